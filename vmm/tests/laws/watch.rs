//! Laws 60 to 66: watchpoints, by debug registers and by read-only pages.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use trapline_guests::fixture::{self, cpu_field, user_field};
use trapline_vmm::boot::ApStart;
use trapline_vmm::debug::{
    Breakpoint, BreakpointError, Crash, Disposition, Handler, Level, Mechanism, Owner, RunMode, Stop, StopReason,
    Stored, Trigger, VcpuId,
};
use trapline_vmm::limits::PAGE_SIZE;

use crate::booted::Booted;
use crate::clock::wait_for;
use crate::lane::Need::{DataWatch, Kick, RealModeSlots, SeveralHits, StepsOverExits, StuckTables, WatchedTables};
use crate::law::{Law, law};
use crate::rig::{Begin, Rig, at, name};

pub(crate) fn laws() -> Vec<Law> {
    vec![
        law!(l60_every_kind_of_access_is_told_behind_it, DataWatch),
        law!(l60_every_kind_of_store_is_told_behind_it_by_pages),
        law!(l60_a_store_in_ring_3_is_told_by_pages),
        law!(l61_a_store_of_the_same_value_is_told, DataWatch),
        law!(l61_a_store_of_the_same_value_is_told_by_pages),
        law!(l62_any_range_is_told_of_exactly_its_stores_by_pages),
        law!(l62_what_kvm_gives_in_pieces_is_one_report_by_pages),
        law!(l62_an_iteration_of_a_rep_is_a_report_of_its_own_by_pages),
        law!(l62_thousands_are_one_change_by_pages),
        law!(l62_pages_serve_what_the_slots_do_not, DataWatch),
        law!(l63_overlapping_watches_are_both_told, DataWatch, SeveralHits),
        law!(l63_overlapping_watches_are_both_told_by_pages),
        law!(l36_a_breakpoint_and_a_watch_on_one_store_by_pages),
        law!(l22_a_stepped_store_is_told_and_ends_the_step_by_pages, StepsOverExits),
        law!(l13_a_watch_hit_within_a_rep_does_not_end_its_crossing_by_pages),
        law!(l64_loads_are_refused_where_only_pages_serve),
        law!(l65_a_store_of_a_device_is_told_by_pages),
        law!(l65_a_store_of_a_device_by_itself_is_told_by_pages, Kick),
        law!(l66_memory_and_registers_are_as_without_us),
        law!(l66_what_is_removed_leaves_no_page_read_only),
        law!(l66_a_change_that_fails_leaves_no_page_read_only),
        law!(l66_a_removal_that_fails_leaves_its_page_watched),
        law!(l66_page_tables_can_be_watched, WatchedTables),
        law!(l66_page_tables_that_stop_the_guest_are_said_and_it_goes_on_without_the_watch, StuckTables),
        law!(l66_a_store_that_kvm_cannot_hand_over_is_said_and_goes_on_without_the_watch),
        law!(l66_a_frame_that_kvm_cannot_hand_over_is_said),
        law!(l66_a_frame_that_stops_the_guest_is_said_and_it_goes_on_without_the_watch, StuckTables),
        law!(l66_stores_beside_are_done_and_nobody_is_told, Kick),
        law!(l66_every_store_of_every_vcpu_is_told_exactly_once, Kick),
        law!(l66_watches_come_and_go_while_the_guest_runs, Kick),
        law!(l67_a_watch_survives_init_of_the_other_cpu, Kick, RealModeSlots),
        law!(l71_a_release_leaves_no_page_read_only, Kick),
    ]
}

/// What serves a test's watchpoints.
#[derive(Clone, Copy, PartialEq)]
enum By {
    Slots,
    Pages,
}

fn rig(property: &'static str, by: By) -> Rig {
    let rig = Rig::one(property);
    if by == By::Pages { rig.with_pages() } else { rig }
}

fn write(offset: u64, len: u64) -> Breakpoint {
    Breakpoint::watch(fixture::WATCH + offset, len, Trigger::Write)
}

/// Every store that a handler was asked about.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<(VcpuId, Stored)>>>);

impl Log {
    fn handler(&self) -> Handler {
        let log = self.0.clone();
        Handler::new(move |hit| {
            let stored = hit.stored.expect("served by pages").clone();
            log.lock().unwrap().push((hit.vcpu, stored));
            Disposition::Continue
        })
    }

    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn take(&self) -> Vec<(VcpuId, Stored)> {
        std::mem::take(&mut self.0.lock().unwrap())
    }

    /// What one vCPU stored, as u64s.
    fn values(&self, vcpu: u32) -> Vec<u64> {
        let log = self.0.lock().unwrap();
        let of = log.iter().filter(|(id, _)| *id == VcpuId(vcpu));
        of.map(|(_, stored)| u64::from_le_bytes(stored.new.as_slice().try_into().unwrap())).collect()
    }
}

fn stored_of(stop: &StopReason) -> &Stored {
    match stop {
        StopReason::Watchpoint { stored: Some(stored), .. } => stored,
        other => panic!("{other:?}"),
    }
}

/// Which accesses of the property `watch` touch a range, in order; each is told with the pc behind it.
fn told(by: By, offset: u64, len: u64, on: Trigger, accesses: &[&str]) {
    let mut rig = rig("watch", by);
    let watch = Breakpoint::watch(fixture::WATCH + offset, len, on);
    rig.set(watch).unwrap();
    for access in accesses {
        let reason = rig.run_first(RunMode::Continue);
        let StopReason::Watchpoint { request, stored, .. } = &reason else { panic!("{reason:?} for {access}") };
        assert_eq!((*request, stored.is_some()), (watch, by == By::Pages));
        assert_eq!(name(rig.pc(0)), name(at(&format!("w_{access}_next"))), "{watch}");
    }
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0), "{watch}");
    rig.assert_guest_undisturbed();
}

const STORES: &[(u64, u64, &[&str])] = &[
    (0, 1, &["store1"]),
    (2, 2, &["store2"]),
    (4, 4, &["store4", "unaligned"]),
    (0x10, 8, &["lock_inc"]),
    (0x18, 8, &["xchg"]),
    (0x20, 8, &["cmpxchg8b"]),
    (0x28, 1, &["or"]),
    (0x30, 8, &["movnti"]),
    (0x40, 8, &["push"]),
    (0x104, 4, &["wide_low"]),
    (0xffc, 4, &["page_cross"]),
    (0x1000, 4, &["page_cross"]),
    (0x1004, 4, &["next_page"]),
    (0x1fff, 1, &["last_byte"]),
];

fn l60_every_kind_of_access_is_told_behind_it() {
    for &(offset, len, accesses) in STORES {
        told(By::Slots, offset, len, Trigger::Write, accesses);
    }
    told(By::Slots, 0, 1, Trigger::Access, &["store1", "read1"]);
    told(By::Slots, 0x28, 1, Trigger::Access, &["or", "test"]);
    told(By::Slots, 0x40, 8, Trigger::Access, &["push", "pop"]);
}

fn l60_every_kind_of_store_is_told_behind_it_by_pages() {
    for &(offset, len, accesses) in STORES {
        told(By::Pages, offset, len, Trigger::Write, accesses);
    }
}

fn l60_a_store_in_ring_3_is_told_by_pages() {
    let mut rig = Rig::new(&[Begin::Ring3("ring3_line")]).with_pages();
    rig.set(write(0, 8)).unwrap();
    let reason = rig.run_first(RunMode::Continue);
    assert_eq!(
        *stored_of(&reason),
        Stored { addr: fixture::WATCH, old: vec![0; 8], new: vec![1, 0, 0, 0, 0, 0, 0, 0] }
    );
    assert_eq!(name(rig.pc(0)), name(at("u_store_next")));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    rig.assert_guest_undisturbed();
}

fn l61_a_store_of_the_same_value_is_told() {
    told(By::Slots, 8, 8, Trigger::Write, &["store8", "same", "unaligned"]);
    told(By::Slots, 8, 8, Trigger::Access, &["store8", "read8", "same", "unaligned"]);
}

fn l61_a_store_of_the_same_value_is_told_by_pages() {
    told(By::Pages, 8, 8, Trigger::Write, &["store8", "same", "unaligned"]);
    // With what was there and what is, as far as it is watched.
    let mut rig = rig("watch", By::Pages);
    rig.set(write(8, 8)).unwrap();
    let value = 0x1122_3344_5566_7788_u64.to_le_bytes();
    for (old, new) in [(&[0; 8][..], &value[..]), (&value[..], &value[..]), (&value[..5], &value[3..])] {
        let reason = rig.run_first(RunMode::Continue);
        assert_eq!(*stored_of(&reason), Stored { addr: fixture::WATCH + 8, old: old.to_vec(), new: new.to_vec() });
    }
}

/// The n-th u64 of both pages gets n. Whatever is watched: told are those stores, with those bytes, that
/// touch it, in this order.
fn l62_any_range_is_told_of_exactly_its_stores_by_pages() {
    let bytes: Vec<u8> = (0..1024u64).flat_map(u64::to_le_bytes).collect();
    let mut state = 62_u64;
    let mut random = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut rig = rig("watch_sweep", By::Pages);
    let mut watches = BTreeSet::new();
    while watches.len() < 60 {
        let longest = [3, 40, 700, 8192][random(4) as usize];
        let len = 1 + random(longest);
        watches.insert((random(8193 - len), len));
    }
    let logs: Vec<_> = watches.into_iter().map(|(offset, len)| (offset, len, Log::default())).collect();
    for (n, (offset, len, log)) in (0..).zip(&logs) {
        rig.coordinator.set_trap(Owner::harness(n), write(*offset, *len), Some(log.handler())).unwrap();
    }
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    for (offset, len, log) in &logs {
        let (first, end) = (offset / 8, (offset + len).div_ceil(8));
        let expected: Vec<_> = (first..end)
            .map(|n| {
                let range = (n * 8).max(*offset)..(n * 8 + 8).min(offset + len);
                let new = bytes[range.start as usize..range.end as usize].to_vec();
                (VcpuId(0), Stored { addr: fixture::WATCH + range.start, old: vec![0; new.len()], new })
            })
            .collect();
        assert_eq!(log.take(), expected, "{len} bytes at {offset:#x}");
    }
}

fn l62_what_kvm_gives_in_pieces_is_one_report_by_pages() {
    // Across two pages: the eight bytes of MOV at 0xffc.
    let mut rig = rig("watch", By::Pages);
    let across = write(0xff8, 0xc);
    rig.set(across).unwrap();
    let reason = rig.run_first(RunMode::Continue);
    let value = rig.registers(0).rax.to_le_bytes().to_vec();
    assert_eq!(*stored_of(&reason), Stored { addr: fixture::WATCH + 0xffc, old: vec![0; 8], new: value });
    assert_eq!(name(rig.pc(0)), name(at("w_page_cross_next")));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    // Sixteen bytes: KVM gives them in two. Watched in one range, in two ranges of two requests, beside.
    for (offset, len) in [(0x40, 16), (0x3c, 0x20), (0x47, 2), (0x48, 1), (0x4f, 1)] {
        let mut rig = self::rig("watch_sse", By::Pages);
        rig.set(write(offset, len)).unwrap();
        let reason = rig.run_first(RunMode::Continue);
        let text: Vec<u8> = (0..16).map(|n| rig.word(fixture::SOURCE + n) as u8).collect();
        let (from, to) = (offset.max(0x40), (offset + len).min(0x50));
        let new = text[(from - 0x40) as usize..(to - 0x40) as usize].to_vec();
        let stored = Stored { addr: fixture::WATCH + from, old: vec![0; new.len()], new };
        assert_eq!(*stored_of(&reason), stored, "{len} bytes at {offset:#x}");
        assert_eq!(name(rig.pc(0)), name(at("w_sse_next")));
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    }
}

/// REP STOSB of three bytes and REP MOVSB of 64: a report for each watched byte, in order.
fn l62_an_iteration_of_a_rep_is_a_report_of_its_own_by_pages() {
    let mut rig = rig("watch", By::Pages);
    let (stos, movs) = (Log::default(), Log::default());
    rig.coordinator.set_trap(Owner::harness(0), write(0x51, 2), Some(stos.handler())).unwrap();
    rig.coordinator.set_trap(Owner::harness(1), write(0x80, 64), Some(movs.handler())).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    let bytes = |log: Log| -> Vec<(u64, Vec<u8>)> {
        log.take().into_iter().map(|(_, stored)| (stored.addr - fixture::WATCH, stored.new)).collect()
    };
    // XCHG has left 0 in RAX.
    assert_eq!(bytes(stos), [(0x51, vec![0]), (0x52, vec![0])]);
    let text = b"0123456789abcdef".repeat(4);
    // An emulator may move several bytes at once; every byte must be told, and none twice.
    let told: Vec<u8> = bytes(movs).into_iter().flat_map(|(_, new)| new).collect();
    assert_eq!(told, text);
}

/// Every u64 of two pages for one owner, and for another every second page of half the memory.
fn l62_thousands_are_one_change_by_pages() {
    let mut rig = rig("watch_sweep", By::Pages);
    let log = Log::default();
    let words = (0..1024).map(|n| (write(n * 8, 8), Some(log.handler()))).collect();
    let epoch = rig.coordinator.image().epoch();
    rig.coordinator.set_traps(Owner::harness(0), words).unwrap();
    assert_eq!(rig.coordinator.image().epoch().0, epoch.0 + 1);
    let pages: Vec<Breakpoint> = (0x24_0000..fixture::MEMORY)
        .step_by(2 * PAGE_SIZE as usize)
        .flat_map(|page| (0..5).map(move |n| Breakpoint::watch(page + n * 700, 3, Trigger::Write)))
        .collect();
    assert!(pages.len() > 1000, "{}", pages.len());
    let quiet = Log::default();
    let traps = pages.iter().map(|page| (*page, Some(quiet.handler()))).collect();
    rig.coordinator.set_traps(Owner::harness(1), traps).unwrap();
    assert_eq!(rig.coordinator.image().epoch().0, epoch.0 + 2);
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(log.values(0), (0..1024).collect::<Vec<u64>>());
    assert_eq!(quiet.len(), 0);
    rig.coordinator.clear_traps(Owner::harness(1), &pages).unwrap();
    rig.coordinator.clear_level(Level::Harness).unwrap();
    assert!(rig.coordinator.image().is_empty());
}

/// Four slots first, then pages; and what one removal frees goes to the oldest that waits on pages.
fn l62_pages_serve_what_the_slots_do_not() {
    let mut rig = Rig::one("watch");
    rig.offer_slots_and_pages();
    let slots: Vec<Breakpoint> = (0..4).map(|n| Breakpoint::exec(at("step_begin") + n)).collect();
    for &slot in &slots {
        rig.set(slot).unwrap();
    }
    let (near, long) = (write(8, 8), write(0x100, 0x200));
    rig.set(near).unwrap();
    rig.set(long).unwrap();
    let by = |rig: &Rig, request| rig.coordinator.mechanism(Owner::GDB, request);
    assert_eq!([near, long].map(|request| by(&rig, request)), [Some(Mechanism::Pages); 2]);
    let reason = rig.run_first(RunMode::Continue);
    assert_eq!((name(rig.pc(0)), stored_of(&reason).addr), (name(at("w_store8_next")), near.addr));
    rig.clear(slots[0]).unwrap();
    assert_eq!([near, long].map(|request| by(&rig, request)), [Some(Mechanism::Slots), Some(Mechanism::Pages)]);
    let reason = rig.run_first(RunMode::Continue);
    assert!(matches!(reason, StopReason::Watchpoint { request, .. } if request == near), "{reason:?}");
    assert_eq!(name(rig.pc(0)), name(at("w_same_next")));
    rig.clear(near).unwrap();
    for access in ["wide_low", "wide_high"] {
        let reason = rig.run_first(RunMode::Continue);
        assert!(matches!(reason, StopReason::Watchpoint { request, .. } if request == long), "{reason:?}");
        assert_eq!(name(rig.pc(0)), name(at(&format!("w_{access}_next"))));
    }
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
}

/// gdb watches eight bytes, a harness the upper four of them: a store to those is both's.
fn overlapping(by: By) {
    let (wide, upper) = (write(0, 8), write(4, 4));
    let harness = Owner::harness(7);
    for gone in [None, Some((Owner::GDB, wide)), Some((harness, upper))] {
        let mut rig = rig("watch", by);
        rig.coordinator.set_breakpoint(Owner::GDB, wide).unwrap();
        rig.coordinator.set_breakpoint(harness, upper).unwrap();
        if let Some((owner, request)) = gone {
            rig.coordinator.clear_breakpoint(owner, request).unwrap();
        }
        let left: Vec<_> =
            [(Owner::GDB, wide), (harness, upper)].into_iter().filter(|held| Some(*held) != gone).collect();
        for access in ["store1", "store2", "store4", "unaligned"] {
            let low = ["store1", "store2"].contains(&access);
            for &(owner, request) in left.iter().filter(|(owner, _)| !low || *owner == Owner::GDB) {
                let stop = rig.run(&rig.plan(RunMode::Continue));
                let told = matches!(stop.reason, StopReason::Watchpoint { request: told, .. } if told == request);
                assert!(told && stop.owner == Some(owner), "{stop:?} for {access}");
                assert_eq!(name(rig.pc(0)), name(at(&format!("w_{access}_next"))));
            }
        }
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    }
}

fn l63_overlapping_watches_are_both_told() {
    overlapping(By::Slots);
}

fn l63_overlapping_watches_are_both_told_by_pages() {
    overlapping(By::Pages);
}

/// gdb stops before the store, a harness counts behind it: what is jumped over is not counted.
fn l36_a_breakpoint_and_a_watch_on_one_store_by_pages() {
    let mut rig = rig("watch_exec", By::Pages);
    let exec = Breakpoint::exec(at("w_exec"));
    let log = Log::default();
    rig.set(exec).unwrap();
    rig.coordinator.set_trap(Owner::harness(0), write(0, 8), Some(log.handler())).unwrap();
    for round in 0..5 {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(exec));
        assert_eq!(log.len(), round.min(2), "counted before its store, or a store that was not done");
        match round {
            1 => assert_eq!(name(rig.step()), name(at("w_exec_next"))),
            2.. => {
                let mut registers = rig.registers(0);
                registers.rip = at("w_exec_next");
                rig.coordinator.set_registers(VcpuId(0), &registers).unwrap();
            }
            _ => {}
        }
    }
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(log.values(0), [1, 2]);
}

fn l22_a_stepped_store_is_told_and_ends_the_step_by_pages() {
    let mut rig = rig("watch", By::Pages);
    rig.run_to("w_store8");
    rig.set(write(8, 8)).unwrap();
    let reason = rig.run_first(RunMode::Step);
    assert_eq!(stored_of(&reason).addr, fixture::WATCH + 8);
    assert_eq!(name(rig.pc(0)), name(at("w_store8_next")));
    // The next step is one of its own, and a store beside the watch is a plain step.
    assert_eq!(name(rig.step()), name(at("w_read8")));
    rig.clear(write(8, 8)).unwrap();
    rig.set(write(0x18, 8)).unwrap();
    rig.run_to("w_lock_inc");
    assert_eq!(name(rig.step()), name(at("w_lock_inc_next")));
    let range = RunMode::StepRange { start: at("w_lock_inc"), end: at("w_end") };
    assert_eq!(stored_of(&rig.run_first(range)).addr, fixture::WATCH + 0x18);
    assert_eq!(name(rig.pc(0)), name(at("w_xchg_next")));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    rig.assert_guest_undisturbed();
}

/// Three bytes are stored at WATCH + 0x50 by REP STOSB; the second of them is watched.
fn l13_a_watch_hit_within_a_rep_does_not_end_its_crossing_by_pages() {
    let mut rig = rig("watch", By::Pages);
    let (exec, watch) = (Breakpoint::exec(at("w_stos")), write(0x51, 1));
    rig.set(exec).unwrap();
    rig.set(watch).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(exec));
    let reason = rig.run_first(RunMode::Continue);
    assert_eq!(stored_of(&reason).addr, watch.addr);
    assert_eq!((name(rig.pc(0)), rig.registers(0).rcx), (name(exec.addr), 1));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0), "the crossing was told twice");
}

/// A disk's worker stores while the guest runs and touches no device.
fn l65_a_store_of_a_device_by_itself_is_told_by_pages() {
    let mut rig = Rig::all(2, "hotloop").with_pages();
    let watch = write(0x20, 4);
    assert!(rig.write_memory(watch.addr - 2, &[1; 8]));
    rig.set(watch).unwrap();
    assert_eq!(rig.go(), None);
    for n in 2..6 {
        let store = rig.store_as_device(watch.addr - 2, &[n; 8]);
        let stop = rig.wait();
        store.join().unwrap();
        let Stored { addr, old, new } = stored_of(&stop.reason).clone();
        assert_eq!((addr, old, new), (watch.addr, vec![n - 1; 4], vec![n; 4]));
        // Nobody's instruction: all go on, and where a breakpoint was told it is not told again.
        assert_eq!(rig.go(), None);
    }
    rig.store_as_device(watch.addr + 4, &[9; 4]).join().unwrap();
    rig.interrupt();
    rig.assert_guest_undisturbed();
}

fn l64_loads_are_refused_where_only_pages_serve() {
    let mut rig = rig("watch", By::Pages);
    for on in [Trigger::Read, Trigger::Access] {
        let error = rig.set(Breakpoint::watch(fixture::WATCH, 8, on)).unwrap_err();
        assert!(matches!(error, BreakpointError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("watch) work"), "{error}");
    }
    assert!(rig.coordinator.image().is_empty());
}

/// A device copies each byte that is written to its port to a watched place; the debugger writes there, too.
fn l65_a_store_of_a_device_is_told_by_pages() {
    for stepping in [false, true] {
        let mut rig = rig("step", By::Pages);
        let watch = write(0x20, 1);
        rig.copy_port_to(watch.addr);
        rig.run_to("s_out");
        assert!(rig.write_memory(watch.addr, &[0x5a]));
        rig.set(watch).unwrap();
        assert!(rig.write_memory(watch.addr, &[0xa5]));
        let reason = rig.run_first(if stepping { RunMode::Step } else { RunMode::Continue });
        let Stored { addr, old, new } = stored_of(&reason).clone();
        assert_eq!((addr, old, new.len()), (watch.addr, vec![0xa5], 1));
        assert_eq!(name(rig.pc(0)), name(at("s_out_next")));
        assert_eq!(rig.word(watch.addr) as u8, new[0]);
        assert_eq!(rig.accesses(), [0, 0, 1, 0]);
        let reason = rig.run_first(RunMode::Continue);
        assert_eq!(stored_of(&reason).old, new);
        assert_eq!(name(rig.pc(0)), name(at("s_outs_next")));
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    }
}

/// CPU 1 is started by INIT and SIPI again and again; CPU 0 counts each time in a watched place.
fn l67_a_watch_survives_init_of_the_other_cpu() {
    let mut guest = Booted::fixture(2, "ap_restart", ApStart::Sipi);
    let hits = fixture::cpu_address(0, cpu_field::HITS).unwrap();
    let count = Breakpoint::watch(hits, 8, Trigger::Write);
    guest.set(count);
    let mut before = None;
    for _ in 0..5 {
        let stop = guest.run_all();
        assert!(matches!(stop.reason, StopReason::Watchpoint { request, .. } if request == count), "{stop:?}");
        let now = guest.word(hits);
        assert_eq!(stop.vcpu, VcpuId(0));
        assert!(before.is_none_or(|before| now == before + 1), "{before:?}, then {now}");
        before = Some(now);
    }
    guest.clear(count);
    guest.go();
    wait_for("it to go on", || (guest.word(hits) > 10).then_some(()));
    assert_eq!(guest.vm.stop().unwrap().reason, StopReason::Interrupted);
}

/// Everything that the property `watch` leaves behind, with no watch, and with one on all of both pages.
fn l66_memory_and_registers_are_as_without_us() {
    let results = [false, true].map(|watched| {
        let mut rig = rig("watch", By::Pages);
        let log = Log::default();
        if watched {
            rig.coordinator.set_trap(Owner::harness(0), write(0, 0x2000), Some(log.handler())).unwrap();
        }
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
        assert_eq!(log.len() > 80, watched, "{} stores", log.len());
        let memory: Vec<u64> = (0..1024).map(|n| rig.word(fixture::WATCH + 8 * n)).collect();
        rig.assert_guest_undisturbed();
        (memory, rig.registers(0))
    });
    let [(memory, registers), (watched_memory, watched_registers)] = results;
    assert_eq!(memory, watched_memory);
    assert_eq!(registers, watched_registers);
}

/// Stores exit while something is watched, and no longer.
fn l66_what_is_removed_leaves_no_page_read_only() {
    let mut rig = rig("watch_sweep", By::Pages);
    let stores = |rig: &Rig| rig.spies[0].look(|notes| notes.stored);
    let (low, high) = (write(8, 8), write(0x1000, 1));
    rig.set(low).unwrap();
    rig.set(high).unwrap();
    assert_eq!(stored_of(&rig.run_first(RunMode::Continue)).addr, low.addr);
    assert_eq!(stores(&rig), 2, "the store before it is on the same page");
    rig.clear(low).unwrap();
    assert_eq!(stored_of(&rig.run_first(RunMode::Continue)).addr, high.addr);
    assert_eq!(stores(&rig), 3, "a store to the lower page exited after its watch was gone");
    rig.clear(high).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(stores(&rig), 3);
    assert_eq!(rig.word(fixture::WATCH + 0x1ff8), 1023);
}

fn l66_a_change_that_fails_leaves_no_page_read_only() {
    let mut rig = rig("watch_sweep", By::Pages);
    rig.spies[0].refuse(1);
    let error = rig.set(write(0, 0x2000)).unwrap_err();
    assert!(matches!(error, BreakpointError::Apply(_)), "{error}");
    // One page of two is no RAM: nothing is protected, and the reason is given.
    let hole = Breakpoint::watch(fixture::MEMORY - 8, 16, Trigger::Write);
    assert!(matches!(rig.set(hole).unwrap_err(), BreakpointError::NotMapped { .. }));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(rig.spies[0].look(|notes| notes.stored), 0);
}

/// A vCPU cannot follow the removal of a watch: it is still in force, and so must its page be.
fn l66_a_removal_that_fails_leaves_its_page_watched() {
    let mut rig = rig("watch_sweep", By::Pages);
    let watch = write(8, 8);
    rig.set(watch).unwrap();
    rig.spies[0].refuse(1);
    let error = rig.clear(watch).unwrap_err();
    assert!(matches!(error, BreakpointError::Apply(_)), "{error}");
    assert_eq!(stored_of(&rig.run_first(RunMode::Continue)).addr, watch.addr);
    rig.clear(watch).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
}

/// The guest digs a hole by clearing a bit of a watched page table entry, and fills it in its #PF handler.
fn l66_page_tables_can_be_watched() {
    let mut rig = rig("fault_pf", By::Pages);
    let entry = Breakpoint::watch(at("fx_hole_entry"), 8, Trigger::Write);
    rig.set(entry).unwrap();
    let present = |reason: &StopReason| stored_of(reason).new[0] & 1;
    assert_eq!(present(&rig.run_first(RunMode::Continue)), 0, "the hole");
    assert_eq!(present(&rig.run_first(RunMode::Continue)), 1, "filled");
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(rig.log().iter().map(|entry| entry.vector).collect::<Vec<_>>(), [14]);
}

/// What the processor needs is on the watched page, and it does not get on. Nothing is lost.
fn goes_on_without(mut rig: Rig, watch: Breakpoint) -> Rig {
    for _ in 0..2 {
        let reason = rig.run_first(RunMode::Continue);
        assert_eq!(*caused_by_watch(&reason, watch), Crash::NoProgress);
    }
    rig.clear(watch).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    rig
}

fn l66_page_tables_that_stop_the_guest_are_said_and_it_goes_on_without_the_watch() {
    let entry = Breakpoint::watch(at("fx_hole_entry"), 8, Trigger::Write);
    let mut rig = rig("fault_pf", By::Pages);
    rig.set(entry).unwrap();
    assert_eq!(stored_of(&rig.run_first(RunMode::Continue)).new[0] & 1, 0, "the hole");
    let rig = goes_on_without(rig, entry);
    assert_eq!(rig.log().iter().map(|entry| entry.vector).collect::<Vec<_>>(), [14]);
}

fn l66_a_frame_that_stops_the_guest_is_said_and_it_goes_on_without_the_watch() {
    let mut rig = rig("watch_stack", By::Pages);
    rig.set(write(0, 1)).unwrap();
    let rig = goes_on_without(rig, write(0, 1));
    assert_eq!(rig.log().iter().map(|entry| entry.vector).collect::<Vec<_>>(), [6]);
}

/// The crash that a watched page caused.
fn caused_by_watch(reason: &StopReason, watch: Breakpoint) -> &Crash {
    match reason {
        StopReason::Crash(Crash::WatchedPage { crash, request }) if *request == watch => crash,
        other => panic!("{other:?}"),
    }
}

fn l66_a_store_that_kvm_cannot_hand_over_is_said_and_goes_on_without_the_watch() {
    let mut rig = Rig::new(&[Begin::Ring3("ring3_sse_store")]).with_pages();
    let watch = write(0x100, 4);
    rig.set(watch).unwrap();
    for _ in 0..2 {
        let reason = rig.run_first(RunMode::Continue);
        assert!(matches!(caused_by_watch(&reason, watch), Crash::EmulationFailure { .. }), "{reason:?}");
        assert_eq!(name(rig.pc(0)), name(at("u_sse_store")));
    }
    rig.clear(watch).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    rig.assert_guest_undisturbed();
}

fn l66_a_frame_that_kvm_cannot_hand_over_is_said() {
    let mut rig = rig("watch_stack", By::Pages);
    let watch = write(0, 1);
    rig.set(watch).unwrap();
    let reason = rig.run_first(RunMode::Continue);
    caused_by_watch(&reason, watch);
}

/// Nobody is told of them, and none is lost; with the counts of the guest itself.
fn l66_stores_beside_are_done_and_nobody_is_told() {
    let mut rig = Rig::new(&[Begin::Ring0("watch_beside"), Begin::Ring3("ring3_store")]).with_pages();
    rig.set(write(0, 8)).unwrap();
    assert_eq!(rig.go(), None);
    let counts = |rig: &Rig| {
        let user = rig.word(fixture::user_address(1, user_field::HITS).unwrap());
        [(rig.word(fixture::WATCH + 0x400), rig.field(0, cpu_field::HITS)), (rig.word(fixture::WATCH + 0xc08), user)]
    };
    wait_for("both to store", || {
        assert_eq!(rig.coordinator.poll().unwrap(), None, "told of a store beside");
        counts(&rig).iter().all(|count| count.1 > 200).then_some(())
    });
    rig.interrupt();
    for (stored, counted) in counts(&rig) {
        assert!(stored - counted <= 1, "{stored} stored, {counted} counted");
    }
    rig.assert_guest_undisturbed();
}

fn l66_every_store_of_every_vcpu_is_told_exactly_once() {
    let mut rig = Rig::all(3, "watch_own").with_pages();
    let log = Log::default();
    let own = (0..3).map(|n| (write(8 * n, 8), Some(log.handler()))).collect();
    rig.coordinator.set_traps(Owner::harness(0), own).unwrap();
    // And somebody who stops for each store of one of them.
    let stopping = write(8, 4);
    rig.set(stopping).unwrap();
    for n in 1..=100 {
        let Stop { vcpu, reason, owner } = rig.run_all();
        assert_eq!((vcpu, owner), (VcpuId(1), Some(Owner::GDB)));
        assert_eq!(stored_of(&reason).new, (n as u32).to_le_bytes());
    }
    rig.clear(stopping).unwrap();
    assert_eq!(rig.go(), None);
    wait_for("all to store", || (0..3).all(|n| log.values(n).len() > 200).then_some(()));
    rig.interrupt();
    for n in 0..3 {
        let word = rig.word(fixture::WATCH + 8 * u64::from(n));
        assert_eq!(log.values(n), (1..=word).collect::<Vec<_>>(), "vCPU {n}");
        assert!(word - rig.field(n, cpu_field::HITS) <= 1);
    }
    rig.assert_guest_undisturbed();
}

fn l66_watches_come_and_go_while_the_guest_runs() {
    let mut rig = Rig::all(2, "watch_own").with_pages();
    assert_eq!(rig.go(), None);
    let harness = Owner::harness(0);
    let both = [write(0, 8), write(8, 8)];
    for round in 0..20 {
        let log = Log::default();
        let traps = both.iter().map(|watch| (*watch, Some(log.handler()))).collect();
        rig.coordinator.set_traps(harness, traps).unwrap();
        wait_for("both to be told of", || {
            assert_eq!(rig.coordinator.poll().unwrap(), None);
            (0..2).all(|n| log.values(n).len() > 3).then_some(())
        });
        rig.coordinator.clear_traps(harness, &both).unwrap();
        let told = log.len();
        let before = [0, 1].map(|n| rig.field(n, cpu_field::HITS));
        wait_for("both to go on", || {
            (0..2).all(|n| rig.field(n, cpu_field::HITS) > before[n as usize] + 3).then_some(())
        });
        assert_eq!(log.len(), told, "told after the removal");
        for n in 0..2 {
            let values = log.values(n);
            assert!(values.windows(2).all(|pair| pair[1] == pair[0] + 1), "round {round}, vCPU {n}: {values:?}");
        }
    }
    rig.interrupt();
    for n in 0..2 {
        let word = rig.word(fixture::WATCH + 8 * u64::from(n));
        assert!(word - rig.field(n, cpu_field::HITS) <= 1, "vCPU {n}: a store was lost or done twice");
    }
    rig.assert_guest_undisturbed();
}

fn l71_a_release_leaves_no_page_read_only() {
    let mut rig = Rig::all(2, "watch_own").with_pages();
    rig.set(write(0, 0x1800)).unwrap();
    for _ in 0..3 {
        rig.run_all();
    }
    rig.coordinator.release(Level::Gdb).unwrap();
    let stores = |rig: &Rig| [0, 1].map(|n| rig.spies[n].look(|notes| notes.stored));
    let before = stores(&rig);
    let count = rig.field(0, cpu_field::HITS);
    wait_for("it to go on", || (rig.field(0, cpu_field::HITS) > count + 1000).then_some(()));
    rig.interrupt();
    assert_eq!(stores(&rig), before);
}
