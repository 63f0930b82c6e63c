//! A stop in gdb's words, and in a person's.

use trapline_vmm::debug::{Breakpoint, Crash, Ending, Stop, StopReason, Trigger};
use trapline_vmm::vcpu::Registers;

use crate::adapter::tid;
use crate::arch::{Register, number};
use crate::framing::{hex, hex_byte};
use crate::packet::Offer;

/// gdb's own numbers for signals (its `gdb/signals.def`), where a guest event resembles one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    /// Ctrl-C.
    Int = 2,
    /// The guest cannot execute its instruction.
    Ill = 4,
    /// A breakpoint, a watchpoint, a step; and the state at attach.
    Trap = 5,
    /// The guest says that it panicked.
    Abort = 6,
    /// Killed.
    Kill = 9,
    /// KVM or the processor refuse to go on.
    Bus = 10,
    /// Triple fault.
    Segv = 11,
    /// The guest wants to end.
    Term = 15,
}

/// What a stop reply says beyond signal, thread and registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    None,
    Breakpoint(Breakpoint),
    Watch(Trigger, u64),
}

/// The reply to `?` and to a resumption, for a stop that leaves something to look at:
/// `T05thread:p1.2;core:1;hwbreak:;06:..;07:..;10:..;`.
///
/// The registers are those that clients ask for first, so that they need not.
pub(crate) fn stop_reply(stop: &Stop, software: bool, offer: Offer, registers: Option<&Registers>) -> Vec<u8> {
    let (signal, cause) = match &stop.reason {
        StopReason::Breakpoint(request) => (Signal::Trap, Cause::Breakpoint(*request)),
        StopReason::Watchpoint { request, addr, .. } => {
            // gdb takes any address in the watched range for the right one.
            let inside = addr.checked_sub(request.addr).is_some_and(|offset| offset < request.len);
            (Signal::Trap, Cause::Watch(request.on, if inside { *addr } else { request.addr }))
        }
        StopReason::Step | StopReason::CannotStep(_) | StopReason::Port(_) | StopReason::KernelEntry => {
            (Signal::Trap, Cause::None)
        }
        StopReason::Interrupted => (Signal::Int, Cause::None),
        StopReason::GuestExit(_) | StopReason::GuestShutdown { .. } => (Signal::Term, Cause::None),
        StopReason::GuestPanic => (Signal::Abort, Cause::None),
        StopReason::Crash(crash) => (crash_signal(crash), Cause::None),
        StopReason::Ended(_) => return end_reply(stop, offer),
    };
    let mut out = signal_and_thread(signal, stop, offer);
    match cause {
        Cause::None => {}
        Cause::Breakpoint(_) if software && offer.swbreak => out.extend_from_slice(b"swbreak:;"),
        Cause::Breakpoint(_) if offer.hwbreak => out.extend_from_slice(b"hwbreak:;"),
        Cause::Breakpoint(_) => {}
        Cause::Watch(on, addr) => {
            let word = match on {
                Trigger::Read => "rwatch",
                Trigger::Access => "awatch",
                Trigger::Write | Trigger::Execute => "watch",
            };
            out.extend_from_slice(format!("{word}:{addr:x};").as_bytes());
        }
    }
    for register in [number::RBP, number::RSP, number::RIP].into_iter().filter_map(Register::new) {
        if let Some(registers) = registers {
            out.extend_from_slice(format!("{:02x}:", register.number()).as_bytes());
            hex(register.read(registers).as_ref(), &mut out);
            out.push(b';');
        }
    }
    out
}

/// The reply to `?` right after attaching: being interrupted by the attach is no signal.
pub(crate) fn attach_reply(stop: &Stop, offer: Offer, registers: Option<&Registers>) -> Vec<u8> {
    let quiet = Stop::new(stop.vcpu, StopReason::Step);
    let stop = if stop.reason == StopReason::Interrupted { &quiet } else { stop };
    stop_reply(stop, false, offer, registers)
}

fn signal_and_thread(signal: Signal, stop: &Stop, offer: Offer) -> Vec<u8> {
    let process = if offer.multiprocess { "p1." } else { "" };
    let mut out = vec![b'T'];
    out.extend_from_slice(&hex_byte(signal as u8));
    out.extend_from_slice(format!("thread:{process}{:x};core:{:x};", tid(stop.vcpu), stop.vcpu.0).as_bytes());
    out
}

/// `W` or `X`: nothing is left to look at.
fn end_reply(stop: &Stop, offer: Offer) -> Vec<u8> {
    let (letter, code) = match &stop.reason {
        // What a parent process would see: the low eight bits.
        StopReason::Ended(Ending::Exit(status)) => (b'W', (*status & 0xff) as u8),
        StopReason::Ended(Ending::Crash(crash)) => (b'X', crash_signal(crash) as u8),
        StopReason::Ended(Ending::Killed) => (b'X', Signal::Kill as u8),
        _ => (b'W', 0),
    };
    let mut out = vec![letter];
    out.extend_from_slice(&hex_byte(code));
    if offer.multiprocess {
        out.extend_from_slice(b";process:1");
    }
    out
}

fn crash_signal(crash: &Crash) -> Signal {
    match crash {
        Crash::TripleFault { .. } => Signal::Segv,
        Crash::EmulationFailure { .. } => Signal::Ill,
        Crash::WatchedPage { crash, .. } => crash_signal(crash),
        Crash::NoProgress
        | Crash::Internal { .. }
        | Crash::FailEntry { .. }
        | Crash::UnknownExit { .. }
        | Crash::RunFailed { .. }
        | Crash::EntryFailed { .. } => Signal::Bus,
    }
}

/// What a stop means, where a signal's name does not say it. One line.
pub(crate) fn words(stop: &Stop) -> Option<String> {
    const LOOK: &str = "registers and memory can be read; continue ends the run";
    let vcpu = stop.vcpu;
    Some(match &stop.reason {
        StopReason::GuestExit(status) => {
            format!("the guest ends itself on {vcpu} with status {status} (port 0xf4); {LOOK}")
        }
        StopReason::GuestShutdown { reset: true } => format!("the guest asks for a reset on {vcpu}; {LOOK}"),
        StopReason::GuestShutdown { reset: false } => format!("the guest asks for power-off on {vcpu}; {LOOK}"),
        StopReason::GuestPanic => format!("the guest reports a panic on {vcpu} (pvpanic); continue lets it go on"),
        StopReason::Crash(crash @ Crash::TripleFault { state_lost: true }) => {
            format!("{vcpu}: {crash}; memory can be read; continue ends the run")
        }
        StopReason::Crash(crash) if crash.is_mendable() => format!("{vcpu}: {crash}, and continue"),
        StopReason::Crash(crash) => format!("{vcpu}: {crash}; {LOOK}"),
        StopReason::Ended(Ending::Exit(status)) => format!("the run is over: the guest ended with status {status}"),
        StopReason::Ended(Ending::Shutdown) => "the run is over: the guest shut down".to_owned(),
        StopReason::Ended(Ending::Crash(crash)) => format!("the run is over: {crash}"),
        StopReason::Ended(Ending::Killed) => "the run is over: killed".to_owned(),
        StopReason::CannotStep(why) => format!("{vcpu} cannot be stepped: {why}"),
        StopReason::Port(access) => format!("{vcpu}: {access}"),
        StopReason::KernelEntry => format!("{vcpu}: guest code has come to the kernel's addresses"),
        StopReason::Breakpoint(_) | StopReason::Watchpoint { .. } | StopReason::Step | StopReason::Interrupted => {
            return None;
        }
    })
}

/// Any stop in one line, for `monitor`.
pub(crate) fn summary(stop: &Stop) -> String {
    let vcpu = stop.vcpu;
    match &stop.reason {
        StopReason::Breakpoint(request) => format!("{vcpu}: {request}"),
        StopReason::Watchpoint { request, addr, stored: None } => {
            format!("{vcpu}: {request}, by the slot at {addr:#x}")
        }
        StopReason::Watchpoint { request, stored: Some(stored), .. } => format!("{vcpu}: {request}, {stored}"),
        StopReason::Step => format!("{vcpu}: step"),
        StopReason::Interrupted => format!("{vcpu}: interrupted"),
        _ => words(stop).unwrap_or_default(),
    }
}

/// The console output packet for one line.
pub(crate) fn console(line: &str) -> Vec<u8> {
    let mut out = vec![b'O'];
    hex(b"trapline: ", &mut out);
    hex(line.as_bytes(), &mut out);
    hex(b"\n", &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use trapline_vmm::debug::{Owner, VcpuId};

    const GDB: Offer = Offer { multiprocess: true, swbreak: true, hwbreak: true, error_message: false };

    fn reply(reason: StopReason) -> String {
        let stop = Stop::new(VcpuId(10), reason);
        String::from_utf8(stop_reply(&stop, false, GDB, None)).unwrap()
    }

    #[test]
    fn every_reason_has_its_reply() {
        let watch =
            |on| StopReason::Watchpoint { request: Breakpoint::watch(0x1001, 15, on), addr: 0x1008, stored: None };
        for (reason, expected) in [
            (StopReason::Breakpoint(Breakpoint::exec(0x1000)), "T05thread:p1.b;core:a;hwbreak:;"),
            (watch(Trigger::Write), "T05thread:p1.b;core:a;watch:1008;"),
            (watch(Trigger::Read), "T05thread:p1.b;core:a;rwatch:1008;"),
            (watch(Trigger::Access), "T05thread:p1.b;core:a;awatch:1008;"),
            (StopReason::Step, "T05thread:p1.b;core:a;"),
            (StopReason::CannotStep("why"), "T05thread:p1.b;core:a;"),
            (StopReason::Interrupted, "T02thread:p1.b;core:a;"),
            (StopReason::GuestExit(3), "T0fthread:p1.b;core:a;"),
            (StopReason::GuestShutdown { reset: true }, "T0fthread:p1.b;core:a;"),
            (StopReason::GuestPanic, "T06thread:p1.b;core:a;"),
            (StopReason::Crash(Crash::TripleFault { state_lost: false }), "T0bthread:p1.b;core:a;"),
            (StopReason::Crash(Crash::EmulationFailure { bytes: vec![] }), "T04thread:p1.b;core:a;"),
            (StopReason::Crash(Crash::Internal { suberror: 3 }), "T0athread:p1.b;core:a;"),
            (StopReason::Ended(Ending::Exit(0x103)), "W03;process:1"),
            (StopReason::Ended(Ending::Shutdown), "W00;process:1"),
            (StopReason::Ended(Ending::Crash(Crash::TripleFault { state_lost: true })), "X0b;process:1"),
            (StopReason::Ended(Ending::Killed), "X09;process:1"),
        ] {
            assert_eq!(reply(reason.clone()), expected, "{reason:?}");
        }
    }

    #[test]
    fn an_address_outside_the_range_becomes_its_start() {
        for addr in [0, 0xfff, 0x1008, u64::MAX] {
            let request = Breakpoint::watch(0x1000, 8, Trigger::Write);
            assert!(reply(StopReason::Watchpoint { request, addr, stored: None }).ends_with(";watch:1000;"));
        }
    }

    #[test]
    fn a_client_is_told_what_it_understands() {
        let stop =
            Stop { vcpu: VcpuId(0), reason: StopReason::Breakpoint(Breakpoint::exec(0)), owner: Some(Owner::GDB) };
        assert_eq!(stop_reply(&stop, true, GDB, None), b"T05thread:p1.1;core:0;swbreak:;");
        assert_eq!(stop_reply(&stop, true, Offer { swbreak: false, ..GDB }, None), b"T05thread:p1.1;core:0;hwbreak:;");
        assert_eq!(stop_reply(&stop, true, Offer::default(), None), b"T05thread:1;core:0;");
        let registers = Registers { rbp: 1, rsp: 2, rip: 0x1122, ..Registers::default() };
        assert_eq!(
            stop_reply(&stop, false, Offer::default(), Some(&registers)),
            b"T05thread:1;core:0;06:0100000000000000;07:0200000000000000;10:2211000000000000;"
        );
        let attached = Stop::new(VcpuId(0), StopReason::Interrupted);
        assert_eq!(attach_reply(&attached, GDB, None), b"T05thread:p1.1;core:0;");
    }
}
