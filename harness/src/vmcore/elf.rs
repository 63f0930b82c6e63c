//! A core as ELF (gABI, chapters 4 and 5): headers, notes, then all RAM from a page boundary on.
//!
//! Every PT_LOAD points into the RAM part; those of other linear addresses share its bytes. RAM itself
//! comes first, since crash takes the first that has a physical address.

use std::path::Path;

use trapline_vmm::limits::PAGE_SIZE;
use trapline_vmm::paging::Extent;

use super::file::CoreFile;
use super::layout::{KERNEL_MAP, Layout};
use super::notes::notes;
use super::ram::{Ram, Run};
use super::{Core, CoreError};

const EHDR_SIZE: u64 = 64;
const PHDR_SIZE: u64 = 56;
const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const RWX: u32 = 7;
/// End of the addresses that hold the image of x86-64 Linux, above which modules are.
const KERNEL_MAP_END: u64 = 0xffff_ffff_c000_0000;
/// A physical address that means none, to drgn, makedumpfile and /proc/kcore.
const NO_ADDRESS: u64 = u64::MAX;

pub(super) fn write(core: &Core<'_>, path: &Path) -> Result<u64, CoreError> {
    let notes = notes(core.vcpus, &core.vmcoreinfo);
    let layout = Layout::new(core.ram, core.vcpus, &core.vmcoreinfo);
    let ram = Ram::new(core);
    let head = head(&ram, &layout, &notes);
    let start = (head.len() as u64).next_multiple_of(PAGE_SIZE);
    let len = start + core.ram.size();
    let mut file = CoreFile::create(path, len)?;
    file.write(0, &head)?;
    ram.each_run(|Run { offset, bytes }| file.write(start + offset, bytes))?;
    file.keep(len)
}

/// All before RAM.
fn head(ram: &Ram<'_>, layout: &Layout, notes: &[u8]) -> Vec<u8> {
    let segments = ram.ranges().len() + layout.extents.len();
    let notes_at = EHDR_SIZE + PHDR_SIZE * (1 + segments as u64);
    let start = (notes_at + notes.len() as u64).next_multiple_of(PAGE_SIZE);
    let mut head = header(1 + segments);
    let notes_len = notes.len() as u64;
    head.extend(program_header(PT_NOTE, 0, notes_at, 0, 0, notes_len));
    for (offset, gpa, len) in ram.ranges() {
        head.extend(program_header(PT_LOAD, RWX, start + offset, gpa.wrapping_add(layout.linear), *gpa, *len));
    }
    for Extent { gva, gpa, len } in &layout.extents {
        // Only what is at one place has a physical address, so that nobody counts RAM twice; but from the
        // kernel's image readers of old kernels' cores find out where that was loaded.
        let image = (KERNEL_MAP..KERNEL_MAP_END).contains(gva);
        let paddr = if image { *gpa } else { NO_ADDRESS };
        head.extend(program_header(PT_LOAD, RWX, start + ram.offset(*gpa), *gva, paddr, *len));
    }
    head.extend(notes);
    head
}

fn header(segments: usize) -> Vec<u8> {
    let mut header = Vec::new();
    // 64 bits, little-endian, version 1, System V.
    header.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    header.extend([ET_CORE, EM_X86_64].iter().flat_map(|half| half.to_le_bytes()));
    header.extend(1_u32.to_le_bytes());
    // No entry point, the program headers right behind this one, no sections.
    header.extend([0, EHDR_SIZE, 0].iter().flat_map(|word: &u64| word.to_le_bytes()));
    header.extend(0_u32.to_le_bytes());
    // The layout has fewer than 16 bits can count.
    let counts = [EHDR_SIZE as u16, PHDR_SIZE as u16, segments as u16, 0, 0, 0];
    header.extend(counts.iter().flat_map(|half| half.to_le_bytes()));
    header
}

/// One program header. Its alignment is 0, by which crash tells a kernel's core from netdump's.
fn program_header(kind: u32, flags: u32, offset: u64, vaddr: u64, paddr: u64, len: u64) -> Vec<u8> {
    let mut header = Vec::with_capacity(PHDR_SIZE as usize);
    header.extend([kind, flags].iter().flat_map(|half| half.to_le_bytes()));
    header.extend([offset, vaddr, paddr, len, len, 0].iter().flat_map(|word| word.to_le_bytes()));
    header
}
