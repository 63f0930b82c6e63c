//! The vCPU as data: what KVM has, and what its thread still owes to the guest.

use super::*;
use crate::state::{OwedState, VcpuState, Word};

impl<C: Cpu> VcpuThread<C> {
    /// Everything that the vCPU is, and nothing of the debugger's (law 69).
    pub(super) fn save(&mut self) -> io::Result<VcpuState> {
        // A park leaves none of them (laws C4, C8).
        let parked = matches!(self.state, State::Parked) && !self.incomplete && self.stepped.is_none();
        if !parked {
            return Err(io::Error::other("it is in the middle of something"));
        }
        let owed = OwedState { db: self.guest.owed().map(Word), trap_at: self.owes_trap_at.map(Word) };
        Ok(VcpuState { owed, ..self.cpu.save()? })
    }

    /// Makes the vCPU what was saved. What was told of where it stood before counts no more.
    pub(super) fn restore(&mut self, state: &VcpuState) -> io::Result<()> {
        if !matches!(self.state, State::Parked) {
            return Err(io::Error::other("it is running"));
        }
        self.forget();
        self.cpu.restore(state)?;
        if let Some(Word(causes)) = state.owed.db {
            self.guest.owe(causes);
        }
        self.owes_trap_at = state.owed.trap_at.map(|at| at.0);
        self.look();
        self.arm_to_run().map(drop)
    }

    fn forget(&mut self) {
        (self.armed, self.told, self.unfinished, self.stepped) = (None, None, None, None);
        (self.incomplete, self.guest_is_known, self.parked_from) = (false, false, None);
        self.guest.forget();
        self.progress = Progress::default();
    }
}
