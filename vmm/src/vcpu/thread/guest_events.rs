//! What the guest's own instructions and debug registers raise, and how it gets it.

use super::*;
use crate::vcpu::guest_level::Served;
use crate::vcpu::raised::{Soft, raised_by};

/// CR0.PE.
const PROTECTED: u64 = 1;

impl<C: Cpu> VcpuThread<C> {
    /// Whether slots of ours keep the guest's debug registers from the processor.
    fn masks_the_guests(&self) -> bool {
        self.image.dr7() != Dr7::NONE
    }

    /// Reads the guest's debug registers, for who armed something beside them.
    pub(super) fn look(&mut self) {
        if self.masks_the_guests()
            && let Err(error) = self.guest.look(&mut self.cpu)
        {
            tracing::warn!(vcpu = self.id.0, %error, "the guest's own debug registers cannot be read");
        }
    }

    /// As [`look`](Self::look), after an exit.
    pub(super) fn look_after(&mut self, exit: &Exit, entry: &Entry) {
        let trap = matches!(exit, Exit::Debug(_));
        if self.masks_the_guests()
            && let Err(error) = self.guest.look_after(&mut self.cpu, &entry.armed, trap)
        {
            tracing::warn!(vcpu = self.id.0, %error, "the guest's own debug registers cannot be read");
        }
    }

    /// Tells which breakpoints of the guest's have lost or regained their slots: its level is the
    /// lowest (law 27).
    pub(super) fn tell_lost(&mut self, overlay: &Overlay) {
        for (own, served) in self.guest.news(overlay, self.image.epoch()) {
            let on = match own.condition {
                SlotCondition::Execute => Trigger::Execute,
                SlotCondition::Write => Trigger::Write,
                SlotCondition::ReadWrite => Trigger::Access,
            };
            let request = Breakpoint { addr: own.addr, len: own.len.bytes(), on };
            let owner = Owner { level: Level::Guest, id: self.id.0 };
            if served == Served::No && !self.said_lost {
                tracing::warn!(vcpu = self.id.0, %request, "no slot is left for a breakpoint of the guest's own");
                self.said_lost = true;
            }
            self.send(Message::Notice(match served {
                Served::No => Notice::Evicted(owner, request),
                Served::Again => Notice::Restored(owner, request),
            }));
        }
    }

    /// Sees to it that the guest's debug registers, and whether it gets on, are looked at in time.
    pub(super) fn kick_itself_if_needed(&mut self) {
        let runs = matches!(self.state, State::Running(_));
        let masks = runs && self.masks_the_guests();
        let looks = self.guest.needs_looks(&mut self.cpu, masks).unwrap_or_else(|error| {
            tracing::warn!(vcpu = self.id.0, %error, "the host does not tell what the guest writes to its debug registers");
            masks
        });
        let needed = looks || runs && self.may_get_stuck();
        if needed != self.kicks_itself {
            match self.cpu.kick_itself(needed) {
                Ok(()) => self.kicks_itself = needed,
                Err(error) => tracing::warn!(vcpu = self.id.0, %error, "no timer to look at the guest"),
            }
        }
    }

    /// Gives the guest the #DB that it is owed; whether there was one. To be called right before
    /// the vCPU is armed: who writes registers in between loses it (law 7).
    pub(super) fn pay_guest(&mut self) -> io::Result<bool> {
        // For the instruction that the debugger stepped while the guest stepped itself (law 46).
        if let Some(at) = self.owes_trap_at.filter(|_| self.stepped.is_none()) {
            let is_there = self.cpu.pc()? == at;
            self.owes_trap_at = None;
            if is_there {
                self.guest.owe(Dr6::BS);
            }
        }
        let pays = self.guest.pay(&mut self.cpu)?;
        if pays {
            self.armed = None;
        }
        Ok(pays)
    }

    /// The vCPU stands on a crossing that was told, and the guest has a breakpoint there too: now
    /// it is the guest's turn, and only then the instruction's.
    pub(super) fn let_the_guests_own_come_first(&mut self) {
        let Some(told) = self.told.filter(|told| told.crossing && self.stepped.is_none()) else { return };
        if !self.guest.may_stop_at(told.pc) || self.cpu.pc().ok() != Some(told.pc) {
            return;
        }
        let Ok(registers) = self.cpu.state() else { return };
        self.look();
        let causes = self.guest.stops_at(told.pc);
        if causes != 0 && registers.rflags & RF == 0 {
            self.guest.owe(causes);
            self.unfinished = Some(Crossing::at(told.pc, &registers));
            self.told = None;
        }
    }

    /// What the guest raised itself at `pc` comes before the instruction there, and ends a step of
    /// ours that was to be over it. A crossing that was told there goes on behind the handler.
    pub(super) fn is_interrupted(&mut self, pc: u64) {
        let crosses = self.told.is_some_and(|told| told.pc == pc && told.crossing);
        let Some(stepped) = self.stepped.take() else { return };
        if crosses {
            self.told = None;
            self.unfinished = Some(stepped.crossing());
        }
        let outcome = stepped.abandon(&mut self.cpu);
        if let Err(error) = self.give_back_tf(outcome) {
            tracing::warn!(vcpu = self.id.0, %error, "the guest's own TF could not be put back");
        }
    }

    /// The instruction at `pc` accesses a debug register, and the overlay has made it exit.
    pub(super) fn access(&mut self, pc: u64, entry: &Entry, mode: RunMode) {
        self.armed = None;
        match self.guest.access(&mut self.cpu, pc) {
            Ok(true) if entry.stepping => self.step_done(Arrival::Done, mode),
            Ok(true) => {}
            Ok(false) => self.is_interrupted(pc),
            Err(error) => {
                let error = error.to_string();
                return self.stop(StopReason::Crash(Crash::EntryFailed { error }));
            }
        }
        self.kick_itself_if_needed();
    }

    /// KVM cannot emulate the instruction in `bytes`: whether all that it does is to raise what the
    /// guest is waiting for (law 73), and that is raised now.
    pub(super) fn raises(&mut self, bytes: &[u8], mode: RunMode) -> bool {
        let Some(raised) = raised_by(bytes) else { return false };
        // Gates are checked against the privilege level elsewhere, and real mode has none.
        let Ok(registers) = self.cpu.state() else { return false };
        if registers.cpl() != 0 || registers.cr0 & PROTECTED == 0 {
            return false;
        }
        self.armed = None;
        match raised {
            Soft::Debug => self.guest.owe(0),
            Soft::Raised(event, len) => {
                if let Err(error) = self.cpu.raise(event, len) {
                    tracing::warn!(vcpu = self.id.0, %error, "an instruction's exception could not be delivered");
                    return false;
                }
            }
        }
        if mode == RunMode::Continue {
            self.is_interrupted(registers.pc());
            self.told = None;
        }
        // A step goes on into the handler.
        true
    }

    pub(super) fn reflect(&mut self, inject: impl FnOnce(&mut C) -> io::Result<()>) {
        self.armed = None;
        if let Err(error) = inject(&mut self.cpu) {
            tracing::warn!(vcpu = self.id.0, %error, "the guest's own debug exception could not be delivered");
        }
    }
}
