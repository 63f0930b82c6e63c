//! The GDT, TSS and identity page tables that the first instruction runs on.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::error::BootError;
use super::layout;
use crate::limits::PAGE_SIZE;

/// Selector of the flat 32-bit code segment.
pub const CODE32: u16 = 0x08;
/// Selector of the 64-bit code segment: `__BOOT_CS` of the Linux 64-bit boot protocol.
pub const CODE64: u16 = 0x10;
/// Selector of the flat data segment: `__BOOT_DS` of the Linux 64-bit boot protocol.
pub const DATA: u16 = 0x18;
/// Selector of the task state segment.
pub const TASK: u16 = 0x20;

/// Bytes of a 64-bit TSS without I/O permission map, less one (SDM 3A 8.7).
pub(super) const TSS_LIMIT: u32 = 103;

/// Descriptors in the order of their selectors (SDM 3A 3.4.5, 8.2.3). Accessed and busy bits are set, as the
/// processor would leave them, so that the table is never written to.
pub(super) const GDT_ENTRIES: [u64; 6] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x0000_8b00_0000_0000 | (layout::TSS & 0xff_ffff) << 16 | TSS_LIMIT as u64,
    0,
];

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;

/// Bytes mapped by one entry of a page directory.
const LARGE_PAGE: u64 = 2 << 20;
const ENTRIES: u64 = 512;
const DIRECTORIES: u64 = 4;

/// Writes GDT, a zero TSS and page tables that map the first 4 GiB one to one with 2 MiB pages.
pub(super) fn write(mem: &GuestMemoryMmap) -> Result<(), BootError> {
    let gdt: Vec<u8> = GDT_ENTRIES.iter().flat_map(|e| e.to_le_bytes()).collect();
    put(mem, "the GDT", layout::GDT, &gdt)?;
    put(mem, "the TSS", layout::TSS, &[0; TSS_LIMIT as usize + 1])?;
    put(mem, "the page tables", layout::PAGE_TABLES, &page_tables())
}

/// PML4, page directory pointers and four page directories, in this order, one page each. Accessed and dirty bits
/// are set, so that running the guest does not change them.
fn page_tables() -> Vec<u8> {
    let mut words = vec![0u64; (ENTRIES * (2 + DIRECTORIES)) as usize];
    let table = |number: u64| layout::PAGE_TABLES + number * PAGE_SIZE;
    words[0] = table(1) | PRESENT | WRITABLE | ACCESSED;
    for directory in 0..DIRECTORIES {
        let entry = table(2 + directory) | PRESENT | WRITABLE | ACCESSED;
        words[(ENTRIES + directory) as usize] = entry;
    }
    for (page, word) in (0u64..).zip(&mut words[2 * ENTRIES as usize..]) {
        *word = (page * LARGE_PAGE) | PRESENT | WRITABLE | ACCESSED | DIRTY | LARGE;
    }
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Writes bytes that the layout keeps room for.
pub(super) fn put(mem: &GuestMemoryMmap, what: &'static str, at: u64, bytes: &[u8]) -> Result<(), BootError> {
    mem.write_slice(bytes, GuestAddress(at)).map_err(|e| BootError::Write { what, at, reason: e.to_string() })
}
