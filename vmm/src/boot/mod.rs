//! From a kernel image to guest memory filled and the first vCPU's state described.
//!
//! [`load`] looks at the image's content, not its name:
//!
//! | content                                                       | [`Format`]     | entry                                  |
//! |---------------------------------------------------------------|----------------|----------------------------------------|
//! | Multiboot 1 header in the first 8 KiB                         | `Multiboot`    | 32-bit, EBX = Multiboot information    |
//! | `HdrS` at 0x202                                               | `BzImage`      | 64-bit Linux boot protocol             |
//! | ELF with a Xen note 18 (PHYS32_ENTRY)                         | `Pvh`          | 32-bit, EBX = hvm_start_info           |
//! | ELF64 with Linux's sections or banner (see `elf::is_linux`)   | `Linux64`      | 64-bit, RSI = boot_params              |
//! | any other ELF64                                               | `BareMetal`    | 64-bit, RDI = hvm_start_info, RSI = vCPUs |
//!
//! The first that fits counts; [`BootRequest::protocol`] overrides it. Everything is checked and placed before the
//! first byte of guest memory is written. Guest memory must be fresh (zero): BSS is not written.

pub mod error;
pub mod image;
pub mod layout;
pub mod registers;

mod bare_metal;
mod bzimage;
mod elf;
mod linux;
mod linux64;
mod mailbox;
mod multiboot;
mod place;
mod pvh;
mod start_info;
mod tables;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

pub use error::BootError;
pub use image::Image;
pub use registers::{registers, system_registers};
pub use tables::{CODE32, CODE64, DATA, TASK};

use crate::acpi;
use crate::devices::virtio::Place;
use crate::limits::{MAX_VCPUS, PAGE_SIZE};
use crate::memory::{E820Entry, E820Kind, GuestRam};

/// The formats of kernel that we boot, and the boot protocol that goes with each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Linux bzImage, entered at its 64-bit entry point.
    BzImage,
    /// ELF with a PVH note, entered in 32-bit mode.
    Pvh,
    /// Linux vmlinux, entered at its 64-bit entry point.
    Linux64,
    /// Multiboot 1 image, entered in 32-bit mode.
    Multiboot,
    /// ELF64 without any of the above, entered in long mode.
    BareMetal,
    /// An ELF of which we do not know more yet; only in error messages.
    Elf,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BzImage => "bzImage",
            Self::Pvh => "PVH ELF",
            Self::Linux64 => "64-bit vmlinux",
            Self::Multiboot => "Multiboot",
            Self::BareMetal => "bare-metal ELF64",
            Self::Elf => "ELF",
        })
    }
}

/// The state of the AP with this APIC id (1 up) before its first instruction. `None`: as KVM made it, waiting for INIT
/// and SIPI.
pub fn ap_state(ap_start: ApStart, apic_id: u32) -> Option<CpuState> {
    match ap_start {
        ApStart::Sipi => None,
        ApStart::Mailbox => Some(mailbox::ap_state(apic_id)),
    }
}

/// How the other vCPUs come to life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ApStart {
    /// INIT and SIPI from the guest, through KVM's local APICs: APs begin in real mode.
    #[default]
    Sipi,
    /// The ACPI wakeup mailbox: APs begin in long mode in a loop of ours (Linux 5.17 and later).
    Mailbox,
}

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub struct BootRequest<'a> {
    /// The kernel.
    pub kernel: Image<'a>,
    /// What the kernel is called: Multiboot kernels see it as the first word of their command line.
    pub name: &'a str,
    /// Initial RAM disk, or the one module of PVH and Multiboot kernels.
    pub initrd: Option<Image<'a>>,
    /// Command line, without NUL.
    pub cmdline: &'a str,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub cpus: u32,
    /// How APs start.
    pub ap_start: ApStart,
    /// `None`: by content.
    pub protocol: Option<Format>,
}

/// Everything the machine needs to know to let the guest run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// What the kernel turned out to be.
    pub format: Format,
    /// State of the boot vCPU before its first instruction.
    pub bsp: CpuState,
    /// Guest-physical addresses from the kernel's first to its last byte, BSS included.
    pub kernel: Range<u64>,
    /// Guest-physical addresses of the initrd.
    pub initrd: Option<Range<u64>>,
}

/// State of a vCPU before its first instruction. What is not named is as after reset, with flat segments
/// (see [`registers`](fn@registers) and [`system_registers`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CpuState {
    /// 64-bit mode at CPL 0 with the page tables at `cr3`, interrupts off.
    Long64 {
        /// Top-level page table.
        cr3: u64,
        /// First instruction.
        rip: u64,
        /// Stack pointer.
        rsp: u64,
        /// First argument of the boot protocol.
        rdi: u64,
        /// Second argument of the boot protocol.
        rsi: u64,
    },
    /// Protected mode at CPL 0 without paging, flat 32-bit segments, interrupts off.
    Protected32 {
        /// First instruction.
        eip: u32,
        /// Stack pointer. PVH and Multiboot promise none; ours points at free RAM.
        esp: u32,
        /// The boot protocol's magic.
        eax: u32,
        /// The boot protocol's information structure.
        ebx: u32,
    },
}

/// Puts the kernel, the initrd, the command line and all tables into fresh guest memory.
pub fn load(ram: &GuestRam, request: &BootRequest<'_>) -> Result<Entry, BootError> {
    load_with(ram, request, &[])
}

/// As [`load`], for a machine with virtio devices in these places.
pub fn load_with(ram: &GuestRam, request: &BootRequest<'_>, virtio: &[Place]) -> Result<Entry, BootError> {
    if request.cpus == 0 || request.cpus > MAX_VCPUS {
        return Err(BootError::Cpus { cpus: request.cpus });
    }
    if let Some(offset) = request.cmdline.bytes().position(|byte| byte == 0) {
        return Err(BootError::CmdlineNul { offset });
    }
    let entry = match identify(request)? {
        Kind::BzImage(header) => bzimage::load(ram, request, &header)?,
        Kind::Multiboot(header, elf) => multiboot::load(ram, request, &header, elf.as_ref())?,
        Kind::Pvh(elf) => pvh::load(ram, request, &elf)?,
        Kind::Linux64(elf) => linux64::load(ram, request, &elf)?,
        Kind::BareMetal(elf) => bare_metal::load(ram, request, &elf)?,
    };
    tables::write(ram.mem())?;
    for (at, table) in acpi::tables(request.cpus, request.ap_start, virtio) {
        tables::put(ram.mem(), "an ACPI table", at, &table)?;
    }
    if request.ap_start == ApStart::Mailbox {
        mailbox::write(ram)?;
    }
    Ok(entry)
}

/// An image whose headers have been read.
enum Kind {
    BzImage(bzimage::Header),
    Multiboot(multiboot::Header, Option<elf::ElfImage>),
    Pvh(elf::ElfImage),
    Linux64(elf::ElfImage),
    BareMetal(elf::ElfImage),
}

/// Finds out what the image is, or checks that it is what the request says, and reads its headers.
fn identify(request: &BootRequest<'_>) -> Result<Kind, BootError> {
    let image = request.kernel;
    let start = image.read_up_to(0, multiboot::SEARCH).map_err(|source| BootError::Read { what: "kernel", source })?;
    let is_elf = start.starts_with(b"\x7fELF");
    let wanted = request.protocol;
    let multiboot = match wanted {
        None | Some(Format::Multiboot) => multiboot::Header::find(&start)?,
        Some(_) => None,
    };
    if let Some(header) = multiboot {
        let elf = match is_elf && !header.has_addresses() {
            true => Some(elf::ElfImage::parse(image)?),
            false => None,
        };
        return Ok(Kind::Multiboot(header, elf));
    }
    let wrong = |wanted, problem| Err(BootError::WrongProtocol { wanted, problem });
    match wanted {
        Some(Format::Multiboot) => wrong(Format::Multiboot, "it has no Multiboot header in its first 8 KiB"),
        Some(Format::BzImage) if !bzimage::is_bzimage(&start) => wrong(Format::BzImage, "it has no HdrS at 0x202"),
        Some(wanted) if wanted != Format::BzImage && !is_elf => wrong(wanted, "it is no ELF"),
        Some(Format::BzImage) => Ok(Kind::BzImage(bzimage::Header::parse(image)?)),
        None if !is_elf && bzimage::is_bzimage(&start) => Ok(Kind::BzImage(bzimage::Header::parse(image)?)),
        None if !is_elf => Err(unrecognised(&start)),
        _ => identify_elf(elf::ElfImage::parse(image)?, wanted),
    }
}

/// Which of the boot protocols of an ELF it is.
fn identify_elf(elf: elf::ElfImage, wanted: Option<Format>) -> Result<Kind, BootError> {
    match wanted {
        Some(Format::Pvh) if elf.pvh_entry.is_none() => Err(BootError::WrongProtocol {
            wanted: Format::Pvh,
            problem: "it has no Xen note of type 18 (PHYS32_ENTRY)",
        }),
        Some(Format::Linux64) => Ok(Kind::Linux64(elf)),
        Some(Format::BareMetal) => Ok(Kind::BareMetal(elf)),
        _ if elf.pvh_entry.is_some() => Ok(Kind::Pvh(elf)),
        _ if elf.is_linux => Ok(Kind::Linux64(elf)),
        _ => Ok(Kind::BareMetal(elf)),
    }
}

fn unrecognised(start: &[u8]) -> BootError {
    let what = match start {
        [] => "an empty file".to_owned(),
        _ => format!(
            "neither ELF (it begins with {:02x?}) nor bzImage (no HdrS at 0x202) nor Multiboot (no header in the first 8 KiB)",
            &start[..start.len().min(4)]
        ),
    };
    BootError::Unrecognised { what }
}

/// The memory map that the guest is told: RAM and what firmware keeps, and the wakeup mailbox if there is one.
fn memory_map(ram: &GuestRam, ap_start: ApStart) -> Vec<E820Entry> {
    let mut map = ram.e820();
    if ap_start == ApStart::Mailbox {
        map.push(E820Entry { start: layout::AP_MAILBOX, size: PAGE_SIZE, kind: E820Kind::AcpiNvs });
        map.sort_unstable_by_key(|entry| entry.start);
    }
    map
}

/// Checks the command line's length and writes it, NUL-terminated, where the layout has room for it.
fn write_cmdline(ram: &GuestRam, format: Format, cmdline: &str, kernel_max: u64) -> Result<(), BootError> {
    let max = kernel_max.min(layout::CMDLINE_SIZE - 1);
    let len = cmdline.len() as u64;
    if len > max {
        return Err(BootError::CmdlineTooLong { format, len, max });
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    tables::put(ram.mem(), "the command line", layout::CMDLINE, &bytes)
}

/// Finds a place for the initrd. Returns the range, and writes nothing.
fn place_initrd(
    request: &BootRequest<'_>,
    place: impl FnOnce(u64) -> Result<u64, BootError>,
) -> Result<Option<Range<u64>>, BootError> {
    let Some(initrd) = request.initrd else {
        return Ok(None);
    };
    let size = initrd.len().map_err(|source| BootError::Read { what: "initrd", source })?;
    if size == 0 {
        return Err(BootError::InitrdEmpty);
    }
    let start = place(size)?;
    Ok(Some(start..start + size))
}

/// Copies the initrd to the place found for it.
fn write_initrd(ram: &GuestRam, request: &BootRequest<'_>, at: Option<&Range<u64>>) -> Result<(), BootError> {
    if let (Some(initrd), Some(at)) = (request.initrd, at) {
        initrd.copy_to(0, at.end - at.start, ram.mem(), at.start, "initrd")?;
    }
    Ok(())
}
