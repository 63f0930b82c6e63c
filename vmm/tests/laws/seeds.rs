//! The five stories that Trapline began with, each as a user of the library has it.
//!
//! Each is a thread of a mailing list about debug registers, and a trap that somebody fell into: a
//! guest is booted, and the story is told to [`Vm`](trapline_vmm::Vm) and to it. The laws behind
//! each have tests of their own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use trapline_guests::fixture::{self, LOG_SIZE, LogEntry, cpu_field};
use trapline_vmm::boot::ApStart;
use trapline_vmm::debug::{
    Breakpoint, BreakpointError, Disposition, Handler, Level, Notice, Owner, RunMode, Stop, StopReason, Trigger, VcpuId,
};

use crate::booted::{ArmHook, Booted};
use crate::lane::Need::{Kick, Patches};
use crate::law::{Law, law};
use crate::rig::{at, name};

pub(crate) fn laws() -> Vec<Law> {
    vec![
        law!(d1_breakpoints_are_registered_on_all_running_cpus_or_on_none, Kick),
        law!(d2_owners_share_dr6_and_slots_by_their_levels),
        law!(d3_a_probe_in_hot_code_comes_and_goes_unseen, Kick, Patches),
        law!(d4_debuggers_meet_on_one_instruction_and_none_locks_up),
        law!(d4_a_guest_that_steps_itself_does_so_with_traps_in_its_way),
        law!(d5_who_stops_before_a_store_and_who_counts_behind_it_share_its_bytes),
    ]
}

const CPUS: u32 = 4;
const HARNESS: Owner = Owner::harness(1);

/// Hits, by vCPU.
#[derive(Clone)]
struct Hits(Arc<Vec<AtomicU64>>);

impl Hits {
    fn new() -> Self {
        Hits((0..CPUS).map(|_| AtomicU64::new(0)).collect::<Vec<_>>().into())
    }

    /// Counts, and lets the guest go on.
    fn handler(&self) -> Handler {
        let hits = self.clone();
        Handler::new(move |hit| {
            hits.0[hit.vcpu.index()].fetch_add(1, Ordering::SeqCst);
            Disposition::Continue
        })
    }

    fn get(&self) -> Vec<u64> {
        self.0.iter().map(|hits| hits.load(Ordering::SeqCst)).collect()
    }

    fn sum(&self) -> u64 {
        self.get().iter().sum()
    }
}

/// Since `counts` were the guest's own, each hit of a vCPU was one execution: but for the one that a
/// vCPU stands before.
fn assert_exact(demo: &mut Booted, hits: &Hits, counts: &[u64], here: u64) {
    for cpu in 0..demo.cpus() {
        let executed = demo.count(cpu) - counts[cpu as usize];
        let told = hits.get()[cpu as usize];
        let stands = u64::from(demo.registers(cpu).pc() == here);
        assert!(told == executed || told == executed + stands, "vCPU {cpu}: {told} hits, {executed} executions");
    }
}

/// Waits until every CPU of the demo has counted so many more; nothing may stop meanwhile.
fn run_on(demo: &mut Booted, more: u64) {
    let before = demo.counts();
    demo.wait_for("all CPUs to count on", |demo| {
        let stop = demo.vm.poll();
        assert_eq!(demo.must(stop), None);
        demo.counts().iter().zip(&before).all(|(now, then)| *now >= then + more).then_some(())
    });
}

/// Stern, 2009: a breakpoint is put on all CPUs at once, and they run through it. One that cannot be
/// told leaves the others with a breakpoint that nobody holds; one that is told late hits what is gone.
fn d1_breakpoints_are_registered_on_all_running_cpus_or_on_none() {
    let deaf = Arc::new(AtomicBool::new(false));
    let is_deaf = deaf.clone();
    let hook: ArmHook = Arc::new(move |vcpu| match vcpu == VcpuId(2) && is_deaf.load(Ordering::SeqCst) {
        true => Err(std::io::ErrorKind::OutOfMemory.into()),
        false => Ok(()),
    });
    let mut demo = Booted::counting_demo(CPUS, Some(hook));
    let bp = Breakpoint::exec(demo.at("count_up_here"));
    let mut all = 0;
    let mut round = 0;
    while all < 10_000 {
        // One CPU cannot have it: then nobody has, and all run on.
        let hits = Hits::new();
        demo.go();
        deaf.store(true, Ordering::SeqCst);
        let refused = demo.vm.set_trap(HARNESS, bp, hits.handler());
        deaf.store(false, Ordering::SeqCst);
        let Err(BreakpointError::Apply(why)) = refused else { panic!("{refused:?}") };
        assert!(why.contains("vCPU 2"), "{why}");
        assert_eq!(demo.vm.breakpoints(), []);
        let told = hits.get();
        run_on(&mut demo, 1000);
        assert_eq!(hits.get(), told, "hit, and nobody holds it");
        demo.vm.stop().unwrap();
        // Now all have it. Others come and go where nobody runs.
        let (hits, counts) = (Hits::new(), demo.counts());
        demo.vm.set_trap(HARNESS, bp, hits.handler()).unwrap();
        demo.go();
        let other = Breakpoint::exec(demo.at("guest_main") + round % 4);
        demo.set(other);
        run_on(&mut demo, 300);
        demo.clear(other);
        demo.vm.stop().unwrap();
        assert_exact(&mut demo, &hits, &counts, bp.addr);
        demo.go();
        run_on(&mut demo, 100);
        // After the OK of the removal nobody is told any more.
        demo.vm.clear_traps(HARNESS, &[bp]).unwrap();
        let told = hits.get();
        run_on(&mut demo, 1000);
        assert_eq!(hits.get(), told, "a hit was told after the removal");
        demo.vm.stop().unwrap();
        all += hits.sum();
        round += 1;
    }
    assert_eq!(demo.guest_debug_exceptions(), 0);
}

/// kwatch, 2007: who is whose in one DR6, and who gives way to whom in four registers.
fn d2_owners_share_dr6_and_slots_by_their_levels() {
    // The guest has breakpoints of its own, at da_first and da_second, and never clears its DR6.
    let mut guest = Booted::fixture(1, "own_dr6", ApStart::Mailbox);
    let armed = Breakpoint::exec(at("da_armed"));
    guest.set(armed);
    assert_eq!(guest.run_all().reason, StopReason::Breakpoint(armed));
    guest.clear(armed);
    // Nothing is there, and so nothing but a slot serves it.
    let far = |n| Breakpoint::exec(0x7000_0000_0000 + n);
    let between = Breakpoint::exec(at("da_between"));
    let of_guest = |label| (Owner { level: Level::Guest, id: 0 }, Breakpoint::exec(at(label)));
    let hits = Hits::new();
    guest.vm.set_trap(HARNESS, between, hits.handler()).unwrap();
    guest.vm.set_breakpoint(HARNESS, far(0)).unwrap();
    assert_eq!(guest.vm.take_notices(), [], "the guest's two have the other two slots");
    let evicted = |(owner, request)| Notice::Evicted(owner, request);
    let restored = |(owner, request)| Notice::Restored(owner, request);
    // gdb comes. First the guest gives way, and then the younger of the harness; each is told.
    for (n, loser) in [of_guest("da_second"), of_guest("da_first"), (HARNESS, far(0))].into_iter().enumerate() {
        guest.set(far(1 + n as u64));
        assert_eq!(settled(guest.vm.take_notices()), [evicted(loser)]);
    }
    // An equal or a higher level gives way to nobody.
    let refused = guest.vm.set_breakpoint(HARNESS, far(9)).unwrap_err();
    // Where INT3s serve what finds no slot, there is nothing to put one into.
    let is_no_slot = matches!(refused, BreakpointError::NoSlot { free: 0, .. } | BreakpointError::NotMapped { .. });
    assert!(is_no_slot, "{refused}");
    // gdb shares the slot of the trap: that takes none from anybody.
    guest.set(between);
    assert_eq!(guest.vm.take_notices(), []);
    // gdb goes, and all have theirs again.
    let mut returned = Vec::new();
    for n in 0..3 {
        guest.clear(far(1 + n));
        returned.extend(settled(guest.vm.take_notices()));
    }
    assert_eq!(returned, [(HARNESS, far(0)), of_guest("da_first"), of_guest("da_second")].map(restored));
    // Its own is the guest's; ours, which both of us hear of, it does not see.
    assert_eq!(
        guest.run_all(),
        Stop { vcpu: VcpuId(0), reason: StopReason::Breakpoint(between), owner: Some(Owner::GDB) }
    );
    assert_eq!((hits.sum(), guest.registers(0).dr6), (1, 0xffff_0ff1));
    // A step is one cause more, and nobody else's either.
    let step = guest.plan(RunMode::Step);
    assert_eq!(guest.run(&step).reason, StopReason::Step);
    assert_eq!(guest.registers(0).dr6, 0xffff_0ff1);
    assert_eq!(guest.run_all().reason, StopReason::GuestExit(0));
    assert_eq!(guest.word(fixture::saved_address(0).unwrap()), 0xffff_0ff3);
    let taken: Vec<_> = log(&guest).iter().map(|entry| (entry.vector, name(entry.rip), entry.dr6)).collect();
    let own = |label: &str, dr6| (1, name(at(label)), dr6);
    assert_eq!(taken, [own("da_first", 0xffff_0ff1), own("da_second", 0xffff_0ff3)]);
    assert_eq!(hits.sum(), 1);
}

/// Without what was lost and found again in one change: a slot that changes hands is nobody's for a
/// moment, and then the guest has it.
fn settled(notices: Vec<Notice>) -> Vec<Notice> {
    let of = |notice: &Notice| match *notice {
        Notice::Evicted(owner, request) | Notice::Restored(owner, request) => (owner, request),
    };
    let is_left = |n: &usize| {
        let later = |other: &Notice| of(other) == of(&notices[*n]);
        let earlier = notices[..*n].iter().filter(|other| later(other)).count();
        !notices[n + 1..].iter().any(later) && earlier % 2 == 0
    };
    (0..notices.len()).filter(is_left).map(|n| notices[n]).collect()
}

/// uprobes, 2012: an INT3 in code that all CPUs run through, all the time.
fn d3_a_probe_in_hot_code_comes_and_goes_unseen() {
    let mut demo = Booted::counting_demo(CPUS, None);
    for n in 0..4 {
        demo.set(Breakpoint::exec(demo.at("guest_main") + n));
    }
    let bp = Breakpoint::exec(demo.at("count_up_here"));
    let raw = |demo: &Booted| {
        let mut code = [0; 16];
        assert_eq!(trapline_vmm::paging::read_physical(demo.vm.ram().mem(), bp.addr, &mut code), 16);
        code
    };
    let before = raw(&demo);
    // Nothing is missed or counted twice, and the guest's code looks as it is.
    let (hits, counts) = (Hits::new(), demo.counts());
    demo.vm.set_trap(HARNESS, bp, hits.handler()).unwrap();
    assert_ne!(raw(&demo), before, "no INT3");
    demo.go();
    run_on(&mut demo, 50);
    demo.vm.stop().unwrap();
    assert_exact(&mut demo, &hits, &counts, bp.addr);
    let mut shown = [0; 16];
    assert_eq!((demo.vm.read_memory(VcpuId(1), bp.addr, &mut shown).unwrap(), shown), (16, before));
    // Unregistered and registered under everybody's feet.
    demo.go();
    for round in 0..250 {
        demo.vm.clear_traps(HARNESS, &[bp]).unwrap();
        assert_eq!(raw(&demo), before, "round {round}");
        demo.vm.set_trap(HARNESS, bp, hits.handler()).unwrap();
        let stop = demo.vm.poll();
        assert_eq!(demo.must(stop), None, "round {round}");
    }
    run_on(&mut demo, 10);
    demo.vm.clear_traps(HARNESS, &[bp]).unwrap();
    // Where gdb sends it on from the probe, the probed instruction does not run.
    let stopped = |demo: &mut Booted, cpu| {
        let alone = demo.only(cpu, RunMode::Continue);
        assert_eq!(demo.run(&alone).reason, StopReason::Breakpoint(bp));
    };
    demo.vm.stop().unwrap();
    demo.set(bp);
    for cpu in 0..CPUS {
        stopped(&mut demo, cpu);
        let count = demo.count(cpu);
        let mut registers = demo.registers(cpu);
        // `incq (%rdi)` is three bytes long.
        registers.rip += 3;
        demo.vm.set_registers(VcpuId(cpu), &registers).unwrap();
        stopped(&mut demo, cpu);
        assert_eq!(demo.count(cpu), count, "vCPU {cpu} ran what it was sent past");
        stopped(&mut demo, cpu);
        assert_eq!(demo.count(cpu), count + 1);
    }
    demo.clear(bp);
    assert_eq!(raw(&demo), before);
    demo.go();
    run_on(&mut demo, 1000);
    demo.vm.stop().unwrap();
    assert_eq!(demo.guest_debug_exceptions(), 0);
}

/// Deacon, 2013: a breakpoint and a probe on one instruction, a probe in what the handler of the
/// first one touches, a watchpoint below, and somebody steps over it all. On arm64 that locked up.
fn d4_debuggers_meet_on_one_instruction_and_none_locks_up() {
    let mut guest = Booted::fixture(1, "hotcall", ApStart::Mailbox);
    let [entry, within, store] =
        ["fx_fentry", "fx_fentry_nop", "fx_fentry_count"].map(|label| Breakpoint::exec(at(label)));
    let calls = fixture::cpu_address(0, cpu_field::FENTRY).unwrap();
    // Behind `pushq %rbp`, which is one byte long and is not carried out in place.
    let behind = Breakpoint::exec(at("fx_fentry_push") + 1);
    let [probe, inner, stored, last] = [Hits::new(), Hits::new(), Hits::new(), Hits::new()];
    let seen = probe.clone();
    let first = Handler::new(move |hit| {
        // It looks at code that has traps of its own.
        let mut code = [0; 12];
        assert_eq!((hit.read(entry.addr, &mut code), &code[..4]), (12, &[0xf3, 0x0f, 0x1e, 0xfa][..]));
        assert!(hit.registers().is_ok());
        seen.0[0].fetch_add(1, Ordering::SeqCst);
        Disposition::Continue
    });
    guest.vm.set_trap(HARNESS, entry, first).unwrap();
    guest.vm.set_trap(Owner::harness(2), within, inner.handler()).unwrap();
    guest.vm.set_trap(Owner::harness(3), Breakpoint::watch(calls, 8, Trigger::Write), stored.handler()).unwrap();
    guest.vm.set_trap(Owner::harness(4), behind, last.handler()).unwrap();
    guest.set(entry);
    let step = guest.plan(RunMode::Step);
    for call in 0..20 {
        assert_eq!(guest.run_all().reason, StopReason::Breakpoint(entry));
        let told = [&probe, &inner, &stored, &last].map(Hits::sum);
        assert_eq!((told, guest.word(calls)), ([call + 1, call, call, call], call));
        // Every other time gdb steps on: over both probes, and the store below them.
        for onto in [within.addr, behind.addr - 1, behind.addr].into_iter().filter(|_| call % 2 == 1) {
            assert_eq!(guest.run(&step).reason, StopReason::Step);
            assert_eq!(name(guest.registers(0).pc()), name(onto), "in call {call}");
        }
        if call % 4 == 3 {
            while guest.registers(0).pc() != store.addr {
                assert_eq!(guest.run(&step).reason, StopReason::Step);
            }
            assert_eq!(guest.run(&step).reason, StopReason::Step);
            assert_eq!(([&probe, &inner, &stored, &last].map(Hits::sum), guest.word(calls)), ([call + 1; 4], call + 1));
        }
    }
    assert_undisturbed(&guest);
}

/// And the guest's own debugger goes on as if we were not there.
fn d4_a_guest_that_steps_itself_does_so_with_traps_in_its_way() {
    let steps = |traps: &[&str]| {
        let mut guest = Booted::fixture(1, "own_tf", ApStart::Mailbox);
        let hits = Hits::new();
        for label in traps {
            guest.vm.set_trap(HARNESS, Breakpoint::exec(at(label)), hits.handler()).unwrap();
        }
        assert_eq!(guest.run_all().reason, StopReason::GuestExit(0));
        assert_eq!(hits.sum(), traps.len() as u64);
        log(&guest)
    };
    let alone = steps(&[]);
    assert_eq!(alone.len(), 5);
    assert_eq!(steps(&["tf1", "tf3"]), alone);
    assert_eq!(steps(&["tf2", "tf4"]), alone);
}

/// powerpc, 2023: ptrace stops before a store, perf counts behind it, and both watch the same bytes.
fn d5_who_stops_before_a_store_and_who_counts_behind_it_share_its_bytes() {
    let mut guest = Booted::fixture(1, "watch_exec", ApStart::Mailbox);
    let before = Breakpoint::exec(at("w_exec"));
    let bytes = Breakpoint::watch(fixture::WATCH, 8, Trigger::Write);
    let hits = Hits::new();
    guest.vm.set_trap(HARNESS, bytes, hits.handler()).unwrap();
    guest.set(bytes);
    guest.set(before);
    let is_behind = |guest: &mut Booted, stop: &Stop| {
        assert!(matches!(stop.reason, StopReason::Watchpoint { request, .. } if request == bytes), "{stop:?}");
        assert_eq!((stop.owner, name(guest.registers(0).pc())), (Some(Owner::GDB), name(at("w_exec_next"))));
    };
    // Stopped before it: nothing is stored, and nothing counted. Sent past it, it never happens.
    assert_eq!(guest.run_all().reason, StopReason::Breakpoint(before));
    let mut registers = guest.registers(0);
    registers.rip = at("w_exec_next");
    guest.vm.set_registers(VcpuId(0), &registers).unwrap();
    assert_eq!(guest.run_all().reason, StopReason::Breakpoint(before));
    assert_eq!((hits.sum(), guest.word(fixture::WATCH)), (0, 0));
    // Stepped over: each owner is told once, and there is one stop.
    let step = guest.plan(RunMode::Step);
    let stop = guest.run(&step);
    is_behind(&mut guest, &stop);
    assert_eq!((hits.sum(), guest.word(fixture::WATCH)), (1, 2));
    // Gone on over: the same.
    assert_eq!(guest.run_all().reason, StopReason::Breakpoint(before));
    let stop = guest.run_all();
    is_behind(&mut guest, &stop);
    assert_eq!((hits.sum(), guest.word(fixture::WATCH)), (2, 3));
    // Either may leave, and takes nothing from the other.
    guest.clear(bytes);
    assert_eq!(guest.run_all().reason, StopReason::Breakpoint(before));
    guest.clear(before);
    guest.set(bytes);
    guest.vm.clear_traps(HARNESS, &[bytes]).unwrap();
    let stop = guest.run_all();
    is_behind(&mut guest, &stop);
    assert_eq!((hits.sum(), guest.word(fixture::WATCH)), (2, 4));
    let stop = guest.run_all();
    is_behind(&mut guest, &stop);
    assert_eq!(guest.run_all().reason, StopReason::GuestExit(0));
    assert_undisturbed(&guest);
}

/// What the fixture logged: every exception that it took.
fn log(guest: &Booted) -> Vec<LogEntry> {
    let entry = |n| {
        let mut bytes = [0; LOG_SIZE];
        assert_eq!(guest.vm.read_physical(fixture::log_entry_address(n).unwrap(), &mut bytes), LOG_SIZE);
        LogEntry::decode(&bytes)
    };
    (0..guest.word(fixture::log_count_address().unwrap())).map(entry).collect()
}

/// The fixture has seen no #DB and no #BP.
fn assert_undisturbed(guest: &Booted) {
    let seen = [cpu_field::DB, cpu_field::BP].map(|field| guest.word(fixture::cpu_address(0, field).unwrap()));
    assert_eq!(seen, [0, 0], "{:x?}", log(guest));
}
