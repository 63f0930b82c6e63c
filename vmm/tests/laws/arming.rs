//! Laws 1 to 8: what one vCPU is told to arm.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use trapline_guests::fixture::{self, cpu_field};
use trapline_vmm::debug::{Breakpoint, Level, RunMode, StopReason, Trigger};
use trapline_vmm::vcpu::Arming;

use crate::clock::wait_for;
use crate::lane::Need::{DataWatch, Kick};
use crate::law::{Law, law};
use crate::rig::{Begin, Rig, at, name};

pub(crate) fn laws() -> Vec<Law> {
    vec![
        law!(l01_only_its_own_thread_touches_a_vcpu, Kick),
        law!(l01_an_ioctl_from_elsewhere_waits_for_kvm_run, Kick),
        law!(l02_every_vcpu_copies_the_published_image_bit_by_bit, Kick),
        law!(l03_kvm_gets_only_values_that_the_processor_takes),
        law!(l03_an_unaligned_watch_is_split_and_still_fires, DataWatch),
        law!(l04_each_arming_replaces_the_one_before),
        law!(l05_nothing_armed_leaves_the_guests_own_single_step_alone),
        law!(l05_what_is_released_is_off_and_not_merely_empty, Kick),
        law!(l06_a_hit_on_its_way_is_never_taken_for_the_slots_next_owner, Kick),
        law!(l06_removing_one_leaves_the_others_in_their_slots),
        law!(l07_a_step_after_a_register_write_is_exact),
        law!(l08_a_breakpoint_is_in_force_in_every_address_space),
        law!(l08_a_breakpoint_is_linear_and_not_physical),
    ]
}

fn l01_only_its_own_thread_touches_a_vcpu() {
    let mut rig = Rig::all(2, "hotmem");
    let bp = Breakpoint::exec(at("hotmem_bp"));
    rig.set(bp).unwrap();
    for _ in 0..4 {
        let stop = rig.run_all();
        let registers = rig.registers(stop.vcpu.0);
        rig.coordinator.set_registers(stop.vcpu, &registers).unwrap();
        rig.coordinator.activity(stop.vcpu).unwrap();
    }
    rig.clear(bp).unwrap();
    assert_eq!(rig.go(), None);
    rig.set(Breakpoint::exec(at("step_begin"))).unwrap();
    rig.interrupt();
    let mut threads = vec![thread::current().id()];
    for spy in &rig.spies {
        assert_eq!(spy.look(|notes| notes.strangers), 0);
        threads.push(spy.look(|notes| notes.thread.unwrap().0));
    }
    threads.dedup();
    assert_eq!(threads.len(), 3, "one thread for each vCPU, and ours");
}

/// Why law 1 is one: the vCPU's mutex is held for as long as the guest runs.
fn l01_an_ioctl_from_elsewhere_waits_for_kvm_run() {
    let mut rig = Rig::one("hotmem");
    assert_eq!(rig.go(), None);
    let hits = |rig: &Rig| rig.field(0, cpu_field::HITS);
    // A signal that is not ours may end KVM_RUN in between: then the question is asked again.
    for _ in 0..20 {
        let before = hits(&rig);
        wait_for("it to run", || (hits(&rig) > before + 1000).then_some(()));
        let entries = rig.spies[0].entries();
        let (fd, done) = (rig.raw[0], Arc::new(AtomicBool::new(false)));
        let answered = done.clone();
        let stranger = thread::spawn(move || {
            let result = crate::rig::read_mp_state(fd);
            answered.store(true, Ordering::SeqCst);
            result
        });
        let before = hits(&rig);
        wait_for("it to count", || (hits(&rig) > before + 20_000).then_some(()));
        let answered_early = done.load(Ordering::SeqCst);
        let still_inside = rig.spies[0].entries() == entries;
        rig.interrupt();
        assert_eq!(stranger.join().unwrap(), 0);
        if still_inside {
            return assert!(!answered_early, "answered while the guest ran");
        }
        assert_eq!(rig.go(), None);
    }
    panic!("KVM_RUN never lasted");
}

fn l02_every_vcpu_copies_the_published_image_bit_by_bit() {
    let mut rig = Rig::all(4, "hotmem");
    assert_eq!(rig.go(), None);
    rig.spies.iter().for_each(|spy| wait_for("it to run", || spy.look(|notes| notes.entries > 0).then_some(())));
    let mut published = Vec::new();
    // Where nothing runs: the world goes on all the time.
    let far: Vec<_> = ["step_begin", "s_out", "s_in", "s_rep"].map(|label| Breakpoint::exec(at(label))).into();
    for round in 0..60 {
        let bp = far[round % 4];
        match rig.coordinator.breakpoints().iter().any(|(_, held)| *held == bp) {
            true => rig.clear(bp).unwrap(),
            false => rig.set(bp).unwrap(),
        }
        published.push(Arming::run(rig.coordinator.image()));
    }
    rig.interrupt();
    for (n, spy) in rig.spies.iter().enumerate() {
        let mut applied = spy.look(|notes| notes.armed.clone());
        // Before its first entry it says that nothing is armed.
        assert_eq!(applied.remove(0), Arming::OFF);
        let differ = applied.iter().zip(&published).position(|(applied, published)| applied != published);
        assert_eq!((applied.len(), differ), (published.len(), None), "vCPU {n}");
    }
}

fn l03_kvm_gets_only_values_that_the_processor_takes() {
    let mut rig = Rig::one("hotmem");
    rig.set(Breakpoint::exec(at("hotmem_bp"))).unwrap();
    let mut held = Vec::new();
    let mut random = 0x2545_f491_4f6c_dd1du64;
    for _ in 0..200 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let len = random >> 8 & 0xf;
        // Not in the guest's way: linear addresses that it has no page for, some not canonical.
        let addr = (random >> 16).wrapping_shl((random & 0x1f) as u32) | 1 << 47;
        let request = match random & 3 {
            0 => Breakpoint::exec(addr),
            1 => Breakpoint::watch(addr, len, Trigger::Write),
            2 => Breakpoint::watch(addr, len, Trigger::Read),
            _ => Breakpoint { addr, len, on: Trigger::Execute },
        };
        match rig.set(request) {
            Ok(()) => held.push(request),
            Err(_) if !held.is_empty() => rig.clear(held.remove(0)).unwrap(),
            Err(_) => {}
        }
        // Each set is really entered with: a value that the processor refuses fails the entry.
        assert!(matches!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(_)));
    }
    rig.spies[0].look(|notes| notes.armed.iter().for_each(assert_sane));
}

/// SDM vol. 3, 18.2: what MOV to DR7 and VM entry take.
fn assert_sane(arming: &Arming) {
    let dr7 = arming.dr7.bits();
    assert_eq!(dr7 & 0xffff_ffff_0000_d800, 0, "{dr7:#x}");
    assert_ne!(dr7 & 1 << 10, 0, "{dr7:#x}");
    for (n, addr) in arming.addresses.iter().enumerate() {
        let (condition, len) = (dr7 >> (16 + 4 * n) & 3, dr7 >> (18 + 4 * n) & 3);
        assert_ne!(condition, 2, "{dr7:#x}: an I/O breakpoint");
        assert!(condition != 0 || len == 0, "{dr7:#x}: a long execution breakpoint");
        let bytes = [1, 2, 8, 4][len as usize];
        assert_eq!(addr % bytes, 0, "{dr7:#x}, slot {n} at {addr:#x}");
    }
}

fn l03_an_unaligned_watch_is_split_and_still_fires() {
    let mut rig = Rig::one("watch");
    // 5 bytes from 3 on: of the first stores only those that touch 3 or 4..8 may stop.
    let watch = Breakpoint::watch(fixture::WATCH + 3, 5, Trigger::Write);
    rig.set(watch).unwrap();
    for label in ["w_store2_next", "w_store4_next", "w_unaligned_next"] {
        let reason = rig.run_first(RunMode::Continue);
        assert!(matches!(reason, StopReason::Watchpoint { request, .. } if request == watch), "{reason:?}");
        assert_eq!(name(rig.pc(0)), name(at(label)));
    }
    rig.spies[0].look(|notes| notes.armed.iter().for_each(assert_sane));
}

fn l04_each_arming_replaces_the_one_before() {
    let mut rig = Rig::one("bp_line");
    let bps = ["bp1", "bp2", "bp3", "bp4"].map(|label| Breakpoint::exec(at(label)));
    for bp in bps {
        rig.set(bp).unwrap();
    }
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bps[0]));
    // A step off it arms the other three and the step; then all four again.
    assert_eq!(rig.step(), bps[0].addr + 3);
    rig.clear(bps[1]).unwrap();
    rig.clear(bps[3]).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bps[2]));
    rig.clear(bps[2]).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    let registers = rig.registers(0);
    assert_eq!([registers.r8, registers.r9, registers.r10, registers.r11, registers.r12], [1; 5]);
}

fn l05_nothing_armed_leaves_the_guests_own_single_step_alone() {
    let mut rig = Rig::one("own_tf");
    // Once armed and then not any more, so that "nothing" is what KVM was told, not what it began with.
    let bp = Breakpoint::exec(at("tf4"));
    rig.set(bp).unwrap();
    rig.clear(bp).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(rig.spies[0].look(|notes| notes.trapped), 0, "its #DB came to us");
    let log = rig.log();
    assert_eq!(log.len(), 5, "{log:x?}");
    assert!(log.iter().all(|entry| entry.vector == 1 && entry.dr6 == 0xffff_4ff0), "{log:x?}");
    assert_eq!(name(log[0].rip), name(at("tf2")));
}

fn l05_what_is_released_is_off_and_not_merely_empty() {
    let mut rig = Rig::all(2, "hotmem");
    rig.set(Breakpoint::exec(at("hotmem_bp"))).unwrap();
    rig.run_all();
    rig.coordinator.release(Level::Gdb).unwrap();
    wait_for("both to count", || (0..2).all(|cpu| rig.field(cpu, cpu_field::HITS) > 1000).then_some(()));
    rig.interrupt();
    assert!(rig.spies.iter().all(|spy| spy.armed() == Arming::OFF));
}

/// Slot 0 changes its owner while vCPU 1 stands between KVM_RUN and the handling of a hit there.
fn l06_a_hit_on_its_way_is_never_taken_for_the_slots_next_owner() {
    let mut rig = Rig::all(2, "hotmem");
    let (first, next) = (Breakpoint::exec(at("hotmem_bp")), Breakpoint::exec(at("step_begin")));
    for _ in 0..20 {
        let before = [0, 1].map(|cpu| rig.field(cpu, cpu_field::HITS));
        assert_eq!(rig.go(), None);
        rig.spies[1].hold_until_kicked(|exit| matches!(exit, trapline_vmm::vcpu::Exit::Debug(_)));
        rig.set(first).unwrap();
        rig.spies[1].wait_held();
        rig.clear(first).unwrap();
        rig.set(next).unwrap();
        assert_eq!(rig.coordinator.image().addresses()[0], next.addr, "the slot is used again");
        let counted = |rig: &Rig| (0..2).all(|cpu| rig.field(cpu, cpu_field::HITS) > before[cpu as usize] + 100);
        wait_for("both to count on", || {
            assert_eq!(rig.coordinator.poll().unwrap(), None, "a hit on what is gone was told");
            counted(&rig).then_some(())
        });
        rig.interrupt();
        rig.clear(next).unwrap();
    }
    rig.assert_guest_undisturbed();
}

fn l06_removing_one_leaves_the_others_in_their_slots() {
    let mut rig = Rig::one("bp_line");
    let bps = ["bp1", "bp2", "bp3", "bp4"].map(|label| Breakpoint::exec(at(label)));
    for bp in bps {
        rig.set(bp).unwrap();
    }
    let before = rig.coordinator.image().addresses();
    rig.clear(bps[0]).unwrap();
    rig.clear(bps[2]).unwrap();
    assert_eq!(rig.spies[0].armed().addresses, [0, before[1], 0, before[3]]);
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bps[1]));
}

fn l07_a_step_after_a_register_write_is_exact() {
    let mut rig = Rig::one("bp_line");
    rig.run_to("bp1");
    assert_eq!(rig.step(), at("bp1") + 3);
    // Elsewhere, right after a step: what KVM latched for the step no longer fits.
    let mut registers = rig.registers(0);
    registers.rip = at("bp4");
    registers.r11 = 40;
    rig.coordinator.set_registers(trapline_vmm::debug::VcpuId(0), &registers).unwrap();
    assert_eq!(name(rig.step()), name(at("bp4") + 3));
    let registers = rig.registers(0);
    assert_eq!([registers.r8, registers.r9, registers.r10, registers.r11, registers.r12], [1, 0, 0, 41, 0]);
}

fn l08_a_breakpoint_is_in_force_in_every_address_space() {
    let mut rig = Rig::one("spaces");
    let bp = Breakpoint::exec(at("fx_spaces_code"));
    rig.set(bp).unwrap();
    for round in 0..10 {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        let space = ["fx_pml4", "fx_second_pml4"][round % 2];
        assert_eq!(rig.registers(0).cr3, at(space), "round {round}");
    }
}

fn l08_a_breakpoint_is_linear_and_not_physical() {
    for (addr, mine, others) in [
        (at("fx_alias_code"), cpu_field::HITS, cpu_field::SECOND),
        (fixture::ALIAS + at("fx_alias_code"), cpu_field::SECOND, cpu_field::HITS),
    ] {
        let mut rig = Rig::new(&[Begin::Ring0("alias")]);
        let bp = Breakpoint::exec(addr);
        rig.set(bp).unwrap();
        for hit in 1..=10 {
            assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
            assert_eq!(rig.pc(0), addr);
            // Every call through this address stopped, none through the other.
            assert_eq!(rig.field(0, mine), hit - 1);
            assert!(rig.field(0, others).abs_diff(hit - 1) <= 1);
        }
    }
}
