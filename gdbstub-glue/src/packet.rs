//! What a client may ask, parsed once and completely.
//!
//! gdbstub ends the session when a packet is malformed. It is therefore only handed packets
//! that went through [`parse`] and were written anew from the result (see [`crate::front`]); what does
//! not parse is answered with an error, and what is not listed here with an empty reply, which is
//! RSP for "unknown".
//!
//! Nothing here knows the guest: whether a thread exists or an address can be read is decided
//! elsewhere.

use std::ops::Range;

use crate::framing::{nibble, unescape};

/// Which threads a packet means (RSP, "Packets", thread-id).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// `-1`, or a process without a thread.
    All,
    /// `0`: whichever suits the stub.
    Any,
    /// This one.
    One(u64),
}

/// What `vCont` wants of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Continue,
    Step,
    StepRange { start: u64, end: u64 },
}

/// The number behind `Z` and `z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PointKind {
    Software,
    Hardware,
    Write,
    Read,
    Access,
}

impl PointKind {
    /// The digit.
    pub(crate) const fn digit(self) -> u8 {
        b'0' + self as u8
    }
}

/// `Z` or `z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Point {
    pub(crate) insert: bool,
    pub(crate) kind: PointKind,
    pub(crate) addr: u64,
    pub(crate) len: u64,
}

/// What a client says that it understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Offer {
    /// Thread-ids with a process.
    pub(crate) multiprocess: bool,
    /// `swbreak:` in a stop reply.
    pub(crate) swbreak: bool,
    /// `hwbreak:` in a stop reply.
    pub(crate) hwbreak: bool,
    /// `E.text` as the reply to anything (gdb 16).
    pub(crate) error_message: bool,
}

/// A packet that we know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Packet {
    /// `qSupported`, and what the client offers, if it says anything at all.
    Supported(Option<Offer>),
    /// `QStartNoAckMode`
    NoAcks,
    /// `QEnableErrorStrings` (lldb)
    ErrorStrings,
    /// `?`
    WhyStopped,
    /// `g`
    ReadFrame,
    /// `G`
    WriteFrame(Vec<u8>),
    /// `p`
    ReadRegister(usize),
    /// `P`
    WriteRegister(usize, Vec<u8>),
    /// `m`
    ReadMemory { addr: u64, len: u64 },
    /// `M` and `X`
    WriteMemory { addr: u64, data: Vec<u8> },
    /// `Hg`
    SelectForAccess(Threads),
    /// `Hc`
    SelectForResume(Threads),
    /// `T`
    Alive(Threads),
    /// `qC`
    CurrentThread,
    /// `qfThreadInfo`
    FirstThreads,
    /// `qsThreadInfo`
    MoreThreads,
    /// `qThreadExtraInfo`
    ThreadExtra(Threads),
    /// `qAttached`
    Attached,
    /// `vCont?`
    ResumeQuery,
    /// `vCont`: what to do, in order; the first action that matches a thread is its own.
    Resume(Vec<(Action, Threads)>),
    /// `c`, `C`, `s`, `S`, perhaps with the address to go on at.
    LegacyResume { action: Action, at: Option<u64> },
    /// `Z`, `z`
    Point(Point),
    /// `Z` with a condition or commands for the target to evaluate, which we never offered.
    ConditionalPoint,
    /// `D`
    Detach,
    /// `k`
    Kill,
    /// `vKill`
    KillProcess,
    /// `qXfer:features:read`
    Features { annex: Vec<u8>, window: Range<u64> },
    /// `qXfer:threads:read`
    ThreadList { window: Range<u64> },
    /// `qRcmd`
    Monitor(Vec<u8>),
    /// `qqemu.Supported`, `qemu.Supported`
    QemuSupported,
    /// `qqemu.PhyMemMode`
    PhysicalQuery,
    /// `Qqemu.PhyMemMode`
    Physical(bool),
    /// `qHostInfo` (lldb)
    HostInfo,
    /// Anything else.
    Unknown,
}

/// A packet that we know but that makes no sense. The text says why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) &'static str);

type Parsed = Result<Packet, Malformed>;

/// Parses the body of a packet, as it came, still escaped.
pub(crate) fn parse(body: &[u8]) -> Parsed {
    let Some((&letter, rest)) = body.split_first() else { return Ok(Packet::Unknown) };
    match letter {
        b'?' => alone(rest, Packet::WhyStopped),
        b'g' => alone(rest, Packet::ReadFrame),
        b'G' => Ok(Packet::WriteFrame(data(rest)?)),
        b'p' => Ok(Packet::ReadRegister(register(rest)?)),
        b'P' => {
            let (number, value) = split(rest, b'=').ok_or(Malformed("P needs a register and a value"))?;
            Ok(Packet::WriteRegister(register(number)?, data(value)?))
        }
        b'm' => {
            let (addr, len) = split(rest, b',').ok_or(Malformed("m needs an address and a length"))?;
            Ok(Packet::ReadMemory { addr: number(addr)?, len: number(len)? })
        }
        b'M' => write_memory(rest, data),
        b'X' => write_memory(rest, |bytes| unescape(bytes).ok_or(Malformed("the data ends inside an escape"))),
        b'H' => match rest.split_first() {
            Some((b'g', id)) => Ok(Packet::SelectForAccess(threads(id)?)),
            Some((b'c', id)) => Ok(Packet::SelectForResume(threads(id)?)),
            _ => Err(Malformed("H needs g or c and a thread")),
        },
        b'T' => Ok(Packet::Alive(threads(rest)?)),
        b'c' => legacy(Action::Continue, rest),
        b's' => legacy(Action::Step, rest),
        b'C' => legacy_with_signal(Action::Continue, rest),
        b'S' => legacy_with_signal(Action::Step, rest),
        b'D' => {
            match rest.split_first() {
                None => {}
                Some((b';', pid)) => process(pid)?,
                _ => return Err(Malformed("D takes nothing or a process")),
            }
            Ok(Packet::Detach)
        }
        b'k' => alone(rest, Packet::Kill),
        b'Z' => point(true, rest),
        b'z' => point(false, rest),
        b'v' => long_v(body),
        b'q' | b'Q' => query(body),
        _ => Ok(Packet::Unknown),
    }
}

fn long_v(body: &[u8]) -> Parsed {
    if let Some(rest) = body.strip_prefix(b"vKill") {
        let pid = rest.strip_prefix(b";").ok_or(Malformed("vKill needs a process"))?;
        process(pid)?;
        return Ok(Packet::KillProcess);
    }
    match body.strip_prefix(b"vCont") {
        Some(b"?") => Ok(Packet::ResumeQuery),
        Some([b';', actions @ ..]) => {
            actions.split(|&b| b == b';').map(action).collect::<Result<_, _>>().map(Packet::Resume)
        }
        Some([]) => Err(Malformed("vCont needs an action")),
        // vContSupported and the like are other packets.
        _ => Ok(Packet::Unknown),
    }
}

fn action(text: &[u8]) -> Result<(Action, Threads), Malformed> {
    let (what, who) = match split(text, b':') {
        Some((what, who)) => (what, threads(who)?),
        None => (text, Threads::All),
    };
    let action = match what.split_first() {
        Some((b'c', [])) => Action::Continue,
        Some((b's', [])) => Action::Step,
        // There are no signals in a guest; gdb passes on the one that it was told of.
        Some((b'C', signal)) => {
            number(signal)?;
            Action::Continue
        }
        Some((b'S', signal)) => {
            number(signal)?;
            Action::Step
        }
        Some((b'r', range)) => {
            let (start, end) = split(range, b',').ok_or(Malformed("r needs a range"))?;
            Action::StepRange { start: number(start)?, end: number(end)? }
        }
        _ => return Err(Malformed("vCont knows c, C, s, S and r")),
    };
    // 0 is "any", which clients use for "all" here.
    Ok((action, if who == Threads::Any { Threads::All } else { who }))
}

fn query(body: &[u8]) -> Parsed {
    let (name, rest) = body.split_at(body.iter().position(|b| b":,;".contains(b)).unwrap_or(body.len()));
    match name {
        b"qSupported" => Ok(supported(rest)),
        b"QStartNoAckMode" => alone(rest, Packet::NoAcks),
        b"QEnableErrorStrings" => alone(rest, Packet::ErrorStrings),
        b"qC" => alone(rest, Packet::CurrentThread),
        b"qfThreadInfo" => alone(rest, Packet::FirstThreads),
        b"qsThreadInfo" => alone(rest, Packet::MoreThreads),
        b"qHostInfo" => alone(rest, Packet::HostInfo),
        b"qThreadExtraInfo" => {
            let id = rest.strip_prefix(b",").ok_or(Malformed("qThreadExtraInfo needs a thread"))?;
            Ok(Packet::ThreadExtra(threads(id)?))
        }
        b"qAttached" => {
            if let Some(pid) = rest.strip_prefix(b":") {
                process(pid)?;
            } else if !rest.is_empty() {
                return Err(Malformed("qAttached takes nothing or a process"));
            }
            Ok(Packet::Attached)
        }
        b"qRcmd" => {
            // A lone `monitor` comes as `qRcmd,`.
            let command = rest.strip_prefix(b",").unwrap_or(rest);
            Ok(Packet::Monitor(data(command)?))
        }
        b"qXfer" => transfer(rest),
        b"qqemu.Supported" | b"qemu.Supported" => Ok(Packet::QemuSupported),
        b"qqemu.PhyMemMode" => alone(rest, Packet::PhysicalQuery),
        b"Qqemu.PhyMemMode" => match rest {
            b":0" => Ok(Packet::Physical(false)),
            b":1" => Ok(Packet::Physical(true)),
            _ => Err(Malformed("Qqemu.PhyMemMode needs :0 or :1")),
        },
        _ => Ok(Packet::Unknown),
    }
}

/// A bare `qSupported` (a user's `maint packet qSupported`) asks again and offers nothing anew.
fn supported(rest: &[u8]) -> Packet {
    Packet::Supported(rest.strip_prefix(b":").map(|features| {
        let has = |name: &[u8]| features.split(|&b| b == b';').any(|f| f == name);
        Offer {
            multiprocess: has(b"multiprocess+"),
            swbreak: has(b"swbreak+"),
            hwbreak: has(b"hwbreak+"),
            error_message: has(b"error-message+"),
        }
    }))
}

/// `qXfer:object:operation:annex:offset,length`
fn transfer(rest: &[u8]) -> Parsed {
    const SENSELESS: Malformed = Malformed("qXfer needs an object, read, an annex, an offset and a length");
    let mut parts = rest.splitn(5, |&b| b == b':').skip(1);
    let (Some(object), Some(operation)) = (parts.next(), parts.next()) else { return Err(SENSELESS) };
    if !matches!(object, b"features" | b"threads") || operation != b"read" {
        return Ok(Packet::Unknown);
    }
    let (Some(annex), Some(window)) = (parts.next(), parts.next()) else { return Err(SENSELESS) };
    let (offset, len) = split(window, b',').ok_or(SENSELESS)?;
    let offset = number(offset)?;
    let window = offset..offset.saturating_add(number(len)?);
    match object {
        b"features" => Ok(Packet::Features { annex: annex.to_vec(), window }),
        _ if annex.is_empty() => Ok(Packet::ThreadList { window }),
        _ => Err(Malformed("qXfer:threads has no annex")),
    }
}

fn point(insert: bool, rest: &[u8]) -> Parsed {
    const SENSELESS: Malformed = Malformed("Z and z need a type, an address and a kind");
    let (kind, rest) = split(rest, b',').ok_or(SENSELESS)?;
    let kind = match kind {
        b"0" => PointKind::Software,
        b"1" => PointKind::Hardware,
        b"2" => PointKind::Write,
        b"3" => PointKind::Read,
        b"4" => PointKind::Access,
        // RSP: an unknown type is an unknown packet.
        _ => return Ok(Packet::Unknown),
    };
    let (addr, rest) = split(rest, b',').ok_or(SENSELESS)?;
    let addr = number(addr)?;
    let (len, extra) = split(rest, b';').unwrap_or((rest, b""));
    let len = number(len)?;
    if !extra.is_empty() {
        return Ok(Packet::ConditionalPoint);
    }
    Ok(Packet::Point(Point { insert, kind, addr, len }))
}

fn write_memory(rest: &[u8], decode: impl FnOnce(&[u8]) -> Result<Vec<u8>, Malformed>) -> Parsed {
    const SENSELESS: Malformed = Malformed("a memory write needs an address, a length and data");
    let (addr, rest) = split(rest, b',').ok_or(SENSELESS)?;
    let (len, bytes) = split(rest, b':').ok_or(SENSELESS)?;
    let (addr, len, data) = (number(addr)?, number(len)?, decode(bytes)?);
    if data.len() as u64 != len {
        return Err(Malformed("the length and the data of a memory write differ"));
    }
    Ok(Packet::WriteMemory { addr, data })
}

fn legacy(action: Action, at: &[u8]) -> Parsed {
    let at = if at.is_empty() { None } else { Some(number(at)?) };
    Ok(Packet::LegacyResume { action, at })
}

fn legacy_with_signal(action: Action, rest: &[u8]) -> Parsed {
    let (signal, at) = split(rest, b';').unwrap_or((rest, b""));
    number(signal)?;
    legacy(action, at)
}

fn alone(rest: &[u8], packet: Packet) -> Parsed {
    if rest.is_empty() { Ok(packet) } else { Err(Malformed("something follows a packet that stands alone")) }
}

fn split(bytes: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let position = bytes.iter().position(|&b| b == at)?;
    Some((&bytes[..position], &bytes[position + 1..]))
}

/// A hexadecimal number of at most 64 bits.
fn number(digits: &[u8]) -> Result<u64, Malformed> {
    if digits.is_empty() {
        return Err(Malformed("a number is missing"));
    }
    digits.iter().try_fold(0u64, |value, &digit| {
        let digit = nibble(digit).ok_or(Malformed("not a hexadecimal number"))?;
        if value >> 60 != 0 {
            return Err(Malformed("a number of more than 64 bits"));
        }
        Ok(value << 4 | u64::from(digit))
    })
}

/// A register number. One beyond `usize` is beyond all registers.
fn register(digits: &[u8]) -> Result<usize, Malformed> {
    number(digits).map(|n| usize::try_from(n).unwrap_or(usize::MAX))
}

/// Bytes, two hexadecimal digits each.
fn data(digits: &[u8]) -> Result<Vec<u8>, Malformed> {
    const SENSELESS: Malformed = Malformed("data is not pairs of hexadecimal digits");
    if !digits.len().is_multiple_of(2) {
        return Err(SENSELESS);
    }
    digits
        .chunks_exact(2)
        .map(|pair| Some(nibble(pair[0])? << 4 | nibble(pair[1])?))
        .collect::<Option<_>>()
        .ok_or(SENSELESS)
}

/// A thread-id: `TID` or `pPID.TID` or `pPID`. There is one process, number 1: the guest.
fn threads(text: &[u8]) -> Result<Threads, Malformed> {
    match text.strip_prefix(b"p") {
        None => thread(text),
        Some(rest) => match split(rest, b'.') {
            None => process(rest).map(|()| Threads::All),
            Some((pid, tid)) => {
                process(pid)?;
                thread(tid)
            }
        },
    }
}

fn thread(text: &[u8]) -> Result<Threads, Malformed> {
    match text {
        b"-1" => Ok(Threads::All),
        _ => number(text).map(|n| if n == 0 { Threads::Any } else { Threads::One(n) }),
    }
}

/// The one process there is, or 0 or -1 for any or all.
fn process(text: &[u8]) -> Result<(), Malformed> {
    if text == b"-1" || number(text)? <= 1 { Ok(()) } else { Err(Malformed("the guest is process 1")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_clients_send() {
        for (body, packet) in [
            (
                &b"qSupported:multiprocess+;swbreak+;xmlRegisters=i386"[..],
                Packet::Supported(Some(Offer { multiprocess: true, swbreak: true, ..Offer::default() })),
            ),
            (b"qSupported:error-message+", Packet::Supported(Some(Offer { error_message: true, ..Offer::default() }))),
            (b"qSupported", Packet::Supported(None)),
            (b"qSupported:", Packet::Supported(Some(Offer::default()))),
            (b"Hgp1.2", Packet::SelectForAccess(Threads::One(2))),
            (b"Hc-1", Packet::SelectForResume(Threads::All)),
            (b"Hcp1.-1", Packet::SelectForResume(Threads::All)),
            (b"Hgp0.0", Packet::SelectForAccess(Threads::Any)),
            (b"Tp1.a", Packet::Alive(Threads::One(10))),
            (b"mffffffff81000000,40", Packet::ReadMemory { addr: 0xffff_ffff_8100_0000, len: 0x40 }),
            (b"M10,2:cafe", Packet::WriteMemory { addr: 0x10, data: vec![0xca, 0xfe] }),
            (b"X10,0:", Packet::WriteMemory { addr: 0x10, data: vec![] }),
            (b"X10,3:a}\x03,", Packet::WriteMemory { addr: 0x10, data: b"a#,".to_vec() }),
            (b"P10=0000000000000080", Packet::WriteRegister(16, vec![0, 0, 0, 0, 0, 0, 0, 0x80])),
            (
                b"Z1,ffffffff81000000,1",
                Packet::Point(Point { insert: true, kind: PointKind::Hardware, addr: 0xffff_ffff_8100_0000, len: 1 }),
            ),
            (b"z4,10,40;", Packet::Point(Point { insert: false, kind: PointKind::Access, addr: 0x10, len: 0x40 })),
            (b"Z0,10,1;X3,220027", Packet::ConditionalPoint),
            (b"Z9,10,1", Packet::Unknown),
            (b"vCont?", Packet::ResumeQuery),
            (b"vCont;c:p1.-1", Packet::Resume(vec![(Action::Continue, Threads::All)])),
            (
                b"vCont;s:p1.2;c:p1.-1",
                Packet::Resume(vec![(Action::Step, Threads::One(2)), (Action::Continue, Threads::All)]),
            ),
            (
                b"vCont;r100,10f:2;C05",
                Packet::Resume(vec![
                    (Action::StepRange { start: 0x100, end: 0x10f }, Threads::One(2)),
                    (Action::Continue, Threads::All),
                ]),
            ),
            (b"s", Packet::LegacyResume { action: Action::Step, at: None }),
            (b"C05;1000", Packet::LegacyResume { action: Action::Continue, at: Some(0x1000) }),
            (b"D;1", Packet::Detach),
            (b"vKill;1", Packet::KillProcess),
            (
                b"qXfer:features:read:target.xml:0,ffb",
                Packet::Features { annex: b"target.xml".to_vec(), window: 0..0xffb },
            ),
            (b"qXfer:threads:read::10,10", Packet::ThreadList { window: 0x10..0x20 }),
            (b"qXfer:auxv:read::0,10", Packet::Unknown),
            (b"qRcmd,68656c70", Packet::Monitor(b"help".to_vec())),
            (b"Qqemu.PhyMemMode:1", Packet::Physical(true)),
            (b"vMustReplyEmpty", Packet::Unknown),
            (b"x0,0", Packet::Unknown),
            (b"", Packet::Unknown),
        ] {
            assert_eq!(parse(body), Ok(packet), "{}", body.escape_ascii());
        }
    }

    /// What ends a session of bare gdbstub 0.7.10.
    #[test]
    fn what_makes_no_sense() {
        for body in [
            &b"m"[..],
            b"m10",
            b"mxyz,4",
            b"m10,",
            b"m10000000000000000,4",
            b"Z1",
            b"Z1,10",
            b"Z1,zz,1",
            b"vCont;",
            b"vCont;x",
            b"vCont;t:1",
            b"vCont;s:zz",
            b"vCont;r10:1",
            b"Hg",
            b"Hx1",
            b"H",
            b"Hg-2",
            b"Tzz",
            b"T",
            b"vKill",
            b"vKill;9",
            b"qThreadExtraInfo",
            b"qThreadExtraInfo,zz",
            b"D;9",
            b"Dx",
            b"G123",
            b"Gzz",
            b"G0x",
            b"P10",
            b"P=00",
            b"P10=1",
            b"p",
            b"pzz",
            b"M10,4:00",
            b"M10,4",
            b"X10,2:a",
            b"X10,1:}",
            b"czz",
            b"Czz",
            b"kk",
            b"gg",
            b"??",
            b"qXfer:features:read:target.xml",
            b"qXfer:features:read:target.xml:0",
            b"qXfer:features:read:target.xml:zz,0",
            b"qXfer:threads:read:x:0,1",
            b"qXfer",
            b"qRcmd,6",
            b"Qqemu.PhyMemMode:2",
            b"QStartNoAckMode:1",
            b"Hgp2.1",
            b"vCont",
        ] {
            assert!(parse(body).is_err(), "{}: {:?}", body.escape_ascii(), parse(body));
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(body in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = parse(&body);
        }

        #[test]
        fn nothing_like_a_packet_panics(head in "(qSupported|vCont;|Z[0-5],|qXfer:|qXfer:features:read:|Hg|Hc|m|M|X|P|p|G|T|qRcmd,|vKill;|D;|C|qThreadExtraInfo,)", tail in "[0-9a-fx:;,=p.}~-]{0,30}") {
            let _ = parse(format!("{head}{tail}").as_bytes());
        }
    }
}
