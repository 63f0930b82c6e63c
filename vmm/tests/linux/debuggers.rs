//! Debuggers inside of the guest: single-step by ptrace, the processor's breakpoints by ptrace and
//! by perf. They are to work beside our own breakpoints and steps as they do without (laws 30 to
//! 33, 46, 47).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use trapline_vmm::debug::{Breakpoint, Disposition, Handler, Owner, RunMode, StopReason};

use crate::guest::Guest;

/// The programs; each says `ok` and ends with 0, or says what was wrong.
const DEBUGGERS: [&str; 3] = ["ptrace-step 2", "hw-watch 2", "perf-bp 2"];

/// Runs them all; `when` says what we do meanwhile.
fn all_work(guest: &mut Guest, when: &str) {
    for debugger in DEBUGGERS {
        let printed = guest.command(debugger);
        let said = printed.lines().find(|line| line.contains(": ok ")).unwrap_or("nothing");
        println!("  {when}: {said}");
    }
}

pub(crate) fn beside_two_slots() {
    let mut guest = Guest::boot();
    all_work(&mut guest, "without us");

    // Two slots: one that nothing reaches, and one that every system call hits.
    guest.vm.stop().unwrap();
    let never = Breakpoint::exec(guest.symbols.at("panic"));
    let often = Breakpoint::exec(guest.symbols.at("do_syscall_64"));
    let hits = Arc::new(AtomicU64::new(0));
    let counter = Handler::new({
        let hits = hits.clone();
        move |_| {
            hits.fetch_add(1, Ordering::Relaxed);
            Disposition::Continue
        }
    });
    guest.vm.set_breakpoint(Owner::GDB, never).unwrap();
    guest.go();
    all_work(&mut guest, "beside a slot that is never hit");
    guest.vm.stop().unwrap();
    guest.vm.set_trap(Owner::harness(1), often, counter).unwrap();
    guest.go();
    all_work(&mut guest, "beside a slot that is always hit");
    guest.vm.stop().unwrap();
    let counted = hits.load(Ordering::Relaxed);
    println!("  {counted} hits of our own");
    assert!(counted > 1000, "our own breakpoint was hit {counted} times");
    guest.vm.clear_breakpoint(Owner::GDB, never).unwrap();
    guest.vm.clear_breakpoint(Owner::harness(1), often).unwrap();

    guest.go();
    all_work(&mut guest, "after us");
    guest.assert_undisturbed();
}

/// Where stepping starts while a debugger runs in the guest, and how far it goes: into the system
/// calls that it makes, through the kernel's own handling of a debug exception, and over the IRET
/// that hands a traced program its TF.
const STARTS: [(&str, u64); 3] =
    [("do_syscall_64", 5), ("asm_exc_debug", 30), ("swapgs_restore_regs_and_return_to_usermode", 60)];

/// At which hits of each it is stepped: not all, or it would take hours.
const EVERY: u64 = 16;

pub(crate) fn while_we_step() {
    let mut guest = Guest::boot();
    for debugger in DEBUGGERS {
        for (start, steps) in STARTS {
            let stepped = debugged(&mut guest, debugger, start, steps);
            println!("  {debugger}: {stepped} steps from {start}");
            assert!(stepped >= steps, "{debugger} never came by {start}");
        }
    }
    guest.assert_undisturbed();
}

/// Runs a debugger in the guest and steps from `start` now and then, as long as it runs.
fn debugged(guest: &mut Guest, debugger: &str, start: &str, steps: u64) -> u64 {
    guest.vm.stop().unwrap();
    let at = Breakpoint::exec(guest.symbols.at(start));
    let hits = AtomicU64::new(0);
    let every = Handler::new(move |_| match hits.fetch_add(1, Ordering::Relaxed) % EVERY {
        0 => Disposition::Stop,
        _ => Disposition::Continue,
    });
    guest.vm.set_trap(Owner::harness(1), at, every).unwrap();
    guest.go();
    let before = guest.console().len();
    guest.start(debugger);
    let mut stepped = 0;
    while let Some(stop) = guest.stop_before(before, &format!(": {debugger}")) {
        assert_eq!(stop.reason, StopReason::Breakpoint(at));
        // The others stand still: they would run into the breakpoint as well.
        let plan = guest.all(RunMode::Parked).with(stop.vcpu, RunMode::Step);
        for _ in 0..steps {
            let step = guest.run(&plan);
            assert_eq!(step.vcpu, stop.vcpu);
            // It may come by its start again.
            assert!([StopReason::Step, StopReason::Breakpoint(at)].contains(&step.reason), "{step:?}");
        }
        stepped += steps;
    }
    guest.vm.stop().unwrap();
    guest.vm.clear_breakpoint(Owner::harness(1), at).unwrap();
    guest.go();
    let printed = guest.console()[before..].to_owned();
    assert!(printed.contains(&Guest::done(debugger, 0)), "stepped from {start}: {printed}");
    stepped
}
