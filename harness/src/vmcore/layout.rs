//! Which linear addresses lead to the guest's RAM, by its own page tables.
//!
//! A core has all RAM once, and PT_LOADs say at which addresses it is found. RAM as a whole stands where
//! most of it is mapped, which is the direct map in Linux (KASLR moves it; nobody needs to tell us). All
//! else that is mapped elsewhere comes after it, as so many stretches of the same bytes.

use std::collections::BTreeMap;

use trapline_vmm::memory::GuestRam;
use trapline_vmm::paging::{Extent, Half, Paging};
use trapline_vmm::vcpu::Registers;

use super::info::Info;

/// Most stretches beside RAM itself. ELF counts program headers in 16 bits; a guest has some thousand,
/// but a hostile one could have as many as pages.
const MOST_EXTENTS: usize = 60_000;
/// Added to a guest-physical address for RAM that has no linear address of its own: no processor has
/// addresses there.
const NOWHERE: u64 = 0x0100_0000_0000_0000;
/// x86-64 Linux: where the kernel's image is linked, `__START_KERNEL_map`.
pub(super) const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

const CR0_PE_PG: u64 = 1 << 31 | 1;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

/// Where RAM is found.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Added to a guest-physical address, this gives a linear one for RAM as a whole.
    pub(super) linear: u64,
    /// Everything else that is mapped: RAM only, ascending, without overlap.
    pub(super) extents: Vec<Extent>,
}

impl Layout {
    /// Reads the page tables that `vmcoreinfo` names and those in force on the vCPUs. If two of them
    /// map an address differently, the first has it.
    pub(super) fn new(ram: &GuestRam, vcpus: &[Registers], vmcoreinfo: &[u8]) -> Self {
        let ranges = ram.ranges();
        let mut found = Stretches::default();
        for (paging, half) in roots(vcpus, vmcoreinfo) {
            paging.extents(ram.mem(), half, &mut |extent| {
                for piece in ranges.iter().filter_map(|range| clip(extent, *range)) {
                    found.add(piece);
                }
                found.all.len() < MOST_EXTENTS
            });
        }
        let found: Vec<Extent> = found.all.into_values().collect();
        let linear = main_offset(&found).filter(|offset| is_free(*offset, &ranges, &found)).unwrap_or(NOWHERE);
        let extents = found.into_iter().filter(|extent| extent.gva.wrapping_sub(extent.gpa) != linear);
        let extents = extents.take(MOST_EXTENTS).collect();
        Self { linear, extents }
    }
}

/// The page tables to read, and which half of the addresses they map.
fn roots(vcpus: &[Registers], vmcoreinfo: &[u8]) -> Vec<(Paging, Half)> {
    // The kernel's own tables first. With page-table isolation, a vCPU in user space has others, which
    // lack most of the kernel.
    let mut roots: Vec<(Paging, Half)> =
        kernel_tables(vmcoreinfo).map(|paging| (paging, Half::Upper)).into_iter().collect();
    let mut add = |paging: Paging, half| {
        if !roots.contains(&(paging, half)) {
            roots.push((paging, half));
        }
    };
    for registers in vcpus {
        add(Paging::from(registers), Half::Upper);
    }
    // The lower half is as many programs' as there are vCPUs, unless a kernel runs there.
    for registers in vcpus.iter().filter(|registers| registers.cpl() == 0 && registers.pc() >> 63 == 0) {
        add(Paging::from(registers), Half::Lower);
    }
    roots
}

/// Linux' tables without a process, from what VMCOREINFO says of them.
fn kernel_tables(vmcoreinfo: &[u8]) -> Option<Paging> {
    let info = Info(vmcoreinfo);
    let cr3 = info.tables()?.checked_sub(KERNEL_MAP)?.checked_add_signed(info.phys_base()?)?;
    Some(Paging { cr0: CR0_PE_PG, cr3, cr4: CR4_PAE | if info.wide() { CR4_LA57 } else { 0 }, efer: EFER_LMA })
}

/// What of `extent` is in the range of RAM `(start, length)`.
fn clip(extent: Extent, (start, len): (u64, u64)) -> Option<Extent> {
    let from = extent.gpa.max(start);
    let to = extent.gpa.saturating_add(extent.len).min(start.saturating_add(len));
    (from < to).then(|| Extent { gva: extent.gva + (from - extent.gpa), gpa: from, len: to - from })
}

/// The difference of linear and physical addresses by which most memory is mapped.
fn main_offset(extents: &[Extent]) -> Option<u64> {
    let mut mapped: BTreeMap<u64, u64> = BTreeMap::new();
    for extent in extents {
        *mapped.entry(extent.gva.wrapping_sub(extent.gpa)).or_default() += extent.len;
    }
    mapped.into_iter().max_by_key(|(offset, len)| (*len, *offset)).map(|(offset, _)| offset)
}

/// Whether RAM as a whole can stand there: its addresses do not wrap, and nothing else is among them.
fn is_free(offset: u64, ranges: &[(u64, u64)], extents: &[Extent]) -> bool {
    ranges.iter().all(|(start, len)| {
        let Some(end) = start.wrapping_add(offset).checked_add(*len) else { return false };
        let start = end - len;
        extents.iter().all(|extent| {
            extent.gva.wrapping_sub(extent.gpa) == offset || extent.gva >= end || extent.gva + (extent.len - 1) < start
        })
    })
}

/// Stretches of linear addresses, by the first of them, that do not overlap.
#[derive(Default)]
struct Stretches {
    all: BTreeMap<u64, Extent>,
}

impl Stretches {
    /// Adds what of `new` is not known yet.
    fn add(&mut self, new: Extent) {
        // Last addresses, not ends: the last page of all ends at 2^64.
        let last = new.gva + (new.len - 1);
        let mut at = new.gva;
        let before = self.all.range(..=at).next_back().map(|(_, known)| *known);
        let inside: Vec<Extent> = self.all.range(at..=last).map(|(_, known)| *known).collect();
        for known in before.into_iter().chain(inside) {
            if known.gva > at {
                self.insert(piece(new, at, known.gva - at));
            }
            let known_last = known.gva + (known.len - 1);
            if known_last >= at {
                let Some(next) = known_last.checked_add(1).filter(|next| *next <= last) else { return };
                at = next;
            }
        }
        self.insert(piece(new, at, last - at + 1));
    }

    fn insert(&mut self, extent: Extent) {
        self.all.insert(extent.gva, extent);
    }
}

/// `len` bytes of `extent` from `gva` on.
fn piece(extent: Extent, gva: u64, len: u64) -> Extent {
    Extent { gva, gpa: extent.gpa + (gva - extent.gva), len }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_across_the_pci_hole_is_cut_at_both_of_its_sides() {
        const GIB: u64 = 1 << 30;
        let extent = Extent { gva: 0xffff_8880_8000_0000, gpa: 2 * GIB, len: 3 * GIB };
        let cut = |range| clip(extent, range).map(|piece| (piece.gva, piece.gpa, piece.len));
        assert_eq!(cut((0, 3 * GIB)), Some((0xffff_8880_8000_0000, 2 * GIB, GIB)));
        assert_eq!(cut((4 * GIB, 0x1000)), Some((0xffff_8881_0000_0000, 4 * GIB, 0x1000)));
        assert_eq!((cut((0, 2 * GIB)), cut((5 * GIB, GIB))), (None, None));
    }
}
