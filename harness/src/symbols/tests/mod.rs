//! Tests of what is public, over small ELF files that are built with the guests.

mod built;
mod debug_info;
mod hostile;
mod lookup;
mod modules;
mod slide;

use std::io::Write as _;
use std::path::PathBuf;

use super::*;

/// A file with these bytes, gone when it is dropped.
fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file.flush().unwrap();
    file
}

/// The symbols of an ELF kernel with these bytes.
fn symbols_of(kernel: &[u8]) -> Symbols {
    let file = file(kernel);
    Symbols::open(&Sources { kernel: Some(file.path()), ..Sources::default() }).unwrap()
}

/// The symbols in a file that was given with `--symbols`, without a kernel.
fn symbols_in(bytes: &[u8]) -> Result<Symbols, SymbolsError> {
    let file = file(bytes);
    let files: [PathBuf; 1] = [file.path().to_owned()];
    Symbols::open(&Sources { symbols: &files, ..Sources::default() })
}
