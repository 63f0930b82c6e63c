//! The stub's sockets: one listener, one client.
//!
//! Nothing here blocks and nothing here waits: the owner of an event loop asks for the
//! [interests](Server::interests), polls, and calls back. A client that does not read is not
//! listened to; it cannot hold up the guest.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use trapline_vmm::debug::Stop;

use crate::adapter::Adapter;
use crate::address::{Address, AddressError, Listening, ListeningSocket};
use crate::debuggee::{Debuggee, DebuggeeError};
use crate::framing::encode;
use crate::limits::{ACCEPTS_PER_EVENT, INPUT_CHUNK, LEAVING, OUTPUT_LIMIT, READS_BEFORE_REFUSAL};
use crate::session::{Flow, Session};
use crate::target::Target;

/// What a call has come to, for the owner of the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// Nothing that concerns the owner.
    Continue,
    /// A debugger has attached: the guest is stopped.
    Attached,
    /// The debugger is gone, politely or not. The guest runs, and nothing that the debugger had
    /// set is left.
    Detached,
    /// The debugger has ended the guest ([`Debuggee::kill`] was called).
    Killed,
    /// The debugger was told how the run ended, and is gone.
    Ended,
}

impl Outcome {
    /// What two calls in a row have come to: the later one, unless it is nothing, or the run was
    /// over already.
    fn and(self, later: Outcome) -> Outcome {
        match (self, later) {
            (Outcome::Killed | Outcome::Ended, _) | (_, Outcome::Continue) => self,
            (_, later) => later,
        }
    }
}

/// A file descriptor to poll, level-triggered. Hang-up and error conditions count as ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interest {
    /// What to poll.
    pub fd: RawFd,
    /// Unique to the connection: the operating system gives the number of a closed descriptor to
    /// the next one, which has to be registered anew.
    pub id: u64,
    /// Wait for input.
    pub readable: bool,
    /// Wait until output can be written.
    pub writable: bool,
}

/// The stub: a listener and at most one client.
///
/// The guest never ends because of a client, unless the client asks for it.
pub struct Server<D: Debuggee> {
    listening: Listening,
    client: Option<Client<D>>,
    /// Connections that have no say any more.
    leaving: VecDeque<Leaving>,
    /// Connections so far.
    connections: u64,
}

struct Client<D: Debuggee> {
    stream: Stream,
    id: u64,
    session: Session<D>,
    /// Received, but not answered because the client has to read first.
    input: Vec<u8>,
}

/// A connection on its way out: it gets our last words, and stays until the other side has
/// closed too. Closed at once, it would turn what the other side is just sending into an error,
/// and our last words with it.
struct Leaving {
    stream: Stream,
    id: u64,
    /// Our last words.
    output: Vec<u8>,
    /// They are due only when the other side has said something.
    waits: bool,
    finished: bool,
}

impl<D: Debuggee> Server<D> {
    /// Listens. An address that other machines can reach needs `expose`.
    pub fn listen(address: &Address, expose: bool) -> Result<Self, AddressError> {
        Ok(Self { listening: address.listen(expose)?, client: None, leaving: VecDeque::new(), connections: 0 })
    }

    /// Where it listens, with the real port; displays as the gdb command line to paste.
    pub fn listening(&self) -> &Listening {
        &self.listening
    }

    /// Whether a debugger is attached and so owns the guest's stops.
    pub fn is_attached(&self) -> bool {
        self.client.as_ref().is_some_and(|c| c.session.is_attached())
    }

    /// Whether something is left to be sent. Worth a short wait before the process ends.
    pub fn has_output(&self) -> bool {
        self.leaving.iter().any(|l| !l.output.is_empty())
            || self.client.as_ref().is_some_and(|c| c.session.pending() > 0)
    }

    /// What to poll. Ask again after every call: it changes.
    pub fn interests(&self) -> impl Iterator<Item = Interest> {
        let listener = Interest { fd: self.listening.fd(), id: 0, readable: true, writable: false };
        let client = self.client.as_ref().map(|c| Interest {
            fd: c.stream.fd(),
            id: c.id,
            readable: !c.session.is_choked(),
            writable: c.session.pending() > 0,
        });
        let leaving = self.leaving.iter().map(|l| Interest {
            fd: l.stream.fd(),
            id: l.id,
            readable: true,
            writable: !l.output.is_empty() && !l.waits,
        });
        [Some(listener), client].into_iter().flatten().chain(leaving)
    }

    /// Something can be done with `fd`. A descriptor that is not (any more) the server's does
    /// nothing.
    ///
    /// # Errors
    /// Only if the guest could not be let go after its debugger was gone.
    pub fn on_ready(&mut self, fd: RawFd, target: &mut Target<D>) -> Result<Outcome, DebuggeeError> {
        if fd == self.listening.fd() {
            return self.accept(target);
        }
        if let Some(at) = self.leaving.iter().position(|l| l.stream.fd() == fd) {
            if self.leaving[at].ready().is_err() {
                self.leaving.remove(at);
            }
            return Ok(Outcome::Continue);
        }
        match &mut self.client {
            Some(client) if client.stream.fd() == fd => {
                let was_attached = client.session.is_attached();
                let flow = client.ready(&mut target.0);
                let newly = !was_attached && client.session.is_attached();
                self.follow(flow, newly, target)
            }
            _ => Ok(Outcome::Continue),
        }
    }

    /// The world has stopped, for this reason. Without an attached debugger nothing happens:
    /// ask [`is_attached`](Self::is_attached) whose stop it is.
    ///
    /// # Errors
    /// As [`on_ready`](Self::on_ready).
    pub fn on_stop(&mut self, stop: Stop, target: &mut Target<D>) -> Result<Outcome, DebuggeeError> {
        let Some(client) = self.client.as_mut().filter(|c| c.session.is_attached()) else {
            return Ok(Outcome::Continue);
        };
        let flow = match client.session.stopped(stop, &mut target.0) {
            Flow::On => client.flush().map_or_else(Flow::Lost, |()| Flow::On),
            flow => flow,
        };
        self.follow(flow, false, target)
    }

    /// Sends the debugger away, if there is one, and lets the guest run.
    ///
    /// # Errors
    /// As [`on_ready`](Self::on_ready).
    pub fn disconnect(&mut self, target: &mut Target<D>) -> Result<Outcome, DebuggeeError> {
        self.follow(Flow::Lost("disconnected by us".into()), false, target)
    }

    fn accept(&mut self, target: &mut Target<D>) -> Result<Outcome, DebuggeeError> {
        let mut outcome = Outcome::Continue;
        for _ in 0..ACCEPTS_PER_EVENT {
            let stream = match self.listening.accept() {
                Ok(stream) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::warn!("cannot accept a debugger: {error}");
                    break;
                }
            };
            // The one before may be gone, its end unread behind its last packets: a gdb that was
            // killed and started again is not a second one.
            for _ in 0..READS_BEFORE_REFUSAL {
                let Some(fd) = self.client.as_ref().map(|client| client.stream.fd()) else { break };
                outcome = outcome.and(self.on_ready(fd, target)?);
            }
            self.connections += 1;
            let id = self.connections;
            if self.is_attached() {
                tracing::info!("a second debugger is refused");
                let mut output = vec![b'+'];
                encode(REFUSAL, &mut output);
                self.leave(Leaving { stream, id, output, waits: true, finished: false });
                continue;
            }
            // Whoever connected before and has not said anything is not a debugger.
            match Session::new(&mut target.0) {
                Ok(session) => {
                    self.client = Some(Client { stream, id, session, input: Vec::new() });
                }
                Err(error) => {
                    tracing::warn!("cannot serve a debugger: {error}");
                    continue;
                }
            }
            // Its first packet is often there already.
            if let Some(fd) = self.client.as_ref().map(|c| c.stream.fd()) {
                outcome = outcome.and(self.on_ready(fd, target)?);
            }
        }
        Ok(outcome)
    }

    fn follow(&mut self, flow: Flow, newly: bool, target: &mut Target<D>) -> Result<Outcome, DebuggeeError> {
        if flow == Flow::On {
            if newly {
                tracing::info!("a debugger has attached");
            }
            return Ok(if newly { Outcome::Attached } else { Outcome::Continue });
        }
        let Some(mut client) = self.client.take() else { return Ok(Outcome::Continue) };
        let attached = client.session.is_attached();
        let output = std::mem::take(client.session.output());
        self.leave(Leaving { stream: client.stream, id: client.id, output, waits: false, finished: false });
        match flow {
            Flow::On => Ok(Outcome::Continue),
            Flow::Killed => {
                tracing::info!("the debugger has killed the guest");
                Ok(Outcome::Killed)
            }
            Flow::Ended => Ok(Outcome::Ended),
            Flow::Detached => {
                tracing::info!("the debugger has detached; the guest runs");
                Ok(Outcome::Detached)
            }
            Flow::Lost(_) if !attached => Ok(Outcome::Continue),
            Flow::Lost(why) => {
                tracing::warn!("the debugger is gone ({why}); its breakpoints are removed and the guest runs");
                target.detach()?;
                Ok(Outcome::Detached)
            }
        }
    }

    fn leave(&mut self, mut leaving: Leaving) {
        if leaving.ready().is_ok() {
            if self.leaving.len() == LEAVING {
                self.leaving.pop_front();
            }
            self.leaving.push_back(leaving);
        }
    }
}

/// What a second debugger shows as the reply to its first packet.
const REFUSAL: &[u8] = b"E.trapline.another debugger is attached; detach it first";

impl Leaving {
    /// Reads what is of no interest any more, and writes. An error is the end.
    fn ready(&mut self) -> io::Result<()> {
        match self.stream.read(&mut [0; INPUT_CHUNK]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => self.waits = false,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
        if !self.waits && !self.finished {
            write_out(&mut self.stream, &mut self.output)?;
            if self.output.is_empty() {
                self.finished = true;
                self.stream.finish()?;
            }
        }
        Ok(())
    }
}

impl<D: Debuggee> Client<D> {
    /// Writes, reads once, answers.
    fn ready(&mut self, target: &mut Adapter<D>) -> Flow {
        let mut may_read = true;
        loop {
            if let Err(why) = self.flush() {
                return Flow::Lost(why);
            }
            if self.session.is_choked() {
                return Flow::On;
            }
            if self.input.is_empty() {
                if !std::mem::take(&mut may_read) {
                    return Flow::On;
                }
                match self.read() {
                    Ok(true) => {}
                    Ok(false) => return Flow::On,
                    Err(why) => return Flow::Lost(why),
                }
            }
            let (taken, flow) = self.session.receive(&self.input, target);
            self.input.drain(..taken);
            if flow != Flow::On {
                return flow;
            }
        }
    }

    fn read(&mut self) -> Result<bool, String> {
        let mut chunk = [0; INPUT_CHUNK];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err("it closed the connection".into()),
                Ok(n) => {
                    self.input.extend_from_slice(&chunk[..n]);
                    return Ok(true);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    fn flush(&mut self) -> Result<(), String> {
        write_out(&mut self.stream, self.session.output()).map_err(|error| error.to_string())?;
        if self.session.pending() > OUTPUT_LIMIT { Err("it does not read".into()) } else { Ok(()) }
    }
}

/// Writes as much as the socket takes and removes it from `output`.
fn write_out(stream: &mut Stream, output: &mut Vec<u8>) -> io::Result<()> {
    let mut written = 0;
    let result = loop {
        if written == output.len() {
            break Ok(());
        }
        match stream.write(&output[written..]) {
            Ok(0) => break Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => written += n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => break Err(error),
        }
    };
    output.drain(..written);
    result
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn fd(&self) -> RawFd {
        match self {
            Stream::Tcp(stream) => stream.as_raw_fd(),
            Stream::Unix(stream) => stream.as_raw_fd(),
        }
    }

    /// Nothing more will be written.
    fn finish(&self) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Stream::Unix(stream) => stream.shutdown(Shutdown::Write),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.read(into),
            Stream::Unix(stream) => stream.read(into),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.write(bytes),
            Stream::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Listening {
    fn fd(&self) -> RawFd {
        match &self.socket {
            ListeningSocket::Tcp(listener) => listener.as_raw_fd(),
            ListeningSocket::Unix(listener) => listener.as_raw_fd(),
        }
    }

    fn accept(&self) -> io::Result<Stream> {
        match &self.socket {
            ListeningSocket::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            ListeningSocket::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Ok(Stream::Unix(stream))
            }
        }
    }
}
