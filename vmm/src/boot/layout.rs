//! Who owns which part of the guest-physical address space when the first instruction runs.
//!
//! | from          | to (exclusive) | memory map | content                                                        |
//! |---------------|----------------|------------|----------------------------------------------------------------|
//! | `0x0000_0000` | `0x0008_0000`  | RAM        | free: images may load here, guests put AP trampolines here     |
//! | `0x0008_0000` | `0x0008_1000`  | RAM        | boot_params (Linux), hvm_start_info (PVH, bare metal) or Multiboot information |
//! | `0x0008_1000` | `0x0008_2000`  | RAM        | memory map table (PVH, bare metal, Multiboot)                  |
//! | `0x0008_2000` | `0x0008_3000`  | RAM        | module list and short strings                                  |
//! | `0x0008_4000` | `0x0008_8000`  | RAM        | first stack of the boot vCPU, growing down                     |
//! | `0x0008_8000` | `0x0009_0000`  | RAM        | command line                                                   |
//! | `0x0009_0000` | `0x0009_6000`  | ACPI NVS   | page tables: the first 4 GiB one to one                        |
//! | `0x0009_6000` | `0x0009_7000`  | ACPI NVS   | GDT and TSS                                                    |
//! | `0x0009_7000` | `0x0009_8000`  | ACPI NVS   | poll loop of the APs (wakeup mailbox only)                     |
//! | `0x0009_9000` | `0x0009_A000`  | ACPI NVS   | FACS                                                           |
//! | `0x0009_A000` | `0x000A_0000`  | reserved   | where PCs have their EBDA; zero                                |
//! | `0x000A_0000` | `0x000E_0000`  | not listed | where PCs have VGA and option ROMs; backed by RAM, zero        |
//! | `0x000E_0000` | `0x0010_0000`  | reserved   | ACPI tables, RSDP first: found by scanning as on a PC          |
//! | `0x0010_0000` | 3 GiB at most  | RAM        | kernel; initrd at the top (Multiboot: right after the kernel)  |
//! | `0xD000_0000` | `0xD000_8000`  | MMIO       | virtio devices, one page each: random bytes, then the disks    |
//! | `0xFEC0_0000` |                | MMIO       | I/O APIC                                                       |
//! | `0xFEE0_0000` |                | MMIO       | local APICs                                                    |
//! | `0xFFFB_A000` | `0xFFFB_B000`  | not listed | exit register, see `devices/exit.rs`                           |
//! | `0xFFFB_B000` | `0xFFFB_C000`  | ACPI NVS   | wakeup mailbox (wakeup mailbox only): registers, not RAM       |
//! | `0xFFFB_C000` | `0xFFFC_0000`  | reserved   | pages that KVM needs on VT-x hosts without unrestricted guest  |
//! | 4 GiB         |                | RAM        | what did not fit below 3 GiB                                   |
//!
//! What a guest still needs after it took its own tables (the APs' page tables and their loop, FACS) is ACPI NVS;
//! what it only reads at the start is RAM that it may reuse.

use std::ops::Range;

use crate::devices::virtio::PLACES;
use crate::limits::{PAGE_SIZE, PCI_HOLE_START};

/// boot_params, hvm_start_info or Multiboot information: one page.
pub const BOOT_INFO: u64 = 0x8_0000;
/// Memory map table: one page.
pub const MEMORY_MAP: u64 = 0x8_1000;
/// Module list and short strings: one page.
pub const MODULES: u64 = 0x8_2000;
/// End of the boot vCPU's first stack; the stack is [`STACK_SIZE`] bytes below it.
pub const STACK_TOP: u64 = 0x8_8000;
/// Bytes of the boot vCPU's first stack.
pub const STACK_SIZE: u64 = 4 * PAGE_SIZE;
/// Command line, with its terminating NUL.
pub const CMDLINE: u64 = 0x8_8000;
/// Bytes for the command line, terminating NUL included.
pub const CMDLINE_SIZE: u64 = 0x8000;

/// First byte of the area that stays the firmware's while the guest runs.
pub const NVS_START: u64 = 0x9_0000;
/// Top-level page table: the value of CR3 at entry in long mode.
pub const PAGE_TABLES: u64 = 0x9_0000;
/// GDT, one page; the TSS is in its upper half.
pub const GDT: u64 = 0x9_6000;
/// TSS that TR points at.
pub const TSS: u64 = 0x9_6800;
/// Code that APs run until the guest wakes them through the mailbox.
pub const AP_LOOP: u64 = 0x9_7000;
/// Firmware ACPI control structure, which the guest writes to: one page.
pub const FACS: u64 = 0x9_9000;
/// End (exclusive) of the firmware's area.
pub const NVS_END: u64 = 0x9_A000;

/// Where a PC has its VGA window and RAM ends as far as old software is concerned.
pub const VGA_START: u64 = 0xA_0000;

/// RSDP, then the other ACPI tables. In the area that is scanned for it (ACPI 6.5, 5.2.5.1).
pub const ACPI_START: u64 = 0xE_0000;
/// End (exclusive) of the ACPI tables' area.
pub const ACPI_END: u64 = 0x10_0000;

/// First byte of RAM above the first MiB.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// Registers of the virtio devices, one page for each place ([`PLACES`]).
pub const VIRTIO: u64 = 0xD000_0000;

/// I/O APIC registers, as KVM's in-kernel irqchip has them.
pub const IOAPIC: u64 = 0xFEC0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u64 = 0xFEE0_0000;

/// The exit register: one page. No RAM.
pub const EXIT_PAGE: u64 = 0xFFFB_A000;
/// ACPI multiprocessor wakeup mailbox: one page (ACPI 6.5, 5.2.12.19). No RAM: a device sees what is written.
pub const AP_MAILBOX: u64 = 0xFFFB_B000;
/// For KVM_SET_IDENTITY_MAP_ADDR: one page (KVM API 4.41).
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
/// For KVM_SET_TSS_ADDR: three pages (KVM API 4.36).
pub const KVM_TSS: u64 = 0xFFFB_D000;
/// End (exclusive) of the pages given to KVM.
pub const KVM_PAGES_END: u64 = 0xFFFC_0000;

/// Ranges that no image may load into, with the words an error message uses for them.
pub(super) const TAKEN: [(Range<u64>, &str); 2] = [
    (BOOT_INFO..NVS_START, "the boot information at 0x80000-0x90000"),
    (NVS_START..HIGH_RAM_START, "the firmware area at 0x90000-0x100000"),
];

const _: () = {
    assert!(PAGE_TABLES + 6 * PAGE_SIZE <= GDT);
    assert!(STACK_TOP - STACK_SIZE >= MODULES + PAGE_SIZE);
    assert!(CMDLINE + CMDLINE_SIZE <= NVS_START);
    assert!(AP_LOOP + PAGE_SIZE <= FACS && FACS + PAGE_SIZE <= NVS_END);
    assert!(EXIT_PAGE + PAGE_SIZE <= AP_MAILBOX);
    assert!(VIRTIO >= PCI_HOLE_START && VIRTIO + PLACES as u64 * PAGE_SIZE <= IOAPIC);
    assert!(AP_MAILBOX + PAGE_SIZE <= KVM_IDENTITY_MAP);
    assert!(KVM_IDENTITY_MAP + PAGE_SIZE <= KVM_TSS && KVM_TSS + 3 * PAGE_SIZE <= KVM_PAGES_END);
};
