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

    /// Sees to it that the guest's debug registers are looked at in time.
    pub(super) fn kick_itself_if_needed(&mut self) {
        let needed = matches!(self.state, State::Running(_)) && self.masks_the_guests() && self.guest.needs_looks();
        if needed != self.kicks_itself {
            match self.cpu.kick_itself(needed) {
                Ok(()) => self.kicks_itself = needed,
                Err(error) => tracing::warn!(vcpu = self.id.0, %error, "no timer to look at the guest's registers"),
            }
        }
    }

    /// The guest is to get a #DB of its own, raised at `pc`.
    pub(super) fn owe(&mut self, causes: u64, pc: u64, mode: RunMode) {
        self.guest.owe(causes);
        self.interrupted_by_its_own(pc, mode);
    }

    /// The instruction at `pc` raises something of the guest's own: its handler comes first, and
    /// a breakpoint that was about to be stepped off there is met again behind it.
    fn interrupted_by_its_own(&mut self, pc: u64, mode: RunMode) {
        if self.told.is_some_and(|told| told.pc == pc && told.crossing) {
            self.told = None;
        }
        if mode == RunMode::Continue {
            self.stepped = None;
        }
    }

    /// Whether execution slots hit at `pc` that were told before the guest's own handler ran.
    pub(super) fn comes_back(&mut self, hits: &[(SlotOwner, u64)], pc: u64) -> bool {
        hits.iter().any(|(behind, _)| behind.request.on == Trigger::Execute)
            && self.guest.has_crossed(&mut self.cpu, pc)
    }

    /// The instruction at `pc` accesses a debug register, and the overlay has made it exit.
    pub(super) fn access(&mut self, pc: u64, entry: &Entry, mode: RunMode) {
        self.armed = None;
        match self.guest.access(&mut self.cpu, pc) {
            Ok(true) if entry.stepping => self.step_done(mode),
            Ok(true) => {}
            Ok(false) => self.interrupted_by_its_own(pc, mode),
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(0);
                return self.stop(StopReason::Crash(Crash::RunFailed { errno }));
            }
        }
        self.kick_itself_if_needed();
    }

    /// KVM cannot emulate the instruction in `bytes`. Some only raise what the guest is waiting
    /// for (law 73); at any other the vCPU stops.
    pub(super) fn cannot_emulate(&mut self, bytes: Vec<u8>, mode: RunMode) {
        if self.raises(&bytes, mode) {
            return;
        }
        self.stop(StopReason::Crash(Crash::EmulationFailure { bytes }));
    }

    fn raises(&mut self, bytes: &[u8], mode: RunMode) -> bool {
        let Some(raised) = raised_by(bytes) else { return false };
        // Gates are checked against the privilege level elsewhere, and real mode has none.
        let Ok(registers) = self.cpu.registers() else { return false };
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
        self.told = None;
        self.interrupted_by_its_own(registers.pc(), mode);
        true
    }

    pub(super) fn reflect(&mut self, inject: impl FnOnce(&mut C) -> io::Result<()>) {
        self.armed = None;
        if let Err(error) = inject(&mut self.cpu) {
            tracing::warn!(vcpu = self.id.0, %error, "the guest's own debug exception could not be delivered");
        }
    }
}
