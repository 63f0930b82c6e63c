//! The coordinator and its vCPU threads, model-checked: shuttle chooses the interleavings.
//!
//! The vCPUs are models that execute a loop of three instructions and know breakpoints the way
//! the processor does; some are late, some fail. What must hold in every interleaving is stated
//! in each test.
//!
//! Run with `cargo test -p trapline-vmm --features shuttle --test coordinator_model`.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed
#![cfg(feature = "shuttle")]

use std::collections::BTreeSet;
use std::io;

use shuttle::rand::Rng;
use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use shuttle::sync::{Arc, Mutex};
use shuttle::thread;
use trapline_vmm::coordinator::{Coordinator, CoordinatorError, Kick};
use trapline_vmm::debug::{
    Breakpoint, BreakpointError, DebugExit, Disposition, Dr6, GuestRegisters, Handler, INT3, Level, Mechanism, Offer,
    Owner, ResumePlan, RunMode, Stop, StopReason, Trigger, VcpuId,
};
use trapline_vmm::ground::Ground;
use trapline_vmm::state::{GeneralState, VcpuState, Word};
use trapline_vmm::vcpu::{Activity, Arming, Cpu, Exit, Raised, Registers};

/// The loop: LOOP, LOOP + 1 (counts), LOOP + 2, back to LOOP.
const LOOP: u64 = 0x1000;
const COUNTS: u64 = LOOP + 1;
/// Schedules that each property is tried on.
const SCHEDULES: usize = 400;

/// What the test can see of a model vCPU from outside.
#[derive(Default)]
struct Probe {
    /// Executions of the instruction at [`COUNTS`].
    count: AtomicU64,
    /// Executions of any instruction.
    executed: AtomicU64,
    kicked: AtomicBool,
    /// The next so many calls of `arm` fail.
    fail: AtomicU64,
    /// Turns that each call of `arm` takes.
    late: AtomicU64,
    /// Turns that it takes to go on.
    slow_to_resume: AtomicU64,
    arming: Mutex<Option<Arming>>,
    /// The next instruction at COUNTS tells pvpanic, once.
    panics: AtomicBool,
    /// The instruction at COUNTS also stores here: a watchpoint on it triggers.
    stores_to: AtomicU64,
}

/// The bytes of the loop. Linear and physical addresses are the same.
#[derive(Clone)]
struct Memory(Arc<Vec<AtomicU64>>);

/// What the guest has there: a prefix that is no instruction yet, so that nobody carries it out but
/// the model.
const CODE: u8 = 0xf0;

impl Memory {
    fn new() -> Self {
        Memory(Arc::new((0..3).map(|_| AtomicU64::new(CODE.into())).collect()))
    }

    fn byte(&self, gpa: u64) -> Option<&AtomicU64> {
        self.0.get(gpa.checked_sub(LOOP)? as usize)
    }

    fn read(&self, gpa: u64) -> Option<u8> {
        self.byte(gpa).map(|byte| byte.load(Ordering::SeqCst) as u8)
    }

    fn write(&self, gpa: u64, value: u8) {
        self.byte(gpa).expect("a byte of the loop").store(value.into(), Ordering::SeqCst);
    }

    fn bytes(&self) -> Vec<u8> {
        (LOOP..LOOP + 3).filter_map(|gpa| self.read(gpa)).collect()
    }
}

impl Ground for Memory {
    fn read(&self, gpa: u64, into: &mut [u8]) -> usize {
        let there = Memory::read(self, gpa).filter(|_| into.len() == 1);
        there.map_or(0, |byte| {
            into[0] = byte;
            1
        })
    }

    fn replace(&mut self, gpa: u64, from: u8, to: u8) -> io::Result<bool> {
        let is_it = Memory::read(self, gpa) == Some(from);
        if is_it {
            self.write(gpa, to);
        }
        Ok(is_it)
    }

    fn protect(&mut self, _: &BTreeSet<u64>) -> io::Result<()> {
        Ok(())
    }
}

struct ModelCpu {
    pc: u64,
    probe: Arc<Probe>,
    memory: Memory,
}

impl ModelCpu {
    /// One instruction. Before it, the execution breakpoints; after it, the step.
    fn execute(&mut self) -> Option<Exit> {
        let arming = self.probe.arming.lock().unwrap().unwrap_or(Arming::OFF);
        let hit = (0..4).find(|&n| arming.dr7.is_enabled(n) && arming.addresses[n] == self.pc);
        if let Some(n) = hit {
            return Some(Exit::Debug(DebugExit { exception: 1, pc: self.pc, dr6: Dr6::RESET | 1 << n }));
        }
        if self.memory.read(self.pc) == Some(INT3) {
            return Some(Exit::Debug(DebugExit { exception: 3, pc: self.pc, dr6: 0 }));
        }
        let mut causes = 0;
        if self.pc == COUNTS {
            self.probe.count.fetch_add(1, Ordering::SeqCst);
            if self.probe.panics.swap(false, Ordering::SeqCst) {
                self.pc += 1;
                return Some(Exit::Served(Some(StopReason::GuestPanic)));
            }
            let stored = self.probe.stores_to.load(Ordering::SeqCst);
            let watch = (0..4).find(|&n| stored != 0 && arming.dr7.is_enabled(n) && arming.addresses[n] == stored);
            causes = watch.map_or(0, |n| 1 << n);
        }
        self.probe.executed.fetch_add(1, Ordering::SeqCst);
        self.pc = if self.pc == LOOP + 2 { LOOP } else { self.pc + 1 };
        if arming.step {
            causes |= Dr6::BS;
        }
        (causes != 0).then(|| Exit::Debug(DebugExit { exception: 1, pc: self.pc, dr6: Dr6::RESET | causes }))
    }
}

impl Cpu for ModelCpu {
    fn clear_kick(&mut self) {
        self.probe.kicked.store(false, Ordering::SeqCst);
    }

    fn run(&mut self) -> Exit {
        // As KVM_RUN does: the kick is looked at first, and guest code runs until something is.
        for _ in 0..16 {
            if self.probe.kicked.load(Ordering::SeqCst) {
                return Exit::Kicked;
            }
            if let Some(exit) = self.execute() {
                return exit;
            }
            thread::yield_now();
        }
        Exit::Again
    }

    fn complete(&mut self) -> Exit {
        Exit::Kicked
    }

    fn arm(&mut self, arming: &Arming) -> io::Result<()> {
        for _ in 0..self.probe.late.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        let failures = self.probe.fail.load(Ordering::SeqCst);
        if failures > 0 {
            self.probe.fail.store(failures - 1, Ordering::SeqCst);
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        *self.probe.arming.lock().unwrap() = Some(*arming);
        Ok(())
    }

    fn pc(&mut self) -> io::Result<u64> {
        Ok(self.pc)
    }

    fn registers(&mut self) -> io::Result<Registers> {
        Ok(Registers { rip: self.pc, ..Registers::default() })
    }

    fn set_registers(&mut self, registers: &Registers) -> io::Result<()> {
        self.pc = registers.rip;
        Ok(())
    }

    fn state(&mut self) -> io::Result<Registers> {
        self.registers()
    }

    fn set_general(&mut self, registers: &Registers) -> io::Result<()> {
        self.set_registers(registers)
    }

    fn activity(&mut self) -> io::Result<Activity> {
        Ok(Activity::Runnable)
    }

    fn halt(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn translate(&mut self, addr: u64) -> Option<u64> {
        self.memory.read(addr).map(|_| addr)
    }

    fn read_physical(&mut self, gpa: u64, into: &mut [u8]) -> usize {
        Ground::read(&self.memory, gpa, into)
    }

    fn write_physical(&mut self, gpa: u64, bytes: &[u8]) -> bool {
        // Others get a turn before and after.
        thread::yield_now();
        self.memory.write(gpa, bytes[0]);
        thread::yield_now();
        true
    }

    fn read(&mut self, _: u64, _: &mut [u8]) -> usize {
        0
    }

    fn exchange(&mut self, _: u64, _: &[u8], _: &mut [u8]) -> usize {
        0
    }

    fn write(&mut self, _: u64, _: &[u8]) -> bool {
        false
    }

    fn reflect_db(&mut self, causes: u64) -> io::Result<()> {
        panic!("the guest was given a #DB that is not its own: {causes:#x}");
    }

    fn reflect_bp(&mut self) -> io::Result<()> {
        panic!("the guest was given a #BP that is not its own");
    }

    fn guest_registers(&mut self) -> io::Result<GuestRegisters> {
        Ok(GuestRegisters { dr7: 0x400, ..GuestRegisters::default() })
    }

    fn set_guest_registers(&mut self, _: &GuestRegisters) -> io::Result<()> {
        panic!("the guest's debug registers were written");
    }

    fn raise(&mut self, event: Raised, _: u64) -> io::Result<()> {
        panic!("the guest was given what it did not raise: {event:?}");
    }

    fn end_shadow(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn kick_itself(&mut self, _: bool) -> io::Result<()> {
        Ok(())
    }

    fn save(&mut self) -> io::Result<VcpuState> {
        let general = GeneralState { rip: Word(self.pc), ..GeneralState::default() };
        Ok(VcpuState { general, ..VcpuState::default() })
    }

    fn restore(&mut self, state: &VcpuState) -> io::Result<()> {
        self.pc = state.general.rip.0;
        Ok(())
    }

    fn resumed(&mut self) {
        for _ in 0..self.probe.slow_to_resume.load(Ordering::SeqCst) {
            thread::yield_now();
        }
    }
}

struct World {
    coordinator: Coordinator,
    probes: Vec<Arc<Probe>>,
    memory: Memory,
}

impl World {
    /// All vCPUs begin at [`LOOP`].
    fn new(vcpus: usize) -> Self {
        Self::starting_at(&vec![LOOP; vcpus])
    }

    fn starting_at(pcs: &[u64]) -> Self {
        let memory = Memory::new();
        let probes: Vec<Arc<Probe>> = pcs.iter().map(|_| Arc::default()).collect();
        let cpus = probes
            .iter()
            .zip(pcs)
            .map(|(probe, &pc)| {
                let kicked = probe.clone();
                let kick: Kick = Box::new(move |_| kicked.kicked.store(true, Ordering::SeqCst));
                (ModelCpu { pc, probe: probe.clone(), memory: memory.clone() }, kick)
            })
            .collect();
        let coordinator = Coordinator::new(cpus, || ()).expect("threads");
        World { coordinator, probes, memory }
    }

    /// As [`new`](Self::new), with all slots taken by breakpoints that nobody comes by: what is set
    /// now is an INT3 in memory.
    fn patching(vcpus: usize) -> Self {
        let mut world = Self::new(vcpus);
        let offer = Offer { patches: true, ..Offer::SLOTS };
        world.coordinator.use_ground(Box::new(world.memory.clone()), offer);
        for n in 0..4 {
            world.coordinator.set_breakpoint(Owner::GDB, Breakpoint::exec(0xdead_0000 + n)).unwrap();
        }
        world
    }

    /// Sets an INT3 at the counted instruction.
    fn patch(&mut self) -> Breakpoint {
        let request = Breakpoint::exec(COUNTS);
        self.coordinator.set_breakpoint(Owner::GDB, request).unwrap();
        assert_eq!(self.coordinator.mechanism(Owner::GDB, request), Some(Mechanism::Patch));
        request
    }

    /// Polls until every vCPU has counted `more`.
    fn count_on(&mut self, more: u64) {
        let before = self.counts();
        while self.counts().iter().zip(&before).any(|(now, then)| *now < then + more) {
            assert_eq!(self.coordinator.poll().unwrap(), None);
            thread::yield_now();
        }
    }

    fn go(&mut self) -> Option<Stop> {
        let plan = ResumePlan::all(self.probes.len(), RunMode::Continue);
        self.coordinator.resume(&plan).expect("resume")
    }

    /// Waits for a stop, giving the others their turns.
    fn wait(&mut self) -> Stop {
        for _ in 0..100_000 {
            if let Some(stop) = self.coordinator.poll().expect("poll") {
                return stop;
            }
            thread::yield_now();
        }
        panic!("no stop came");
    }

    fn counts(&self) -> Vec<u64> {
        self.probes.iter().map(|probe| probe.count.load(Ordering::SeqCst)).collect()
    }

    fn executed(&self) -> u64 {
        self.probes.iter().map(|probe| probe.executed.load(Ordering::SeqCst)).sum()
    }

    /// What each vCPU was last armed with: addresses, DR7, and whether it steps.
    fn armed(&self) -> Vec<Arming> {
        self.probes.iter().map(|probe| probe.arming.lock().unwrap().unwrap_or(Arming::OFF)).collect()
    }
}

fn check(property: impl Fn() + Send + Sync + 'static) {
    shuttle::check_random(property, SCHEDULES);
}

#[test]
fn l13_every_crossing_of_every_vcpu_is_told_exactly_once() {
    check(|| {
        let mut world = World::new(3);
        world.coordinator.set_breakpoint(Owner::GDB, Breakpoint::exec(COUNTS)).unwrap();
        let mut hits = [0u64; 3];
        for _ in 0..12 {
            let stop = match world.go() {
                Some(pending) => pending,
                None => world.wait(),
            };
            assert_eq!(stop.reason, StopReason::Breakpoint(Breakpoint::exec(COUNTS)));
            hits[stop.vcpu.index()] += 1;
            for (n, count) in world.counts().into_iter().enumerate() {
                // A vCPU that was told about stands on its breakpoint: that crossing comes next.
                let crossings = hits[n];
                assert!(count == crossings || count + 1 == crossings, "vCPU {n}: {count} of {crossings}");
            }
        }
    });
}

#[test]
fn l14_pending_stops_are_told_without_running_the_guest() {
    check(|| {
        let mut world = World::new(3);
        world.coordinator.set_breakpoint(Owner::GDB, Breakpoint::exec(COUNTS)).unwrap();
        assert_eq!(world.go(), None);
        let first = world.wait();
        let before = world.executed();
        let mut told = vec![first.vcpu];
        while let Some(next) = world.coordinator.take_stop() {
            assert!(!told.contains(&next.vcpu), "{} told twice", next.vcpu);
            told.push(next.vcpu);
        }
        assert_eq!(world.executed(), before);
    });
}

/// Put back, every vCPU is where it was saved; what happened since is told to nobody, and each crossing from there on
/// is told once, under what is armed now.
#[test]
fn l70_put_back_they_are_where_they_were_and_nothing_else_is_told() {
    check(|| {
        let mut world = World::new(2);
        let request = Breakpoint::exec(COUNTS);
        assert_eq!(world.go(), None);
        world.count_on(1);
        world.coordinator.stop().unwrap();
        let saved = world.coordinator.save().unwrap();
        world.coordinator.set_breakpoint(Owner::GDB, request).unwrap();
        assert_eq!(world.go(), None);
        world.wait();
        world.coordinator.restore(saved.clone(), Vec::new(), VcpuId(1)).unwrap();
        assert_eq!(world.coordinator.take_stop(), None, "what was pending is gone");
        assert_eq!(world.coordinator.first_resumed(), VcpuId(1));
        assert_eq!(world.coordinator.save().unwrap(), saved);
        let before = world.counts();
        let mut hits = [0u64; 2];
        for _ in 0..6 {
            let stop = match world.go() {
                Some(pending) => pending,
                None => world.wait(),
            };
            hits[stop.vcpu.index()] += 1;
            for (n, count) in world.counts().into_iter().enumerate() {
                let (crossings, counted) = (hits[n], count - before[n]);
                assert!(counted == crossings || counted + 1 == crossings, "vCPU {n}: {counted} of {crossings}");
            }
        }
        assert!(world.coordinator.restore(Vec::new(), Vec::new(), VcpuId(0)).is_err());
    });
}

/// What is still to be told goes along, and comes before anything runs.
#[test]
fn l69_what_was_not_told_is_told_first() {
    check(|| {
        let mut world = World::new(2);
        let saved = world.coordinator.save().unwrap();
        let panicked = Stop::new(VcpuId(1), StopReason::GuestPanic);
        world.coordinator.restore(saved, vec![panicked.clone()], VcpuId(0)).unwrap();
        assert_eq!(world.coordinator.stops().collect::<Vec<_>>(), [&panicked]);
        assert_eq!(world.go(), Some(panicked));
        assert_eq!(world.executed(), 0);
        assert_eq!(world.coordinator.last_stopped(), VcpuId(1));
        assert_eq!(world.go(), None);
        assert!(world.coordinator.save().is_err(), "it runs");
    });
}

#[test]
fn l10_after_the_ok_of_a_removal_nothing_is_told_of_it() {
    check(|| {
        let mut world = World::new(2);
        world.coordinator.set_breakpoint(Owner::GDB, Breakpoint::exec(COUNTS)).unwrap();
        assert_eq!(world.go(), None);
        world.wait();
        world.coordinator.clear_breakpoint(Owner::GDB, Breakpoint::exec(COUNTS)).unwrap();
        let before = world.counts();
        assert_eq!(world.go(), None, "a hit on what is gone was told");
        while world.counts().iter().zip(&before).any(|(now, then)| now < &(then + 2)) {
            assert_eq!(world.coordinator.poll().unwrap(), None);
            thread::yield_now();
        }
    });
}

#[test]
fn l11_a_hit_that_was_dropped_fires_again_if_the_breakpoint_comes_back() {
    check(|| {
        let mut world = World::new(2);
        let request = Breakpoint::exec(COUNTS);
        world.coordinator.set_breakpoint(Owner::GDB, request).unwrap();
        assert_eq!(world.go(), None);
        let told = world.wait().vcpu.index();
        let other = 1 - told;
        // The other vCPU may stand on it with a hit that nobody heard of. Let it run for no, or
        // for a short, time without the breakpoint.
        world.coordinator.clear_breakpoint(Owner::GDB, request).unwrap();
        assert_eq!(world.go(), None);
        world.coordinator.stop().unwrap();
        world.coordinator.set_breakpoint(Owner::GDB, request).unwrap();
        let before = world.counts()[other];
        // From here on each of its crossings is told before it happens.
        let only_other = ResumePlan::all(2, RunMode::Parked).with(VcpuId(other as u32), RunMode::Continue);
        for n in 0..2 {
            let stop = match world.coordinator.resume(&only_other).unwrap() {
                Some(pending) => pending,
                None => world.wait(),
            };
            assert_eq!(stop.vcpu.index(), other);
            assert_eq!(world.counts()[other], before + n, "a crossing was not told");
        }
    });
}

/// A slot changes hands while both vCPUs store to what it watched: those hits are not its new owner's.
#[test]
fn l11_a_hit_is_judged_by_what_its_own_vcpu_has_installed() {
    const WATCHED: u64 = 0x8000;
    check(|| {
        let mut world = World::new(2);
        world.probes.iter().for_each(|probe| probe.stores_to.store(WATCHED, Ordering::SeqCst));
        let (handler, counted) = storing(2);
        for n in 0..3 {
            world.coordinator.set_breakpoint(Owner::harness(1), Breakpoint::exec(0xdead_0000 + n)).unwrap();
        }
        let watch = Breakpoint::watch(WATCHED, 1, Trigger::Write);
        world.coordinator.set_trap(Owner::harness(1), watch, Some(handler)).unwrap();
        assert_eq!(world.go(), None);
        let elsewhere = Breakpoint::watch(WATCHED + 8, 1, Trigger::Write);
        for _ in 0..3 {
            world.count_on(1);
            // It takes the slot of the youngest of the harness, and gives it back.
            world.coordinator.set_breakpoint(Owner::GDB, elsewhere).unwrap();
            assert_eq!(world.coordinator.mechanism(Owner::harness(1), watch), None);
            assert_eq!(world.coordinator.poll().unwrap(), None, "told to who watches another place");
            world.coordinator.clear_breakpoint(Owner::GDB, elsewhere).unwrap();
        }
        world.coordinator.stop().unwrap();
        assert_eq!(world.coordinator.take_stop(), None, "told to who watches another place");
        for (n, count) in world.counts().into_iter().enumerate() {
            let hits = counted[n].load(Ordering::SeqCst);
            assert!(hits > 0 && hits <= count, "vCPU {n}: {hits} hits, {count} stores");
        }
    });
}

#[test]
fn l13_a_crossing_after_the_breakpoint_came_back_is_told() {
    check(|| {
        let mut world = World::new(1);
        let request = Breakpoint::exec(COUNTS);
        for round in 0..4 {
            world.coordinator.set_breakpoint(Owner::GDB, request).unwrap();
            let before = world.counts()[0];
            let stop = match world.go() {
                Some(pending) => pending,
                None => world.wait(),
            };
            assert_eq!(stop.reason, StopReason::Breakpoint(request));
            assert_eq!(world.counts()[0], before, "round {round}: a crossing was not told");
            // Round the loop at least once without it. The stop may come anywhere, here as well.
            world.coordinator.clear_breakpoint(Owner::GDB, request).unwrap();
            assert_eq!(world.go(), None);
            while world.counts()[0] < before + 2 {
                thread::yield_now();
            }
            world.coordinator.stop().unwrap();
        }
    });
}

#[test]
fn l13_a_breakpoint_that_comes_back_at_once_is_not_told_twice() {
    check(|| {
        let mut world = World::new(1);
        let request = Breakpoint::exec(COUNTS);
        world.coordinator.set_breakpoint(Owner::GDB, request).unwrap();
        assert_eq!(world.go(), None);
        world.wait();
        // Taken away and put back while the vCPU may not have moved at all.
        world.coordinator.clear_breakpoint(Owner::GDB, request).unwrap();
        assert_eq!(world.go(), None);
        world.coordinator.stop().unwrap();
        world.coordinator.set_breakpoint(Owner::GDB, request).unwrap();
        let before = world.counts()[0];
        assert_eq!(world.go(), None);
        world.wait();
        let now = world.counts()[0];
        assert!(now == before && now > 0 || now == 1, "the first crossing was told again");
    });
}

#[test]
fn l22_a_watchpoint_does_not_swallow_the_breakpoint_behind_its_access() {
    const WATCHED: u64 = 0x8000;
    check(|| {
        let mut world = World::new(1);
        world.probes[0].stores_to.store(WATCHED, Ordering::SeqCst);
        let (watch, exec) = (Breakpoint::watch(WATCHED, 1, Trigger::Write), Breakpoint::exec(COUNTS + 1));
        world.coordinator.set_breakpoint(Owner::GDB, watch).unwrap();
        world.coordinator.set_breakpoint(Owner::GDB, exec).unwrap();
        for _ in 0..3 {
            assert_eq!(world.go(), None);
            assert_eq!(world.wait().reason, StopReason::Watchpoint { request: watch, addr: WATCHED, stored: None });
            assert_eq!(world.go(), None);
            assert_eq!(world.wait().reason, StopReason::Breakpoint(exec));
        }
    });
}

#[test]
fn l9_breakpoints_change_while_the_guest_runs() {
    check(|| {
        let mut world = World::new(2);
        assert_eq!(world.go(), None);
        let mut told = 0;
        for round in 0..6 {
            world.coordinator.set_breakpoint(Owner::GDB, Breakpoint::exec(COUNTS)).unwrap();
            if round % 2 == 0 {
                // Removed at once, with hits on the way: they may be told until then, never after.
                world.coordinator.clear_breakpoint(Owner::GDB, Breakpoint::exec(COUNTS)).unwrap();
                assert_eq!(world.coordinator.poll().unwrap(), None);
                assert!(world.coordinator.is_running());
            } else {
                let stop = world.wait();
                told += 1;
                assert_eq!(stop.reason, StopReason::Breakpoint(Breakpoint::exec(COUNTS)));
                world.coordinator.clear_breakpoint(Owner::GDB, Breakpoint::exec(COUNTS)).unwrap();
                assert_eq!(world.go(), None);
            }
        }
        assert_eq!(told, 3);
        // Every vCPU runs on: none was left parked with a hit that nobody wanted.
        let before = world.counts();
        while world.counts().iter().zip(&before).any(|(now, then)| now < &(then + 2)) {
            assert_eq!(world.coordinator.poll().unwrap(), None);
            thread::yield_now();
        }
    });
}

#[test]
fn l12_one_failing_vcpu_leaves_every_vcpu_with_the_old_set() {
    check(|| {
        let mut world = World::new(3);
        let old = Breakpoint::exec(LOOP + 2);
        world.coordinator.set_breakpoint(Owner::GDB, old).unwrap();
        let before = world.armed();
        world.probes[1].fail.store(1, Ordering::SeqCst);
        let refused = world.coordinator.set_breakpoint(Owner::GDB, Breakpoint::exec(COUNTS)).unwrap_err();
        let BreakpointError::Apply(why) = refused else { panic!("{refused}") };
        assert!(why.contains("vCPU 1"), "{why}");
        assert_eq!(world.armed(), before, "bit-identical");
        assert_eq!(world.coordinator.breakpoints(), [(Owner::GDB, old)]);
        // And the old one still works, on a vCPU that was switched and switched back.
        assert_eq!(world.go(), None);
        assert_eq!(world.wait().reason, StopReason::Breakpoint(old));
        assert_eq!(world.counts().iter().filter(|&&count| count > 1).count(), 0, "the undone one stopped nothing");
    });
}

#[test]
fn l18_a_vcpu_that_is_too_late_is_named_and_ends_up_with_the_old_set() {
    check(|| {
        let mut world = World::new(2);
        let old = Breakpoint::exec(LOOP + 2);
        world.coordinator.set_breakpoint(Owner::GDB, old).unwrap();
        let before = world.armed();
        // Longer than the deadline has turns.
        world.probes[1].late.store(5_000, Ordering::SeqCst);
        let refused = world.coordinator.set_breakpoint(Owner::GDB, Breakpoint::exec(COUNTS)).unwrap_err();
        assert!(refused.to_string().contains("vCPU 1 did not answer"), "{refused}");
        world.probes[1].late.store(0, Ordering::SeqCst);
        // Its late answers arrive among those to newer questions and change none of them.
        assert_eq!(world.coordinator.registers(VcpuId(0)).unwrap().rip, LOOP);
        loop {
            match world.coordinator.registers(VcpuId(1)) {
                Ok(registers) => break assert_eq!(registers.rip, LOOP),
                Err(CoordinatorError::NoAnswer { .. }) => {}
                Err(other) => panic!("{other}"),
            }
        }
        assert_eq!(world.armed(), before);
        assert_eq!(world.go(), None);
        assert_eq!(world.wait().reason, StopReason::Breakpoint(old));
    });
}

#[test]
fn l18_a_stop_that_one_vcpu_misses_lets_the_others_go_on() {
    check(|| {
        let mut world = World::new(2);
        world.coordinator.set_breakpoint(Owner::GDB, Breakpoint::exec(0xdead)).unwrap();
        assert_eq!(world.go(), None);
        // Parking arms again only after a step, so the delay is put where a park passes through.
        world.probes[1].late.store(5_000, Ordering::SeqCst);
        let refused = world.coordinator.set_breakpoint(Owner::GDB, Breakpoint::exec(0xbeef)).unwrap_err();
        assert!(refused.to_string().contains("vCPU 1"), "{refused}");
        let stopped = world.coordinator.stop();
        world.probes[1].late.store(0, Ordering::SeqCst);
        match stopped {
            Ok(()) => assert!(!world.coordinator.is_running()),
            Err(CoordinatorError::NoAnswer { vcpu }) => {
                assert_eq!(vcpu, VcpuId(1));
                let before = world.counts();
                while world.counts().iter().zip(&before).any(|(now, then)| now < &(then + 2)) {
                    thread::yield_now();
                }
            }
            Err(other) => panic!("{other}"),
        }
    });
}

#[test]
fn l18_a_vcpu_that_stopped_by_itself_stays_there_when_the_stop_of_the_world_fails() {
    const WATCHED: u64 = 0x8000;
    check(|| {
        let mut world = World::new(2);
        // vCPU 0 stops by itself. vCPU 1 steps on and on, and so arms when it parks: too late.
        world.probes[0].stores_to.store(WATCHED, Ordering::SeqCst);
        let watch = Breakpoint::watch(WATCHED, 1, Trigger::Write);
        world.coordinator.set_breakpoint(Owner::GDB, watch).unwrap();
        let range = RunMode::StepRange { start: LOOP, end: LOOP + 3 };
        let plan = ResumePlan::all(2, RunMode::Continue).with(VcpuId(1), range);
        assert_eq!(world.coordinator.resume(&plan).unwrap(), None);
        while world.probes[1].executed.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        world.probes[1].late.store(5_000, Ordering::SeqCst);
        let refused = loop {
            match world.coordinator.poll() {
                Ok(None) => thread::yield_now(),
                Ok(Some(stop)) => panic!("{stop:?}"),
                Err(refused) => break refused,
            }
        };
        assert_eq!(refused, CoordinatorError::NoAnswer { vcpu: VcpuId(1) });
        for _ in 0..20 {
            thread::yield_now();
        }
        assert_eq!(world.counts()[0], 1, "it ran on with a stop that was not told");
        world.probes[1].late.store(0, Ordering::SeqCst);
        while world.coordinator.stop().is_err() {}
        let told = world.coordinator.take_stop();
        assert_eq!(
            told,
            Some(Stop {
                vcpu: VcpuId(0),
                reason: StopReason::Watchpoint { request: watch, addr: WATCHED, stored: None },
                owner: Some(Owner::GDB)
            })
        );
        assert_eq!(world.counts()[0], 1);
        assert_eq!(world.coordinator.take_stop(), None);
    });
}

/// One vCPU does not follow for so long that the others can perhaps be stopped again, and perhaps not.
#[test]
fn l18_what_a_resume_says_is_what_the_world_does() {
    check(|| {
        let mut world = World::new(2);
        // Around one deadline, around two, and beyond.
        let turns = shuttle::rand::thread_rng().gen_range(200..2_000);
        world.probes[1].slow_to_resume.store(turns, Ordering::SeqCst);
        let resumed = world.coordinator.resume(&ResumePlan::all(2, RunMode::Continue));
        match resumed {
            Ok(stop) => {
                assert_eq!((stop, world.coordinator.is_running()), (None, true));
                // Both run, the late one from when it wakes.
                world.probes[1].slow_to_resume.store(0, Ordering::SeqCst);
                while world.counts().contains(&0) {
                    assert_eq!(world.coordinator.poll().unwrap(), None);
                    thread::yield_now();
                }
            }
            Err(error) => {
                assert_eq!(error, CoordinatorError::NoAnswer { vcpu: VcpuId(1) });
                assert!(!world.coordinator.is_running(), "told that it does not run, and it does");
                let before = world.executed();
                for _ in 0..20 {
                    thread::yield_now();
                }
                assert_eq!(world.executed(), before, "guest code ran in a stopped world");
                world.probes[1].slow_to_resume.store(0, Ordering::SeqCst);
                assert_eq!(world.go(), None);
            }
        }
        while world.coordinator.stop().is_err() {}
        assert_eq!(world.coordinator.take_stop(), None);
    });
}

#[test]
fn c8_a_step_that_another_vcpu_interrupts_leaves_nothing_behind() {
    check(|| {
        let mut world = World::new(2);
        world.coordinator.set_breakpoint(Owner::GDB, Breakpoint::exec(COUNTS)).unwrap();
        // vCont;s:1;c:2, and either may stop first.
        let plan = ResumePlan::all(2, RunMode::Continue).with(VcpuId(0), RunMode::Step);
        let stop = match world.coordinator.resume(&plan).unwrap() {
            Some(stop) => stop,
            None => world.wait(),
        };
        assert!(world.armed().iter().all(|arming| !arming.step), "a step was left armed");
        // Whatever is told from here on is a breakpoint: the step is over or cancelled.
        for _ in 0..4 {
            let next = match world.go() {
                Some(pending) => pending,
                None => world.wait(),
            };
            assert_eq!(next.reason, StopReason::Breakpoint(Breakpoint::exec(COUNTS)), "after {stop:?}");
        }
    });
}

#[test]
fn c8_parked_vcpus_do_not_run_under_scheduler_locking() {
    check(|| {
        let mut world = World::new(2);
        let plan = ResumePlan::all(2, RunMode::Parked).with(VcpuId(1), RunMode::Step);
        for n in 1..5 {
            assert_eq!(world.coordinator.resume(&plan).unwrap(), None);
            assert_eq!(world.wait(), Stop::new(VcpuId(1), StopReason::Step));
            assert_eq!(world.probes[0].executed.load(Ordering::SeqCst), 0);
            assert_eq!(world.probes[1].executed.load(Ordering::SeqCst), n);
        }
    });
}

#[test]
fn c8_under_scheduler_locking_only_the_resumed_vcpu_is_told_of() {
    check(|| {
        let mut world = World::starting_at(&[LOOP, COUNTS, COUNTS + 1]);
        for addr in [COUNTS, COUNTS + 1] {
            world.coordinator.set_breakpoint(Owner::GDB, Breakpoint::exec(addr)).unwrap();
        }
        let mut stop = match world.go() {
            Some(pending) => pending,
            None => world.wait(),
        };
        // What gdb does at each hit: take that breakpoint out, step this vCPU alone, put it back,
        // go on. The others may have hits, on the other breakpoint too, that are still to be told.
        for _ in 0..6 {
            let StopReason::Breakpoint(request) = stop.reason else { panic!("{stop:?}") };
            world.coordinator.clear_breakpoint(Owner::GDB, request).unwrap();
            let alone = ResumePlan::all(3, RunMode::Parked).with(stop.vcpu, RunMode::Step);
            let stepped = match world.coordinator.resume(&alone).unwrap() {
                Some(pending) => pending,
                None => world.wait(),
            };
            assert_eq!(stepped, Stop::new(stop.vcpu, StopReason::Step));
            world.coordinator.set_breakpoint(Owner::GDB, request).unwrap();
            stop = match world.go() {
                Some(pending) => pending,
                None => world.wait(),
            };
        }
    });
}

#[test]
fn l71_release_leaves_nothing_armed_and_everything_running() {
    check(|| {
        let mut world = World::new(3);
        world.coordinator.set_breakpoint(Owner::GDB, Breakpoint::exec(COUNTS)).unwrap();
        assert_eq!(world.go(), None);
        world.wait();
        world.coordinator.release(Level::Gdb).unwrap();
        let before = world.counts();
        while world.counts().iter().zip(&before).any(|(now, then)| now < &(then + 2)) {
            assert_eq!(world.coordinator.poll().unwrap(), None);
            thread::yield_now();
        }
        assert!(world.armed().iter().all(|arming| *arming == Arming::OFF));
        assert!(world.coordinator.breakpoints().is_empty());
    });
}

#[test]
fn l13_traps_that_only_count_stop_nobody_and_miss_nothing() {
    check(|| {
        let mut world = World::new(2);
        let counted: Arc<Vec<AtomicU64>> = Arc::new((0..2).map(|_| AtomicU64::new(0)).collect());
        let counter = counted.clone();
        let handler = Handler::new(move |hit| {
            assert_eq!(hit.pc, COUNTS);
            counter[hit.vcpu.index()].fetch_add(1, Ordering::SeqCst);
            Disposition::Continue
        });
        let request = Breakpoint::exec(COUNTS);
        world.coordinator.set_trap(Owner::harness(1), request, Some(handler)).unwrap();
        // gdb works on the same breakpoint meanwhile, and the world is stopped now and then.
        for round in 0..4 {
            assert_eq!(world.go(), None);
            while world.counts().iter().any(|&count| count < 2 * (round + 1)) {
                assert_eq!(world.coordinator.poll().unwrap(), None);
                thread::yield_now();
            }
            world.coordinator.stop().unwrap();
            for (n, count) in world.counts().into_iter().enumerate() {
                // A vCPU that was parked between the hit and its instruction has counted one more.
                let hits = counted[n].load(Ordering::SeqCst);
                assert!(hits == count || hits == count + 1, "vCPU {n}: {hits} hits, {count} executions");
            }
            // Step the first vCPU onto the breakpoint and over it.
            for _ in 0..4 {
                let plan = ResumePlan::all(2, RunMode::Parked).with(VcpuId(0), RunMode::Step);
                assert_eq!(world.coordinator.resume(&plan).unwrap(), None);
                assert_eq!(world.wait().reason, StopReason::Step);
            }
            let (hits, count) = (counted[0].load(Ordering::SeqCst), world.counts()[0]);
            assert!(hits == count || hits == count + 1, "after stepping: {hits} hits, {count} executions");
        }
    });
}

#[test]
fn l29_a_shared_breakpoint_is_told_to_gdb_and_counted_for_the_harness() {
    check(|| {
        let mut world = World::new(1);
        let counted = Arc::new(AtomicU64::new(0));
        let counter = counted.clone();
        let handler = Handler::new(move |_| {
            counter.fetch_add(1, Ordering::SeqCst);
            Disposition::Continue
        });
        let request = Breakpoint::exec(COUNTS);
        world.coordinator.set_trap(Owner::harness(1), request, Some(handler)).unwrap();
        world.coordinator.set_breakpoint(Owner::GDB, request).unwrap();
        for n in 1..4 {
            let stop = match world.go() {
                Some(pending) => pending,
                None => world.wait(),
            };
            assert_eq!(stop.reason, StopReason::Breakpoint(request));
            assert_eq!(counted.load(Ordering::SeqCst), n);
            assert_eq!(world.counts()[0], n - 1);
        }
        // Removing one keeps the other.
        world.coordinator.clear_breakpoint(Owner::GDB, request).unwrap();
        assert_eq!(world.go(), None);
        while world.counts()[0] < 6 {
            assert_eq!(world.coordinator.poll().unwrap(), None);
            thread::yield_now();
        }
        world.coordinator.stop().unwrap();
        let (hits, count) = (counted.load(Ordering::SeqCst), world.counts()[0]);
        assert!(hits == count || hits == count + 1, "{hits} hits, {count} executions");
    });
}

#[test]
fn l71_release_does_not_drop_what_the_guest_itself_says() {
    check(|| {
        let mut world = World::new(2);
        world.probes[0].panics.store(true, Ordering::SeqCst);
        world.coordinator.set_breakpoint(Owner::GDB, Breakpoint::exec(COUNTS + 1)).unwrap();
        assert_eq!(world.go(), None);
        let panicked = Stop::new(VcpuId(0), StopReason::GuestPanic);
        // Told before the debugger goes, or else after.
        if world.wait() != panicked {
            world.coordinator.release(Level::Gdb).unwrap();
            assert_eq!(world.wait(), panicked);
        }
    });
}

/// gdb goes; what the harness watches has been stored to, and perhaps not been told yet.
#[test]
fn l71_release_of_one_level_leaves_the_stops_of_the_others() {
    const WATCHED: u64 = 0x8000;
    check(|| {
        let mut world = World::new(2);
        world.probes[1].stores_to.store(WATCHED, Ordering::SeqCst);
        let watch = Breakpoint::watch(WATCHED, 1, Trigger::Write);
        let stored = Stop {
            vcpu: VcpuId(1),
            reason: StopReason::Watchpoint { request: watch, addr: WATCHED, stored: None },
            owner: Some(Owner::harness(1)),
        };
        world.coordinator.set_breakpoint(Owner::harness(1), watch).unwrap();
        // Behind the store: vCPU 1 is told of that first.
        world.coordinator.set_breakpoint(Owner::GDB, Breakpoint::exec(COUNTS + 1)).unwrap();
        assert_eq!(world.go(), None);
        if world.wait() != stored {
            world.coordinator.release(Level::Gdb).unwrap();
            assert_eq!(world.wait(), stored);
        }
        assert_eq!(world.counts()[1], 1, "a stop of the harness was dropped with gdb");
    });
}

#[test]
fn c2_no_kick_is_lost() {
    check(|| {
        let mut world = World::new(2);
        for _ in 0..5 {
            assert_eq!(world.go(), None);
            world.coordinator.stop().unwrap();
            let before = world.executed();
            for _ in 0..10 {
                thread::yield_now();
            }
            assert_eq!(world.executed(), before, "guest code ran in a stopped world");
        }
    });
}

/// A handler that counts, and how often it did on each vCPU.
fn counting(vcpus: usize) -> (Handler, Arc<Vec<AtomicU64>>) {
    counting_at(COUNTS, vcpus)
}

/// The same behind the instruction that counts and stores.
fn storing(vcpus: usize) -> (Handler, Arc<Vec<AtomicU64>>) {
    counting_at(COUNTS + 1, vcpus)
}

fn counting_at(pc: u64, vcpus: usize) -> (Handler, Arc<Vec<AtomicU64>>) {
    let counted: Arc<Vec<AtomicU64>> = Arc::new((0..vcpus).map(|_| AtomicU64::new(0)).collect());
    let counter = counted.clone();
    let handler = Handler::new(move |hit| {
        assert_eq!(hit.pc, pc);
        counter[hit.vcpu.index()].fetch_add(1, Ordering::SeqCst);
        Disposition::Continue
    });
    (handler, counted)
}

/// A vCPU that was parked between the hit and its instruction has one hit more than executions.
fn assert_equal(counted: &[AtomicU64], world: &World) {
    for (n, count) in world.counts().into_iter().enumerate() {
        let hits = counted[n].load(Ordering::SeqCst);
        assert!(hits == count || hits == count + 1, "vCPU {n}: {hits} hits, {count} executions");
    }
}

#[test]
fn l58_every_crossing_of_a_patch_is_counted_on_every_vcpu() {
    check(|| {
        let mut world = World::patching(3);
        let (handler, counted) = counting(3);
        world.coordinator.set_trap(Owner::harness(1), Breakpoint::exec(COUNTS), Some(handler)).unwrap();
        // All three want to be alone again and again, often at once, and the world is stopped in between.
        for _ in 0..3 {
            assert_eq!(world.go(), None);
            world.count_on(2);
            world.coordinator.stop().unwrap();
            assert_eq!(world.coordinator.take_stop(), None);
            assert_equal(&counted, &world);
            assert_eq!(world.memory.bytes(), [CODE, INT3, CODE], "an INT3 was not put back");
        }
        world.coordinator.clear_level(Level::Harness).unwrap();
        assert_eq!(world.memory.bytes(), [CODE; 3]);
    });
}

#[test]
fn l58_every_crossing_of_a_patch_is_told_exactly_once() {
    check(|| {
        let mut world = World::patching(3);
        let request = world.patch();
        let mut hits = [0u64; 3];
        for _ in 0..12 {
            let stop = match world.go() {
                Some(pending) => pending,
                None => world.wait(),
            };
            assert_eq!(stop.reason, StopReason::Breakpoint(request));
            hits[stop.vcpu.index()] += 1;
            for (n, count) in world.counts().into_iter().enumerate() {
                assert!(count == hits[n] || count + 1 == hits[n], "vCPU {n}: {count} of {}", hits[n]);
            }
        }
    });
}

#[test]
fn l58_a_stop_request_finds_those_that_step_over_a_patch() {
    check(|| {
        let mut world = World::patching(2);
        let (handler, counted) = counting(2);
        world.coordinator.set_trap(Owner::harness(1), Breakpoint::exec(COUNTS), Some(handler)).unwrap();
        // Nobody polls: it is the stops that let them step, and each gets on.
        let mut rounds = 0;
        while world.counts().iter().any(|&count| count < 3) {
            assert_eq!(world.go(), None);
            for _ in 0..5 {
                thread::yield_now();
            }
            world.coordinator.stop().unwrap();
            assert_equal(&counted, &world);
            let before = world.executed();
            for _ in 0..5 {
                thread::yield_now();
            }
            assert_eq!(world.executed(), before, "guest code ran in a stopped world");
            rounds += 1;
            assert!(rounds < 2_000, "they do not get on: {:?}", world.counts());
        }
    });
}

#[test]
fn l59_a_patch_that_comes_and_goes_under_running_vcpus_disturbs_none() {
    check(|| {
        let mut world = World::patching(2);
        assert_eq!(world.go(), None);
        for _ in 0..4 {
            let request = world.patch();
            for _ in 0..3 {
                thread::yield_now();
            }
            world.coordinator.clear_breakpoint(Owner::GDB, request).unwrap();
            assert_eq!(world.memory.bytes(), [CODE; 3]);
            assert_eq!(world.coordinator.poll().unwrap(), None, "a hit on what is gone was told");
            world.count_on(1);
        }
    });
}

#[test]
fn l58_a_vcpu_that_cannot_step_over_stops_the_world_and_holds_nobody_up() {
    check(|| {
        let mut world = World::patching(2);
        let (handler, _) = counting(2);
        world.coordinator.set_trap(Owner::harness(1), Breakpoint::exec(COUNTS), Some(handler)).unwrap();
        assert_eq!(world.go(), None);
        while world.probes[0].count.load(Ordering::SeqCst) == 0 {
            assert_eq!(world.coordinator.poll().unwrap(), None);
            thread::yield_now();
        }
        // Whatever it is armed for next fails: the step over the patch, or the run up to it.
        world.probes[0].fail.store(1, Ordering::SeqCst);
        let stop = world.wait();
        assert_eq!(stop.vcpu, VcpuId(0));
        assert!(matches!(stop.reason, StopReason::Crash(_)), "{stop:?}");
        assert_eq!(world.memory.bytes(), [CODE, INT3, CODE], "an INT3 was not put back");
    });
}

#[test]
fn l58_while_one_is_late_with_its_step_nobody_else_runs() {
    check(|| {
        let mut world = World::patching(2);
        let (handler, counted) = counting(2);
        world.coordinator.set_trap(Owner::harness(1), Breakpoint::exec(COUNTS), Some(handler)).unwrap();
        assert_eq!(world.go(), None);
        while world.probes[0].count.load(Ordering::SeqCst) == 0 {
            assert_eq!(world.coordinator.poll().unwrap(), None);
            thread::yield_now();
        }
        // Longer than the deadline has turns. It comes where it arms: mostly with the patch taken out.
        world.probes[1].late.store(5_000, Ordering::SeqCst);
        let mut refused = 0;
        for _ in 0..20 {
            match world.coordinator.poll() {
                Ok(stop) => assert_eq!(stop, None),
                Err(CoordinatorError::NoAnswer { vcpu }) => {
                    assert_eq!(vcpu, VcpuId(1));
                    refused += 1;
                    assert_equal(&counted, &world);
                    // Not even a change of the set or a failed stop lets the other one go.
                    let _ = world.coordinator.set_breakpoint(Owner::GDB, Breakpoint::exec(LOOP));
                    let _ = world.coordinator.clear_breakpoint(Owner::GDB, Breakpoint::exec(LOOP));
                    assert_equal(&counted, &world);
                    if refused == 2 {
                        break;
                    }
                }
                Err(other) => panic!("{other}"),
            }
            thread::yield_now();
        }
        world.probes[1].late.store(0, Ordering::SeqCst);
        // Once it wakes all is as if nothing had been.
        let before = world.counts();
        while world.counts().iter().zip(&before).any(|(now, then)| *now < then + 2) {
            match world.coordinator.poll() {
                Ok(None) | Err(CoordinatorError::NoAnswer { vcpu: VcpuId(1) }) => thread::yield_now(),
                other => panic!("{other:?}"),
            }
        }
        while world.coordinator.stop().is_err() {}
        assert_equal(&counted, &world);
        assert_eq!(world.memory.bytes(), [CODE, INT3, CODE]);
    });
}

#[test]
fn l58_under_scheduler_locking_the_parked_ones_stay_parked_when_the_other_steps_over() {
    check(|| {
        let mut world = World::patching(2);
        let (handler, counted) = counting(2);
        world.coordinator.set_trap(Owner::harness(1), Breakpoint::exec(COUNTS), Some(handler)).unwrap();
        assert_eq!(world.go(), None);
        world.count_on(1);
        world.coordinator.stop().unwrap();
        let executed = |world: &World| world.probes[0].executed.load(Ordering::SeqCst);
        let before = executed(&world);
        let only = ResumePlan::all(2, RunMode::Parked).with(VcpuId(1), RunMode::Continue);
        assert_eq!(world.coordinator.resume(&only).unwrap(), None);
        let target = world.counts()[1] + 3;
        while world.counts()[1] < target {
            assert_eq!(world.coordinator.poll().unwrap(), None);
            thread::yield_now();
        }
        world.coordinator.stop().unwrap();
        assert_eq!(executed(&world), before, "the parked one ran");
        assert_equal(&counted, &world);
    });
}

#[test]
fn l58_a_step_of_the_user_over_a_patch_is_one_step() {
    check(|| {
        let mut world = World::patching(2);
        let request = world.patch();
        assert_eq!(world.go(), None);
        let told = world.wait();
        assert_eq!(told.reason, StopReason::Breakpoint(request));
        while world.coordinator.take_stop().is_some() {}
        for n in [1, 2, 0, 1, 2] {
            let only = ResumePlan::all(2, RunMode::Parked).with(told.vcpu, RunMode::Step);
            let stop = match world.coordinator.resume(&only).unwrap() {
                Some(pending) => pending,
                None => world.wait(),
            };
            assert_eq!(stop, Stop::new(told.vcpu, StopReason::Step));
            let pc = world.coordinator.registers(told.vcpu).unwrap().rip;
            assert_eq!(pc, LOOP + (n + 1) % 3, "in step {n}");
        }
        assert_eq!(world.counts()[told.vcpu.index()], 2);
    });
}

#[test]
fn l71_release_takes_the_patches_away_while_vcpus_stand_on_them() {
    check(|| {
        let mut world = World::patching(3);
        world.patch();
        assert_eq!(world.go(), None);
        world.wait();
        world.coordinator.release(Level::Gdb).unwrap();
        assert_eq!(world.memory.bytes(), [CODE; 3]);
        world.count_on(2);
        assert!(world.armed().iter().all(|arming| *arming == Arming::OFF));
    });
}
