//! Disks: raw images (virtio 1.2, 5.2).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::MAX_DISKS;
use super::core::{Backend, QUEUE_SIZE};
use super::request::{Fault, Request};

/// The unit of a disk's size and of its requests, in bytes.
const SECTOR: u64 = 512;

/// Bytes that go between file and guest memory at once.
const PIECE: u64 = 128 << 10;

/// Bytes of a request's header: type, reserved, sector.
const HEADER: u64 = 16;

const SERIAL_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// A disk to attach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// A raw image: a regular file or a block device, of whole sectors of 512 bytes.
    pub path: PathBuf,
    /// The guest may not write to it.
    pub read_only: bool,
}

/// A disk that cannot be attached.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The file cannot be opened.
    #[error("cannot open the disk image {}: {error}; {advice}", path.display())]
    Open {
        /// Which one.
        path: PathBuf,
        /// What the host says.
        error: io::Error,
        /// What to do.
        advice: &'static str,
    },
    /// It is no file that can be a disk.
    #[error("the disk image {} is {what}; give a raw image or a block device", path.display())]
    NotADisk {
        /// Which one.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// It has no sectors, or a part of one at its end.
    #[error(
        "the disk image {} has {size} bytes, which is not a whole number of {SECTOR}-byte sectors and at least one; \
         lengthen it with: truncate -s {} FILE", path.display(), size.next_multiple_of(SECTOR).max(SECTOR)
    )]
    Size {
        /// Which one.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Somebody else has it.
    #[error("the disk image {} is in use by another run or disk; {advice}", path.display())]
    InUse {
        /// Which one.
        path: PathBuf,
        /// What to do.
        advice: &'static str,
    },
    /// There is no place for that many.
    #[error("{count} disks are more than the {MAX_DISKS} that a machine has room for; give fewer")]
    TooMany {
        /// How many were asked for.
        count: usize,
    },
}

/// An open disk image. Others that respect `flock` are kept from writing to it, and from it if it is written to.
#[derive(Debug)]
pub struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
    serial: [u8; SERIAL_BYTES],
    /// Between file and guest memory.
    buffer: Vec<u8>,
}

impl Disk {
    /// Opens what `configs` name, in this order.
    pub fn open_all(configs: &[DiskConfig]) -> Result<Vec<Self>, DiskError> {
        if configs.len() > MAX_DISKS {
            return Err(DiskError::TooMany { count: configs.len() });
        }
        configs.iter().map(Self::open).collect()
    }

    /// Opens an image and locks it.
    pub fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        let DiskConfig { path, read_only } = config;
        let failed =
            |error: io::Error| DiskError::Open { path: path.clone(), advice: advice(&error, *read_only), error };
        // Before it is opened: a FIFO would keep us waiting.
        let kind = fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let what = if kind.is_dir() { "a directory" } else { "neither a file nor a block device" };
            return Err(DiskError::NotADisk { path: path.clone(), what });
        }
        let mut file = OpenOptions::new().read(true).write(!read_only).open(path).map_err(failed)?;
        lock(&file, path, *read_only)?;
        let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(DiskError::Size { path: path.clone(), size });
        }
        let (sectors, serial) = (size / SECTOR, serial(path));
        Ok(Self { file, sectors, read_only: *read_only, serial, buffer: Vec::new() })
    }

    /// Serves what the header asks for; the status, and how many bytes of data were written to the guest.
    fn obey(&mut self, request: &Request<'_>, header: [u8; HEADER as usize]) -> Result<(u32, u64), Fault> {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let (to_guest, from_guest) = (request.writable() - 1, request.readable() - HEADER);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => match self.offset(sector, to_guest) {
                Some(offset) => self.read(request, offset, to_guest),
                None => Ok((VIRTIO_BLK_S_IOERR, 0)),
            },
            VIRTIO_BLK_T_OUT => match self.offset(sector, from_guest).filter(|_| !self.read_only) {
                Some(offset) => self.write(request, offset, from_guest),
                None => Ok((VIRTIO_BLK_S_IOERR, 0)),
            },
            VIRTIO_BLK_T_FLUSH => Ok((status(self.file.sync_data()), 0)),
            VIRTIO_BLK_T_GET_ID if to_guest >= SERIAL_BYTES as u64 => {
                request.write(0, &self.serial)?;
                Ok((VIRTIO_BLK_S_OK, SERIAL_BYTES as u64))
            }
            _ => Ok((VIRTIO_BLK_S_UNSUPP, 0)),
        }
    }

    /// Where in the file `len` bytes from `sector` on are, if the disk has them and they are whole sectors.
    fn offset(&self, sector: u64, len: u64) -> Option<u64> {
        let end = sector.checked_add(len / SECTOR)?;
        let inside = len.is_multiple_of(SECTOR) && end <= self.sectors;
        sector.checked_mul(SECTOR).filter(|_| inside)
    }

    fn read(&mut self, request: &Request<'_>, offset: u64, len: u64) -> Result<(u32, u64), Fault> {
        let mut done = 0;
        while done < len {
            self.buffer.resize((len - done).min(PIECE) as usize, 0);
            if let Err(error) = self.file.read_exact_at(&mut self.buffer, offset + done) {
                tracing::warn!(%error, offset = offset + done, "a disk image cannot be read");
                return Ok((VIRTIO_BLK_S_IOERR, done));
            }
            request.write(done, &self.buffer)?;
            done += self.buffer.len() as u64;
        }
        Ok((VIRTIO_BLK_S_OK, done))
    }

    fn write(&mut self, request: &Request<'_>, offset: u64, len: u64) -> Result<(u32, u64), Fault> {
        let mut done = 0;
        while done < len {
            self.buffer.resize((len - done).min(PIECE) as usize, 0);
            request.read(HEADER + done, &mut self.buffer)?;
            if let Err(error) = self.file.write_all_at(&self.buffer, offset + done) {
                tracing::warn!(%error, offset = offset + done, "a disk image cannot be written");
                return Ok((VIRTIO_BLK_S_IOERR, 0));
            }
            done += self.buffer.len() as u64;
        }
        // Who cannot ask for a flush expects none to be needed (virtio 1.2, 5.2.6.2).
        let flushed = if request.has_feature(VIRTIO_BLK_F_FLUSH) { Ok(()) } else { self.file.sync_data() };
        Ok((status(flushed), 0))
    }
}

impl Backend for Disk {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let read_only = if self.read_only { 1 << VIRTIO_BLK_F_RO } else { 0 };
        1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_FLUSH | read_only
    }

    fn config(&self) -> Vec<u8> {
        // Capacity in sectors, no size_max, seg_max: a queue's worth, less header and status. Nothing else of it means
        // anything without its feature.
        let seg_max = u32::from(QUEUE_SIZE) - 2;
        [&self.sectors.to_le_bytes()[..], &[0; 4], &seg_max.to_le_bytes()].concat()
    }

    fn serve(&mut self, request: &Request<'_>) -> Result<u32, Fault> {
        let mut header = [0; HEADER as usize];
        request.read(0, &mut header)?;
        let Some(last) = request.writable().checked_sub(1) else {
            return Err(Fault::Broken("a disk request has no room for its status"));
        };
        let (status, data) = self.obey(request, header)?;
        request.write(last, &[status as u8])?;
        // What lies between data and status was not written, and then the status does not count either.
        let written = if data == last { data + 1 } else { data };
        Ok(written.try_into().unwrap_or(u32::MAX))
    }
}

fn status(result: io::Result<()>) -> u32 {
    match result {
        Ok(()) => VIRTIO_BLK_S_OK,
        Err(error) => {
            tracing::warn!(%error, "a disk image cannot be flushed");
            VIRTIO_BLK_S_IOERR
        }
    }
}

fn advice(error: &io::Error, read_only: bool) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem if !read_only => {
            "get permission to write to it, or attach it read-only: --disk FILE,ro"
        }
        io::ErrorKind::PermissionDenied => "get permission to read it",
        _ => "check the path",
    }
}

/// One writer, or any number of readers.
fn lock(file: &File, path: &Path, read_only: bool) -> Result<(), DiskError> {
    let (how, advice) = match read_only {
        true => (FlockOperation::NonBlockingLockShared, "it is written to there: end that, or attach a copy"),
        false => (FlockOperation::NonBlockingLockExclusive, "end that, attach a copy, or attach both read-only"),
    };
    match flock(file, how) {
        Err(Errno::WOULDBLOCK) => Err(DiskError::InUse { path: path.to_owned(), advice }),
        // Some file systems cannot lock at all.
        Err(error) => {
            tracing::debug!(%error, path = %path.display(), "a disk image cannot be locked");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

/// What the guest sees as the disk's serial number: the beginning of the file's name.
fn serial(path: &Path) -> [u8; SERIAL_BYTES] {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mut serial = [0; SERIAL_BYTES];
    for (byte, from) in serial.iter_mut().zip(name.bytes().filter(u8::is_ascii_graphic)) {
        *byte = from;
    }
    serial
}
