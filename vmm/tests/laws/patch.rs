//! Laws 40 and 54 to 59a: execution breakpoints beyond the four slots are INT3s in guest memory, and
//! nobody but the debugger notices.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use trapline_guests::fixture::{self, cpu_field};
use trapline_vmm::debug::{
    Breakpoint, BreakpointError, Crash, Disposition, Handler, INT3, Level, Mechanism, Owner, RunMode, StopReason,
    VcpuId,
};
use trapline_vmm::vcpu::Exit;

use crate::booted::Booted;
use crate::clock::wait_for;
use crate::landing::is_left_for_good_and_told_again;
use crate::lane::Need::{Kick, Patches};
use crate::law::{Law, law};
use crate::rig::{Begin, Rig, at, hit, name, send_nmi};

pub(crate) fn laws() -> Vec<Law> {
    vec![
        law!(l40_a_slot_and_a_patch_on_one_instruction_are_each_hit_once, Patches),
        law!(l42_a_patch_on_an_instruction_that_faults, Patches),
        law!(l42_a_patch_that_faults_and_is_left_for_good_is_told_again, Patches),
        law!(l54_what_finds_no_slot_is_a_patch, Patches),
        law!(l54_where_int3_is_the_guests_the_fifth_is_refused),
        law!(l54_a_slot_that_becomes_free_takes_over_from_a_patch, Patches),
        law!(l55_what_is_read_shows_no_patch, Patches),
        law!(l55_what_is_written_under_a_patch_is_there_when_it_goes, Patches),
        law!(l55_an_int3_that_is_written_under_a_patch_is_the_guests, Patches),
        law!(l56_what_the_guest_writes_over_a_patch_stays, Patches),
        law!(l56_an_instruction_that_overwrites_itself_under_a_patch_stays, Patches),
        law!(l56_a_patch_that_one_vcpu_rewrites_while_another_runs_into_it, Patches, Kick),
        law!(l56_an_int3_of_the_guests_is_refused, Patches),
        law!(l57_an_alias_is_stepped_over_and_not_told, Patches),
        law!(l57_a_patch_stays_with_its_page, Patches),
        law!(l58_four_vcpus_hammer_one_patch_and_no_hit_is_lost, Patches, Kick),
        law!(l58_a_patch_on_an_access_to_a_device, Patches),
        law!(l58_a_patch_on_a_rep_is_one_crossing, Patches),
        law!(l58_a_patch_on_a_hlt, Patches),
        law!(l58_a_user_steps_over_a_patch, Patches),
        law!(l59_set_and_removed_1000_times_under_fire, Patches, Kick),
        law!(l59_a_patch_that_goes_between_exit_and_handling, Patches, Kick),
        law!(l54_5000_patches_are_one_change, Patches),
        law!(l71_released_under_fire_memory_is_as_it_was, Patches, Kick),
    ]
}

/// Counts the hits of each vCPU and lets it go on.
struct Counter(Arc<Vec<AtomicU64>>);

impl Counter {
    fn new(cpus: usize) -> (Self, Handler) {
        let counts: Arc<Vec<AtomicU64>> = Arc::new((0..cpus).map(|_| AtomicU64::new(0)).collect());
        let counter = counts.clone();
        let handler = Handler::new(move |hit| {
            counter[hit.vcpu.index()].fetch_add(1, Ordering::SeqCst);
            Disposition::Continue
        });
        (Counter(counts), handler)
    }

    fn of(&self, cpu: u32) -> u64 {
        self.0[cpu as usize].load(Ordering::SeqCst)
    }
}

const HARNESS: Owner = Owner::harness(7);

/// Four breakpoints where no property comes by: all slots are taken.
fn fill_slots(rig: &mut Rig) {
    rig.offer_patches();
    for n in 0..4 {
        rig.set(Breakpoint::exec(at("step_begin") + n)).unwrap();
    }
}

fn patching(begins: &[Begin]) -> Rig {
    let mut rig = Rig::new(begins);
    fill_slots(&mut rig);
    rig
}

/// A breakpoint of gdb's that is a patch.
fn patch(rig: &mut Rig, addr: u64) -> Breakpoint {
    let request = Breakpoint::exec(addr);
    rig.set(request).unwrap();
    assert_eq!(rig.coordinator.mechanism(Owner::GDB, request), Some(Mechanism::Patch));
    request
}

/// Is an INT3 that came out of the guest.
fn is_int3(exit: &Exit) -> bool {
    match exit {
        Exit::Debug(exit) => exit.exception == 3,
        Exit::Crash(Crash::EmulationFailure { bytes }) => bytes.first() == Some(&INT3),
        _ => false,
    }
}

fn l54_what_finds_no_slot_is_a_patch() {
    let mut rig = Rig::one("bp_line");
    rig.offer_patches();
    let before = rig.code();
    let bps = ["bp1", "bp2", "bp3", "bp4", "bp5"].map(|label| Breakpoint::exec(at(label)));
    for bp in bps {
        rig.set(bp).unwrap();
    }
    let mechanisms = bps.map(|bp| rig.coordinator.mechanism(Owner::GDB, bp));
    assert_eq!(mechanisms[..4], [Some(Mechanism::Slots); 4]);
    assert_eq!(mechanisms[4], Some(Mechanism::Patch));
    for (n, bp) in bps.into_iter().enumerate() {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        let registers = rig.registers(0);
        let counts = [registers.r8, registers.r9, registers.r10, registers.r11, registers.r12];
        assert_eq!((registers.pc(), counts.iter().sum::<u64>()), (bp.addr, n as u64));
    }
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(rig.registers(0).r12, 1);
    rig.clear(bps[4]).unwrap();
    assert!(rig.code() == before, "the code is not as it was");
    rig.assert_guest_undisturbed();
}

/// The product asks its own probe what this host offers.
fn l54_where_int3_is_the_guests_the_fifth_is_refused() {
    let mut demo = Booted::counting_demo(1, None);
    let four = [0, 1, 2, 3].map(|n| Breakpoint::exec(demo.at("count_a_round") + n));
    for bp in four {
        demo.set(bp);
    }
    let fifth = Breakpoint::exec(demo.at("count_up_here"));
    let set = demo.vm.set_breakpoint(Owner::GDB, fifth);
    if Patches.missing().is_none() {
        set.unwrap();
        // The guest comes by at some of the four as well.
        let mut reasons = (0..).map(|_| demo.run_all().reason);
        let other = reasons.find(|reason| !four.map(StopReason::Breakpoint).contains(reason));
        assert_eq!(other, Some(StopReason::Breakpoint(fifth)));
    } else {
        assert_eq!(set, Err(BreakpointError::NoSlot { request: fifth, needed: 1, free: 0 }));
    }
    assert_eq!(demo.guest_debug_exceptions(), 0);
}

fn l54_a_slot_that_becomes_free_takes_over_from_a_patch() {
    let mut rig = patching(&[Begin::Ring0("loop5")]);
    let before = rig.code();
    let bp = patch(&mut rig, at("loop5_bp"));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
    // It stands there, told, while the breakpoint goes from memory into a slot: still one crossing.
    rig.clear(Breakpoint::exec(at("step_begin"))).unwrap();
    assert_eq!(rig.coordinator.mechanism(Owner::GDB, bp), Some(Mechanism::Slots));
    assert!(rig.code() == before);
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
    assert_eq!(rig.registers(0).r8, 1);
    // And back.
    rig.clear(bp).unwrap();
    rig.set(Breakpoint::exec(at("step_begin"))).unwrap();
    patch(&mut rig, bp.addr);
    for r8 in 2..5 {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        assert_eq!(rig.registers(0).r8, r8);
    }
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    rig.assert_guest_undisturbed();
}

fn l54_5000_patches_are_one_change() {
    let mut rig = patching(&[Begin::Ring0("field")]);
    let before = rig.code();
    let epoch = rig.coordinator.image().epoch().0;
    let (counter, handler) = Counter::new(1);
    let places: Vec<Breakpoint> = (0..5000).map(|n| Breakpoint::exec(at("field_begin") + 3 * n)).collect();
    let requests = places.iter().map(|place| (*place, Some(handler.clone()))).collect();
    rig.coordinator.set_traps(HARNESS, requests).unwrap();
    assert_eq!(rig.coordinator.image().epoch().0, epoch + 1);
    assert_eq!(rig.coordinator.image().patches().len(), 5000);
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!((counter.of(0), rig.registers(0).r8), (5000, 5000));
    rig.coordinator.clear_traps(HARNESS, &places).unwrap();
    assert_eq!(rig.coordinator.image().epoch().0, epoch + 2);
    assert!(rig.code() == before, "the code is not as it was");
    rig.assert_guest_undisturbed();
}

fn l55_what_is_read_shows_no_patch() {
    let mut rig = patching(&[Begin::Ring0("loop5")]);
    let bp = at("loop5_bp");
    let mut original = [0; 4];
    rig.read_ram(bp, &mut original);
    // A handler reads through its vCPU.
    let seen = Arc::new(AtomicU64::new(0));
    let saw = seen.clone();
    let reader = Handler::new(move |hit| {
        let mut code = [0; 4];
        assert_eq!(hit.read(hit.pc, &mut code), 4);
        saw.store(u32::from_le_bytes(code).into(), Ordering::SeqCst);
        Disposition::Continue
    });
    rig.coordinator.set_trap(HARNESS, Breakpoint::exec(bp), Some(reader)).unwrap();
    assert_eq!(rig.coordinator.mechanism(HARNESS, Breakpoint::exec(bp)), Some(Mechanism::Patch));
    let mut there = [0; 4];
    rig.read_ram(bp, &mut there);
    assert_eq!(there, [INT3, original[1], original[2], original[3]], "no patch at all");
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(seen.load(Ordering::SeqCst), u64::from(u32::from_le_bytes(original)));

    // And the product's own reads, linear and physical, of one byte and of many.
    let mut demo = patching_demo(1);
    let place = demo.at("count_up_here");
    let mut original = [0; 64];
    assert_eq!(demo.vm.read_physical(place - 30, &mut original), 64);
    demo.set(Breakpoint::exec(place));
    assert_eq!(raw_byte(&demo, place), INT3, "no patch at all");
    let mut seen = [0; 64];
    assert_eq!(demo.vm.read_physical(place - 30, &mut seen), 64);
    assert_eq!(seen, original);
    assert_eq!(demo.vm.read_memory(VcpuId(0), place - 30, &mut seen).unwrap(), 64);
    assert_eq!(seen, original);
    let mut one = [0];
    assert_eq!(demo.vm.read_memory(VcpuId(0), place, &mut one).unwrap(), 1);
    assert_eq!(one[0], original[30]);
}

/// The demo with all slots taken.
fn patching_demo(cpus: u32) -> Booted {
    let mut demo = Booted::counting_demo(cpus, None);
    for n in 0..4 {
        demo.set(Breakpoint::exec(demo.at("guest_main") + n));
    }
    demo
}

/// What is really in memory: linear and physical addresses are the same there.
fn raw_byte(demo: &Booted, addr: u64) -> u8 {
    let mut byte = [0];
    assert_eq!(trapline_vmm::paging::read_physical(demo.vm.ram().mem(), addr, &mut byte), 1);
    byte[0]
}

fn l55_what_is_written_under_a_patch_is_there_when_it_goes() {
    let mut demo = patching_demo(1);
    let place = demo.at("count_up_here");
    let bp = Breakpoint::exec(place);
    let original = raw_byte(&demo, place);
    demo.set(bp);
    assert_eq!(demo.run_all().reason, StopReason::Breakpoint(bp));
    let other = original ^ 0x01;
    for (n, byte) in [other, original, other].into_iter().enumerate() {
        let written = match n {
            0 => demo.vm.write_memory(VcpuId(0), place, &[byte]).unwrap(),
            _ => demo.vm.write_physical(place, &[byte]).unwrap(),
        };
        assert!(written);
        assert_eq!(raw_byte(&demo, place), INT3, "the breakpoint was overwritten");
        let mut seen = [0];
        assert_eq!(demo.vm.read_memory(VcpuId(0), place, &mut seen).unwrap(), 1);
        assert_eq!(seen[0], byte);
    }
    demo.clear(bp);
    assert_eq!(raw_byte(&demo, place), other, "what was written is lost");
    // Under a breakpoint again, with the guest's own byte: it goes on as if nothing had been.
    assert!(demo.vm.write_physical(place, &[original]).unwrap());
    demo.set(bp);
    let before = demo.count(0);
    for n in 0..3 {
        assert_eq!(demo.run_all().reason, StopReason::Breakpoint(bp));
        assert!(demo.count(0) <= before + n + 1);
    }
    // A write across it reaches the bytes beside it as well.
    let mut around = [0; 3];
    assert_eq!(demo.vm.read_physical(place - 1, &mut around), 3);
    assert!(demo.vm.write_memory(VcpuId(0), place - 1, &around).unwrap());
    assert_eq!(raw_byte(&demo, place), INT3);
    demo.clear(bp);
    assert_eq!([raw_byte(&demo, place - 1), raw_byte(&demo, place), raw_byte(&demo, place + 1)], around);
    assert_eq!(demo.guest_debug_exceptions(), 0);
}

/// The guest has then an INT3 of its own there, and the breakpoint has no place any more.
fn l55_an_int3_that_is_written_under_a_patch_is_the_guests() {
    let mut demo = patching_demo(1);
    let place = demo.at("count_up_here");
    let bp = Breakpoint::exec(place);
    demo.set(bp);
    assert!(demo.vm.write_physical(place, &[INT3]).unwrap());
    assert_eq!(demo.vm.breakpoints().len(), 4);
    demo.go();
    wait_for("the guest to take its #BP", || {
        assert_eq!(demo.vm.poll().unwrap(), None);
        (demo.guest_debug_exceptions() > 0).then_some(())
    });
}

/// The patch is on the first byte of a NOP of two bytes; the guest replaces it by a NOP of one.
fn l56_what_the_guest_writes_over_a_patch_stays() {
    let mut rig = patching(&[Begin::Ring0("self_patch")]);
    let site = at("patch_site");
    let bp = patch(&mut rig, site);
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0), "what is overwritten is not hit");
    assert_eq!(rig.registers(0).r8, 1);
    let saved = |n| rig.word(fixture::saved_address(n).unwrap());
    assert_eq!([saved(0), saved(1)], [0x90cc, 0x9090]);
    rig.clear(bp).unwrap();
    let mut there = [0; 2];
    rig.read_ram(site, &mut there);
    assert_eq!(there, [0x90, 0x90], "the guest's own code was undone");
    rig.assert_guest_undisturbed();
}

fn l56_an_instruction_that_overwrites_itself_under_a_patch_stays() {
    let mut rig = patching(&[Begin::Ring0("patch_itself")]);
    let bp = patch(&mut rig, at("patch_itself"));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    let mut there = [0];
    rig.read_ram(bp.addr, &mut there);
    assert_eq!((there, rig.registers(0).r8), ([0x90], 1));
    rig.clear(bp).unwrap();
    rig.read_ram(bp.addr, &mut there);
    assert_eq!(there, [0x90]);
    rig.assert_guest_undisturbed();
}

/// CPU 0 writes the original byte and a NOP there, in turn; CPU 1 runs it.
fn l56_a_patch_that_one_vcpu_rewrites_while_another_runs_into_it() {
    let mut rig = patching(&[Begin::Ring0("patch_rewrite"), Begin::Ring0("patch_rewrite")]);
    let request = Breakpoint::exec(at("rewrite_site"));
    let (_, handler) = Counter::new(2);
    for _ in 0..50 {
        rig.coordinator.set_trap(HARNESS, request, Some(handler.clone())).unwrap();
        assert_eq!(rig.go(), None);
        let before = rig.field(1, cpu_field::HITS);
        wait_for("it to count", || {
            assert_eq!(rig.coordinator.poll().unwrap(), None);
            (rig.field(1, cpu_field::HITS) > before + 3).then_some(())
        });
        rig.interrupt();
        rig.coordinator.clear_level(Level::Harness).unwrap();
        let mut there = [0];
        rig.read_ram(request.addr, &mut there);
        assert!([0x90, 0x66].contains(&there[0]), "{:#x} was left behind", there[0]);
    }
    rig.assert_guest_undisturbed();
}

fn l56_an_int3_of_the_guests_is_refused() {
    let mut rig = patching(&[Begin::Ring0("int3")]);
    let before = rig.code();
    let requests = rig.coordinator.breakpoints();
    let error = rig.set(Breakpoint::exec(at("i3"))).unwrap_err();
    assert!(matches!(error, BreakpointError::Invalid { .. }), "{error:?}");
    assert!(error.to_string().contains("INT3 of its own"), "{error}");
    // In one change with others it takes them along.
    let both = vec![(Breakpoint::exec(at("i3_next")), None), (Breakpoint::exec(at("i3")), None)];
    rig.coordinator.set_traps(Owner::GDB, both).unwrap_err();
    assert_eq!(rig.coordinator.breakpoints(), requests);
    assert!(rig.code() == before);
}

/// The same byte through two linear addresses: only the one that was asked for is told.
fn l57_an_alias_is_stepped_over_and_not_told() {
    for through_alias in [false, true] {
        let mut rig = patching(&[Begin::Ring0("alias")]);
        let offset = if through_alias { fixture::ALIAS } else { 0 };
        let bp = patch(&mut rig, at("fx_alias_code") + offset);
        for round in 0..20 {
            assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
            let counts = [cpu_field::HITS, cpu_field::SECOND, cpu_field::ROUNDS].map(|field| rig.field(0, field));
            assert_eq!(counts, [round + u64::from(through_alias), round, round], "alias: {through_alias}");
            assert_eq!(rig.pc(0), bp.addr);
        }
        rig.assert_guest_undisturbed();
    }
}

/// One linear address, two pages in turn: the patch is in the first.
fn l57_a_patch_stays_with_its_page() {
    let mut rig = patching(&[Begin::Ring0("remap")]);
    let mut other = [0; 16];
    rig.read_ram(fixture::REMAP_B, &mut other);
    let bp = patch(&mut rig, fixture::REMAP);
    for round in 0..20 {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        let counts = [cpu_field::HITS, cpu_field::SECOND, cpu_field::ROUNDS].map(|field| rig.field(0, field));
        assert_eq!(counts, [round, round, round]);
    }
    let mut now = [0; 16];
    rig.read_ram(fixture::REMAP_B, &mut now);
    assert_eq!(now, other, "the other page was changed");
    // While the address leads to the other page, the first one's byte still is what goes back.
    rig.clear(bp).unwrap();
    rig.run_to("remap_call_b");
    let mut first = [0; 16];
    rig.read_ram(fixture::REMAP_A, &mut first);
    assert_eq!(first[..4], other[..4], "both pages hold the same code");
    rig.assert_guest_undisturbed();
}

/// Every vCPU's hits against its own count: a vCPU that was counted and has not executed yet stands
/// on the patch.
fn assert_equal(rig: &mut Rig, counter: &Counter, bp: u64, field: u64) {
    for cpu in 0..rig.cpus() as u32 {
        let (hits, count, pc) = (counter.of(cpu), rig.field(cpu, field), rig.pc(cpu));
        let ahead = hits.checked_sub(count).unwrap_or_else(|| panic!("vCPU {cpu}: {count} crossings, {hits} hits"));
        assert!(ahead == 0 || ahead == 1 && pc == bp, "vCPU {cpu}: {hits} hits, {count} crossings, at {}", name(pc));
    }
}

fn l58_four_vcpus_hammer_one_patch_and_no_hit_is_lost() {
    for (property, label) in [("hotlock", "hotlock_bp"), ("hotmem", "hotmem_bp")] {
        let mut rig = patching(&[Begin::Ring0(property); 4]);
        let (counter, handler) = Counter::new(4);
        let bp = at(label);
        rig.coordinator.set_trap(HARNESS, Breakpoint::exec(bp), Some(handler)).unwrap();
        for round in 1..=4 {
            assert_eq!(rig.go(), None);
            wait_for("all four to hit it", || {
                assert_eq!(rig.coordinator.poll().unwrap(), None);
                (0..4).all(|cpu| counter.of(cpu) >= 100 * round).then_some(())
            });
            rig.interrupt();
            assert_equal(&mut rig, &counter, bp, cpu_field::HITS);
            let mut there = [0];
            rig.read_ram(bp, &mut there);
            assert_eq!(there, [INT3], "it was not put back");
        }
        rig.assert_guest_undisturbed();
    }
}

fn l58_a_patch_on_an_access_to_a_device() {
    for (property, labels) in [("mmio_loop", ["mmio_write", "mmio_read"]), ("pio_loop", ["pio_out", "pio_in"])] {
        let mut rig = patching(&[Begin::Ring0(property)]);
        let bps = labels.map(|label| patch(&mut rig, at(label)));
        for round in 0..20 {
            for (n, bp) in bps.into_iter().enumerate() {
                assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp), "round {round}");
                let [mmio_writes, mmio_reads, port_writes, port_reads] = rig.accesses();
                let done = [mmio_writes + port_writes, mmio_reads + port_reads];
                assert_eq!(done, [round + n as u64, round], "before {}", labels[n]);
            }
        }
        rig.assert_guest_undisturbed();
    }
}

fn l58_a_patch_on_a_rep_is_one_crossing() {
    let mut rig = patching(&[Begin::Ring0("step_rep_long")]);
    let bp = patch(&mut rig, at("s_rep_long"));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    rig.assert_guest_undisturbed();
}

fn l58_a_patch_on_a_hlt() {
    let mut rig = patching(&[Begin::Ring0("step_hlt")]);
    let bp = patch(&mut rig, at("s_hlt"));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
    assert_eq!(rig.coordinator.resume(&rig.plan(RunMode::Continue)).unwrap(), None);
    wait_for("it to sleep", || {
        assert_eq!(rig.coordinator.poll().unwrap(), None);
        rig.spies[0].look(|notes| notes.halted > 0).then_some(())
    });
    // It sleeps with interrupts off.
    assert_eq!(send_nmi(rig.raw[0]), 0);
    assert_eq!(rig.wait().reason, StopReason::GuestExit(0));
    assert_eq!(
        rig.log().iter().map(|entry| (entry.vector, name(entry.rip))).collect::<Vec<_>>(),
        [(2, name(at("s_hlt_next")))]
    );
}

/// `stepi` onto a patch, over it, and away.
fn l58_a_user_steps_over_a_patch() {
    let mut rig = patching(&[Begin::Ring0("loop5")]);
    let bp = patch(&mut rig, at("loop5_bp"));
    let (counter, handler) = Counter::new(1);
    rig.coordinator.set_trap(HARNESS, bp, Some(handler)).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
    for round in 1..4 {
        assert_eq!((rig.registers(0).r8, counter.of(0)), (round - 1, round));
        for label in ["loop5_bp2", "loop5_bp3"] {
            assert_eq!(name(rig.step()), name(at(label)));
        }
        assert_eq!((rig.registers(0).r8, counter.of(0)), (round, round));
        // Who steps onto it is not told; the other one counts when it is crossed.
        assert_eq!(name(rig.step()), name(bp.addr));
        assert_eq!(name(rig.step()), name(at("loop5_bp2")));
        assert_eq!((rig.registers(0).r8, counter.of(0)), (round + 1, round + 1));
        if round == 3 {
            break;
        }
        // Back to before it.
        let mut registers = rig.registers(0);
        (registers.rip, registers.r8) = (bp.addr, round);
        rig.coordinator.set_registers(VcpuId(0), &registers).unwrap();
        counter.0[0].store(round, Ordering::SeqCst);
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
    }
    rig.assert_guest_undisturbed();
}

/// The store faults, the handler maps its page, and it runs again.
fn l42_a_patch_on_an_instruction_that_faults() {
    let mut rig = patching(&[Begin::Ring0("fault_pf_loop")]);
    let bp = patch(&mut rig, at("f_pf_loop"));
    for stores in 0..20 {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        assert_eq!((rig.field(0, cpu_field::HITS), rig.log().len() as u64), (stores, stores));
    }
    rig.assert_guest_undisturbed();
}

/// The frame of the fault still lies below the stack when the vCPU comes by again: it says nothing then.
fn l42_a_patch_that_faults_and_is_left_for_good_is_told_again() {
    let mut rig = patching(&[Begin::Ring0("fault_pf_loop")]);
    let bp = patch(&mut rig, at("f_pf_loop"));
    is_left_for_good_and_told_again(rig, bp);
}

fn l59_set_and_removed_1000_times_under_fire() {
    let mut rig = patching(&[Begin::Ring0("hotlock"); 4]);
    let before = rig.code();
    let (counter, handler) = Counter::new(4);
    let request = Breakpoint::exec(at("hotlock_bp"));
    assert_eq!(rig.go(), None);
    for round in 0..1000 {
        rig.coordinator.set_trap(HARNESS, request, Some(handler.clone())).unwrap();
        // Each round removes it a little later: before, while and after the vCPUs run into it.
        for _ in 0..round % 7 {
            assert_eq!(rig.coordinator.poll().unwrap(), None);
        }
        rig.coordinator.clear_breakpoint(HARNESS, request).unwrap();
    }
    let counts: Vec<u64> = (0..4).map(|cpu| rig.field(cpu, cpu_field::HITS)).collect();
    wait_for("all four to count on", || {
        assert_eq!(rig.coordinator.poll().unwrap(), None);
        (0..4).all(|cpu| rig.field(cpu, cpu_field::HITS) > counts[cpu as usize]).then_some(())
    });
    rig.interrupt();
    for cpu in 0..4 {
        // Each instruction ran as often as its neighbour: none was lost, none doubled.
        let (hits, r8) = (rig.field(cpu, cpu_field::HITS), rig.registers(cpu).r8);
        assert!(hits == r8 || hits == r8 + 1 && rig.pc(cpu) != request.addr, "vCPU {cpu}: {hits} and {r8}");
        assert!(counter.of(cpu) <= hits + 1);
    }
    assert!((0..4).any(|cpu| counter.of(cpu) > 0), "nothing ever hit it");
    assert!(rig.code() == before, "the code is not as it was");
    rig.assert_guest_undisturbed();
}

/// vCPU 1 has come out with the INT3 and not looked at it yet when its removal is asked for.
fn l59_a_patch_that_goes_between_exit_and_handling() {
    let mut rig = patching(&[Begin::Ring0("hotlock"); 2]);
    let before = rig.code();
    let bp = Breakpoint::exec(at("hotlock_bp"));
    for round in 0..20 {
        assert_eq!(rig.go(), None);
        rig.spies[1].hold_until_kicked(is_int3);
        patch(&mut rig, bp.addr);
        rig.spies[1].wait_held();
        let count = rig.field(1, cpu_field::HITS);
        rig.clear(bp).unwrap();
        assert!(rig.code() == before, "round {round}");
        wait_for("it to go on", || {
            assert_eq!(rig.coordinator.poll().unwrap(), None, "round {round}: told of what is gone");
            (rig.field(1, cpu_field::HITS) > count + 2).then_some(())
        });
        rig.interrupt();
        for cpu in 0..2 {
            let (hits, r8) = (rig.field(cpu, cpu_field::HITS), rig.registers(cpu).r8);
            assert!(hits == r8 || hits == r8 + 1, "vCPU {cpu} executed it {hits} times and what follows {r8} times");
        }
    }
    rig.assert_guest_undisturbed();
}

/// One physical instruction that is reached through two linear addresses: at the direct one there is a
/// slot, which gdb and the harness share, and at the alias a patch. So a vCPU that steps off the slot
/// runs into the INT3, and each handler looks at what the other one is set on.
fn l40_a_slot_and_a_patch_on_one_instruction_are_each_hit_once() {
    let mut rig = Rig::one("alias");
    rig.offer_patches();
    let code = at("fx_alias_code");
    let (direct, alias) = (Breakpoint::exec(code), Breakpoint::exec(code + fixture::ALIAS));
    let (counter, counting) = Counter::new(1);
    let looking = Handler::new(move |hit| {
        let mut bytes = [0; 8];
        for at in [direct.addr, alias.addr] {
            assert_eq!(hit.read(at, &mut bytes), 8);
            assert_ne!(bytes[0], INT3);
        }
        Disposition::Stop
    });
    rig.set(direct).unwrap();
    for n in 0..3 {
        rig.set(Breakpoint::exec(at("step_begin") + n)).unwrap();
    }
    rig.coordinator.set_trap(HARNESS, direct, Some(counting)).unwrap();
    rig.coordinator.set_trap(HARNESS, alias, Some(looking)).unwrap();
    assert_eq!(rig.coordinator.mechanism(HARNESS, direct), Some(Mechanism::Slots));
    assert_eq!(rig.coordinator.mechanism(HARNESS, alias), Some(Mechanism::Patch));
    for round in 0..20 {
        assert_eq!(rig.run_all(), hit(0, direct));
        assert_eq!((counter.of(0), rig.field(0, cpu_field::HITS)), (round + 1, round));
        let stop = rig.run_all();
        assert_eq!((stop.reason, stop.owner), (StopReason::Breakpoint(alias), Some(HARNESS)));
        assert_eq!((counter.of(0), rig.field(0, cpu_field::SECOND)), (round + 1, round));
        assert_eq!(rig.field(0, cpu_field::HITS), round + 1);
    }
    rig.assert_guest_undisturbed();
}

fn l71_released_under_fire_memory_is_as_it_was() {
    let mut rig = patching(&[Begin::Ring0("hotlock"); 4]);
    let before = rig.code();
    for _ in 0..20 {
        let bps = ["hotlock_bp", "hotlock_bp2"].map(|label| patch(&mut rig, at(label)));
        assert_eq!(rig.go(), None);
        let first = rig.wait().reason;
        assert!(bps.map(StopReason::Breakpoint).contains(&first), "{first:?}");
        // Go on: some step over it, some run into it, and gdb goes away in the middle of it.
        let _ = rig.go();
        rig.coordinator.release(Level::Gdb).unwrap();
        assert!(rig.code() == before, "the code is not as it was");
        let counts: Vec<u64> = (0..4).map(|cpu| rig.field(cpu, cpu_field::HITS)).collect();
        wait_for("all four to count on", || {
            assert_eq!(rig.coordinator.poll().unwrap(), None);
            (0..4).all(|cpu| rig.field(cpu, cpu_field::HITS) > counts[cpu as usize] + 2).then_some(())
        });
        rig.interrupt();
        fill_slots(&mut rig);
    }
    rig.assert_guest_undisturbed();
}
