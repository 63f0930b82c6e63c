//! `trapline run`: puts the machine together and waits for what happens.
//!
//! One thread, one epoll loop: it owns the VM's coordinator and the gdb session, and hears of
//! everything else through file descriptors.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use tempfile::NamedTempFile;
use trapline_gdbstub_glue::Target;

use trapline_harness::report::{Progress, SourcePaths, StopRecord, Style};
use trapline_harness::run::{self, Kernel, Next, Outputs, Run, Supervisor};
use trapline_harness::{Verdict, rules};
use trapline_vmm::Vm;
use trapline_vmm::debug::{Ending, ResumePlan, RunMode, Stop, StopReason, VcpuId};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::args::{ConsoleTarget, RunArgs};
use crate::console;
use crate::initrd;
use crate::stub::Stub;
use crate::terminal::RawTerminal;
use crate::{chain, severity};

/// How the loop ended.
pub(crate) enum Outcome {
    Over(Box<run::Outcome>),
    /// The same where there was no supervisor.
    Ended(Verdict),
    /// The user's key, or a signal; the number is that of the signal.
    Interrupted(i32),
}

/// Runs a guest to its end.
pub(crate) fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let (vm, supervisor) = prepare(args)?;
    let symbols = Symbols::of(args)?;
    let stub = args.gdb.as_ref().map(|address| Stub::listen(address, args.gdb_expose)).transpose()?;
    let session = Session::new(vm, stub, supervisor.timeout())?.with(supervisor, args.console == ConsoleTarget::Stdio);
    let waits = args.wait.then_some("at its first instruction");
    Ok(match attend(session, &args.console, &symbols, waits)? {
        Outcome::Over(outcome) => {
            // Nothing of the console's is buffered; and a vCPU that is stuck in writing to a full
            // pipe holds the lock that a flush would wait for.
            say(args, &outcome);
            ExitCode::from(outcome.exit_code())
        }
        other => other.told(),
    })
}

impl Outcome {
    /// The exit code; a verdict in a line before.
    pub(crate) fn told(&self) -> ExitCode {
        let verdict = match self {
            Outcome::Over(outcome) => &outcome.verdict,
            Outcome::Ended(verdict) => verdict,
            Outcome::Interrupted(signal) => return ExitCode::from(128 + *signal as u8),
        };
        if *verdict != Verdict::Pass {
            eprintln!("trapline: {verdict}");
        }
        ExitCode::from(verdict.exit_code())
    }
}

/// Serves a guest, its console and its debugger to the end. `waits`: where it stands until a debugger lets it go on.
pub(crate) fn attend(
    mut session: Session,
    console: &ConsoleTarget,
    symbols: &Symbols,
    waits: Option<&str>,
) -> anyhow::Result<Outcome> {
    let terminal = match console {
        ConsoleTarget::Stdio => RawTerminal::take().context("cannot use the terminal")?,
        _ => None,
    };
    // A background job that read the terminal would be stopped by SIGTTIN.
    if matches!(console, ConsoleTarget::Stdio) && (terminal.is_some() || !io::stdin().is_terminal()) {
        let serial = session.vm.serial().clone();
        let room = serial.lock().room_event()?;
        session.quit = Some(console::feed(serial, room, terminal.is_some())?);
    }
    session.symbols.clone_from(&symbols.path);
    session.announce(symbols.slide, waits, terminal.is_some());
    // The terminal is the user's again before anything is said.
    session.run(waits.is_some())
}

/// What a run came to, for a person and for the CI system that looks at what we print.
fn say(args: &RunArgs, outcome: &run::Outcome) {
    if args.headless.is_wanted() {
        eprint!("{}", outcome.report.summary(Style::of_stderr()));
    } else if outcome.verdict != Verdict::Pass {
        eprintln!("trapline: {}", outcome.verdict);
    }
    if let Some(paths) = SourcePaths::of_github() {
        // Nobody is left to tell that stderr is closed.
        let _ = outcome.report.write_annotations(&mut io::stderr(), &paths);
    }
}

/// The run as the command line describes it.
pub(crate) fn describe(args: &RunArgs) -> anyhow::Result<Run> {
    let kernel = match args.kernel() {
        Some(path) => Kernel::from(path.as_path()),
        None => Kernel::Bytes("demo".to_owned(), trapline_guests::demo()),
    };
    let headless = &args.headless;
    let mut run = Run::new(kernel)
        .cmdline(args.cmdline())
        .cpus(args.cpus())
        .memory(args.memory)
        .ap_start(args.ap_start.into())
        .gdb(args.gdb.is_some())
        .outputs(Outputs {
            report: headless.report.clone(),
            junit: headless.junit.clone(),
            events: headless.events.clone(),
            vmcore: headless.vmcore.clone(),
            compress: headless.compress,
        });
    if let Some(initrd) = &args.initrd {
        run = run.initrd(initrd);
    }
    if let Some(made) = initrd::make(args)? {
        run = run.initramfs(made);
    }
    if let Some(format) = args.boot_protocol {
        run = run.protocol(format.into());
    }
    if let Some(time) = args.timeout {
        run = run.timeout(time);
    }
    run = args.disks.iter().cloned().fold(run, Run::disk);
    run = headless.symbols.iter().fold(run, |run, path| run.symbols(path));
    for path in &headless.trap_files {
        let text = fs::read_to_string(path)
            .with_context(|| format!("cannot read the traps in {}; check the path", path.display()))?;
        let rules = rules::from_toml(&text, &path.to_string_lossy())?;
        run = rules.into_iter().fold(run, Run::rule);
    }
    Ok(headless.traps.iter().fold(run, |run, rule| run.trap(rule)))
}

fn prepare(args: &RunArgs) -> anyhow::Result<(Vm, Supervisor)> {
    let run = describe(args)?;
    let run = match &args.console {
        ConsoleTarget::Stdio => run.console(Unbuffered(io::stdout())),
        ConsoleTarget::None => run,
        ConsoleTarget::File(path) => run.console(
            File::create(path)
                .with_context(|| format!("cannot write the console to {}; choose another file", path.display()))?,
        ),
    };
    Ok(run.prepare()?)
}

/// Stdout without waiting for the end of a line: a guest's prompt has none.
pub(crate) struct Unbuffered(pub(crate) io::Stdout);

impl Write for Unbuffered {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.0.write(bytes)?;
        self.0.flush()?;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Where gdb finds the symbols of what runs.
pub(crate) struct Symbols {
    path: String,
    /// How far what runs has moved from where they say it is.
    slide: u64,
    /// The built-in guest has no file of its own; this one goes away with the run.
    _demo: Option<NamedTempFile>,
}

impl Symbols {
    fn of(args: &RunArgs) -> anyhow::Result<Self> {
        match (args.kernel(), &args.gdb) {
            (None, Some(_)) => Self::demo(),
            (Some(path), _) if is_elf(path) => Ok(Self::at(path)),
            _ => Ok(Self::at(Path::new("vmlinux"))),
        }
    }

    /// Those of the built-in guest.
    pub(crate) fn demo() -> anyhow::Result<Self> {
        let write = || -> io::Result<NamedTempFile> {
            let mut file = tempfile::Builder::new().prefix("trapline-demo-").suffix(".elf").tempfile()?;
            file.write_all(trapline_guests::demo())?;
            Ok(file)
        };
        let file = write().context("cannot write the demo guest's symbols to the temporary directory")?;
        Ok(Self { path: file.path().display().to_string(), slide: 0, _demo: Some(file) })
    }

    /// Those in a file.
    pub(crate) fn at(path: &Path) -> Self {
        Self { path: path.display().to_string(), slide: 0, _demo: None }
    }

    /// The same of a kernel that has moved itself.
    pub(crate) fn moved(self, slide: u64) -> Self {
        Self { slide, ..self }
    }
}

fn is_elf(path: &Path) -> bool {
    let mut magic = [0; 4];
    File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *b"\x7fELF"
}

/// How a guest came to its end, and the stop that a trap has ended it with, if it was one.
type End = (Verdict, Option<StopRecord>);

/// Everything that the loop looks after.
pub(crate) struct Session {
    vm: Target<Vm>,
    /// Gone once the run is over; a machine that was opened has none.
    supervisor: Option<Supervisor>,
    /// A trap has ended the run, and the debugger that is attached has not let the guest go on yet.
    held: Option<End>,
    progress: Progress,
    stub: Option<Stub>,
    /// The file that gdb is to have.
    symbols: String,
    /// The user's wish, from within the console, to end the run.
    quit: Option<EventFd>,
    timer: TimerFd,
    timeout: Option<Duration>,
    fds: Vec<RawFd>,
    signals: [(i32, UnixStream); 3],
    /// What the loop has come to, or what went wrong inside of an event handler.
    outcome: Option<anyhow::Result<Outcome>>,
}

impl Session {
    pub(crate) fn new(vm: Vm, stub: Option<Stub>, timeout: Option<Duration>) -> anyhow::Result<Self> {
        let listen = |signal: i32| -> io::Result<(i32, UnixStream)> {
            let (receiver, sender) = UnixStream::pair()?;
            receiver.set_nonblocking(true)?;
            signal_hook::low_level::pipe::register(signal, sender)?;
            Ok((signal, receiver))
        };
        let signals = [listen(SIGINT)?, listen(SIGTERM)?, listen(SIGHUP)?];
        // A file that may not grow is an error of its write, and costs the file and not the run.
        signal_hook::flag::register(SIGXFSZ, Arc::default())?;
        let mut timer = TimerFd::new().map_err(io::Error::from)?;
        if let Some(time) = timeout {
            timer.reset(time, None).map_err(io::Error::from)?;
        }
        Ok(Self {
            vm: Target::new(vm),
            fds: Vec::new(),
            supervisor: None,
            held: None,
            symbols: String::new(),
            progress: Progress::new(true),
            stub,
            quit: None,
            timer,
            timeout,
            signals,
            outcome: None,
        })
    }

    /// With somebody who looks after the run.
    fn with(self, supervisor: Supervisor, console_on_stdout: bool) -> Self {
        let fds = supervisor.fds().to_vec();
        Self { fds, supervisor: Some(supervisor), progress: Progress::new(console_on_stdout), ..self }
    }

    /// Says what a user needs to know to go on, on stderr.
    fn announce(&self, slide: u64, waits: Option<&str>, is_terminal: bool) {
        if let Some(command) = self.gdb_command(slide) {
            eprintln!("trapline: {command}");
            if let Some(place) = waits {
                eprintln!("trapline: the guest stands {place} until gdb continues it");
            }
        }
        if is_terminal {
            eprintln!("trapline: the terminal is the guest's console; Ctrl-A x ends the run");
        }
    }

    /// What starts a gdb that attaches, and knows how far the kernel has moved.
    fn gdb_command(&self, slide: u64) -> Option<String> {
        let attach = self.stub.as_ref()?.listening().to_string();
        let symbols = match slide {
            0 => self.symbols.clone(),
            _ => format!("-ex 'symbol-file -o {slide:#x} {}'", self.symbols.replace('\'', r"'\''")),
        };
        Some(attach.replacen("gdb", &format!("gdb {symbols}"), 1))
    }

    fn run(mut self, waits: bool) -> anyhow::Result<Outcome> {
        if let Some(supervisor) = &mut self.supervisor {
            supervisor.begins();
        }
        if !waits && let Err(error) = self.go() {
            self.failed(error);
        }
        let error = |error: event_manager::Error| anyhow!("the event loop failed: {error}");
        let mut manager = EventManager::<Session>::new().map_err(error)?;
        let id = manager.add_subscriber(self);
        loop {
            let session = manager.subscriber_mut(id).map_err(error)?;
            if let Some(outcome) = session.outcome.take() {
                if let Some(stub) = &mut session.stub {
                    stub.say_goodbye(&mut session.vm);
                }
                return outcome;
            }
            manager.run().map_err(error)?;
        }
    }

    /// All go on as they did, so that a step that a debugger has asked for is not lost.
    fn go(&mut self) -> anyhow::Result<()> {
        let plan = match self.stub.as_ref().is_some_and(Stub::is_attached) {
            true => self.vm.last_plan(),
            false => ResumePlan::all(self.vm.vcpus(), RunMode::Continue),
        };
        if let Some(stop) = self.vm.resume(&plan)? {
            self.stopped(stop)?;
        }
        Ok(())
    }

    /// A stop, with the world parked: a trap's, the debugger's to look at, or else the verdict.
    fn stopped(&mut self, stop: Stop) -> anyhow::Result<()> {
        let next = match &mut self.supervisor {
            Some(supervisor) => supervisor.stopped(&mut self.vm, &stop)?,
            None => Next::Nothing,
        };
        match next {
            Next::Nothing if self.is_attached() => self.show(stop),
            Next::Nothing => match Verdict::of_stop(&stop.reason) {
                Some(verdict) => self.over(verdict, None),
                None => self.go(),
            },
            next => self.follow(next, Some(stop)),
        }
    }

    /// What a trap wants, which has stopped the world.
    fn follow(&mut self, next: Next, stop: Option<Stop>) -> anyhow::Result<()> {
        let interrupted = || Stop::new(VcpuId(0), StopReason::Interrupted);
        match next {
            Next::Nothing => Ok(()),
            Next::Go => self.go(),
            Next::Hold(reason) => {
                self.progress.suspend(|| eprintln!("trapline: {reason}"));
                if self.is_attached() {
                    return self.show(stop.unwrap_or_else(interrupted));
                }
                // Whoever comes to look takes the time that it takes.
                self.timer.clear().map_err(io::Error::from)?;
                let slide = self.supervisor.as_ref().map_or(0, |supervisor| supervisor.symbols().slide());
                let command = self.gdb_command(slide).filter(|_| slide != 0);
                self.progress.suspend(|| {
                    if let Some(command) = command {
                        eprintln!("trapline: the kernel has moved: {command}");
                    }
                    eprintln!("trapline: the guest stands there until a debugger lets it go on");
                });
                Ok(())
            }
            Next::End(ended) => {
                let verdict = match &self.supervisor {
                    Some(supervisor) => supervisor.verdict_of(&ended),
                    None => Verdict::Pass,
                };
                let record = ended.stop.map(|stop| *stop);
                if !self.is_attached() {
                    return self.over(verdict, record);
                }
                self.progress.suspend(|| eprintln!("trapline: {verdict}"));
                self.held.get_or_insert((verdict, record));
                self.show(stop.unwrap_or_else(interrupted))
            }
        }
    }

    fn is_attached(&self) -> bool {
        self.stub.as_ref().is_some_and(Stub::is_attached)
    }

    /// Shows the debugger a stop.
    fn show(&mut self, stop: Stop) -> anyhow::Result<()> {
        if let Some(stub) = &mut self.stub {
            stub.stopped(stop, &mut self.vm)?;
        }
        self.look_for_the_end()
    }

    /// After every call of the stub: a debugger may have ended the run, or been told of its end.
    fn look_for_the_end(&mut self) -> anyhow::Result<()> {
        match self.vm.ended() {
            Some(ending) => {
                let verdict = Verdict::from(ending);
                self.over(verdict, None)
            }
            None => Ok(()),
        }
    }

    /// The run is over. What a trap has ended while a debugger was looking stays ended.
    fn over(&mut self, verdict: Verdict, stop: Option<StopRecord>) -> anyhow::Result<()> {
        let (verdict, stop) = self.held.take().unwrap_or((verdict, stop));
        if let Some(supervisor) = self.supervisor.take() {
            let outcome = supervisor.finish(&mut self.vm, verdict, stop);
            self.outcome = Some(Ok(Outcome::Over(Box::new(outcome))));
        } else if self.outcome.is_none() {
            self.outcome = Some(Ok(Outcome::Ended(verdict)));
        }
        Ok(())
    }

    /// Ends the run from outside.
    fn end(&mut self, verdict: Verdict) -> anyhow::Result<()> {
        self.over(verdict, None)?;
        self.vm.kill();
        if let Some(stub) = &mut self.stub {
            let stop = Stop::new(VcpuId(0), StopReason::Ended(Ending::Killed));
            stub.stopped(stop, &mut self.vm)?;
        }
        Ok(())
    }

    /// The run cannot go on. Where a report was asked for, it says so.
    fn failed(&mut self, error: anyhow::Error) {
        if self.supervisor.as_ref().is_some_and(Supervisor::is_headless) {
            let verdict = Verdict::aborted(severity(&error), &chain(&error));
            if let Err(again) = self.end(verdict) {
                tracing::warn!("{again:#}");
            }
        }
        self.outcome.get_or_insert(Err(error));
    }

    fn interrupted(&mut self, signal: i32) -> anyhow::Result<()> {
        self.end(Verdict::Killed)?;
        self.outcome = Some(Ok(Outcome::Interrupted(signal)));
        Ok(())
    }

    fn handle(&mut self, events: Events) -> anyhow::Result<()> {
        let fd = events.fd();
        if fd == self.vm.events().as_raw_fd() {
            match self.vm.poll() {
                Ok(Some(stop)) => self.stopped(stop)?,
                Ok(None) => {}
                // A vCPU that is late costs nobody the guest: the stop is still there to be told.
                Err(error) => {
                    tracing::warn!("{error}; trying again");
                    let _ = self.vm.events().write(1);
                }
            }
        } else if let Some((signal, _)) = self.signals.iter().find(|(_, stream)| stream.as_raw_fd() == fd) {
            self.interrupted(*signal)?;
        } else if fd == self.timer.as_raw_fd() {
            let time = self.timeout.unwrap_or_default();
            self.end(Verdict::TimedOut(time))?;
        } else if self.quit.as_ref().is_some_and(|quit| quit.as_raw_fd() == fd) {
            self.interrupted(SIGINT)?;
        } else if self.fds.contains(&fd) {
            let next = match &mut self.supervisor {
                Some(supervisor) => {
                    let next = supervisor.ready(&mut self.vm, fd)?;
                    if self.progress.is_shown() && supervisor.is_headless() {
                        let line = supervisor.last_line();
                        self.progress.tick(&supervisor.progress(&line));
                    }
                    next
                }
                None => Next::Nothing,
            };
            self.follow(next, None)?;
        } else if let Some(stub) = &mut self.stub {
            stub.ready(&mut self.vm)?;
            self.look_for_the_end()?;
        }
        Ok(())
    }
}

/// Watches `fd` for input.
fn add(ops: &mut EventOps<'_>, fd: RawFd) -> anyhow::Result<()> {
    ops.add(Events::new_raw(fd, EventSet::IN)).map_err(|error| anyhow!("the event loop cannot watch a file: {error}"))
}

impl MutEventSubscriber for Session {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let fixed = [self.vm.events().as_raw_fd(), self.timer.as_raw_fd()];
        let quit = self.quit.as_ref().map(AsRawFd::as_raw_fd);
        let signals = self.signals.each_ref().map(|(_, stream)| stream.as_raw_fd());
        let stub = self.stub.as_ref().map(Stub::fd);
        for fd in fixed.into_iter().chain(self.fds.iter().copied()).chain(signals).chain(quit).chain(stub) {
            if let Err(error) = add(ops, fd) {
                self.outcome = Some(Err(error));
            }
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        if self.outcome.is_some() {
            return;
        }
        if let Err(error) = self.handle(events) {
            self.failed(error);
        }
    }
}
