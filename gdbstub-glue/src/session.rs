//! One client: bytes in, bytes out, and what that does to the debuggee.
//!
//! No socket in here. The first whole packet attaches, which stops the world: a port scanner does
//! not. From then on the session is stopped or running:
//!
//! ```text
//!   Silent ─ first packet ─► Stopped ── vCont, c, s ──► debuggee.resume ──► Running
//!                               ▲                              │               │
//!                               │                       a pending stop   stop or Ctrl-C
//!                               │                              ▼               ▼
//!                               └──────────────────────────── T.. reply ◄──────┘
//!   D, k, vKill, the guest's end, a lost engine: from everywhere to the end
//! ```

use std::collections::VecDeque;

use trapline_vmm::debug::{Stop, StopReason};

use crate::adapter::Adapter;
use crate::debuggee::Debuggee;
use crate::engine::{Engine, EngineError};
use crate::framing::{Event, Receiver, encode};
use crate::front::{Front, Kind, Verdict};
use crate::limits::OUTPUT_HIGH_WATER;
use crate::packet;
use crate::stop::{console, words};

/// How a session goes on after an input or a stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Flow {
    /// It goes on.
    On,
    /// The client detached. The guest runs already.
    Detached,
    /// The client killed the guest.
    Killed,
    /// The run is over and the client knows.
    Ended,
    /// The conversation cannot go on, for this reason.
    Lost(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nothing was said yet.
    Silent,
    Stopped,
    Running,
}

/// One client's conversation.
pub(crate) struct Session<D: Debuggee> {
    receiver: Receiver,
    front: Front,
    engine: Engine<D>,
    acks: bool,
    phase: Phase,
    /// Ctrl-C came while the guest was stopped, as it does when a client resumes and stops
    /// by itself over and over (a false condition, `next`): the next resumption is where it stops.
    interrupt: bool,
    /// A stop that was told while the client thinks the guest is stopped. Its turn is at the
    /// next resumption.
    waiting: VecDeque<Stop>,
    /// The last packet sent, for a client that wants it again.
    last: Vec<u8>,
    output: Vec<u8>,
}

impl<D: Debuggee> Session<D> {
    /// A session whose client has not said anything.
    pub(crate) fn new(target: &mut Adapter<D>) -> Result<Self, EngineError> {
        Ok(Self {
            receiver: Receiver::new(),
            front: Front::new(),
            engine: Engine::new(target)?,
            acks: true,
            phase: Phase::Silent,
            interrupt: false,
            waiting: VecDeque::new(),
            last: Vec::new(),
            output: Vec::new(),
        })
    }

    /// Whether the client has stopped the world, so that somebody has to let it go again.
    pub(crate) fn is_attached(&self) -> bool {
        self.phase != Phase::Silent
    }

    /// What is to be sent. Whoever sends it removes it.
    pub(crate) fn output(&mut self) -> &mut Vec<u8> {
        &mut self.output
    }

    /// Bytes that are to be sent.
    pub(crate) fn pending(&self) -> usize {
        self.output.len()
    }

    /// Whether the client has to read before it is listened to.
    pub(crate) fn is_choked(&self) -> bool {
        self.output.len() >= OUTPUT_HIGH_WATER
    }

    /// Takes bytes until one ends the session or the output is full; returns how many.
    pub(crate) fn receive(&mut self, bytes: &[u8], target: &mut Adapter<D>) -> (usize, Flow) {
        for (taken, &byte) in bytes.iter().enumerate() {
            if self.is_choked() {
                return (taken, Flow::On);
            }
            let flow = match self.receiver.push(byte) {
                None => continue,
                Some(event) => self.event(event, target),
            };
            if flow != Flow::On {
                return (taken + 1, flow);
            }
        }
        (bytes.len(), Flow::On)
    }

    /// The world has stopped.
    pub(crate) fn stopped(&mut self, stop: Stop, target: &mut Adapter<D>) -> Flow {
        if self.phase != Phase::Running {
            self.waiting.push_back(stop);
            return Flow::On;
        }
        self.report(stop, target)
    }

    fn attach(&mut self, target: &mut Adapter<D>) -> Result<(), String> {
        let stop = target.stop().map_err(|error| format!("the guest cannot be stopped: {error}"))?;
        target.begin(stop);
        self.phase = Phase::Stopped;
        Ok(())
    }

    fn event(&mut self, event: Event, target: &mut Adapter<D>) -> Flow {
        match event {
            Event::Ack => Flow::On,
            Event::Nack => {
                // What is still on its way cannot have been received badly.
                if self.acks && self.output.is_empty() {
                    self.output.extend_from_slice(&self.last);
                }
                Flow::On
            }
            Event::BadChecksum if self.acks => {
                self.output.push(b'-');
                Flow::On
            }
            Event::BadChecksum => self.decide_refused("the checksum is wrong"),
            Event::Oversized => {
                self.acknowledge();
                self.decide_refused("the packet is longer than PacketSize")
            }
            Event::Interrupt => {
                // If another event wins the race, the client may resume without asking anybody
                // (a false condition); then the interrupt is still due.
                self.interrupt = self.phase != Phase::Silent;
                if self.phase != Phase::Running {
                    return Flow::On;
                }
                match target.stop() {
                    Ok(stop) => self.report(stop, target),
                    Err(error) => Flow::Lost(format!("the guest cannot be stopped: {error}")),
                }
            }
            Event::Packet(body) => {
                self.acknowledge();
                if self.phase == Phase::Silent
                    && let Err(why) = self.attach(target)
                {
                    tracing::warn!("a debugger cannot attach: {why}");
                    let reply = self.front.resume_error(&why);
                    self.send(&reply);
                    return Flow::Lost(why);
                }
                let packet = packet::parse(&body);
                tracing::trace!(body = %body.escape_ascii(), ?packet, "from the client");
                let verdict = if self.phase == Phase::Running {
                    self.front.admit_running(packet)
                } else {
                    self.front.admit(packet, target)
                };
                self.decide(verdict, target)
            }
        }
    }

    fn decide(&mut self, verdict: Verdict, target: &mut Adapter<D>) -> Flow {
        match verdict {
            Verdict::Reply(reply) => self.send(&reply),
            Verdict::Serve(packet, kind) => return self.serve(&packet, kind, target),
            Verdict::Resume(packet) => return self.resume(&packet, target),
            Verdict::Detach => match target.detach() {
                Ok(()) => {
                    self.send(b"OK");
                    return Flow::Detached;
                }
                Err(error) => self.send(&self.front.resume_error(&error.0)),
            },
            Verdict::Kill { reply } => {
                target.kill();
                if reply {
                    self.send(b"OK");
                }
                return Flow::Killed;
            }
        }
        Flow::On
    }

    fn decide_refused(&mut self, why: &str) -> Flow {
        if let Verdict::Reply(reply) = self.front.refuse(why) {
            self.send(&reply);
        }
        Flow::On
    }

    fn serve(&mut self, packet: &[u8], kind: Kind, target: &mut Adapter<D>) -> Flow {
        let mut replies = match self.engine.serve(packet, target) {
            Ok(replies) => replies,
            Err(error) => return Flow::Lost(error.to_string()),
        };
        let Some(last) = replies.pop() else { return Flow::Lost("the gdb protocol engine gave no reply".into()) };
        // What comes before the reply proper is console output.
        replies.iter().for_each(|reply| self.send(reply));
        let reply = self.front.finish(last, kind, target);
        self.send(&reply);
        if kind == Kind::NoAcks {
            self.acks = false;
        }
        Flow::On
    }

    fn resume(&mut self, packet: &[u8], target: &mut Adapter<D>) -> Flow {
        if let Some(stop) = self.waiting.pop_front() {
            return self.report(stop, target);
        }
        if std::mem::take(&mut self.interrupt) {
            let stop = Stop::new(target.view.selected, StopReason::Interrupted);
            return self.report(stop, target);
        }
        if let Err(error) = self.engine.serve(packet, target) {
            return Flow::Lost(error.to_string());
        }
        match target.view.resumed.take() {
            Some(Ok(None)) => {
                self.phase = Phase::Running;
                self.front.resumed();
                Flow::On
            }
            Some(Ok(Some(stop))) => {
                if let Err(error) = self.engine.stopped(target) {
                    return Flow::Lost(error.to_string());
                }
                self.report(stop, target)
            }
            Some(Err(error)) => {
                // gdb takes an error here as "it did not go on".
                self.send(&self.front.resume_error(&error.0));
                self.engine.stopped(target).map_or_else(|e| Flow::Lost(e.to_string()), |()| Flow::On)
            }
            None => Flow::Lost("the gdb protocol engine did not resume".into()),
        }
    }

    /// Tells the client of a stop, in the middle of or instead of a run.
    fn report(&mut self, stop: Stop, target: &mut Adapter<D>) -> Flow {
        self.front.resumed();
        if stop.reason == StopReason::Interrupted {
            self.interrupt = false;
        }
        let ended = matches!(stop.reason, StopReason::Ended(_));
        let words = words(&stop);
        target.view.stopped(stop);
        if std::mem::replace(&mut self.phase, Phase::Stopped) == Phase::Running
            && let Err(error) = self.engine.stopped(target)
        {
            return Flow::Lost(error.to_string());
        }
        if let Some(words) = words {
            self.send(&console(&words));
        }
        let reply = self.front.stop_reply(target);
        self.send(&reply);
        if ended { Flow::Ended } else { Flow::On }
    }

    fn acknowledge(&mut self) {
        if self.acks {
            self.output.push(b'+');
        }
    }

    fn send(&mut self, body: &[u8]) {
        tracing::trace!(body = %body.escape_ascii(), "to the client");
        self.last.clear();
        encode(body, &mut self.last);
        self.output.extend_from_slice(&self.last);
    }
}
