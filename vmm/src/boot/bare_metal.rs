//! Bare-metal ELF64: loaded at its physical addresses and entered in long mode, the first 4 GiB mapped one to one.
//!
//! At entry: CPL 0, interrupts off, no IDT, flat segments, SSE usable, RDI = address of an `hvm_start_info`, RSI =
//! number of vCPUs, RSP = top of a 16 KiB stack holding a zero return address, so that `extern "C" fn _start(info,
//! cpus) -> !` works as it stands.

use super::error::BootError;
use super::place::Placement;
use super::{BootRequest, CpuState, Entry, Format, elf::ElfImage, layout, start_info};
use super::{place_initrd, write_cmdline, write_initrd};
use crate::limits::PCI_HOLE_END;
use crate::memory::GuestRam;

pub(super) fn load(ram: &GuestRam, request: &BootRequest<'_>, elf: &ElfImage) -> Result<Entry, BootError> {
    let format = Format::BareMetal;
    check_entry(elf)?;
    let mut placement = Placement::new(ram, format);
    elf.claim(&mut placement)?;
    let initrd = place_initrd(request, |size| placement.initrd_high(size, u64::MAX, ""))?;
    write_cmdline(ram, format, request.cmdline, u64::MAX)?;
    elf.write(ram, request.kernel)?;
    write_initrd(ram, request, initrd.as_ref())?;
    start_info::write(ram, request.ap_start, initrd.as_ref())?;
    Ok(Entry {
        format,
        bsp: CpuState::Long64 {
            cr3: layout::PAGE_TABLES,
            rip: elf.entry,
            // A called function finds its stack 8 short of a multiple of 16 (System V ABI 3.2.2).
            rsp: layout::STACK_TOP - 8,
            rdi: layout::BOOT_INFO,
            rsi: request.cpus.into(),
        },
        kernel: elf.range(),
        initrd,
    })
}

/// The entry point must be the same address with and without paging, and have been loaded.
fn check_entry(elf: &ElfImage) -> Result<(), BootError> {
    let entry = elf.entry;
    let wrong = |problem: String, advice| Err(BootError::malformed(Format::BareMetal, "e_entry", problem, advice));
    if !elf.is_64 {
        return Err(BootError::malformed(
            Format::BareMetal,
            "e_ident[EI_CLASS]",
            "a 32-bit ELF without Multiboot header or PVH note has no boot protocol",
            "add a Multiboot header or PVH note, or build it as ELF64",
        ));
    }
    if entry >= PCI_HOLE_END {
        return wrong(
            format!("{entry:#x} is not in the first 4 GiB, which is all that is mapped at entry"),
            "link the entry code to its physical address, or give --boot-protocol if this is a Linux kernel",
        );
    }
    match elf.segment_at_physical(entry) {
        Some(segment) if segment.vaddr == segment.paddr => Ok(()),
        Some(segment) => wrong(
            format!("{entry:#x} is in a segment linked for {:#x} but loaded at {:#x}", segment.vaddr, segment.paddr),
            "link the entry code to its physical address",
        ),
        None => {
            wrong(format!("{entry:#x} is in none of the load segments"), "set the entry point in the linker script")
        }
    }
}
