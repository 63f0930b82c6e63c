//! Laws 42, 45, 46 and 49, where a stepped instruction does not lead to the one behind it: it faults,
//! raises an exception, changes the ring, or the guest steps itself at the same time.

use trapline_guests::fixture::{self, LogEntry, cpu_field, vector};
use trapline_vmm::debug::{Breakpoint, RunMode, StopReason, Trigger, VcpuId};
use trapline_vmm::vcpu::Activity;

use crate::lane::Flavour::Pvm;
use crate::lane::Need::{DataWatch, ResumeFlagOverExits, StepInRing3, StepsOverExits, Syscall};
use crate::lane::flavour;
use crate::law::{Law, law};
use crate::rig::{Begin, Rig, at, name};

/// RFLAGS.TF.
const TF: u64 = 1 << 8;

/// An exception's name, and the property, the instruction, its vector and the address in the frame.
const EXCEPTIONS: &[(&str, &str, &str, u64, &str)] = &[
    ("divide_error", "fault_de", "f_de", 0, "f_de"),
    ("general_protection", "fault_gp", "f_gp", 13, "f_gp"),
    ("error_code", "fault_gp_selector", "f_gp_selector", 13, "f_gp_selector"),
    ("undefined", "fault_ud", "f_ud", 6, "f_ud"),
    ("page_fault", "fault_pf", "f_pf", 14, "f_pf"),
    ("page_fault_of_a_write", "fault_pf_write", "f_pf_write", 14, "f_pf_write"),
    ("int", "step_int", "s_int", vector::SOFTWARE as u64, "s_int_next"),
    ("int3", "int3", "i3", 3, "i3_next"),
    ("int3_of_two_bytes", "int3_long", "i3_long", 3, "i3_long_next"),
    ("int1", "int1", "i1", 1, "i1_next"),
];

pub(crate) fn laws() -> Vec<Law> {
    let mut laws = vec![
        law!(l42_a_handler_may_sleep_while_its_instruction_is_stepped_over, ResumeFlagOverExits),
        law!(l42_a_step_into_a_handler_that_sleeps),
        law!(l42_a_breakpoint_that_faults_and_is_left_for_good_is_told_again, ResumeFlagOverExits),
        law!(l47_a_long_rep_under_a_breakpoint_lets_interrupts_through, ResumeFlagOverExits),
        law!(l45_a_stepped_pushf_behind_mov_ss_stores_no_trap_flag),
        law!(l45_a_step_leaves_no_trap_flag_to_what_comes_later),
        law!(l45_a_guest_cannot_tell_that_it_is_stepped),
        law!(l45_a_guest_in_ring_3_cannot_tell_that_it_is_stepped, StepInRing3),
        law!(l46_popf_that_sets_tf_under_a_step),
        law!(l46_a_guest_that_steps_itself_may_be_stepped_anywhere, StepsOverExits),
        law!(l46_a_breakpoint_where_the_guest_steps_itself),
        law!(l46_in_ring_3_the_guests_own_trap_flag_survives, StepInRing3),
        law!(l49_a_step_lands_on_the_handler_with_all_slots_taken),
        law!(l49_a_step_lands_on_the_handler_with_all_slots_watching, DataWatch),
        law!(l49_a_breakpoint_on_the_handler_is_told),
        law!(l49_step_over_iret_into_ring_3_lands_there, StepInRing3),
        law!(l49_step_over_sysret_lands_in_ring_3),
        law!(l49_step_over_syscall_lands_at_the_kernels_entry, StepInRing3, Syscall),
        law!(l49_step_over_a_fault_in_ring_3_lands_on_the_handler, StepInRing3),
        law!(l49_step_over_int3_in_ring_3_lands_on_the_handler, StepInRing3),
        law!(l49_a_step_in_ring_3_is_made_or_refused),
        law!(l52_a_step_of_a_sleeping_vcpu_waits_for_its_interrupt),
    ];
    for (what, ..) in EXCEPTIONS {
        laws.push(Law::of("l49_lands_on_the_handler_of_", what, &[], lands_on_the_handler));
    }
    laws
}

/// Steps to `label`: a breakpoint does not lead everywhere (ring 3).
pub(crate) fn step_to(rig: &mut Rig, label: &str) {
    for _ in 0..100 {
        if rig.pc(0) == at(label) {
            return;
        }
        rig.step();
    }
    panic!("{label} was not reached, but {}", name(rig.pc(0)));
}

/// At the first instruction of the handler, before it has run, and with a frame that knows nothing
/// of us; and then the guest goes on as if nothing had been.
fn lands_on_the_handler(what: &str) {
    let &(_, property, label, vector, saved) = EXCEPTIONS.iter().find(|row| row.0 == what).unwrap();
    let mut rig = Rig::one(property);
    rig.run_to(label);
    assert_eq!(name(rig.step()), name(at(&format!("fx_vector_{vector}"))));
    assert_eq!(rig.log(), [], "the handler has run");
    let registers = rig.registers(0);
    assert_eq!(registers.rflags & TF, 0);
    let code = u64::from(rig.word(registers.rsp) != at(saved));
    let frame = |n: u64| rig.word(registers.rsp + 8 * (code + n));
    assert_eq!((name(frame(0)), frame(2) & TF), (name(at(saved)), 0));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    let log = rig.log();
    assert_eq!(log.len(), 1, "{log:x?}");
    assert_eq!((log[0].vector, name(log[0].rip), log[0].rflags & TF), (vector, name(at(saved)), 0));
}

/// The handler waits for an interrupt, which must not wait for the handler.
fn l42_a_handler_may_sleep_while_its_instruction_is_stepped_over() {
    let mut rig = Rig::one("fault_pf_sleep");
    let bp = Breakpoint::exec(at("f_pf_sleep"));
    rig.set(bp).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
    rig.interrupt_guest(0, vector::MESSAGE);
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    let vectors: Vec<u64> = rig.log().iter().map(|entry| entry.vector).collect();
    assert_eq!(vectors, [14, vector::MESSAGE.into()]);
    assert_eq!(rig.registers(0).r8, 1);
}

fn l42_a_step_into_a_handler_that_sleeps() {
    let mut rig = Rig::one("fault_pf_sleep");
    rig.run_to("f_pf_sleep");
    rig.interrupt_guest(0, vector::MESSAGE);
    assert_eq!(name(rig.step()), name(at("fx_vector_14")));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    let log: Vec<_> = rig.log().iter().map(|entry| (entry.vector, entry.rflags & TF)).collect();
    assert_eq!(log, [(14, 0), (vector::MESSAGE.into(), 0)]);
}

/// Told once for each way to it: the return from a handler is none, a new round is one.
fn l42_a_breakpoint_that_faults_and_is_left_for_good_is_told_again() {
    let mut rig = Rig::one("fault_pf_loop");
    let bp = Breakpoint::exec(at("f_pf_loop"));
    rig.set(bp).unwrap();
    is_left_for_good_and_told_again(rig, bp);
}

/// With `bp` at the first instruction of `fault_pf_loop`, by whatever serves it.
pub(crate) fn is_left_for_good_and_told_again(mut rig: Rig, bp: Breakpoint) {
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
    // Into the handler, and from there past the instruction.
    assert_eq!(name(rig.step()), name(at("fx_vector_14")));
    let mut registers = rig.registers(0);
    registers.rip = at("f_pf_loop_next");
    // Behind the error code, RIP, CS and RFLAGS.
    registers.rsp = rig.word(registers.rsp + 32);
    rig.coordinator.set_registers(VcpuId(0), &registers).unwrap();
    for hits in 1..5 {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        assert_eq!(rig.field(0, cpu_field::HITS), hits);
    }
}

/// The interrupt comes between two iterations, and the REP is still one crossing.
fn l47_a_long_rep_under_a_breakpoint_lets_interrupts_through() {
    let mut rig = Rig::one("step_rep_irq");
    let bp = Breakpoint::exec(at("s_rep_irq"));
    rig.set(bp).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
    rig.interrupt_guest(0, vector::MESSAGE);
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    let log = rig.log();
    assert_eq!(log.len(), 1, "{log:x?}");
    let (rip, tf) = (name(log[0].rip), log[0].rflags & TF);
    assert_eq!((log[0].vector, rip, tf), (vector::MESSAGE.into(), name(at("s_rep_irq")), 0));
}

/// One step may cover both instructions.
fn l45_a_stepped_pushf_behind_mov_ss_stores_no_trap_flag() {
    let mut rig = Rig::one("step_movss_pushf");
    rig.run_to("s_movss_pushf");
    if rig.step() == at("s_movss_pushf_next") {
        rig.step();
    }
    assert_eq!(name(rig.pc(0)), name(at("s_movss_pushf_next2")));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(rig.word(fixture::saved_address(0).unwrap()) & TF, 0);
}

/// After each number of steps the guest is let go, and nothing of ours is left in it.
fn l45_a_step_leaves_no_trap_flag_to_what_comes_later() {
    for steps in 0..12 {
        let mut rig = Rig::one("fault_pf");
        rig.run_to("f_pf");
        for _ in 0..steps {
            rig.step();
        }
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0), "after {steps} steps");
        let log = rig.log();
        assert_eq!((log.len(), log[0].rflags & TF), (1, 0), "after {steps} steps: {log:x?}");
    }
}

/// What the guest logged and saved, when it runs by itself.
fn alone(begin: Begin) -> (Vec<LogEntry>, Vec<u64>) {
    let mut rig = Rig::new(&[begin]);
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    left_behind(&rig)
}

fn left_behind(rig: &Rig) -> (Vec<LogEntry>, Vec<u64>) {
    let saved = (0..16).map(|n| rig.word(fixture::saved_address(n).unwrap())).collect();
    (rig.log(), saved)
}

/// Steps to the end, every instruction of every handler as well: the guest sees what it sees alone.
fn all_of_it_stepped(begin: Begin, what: &str) {
    let mut rig = Rig::new(&[begin]);
    let (mut steps, mut from) = (0, rig.pc(0));
    let rep = [at("s_rep")];
    loop {
        match rig.run_first(RunMode::Step) {
            StopReason::Step => {
                let pc = rig.pc(0);
                assert!(pc != from || rep.contains(&pc), "{what}, after {steps} steps: no progress at {}", name(pc));
                (steps, from) = (steps + 1, pc);
            }
            StopReason::GuestExit(0) => break,
            other => panic!("{what}, after {steps} steps: {other:?} at {}", name(rig.pc(0))),
        }
        assert!(steps < 5000, "{what} does not end");
    }
    assert!(steps > 5, "{what}: {steps} steps");
    assert_eq!(left_behind(&rig), alone(begin), "{what}, stepped and alone");
}

fn l45_a_guest_cannot_tell_that_it_is_stepped() {
    let properties = [
        "step",
        "step_iret",
        "step_sti",
        "step_movss_pushf",
        "step_popf_tf",
        "fault_de",
        "fault_gp",
        "fault_gp_selector",
        "fault_ud",
        "fault_pf",
        "fault_pf_write",
        "own_tf",
        "step_int",
        "int3",
        "int3_long",
        "int1",
        "bp_line",
        "loop5",
    ];
    for property in properties {
        all_of_it_stepped(Begin::Ring0(property), property);
    }
}

fn l45_a_guest_in_ring_3_cannot_tell_that_it_is_stepped() {
    for property in ["ring3_line", "ring3_fault", "ring3_tf"] {
        all_of_it_stepped(Begin::Ring0(property), property);
    }
}

/// The debugger sees the guest's TF; the guest gets the #DB that it asked for, and no other.
fn l46_popf_that_sets_tf_under_a_step() {
    let mut rig = Rig::one("step_popf_tf");
    rig.run_to("s_popf_tf");
    assert_eq!(name(rig.step()), name(at("s_popf_tf_next")));
    assert_eq!(rig.registers(0).rflags & TF, TF);
    assert_eq!(name(rig.step()), name(at("s_popf_tf_next2")));
    assert_eq!((rig.registers(0).rflags & TF, rig.log()), (TF, vec![]));
    // What is owed for the first comes now, before the second.
    assert_eq!(name(rig.step()), name(at("fx_vector_1")));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(left_behind(&rig), alone(Begin::Ring0("step_popf_tf")));
}

/// So many steps, then on without us.
fn l46_a_guest_that_steps_itself_may_be_stepped_anywhere() {
    let undisturbed = alone(Begin::Ring0("own_tf"));
    assert_eq!(undisturbed.0.len(), 5);
    for steps in 0..45 {
        let mut rig = Rig::one("own_tf");
        for _ in 0..steps {
            rig.step();
        }
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0), "after {steps} steps");
        assert_eq!(left_behind(&rig), undisturbed, "after {steps} steps");
    }
}

fn l46_a_breakpoint_where_the_guest_steps_itself() {
    let undisturbed = alone(Begin::Ring0("own_tf"));
    for label in ["tf1", "tf2", "tf3", "tf4"] {
        let mut rig = Rig::one("own_tf");
        let bp = Breakpoint::exec(at(label));
        rig.set(bp).unwrap();
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
        assert_eq!(left_behind(&rig), undisturbed, "with a breakpoint at {label}");
    }
}

fn l46_in_ring_3_the_guests_own_trap_flag_survives() {
    let begin = Begin::Ring3("ring3_tf");
    let undisturbed = alone(begin);
    for steps in 0..20 {
        let mut rig = Rig::new(&[begin]);
        for _ in 0..steps {
            rig.step();
        }
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0), "after {steps} steps");
        assert_eq!(left_behind(&rig), undisturbed, "after {steps} steps");
    }
}

/// The step borrows a slot of a breakpoint that it cannot reach, and gives it back.
fn l49_a_step_lands_on_the_handler_with_all_slots_taken() {
    for (property, label, vector) in [("fault_pf", "f_pf", 14), ("fault_ud", "f_ud", 6)] {
        let mut rig = Rig::one(property);
        rig.run_to(label);
        for elsewhere in ["bp1", "bp2", "bp3", "bp4"] {
            rig.set(Breakpoint::exec(at(elsewhere))).unwrap();
        }
        assert_eq!(name(rig.step()), name(at(&format!("fx_vector_{vector}"))));
        assert_eq!(rig.spies[0].armed(), rig.published());
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    }
}

fn l49_a_step_lands_on_the_handler_with_all_slots_watching() {
    let mut rig = Rig::one("fault_ud");
    rig.run_to("f_ud");
    for n in 0..4 {
        rig.set(Breakpoint::watch(fixture::WATCH + 8 * n, 8, Trigger::Write)).unwrap();
    }
    assert_eq!(name(rig.step()), name(at("fx_vector_6")));
    assert_eq!(rig.spies[0].armed(), rig.published());
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
}

fn l49_a_breakpoint_on_the_handler_is_told() {
    let mut rig = Rig::one("fault_pf");
    rig.run_to("f_pf");
    let bp = Breakpoint::exec(at("fx_vector_14"));
    rig.set(bp).unwrap();
    assert_eq!(rig.run_first(RunMode::Step), StopReason::Breakpoint(bp));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    let log = rig.log();
    assert_eq!((log.len(), log[0].rflags & TF), (1, 0), "{log:x?}");
}

fn l49_step_over_iret_into_ring_3_lands_there() {
    let mut rig = Rig::one("ring3_line");
    rig.run_to("ring3_line_iret");
    step_to(&mut rig, "u_ring3_line");
    let registers = rig.registers(0);
    assert_eq!((registers.cpl(), registers.cs.selector & 3), (3, 3));
    assert_eq!(name(rig.step()), name(at("u_bp1")));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    rig.assert_guest_undisturbed();
}

fn l49_step_over_sysret_lands_in_ring_3() {
    let mut rig = Rig::one("step_sysret");
    rig.run_to("s_sysret");
    assert_eq!(name(rig.step()), name(at("u_sysret_to")));
    assert_eq!(rig.registers(0).cpl(), 3);
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    rig.assert_guest_undisturbed();
}

fn l49_step_over_syscall_lands_at_the_kernels_entry() {
    let mut rig = Rig::new(&[Begin::Ring3("ring3_syscall")]);
    step_to(&mut rig, "u_syscall");
    assert_eq!(name(rig.step()), name(at("fx_syscall")));
    let registers = rig.registers(0);
    assert_eq!((registers.cpl(), registers.r11 & TF), (0, 0));
    step_to(&mut rig, "fx_sysret");
    assert_eq!(name(rig.step()), name(at("u_syscall_next")));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(rig.field(0, cpu_field::R11) & TF, 0);
    rig.assert_guest_undisturbed();
}

fn l49_step_over_a_fault_in_ring_3_lands_on_the_handler() {
    let mut rig = Rig::one("ring3_fault");
    rig.run_to("ring3_fault_iret");
    step_to(&mut rig, "u_fault");
    assert_eq!(name(rig.step()), name(at("fx_vector_14")));
    assert_eq!(rig.registers(0).cpl(), 0);
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    let log = rig.log();
    assert_eq!((log[0].vector, name(log[0].rip), log[0].rflags & TF), (14, name(at("u_fault")), 0));
    rig.assert_guest_undisturbed();
}

fn l49_step_over_int3_in_ring_3_lands_on_the_handler() {
    let mut rig = Rig::new(&[Begin::Ring3("ring3_int3")]);
    step_to(&mut rig, "u_int3");
    assert_eq!(name(rig.step()), name(at("fx_vector_3")));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    let log = rig.log();
    assert_eq!((log[0].vector, name(log[0].rip), log[0].rflags & TF), (3, name(at("u_int3_next")), 0));
}

/// Never a #DB of ours in the guest: whoever cannot step says so.
fn l49_a_step_in_ring_3_is_made_or_refused() {
    let mut rig = Rig::new(&[Begin::Ring3("ring3_sse")]);
    let mut refused = false;
    while rig.pc(0) != at("u_sse_next") && !refused {
        let from = rig.pc(0);
        match rig.run_first(RunMode::Step) {
            StopReason::Step => assert_ne!(name(rig.pc(0)), name(from)),
            StopReason::CannotStep(why) => {
                assert!(why.contains("KVM"), "{why}");
                assert_eq!(rig.pc(0), from);
                refused = true;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(refused, flavour() == Some(Pvm));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    rig.assert_guest_undisturbed();
}

/// Its interrupt is handled first, all of it, and then one instruction is stepped.
fn l52_a_step_of_a_sleeping_vcpu_waits_for_its_interrupt() {
    let mut rig = Rig::one("hlt_wait");
    rig.run_to("hlt_wait_hlt");
    assert_eq!(name(rig.step()), name(at("hlt_wait_woken")));
    assert_eq!(rig.coordinator.activity(VcpuId(0)).unwrap(), Activity::Halted);
    rig.interrupt_guest(0, vector::MESSAGE);
    assert_eq!(name(rig.step()), name(at("hlt_wait_woken") + 1));
    let log = rig.log();
    assert_eq!(log.len(), 1, "{log:x?}");
    let (rip, tf) = (name(log[0].rip), log[0].rflags & TF);
    assert_eq!((log[0].vector, rip, tf), (vector::MESSAGE.into(), name(at("hlt_wait_woken")), 0));
    rig.assert_guest_undisturbed();
}
