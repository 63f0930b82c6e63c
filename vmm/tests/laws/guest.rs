//! Laws 23, 24, 27, 30 to 36 and 73: the guest's own debug registers and exceptions, beside ours.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use trapline_guests::fixture::cpu_field::{DB, HITS, SECOND};
use trapline_guests::fixture::{self, LogEntry};
use trapline_vmm::debug::{
    Breakpoint, Disposition, Dr6, Handler, Level, Notice, Owner, RunMode, StopReason, Trigger, VcpuId,
};

use crate::clock::wait_for;
use crate::lane::Flavour::Pvm;
use crate::lane::Need::{DataWatch, DrWrites, GeneralDetect, Kick, StepsOverExits};
use crate::lane::flavour;
use crate::law::{Law, law};
use crate::rig::{Rig, at, name};

pub(crate) fn laws() -> Vec<Law> {
    vec![
        law!(l23_the_guests_dr6_shows_nothing_of_ours),
        law!(l24_the_guests_own_hits_add_up_around_one_of_ours),
        law!(l27_the_guest_loses_when_no_slot_is_left_and_regains_it),
        law!(l30_the_guests_debug_registers_stay_its_own),
        law!(l30_every_access_to_a_debug_register_is_to_the_guests_own),
        law!(l30_what_the_guest_writes_it_reads_back_while_ours_come_and_go, Kick),
        law!(l31_the_guests_own_breakpoints_fire_beside_ours),
        law!(l31_a_breakpoint_that_the_guest_sets_unseen_is_served_in_time, Kick),
        law!(l31_one_that_the_guest_sets_is_served_at_once, DrWrites),
        law!(l31_where_writes_are_told_nobody_looks_for_them_now_and_then, DrWrites),
        law!(l31_one_that_the_guest_switches_off_and_on_is_served_each_time, Kick),
        law!(l31_one_that_the_guest_has_switched_off_is_not_served),
        law!(l32_the_guests_breakpoint_and_ours_on_one_instruction_are_both_hit, Kick),
        law!(l33_the_guests_own_single_step_goes_on_under_our_breakpoints),
        law!(l33_the_guests_own_single_step_over_its_debug_registers, StepsOverExits),
        law!(l33_the_guests_own_int1_reaches_it_under_our_breakpoints),
        law!(l34_the_guests_own_int3_reaches_it_under_our_breakpoints),
        law!(l35_general_detect_is_the_guests_own, GeneralDetect),
        law!(l36_who_stops_before_an_access_leaves_it_to_who_counts_behind_it, DataWatch),
        law!(l73_instructions_that_only_raise_something_raise_it),
    ]
}

/// Where the guest never comes by.
fn elsewhere() -> Breakpoint {
    Breakpoint::exec(at("step_begin"))
}

/// More of the same.
fn far(n: u64) -> Breakpoint {
    Breakpoint::exec(at("step_begin") + n)
}

/// `fx_saved[n]`.
fn saved(rig: &Rig, n: u64) -> u64 {
    rig.word(fixture::saved_address(n).unwrap())
}

/// What it took and where, in words.
fn taken(log: &[LogEntry]) -> Vec<(u64, String)> {
    log.iter().map(|entry| (entry.vector, name(entry.rip))).collect()
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

/// The guest leaves DR6 alone: what it reads at the end are its own two hits, and not ours.
fn l24_the_guests_own_hits_add_up_around_one_of_ours() {
    let mut rig = Rig::one("own_dr6");
    rig.run_to("da_armed");
    let between = Breakpoint::exec(at("da_between"));
    // Ours would be B0 and B1, if they were the guest's.
    rig.set(elsewhere()).unwrap();
    rig.set(between).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(between));
    assert_eq!(rig.registers(0).dr6, 0xffff_0ff1);
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(saved(&rig, 0), 0xffff_0ff3);
    let log: Vec<_> = rig.log().iter().map(|entry| (entry.vector, name(entry.rip), entry.dr6)).collect();
    let hit = |label: &str, dr6| (1, name(at(label)), dr6);
    assert_eq!(log, [hit("da_first", 0xffff_0ff1), hit("da_second", 0xffff_0ff3)]);
    assert_eq!([rig.registers(0).r8, rig.registers(0).r9, rig.registers(0).r10], [1, 1, 1]);
}

fn l27_the_guest_loses_when_no_slot_is_left_and_regains_it() {
    let mut rig = Rig::one("own_dr6");
    rig.run_to("da_armed");
    let first = Breakpoint::exec(at("da_between"));
    for request in [far(0), far(1), far(2), first] {
        rig.set(request).unwrap();
    }
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(first));
    // KVM's interpreter serves the guest's own registers beside ours.
    let served = if flavour() == Some(Pvm) { 1 } else { 0 };
    assert_eq!(rig.log().len(), served, "{:x?}", rig.log());
    let guest = Owner { level: Level::Guest, id: 0 };
    let lost = |label| Notice::Evicted(guest, Breakpoint::exec(at(label)));
    // One slot was left for a while.
    assert_eq!(rig.coordinator.take_notices(), [lost("da_second"), lost("da_first")]);
    // Room again, for the first that asks.
    rig.clear(far(0)).unwrap();
    assert_eq!(rig.coordinator.take_notices(), [Notice::Restored(guest, Breakpoint::exec(at("da_first")))]);
    rig.clear(far(1)).unwrap();
    assert_eq!(rig.coordinator.take_notices(), [Notice::Restored(guest, Breakpoint::exec(at("da_second")))]);
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(taken(&rig.log()).last(), Some(&(1, name(at("da_second")))));
    assert_eq!([rig.registers(0).r8, rig.registers(0).r9, rig.registers(0).r10], [1, 1, 1]);
}

/// The guest writes and reads its own DR0-7 while a breakpoint of ours is armed.
fn l30_the_guests_debug_registers_stay_its_own() {
    let mut rig = Rig::one("own_dr");
    rig.set(elsewhere()).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!([saved(&rig, 0), saved(&rig, 1), saved(&rig, 3)], [fixture::WATCH, at("od_exec"), 0xd040a]);
    assert_eq!(saved(&rig, 4), 1, "the instruction under its own breakpoint ran once");
    let registers = rig.registers(0);
    assert_eq!([registers.dr[0], registers.dr[1], registers.dr7], [fixture::WATCH, at("od_exec"), 0x400]);
}

/// All moves, both aliases, and the ones that fault.
fn l30_every_access_to_a_debug_register_is_to_the_guests_own() {
    /// B0-B3 and the others are all that can be set; these two depend on the processor.
    const PROCESSORS_OWN: u64 = Dr6::BLD | Dr6::RTM;
    let read = [false, true].map(|armed| {
        let mut rig = Rig::one("own_dr_forms");
        if armed {
            rig.set(elsewhere()).unwrap();
        }
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0), "armed: {armed}");
        let read: Vec<u64> = (0..15).map(|n| saved(&rig, n)).collect();
        (read, rig.log())
    });
    let [(_, log_without), (mut with, log_with)] = read;
    assert_eq!(log_with, log_without);
    with[7] |= PROCESSORS_OWN;
    // What the SDM says; an emulated processor without us keeps reserved bits that were written.
    let expected: [[u64; 5]; 3] = [
        [0x1111, 0x1234_5678_90ab_cdef, 0x3333, 0x4444, 0xffff_0ff0],
        [0x400, 0xffff_efff, 0xffff_0ff0, 0xffff_0400, 0x400],
        [0xffff_4ff1, 0x1_0400, 0x77, 0x1_0400, 0xffff_4ff1],
    ];
    assert_eq!(format!("{with:x?}"), format!("{:x?}", expected.concat()));
    let faults = ["odf_de", "odf_wide7", "odf_wide6"].map(|label| name(at(label)));
    assert_eq!(taken(&log_without), [6, 13, 13].into_iter().zip(faults).collect::<Vec<_>>());
}

fn l30_what_the_guest_writes_it_reads_back_while_ours_come_and_go() {
    let mut rig = Rig::all(2, "own_dr_rewrite");
    assert_eq!(rig.go(), None);
    let mut rounds = 0;
    for n in 0..40 {
        let before = rig.field(0, HITS);
        rig.set(far(n)).unwrap();
        wait_for("the guest to go on", || (rig.field(0, HITS) > before).then_some(()));
        rig.clear(far(n)).unwrap();
        rounds = rig.field(0, HITS);
    }
    rig.interrupt();
    assert!(rounds > 40);
    assert_eq!([rig.field(0, SECOND), rig.field(1, SECOND)], [0, 0], "a debug register did not read as written");
    rig.assert_guest_undisturbed();
}

/// Runs a property to its end without us, and again with breakpoints of ours elsewhere: the guest's
/// own log must be the same, and we must be told of nothing.
fn same_log_beside(property: &'static str, ours: u64) -> Vec<LogEntry> {
    let logs = [0, ours].map(|armed| {
        let mut rig = Rig::one(property);
        for n in 0..armed {
            rig.set(far(n)).unwrap();
        }
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0), "beside {armed} of ours");
        rig.log()
    });
    let [without, with] = logs;
    assert_eq!(taken(&with), taken(&without), "with us: {with:x?}");
    for (with, without) in with.iter().zip(&without) {
        assert_eq!(with, without);
    }
    without
}

fn same_log(property: &'static str) -> Vec<LogEntry> {
    same_log_beside(property, 1)
}

/// A write watch, an access watch and a breakpoint of the guest's, in slots of other numbers.
fn l31_the_guests_own_breakpoints_fire_beside_ours() {
    let log = same_log("own_three");
    let hit = |label: &str, dr6| (name(at(label)), dr6);
    let mut round = vec![hit("o3_exec", 0xffff_0ff8)];
    // No data slot fires in KVM's interpreter, with us or without.
    if flavour() != Some(Pvm) {
        round = vec![hit("o3_write_next", 0xffff_0ff1), round.remove(0), hit("o3_read_next", 0xffff_0ff4)];
    }
    let seen: Vec<_> = log.iter().map(|entry| (name(entry.rip), entry.dr6)).collect();
    assert_eq!(seen, [round.clone(), round.clone(), round].concat());
    assert!(log.iter().all(|entry| entry.dr7 == 0x0b0d_04a2));
}

/// The guest leaves for nothing between setting its breakpoint and coming by it. What it crosses
/// before anybody has looked is lost where the access is not reported; then no more.
fn l31_a_breakpoint_that_the_guest_sets_unseen_is_served_in_time() {
    let mut rig = Rig::one("own_dr_loop");
    rig.set(elsewhere()).unwrap();
    assert_eq!(rig.go(), None);
    wait_for("the guest's own breakpoint", || (rig.field(0, DB) > 10).then_some(()));
    rig.interrupt();
    let before = [rig.field(0, DB), rig.field(0, HITS)];
    assert_eq!(rig.go(), None);
    wait_for("more of them", || (rig.field(0, DB) > before[0] + 1000).then_some(()));
    rig.interrupt();
    let more = [rig.field(0, DB) - before[0], rig.field(0, HITS) - before[1]];
    assert!(more[0].abs_diff(more[1]) <= 1, "#DB and crossings: {more:?}");
}

/// Its first crossing is two instructions behind the write.
fn l31_one_that_the_guest_sets_is_served_at_once() {
    let mut rig = Rig::one("own_dr_loop");
    let ours = Breakpoint::exec(at("ol_next"));
    rig.set(ours).unwrap();
    for round in 1..=50 {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(ours));
        assert_eq!([rig.field(0, HITS), rig.field(0, DB)], [round, round], "crossings and #DB");
    }
}

/// A look costs every guest some time, also one that has no breakpoints of its own.
fn l31_where_writes_are_told_nobody_looks_for_them_now_and_then() {
    let mut rig = Rig::one("own_dr_loop");
    rig.set(elsewhere()).unwrap();
    assert_eq!(rig.go(), None);
    wait_for("the guest's own breakpoint", || (rig.field(0, DB) > 10).then_some(()));
    let (kicks_itself, armed) = (rig.spies[0].look(|notes| notes.kicks_itself), rig.spies[0].armed());
    rig.interrupt();
    assert!(!kicks_itself, "with {armed:?}");
}

/// As a kernel does at each switch of threads.
fn l31_one_that_the_guest_switches_off_and_on_is_served_each_time() {
    let mut rig = Rig::one("own_dr_switch");
    rig.set(elsewhere()).unwrap();
    assert_eq!(rig.go(), None);
    wait_for("the guest's own breakpoint", || (rig.field(0, DB) > 1000).then_some(()));
    rig.interrupt();
    let more = [rig.field(0, DB), rig.field(0, HITS)];
    assert!(more[0].abs_diff(more[1]) <= 1, "#DB and crossings: {more:?}");
}

fn l31_one_that_the_guest_has_switched_off_is_not_served() {
    assert_eq!(same_log("own_dr_off"), []);
    let mut rig = Rig::one("own_dr_off");
    rig.set(elsewhere()).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(saved(&rig, 0), 100);
    let trapped = rig.spies[0].look(|notes| notes.trapped);
    assert!(trapped <= 64, "the copies went on hitting for nothing: {trapped} times");
}

/// Ours first, then the guest's handler, then the instruction, each once.
fn l32_the_guests_breakpoint_and_ours_on_one_instruction_are_both_hit() {
    let mut rig = Rig::one("own_dr_loop");
    let bp = Breakpoint::exec(at("ol_exec"));
    rig.set(bp).unwrap();
    // The first crossings may be before the guest's is served.
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
    for round in 0..50 {
        let before = [rig.field(0, HITS), rig.field(0, DB)];
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        let after = [rig.field(0, HITS), rig.field(0, DB)];
        assert_eq!([after[0] - before[0], after[1] - before[1]], [1, 1], "executions and #DB in round {round}");
    }
    // And with a handler that only counts.
    let counted = Arc::new(AtomicU64::new(0));
    let count = counted.clone();
    rig.clear(bp).unwrap();
    let handler = Handler::new(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        Disposition::Continue
    });
    let before = [rig.field(0, HITS), rig.field(0, DB)];
    rig.coordinator.set_trap(Owner::harness(1), bp, Some(handler)).unwrap();
    assert_eq!(rig.go(), None);
    wait_for("hits", || (counted.load(Ordering::Relaxed) > 1000).then_some(()));
    rig.interrupt();
    let after = [rig.field(0, HITS), rig.field(0, DB)];
    let (hits, dbs, told) = (after[0] - before[0], after[1] - before[1], counted.load(Ordering::Relaxed));
    assert!(told.abs_diff(hits) <= 1 && told.abs_diff(dbs) <= 1, "told {told}, executed {hits}, #DB {dbs}");
}

fn l33_the_guests_own_single_step_goes_on_under_our_breakpoints() {
    let log = same_log("own_tf");
    assert_eq!(log.len(), 5);
    assert!(log.iter().all(|entry| (entry.vector, entry.dr6) == (1, 0xffff_4ff0)), "{log:x?}");
}

fn l33_the_guests_own_single_step_over_its_debug_registers() {
    let log = same_log("own_tf_dr");
    assert!(log.len() >= 5, "{log:x?}");
}

fn l33_the_guests_own_int1_reaches_it_under_our_breakpoints() {
    assert_eq!(taken(&same_log("int1")), [(1, name(at("i1_next")))]);
}

fn l34_the_guests_own_int3_reaches_it_under_our_breakpoints() {
    for (property, behind) in [("int3", "i3_next"), ("int3_long", "i3_long_next")] {
        assert_eq!(taken(&same_log(property)), [(3, name(at(behind)))]);
    }
}

fn l35_general_detect_is_the_guests_own() {
    let log = same_log("own_gd");
    assert_eq!(taken(&log), [(1, name(at("gd_access")))]);
    assert_eq!((log[0].dr6, log[0].dr7), (0xffff_2ff0, 0x400));
}

/// gdb stops before the store, a harness counts behind it: it counts what was really stored.
fn l36_who_stops_before_an_access_leaves_it_to_who_counts_behind_it() {
    let exec = Breakpoint::exec(at("w_exec"));
    let watch = Breakpoint::watch(fixture::WATCH, 8, Trigger::Write);
    let mut rig = Rig::one("watch_exec");
    let counted = Arc::new(AtomicU64::new(0));
    let count = counted.clone();
    let handler = Handler::new(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        Disposition::Continue
    });
    rig.coordinator.set_trap(Owner::harness(1), watch, Some(handler)).unwrap();
    rig.set(exec).unwrap();
    // Sent past the store: it never happens.
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(exec));
    let mut registers = rig.registers(0);
    registers.rip = at("w_exec_next");
    rig.coordinator.set_registers(VcpuId(0), &registers).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(exec));
    assert_eq!((counted.load(Ordering::Relaxed), rig.word(fixture::WATCH)), (0, 0));
    // Stepped over it, and gone on over it.
    assert_eq!(name(rig.step()), name(at("w_exec_next")));
    assert_eq!((counted.load(Ordering::Relaxed), rig.word(fixture::WATCH)), (1, 2));
    for stores in [1, 2, 3] {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(exec));
        assert_eq!(counted.load(Ordering::Relaxed), stores);
    }
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(counted.load(Ordering::Relaxed), 4);
    rig.assert_guest_undisturbed();
}

fn l73_instructions_that_only_raise_something_raise_it() {
    let log = same_log("int_n");
    assert_eq!(taken(&log), [(fixture::vector::SOFTWARE.into(), name(at("int_n_next")))]);
    let log = same_log("ud0");
    assert_eq!(taken(&log), [(6, name(at("ud0_at"))), (6, name(at("ud1_at")))]);
}
