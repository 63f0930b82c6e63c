//! A store into a page that is read-only because something on it is watched (law 66).
//!
//! ```text
//!   KVM:  store exits, not done, RIP behind it ──►  carry it out ──► watched bytes? ──► hits
//!                 ▲                                                       │ none
//!                 └──────────── the next piece, or the next entry ◄───────┘
//! ```
//!
//! KVM gives one store in several pieces where it crosses a page or is longer than eight bytes. All pieces
//! of one instruction are one hit for each request; an iteration of a REP is one of its own.

use super::cpu::{Cpu, Exit};
use super::step::Arrival;
use super::thread::{Entry, Found, VcpuThread};
use crate::debug::{DebugImage, RunMode, StopReason, Stored};
use crate::memory::DeviceStore;

impl<C: Cpu> VcpuThread<C> {
    /// Carries out the rest of an instruction that begins with `exit`, a store or an access to a device
    /// that has made `device` stores of its own, and tells those who watch any of it.
    pub(super) fn stored(&mut self, mut exit: Exit, mut device: Vec<DeviceStore>, entry: &Entry, mode: RunMode) {
        let mut hits = Vec::new();
        let mut event = None;
        loop {
            for DeviceStore { gpa, old, new } in std::mem::take(&mut device) {
                note(&self.image, gpa, &old, &new, &mut hits);
            }
            match exit {
                Exit::Store { gpa, data } => {
                    let mut old = vec![0; data.len()];
                    let done = self.cpu.exchange(gpa, &data, &mut old);
                    note(&self.image, gpa, &old[..done], &data[..done], &mut hits);
                }
                Exit::Served(reason) => event = event.or(reason),
                Exit::Kicked | Exit::Again => break,
                Exit::Debug(exit) => return self.trapped(exit, hits, entry, mode),
                Exit::Crash(crash) => {
                    event = event.or(Some(StopReason::Crash(self.explain(crash))));
                    break;
                }
            }
            if hits.is_empty() && event.is_none() && !entry.stepping {
                // Nobody waits for its end: what is left of it comes with the next entry.
                self.incomplete = true;
                return;
            }
            exit = self.cpu.complete();
            if matches!(exit, Exit::Served(_)) {
                device = self.cpu.device_stores();
            }
        }
        self.tell_stores(hits, entry, mode);
        if let Some(reason) = event {
            self.stop(reason);
        }
    }

    /// Tells of what devices have stored on threads of their own. It is nobody's instruction: it is told
    /// where this vCPU happens to be, which goes on from there as it would have.
    pub(super) fn tell_device_stores(&mut self, mode: RunMode) {
        let Ok(pc) = self.cpu.pc() else { return };
        for DeviceStore { gpa, old, new } in self.cpu.device_stores() {
            let mut hits = Vec::new();
            note(&self.image, gpa, &old, &new, &mut hits);
            if !hits.is_empty() {
                self.triggered_elsewhere(hits, pc, mode);
            }
        }
    }

    fn tell_stores(&mut self, hits: Vec<Found>, entry: &Entry, mode: RunMode) {
        // Without RIP nobody could tell where: the next entry fails and says why.
        let Ok(pc) = self.cpu.pc() else { return };
        // A REP that stays where it is has more to do.
        let arrival = (entry.stepping && pc != entry.from).then_some(Arrival::Done);
        match arrival {
            Some(arrival) if hits.is_empty() => self.step_done(arrival, mode),
            None if hits.is_empty() => {}
            _ => self.triggered(hits, arrival, pc, mode),
        }
    }
}

/// Adds the requests that watch bytes of this piece, each with the bytes that it watches.
fn note(image: &DebugImage, gpa: u64, old: &[u8], new: &[u8], hits: &mut Vec<Found>) {
    for range in image.ranges_in(gpa, new.len() as u64) {
        let watched = range.bytes();
        let from = watched.start.max(gpa);
        let to = watched.end.min(gpa + new.len() as u64);
        let piece = (from - gpa) as usize..(to - gpa) as usize;
        let addr = range.addr.wrapping_add(from - watched.start);
        let (old, new) = (&old[piece.clone()], &new[piece]);
        let same =
            |hit: &&mut Found| (hit.behind.owner, hit.behind.request) == (range.behind.owner, range.behind.request);
        match hits.iter_mut().find(same) {
            Some(Found { stored: Some(stored), .. }) => append(stored, addr, old, new),
            Some(_) => {}
            None => {
                let stored = Stored { addr, old: old.to_vec(), new: new.to_vec() };
                hits.push(Found { behind: range.behind.clone(), addr, stored: Some(stored) });
            }
        }
    }
}

/// Another piece of the same store, if it goes on where the last one ended.
fn append(stored: &mut Stored, addr: u64, old: &[u8], new: &[u8]) {
    if stored.addr.wrapping_add(stored.new.len() as u64) == addr {
        stored.old.extend_from_slice(old);
        stored.new.extend_from_slice(new);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::debug::{Breakpoint, Epoch, Owner, SLOTS, SlotOwner, Trigger, WatchedRange};
    use proptest::prelude::*;

    /// A linear address whose page is at another physical one, so that neither passes for the other.
    const LINEAR: u64 = 0x7000_0000;

    /// The ranges of requests `(gpa, len)`, in pieces by page.
    fn image(requests: &[(u64, u64)]) -> DebugImage {
        let mut ranges = Vec::new();
        for (n, &(gpa, len)) in requests.iter().enumerate() {
            let request = Breakpoint::watch(LINEAR + gpa, len, Trigger::Write);
            let behind = SlotOwner { owner: Owner::harness(n as u32), request, handler: None };
            let mut at = gpa;
            while at < gpa + len {
                let end = (at / 0x1000 * 0x1000 + 0x1000).min(gpa + len);
                ranges.push(WatchedRange { gpa: at, len: end - at, addr: LINEAR + at, behind: behind.clone() });
                at = end;
            }
        }
        DebugImage::new(Epoch(1), [const { None }; SLOTS]).with_memory(Vec::new(), ranges)
    }

    proptest! {
        /// One store in pieces, as KVM gives it, against every byte on its own.
        #[test]
        fn l62_pieces_and_ranges_agree_with_the_naive_bytes(
            requests in prop::collection::vec((0u64..0x3000, 1u64..0x1800), 0..12),
            gpa in 0u64..0x4000,
            bytes in prop::collection::vec(any::<(u8, u8)>(), 1..80),
            first in 1usize..80,
        ) {
            let (old, new): (Vec<u8>, Vec<u8>) = bytes.into_iter().unzip();
            let image = image(&requests);
            let mut hits = Vec::new();
            let mut at = 0;
            // Pieces of any length first, then of eight bytes.
            let mut len = first;
            while at < new.len() {
                let end = (at + len).min(new.len());
                note(&image, gpa + at as u64, &old[at..end], &new[at..end], &mut hits);
                (at, len) = (end, 8);
            }
            for (n, &(from, len)) in requests.iter().enumerate() {
                let bytes: Vec<usize> =
                    (0..new.len()).filter(|at| (from..from + len).contains(&(gpa + *at as u64))).collect();
                let mut told = hits.iter().filter(|hit| hit.behind.owner == Owner::harness(n as u32));
                let stored = bytes.first().map(|first| Stored {
                    addr: LINEAR + gpa + *first as u64,
                    old: bytes.iter().map(|at| old[*at]).collect(),
                    new: bytes.iter().map(|at| new[*at]).collect(),
                });
                let hit = told.next();
                prop_assert_eq!(hit.map(|hit| hit.addr), stored.as_ref().map(|stored| stored.addr));
                prop_assert_eq!(hit.and_then(|hit| hit.stored.clone()), stored);
                prop_assert!(told.next().is_none(), "one request is told of once");
            }
        }
    }
}
