//! INT3 patches, as the vCPU that runs into one sees them.
//!
//! ```text
//!   #BP, RIP on the INT3 ── patch here, asked for at this pc? ──► hit: handlers, stop
//!                        └─ patch here, asked for elsewhere? ───► an alias: nobody's hit
//!                        └─ no patch ───────────────────────────► the guest's own
//!
//!   to go on from there:  park, WantsAlone ──► the coordinator parks the others, StepOver
//!                         original byte in, one step, INT3 in again ──► Answer, all go on
//! ```
//!
//! While the original byte is back any vCPU could run through it unseen, so the step is made with
//! all others parked (law 58).

use std::io;

use super::{Found, State, Told, Trap, VcpuThread};
use crate::debug::{Crash, INT3, Patch, RunMode, SlotOwner, StopReason};
use crate::vcpu::Cpu;
use crate::vcpu::protocol::Message;

/// Most entries into the guest for one [`StepOver`](super::Request::StepOver): the others wait. What is
/// not done by then, a REP, goes on in the next.
const ENTRIES: usize = 4096;

impl<C: Cpu> VcpuThread<C> {
    /// The patch that `pc` leads to, if it is in memory: the guest may have overwritten it.
    pub(super) fn patch_under(&mut self, pc: u64) -> Option<Patch> {
        if self.image.patches().is_empty() {
            return None;
        }
        let gpa = self.cpu.translate(pc)?;
        let patch = self.image.patch_at(gpa)?.clone();
        (self.byte_at(gpa) == Some(INT3)).then_some(patch)
    }

    /// What is really in memory.
    fn byte_at(&mut self, gpa: u64) -> Option<u8> {
        let mut byte = [0];
        (self.cpu.read_physical(gpa, &mut byte) == 1).then_some(byte[0])
    }

    /// An INT3 at `pc` came to us. Whether it was ours; if not, it is the guest's own (law 34).
    pub(super) fn ran_into_patch(&mut self, pc: u64, mode: RunMode) -> bool {
        let here = self.cpu.translate(pc).filter(|gpa| self.image.patch_at(*gpa).is_some());
        let Some(gpa) = here else { return false };
        // Who was held up before this point may find that the guest has overwritten it: then what
        // it has written there is run.
        if self.byte_at(gpa) == Some(INT3) {
            let asked = |behind: &&SlotOwner| behind.request.addr == pc;
            let owners = self.image.patch_at(gpa).map_or(&[][..], |patch| &patch.owners);
            let found = |behind: &SlotOwner| Found { behind: behind.clone(), addr: pc, stored: None };
            let hits: Vec<Found> = owners.iter().filter(asked).map(found).collect();
            if hits.is_empty() || self.is_back(pc, Trap::Patch) {
                // Another linear address of the same byte, which is nobody's (law 57), or the crossing
                // that was told goes on: it is only to be stepped over.
                self.told = Some(Told { pc, crossing: true, counted: true });
            } else {
                self.triggered(hits, None, pc, mode);
            }
        }
        true
    }

    /// Whether the vCPU stands on a patch that has been told, and so must get off it.
    pub(super) fn stands_on_told_patch(&mut self) -> bool {
        let Some(Told { pc: told, crossing: true, .. }) = self.told else { return false };
        !self.image.patches().is_empty() && self.cpu.pc().is_ok_and(|pc| pc == told) && self.patch_under(told).is_some()
    }

    /// Parks until the coordinator has parked all others.
    pub(super) fn want_alone(&mut self, mode: RunMode) {
        self.parked_from = Some(mode);
        if let Err(error) = self.park() {
            tracing::warn!(vcpu = self.id.0, %error, "parked, but its debug registers could not be put back");
        }
        // Parking may have found a stop of its own; that comes first.
        if self.parked_from.is_some() {
            self.send(Message::WantsAlone(self.id));
            (self.notify)();
        }
    }

    /// All others are parked: takes the vCPU off the patch that it stands on, and parks it again.
    /// With nothing to step over it stays as it is.
    pub(super) fn step_over(&mut self) {
        let (State::Parked, Some(mode)) = (&self.state, self.parked_from) else { return };
        let Some(Told { pc, crossing: true, .. }) = self.told else { return };
        let Some(patch) = self.patch_under(pc).filter(|_| self.cpu.pc().is_ok_and(|now| now == pc)) else { return };
        self.state = State::Running(mode);
        if let Err(error) = self.write_byte(patch.gpa, patch.original) {
            let error = format!("the breakpoint at {pc:#x} could not be taken out for a step: {error}");
            return self.stop(StopReason::Crash(Crash::EntryFailed { error }));
        }
        self.alone = true;
        for _ in 0..ENTRIES {
            // Each entry is one step: the inbox does not wait long for its turn.
            self.cpu.clear_kick();
            self.run_once(mode);
            if matches!(self.state, State::Parked) || !self.told.is_some_and(|told| told.crossing && told.pc == pc) {
                break;
            }
        }
        self.alone = false;
        // Completed first: the access that the instruction makes may be a store to its own place.
        if let State::Running(mode) = self.state {
            self.parked_from = Some(mode);
            if let Err(error) = self.park() {
                tracing::warn!(vcpu = self.id.0, %error, "parked, but its debug registers could not be put back");
            }
        }
        // The instruction may have overwritten itself: that stays (law 56).
        if self.byte_at(patch.gpa) == Some(patch.original)
            && let Err(error) = self.write_byte(patch.gpa, INT3)
        {
            tracing::error!(vcpu = self.id.0, %error, gpa = patch.gpa, "a breakpoint could not be put back and is lost");
        }
    }

    fn write_byte(&mut self, gpa: u64, byte: u8) -> io::Result<()> {
        if self.cpu.write_physical(gpa, &[byte]) { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
    }
}
