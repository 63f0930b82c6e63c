//! The gdb stub in the event loop.
//!
//! The server's sockets come and go inside of its own calls, so they are polled by an epoll of
//! their own, which forgets a closed descriptor by itself; the loop polls that epoll.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use anyhow::Context;
use trapline_gdbstub_glue::{Address, DebuggeeError, Listening, Outcome, Server, Target};
use trapline_vmm::Vm;
use trapline_vmm::debug::Stop;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Descriptors looked at in one turn of the loop; the others wait for the next.
const EVENTS_PER_TURN: usize = 4;
/// How long a debugger may take to read its last packet: so many turns of so much.
const GOODBYE_TURNS: u32 = 100;
const GOODBYE_TURN: Duration = Duration::from_millis(10);

/// The server and what it waits for.
pub(crate) struct Stub {
    server: Server<Vm>,
    epoll: Epoll,
    /// What is watched now: descriptor, connection, events.
    watched: Vec<(RawFd, u64, EventSet)>,
}

impl Stub {
    pub(crate) fn listen(address: &Address, expose: bool) -> anyhow::Result<Self> {
        let server = Server::listen(address, expose)?;
        let epoll = Epoll::new().context("cannot make an epoll; raise the limit of open files (ulimit -n)")?;
        let mut stub = Self { server, epoll, watched: Vec::new() };
        stub.watch()?;
        Ok(stub)
    }

    pub(crate) fn listening(&self) -> &Listening {
        self.server.listening()
    }

    /// Readable when [`ready`](Self::ready) has something to do.
    pub(crate) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Whether a debugger is attached and so owns the guest's stops.
    pub(crate) fn is_attached(&self) -> bool {
        self.server.is_attached()
    }

    /// Serves whatever sockets are ready.
    pub(crate) fn ready(&mut self, vm: &mut Target<Vm>) -> anyhow::Result<()> {
        let mut events = [EpollEvent::default(); EVENTS_PER_TURN];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error).context("the stub's event loop failed"),
        };
        for event in &events[..count] {
            log(self.server.on_ready(event.fd(), vm));
        }
        self.watch()
    }

    /// Tells the debugger about a stop.
    pub(crate) fn stopped(&mut self, stop: Stop, vm: &mut Target<Vm>) -> anyhow::Result<()> {
        log(self.server.on_stop(stop, vm));
        self.watch()
    }

    /// Gives a debugger a moment to take its last packet.
    pub(crate) fn say_goodbye(&mut self, vm: &mut Target<Vm>) {
        for _ in 0..GOODBYE_TURNS {
            if !self.server.has_output() || self.ready(vm).is_err() {
                return;
            }
            std::thread::sleep(GOODBYE_TURN);
        }
    }

    /// Brings epoll up to date with what the server waits for.
    fn watch(&mut self) -> anyhow::Result<()> {
        let wanted: Vec<(RawFd, u64, EventSet)> = self
            .server
            .interests()
            .map(|interest| {
                let mut events = EventSet::empty();
                events.set(EventSet::IN, interest.readable);
                events.set(EventSet::OUT, interest.writable);
                (interest.fd, interest.id, events)
            })
            .collect();
        for &(fd, id, events) in &wanted {
            let operation = match self.watched.iter().find(|have| (have.0, have.1) == (fd, id)) {
                Some(have) if have.2 == events => continue,
                Some(_) => ControlOperation::Modify,
                None => ControlOperation::Add,
            };
            let event = EpollEvent::new(events, fd as u64);
            self.epoll.ctl(operation, fd, event).context("the stub's event loop cannot watch a socket")?;
        }
        self.watched = wanted;
        Ok(())
    }
}

/// What the stub came to is read from the machine; for a person it is a line in the log. A guest
/// that could not be let go when its debugger went is not lost: the next one finds it.
fn log(outcome: Result<Outcome, DebuggeeError>) {
    match outcome {
        Ok(Outcome::Continue) => {}
        Ok(outcome) => tracing::debug!(?outcome, "stub"),
        Err(error) => tracing::warn!("the debugger is gone and the guest could not be let go: {error}"),
    }
}
