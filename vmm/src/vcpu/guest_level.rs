//! The guest's own debug registers, as the thread of its vCPU looks after them (laws 30-35).
//!
//! The guest's breakpoints are copied into the slots that the image leaves free
//! ([`Overlay`]). For that the thread must know what the guest writes to
//! its debug registers, and flavours of KVM differ:
//!
//! - where DR7.GD in the overlay makes such an access exit (VT-x), it is carried out here, and
//!   nothing is missed;
//! - on SVM, where the host's kernel lets this process trace its KVM, the write kicks the vCPU before the
//!   next instruction, the registers are read then, and nothing is missed either;
//! - elsewhere KVM carries it out without a word. So the registers are read again after each
//!   exit that did not come from a trap, after every [`TRAPS_PER_LOOK`]th that did, and at the
//!   latest after [`LOOK_INTERVAL`](crate::limits::LOOK_INTERVAL) of running: the vCPU kicks itself.
//!   A breakpoint that the guest sets is in force at the latest then.

use std::io;

use super::cpu::{Cpu, Raised};
use super::dr_access::{Access, carry_out};
use crate::debug::{
    DebugImage, Dr6, Epoch, GuestBreakpoint, GuestBreakpoints, GuestRegisters, GuestView, Overlay, Remembered, SLOTS,
    SlotCondition,
};

/// RFLAGS.TF.
const TF: u64 = 1 << 8;
/// RFLAGS.RF.
const RF: u64 = 1 << 16;
/// POPF, the last byte of it.
const POPF: u8 = 0x9d;
/// Most bytes of one instruction.
const MAX_INSTRUCTION: usize = 15;
/// After so many traps in a row the guest's registers are read again. A trap that is only counted
/// must stay cheap.
const TRAPS_PER_LOOK: u32 = 16;

#[derive(Debug, Default)]
pub(crate) struct GuestLevel {
    /// As last read.
    registers: GuestRegisters,
    remembered: Remembered,
    /// Accesses to debug registers exit here: what was read stays true.
    accesses_exit: bool,
    /// Set while the vCPU is to be kicked at writes to them: whether the host does that, and what was read stays true until
    /// such a kick.
    writes_kick: Option<bool>,
    /// Traps since the registers were read.
    traps: u32,
    /// Causes of a #DB that the guest gets at the next entry.
    owed: Option<u64>,
    /// Where the guest, stepping itself, stands on an instruction that may clear its TF.
    clears_tf: Option<u64>,
    /// The guest's breakpoints that were said to have no slot, by its own numbers, and since which image.
    said_lost: GuestBreakpoints,
    said_for: Epoch,
}

impl GuestLevel {
    /// What to arm for running on: `image`, and what the guest wants in the slots that it leaves.
    pub(crate) fn overlay(&self, image: &DebugImage) -> Overlay {
        Overlay::merge(image, 0, &self.remembered.breakpoints())
    }

    /// What to arm for a step: `image` without the `suspended` slots, and what the guest wants in
    /// the others, execution of the instruction at `but` excepted.
    pub(crate) fn overlay_for_step(&self, image: &DebugImage, suspended: u8, but: Option<u64>) -> Overlay {
        let mut wanted = self.remembered.breakpoints();
        for own in wanted.iter_mut().filter(|own| own.is_some_and(|own| Some(own.addr) == but)) {
            own.take_if(|own| own.condition == SlotCondition::Execute);
        }
        Overlay::for_step(image, suspended, &wanted)
    }

    /// Whether the guest may have an execution breakpoint at `pc`, as far as is known without a look.
    pub(crate) fn may_stop_at(&self, pc: u64) -> bool {
        stops_at(&self.remembered.breakpoints(), pc) != 0
    }

    /// The guest's execution breakpoints at `pc` as of the last look, one bit each.
    pub(crate) fn stops_at(&self, pc: u64) -> u64 {
        stops_at(&self.registers.breakpoints(), pc)
    }

    /// Has the vCPU kicked at what the guest writes, while that is `wanted`, if nothing else tells of it; whether the host
    /// cannot do that, and the vCPU must kick itself now and then.
    pub(crate) fn needs_looks<C: Cpu>(&mut self, cpu: &mut C, wanted: bool) -> io::Result<bool> {
        let kicks = wanted && !self.accesses_exit;
        if kicks != self.writes_kick.is_some() {
            let can = cpu.kick_at_dr_writes(kicks)?;
            self.writes_kick = kicks.then_some(can);
        }
        Ok(self.writes_kick == Some(false))
    }

    /// Reads the guest's registers.
    pub(crate) fn look<C: Cpu>(&mut self, cpu: &mut C) -> io::Result<()> {
        self.registers = cpu.guest_registers()?;
        self.traps = 0;
        let now = self.registers.breakpoints();
        if self.accesses_exit {
            self.remembered.only(&now)
        } else {
            self.remembered.see(&now)
        }
        Ok(())
    }

    /// Reads them after an exit by which they may have changed unseen: with `armed`, by a `trap` or not.
    pub(crate) fn look_after<C: Cpu>(&mut self, cpu: &mut C, armed: &Overlay, trap: bool) -> io::Result<()> {
        self.traps += u32::from(trap);
        let wrote = cpu.wrote_debug_registers();
        let unmoved = self.writes_kick == Some(true) || trap && self.traps < TRAPS_PER_LOOK;
        let seen = armed.is_on() && (self.accesses_exit || !wrote && unmoved);
        if seen { Ok(()) } else { self.look(cpu) }
    }

    /// What they say to whoever splits an exit at `pc` among its owners.
    pub(crate) fn view<'a, C: Cpu>(&'a mut self, cpu: &'a mut C, pc: u64) -> View<'a, C> {
        View { level: self, cpu, pc, looked: false }
    }

    /// Copies of the guest's registers have hit.
    pub(crate) fn heard(&mut self, wanted: u8, idle: u8) {
        for index in 0..SLOTS {
            if (wanted | idle) & (1 << index) != 0 && !self.accesses_exit {
                self.remembered.hit(index, wanted & (1 << index) != 0);
            }
        }
    }

    /// The guest is to get a #DB with these causes when it goes on.
    pub(crate) fn owe(&mut self, causes: u64) {
        self.owed = Some(self.owed.unwrap_or(0) | causes);
    }

    /// Gives the guest what it is owed; whether that was something.
    pub(crate) fn pay<C: Cpu>(&mut self, cpu: &mut C) -> io::Result<bool> {
        let Some(causes) = self.owed else { return Ok(false) };
        match cpu.reflect_db(causes) {
            // Another exception is on its way to the guest: after that.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(true),
            result => {
                self.owed = None;
                result.map(|()| true)
            }
        }
    }

    /// The causes of the #DB that it is owed.
    pub(crate) fn owed(&self) -> Option<u64> {
        self.owed
    }

    /// The guest is another one. What its KVM reports is as it was.
    pub(crate) fn forget(&mut self) {
        let &mut GuestLevel { accesses_exit, writes_kick, .. } = self;
        *self = GuestLevel { accesses_exit, writes_kick, ..GuestLevel::default() };
    }

    /// Whether it is owed one.
    pub(crate) fn is_owed(&self) -> bool {
        self.owed.is_some()
    }

    /// Carries out an access to a debug register at `pc`, or raises in the guest what it raises.
    /// Whether the instruction is done.
    pub(crate) fn access<C: Cpu>(&mut self, cpu: &mut C, pc: u64) -> io::Result<bool> {
        let mut bytes = [0; MAX_INSTRUCTION];
        let got = cpu.read(pc, &mut bytes);
        let before = cpu.guest_registers()?;
        let (mut general, mut own) = (cpu.state()?, before);
        let access = carry_out(&bytes[..got], &mut general, &mut own);
        match access {
            Access::Done => {
                self.accesses_exit = true;
                cpu.set_general(&general)?;
                if own != before {
                    cpu.set_guest_registers(&own)?;
                }
                cpu.end_shadow()?;
                if general.rflags & TF != 0 {
                    self.owe(Dr6::BS);
                }
            }
            Access::Detected => self.owe(Dr6::BD),
            Access::Undefined => cpu.raise(Raised::exception(6), 0)?,
            Access::Protected => cpu.raise(Raised::fault(13), 0)?,
            // Otherwise it would exit for ever.
            Access::Other if got == 0 => return Err(io::Error::from_raw_os_error(libc::EFAULT)),
            // A bit that was left over.
            Access::Other => {}
        }
        self.look(cpu)?;
        Ok(access == Access::Done)
    }

    /// The guest's breakpoints that have just lost their slots, or have got them back (law 27).
    ///
    /// What is said is bounded by what the debugger does, and not by how often the guest writes
    /// its registers: for each image a register is said to have lost at most once.
    pub(crate) fn news(&mut self, overlay: &Overlay, epoch: Epoch) -> Vec<(GuestBreakpoint, Served)> {
        let nothing_lost = overlay.lost() == 0 && self.said_lost == [None; SLOTS];
        if nothing_lost {
            return Vec::new();
        }
        let mut news = Vec::new();
        let wanted = self.remembered.breakpoints();
        for (index, (said_lost, wanted)) in self.said_lost.iter_mut().zip(wanted).enumerate() {
            let is_lost = overlay.lost() & (1 << index) != 0;
            match (*said_lost, wanted) {
                (None, Some(lost)) if is_lost => {
                    news.push((lost, Served::No));
                    *said_lost = Some(lost);
                }
                (Some(said), now) if !is_lost && self.said_for != epoch => {
                    if now == Some(said) {
                        news.push((said, Served::Again));
                    }
                    *said_lost = None;
                }
                _ => {}
            }
        }
        self.said_for = epoch;
        news
    }
}

/// What has become of a breakpoint of the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Served {
    /// No slot is left for it.
    No,
    /// It has one again.
    Again,
}

/// The guest's registers at one exit.
pub(crate) struct View<'a, C> {
    level: &'a mut GuestLevel,
    cpu: &'a mut C,
    pc: u64,
    looked: bool,
}

impl<C: Cpu> GuestView for View<'_, C> {
    fn breakpoint(&mut self, n: usize) -> Option<GuestBreakpoint> {
        if !self.looked {
            self.looked = true;
            if let Err(error) = self.level.look(self.cpu) {
                tracing::warn!(%error, "the guest's own debug registers cannot be read");
            }
        }
        self.level.registers.breakpoint(n)
    }

    fn single_steps(&mut self) -> bool {
        let Ok(registers) = self.cpu.state() else { return false };
        let has_tf = registers.rflags & TF != 0;
        // The trap behind a POPF or IRET that clears TF comes with TF clear. A program that was stepped to
        // its POPF on another vCPU was not seen there on this one; nobody else uses one in ring 3.
        let seen = self.level.clears_tf.take().is_some();
        let cleared = !has_tf && (seen || registers.cpl() == 3 && self.is_behind_popf());
        if has_tf {
            let mut bytes = [0; MAX_INSTRUCTION];
            let got = self.cpu.read(self.pc, &mut bytes);
            self.level.clears_tf = loads_flags(&bytes[..got]).then_some(self.pc);
        }
        has_tf || cleared
    }

    fn resumes(&mut self) -> bool {
        self.cpu.state().is_ok_and(|registers| registers.rflags & RF != 0)
    }
}

impl<C: Cpu> View<'_, C> {
    fn is_behind_popf(&mut self) -> bool {
        let mut byte = [0];
        self.cpu.read(self.pc.wrapping_sub(1), &mut byte) == 1 && byte[0] == POPF
    }
}

/// Whether the instruction loads RFLAGS, and so may clear TF.
fn loads_flags(bytes: &[u8]) -> bool {
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};
    let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
    matches!(
        instruction.mnemonic(),
        Mnemonic::Popf
            | Mnemonic::Popfd
            | Mnemonic::Popfq
            | Mnemonic::Iret
            | Mnemonic::Iretd
            | Mnemonic::Iretq
            | Mnemonic::Sysret
            | Mnemonic::Sysretq
    )
}

/// Those that are execution breakpoints at `pc`, one bit each.
fn stops_at(own: &GuestBreakpoints, pc: u64) -> u64 {
    let here = |own: &GuestBreakpoint| own.condition == SlotCondition::Execute && own.addr == pc;
    own.iter().enumerate().filter(|(_, own)| own.is_some_and(|own| here(&own))).fold(0, |bits, (n, _)| bits | 1 << n)
}
