//! Laws 43 to 53: a step is one instruction, whatever the instruction and whatever this KVM makes of it.

use trapline_guests::fixture::{self, cpu_field, user_field, vector};
use trapline_vmm::debug::{Breakpoint, RunMode, StopReason, VcpuId};
use trapline_vmm::vcpu::Activity;

use crate::clock::wait_for;
use crate::landing::step_to;
use crate::lane::Need::{Kick, StepInRing3, StepsOverExits, Syscall};
use crate::law::{Law, law};
use crate::rig::{Begin, Rig, at, name, send_nmi};

/// RFLAGS.TF.
const TF: u64 = 1 << 8;

pub(crate) fn laws() -> Vec<Law> {
    let mut laws = vec![
        law!(l43_interrupts_wait_while_the_debugger_steps),
        law!(l44_a_whole_function_is_stepped_instruction_by_instruction),
        law!(l45_a_stepped_pushf_stores_no_trap_flag),
        law!(l45_a_stepped_pushf_stores_no_trap_flag_in_ring_3, StepInRing3),
        law!(l45_a_stepped_fault_leaves_no_trap_flag_in_its_frame),
        law!(l45_a_stepped_syscall_leaves_no_trap_flag_in_r11, StepInRing3, Syscall),
        law!(l46_the_guests_own_trap_flag_survives_a_step),
        law!(l48_an_interrupt_during_a_continue_is_not_a_stop, Kick),
        law!(l49_step_over_mov_ss_lands_behind_it),
        law!(l49_step_over_sti_lands_behind_it),
        law!(l49_step_over_hlt_lands_behind_it_and_sleeps, Kick),
        law!(l49_step_over_iret_lands_on_its_target),
        law!(l49_step_over_a_fault_lands_on_the_handler),
        law!(l49_step_over_an_undefined_instruction_lands_on_the_handler),
        law!(l49_step_over_rep_ends_behind_it),
        law!(l49_step_over_a_long_rep_ends_behind_it),
        law!(l49_step_over_call_lands_in_the_function),
        law!(l50_step_over_out_in_ring_3, StepInRing3, StepsOverExits),
        law!(l51_an_nmi_under_a_breakpoint_is_no_stop, Kick),
        law!(l52_a_stepped_sti_hlt_is_still_woken),
        law!(l53_a_jump_to_itself_is_a_step),
        law!(step_ranges_end_where_the_range_ends),
        law!(l37_a_step_off_a_breakpoint_leaves_it_armed_for_the_others, Kick),
    ];
    for plain in ["pushf", "popf", "cli", "rdtsc", "pause"] {
        laws.push(Law::of("l49_step_over_", plain, &[], step_over));
    }
    for exits in ["cpuid", "rdmsr", "wrmsr", "read_dr", "write_dr", "write_cr3"] {
        laws.push(Law::of("l49_step_over_", exits, &[StepsOverExits], step_over));
    }
    for access in ["out", "in", "outs", "ins", "mmio_write", "mmio_read"] {
        laws.push(Law::of("l50_step_over_", access, &[StepsOverExits], step_over));
    }
    laws
}

/// One instruction of the property `step`, and then the guest goes on to its end undisturbed.
fn step_over(what: &str) {
    let mut rig = Rig::one("step");
    rig.run_to(&format!("s_{what}"));
    assert_eq!(name(rig.step()), name(at(&format!("s_{what}_next"))));
    // The instruction behind it, too: a step that KVM owed from the first would come at once.
    if what != "pushf" {
        assert_eq!(name(rig.step()), name(at(&format!("s_{what}_next")) + 1));
    }
    goes_on_to_its_end(&mut rig);
    assert_eq!(rig.accesses(), [1, 1, 2, 2], "a device access was lost or doubled");
}

/// The property `step` faults twice of its own; nothing else may have come.
fn goes_on_to_its_end(rig: &mut Rig) {
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    let vectors: Vec<u64> = rig.log().iter().map(|entry| entry.vector).collect();
    assert_eq!(vectors, [14, 6], "what the guest took");
    assert_eq!(rig.word(fixture::saved_address(0).unwrap()) & TF, 0, "PUSHF showed our trap flag");
}

/// In place where the instructions touch registers only, and by KVM's steps where one stores.
fn l43_interrupts_wait_while_the_debugger_steps() {
    for round in [["spin0", "spin1", "spin2"], ["hotmem_bp", "hotmem_bp2", "hotmem_bp3"]] {
        let mut rig = Rig::one("irqspin");
        rig.run_to("spin0");
        rig.interrupt_guest(0, vector::MESSAGE);
        let mut registers = rig.registers(0);
        registers.rip = at(round[0]);
        rig.coordinator.set_registers(VcpuId(0), &registers).unwrap();
        for label in round.into_iter().cycle().skip(1).take(4) {
            assert_eq!(name(rig.step()), name(at(label)));
        }
        assert_eq!(rig.log(), [], "the interrupt came during a step");
        // Let go it comes, once.
        let bp = Breakpoint::exec(at(round[0]));
        rig.set(bp).unwrap();
        for _ in 0..3 {
            assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        }
        let log = rig.log();
        assert_eq!(log.len(), 1, "{log:x?}");
        assert_eq!((log[0].vector, log[0].rflags & TF), (vector::MESSAGE.into(), 0));
    }
}

/// Every instruction between two labels is stopped at, in order: none is run over (law 44).
fn l44_a_whole_function_is_stepped_instruction_by_instruction() {
    let mut rig = Rig::one("step");
    rig.run_to("step_begin");
    let mut trace = vec![at("step_begin")];
    while rig.pc(0) != at("s_page_fault") {
        assert!(trace.len() < 200, "it does not end: {:?}", trace.iter().map(|pc| name(*pc)).collect::<Vec<_>>());
        trace.push(rig.step());
    }
    let mut bytes = vec![0; (at("s_page_fault") - at("step_begin")) as usize];
    for (n, byte) in bytes.iter_mut().enumerate() {
        *byte = rig.word(at("step_begin") + n as u64) as u8;
    }
    let options = iced_x86::DecoderOptions::NONE;
    let decoder = iced_x86::Decoder::with_ip(64, &bytes, at("step_begin"), options);
    let mut expected: Vec<u64> = decoder.into_iter().map(|instruction| instruction.ip()).collect();
    expected.push(at("s_page_fault"));
    // The one that may be run over is in the shadow of MOV SS; the one that may be stopped at
    // several times is REP.
    trace.dedup();
    if !trace.contains(&at("s_movss_next")) {
        expected.retain(|pc| *pc != at("s_movss_next"));
    }
    let names = |pcs: &[u64]| pcs.iter().map(|pc| name(*pc)).collect::<Vec<_>>();
    assert_eq!(names(&trace), names(&expected));
    goes_on_to_its_end(&mut rig);
}

fn l45_a_stepped_pushf_stores_no_trap_flag() {
    let mut rig = Rig::one("step");
    rig.run_to("s_pushf");
    rig.step();
    let rsp = rig.registers(0).rsp;
    assert_eq!(rig.word(rsp) & TF, 0, "{:#x}", rig.word(rsp));
    goes_on_to_its_end(&mut rig);
}

fn l45_a_stepped_pushf_stores_no_trap_flag_in_ring_3() {
    let mut rig = Rig::new(&[Begin::Ring3("ring3_line")]);
    step_to(&mut rig, "u_pushf");
    assert_eq!(name(rig.step()), name(at("u_pushf_next")));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    let saved = rig.word(fixture::user_address(0, user_field::SAVED_RFLAGS).unwrap());
    assert_eq!(saved & TF, 0, "{saved:#x}");
    rig.assert_guest_undisturbed();
}

fn l45_a_stepped_fault_leaves_no_trap_flag_in_its_frame() {
    for (property, label) in [("fault_pf", "f_pf"), ("fault_ud", "f_ud")] {
        let mut rig = Rig::one(property);
        rig.run_to(label);
        assert_eq!(rig.run_first(RunMode::Step), StopReason::Step);
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
        let log = rig.log();
        assert_eq!((log.len(), log[0].rip, log[0].rflags & TF), (1, at(label), 0), "{log:x?}");
    }
}

fn l45_a_stepped_syscall_leaves_no_trap_flag_in_r11() {
    let mut rig = Rig::new(&[Begin::Ring3("ring3_syscall")]);
    step_to(&mut rig, "u_syscall");
    rig.step();
    assert_eq!(rig.registers(0).r11 & TF, 0);
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    rig.assert_guest_undisturbed();
}

fn l46_the_guests_own_trap_flag_survives_a_step() {
    let mut rig = Rig::one("own_tf");
    // From the first instruction at which its TF is set: a step there, then on without us.
    rig.run_to("tf1");
    rig.step();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(rig.log().len(), 5, "{:x?}", rig.log());
}

/// The stop comes where it was asked for, with interrupts taken all the time on the way.
fn l48_an_interrupt_during_a_continue_is_not_a_stop() {
    let mut rig = Rig::one("irqspin_timer");
    let bp = Breakpoint::exec(at("timer_spin1"));
    rig.set(bp).unwrap();
    let mut told = 0;
    while rig.field(0, cpu_field::TIMER) < 5 {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        told += 1;
        assert_eq!(rig.field(0, cpu_field::HITS), told);
        for label in ["timer_spin2", "timer_spin0"] {
            assert_eq!(name(rig.step()), name(at(label)), "a step went elsewhere");
        }
        assert!(told < 1_000_000, "its timer does not tick");
    }
    rig.assert_guest_undisturbed();
}

/// Behind it or behind the next instruction, which its shadow covers; never stuck (law 49).
fn l49_step_over_mov_ss_lands_behind_it() {
    let mut rig = Rig::one("step");
    rig.run_to("s_movss");
    let pc = rig.step();
    assert!([at("s_movss_next"), at("s_movss_next2")].contains(&pc), "{}", name(pc));
    if pc == at("s_movss_next") {
        assert_eq!(name(rig.step()), name(at("s_movss_next2")));
    }
    goes_on_to_its_end(&mut rig);
}

fn l49_step_over_sti_lands_behind_it() {
    let mut rig = Rig::one("step_sti");
    rig.run_to("s_sti");
    assert_eq!(name(rig.step()), name(at("s_sti_next")));
    assert_eq!(name(rig.step()), name(at("s_sti_next2")));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(rig.log(), []);
}

fn l49_step_over_hlt_lands_behind_it_and_sleeps() {
    let mut rig = Rig::one("hlt_wait");
    rig.run_to("hlt_wait_hlt");
    assert_eq!(name(rig.step()), name(at("hlt_wait_woken")));
    assert_eq!(rig.coordinator.activity(VcpuId(0)).unwrap(), Activity::Halted);
    let entries = rig.spies[0].entries();
    assert_eq!(rig.go(), None);
    wait_for("it to be entered", || (rig.spies[0].entries() > entries).then_some(()));
    rig.interrupt();
    assert_eq!((rig.pc(0), rig.field(0, cpu_field::WAKEUPS)), (at("hlt_wait_woken"), 0), "it does not sleep");
    rig.interrupt_guest(0, vector::MESSAGE);
    assert_eq!(rig.go(), None);
    wait_for("it to wake up", || (rig.field(0, cpu_field::WAKEUPS) == 1).then_some(()));
    rig.interrupt();
    assert_eq!(rig.log().iter().map(|entry| entry.vector).collect::<Vec<_>>(), [u64::from(vector::MESSAGE)]);
}

fn l49_step_over_iret_lands_on_its_target() {
    let mut rig = Rig::one("step_iret");
    rig.run_to("s_iret");
    assert_eq!(name(rig.step()), name(at("s_iret_next")));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(rig.log(), []);
}

fn l49_step_over_a_fault_lands_on_the_handler() {
    let mut rig = Rig::one("fault_pf");
    rig.run_to("f_pf");
    assert_eq!(name(rig.step()), name(at("fx_vector_14")));
}

fn l49_step_over_an_undefined_instruction_lands_on_the_handler() {
    let mut rig = Rig::one("fault_ud");
    rig.run_to("f_ud");
    assert_eq!(name(rig.step()), name(at("fx_vector_6")));
}

fn l49_step_over_rep_ends_behind_it() {
    rep(("step", "s_rep", "s_rep_next"), 3);
}

fn l49_step_over_a_long_rep_ends_behind_it() {
    rep(("step_rep_long", "s_rep_long", "s_rep_long_next"), 4096);
}

/// One stop for each iteration, or for several, or now and then one for none; nothing is run over.
fn rep((property, begin, end): (&'static str, &str, &str), iterations: u64) {
    let mut rig = Rig::one(property);
    rig.run_to(begin);
    let mut left = rig.registers(0).rcx;
    assert_eq!(left, iterations);
    let mut idle = 0;
    loop {
        let pc = rig.step();
        let rcx = rig.registers(0).rcx;
        if pc == at(end) {
            assert_eq!(rcx, 0);
            assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
            return;
        }
        assert_eq!(name(pc), name(at(begin)));
        assert!(rcx <= left);
        idle = if rcx == left { idle + 1 } else { 0 };
        assert!(idle <= 8, "no progress at {left} iterations");
        left = rcx;
    }
}

fn l49_step_over_call_lands_in_the_function() {
    let mut rig = Rig::one("step");
    rig.run_to("s_call");
    let inside = rig.step();
    assert!(inside < at("step_begin") || inside > at("step_end"), "{}", name(inside));
    // Its one instruction is RET.
    assert_eq!(name(rig.step()), name(at("s_call_next")));
    goes_on_to_its_end(&mut rig);
}

fn l50_step_over_out_in_ring_3() {
    let mut rig = Rig::new(&[Begin::Ring3("ring3_out")]);
    step_to(&mut rig, "u_out");
    assert_eq!(name(rig.step()), name(at("u_out_next")));
    assert_eq!(name(rig.step()), name(at("u_out_next") + 1));
    assert_eq!(rig.accesses(), [0, 0, 1, 0]);
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    rig.assert_guest_undisturbed();
}

/// KVM steps by itself to find out when an NMI may come (law 51): that step is nobody's.
fn l51_an_nmi_under_a_breakpoint_is_no_stop() {
    let mut rig = Rig::one("irqspin");
    rig.run_to("spin0");
    rig.set(Breakpoint::exec(at("step_begin"))).unwrap();
    for nmis in 1..=10 {
        assert_eq!(send_nmi(rig.raw[0]), 0);
        assert_eq!(rig.go(), None);
        wait_for("the NMI", || {
            assert_eq!(rig.coordinator.poll().unwrap(), None);
            (rig.log().len() == nmis).then_some(())
        });
        rig.interrupt();
    }
    assert!(rig.log().iter().all(|entry| entry.vector == 2), "{:x?}", rig.log());
}

fn l52_a_stepped_sti_hlt_is_still_woken() {
    let mut rig = Rig::one("step_sti_hlt");
    rig.run_to("s_sti_hlt_sti");
    rig.interrupt_guest(0, vector::MESSAGE);
    assert_eq!(name(rig.step()), name(at("s_sti_hlt")));
    assert_eq!(name(rig.step()), name(at("s_sti_hlt_next")));
    assert_eq!(rig.log(), [], "the interrupt came during a step");
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    let log = rig.log();
    assert_eq!(log.len(), 1, "{log:x?}");
    assert_eq!((log[0].vector, log[0].rip, log[0].rflags & TF), (vector::MESSAGE.into(), at("s_sti_hlt_next"), 0));
}

fn l53_a_jump_to_itself_is_a_step() {
    let mut rig = Rig::one("jump_self");
    for _ in 0..20 {
        assert_eq!(rig.step(), at("s_jump_self"));
    }
}

fn step_ranges_end_where_the_range_ends() {
    let mut rig = Rig::one("bp_line");
    rig.run_to("bp1");
    let range = |start: &str, end: &str| RunMode::StepRange { start: at(start), end: at(end) };
    assert_eq!(rig.run_first(range("bp1", "bp3")), StopReason::Step);
    assert_eq!(name(rig.pc(0)), name(at("bp3")));
    // A breakpoint inside ends it, once.
    let bp = Breakpoint::exec(at("bp4"));
    rig.set(bp).unwrap();
    assert_eq!(rig.run_first(range("bp3", "bp_line_end")), StopReason::Breakpoint(bp));
    assert_eq!(rig.run_first(range("bp3", "bp_line_end")), StopReason::Step);
    assert_eq!(name(rig.pc(0)), name(at("bp_line_end")));
    let registers = rig.registers(0);
    assert_eq!([registers.r8, registers.r9, registers.r10, registers.r11, registers.r12], [1; 5]);
}

/// While vCPU 0 steps off it, vCPU 1 runs into it (law 39).
fn l37_a_step_off_a_breakpoint_leaves_it_armed_for_the_others() {
    let mut rig = Rig::all(2, "hotmem");
    let bp = Breakpoint::exec(at("hotmem_bp"));
    rig.set(bp).unwrap();
    let mut told = [0u64; 2];
    for _ in 0..100 {
        let stop = rig.run_all();
        assert_eq!(stop.reason, StopReason::Breakpoint(bp));
        told[stop.vcpu.index()] += 1;
        assert_eq!(rig.field(stop.vcpu.0, cpu_field::HITS), told[stop.vcpu.index()] - 1);
        let other = 1 - stop.vcpu.index();
        assert!(!rig.spies[other].armed().step, "the other one steps, too");
        assert_eq!(rig.spies[other].armed().dr7, rig.coordinator.image().dr7());
    }
    assert!(told.iter().all(|&times| times > 0), "{told:?}");
}
