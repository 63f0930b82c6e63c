//! PVH: the entry that the ELF's Xen note names, in 32-bit mode, with `hvm_start_info` in EBX (Xen, docs/misc/pvh.pandoc).

use super::error::{BootError, CORRUPT};
use super::place::Placement;
use super::{BootRequest, CpuState, Entry, Format, elf::ElfImage, layout, linux, start_info};
use super::{place_initrd, write_cmdline, write_initrd};
use crate::memory::GuestRam;

pub(super) fn load(ram: &GuestRam, request: &BootRequest<'_>, elf: &ElfImage) -> Result<Entry, BootError> {
    let format = Format::Pvh;
    let eip = entry(elf)?;
    let mut placement = Placement::new(ram, format);
    elf.claim(&mut placement)?;
    let initrd = place_initrd(request, |size| placement.initrd_high(size, u64::MAX, ""))?;
    // Linux would cut a longer one without a word.
    let cmdline_max = if elf.is_linux { linux::COMMAND_LINE_MAX } else { u64::MAX };
    write_cmdline(ram, format, request.cmdline, cmdline_max)?;
    elf.write(ram, request.kernel)?;
    write_initrd(ram, request, initrd.as_ref())?;
    start_info::write(ram, request.ap_start, initrd.as_ref())?;
    Ok(Entry {
        format,
        bsp: CpuState::Protected32 { eip, esp: layout::STACK_TOP as u32, eax: 0, ebx: layout::BOOT_INFO as u32 },
        kernel: elf.range(),
        initrd,
    })
}

/// The entry point, which must have been loaded.
fn entry(elf: &ElfImage) -> Result<u32, BootError> {
    let field = "PVH note";
    let wrong = |problem| BootError::malformed(Format::Pvh, field, problem, CORRUPT);
    let eip = elf.pvh_entry.ok_or_else(|| wrong("there is none".to_owned()))?;
    match elf.segment_at_physical(eip.into()) {
        Some(_) => Ok(eip),
        None => Err(wrong(format!("its entry point {eip:#x} is in none of the load segments"))),
    }
}
