//! `trapline run`: puts the machine together and waits for what happens.
//!
//! One thread, one epoll loop: it owns the VM's coordinator and the gdb session, and hears of
//! everything else through file descriptors.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tempfile::NamedTempFile;
use trapline_gdbstub_glue::Target;
use trapline_harness::Verdict;
use trapline_vmm::boot::{BootRequest, Image};
use trapline_vmm::debug::{Ending, ResumePlan, RunMode, Stop, StopReason, VcpuId};
use trapline_vmm::devices::Console;
use trapline_vmm::{Vm, VmConfig};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::args::{ConsoleTarget, RunArgs};
use crate::console;
use crate::initrd;
use crate::stub::Stub;
use crate::terminal::RawTerminal;

/// How the loop ended.
enum Outcome {
    Verdict(Verdict),
    /// The user's key, or a signal; the number is that of the signal.
    Interrupted(i32),
}

/// Runs a guest to its end.
pub(crate) fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let vm = boot(args)?;
    let symbols = Symbols::of(args)?;
    let stub = args.gdb.as_ref().map(|address| Stub::listen(address, args.gdb_expose)).transpose()?;
    let mut session = Session::new(vm, stub, args)?;
    let terminal = match args.console {
        ConsoleTarget::Stdio => RawTerminal::take().context("cannot use the terminal")?,
        _ => None,
    };
    // A background job that read the terminal would be stopped by SIGTTIN.
    if matches!(args.console, ConsoleTarget::Stdio) && (terminal.is_some() || !io::stdin().is_terminal()) {
        let serial = session.vm.serial().clone();
        let room = serial.lock().room_event()?;
        session.quit = Some(console::feed(serial, room, terminal.is_some())?);
    }
    session.announce(args, &symbols, terminal.is_some())?;
    let outcome = session.run(args);
    // The terminal is the user's again before anything is said.
    drop(terminal);
    drop(symbols);
    Ok(match outcome? {
        Outcome::Verdict(verdict) => {
            // Nothing of the console's is buffered; and a vCPU that is stuck in writing to a full
            // pipe holds the lock that a flush would wait for.
            if verdict != Verdict::Pass {
                eprintln!("trapline: {verdict}");
            }
            ExitCode::from(verdict.exit_code())
        }
        Outcome::Interrupted(signal) => ExitCode::from(128 + signal as u8),
    })
}

fn boot(args: &RunArgs) -> anyhow::Result<Vm> {
    let open = |what: &str, path: &Path| {
        File::open(path).with_context(|| format!("cannot open the {what} {}; check the path", path.display()))
    };
    let kernel = args.kernel().map(|path| open("kernel", path)).transpose()?;
    let initrd = match &args.initrd {
        Some(path) => Some(open("initrd", path)?),
        None => initrd::make(args)?,
    };
    let name = args.kernel().map_or("demo".into(), |path| path.to_string_lossy());
    let boot = BootRequest {
        kernel: kernel.as_ref().map_or(Image::Bytes(trapline_guests::demo()), Image::File),
        name: &name,
        initrd: initrd.as_ref().map(Image::File),
        cmdline: args.cmdline(),
        cpus: args.cpus(),
        ap_start: args.ap_start.into(),
        protocol: args.boot_protocol.map(Into::into),
    };
    let console = match &args.console {
        ConsoleTarget::Stdio => Console::new(Unbuffered(io::stdout())),
        ConsoleTarget::None => Console::new(io::sink()),
        ConsoleTarget::File(path) => Console::new(
            File::create(path)
                .with_context(|| format!("cannot write the console to {}; choose another file", path.display()))?,
        ),
    };
    Ok(Vm::boot(VmConfig { memory: args.memory, boot, console, arm_hook: None })?)
}

/// Stdout without waiting for the end of a line: a guest's prompt has none.
struct Unbuffered(io::Stdout);

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
struct Symbols {
    path: String,
    /// The built-in guest has no file of its own; this one goes away with the run.
    _demo: Option<NamedTempFile>,
}

impl Symbols {
    fn of(args: &RunArgs) -> anyhow::Result<Self> {
        match (args.kernel(), &args.gdb) {
            (None, Some(_)) => {
                let write = || -> io::Result<NamedTempFile> {
                    let mut file = tempfile::Builder::new().prefix("trapline-demo-").suffix(".elf").tempfile()?;
                    file.write_all(trapline_guests::demo())?;
                    Ok(file)
                };
                let file = write().context("cannot write the demo guest's symbols to the temporary directory")?;
                Ok(Self { path: file.path().display().to_string(), _demo: Some(file) })
            }
            (Some(path), _) if is_elf(path) => Ok(Self { path: path.display().to_string(), _demo: None }),
            _ => Ok(Self { path: "vmlinux".to_owned(), _demo: None }),
        }
    }
}

fn is_elf(path: &Path) -> bool {
    let mut magic = [0; 4];
    File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *b"\x7fELF"
}

/// Everything that the loop looks after.
struct Session {
    vm: Target<Vm>,
    stub: Option<Stub>,
    /// The user's wish, from within the console, to end the run.
    quit: Option<EventFd>,
    timer: TimerFd,
    timeout: Option<Duration>,
    signals: [(i32, UnixStream); 3],
    /// What the loop has come to, or what went wrong inside of an event handler.
    outcome: Option<anyhow::Result<Outcome>>,
}

impl Session {
    fn new(vm: Vm, stub: Option<Stub>, args: &RunArgs) -> anyhow::Result<Self> {
        let listen = |signal: i32| -> io::Result<(i32, UnixStream)> {
            let (receiver, sender) = UnixStream::pair()?;
            receiver.set_nonblocking(true)?;
            signal_hook::low_level::pipe::register(signal, sender)?;
            Ok((signal, receiver))
        };
        let signals = [listen(SIGINT)?, listen(SIGTERM)?, listen(SIGHUP)?];
        let mut timer = TimerFd::new().map_err(io::Error::from)?;
        if let Some(time) = args.timeout {
            timer.reset(time, None).map_err(io::Error::from)?;
        }
        Ok(Self { vm: Target::new(vm), stub, quit: None, timer, timeout: args.timeout, signals, outcome: None })
    }

    /// Says what a user needs to know to go on, on stderr.
    fn announce(&self, args: &RunArgs, symbols: &Symbols, is_terminal: bool) -> anyhow::Result<()> {
        if let Some(stub) = &self.stub {
            let command = stub.listening().to_string().replacen("gdb", &format!("gdb {}", symbols.path), 1);
            eprintln!("trapline: {command}");
            if args.wait {
                eprintln!("trapline: the guest stands at its first instruction until gdb continues it");
            }
        }
        if is_terminal {
            eprintln!("trapline: the terminal is the guest's console; Ctrl-A x ends the run");
        }
        Ok(())
    }

    fn run(mut self, args: &RunArgs) -> anyhow::Result<Outcome> {
        if !args.wait {
            self.go()?;
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

    fn go(&mut self) -> anyhow::Result<()> {
        let plan = ResumePlan::all(self.vm.vcpus(), RunMode::Continue);
        if let Some(stop) = self.vm.resume(&plan)? {
            self.stopped(stop)?;
        }
        Ok(())
    }

    /// A stop, with the world parked: the debugger's to look at, or else the verdict.
    fn stopped(&mut self, stop: Stop) -> anyhow::Result<()> {
        if let Some(stub) = self.stub.as_mut().filter(|stub| stub.is_attached()) {
            stub.stopped(stop, &mut self.vm)?;
            self.look_for_the_end();
            return Ok(());
        }
        match Verdict::of_stop(&stop.reason) {
            Some(verdict) => self.outcome = Some(Ok(Outcome::Verdict(verdict))),
            None => self.go()?,
        }
        Ok(())
    }

    /// After every call of the stub: a debugger may have ended the run, or been told of its end.
    fn look_for_the_end(&mut self) {
        if let Some(ending) = self.vm.ended() {
            self.outcome = Some(Ok(Outcome::Verdict(Verdict::from(ending))));
        }
    }

    /// Ends the run from outside.
    fn end(&mut self, outcome: Outcome) -> anyhow::Result<()> {
        self.vm.kill();
        if let Some(stub) = &mut self.stub {
            let stop = Stop::new(VcpuId(0), StopReason::Ended(Ending::Killed));
            stub.stopped(stop, &mut self.vm)?;
        }
        self.outcome = Some(Ok(outcome));
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
            self.end(Outcome::Interrupted(*signal))?;
        } else if fd == self.timer.as_raw_fd() {
            let time = self.timeout.unwrap_or_default();
            self.end(Outcome::Verdict(Verdict::TimedOut(time)))?;
        } else if self.quit.as_ref().is_some_and(|quit| quit.as_raw_fd() == fd) {
            self.end(Outcome::Interrupted(SIGINT))?;
        } else if let Some(stub) = &mut self.stub {
            stub.ready(&mut self.vm)?;
            self.look_for_the_end();
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
        for fd in fixed.into_iter().chain(signals).chain(quit).chain(stub) {
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
            self.outcome = Some(Err(error));
        }
    }
}
