//! Laws 69 and 70, as far as they hold without snapshots: what is read of a guest is the guest's
//! own, whatever is armed, and a guest that is put back hits again as at first.

use trapline_vmm::debug::{Breakpoint, Owner, RunMode, StopReason, Trigger, VcpuId};
use trapline_vmm::limits::MIB;
use trapline_vmm::vcpu::Registers;

use crate::booted::Booted;
use crate::lane::Need;
use crate::lane::Need::Kick;
use crate::law::{Law, law};
use crate::rig::{Rig, at};

pub(crate) fn laws() -> Vec<Law> {
    vec![
        law!(l69_what_is_read_of_a_guest_is_its_own, Kick),
        law!(l69_and_in_the_middle_of_a_step),
        law!(l70_put_back_a_thousand_times_it_hits_once_each),
    ]
}

/// All registers, the guest's debug registers among them, and all memory.
fn truth(demo: &mut Booted) -> (Vec<Registers>, Vec<u8>) {
    let registers = (0..demo.cpus()).map(|cpu| demo.registers(cpu)).collect();
    let mut memory = vec![0; 64 * MIB as usize];
    let got = demo.vm.read_physical(0, &mut memory);
    assert_eq!(got, memory.len());
    (registers, memory)
}

fn l69_what_is_read_of_a_guest_is_its_own() {
    let mut demo = Booted::counting_demo(2, None);
    let (registers, memory) = truth(&mut demo);
    let same = |demo: &mut Booted, armed: &str| {
        let now = truth(demo);
        assert_eq!(now.0, registers, "{armed}");
        assert!(now.1 == memory, "memory differs, {armed}");
    };
    let traced = demo.at("count_up_traced");
    for n in 0..4 {
        demo.set(Breakpoint::exec(traced + n));
    }
    same(&mut demo, "four slots armed");
    if Need::Patches.missing().is_none() {
        demo.set(Breakpoint::exec(demo.at("count_up_here")));
        same(&mut demo, "and a patch");
    }
    // By a slot or by a page, if there is either.
    demo.clear(Breakpoint::exec(traced + 3));
    let watch = Breakpoint::watch(demo.at("debug_exceptions_seen"), 8, Trigger::Write);
    let watched = demo.vm.set_breakpoint(Owner::GDB, watch).is_ok();
    same(&mut demo, if watched { "and a watchpoint" } else { "and no watchpoint" });
}

/// KVM hides TF while it steps, and drops it afterwards.
fn l69_and_in_the_middle_of_a_step() {
    let mut rig = Rig::one("own_tf");
    // Until the guest steps itself.
    while rig.registers(0).rflags & (1 << 8) == 0 {
        rig.step();
    }
    let registers = rig.registers(0);
    rig.set(Breakpoint::exec(registers.pc())).unwrap();
    assert_eq!(rig.registers(0), registers);
    rig.clear(Breakpoint::exec(registers.pc())).unwrap();
    // Written back, it is what was read.
    rig.coordinator.set_registers(VcpuId(0), &registers).unwrap();
    assert_eq!(rig.registers(0), registers);
}

fn l70_put_back_a_thousand_times_it_hits_once_each() {
    let mut rig = Rig::one("loop5");
    let begin = rig.registers(0);
    let [bp, after] = ["loop5_bp3", "loop5_after"].map(|label| Breakpoint::exec(at(label)));
    rig.set(bp).unwrap();
    for round in 0..1000 {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp), "round {round}");
        assert_eq!(rig.registers(0).r8, 1, "round {round}");
        match round % 3 {
            // From where it was told, from a step that led off, and from the end.
            0 => {}
            1 => assert_eq!(rig.step(), at("loop5_bp")),
            _ => {
                rig.clear(bp).unwrap();
                rig.set(after).unwrap();
                assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(after));
                rig.clear(after).unwrap();
                rig.set(bp).unwrap();
            }
        }
        rig.coordinator.set_registers(VcpuId(0), &begin).unwrap();
    }
    rig.assert_guest_undisturbed();
}
