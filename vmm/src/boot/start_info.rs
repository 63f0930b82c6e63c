//! The PVH start information (Xen, public/arch-x86/hvm/start_info.h), which bare-metal guests get as well: command
//! line, memory map, RSDP and the initrd as the one module, by a documented structure.

use std::ops::Range;

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::GuestAddress;

use super::error::BootError;
use super::{ApStart, layout, memory_map};
use crate::memory::GuestRam;

/// Writes the start information to [`layout::BOOT_INFO`] and what it points at beside it. The command line is
/// written already.
pub(super) fn write(ram: &GuestRam, ap_start: ApStart, initrd: Option<&Range<u64>>) -> Result<(), BootError> {
    let map: Vec<_> = memory_map(ram, ap_start)
        .iter()
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.size,
            type_: entry.kind as u32,
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = initrd
        .iter()
        .map(|range| hvm_modlist_entry { paddr: range.start, size: range.end - range.start, ..Default::default() })
        .collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { layout::MODULES },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::ACPI_START,
        memmap_paddr: layout::MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(layout::BOOT_INFO));
    params.set_sections(&map, GuestAddress(layout::MEMORY_MAP));
    params.set_modules(&modules, GuestAddress(layout::MODULES));
    PvhBootConfigurator::write_bootparams(&params, ram.mem()).map_err(|e| BootError::Write {
        what: "hvm_start_info",
        at: layout::BOOT_INFO,
        reason: e.to_string(),
    })
}
