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
//! All waits are bounded. A vCPU that does not answer in time is named in the error, and
//! because commands are obeyed in order, the undoing commands that were queued behind the one it
//! missed put it right once it wakes (law 18).

use std::collections::VecDeque;
use std::ops::Range;

use crate::debug::{
    Breakpoint, BreakpointError, DebugImage, Ending, Handler, Level, Notice, Owner, Prepared, ResumePlan, RunMode,
    SlotTable, Stop, StopReason, VcpuId,
};
use crate::limits::{ACK_DEADLINE, KICK_INTERVAL};
use crate::sync::{Arc, Deadline, Missed, mpsc, thread};
use crate::vcpu::protocol::{Answer, Command, Event, Message, Reply, Request};
use crate::vcpu::thread::VcpuThread;
use crate::vcpu::{Activity, Cpu, Registers};

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
    world: World,
    /// Stops that happened and were not told yet, oldest first (law 14).
    pending: VecDeque<Stop>,
    /// Set by a stop after which the guest cannot go on.
    ending: Option<Ending>,
    /// Registers of parked vCPUs, as far as somebody has asked. Valid while the world stands.
    registers: Vec<Option<Registers>>,
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
            world: World::Stopped,
            pending: VecDeque::new(),
            ending: None,
            notices: Vec::new(),
            seq: 0,
        })
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
        match self.table.prepare_set(owner, request, handler)? {
            Some(prepared) => self.apply(prepared),
            None => Ok(()),
        }
    }

    /// Disarms `request` on every vCPU, or nowhere. A hit on it that nobody was told of is dropped.
    pub fn clear_breakpoint(&mut self, owner: Owner, request: Breakpoint) -> Result<(), BreakpointError> {
        let prepared = self.table.prepare_clear(owner, request)?;
        self.apply(prepared)
    }

    /// Disarms everything that `level` holds.
    pub fn clear_level(&mut self, level: Level) -> Result<(), BreakpointError> {
        match self.table.prepare_clear_level(level) {
            Some(prepared) => self.apply(prepared),
            None => Ok(()),
        }
    }

    /// What changes did to requests that nobody asked about in them, oldest first (law 27).
    pub fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// Install on all, image by image, then commit; or put back what was, on all.
    fn apply(&mut self, prepared: Prepared) -> Result<(), BreakpointError> {
        let mut newest = self.image.clone();
        for image in prepared.images() {
            newest = Arc::new(image.clone());
            if let Err(error) = self.ask_all(&Request::Install(newest.clone())) {
                return Err(self.undo(&newest, &error));
            }
        }
        self.notices.extend_from_slice(prepared.notices());
        self.table.commit(prepared);
        self.image = newest;
        Ok(())
    }

    /// Puts back the image that is in force after `newest` could not be installed everywhere.
    fn undo(&mut self, newest: &DebugImage, error: &CoordinatorError) -> BreakpointError {
        self.table.skip_epoch(newest.epoch());
        let mut why = error.to_string();
        if let Err(undo) = self.ask_all(&Request::Install(self.image.clone()))
            && undo != *error
        {
            // Nothing is left to try: say which vCPU may disagree with the others.
            why = format!("{why}; and then {undo}");
        }
        BreakpointError::Apply(why)
    }

    /// Stops the world, if it runs. What happened meanwhile is kept for [`take_stop`](Self::take_stop).
    ///
    /// If a vCPU does not park in time, the others go on as before and the error names it.
    pub fn stop(&mut self) -> Result<(), CoordinatorError> {
        match self.world {
            World::Stopped | World::Over(_) => return Ok(()),
            World::Running => {}
        }
        match self.ask_all(&Request::Park) {
            Ok(()) => {
                self.world = World::Stopped;
                Ok(())
            }
            Err(error) => {
                for n in 0..self.vcpus.len() {
                    // Queued behind the Park that was missed, so that it undoes it. A vCPU that
                    // has parked itself stays: its stop is still to be told, and there.
                    let seq = self.next_seq();
                    self.send(n, seq, Request::Unpark);
                }
                Err(error)
            }
        }
    }

    /// Lets the vCPUs go on as `plan` says and returns at once.
    ///
    /// If a vCPU that is to run has a stop that nobody was told of, that stop is returned and
    /// nothing runs. After a stop that the guest cannot survive, this ends the run.
    pub fn resume(&mut self, plan: &ResumePlan) -> Result<Option<Stop>, CoordinatorError> {
        match &self.world {
            World::Running => return Err(CoordinatorError::Running),
            World::Over(_) => return Err(CoordinatorError::Ended),
            World::Stopped => {}
        }
        if let Some(ending) = self.ending.take() {
            return Ok(Some(self.end(ending)));
        }
        if let Some(stop) = self.take_pending(|vcpu| plan.mode(vcpu) != RunMode::Parked) {
            return Ok(Some(stop));
        }
        for n in 0..self.vcpus.len() {
            self.vcpus[n].mode = plan.mode(VcpuId(n as u32));
        }
        self.world = World::Running;
        self.registers.fill(None);
        let requests: Vec<_> = self.vcpus.iter().map(|vcpu| Request::Resume(vcpu.mode)).collect();
        let resumed = self.ask_each(requests).into_iter().try_for_each(|answer| answer.map(|_| ()));
        if let Err(error) = resumed {
            self.stop()?;
            return Err(error);
        }
        Ok(None)
    }

    /// Looks at what the vCPUs have said. `Some` is a stop: by then the whole world is parked.
    ///
    /// Hits on breakpoints that are gone are dropped here, and their vCPU goes on (law 11).
    pub fn poll(&mut self) -> Result<Option<Stop>, CoordinatorError> {
        loop {
            match self.messages.try_recv() {
                Ok(Message::Event(event)) => self.queue(event),
                Ok(Message::Notice(notice)) => self.notices.push(notice),
                Ok(Message::Answer(_)) => {} // too late: whoever asked has given up on it
                Err(_) => break,
            }
        }
        if self.world != World::Running {
            return Ok(None);
        }
        let stale: Vec<VcpuId> = self.drop_removed();
        for vcpu in stale {
            let mode = self.vcpus[vcpu.index()].mode;
            self.ask(vcpu, Request::Resume(mode))?;
        }
        if !self.pending.iter().any(|stop| self.was_resumed(stop.vcpu)) {
            return Ok(None);
        }
        self.stop()?;
        Ok(self.take_stop())
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

    fn was_resumed(&self, vcpu: VcpuId) -> bool {
        self.vcpus[vcpu.index()].mode != RunMode::Parked
    }

    /// The first vCPU that was resumed last, and not left parked: where a stop that is nobody's
    /// doing is reported.
    pub fn first_resumed(&self) -> VcpuId {
        let vcpus = (0..self.vcpus.len() as u32).map(VcpuId);
        vcpus.into_iter().find(|&vcpu| self.was_resumed(vcpu)).unwrap_or(VcpuId(0))
    }

    /// What a parked vCPU is doing.
    pub fn activity(&mut self, vcpu: VcpuId) -> Result<Activity, CoordinatorError> {
        match self.ask_stopped(vcpu, Request::ReadActivity)? {
            Reply::Activity(activity) => Ok(activity),
            other => Err(CoordinatorError::vcpu_error(vcpu, format!("unexpected answer {other:?}"))),
        }
    }

    /// Drops every stop that was not told and everything that `level` armed, and lets the guest
    /// go on: what a client leaves behind is nothing (law 71).
    pub fn release(&mut self, level: Level) -> Result<(), CoordinatorError> {
        self.stop()?;
        if let Err(error) = self.clear_level(level) {
            // The guest must not stand still for this: what is left armed stops it now and then,
            // and whoever owns the run lets it go on.
            tracing::warn!(%error, "breakpoints that nobody owns any more could not be removed");
        }
        let mut panics = Vec::new();
        while let Some(stop) = self.pending.pop_front() {
            self.untell(stop.vcpu);
            // What the guest itself did cannot be dropped.
            if let Some(ending) = ending_of(&stop.reason) {
                self.ending = Some(ending);
            } else if stop.reason == StopReason::GuestPanic {
                panics.push(stop);
            }
        }
        let vcpus = self.vcpus.len();
        if self.image.is_empty() {
            // No slot is left to step off, and whoever is gone wants no step either.
            (0..vcpus as u32).for_each(|n| self.untell(VcpuId(n)));
        }
        if self.ended().is_none() {
            self.resume(&ResumePlan::all(vcpus, RunMode::Continue))?;
        }
        // The guest can go on after this one, but whoever owns the run has yet to hear of it.
        if self.world == World::Running {
            self.pending.extend(panics);
        }
        Ok(())
    }

    /// Ends the run; nothing of the guest runs afterwards.
    pub fn kill(&mut self) {
        if self.ended().is_none() {
            self.end(Ending::Killed);
        }
    }

    fn end(&mut self, ending: Ending) -> Stop {
        self.world = World::Over(ending.clone());
        self.pending.clear();
        self.quit();
        Stop { vcpu: VcpuId(0), reason: StopReason::Ended(ending) }
    }

    /// Ends every vCPU thread. One that does not answer is left behind, disarmed by nobody but
    /// running nothing either, since its next look at the inbox ends it.
    fn quit(&mut self) {
        let answers = self.ask_each(vec![Request::Quit; self.vcpus.len()]);
        for (vcpu, answer) in self.vcpus.iter_mut().zip(answers) {
            let answered = !matches!(answer, Err(CoordinatorError::NoAnswer { .. }));
            if let Some(thread) = vcpu.thread.take().filter(|_| answered) {
                let _ = thread.join();
            }
        }
    }

    fn queue(&mut self, event: Event) {
        for reason in event.reasons {
            self.pending.push_back(Stop { vcpu: event.vcpu, reason });
        }
    }

    /// Takes the oldest pending stop of a vCPU that `may` be told about. Hits on what is gone
    /// are dropped; the step of another vCPU is cancelled, since nobody waits for it any more.
    fn take_pending(&mut self, may: impl Fn(VcpuId) -> bool) -> Option<Stop> {
        self.drop_removed();
        let at = self.pending.iter().position(|stop| may(stop.vcpu))?;
        let stop = self.pending.remove(at)?;
        self.ending = self.ending.take().or_else(|| ending_of(&stop.reason));
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
        let is_gone = |table: &SlotTable, stop: &Stop| match &stop.reason {
            StopReason::Breakpoint(request) | StopReason::Watchpoint { request, .. } => {
                !table.requests().any(|(_, held)| held == *request)
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
        match self.world {
            World::Stopped => self.ask(vcpu, request),
            World::Running => Err(CoordinatorError::Running),
            World::Over(_) => Err(CoordinatorError::Ended),
        }
    }

    fn ask(&mut self, vcpu: VcpuId, request: Request) -> Result<Reply, CoordinatorError> {
        if vcpu.index() >= self.vcpus.len() {
            return Err(CoordinatorError::NoSuchVcpu { vcpu });
        }
        let seq = self.next_seq();
        self.send(vcpu.index(), seq, request);
        self.collect(seq, vcpu.index()..vcpu.index() + 1).swap_remove(0)
    }

    fn ask_all(&mut self, request: &Request) -> Result<(), CoordinatorError> {
        let requests = vec![request.clone(); self.vcpus.len()];
        self.ask_each(requests).into_iter().try_for_each(|answer| answer.map(|_| ()))
    }

    /// One request for each vCPU; one result from each.
    fn ask_each(&mut self, requests: Vec<Request>) -> Vec<Result<Reply, CoordinatorError>> {
        let seq = self.next_seq();
        for (n, request) in requests.into_iter().enumerate() {
            self.send(n, seq, request);
        }
        self.collect(seq, 0..self.vcpus.len())
    }

    /// Waits until every vCPU that was `asked` has answered `seq`, kicking those that have not,
    /// until the deadline.
    fn collect(&mut self, seq: u64, asked: Range<usize>) -> Vec<Result<Reply, CoordinatorError>> {
        let mut answers: Vec<Option<Result<Reply, String>>> = asked.clone().map(|_| None).collect();
        let deadline = Deadline::after(ACK_DEADLINE);
        while answers.iter().any(Option::is_none) && !deadline.is_over() {
            match deadline.recv(&self.messages, KICK_INTERVAL) {
                Ok(Message::Event(event)) => self.queue(event),
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

/// What resuming after this stop leads to, if the guest cannot go on.
fn ending_of(reason: &StopReason) -> Option<Ending> {
    match reason {
        StopReason::GuestExit(value) => Some(Ending::Exit(*value)),
        StopReason::GuestShutdown { .. } => Some(Ending::Shutdown),
        StopReason::Crash(crash) => Some(Ending::Crash(crash.clone())),
        StopReason::Ended(ending) => Some(ending.clone()),
        StopReason::Breakpoint(_)
        | StopReason::Watchpoint { .. }
        | StopReason::Step
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
            Ok(Reply::Activity(activity)) => Ok(Reply::Activity(*activity)),
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
