//! Laws 9 to 12 and 15 to 19: the set of breakpoints changes on all vCPUs, or on none.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use trapline_guests::fixture::{self, cpu_field};
use trapline_vmm::coordinator::CoordinatorError;
use trapline_vmm::debug::{Breakpoint, BreakpointError, RunMode, Stop, StopReason, Trigger, VcpuId};
use trapline_vmm::vcpu::{Activity, Arming, Exit};

use crate::booted::Booted;
use crate::clock::wait_for;
use crate::lane::Need::{DataWatch, Kick};
use crate::law::{Law, law};
use crate::rig::{Begin, Rig, at, hit, name};

pub(crate) fn laws() -> Vec<Law> {
    vec![
        law!(l09_a_refused_change_reaches_no_vcpu),
        law!(l09_the_set_changes_while_the_guest_runs, Kick),
        law!(l09_a_change_in_the_middle_of_an_access_disturbs_nothing, Kick),
        law!(l10_no_hit_is_told_after_the_ok_of_its_removal, Kick),
        law!(l11_a_hit_on_what_is_gone_is_swallowed, Kick),
        law!(l12_one_failing_vcpu_leaves_all_with_the_old_set_world_stopped, Kick),
        law!(l12_one_failing_vcpu_leaves_all_with_the_old_set_world_running, Kick),
        law!(l12_an_ioctl_that_fails_in_the_product_changes_nothing, Kick),
        law!(l15_bits_of_slots_that_hit_before_tell_nothing_again, DataWatch),
        law!(l16_a_trap_that_was_held_back_over_the_removal_is_nobodys, DataWatch),
        law!(l17_vcpus_that_sleep_are_armed_without_running, Kick),
        law!(l18_a_vcpu_that_does_not_park_is_named_and_the_others_go_on, Kick),
        law!(l18_a_failed_stop_loses_and_doubles_no_hit, Kick),
        law!(l19_a_vcpu_stops_at_its_very_first_instruction, Kick),
        law!(the_fifth_breakpoint_is_refused_and_the_four_still_work),
    ]
}

fn l09_a_refused_change_reaches_no_vcpu() {
    let mut rig = Rig::one("bp_line");
    for label in ["bp1", "bp2", "bp3", "bp4"] {
        rig.set(Breakpoint::exec(at(label))).unwrap();
    }
    let told = rig.spies[0].look(|notes| notes.armed.len());
    let epoch = rig.coordinator.image().epoch();
    for request in [
        Breakpoint::exec(at("bp5")),
        Breakpoint::watch(fixture::WATCH, 0, Trigger::Write),
        Breakpoint::watch(u64::MAX, 2, Trigger::Write),
        Breakpoint { len: 2, ..Breakpoint::exec(at("bp1")) },
    ] {
        rig.set(request).unwrap_err();
    }
    rig.clear(Breakpoint::exec(at("bp5"))).unwrap_err();
    // And asking for what is there already is nothing to do.
    rig.set(Breakpoint::exec(at("bp1"))).unwrap();
    assert_eq!(rig.spies[0].look(|notes| notes.armed.len()), told);
    assert_eq!(rig.coordinator.image().epoch(), epoch);
}

fn l09_the_set_changes_while_the_guest_runs() {
    let mut rig = Rig::all(4, "hotmem");
    let bp = Breakpoint::exec(at("hotmem_bp"));
    for round in 0..50 {
        assert_eq!(rig.go(), None);
        let before: Vec<u64> = rig.spies.iter().map(|spy| spy.look(|notes| notes.resumed)).collect();
        rig.set(bp).unwrap();
        let stop = rig.wait();
        assert_eq!(stop.reason, StopReason::Breakpoint(bp), "round {round}");
        assert_eq!(rig.pc(stop.vcpu.0), bp.addr);
        let after: Vec<u64> = rig.spies.iter().map(|spy| spy.look(|notes| notes.resumed)).collect();
        assert_eq!(before, after, "the change stopped the world");
        rig.clear(bp).unwrap();
    }
    rig.assert_guest_undisturbed();
}

/// The vCPUs do nothing but talk to a device, and the breakpoint is on the very instruction.
fn l09_a_change_in_the_middle_of_an_access_disturbs_nothing() {
    let mut rig = Rig::all(2, "mmio_loop");
    let bp = Breakpoint::exec(at("mmio_write"));
    assert_eq!(rig.go(), None);
    for round in 0..100 {
        let before = rig.accesses();
        rig.set(bp).unwrap();
        (0..round * 50).for_each(|_| std::hint::spin_loop());
        rig.clear(bp).unwrap();
        wait_for("both to go on", || {
            assert_eq!(rig.coordinator.poll().unwrap(), None, "round {round}");
            (rig.accesses()[0] > before[0] + 2).then_some(())
        });
    }
    rig.interrupt();
    let writes = std::mem::take(&mut rig.mmio.lock().writes);
    for cpu in 0..2 {
        let own = writes.iter().filter(|(offset, _)| *offset == cpu * fixture::MMIO_STRIDE).map(|(_, value)| *value);
        let own: Vec<u64> = own.collect();
        // The n-th write wrote n; R8 is the last, or the one to come.
        let r8 = rig.registers(cpu as u32).r8;
        assert!(own.iter().copied().eq(1..=own.len() as u64), "vCPU {cpu}: a write was lost or doubled");
        assert!(r8 - own.len() as u64 <= 1, "vCPU {cpu}: {r8} after {} writes", own.len());
    }
    rig.assert_guest_undisturbed();
}

/// Removal under fire: every vCPU runs into the breakpoint all the time.
fn l10_no_hit_is_told_after_the_ok_of_its_removal() {
    let mut rig = Rig::all(4, "hotmem");
    let bp = Breakpoint::exec(at("hotmem_bp"));
    assert_eq!(rig.go(), None);
    for round in 0..150 {
        let hits = |rig: &Rig| (0..4).map(|cpu| rig.field(cpu, cpu_field::HITS)).collect::<Vec<_>>();
        let before = hits(&rig);
        rig.set(bp).unwrap();
        // Each round removes it a little later: before, while and after the vCPUs run into it.
        (0..round * 50).for_each(|_| std::hint::spin_loop());
        rig.clear(bp).unwrap();
        wait_for("all four to count on", || {
            assert_eq!(rig.coordinator.poll().unwrap(), None, "round {round}");
            hits(&rig).iter().zip(&before).all(|(now, then)| now > then).then_some(())
        });
    }
    rig.interrupt();
    assert!(rig.spies.iter().any(|spy| spy.look(|notes| notes.trapped) > 0), "nothing ever hit it");
    rig.assert_guest_undisturbed();
}

/// The breakpoint goes while vCPU 1 stands between KVM_RUN and the handling of its hit, and while
/// vCPU 0 waits to be told of.
fn l11_a_hit_on_what_is_gone_is_swallowed() {
    let mut rig = Rig::all(2, "hotmem");
    let bp = Breakpoint::exec(at("hotmem_bp"));
    for _ in 0..20 {
        assert_eq!(rig.go(), None);
        let trapped = rig.spies[1].look(|notes| notes.trapped);
        rig.spies[1].hold_until_kicked(|exit| matches!(exit, Exit::Debug(_)));
        rig.set(bp).unwrap();
        rig.spies[1].wait_held();
        // The guest's own count at the hit, which it must go on from.
        let before = rig.field(1, cpu_field::HITS);
        rig.clear(bp).unwrap();
        wait_for("it to count on", || {
            assert_eq!(rig.coordinator.poll().unwrap(), None, "a hit on what is gone was told");
            (rig.field(1, cpu_field::HITS) > before).then_some(())
        });
        rig.interrupt();
        assert_eq!(rig.spies[1].look(|notes| notes.trapped), trapped + 1, "the same hit came again");
    }
    // R8 counts the rounds beside it: nothing was skipped and nothing ran twice.
    for cpu in 0..2 {
        let (hits, registers) = (rig.field(cpu, cpu_field::HITS), rig.registers(cpu));
        assert!(hits - registers.r8 <= 1, "{hits} against {}", registers.r8);
    }
    rig.assert_guest_undisturbed();
}

fn l12_one_failing_vcpu_leaves_all_with_the_old_set_world_stopped() {
    failing_vcpu(false);
}

fn l12_one_failing_vcpu_leaves_all_with_the_old_set_world_running() {
    failing_vcpu(true);
}

fn failing_vcpu(running: bool) {
    let mut rig = Rig::all(4, "hotmem");
    // Where nothing runs yet: the world can go on with it.
    let (old, new) = (Breakpoint::exec(at("step_begin")), Breakpoint::exec(at("hotmem_bp")));
    rig.set(old).unwrap();
    let before: Vec<Arming> = rig.spies.iter().map(|spy| spy.armed()).collect();
    let image = rig.coordinator.image().clone();
    if running {
        assert_eq!(rig.go(), None);
    }
    for victim in [2usize, 0, 3] {
        rig.spies[victim].refuse(1);
        let refused = rig.set(new).unwrap_err();
        let BreakpointError::Apply(why) = &refused else { panic!("{refused}") };
        assert!(why.contains(&format!("vCPU {victim}")), "{why}");
        let after: Vec<Arming> = rig.spies.iter().map(|spy| spy.armed()).collect();
        assert_eq!(after, before, "not bit-identical");
        assert_eq!(rig.coordinator.image(), &image);
        assert_eq!(rig.coordinator.breakpoints().len(), 1);
        assert_eq!(rig.coordinator.poll().unwrap(), None, "the undone one stopped something");
        assert_eq!(rig.coordinator.is_running(), running);
    }
    if running {
        // Those that had run into it before it was undone run on.
        let before: Vec<u64> = (0..4).map(|cpu| rig.field(cpu, cpu_field::HITS)).collect();
        wait_for("all to run on", || {
            assert_eq!(rig.coordinator.poll().unwrap(), None, "the undone one stopped something");
            (0..4).all(|cpu| rig.field(cpu, cpu_field::HITS) > before[cpu as usize]).then_some(())
        });
        rig.interrupt();
    }
    // The old one still works: each vCPU that comes by hits it once.
    for cpu in 0..4 {
        let mut registers = rig.registers(cpu);
        registers.rip = old.addr;
        rig.coordinator.set_registers(VcpuId(cpu), &registers).unwrap();
    }
    let mut told = Vec::new();
    let first = rig.run_all();
    told.push(first.vcpu.0);
    assert_eq!(first.reason, StopReason::Breakpoint(old));
    while told.len() < 4 {
        let stop = rig.run(&rig.plan(RunMode::Parked).with(VcpuId(next_of(&told)), RunMode::Continue));
        assert_eq!(stop.reason, StopReason::Breakpoint(old));
        told.push(stop.vcpu.0);
    }
    told.sort_unstable();
    assert_eq!(told, [0, 1, 2, 3]);
}

/// A vCPU that is not among `told`.
fn next_of(told: &[u32]) -> u32 {
    (0..4).find(|cpu| !told.contains(cpu)).unwrap()
}

fn l12_an_ioctl_that_fails_in_the_product_changes_nothing() {
    const NOBODY: u32 = u32::MAX;
    let victim = Arc::new(AtomicU32::new(NOBODY));
    let fails = victim.clone();
    let hook = Arc::new(move |vcpu: VcpuId| {
        // Once: the undoing succeeds, as it does where memory was short for a moment.
        match fails.compare_exchange(vcpu.0, NOBODY, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
            Err(_) => Ok(()),
        }
    });
    let mut demo = Booted::counting_demo(4, Some(hook));
    let (old, new) = (Breakpoint::exec(demo.at("count_up_here")), Breakpoint::exec(demo.at("count_a_round")));
    demo.set(old);
    for vcpu in 0..4 {
        victim.store(vcpu, Ordering::SeqCst);
        let error = demo.vm.set_breakpoint(trapline_vmm::debug::Owner::GDB, new).unwrap_err().to_string();
        assert!(error.contains(&format!("vCPU {vcpu}")), "{error}");
        assert_eq!(demo.vm.breakpoints().len(), 1);
        for _ in 0..8 {
            assert_eq!(demo.run_all().reason, StopReason::Breakpoint(old));
        }
        victim.store(vcpu, Ordering::SeqCst);
        demo.vm.clear_breakpoint(trapline_vmm::debug::Owner::GDB, old).unwrap_err();
        for _ in 0..8 {
            assert_eq!(demo.run_all().reason, StopReason::Breakpoint(old), "it was removed all the same");
        }
    }
    demo.set(new);
    assert_eq!(demo.vm.breakpoints().len(), 2);
    assert_eq!(demo.guest_debug_exceptions(), 0);
}

/// DR6 keeps bits that nobody clears: the steps after a hit on slot 0 must not show it again.
fn l15_bits_of_slots_that_hit_before_tell_nothing_again() {
    let mut rig = Rig::one("watch_exec");
    let watch = Breakpoint::watch(fixture::WATCH, 8, Trigger::Write);
    rig.set(watch).unwrap();
    for round in 0..4 {
        let reason = rig.run_first(RunMode::Continue);
        assert!(matches!(reason, StopReason::Watchpoint { .. }), "round {round}: {reason:?}");
        assert_eq!(name(rig.pc(0)), name(at("w_exec_next")));
        // nop, dec, jnz, inc
        for _ in 0..4 {
            rig.step();
        }
        assert_eq!(name(rig.pc(0)), name(at("w_exec")));
    }
}

/// The load of SS holds the watch's trap back until after the next instruction (SDM vol. 3, 6.8.3).
fn l16_a_trap_that_was_held_back_over_the_removal_is_nobodys() {
    let mut rig = Rig::one("watch_movss");
    rig.run_to("w_movss");
    let watch = Breakpoint::watch(fixture::WATCH, 2, Trigger::Access);
    rig.set(watch).unwrap();
    let reason = rig.run_first(RunMode::Step);
    let pc = rig.pc(0);
    // Where the flavour stops inside the shadow the trap is still to come; else it has come
    // (Bochs: before the load counts as done).
    let places = match reason {
        StopReason::Step => [at("w_movss_1"), at("w_movss_2"), 0],
        StopReason::Watchpoint { .. } => [at("w_movss"), at("w_movss_1"), at("w_movss_2")],
        _ => panic!("{reason:?}"),
    };
    assert!(places.contains(&pc), "{reason:?} at {}", name(pc));
    rig.clear(watch).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(rig.log(), []);
    assert!(rig.spies[0].look(|notes| notes.trapped) <= 3, "more than one swallowed exit");
}

fn l17_vcpus_that_sleep_are_armed_without_running() {
    let mut rig =
        Rig::new(&[Begin::Ring0("hotmem"), Begin::Ring0("hlt_wait"), Begin::Ring0("halt"), Begin::WaitForSipi]);
    rig.run_until_asleep(1);
    rig.run_until_asleep(2);
    for world in ["stopped", "running"] {
        if world == "running" {
            assert_eq!(rig.go(), None);
        }
        let bp = Breakpoint::exec(at("step_begin"));
        rig.set(bp).unwrap();
        assert!(rig.spies.iter().all(|spy| spy.armed() == rig.published()), "in the {world} world");
        rig.coordinator.stop().unwrap();
        let states: Vec<_> = (0..4).map(|cpu| rig.coordinator.activity(VcpuId(cpu)).unwrap()).collect();
        use Activity::{Halted, Runnable, WaitForSipi};
        assert_eq!(states, [Runnable, Halted, Halted, WaitForSipi]);
        rig.clear(bp).unwrap();
        assert!(rig.spies.iter().all(|spy| spy.armed() == Arming::OFF));
    }
}

/// Waits for the deadline of the product, as the next one does.
fn l18_a_vcpu_that_does_not_park_is_named_and_the_others_go_on() {
    let mut rig = Rig::all(3, "hotmem");
    let bp = Breakpoint::exec(at("hotmem_bp"));
    assert_eq!(rig.go(), None);
    wait_for("it to run", || (rig.field(1, cpu_field::HITS) > 1000).then_some(()));
    // It comes out of the guest and then does nothing, as a thread that is stopped or starved.
    rig.spies[1].hold(|_| true);
    let error = rig.coordinator.stop().unwrap_err();
    assert_eq!(error, CoordinatorError::NoAnswer { vcpu: VcpuId(1) });
    assert!(rig.coordinator.is_running());
    let hits = |rig: &Rig, cpu| rig.field(cpu, cpu_field::HITS);
    let before = [0, 1, 2].map(|cpu| hits(&rig, cpu));
    wait_for("the others to go on", || (hits(&rig, 0) > before[0] && hits(&rig, 2) > before[2]).then_some(()));
    assert_eq!(hits(&rig, 1), before[1]);
    // Once it wakes all is as if nothing had been.
    rig.spies[1].let_go();
    wait_for("it to go on", || (hits(&rig, 1) > before[1]).then_some(()));
    rig.set(bp).unwrap();
    let mut told: Vec<u32> = vec![rig.wait().vcpu.0];
    while let Some(Stop { vcpu, reason, .. }) = rig.coordinator.take_stop() {
        assert_eq!(reason, StopReason::Breakpoint(bp));
        told.push(vcpu.0);
    }
    for cpu in told {
        assert_eq!(rig.pc(cpu), bp.addr);
    }
}

/// Those that stopped by themselves meanwhile do not go on: nobody was told of them yet.
fn l18_a_failed_stop_loses_and_doubles_no_hit() {
    let mut rig = Rig::all(3, "hotmem");
    let bp = Breakpoint::exec(at("hotmem_bp"));
    rig.set(bp).unwrap();
    rig.spies[1].hold(|exit| matches!(exit, Exit::Debug(_)));
    assert_eq!(rig.go(), None);
    rig.spies[1].wait_held();
    wait_for("the others to hit", || {
        [0, 2].iter().all(|cpu| rig.spies[*cpu as usize].look(|n| n.trapped > 0)).then_some(())
    });
    assert_eq!(rig.coordinator.poll(), Err(CoordinatorError::NoAnswer { vcpu: VcpuId(1) }));
    rig.spies[1].let_go();
    let mut told = [0u64; 3];
    for _ in 0..30 {
        let stop = match rig.coordinator.is_running() {
            true => rig.wait(),
            false => rig.run_all(),
        };
        assert_eq!(stop.reason, StopReason::Breakpoint(bp));
        let (cpu, n) = (stop.vcpu.0, stop.vcpu.index());
        assert_eq!((rig.pc(cpu), rig.field(cpu, cpu_field::HITS)), (bp.addr, told[n]), "vCPU {n}");
        told[n] += 1;
    }
    assert!(told.iter().all(|times| *times > 0), "{told:?}");
}

fn l19_a_vcpu_stops_at_its_very_first_instruction() {
    let mut rig = Rig::all(3, "hotmem");
    // No vCPU has ever run when this is armed.
    let bp = Breakpoint::exec(at("hotmem_bp"));
    rig.set(bp).unwrap();
    for cpu in [1, 0, 2] {
        let only = rig.only(cpu, RunMode::Continue);
        let stop = rig.run(&only);
        assert_eq!(stop, hit(cpu, bp));
        assert_eq!((rig.field(cpu, cpu_field::HITS), rig.registers(cpu).r8), (0, 0));
    }
}

fn the_fifth_breakpoint_is_refused_and_the_four_still_work() {
    let mut rig = Rig::one("bp_line");
    let bps = ["bp1", "bp2", "bp3", "bp4"].map(|label| Breakpoint::exec(at(label)));
    for bp in bps {
        rig.set(bp).unwrap();
    }
    let fifth = Breakpoint::exec(at("bp5"));
    assert_eq!(rig.set(fifth), Err(BreakpointError::NoSlot { request: fifth, needed: 1, free: 0 }));
    for bp in bps {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
    }
    rig.clear(bps[0]).unwrap();
    rig.set(fifth).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(fifth));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
}
