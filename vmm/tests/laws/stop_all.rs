//! Laws C1 to C9: the world stops, whatever its vCPUs are doing, and goes on as if it had not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use trapline_guests::fixture::{self, cpu_field, vector};
use trapline_vmm::debug::{Breakpoint, RunMode, Stop, StopReason, VcpuId};
use trapline_vmm::vcpu::{Activity, Exit, Registers, kick};

use crate::booted::Booted;
use crate::clock::wait_for;
use crate::lane::Need::Kick;
use crate::law::{Law, law};
use crate::rig::{Begin, Rig, at, hit, name};

pub(crate) fn laws() -> Vec<Law> {
    let mut laws = vec![
        law!(c1_every_kind_of_vcpu_stops_and_resumes_1000_times, Kick),
        law!(c2_a_storm_of_kicks_stops_nothing, Kick),
        law!(c2_a_storm_of_kicks_loses_and_doubles_no_hit, Kick),
        law!(c5_all_are_parked_when_a_stop_is_told, Kick),
        law!(c5_sixty_four_vcpus_stop_and_are_told_of, Kick),
        law!(c6_who_goes_on_is_told_that_time_was_stolen, Kick),
        law!(c6_a_guest_with_a_clock_sees_that_it_was_stopped, Kick),
        law!(c7_registers_are_written_before_the_guest_goes_on, Kick),
        law!(c8_a_stop_changes_nothing_in_the_guest, Kick),
        law!(c8_scheduler_locking_keeps_the_others_parked, Kick),
        law!(c8_a_step_that_another_vcpus_stop_ends_leaves_nothing_behind, Kick),
        law!(c8_a_step_that_is_interrupted_leaves_nothing_behind, Kick),
        law!(c9_an_interrupt_is_told_of_a_vcpu_that_ran, Kick),
    ];
    for access in ACCESSES {
        laws.push(Law::of("c4_stopped_within_", access, &[Kick], c4_stopped_within));
    }
    laws
}

/// (t1) One spins, one sleeps and is woken by its timer, one talks to a device, one was never started.
fn c1_every_kind_of_vcpu_stops_and_resumes_1000_times() {
    const SPIN: u32 = 0;
    const SLEEP: u32 = 1;
    const TALK: u32 = 2;
    let mut rig =
        Rig::new(&[Begin::Ring0("hotmem"), Begin::Ring0("hlt_timer"), Begin::Ring0("mmio_loop"), Begin::WaitForSipi]);
    let mut before = [0; 4];
    let mut random = 1u32;
    for round in 0..1000 {
        assert_eq!(rig.go(), None, "round {round}");
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        match random >> 29 {
            0..3 => {}
            3..7 => (0..random >> 16).for_each(|_| std::hint::spin_loop()),
            _ => thread::sleep(Duration::from_micros(u64::from(random >> 22))),
        }
        rig.interrupt();
        let [writes, reads, ..] = rig.accesses();
        let now = [
            rig.field(SPIN, cpu_field::HITS),
            rig.field(SLEEP, cpu_field::WAKEUPS),
            rig.field(TALK, cpu_field::MMIO_WRITES),
            rig.field(TALK, cpu_field::MMIO_READS),
        ];
        assert!(now.iter().zip(&before).all(|(now, before)| now >= before), "round {round}: {before:?}, then {now:?}");
        before = now;
        // A device access counts as done, in the guest and in the device, or not at all: but for the
        // instruction that counts it.
        let pc = rig.pc(TALK);
        let [wrote, read] = ["mmio_write_next", "mmio_read_next"].map(|label| u64::from(pc == at(label)));
        assert_eq!(writes, now[2] + wrote, "round {round} at {}", name(pc));
        assert_eq!(reads, now[3] + read, "round {round} at {}", name(pc));
        let states = [SPIN, SLEEP, TALK, 3].map(|cpu| rig.coordinator.activity(VcpuId(cpu)).unwrap());
        assert!(matches!(
            states,
            [Activity::Runnable, Activity::Runnable | Activity::Halted, Activity::Runnable, Activity::WaitForSipi]
        ));
    }
    assert_eq!(rig.go(), None);
    wait_for("each to make progress", || {
        let now = [rig.field(SPIN, cpu_field::HITS), rig.field(SLEEP, cpu_field::WAKEUPS), rig.accesses()[1]];
        (now[0] > before[0] && now[1] > before[1] && now[2] > before[3]).then_some(())
    });
    rig.interrupt();
    let offset = u64::from(TALK) * fixture::MMIO_STRIDE;
    for (n, write) in rig.mmio.lock().writes.iter().enumerate() {
        assert_eq!(*write, (offset, n as u64 + 1), "a write was lost, doubled or changed");
    }
    rig.assert_guest_undisturbed();
}

/// (t2) Kicks that nobody sent for a reason, far more often than the product sends any.
struct Storm {
    over: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<u64>>,
}

impl Storm {
    fn over(rig: &Rig) -> Self {
        let targets: Vec<libc::pthread_t> =
            rig.spies.iter().map(|spy| wait_for("a thread", || spy.look(|notes| notes.thread)).1).collect();
        let over = Arc::new(AtomicBool::new(false));
        let ends = over.clone();
        let thread = thread::spawn(move || {
            let mut sent = 0;
            while !ends.load(Ordering::SeqCst) {
                for &target in &targets {
                    crate::rig::send_signal(target, kick::signal());
                    sent += 1;
                }
                thread::sleep(Duration::from_micros(50));
            }
            sent
        });
        Storm { over, thread: Some(thread) }
    }

    /// Ends it; how many kicks there were. The vCPU threads still live: the rig outlives the storm.
    fn end(mut self) -> u64 {
        self.over.store(true, Ordering::SeqCst);
        self.thread.take().map_or(0, |thread| thread.join().unwrap())
    }
}

impl Drop for Storm {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn c2_a_storm_of_kicks_stops_nothing() {
    let mut rig = Rig::new(&[Begin::Ring0("hotmem"), Begin::Ring0("hlt_timer"), Begin::Ring0("mmio_loop")]);
    assert_eq!(rig.go(), None);
    let storm = Storm::over(&rig);
    let progress = |rig: &Rig| {
        [rig.field(0, cpu_field::HITS), rig.field(1, cpu_field::WAKEUPS), rig.field(2, cpu_field::MMIO_READS)]
    };
    for _ in 0..20 {
        let before = progress(&rig);
        wait_for("each to make progress", || {
            assert_eq!(rig.coordinator.poll().unwrap(), None, "a kick surfaced as a stop");
            progress(&rig).iter().zip(&before).all(|(now, then)| now > then).then_some(())
        });
    }
    assert!(storm.end() > 100);
    assert!(rig.spies.iter().all(|spy| spy.look(|notes| notes.kicked) > 0), "no kick arrived");
    rig.interrupt();
    for (n, write) in rig.mmio.lock().writes.iter().enumerate() {
        assert_eq!(write.1, n as u64 + 1, "a write was lost, doubled or changed");
    }
}

fn c2_a_storm_of_kicks_loses_and_doubles_no_hit() {
    let mut rig = Rig::all(2, "hotmem");
    let bp = Breakpoint::exec(at("hotmem_bp"));
    rig.set(bp).unwrap();
    // Threads that have not begun cannot be signalled.
    rig.registers(0);
    rig.registers(1);
    let storm = Storm::over(&rig);
    let mut told = [0u64; 2];
    for _ in 0..300 {
        let stop = rig.run_all();
        assert_eq!(stop.reason, StopReason::Breakpoint(bp));
        let cpu = stop.vcpu.0;
        assert_eq!(rig.pc(cpu), bp.addr);
        assert_eq!(rig.field(cpu, cpu_field::HITS), told[cpu as usize]);
        told[cpu as usize] += 1;
    }
    storm.end();
    assert!(told.iter().all(|&times| times > 20), "{told:?}");
}

/// The accesses to devices of the property `step`, in its order.
const ACCESSES: [&str; 6] = ["out", "in", "outs", "ins", "mmio_write", "mmio_read"];

/// (t3) Stopped between the device's part of an access and its end, the vCPU has the registers of one
/// that was stepped over the whole instruction: nothing is half done when somebody looks (law C4).
fn c4_stopped_within(access: &str) {
    let next = at(&format!("s_{access}_next"));
    let mut stepped = Rig::one("step");
    stepped.run_to(&format!("s_{access}"));
    assert_eq!(name(stepped.step()), name(next));
    let expected = stepped.registers(0);

    let mut stopped = Rig::one("step");
    let before = ACCESSES.iter().position(|other| *other == access).unwrap();
    stopped.spies[0].hold_nth_until_kicked(before as u32, |exit| matches!(exit, Exit::Served(None)));
    assert_eq!(stopped.go(), None);
    stopped.spies[0].wait_held();
    stopped.interrupt();
    let found = stopped.registers(0);
    assert_eq!(name(found.pc()), name(next));
    assert_eq!(Difference(found), Difference(expected));
    assert_eq!(stopped.accesses(), stepped.accesses());
    // And it goes on from there: nothing is done a second time.
    for rig in [&mut stopped, &mut stepped] {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
        assert_eq!(rig.accesses(), [1, 1, 2, 2]);
    }
}

/// Registers, compared without what the two ways may leave different: RF, which no instruction sees.
#[derive(Debug)]
struct Difference(Registers);

impl PartialEq for Difference {
    fn eq(&self, other: &Self) -> bool {
        const RF: u64 = 1 << 16;
        let plain = |registers: Registers| Registers { rflags: registers.rflags & !RF, ..registers };
        plain(self.0) == plain(other.0)
    }
}

fn c5_all_are_parked_when_a_stop_is_told() {
    let mut rig = Rig::all(4, "hotmem");
    let bp = Breakpoint::exec(at("hotmem_bp2"));
    // Only vCPU 2 comes by: the others are spinning somewhere else.
    for cpu in [0, 1, 3] {
        let mut registers = rig.registers(cpu);
        registers.rip = at("s_jump_self");
        rig.coordinator.set_registers(VcpuId(cpu), &registers).unwrap();
    }
    rig.set(bp).unwrap();
    for _ in 0..50 {
        assert_eq!(rig.run_all(), hit(2, bp));
        // A vCPU that runs answers no question about its registers; and it does not enter the guest again.
        let entries: Vec<u64> = rig.spies.iter().map(|spy| spy.look(|notes| notes.entries)).collect();
        for cpu in [0, 1, 3] {
            assert_eq!(rig.pc(cpu), at("s_jump_self"));
        }
        assert_eq!(rig.spies.iter().map(|spy| spy.look(|notes| notes.entries)).collect::<Vec<_>>(), entries);
        assert!(!rig.coordinator.is_running());
    }
}

fn c5_sixty_four_vcpus_stop_and_are_told_of() {
    const CPUS: usize = 64;
    let mut rig = Rig::all(CPUS, "hotmem");
    let bp = Breakpoint::exec(at("hotmem_bp"));
    for round in 0..3 {
        rig.set(bp).unwrap();
        let mut told = [false; CPUS];
        let mut before = [0; CPUS];
        while told.contains(&false) {
            let stop = rig.run_all();
            assert_eq!(stop.reason, StopReason::Breakpoint(bp));
            let hits = rig.field(stop.vcpu.0, cpu_field::HITS);
            let n = stop.vcpu.index();
            assert!(!told[n] || hits == before[n] + 1, "vCPU {n} of round {round}: {hits} after {}", before[n]);
            (told[n], before[n]) = (true, hits);
        }
        rig.clear(bp).unwrap();
        assert_eq!(rig.go(), None);
        rig.interrupt();
    }
    rig.assert_guest_undisturbed();
}

fn c6_who_goes_on_is_told_that_time_was_stolen() {
    let mut rig = Rig::all(2, "hotmem");
    for round in 1..=5 {
        assert_eq!(rig.coordinator.resume(&rig.only(1, RunMode::Continue)).unwrap(), None);
        rig.interrupt();
        let resumed = [0, 1].map(|cpu: usize| rig.spies[cpu].look(|notes| notes.resumed));
        assert_eq!(resumed, [0, round], "once for each time that it went on");
    }
    // A guest that is stepped while it reads the clock would see a new version at each step.
    rig.step();
    assert_eq!(rig.spies[0].look(|notes| notes.resumed), 0);
}

/// The guest's watchdog forgives a stop by this flag of its paravirtual clock.
fn c6_a_guest_with_a_clock_sees_that_it_was_stopped() {
    const FLAGS: u64 = 29;
    const GUEST_STOPPED: u64 = 1 << 1;
    let mut rig = Rig::one("hotmem");
    rig.give_clock(0, fixture::WATCH);
    for round in 0..5 {
        let before = rig.field(0, cpu_field::HITS);
        assert_eq!(rig.go(), None);
        wait_for("it to run", || (rig.field(0, cpu_field::HITS) > before).then_some(()));
        rig.interrupt();
        assert_ne!(rig.word(fixture::WATCH + FLAGS) & GUEST_STOPPED, 0, "round {round}");
        // As the guest's watchdog does, once it has seen it.
        assert!(rig.write_memory(fixture::WATCH + FLAGS, &[0]));
    }
}

fn c7_registers_are_written_before_the_guest_goes_on() {
    let mut rig = Rig::all(2, "hotmem");
    for round in 0..50 {
        let mut registers = rig.registers(1);
        registers.r8 = round << 40;
        rig.coordinator.set_registers(VcpuId(1), &registers).unwrap();
        assert_eq!(rig.registers(1), registers);
        let before = rig.field(1, cpu_field::HITS);
        assert_eq!(rig.go(), None);
        wait_for("it to run", || (rig.field(1, cpu_field::HITS) > before + 10).then_some(()));
        rig.interrupt();
        let executed = rig.field(1, cpu_field::HITS) - before;
        let counted = rig.registers(1).r8 - registers.r8;
        // R8 counts right after: both count from what they were, but for the instruction between them.
        assert!(counted.abs_diff(executed) <= 1, "{counted} and {executed}");
    }
}

fn c8_a_stop_changes_nothing_in_the_guest() {
    let mut rig =
        Rig::new(&[Begin::Ring0("hotmem"), Begin::Ring0("hlt_wait"), Begin::Ring0("halt"), Begin::WaitForSipi]);
    rig.set(Breakpoint::exec(at("step_begin"))).unwrap();
    rig.run_until_asleep(1);
    rig.run_until_asleep(2);
    assert_eq!(rig.go(), None);
    for _ in 0..50 {
        rig.interrupt();
        assert!(rig.spies.iter().all(|spy| spy.armed() == rig.published()));
        let states = [1, 2, 3].map(|cpu| rig.coordinator.activity(VcpuId(cpu)).unwrap());
        assert_eq!(states, [Activity::Halted, Activity::Halted, Activity::WaitForSipi]);
        assert_eq!(rig.go(), None);
    }
    assert_eq!(rig.field(1, cpu_field::WAKEUPS), 0, "a stop woke it");
    assert_eq!(rig.log(), [], "a stop injected something");
    // And what really wakes it still does.
    rig.interrupt_guest(1, vector::MESSAGE);
    wait_for("it to wake up", || (rig.field(1, cpu_field::WAKEUPS) == 1).then_some(()));
}

fn c8_scheduler_locking_keeps_the_others_parked() {
    let mut demo = Booted::counting_demo(4, None);
    let bp = Breakpoint::exec(demo.at("count_up_here"));
    let others = |counts: &[u64], cpu: u32| -> Vec<u64> {
        counts.iter().enumerate().filter(|(n, _)| *n != cpu as usize).map(|(_, count)| *count).collect()
    };
    for cpu in [2, 0, 3, 1] {
        let before = demo.counts();
        let pcs: Vec<u64> = (0..4).map(|cpu| demo.registers(cpu).pc()).collect();
        let step = demo.only(cpu, RunMode::Step);
        for _ in 0..50 {
            assert_eq!(demo.run(&step), Stop::new(VcpuId(cpu), StopReason::Step));
        }
        demo.set(bp);
        let go = demo.only(cpu, RunMode::Continue);
        for _ in 0..5 {
            assert_eq!(demo.run(&go), hit(cpu, bp));
        }
        demo.clear(bp);
        assert_eq!(others(&demo.counts(), cpu), others(&before, cpu));
        for other in (0..4).filter(|other| *other != cpu) {
            assert_eq!(demo.registers(other).pc(), pcs[other as usize]);
        }
    }
    assert_eq!(demo.guest_debug_exceptions(), 0);
}

/// `vCont;s:1;c:2`, and 2 stops first, because 1 sleeps.
fn c8_a_step_that_another_vcpus_stop_ends_leaves_nothing_behind() {
    let mut rig = Rig::new(&[Begin::Ring0("hlt_wait"), Begin::Ring0("hotmem")]);
    rig.run_until_asleep(0);
    let bp = Breakpoint::exec(at("hotmem_bp"));
    rig.set(bp).unwrap();
    let plan = rig.plan(RunMode::Continue).with(VcpuId(0), RunMode::Step);
    for _ in 0..20 {
        assert_eq!(rig.run(&plan), hit(1, bp));
        let armed = rig.spies[0].armed();
        assert!(!armed.step && !armed.block_irq, "a step was left armed");
        assert_eq!(rig.registers(0).rflags & 0x100, 0, "TF was left set");
    }
    rig.clear(bp).unwrap();
    // Awake it runs on and on; a step that was left behind would stop it.
    assert_eq!(rig.go(), None);
    for wakeups in 1..=5 {
        rig.interrupt_guest(0, vector::MESSAGE);
        wait_for("it to wake up", || {
            assert_eq!(rig.coordinator.poll().unwrap(), None);
            (rig.field(0, cpu_field::WAKEUPS) == wakeups).then_some(())
        });
    }
    rig.interrupt();
    assert!(rig.log().iter().all(|entry| entry.vector == u64::from(vector::MESSAGE) && entry.rflags & 0x100 == 0));
    rig.assert_guest_undisturbed();
}

fn c8_a_step_that_is_interrupted_leaves_nothing_behind() {
    let mut rig = Rig::new(&[Begin::Ring0("hlt_wait"), Begin::Ring0("hotmem")]);
    rig.run_until_asleep(0);
    for _ in 0..20 {
        assert_eq!(rig.coordinator.resume(&rig.only(0, RunMode::Step)).unwrap(), None);
        rig.interrupt();
        assert!(!rig.spies[0].armed().step, "a step was left armed");
    }
    assert_eq!(rig.go(), None);
    rig.interrupt_guest(0, vector::MESSAGE);
    wait_for("it to wake up", || {
        assert_eq!(rig.coordinator.poll().unwrap(), None, "a step that nobody waits for was told");
        (rig.field(0, cpu_field::WAKEUPS) == 1).then_some(())
    });
    rig.assert_guest_undisturbed();
}

fn c9_an_interrupt_is_told_of_a_vcpu_that_ran() {
    let mut demo = Booted::counting_demo(3, None);
    for cpu in [0, 2, 1] {
        let plan = demo.only(cpu, RunMode::Continue);
        assert_eq!(demo.vm.resume(&plan).unwrap(), None);
        let stop = demo.vm.stop().unwrap();
        assert_eq!(stop, Stop::new(VcpuId(cpu), StopReason::Interrupted));
    }
}
