//! The slot table: which requests are in force, and what serves each.
//!
//! The table is plain data with one owner. A change is *prepared* into new images; only when
//! every vCPU has installed them is it *committed* (law 9). Until then the table is as it
//! was, so that undoing a failed change is to drop the prepared one.
//!
//! Who is served is derived afresh at every change (law 28: no counts that could go stale): from
//! the highest level down, and within a level by age, each request gets its slots if they
//! are there. One that does not is served in guest memory, where the host can do that ([`Offer`]):
//! an execution breakpoint by a patch, a write watchpoint by read-only pages. What is left waits:
//! so a request of a higher level evicts the youngest of a lower one, and what
//! was evicted comes back by itself when there is room again. Either is told as a [`Notice`].

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Breakpoint, BreakpointError, Change, DebugImage, Epoch, Handler, INT3, Level, Mechanism, Offer, Owner, Patch,
    Piece, Place, SLOTS, Slot, SlotCondition, SlotLen, SlotOwner, Trigger, WatchedRange,
};
use crate::limits::{MAX_WATCHED, PAGE_SIZE};

/// An aligned piece of a request: what one slot can cover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Chunk {
    addr: u64,
    len: SlotLen,
    condition: SlotCondition,
}

/// A request that somebody holds.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    owner: Owner,
    request: Breakpoint,
    handler: Option<Handler>,
    place: Option<Place>,
    /// What serves it. One that nothing serves waits for slots.
    served: Option<Mechanism>,
}

impl Held {
    fn behind(&self) -> SlotOwner {
        SlotOwner { owner: self.owner, request: self.request, handler: self.handler.clone() }
    }
}

/// What a change did to a request that nobody asked about in it (law 27).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// A higher level took its slots. It does not trigger until it is restored.
    Evicted(Owner, Breakpoint),
    /// It has slots again.
    Restored(Owner, Breakpoint),
}

/// Requests and what serves them.
#[derive(Debug, Clone)]
pub struct SlotTable {
    /// Oldest first.
    held: Vec<Held>,
    assigned: [Option<Chunk>; SLOTS],
    epoch: Epoch,
    offer: Offer,
}

impl Default for SlotTable {
    fn default() -> Self {
        Self::new(Offer::SLOTS)
    }
}

/// A change that can still fail to be applied. Dropping it leaves the table as it was.
#[derive(Debug)]
pub struct Prepared {
    after: SlotTable,
    images: Vec<DebugImage>,
    notices: Vec<Notice>,
}

impl Prepared {
    /// What the vCPUs are to install, one after the other, each on all of them before the next.
    ///
    /// Two where a slot changes hands: it must have been empty everywhere in between, or a hit
    /// that is on its way could be taken for the other's (law 6).
    pub fn images(&self) -> &[DebugImage] {
        &self.images
    }

    /// What this does to others' requests.
    pub fn notices(&self) -> &[Notice] {
        &self.notices
    }
}

impl SlotTable {
    /// An empty table for a host that offers this.
    pub fn new(offer: Offer) -> Self {
        Self { held: Vec::new(), assigned: [None; SLOTS], epoch: Epoch::default(), offer }
    }

    /// What the host offers.
    pub fn offer(&self) -> Offer {
        self.offer
    }

    /// Changes what the host offers. It counts from the next change of the set on.
    pub fn set_offer(&mut self, offer: Offer) {
        self.offer = offer;
    }

    /// The requests that are served.
    pub fn requests(&self) -> impl Iterator<Item = (Owner, Breakpoint)> {
        self.held.iter().filter(|held| held.served.is_some()).map(|held| (held.owner, held.request))
    }

    /// Whether `owner` holds `request`, served or waiting.
    pub fn holds(&self, owner: Owner, request: Breakpoint) -> bool {
        self.held.iter().any(|held| (held.owner, held.request) == (owner, request))
    }

    /// What serves `request` of `owner`; `None` if it waits, or is not held.
    pub fn mechanism(&self, owner: Owner, request: Breakpoint) -> Option<Mechanism> {
        self.held.iter().find(|held| (held.owner, held.request) == (owner, request)).and_then(|held| held.served)
    }

    /// Whether it matters where a request of this kind lies in guest memory: it may be served there,
    /// or stand in a page that becomes read-only for another.
    pub fn wants_place(&self, request: Breakpoint) -> bool {
        by_patch(request, self.offer) || self.offer.pages && request.on.is_watch()
    }

    /// Prepares all of `changes` as one. `Ok(None)`: there is nothing to do, because each sets what its
    /// owner already holds (RSP: inserting twice is harmless).
    ///
    /// # Errors
    /// For the first change that makes no sense, that clears what is not held, or that nothing can
    /// serve without taking it from an equal or higher level. Then none is carried out.
    pub fn prepare(&self, changes: &[Change]) -> Result<Option<Prepared>, BreakpointError> {
        let mut held = self.held.clone();
        let mut set = Vec::new();
        for change in changes {
            let at = |held: &[Held], owner, request| held.iter().position(|h| (h.owner, h.request) == (owner, request));
            match change.clone() {
                Change::Set { owner, request, handler, place } => {
                    check(request)?;
                    if at(&held, owner, request).is_none() {
                        held.push(Held { owner, request, handler, place, served: None });
                        set.push((owner, request));
                    }
                }
                Change::Clear { owner, request } => {
                    let at = at(&held, owner, request).ok_or(BreakpointError::NotSet { request })?;
                    held.remove(at);
                    set.retain(|added| *added != (owner, request));
                }
            }
        }
        if set.is_empty() && held.len() == self.held.len() {
            return Ok(None);
        }
        let prepared = self.change_to(held);
        // Whoever asks now is served now; only those who were there before can come to wait.
        let unserved = |h: &&Held| h.served.is_none() && set.contains(&(h.owner, h.request));
        match prepared.after.held.iter().find(unserved) {
            Some(refused) => Err(self.refusal(refused)),
            None => Ok(Some(prepared)),
        }
    }

    /// Prepares one request; as [`prepare`](Self::prepare).
    pub fn prepare_set(
        &self,
        owner: Owner,
        request: Breakpoint,
        handler: Option<Handler>,
    ) -> Result<Option<Prepared>, BreakpointError> {
        self.prepare(&[Change::Set { owner, request, handler, place: None }])
    }

    /// Prepares the removal of `request` of `owner`.
    ///
    /// # Errors
    /// If the owner does not hold it.
    pub fn prepare_clear(&self, owner: Owner, request: Breakpoint) -> Result<Prepared, BreakpointError> {
        let prepared = self.prepare(&[Change::Clear { owner, request }])?;
        prepared.ok_or(BreakpointError::NotSet { request })
    }

    /// Prepares the removal of everything that `level` holds; `None` if it holds nothing.
    pub fn prepare_clear_level(&self, level: Level) -> Option<Prepared> {
        let mut held = self.held.clone();
        held.retain(|held| held.owner.level != level);
        (held.len() < self.held.len()).then(|| self.change_to(held))
    }

    /// Prepares that the guest has other bytes under its patches: `(gpa, byte)` each (law 55).
    /// `None` if no patch is there.
    pub fn prepare_originals(&self, bytes: &[(u64, u8)]) -> Option<Prepared> {
        let mut held = self.held.clone();
        let mut changed = false;
        for place in held.iter_mut().filter_map(|held| held.place.as_mut()) {
            let Some(first) = place.pieces.first() else { continue };
            if let Some(&(_, byte)) = bytes.iter().find(|(gpa, _)| *gpa == first.gpa) {
                changed |= place.original != byte;
                place.original = byte;
            }
        }
        changed.then(|| self.change_to(held))
    }

    /// Takes note of what the guest has now where requests lie that no patch serves: that is what a
    /// patch there would put back.
    pub fn refresh(&mut self, original: impl Fn(u64) -> Option<u8>) {
        for held in self.held.iter_mut().filter(|held| held.served != Some(Mechanism::Patch)) {
            let Some(place) = &mut held.place else { continue };
            let now = place.pieces.first().and_then(|piece| original(piece.gpa));
            place.original = now.unwrap_or(place.original);
        }
    }

    /// Why nothing can serve `refused`.
    fn refusal(&self, refused: &Held) -> BreakpointError {
        let Held { owner, request, .. } = *refused;
        if request.on.is_watch() && !self.offer.data_slots && !by_pages(request, self.offer) {
            let instead = if self.offer.pages { "; write watchpoints (gdb's watch) work" } else { "" };
            let why = format!("this host's KVM accepts data watchpoints and never triggers them{instead}");
            return BreakpointError::Unsupported { request, why };
        }
        if by_patch(request, self.offer) || by_pages(request, self.offer) {
            return match &refused.place {
                Some(place) if place.original == INT3 && !request.on.is_watch() => BreakpointError::Invalid {
                    request,
                    why: "the guest has an INT3 of its own there, and the hardware slots are taken",
                },
                Some(place) if place.user && !request.on.is_watch() => BreakpointError::Unsupported {
                    request,
                    why: "this host's KVM gives an INT3 in ring 3 to the guest, and the hardware slots are taken"
                        .to_owned(),
                },
                _ => BreakpointError::NotMapped { request },
            };
        }
        let chunks = match split(request) {
            Ok(chunks) => chunks,
            Err(error) => return error,
        };
        // What equal and higher levels hold is not to be had.
        let mut kept = self.held.clone();
        kept.retain(|held| held.owner.level >= owner.level);
        let taken = self.change_to(kept).after.assigned;
        let needed = chunks.iter().filter(|chunk| !taken.contains(&Some(**chunk))).count();
        BreakpointError::NoSlot { request, needed, free: taken.iter().filter(|slot| slot.is_none()).count() }
    }

    /// Makes a prepared change the table's own. Called once every vCPU has acknowledged its images.
    pub fn commit(&mut self, prepared: Prepared) {
        *self = prepared.after;
    }

    /// Never reuses the epoch of a change that was sent to the vCPUs and then undone.
    pub fn skip_epoch(&mut self, used: Epoch) {
        self.epoch = self.epoch.max(used);
    }

    /// Derives who is served and by which slots, once `held` is what is held.
    fn change_to(&self, mut held: Vec<Held>) -> Prepared {
        let chunks = serve(&mut held, self.offer);
        // A chunk that stays keeps its slot; one that goes leaves it empty for an epoch.
        let kept = self.assigned.map(|slot| slot.filter(|chunk| chunks.contains(chunk)));
        let fresh: Vec<Chunk> = chunks.into_iter().filter(|chunk| !kept.contains(&Some(*chunk))).collect();
        let never_used = (0..SLOTS).filter(|&n| self.assigned[n].is_none());
        let just_freed = (0..SLOTS).filter(|&n| self.assigned[n].is_some() && kept[n].is_none());
        let places: Vec<usize> = never_used.chain(just_freed).collect();
        let mut assigned = kept;
        let mut changes_hands = false;
        for (chunk, n) in fresh.into_iter().zip(places) {
            changes_hands |= self.assigned[n].is_some();
            assigned[n] = Some(chunk);
        }
        let notices = self.notices(&held);
        let mut after = SlotTable { held, assigned: kept, epoch: self.epoch, offer: self.offer };
        let mut images = Vec::new();
        if changes_hands {
            images.push(after.next_image());
        }
        after.assigned = assigned;
        images.push(after.next_image());
        Prepared { after, images, notices }
    }

    /// What becomes of those that are held before and after.
    fn notices(&self, after: &[Held]) -> Vec<Notice> {
        // Both lists are in the order of age, and a change only removes from the old and adds behind it.
        let mut before = self.held.iter();
        let known = after.iter().filter_map(|now| {
            let then = before.find(|then| (then.owner, then.request) == (now.owner, now.request))?;
            Some((then.served.is_some(), now))
        });
        known
            .filter(|(was_served, now)| *was_served != now.served.is_some())
            .map(|(_, now)| match now.served {
                Some(_) => Notice::Restored(now.owner, now.request),
                None => Notice::Evicted(now.owner, now.request),
            })
            .collect()
    }

    fn served_by(&self, mechanism: Mechanism) -> impl Iterator<Item = &Held> {
        self.held.iter().filter(move |held| held.served == Some(mechanism))
    }

    fn owners_of(&self, chunk: Chunk) -> Vec<SlotOwner> {
        self.served_by(Mechanism::Slots).filter(|held| wants(held.request, chunk)).map(Held::behind).collect()
    }

    fn next_image(&mut self) -> DebugImage {
        self.epoch = Epoch(self.epoch.0 + 1);
        let slots = std::array::from_fn(|n| {
            self.assigned[n].map(|chunk| Slot {
                addr: chunk.addr,
                len: chunk.len,
                condition: chunk.condition,
                owners: self.owners_of(chunk),
            })
        });
        DebugImage::new(self.epoch, slots).with_memory(self.patches(), self.ranges())
    }

    fn patches(&self) -> Vec<Patch> {
        let mut patches: BTreeMap<u64, Patch> = BTreeMap::new();
        for held in self.served_by(Mechanism::Patch) {
            let Some(Place { pieces, original, .. }) = &held.place else { continue };
            let Some(&Piece { gpa, .. }) = pieces.first() else { continue };
            let patch = patches.entry(gpa).or_insert_with(|| Patch { gpa, original: *original, owners: Vec::new() });
            patch.owners.push(held.behind());
        }
        patches.into_values().collect()
    }

    fn ranges(&self) -> Vec<WatchedRange> {
        let mut ranges: Vec<WatchedRange> = self.served_by(Mechanism::Pages).flat_map(pieces_of).collect();
        let pages: BTreeSet<u64> = ranges.iter().map(|range| range.gpa / PAGE_SIZE).collect();
        // A store to a read-only page is not made by the processor, so that no slot sees it (law 65).
        let watches = self.served_by(Mechanism::Slots).filter(|held| held.request.on.is_watch());
        ranges.extend(watches.flat_map(pieces_of).filter(|range| pages.contains(&(range.gpa / PAGE_SIZE))));
        ranges
    }
}

/// The pieces of a request in guest-physical memory, each with its linear address.
fn pieces_of(held: &Held) -> Vec<WatchedRange> {
    let mut addr = held.request.addr;
    let piece = |&Piece { gpa, len }: &Piece| {
        let range = WatchedRange { gpa, len, addr, behind: held.behind() };
        addr = addr.wrapping_add(len);
        range
    };
    held.place.iter().flat_map(|place| &place.pieces).map(piece).collect()
}

/// Whether an execution breakpoint may be served by a patch.
fn by_patch(request: Breakpoint, offer: Offer) -> bool {
    request.on == Trigger::Execute && offer.patches
}

/// Whether an INT3 at this place would be ours, and come to us.
fn can_patch(place: &Place, offer: Offer) -> bool {
    place.original != INT3 && (offer.user_patches || !place.user)
}

/// Whether a write watchpoint may be served by read-only pages: loads do not exit.
fn by_pages(request: Breakpoint, offer: Offer) -> bool {
    request.on == Trigger::Write && offer.pages
}

/// Says what serves each, from the highest level down and the oldest first, and gives the chunks
/// that this takes: never more than there are slots.
fn serve(held: &mut [Held], offer: Offer) -> Vec<Chunk> {
    let mut order: Vec<usize> = (0..held.len()).collect();
    order.sort_by_key(|&n| std::cmp::Reverse(held[n].owner.level));
    let mut used: Vec<Chunk> = Vec::new();
    for n in order {
        let request = held[n].request;
        let chunks = split(request).ok().filter(|_| offer.data_slots || !request.on.is_watch());
        let missing: Option<Vec<Chunk>> =
            chunks.map(|chunks| chunks.into_iter().filter(|chunk| !used.contains(chunk)).collect());
        let place = held[n].place.as_ref();
        held[n].served = match missing {
            Some(missing) if used.len() + missing.len() <= SLOTS => {
                used.extend(missing);
                Some(Mechanism::Slots)
            }
            _ if by_patch(request, offer) && place.is_some_and(|place| can_patch(place, offer)) => {
                Some(Mechanism::Patch)
            }
            _ if by_pages(request, offer) && place.is_some() => Some(Mechanism::Pages),
            _ => None,
        };
    }
    used
}

/// Whether `chunk` is one of the pieces that `request` splits into.
fn wants(request: Breakpoint, chunk: Chunk) -> bool {
    split(request).is_ok_and(|chunks| chunks.contains(&chunk))
}

/// What is wrong with a request, whatever is to serve it.
fn check(request: Breakpoint) -> Result<(), BreakpointError> {
    let invalid = |why| Err(BreakpointError::Invalid { request, why });
    match request {
        Breakpoint { on: Trigger::Execute, len, .. } if len != 1 => invalid("an execution breakpoint is one byte long"),
        Breakpoint { len: 0, .. } => invalid("its length is zero"),
        Breakpoint { addr, len, .. } if addr.checked_add(len - 1).is_none() => {
            invalid("its range wraps around the end of the address space")
        }
        Breakpoint { len, .. } if len > MAX_WATCHED => invalid("it is longer than 64 MiB"),
        _ => Ok(()),
    }
}

/// Splits a request into the fewest aligned pieces of 1, 2, 4 or 8 bytes (law 62).
///
/// Never widened: a slot that covered more than was asked for would report accesses that nobody
/// asked about.
fn split(request: Breakpoint) -> Result<Vec<Chunk>, BreakpointError> {
    check(request)?;
    let condition = match request.on {
        Trigger::Execute => SlotCondition::Execute,
        Trigger::Write => SlotCondition::Write,
        Trigger::Read | Trigger::Access => SlotCondition::ReadWrite,
    };
    let last = request.addr + (request.len - 1);
    let mut chunks = Vec::new();
    let mut addr = request.addr;
    loop {
        let len = SlotLen::longest_at(addr, (last - addr).saturating_add(1));
        chunks.push(Chunk { addr, len, condition });
        if chunks.len() > SLOTS {
            let why = "it needs more than the four hardware slots; watch at most 32 aligned bytes";
            return Err(BreakpointError::Invalid { request, why });
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
        if let Some(prepared) = table.prepare_set(owner, request, None)? {
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
        assert_eq!(table.requests().count(), 4);
    }

    #[test]
    fn l29_equal_requests_share_a_slot_until_the_last_leaves() {
        let mut table = SlotTable::default();
        let watch = Breakpoint::watch(0x30000, 4, Trigger::Write);
        set(&mut table, GDB, watch).unwrap();
        set(&mut table, Owner::harness(1), watch).unwrap();
        assert_eq!(table.assigned.iter().flatten().count(), 1);
        clear(&mut table, GDB, watch).unwrap();
        let prepared = table.prepare_clear(Owner::harness(1), watch).unwrap();
        assert!(last(&prepared).is_empty());
        assert_eq!(table.assigned.iter().flatten().count(), 1);
    }

    #[test]
    fn l6_a_slot_keeps_its_number_when_another_is_removed() {
        let mut table = SlotTable::default();
        let (a, b) = (Breakpoint::exec(0xa), Breakpoint::exec(0xb));
        set(&mut table, GDB, a).unwrap();
        set(&mut table, GDB, b).unwrap();
        clear(&mut table, GDB, a).unwrap();
        let prepared = table.prepare_set(GDB, Breakpoint::exec(0xc), None).unwrap().unwrap();
        assert_eq!(last(&prepared).addresses()[1], 0xb);
    }

    #[test]
    fn l9_a_prepared_change_that_is_dropped_changes_nothing() {
        let mut table = SlotTable::default();
        set(&mut table, GDB, Breakpoint::exec(0xa)).unwrap();
        let before = table.clone();
        drop(table.prepare_set(GDB, Breakpoint::exec(0xb), None).unwrap());
        drop(table.prepare_clear(GDB, Breakpoint::exec(0xa)).unwrap());
        assert_eq!(before.held, table.held);
        assert_eq!(before.assigned, table.assigned);
    }

    #[test]
    fn l27_a_higher_level_evicts_the_youngest_of_a_lower_one_and_gives_back() {
        let mut table = SlotTable::default();
        for i in 0..4 {
            set(&mut table, Owner::harness(1), Breakpoint::exec(0x1000 + i)).unwrap();
        }
        let evicted = (Owner::harness(1), Breakpoint::exec(0x1003));
        let watch = Breakpoint::watch(0x3000, 4, Trigger::Write);
        let prepared = table.prepare_set(GDB, watch, None).unwrap().unwrap();
        assert_eq!(prepared.notices(), [Notice::Evicted(evicted.0, evicted.1)]);
        table.commit(prepared);
        assert!(!table.requests().any(|request| request == evicted));
        // Equal and lower levels cannot take it back.
        assert!(set(&mut table, Owner::harness(2), Breakpoint::exec(0x2000)).is_err());
        let prepared = table.prepare_clear(GDB, watch).unwrap();
        assert_eq!(prepared.notices(), [Notice::Restored(evicted.0, evicted.1)]);
        table.commit(prepared);
        assert!(table.requests().any(|request| request == evicted));
    }

    #[test]
    fn l28_an_intermediate_request_succeeds_once_the_high_one_has_left() {
        let mut table = SlotTable::default();
        let guest = Owner { level: Level::Guest, id: 0 };
        let shared = Breakpoint::exec(0x1000);
        set(&mut table, guest, shared).unwrap();
        set(&mut table, GDB, shared).unwrap();
        for i in 1..4 {
            set(&mut table, GDB, Breakpoint::exec(0x1000 + i)).unwrap();
        }
        let wanted = Breakpoint::exec(0x2000);
        assert!(set(&mut table, Owner::harness(1), wanted).is_err(), "all four are gdb's");
        clear(&mut table, GDB, shared).unwrap();
        // Only the guest's own low level is left on that slot.
        set(&mut table, Owner::harness(1), wanted).unwrap();
        assert!(table.mechanism(guest, shared).is_none() && table.holds(guest, shared));
    }

    #[test]
    fn l6_a_slot_that_changes_hands_is_empty_in_between() {
        let mut table = SlotTable::default();
        for i in 0..4 {
            set(&mut table, Owner::harness(1), Breakpoint::exec(0x1000 + i)).unwrap();
        }
        let prepared = table.prepare_set(GDB, Breakpoint::exec(0x9000), None).unwrap().unwrap();
        let [between, after] = prepared.images() else { panic!("{:?}", prepared.images()) };
        assert!(between.epoch() < after.epoch());
        let n = after.addresses().iter().position(|&addr| addr == 0x9000).unwrap();
        assert!(between.slots()[n].is_none());
        // Where there is room, one image does.
        clear(&mut table, Owner::harness(1), Breakpoint::exec(0x1000)).unwrap();
        assert_eq!(table.prepare_set(GDB, Breakpoint::exec(0x9000), None).unwrap().unwrap().images().len(), 1);
    }

    const EVERYTHING: Offer = Offer { data_slots: true, patches: true, user_patches: true, pages: true };

    /// A guest whose linear addresses are its physical ones, plus this.
    const LINEAR: u64 = 0xffff_8000_0000_0000;

    fn mapped(addr: u64, len: u64, original: u8) -> Option<Place> {
        let mut pieces = Vec::new();
        let mut at = addr;
        while at < addr + len {
            let end = (addr + len).min((at / PAGE_SIZE + 1) * PAGE_SIZE);
            pieces.push(Piece { gpa: at, len: end - at });
            at = end;
        }
        Some(Place { pieces, original, user: false })
    }

    #[test]
    fn l54_in_ring_3_a_patch_serves_only_where_its_int3_is_ours_there() {
        for user_patches in [false, true] {
            let mut table = SlotTable::new(Offer { user_patches, ..EVERYTHING });
            for i in 0..4 {
                set(&mut table, GDB, Breakpoint::exec(i)).unwrap();
            }
            let request = Breakpoint::exec(0x1000);
            let place = mapped(0x1000, 1, 0x90).map(|place| Place { user: true, ..place });
            let set = table.prepare(&[Change::Set { owner: GDB, request, handler: None, place }]);
            match user_patches {
                true => assert_eq!(last(&set.unwrap().unwrap()).patches().len(), 1),
                false => assert!(matches!(set, Err(BreakpointError::Unsupported { .. }))),
            }
        }
    }

    #[test]
    fn l56_a_patch_puts_back_what_was_there_when_it_came() {
        let mut table = SlotTable::new(EVERYTHING);
        let held = |gpa| match exec_at(gpa, 0x50) {
            Change::Set { request, place, .. } => {
                Change::Set { owner: Owner::harness(1), request, handler: None, place }
            }
            clear => clear,
        };
        for n in 0..4 {
            table.commit(table.prepare(&[held(0x1000 + n)]).unwrap().unwrap());
        }
        // The guest changes its code where a slot serves; then the youngest loses its slot to gdb.
        table.refresh(|_| Some(0x60));
        let image = change(&mut table, &[exec_at(0x2000, 0x50)]).unwrap();
        assert_eq!(
            image.patches().iter().map(|patch| (patch.gpa, patch.original)).collect::<Vec<_>>(),
            [(0x1003, 0x60)]
        );
        // What is under a patch is not looked at: it is an INT3.
        table.refresh(|_| Some(0x70));
        assert_eq!(table.patches()[0].original, 0x60);
    }

    fn change(table: &mut SlotTable, changes: &[Change]) -> Result<DebugImage, BreakpointError> {
        let prepared = table.prepare(changes)?.expect("something to do");
        let image = last(&prepared).clone();
        table.commit(prepared);
        Ok(image)
    }

    fn exec_at(gpa: u64, original: u8) -> Change {
        let request = Breakpoint::exec(LINEAR + gpa);
        Change::Set { owner: GDB, request, handler: None, place: mapped(gpa, 1, original) }
    }

    #[test]
    fn l54_slots_come_first_and_patches_serve_what_is_left() {
        let mut table = SlotTable::new(EVERYTHING);
        let six: Vec<Change> = (0..6).map(|n| exec_at(0x1000 + n, 0x90)).collect();
        let image = change(&mut table, &six).unwrap();
        assert_eq!(image.slots().iter().flatten().count(), SLOTS);
        assert_eq!(
            image.patches().iter().map(|p| (p.gpa, p.original)).collect::<Vec<_>>(),
            [(0x1004, 0x90), (0x1005, 0x90)]
        );
        // The one whose slot becomes free comes out of guest memory.
        let image =
            change(&mut table, &[Change::Clear { owner: GDB, request: Breakpoint::exec(LINEAR + 0x1000) }]).unwrap();
        assert_eq!(image.patches().len(), 1);
        assert_eq!(image.slots().iter().flatten().count(), SLOTS);
    }

    #[test]
    fn l56_the_guests_own_int3_is_never_patched() {
        let mut table = SlotTable::new(EVERYTHING);
        let five: Vec<Change> = (0..5).map(|n| exec_at(0x1000 + n, INT3)).collect();
        assert!(matches!(table.prepare(&five), Err(BreakpointError::Invalid { .. })));
        change(&mut table, &five[..4]).expect("slots change no memory");
    }

    #[test]
    fn l57_a_patch_is_physical_and_shared_by_its_aliases() {
        let mut table = SlotTable::new(EVERYTHING);
        change(&mut table, &(0..4).map(|n| exec_at(n, 0x90)).collect::<Vec<_>>()).unwrap();
        let alias = Breakpoint::exec(0x7000);
        let place = mapped(0x1000, 1, 0x55);
        let image = change(
            &mut table,
            &[exec_at(0x1000, 0x55), Change::Set { owner: GDB, request: alias, handler: None, place }],
        )
        .unwrap();
        assert_eq!(image.patches().len(), 1);
        assert_eq!(image.patch_at(0x1000).unwrap().owners.len(), 2);
    }

    #[test]
    fn what_is_not_mapped_is_served_by_slots_only() {
        let mut table = SlotTable::new(EVERYTHING);
        for n in 0..4 {
            set(&mut table, GDB, Breakpoint::exec(n)).unwrap();
        }
        let fifth = Breakpoint::exec(4);
        assert_eq!(set(&mut table, GDB, fifth), Err(BreakpointError::NotMapped { request: fifth }));
    }

    #[test]
    fn l66_where_data_slots_never_fire_pages_serve_writes_and_nothing_serves_loads() {
        let mut table = SlotTable::new(Offer { data_slots: false, ..EVERYTHING });
        let wide = Breakpoint::watch(LINEAR + 0x1ff0, 0x1020, Trigger::Write);
        let place = mapped(0x1ff0, 0x1020, 0);
        let image = change(&mut table, &[Change::Set { owner: GDB, request: wide, handler: None, place }]).unwrap();
        assert!(image.slots().iter().all(Option::is_none));
        assert_eq!(image.pages(), [0x1000, 0x2000, 0x3000].into());
        assert_eq!(image.ranges_in(0x1fef, 1).count(), 0);
        assert_eq!(image.ranges_in(0x1fef, 2).map(|r| r.addr).collect::<Vec<_>>(), [wide.addr]);
        assert_eq!(image.ranges_in(0x300f, 8).map(|r| r.addr).collect::<Vec<_>>(), [LINEAR + 0x3000]);
        assert_eq!(image.ranges_in(0x3010, 8).count(), 0);
        let load = Breakpoint::watch(LINEAR + 0x1000, 4, Trigger::Access);
        assert!(matches!(set(&mut table, GDB, load), Err(BreakpointError::Unsupported { .. })));
    }

    #[test]
    fn l65_a_slot_on_a_read_only_page_is_served_by_the_page_as_well() {
        let mut table = SlotTable::new(EVERYTHING);
        let watch = |gpa, len, on| {
            let request = Breakpoint::watch(LINEAR + gpa, len, on);
            Change::Set { owner: GDB, request, handler: None, place: mapped(gpa, len, 0) }
        };
        let image = change(&mut table, &[watch(0x1008, 8, Trigger::Access), watch(0x5000, 8, Trigger::Write)]).unwrap();
        assert!(image.ranges().is_empty());
        let image = change(&mut table, &[watch(0x1100, 100, Trigger::Write)]).unwrap();
        assert_eq!(image.pages(), [0x1000].into());
        assert_eq!(image.ranges_in(0x100c, 1).map(|range| range.addr).collect::<Vec<_>>(), [LINEAR + 0x1008]);
        assert_eq!(image.ranges().len(), 2, "nothing for the page that stays writable");
    }

    #[test]
    fn l27_an_evicted_breakpoint_goes_on_as_a_patch_where_that_serves() {
        let mut table = SlotTable::new(EVERYTHING);
        let harness = |n| Change::Set {
            owner: Owner::harness(1),
            request: Breakpoint::exec(LINEAR + n),
            handler: None,
            place: mapped(n, 1, 0x90),
        };
        change(&mut table, &(0..4).map(harness).collect::<Vec<_>>()).unwrap();
        let watch = Breakpoint::watch(0x9000, 8, Trigger::Access);
        let prepared = table.prepare_set(GDB, watch, None).unwrap().unwrap();
        assert_eq!(prepared.notices(), []);
        table.commit(prepared);
        assert_eq!(table.mechanism(Owner::harness(1), Breakpoint::exec(LINEAR + 3)), Some(Mechanism::Patch));
        assert_eq!(table.mechanism(GDB, watch), Some(Mechanism::Slots));
    }

    #[test]
    fn one_bad_change_of_many_leaves_all_as_it_was() {
        let mut table = SlotTable::new(EVERYTHING);
        let image = change(&mut table, &[exec_at(0x1000, 0x90)]).unwrap();
        let nonsense = Change::Clear { owner: GDB, request: Breakpoint::exec(1) };
        assert!(table.prepare(&[exec_at(0x2000, 0x90), nonsense]).is_err());
        let again = table.prepare(&[exec_at(0x1000, 0x90)]).unwrap();
        assert!(again.is_none(), "what one holds need not be set again");
        assert_eq!(table.requests().count(), 1);
        assert!(image.has_memory_of(&DebugImage::default()));
    }

    #[test]
    fn l55_what_the_debugger_writes_under_a_patch_is_what_goes_back() {
        let mut table = SlotTable::new(EVERYTHING);
        change(&mut table, &(0..5).map(|n| exec_at(0x1000 + n, 0x90)).collect::<Vec<_>>()).unwrap();
        assert!(table.prepare_originals(&[(0x1009, 0x55)]).is_none());
        let prepared = table.prepare_originals(&[(0x1003, 0x55), (0x1004, 0x56)]).unwrap();
        assert_eq!(last(&prepared).patch_at(0x1004).unwrap().original, 0x56);
    }

    fn last(prepared: &Prepared) -> &DebugImage {
        prepared.images().last().unwrap()
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
        let guest = (0u32..2).prop_map(|id| Owner { level: Level::Guest, id });
        prop_oneof![Just(GDB), (0u32..3).prop_map(Owner::harness), guest]
    }

    fn condition_of(request: &Breakpoint) -> SlotCondition {
        match request.on {
            Trigger::Execute => SlotCondition::Execute,
            Trigger::Write => SlotCondition::Write,
            Trigger::Read | Trigger::Access => SlotCondition::ReadWrite,
        }
    }

    /// The naive shadow: everything that is held, oldest first.
    type Shadow = Vec<(Owner, Breakpoint)>;

    /// Who is served, worked out the long way: for each request, by counting the slots that
    /// those who come before it take.
    fn served(shadow: &Shadow) -> Shadow {
        let mut pieces: Vec<(u64, u64, SlotCondition)> = Vec::new();
        let mut result = Vec::new();
        for level in [Level::Gdb, Level::Harness, Level::Guest] {
            for (owner, request) in shadow.iter().filter(|(owner, _)| owner.level == level) {
                let mut with = pieces.clone();
                let (mut at, end) = (request.addr, request.addr + request.len);
                while at < end {
                    let len = [8, 4, 2, 1].into_iter().find(|len| at % len == 0 && at + len <= end).unwrap();
                    let piece = (at, len, condition_of(request));
                    if !with.contains(&piece) {
                        with.push(piece);
                    }
                    at += len;
                }
                if with.len() <= SLOTS {
                    pieces = with;
                    result.push((*owner, *request));
                }
            }
        }
        result
    }

    proptest! {
        /// With everything on offer nobody waits whose bytes are mapped, and byte by byte there is
        /// something for exactly what was asked.
        #[test]
        fn every_byte_that_is_asked_for_is_served_by_something(
            steps in prop::collection::vec((any::<bool>(), any_owner(), 0x1ff0u64..0x2010, 1u64..40, any::<bool>()), 1..40)
        ) {
            let mut table = SlotTable::new(EVERYTHING);
            let mut shadow: Shadow = Vec::new();
            for (add, owner, gpa, len, exec) in steps {
                let (len, on) = if exec { (1, Trigger::Execute) } else { (len, Trigger::Write) };
                let request = Breakpoint { addr: LINEAR + gpa, len, on };
                let change = match add {
                    true => Change::Set { owner, request, handler: None, place: mapped(gpa, len, 0x90) },
                    false => Change::Clear { owner, request },
                };
                let held = shadow.contains(&(owner, request));
                let Ok(Some(prepared)) = table.prepare(&[change]) else {
                    prop_assert_eq!(add, held, "refused or nothing to do");
                    continue;
                };
                match add {
                    true => shadow.push((owner, request)),
                    false => shadow.retain(|have| *have != (owner, request)),
                }
                prop_assert!(prepared.notices().is_empty(), "somebody lost or regained");
                let memory = last(&prepared).clone();
                table.commit(prepared);
                for byte in 0x1fe0..0x2060u64 {
                    let slot = |condition| memory.slots().iter().flatten().filter(move |slot| slot.condition == condition)
                        .filter(move |slot| byte >= slot.addr - LINEAR && byte - (slot.addr - LINEAR) < slot.len.bytes())
                        .flat_map(|slot| slot.owners.iter().map(|behind| (behind.owner, behind.request))).collect::<Vec<_>>();
                    let mut exec = slot(SlotCondition::Execute);
                    exec.extend(memory.patch_at(byte).iter().flat_map(|p| p.owners.iter().map(|b| (b.owner, b.request))));
                    let mut write = slot(SlotCondition::Write);
                    write.extend(memory.ranges_in(byte, 1).map(|range| (range.behind.owner, range.behind.request)));
                    for (served, on) in [(&mut exec, Trigger::Execute), (&mut write, Trigger::Write)] {
                        let mut asked: Shadow = shadow.iter().copied()
                            .filter(|(_, r)| r.on == on && byte >= r.addr - LINEAR && byte - (r.addr - LINEAR) < r.len).collect();
                        asked.sort();
                        served.sort();
                        // A slot on a read-only page is served by the page as well.
                        served.dedup();
                        prop_assert_eq!(&*served, &asked, "byte {:#x}", byte);
                    }
                }
                let pages: std::collections::BTreeSet<u64> = memory.ranges().iter().map(|r| r.gpa & !0xfff).collect();
                prop_assert_eq!(memory.pages(), pages);
            }
        }

        #[test]
        fn the_table_agrees_with_a_naive_list(
            steps in prop::collection::vec((any::<bool>(), any_owner(), any_breakpoint()), 1..60)
        ) {
            let mut table = SlotTable::default();
            let mut shadow: Shadow = Vec::new();
            let mut epoch = Epoch(0);
            for (add, owner, request) in steps {
                let held = shadow.contains(&(owner, request));
                let mut wanted = shadow.clone();
                let prepared = if add {
                    wanted.push((owner, request));
                    match table.prepare_set(owner, request, None) {
                        Ok(None) => { prop_assert!(held); continue }
                        Ok(Some(prepared)) => prepared,
                        Err(error) => {
                            // Refused if and only if it would not be served, or is too long for the slots.
                            let hopeless = split(request).is_err();
                            prop_assert!(hopeless || !served(&wanted).contains(&(owner, request)), "{}", error);
                            if let BreakpointError::NoSlot { needed, free, .. } = error {
                                prop_assert!(needed > free);
                            }
                            continue;
                        }
                    }
                } else {
                    wanted.retain(|have| *have != (owner, request));
                    match table.prepare_clear(owner, request) {
                        Ok(prepared) => prepared,
                        Err(_) => { prop_assert!(!held); continue }
                    }
                };
                let (before, after) = (served(&shadow), served(&wanted));
                // Everybody who gains or loses without having asked is told, and nobody else.
                for other in wanted.iter().filter(|other| shadow.contains(other)) {
                    let evicted = prepared.notices().contains(&Notice::Evicted(other.0, other.1));
                    let restored = prepared.notices().contains(&Notice::Restored(other.0, other.1));
                    prop_assert_eq!(evicted, before.contains(other) && !after.contains(other));
                    prop_assert_eq!(restored, !before.contains(other) && after.contains(other));
                }
                // Slot by slot: what a slot means changes only through empty.
                let mut meaning = table.assigned;
                for image in prepared.images() {
                    prop_assert!(image.epoch() > epoch);
                    epoch = image.epoch();
                    for (n, slot) in image.slots().iter().enumerate() {
                        let now = slot.as_ref().map(|s| Chunk { addr: s.addr, len: s.len, condition: s.condition });
                        if let (Some(then), Some(now)) = (meaning[n], now) {
                            prop_assert_eq!(then, now, "slot {} changed its meaning", n);
                        }
                        meaning[n] = now;
                        prop_assert_eq!(image.dr7().is_enabled(n), slot.is_some());
                        prop_assert!(slot.as_ref().is_none_or(|slot| !slot.owners.is_empty() && slot.addr % slot.len.bytes() == 0));
                    }
                }
                let image = last(&prepared).clone();
                table.commit(prepared);
                shadow = wanted;
                let mut in_force: Shadow = table.requests().collect();
                let mut expected = after;
                in_force.sort();
                expected.sort();
                prop_assert_eq!(&in_force, &expected);
                for byte in 0xff0..0x1040 {
                    for condition in [SlotCondition::Execute, SlotCondition::Write, SlotCondition::ReadWrite] {
                        let armed = image.slots().iter().flatten().any(|slot| {
                            slot.condition == condition && byte >= slot.addr && byte - slot.addr < slot.len.bytes()
                        });
                        let asked = expected.iter().any(|(_, request)| {
                            condition_of(request) == condition && byte >= request.addr && byte - request.addr < request.len
                        });
                        prop_assert_eq!(armed, asked, "byte {:#x}", byte);
                    }
                }
            }
        }
    }
}
