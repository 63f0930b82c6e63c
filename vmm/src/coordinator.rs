//! One owner of all debug state, and the protocol by which every vCPU follows it.
//!
//! The coordinator holds the slot table and the list of stops that were not told yet; vCPU
//! threads hold their vCPU and a copy of the image. Nothing is shared and nothing is locked:
//!
//! ```text
//!   coordinator ── Command (Install, Park, Resume, Read..) ──► vCPU thread
//!               ◄── Answer, one for each ──────────────────────
//!               ◄── Event: "parked myself, because.." ─────────
//! ```
//!
//! A change of the set is *prepared* (all that can be refused), *installed* by every vCPU, and
//! only then *committed*; if one vCPU cannot follow, all get the old image back and the caller
//! gets an error (laws 9, 10, 12). It works with the world stopped and with the guest running.
//!
//! A change that touches guest memory (a patch, a page that becomes read-only) is made on the
//! [`Ground`] between two images, with every vCPU parked for as long as it takes.
//!
//! All waits are bounded. A vCPU that does not answer in time is named in the error, and
//! because commands are obeyed in order, the undoing commands that were queued behind the one it
//! missed put it right once it wakes (law 18).

mod alone;

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use alone::Alone;

use crate::debug::{
    Breakpoint, BreakpointError, Change, DebugImage, Ending, Handler, INT3, Level, Mechanism, Notice, Offer, Owner,
    Place, Prepared, ResumePlan, RunMode, SlotTable, Stop, StopReason, VcpuId,
};
use crate::ground::{Ground, NoGround};
use crate::limits::{ACK_DEADLINE, KICK_INTERVAL, MAX_WATCHED, QUIT_DEADLINE};
use crate::state::VcpuState;
use crate::sync::{Arc, Deadline, Missed, mpsc, thread};
use crate::vcpu::protocol::{Answer, Command, Event, Located, Message, Reply, Request};
use crate::vcpu::thread::VcpuThread;
use crate::vcpu::{Activity, Cpu, Glance, Registers};

/// Interrupts a vCPU thread that may be inside KVM_RUN.
pub type Kick = Box<dyn Fn(&thread::JoinHandle<()>) + Send>;

/// Why the coordinator could not do what it was asked to. The world is as it was before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CoordinatorError {
    /// A vCPU thread gave no answer in time.
    #[error("{vcpu} did not answer within {} s", ACK_DEADLINE.as_secs())]
    NoAnswer {
        /// Which one.
        vcpu: VcpuId,
    },
    /// A vCPU could not do it.
    #[error("{vcpu}: {error}")]
    Vcpu {
        /// Which one.
        vcpu: VcpuId,
        /// What the ioctl said.
        error: String,
    },
    /// There is no such vCPU.
    #[error("there is no {vcpu}")]
    NoSuchVcpu {
        /// The one that was asked for.
        vcpu: VcpuId,
    },
    /// What was to be written lies under breakpoints, and they could not be told.
    #[error("the bytes under the breakpoints there could not be changed: {error}")]
    UnderPatches {
        /// What went wrong; nothing has changed.
        error: String,
    },
    /// The operation needs a stopped world.
    #[error("the guest is running; stop it first")]
    Running,
    /// The run is over.
    #[error("the guest has ended")]
    Ended,
}

impl CoordinatorError {
    fn vcpu_error(vcpu: VcpuId, error: String) -> Self {
        CoordinatorError::Vcpu { vcpu, error }
    }
}

struct VcpuHandle {
    inbox: mpsc::Sender<Command>,
    thread: Option<thread::JoinHandle<()>>,
    kick: Kick,
    /// The mode it was last resumed in.
    mode: RunMode,
}

/// Whether guest code may be running.
#[derive(Debug, Clone, PartialEq, Eq)]
enum World {
    Stopped,
    Running,
    Over(Ending),
}

/// The owner of the debug state of one VM.
pub struct Coordinator {
    vcpus: Vec<VcpuHandle>,
    messages: mpsc::Receiver<Message>,
    table: SlotTable,
    image: Arc<DebugImage>,
    ground: Box<dyn Ground>,
    world: World,
    /// Stops that happened and were not told yet, oldest first (law 14).
    pending: VecDeque<Stop>,
    /// A stop that was told, after which the guest cannot go on.
    ending: Option<Stop>,
    /// The vCPU of the stop that was told last.
    last: VcpuId,
    /// Registers of parked vCPUs, as far as somebody has asked. Valid while the world stands.
    registers: Vec<Option<Registers>>,
    /// vCPUs that must step over a patch.
    alone: Alone,
    /// Evictions and returns that nobody has asked about yet.
    notices: Vec<Notice>,
    seq: u64,
}

impl Coordinator {
    /// Starts one thread for each vCPU, parked. `notify` is called, on a vCPU's thread, whenever
    /// there may be something for [`poll`](Self::poll).
    pub fn new<C: Cpu + Send + 'static>(
        cpus: Vec<(C, Kick)>,
        notify: impl Fn() + Clone + Send + 'static,
    ) -> std::io::Result<Self> {
        let bodies = cpus.into_iter().map(|(cpu, kick)| {
            let notify = notify.clone();
            let body = move |id, commands, outbox| VcpuThread::new(id, cpu, commands, outbox, Box::new(notify)).main();
            (body, kick)
        });
        Self::with_threads(bodies)
    }

    /// Starts a thread for each body, which speaks the protocol until it is told to quit.
    fn with_threads<B>(bodies: impl Iterator<Item = (B, Kick)>) -> std::io::Result<Self>
    where
        B: FnOnce(VcpuId, mpsc::Receiver<Command>, mpsc::Sender<Message>) + Send + 'static,
    {
        let (outbox, messages) = mpsc::channel();
        let mut vcpus = Vec::new();
        for (n, (body, kick)) in bodies.enumerate() {
            let (inbox, commands) = mpsc::channel();
            let outbox = outbox.clone();
            let name = format!("vcpu{n}");
            let thread = thread::Builder::new().name(name).spawn(move || body(VcpuId(n as u32), commands, outbox))?;
            vcpus.push(VcpuHandle { inbox, thread: Some(thread), kick, mode: RunMode::Parked });
        }
        Ok(Self {
            registers: vec![None; vcpus.len()],
            vcpus,
            messages,
            table: SlotTable::default(),
            image: Arc::default(),
            ground: Box::new(NoGround),
            world: World::Stopped,
            pending: VecDeque::new(),
            ending: None,
            last: VcpuId(0),
            alone: Alone::default(),
            notices: Vec::new(),
            seq: 0,
        })
    }

    /// Serves requests in guest memory, too, by what `offer` says.
    pub fn use_ground(&mut self, ground: Box<dyn Ground>, offer: Offer) {
        self.ground = ground;
        self.set_offer(offer);
    }

    /// Changes what serves requests. It counts from the next change of the set on.
    pub fn set_offer(&mut self, offer: Offer) {
        self.table.set_offer(offer);
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// Whether guest code may be running.
    pub fn is_running(&self) -> bool {
        self.world == World::Running
    }

    /// How the run ended, if it has.
    pub fn ended(&self) -> Option<&Ending> {
        match &self.world {
            World::Over(ending) => Some(ending),
            _ => None,
        }
    }

    /// The image in force.
    pub fn image(&self) -> &DebugImage {
        &self.image
    }

    /// The requests in force.
    pub fn breakpoints(&self) -> Vec<(Owner, Breakpoint)> {
        self.table.requests().collect()
    }

    /// Arms `request` on every vCPU, or nowhere. Asking again for what one holds is no error.
    pub fn set_breakpoint(&mut self, owner: Owner, request: Breakpoint) -> Result<(), BreakpointError> {
        self.set_trap(owner, request, None)
    }

    /// As [`set_breakpoint`](Self::set_breakpoint), with a handler that decides about each hit on
    /// the vCPU's own thread.
    pub fn set_trap(
        &mut self,
        owner: Owner,
        request: Breakpoint,
        handler: Option<Handler>,
    ) -> Result<(), BreakpointError> {
        self.set_traps(owner, vec![(request, handler)])
    }

    /// Arms all of `requests` on every vCPU, or none of them anywhere: thousands are one change.
    pub fn set_traps(
        &mut self,
        owner: Owner,
        requests: Vec<(Breakpoint, Option<Handler>)>,
    ) -> Result<(), BreakpointError> {
        let places = self.locate(&requests);
        let changes: Vec<Change> = requests
            .into_iter()
            .zip(places)
            .map(|((request, handler), place)| Change::Set { owner, request, handler, place })
            .collect();
        self.change(&changes)
    }

    /// Disarms all of `requests` on every vCPU, or none of them anywhere.
    pub fn clear_traps(&mut self, owner: Owner, requests: &[Breakpoint]) -> Result<(), BreakpointError> {
        let changes: Vec<Change> = requests.iter().map(|&request| Change::Clear { owner, request }).collect();
        self.change(&changes)
    }

    fn change(&mut self, changes: &[Change]) -> Result<(), BreakpointError> {
        self.look_at_places();
        match self.table.prepare(changes)? {
            Some(prepared) => self.apply(prepared),
            None => Ok(()),
        }
    }

    /// The guest may have changed its code since a place of it was asked for: who comes to be served
    /// there now puts back what is there now.
    fn look_at_places(&mut self) {
        self.table.refresh(|gpa| original(&*self.ground, &self.image, gpa));
    }

    /// The guest is to have `bytes`, `(gpa, byte)` each, under its patches (law 55). Where none is this
    /// changes nothing.
    pub fn write_under_patches(&mut self, bytes: &[(u64, u8)]) -> Result<(), CoordinatorError> {
        match self.table.prepare_originals(bytes) {
            Some(prepared) => {
                self.apply(prepared).map_err(|error| CoordinatorError::UnderPatches { error: error.to_string() })
            }
            None => Ok(()),
        }
    }

    /// What serves `request` of `owner`; `None` if it waits for slots, or is not held.
    pub fn mechanism(&self, owner: Owner, request: Breakpoint) -> Option<Mechanism> {
        self.table.mechanism(owner, request)
    }

    /// Where each request lies in guest memory, as far as that may matter: by the page tables of
    /// the first vCPU that maps all of it.
    fn locate(&mut self, requests: &[(Breakpoint, Option<Handler>)]) -> Vec<Option<Place>> {
        let mut places = vec![None; requests.len()];
        for n in 0..self.vcpus.len() as u32 {
            let open: Vec<usize> = (0..requests.len())
                .filter(|&i| places[i].is_none() && self.table.wants_place(requests[i].0))
                .filter(|&i| requests[i].0.len <= MAX_WATCHED)
                .collect();
            if open.is_empty() || self.ended().is_some() {
                break;
            }
            let ranges = open.iter().map(|&i| (requests[i].0.addr, requests[i].0.len)).collect();
            if let Ok(Reply::Located(found)) = self.ask(VcpuId(n), Request::Locate(ranges)) {
                for (i, located) in open.into_iter().zip(found) {
                    places[i] = located.and_then(|located| self.place(located));
                }
            }
        }
        places
    }

    /// The place that has these pieces, if all of them are RAM.
    fn place(&self, Located { pieces, user }: Located) -> Option<Place> {
        let mut byte = [0];
        let there = pieces.iter().all(|piece| self.ground.read(piece.gpa, &mut byte) == 1);
        let first = pieces.first().filter(|_| there)?.gpa;
        Some(Place { original: original(&*self.ground, &self.image, first)?, pieces, user })
    }

    /// Disarms `request` on every vCPU, or nowhere. A hit on it that nobody was told of is dropped.
    pub fn clear_breakpoint(&mut self, owner: Owner, request: Breakpoint) -> Result<(), BreakpointError> {
        self.clear_traps(owner, &[request])
    }

    /// Disarms everything that `level` holds.
    pub fn clear_level(&mut self, level: Level) -> Result<(), BreakpointError> {
        self.look_at_places();
        match self.table.prepare_clear_level(level) {
            Some(prepared) => self.apply(prepared),
            None => Ok(()),
        }
    }

    /// What changes did to requests that nobody asked about in them, oldest first (law 27).
    pub fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// Carries out a change everywhere, or nowhere.
    fn apply(&mut self, prepared: Prepared) -> Result<(), BreakpointError> {
        if self.ended().is_some() {
            return Err(BreakpointError::Apply(CoordinatorError::Ended.to_string()));
        }
        if prepared.images().iter().all(|image| image.has_memory_of(&self.image)) {
            return self.carry_out(prepared);
        }
        self.quietly(|coordinator| coordinator.carry_out(prepared))
    }

    /// Does `work` with every vCPU parked. Those that ran go on as before.
    fn quietly(&mut self, work: impl FnOnce(&mut Self) -> Result<(), BreakpointError>) -> Result<(), BreakpointError> {
        if self.world != World::Running {
            return work(self);
        }
        let parked = self.ask_all(&Request::Park).map_err(|error| BreakpointError::Apply(error.to_string()));
        let result = parked.and_then(|()| {
            self.ground.hold_devices(true);
            work(self)
        });
        self.unpark();
        result
    }

    /// Install on all, image by image, then commit; or put back what was, on all.
    fn carry_out(&mut self, prepared: Prepared) -> Result<(), BreakpointError> {
        let mut newest = self.image.clone();
        for image in prepared.images() {
            let next = Arc::new(image.clone());
            let changed = change_memory(&mut *self.ground, &newest, &next);
            if let Err(error) = changed {
                return Err(self.undo(&newest, next, error));
            }
            newest = next;
            if let Err(error) = self.ask_all(&Request::Install(newest.clone())) {
                return Err(self.undo(&newest, newest.clone(), error.to_string()));
            }
        }
        self.notices.extend_from_slice(prepared.notices());
        self.table.commit(prepared);
        self.image = newest;
        Ok(())
    }

    /// Puts back the image that is in force. Guest memory is as `newest` has it, and images up to
    /// `sent` may be installed somewhere.
    fn undo(&mut self, newest: &DebugImage, sent: Arc<DebugImage>, error: String) -> BreakpointError {
        self.table.skip_epoch(sent.epoch());
        let mut why = error;
        // Nothing is left to try where this fails: say what may be wrong now.
        if let Err(undo) = change_memory(&mut *self.ground, newest, &self.image) {
            why = format!("{why}; and then guest memory could not be put back: {undo}");
        }
        if let Err(undo) = self.ask_all(&Request::Install(self.image.clone())).map_err(|undo| undo.to_string())
            && undo != why
        {
            why = format!("{why}; and then {undo}");
        }
        BreakpointError::Apply(why)
    }

    /// Sends every vCPU that a Park has stopped on its way again. Queued behind a Park that was
    /// missed, it undoes that. A vCPU that has parked itself stays: its stop is still to be told,
    /// and there.
    fn unpark(&mut self) {
        if self.alone.holds() {
            return; // until that one has answered
        }
        self.alone.forget();
        for n in 0..self.vcpus.len() {
            let seq = self.next_seq();
            self.send(n, seq, Request::Unpark);
        }
        self.ground.hold_devices(false);
    }

    /// Stops the world, if it runs. What happened meanwhile is kept for [`take_stop`](Self::take_stop).
    ///
    /// If a vCPU does not park in time, the others go on as before and the error names it.
    pub fn stop(&mut self) -> Result<(), CoordinatorError> {
        match self.world {
            World::Stopped | World::Over(_) => return Ok(()),
            World::Running => {}
        }
        match self.park_all() {
            Ok(()) => {
                self.alone.forget();
                self.world = World::Stopped;
                Ok(())
            }
            Err(error) => {
                self.unpark();
                Err(error)
            }
        }
    }

    /// Lets the vCPUs go on as `plan` says and returns at once.
    ///
    /// If a vCPU that is to run has a stop that nobody was told of, that stop is returned and
    /// nothing runs. After a stop that the guest cannot survive, this ends the run.
    ///
    /// # Errors
    /// If a vCPU does not follow, and the others could be stopped again: the world stands. If they
    /// could not, the guest runs, that vCPU follows when it wakes, and this is no error.
    pub fn resume(&mut self, plan: &ResumePlan) -> Result<Option<Stop>, CoordinatorError> {
        match &self.world {
            World::Running => return Err(CoordinatorError::Running),
            World::Over(_) => return Err(CoordinatorError::Ended),
            World::Stopped => {}
        }
        if let Some(ending) = self.take_ending() {
            return Ok(Some(self.end(ending)));
        }
        if let Some(stop) = self.take_pending(|vcpu| plan.mode(vcpu) != RunMode::Parked) {
            return Ok(Some(stop));
        }
        self.start(plan, |_| false)?;
        Ok(None)
    }

    /// Sends the vCPUs on their way. One that `waits` counts as running, and stays where it is
    /// until its stop is told.
    fn start(&mut self, plan: &ResumePlan, waits: impl Fn(VcpuId) -> bool) -> Result<(), CoordinatorError> {
        for n in 0..self.vcpus.len() {
            self.vcpus[n].mode = plan.mode(VcpuId(n as u32));
        }
        self.world = World::Running;
        self.ground.hold_devices(false);
        self.registers.fill(None);
        let mode = |(n, vcpu): (usize, &VcpuHandle)| if waits(VcpuId(n as u32)) { RunMode::Parked } else { vcpu.mode };
        let requests: Vec<_> = self.vcpus.iter().enumerate().map(mode).map(Request::Resume).collect();
        let resumed = self.ask_each(requests, ACK_DEADLINE).into_iter().try_for_each(|answer| answer.map(|_| ()));
        let Err(error) = resumed else { return Ok(()) };
        match self.stop() {
            Ok(()) => Err(error),
            // The others run, and the one that is late follows when it wakes: the command is in its inbox.
            Err(still) => {
                tracing::warn!(%error, %still, "the guest goes on, but for that vCPU");
                Ok(())
            }
        }
    }

    /// Looks at what the vCPUs have said. `Some` is a stop: by then the whole world is parked.
    ///
    /// Hits on breakpoints that are gone are dropped here, and their vCPU goes on (law 11).
    pub fn poll(&mut self) -> Result<Option<Stop>, CoordinatorError> {
        loop {
            match self.messages.try_recv() {
                Ok(Message::Event(event)) => self.queue(event),
                Ok(Message::Notice(notice)) => self.notices.push(notice),
                Ok(Message::WantsAlone(vcpu)) => self.alone.wants(vcpu),
                // Too late: whoever asked has given up on it.
                Ok(Message::Answer(answer)) => self.alone.hear(&answer),
                Err(_) => break,
            }
        }
        if self.world != World::Running {
            return Ok(None);
        }
        self.await_late_step()?;
        let mut went_on = Ok(());
        for vcpu in self.drop_removed() {
            let mode = self.vcpus[vcpu.index()].mode;
            // One that does not answer keeps none of the others waiting.
            went_on = went_on.and(self.ask(vcpu, Request::Resume(mode)).map(|_| ()));
        }
        went_on?;
        self.tell_device_stores()?;
        if !self.pending.iter().any(|stop| self.was_resumed(stop.vcpu)) {
            if self.alone.is_wanted() {
                self.step_those_that_wait()?;
            }
            return Ok(None);
        }
        self.stop()?;
        Ok(self.take_stop())
    }

    /// Devices store on threads of their own, and handlers are asked on those of vCPUs: the first that
    /// runs takes it on.
    fn tell_device_stores(&mut self) -> Result<(), CoordinatorError> {
        for vcpu in (0..self.vcpus.len() as u32).map(VcpuId) {
            if self.ground.has_device_stores() && self.was_resumed(vcpu) {
                self.ask(vcpu, Request::TellDeviceStores)?;
            }
        }
        Ok(())
    }

    /// The next stop that nobody was told of, once the world is stopped. Whoever takes it has
    /// been told: the vCPU will step off the breakpoint when it goes on.
    ///
    /// Only of vCPUs that were resumed: what was pending on one that stayed parked (under
    /// scheduler-locking) waits until it is resumed too. gdb does not expect it before.
    pub fn take_stop(&mut self) -> Option<Stop> {
        if self.world != World::Stopped {
            return None;
        }
        let resumed: Vec<bool> = self.vcpus.iter().map(|vcpu| vcpu.mode != RunMode::Parked).collect();
        self.take_pending(|vcpu| resumed[vcpu.index()])
    }

    /// The registers of a parked vCPU.
    pub fn registers(&mut self, vcpu: VcpuId) -> Result<Registers, CoordinatorError> {
        if let Some(Some(registers)) = self.registers.get(vcpu.index()).filter(|_| self.world == World::Stopped) {
            return Ok(*registers);
        }
        match self.ask_stopped(vcpu, Request::ReadRegisters)? {
            Reply::Registers(registers) => {
                self.registers[vcpu.index()] = Some(*registers);
                Ok(*registers)
            }
            other => Err(CoordinatorError::vcpu_error(vcpu, format!("unexpected answer {other:?}"))),
        }
    }

    /// Writes the registers of a parked vCPU.
    pub fn set_registers(&mut self, vcpu: VcpuId, registers: &Registers) -> Result<(), CoordinatorError> {
        // KVM may not keep every bit that is written: what is read next is what it has.
        if let Some(cached) = self.registers.get_mut(vcpu.index()) {
            *cached = None;
        }
        self.ask_stopped(vcpu, Request::WriteRegisters(Box::new(*registers))).map(|_| ())
    }

    /// Everything that each parked vCPU is.
    pub fn save(&mut self) -> Result<Vec<VcpuState>, CoordinatorError> {
        self.must_be_stopped()?;
        let answers = self.ask_each(vec![Request::Save; self.vcpus.len()], ACK_DEADLINE);
        let state = |(n, answer): (usize, Result<Reply, CoordinatorError>)| match answer? {
            Reply::State(state) => Ok(*state),
            other => Err(CoordinatorError::vcpu_error(VcpuId(n as u32), format!("unexpected answer {other:?}"))),
        };
        answers.into_iter().enumerate().map(state).collect()
    }

    /// Makes each parked vCPU what was saved: one state for each. Stops that were not told are gone, and `stops` are to be
    /// told when their vCPUs are resumed. Who asks for a stop now is told of `at`, as if it alone had been resumed.
    ///
    /// # Errors
    /// If a vCPU cannot be made that. None of them is fit to run then.
    pub fn restore(&mut self, states: Vec<VcpuState>, stops: Vec<Stop>, at: VcpuId) -> Result<(), CoordinatorError> {
        self.must_be_stopped()?;
        let requests: Vec<_> = states.into_iter().map(|state| Request::Restore(Box::new(state))).collect();
        if requests.len() != self.vcpus.len() {
            let vcpu = VcpuId(requests.len().min(self.vcpus.len()) as u32);
            return Err(CoordinatorError::NoSuchVcpu { vcpu });
        }
        self.registers.fill(None);
        self.alone.forget();
        (self.ending, self.pending, self.last) = (None, stops.into(), at);
        for (n, vcpu) in self.vcpus.iter_mut().enumerate() {
            vcpu.mode = if n == at.index() { RunMode::Continue } else { RunMode::Parked };
        }
        self.ask_each(requests, ACK_DEADLINE).into_iter().try_for_each(|answer| answer.map(|_| ()))
    }

    /// The vCPU that the stop told last was about.
    pub fn last_stopped(&self) -> VcpuId {
        self.last
    }

    /// The stops that were not told yet, and the one that was told last if the guest cannot go on after it.
    pub fn stops(&self) -> impl Iterator<Item = &Stop> {
        self.ending.iter().chain(&self.pending)
    }

    fn must_be_stopped(&self) -> Result<(), CoordinatorError> {
        match self.world {
            World::Stopped => Ok(()),
            World::Running => Err(CoordinatorError::Running),
            World::Over(_) => Err(CoordinatorError::Ended),
        }
    }

    fn was_resumed(&self, vcpu: VcpuId) -> bool {
        self.vcpus[vcpu.index()].mode != RunMode::Parked
    }

    /// The first vCPU that was resumed last, and not left parked: where a stop that is nobody's
    /// doing is reported.
    pub fn first_resumed(&self) -> VcpuId {
        let vcpus = (0..self.vcpus.len() as u32).map(VcpuId);
        vcpus.into_iter().find(|&vcpu| self.was_resumed(vcpu)).unwrap_or(VcpuId(0))
    }

    /// How each vCPU was resumed last.
    pub fn last_plan(&self) -> ResumePlan {
        let plan = ResumePlan::all(self.vcpus.len(), RunMode::Parked);
        (0..).zip(&self.vcpus).fold(plan, |plan, (n, vcpu)| plan.with(VcpuId(n), vcpu.mode))
    }

    /// What a parked vCPU is doing.
    pub fn activity(&mut self, vcpu: VcpuId) -> Result<Activity, CoordinatorError> {
        match self.ask_stopped(vcpu, Request::ReadActivity)? {
            Reply::Activity(activity) => Ok(activity),
            other => Err(CoordinatorError::vcpu_error(vcpu, format!("unexpected answer {other:?}"))),
        }
    }

    /// One look at a vCPU, which may be running.
    pub fn glance(&mut self, vcpu: VcpuId) -> Result<Glance, CoordinatorError> {
        match self.ask(vcpu, Request::Glance)? {
            Reply::Glance(glance) => Ok(glance),
            other => Err(CoordinatorError::vcpu_error(vcpu, format!("unexpected answer {other:?}"))),
        }
    }

    /// Drops everything that `level` armed and every stop of it that was not told, and lets the
    /// guest go on: what a client leaves behind is nothing (law 71). Stops of other levels, and what
    /// the guest itself did, are still to be told; their vCPUs wait for that.
    pub fn release(&mut self, level: Level) -> Result<(), CoordinatorError> {
        self.stop()?;
        if let Err(error) = self.clear_level(level) {
            // The guest must not stand still for this: what is left armed stops it now and then,
            // and whoever owns the run lets it go on.
            tracing::warn!(%error, "breakpoints that nobody owns any more could not be removed");
        }
        let is_left = |stop: &Stop| match stop.owner {
            Some(owner) => owner.level != level,
            None => {
                let is_told_anyway =
                    matches!(stop.reason, StopReason::GuestPanic | StopReason::KernelEntry | StopReason::Port(_));
                is_told_anyway || ending_of(&stop.reason).is_some()
            }
        };
        let (left, dropped): (Vec<Stop>, Vec<Stop>) = self.pending.drain(..).partition(is_left);
        let waits = |vcpu: VcpuId| left.iter().any(|stop| stop.vcpu == vcpu);
        // Where no slot is left to step off, nobody is left to want a step either.
        let nobody = self.image.is_empty();
        let forget = |vcpu: &VcpuId| !waits(*vcpu) && (nobody || dropped.iter().any(|stop| stop.vcpu == *vcpu));
        let forgetting: Vec<VcpuId> = (0..self.vcpus.len() as u32).map(VcpuId).filter(forget).collect();
        forgetting.into_iter().for_each(|vcpu| self.untell(vcpu));
        let mut started = Ok(());
        match self.take_ending() {
            Some(ending) => _ = self.end(ending),
            None if self.ended().is_none() => {
                started = self.start(&ResumePlan::all(self.vcpus.len(), RunMode::Continue), waits);
            }
            None => {}
        }
        self.pending.extend(left);
        started
    }

    /// Ends the run; nothing of the guest runs afterwards.
    pub fn kill(&mut self) {
        if self.ended().is_none() {
            self.end(Ending::Killed);
        }
    }

    fn take_ending(&mut self) -> Option<Ending> {
        self.ending.take().and_then(|stop| ending_of(&stop.reason))
    }

    fn end(&mut self, ending: Ending) -> Stop {
        self.world = World::Over(ending.clone());
        self.pending.clear();
        self.quit();
        self.ground.hold_devices(true);
        Stop::new(VcpuId(0), StopReason::Ended(ending))
    }

    /// Ends every vCPU thread. One that does not answer is left behind, disarmed by nobody but
    /// running nothing either, since its next look at the inbox ends it.
    fn quit(&mut self) {
        let answers = self.ask_each(vec![Request::Quit; self.vcpus.len()], QUIT_DEADLINE);
        for (vcpu, answer) in self.vcpus.iter_mut().zip(answers) {
            let answered = !matches!(answer, Err(CoordinatorError::NoAnswer { .. }));
            if let Some(thread) = vcpu.thread.take().filter(|_| answered) {
                let _ = thread.join();
            }
        }
    }

    fn queue(&mut self, event: Event) {
        self.pending.extend(event.stops);
    }

    /// Takes the oldest pending stop of a vCPU that `may` be told about. Hits on what is gone
    /// are dropped; the step of another vCPU is cancelled, since nobody waits for it any more.
    fn take_pending(&mut self, may: impl Fn(VcpuId) -> bool) -> Option<Stop> {
        self.drop_removed();
        let at = self.pending.iter().position(|stop| may(stop.vcpu))?;
        let stop = self.pending.remove(at)?;
        self.last = stop.vcpu;
        self.ending = self.ending.take().or_else(|| ending_of(&stop.reason).map(|_| stop.clone()));
        let cancelled: Vec<VcpuId> =
            self.pending.iter().filter(|other| other.reason == StopReason::Step).map(|other| other.vcpu).collect();
        self.pending.retain(|other| other.reason != StopReason::Step);
        for vcpu in cancelled {
            self.untell(vcpu);
        }
        Some(stop)
    }

    /// Drops the hits whose breakpoint is gone, and says which vCPUs have nothing left to tell.
    fn drop_removed(&mut self) -> Vec<VcpuId> {
        let is_gone = |table: &SlotTable, stop: &Stop| match (&stop.reason, stop.owner) {
            (StopReason::Breakpoint(request) | StopReason::Watchpoint { request, .. }, Some(owner)) => {
                table.mechanism(owner, *request).is_none()
            }
            _ => false,
        };
        let mut gone: Vec<VcpuId> =
            self.pending.iter().filter(|stop| is_gone(&self.table, stop)).map(|stop| stop.vcpu).collect();
        self.pending.retain(|stop| !is_gone(&self.table, stop));
        gone.retain(|vcpu| !self.pending.iter().any(|stop| stop.vcpu == *vcpu));
        gone.dedup();
        for &vcpu in &gone {
            self.untell(vcpu);
        }
        gone
    }

    /// The vCPU must report again what it has reported here: nobody heard it.
    fn untell(&mut self, vcpu: VcpuId) {
        let seq = self.next_seq();
        self.send(vcpu.index(), seq, Request::Untell);
    }

    fn ask_stopped(&mut self, vcpu: VcpuId, request: Request) -> Result<Reply, CoordinatorError> {
        self.must_be_stopped()?;
        self.ask(vcpu, request)
    }

    fn ask(&mut self, vcpu: VcpuId, request: Request) -> Result<Reply, CoordinatorError> {
        if vcpu.index() >= self.vcpus.len() {
            return Err(CoordinatorError::NoSuchVcpu { vcpu });
        }
        let seq = self.next_seq();
        self.send(vcpu.index(), seq, request);
        self.collect(seq, vcpu.index()..vcpu.index() + 1, ACK_DEADLINE).swap_remove(0)
    }

    fn ask_all(&mut self, request: &Request) -> Result<(), CoordinatorError> {
        let requests = vec![request.clone(); self.vcpus.len()];
        self.ask_each(requests, ACK_DEADLINE).into_iter().try_for_each(|answer| answer.map(|_| ()))
    }

    /// One request for each vCPU; one result from each.
    fn ask_each(&mut self, requests: Vec<Request>, time: Duration) -> Vec<Result<Reply, CoordinatorError>> {
        let seq = self.next_seq();
        for (n, request) in requests.into_iter().enumerate() {
            self.send(n, seq, request);
        }
        self.collect(seq, 0..self.vcpus.len(), time)
    }

    /// Waits until every vCPU that was `asked` has answered `seq`, kicking those that have not,
    /// until the `time` is over.
    fn collect(&mut self, seq: u64, asked: Range<usize>, time: Duration) -> Vec<Result<Reply, CoordinatorError>> {
        let mut answers: Vec<Option<Result<Reply, String>>> = asked.clone().map(|_| None).collect();
        let deadline = Deadline::after(time);
        while answers.iter().any(Option::is_none) && !deadline.is_over() {
            let message = deadline.recv(&self.messages, KICK_INTERVAL);
            if let Ok(Message::Answer(answer)) = &message {
                self.alone.hear(answer);
            }
            match message {
                Ok(Message::Event(event)) => self.queue(event),
                Ok(Message::WantsAlone(vcpu)) => self.alone.wants(vcpu),
                Ok(Message::Notice(notice)) => self.notices.push(notice),
                Ok(Message::Answer(Answer { vcpu, seq: answered, result })) if answered == seq => {
                    // The first answer counts; a second one changes nothing.
                    let place = vcpu.index().checked_sub(asked.start).and_then(|n| answers.get_mut(n));
                    if let Some(open @ None) = place {
                        *open = Some(result);
                    }
                }
                // An answer to a question that was given up on.
                Ok(Message::Answer(_)) => {}
                Err(Missed::Timeout) => {
                    let silent = asked.clone().zip(&answers).filter(|(_, answer)| answer.is_none());
                    silent.for_each(|(n, _)| self.kick(n));
                }
                Err(Missed::Disconnected) => break,
            }
        }
        asked
            .zip(answers)
            .map(|(n, answer)| (VcpuId(n as u32), answer))
            .map(|(vcpu, answer)| match answer {
                Some(Ok(reply)) => Ok(reply),
                Some(Err(error)) => Err(CoordinatorError::Vcpu { vcpu, error }),
                None => Err(CoordinatorError::NoAnswer { vcpu }),
            })
            .collect()
    }

    /// Sends and kicks at once if guest code may be running. A thread that is gone is noticed by
    /// its silence.
    fn send(&mut self, n: usize, seq: u64, request: Request) {
        let vcpu = &self.vcpus[n];
        let _ = vcpu.inbox.send(Command { seq, request });
        if self.world == World::Running {
            self.kick(n);
        }
    }

    fn kick(&self, n: usize) {
        if self.alone.minds_kicks(VcpuId(n as u32)) {
            return;
        }
        let vcpu = &self.vcpus[n];
        if let Some(thread) = &vcpu.thread {
            (vcpu.kick)(thread);
        }
    }

    fn next_seq(&mut self) -> u64 {
        self.seq += 1;
        self.seq
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What the guest has at `gpa`, under a patch or not.
fn original(ground: &dyn Ground, image: &DebugImage, gpa: u64) -> Option<u8> {
    let mut byte = [0];
    let there = ground.read(gpa, &mut byte) == 1;
    image.hide_patches(gpa, &mut byte);
    there.then_some(byte[0])
}

/// Makes guest memory as `to` has it, from what it is under `from`; on error it is as it was.
fn change_memory(ground: &mut dyn Ground, from: &DebugImage, to: &DebugImage) -> Result<(), String> {
    if to.has_memory_of(from) {
        return Ok(());
    }
    let coming = to.patches().iter().filter(|patch| from.patch_at(patch.gpa).is_none());
    let leaving = from.patches().iter().filter(|patch| to.patch_at(patch.gpa).is_none());
    let changes: Vec<(u64, u8, u8)> = coming
        .map(|patch| (patch.gpa, patch.original, INT3))
        .chain(leaving.map(|patch| (patch.gpa, INT3, patch.original)))
        .collect();
    let mut done = 0;
    let result = changes.iter().try_for_each(|&(gpa, was, is)| {
        match ground.replace(gpa, was, is) {
            Ok(true) => {}
            // The guest has written its own code over the patch: that stays (law 56).
            Ok(false) if was == INT3 => tracing::info!("the guest has overwritten the breakpoint at physical {gpa:#x}"),
            Ok(false) => return Err(format!("the guest has just changed its code at physical {gpa:#x}; try again")),
            Err(error) => return Err(format!("guest memory at {gpa:#x}: {error}")),
        }
        done += 1;
        Ok(())
    });
    let result = result.and_then(|()| match from.pages() == to.pages() {
        true => Ok(()),
        false => ground.protect(&to.pages()).map_err(|error| format!("protecting pages of guest memory: {error}")),
    });
    if result.is_err() {
        for &(gpa, was, is) in changes[..done].iter().rev() {
            let _ = ground.replace(gpa, is, was);
        }
    }
    result
}

/// What resuming after this stop leads to, if the guest cannot go on.
fn ending_of(reason: &StopReason) -> Option<Ending> {
    match reason {
        StopReason::GuestExit(value) => Some(Ending::Exit(*value)),
        StopReason::GuestShutdown { .. } => Some(Ending::Shutdown),
        StopReason::Crash(crash) if crash.is_mendable() => None,
        StopReason::Crash(crash) => Some(Ending::Crash(crash.clone())),
        StopReason::Ended(ending) => Some(ending.clone()),
        StopReason::Breakpoint(_)
        | StopReason::Watchpoint { .. }
        | StopReason::Port(_)
        | StopReason::KernelEntry
        | StopReason::Step
        | StopReason::CannotStep(_)
        | StopReason::Interrupted
        | StopReason::GuestPanic => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vcpu::Registers;

    /// A vCPU that speaks the protocol, and each answer as often and in whatever disorder `say`
    /// chooses.
    fn coordinator(say: impl Fn(&mpsc::Sender<Message>, Answer) + Clone + Send + 'static) -> Coordinator {
        let bodies = (0..2).map(|_| {
            let say = say.clone();
            let body = move |vcpu, commands: mpsc::Receiver<Command>, outbox: mpsc::Sender<Message>| {
                while let Ok(Command { seq, request }) = commands.recv() {
                    let quit = matches!(request, Request::Quit);
                    let result = Ok(match request {
                        Request::ReadRegisters => {
                            Reply::Registers(Box::new(Registers { rip: seq, ..Registers::default() }))
                        }
                        Request::ReadActivity => Reply::Activity(Activity::Runnable),
                        Request::Locate(ranges) => Reply::Located(vec![None; ranges.len()]),
                        _ => Reply::Done,
                    });
                    say(&outbox, Answer { vcpu, seq, result });
                    if quit {
                        return;
                    }
                }
            };
            (body, Box::new(|_: &thread::JoinHandle<()>| ()) as Kick)
        });
        Coordinator::with_threads(bodies).unwrap()
    }

    fn copy(answer: &Answer) -> Answer {
        let result = match &answer.result {
            Ok(Reply::Done) => Ok(Reply::Done),
            Ok(Reply::Registers(registers)) => Ok(Reply::Registers(registers.clone())),
            Ok(Reply::Glance(glance)) => Ok(Reply::Glance(*glance)),
            Ok(Reply::Activity(activity)) => Ok(Reply::Activity(*activity)),
            Ok(Reply::State(state)) => Ok(Reply::State(state.clone())),
            Ok(Reply::Located(found)) => Ok(Reply::Located(found.clone())),
            Err(error) => Err(error.clone()),
        };
        Answer { vcpu: answer.vcpu, seq: answer.seq, result }
    }

    fn exercise(say: impl Fn(&mpsc::Sender<Message>, Answer) + Clone + Send + 'static) {
        let mut coordinator = coordinator(say);
        for n in 0..5 {
            coordinator.set_breakpoint(Owner::GDB, Breakpoint::exec(n)).map_or_else(|_| assert_eq!(n, 4), |()| ());
            for vcpu in [VcpuId(1), VcpuId(0)] {
                // The answer is the one to this question: it carries the question's own number.
                coordinator.set_registers(vcpu, &Registers::default()).unwrap();
                let registers = coordinator.registers(vcpu).unwrap();
                assert_eq!(registers.rip, coordinator.seq);
                assert_eq!(coordinator.activity(vcpu).unwrap(), Activity::Runnable);
            }
        }
        assert_eq!(coordinator.registers(VcpuId(2)), Err(CoordinatorError::NoSuchVcpu { vcpu: VcpuId(2) }));
    }

    fn in_any_order(test: impl Fn() + Send + Sync + 'static) {
        #[cfg(feature = "shuttle")]
        shuttle::check_random(test, 400);
        #[cfg(not(feature = "shuttle"))]
        test();
    }

    #[test]
    fn duplicate_answers_change_nothing() {
        in_any_order(|| {
            exercise(|outbox, answer| {
                let _ = outbox.send(Message::Answer(copy(&answer)));
                let _ = outbox.send(Message::Answer(answer));
            });
        });
    }

    #[test]
    fn answers_to_old_questions_change_nothing() {
        in_any_order(|| {
            exercise(|outbox, answer| {
                // The answer before last comes along again, as one that was given up on does.
                if answer.seq > 1 {
                    let _ = outbox.send(Message::Answer(Answer { seq: answer.seq - 1, ..copy(&answer) }));
                }
                let _ = outbox.send(Message::Answer(answer));
            });
        });
    }

    #[test]
    fn answers_of_vcpus_that_do_not_exist_change_nothing() {
        in_any_order(|| {
            exercise(|outbox, answer| {
                let _ = outbox.send(Message::Answer(Answer { vcpu: VcpuId(77), ..copy(&answer) }));
                let _ = outbox.send(Message::Answer(answer));
            });
        });
    }
}
