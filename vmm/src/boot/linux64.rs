//! Linux vmlinux without PVH note (or by choice): entered at `startup_64` with a zero page in RSI, as the
//! decompressor of a bzImage does it.

use super::error::BootError;
use super::place::Placement;
use super::{BootRequest, CpuState, Entry, Format, elf::ElfImage, layout, linux};
use super::{place_initrd, write_initrd};
use crate::limits::PCI_HOLE_END;
use crate::memory::GuestRam;

pub(super) fn load(ram: &GuestRam, request: &BootRequest<'_>, elf: &ElfImage) -> Result<Entry, BootError> {
    let format = Format::Linux64;
    check_entry(elf)?;
    let mut placement = Placement::new(ram, format);
    elf.claim(&mut placement)?;
    let initrd = place_initrd(request, |size| placement.initrd_high(size, u64::MAX, ""))?;
    let setup = linux::vmlinux_setup_header();
    linux::write_boot_params(ram, request, format, setup, initrd.as_ref())?;
    elf.write(ram, request.kernel)?;
    write_initrd(ram, request, initrd.as_ref())?;
    Ok(Entry {
        format,
        bsp: CpuState::Long64 {
            cr3: layout::PAGE_TABLES,
            rip: elf.entry,
            rsp: layout::STACK_TOP,
            rdi: 0,
            rsi: layout::BOOT_INFO,
        },
        kernel: elf.range(),
        initrd,
    })
}

/// `e_entry` of a vmlinux is the physical address of `startup_64`.
fn check_entry(elf: &ElfImage) -> Result<(), BootError> {
    let wrong = |field, problem: String, advice| Err(BootError::malformed(Format::Linux64, field, problem, advice));
    if !elf.is_64 {
        return wrong(
            "e_ident[EI_CLASS]",
            "a 32-bit ELF has no 64-bit entry point".to_owned(),
            "give a vmlinux built with CONFIG_64BIT",
        );
    }
    match elf.segment_at_physical(elf.entry) {
        Some(_) if elf.entry < PCI_HOLE_END => Ok(()),
        _ => wrong(
            "e_entry",
            format!("{:#x} is not a physical address in a segment below 4 GiB", elf.entry),
            "give the vmlinux of an x86-64 Linux, or --boot-protocol if it is something else",
        ),
    }
}
