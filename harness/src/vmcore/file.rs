//! A core file under way: a temporary file beside the wanted one, renamed when it is whole.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;
use thiserror::Error;

/// Why there is no core. Nothing is left of it, and what was at its path before is still there.
#[derive(Debug, Error)]
pub enum CoreError {
    /// Its folder is not there, or may not be written to.
    #[error("cannot make a file for the core in {folder}: {source}; name a folder that exists and may be written to")]
    Create {
        /// The folder.
        folder: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There was no room.
    #[error(
        "no room for the core {path}: {source}; it needs up to {} MiB there (memory that is zero needs none)",
        needed.div_ceil(1 << 20)
    )]
    Full {
        /// The wanted file.
        path: PathBuf,
        /// Bytes it takes if no page is zero or compressible.
        needed: u64,
        /// What the system said.
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot write the core {path}: {source}")]
    Write {
        /// The wanted file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A file that is not there under its name yet, and that goes away unless it is [kept](Self::keep).
pub(super) struct CoreFile {
    temporary: NamedTempFile,
    path: PathBuf,
    needed: u64,
}

impl CoreFile {
    /// For a core at `path` that takes at most `needed` bytes.
    pub(super) fn create(path: &Path, needed: u64) -> Result<Self, CoreError> {
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        // As any file of the report: who collects them may be another user. The umask applies.
        let temporary = tempfile::Builder::new()
            .prefix(".vmcore-")
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(folder)
            .map_err(|source| CoreError::Create { folder: folder.to_path_buf(), source })?;
        Ok(Self { temporary, path: path.to_path_buf(), needed })
    }

    /// Writes `bytes` at `offset`. What is never written reads as zeros.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), CoreError> {
        self.file().write_all_at(bytes, offset).map_err(|source| self.error(source))
    }

    /// Makes the file `len` bytes long and gives it its name.
    pub(super) fn keep(self, len: u64) -> Result<u64, CoreError> {
        self.file().set_len(len).map_err(|source| self.error(source))?;
        let Self { temporary, path, .. } = self;
        match temporary.persist(&path) {
            Ok(_) => Ok(len),
            Err(failed) => Err(CoreError::Write { path, source: failed.error }),
        }
    }

    fn file(&self) -> &File {
        self.temporary.as_file()
    }

    fn error(&self, source: io::Error) -> CoreError {
        let path = self.path.clone();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                CoreError::Full { path, needed: self.needed, source }
            }
            _ => CoreError::Write { path, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_one_line_that_says_how_much_it_takes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmcore");
        let mut core = CoreFile::create(&path, 512 << 20).unwrap();
        // A file on which every write says that the disk is full.
        *core.temporary.as_file_mut() = File::options().write(true).open("/dev/full").unwrap();
        let error = core.write(0, b"bytes").unwrap_err();
        assert!(matches!(error, CoreError::Full { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("vmcore: No space left") && text.contains("up to 512 MiB"), "{text}");
        drop(core);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the temporary file is gone");
    }
}
