//! The immutable set of debug registers that is in force for one epoch.

use super::{Breakpoint, Dr7, Handler, Level, Owner, SLOTS, SlotCondition, SlotLen};

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

/// What every vCPU installs: DR0-3, DR7, and what each slot means (law 2).
///
/// DR7 is computed once, here, when the coordinator builds the image; a vCPU thread copies it.
/// A slot's meaning never changes between two images that can be in force at one time (law 6).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DebugImage {
    epoch: Epoch,
    slots: [Option<Slot>; SLOTS],
    dr7: Dr7,
}

impl DebugImage {
    /// Computes the image for `slots`. An execution slot longer than one byte cannot be encoded
    /// and is left disabled; the slot table never makes one.
    pub fn new(epoch: Epoch, slots: [Option<Slot>; SLOTS]) -> Self {
        let dr7 = slots.iter().enumerate().fold(Dr7::NONE, |dr7, (n, slot)| match slot {
            Some(slot) => dr7.enable(n, slot.condition, slot.len).unwrap_or(dr7),
            None => dr7,
        });
        Self { epoch, slots, dr7 }
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

    /// Whether any slot is enabled.
    pub fn is_empty(&self) -> bool {
        self.dr7 == Dr7::NONE
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
