//! The zero page of the Linux boot protocol (Linux, Documentation/arch/x86/zero-page.rst).

use std::ops::Range;

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{LOADED_HIGH, boot_e820_entry, boot_params, setup_header};
use vm_memory::GuestAddress;

use super::error::BootError;
use super::{BootRequest, Format, layout, memory_map, write_cmdline};
use crate::memory::GuestRam;

/// Longest command line that x86 Linux takes: COMMAND_LINE_SIZE without the NUL.
pub(super) const COMMAND_LINE_MAX: u64 = 2047;

/// A loader that has no number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// The setup header that a loader makes up for a vmlinux, which has none.
pub(super) fn vmlinux_setup_header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x020f,
        loadflags: LOADED_HIGH,
        kernel_alignment: 0x20_0000,
        cmdline_size: COMMAND_LINE_MAX as u32,
        ..Default::default()
    }
}

/// Writes command line and zero page. The initrd's place is known, its bytes need not be there yet.
pub(super) fn write_boot_params(
    ram: &GuestRam,
    request: &BootRequest<'_>,
    format: Format,
    setup: setup_header,
    initrd: Option<&Range<u64>>,
) -> Result<(), BootError> {
    write_cmdline(ram, format, request.cmdline, setup.cmdline_size.into())?;
    let mut params = boot_params { hdr: setup, acpi_rsdp_addr: layout::ACPI_START, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    // The kernel in the image may say that a loader put data there; we did not.
    params.hdr.setup_data = 0;
    params.hdr.ramdisk_image = 0;
    params.hdr.ramdisk_size = 0;
    if let Some(range) = initrd {
        let size = range.end - range.start;
        params.hdr.ramdisk_image = range.start as u32;
        params.hdr.ramdisk_size = size as u32;
        params.ext_ramdisk_image = (range.start >> 32) as u32;
        params.ext_ramdisk_size = (size >> 32) as u32;
    }
    let map = memory_map(ram, request.ap_start);
    params.e820_entries = map.len() as u8;
    let mut table = params.e820_table;
    for (slot, entry) in table.iter_mut().zip(&map) {
        *slot = boot_e820_entry { addr: entry.start, size: entry.size, r#type: entry.kind as u32 };
    }
    params.e820_table = table;
    let params = BootParams::new(&params, GuestAddress(layout::BOOT_INFO));
    LinuxBootConfigurator::write_bootparams(&params, ram.mem()).map_err(|e| BootError::Write {
        what: "boot_params",
        at: layout::BOOT_INFO,
        reason: e.to_string(),
    })
}
