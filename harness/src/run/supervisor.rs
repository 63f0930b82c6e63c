//! The one who looks after a run that nobody watches: arms the traps when they can be armed, hears of stops, decides
//! how it goes on.
//!
//! ```text
//!  before the first instruction ── where all of it fits into the slots ──► everything
//!  the kernel's first instructions at its own addresses ── slide known, memory mapped ──► slots, protected pages
//!  rest_init: it patches its own code no more (ENDBR, alternatives) ──► software breakpoints, too
//!  a module is there ──► what waits for it
//! ```
//!
//! Whoever owns the VM and its event loop calls [`Supervisor::stopped`] for every stop and
//! [`Supervisor::ready`] when one of [`Supervisor::fds`] is readable, and does what they say.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use trapline_vmm::Vm;
use trapline_vmm::boot::Format;
use trapline_vmm::coordinator::CoordinatorError;
use trapline_vmm::debug::{Breakpoint, Crash, Stop, StopReason, VcpuId};
use vmm_sys_util::timerfd::TimerFd;

use super::arming::Stage;
use super::look::{self, Moment, Seen, micros};
use super::modules::Modules;
use super::outputs::Stream;
use super::plan::{By, OWNER, Plan, Planned};
use super::trap::{Callback, Counted, Counters, Fired, LOG_ROOM, PortPoint, Trap};
use super::watchdog::Watchdog;
use super::{Outputs, RunError};
use crate::Verdict;
use crate::console::{self, ConsoleEvent, ConsoleHandle};
use crate::report::{
    Change, Event, FrameRecord, HitRecord, HitTiming, Input, ProgressState, SCHEMA, StopRecord, TargetRecord,
    TestResult,
};
use crate::rules::{Action, Rule};
use crate::symbols::{LoadedModule, Symbols};
use crate::unwind::Unwinder;

/// How often what was logged is taken.
const TICK: Duration = Duration::from_millis(100);
/// Hits that a report shows as the last ones.
const RECENT: usize = 64;

/// What the owner of the event loop is to do after a stop or an event.
#[derive(Debug, PartialEq)]
pub enum Next {
    /// Nothing: the guest runs, or stands for somebody else.
    Nothing,
    /// Let the guest go on.
    Go,
    /// Let it stand for a debugger; the reason in words.
    Hold(String),
    /// The run has come to its end by a trap. The guest stands.
    End(Ended),
}

/// How a trap ended a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    /// Its index.
    pub trap: usize,
    /// What happened, in a line.
    pub reason: String,
    /// Where and what every vCPU was doing.
    pub stop: Option<Box<StopRecord>>,
}

/// What a supervisor is made of.
pub(crate) struct Setup {
    pub(crate) plan: Plan,
    /// What serves each point of the plan, as the report has it.
    pub(crate) records: Vec<Vec<TargetRecord>>,
    pub(crate) callbacks: BTreeMap<usize, Callback>,
    pub(crate) symbols: Symbols,
    /// The kernel chooses its addresses itself (KASLR).
    pub(crate) may_move: bool,
    pub(crate) console: ConsoleHandle,
    pub(crate) outputs: Outputs,
    pub(crate) input: Input,
    /// The guest's init is ours, which never ends without a status.
    pub(crate) tells_status: bool,
    pub(crate) timeout: Option<Duration>,
}

/// What is known of vCPUs that do not get on.
pub(super) struct Hangs {
    watchdog: Watchdog,
    /// The traps that have heard of the hang of a vCPU.
    told: BTreeSet<(usize, VcpuId)>,
}

/// Looks after one run.
pub struct Supervisor {
    pub(super) symbols: Symbols,
    pub(super) plan: Vec<Planned>,
    pub(super) traps: Vec<Arc<Trap>>,
    pub(super) records: Vec<Vec<TargetRecord>>,
    pub(super) fired: Arc<Fired>,
    pub(super) logged: Receiver<Counted>,
    /// What is trapped of ports.
    pub(super) ports: Vec<Arc<PortPoint>>,
    pub(super) stage: Stage,
    pub(super) may_move: bool,
    pub(super) modules: Modules,
    /// Those that the guest had when somebody looked last.
    pub(super) loaded: Vec<LoadedModule>,
    /// Reads its tables once for as long as the symbols stay the same.
    pub(super) unwinder: Option<Unwinder>,
    /// What is armed, so that what is not wanted any more can be taken away.
    pub(super) armed: BTreeSet<Breakpoint>,
    pub(super) timer: TimerFd,
    pub(super) hangs: Option<Hangs>,
    pub(super) console: ConsoleHandle,
    /// The traps that the console's patterns belong to, in their order.
    pub(super) patterns: Vec<usize>,
    pub(super) outputs: Outputs,
    pub(super) streams: Vec<Stream>,
    pub(super) input: Input,
    pub(super) tells_status: bool,
    pub(super) timeout: Option<Duration>,
    pub(super) began: Instant,
    pub(super) recent: VecDeque<HitRecord>,
    /// Directories with machines that were saved on the way.
    pub(super) snapshots: Vec<String>,
    /// What went wrong on the way, for the report.
    pub(super) problems: Vec<String>,
    /// The line of the console that ended the run.
    pub(super) console_line: Option<u64>,
    /// The vCPU that the guest's end came on.
    pub(super) ended_on: Option<VcpuId>,
    /// The status that the guest gave.
    pub(super) guest_status: Option<u32>,
}

impl Supervisor {
    /// Arms what can be armed before the guest's first instruction.
    ///
    /// # Errors
    /// What this host or these symbols cannot do.
    pub(crate) fn new(vm: &mut Vm, setup: Setup) -> Result<Self, RunError> {
        let Setup { plan, records, callbacks, symbols, may_move, console, outputs, input, tells_status, timeout } =
            setup;
        let (log, logged) = sync_channel(LOG_ROOM);
        let fired = Arc::new(Fired::default());
        let vcpus = vm.vcpus();
        let traps = plan.traps.iter().enumerate().map(|(index, planned)| {
            Arc::new(Trap {
                index,
                rule: planned.rule.clone(),
                counters: Arc::new(Counters::new(vcpus)),
                callback: callbacks.get(&index).cloned(),
                log: log.clone(),
                fired: fired.clone(),
            })
        });
        let sources =
            || plan.traps.iter().enumerate().flat_map(|(n, trap)| trap.points.iter().map(move |p| (n, &p.by)));
        let shortest_hang = sources()
            .filter_map(|(_, by)| match by {
                By::Hang(time) => Some(*time),
                _ => None,
            })
            .min();
        let patterns = sources().filter(|(_, by)| matches!(by, By::Console(_))).map(|(trap, _)| trap).collect();
        let streams = outputs.streams()?;
        let mut supervisor = Self {
            streams,
            traps: traps.collect(),
            modules: Modules::wanted(&plan.traps),
            patterns,
            loaded: Vec::new(),
            unwinder: None,
            plan: plan.traps,
            records,
            symbols,
            fired,
            logged,
            ports: Vec::new(),
            stage: Stage::Armed,
            may_move,
            armed: BTreeSet::new(),
            timer: TimerFd::new().map_err(io::Error::from)?,
            hangs: shortest_hang
                .map(|_| Hangs { watchdog: Watchdog::new(vcpus, !is_linux(vm.entry().format)), told: BTreeSet::new() }),
            console,
            outputs,
            input,
            tells_status,
            timeout,
            began: Instant::now(),
            recent: VecDeque::new(),
            snapshots: Vec::new(),
            problems: Vec::new(),
            console_line: None,
            ended_on: None,
            guest_status: None,
        };
        supervisor.trap_ports(vm)?;
        supervisor.begin(vm)?;
        let tick = shortest_hang.map_or(TICK, |time| Watchdog::interval(time).min(TICK));
        if supervisor.is_headless() {
            supervisor.timer.reset(tick, Some(tick)).map_err(io::Error::from)?;
        }
        Ok(supervisor)
    }

    /// The guest is about to execute its first instruction: times count from here.
    pub fn begins(&mut self) {
        self.began = Instant::now();
        self.console.start(self.began);
        let (input, plan, records) = (&self.input, &self.plan, &self.records);
        for stream in &mut self.streams {
            let trapline = env!("CARGO_PKG_VERSION");
            stream.emit(Duration::ZERO, Event::Start { schema: SCHEMA, trapline, input });
            for (trap, (planned, targets)) in plan.iter().zip(records).enumerate() {
                stream.emit(Duration::ZERO, Event::Armed { trap, rule: &planned.rule.text, targets });
            }
        }
    }

    /// Whether anything is asked of it: a trap, or a file.
    pub fn is_headless(&self) -> bool {
        !self.plan.is_empty() || !self.outputs.is_empty()
    }

    /// How it goes so far, for a line on the terminal; `line` is the console's last.
    pub fn progress<'a>(&self, line: &'a str) -> ProgressState<'a> {
        let tests = self.console.tests();
        let failed = tests.iter().filter(|test| test.result == TestResult::Failed).count();
        ProgressState {
            elapsed: self.began.elapsed(),
            timeout: self.timeout,
            hits: self.traps.iter().map(|trap| trap.counters.total()).sum(),
            tests: (tests.len() as u64, failed as u64),
            line,
        }
    }

    /// The console's last line that is not blank.
    pub fn last_line(&self) -> String {
        self.console.last_line().map(|line| line.text).unwrap_or_default()
    }

    fn emit(&mut self, event: Event<'_>) {
        let at = self.began.elapsed();
        for stream in &mut self.streams {
            stream.emit(at, event);
        }
    }

    /// When that was.
    pub(super) fn began(&self) -> Instant {
        self.began
    }

    /// How long the run may take.
    pub fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    /// Readable when [`ready`](Self::ready) has something to do.
    pub fn fds(&self) -> [RawFd; 2] {
        [self.timer.as_raw_fd(), self.console.event().as_raw_fd()]
    }

    /// The guest's symbols, where they are by what is known of it now.
    pub fn symbols(&self) -> &Symbols {
        &self.symbols
    }

    /// The last hits, oldest first.
    pub fn recent(&self) -> impl Iterator<Item = &HitRecord> {
        self.recent.iter()
    }
}

/// Hearing of stops and of time.
impl Supervisor {
    /// The world stands, for this.
    ///
    /// # Errors
    /// A vCPU failed, or what was to be armed now cannot be.
    pub fn stopped(&mut self, vm: &mut Vm, stop: &Stop) -> Result<Next, RunError> {
        self.act_on(vm, stop).map_err(|error| self.in_words(error))
    }

    /// What cannot be armed, by its place: the address is another in each run.
    fn in_words(&self, error: RunError) -> RunError {
        let RunError::Arm(arm) = &error else { return error };
        let Some(request) = arm.request() else { return error };
        let place = look::place(&self.symbols, request.addr);
        RunError::Refused(vec![error.to_string().replace(&format!("{:#x}", request.addr), &place)])
    }

    fn act_on(&mut self, vm: &mut Vm, stop: &Stop) -> Result<Next, RunError> {
        match &stop.reason {
            StopReason::KernelEntry => {
                self.kernel_is_there(vm, stop.vcpu)?;
                Ok(Next::Go)
            }
            StopReason::Breakpoint(request) | StopReason::Watchpoint { request, .. } if stop.owner == Some(OWNER) => {
                if self.stage.ends_at(*request) {
                    self.stage = self.stage_after(self.stage);
                    self.arm_all(vm)?;
                    return Ok(Next::Go);
                }
                if self.modules.is_hook(*request) {
                    return self.modules_changed(vm, stop.vcpu, *request);
                }
                let hits = self.fired.take(stop.vcpu);
                self.act(vm, hits, request.on.is_watch())
            }
            StopReason::Port(_) => {
                let hits = self.fired.take(stop.vcpu);
                self.act(vm, hits, true)
            }
            reason => {
                if Verdict::of_stop(reason).is_some() {
                    self.ended_on = Some(stop.vcpu);
                }
                if let StopReason::GuestExit(status) = reason {
                    self.guest_status = Some(*status);
                }
                if let StopReason::Crash(Crash::TripleFault { .. }) = reason {
                    self.count_triple_fault(stop.vcpu);
                }
                Ok(Next::Nothing)
            }
        }
    }

    /// Rules that wait for a triple fault have been hit; the run ends of itself.
    fn count_triple_fault(&self, vcpu: VcpuId) {
        for trap in self.triple_fault_traps() {
            self.traps[trap].counters.count(vcpu);
        }
    }

    fn triple_fault_traps(&self) -> impl Iterator<Item = usize> {
        let waits = |planned: &Planned| planned.points.iter().any(|point| point.by == By::TripleFault);
        (0..self.plan.len()).filter(move |n| waits(&self.plan[*n]))
    }

    /// The first of them.
    pub(super) fn triple_fault_trap(&self) -> Option<usize> {
        self.triple_fault_traps().next()
    }

    /// How a run ends that a trap has ended.
    pub fn verdict_of(&self, ended: &Ended) -> Verdict {
        let exit_code = self.traps.get(ended.trap).map_or(3, |trap| trap.rule.exit_code());
        Verdict::Trapped { trap: ended.trap, exit_code, reason: ended.reason.clone() }
    }

    /// One of [`fds`](Self::fds) is readable: takes what was logged, hears what the console said, looks
    /// whether every vCPU gets on.
    ///
    /// # Errors
    /// As [`stopped`](Self::stopped).
    pub fn ready(&mut self, vm: &mut Vm, fd: RawFd) -> Result<Next, RunError> {
        if fd == self.console.event().as_raw_fd() {
            let _ = self.console.event().read();
            return self.hear(vm);
        }
        let _ = self.timer.wait();
        self.take_logged();
        if !self.patterns.is_empty() {
            self.console.check_partial();
        }
        if !vm.is_running() {
            return Ok(Next::Nothing);
        }
        let mut next = Next::Nothing;
        for (trap, vcpu, time) in self.find_hangs(vm) {
            let wanted = self.hung(vm, trap, vcpu, time)?;
            if gravity(&wanted) > gravity(&next) {
                next = wanted;
            }
        }
        Ok(next)
    }

    /// Puts what was logged into the report's words.
    pub(crate) fn take_logged(&mut self) {
        let logged: Vec<Counted> = self.logged.try_iter().collect();
        for hit in logged {
            let behind = self.is_behind(hit.trap);
            let record = self.record(&hit, behind, Vec::new());
            self.remember(record);
        }
    }

    fn is_behind(&self, trap: usize) -> bool {
        let watches = |planned: &Planned| {
            planned.points.iter().any(|point| point.request().is_some_and(|request| request.on.is_watch()))
        };
        self.plan.get(trap).is_some_and(watches)
    }

    fn record(&self, hit: &Counted, is_behind: bool, backtrace: Vec<FrameRecord>) -> HitRecord {
        let back = u64::from(is_behind);
        HitRecord {
            trap: hit.trap,
            vcpu: hit.vcpu.0,
            at: look::place(&self.symbols, hit.pc),
            source: look::source(&self.symbols, hit.pc.wrapping_sub(back)),
            change: hit.change,
            backtrace,
            timing: HitTiming { at_us: micros(self.began, hit.at), pc: hit.pc, hits_before: hit.hits_before },
        }
    }

    fn remember(&mut self, record: HitRecord) {
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        let is_logged = self.traps.get(record.trap).is_some_and(|trap| trap.rule.action == Action::Log);
        self.emit(if is_logged { Event::Log(&record) } else { Event::Hit(&record) });
        self.recent.push_back(record);
    }

    /// Does what the rules of these hits want; of several the gravest decides how it goes on.
    fn act(&mut self, vm: &mut Vm, mut hits: Vec<Counted>, is_behind: bool) -> Result<Next, RunError> {
        hits.sort_by_key(|hit| hit.trap);
        let mut next = Next::Go;
        let mut done = false;
        for hit in hits {
            let Some(trap) = self.traps.get(hit.trap).cloned() else { continue };
            done |= trap.rule.once;
            // The place may be in a module; its bare address would be another in each run.
            self.learn_modules(vm, hit.vcpu);
            let backtrace = match trap.rule.action {
                Action::Backtrace => {
                    let registers = vm.registers(hit.vcpu)?;
                    let unwinder = self.unwinder.get_or_insert_with(|| Unwinder::new(self.symbols.clone()));
                    look::backtrace(vm, &self.symbols, unwinder, hit.vcpu, &registers)?.0
                }
                _ => Vec::new(),
            };
            let record = self.record(&hit, is_behind, backtrace);
            let reason = reason(&trap.rule, &record);
            if trap.rule.action != Action::Ignore {
                self.remember(record);
            }
            let wanted = match trap.rule.action {
                Action::Fail => {
                    let moment = Moment {
                        reason: reason.clone(),
                        vcpu: Some(hit.vcpu),
                        change: hit.change,
                        is_behind,
                        began: self.began,
                        at: hit.at,
                    };
                    let stop = Some(Box::new(self.look(vm, &moment)?));
                    Next::End(Ended { trap: hit.trap, reason, stop })
                }
                Action::Gdb => Next::Hold(reason),
                Action::Snapshot => {
                    self.snapshot(vm);
                    Next::Go
                }
                Action::Backtrace | Action::Log | Action::Ignore => Next::Go,
            };
            if gravity(&wanted) > gravity(&next) {
                next = wanted;
            }
        }
        if done {
            self.arm_all(vm)?;
        }
        Ok(next)
    }

    /// What the console has said since the last time.
    pub(super) fn hear(&mut self, vm: &mut Vm) -> Result<Next, RunError> {
        let mut next = Next::Nothing;
        for event in self.console.events() {
            let (pattern, number, line) = match event {
                ConsoleEvent::Matched { pattern, number, line } => (pattern, number, line),
                ConsoleEvent::Booted { .. } => {
                    self.emit(Event::Boot {});
                    continue;
                }
                ConsoleEvent::Panic { text } => {
                    self.emit(Event::Panic { text: &text });
                    continue;
                }
                ConsoleEvent::Test(test) => {
                    self.emit(Event::Test(&test));
                    continue;
                }
            };
            let Some((index, trap)) = self.patterns.get(pattern).and_then(|n| Some((*n, self.traps.get(*n)?.clone())))
            else {
                continue;
            };
            let Some(hits_before) = trap.count(VcpuId(0)).filter(|before| trap.is_due(*before)) else { continue };
            let reason = format!("{}: the console says: {}", trap.rule.title(), console::message(&line.text).trim());
            if trap.rule.action == Action::Fail {
                self.console_line = self.console_line.or(Some(number));
            }
            let wanted = self.stop_for(vm, index, None, hits_before, reason)?;
            if gravity(&wanted) > gravity(&next) {
                next = wanted;
            }
        }
        Ok(next)
    }

    /// The hangs that rules have not heard of: trap, vCPU, and the time that the rule says; the longest first. A rule hears of
    /// each hang once, which is over when the vCPU gets on.
    fn find_hangs(&mut self, vm: &mut Vm) -> Vec<(usize, VcpuId, Duration)> {
        let Some(hangs) = &mut self.hangs else { return Vec::new() };
        let now = Instant::now();
        let mut found = Vec::new();
        for vcpu in (0..vm.vcpus() as u32).map(VcpuId) {
            // One that waits for who reads its console does not answer either, and that is no hang of the guest's.
            let Ok(glance) = vm.glance(vcpu) else { continue };
            let Some(time) = hangs.watchdog.seen(vcpu, &glance, now) else {
                hangs.told.retain(|(_, told)| *told != vcpu);
                continue;
            };
            for (trap, planned) in self.plan.iter().enumerate() {
                let wanted = planned.points.iter().find_map(|point| match point.by {
                    By::Hang(least) if least <= time => Some(least),
                    _ => None,
                });
                if let Some(least) = wanted
                    && hangs.told.insert((trap, vcpu))
                {
                    found.push((time, trap, vcpu, least));
                }
            }
        }
        found.sort_by_key(|(time, trap, ..)| (std::cmp::Reverse(*time), *trap));
        found.into_iter().map(|(_, trap, vcpu, least)| (trap, vcpu, least)).collect()
    }

    fn hung(&mut self, vm: &mut Vm, trap: usize, vcpu: VcpuId, time: Duration) -> Result<Next, RunError> {
        let Some(this) = self.traps.get(trap).cloned() else { return Ok(Next::Nothing) };
        let Some(hits_before) = this.count(vcpu).filter(|before| this.is_due(*before)) else {
            return Ok(Next::Nothing);
        };
        // What the rule says, not what was measured: that is another in each run.
        let reason = format!("{vcpu} has made no progress for {time:?}, with interrupts off");
        self.stop_for(vm, trap, Some(vcpu), hits_before, reason)
    }

    /// Stops the world for something that no breakpoint has found, and does what the rule wants.
    pub(crate) fn stop_for(
        &mut self,
        vm: &mut Vm,
        trap: usize,
        vcpu: Option<VcpuId>,
        hits_before: u64,
        reason: String,
    ) -> Result<Next, RunError> {
        let Some(this) = self.traps.get(trap).cloned() else { return Ok(Next::Nothing) };
        let at = Instant::now();
        if matches!(this.rule.action, Action::Log | Action::Ignore) {
            if this.rule.action == Action::Log {
                self.remember(HitRecord {
                    trap,
                    vcpu: vcpu.map_or(0, |vcpu| vcpu.0),
                    at: reason,
                    source: None,
                    change: None,
                    backtrace: Vec::new(),
                    timing: HitTiming { at_us: micros(self.began, at), pc: 0, hits_before },
                });
            }
            return Ok(Next::Nothing);
        }
        // If it stands for somebody else already, it is theirs to let go on.
        let goes_on = if vm.is_running() { Next::Go } else { Next::Nothing };
        vm.pause()?;
        if vm.ended().is_some() {
            // A debugger has seen it to its end: nothing is left to look at.
            return Ok(match this.rule.action {
                Action::Fail => Next::End(Ended { trap, reason, stop: None }),
                _ => Next::Nothing,
            });
        }
        let who = vcpu.unwrap_or(VcpuId(0));
        let pc = vm.registers(who)?.pc();
        self.look_for_slide(vm)?;
        self.learn_modules(vm, who);
        let hit = Counted { trap, vcpu: who, at, pc, change: None, hits_before };
        let record = self.record(&hit, false, Vec::new());
        self.remember(record);
        Ok(match this.rule.action {
            Action::Fail => {
                let moment =
                    Moment { reason: reason.clone(), vcpu, change: None, is_behind: false, began: self.began, at };
                let stop = Some(Box::new(self.look(vm, &moment)?));
                Next::End(Ended { trap, reason, stop })
            }
            Action::Gdb => Next::Hold(reason),
            Action::Snapshot => {
                self.snapshot(vm);
                goes_on
            }
            Action::Backtrace | Action::Log | Action::Ignore => goes_on,
        })
    }

    /// What every vCPU is doing; the world stands.
    pub(crate) fn look(&mut self, vm: &mut Vm, moment: &Moment) -> Result<StopRecord, CoordinatorError> {
        self.look_for_slide(vm)?;
        self.learn_modules(vm, moment.vcpu.unwrap_or(VcpuId(0)));
        let unwinder = self.unwinder.get_or_insert_with(|| Unwinder::new(self.symbols.clone()));
        look::look(vm, &self.symbols, unwinder, moment)
    }

    /// What every vCPU is doing, for a stop that is no trap's: the end of the time, a crash.
    ///
    /// # Errors
    /// A vCPU did not answer.
    pub fn look_around(
        &mut self,
        vm: &mut Vm,
        reason: String,
        vcpu: Option<VcpuId>,
    ) -> Result<StopRecord, CoordinatorError> {
        let moment = Moment { reason, vcpu, change: None, is_behind: false, began: self.began, at: Instant::now() };
        self.look(vm, &moment)
    }

    /// Where the kernel has moved to, if no trap has needed to know yet.
    fn look_for_slide(&mut self, vm: &mut Vm) -> Result<(), CoordinatorError> {
        for vcpu in (0..vm.vcpus() as u32).map(VcpuId) {
            let registers = vm.registers(vcpu)?;
            // A vCPU in a program or a module has the kernel's address all the same: where system calls go.
            for inside in [registers.pc(), registers.lstar] {
                if self.find_slide(vm, vcpu, inside)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The modules that the guest has now, as far as they can be found: backtraces go through them.
    fn learn_modules(&mut self, vm: &mut Vm, vcpu: VcpuId) {
        let Ok(seen) = Seen::by(vm, vcpu) else { return };
        match self.symbols.guest_modules(&seen) {
            Ok(loaded) => {
                let identity = |module: &LoadedModule| (module.name.clone(), module.address, module.state);
                if !loaded.iter().map(identity).eq(self.loaded.iter().map(identity)) {
                    self.symbols = self.symbols.with_modules(&loaded);
                    self.unwinder = None;
                }
                self.loaded = loaded;
            }
            Err(error) => tracing::debug!(%error, "the guest's modules are not known"),
        }
    }

    /// The guest stands where a module has come or is about to go.
    fn modules_changed(&mut self, vm: &mut Vm, vcpu: VcpuId, hook: Breakpoint) -> Result<Next, RunError> {
        let registers = vm.registers(vcpu)?;
        self.learn_modules(vm, vcpu);
        self.modules.changed(&self.plan, &self.symbols, &self.loaded, hook, registers.rdi).map_err(RunError::Usage)?;
        self.arm_all(vm)?;
        Ok(Next::Go)
    }
}

/// Whether a kernel of this format unpacks itself and sets itself up as Linux does.
fn is_linux(format: Format) -> bool {
    matches!(format, Format::BzImage | Format::Linux64 | Format::Pvh)
}

/// Which of two ways to go on comes first.
fn gravity(next: &Next) -> u8 {
    match next {
        Next::Nothing => 0,
        Next::Go => 1,
        Next::Hold(_) => 2,
        Next::End(_) => 3,
    }
}

/// A hit in one line.
fn reason(rule: &Rule, hit: &HitRecord) -> String {
    let change = match hit.change {
        Some(Change { old, new }) => format!(", {old:#x} -> {new:#x}"),
        None => String::new(),
    };
    format!("{}: vCPU {} at {}{change}", rule.title(), hit.vcpu, hit.at)
}
