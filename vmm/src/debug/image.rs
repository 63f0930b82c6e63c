//! The immutable set of debug registers, patches and watched pages that is in force for one epoch.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use super::{Breakpoint, Dr7, Handler, INT3, Level, Owner, SLOTS, SlotCondition, SlotLen};
use crate::limits::PAGE_SIZE;

/// Counts changes of the set. Epoch 0 is the empty image that every vCPU starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u64);

/// One armed slot: an aligned range, its condition, and everybody who wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// The value of DRn.
    pub addr: u64,
    /// Bytes covered.
    pub len: SlotLen,
    /// What triggers it.
    pub condition: SlotCondition,
    /// The requests behind it. Never empty.
    pub owners: Vec<SlotOwner>,
}

/// One request behind a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotOwner {
    /// Who asked.
    pub owner: Owner,
    /// What for.
    pub request: Breakpoint,
    /// What decides about a hit; without one every hit stops the world.
    pub handler: Option<Handler>,
}

impl Slot {
    /// The highest level that wants this slot.
    pub fn level(&self) -> Level {
        self.owners.iter().map(|behind| behind.owner.level).max().unwrap_or(Level::Guest)
    }
}

/// An INT3 in guest memory, and everybody who wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patch {
    /// Guest-physical address of the byte.
    pub gpa: u64,
    /// What the guest has there.
    pub original: u8,
    /// The requests behind it, which may differ in their linear addresses. Never empty.
    pub owners: Vec<SlotOwner>,
}

/// A piece of a watched range, in one page that is read-only because of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchedRange {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// Linear address of its first byte.
    pub addr: u64,
    /// The request that it is a piece of.
    pub behind: SlotOwner,
}

impl WatchedRange {
    /// Guest-physical addresses.
    pub fn bytes(&self) -> Range<u64> {
        self.gpa..self.gpa + self.len
    }
}

/// What every vCPU installs: DR0-3, DR7, and what each slot means (law 2); and what stands in
/// guest memory for the requests that the slots do not serve.
///
/// DR7 is computed once, here, when the coordinator builds the image; a vCPU thread copies it.
/// A slot's meaning never changes between two images that can be in force at one time (law 6).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DebugImage {
    epoch: Epoch,
    slots: [Option<Slot>; SLOTS],
    dr7: Dr7,
    /// By address, no two at one.
    patches: Arc<[Patch]>,
    /// By address; they may overlap.
    ranges: Arc<[WatchedRange]>,
}

impl DebugImage {
    /// Computes the image for `slots`. An execution slot longer than one byte cannot be encoded
    /// and is left disabled; the slot table never makes one.
    pub fn new(epoch: Epoch, slots: [Option<Slot>; SLOTS]) -> Self {
        let dr7 = slots.iter().enumerate().fold(Dr7::NONE, |dr7, (n, slot)| match slot {
            Some(slot) => dr7.enable(n, slot.condition, slot.len).unwrap_or(dr7),
            None => dr7,
        });
        Self { epoch, slots, dr7, patches: Arc::default(), ranges: Arc::default() }
    }

    /// The same slots, with these in guest memory.
    #[must_use]
    pub fn with_memory(mut self, mut patches: Vec<Patch>, mut ranges: Vec<WatchedRange>) -> Self {
        patches.sort_by_key(|patch| patch.gpa);
        ranges.sort_by_key(|range| range.gpa);
        (self.patches, self.ranges) = (patches.into(), ranges.into());
        self
    }

    /// Which change of the set this is.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// DR0-DR3.
    pub fn addresses(&self) -> [u64; SLOTS] {
        std::array::from_fn(|n| self.slots[n].as_ref().map_or(0, |slot| slot.addr))
    }

    /// DR7.
    pub fn dr7(&self) -> Dr7 {
        self.dr7
    }

    /// DR7 without the slots of which a bit is set: what a vCPU uses to step off a breakpoint
    /// (law 37; RF is honoured by some KVM paths only).
    pub fn dr7_without(&self, suspended: u8) -> Dr7 {
        (0..SLOTS).filter(|n| suspended & (1 << n) != 0).fold(self.dr7, |dr7, n| dr7.disable(n))
    }

    /// The slots, by register number.
    pub fn slots(&self) -> &[Option<Slot>; SLOTS] {
        &self.slots
    }

    /// Whether nothing is armed at all.
    pub fn is_empty(&self) -> bool {
        self.dr7 == Dr7::NONE && self.patches.is_empty() && self.ranges.is_empty()
    }

    /// The patches, by address.
    pub fn patches(&self) -> &[Patch] {
        &self.patches
    }

    /// The patch at this guest-physical address.
    pub fn patch_at(&self, gpa: u64) -> Option<&Patch> {
        self.patches.binary_search_by_key(&gpa, |patch| patch.gpa).ok().map(|n| &self.patches[n])
    }

    /// The patches among `len` bytes from `gpa` on, by address.
    pub fn patches_in(&self, gpa: u64, len: u64) -> &[Patch] {
        let first = self.patches.partition_point(|patch| patch.gpa < gpa);
        let near = &self.patches[first..];
        &near[..near.partition_point(|patch| patch.gpa - gpa < len)]
    }

    /// Shows in `bytes`, which were read from `gpa` on, what the guest has where patches are (law 55).
    pub fn hide_patches(&self, gpa: u64, bytes: &mut [u8]) {
        for patch in self.patches_in(gpa, bytes.len() as u64) {
            // What the guest has written over a patch is its own.
            if let Some(byte) = bytes.get_mut((patch.gpa - gpa) as usize).filter(|byte| **byte == INT3) {
                *byte = patch.original;
            }
        }
    }

    /// The watched ranges, by address.
    pub fn ranges(&self) -> &[WatchedRange] {
        &self.ranges
    }

    /// The watched ranges that share a byte with `len` bytes from `gpa` on.
    pub fn ranges_in(&self, gpa: u64, len: u64) -> impl Iterator<Item = &WatchedRange> {
        // A range lies in one page, so none that begins a page or more before can reach here.
        let first = self.ranges.partition_point(|range| range.gpa < gpa.saturating_sub(PAGE_SIZE - 1));
        let end = gpa.saturating_add(len);
        let near = self.ranges[first..].iter().take_while(move |range| range.gpa < end);
        near.filter(move |range| range.bytes().end > gpa)
    }

    /// Whether guest memory is the same under both: patches at the same bytes, the same pages protected.
    pub fn has_memory_of(&self, other: &DebugImage) -> bool {
        self.patches.iter().map(|patch| patch.gpa).eq(other.patches.iter().map(|patch| patch.gpa))
            && self.pages() == other.pages()
    }

    /// Addresses of the pages that must be read-only for the guest.
    pub fn pages(&self) -> BTreeSet<u64> {
        self.ranges.iter().map(|range| range.gpa & !(PAGE_SIZE - 1)).collect()
    }

    /// The execution slots whose address is `pc`, with their numbers.
    pub fn exec_slots_at(&self, pc: u64) -> impl Iterator<Item = (usize, &Slot)> {
        self.slots.iter().enumerate().filter_map(move |(n, slot)| {
            slot.as_ref()
                .filter(|slot| slot.condition == SlotCondition::Execute && slot.addr == pc)
                .map(|slot| (n, slot))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn image(patches: &[(u64, u8)]) -> DebugImage {
        let patch = |&(gpa, original): &(u64, u8)| {
            let behind = SlotOwner { owner: Owner::GDB, request: Breakpoint::exec(gpa), handler: None };
            Patch { gpa, original, owners: vec![behind] }
        };
        DebugImage::new(Epoch(1), Default::default()).with_memory(patches.iter().map(patch).collect(), Vec::new())
    }

    #[test]
    fn l55_a_patch_that_the_guest_has_overwritten_is_not_hidden() {
        let mut bytes = [INT3, 0x90, INT3, INT3];
        image(&[(0x1000, 0x55), (0x1001, 0x48), (0x1003, 0xf4)]).hide_patches(0x1000, &mut bytes);
        assert_eq!(bytes, [0x55, 0x90, INT3, 0xf4]);
    }

    proptest! {
        #[test]
        fn l55_hiding_agrees_with_a_look_at_each_byte(
            patches in prop::collection::btree_map(0x1000u64..0x1040, any::<u8>(), 0..20),
            gpa in prop_oneof![0xff0u64..0x1050, Just(0), Just(u64::MAX - 3)],
            overwritten in prop::collection::vec(any::<bool>(), 0..80),
        ) {
            let list: Vec<(u64, u8)> = patches.iter().map(|(gpa, byte)| (*gpa, *byte)).collect();
            let memory: Vec<u8> = overwritten.iter().map(|&other| if other { 0x11 } else { INT3 }).collect();
            let mut shown = memory.clone();
            image(&list).hide_patches(gpa, &mut shown);
            for (n, (shown, there)) in shown.into_iter().zip(memory).enumerate() {
                let original = gpa.checked_add(n as u64).and_then(|at| patches.get(&at)).filter(|_| there == INT3);
                prop_assert_eq!(shown, *original.unwrap_or(&there));
            }
        }
    }
}
