//! A directory of this machine, as it is to be the guest's `/`.

use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::InitramfsError;
use super::cpio::{Archive, Contents, Node};

/// Puts all of `dir` into the archive; `notes` hears of what is left out.
pub(super) fn read(dir: &Path, archive: &mut Archive, notes: &mut Vec<String>) -> Result<(), InitramfsError> {
    let metadata = fs::metadata(dir).map_err(|source| InitramfsError::Read { path: dir.into(), source })?;
    if !metadata.is_dir() {
        return Err(InitramfsError::NotADirectory { path: dir.into() });
    }
    let mut reader = Reader {
        archive,
        notes,
        device: metadata.dev(),
        user: rustix::process::geteuid().as_raw(),
        group: rustix::process::getegid().as_raw(),
    };
    // Directories whose entries are to be read, with their names in the guest.
    let mut waiting = vec![(dir.to_path_buf(), Vec::new())];
    while let Some((path, name)) = waiting.pop() {
        let failed = |source| InitramfsError::Read { path: path.clone(), source };
        for entry in fs::read_dir(&path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let path = entry.path();
            let name = match name.as_slice() {
                [] => entry.file_name().as_bytes().to_vec(),
                parent => [parent, b"/", entry.file_name().as_bytes()].concat(),
            };
            if reader.add(&path, &name)? {
                waiting.push((path, name));
            }
        }
    }
    Ok(())
}

struct Reader<'a> {
    archive: &'a mut Archive,
    notes: &'a mut Vec<String>,
    /// The file system that the directory is on.
    device: u64,
    /// Whose files become root's.
    user: u32,
    group: u32,
}

impl Reader<'_> {
    /// Adds one file. Returns whether it is a directory to go on with.
    fn add(&mut self, path: &Path, name: &[u8]) -> Result<bool, InitramfsError> {
        let failed = |source| InitramfsError::Read { path: path.into(), source };
        let metadata = fs::symlink_metadata(path).map_err(failed)?;
        let kind = metadata.file_type();
        let contents = if kind.is_file() {
            // To learn now, not halfway through the archive, that it cannot be read.
            fs::File::open(path).map_err(failed)?;
            Contents::host(path, metadata.len())?
        } else if kind.is_symlink() {
            Contents::Bytes(fs::read_link(path).map_err(failed)?.as_os_str().as_bytes().to_vec())
        } else {
            Contents::None
        };
        let device = match kind.is_char_device() || kind.is_block_device() {
            true => (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev())),
            false => (0, 0),
        };
        let node = Node {
            mode: metadata.mode(),
            uid: if metadata.uid() == self.user { 0 } else { metadata.uid() },
            gid: if metadata.gid() == self.group { 0 } else { metadata.gid() },
            device,
            contents,
            shared: shared(&metadata),
        };
        self.archive.insert(name.to_vec(), node)?;
        let other = kind.is_dir() && metadata.dev() != self.device;
        if other {
            self.notes.push(format!("{} is a mount point: left empty", path.display()));
        }
        Ok(kind.is_dir() && !other)
    }
}

/// What ties the names of a file with several together.
fn shared(metadata: &Metadata) -> Option<(u64, u64)> {
    (!metadata.is_dir() && metadata.nlink() > 1).then(|| (metadata.dev(), metadata.ino()))
}
