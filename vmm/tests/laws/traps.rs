//! Laws 23, 30, 33, 34, 60 and 61: whose trap it is, and what the guest sees of ours.

use trapline_guests::fixture::{self, LogEntry};
use trapline_vmm::debug::{Breakpoint, RunMode, StopReason, Trigger};

use crate::lane::Need::{DataWatch, IntInRing0};
use crate::law::{Law, law};
use crate::rig::{Rig, at, name};

pub(crate) fn laws() -> Vec<Law> {
    vec![
        law!(l23_the_guests_dr6_shows_nothing_of_ours),
        law!(l30_the_guests_debug_registers_stay_its_own),
        law!(l33_the_guests_own_single_step_goes_on_under_our_breakpoints),
        law!(l33_the_guests_own_int1_reaches_it_under_our_breakpoints, IntInRing0),
        law!(l34_the_guests_own_int3_reaches_it_under_our_breakpoints, IntInRing0),
        law!(l60_every_kind_of_access_is_told_behind_it, DataWatch),
        law!(l61_a_store_of_the_same_value_is_told, DataWatch),
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

/// Which accesses of the property `watch` touch a range, in order; each is told with the pc behind it.
fn told(offset: u64, len: u64, on: Trigger, accesses: &[&str]) {
    let mut rig = Rig::one("watch");
    let watch = Breakpoint::watch(fixture::WATCH + offset, len, on);
    rig.set(watch).unwrap();
    for access in accesses {
        let reason = rig.run_first(RunMode::Continue);
        assert!(
            matches!(reason, StopReason::Watchpoint { request, .. } if request == watch),
            "{reason:?} for {access}"
        );
        assert_eq!(name(rig.pc(0)), name(at(&format!("w_{access}_next"))), "{watch}");
    }
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0), "{watch}");
    rig.assert_guest_undisturbed();
}

fn l60_every_kind_of_access_is_told_behind_it() {
    use Trigger::{Access, Write};
    told(0, 1, Write, &["store1"]);
    told(0, 1, Access, &["store1", "read1"]);
    told(2, 2, Write, &["store2"]);
    told(0x10, 8, Write, &["lock_inc"]);
    told(0x18, 8, Write, &["xchg"]);
    told(0x20, 8, Write, &["cmpxchg8b"]);
    told(0x28, 1, Write, &["or"]);
    told(0x28, 1, Access, &["or", "test"]);
    told(0x30, 8, Write, &["movnti"]);
    told(0x40, 8, Write, &["push"]);
    told(0x40, 8, Access, &["push", "pop"]);
    told(0x104, 4, Write, &["wide_low"]);
    told(0xffc, 4, Write, &["page_cross"]);
    told(0x1000, 4, Write, &["page_cross"]);
    told(0x1004, 4, Write, &["next_page"]);
    told(0x1fff, 1, Write, &["last_byte"]);
}

fn l61_a_store_of_the_same_value_is_told() {
    told(8, 8, Trigger::Write, &["store8", "same", "unaligned"]);
    told(8, 8, Trigger::Access, &["store8", "read8", "same", "unaligned"]);
}
