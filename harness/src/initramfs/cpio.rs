//! The archive: what is in it, by name, and its "newc" form (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Names are bytes without a leading `/`. A directory's name sorts before the names of what is in it, so writing in
//! order gives the kernel each directory before its entries.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::InitramfsError;

/// Bits of a mode that say what kind of file it is.
pub(super) const S_IFMT: u32 = 0o170_000;
pub(super) const S_IFCHR: u32 = 0o020_000;
pub(super) const S_IFDIR: u32 = 0o040_000;
pub(super) const S_IFREG: u32 = 0o100_000;
pub(super) const S_IFLNK: u32 = 0o120_000;

/// The kernel takes names and targets of symbolic links of PATH_MAX bytes, the NUL among them.
const MAX_NAME: usize = 4095;
/// As many symbolic links as the kernel follows in one path.
const MAX_LINKS: usize = 40;

const TRAILER: &[u8] = b"TRAILER!!!";

/// What a file holds.
#[derive(Debug)]
pub(super) enum Contents {
    /// Nothing: a directory, a device, a FIFO.
    None,
    /// What was made here, or a symbolic link's target.
    Bytes(Vec<u8>),
    /// A file of this machine with its size, read when the archive is written.
    Host { path: PathBuf, size: u64 },
}

/// One file, of whatever kind.
#[derive(Debug)]
pub(super) struct Node {
    /// With the bits of [`S_IFMT`].
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Major and minor number of a device.
    pub(super) device: (u32, u32),
    pub(super) contents: Contents,
    /// The same for all names of one file with several (any two numbers will do: those of the host's file system).
    pub(super) shared: Option<(u64, u64)>,
}

impl Node {
    fn new(mode: u32, contents: Contents) -> Self {
        Self { mode, uid: 0, gid: 0, device: (0, 0), contents, shared: None }
    }

    pub(super) fn directory(permissions: u32) -> Self {
        Self::new(S_IFDIR | permissions, Contents::None)
    }

    pub(super) fn character(permissions: u32, major: u32, minor: u32) -> Self {
        Self { device: (major, minor), ..Self::new(S_IFCHR | permissions, Contents::None) }
    }

    pub(super) fn bytes(bytes: Vec<u8>, permissions: u32) -> Self {
        Self::new(S_IFREG | permissions, Contents::Bytes(bytes))
    }

    /// A regular file of this machine, symbolic links followed.
    pub(super) fn host_file(path: &Path, permissions: u32) -> Result<Self, InitramfsError> {
        let metadata = fs::metadata(path).map_err(|source| InitramfsError::Read { path: path.into(), source })?;
        if !metadata.is_file() {
            return Err(InitramfsError::NotAFile { path: path.into() });
        }
        let contents = Contents::host(path, metadata.len())?;
        Ok(Self::new(S_IFREG | permissions, contents))
    }

    pub(super) fn is(&self, kind: u32) -> bool {
        self.mode & S_IFMT == kind
    }

    fn link(&self) -> Option<&[u8]> {
        match &self.contents {
            Contents::Bytes(target) if self.is(S_IFLNK) => Some(target),
            _ => None,
        }
    }
}

impl Contents {
    /// A file of this machine of `size` bytes.
    pub(super) fn host(path: &Path, size: u64) -> Result<Self, InitramfsError> {
        if u32::try_from(size).is_err() {
            return Err(InitramfsError::TooLarge { path: path.into(), size });
        }
        Ok(Self::Host { path: path.into(), size })
    }

    fn len(&self) -> u64 {
        match self {
            Self::None => 0,
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Host { size, .. } => *size,
        }
    }
}

/// The files of a guest, by name.
#[derive(Debug, Default)]
pub(super) struct Archive {
    nodes: BTreeMap<Vec<u8>, Node>,
}

impl Archive {
    /// The file of that name in the guest, symbolic links followed, with its name without any.
    pub(super) fn find(&self, path: &[u8]) -> Option<(Vec<u8>, &Node)> {
        let name = self.resolve(path).ok()?;
        let node = self.nodes.get(&name)?;
        Some((name, node))
    }

    /// Puts a file where the guest will find it by `path`, in place of what is there; directories that it needs are made.
    pub(super) fn put(&mut self, path: &[u8], node: Node) -> Result<(), InitramfsError> {
        let (parent, last) = split(path);
        let mut name = self.resolve(parent)?;
        self.make_directory(&name)?;
        if !name.is_empty() {
            name.push(b'/');
        }
        name.extend_from_slice(last);
        self.insert(name, node)
    }

    /// [`put`](Self::put), unless there is something already.
    pub(super) fn put_if_absent(&mut self, path: &[u8], node: Node) -> Result<(), InitramfsError> {
        match self.find(path) {
            Some(_) => Ok(()),
            None => self.put(path, node),
        }
    }

    /// Puts a file under just this name; its directory must come from elsewhere.
    pub(super) fn insert(&mut self, name: Vec<u8>, node: Node) -> Result<(), InitramfsError> {
        let longest = name.len().max(node.link().map_or(0, <[u8]>::len));
        if longest > MAX_NAME {
            return Err(InitramfsError::NameTooLong { name: lossy(&name), max: MAX_NAME });
        }
        self.nodes.insert(name, node);
        Ok(())
    }

    pub(super) fn remove(&mut self, name: &[u8]) {
        self.nodes.remove(name);
    }

    fn make_directory(&mut self, name: &[u8]) -> Result<(), InitramfsError> {
        let ends = (0..=name.len()).filter(|&at| at > 0 && name.get(at).is_none_or(|&byte| byte == b'/'));
        for end in ends {
            let directory = &name[..end];
            match self.nodes.get(directory) {
                Some(node) if node.is(S_IFDIR) => {}
                Some(_) => return Err(no_place(directory, "there is a file of that name where a directory is needed")),
                None => self.insert(directory.to_vec(), Node::directory(0o755))?,
            }
        }
        Ok(())
    }

    /// The name that a path comes to when the symbolic links of the archive are followed; what is not there has none.
    fn resolve(&self, path: &[u8]) -> Result<Vec<u8>, InitramfsError> {
        let mut name: Vec<u8> = Vec::new();
        // What is still to go, the next component last.
        let mut rest: Vec<Vec<u8>> = components(path).rev().map(<[u8]>::to_vec).collect();
        let mut links = 0;
        while let Some(component) = rest.pop() {
            if component == b".." {
                let parent = split(&name).0.len();
                name.truncate(parent);
                continue;
            }
            let parent = name.len();
            if !name.is_empty() {
                name.push(b'/');
            }
            name.extend_from_slice(&component);
            if let Some(target) = self.nodes.get(&name).and_then(Node::link) {
                links += 1;
                if links > MAX_LINKS {
                    return Err(no_place(path, "its symbolic links go in a circle"));
                }
                rest.extend(components(target).rev().map(<[u8]>::to_vec));
                name.truncate(if target.first() == Some(&b'/') { 0 } else { parent });
            }
        }
        Ok(name)
    }

    /// Writes all of it; returns the number of bytes.
    pub(super) fn write_to(&self, out: &mut dyn Write) -> Result<u64, InitramfsError> {
        let mut names: HashMap<(u64, u64), Names> = HashMap::new();
        for shared in self.nodes.values().filter_map(|node| node.shared) {
            names.entry(shared).or_default().all += 1;
        }
        let mut out = Counted { out, written: 0 };
        let mut inode = 0;
        let mut next_inode = || {
            inode += 1;
            inode
        };
        for (name, node) in &self.nodes {
            let mut header = Header::of(node);
            let mut contents = &node.contents;
            if let Some(names) = node.shared.and_then(|shared| names.get_mut(&shared)) {
                names.written += 1;
                header.links = names.all;
                header.inode = *names.inode.get_or_insert_with(&mut next_inode);
                // Readers expect the contents with the last of the names.
                if names.written < names.all {
                    contents = &Contents::None;
                }
            } else {
                header.inode = next_inode();
            }
            out.entry(&header, name, contents)?;
        }
        out.entry(&Header { links: 1, ..Header::default() }, TRAILER, &Contents::None)?;
        Ok(out.written)
    }
}

/// How many names a file has, how many of them are written, and the number that ties them together.
#[derive(Default)]
struct Names {
    all: u32,
    written: u32,
    inode: Option<u32>,
}

/// The fields of a header that are not 0 for all.
#[derive(Default)]
struct Header {
    inode: u32,
    mode: u32,
    uid: u32,
    gid: u32,
    links: u32,
    device: (u32, u32),
}

impl Header {
    fn of(node: &Node) -> Self {
        let links = if node.is(S_IFDIR) { 2 } else { 1 };
        Self { inode: 0, mode: node.mode, uid: node.uid, gid: node.gid, links, device: node.device }
    }
}

struct Counted<'a> {
    out: &'a mut dyn Write,
    written: u64,
}

impl Counted<'_> {
    fn entry(&mut self, header: &Header, name: &[u8], contents: &Contents) -> Result<(), InitramfsError> {
        // Both were checked when they came in.
        let size = u32::try_from(contents.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        let (major, minor) = header.device;
        let fields = [
            header.inode,
            header.mode,
            header.uid,
            header.gid,
            header.links,
            0, // time
            size,
            0, // device that it is on
            0,
            major,
            minor,
            name_size,
            0, // checksum
        ];
        let mut bytes = b"070701".to_vec();
        for field in fields {
            bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        bytes.extend_from_slice(name);
        bytes.push(0);
        self.write(&bytes)?;
        self.pad()?;
        match contents {
            Contents::None => {}
            Contents::Bytes(bytes) => self.write(bytes)?,
            Contents::Host { path, size } => self.copy(path, *size)?,
        }
        self.pad()
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), InitramfsError> {
        self.out.write_all(bytes).map_err(|source| InitramfsError::Write { source })?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn pad(&mut self) -> Result<(), InitramfsError> {
        let len = self.written.next_multiple_of(4) - self.written;
        self.write(&[0; 3][..len as usize])
    }

    /// `size` bytes of a file, which may have grown since that size was taken.
    fn copy(&mut self, path: &Path, size: u64) -> Result<(), InitramfsError> {
        let read = |source| InitramfsError::Read { path: path.into(), source };
        let mut file = File::open(path).map_err(read)?;
        let mut buffer = vec![0; 1 << 16];
        let mut left = size;
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            match file.read(&mut buffer[..most]) {
                Ok(0) => return Err(InitramfsError::Changed { path: path.into() }),
                Ok(n) => {
                    self.write(&buffer[..n])?;
                    left -= n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(read(error)),
            }
        }
        Ok(())
    }
}

/// The directory that a path is in, without `/` at its end, and its last component.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&[], path),
    }
}

fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".")
}

fn no_place(name: &[u8], problem: &'static str) -> InitramfsError {
    InitramfsError::NoPlace { name: lossy(name), problem }
}

pub(super) fn lossy(name: &[u8]) -> String {
    format!("/{}", String::from_utf8_lossy(name).trim_start_matches('/'))
}
