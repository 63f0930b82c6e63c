//! The vCPU thread: obey, run, classify, park.
//!
//! ```text
//!                    Resume(mode)
//!         ┌────────┐ ───────────► ┌─────────┐  run ─► Exit ─► classify
//!         │ Parked │              │ Running │ ◄───────── nobody's: go on
//!         └────────┘ ◄─────────── └─────────┘
//!                    Park, or a stop of its own (Event)
//! ```
//!
//! The loop clears the kick *before* it looks at the inbox: a kick that arrives later makes the
//! next entry return at once, so that no command waits for a guest exit (law C2).

mod guest_events;

use std::io;

use super::Registers;
use super::cpu::{Arming, Cpu, Exit};
use super::guest_level::GuestLevel;
use super::protocol::{Answer, Command, Event, Message, Reply, Request};
use super::step::Stepped;
use crate::debug::{
    Breakpoint, Causes, Crash, DebugExit, DebugImage, Disposition, Dr7, GuestState, Hit, Level, Notice, Overlay, Owner,
    Piece, RunMode, Slot, SlotCondition, SlotOwner, Stop, StopReason, Trigger, VcpuId, classify,
};
use crate::limits::PAGE_SIZE;
use crate::sync::{Arc, mpsc};

enum State {
    Parked,
    Running(RunMode),
}

/// What one entry into the guest was armed for.
struct Entry {
    from: u64,
    stepping: bool,
    armed: Overlay,
}

/// The last stop, for as long as the vCPU has not left the place.
#[derive(Debug, Clone, Copy)]
struct Told {
    pc: u64,
    /// The crossing of a breakpoint was told, before its instruction ran. It is over when that
    /// instruction is done, whether the breakpoint is still armed or not: without a step nobody
    /// could tell later whether the vCPU never left or has come back (law 13).
    crossing: bool,
}

/// What of a vCPU a handler may look at.
struct HitState<'a, C>(&'a mut C);

impl<C: Cpu> GuestState for HitState<'_, C> {
    fn registers(&mut self) -> io::Result<Registers> {
        self.0.registers()
    }

    fn read(&mut self, addr: u64, into: &mut [u8]) -> usize {
        self.0.read(addr, into)
    }
}

pub(crate) struct VcpuThread<C> {
    id: VcpuId,
    cpu: C,
    inbox: mpsc::Receiver<Command>,
    outbox: mpsc::Sender<Message>,
    /// Wakes whoever waits for events elsewhere than in the channel.
    notify: Box<dyn Fn() + Send>,
    state: State,
    /// The mode in which a Park found it. A stop of its own leaves nothing to go back to.
    parked_from: Option<RunMode>,
    image: Arc<DebugImage>,
    /// What KVM was last told; `None` when it must be told again.
    armed: Option<Arming>,
    /// What was told where the vCPU stands.
    told: Option<Told>,
    /// A served access has not been completed yet.
    incomplete: bool,
    /// The instruction that is being stepped, from its first entry until it is done.
    stepped: Option<Stepped>,
    /// The guest's own debug registers.
    guest: GuestLevel,
    /// It kicks itself now and then.
    kicks_itself: bool,
    /// It was logged that no slot is left for the guest.
    said_lost: bool,
}

impl<C: Cpu> VcpuThread<C> {
    pub(crate) fn new(
        id: VcpuId,
        cpu: C,
        inbox: mpsc::Receiver<Command>,
        outbox: mpsc::Sender<Message>,
        notify: Box<dyn Fn() + Send>,
    ) -> Self {
        Self {
            id,
            cpu,
            inbox,
            outbox,
            notify,
            state: State::Parked,
            parked_from: None,
            image: Arc::default(),
            armed: None,
            told: None,
            incomplete: false,
            stepped: None,
            guest: GuestLevel::default(),
            kicks_itself: false,
            said_lost: false,
        }
    }

    /// Runs until told to quit, or until the coordinator is gone.
    pub(crate) fn main(mut self) {
        self.cpu.begin();
        loop {
            self.cpu.clear_kick();
            let command = match self.state {
                State::Parked => self.inbox.recv().map(Some).map_err(|_| ()),
                State::Running(_) => match self.inbox.try_recv() {
                    Ok(command) => Ok(Some(command)),
                    Err(mpsc::TryRecvError::Empty) => Ok(None),
                    Err(mpsc::TryRecvError::Disconnected) => Err(()),
                },
            };
            match (command, &self.state) {
                (Ok(Some(command)), _) => {
                    let quit = matches!(command.request, Request::Quit);
                    self.obey(command);
                    if quit {
                        return;
                    }
                }
                (Ok(None), &State::Running(mode)) => self.run_once(mode),
                (Ok(None), State::Parked) => {}
                (Err(()), _) => return,
            }
        }
    }

    fn obey(&mut self, command: Command) {
        let result = match command.request {
            Request::Install(image) => self.install(image).map(|()| Reply::Done),
            Request::Park => {
                if let State::Running(mode) = self.state {
                    self.parked_from = Some(mode);
                }
                self.park().map(|()| Reply::Done)
            }
            Request::Resume(mode) => {
                self.resume(mode);
                Ok(Reply::Done)
            }
            Request::Unpark => {
                if let Some(mode) = self.parked_from {
                    self.resume(mode);
                }
                Ok(Reply::Done)
            }
            Request::Untell => {
                self.told = None;
                Ok(Reply::Done)
            }
            Request::ReadRegisters => self.cpu.registers().map(|r| Reply::Registers(Box::new(r))),
            Request::WriteRegisters(registers) => {
                // Writing registers drops what KVM latched for the step (law 7).
                self.armed = None;
                let written = self.cpu.set_registers(&registers);
                self.look();
                written.map(|()| Reply::Done)
            }
            Request::ReadActivity => self.cpu.activity().map(Reply::Activity),
            Request::Locate(ranges) => Ok(Reply::Located(ranges.iter().map(|&range| self.locate(range)).collect())),
            Request::Quit => {
                let quiet = self.cpu.kick_itself(false);
                self.cpu.arm(&Arming::OFF).and(quiet).map(|()| Reply::Done)
            }
        };
        let result = result.map_err(|error| error.to_string());
        self.send(Message::Answer(Answer { vcpu: self.id, seq: command.seq, result }));
    }

    /// The pieces of a linear range in guest-physical memory, page by page.
    fn locate(&mut self, (addr, len): (u64, u64)) -> Option<Vec<Piece>> {
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < len {
            let at = addr.checked_add(done)?;
            let piece = (PAGE_SIZE - at % PAGE_SIZE).min(len - done);
            pieces.push(Piece { gpa: self.cpu.translate(at)?, len: piece });
            done += piece;
        }
        Some(pieces)
    }

    /// The coordinator may be gone already; then nobody wants to hear.
    fn send(&self, message: Message) {
        let _ = self.outbox.send(message);
    }

    fn install(&mut self, image: Arc<DebugImage>) -> io::Result<()> {
        // With nothing armed the guest's registers were nobody's business.
        self.guest.look(&mut self.cpu)?;
        let overlay = self.guest.overlay(&image, 0);
        let arming = Arming::run(&image, &overlay);
        // On failure KVM has kept what it had, and so does this thread.
        self.cpu.arm(&arming)?;
        self.armed = Some(arming);
        self.image = image;
        self.tell_lost(&overlay);
        self.kick_itself_if_needed();
        Ok(())
    }

    fn resume(&mut self, mode: RunMode) {
        if mode != RunMode::Parked && matches!(self.state, State::Parked) {
            self.cpu.resumed();
            self.parked_from = None;
            self.state = State::Running(mode);
            self.kick_itself_if_needed();
        }
    }

    /// Parks with nothing half-done and nothing armed but the image (laws C4, C8).
    fn park(&mut self) -> io::Result<()> {
        self.settle();
        self.state = State::Parked;
        self.stepped = None;
        self.kick_itself_if_needed();
        self.arm(Arming::run(&self.image, &self.guest.overlay(&self.image, 0)))
    }

    /// Completes a served access. What surfaces meanwhile is an event of its own.
    fn settle(&mut self) {
        while std::mem::take(&mut self.incomplete) {
            let entry = Entry { from: 0, stepping: false, armed: self.guest.overlay(&self.image, 0) };
            match self.cpu.complete() {
                Exit::Kicked => {}
                exit => self.handle(exit, &entry, RunMode::Continue),
            }
        }
    }

    fn arm(&mut self, arming: Arming) -> io::Result<()> {
        if self.armed == Some(arming) && !arming.step {
            return Ok(());
        }
        self.armed = None;
        self.cpu.arm(&arming)?;
        self.armed = Some(arming);
        Ok(())
    }

    /// One entry into the guest.
    fn run_once(&mut self, mode: RunMode) {
        let entry = match self.prepare(mode) {
            Ok(entry) => entry,
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(0);
                return self.stop(StopReason::Crash(crate::debug::Crash::RunFailed { errno }));
            }
        };
        if self.halts(&entry) {
            match self.cpu.halt() {
                Ok(()) => return self.step_done(mode),
                Err(error) => tracing::warn!(vcpu = self.id.0, %error, "HLT could not be carried out; KVM steps it"),
            }
        }
        // Entering the guest completes whatever access was served before.
        self.incomplete = false;
        let exit = self.cpu.run();
        self.handle(exit, &entry, mode);
    }

    /// Decides what to arm for the next entry and arms it: the slots, less those that this vCPU
    /// stands on and was stopped at, and single-step if that is wanted or needed.
    fn prepare(&mut self, mode: RunMode) -> io::Result<Entry> {
        if self.guest.pay(&mut self.cpu)? {
            self.armed = None;
        }
        let wants_step = mode != RunMode::Continue;
        if !wants_step && self.told.is_none() && self.guest.passes_at().is_none() {
            let armed = self.guest.overlay(&self.image, 0);
            self.arm(Arming::run(&self.image, &armed))?;
            self.tell_lost(&armed);
            return Ok(Entry { from: 0, stepping: false, armed });
        }
        let from = self.cpu.pc()?;
        let passes = self.guest.passes_at() == Some(from);
        if !passes {
            self.guest.pass(None);
        }
        let told = self.told.filter(|told| told.pc == from);
        let suspended = told.map_or(0, |told| self.heard(from, told.crossing));
        let stepping = wants_step || suspended != 0 || passes || told.is_some_and(|told| told.crossing);
        // Once it runs freely it may come back here, and that is news.
        self.told = told.filter(|_| stepping);
        let armed = self.guest.overlay(&self.image, suspended);
        let mut arming = Arming::run(&self.image, &armed);
        if stepping {
            if self.stepped.is_none() {
                self.stepped = Some(Stepped::begin(&mut self.cpu, from)?);
            }
            arming.step = true;
            // A halted vCPU is woken by nothing but an interrupt.
            arming.block_irq = !self.stepped.as_ref().is_some_and(Stepped::waits_for_interrupt);
        }
        self.arm(arming)?;
        Ok(Entry { from, stepping, armed })
    }

    /// The execution slots at `pc` that have had their say, one bit each: all of them after a hit,
    /// those that are gdb's alone after a step that led here. The others count this crossing when
    /// it faults (law 22).
    fn heard(&self, pc: u64, crossing: bool) -> u8 {
        let is_gdbs = |slot: &Slot| slot.owners.iter().all(|behind| behind.owner.level == Level::Gdb);
        let heard = self.image.exec_slots_at(pc).filter(|(_, slot)| crossing || is_gdbs(slot));
        heard.fold(0, |bits, (n, _)| bits | 1 << n)
    }

    /// Whether the step is over a HLT that no armed slot stops at first.
    fn halts(&self, entry: &Entry) -> bool {
        entry.stepping
            && self.stepped.as_ref().is_some_and(Stepped::halts)
            && !self.image.exec_slots_at(entry.from).any(|(n, _)| entry.armed.is_ours(n))
    }

    fn handle(&mut self, exit: Exit, entry: &Entry, mode: RunMode) {
        self.look_after(&exit, entry);
        match exit {
            Exit::Kicked | Exit::Again => {}
            Exit::Served(None) => {
                self.incomplete = true;
                if entry.stepping {
                    self.complete_step(entry, mode);
                }
            }
            Exit::Served(Some(reason)) => {
                self.incomplete = true;
                self.settle();
                self.stop(reason);
            }
            Exit::Debug(exit) => self.trapped(exit, entry, mode),
            Exit::Crash(Crash::EmulationFailure { bytes }) => self.cannot_emulate(bytes, mode),
            Exit::Crash(crash) => self.stop(StopReason::Crash(crash)),
        }
    }

    /// A port or MMIO access was stepped: on some paths KVM reports no #DB for it (law 50). The
    /// instruction is done once RIP has moved; a REP that stays is stepped further.
    fn complete_step(&mut self, entry: &Entry, mode: RunMode) {
        self.incomplete = false;
        match self.cpu.complete() {
            Exit::Kicked => {
                if self.cpu.pc().is_ok_and(|pc| pc != entry.from) {
                    self.step_done(mode);
                }
            }
            exit => self.handle(exit, entry, mode),
        }
    }

    fn trapped(&mut self, exit: DebugExit, entry: &Entry, mode: RunMode) {
        let mut view = self.guest.view(&mut self.cpu, exit.pc);
        let causes = classify(exit, &self.image, &entry.armed, entry.stepping, &mut view);
        let Causes { step, mut hits, guest_db, guest_bp, access, pass, wanted, idle } = causes;
        self.guest.heard(wanted, idle);
        if access {
            return self.access(exit.pc, entry, mode);
        }
        if let Some(causes) = guest_db {
            self.owe(causes, exit.pc, mode);
        }
        if guest_bp {
            self.reflect(|cpu| cpu.reflect_bp());
        }
        if pass {
            self.guest.pass(Some(exit.pc));
        }
        if self.comes_back(&hits, exit.pc) {
            self.told = Some(Told { pc: exit.pc, crossing: true });
            hits.clear();
        }
        if hits.is_empty() {
            // Who steps over a breakpoint steps over all iterations: they are one crossing.
            let goes_on = self.stepped.as_ref().is_some_and(|stepped| {
                stepped.has_not_run_at(exit.pc) || stepped.goes_on_at(exit.pc) && mode == RunMode::Continue
            });
            if step && !goes_on {
                self.step_done(mode);
            }
            return;
        }
        // A watchpoint says nothing about the instruction behind the access (law 22), and does not
        // end a crossing either while a REP goes on.
        let crossing = hits.iter().any(|(behind, _)| behind.request.on == Trigger::Execute);
        let gdb_knows = self.told.is_some_and(|told| told.pc == exit.pc);
        let goes_on = self.stepped.as_ref().is_some_and(|stepped| stepped.goes_on_at(exit.pc));
        if crossing {
            self.guest.crosses(exit.pc);
        }
        if crossing || !goes_on {
            self.told = crossing.then_some(Told { pc: exit.pc, crossing });
        }
        if step {
            // The instruction is done too; the hit is the reason that is told.
            self.end_step();
        }
        let mut stops: Vec<Stop> = Vec::new();
        for (behind, addr) in hits {
            let SlotOwner { owner, request, .. } = behind;
            // Whoever was stopped here by a step has seen this crossing; the others have not.
            if gdb_knows && owner.level == Level::Gdb && request.on == Trigger::Execute {
                continue;
            }
            if self.ask_handler(&behind, exit.pc) == Disposition::Continue {
                continue;
            }
            let reason = match request.on {
                Trigger::Execute => StopReason::Breakpoint(request),
                _ => StopReason::Watchpoint { request, addr, stored: None },
            };
            stops.push(Stop { vcpu: self.id, reason, owner: Some(owner) });
        }
        if !stops.is_empty() {
            self.stop_for(stops);
        } else if step {
            self.tell_step(mode);
        }
    }

    /// What the owner's handler says about a hit; without one, a hit is a stop.
    fn ask_handler(&mut self, behind: &SlotOwner, pc: u64) -> Disposition {
        let Some(handler) = &behind.handler else { return Disposition::Stop };
        let (owner, request, vcpu) = (behind.owner, behind.request, self.id);
        handler.call(&mut Hit { owner, request, vcpu, pc, state: &mut HitState(&mut self.cpu) })
    }

    fn end_step(&mut self) {
        self.guest.pass(None);
        if let Some(stepped) = self.stepped.take() {
            stepped.end(&mut self.cpu);
            self.armed = None;
        }
    }

    /// The stepped instruction is done: tell, or go on if it was only to get off a breakpoint.
    fn step_done(&mut self, mode: RunMode) {
        self.end_step();
        self.told = None;
        self.tell_step(mode);
    }

    /// A step was done; stops if that is what the vCPU was resumed for.
    fn tell_step(&mut self, mode: RunMode) {
        let stop = match mode {
            RunMode::Continue | RunMode::Parked => false,
            RunMode::Step => true,
            RunMode::StepRange { start, end } => !self.cpu.pc().is_ok_and(|pc| (start..end).contains(&pc)),
        };
        if stop {
            self.told = self.cpu.pc().ok().map(|pc| Told { pc, crossing: false });
            self.stop(StopReason::Step);
        }
    }

    /// Parks for a reason that is no breakpoint's.
    fn stop(&mut self, reason: StopReason) {
        self.stop_for(vec![Stop::new(self.id, reason)]);
    }

    /// Parks for stops of its own, and then says so.
    fn stop_for(&mut self, stops: Vec<Stop>) {
        if let Err(error) = self.park() {
            tracing::warn!(vcpu = self.id.0, %error, "parked, but its debug registers could not be put back");
        }
        self.parked_from = None;
        self.send(Message::Event(Event { stops }));
        (self.notify)();
    }
}
