//! A core file under way. It gets its name when it is whole (see [`AtomicFile`]).

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::files::{AtomicFile, WriteError};

/// Why there is no core. Nothing is left of it, and what was at its path before is still there.
#[derive(Debug, Error)]
pub enum CoreError {
    /// There was no room.
    #[error(
        "no room for the core {}: {source}; it takes up to {} MiB, less what of the guest's memory is zero",
        path.display(),
        needed.div_ceil(1 << 20)
    )]
    Full {
        /// The wanted file.
        path: PathBuf,
        /// Bytes it takes at most.
        needed: u64,
        /// What the system said.
        source: io::Error,
    },
    /// Anything else.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// A file of which any part can be written at any time.
pub(super) struct CoreFile {
    file: AtomicFile,
    path: PathBuf,
    needed: u64,
}

impl CoreFile {
    /// For a core at `path` that takes at most `needed` bytes.
    pub(super) fn create(path: &Path, needed: u64) -> Result<Self, CoreError> {
        Ok(Self { file: AtomicFile::create(path)?, path: path.to_path_buf(), needed })
    }

    /// Writes `bytes` at `offset`. What is never written reads as zeros.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), CoreError> {
        let written = self.file.file().write_all_at(bytes, offset);
        written.map_err(|error| self.error(error))
    }

    /// Makes the file `len` bytes long and gives it its name.
    pub(super) fn keep(mut self, len: u64) -> Result<u64, CoreError> {
        self.file.file().set_len(len).map_err(|error| self.error(error))?;
        self.file.commit()?;
        Ok(len)
    }

    fn error(&self, source: io::Error) -> CoreError {
        let path = self.path.clone();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                CoreError::Full { path, needed: self.needed, source }
            }
            _ => WriteError { path, source }.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_full_disk_is_one_line_that_says_how_much_it_takes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmcore");
        let mut core = CoreFile::create(&path, 512 << 20).unwrap();
        // A file on which every write says that the disk is full.
        *core.file.file() = File::options().write(true).open("/dev/full").unwrap();
        let error = core.write(0, b"bytes").unwrap_err();
        assert!(matches!(error, CoreError::Full { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("vmcore: No space left") && text.contains("up to 512 MiB"), "{text}");
        drop(core);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the temporary file is gone");
    }
}
