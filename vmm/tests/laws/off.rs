//! Laws 37 to 39: off a breakpoint, with its slot disarmed and one step, on that vCPU alone.

use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug};
use kvm_ioctls::VcpuExit;
use trapline_guests::fixture::cpu_field;
use trapline_vmm::debug::{Breakpoint, RunMode, StopReason, VcpuId};

use crate::lane::Need::Kick;
use crate::law::{Law, law};
use crate::rig::{Begin, Rig, at, bare_machine, hit, name, vcpu};

pub(crate) fn laws() -> Vec<Law> {
    vec![
        law!(l37_a_loop_of_five_is_five_hits),
        law!(l38_who_goes_on_with_the_slot_armed_gets_nowhere),
        law!(l39_the_others_hit_while_one_stands_on_the_breakpoint, Kick),
    ]
}

fn l37_a_loop_of_five_is_five_hits() {
    for label in ["loop5_bp", "loop5_bp2", "loop5_bp3"] {
        let mut rig = Rig::one("loop5");
        let bp = Breakpoint::exec(at(label));
        rig.set(bp).unwrap();
        for round in 0..5 {
            assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp), "{label}");
            let done = if label == "loop5_bp" { round } else { round + 1 };
            assert_eq!((name(rig.pc(0)), rig.registers(0).r8), (name(bp.addr), done), "{label}");
        }
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0), "{label}");
        assert_eq!(rig.registers(0).r8, 5);
        rig.assert_guest_undisturbed();
    }
}

/// This is KVM's doing and not ours: what the step off is for.
fn l38_who_goes_on_with_the_slot_armed_gets_nowhere() {
    let (vm, _ram) = bare_machine();
    let mut fd = vcpu(&vm, 0, 1, Begin::Ring0("loop5"));
    let mut debug = kvm_guest_debug { control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, ..Default::default() };
    debug.arch.debugreg[0] = at("loop5_bp");
    debug.arch.debugreg[7] = 0x402;
    fd.set_guest_debug(&debug).unwrap();
    for _ in 0..40 {
        match fd.run().unwrap() {
            VcpuExit::Debug(exit) => assert_eq!((name(exit.pc), exit.exception), (name(at("loop5_bp")), 1)),
            other => panic!("{other:?}"),
        }
        assert_eq!(fd.get_regs().unwrap().r8, 0, "it has got off by itself");
    }
}

fn l39_the_others_hit_while_one_stands_on_the_breakpoint() {
    let mut rig = Rig::all(2, "hotmem");
    let bp = Breakpoint::exec(at("hotmem_bp"));
    rig.set(bp).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
    // vCPU 0 has been told, and is in the middle of getting off: the other one's slot is its own.
    for hits in 0..20 {
        let plan = rig.only(1, RunMode::Continue);
        assert_eq!(rig.run(&plan), hit(1, bp));
        assert_eq!(rig.field(1, cpu_field::HITS), hits);
    }
    assert_eq!(rig.field(0, cpu_field::HITS), 0);
    // And it gets off without another word about this crossing.
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
    assert_eq!(rig.field(0, cpu_field::HITS), 1);
    assert_eq!(rig.coordinator.registers(VcpuId(1)).unwrap().pc(), bp.addr);
    rig.assert_guest_undisturbed();
}
