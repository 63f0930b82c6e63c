//! RAM as KVM's memory slots, with single pages of it read-only.
//!
//! A store into a read-only slot exits to us instead of being done (KVM API 4.35): that is how a
//! page is watched. KVM lets no slot change this flag, be split or be resized, so each change deletes
//! and creates slots, which is safe only while no vCPU runs.
//!
//! ```text
//!   RAM        0 ............................................ end
//!   protected         #        ##
//!   slots      |  0   |1|  2   |3 |           4               |
//! ```
//!
//! Neighbouring protected pages share a slot. Where KVM has too few of them, the shortest stretches
//! between protected pages are protected too: stores there are performed like all others, and nobody is told.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use crate::limits::PAGE_SIZE;
use crate::memory::Slot;

/// Least number of slots that [`MemorySlots`] can work with: three for each of two ranges of RAM.
const FEWEST_SLOTS: usize = 6;

/// One call of KVM_SET_USER_MEMORY_REGION.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Change {
    /// The slot; a size of 0 deletes it.
    pub(crate) slot: Slot,
    /// KVM_MEM_READONLY.
    pub(crate) read_only: bool,
}

/// A range of RAM that one slot maps. In pages, by the first of which it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    pages: u64,
    read_only: bool,
}

/// The slots in force.
#[derive(Debug)]
pub(crate) struct MemorySlots {
    /// RAM as it lies in this process. The slot numbers are those of the first layout only.
    ram: Vec<Slot>,
    /// Most slots that may exist at one time, which is also the end of their numbers.
    most: usize,
    /// What KVM has, by first page: the piece and the number of its slot.
    mapped: BTreeMap<u64, (Piece, u32)>,
}

impl MemorySlots {
    /// For `ram` as KVM has it already, in the slots that it names; `most` slots may exist.
    pub(crate) fn new(ram: Vec<Slot>, most: usize) -> Self {
        let whole = |slot: &Slot| Piece { pages: slot.memory_size / PAGE_SIZE, read_only: false };
        let mapped = ram.iter().map(|slot| (slot.guest_phys_addr / PAGE_SIZE, (whole(slot), slot.slot))).collect();
        Self { ram, most: most.max(FEWEST_SLOTS), mapped }
    }

    /// Makes the pages at these addresses read-only and nothing else, but what the number of slots
    /// forces. `set` is KVM_SET_USER_MEMORY_REGION.
    ///
    /// No vCPU may run: between a deletion and the creation that follows it the RAM is not there.
    ///
    /// # Errors
    /// If a page is no RAM, or what `set` said; then everything is as it was. If even that could not be
    /// had, the error says so, and the next change starts from what there is.
    pub(crate) fn protect(
        &mut self,
        protected: &BTreeSet<u64>,
        mut set: impl FnMut(Change) -> io::Result<()>,
    ) -> io::Result<()> {
        let number = |addr: &u64| {
            let page =
                Some(addr / PAGE_SIZE).filter(|page| addr.is_multiple_of(PAGE_SIZE) && self.ram_of(*page).is_some());
            page.ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidInput, format!("there is no page of RAM at {addr:#x}"))
            })
        };
        let protected = protected.iter().map(number).collect::<io::Result<BTreeSet<u64>>>()?;
        let before = self.mapped.clone();
        let wanted = self.layout(&protected);
        let Err(error) = self.become_layout(&wanted, &mut set) else { return Ok(()) };
        let old = before.iter().map(|(first, (piece, _))| (*first, *piece)).collect();
        match self.become_layout(&old, &mut set) {
            Ok(()) => Err(error),
            Err(undo) => Err(io::Error::new(error.kind(), format!("{error}; and RAM could not be put back: {undo}"))),
        }
    }

    /// Deletes the slots that are not wanted and creates those that are missing. On error `mapped`
    /// says what KVM has.
    fn become_layout(
        &mut self,
        wanted: &BTreeMap<u64, Piece>,
        set: &mut impl FnMut(Change) -> io::Result<()>,
    ) -> io::Result<()> {
        let gone: Vec<u64> = self
            .mapped
            .iter()
            .filter(|(first, (piece, _))| wanted.get(first) != Some(piece))
            .map(|(first, _)| *first)
            .collect();
        // KVM refuses slots that overlap: all deletions come first.
        for first in gone {
            if let Some((piece, number)) = self.mapped.get(&first).copied() {
                let slot = Slot { memory_size: 0, ..self.slot(first, piece, number)? };
                set(Change { slot, read_only: false })?;
                self.mapped.remove(&first);
            }
        }
        let used: BTreeSet<u32> = self.mapped.values().map(|(_, number)| *number).collect();
        let missing = wanted.iter().filter(|(first, _)| !self.mapped.contains_key(first));
        let missing: Vec<(u64, Piece)> = missing.map(|(first, piece)| (*first, *piece)).collect();
        let free = (0..).filter(|number| !used.contains(number));
        for ((first, piece), number) in missing.into_iter().zip(free) {
            set(Change { slot: self.slot(first, piece, number)?, read_only: piece.read_only })?;
            self.mapped.insert(first, (piece, number));
        }
        Ok(())
    }

    /// The range of RAM that has this page.
    fn ram_of(&self, page: u64) -> Option<&Slot> {
        let addr = page.checked_mul(PAGE_SIZE)?;
        self.ram.iter().find(|ram| addr.checked_sub(ram.guest_phys_addr).is_some_and(|at| at < ram.memory_size))
    }

    fn slot(&self, first: u64, piece: Piece, number: u32) -> io::Result<Slot> {
        let ram = self.ram_of(first).ok_or(io::ErrorKind::InvalidInput)?;
        let guest_phys_addr = first * PAGE_SIZE;
        Ok(Slot {
            slot: number,
            guest_phys_addr,
            memory_size: piece.pages * PAGE_SIZE,
            userspace_addr: ram.userspace_addr + (guest_phys_addr - ram.guest_phys_addr),
        })
    }

    /// Which pieces RAM is to be mapped in, by first page, for these page numbers.
    fn layout(&self, protected: &BTreeSet<u64>) -> BTreeMap<u64, Piece> {
        let runs: Vec<Vec<(u64, u64)>> = self.ram.iter().map(|ram| runs(protected, pages_of(ram))).collect();
        let pieces = |runs: &[Vec<(u64, u64)>]| -> BTreeMap<u64, Piece> {
            self.ram.iter().zip(runs).flat_map(|(ram, runs)| split(pages_of(ram), runs)).collect()
        };
        let all = pieces(&runs);
        let Some(too_many) = all.len().checked_sub(self.most).filter(|excess| *excess > 0) else { return all };
        // Each gap that is closed joins three slots to one.
        let mut gaps: Vec<u64> = runs.iter().flat_map(|runs| gaps(runs)).collect();
        gaps.sort_unstable();
        let to_close = too_many.div_ceil(2).min(gaps.len());
        let Some(&widest) = to_close.checked_sub(1).and_then(|last| gaps.get(last)) else { return all };
        let closed: Vec<_> = runs.iter().map(|runs| close_gaps(runs, widest)).collect();
        pieces(&closed)
    }
}

/// The pages of a range of RAM, as first and end.
fn pages_of(ram: &Slot) -> (u64, u64) {
    let first = ram.guest_phys_addr / PAGE_SIZE;
    (first, first + ram.memory_size / PAGE_SIZE)
}

/// The protected pages within `from .. to`, as runs of neighbours (first, end).
fn runs(protected: &BTreeSet<u64>, (from, to): (u64, u64)) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for &page in protected.range(from..to) {
        match runs.last_mut() {
            Some((_, end)) if *end == page => *end += 1,
            _ => runs.push((page, page + 1)),
        }
    }
    runs
}

/// The lengths of what lies between the runs.
fn gaps(runs: &[(u64, u64)]) -> impl Iterator<Item = u64> {
    runs.windows(2).map(|pair| pair[1].0 - pair[0].1)
}

/// Joins runs with no more than `widest` pages between them.
fn close_gaps(runs: &[(u64, u64)], widest: u64) -> Vec<(u64, u64)> {
    let mut closed: Vec<(u64, u64)> = Vec::new();
    for &(first, end) in runs {
        match closed.last_mut() {
            Some((_, last)) if first - *last <= widest => *last = end,
            _ => closed.push((first, end)),
        }
    }
    closed
}

/// A range of RAM in pieces: the runs read-only, the rest as it always was.
fn split((from, to): (u64, u64), runs: &[(u64, u64)]) -> Vec<(u64, Piece)> {
    let mut pieces = Vec::new();
    let mut at = from;
    for &(first, end) in runs {
        if at < first {
            pieces.push((at, Piece { pages: first - at, read_only: false }));
        }
        pieces.push((first, Piece { pages: end - first, read_only: true }));
        at = end;
    }
    if at < to {
        pieces.push((at, Piece { pages: to - at, read_only: false }));
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 64;
    const HIGH: u64 = 1000;

    /// Two ranges of RAM, as around the PCI hole.
    fn ram() -> Vec<Slot> {
        let range = |slot, page| Slot {
            slot,
            guest_phys_addr: page * PAGE_SIZE,
            memory_size: PAGES * PAGE_SIZE,
            userspace_addr: 0x7000_0000_0000 + u64::from(slot) * 0x1_0000_0000,
        };
        vec![range(0, 0), range(1, HIGH)]
    }

    fn is_ram(page: u64) -> bool {
        page < PAGES || (HIGH..HIGH + PAGES).contains(&page)
    }

    /// KVM's rules for memory slots, and calls that fail.
    struct Kvm {
        slots: BTreeMap<u32, (Slot, bool)>,
        most: usize,
        calls: usize,
        fail_at: Option<usize>,
    }

    impl Kvm {
        fn new(most: usize) -> Self {
            let slots = ram().into_iter().map(|slot| (slot.slot, (slot, false))).collect();
            Kvm { slots, most, calls: 0, fail_at: None }
        }

        fn set(&mut self, Change { slot, read_only }: Change) -> io::Result<()> {
            self.calls += 1;
            if self.fail_at == Some(self.calls) {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            if slot.memory_size == 0 {
                return self.slots.remove(&slot.slot).map(|_| ()).ok_or_else(|| io::ErrorKind::NotFound.into());
            }
            let end = |slot: &Slot| slot.guest_phys_addr + slot.memory_size;
            let overlaps =
                |(other, _): &(Slot, bool)| other.guest_phys_addr < end(&slot) && slot.guest_phys_addr < end(other);
            assert!(!self.slots.values().any(overlaps), "{slot:x?} overlaps");
            assert!(!self.slots.contains_key(&slot.slot), "slot {} is there", slot.slot);
            assert!(self.slots.len() < self.most && (slot.slot as usize) < self.most, "too many slots");
            self.slots.insert(slot.slot, (slot, read_only));
            Ok(())
        }

        /// What a store into a page does: `None`, it goes to a device; else whether it exits.
        fn exits(&self, page: u64) -> Option<bool> {
            let addr = page * PAGE_SIZE;
            let has = |slot: &Slot| (slot.guest_phys_addr..slot.guest_phys_addr + slot.memory_size).contains(&addr);
            let (slot, read_only) = self.slots.values().find(|(slot, _)| has(slot))?;
            let ram = ram().into_iter().find(has)?;
            assert_eq!(
                slot.userspace_addr.wrapping_sub(slot.guest_phys_addr),
                ram.userspace_addr.wrapping_sub(ram.guest_phys_addr),
                "another page of this process is mapped there"
            );
            Some(*read_only)
        }

        /// By page: what the guest sees of it all.
        fn seen(&self) -> BTreeMap<u64, bool> {
            (0..HIGH + PAGES + 2).filter_map(|page| Some((page, self.exits(page)?))).collect()
        }
    }

    fn addresses(pages: &BTreeSet<u64>) -> BTreeSet<u64> {
        pages.iter().map(|page| page * PAGE_SIZE).collect()
    }

    fn expected(protected: &BTreeSet<u64>) -> BTreeMap<u64, bool> {
        (0..HIGH + PAGES).filter(|page| is_ram(*page)).map(|page| (page, protected.contains(&page))).collect()
    }

    #[test]
    fn neighbouring_pages_share_a_slot_and_what_stays_is_not_touched() {
        let (mut kvm, mut slots) = (Kvm::new(100), MemorySlots::new(ram(), 100));
        let pages = BTreeSet::from([3, 4, 5, 9]);
        slots.protect(&addresses(&pages), |change| kvm.set(change)).unwrap();
        assert_eq!((kvm.slots.len(), kvm.calls), (6, 6), "five pieces for one of the two slots");
        assert_eq!(kvm.seen(), expected(&pages));
        // The same again is nothing to do; all off is the two slots of the beginning.
        slots.protect(&addresses(&pages), |change| kvm.set(change)).unwrap();
        assert_eq!(kvm.calls, 6);
        slots.protect(&BTreeSet::new(), |change| kvm.set(change)).unwrap();
        assert_eq!(kvm.slots.len(), 2);
        assert_eq!(kvm.seen(), expected(&BTreeSet::new()));
    }

    #[test]
    fn the_ends_of_ram_and_all_of_it() {
        let (mut kvm, mut slots) = (Kvm::new(100), MemorySlots::new(ram(), 100));
        let ends = BTreeSet::from([0, PAGES - 1, HIGH, HIGH + PAGES - 1]);
        for pages in [ends, (0..PAGES).collect()] {
            slots.protect(&addresses(&pages), |change| kvm.set(change)).unwrap();
            assert_eq!(kvm.seen(), expected(&pages));
        }
        for addr in [PAGES * PAGE_SIZE, (HIGH - 1) * PAGE_SIZE, (HIGH + PAGES) * PAGE_SIZE, 0x800, u64::MAX, 1 << 63] {
            let error = slots.protect(&BTreeSet::from([addr]), |_| panic!("KVM is asked")).unwrap_err();
            assert!(error.to_string().contains("no page of RAM"), "{error}");
        }
    }

    #[test]
    fn the_shortest_gaps_are_closed_where_slots_run_out() {
        let (mut kvm, mut slots) = (Kvm::new(8), MemorySlots::new(ram(), 8));
        // Four runs, nine pieces and the other range: ten slots, two too many.
        let pages = BTreeSet::from([2, 10, 12, 30]);
        slots.protect(&addresses(&pages), |change| kvm.set(change)).unwrap();
        assert_eq!(kvm.seen(), expected(&BTreeSet::from([2, 10, 11, 12, 30])));
        assert_eq!(kvm.slots.len(), 8);
    }

    #[test]
    fn an_undoing_that_fails_is_said_and_the_next_change_mends_it() {
        let (mut kvm, mut slots) = (Kvm::new(100), MemorySlots::new(ram(), 100));
        kvm.fail_at = Some(2);
        let mut calls = 0;
        let error = slots.protect(&addresses(&BTreeSet::from([3])), |change| {
            calls += 1;
            if calls == 3 { Err(io::ErrorKind::OutOfMemory.into()) } else { kvm.set(change) }
        });
        assert!(error.unwrap_err().to_string().contains("could not be put back"));
        assert_eq!(kvm.exits(3), None);
        slots.protect(&BTreeSet::new(), |change| kvm.set(change)).unwrap();
        assert_eq!(kvm.seen(), expected(&BTreeSet::new()));
    }

    fn any_pages() -> impl Strategy<Value = BTreeSet<u64>> {
        let page = prop_oneof![0..PAGES, HIGH..HIGH + PAGES];
        prop::collection::btree_set(page, 0..40)
    }

    proptest! {
        /// Whatever is changed to whatever, and whichever call fails: the guest sees RAM everywhere and
        /// exactly the protected pages exit; after a failure it sees what it saw before.
        #[test]
        fn the_guest_sees_exactly_what_is_asked_for(
            changes in prop::collection::vec((any_pages(), prop::option::of(1usize..30)), 1..12),
        ) {
            let (mut kvm, mut slots) = (Kvm::new(500), MemorySlots::new(ram(), 500));
            let mut in_force = BTreeSet::new();
            for (pages, fail_after) in changes {
                kvm.fail_at = fail_after.map(|calls| kvm.calls + calls);
                let before = kvm.seen();
                match slots.protect(&addresses(&pages), |change| kvm.set(change)) {
                    Ok(()) => in_force = pages,
                    Err(_) => prop_assert_eq!(kvm.seen(), before),
                }
                prop_assert_eq!(kvm.seen(), expected(&in_force));
            }
        }

        /// With few slots more pages exit, never fewer, and never more slots are used.
        #[test]
        fn few_slots_protect_more_and_never_less(pages in any_pages(), most in FEWEST_SLOTS..30) {
            let (mut kvm, mut slots) = (Kvm::new(most), MemorySlots::new(ram(), most));
            slots.protect(&addresses(&pages), |change| kvm.set(change)).unwrap();
            let seen = kvm.seen();
            prop_assert!(pages.iter().all(|page| seen.get(page) == Some(&true)));
            prop_assert_eq!(seen.len() as u64, 2 * PAGES);
            let roomy = MemorySlots::new(ram(), 1000).layout(&pages).len();
            prop_assert!(roomy > most || seen == expected(&pages), "protected without need");
        }
    }
}
