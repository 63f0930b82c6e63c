//! One stepped instruction: where it is to stop, and the mending of what stepping does to the
//! guest behind its back.
//!
//! KVM steps by setting TF in the real RFLAGS, and no two flavours of it make the same of an
//! instruction that raises an exception, changes RFLAGS or leaves the ring. So the instruction is
//! decoded before it runs ([`effect`]), and a step means the same everywhere:
//!
//! * It ends at the next instruction of the same context. What was stepped may have been a system
//!   call, an IRET or a SYSRET: then that is the entry of the kernel, or the target.
//! * If the instruction raises an exception (a fault, INT n, INT3, INT1), it ends at the first
//!   instruction of the guest's handler, which has not run yet.
//! * The guest sees no TF but its own (law 45): not where PUSHF stores it, not in the frame of an
//!   exception, not in R11. Its own TF is what it would be without us, and the #DB that it owes
//!   itself for the stepped instruction comes when the debugger lets it go on (law 46).
//!
//! To be stopped where the processor or KVM would run on, the step arms execution slots of its
//! own, in this vCPU alone and for this step alone ([`Landing`]): at the handlers of the
//! exceptions that the instruction may raise, at LSTAR, at the target of IRET. It takes what the image leaves
//! free, then slots of execution breakpoints elsewhere: one instruction cannot reach those. A
//! watchpoint's slot is taken only from an instruction that uses no memory. With four watchpoints
//! armed, the step of an instruction that raises an exception ends where this KVM ends it: on AMD
//! and Intel one instruction behind the return from the handler, on PVM one behind its entry.
//!
//! PVM runs 64-bit ring 3 natively and gives a single-step there to the guest. Under an interrupt
//! shadow it emulates the next instruction, and that can be stepped. What its emulator does not
//! know is not stepped there: the step is refused with a reason. IRETQ and SYSRET into ring 3 are carried out in place.
//!
//! A vCPU that sleeps, or into which an interrupt is on its way already, first runs freely back to where it
//! is: then the interrupt's handler is over, and the step can begin.
//!
//! All of this holds in long mode. Real mode and 32-bit guests are stepped as their KVM does it.

mod effect;
mod gate;
mod iret;
mod plain;

use std::io;

use self::effect::{Effect, Kind, Next, decode};
pub(crate) use self::gate::Frame;
use self::gate::{Gates, with_tf};
pub(crate) use self::iret::Return;
use super::over::hide_patches;
use super::{Activity, Arming, Cpu, Registers, Ring3};
use crate::debug::{DebugExit, DebugImage, Dr6, GuestBreakpoint, Overlay, SLOTS, SlotCondition};

/// RFLAGS.TF.
const TF: u64 = 1 << 8;
/// EFER.LMA.
const LONG_MODE: u64 = 1 << 10;
/// Longest instruction, in bytes.
const MAX_INSTRUCTION: usize = 15;
/// Stops within a REP that is stepped over before interrupts get their turn.
const REP_PIECE: u32 = 16;

/// #DB.
pub(crate) const DB: u8 = 1;
const UD: u8 = 6;
const NM: u8 = 7;
const NP: u8 = 11;
const GP: u8 = 13;
const PF: u8 = 14;

/// An instruction that is being stepped, from its first entry until it is done.
pub(crate) struct Stepped {
    from: u64,
    /// The instruction, and the one behind it if one trap covers both (MOV SS).
    effect: Effect,
    covered: Option<Effect>,
    /// The guest's own TF before it, and what each of the two loads, if it loads RFLAGS.
    tf: bool,
    loads: [Option<bool>; 2],
    landings: Vec<Landing>,
    phase: Phase,
    /// It has to be emulated, for which the vCPU is put into an interrupt shadow.
    in_shadow: bool,
    /// IRETQ or SYSRET into ring 3 that is carried out in place.
    returns: bool,
    /// It may lead to itself: a trap there says that it was done.
    may_stay: bool,
    /// Stops within a REP so far, and RCX at the last of them.
    iterations: u32,
    count: u64,
    /// RSP, CS and CR3 at the start: whose instruction it is.
    context: Context,
}

/// How the vCPU is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// By single steps.
    Stepping,
    /// Freely, to the same place again: it sleeps, and whatever wakes it is handled first.
    Waiting,
    /// By single steps, with interrupts let through: it sleeps, and no slot is left.
    WaitingUnwatched,
    /// Freely, to the handler of the exception that the instruction raises.
    Raising,
}

/// What a step begins as.
#[expect(clippy::large_enum_variant, reason = "it is matched at once, and there is one for each step")]
pub(crate) enum Begun {
    Step(Stepped),
    /// It cannot be made on this host; why.
    Refused(&'static str),
}

/// Where the vCPU may come by something else than the end of the instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Landing {
    addr: u64,
    /// It is the first instruction of a handler and not where the instruction leads by itself.
    handler: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Context {
    rsp: u64,
    cs: u16,
    cr3: u64,
    /// Linear address of RIP 0.
    base: u64,
}

/// The slots that one entry has armed for the step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Placed {
    at: [Option<Landing>; SLOTS],
}

/// How the vCPU came to where it stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// The instruction is done.
    Done,
    /// It raised an exception; the vCPU stands at its handler.
    Handler,
}

/// What is left to be done about a step that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// The guest's own TF now. KVM has lost it while it stepped.
    pub(crate) tf: bool,
    /// The guest steps itself, and is to get #DB for this instruction.
    pub(crate) owes_trap: bool,
    /// The instruction has faulted, and this leads back to it: it may be tried again.
    pub(crate) faulted: Option<Frame>,
}

/// One context's way over one instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Crossing {
    pub(crate) pc: u64,
    rsp: u64,
    cr3: u64,
    /// Its instruction has faulted, and this leads back to it.
    frame: Option<Frame>,
}

impl Crossing {
    /// That of a vCPU with these registers, which stands at `pc`.
    pub(crate) fn at(pc: u64, registers: &Registers) -> Self {
        Crossing { pc, rsp: registers.rsp, cr3: registers.cr3, frame: None }
    }

    /// It has faulted.
    pub(crate) fn faulted(self, frame: Frame) -> Self {
        Crossing { frame: Some(frame), ..self }
    }

    /// The debugger has moved the vCPU: what is on the stack says nothing any more.
    pub(crate) fn forget_frame(&mut self) {
        self.frame = None;
    }

    /// Whether the frame is still there by which the handler of its fault returns to it.
    pub(crate) fn is_led_back_to<C: Cpu>(&self, cpu: &mut C) -> bool {
        self.frame.is_some_and(|frame| frame.leads_back(cpu, self.rsp))
    }

    /// Whether a vCPU with these registers, at its address, is in the same context.
    pub(crate) fn is_of(&self, registers: &Registers) -> bool {
        (registers.rsp, registers.cr3) == (self.rsp, self.cr3)
    }
}

impl Stepped {
    /// Looks at the instruction at `pc`, which is to be stepped. `event`: this exception is
    /// delivered to the guest before anything else.
    pub(crate) fn begin<C: Cpu>(cpu: &mut C, image: &DebugImage, pc: u64, event: Option<u8>) -> io::Result<Begun> {
        let registers = cpu.state()?;
        let effect = fetch(cpu, image, pc, &registers);
        let covered = (effect.kind == Kind::LoadSs).then(|| fetch(cpu, image, effect.behind, &registers));
        let waits = event.is_none() && (cpu.activity()? == Activity::Halted || cpu.has_interrupt_on_its_way()?);
        let phase = if waits { Phase::Waiting } else { Phase::Stepping };
        let context =
            Context { rsp: registers.rsp, cs: registers.cs.selector, cr3: registers.cr3, base: registers.cs.base };
        let mut may_stay = false;
        for effect in [Some(effect), covered].into_iter().flatten() {
            may_stay |= may_lead_to(cpu, &effect, &registers, pc)?;
        }
        let mut stepped = Stepped {
            from: pc,
            effect,
            covered,
            tf: registers.rflags & TF != 0,
            loads: [None; 2],
            landings: Vec::new(),
            phase,
            in_shadow: false,
            returns: false,
            may_stay,
            iterations: 0,
            count: registers.rcx,
            context,
        };
        if phase == Phase::Stepping
            && event.is_none()
            && let Some(why) = stepped.adapt(cpu, &registers)
        {
            return Ok(Begun::Refused(why));
        }
        stepped.loads = [Some(effect), covered].map(|effect| loaded_tf(cpu, effect?, &registers));
        if phase == Phase::Waiting {
            stepped.land(pc, false);
            stepped.land_behind();
        } else {
            stepped.foresee(cpu, &registers, event)?;
        }
        Ok(Begun::Step(stepped))
    }

    /// Finds another way where single-step is not to be had in ring 3; why there is none.
    fn adapt<C: Cpu>(&mut self, cpu: &mut C, registers: &Registers) -> Option<&'static str> {
        let in_ring_3 = registers.cpl() == 3 && is_64_bit(registers);
        let returns = matches!(self.effect.kind, Kind::Iret(8) | Kind::Sysret { wide: true });
        if !in_ring_3 && !returns {
            return None;
        }
        let ring_3 = cpu.ring_3();
        if ring_3 == Ring3::Steps {
            return None;
        }
        if !in_ring_3 {
            self.returns =
                registers.cpl() == 0 && (self.effect.kind != Kind::Iret(8) || iret::leads_to_ring_3(cpu, registers));
            return None;
        }
        if let Kind::Interrupt(_) = self.effect.kind {
            self.phase = Phase::Raising;
            return None;
        }
        let known = self.effect.is_emulated && self.covered.is_none_or(|effect| effect.is_emulated);
        match ring_3 {
            Ring3::StepsInShadow if known => {
                self.in_shadow = true;
                None
            }
            Ring3::StepsInShadow => Some(
                "this host's KVM runs user code natively and cannot emulate this instruction; \
                 set a breakpoint in the kernel and continue",
            ),
            Ring3::Steps | Ring3::Never => Some(
                "this host's KVM runs user code natively and reports no steps of it; \
                 set a breakpoint in the kernel and continue",
            ),
        }
    }

    /// Finds out where the instruction may lead that a single step would miss.
    fn foresee<C: Cpu>(&mut self, cpu: &mut C, registers: &Registers, event: Option<u8>) -> io::Result<()> {
        if registers.efer & LONG_MODE == 0 {
            return Ok(());
        }
        if event.is_none() && self.covered.is_none() && self.effect.raises_nothing(cpu) {
            return Ok(());
        }
        let gates = Gates::read(cpu, registers);
        if let Some(vector) = event {
            if let Some(handler) = gates.handler(cpu, vector) {
                self.land(handler, true);
            }
            return Ok(());
        }
        for effect in [Some(self.effect), self.covered].into_iter().flatten() {
            let vectors: &[u8] = match effect.kind {
                Kind::Iret(len) => {
                    let mut rip = [0; 8];
                    if cpu.read(registers.rsp, &mut rip[..len]) == len {
                        self.land(u64::from_le_bytes(rip), false);
                    }
                    &[]
                }
                // It loads TF, and that is the guest's: no trap comes behind it.
                Kind::Sysret { wide } => {
                    let rip = if wide { registers.rcx } else { registers.rcx & u64::from(u32::MAX) };
                    self.land(rip, false);
                    &[]
                }
                Kind::Syscall => {
                    self.land(cpu.registers()?.lstar, false);
                    &[UD]
                }
                Kind::Interrupt(vector) => &[vector],
                Kind::Divide => &[0],
                Kind::Undefined => &[UD],
                Kind::Fpu => &[NM],
                _ => &[],
            };
            // What any instruction may raise, the likeliest first: there are four slots at best.
            // One that only raises it runs freely, and others may come by their handlers.
            let others: &[u8] = if self.phase == Phase::Raising { &[] } else { &[PF, GP, UD, NP] };
            for &vector in vectors.iter().chain(others) {
                if let Some(handler) = gates.handler(cpu, vector) {
                    self.land(handler, true);
                }
            }
        }
        Ok(())
    }

    /// QEMU sets RF in the frame of an interrupt, too: back from it, an instruction that has a slot runs all the
    /// same. Then the step is made already, and that is noticed where it leads.
    fn land_behind(&mut self) {
        if self.tf || self.covered.is_some() || self.effect.kind == Kind::Halt {
            return;
        }
        match self.effect.next {
            Next::Behind => self.land(self.effect.behind, false),
            Next::At(to) => [to, self.effect.behind].into_iter().for_each(|addr| self.land(addr, false)),
            Next::StoredAt(_) | Next::Unknown => {}
        }
    }

    fn land(&mut self, addr: u64, handler: bool) {
        // Where it stands, a slot would stop it before the instruction: at the first one of a handler.
        if addr == self.from && self.phase != Phase::Waiting {
            return;
        }
        if !self.landings.iter().any(|known| known.addr == addr) {
            self.landings.push(Landing { addr, handler });
        }
    }

    /// Puts the step's own slots into `armed`, which holds what else is to be in force.
    pub(crate) fn place(&mut self, image: &DebugImage, armed: &mut Overlay) -> Placed {
        let mut placed = Placed::NONE;
        let uses_memory = self.effect.uses_memory || self.covered.is_some_and(|effect| effect.uses_memory);
        let can_lend = |held: GuestBreakpoint| match held.condition {
            SlotCondition::Execute => held.addr != self.from && !self.landings.iter().any(|l| l.addr == held.addr),
            SlotCondition::Write | SlotCondition::ReadWrite => !uses_memory,
        };
        let (suspended, free): (Vec<usize>, Vec<usize>) =
            (0..SLOTS).filter(|&n| armed.is_free(n)).partition(|&n| image.slots()[n].is_some());
        let mut slots = free;
        if self.phase == Phase::Stepping || self.phase == Phase::Raising {
            slots.extend(suspended);
            slots.extend((0..SLOTS).filter(|&n| armed.holds(n).is_some_and(can_lend)));
        } else if slots.is_empty() {
            self.phase = Phase::WaitingUnwatched;
        }
        let mut slots = slots.into_iter();
        for landing in &self.landings {
            // A breakpoint of somebody's there stops it as well.
            if image.exec_slots_at(landing.addr).any(|(n, _)| armed.is_ours(n)) {
                continue;
            }
            let Some(n) = slots.next() else { break };
            if armed.lend(n, landing.addr) {
                placed.at[n] = Some(*landing);
            }
        }
        placed
    }

    /// How it is entered.
    pub(crate) fn put_into(&self, arming: &mut Arming) {
        arming.step = matches!(self.phase, Phase::Stepping | Phase::WaitingUnwatched);
        arming.block_irq = self.phase == Phase::Stepping;
    }

    /// Whether it was entered freely, and is back at `pc` before the step itself.
    pub(crate) fn is_awake_at(&self, pc: u64) -> bool {
        self.phase == Phase::Waiting && self.from == pc
    }

    /// How the vCPU came to where `exit` says, if the step is over there. `bs`: the exit reports
    /// a single step.
    pub(crate) fn arrival(&self, pc: u64, bs: bool) -> Option<Arrival> {
        // A trap says that the instruction was done; an execution slot alone, that it was not, or
        // that it led where no trap comes.
        let landing = self.landings.iter().find(|landing| landing.addr == pc);
        match landing {
            Some(landing) if landing.handler && !bs => Some(Arrival::Handler),
            Some(_) => Some(Arrival::Done),
            None => bs.then_some(Arrival::Done),
        }
    }

    /// Whether the vCPU must be put into an interrupt shadow before each entry.
    pub(crate) fn needs_shadow(&self) -> bool {
        self.in_shadow
    }

    /// How it is carried out in place, if it is an IRETQ or SYSRET that is to be.
    pub(crate) fn returns(&self) -> Option<Return> {
        let by = if self.effect.kind == Kind::Iret(8) { Return::Iret } else { Return::Sysret };
        self.returns.then_some(by)
    }

    /// Whether it is a HLT that is to be carried out in place: a step over it ends with the vCPU
    /// asleep behind it, and no two KVM flavours do that alike (law 49).
    pub(crate) fn halts(&self) -> bool {
        self.effect.kind == Kind::Halt && self.phase == Phase::Stepping
    }

    /// Whether a trap at `pc` is one between two iterations of the instruction, not its end.
    pub(crate) fn goes_on_at(&self, pc: u64) -> bool {
        self.effect.kind == Kind::Repeat && pc == self.from
    }

    /// Whether a trap at `pc` says of a step that was none: some VT-x implementations trap once
    /// more without progress after they have left the guest in between (law 51).
    pub(crate) fn has_not_run_at<C: Cpu>(&self, cpu: &mut C, pc: u64) -> io::Result<bool> {
        if pc != self.from || self.may_stay {
            return Ok(false);
        }
        // A REP stops between its iterations, too.
        Ok(self.effect.kind != Kind::Repeat || cpu.state()?.rcx == self.count)
    }

    /// Whether it is INT1, which VT-x exits for before it has run, as if for a trap.
    pub(crate) fn is_int1(&self) -> bool {
        self.effect.kind == Kind::Interrupt(DB)
    }

    /// Puts right what the instruction did with the TF that the guest did not set. The vCPU has
    /// stopped at `pc`.
    pub(crate) fn end<C: Cpu>(self, cpu: &mut C, pc: u64, arrival: Arrival) -> Outcome {
        self.mend(cpu, pc, arrival).unwrap_or_else(|error| {
            tracing::warn!(%error, pc = self.from, "what single-step left in the guest could not be put right");
            Outcome { tf: self.tf, owes_trap: false, faulted: None }
        })
    }

    /// The step is given up, before the instruction was done: the guest's own TF is what it was.
    pub(crate) fn abandon<C: Cpu>(self, cpu: &mut C) -> Outcome {
        if self.in_shadow
            && let Err(error) = cpu.end_shadow()
        {
            tracing::warn!(%error, pc = self.from, "an interrupt shadow is left over from a step");
        }
        let was_hidden = matches!(self.phase, Phase::Stepping | Phase::WaitingUnwatched);
        Outcome { tf: self.tf && was_hidden, owes_trap: false, faulted: None }
    }

    fn mend<C: Cpu>(&self, cpu: &mut C, pc: u64, arrival: Arrival) -> io::Result<Outcome> {
        let mut registers = cpu.state()?;
        let both_ran = |covered: &Effect| pc != covered.at;
        let mut outcome = Outcome { tf: self.tf, owes_trap: false, faulted: None };
        if arrival == Arrival::Handler {
            let from = [Some(self.effect), self.covered].into_iter().flatten().flat_map(|e| [e.at, e.behind]);
            let from: Vec<u64> = from.map(|at| at.wrapping_sub(self.context.base)).collect();
            if let Some(frame) = Frame::find(cpu, registers.rsp, self.context.cs, &from) {
                frame.put_tf(cpu, self.tf);
                outcome.tf = false;
                outcome.faulted = (frame.rip == from[0]).then_some(frame);
            }
            return Ok(outcome);
        }
        self.pass(cpu, &mut registers, self.effect, self.loads[0], &mut outcome)?;
        if let Some(covered) = self.covered.filter(both_ran) {
            self.pass(cpu, &mut registers, covered, self.loads[1], &mut outcome)?;
        }
        Ok(outcome)
    }

    /// One instruction that is done: what it stored is mended, what it does to TF and to the
    /// guest's own trap is taken over.
    fn pass<C: Cpu>(
        &self,
        cpu: &mut C,
        registers: &mut Registers,
        effect: Effect,
        loaded: Option<bool>,
        outcome: &mut Outcome,
    ) -> io::Result<()> {
        let before = outcome.tf;
        // The processor looks at TF before the instruction (SDM vol. 3, 18.3.1.4).
        outcome.owes_trap = before;
        outcome.tf = loaded.unwrap_or(before);
        match effect.kind {
            Kind::PushFlags(len) => put_pushed_tf(cpu, registers, len, before),
            Kind::Syscall => {
                let fmask = cpu.registers()?.fmask;
                let r11 = with_tf(registers.r11, before);
                if r11 != registers.r11 {
                    registers.r11 = r11;
                    cpu.set_general(registers)?;
                }
                outcome.tf = before && fmask & TF == 0;
                // Here and with SYSRET it is the new TF that counts.
                outcome.owes_trap = outcome.tf;
            }
            Kind::Sysret { .. } => outcome.owes_trap = outcome.tf,
            // Held back until the next instruction is done.
            Kind::LoadSs => outcome.owes_trap = false,
            _ => {}
        }
        Ok(())
    }

    /// Counts a trap between two iterations of a REP; whether others are to have their turn:
    /// interrupts now and then, the guest that steps itself each time.
    pub(crate) fn iterated<C: Cpu>(&mut self, cpu: &mut C) -> io::Result<bool> {
        self.iterations += 1;
        self.count = cpu.state()?.rcx;
        Ok(self.tf || self.iterations >= REP_PIECE)
    }

    /// Whose instruction it is.
    pub(crate) fn crossing(&self) -> Crossing {
        let Context { rsp, cr3, .. } = self.context;
        Crossing { pc: self.from, rsp, cr3, frame: None }
    }
}

impl Placed {
    /// None at all.
    pub(crate) const NONE: Placed = Placed { at: [None; SLOTS] };

    /// The slots, one bit each.
    pub(crate) fn mask(&self) -> u8 {
        (0..SLOTS).filter(|&n| self.at[n].is_some()).fold(0, |mask, n| mask | 1 << n)
    }

    /// Whether one of them stopped the vCPU.
    pub(crate) fn stopped(&self, exit: &DebugExit) -> bool {
        let hit = |n: usize| Dr6(exit.dr6).hit(n) && self.at[n].is_some_and(|landing| landing.addr == exit.pc);
        exit.exception == 1 && (0..SLOTS).any(hit)
    }
}

/// Decodes the instruction at `pc`, as the guest wrote it.
fn fetch<C: Cpu>(cpu: &mut C, image: &DebugImage, pc: u64, registers: &Registers) -> Effect {
    let mut bytes = [0; MAX_INSTRUCTION];
    let got = cpu.read(pc, &mut bytes);
    hide_patches(cpu, image, pc, &mut bytes[..got]);
    decode(&bytes[..got], pc, registers)
}

/// Whether `effect` may lead to `addr`, as far as that can be told beforehand.
fn may_lead_to<C: Cpu>(cpu: &mut C, effect: &Effect, registers: &Registers, addr: u64) -> io::Result<bool> {
    let mut target = [0; 8];
    Ok(match (effect.kind, effect.next) {
        (Kind::Interrupt(vector), _) if registers.efer & LONG_MODE != 0 => {
            Gates::read(cpu, registers).handler(cpu, vector) == Some(addr)
        }
        (Kind::Syscall, _) => cpu.registers()?.lstar == addr,
        (Kind::Sysret { wide: true }, _) => registers.rcx == addr,
        (_, Next::Behind) => false,
        (_, Next::At(to)) => to == addr,
        (_, Next::StoredAt(at)) => cpu.read(at, &mut target) != target.len() || u64::from_le_bytes(target) == addr,
        (_, Next::Unknown) => true,
    })
}

/// The TF that the instruction is about to load, if it loads RFLAGS.
fn loaded_tf<C: Cpu>(cpu: &mut C, effect: Effect, registers: &Registers) -> Option<bool> {
    let (at, len) = match effect.kind {
        Kind::PopFlags(len) => (0, len),
        Kind::Iret(len) => (2 * len as u64, len),
        Kind::Sysret { .. } => return Some(registers.r11 & TF != 0),
        _ => return None,
    };
    let top = stack_base(registers).wrapping_add(registers.rsp).wrapping_add(at);
    let mut image = [0; 8];
    (cpu.read(top, &mut image[..len]) == len).then(|| u64::from_le_bytes(image) & TF != 0)
}

fn put_pushed_tf<C: Cpu>(cpu: &mut C, registers: &Registers, len: usize, tf: bool) {
    let top = stack_base(registers).wrapping_add(registers.rsp);
    let mut image = [0; 8];
    if cpu.read(top, &mut image[..len]) == len {
        let flags = u64::from_le_bytes(image);
        let wanted = with_tf(flags, tf);
        if wanted != flags {
            cpu.write(top, &wanted.to_le_bytes()[..len]);
        }
    }
}

/// SS.base, which 64-bit code does without.
fn stack_base(registers: &Registers) -> u64 {
    if is_64_bit(registers) { 0 } else { registers.ss.base }
}

fn is_64_bit(registers: &Registers) -> bool {
    const CODE_64: u32 = 1 << 13;
    registers.efer & LONG_MODE != 0 && registers.cs.attributes & CODE_64 != 0
}
