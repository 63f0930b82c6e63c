//! Laws 13, 14 and 22: every crossing of a breakpoint by every vCPU is told exactly once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use trapline_guests::fixture::{self, cpu_field, user_field};
use trapline_vmm::debug::{Breakpoint, Disposition, Handler, Hit, Owner, RunMode, Stop, StopReason, Trigger, VcpuId};

use crate::booted::Booted;
use crate::clock::wait_for;
use crate::lane::Need::{DataWatch, ExecInRing3, Kick, ResumeFlagOverExits, SeveralHits};
use crate::law::{Law, law};
use crate::rig::{Begin, Rig, at, hit, name};

pub(crate) fn laws() -> Vec<Law> {
    vec![
        law!(l13_exactly_once_toggling_1000_rounds, Kick),
        law!(l13_exactly_once_on_one_vcpu),
        law!(l13_exactly_once_where_interrupts_are_taken, Kick),
        law!(l13_exactly_once_on_neighbouring_instructions, Kick),
        law!(l13_exactly_once_in_ring_3, Kick, ExecInRing3),
        law!(l13_a_vcpu_that_came_back_to_its_breakpoint_is_told_of_again, Kick),
        law!(l13_a_vcpu_that_has_not_moved_is_not_told_of_again, Kick),
        law!(l13_every_watched_store_is_told_exactly_once, DataWatch, Kick),
        law!(l13_exactly_once_on_accesses_to_devices),
        law!(l13_exactly_once_at_the_end_of_a_fault_handler),
        law!(l13_a_rep_is_one_crossing, ResumeFlagOverExits),
        law!(l13_a_watch_hit_within_a_rep_does_not_end_its_crossing, DataWatch),
        law!(l14_all_that_stop_in_one_window_are_told_without_running, Kick),
        law!(l14_a_stop_of_a_vcpu_that_stays_parked_waits, Kick),
        law!(l14_a_stop_request_may_be_answered_by_a_hit, Kick),
        law!(l42_a_breakpoint_on_an_instruction_that_faults_is_told_once, ResumeFlagOverExits),
        law!(l20_two_slots_hit_by_one_store_are_both_told, DataWatch, SeveralHits),
        law!(l22_a_watch_hit_and_the_breakpoint_behind_it_are_both_told, DataWatch),
        law!(l22_a_step_onto_a_breakpoint_is_a_step_and_then_a_hit_for_nobody),
    ]
}

/// What the guest counted against what was told, while a breakpoint on the counting instruction
/// comes and goes.
///
/// A vCPU that was told of stands *before* its count: it is one ahead until it has executed the
/// instruction. Apart from that told and counted go up together while the breakpoint is armed.
struct Ledger {
    bp: u64,
    counts: Vec<u64>,
    ahead: Vec<u64>,
    told: Vec<u64>,
    counted: Vec<u64>,
}

impl Ledger {
    fn new(bp: u64, counts: Vec<u64>) -> Self {
        let none = vec![0; counts.len()];
        Ledger { bp, counts, ahead: none.clone(), told: none.clone(), counted: none }
    }

    /// The world has stopped under the armed breakpoint, for a hit of `told` or for another reason.
    fn armed(&mut self, counts: &[u64], pcs: &[u64], told: Option<VcpuId>) {
        for (n, &count) in counts.iter().enumerate() {
            let executed = count - self.counts[n];
            let is_told = u64::from(told == Some(VcpuId(n as u32)));
            self.told[n] += is_told;
            self.counted[n] += executed;
            let owed = self.ahead[n] + is_told;
            assert!(executed <= owed, "vCPU {n} crossed {executed} times and was told of {owed}: a hit was lost");
            let ahead = owed - executed;
            assert!(ahead <= 1, "vCPU {n} was told of twice at one crossing");
            assert!(ahead == 0 || pcs[n] == self.bp, "vCPU {n} was told of and is at {:#x}", pcs[n]);
            assert!(is_told == 0 || ahead == 1, "vCPU {n} was told of after its crossing");
            (self.counts[n], self.ahead[n]) = (count, ahead);
        }
    }

    /// The world has stopped without the breakpoint: crossings are not told, and what is still
    /// ahead has not run at all.
    fn unarmed(&mut self, counts: &[u64], pcs: &[u64]) {
        for (n, &count) in counts.iter().enumerate() {
            if count != self.counts[n] {
                self.ahead[n] = 0;
            }
            assert!(self.ahead[n] == 0 || pcs[n] == self.bp, "vCPU {n} moved and did not count");
            self.counts[n] = count;
        }
    }
}

/// Issue 2's own words: four vCPUs, a breakpoint in the hot loop, toggled each round, a thousand stops.
fn l13_exactly_once_toggling_1000_rounds() {
    let mut demo = Booted::counting_demo(4, None);
    let bp = Breakpoint::exec(demo.at("count_up_here"));
    let mut ledger = Ledger::new(bp.addr, demo.counts());
    for round in 0..1000 {
        if round % 2 == 0 {
            demo.set(bp);
            for _ in 0..1 + round / 2 % 5 {
                let stop = demo.run_all();
                assert_eq!(stop.reason, StopReason::Breakpoint(bp), "round {round}");
                let (counts, pcs) = where_all_are(&mut demo);
                ledger.armed(&counts, &pcs, Some(stop.vcpu));
            }
        } else {
            demo.clear(bp);
            demo.go();
            if round % 4 == 1 {
                let cpu = round / 4 % 4;
                let before = demo.count(cpu);
                demo.wait_for("the guest to count", |demo| (demo.count(cpu) > before).then_some(()));
            }
            let stop = demo.vm.stop();
            let stop = demo.must(stop);
            assert_eq!(stop.reason, StopReason::Interrupted, "round {round}: told of what is gone");
            let (counts, pcs) = where_all_are(&mut demo);
            ledger.unarmed(&counts, &pcs);
        }
    }
    for n in 0..4 {
        assert!(ledger.told[n] > 0, "vCPU {n} was never told of");
        // A crossing that was told of while armed may be counted after the removal.
        assert!(ledger.counted[n] <= ledger.told[n]);
    }
    assert_eq!(demo.guest_debug_exceptions(), 0);
}

/// Each vCPU's own count, and where it stands.
fn where_all_are(demo: &mut Booted) -> (Vec<u64>, Vec<u64>) {
    let pcs = (0..demo.cpus()).map(|cpu| demo.registers(cpu).pc()).collect();
    (demo.counts(), pcs)
}

fn l13_exactly_once_on_one_vcpu() {
    let mut rig = Rig::one("loop5");
    let bp = Breakpoint::exec(at("loop5_bp"));
    rig.set(bp).unwrap();
    for hit in 0..5 {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        assert_eq!((rig.pc(0), rig.registers(0).r8), (bp.addr, hit));
    }
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(rig.registers(0).r8, 5);
}

fn l13_exactly_once_on_neighbouring_instructions() {
    let mut rig = Rig::all(2, "neighbours");
    let bps = ["neighbour_1", "neighbour_2"].map(|label| Breakpoint::exec(at(label)));
    for bp in bps {
        rig.set(bp).unwrap();
    }
    let mut told = [[0u64; 2]; 2];
    for _ in 0..200 {
        let stop = rig.run_all();
        let which = bps.iter().position(|bp| stop.reason == StopReason::Breakpoint(*bp)).expect("one of ours");
        let cpu = stop.vcpu.0;
        told[cpu as usize][which] += 1;
        assert_eq!(name(rig.pc(cpu)), name(bps[which].addr));
        // It stands before the count of the one that it was told of last.
        let mut expected = told[cpu as usize];
        expected[which] -= 1;
        assert_eq!([rig.field(cpu, cpu_field::HITS), rig.field(cpu, cpu_field::SECOND)], expected);
    }
    assert!(told.iter().flatten().all(|&times| times > 10), "{told:?}");
}

/// Three breakpoints in a row are a loop's every instruction: an interrupt is taken at one of them.
fn l13_exactly_once_where_interrupts_are_taken() {
    const TICKS: u64 = 300;
    let mut rig = Rig::one("irqspin_timer");
    let bps = ["timer_spin0", "timer_spin1", "timer_spin2"].map(|label| Breakpoint::exec(at(label)));
    let told = Arc::new([const { AtomicU64::new(0) }; 3]);
    for (n, bp) in bps.into_iter().enumerate() {
        let told = told.clone();
        let counting = move |_: &mut Hit<'_>| {
            told[n].fetch_add(1, SeqCst);
            Disposition::Continue
        };
        rig.coordinator.set_trap(Owner::harness(0), bp, Some(Handler::new(counting))).unwrap();
    }
    assert_eq!(rig.go(), None);
    wait_for("its timer to tick", || (rig.field(0, cpu_field::TIMER) >= TICKS).then_some(()));
    rig.interrupt();
    let [first, second, third] = [0, 1, 2].map(|n| told[n].load(SeqCst));
    let (hits, r9) = (rig.field(0, cpu_field::HITS), rig.registers(0).r9);
    // Where it stands it may have been told of already.
    let pc = rig.pc(0);
    let ahead = |n: usize| u64::from(pc == bps[n].addr);
    assert!((hits..=hits + ahead(0)).contains(&first), "{hits} times executed, told of {first} times");
    assert!((r9..=r9 + ahead(1)).contains(&second), "{r9} times executed, told of {second} times");
    assert!((hits - 1..=hits).contains(&third), "{hits} rounds, told of {third} times");
    rig.assert_guest_undisturbed();
}

fn l13_exactly_once_in_ring_3() {
    let mut rig = Rig::new(&[Begin::Ring3("ring3_loop"), Begin::Ring3("ring3_loop")]);
    let bp = Breakpoint::exec(at("u_loop_bp"));
    rig.set(bp).unwrap();
    let mut told = [0u64; 2];
    for _ in 0..200 {
        let stop = rig.run_all();
        assert_eq!(stop.reason, StopReason::Breakpoint(bp));
        let cpu = stop.vcpu.0;
        assert_eq!((rig.pc(cpu), rig.registers(cpu).cpl()), (bp.addr, 3));
        assert_eq!(rig.word(fixture::user_address(cpu, user_field::HITS).unwrap()), told[cpu as usize]);
        told[cpu as usize] += 1;
    }
    assert!(told.iter().all(|&times| times > 10), "{told:?}");
    rig.assert_guest_undisturbed();
}

/// Told of, let go without the breakpoint, and by chance stopped at the very place again: the next
/// crossing is a new one.
fn l13_a_vcpu_that_came_back_to_its_breakpoint_is_told_of_again() {
    let mut rig = Rig::one("hotmem");
    let bp = Breakpoint::exec(at("hotmem_bp"));
    let mut came_back = 0;
    for _ in 0..400 {
        rig.set(bp).unwrap();
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        rig.clear(bp).unwrap();
        let told_at = rig.field(0, cpu_field::HITS);
        assert_eq!(rig.go(), None);
        wait_for("it to count", || (rig.field(0, cpu_field::HITS) > told_at).then_some(()));
        rig.interrupt();
        if rig.pc(0) != bp.addr {
            continue;
        }
        let hits = rig.field(0, cpu_field::HITS);
        rig.set(bp).unwrap();
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        assert_eq!(rig.field(0, cpu_field::HITS), hits, "a crossing was not told");
        rig.clear(bp).unwrap();
        came_back += 1;
        if came_back == 5 {
            return;
        }
    }
    panic!("in 400 rounds it came back only {came_back} times");
}

fn l13_a_vcpu_that_has_not_moved_is_not_told_of_again() {
    let mut rig = Rig::all(2, "hotmem");
    let bp = Breakpoint::exec(at("hotmem_bp"));
    let only = [0, 1].map(|cpu| rig.only(cpu, RunMode::Continue));
    for round in 0..20 {
        rig.set(bp).unwrap();
        assert_eq!(rig.run(&only[0]), hit(0, bp));
        rig.clear(bp).unwrap();
        assert_eq!(rig.coordinator.resume(&only[1]).unwrap(), None);
        rig.interrupt();
        rig.set(bp).unwrap();
        let before = rig.field(0, cpu_field::HITS);
        assert_eq!(rig.run(&only[0]), hit(0, bp));
        assert_eq!(rig.field(0, cpu_field::HITS), before + 1, "round {round}: told twice of one crossing");
        rig.clear(bp).unwrap();
        // Off it, so that the next round begins with a crossing that nobody was told of.
        assert_eq!(rig.coordinator.resume(&only[0]).unwrap(), None);
        wait_for("it to go on", || (rig.field(0, cpu_field::HITS) > before + 1).then_some(()));
        rig.interrupt();
    }
}

fn l13_every_watched_store_is_told_exactly_once() {
    let mut rig = Rig::all(2, "watch_own");
    let watch = Breakpoint::watch(fixture::WATCH, 8, Trigger::Write);
    rig.set(watch).unwrap();
    for hit in 1..=100 {
        let stop = rig.run_all();
        let reason = StopReason::Watchpoint { request: watch, addr: fixture::WATCH, stored: None };
        assert_eq!((stop.vcpu, stop.reason), (VcpuId(0), reason), "only CPU 0 stores there");
        assert_eq!(name(rig.pc(0)), name(at("w_own_next")));
        // The store is done, the count behind it not yet.
        assert_eq!((rig.word(fixture::WATCH), rig.field(0, cpu_field::HITS)), (hit, hit - 1));
    }
    rig.clear(watch).unwrap();
    assert_eq!(rig.go(), None);
    wait_for("it to count on", || (rig.field(0, cpu_field::HITS) > 200).then_some(()));
    rig.interrupt();
    rig.assert_guest_undisturbed();
}

fn l13_exactly_once_on_accesses_to_devices() {
    for (property, labels) in [("mmio_loop", ["mmio_write", "mmio_read"]), ("pio_loop", ["pio_out", "pio_in"])] {
        let mut rig = Rig::one(property);
        let bps = labels.map(|label| Breakpoint::exec(at(label)));
        for bp in bps {
            rig.set(bp).unwrap();
        }
        for round in 0..20 {
            for (n, bp) in bps.into_iter().enumerate() {
                assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp), "round {round}");
                let [mmio_writes, mmio_reads, port_writes, port_reads] = rig.accesses();
                let done = [mmio_writes + port_writes, mmio_reads + port_reads];
                assert_eq!(done, [round + n as u64, round], "before {}", labels[n]);
            }
        }
    }
}

/// Each fault of the guest ends with one IRET, and then the store that faulted counts.
fn l13_exactly_once_at_the_end_of_a_fault_handler() {
    let mut rig = Rig::one("fault_pf_loop");
    let bp = Breakpoint::exec(at("fx_trap_iret"));
    rig.set(bp).unwrap();
    for stores in 0..20 {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        assert_eq!((rig.field(0, cpu_field::HITS), rig.log().len() as u64), (stores, stores + 1));
    }
    rig.assert_guest_undisturbed();
}

/// The store faults, the handler maps its page, and it runs again: one crossing.
fn l42_a_breakpoint_on_an_instruction_that_faults_is_told_once() {
    let mut rig = Rig::one("fault_pf_loop");
    let bp = Breakpoint::exec(at("f_pf_loop"));
    rig.set(bp).unwrap();
    for stores in 0..20 {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        assert_eq!((rig.field(0, cpu_field::HITS), rig.log().len() as u64), (stores, stores));
    }
    rig.assert_guest_undisturbed();
}

fn l13_a_rep_is_one_crossing() {
    let mut rig = Rig::one("step_rep_long");
    let bp = Breakpoint::exec(at("s_rep_long"));
    rig.set(bp).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
}

/// Three bytes are stored at WATCH + 0x50 by REP STOSB; the second of them is watched.
fn l13_a_watch_hit_within_a_rep_does_not_end_its_crossing() {
    let mut rig = Rig::one("watch");
    let exec = Breakpoint::exec(at("w_stos"));
    let watch = Breakpoint::watch(fixture::WATCH + 0x51, 1, Trigger::Write);
    rig.set(exec).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(exec));
    rig.set(watch).unwrap();
    let hit = StopReason::Watchpoint { request: watch, addr: watch.addr, stored: None };
    assert_eq!(rig.run_first(RunMode::Continue), hit);
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
}

fn l14_all_that_stop_in_one_window_are_told_without_running() {
    let mut rig = Rig::all(4, "hotmem");
    let bp = Breakpoint::exec(at("hotmem_bp"));
    rig.set(bp).unwrap();
    for round in 1..=20 {
        assert_eq!(rig.go(), None);
        wait_for("all four to hit", || {
            rig.spies.iter().all(|spy| spy.look(|notes| notes.trapped - notes.stepped) >= round).then_some(())
        });
        let first = rig.wait();
        let hits: Vec<u64> = (0..4).map(|cpu| rig.field(cpu, cpu_field::HITS)).collect();
        let mut told = vec![first];
        for _ in 0..3 {
            told.push(rig.go().expect("another stop is pending"));
        }
        assert_eq!((0..4).map(|cpu| rig.field(cpu, cpu_field::HITS)).collect::<Vec<_>>(), hits, "the guest ran");
        assert!(told.iter().all(|stop| stop.reason == StopReason::Breakpoint(bp)));
        told.sort_by_key(|stop| stop.vcpu);
        assert_eq!(told.iter().map(|stop| stop.vcpu.0).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(hits, vec![round - 1; 4]);
    }
}

/// Scheduler-locking: the step of one vCPU is not answered with what another one did before.
fn l14_a_stop_of_a_vcpu_that_stays_parked_waits() {
    let mut rig = Rig::all(2, "hotmem");
    let bp = Breakpoint::exec(at("hotmem_bp"));
    rig.set(bp).unwrap();
    assert_eq!(rig.go(), None);
    wait_for("both to hit", || rig.spies.iter().all(|spy| spy.look(|notes| notes.trapped) > 0).then_some(()));
    let first = rig.wait().vcpu;
    let other = VcpuId(1 - first.0);
    let step = rig.only(first.0, RunMode::Step);
    for label in ["hotmem_bp2", "hotmem_bp3", "hotmem_bp"] {
        assert_eq!(rig.run(&step), Stop::new(first, StopReason::Step));
        assert_eq!(name(rig.pc(first.0)), name(at(label)));
        assert_eq!(rig.field(other.0, cpu_field::HITS), 0, "the parked one ran");
    }
    assert_eq!(rig.go(), Some(hit(other.0, bp)));
}

fn l14_a_stop_request_may_be_answered_by_a_hit() {
    let mut rig = Rig::all(2, "hotmem");
    let bp = Breakpoint::exec(at("hotmem_bp"));
    rig.set(bp).unwrap();
    assert_eq!(rig.go(), None);
    wait_for("both to hit", || rig.spies.iter().all(|spy| spy.look(|notes| notes.trapped) > 0).then_some(()));
    rig.coordinator.stop().unwrap();
    let mut told: Vec<Stop> = std::iter::from_fn(|| rig.coordinator.take_stop()).collect();
    told.sort_by_key(|stop| stop.vcpu);
    assert_eq!(told, [hit(0, bp), hit(1, bp)]);
}

fn l20_two_slots_hit_by_one_store_are_both_told() {
    let mut rig = Rig::one("watch_exec");
    let watches = [Trigger::Write, Trigger::Access].map(|on| Breakpoint::watch(fixture::WATCH, 8, on));
    for watch in watches {
        rig.set(watch).unwrap();
    }
    for _ in 0..5 {
        let first = rig.run_first(RunMode::Continue);
        let r8 = rig.registers(0).r8;
        let second = rig.run_first(RunMode::Continue);
        assert_eq!(rig.registers(0).r8, r8, "the guest ran");
        for (watch, reason) in watches.into_iter().zip([first, second]) {
            assert_eq!(reason, StopReason::Watchpoint { request: watch, addr: fixture::WATCH, stored: None });
        }
    }
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
}

/// The store's trap and the breakpoint's fault come at the same pc, one after the other or at once.
fn l22_a_watch_hit_and_the_breakpoint_behind_it_are_both_told() {
    let watch = Breakpoint::watch(fixture::WATCH, 8, Trigger::Write);
    let exec = Breakpoint::exec(at("w_exec_next"));
    for order in [[watch, exec], [exec, watch]] {
        let mut rig = Rig::one("watch_exec");
        for request in order {
            rig.set(request).unwrap();
        }
        for round in 1..=5 {
            let reasons = [rig.run_first(RunMode::Continue), rig.run_first(RunMode::Continue)];
            assert_eq!((name(rig.pc(0)), rig.registers(0).r8), (name(exec.addr), round), "{reasons:?}");
            let hits = |wanted: fn(&StopReason) -> bool| reasons.iter().filter(|reason| wanted(reason)).count();
            assert_eq!(hits(|reason| matches!(reason, StopReason::Watchpoint { .. })), 1, "{reasons:?}");
            assert_eq!(hits(|reason| matches!(reason, StopReason::Breakpoint(_))), 1, "{reasons:?}");
        }
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    }
}

/// Who was led to a breakpoint by a step is not told of it again by going on.
fn l22_a_step_onto_a_breakpoint_is_a_step_and_then_a_hit_for_nobody() {
    let mut rig = Rig::one("loop5");
    let bp = Breakpoint::exec(at("loop5_bp"));
    rig.set(bp).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
    for label in ["loop5_bp2", "loop5_bp3", "loop5_bp"] {
        assert_eq!(name(rig.step()), name(at(label)));
    }
    for r8 in [2, 3, 4] {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        assert_eq!(rig.registers(0).r8, r8);
    }
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
}
