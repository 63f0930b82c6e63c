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

impl<C: Cpu> VcpuThread<C> {
    /// Carries out the store of `data` at `gpa`, and tells those who watch bytes of it.
    pub(super) fn stored(&mut self, gpa: u64, data: Vec<u8>, entry: &Entry, mode: RunMode) {
        let mut hits = Vec::new();
        let mut event = None;
        let mut exit = Exit::Store { gpa, data };
        loop {
            match exit {
                Exit::Store { gpa, data } => {
                    let mut old = vec![0; data.len()];
                    let done = self.cpu.exchange(gpa, &data, &mut old);
                    note(&self.image, gpa, &old[..done], &data[..done], &mut hits);
                }
                // The rest of it went to a device in the next page.
                Exit::Served(reason) => event = event.or(reason),
                Exit::Kicked | Exit::Again => break,
                Exit::Debug(exit) => return self.trapped(exit, hits, entry, mode),
                Exit::Crash(crash) => {
                    event = event.or(Some(StopReason::Crash(crash)));
                    break;
                }
            }
            if hits.is_empty() && event.is_none() && !entry.stepping {
                // Nobody waits for its end: what is left of it comes with the next entry.
                self.incomplete = true;
                return;
            }
            exit = self.cpu.complete();
        }
        self.tell_stores(hits, entry, mode);
        if let Some(reason) = event {
            self.stop(reason);
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
        let same = |hit: &&mut Found| {
            (hit.behind.owner, hit.behind.request) == (range.behind.owner, range.behind.request)
        };
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
