//! A client that is no debugger: it says what a test wants, and writes down what is said.
//!
//! Client, server and machine live on one thread. After each thing that is said the server is
//! called until nothing is left to do, so a transcript does not depend on time.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use trapline_gdbstub_glue::{Address, Outcome, Server, Target};
use trapline_vmm::debug::{Stop, StopReason, VcpuId};

use super::event_loop::Poller;
use super::fake::{Fake, Seen};

/// A machine, its server, and at most one client.
pub struct Conversation {
    pub server: Server<Fake>,
    pub target: Target<Fake>,
    poller: Poller,
    path: PathBuf,
    _dir: tempfile::TempDir,
    client: Option<UnixStream>,
    received: Vec<u8>,
    pub outcomes: Vec<Outcome>,
    /// What was said, one line each.
    pub transcript: String,
}

impl Conversation {
    /// Nobody has connected; the guest runs.
    pub fn new(vcpus: usize) -> Self {
        Self::with(Fake::new(vcpus))
    }

    pub fn with(fake: Fake) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gdb.sock");
        Self {
            server: Server::listen(&Address::Unix(path.clone()), false).unwrap(),
            target: Target::new(fake),
            poller: Poller::new().unwrap(),
            path,
            _dir: dir,
            client: None,
            received: Vec::new(),
            outcomes: Vec::new(),
            transcript: String::new(),
        }
    }

    /// A client that has attached like gdb, without acknowledgements, to four vCPUs at their start.
    pub fn attached() -> Self {
        let mut talk = Self::with(Fake::stopped(4));
        talk.connect();
        talk.say("qSupported:multiprocess+;swbreak+;hwbreak+");
        talk.say("QStartNoAckMode");
        talk.raw(b"+");
        talk.say("?");
        talk.transcript.clear();
        talk
    }

    pub fn seen(&self) -> Seen {
        self.target.seen.lock().unwrap().clone()
    }

    /// Connects, and lets go of the client before.
    pub fn connect(&mut self) {
        self.client = None;
        self.settle();
        self.client = Some(self.another());
        self.received.clear();
        self.settle();
    }

    /// A connection that is not this conversation's.
    pub fn another(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    /// Closes the connection, as the death of a client does.
    pub fn vanish(&mut self) {
        self.client = None;
        self.note("(the client vanishes)");
        self.settle();
    }

    /// Says something and vanishes, as another one connects, all before the server looks.
    pub fn hand_over(&mut self, last_words: &[u8]) -> UnixStream {
        let mut first = self.client.take().unwrap();
        first.write_all(last_words).unwrap();
        drop(first);
        self.another()
    }

    /// Sends a packet and returns what came back, without frames.
    pub fn say(&mut self, body: &str) -> Vec<String> {
        self.say_bytes(body.as_bytes())
    }

    pub fn say_bytes(&mut self, body: &[u8]) -> Vec<String> {
        self.note(&format!("-> {}", body.escape_ascii()));
        self.send(&frame(body));
        self.replies()
    }

    /// The one reply to a packet.
    pub fn ask(&mut self, body: &str) -> String {
        let replies = self.say(body);
        assert_eq!(replies.len(), 1, "{body}: {replies:?}");
        replies.into_iter().next().unwrap_or_default()
    }

    /// Sends bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) -> Vec<String> {
        self.note(&format!("-> bytes {}", bytes.escape_ascii()));
        self.send(bytes);
        self.replies()
    }

    /// Sends bytes and does not look at what comes back.
    pub fn send(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.client.as_mut().map(|c| c.write(rest)) {
                Some(Ok(n)) => rest = &rest[n..],
                Some(Err(e)) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Some(Err(_)) | None => break,
            }
            self.settle();
        }
    }

    /// Sends as much of `bytes` as the socket takes while the client does not read; the server is
    /// called until it wants no more.
    pub fn stuff(&mut self, bytes: &[u8]) -> usize {
        let mut sent = 0;
        while sent < bytes.len() {
            match self.client.as_mut().map(|c| c.write(&bytes[sent..])) {
                Some(Ok(n)) => sent += n,
                _ => break,
            }
            self.settle();
        }
        sent
    }

    /// Lets the machine run.
    pub fn run(&mut self, rounds: usize) -> Vec<String> {
        self.note(&format!("(the guest may run {rounds} rounds)"));
        if let Some(stop) = self.target.run(rounds) {
            self.stop_arrives(stop);
        }
        self.replies()
    }

    /// Something happens to the guest, as far as it runs.
    pub fn happens(&mut self, vcpu: u32, reason: StopReason) -> Vec<String> {
        self.note(&format!("({}: {reason:?})", VcpuId(vcpu)));
        self.target.happens(vcpu, reason);
        if let Some(stop) = self.target.run(1) {
            self.stop_arrives(stop);
        }
        self.replies()
    }

    fn stop_arrives(&mut self, stop: Stop) {
        let outcome = self.server.on_stop(stop, &mut self.target).unwrap();
        self.outcome(outcome);
        self.settle();
    }

    /// Calls the server until nothing is left to do.
    pub fn settle(&mut self) {
        loop {
            let ready: Vec<RawFd> = self.poller.wait(self.server.interests(), 0).unwrap();
            if ready.is_empty() {
                return;
            }
            for fd in ready {
                let outcome = self.server.on_ready(fd, &mut self.target).unwrap();
                self.outcome(outcome);
            }
        }
    }

    fn outcome(&mut self, outcome: Outcome) {
        if outcome != Outcome::Continue {
            self.outcomes.push(outcome);
            self.note(&format!("({outcome:?})"));
        }
    }

    /// What has arrived, without frames.
    pub fn replies(&mut self) -> Vec<String> {
        self.read();
        let replies = unframe(&std::mem::take(&mut self.received));
        for reply in &replies {
            self.note(&format!("<- {reply}"));
        }
        replies
    }

    /// What has arrived, as it came.
    pub fn bytes(&mut self) -> Vec<u8> {
        self.read();
        std::mem::take(&mut self.received)
    }

    /// Whether the server has closed the connection.
    pub fn is_closed(&mut self) -> bool {
        match self.client.as_mut().map(|c| c.read(&mut [0; 1])) {
            Some(Ok(0)) | None => true,
            Some(Ok(_)) => panic!("unread output"),
            Some(Err(e)) => e.kind() != std::io::ErrorKind::WouldBlock,
        }
    }

    fn read(&mut self) {
        let mut chunk = vec![0; 1 << 16];
        loop {
            match self.client.as_mut().map(|c| c.read(&mut chunk)) {
                Some(Ok(n)) if n > 0 => self.received.extend_from_slice(&chunk[..n]),
                _ => return,
            }
            // Room for the server to write more.
            self.settle();
        }
    }

    fn note(&mut self, line: &str) {
        let _ = writeln!(self.transcript, "{line}");
    }
}

/// A packet around `body`.
pub fn frame(body: &[u8]) -> Vec<u8> {
    let sum = body.iter().fold(0u8, |sum, &b| sum.wrapping_add(b));
    [b"$", body, b"#", format!("{sum:02x}").as_bytes()].concat()
}

/// Packets without their frames, checked and with runs expanded; acknowledgements as they are.
pub fn unframe(bytes: &[u8]) -> Vec<String> {
    let mut out = Vec::new();
    let mut rest = bytes;
    while let Some((&first, after)) = rest.split_first() {
        if first != b'$' {
            out.push(char::from(first).to_string());
            rest = after;
            continue;
        }
        let end = after.iter().position(|&b| b == b'#').unwrap_or_else(|| panic!("an unfinished packet"));
        let body = &after[..end];
        assert_eq!(frame(body)[body.len() + 2..], after[end + 1..end + 3], "checksum");
        out.push(expand(body).escape_ascii().to_string());
        rest = &after[end + 3..];
    }
    out
}

fn expand(body: &[u8]) -> Vec<u8> {
    let mut out: Vec<u8> = Vec::new();
    let mut bytes = body.iter();
    while let Some(&b) = bytes.next() {
        match (b, out.last()) {
            (b'*', Some(&last)) => {
                let count = usize::from(*bytes.next().unwrap()) - 29;
                out.extend(std::iter::repeat_n(last, count));
            }
            _ => out.push(b),
        }
    }
    out
}

/// The text in an `O` packet.
pub fn console(reply: &str) -> String {
    let digits = reply.strip_prefix('O').unwrap_or_else(|| panic!("no console output: {reply}"));
    let bytes = (0..digits.len() / 2).map(|i| u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).unwrap());
    String::from_utf8(bytes.collect()).unwrap()
}
