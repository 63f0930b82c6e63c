//! ELF32 and ELF64 headers, read through the `object` crate and turned into what loading needs.
//!
//! linux-loader's ELF loader knows ELF64 only, allocates by unchecked header fields and names no field in its errors;
//! all ELF kernels, Multiboot's ELF32 ones included, therefore share this one.

use object::elf::{EM_386, EM_X86_64, ET_DYN, ET_EXEC, FileHeader32, FileHeader64, PT_LOAD, PT_NOTE};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, ReadCache};

use super::Format;
use super::error::{BootError, CORRUPT, CUT_SHORT};
use super::image::{Image, ImageReader};
use super::place::Placement;
use crate::limits::{MAX_NOTE_SEGMENT, MAX_PROGRAM_HEADERS};
use crate::memory::GuestRam;

/// One PT_LOAD segment that has bytes in memory.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) offset: u64,
    pub(super) file_size: u64,
    pub(super) vaddr: u64,
    pub(super) paddr: u64,
    pub(super) mem_size: u64,
}

/// What loading needs to know of an ELF kernel.
#[derive(Clone, Debug)]
pub(super) struct ElfImage {
    /// ELF64, not ELF32.
    pub(super) is_64: bool,
    /// `e_entry`.
    pub(super) entry: u64,
    /// Never empty.
    pub(super) segments: Vec<Segment>,
    /// Descriptor of the Xen note PHYS32_ENTRY.
    pub(super) pvh_entry: Option<u32>,
    /// See [`is_linux`].
    pub(super) is_linux: bool,
}

/// `e_ident[EI_CLASS]` and `[EI_DATA]`.
const CLASS: usize = 4;
const DATA: usize = 5;

/// Owner and type of the PVH note (Xen, public/elfnote.h).
const XEN: &[u8] = b"Xen";
const PHYS32_ENTRY: u32 = 18;

impl ElfImage {
    /// Reads all headers and checks them against the file and each other.
    pub(super) fn parse(image: Image<'_>) -> Result<Self, BootError> {
        let read = |source| BootError::Read { what: "kernel", source };
        let ident = image.read_up_to(0, 16).map_err(read)?;
        if ident.len() < 16 {
            return Err(wrong("e_ident", "the file ends inside it", CUT_SHORT));
        }
        if ident[DATA] != 1 {
            return Err(wrong(
                "e_ident[EI_DATA]",
                format!("{} is not little-endian (1)", ident[DATA]),
                "build the kernel for x86",
            ));
        }
        let cache = ReadCache::new(image.reader());
        match ident[CLASS] {
            1 => parse_class::<FileHeader32<Endianness>>(&cache, image),
            2 => parse_class::<FileHeader64<Endianness>>(&cache, image),
            other => Err(wrong("e_ident[EI_CLASS]", format!("{other} is neither 32-bit (1) nor 64-bit (2)"), CORRUPT)),
        }
    }

    /// Takes the places of all segments.
    pub(super) fn claim(&self, placement: &mut Placement<'_>) -> Result<(), BootError> {
        for (number, segment) in self.segments.iter().enumerate() {
            let part = format!("load segment {number}");
            placement.claim(part, segment.paddr, segment.mem_size)?;
        }
        Ok(())
    }

    /// Copies all segments. BSS is zero already.
    pub(super) fn write(&self, ram: &GuestRam, image: Image<'_>) -> Result<(), BootError> {
        for segment in &self.segments {
            let (offset, size) = (segment.offset, segment.file_size);
            image.copy_to(offset, size, ram.mem(), segment.paddr, "kernel")?;
        }
        Ok(())
    }

    /// From the first to the last byte in guest-physical memory.
    pub(super) fn range(&self) -> std::ops::Range<u64> {
        let starts = self.segments.iter().map(|s| s.paddr);
        let ends = self.segments.iter().map(|s| s.paddr.saturating_add(s.mem_size));
        starts.min().unwrap_or(0)..ends.max().unwrap_or(0)
    }

    /// The segment whose guest-physical addresses contain `address`.
    pub(super) fn segment_at_physical(&self, address: u64) -> Option<&Segment> {
        self.segments.iter().find(|s| address.checked_sub(s.paddr).is_some_and(|off| off < s.mem_size))
    }

    /// The guest-physical address of a virtual address, by the segment that contains it.
    pub(super) fn to_physical(&self, vaddr: u64) -> Option<u64> {
        self.segments.iter().find_map(|s| {
            let offset = vaddr.checked_sub(s.vaddr)?;
            (offset < s.mem_size).then(|| s.paddr.checked_add(offset))?
        })
    }
}

fn wrong(field: &'static str, problem: impl Into<String>, advice: &'static str) -> BootError {
    BootError::malformed(Format::Elf, field, problem, advice)
}

/// Parses one class of ELF.
fn parse_class<H>(cache: &ReadCache<ImageReader<'_>>, image: Image<'_>) -> Result<ElfImage, BootError>
where
    H: FileHeader<Endian = Endianness>,
{
    let endian = Endianness::Little;
    let header = H::parse(cache).map_err(|e| wrong("file header", e.to_string(), CUT_SHORT))?;
    let is_64 = header.is_class_64();
    let machine = header.e_machine(endian);
    if machine != EM_X86_64 && (is_64 || machine != EM_386) {
        return Err(wrong("e_machine", format!("{} is not x86", machine.0), "build the kernel for x86-64"));
    }
    match header.e_type(endian) {
        ET_EXEC => {}
        ET_DYN => {
            return Err(wrong(
                "e_type",
                "the image is position independent (ET_DYN) and nobody would relocate it",
                "link it to a fixed address (-no-pie; in Rust relocation-model=static)",
            ));
        }
        other => {
            return Err(wrong(
                "e_type",
                format!("{} is not an executable (2)", other.0),
                "give a linked kernel, not an object or core file",
            ));
        }
    }
    let headers = header
        .program_headers(endian, cache)
        .map_err(|e| wrong("program headers (e_phoff, e_phnum)", e.to_string(), CUT_SHORT))?;
    if headers.len() > MAX_PROGRAM_HEADERS {
        return Err(wrong("e_phnum", format!("{} is more than {MAX_PROGRAM_HEADERS}", headers.len()), CORRUPT));
    }
    let len = image.len().map_err(|source| BootError::Read { what: "kernel", source })?;
    let mut segments = Vec::new();
    let mut pvh_entry = None;
    for header in headers {
        if header.p_type(endian) == PT_LOAD {
            segments.extend(load_segment(header, len)?);
        } else if header.p_type(endian) == PT_NOTE && pvh_entry.is_none() {
            pvh_entry = pvh_note(header, cache)?;
        }
    }
    if segments.is_empty() {
        return Err(wrong(
            "program headers",
            "there is no PT_LOAD segment",
            "give a linked kernel, not an object file or separate debug file",
        ));
    }
    // `strip --only-keep-debug` turns every segment's content into nothing but keeps the headers.
    if segments.iter().all(|s: &Segment| s.file_size == 0) {
        return Err(wrong("p_filesz", "no segment has content", "give the kernel itself, not its separate debug file"));
    }
    Ok(ElfImage {
        is_64,
        entry: header.e_entry(endian).into(),
        is_linux: is_64 && is_linux(header, cache, image),
        segments,
        pvh_entry,
    })
}

/// Checks one PT_LOAD header against the file. `None`: it takes no memory.
fn load_segment<P>(header: &P, len: u64) -> Result<Option<Segment>, BootError>
where
    P: ProgramHeader<Endian = Endianness>,
{
    let endian = Endianness::Little;
    let segment = Segment {
        offset: header.p_offset(endian).into(),
        file_size: header.p_filesz(endian).into(),
        vaddr: header.p_vaddr(endian).into(),
        paddr: header.p_paddr(endian).into(),
        mem_size: header.p_memsz(endian).into(),
    };
    if segment.mem_size == 0 && segment.file_size == 0 {
        return Ok(None);
    }
    if segment.file_size > segment.mem_size {
        return Err(wrong(
            "p_filesz",
            format!("{:#x} is more than p_memsz {:#x}", segment.file_size, segment.mem_size),
            CORRUPT,
        ));
    }
    if segment.offset.checked_add(segment.file_size).is_none_or(|end| end > len) {
        return Err(wrong(
            "p_offset + p_filesz",
            format!(
                "a segment's {:#x} bytes at {:#x} go beyond the file's {len:#x}",
                segment.file_size, segment.offset
            ),
            CUT_SHORT,
        ));
    }
    Ok(Some(segment))
}

/// The PVH entry address, if this note segment has it.
fn pvh_note<P>(header: &P, cache: &ReadCache<ImageReader<'_>>) -> Result<Option<u32>, BootError>
where
    P: ProgramHeader<Endian = Endianness>,
{
    let endian = Endianness::Little;
    let size: u64 = header.p_filesz(endian).into();
    if size > MAX_NOTE_SEGMENT {
        return Err(wrong("p_filesz of PT_NOTE", format!("{size:#x} is more than {MAX_NOTE_SEGMENT:#x}"), CORRUPT));
    }
    let bad = |e: object::read::Error| wrong("PT_NOTE", e.to_string(), CUT_SHORT);
    let Some(mut notes) = header.notes(endian, cache).map_err(bad)? else {
        return Ok(None);
    };
    // A note that does not parse ends the search: other vendors' notes are not our business.
    while let Ok(Some(note)) = notes.next() {
        if note.name() == XEN && note.n_type(endian).0 == PHYS32_ENTRY {
            let address = note.desc().first_chunk::<4>().ok_or_else(|| {
                wrong("PVH note", format!("its descriptor has {} of at least 4 bytes", note.desc().len()), CORRUPT)
            })?;
            return Ok(Some(u32::from_le_bytes(*address)));
        }
    }
    Ok(None)
}

/// Whether an ELF64 without other marks is a Linux kernel: its section table has `.init.text` together with one of
/// the sections that only Linux has, or, where the section table was stripped, the banner `Linux version ` is in it.
/// (Addresses do not tell: higher-half bare-metal kernels have p_paddr != p_vaddr too.)
fn is_linux<H>(header: &H, cache: &ReadCache<ImageReader<'_>>, image: Image<'_>) -> bool
where
    H: FileHeader<Endian = Endianness>,
{
    let endian = Endianness::Little;
    let has_table = header.section_headers(endian, cache).is_ok_and(|all| !all.is_empty());
    if !has_table {
        return contains(image, b"Linux version ");
    }
    let Ok(sections) = header.sections(endian, cache) else {
        return false;
    };
    let has = |wanted: &[u8]| {
        sections.iter().any(|section| sections.section_name(endian, section).is_ok_and(|name| name == wanted))
    };
    has(b".init.text") && (has(b"__ksymtab") || has(b"__param") || has(b".data..percpu"))
}

/// Whether the image has these bytes anywhere.
fn contains(image: Image<'_>, needle: &[u8]) -> bool {
    const STEP: usize = 1 << 20;
    let mut offset = 0;
    loop {
        match image.read_up_to(offset, STEP + needle.len()) {
            Ok(chunk) if chunk.len() >= needle.len() => {
                if chunk.windows(needle.len()).any(|window| window == needle) {
                    return true;
                }
            }
            _ => return false,
        }
        offset += STEP as u64;
    }
}
