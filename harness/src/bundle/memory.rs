//! Guest memory out of an ELF core, where its PT_LOADs say at which physical addresses it was.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use object::elf::{FileHeader64, PT_LOAD};
use object::read::ReadCache;
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, ReadRef};
use rustix::fs::{SeekFrom, seek};
use trapline_vmm::memory::ram_ranges;
use trapline_vmm::state::MemorySource;

/// The physical address of a PT_LOAD that has none (see [`vmcore`](crate::vmcore)).
const NO_ADDRESS: u64 = u64::MAX;

/// A stretch of guest memory in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    gpa: u64,
    len: u64,
    /// Where its bytes are.
    offset: u64,
}

impl Piece {
    fn end(&self) -> u64 {
        self.gpa + self.len
    }
}

/// The memory of a machine, in a core.
#[derive(Debug)]
pub struct CoreMemory {
    file: File,
    /// What is not zero, ascending.
    pieces: Vec<Piece>,
}

impl CoreMemory {
    /// Reads where memory is, for a machine that has `size` bytes of it; all of it must be there.
    ///
    /// # Errors
    /// What is wrong with the file, in words.
    pub fn read(file: File, size: u64) -> Result<Self, String> {
        let unreadable = |error: io::Error| error.to_string();
        let there = file.metadata().map_err(unreadable)?;
        if !there.is_file() {
            return Err("it is no file".to_owned());
        }
        let loads = loads(&file, there.len())?;
        let mut pieces = Vec::new();
        for (start, len) in ram_ranges(size) {
            pieces.extend(cover(&loads, start, len)?);
        }
        let pieces = pieces.into_iter().flat_map(|piece| without_holes(&file, piece)).collect();
        Ok(Self { file, pieces })
    }
}

impl MemorySource for CoreMemory {
    fn ranges(&self) -> Vec<(u64, u64)> {
        self.pieces.iter().map(|piece| (piece.gpa, piece.len)).collect()
    }

    fn read(&self, gpa: u64, into: &mut [u8]) -> io::Result<()> {
        let after = self.pieces.partition_point(|piece| piece.gpa <= gpa);
        let piece = after.checked_sub(1).map(|at| self.pieces[at]);
        let piece = piece.filter(|piece| piece.end().checked_sub(gpa).is_some_and(|left| left >= into.len() as u64));
        let piece = piece.ok_or_else(|| io::Error::other("the core has nothing there"))?;
        self.file.read_exact_at(into, piece.offset + (gpa - piece.gpa))
    }
}

/// Every PT_LOAD with a physical address, by that; of several at one address the longest first.
fn loads(file: &File, size: u64) -> Result<Vec<Piece>, String> {
    let cache = ReadCache::new(file);
    let magic: &[u8] = (&cache).read_bytes_at(0, 8).unwrap_or_default();
    if magic == b"KDUMP   " || magic == b"makedump" {
        return Err("it is a compressed core, and memory is read from ELF cores only".to_owned());
    }
    let damaged = |error: object::Error| format!("it is no ELF core, or damaged: {error}");
    let header = FileHeader64::<Endianness>::parse(&cache).map_err(damaged)?;
    let endian = header.endian().map_err(damaged)?;
    let headers = header.program_headers(endian, &cache).map_err(damaged)?;
    let mut loads = Vec::new();
    for load in headers.iter().filter(|load| load.p_type(endian) == PT_LOAD) {
        let (gpa, offset, len) = (load.p_paddr(endian), load.p_offset(endian), load.p_filesz(endian));
        if gpa == NO_ADDRESS || len == 0 {
            continue;
        }
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(format!("it is cut off: memory at {gpa:#x} would end behind its {size} bytes"));
        }
        if gpa.checked_add(len).is_none() {
            return Err(format!("it has {len:#x} bytes of memory at {gpa:#x}, which no machine has"));
        }
        loads.push(Piece { gpa, len, offset });
    }
    loads.sort_by_key(|load| (load.gpa, std::cmp::Reverse(load.len)));
    Ok(loads)
}

/// The pieces of the file that are the memory from `start` on, each byte once.
fn cover(loads: &[Piece], start: u64, len: u64) -> Result<Vec<Piece>, String> {
    let (mut at, end) = (start, start + len);
    let mut pieces = Vec::new();
    for load in loads.iter().filter(|load| load.gpa < end && load.end() > start) {
        if load.gpa > at {
            break;
        }
        let upto = load.end().min(end);
        if upto > at {
            pieces.push(Piece { gpa: at, len: upto - at, offset: load.offset + (at - load.gpa) });
            at = upto;
        }
    }
    match at {
        at if at < end => Err(format!("it lacks the memory at {at:#x}, which the machine has up to {end:#x}")),
        _ => Ok(pieces),
    }
}

/// The parts of a piece that are no holes in the file. A file system that does not say has none.
fn without_holes(file: &File, piece: Piece) -> Vec<Piece> {
    let end = piece.offset + piece.len;
    let part = |from: u64, to: u64| Piece { gpa: piece.gpa + (from - piece.offset), len: to - from, offset: from };
    let mut parts = Vec::new();
    let mut at = piece.offset;
    while at < end {
        let from = match seek(file, SeekFrom::Data(at)) {
            Ok(from) => from.max(at).min(end),
            Err(rustix::io::Errno::NXIO) => end,
            Err(_) => at,
        };
        if from == end {
            break;
        }
        let to = seek(file, SeekFrom::Hole(from)).map_or(end, |to| to.clamp(from, end));
        let to = if to == from { end } else { to };
        parts.push(part(from, to));
        at = to;
    }
    parts
}
