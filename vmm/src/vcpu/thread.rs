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
mod patch;
mod state;

use std::io;
use std::time::Instant;

use super::cpu::{Arming, Cpu, Exit};
use super::guest_level::GuestLevel;
use super::over;
use super::protocol::{Answer, Command, Event, Located, Message, Reply, Request};
use super::step::{Arrival, Begun, Crossing, DB, Outcome, Placed, Stepped};
use super::unserved::Progress;
use super::{Glance, Registers};
use crate::debug::{
    BP, Breakpoint, Causes, Crash, DebugExit, DebugImage, Disposition, Dr6, Dr7, Expectation, GuestState, Hit, INT3,
    Level, Notice, Overlay, Owner, Piece, PortAccess, PortHit, RunMode, Slot, SlotCondition, SlotOwner, Stop,
    StopReason, Stored, Trigger, VcpuId, classify,
};
use crate::limits::PAGE_SIZE;
use crate::sync::{Arc, mpsc};

/// RFLAGS.IF.
const IF: u64 = 1 << 9;
/// RFLAGS.TF.
const TF: u64 = 1 << 8;
/// RFLAGS.RF: set in the frame of a fault and of an interrupted REP, so that an execution
/// breakpoint does not trigger again on the way back. Not every KVM heeds it.
const RF: u64 = 1 << 16;

enum State {
    Parked,
    Running(RunMode),
}

/// What one entry into the guest was armed for.
pub(super) struct Entry {
    pub(super) from: u64,
    pub(super) stepping: bool,
    armed: Overlay,
    /// The step's own slots.
    placed: Placed,
}

impl Entry {
    /// This and nothing else.
    fn free(armed: Overlay) -> Self {
        Entry { from: 0, stepping: false, armed, placed: Placed::NONE }
    }
}

/// A request that triggered.
pub(super) struct Found {
    pub(super) behind: SlotOwner,
    /// The data address that matched.
    pub(super) addr: u64,
    /// What was stored, where that is seen.
    pub(super) stored: Option<Stored>,
}

/// What comes of the wish to enter the guest.
enum Ready {
    Enter(Entry),
    /// It was to be stepped, and cannot be here.
    Refused(&'static str),
}

/// What a breakpoint is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trap {
    Slot,
    Patch,
}

/// The last stop, for as long as the vCPU has not left the place.
#[derive(Debug, Clone, Copy)]
struct Told {
    pc: u64,
    /// The crossing of a breakpoint was told, before its instruction ran. It is over when that
    /// instruction is done, whether the breakpoint is still armed or not: without a step nobody
    /// could tell later whether the vCPU never left or has come back (law 13).
    crossing: bool,
    /// A handler has heard of this crossing, or nobody needs to.
    counted: bool,
}

/// What of a vCPU a handler may look at.
struct HitState<'a, C>(&'a mut C);

impl<C: Cpu> GuestState for HitState<'_, C> {
    fn registers(&mut self) -> io::Result<Registers> {
        self.0.registers()
    }

    fn state(&mut self) -> io::Result<Registers> {
        self.0.state()
    }

    fn read(&mut self, addr: u64, into: &mut [u8]) -> usize {
        self.0.read(addr, into)
    }
}

pub(crate) struct VcpuThread<C> {
    id: VcpuId,
    pub(super) cpu: C,
    inbox: mpsc::Receiver<Command>,
    outbox: mpsc::Sender<Message>,
    /// Wakes whoever waits for events elsewhere than in the channel.
    notify: Box<dyn Fn() + Send>,
    state: State,
    parked_since: Option<Instant>,
    /// The mode in which a Park found it. A stop of its own leaves nothing to go back to.
    parked_from: Option<RunMode>,
    pub(super) image: Arc<DebugImage>,
    /// What KVM was last told; `None` when it must be told again.
    armed: Option<Arming>,
    /// What was told where the vCPU stands.
    told: Option<Told>,
    /// A served access has not been completed yet.
    pub(super) incomplete: bool,
    /// The instruction that is being stepped, from its first entry until it is done.
    stepped: Option<Stepped>,
    /// The guest steps itself, and is owed its #DB for the instruction before this pc (law 46).
    owes_trap_at: Option<u64>,
    /// All other vCPUs are parked until it has stepped over a patch.
    alone: bool,
    /// A crossing that was told and is not over: its instruction has faulted, or is a REP that was
    /// interrupted. The guest may be about to come back to it (law 42).
    unfinished: Option<Crossing>,
    /// The guest's own debug registers.
    guest: GuestLevel,
    /// It kicks itself now and then, to look at them.
    kicks_itself: bool,
    /// It was logged that no slot is left for the guest.
    said_lost: bool,
    /// The guest's debug registers were read since it last ran.
    guest_is_known: bool,
    /// Whether it gets on, where pages are watched.
    pub(super) progress: Progress,
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
            parked_since: None,
            parked_from: None,
            image: Arc::default(),
            armed: None,
            told: None,
            incomplete: false,
            stepped: None,
            owes_trap_at: None,
            alone: false,
            unfinished: None,
            guest: GuestLevel::default(),
            kicks_itself: false,
            said_lost: false,
            guest_is_known: false,
            progress: Progress::default(),
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
        let late = matches!(command.request, Request::StepOver);
        let result = match command.request {
            Request::Install(image) => self.install(image).map(|()| Reply::Done),
            Request::Park => {
                if let State::Running(mode) = self.state {
                    self.parked_from = Some(mode);
                }
                self.park().map(|()| Reply::Done)
            }
            Request::Resume(mode) => {
                // One that is to stay parked now does not go on at the next Unpark either.
                self.parked_from = None;
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
                // Who has a handler was told; the others, whose stop was dropped, are gone.
                self.told = self.told.filter(|told| told.counted);
                Ok(Reply::Done)
            }
            Request::StepOver => {
                self.step_over();
                Ok(Reply::Done)
            }
            Request::TellDeviceStores => {
                if let State::Running(mode) = self.state {
                    self.settle();
                    self.tell_device_stores(mode);
                }
                Ok(Reply::Done)
            }
            Request::ReadRegisters => self.cpu.registers().map(|r| Reply::Registers(Box::new(r))),
            Request::WriteRegisters(registers) => {
                // Writing registers drops what KVM latched for the step (law 7).
                (self.armed, self.guest_is_known) = (None, false);
                let before = self.cpu.state();
                let written = self.cpu.set_registers(&registers);
                let moved = before.map_or(true, |old| (old.rip, old.rsp) != (registers.rip, registers.rsp));
                if moved && let Some(crossing) = &mut self.unfinished {
                    crossing.forget_frame();
                }
                self.look();
                written.map(|()| Reply::Done)
            }
            Request::ReadActivity => self.cpu.activity().map(Reply::Activity),
            Request::Glance => self.glance().map(Reply::Glance),
            Request::Locate(ranges) => Ok(Reply::Located(ranges.iter().map(|&range| self.locate(range)).collect())),
            Request::Save => self.save().map(|state| Reply::State(Box::new(state))),
            Request::Restore(state) => self.restore(&state).map(|()| Reply::Done),
            Request::Quit => {
                let quiet = self.cpu.kick_itself(false).and(self.cpu.kick_at_dr_writes(false).map(drop));
                self.cpu.arm(&Arming::OFF).and(quiet).map(|()| Reply::Done)
            }
        };
        let result = result.map_err(|error| error.to_string());
        self.send(Message::Answer(Answer { vcpu: self.id, seq: command.seq, result }));
        if late {
            // All others wait for this one; if the coordinator has given up on it, it must look again.
            (self.notify)();
        }
    }

    fn glance(&mut self) -> io::Result<Glance> {
        let registers = self.cpu.state()?;
        let parked = self.parked_since.filter(|_| matches!(self.state, State::Parked));
        Ok(Glance {
            pc: registers.pc(),
            interrupts: registers.rflags & IF != 0,
            cpl: registers.cpl(),
            activity: self.cpu.activity()?,
            parked,
        })
    }

    /// The pieces of a linear range in guest-physical memory, page by page.
    fn locate(&mut self, (addr, len): (u64, u64)) -> Option<Located> {
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < len {
            let at = addr.checked_add(done)?;
            let piece = (PAGE_SIZE - at % PAGE_SIZE).min(len - done);
            pieces.push(Piece { gpa: self.cpu.translate(at)?, len: piece });
            done += piece;
        }
        Some(Located { pieces, user: self.cpu.is_users(addr) })
    }

    /// The coordinator may be gone already; then nobody wants to hear.
    fn send(&self, message: Message) {
        let _ = self.outbox.send(message);
    }

    fn install(&mut self, image: Arc<DebugImage>) -> io::Result<()> {
        // With nothing armed the guest's registers were nobody's business.
        self.guest.look(&mut self.cpu)?;
        let overlay = self.guest.overlay(&image);
        let arming = Arming::run(&image, &overlay);
        // On failure KVM has kept what it had, and so does this thread.
        self.cpu.arm(&arming)?;
        self.armed = Some(arming);
        self.cpu.hide(&image);
        self.image = image;
        self.tell_lost(&overlay);
        self.kick_itself_if_needed();
        Ok(())
    }

    /// What is armed for running on: the image, and the guest's own beside it.
    fn overlay(&self) -> Overlay {
        self.guest.overlay(&self.image)
    }

    /// Arms that and nothing else.
    fn arm_to_run(&mut self) -> io::Result<Overlay> {
        let overlay = self.overlay();
        self.arm(Arming::run(&self.image, &overlay))?;
        Ok(overlay)
    }

    fn resume(&mut self, mode: RunMode) {
        if mode != RunMode::Parked && matches!(self.state, State::Parked) {
            // KVM then gives the clock a new version: who reads it step by step would never be done.
            if mode == RunMode::Continue {
                self.cpu.resumed();
            }
            self.parked_from = None;
            self.state = State::Running(mode);
            self.kick_itself_if_needed();
        }
    }

    /// Parks with nothing half-done and nothing armed but the image (laws C4, C8).
    fn park(&mut self) -> io::Result<()> {
        self.settle();
        if !matches!(self.state, State::Parked) {
            self.parked_since = Some(Instant::now());
        }
        self.state = State::Parked;
        self.kick_itself_if_needed();
        // What the guest has at this pc must be known when it goes on.
        self.look();
        self.arm_to_run()?;
        match self.stepped.take() {
            Some(stepped) => {
                let outcome = stepped.abandon(&mut self.cpu);
                self.give_back_tf(outcome)
            }
            None => Ok(()),
        }
    }

    /// The guest's own TF, which KVM has dropped with the step. Nothing steps any more.
    fn give_back_tf(&mut self, outcome: Outcome) -> io::Result<()> {
        if !outcome.tf {
            return Ok(());
        }
        self.arm_to_run()?;
        let mut registers = self.cpu.state()?;
        registers.rflags |= TF;
        self.cpu.set_general(&registers)
    }

    /// Completes a served access. What surfaces meanwhile is an event of its own.
    fn settle(&mut self) {
        while std::mem::take(&mut self.incomplete) {
            let entry = Entry::free(self.overlay());
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
        self.let_the_guests_own_come_first();
        if self.is_over_in_place(mode) {
            return;
        }
        if self.stands_on_told_patch() {
            return self.want_alone(mode);
        }
        let entry = match self.prepare(mode) {
            Ok(Ready::Enter(entry)) => entry,
            Ok(Ready::Refused(why)) => return self.stop(StopReason::CannotStep(why)),
            Err(error) => {
                let error = error.to_string();
                return self.stop(StopReason::Crash(Crash::EntryFailed { error }));
            }
        };
        match self.is_stepped_in_place(&entry) {
            Ok(true) => return self.step_done(Arrival::Done, mode),
            Ok(false) => {}
            Err(error) => tracing::warn!(vcpu = self.id.0, %error, "not carried out in place; KVM steps it"),
        }
        // Entering the guest completes whatever access was served before.
        (self.incomplete, self.guest_is_known) = (false, false);
        let exit = self.cpu.run();
        self.handle(exit, &entry, mode);
    }

    /// Carries out the instruction at RIP without an entry, if it is to be stepped and allows that;
    /// whether it did (law 41).
    fn is_over_in_place(&mut self, mode: RunMode) -> bool {
        // The step that is tried next tells what went wrong.
        let over = self.goes_over_in_place(mode).unwrap_or(false);
        if over {
            self.step_done(Arrival::Done, mode);
        }
        over
    }

    fn goes_over_in_place(&mut self, mode: RunMode) -> io::Result<bool> {
        let half_done = self.stepped.is_some() || self.incomplete;
        let is_owed = self.owes_trap_at.is_some() || self.guest.is_owed();
        if half_done || is_owed || mode == RunMode::Continue && self.told.is_none() {
            return Ok(false);
        }
        let pc = self.cpu.pc()?;
        let told = self.told.filter(|told| told.pc == pc);
        let crossing = told.is_some_and(|told| told.crossing);
        if mode == RunMode::Continue && !crossing {
            return Ok(false);
        }
        let heard = told.map_or(0, |told| self.heard(pc, told.crossing));
        // Who has not had its say yet is hit first.
        if self.image.exec_slots_at(pc).any(|(n, _)| heard & 1 << n == 0) {
            return Ok(false);
        }
        let Some(after) = over::in_place(&mut self.cpu, &self.image, pc, crossing)? else { return Ok(false) };
        // So are the guest's own breakpoints; with none of ours nobody has looked at them.
        if !crossing && self.guests_breakpoint_at(pc)? {
            return Ok(false);
        }
        self.cpu.advance(&after)?;
        Ok(true)
    }

    /// Whether the guest has a breakpoint of its own at `pc`. What it has set changes only while it runs.
    fn guests_breakpoint_at(&mut self, pc: u64) -> io::Result<bool> {
        if !self.guest_is_known {
            self.guest.look(&mut self.cpu)?;
            self.guest_is_known = true;
        }
        Ok(self.guest.stops_at(pc) != 0)
    }

    /// Decides what to arm for the next entry and arms it: the slots, less those that this vCPU
    /// stands on and was stopped at, and single-step if that is wanted or needed.
    fn prepare(&mut self, mode: RunMode) -> io::Result<Ready> {
        let wants_step = mode != RunMode::Continue;
        if !wants_step && self.told.is_none() && self.owes_trap_at.is_none() && !self.guest.is_owed() {
            let armed = self.arm_to_run()?;
            self.tell_lost(&armed);
            return Ok(Ready::Enter(Entry::free(armed)));
        }
        let event = self.pay_guest()?.then_some(DB);
        let from = self.cpu.pc()?;
        let told = self.told.filter(|told| told.pc == from && event.is_none());
        let suspended = told.map_or(0, |told| self.heard(from, told.crossing));
        let crossing = told.is_some_and(|told| told.crossing);
        let stepping = wants_step || suspended != 0 || crossing;
        // Once it runs freely it may come back here, and that is news.
        self.told = told.filter(|_| stepping);
        if !stepping {
            return Ok(Ready::Enter(Entry { from, ..Entry::free(self.arm_to_run()?) }));
        }
        let begun = match self.stepped.take() {
            Some(stepped) => Begun::Step(stepped),
            None => Stepped::begin(&mut self.cpu, &self.image, from, event)?,
        };
        let mut stepped = match begun {
            Begun::Step(stepped) => stepped,
            Begun::Refused(why) if wants_step => return Ok(Ready::Refused(why)),
            Begun::Refused(_) => {
                // It was to get off a breakpoint, where this host's KVM heeds none anyway.
                self.told = None;
                return Ok(Ready::Enter(Entry::free(self.arm_to_run()?)));
            }
        };
        // What the guest itself has here has had its turn: it comes before the crossing is over.
        let mut armed = self.guest.overlay_for_step(&self.image, suspended, crossing.then_some(from));
        let placed = stepped.place(&self.image, &mut armed);
        let armed = armed.or_off();
        let mut arming = Arming::run(&self.image, &armed);
        stepped.put_into(&mut arming);
        let in_shadow = stepped.needs_shadow();
        self.stepped = Some(stepped);
        self.arm(arming)?;
        if in_shadow {
            self.cpu.cast_shadow()?;
        }
        Ok(Ready::Enter(Entry { from, stepping: arming.step, armed, placed }))
    }

    /// The execution slots at `pc` that have had their say, one bit each: all of them after a hit,
    /// those that are gdb's alone after a step that led here. The others count this crossing when
    /// it faults (law 22).
    fn heard(&self, pc: u64, crossing: bool) -> u8 {
        let is_gdbs = |slot: &Slot| slot.owners.iter().all(|behind| behind.owner.level == Level::Gdb);
        let heard = self.image.exec_slots_at(pc).filter(|(_, slot)| crossing || is_gdbs(slot));
        heard.fold(0, |bits, (n, _)| bits | 1 << n)
    }

    /// Carries out what no KVM steps as it should, unless an armed slot or a patch stops at it
    /// first; whether it was.
    fn is_stepped_in_place(&mut self, entry: &Entry) -> io::Result<bool> {
        let Some(stepped) = self.stepped.as_ref().filter(|_| entry.stepping) else { return Ok(false) };
        let (halts, returns) = (stepped.halts(), stepped.returns());
        if !halts && returns.is_none() || entry.armed.stops_at(entry.from) || self.patch_under(entry.from).is_some() {
            return Ok(false);
        }
        match returns {
            Some(by) => by.carry_out(&mut self.cpu),
            None => self.cpu.halt().map(|()| true),
        }
    }

    fn handle(&mut self, mut exit: Exit, entry: &Entry, mode: RunMode) {
        self.look_after(&exit, entry);
        if matches!(exit, Exit::Served(_)) {
            let stores = self.cpu.device_stores();
            if !stores.is_empty() {
                return self.stored(exit, stores, entry, mode);
            }
        }
        // A port or MMIO access that is stepped is completed at once: on some paths KVM reports no
        // #DB for it (law 50). It may consist of several exits.
        while entry.stepping && matches!(exit, Exit::Served(None)) {
            exit = self.cpu.complete();
            if matches!(exit, Exit::Kicked) {
                // It is done once RIP has moved; a REP that stays is stepped further.
                if self.cpu.pc().is_ok_and(|pc| pc != entry.from) {
                    self.step_done(Arrival::Done, mode);
                }
                return;
            }
        }
        match exit {
            Exit::Kicked | Exit::Again => {
                self.is_stuck();
            }
            Exit::Served(None) => self.incomplete = true,
            Exit::Served(Some(StopReason::Port(access))) if self.ask_port_handler(access) == Disposition::Continue => {
                self.incomplete = true;
            }
            Exit::Served(Some(reason)) => {
                self.incomplete = true;
                self.settle();
                self.stop(reason);
            }
            Exit::Store { .. } => self.stored(exit, Vec::new(), entry, mode),
            Exit::Debug(exit) if exit.exception == BP && self.ran_into_patch(exit.pc, mode) => {}
            Exit::Debug(exit) => self.trapped(exit, Vec::new(), entry, mode),
            // A KVM that interprets ring 0 does not know INT3 (law 54).
            Exit::Crash(Crash::EmulationFailure { bytes })
                if bytes.first() == Some(&INT3) && self.cpu.pc().is_ok_and(|pc| self.ran_into_patch(pc, mode)) => {}
            Exit::Crash(Crash::EmulationFailure { bytes }) if self.is_stuck() || self.raises(&bytes, mode) => {}
            Exit::Crash(crash) => {
                let crash = self.explain(crash);
                self.stop(StopReason::Crash(crash));
            }
        }
    }

    /// #DB or #BP, after a store of the same instruction that these requests watch.
    pub(super) fn trapped(&mut self, exit: DebugExit, stores: Vec<Found>, entry: &Entry, mode: RunMode) {
        let stopped_by_step = entry.placed.stopped(&exit);
        if stopped_by_step && self.stepped.as_ref().is_some_and(|stepped| stepped.is_awake_at(exit.pc)) {
            // It is awake, and what woke it has been handled: now for the step itself.
            self.stepped = None;
            return;
        }
        let Causes { step, hits, guest_db, guest_bp, access, pass, wanted, idle } =
            self.causes(exit, entry, stopped_by_step);
        self.guest.heard(wanted, idle);
        if access {
            return self.access(exit.pc, entry, mode);
        }
        if let Some(causes) = guest_db {
            self.guest.owe(causes);
            if !step {
                self.is_interrupted(exit.pc);
            }
        }
        if guest_bp {
            self.reflect(|cpu| cpu.reflect_bp());
        }
        if pass {
            // The instruction is stepped over, as is one whose crossing was told.
            self.told = Some(Told { pc: exit.pc, crossing: true, counted: true });
        }
        if !hits.is_empty() && self.is_back(exit.pc, Trap::Slot) {
            // The crossing that was told goes on; its slot is suspended again, and it is stepped.
            self.told = Some(Told { pc: exit.pc, crossing: true, counted: true });
            return;
        }
        let hits = hits.into_iter().map(|(behind, addr)| Found { behind, addr, stored: None });
        let hits: Vec<Found> = stores.into_iter().chain(hits).collect();
        let hit_in_step = entry.stepping && !hits.is_empty();
        let arrival = match &self.stepped {
            Some(stepped) if step || stopped_by_step || hit_in_step => stepped.arrival(exit.pc, step),
            _ => None,
        };
        if hits.is_empty() {
            let Some(arrival) = arrival else { return };
            let Some(stepped) = &mut self.stepped else { return };
            if arrival == Arrival::Done && stepped.has_not_run_at(&mut self.cpu, exit.pc).unwrap_or(false) {
                if stepped.is_int1() {
                    self.guest.owe(0);
                    self.is_interrupted(exit.pc);
                }
                return;
            }
            // Who steps over a breakpoint steps over all iterations: they are one crossing.
            if stepped.goes_on_at(exit.pc) && mode == RunMode::Continue {
                let breathed = match stepped.iterated(&mut self.cpu) {
                    Ok(true) if !self.alone => self.breathe(exit.pc),
                    result => result.map(drop),
                };
                if let Err(error) = breathed {
                    tracing::warn!(vcpu = self.id.0, %error, "a REP could not be interrupted");
                }
                return;
            }
            return self.step_done(arrival, mode);
        }
        self.triggered(hits, arrival, exit.pc, mode);
    }

    /// Asks the handlers of what triggered, and stops for the rest. `arrival`: the step is over, too.
    pub(super) fn triggered(&mut self, hits: Vec<Found>, arrival: Option<Arrival>, pc: u64, mode: RunMode) {
        // A watchpoint says nothing about the instruction behind the access (law 22), and does not
        // end a crossing either while a REP goes on.
        let crossing = hits.iter().any(|hit| hit.behind.request.on == Trigger::Execute);
        let gdb_knows = self.told.is_some_and(|told| told.pc == pc);
        let crossed = self.told.is_some_and(|told| told.crossing);
        let goes_on = self.stepped.as_ref().is_some_and(|stepped| stepped.goes_on_at(pc));
        if crossing || !goes_on {
            self.told = crossing.then_some(Told { pc, crossing, counted: false });
        }
        if let Some(arrival) = arrival {
            // The instruction is done too; the hit is the reason that is told.
            self.end_step(arrival, pc, crossed);
        }
        let mut stops: Vec<Stop> = Vec::new();
        for hit in hits {
            let SlotOwner { owner, request, .. } = hit.behind;
            // Whoever was stopped here by a step has seen this crossing; the others have not.
            if gdb_knows && owner.level == Level::Gdb && request.on == Trigger::Execute {
                continue;
            }
            if hit.behind.handler.is_some() && request.on == Trigger::Execute {
                self.told = self.told.map(|told| Told { counted: true, ..told });
            }
            if self.ask_handler(&hit, pc) == Disposition::Continue {
                continue;
            }
            let reason = match request.on {
                Trigger::Execute => StopReason::Breakpoint(request),
                _ => StopReason::Watchpoint { request, addr: hit.addr, stored: hit.stored },
            };
            stops.push(Stop { vcpu: self.id, reason, owner: Some(owner) });
        }
        if !stops.is_empty() {
            self.stop_for(stops);
        } else if arrival.is_some() {
            self.tell_step(mode);
        }
    }

    /// As [`triggered`](Self::triggered), by what is not this vCPU's doing: a crossing that was told at
    /// `pc` stays told.
    pub(super) fn triggered_elsewhere(&mut self, hits: Vec<Found>, pc: u64, mode: RunMode) {
        let told = self.told;
        self.triggered(hits, None, pc, mode);
        self.told = told;
    }

    /// Whose trap it was, the step's own slots aside.
    fn causes(&mut self, exit: DebugExit, entry: &Entry, stopped_by_step: bool) -> Causes {
        let dr6 = exit.dr6 & !u64::from(entry.placed.mask());
        let nothing_else = Dr6(dr6).causes() == 0;
        if stopped_by_step && nothing_else {
            return Causes::default();
        }
        let exit = DebugExit { dr6, ..exit };
        let expect = Expectation { stepping: entry.stepping, arrived: stopped_by_step };
        let mut view = self.guest.view(&mut self.cpu, exit.pc);
        classify(exit, &self.image, &entry.armed, expect, &mut view)
    }

    /// Whether the vCPU has come back to an instruction that was told of and has faulted.
    ///
    /// INT3 has begun when it traps, and RF with it is gone (SDM vol. 3, 18.3.1.1): that its
    /// breakpoint has been told is seen from the frame through which the handler has returned.
    fn is_back(&mut self, pc: u64, by: Trap) -> bool {
        let Some(crossing) = self.unfinished.filter(|crossing| crossing.pc == pc) else { return false };
        let Ok(registers) = self.cpu.state() else { return false };
        if !crossing.is_of(&registers) {
            return false;
        }
        self.unfinished = None;
        // Where it has been left for good, the next time at this place is another crossing.
        registers.rflags & RF != 0 || by == Trap::Patch && crossing.is_led_back_to(&mut self.cpu)
    }

    /// Lets interrupts have their turn between two iterations of the REP at `pc`, which is a
    /// breakpoint's and stepped over. With RF it runs on, or is back at once.
    fn breathe(&mut self, pc: u64) -> io::Result<()> {
        let Some(stepped) = self.stepped.take() else { return Ok(()) };
        self.told = None;
        self.unfinished = Some(stepped.crossing());
        self.finish(stepped, Arrival::Done, pc);
        self.arm_to_run()?;
        let mut registers = self.cpu.state()?;
        registers.rflags |= RF;
        self.armed = None;
        self.cpu.set_general(&registers)
    }

    /// What the owner's handler says about a hit; without one, a hit is a stop.
    fn ask_handler(&mut self, hit: &Found, pc: u64) -> Disposition {
        let Some(handler) = &hit.behind.handler else { return Disposition::Stop };
        let (owner, request, vcpu) = (hit.behind.owner, hit.behind.request, self.id);
        let (stored, state) = (hit.stored.as_ref(), &mut HitState(&mut self.cpu));
        handler.ask(&mut Hit { owner, request, vcpu, pc, stored, state })
    }

    /// What the handler of a port says about an access to it.
    fn ask_port_handler(&mut self, access: PortAccess) -> Disposition {
        let Some(handler) = self.cpu.port_handler(access.port) else { return Disposition::Stop };
        handler.call(&mut PortHit { vcpu: self.id, access, state: &mut HitState(&mut self.cpu) })
    }

    /// The step is over, at `pc`; `crossing`: that of a breakpoint that was told.
    fn end_step(&mut self, arrival: Arrival, pc: u64, crossing: bool) {
        let Some(stepped) = self.stepped.take() else { return };
        let told = stepped.crossing();
        if let Some(frame) = self.finish(stepped, arrival, pc).faulted
            && crossing
        {
            self.unfinished = Some(told.faulted(frame));
        }
    }

    fn finish(&mut self, stepped: Stepped, arrival: Arrival, pc: u64) -> Outcome {
        let outcome = stepped.end(&mut self.cpu, pc, arrival);
        self.armed = None;
        self.owes_trap_at = outcome.owes_trap.then_some(pc);
        if let Err(error) = self.give_back_tf(outcome) {
            tracing::warn!(vcpu = self.id.0, %error, "the guest's own TF could not be put back");
        }
        outcome
    }

    /// The stepped instruction is over: tell, or go on if it was only to get off a breakpoint.
    pub(super) fn step_done(&mut self, arrival: Arrival, mode: RunMode) {
        let crossing = self.told.is_some_and(|told| told.crossing);
        match self.cpu.pc() {
            Ok(pc) => self.end_step(arrival, pc, crossing),
            Err(error) => tracing::warn!(vcpu = self.id.0, %error, "where the step ended could not be read"),
        }
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
            self.told = self.cpu.pc().ok().map(|pc| Told { pc, crossing: false, counted: false });
            self.stop(StopReason::Step);
        }
    }

    /// Parks for a reason that is no breakpoint's.
    pub(super) fn stop(&mut self, reason: StopReason) {
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
