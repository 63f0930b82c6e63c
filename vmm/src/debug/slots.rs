//! The slot table: which requests are in force and which slot serves each.
//!
//! The table is plain data with one owner. A change is *prepared* into a new image; only when
//! every vCPU has installed that image is it *committed* (law 9). Until then the table is as it
//! was, so that undoing a failed change is to drop the prepared one.

use super::{
    Breakpoint, BreakpointError, DebugImage, Epoch, Level, Owner, SLOTS, Slot, SlotCondition, SlotLen, Trigger,
};

/// An aligned piece of a request: what one slot can cover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Chunk {
    addr: u64,
    len: SlotLen,
    condition: SlotCondition,
}

/// Requests and the slots that serve them.
#[derive(Debug, Clone, Default)]
pub struct SlotTable {
    requests: Vec<(Owner, Breakpoint)>,
    assigned: [Option<Chunk>; SLOTS],
    epoch: Epoch,
}

/// A change that can still fail to be applied. Dropping it leaves the table as it was.
#[derive(Debug)]
pub struct Prepared {
    after: SlotTable,
    image: DebugImage,
}

impl Prepared {
    /// What the vCPUs are to install.
    pub fn image(&self) -> &DebugImage {
        &self.image
    }
}

impl SlotTable {
    /// The requests in force.
    pub fn requests(&self) -> &[(Owner, Breakpoint)] {
        &self.requests
    }

    /// Whether `owner` holds `request`.
    pub fn holds(&self, owner: Owner, request: Breakpoint) -> bool {
        self.requests.contains(&(owner, request))
    }

    /// Prepares `request` for `owner`. Asking for what the owner already holds gives `Ok(None)`:
    /// there is nothing to do (RSP: inserting twice is harmless).
    pub fn prepare_set(&self, owner: Owner, request: Breakpoint) -> Result<Option<Prepared>, BreakpointError> {
        if self.holds(owner, request) {
            return Ok(None);
        }
        let chunks = split(request)?;
        let mut after = self.clone();
        let missing: Vec<Chunk> =
            chunks.into_iter().filter(|chunk| !after.assigned.iter().flatten().any(|have| have == chunk)).collect();
        let free: Vec<usize> = (0..SLOTS).filter(|&n| after.assigned[n].is_none()).collect();
        if missing.len() > free.len() {
            return Err(BreakpointError::NoSlot { request, needed: missing.len(), free: free.len() });
        }
        for (chunk, n) in missing.into_iter().zip(free) {
            after.assigned[n] = Some(chunk);
        }
        after.requests.push((owner, request));
        Ok(Some(after.into_prepared()))
    }

    /// Prepares the removal of `request` of `owner`.
    pub fn prepare_clear(&self, owner: Owner, request: Breakpoint) -> Result<Prepared, BreakpointError> {
        if !self.holds(owner, request) {
            return Err(BreakpointError::NotSet { request });
        }
        Ok(self.without(|held| *held == (owner, request)))
    }

    /// Prepares the removal of everything that `level` holds; `None` if it holds nothing.
    pub fn prepare_clear_level(&self, level: Level) -> Option<Prepared> {
        self.requests
            .iter()
            .any(|(owner, _)| owner.level == level)
            .then(|| self.without(|(owner, _)| owner.level == level))
    }

    /// Makes a prepared change the table's own. Called once every vCPU has acknowledged its image.
    pub fn commit(&mut self, prepared: Prepared) {
        *self = prepared.after;
    }

    /// Never reuses the epoch of a change that was sent to the vCPUs and then undone.
    pub fn skip_epoch(&mut self, used: Epoch) {
        self.epoch = self.epoch.max(used);
    }

    fn without(&self, gone: impl Fn(&(Owner, Breakpoint)) -> bool) -> Prepared {
        let mut after = self.clone();
        after.requests.retain(|held| !gone(held));
        for slot in &mut after.assigned {
            if let Some(chunk) = slot
                && !after.requests.iter().any(|(_, request)| wants(*request, *chunk))
            {
                *slot = None;
            }
        }
        after.into_prepared()
    }

    fn into_prepared(mut self) -> Prepared {
        self.epoch = Epoch(self.epoch.0 + 1);
        let slots = std::array::from_fn(|n| {
            self.assigned[n].map(|chunk| Slot {
                addr: chunk.addr,
                len: chunk.len,
                condition: chunk.condition,
                owners: self.requests.iter().copied().filter(|(_, request)| wants(*request, chunk)).collect(),
            })
        });
        let image = DebugImage::new(self.epoch, slots);
        Prepared { after: self, image }
    }
}

/// Whether `chunk` is one of the pieces that `request` splits into.
fn wants(request: Breakpoint, chunk: Chunk) -> bool {
    split(request).is_ok_and(|chunks| chunks.contains(&chunk))
}

/// Splits a request into the fewest aligned pieces of 1, 2, 4 or 8 bytes (law 62).
///
/// Never widened: a slot that covered more than was asked for would report accesses that nobody
/// asked about.
fn split(request: Breakpoint) -> Result<Vec<Chunk>, BreakpointError> {
    let invalid = |why| BreakpointError::Invalid { request, why };
    let condition = match request.on {
        Trigger::Execute if request.len != 1 => return Err(invalid("an execution breakpoint is one byte long")),
        Trigger::Execute => SlotCondition::Execute,
        Trigger::Write => SlotCondition::Write,
        Trigger::Read | Trigger::Access => SlotCondition::ReadWrite,
    };
    if request.len == 0 {
        return Err(invalid("its length is zero"));
    }
    let Some(last) = request.addr.checked_add(request.len - 1) else {
        return Err(invalid("its range wraps around the end of the address space"));
    };
    let mut chunks = Vec::new();
    let mut addr = request.addr;
    loop {
        let len = SlotLen::longest_at(addr, (last - addr).saturating_add(1));
        chunks.push(Chunk { addr, len, condition });
        if chunks.len() > SLOTS {
            return Err(invalid("it needs more than the four hardware slots; watch at most 32 aligned bytes"));
        }
        // The last piece may end at the very top of the address space.
        match addr.checked_add(len.bytes()) {
            Some(next) if next <= last => addr = next,
            _ => return Ok(chunks),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GDB: Owner = Owner::GDB;

    fn set(table: &mut SlotTable, owner: Owner, request: Breakpoint) -> Result<(), BreakpointError> {
        if let Some(prepared) = table.prepare_set(owner, request)? {
            table.commit(prepared);
        }
        Ok(())
    }

    fn clear(table: &mut SlotTable, owner: Owner, request: Breakpoint) -> Result<(), BreakpointError> {
        let prepared = table.prepare_clear(owner, request)?;
        table.commit(prepared);
        Ok(())
    }

    fn pieces(request: Breakpoint) -> Vec<(u64, u64)> {
        split(request).map(|chunks| chunks.iter().map(|c| (c.addr, c.len.bytes())).collect()).unwrap_or_default()
    }

    #[test]
    fn l62_ranges_split_into_aligned_pieces() {
        assert_eq!(pieces(Breakpoint::watch(0x30003, 5, Trigger::Write)), [(0x30003, 1), (0x30004, 4)]);
        assert_eq!(pieces(Breakpoint::watch(0x30000, 32, Trigger::Write)).len(), 4);
        assert!(split(Breakpoint::watch(0x30000, 33, Trigger::Write)).is_err());
        assert!(split(Breakpoint::watch(0x30000, u64::MAX, Trigger::Write)).is_err());
        assert!(split(Breakpoint::watch(0x30000, 0, Trigger::Write)).is_err());
        assert!(split(Breakpoint::watch(u64::MAX, 2, Trigger::Write)).is_err());
        assert_eq!(pieces(Breakpoint::watch(u64::MAX, 1, Trigger::Write)), [(u64::MAX, 1)]);
        assert_eq!(pieces(Breakpoint::watch(u64::MAX - 7, 8, Trigger::Write)), [(u64::MAX - 7, 8)]);
    }

    #[test]
    fn the_fifth_request_is_refused_and_the_four_stay() {
        let mut table = SlotTable::default();
        for i in 0..4 {
            set(&mut table, GDB, Breakpoint::exec(0x1000 + i)).unwrap();
        }
        let refused = set(&mut table, GDB, Breakpoint::exec(0x2000)).unwrap_err();
        assert_eq!(refused, BreakpointError::NoSlot { request: Breakpoint::exec(0x2000), needed: 1, free: 0 });
        assert_eq!(table.requests().len(), 4);
    }

    #[test]
    fn l29_equal_requests_share_a_slot_until_the_last_leaves() {
        let mut table = SlotTable::default();
        let watch = Breakpoint::watch(0x30000, 4, Trigger::Write);
        set(&mut table, GDB, watch).unwrap();
        set(&mut table, Owner::harness(1), watch).unwrap();
        assert_eq!(table.assigned.iter().flatten().count(), 1);
        clear(&mut table, GDB, watch).unwrap();
        let image = table.prepare_clear(Owner::harness(1), watch).unwrap().image;
        assert!(image.is_empty());
        assert_eq!(table.assigned.iter().flatten().count(), 1);
    }

    #[test]
    fn l6_a_slot_keeps_its_number_when_another_is_removed() {
        let mut table = SlotTable::default();
        let (a, b) = (Breakpoint::exec(0xa), Breakpoint::exec(0xb));
        set(&mut table, GDB, a).unwrap();
        set(&mut table, GDB, b).unwrap();
        clear(&mut table, GDB, a).unwrap();
        let image = table.prepare_set(GDB, Breakpoint::exec(0xc)).unwrap().unwrap().image;
        assert_eq!(image.addresses()[1], 0xb);
    }

    #[test]
    fn l9_a_prepared_change_that_is_dropped_changes_nothing() {
        let mut table = SlotTable::default();
        set(&mut table, GDB, Breakpoint::exec(0xa)).unwrap();
        let before = table.clone();
        drop(table.prepare_set(GDB, Breakpoint::exec(0xb)).unwrap());
        drop(table.prepare_clear(GDB, Breakpoint::exec(0xa)).unwrap());
        assert_eq!(before.requests, table.requests);
        assert_eq!(before.assigned, table.assigned);
    }

    fn any_breakpoint() -> impl Strategy<Value = Breakpoint> {
        // A small address range, so that requests collide and share.
        (0x1000u64..0x1020, 1u64..12, 0..4).prop_map(|(addr, len, on)| match on {
            0 => Breakpoint::exec(addr),
            1 => Breakpoint::watch(addr, len, Trigger::Write),
            2 => Breakpoint::watch(addr, len, Trigger::Read),
            _ => Breakpoint::watch(addr, len, Trigger::Access),
        })
    }

    fn any_owner() -> impl Strategy<Value = Owner> {
        prop_oneof![Just(GDB), (0u32..3).prop_map(Owner::harness)]
    }

    /// The naive shadow: a plain list; a byte triggers if any request of that kind covers it.
    fn covered(requests: &[(Owner, Breakpoint)], byte: u64, condition: SlotCondition) -> bool {
        requests.iter().any(|(_, r)| {
            let kind = match r.on {
                Trigger::Execute => SlotCondition::Execute,
                Trigger::Write => SlotCondition::Write,
                Trigger::Read | Trigger::Access => SlotCondition::ReadWrite,
            };
            kind == condition && byte >= r.addr && byte - r.addr < r.len
        })
    }

    proptest! {
        #[test]
        fn the_table_agrees_with_a_naive_list(
            steps in prop::collection::vec((any::<bool>(), any_owner(), any_breakpoint()), 1..60)
        ) {
            let mut table = SlotTable::default();
            let mut shadow: Vec<(Owner, Breakpoint)> = Vec::new();
            let mut last_slots: [Option<Chunk>; SLOTS] = [None; SLOTS];
            for (add, owner, request) in steps {
                let held = shadow.contains(&(owner, request));
                if add {
                    match set(&mut table, owner, request) {
                        Ok(()) => if !held { shadow.push((owner, request)) },
                        Err(_) => prop_assert!(!held),
                    }
                } else {
                    let result = clear(&mut table, owner, request);
                    prop_assert_eq!(result.is_ok(), held);
                    shadow.retain(|have| *have != (owner, request));
                }
                prop_assert_eq!(table.requests(), &shadow[..]);
                let image = table.clone().into_prepared().image;
                for byte in 0xff0..0x1040 {
                    for condition in [SlotCondition::Execute, SlotCondition::Write, SlotCondition::ReadWrite] {
                        let armed = image.slots().iter().flatten().any(|slot| {
                            slot.condition == condition && byte >= slot.addr && byte - slot.addr < slot.len.bytes()
                        });
                        prop_assert_eq!(armed, covered(&shadow, byte, condition), "byte {:#x}", byte);
                    }
                }
                for (n, slot) in image.slots().iter().enumerate() {
                    if let Some(slot) = slot {
                        prop_assert!(!slot.owners.is_empty());
                        prop_assert_eq!(slot.addr % slot.len.bytes(), 0);
                        // A slot that survives a change keeps its meaning.
                        if let (Some(before), Some(now)) = (last_slots[n], table.assigned[n]) {
                            prop_assert_eq!(before, now, "slot {} changed meaning in one step", n);
                        }
                    }
                    prop_assert_eq!(image.dr7().is_enabled(n), slot.is_some());
                }
                last_slots = table.assigned;
            }
        }
    }
}
