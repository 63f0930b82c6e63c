//! The guest's modules: which are loaded, where, and what symbols they have.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::dwarf::Dwarf;
use super::table::Table;
use super::{Memory, Symbols};

/// A module whose symbols are known. Addresses are run-time.
#[derive(Debug)]
pub(super) struct Module {
    pub(super) name: Arc<str>,
    pub(super) table: Table,
    pub(super) dwarf: Option<Dwarf>,
    ranges: Vec<Range<u64>>,
}

impl Module {
    /// A file may have `-` where the kernel has `_`.
    pub(super) fn is_called(&self, name: &str) -> bool {
        same_name(&self.name, name)
    }
}

fn same_name(a: &str, b: &str) -> bool {
    let plain = |byte: u8| if byte == b'-' { b'_' } else { byte };
    a.bytes().map(plain).eq(b.bytes().map(plain))
}

/// Whether a file is that of the module `name`, by the file's name: `NAME.ko`, `NAME.ko.debug`.
pub(super) fn is_file_of(path: &Path, name: &str) -> bool {
    let file = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let stem = file.split_once(".ko").map_or(file, |(stem, _)| stem);
    same_name(stem, name)
}

impl Symbols {
    /// The module whose memory has this address.
    pub(super) fn module_at(&self, address: u64) -> Option<&Module> {
        self.modules.iter().find(|module| module.ranges.iter().any(|range| range.contains(&address)))
    }
}
