//! The packet level: what is answered here, what goes to gdbstub, and in which words.
//!
//! gdbstub takes any malformed packet for the end of the session and knows neither thread
//! names nor error texts nor why the world stopped. So every packet is parsed here first. What
//! gdbstub serves is written anew in its simplest form, with dead threads, wrong lengths and
//! ambiguous requests already refused; gdbstub never sees a byte of the client's.

use trapline_vmm::debug::VcpuId;

use crate::adapter::{Adapter, tid};
use crate::arch::{FRAME, Register, number};
use crate::debuggee::Debuggee;
use crate::framing::{escape, hex};
use crate::limits::{MEMORY_READ, TEXT};
use crate::packet::{Action, Malformed, Offer, Packet, Point, PointKind, Threads};
use crate::stop::attach_reply;
use crate::threads;

/// What becomes of a packet.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is answered with this.
    Reply(Vec<u8>),
    /// gdbstub serves it, in this form; its reply is treated as that of this kind of packet.
    Serve(Vec<u8>, Kind),
    /// gdbstub resumes with this; the reply is the next stop.
    Resume(Vec<u8>),
    /// The client goes and the guest runs.
    Detach,
    /// The guest ends. `k` has no reply, `vKill` has.
    Kill { reply: bool },
}

/// How a reply of gdbstub's is finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `qSupported`: what the front layer adds is appended.
    Supported,
    /// After it, acknowledgements stop.
    NoAcks,
    /// gdb reads an `E.text` as an error: the words are sent.
    Spoken,
    /// The reply is data: an error must have its number.
    Numbered,
}

/// How this client reads errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ErrorStyle {
    /// `Enn`, and `E.text` where gdb has always read it.
    Gdb,
    /// `E.text` everywhere (gdb 16's `error-message+`).
    GdbEverywhere,
    /// `Enn;hex` (lldb's QEnableErrorStrings).
    Lldb,
}

/// What one client has negotiated and selected.
pub(crate) struct Front {
    pub(crate) offer: Offer,
    errors: ErrorStyle,
    /// `Hc`, for the packets that came before `vCont`.
    resumes: Threads,
    /// The thread list, kept while the client reads it piece by piece.
    thread_list: Vec<u8>,
    /// Nothing was resumed since the attach: being interrupted is not news.
    attached: bool,
}

impl Front {
    pub(crate) fn new() -> Self {
        Self {
            offer: Offer::default(),
            errors: ErrorStyle::Gdb,
            resumes: Threads::Any,
            thread_list: Vec::new(),
            attached: true,
        }
    }

    /// The guest goes on: what was known about it is not true any more.
    pub(crate) fn resumed(&mut self) {
        self.attached = false;
        self.thread_list = Vec::new();
    }

    /// Decides about a packet. The world is stopped.
    pub(crate) fn admit<D: Debuggee>(&mut self, packet: Result<Packet, Malformed>, target: &mut Adapter<D>) -> Verdict {
        let packet = match packet {
            Ok(packet) => packet,
            Err(Malformed(why)) => return self.refuse(why),
        };
        match packet {
            Packet::Supported(offer) => self.supported(offer),
            Packet::NoAcks => serve("QStartNoAckMode", Kind::NoAcks),
            Packet::ErrorStrings => {
                self.errors = ErrorStyle::Lldb;
                ok()
            }
            Packet::WhyStopped => {
                let vcpu = target.view.stop.vcpu;
                target.view.selected = vcpu;
                let registers = target.registers(vcpu).ok();
                Verdict::Reply(if self.attached {
                    attach_reply(&target.view.stop, self.offer, registers.as_ref())
                } else {
                    self.stop_reply(target)
                })
            }
            Packet::ReadFrame => serve("g", Kind::Spoken),
            Packet::WriteFrame(bytes) if bytes.len() != FRAME => {
                self.refuse("G has not the length of the register frame")
            }
            Packet::WriteFrame(bytes) => serve_with("G", &bytes),
            Packet::ReadRegister(number) => match Register::new(number) {
                Some(_) => serve(format!("p{number:x}"), Kind::Spoken),
                None => self.refuse("there is no such register"),
            },
            Packet::WriteRegister(number, value) => match Register::new(number) {
                Some(register) if register.size() == value.len() => serve_with(&format!("P{number:x}="), &value),
                Some(register) => {
                    self.refuse(&format!("{} has {} bytes, not {}", register.name(), register.size(), value.len()))
                }
                None => self.refuse("there is no such register"),
            },
            Packet::ReadMemory { addr, len } => {
                let len = usize::try_from(len).unwrap_or(usize::MAX).min(MEMORY_READ);
                serve(format!("m{addr:x},{len:x}"), Kind::Numbered)
            }
            Packet::WriteMemory { addr, data } => serve_with(&format!("M{addr:x},{:x}:", data.len()), &data),
            Packet::SelectForAccess(threads) => match self.one(threads, target) {
                Ok(vcpu) => {
                    target.view.selected = vcpu;
                    ok()
                }
                Err(refused) => refused,
            },
            Packet::SelectForResume(threads) => match threads {
                Threads::One(id) if target.vcpu(id).is_none() => self.refuse("there is no such thread"),
                threads => {
                    self.resumes = threads;
                    ok()
                }
            },
            Packet::Alive(threads) => match self.one(threads, target) {
                Ok(vcpu) => serve(format!("T{:x}", tid(vcpu)), Kind::Spoken),
                Err(refused) => refused,
            },
            Packet::CurrentThread => Verdict::Reply(format!("QC{}", self.id(target.view.selected)).into_bytes()),
            Packet::FirstThreads => serve("qfThreadInfo", Kind::Numbered),
            Packet::MoreThreads => serve("qsThreadInfo", Kind::Numbered),
            Packet::ThreadExtra(threads) => match self.one(threads, target) {
                Ok(vcpu) => {
                    let mut reply = Vec::new();
                    hex(threads::state(target, vcpu).as_bytes(), &mut reply);
                    Verdict::Reply(reply)
                }
                Err(refused) => refused,
            },
            Packet::Attached => serve("qAttached", Kind::Numbered),
            Packet::ResumeQuery => serve("vCont?", Kind::Numbered),
            Packet::Resume(actions) => self.resume(&actions, target),
            Packet::LegacyResume { action, at } => self.legacy_resume(action, at, target),
            Packet::Point(point) => self.point(point),
            Packet::ConditionalPoint => {
                self.refuse("breakpoint conditions and commands are evaluated by the debugger here")
            }
            Packet::Detach => Verdict::Detach,
            Packet::Kill => Verdict::Kill { reply: false },
            Packet::KillProcess => Verdict::Kill { reply: true },
            Packet::Features { annex, window } => {
                if annex != b"target.xml" {
                    return Verdict::Reply(b"E00".to_vec()); // RSP: a bad annex
                }
                let len = window.end - window.start;
                serve(format!("qXfer:features:read:target.xml:{:x},{len:x}", window.start), Kind::Numbered)
            }
            Packet::ThreadList { window } => {
                if window.start == 0 || self.thread_list.is_empty() {
                    self.thread_list = threads::list(target, self.offer).into_bytes();
                }
                Verdict::Reply(piece(&self.thread_list, window.start, window.end))
            }
            Packet::Monitor(command) => {
                let mut packet = b"qRcmd,".to_vec();
                hex(&command, &mut packet);
                Verdict::Serve(packet, Kind::Numbered) // gdb 13 decodes any other reply as output
            }
            Packet::QemuSupported => Verdict::Reply(b"PhyMemMode".to_vec()),
            Packet::PhysicalQuery => Verdict::Reply(if target.view.physical { b"1".to_vec() } else { b"0".to_vec() }),
            Packet::Physical(on) => {
                target.view.physical = on;
                ok()
            }
            Packet::HostInfo => {
                let mut reply = b"triple:".to_vec();
                hex(b"x86_64-unknown-none", &mut reply);
                reply.extend_from_slice(b";endian:little;ptrsize:8;");
                Verdict::Reply(reply)
            }
            Packet::Unknown => Verdict::Reply(Vec::new()),
        }
    }

    /// Decides about a packet that comes while the guest runs. In all-stop mode a client waits for
    /// the stop; nothing but leaving makes sense in between.
    pub(crate) fn admit_running(&self, packet: Result<Packet, Malformed>) -> Verdict {
        match packet {
            Ok(Packet::Detach) => Verdict::Detach,
            Ok(Packet::Kill) => Verdict::Kill { reply: false },
            Ok(Packet::KillProcess) => Verdict::Kill { reply: true },
            Ok(Packet::Unknown) => Verdict::Reply(Vec::new()),
            _ => self.refuse("the guest runs; interrupt it first"),
        }
    }

    /// Finishes a reply of gdbstub's.
    pub(crate) fn finish<D>(&self, mut reply: Vec<u8>, kind: Kind, target: &mut Adapter<D>) -> Vec<u8> {
        let failure = target.view.failure.take();
        if kind == Kind::Supported {
            reply.extend_from_slice(b";qXfer:threads:read+");
            return reply;
        }
        match (failure, reply.as_slice()) {
            (Some(words), [b'E', a, b]) => {
                let code = [*a, *b];
                self.error(code, &words, kind)
            }
            _ => reply,
        }
    }

    /// The reply for the stop that the world is in.
    pub(crate) fn stop_reply<D: Debuggee>(&self, target: &mut Adapter<D>) -> Vec<u8> {
        let stop = target.view.stop.clone();
        let registers = target.registers(stop.vcpu).ok();
        let software = match stop.reason {
            trapline_vmm::debug::StopReason::Breakpoint(request) => target.view.is_software(request),
            _ => false,
        };
        crate::stop::stop_reply(&stop, software, self.offer, registers.as_ref())
    }

    /// The reply to a packet that cannot be served.
    pub(crate) fn refuse(&self, why: &str) -> Verdict {
        Verdict::Reply(self.error(*b"01", why, Kind::Numbered))
    }

    /// The reply to a resumption that failed.
    pub(crate) fn resume_error(&self, why: &str) -> Vec<u8> {
        self.error(*b"05", why, Kind::Spoken)
    }

    fn error(&self, code: [u8; 2], words: &str, kind: Kind) -> Vec<u8> {
        let mut out = vec![b'E'];
        let words: Vec<u8> = words.bytes().take(TEXT).map(|b| if printable(b) { b } else { b'?' }).collect();
        match (self.errors, kind) {
            (ErrorStyle::Lldb, _) => {
                out.extend_from_slice(&code);
                out.push(b';');
                hex(&words, &mut out);
            }
            (ErrorStyle::GdbEverywhere, _) => {
                out.push(b'.');
                out.extend_from_slice(&words);
            }
            // gdb 13 shows what follows the second dot, and only for Z1.
            (ErrorStyle::Gdb, Kind::Spoken) => {
                out.extend_from_slice(b".trapline.");
                out.extend_from_slice(&words);
            }
            (ErrorStyle::Gdb, _) => out.extend_from_slice(&code),
        }
        out
    }

    fn supported(&mut self, offer: Option<Offer>) -> Verdict {
        if let Some(offer) = offer {
            self.offer = offer;
            if offer.error_message {
                self.errors = ErrorStyle::GdbEverywhere;
            }
        }
        let sign = if self.offer.multiprocess { '+' } else { '-' };
        serve(format!("qSupported:multiprocess{sign}"), Kind::Supported)
    }

    /// The vCPU that a packet about one thread means.
    fn one<D: Debuggee>(&self, threads: Threads, target: &Adapter<D>) -> Result<VcpuId, Verdict> {
        match threads {
            Threads::Any => Ok(target.view.selected),
            Threads::One(id) => target.vcpu(id).ok_or_else(|| self.refuse("there is no such thread")),
            Threads::All => Err(self.refuse("this needs one thread")),
        }
    }

    fn id(&self, vcpu: VcpuId) -> String {
        let process = if self.offer.multiprocess { "p1." } else { "" };
        format!("{process}{:x}", tid(vcpu))
    }

    /// A breakpoint is set or removed.
    ///
    /// The hardware cannot watch for loads alone. gdb makes up for that if it is told that `Z3` is
    /// unknown: it watches for any access and passes over those that changed the value. If `Z3`
    /// succeeds it takes every hit for a load. lldb has nothing like it, and gets the stores too.
    fn point(&self, point: Point) -> Verdict {
        if point.kind == PointKind::Read && point.insert && self.is_gdb() {
            return Verdict::Reply(Vec::new());
        }
        let letter = if point.insert { 'Z' } else { 'z' };
        let kind = char::from(point.kind.digit());
        serve(format!("{letter}{kind},{:x},{:x}", point.addr, point.len), Kind::Spoken)
    }

    /// gdb says that it understands `hwbreak:` (since 7.10), and nobody else does.
    fn is_gdb(&self) -> bool {
        self.offer.hwbreak
    }

    /// One explicit action for each vCPU that goes on. gdbstub knows no order among actions and
    /// takes a step of all threads for an error; here each vCPU has its own.
    fn resume<D: Debuggee>(&self, actions: &[(Action, Threads)], target: &Adapter<D>) -> Verdict {
        if actions.iter().any(|(_, who)| matches!(who, Threads::One(id) if target.vcpu(*id).is_none())) {
            return self.refuse("there is no such thread");
        }
        let mut packet = String::from("vCont");
        for vcpu in target.vcpu_ids() {
            let id = tid(vcpu);
            let own =
                actions.iter().find(|(_, who)| matches!(who, Threads::All | Threads::Any) || *who == Threads::One(id));
            packet.push_str(&match own {
                Some((Action::Continue, _)) => format!(";c:{id:x}"),
                Some((Action::Step, _)) => format!(";s:{id:x}"),
                Some((Action::StepRange { start, end }, _)) => format!(";r{start:x},{end:x}:{id:x}"),
                None => continue,
            });
        }
        Verdict::Resume(packet.into_bytes())
    }

    /// `c` and `s`: the thread of `Hc` alone, or else the selected one as told and all others on.
    fn legacy_resume<D: Debuggee>(&self, action: Action, at: Option<u64>, target: &mut Adapter<D>) -> Verdict {
        let vcpu = match self.resumes {
            Threads::One(id) => target.vcpu(id),
            Threads::All | Threads::Any => Some(target.view.selected),
        };
        let Some(vcpu) = vcpu else { return self.refuse("there is no such thread") };
        if let Some(at) = at
            && let Err(why) = jump(target, vcpu, at)
        {
            return Verdict::Reply(self.resume_error(&why));
        }
        let mut actions = vec![(action, Threads::One(tid(vcpu)))];
        if !matches!(self.resumes, Threads::One(_)) {
            actions.push((Action::Continue, Threads::All));
        }
        self.resume(&actions, target)
    }
}

fn jump<D: Debuggee>(target: &mut Adapter<D>, vcpu: VcpuId, to: u64) -> Result<(), String> {
    let mut registers = target.registers(vcpu).map_err(|e| e.0)?;
    let rip = Register::new(number::RIP).ok_or("there is no RIP")?;
    rip.write(&mut registers, &to.to_le_bytes())?;
    target.set_registers(vcpu, &registers).map_err(|e| e.0)
}

/// gdbstub serves this.
fn serve(packet: impl Into<String>, kind: Kind) -> Verdict {
    Verdict::Serve(packet.into().into_bytes(), kind)
}

/// gdbstub serves this, with data behind it.
fn serve_with(head: &str, data: &[u8]) -> Verdict {
    let mut packet = head.as_bytes().to_vec();
    hex(data, &mut packet);
    Verdict::Serve(packet, Kind::Spoken)
}

fn ok() -> Verdict {
    Verdict::Reply(b"OK".to_vec())
}

/// A piece of an object: `m` and data, or `l` and the last of it.
fn piece(object: &[u8], start: u64, end: u64) -> Vec<u8> {
    let len = object.len() as u64;
    let most = end.saturating_sub(start).min(MEMORY_READ as u64);
    let (start, end) = (start.min(len), start.saturating_add(most).min(len));
    let mut out = vec![if end == len { b'l' } else { b'm' }];
    escape(object.get(start as usize..end as usize).unwrap_or_default(), &mut out);
    out
}

/// May stand in an error text without being mistaken for framing.
fn printable(byte: u8) -> bool {
    (b' '..=b'~').contains(&byte) && !b"#$}*".contains(&byte)
}
