//! Multiboot 1 (Multiboot Specification 0.6.96): ELF32 and ELF64 images with a header in their first 8 KiB, and images
//! of any kind whose header has the address fields ("a.out kludge"). Entered in 32-bit mode.
//!
//! An ELF64 image is entered in 32-bit mode as well: its header is the wrapper, its own code gets to long mode.

use std::ops::Range;

use super::elf::ElfImage;
use super::error::{BootError, CORRUPT, CUT_SHORT};
use super::place::Placement;
use super::{ApStart, BootRequest, CpuState, Entry, Format, layout};
use super::{memory_map, place_initrd, tables, write_cmdline, write_initrd};
use crate::limits::{KIB, PAGE_SIZE};
use crate::memory::GuestRam;

/// The header must lie in this many bytes.
pub(super) const SEARCH: usize = 8192;

const HEADER_MAGIC: u32 = 0x1BAD_B002;
/// In EAX at entry.
const LOADER_MAGIC: u32 = 0x2BAD_B002;

/// Requirements a loader must meet or refuse the image.
const MUST_KNOW: u32 = 0xffff;
const PAGE_ALIGN: u32 = 1;
const MEMORY_INFO: u32 = 1 << 1;
/// Wants a video mode described; like other loaders without a screen we go on without.
const VIDEO_MODE: u32 = 1 << 2;
const ADDRESS_FIELDS: u32 = 1 << 16;

const INFO_MEMORY: u32 = 1;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MMAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;
/// Bytes of the information structure with all fields that the specification has.
const INFO_SIZE: usize = 116;

/// Strings that the information structure points at.
const LOADER_NAME_AT: u64 = layout::MODULES + 0x100;
const MODULE_NAME_AT: u64 = layout::MODULES + 0x200;

fn wrong(field: &'static str, problem: impl Into<String>, advice: &'static str) -> BootError {
    BootError::malformed(Format::Multiboot, field, problem, advice)
}

/// What the image's header says.
#[derive(Clone, Debug)]
pub(super) struct Header {
    flags: u32,
    /// Offset of the header in the file.
    offset: u64,
    /// header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr.
    addresses: Option<[u32; 5]>,
}

impl Header {
    /// Looks for a header in the beginning of a file. Errors only when there is one and it cannot be used.
    pub(super) fn find(start: &[u8]) -> Result<Option<Self>, BootError> {
        let start = &start[..start.len().min(SEARCH)];
        let word = |at: usize| {
            let bytes = start.get(at..at.checked_add(4)?)?;
            bytes.first_chunk().map(|word| u32::from_le_bytes(*word))
        };
        for at in (0..start.len()).step_by(4) {
            let (Some(HEADER_MAGIC), Some(flags), Some(checksum)) = (word(at), word(at + 4), word(at + 8)) else {
                continue;
            };
            if HEADER_MAGIC.wrapping_add(flags).wrapping_add(checksum) != 0 {
                continue;
            }
            let unknown = flags & MUST_KNOW & !(PAGE_ALIGN | MEMORY_INFO | VIDEO_MODE);
            if unknown != 0 {
                return Err(wrong(
                    "flags",
                    format!("{flags:#x} requires features that Multiboot 1 does not have"),
                    "give a Multiboot 1 kernel",
                ));
            }
            let mut addresses = None;
            if flags & ADDRESS_FIELDS != 0 {
                let mut fields = [0; 5];
                for (n, field) in fields.iter_mut().enumerate() {
                    *field = word(at + 12 + 4 * n)
                        .ok_or_else(|| wrong("address fields", "the file ends inside them", CUT_SHORT))?;
                }
                addresses = Some(fields);
            }
            return Ok(Some(Self { flags, offset: at as u64, addresses }));
        }
        Ok(None)
    }

    /// Whether the header itself says what goes where.
    pub(super) fn has_addresses(&self) -> bool {
        self.addresses.is_some()
    }
}

/// What is copied where, and where it begins to run.
struct Plan {
    /// Offset in the file, length there, guest-physical address.
    parts: Vec<(u64, u64, u64)>,
    kernel: Range<u64>,
    eip: u32,
}

pub(super) fn load(
    ram: &GuestRam,
    request: &BootRequest<'_>,
    header: &Header,
    elf: Option<&ElfImage>,
) -> Result<Entry, BootError> {
    let format = Format::Multiboot;
    let mut placement = Placement::new(ram, format);
    let plan = match (header.addresses, elf) {
        (Some(fields), _) => by_addresses(request, header, fields, &mut placement)?,
        (None, Some(elf)) => by_elf(elf, &mut placement)?,
        (None, None) => {
            return Err(wrong(
                "flags",
                format!("{:#x} has no address fields (bit 16) and the image is no ELF", header.flags),
                "build the kernel as ELF or fill in the address fields",
            ));
        }
    };
    let initrd = place_initrd(request, |size| placement.initrd_after_kernel(size))?;
    write_cmdline(ram, format, &command_line(request), u64::MAX)?;
    for (offset, len, to) in plan.parts {
        request.kernel.copy_to(offset, len, ram.mem(), to, "kernel")?;
    }
    write_initrd(ram, request, initrd.as_ref())?;
    write_info(ram, request.ap_start, initrd.as_ref())?;
    Ok(Entry {
        format,
        bsp: CpuState::Protected32 {
            eip: plan.eip,
            esp: layout::STACK_TOP as u32,
            eax: LOADER_MAGIC,
            ebx: layout::BOOT_INFO as u32,
        },
        kernel: plan.kernel,
        initrd,
    })
}

/// Follows the ELF's segments. The entry point may be a virtual address (then its segment says where it is) or a
/// physical one.
fn by_elf(elf: &ElfImage, placement: &mut Placement<'_>) -> Result<Plan, BootError> {
    elf.claim(placement)?;
    let physical = elf.to_physical(elf.entry).or_else(|| elf.segment_at_physical(elf.entry).map(|_| elf.entry));
    let eip = physical.and_then(|address| u32::try_from(address).ok());
    let Some(eip) = eip else {
        return Err(wrong(
            "e_entry",
            format!("{:#x} is not in a segment loaded below 4 GiB", elf.entry),
            "set the entry point in the linker script",
        ));
    };
    let parts = elf.segments.iter();
    Ok(Plan { parts: parts.map(|s| (s.offset, s.file_size, s.paddr)).collect(), kernel: elf.range(), eip })
}

/// Follows the header's address fields (specification 3.1.3).
fn by_addresses(
    request: &BootRequest<'_>,
    header: &Header,
    [header_addr, load_addr, load_end, bss_end, entry]: [u32; 5],
    placement: &mut Placement<'_>,
) -> Result<Plan, BootError> {
    let len = request.kernel.len().map_err(|source| BootError::Read { what: "kernel", source })?;
    let before_header = header_addr
        .checked_sub(load_addr)
        .ok_or_else(|| wrong("load_addr", format!("{load_addr:#x} is above header_addr {header_addr:#x}"), CORRUPT))?;
    let offset = header.offset.checked_sub(before_header.into()).ok_or_else(|| {
        wrong("header_addr", format!("{header_addr:#x} asks for bytes before the file's first"), CORRUPT)
    })?;
    let in_file = len.saturating_sub(offset);
    let size =
        match load_end {
            0 => in_file,
            end => u64::from(end.checked_sub(load_addr).ok_or_else(|| {
                wrong("load_end_addr", format!("{end:#x} is below load_addr {load_addr:#x}"), CORRUPT)
            })?),
        };
    if size > in_file {
        return Err(wrong(
            "load_end_addr",
            format!("{load_end:#x} asks for {size:#x} bytes, the file has {in_file:#x}"),
            CUT_SHORT,
        ));
    }
    let loaded_end = u64::from(load_addr) + size;
    let end = match bss_end {
        0 => loaded_end,
        end if u64::from(end) >= loaded_end => end.into(),
        end => {
            return Err(wrong(
                "bss_end_addr",
                format!("{end:#x} is below the end of the loaded part {loaded_end:#x}"),
                CORRUPT,
            ));
        }
    };
    let start = u64::from(load_addr);
    if !(start..loaded_end).contains(&entry.into()) {
        return Err(wrong(
            "entry_addr",
            format!("{entry:#x} is outside of the loaded part {start:#x}-{loaded_end:#x}"),
            CORRUPT,
        ));
    }
    placement.claim("the image".to_owned(), start, end - start)?;
    Ok(Plan { parts: vec![(offset, size, start)], kernel: start..end, eip: entry })
}

/// Loaders put the image's name first, and test kernels skip the first word.
fn command_line(request: &BootRequest<'_>) -> String {
    let blank = |c: char| c.is_whitespace() || c == '\0';
    let name = match request.name {
        "" => "kernel".to_owned(),
        name => name.replace(blank, "_"),
    };
    match request.cmdline {
        "" => name,
        rest => format!("{name} {rest}"),
    }
}

/// Writes the Multiboot information structure (specification 3.3) and what it points at.
fn write_info(ram: &GuestRam, ap_start: ApStart, initrd: Option<&Range<u64>>) -> Result<(), BootError> {
    let mem = ram.mem();
    let mut flags = INFO_MEMORY | INFO_CMDLINE | INFO_MMAP | INFO_LOADER_NAME;
    let mut info = [0u8; INFO_SIZE];
    let mut set = |at: usize, value: u64| {
        // Everything that the structure points at is below 1 MiB, and memory is counted in KiB.
        info[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
    };
    set(4, layout::NVS_START / KIB);
    set(8, (ram.low_end() - layout::HIGH_RAM_START) / KIB);
    set(16, layout::CMDLINE);
    set(64, LOADER_NAME_AT);
    tables::put(mem, "the loader's name", LOADER_NAME_AT, b"Trapline\0")?;

    if let Some(range) = initrd {
        flags |= INFO_MODULES;
        set(20, 1);
        set(24, layout::MODULES);
        let words = [range.start, range.end, MODULE_NAME_AT, 0];
        let module: Vec<u8> = words.iter().flat_map(|w| (*w as u32).to_le_bytes()).collect();
        tables::put(mem, "the module list", layout::MODULES, &module)?;
        tables::put(mem, "the module's name", MODULE_NAME_AT, b"initrd\0")?;
    }

    let mut map = Vec::new();
    for entry in memory_map(ram, ap_start) {
        // The length of an entry does not count the field that holds it.
        map.extend(20u32.to_le_bytes());
        map.extend(entry.start.to_le_bytes());
        map.extend(entry.size.to_le_bytes());
        map.extend((entry.kind as u32).to_le_bytes());
    }
    set(44, map.len() as u64);
    set(48, layout::MEMORY_MAP);
    tables::put(mem, "the memory map", layout::MEMORY_MAP, &map)?;

    set(0, flags.into());
    tables::put(mem, "the Multiboot information", layout::BOOT_INFO, &info)
}

const _: () = assert!(MODULE_NAME_AT + 0x100 <= layout::MODULES + PAGE_SIZE);
