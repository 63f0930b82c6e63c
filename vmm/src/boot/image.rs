//! A kernel or initrd as it comes in: bytes in memory or a file, read in pieces so that a vmlinux with hundreds of
//! MiB of debug information costs no more than what is loaded of it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::error::BootError;

/// Bytes to boot from.
#[derive(Clone, Copy, Debug)]
pub enum Image<'a> {
    /// Held in memory.
    Bytes(&'a [u8]),
    /// An open regular file. Its position is not used and changes.
    File(&'a File),
}

impl<'a> From<&'a [u8]> for Image<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::Bytes(bytes)
    }
}

impl<'a> From<&'a Vec<u8>> for Image<'a> {
    fn from(bytes: &'a Vec<u8>) -> Self {
        Self::Bytes(bytes)
    }
}

impl<'a> From<&'a File> for Image<'a> {
    fn from(file: &'a File) -> Self {
        Self::File(file)
    }
}

impl<'a> Image<'a> {
    /// Length in bytes.
    pub fn len(&self) -> io::Result<u64> {
        match self {
            Self::Bytes(bytes) => Ok(bytes.len() as u64),
            Self::File(file) => Ok(file.metadata()?.len()),
        }
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Up to `len` bytes from `offset`; fewer where the image ends.
    pub(super) fn read_up_to(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let left = self.len()?.saturating_sub(offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(len);
        let mut bytes = vec![0; len];
        match self {
            Self::Bytes(all) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(all.len());
                bytes.copy_from_slice(&all[start..start + len]);
            }
            Self::File(file) => file.read_exact_at(&mut bytes, offset)?,
        }
        Ok(bytes)
    }

    /// Copies `len` bytes from `offset` to guest-physical address `to`. `what` is "kernel" or "initrd".
    pub(super) fn copy_to(
        &self,
        offset: u64,
        len: u64,
        mem: &GuestMemoryMmap,
        to: u64,
        what: &'static str,
    ) -> Result<(), BootError> {
        let read = |source: io::Error| BootError::Read { what, source };
        let end = || read(io::ErrorKind::UnexpectedEof.into());
        if offset.checked_add(len).is_none_or(|last| self.len().map_or(true, |available| last > available)) {
            return Err(end());
        }
        let count = usize::try_from(len).map_err(|_| end())?;
        let copied = match self {
            Self::Bytes(all) => {
                let start = usize::try_from(offset).map_err(|_| end())?;
                let mut part = all.get(start..).ok_or_else(end)?;
                mem.read_exact_volatile_from(GuestAddress(to), &mut part, count)
            }
            Self::File(file) => {
                let mut file = *file;
                file.seek(SeekFrom::Start(offset)).map_err(read)?;
                mem.read_exact_volatile_from(GuestAddress(to), &mut file, count)
            }
        };
        copied.map_err(|e| read(io::Error::other(e)))
    }

    /// A reader of its own position, for the `object` crate and linux-loader.
    pub(super) fn reader(self) -> ImageReader<'a> {
        ImageReader { image: self, position: 0 }
    }
}

/// Reads and seeks in an [`Image`].
#[derive(Debug)]
pub(super) struct ImageReader<'a> {
    image: Image<'a>,
    position: u64,
}

impl Read for ImageReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let bytes = self.image.read_up_to(self.position, buf.len())?;
        buf[..bytes.len()].copy_from_slice(&bytes);
        self.position += bytes.len() as u64;
        Ok(bytes.len())
    }
}

impl Seek for ImageReader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let (base, offset) = match to {
            SeekFrom::Start(offset) => (offset, 0),
            SeekFrom::End(offset) => (self.image.len()?, offset),
            SeekFrom::Current(offset) => (self.position, offset),
        };
        self.position = base.checked_add_signed(offset).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}
