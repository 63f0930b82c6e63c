//! Laws 23, 30, 33 and 34: whose trap it is, and what the guest sees of ours.

use trapline_guests::fixture::{self, LogEntry};
use trapline_vmm::debug::{Breakpoint, RunMode, StopReason};

use crate::lane::Flavour::{Amd, Intel};
use crate::lane::Need::{IntInRing0, Issue3On};
use crate::law::{Law, law};
use crate::rig::{Rig, at, name};

pub(crate) fn laws() -> Vec<Law> {
    vec![
        law!(l23_the_guests_dr6_shows_nothing_of_ours),
        law!(l30_the_guests_debug_registers_stay_its_own),
        law!(l33_the_guests_own_single_step_goes_on_under_our_breakpoints, Issue3On(&[Amd, Intel])),
        law!(l33_the_guests_own_int1_reaches_it_under_our_breakpoints, IntInRing0),
        law!(l34_the_guests_own_int3_reaches_it_under_our_breakpoints, IntInRing0),
    ]
}

/// Where the guest never comes by.
fn elsewhere() -> Breakpoint {
    Breakpoint::exec(at("step_begin"))
}

fn l23_the_guests_dr6_shows_nothing_of_ours() {
    let mut rig = Rig::one("loop5");
    let bp = Breakpoint::exec(at("loop5_bp"));
    rig.set(elsewhere()).unwrap();
    rig.set(bp).unwrap();
    for _ in 0..5 {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        rig.step();
        let registers = rig.registers(0);
        assert_eq!((registers.dr, registers.dr6, registers.dr7), ([0; 4], 0xffff_0ff0, 0x400));
    }
}

/// The guest writes and reads its own DR0-7 while a breakpoint of ours is armed.
fn l30_the_guests_debug_registers_stay_its_own() {
    let mut rig = Rig::one("own_dr");
    rig.set(elsewhere()).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    let saved = |n| rig.word(fixture::saved_address(n).unwrap());
    assert_eq!([saved(0), saved(1), saved(3)], [fixture::WATCH, at("od_exec"), 0xd040a]);
    assert_eq!(saved(4), 1, "the instruction under its own breakpoint ran once");
    let registers = rig.registers(0);
    assert_eq!([registers.dr[0], registers.dr[1], registers.dr7], [fixture::WATCH, at("od_exec"), 0x400]);
}

/// Runs a property to its end without us, and again with a breakpoint of ours elsewhere: the guest's
/// own log must be the same, and we must be told of nothing.
fn same_log(property: &'static str) -> Vec<LogEntry> {
    let logs = [false, true].map(|armed| {
        let mut rig = Rig::one(property);
        if armed {
            rig.set(elsewhere()).unwrap();
        }
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0), "armed: {armed}");
        rig.log()
    });
    let [without, with] = logs;
    assert_eq!(with.len(), without.len(), "with us: {with:x?}");
    for (with, without) in with.iter().zip(&without) {
        assert_eq!(with, without);
    }
    without
}

fn l33_the_guests_own_single_step_goes_on_under_our_breakpoints() {
    let log = same_log("own_tf");
    assert_eq!(log.len(), 5);
    assert!(log.iter().all(|entry| (entry.vector, entry.dr6) == (1, 0xffff_4ff0)), "{log:x?}");
}

fn l33_the_guests_own_int1_reaches_it_under_our_breakpoints() {
    let log = same_log("int1");
    assert_eq!(log.iter().map(|entry| (entry.vector, name(entry.rip))).collect::<Vec<_>>(), [(1, name(at("i1_next")))]);
}

fn l34_the_guests_own_int3_reaches_it_under_our_breakpoints() {
    for (property, behind) in [("int3", "i3_next"), ("int3_long", "i3_long_next")] {
        let log = same_log(property);
        assert_eq!(
            log.iter().map(|entry| (entry.vector, name(entry.rip))).collect::<Vec<_>>(),
            [(3, name(at(behind)))]
        );
    }
}
