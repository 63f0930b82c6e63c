//! Files that are there whole or not at all.
//!
//! What is written for others (a report, a core) goes into a temporary file beside the place where it is to be, and is
//! renamed when it is complete: a reader sees the old file or the new one, and a full disk leaves nothing behind.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::TempPath;
use thiserror::Error;

/// What a new file may be used for, less the umask.
const MODE: u32 = 0o666;

/// A file could not be written. What was under its name before is still there.
#[derive(Debug, Error)]
#[error("cannot write {}: {}", .path.display(), advice(.source))]
pub struct WriteError {
    /// The file that was wanted.
    pub path: PathBuf,
    /// What stood in the way.
    #[source]
    pub source: io::Error,
}

/// Why, and what to do.
fn advice(error: &io::Error) -> String {
    use io::ErrorKind::*;
    match error.kind() {
        StorageFull => "the disk is full: make room, or name another directory".to_owned(),
        QuotaExceeded => "the disk quota is used up: make room, or name another directory".to_owned(),
        ReadOnlyFilesystem => "the file system is read-only: name another directory".to_owned(),
        PermissionDenied => "no permission to write there: name another directory".to_owned(),
        NotFound => "its directory does not exist: make it first".to_owned(),
        NotADirectory => "what should be its directory is a file: name another place".to_owned(),
        AlreadyExists => "there is a file of that name, which is no directory: name another".to_owned(),
        IsADirectory => "that is a directory: name a file in it".to_owned(),
        _ => error.to_string(),
    }
}

/// Writes a file by `fill`, which appears under its name only if `fill` succeeds. See [`AtomicFile`].
pub fn write_atomically(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), WriteError> {
    let mut pending = AtomicFile::create(path)?;
    let written = (|| {
        let mut out = BufWriter::new(pending.file());
        fill(&mut out)?;
        out.flush()
    })();
    match written {
        Ok(()) => pending.commit(),
        Err(source) => Err(WriteError { path: path.to_owned(), source }),
    }
}

/// A file that is being written. It gets its name by [`AtomicFile::commit`]; dropped before that, it is gone.
///
/// Its directory must exist. A symbolic link is followed. What is no regular file (a pipe, `/dev/stdout`) cannot be
/// replaced by one: it is written to as it is.
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    /// As the caller named it.
    path: PathBuf,
    /// The temporary name, and the one that it is to have.
    rename: Option<(TempPath, PathBuf)>,
}

impl AtomicFile {
    /// Opens a temporary file in the directory of `path`.
    pub fn create(path: &Path) -> Result<Self, WriteError> {
        Self::open(path).map_err(|source| WriteError { path: path.to_owned(), source })
    }

    fn open(path: &Path) -> io::Result<Self> {
        let (meant, there) = match fs::metadata(path) {
            Ok(there) => (fs::canonicalize(path)?, Some(there)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => (path.to_owned(), None),
            Err(error) => return Err(error),
        };
        match there {
            Some(there) if there.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
            Some(there) if !there.is_file() => {
                let file = OpenOptions::new().write(true).open(path)?;
                return Ok(Self { file, path: path.to_owned(), rename: None });
            }
            _ => {}
        }
        let directory = match meant.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            Some(_) => Path::new("."),
            None => return Err(io::ErrorKind::IsADirectory.into()),
        };
        let (file, temporary) = tempfile::Builder::new()
            .prefix(".trapline-")
            .suffix(".part")
            .permissions(Permissions::from_mode(MODE))
            .tempfile_in(directory)?
            .into_parts();
        Ok(Self { file, path: path.to_owned(), rename: Some((temporary, meant)) })
    }

    /// What is written to.
    pub fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// Gives it its name. What is in the caller's buffers is not in the file: flush them first.
    pub fn commit(self) -> Result<(), WriteError> {
        let Some((temporary, meant)) = self.rename else { return Ok(()) };
        temporary.persist(meant).map_err(|error| WriteError { path: self.path, source: error.error })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_failure_leaves_what_was_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report.json");
        write_atomically(&path, |out| out.write_all(b"first")).unwrap();
        let error = write_atomically(&path, |out| {
            out.write_all(&[b'x'; 100_000])?;
            Err(io::ErrorKind::StorageFull.into())
        })
        .unwrap_err();
        assert!(error.to_string().contains("report.json: the disk is full: make room"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"first");
        assert_eq!(names(directory.path()), ["report.json"]);
    }

    #[test]
    fn it_has_its_name_only_when_complete() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("core");
        let mut pending = AtomicFile::create(&path).unwrap();
        pending.file().write_all(b"half").unwrap();
        assert!(!path.exists());
        pending.commit().unwrap();
        assert_eq!(names(directory.path()), ["core"]);
        drop(AtomicFile::create(&path).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"half");
        assert_eq!(names(directory.path()), ["core"]);
    }

    #[test]
    fn links_are_followed_and_devices_stay() {
        let directory = tempfile::tempdir().unwrap();
        let (target, link) = (directory.path().join("real"), directory.path().join("link"));
        fs::write(&target, "old").unwrap();
        symlink(&target, &link).unwrap();
        write_atomically(&link, |out| out.write_all(b"new")).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read(&target).unwrap(), b"new");

        let device = directory.path().join("null");
        symlink("/dev/null", &device).unwrap();
        write_atomically(&device, |out| out.write_all(b"gone")).unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
        let full = directory.path().join("full");
        symlink("/dev/full", &full).unwrap();
        let error = write_atomically(&full, |out| out.write_all(b"no room")).unwrap_err();
        assert!(error.to_string().ends_with("full: the disk is full: make room, or name another directory"), "{error}");
    }

    #[test]
    fn places_that_cannot_be_are_told_in_a_line() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("file"), "").unwrap();
        for (place, says) in [("no/report.json", "make it first"), ("file/x", "is a file"), ("", "is a directory")] {
            let error = write_atomically(&directory.path().join(place), |_| Ok(())).unwrap_err().to_string();
            assert!(error.contains(says) && !error.contains('\n'), "{error}");
        }
    }
}
