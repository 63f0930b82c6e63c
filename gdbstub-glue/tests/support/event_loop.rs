//! The event loop of a VMM, around the fake machine.

use std::collections::HashMap;
use std::os::fd::RawFd;

use trapline_gdbstub_glue::{Debuggee, Interest, Outcome, Server, Target};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::fake::Fake;

/// Polls what the server is interested in.
pub struct Poller {
    epoll: Epoll,
    registered: HashMap<RawFd, (u64, EventSet)>,
}

impl Poller {
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { epoll: Epoll::new()?, registered: HashMap::new() })
    }

    /// Waits for at most `milliseconds` (-1: for ever) and returns what is ready.
    pub fn wait(
        &mut self,
        interests: impl Iterator<Item = Interest>,
        milliseconds: i32,
    ) -> std::io::Result<Vec<RawFd>> {
        let mut wanted = HashMap::new();
        for interest in interests {
            let mut events = EventSet::empty();
            events.set(EventSet::IN, interest.readable);
            events.set(EventSet::OUT, interest.writable);
            wanted.insert(interest.fd, (interest.id, events));
            let operation = match self.registered.get(&interest.fd) {
                Some(&(id, known)) if id == interest.id && known == events => continue,
                Some(&(id, _)) if id == interest.id => ControlOperation::Modify,
                // A closed descriptor leaves the epoll by itself.
                _ => ControlOperation::Add,
            };
            self.epoll.ctl(operation, interest.fd, EpollEvent::new(events, interest.fd as u64))?;
        }
        self.registered = wanted;
        let mut ready = [EpollEvent::default(); 8];
        loop {
            match self.epoll.wait(milliseconds, &mut ready) {
                Ok(count) => return Ok(ready[..count].iter().map(|e| e.data() as RawFd).collect()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Runs the machine and serves the debugger until the guest ends, or `until` says so.
pub fn serve(
    server: &mut Server<Fake>,
    target: &mut Target<Fake>,
    mut until: impl FnMut(&mut Target<Fake>, Outcome) -> bool,
) -> std::io::Result<Outcome> {
    let mut poller = Poller::new()?;
    loop {
        // While the guest runs, its threads do: look at the sockets in between.
        let milliseconds = if target.is_running() { 0 } else { 20 };
        for fd in poller.wait(server.interests(), milliseconds)? {
            let outcome = server.on_ready(fd, target).map_err(std::io::Error::other)?;
            if matches!(outcome, Outcome::Killed | Outcome::Ended) || until(target, outcome) {
                return Ok(outcome);
            }
        }
        if let Some(stop) = target.run(200) {
            if !server.is_attached() {
                target.detach().map_err(std::io::Error::other)?;
                continue;
            }
            let outcome = server.on_stop(stop, target).map_err(std::io::Error::other)?;
            if matches!(outcome, Outcome::Killed | Outcome::Ended) || until(target, outcome) {
                return Ok(outcome);
            }
        }
        if until(target, Outcome::Continue) {
            return Ok(Outcome::Continue);
        }
    }
}
