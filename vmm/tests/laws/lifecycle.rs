//! Laws 67 to 73 as far as they are built, and what a stopped guest shows: registers, memory, its end.

use trapline_guests::{demo, fixture};
use trapline_vmm::boot::ApStart;
use trapline_vmm::debug::{Breakpoint, Crash, Ending, Level, RunMode, Stop, StopReason, VcpuId};
use trapline_vmm::vcpu::{Arming, DescriptorTable, Fpu, Registers, Segment};

use crate::booted::{Booted, ap_start};
use crate::clock::wait_for;
use crate::lane::Need::{Kick, RealModeSlots};
use crate::law::{Law, law};
use crate::rig::{Begin, Rig, at, hit, name};

/// Where the guests put the code that an AP begins with (guest-images/common/layout.h).
const TRAMPOLINE: u64 = 0x8000;

pub(crate) fn laws() -> Vec<Law> {
    vec![
        law!(l68_an_ap_stops_at_its_first_instruction_in_real_mode, Kick, RealModeSlots),
        law!(l68_an_ap_that_is_armed_stops_where_the_guest_sends_it, Kick),
        law!(l71_release_leaves_nothing_armed, Kick),
        law!(l71_release_in_the_middle_of_a_step_leaves_nothing_behind, Kick),
        law!(l72_a_triple_fault_stops_all_and_can_be_looked_at, Kick),
        law!(l73_an_emulation_failure_stops_all_and_can_be_looked_at, Kick),
        law!(a_guest_that_exits_can_be_looked_at_and_then_ends),
        law!(a_killed_guest_runs_nothing_more, Kick),
        law!(every_register_survives_the_round_trip),
        law!(registers_that_cannot_be_change_nothing),
        law!(memory_is_read_through_the_guests_own_page_tables),
    ]
}

/// Armed before INIT and SIPI (law 68), by linear address: RIP is 0 there.
fn l68_an_ap_stops_at_its_first_instruction_in_real_mode() {
    let mut guest = Booted::fixture(2, "hotmem", ApStart::Sipi);
    let bp = Breakpoint::exec(TRAMPOLINE);
    guest.set(bp);
    assert_eq!(guest.run_all(), hit(1, bp));
    let registers = guest.registers(1);
    assert_eq!((registers.pc(), registers.rip, registers.cs.base), (TRAMPOLINE, 0, TRAMPOLINE));
    assert_eq!(registers.cr0 & 1, 0, "not in real mode");
    // It is stepped all the way up to long mode.
    let step = guest.only(1, RunMode::Step);
    let mut steps = 0;
    while guest.registers(1).efer & 1 << 10 == 0 {
        assert_eq!(guest.run(&step), Stop::new(VcpuId(1), StopReason::Step));
        steps += 1;
        assert!(steps < 1000, "at {:#x}", guest.registers(1).pc());
    }
    guest.clear(bp);
    guest.go();
    both_count(&mut guest);
}

fn l68_an_ap_that_is_armed_stops_where_the_guest_sends_it() {
    let mut guest = Booted::fixture(2, "hotmem", ap_start());
    let bp = Breakpoint::exec(guest.at("ap_start"));
    guest.set(bp);
    assert_eq!(guest.run_all(), hit(1, bp));
    assert_eq!(guest.registers(1).pc(), bp.addr);
    guest.go();
    both_count(&mut guest);
}

/// The guest goes on to its end, or what is its end: both CPUs count in memory.
fn both_count(guest: &mut Booted) {
    let hits = |guest: &Booted, cpu| guest.word(fixture::cpu_address(cpu, fixture::cpu_field::HITS).unwrap());
    wait_for("both to count", || {
        assert_eq!(guest.vm.poll().unwrap(), None);
        (hits(guest, 0) > 100 && hits(guest, 1) > 100).then_some(())
    });
    assert_eq!(guest.word(fixture::log_count_address().unwrap()), 0, "the guest took an exception");
}

fn l71_release_leaves_nothing_armed() {
    let mut demo = Booted::counting_demo(4, None);
    let labels = ["count_up_here", "count_up", "count_a_round", "count_up_traced_here"];
    for round in 0..10 {
        for label in labels {
            let bp = Breakpoint::exec(demo.at(label));
            demo.set(bp);
        }
        for _ in 0..round {
            assert!(matches!(demo.run_all().reason, StopReason::Breakpoint(_)));
        }
        if round % 3 == 0 {
            // With hits on their way that nobody was told of.
            let plan = demo.plan(RunMode::Continue);
            demo.vm.resume(&plan).unwrap();
        }
        demo.vm.release(Level::Gdb).unwrap();
        assert_eq!(demo.vm.breakpoints(), []);
        goes_on(&mut demo);
        assert_eq!(demo.vm.stop().unwrap().reason, StopReason::Interrupted);
    }
}

fn l71_release_in_the_middle_of_a_step_leaves_nothing_behind() {
    let mut demo = Booted::counting_demo(4, None);
    for round in 0..30 {
        // Every vCPU in a step, or one of them while it steps off a breakpoint.
        let bp = Breakpoint::exec(demo.at("count_up_here"));
        demo.set(bp);
        if round % 2 == 0 {
            demo.run_all();
        }
        let plan = demo.plan(RunMode::Step);
        demo.vm.resume(&plan).unwrap();
        demo.vm.release(Level::Gdb).unwrap();
        goes_on(&mut demo);
        assert_eq!(demo.vm.stop().unwrap().reason, StopReason::Interrupted);
    }
    // The same where it can be seen what KVM was told: a sleeping vCPU's step does not end by itself.
    let mut rig = Rig::new(&[Begin::Ring0("hlt_wait"), Begin::Ring0("hotmem")]);
    assert_eq!(rig.go(), None);
    rig.interrupt();
    rig.set(Breakpoint::exec(at("hotmem_bp"))).unwrap();
    let step = rig.only(0, RunMode::Step);
    assert_eq!(rig.coordinator.resume(&step).unwrap(), None);
    rig.coordinator.release(Level::Gdb).unwrap();
    wait_for("all to be disarmed", || rig.spies.iter().all(|spy| spy.armed() == Arming::OFF).then_some(()));
}

/// All CPUs of the demo count, none stops, and the guest has seen no debug exception.
fn goes_on(demo: &mut Booted) {
    let before = demo.counts();
    wait_for("all CPUs to count on", || {
        assert_eq!(demo.vm.poll().unwrap(), None, "a stop that nobody asked for");
        demo.counts().iter().zip(&before).all(|(now, then)| *now > then + 20).then_some(())
    });
    assert_eq!(demo.guest_debug_exceptions(), 0);
}

fn l72_a_triple_fault_stops_all_and_can_be_looked_at() {
    let mut rig = Rig::new(&[Begin::Ring0("hotmem"), Begin::Ring0("triple")]);
    let stop = rig.run_all();
    let StopReason::Crash(Crash::TripleFault { state_lost }) = stop.reason else { panic!("{stop:?}") };
    assert_eq!(stop.vcpu, VcpuId(1));
    let registers = rig.registers(1);
    if state_lost {
        assert_eq!((registers.rip, registers.cs.base), (0xfff0, 0xffff_0000), "said to be lost, and are not");
    } else {
        assert_eq!((name(registers.pc()), registers.r8), (name(at("triple_ud")), 0x1122_3344_5566_7788));
    }
    let pc = rig.pc(0);
    assert!((at("hotmem_bp")..=at("hotmem_bp3")).contains(&pc), "{}", name(pc));
    let ending = Ending::Crash(Crash::TripleFault { state_lost });
    assert_eq!(rig.go().map(|stop| stop.reason), Some(StopReason::Ended(ending)));
}

fn l73_an_emulation_failure_stops_all_and_can_be_looked_at() {
    let mut guest = Booted::act(2, "fetch-hole");
    let stop = guest.run_all();
    let StopReason::Crash(Crash::EmulationFailure { bytes }) = &stop.reason else { panic!("{stop:?}") };
    assert_eq!((stop.vcpu, bytes.as_slice()), (VcpuId(0), [].as_slice()));
    let registers = guest.registers(0);
    assert_eq!(registers.pc() >> 28, 0xd, "{:#x}: not in the PCI hole", registers.pc());
    // The call that led there is on the stack.
    let mut from = [0; 8];
    assert_eq!(guest.vm.read_memory(VcpuId(0), registers.rsp, &mut from).unwrap(), 8);
    assert!(guest.vm.entry().kernel.contains(&u64::from_le_bytes(from)), "{from:x?}");
    guest.registers(1);
    assert!(matches!(guest.run_all().reason, StopReason::Ended(Ending::Crash(_))));
}

fn a_guest_that_exits_can_be_looked_at_and_then_ends() {
    let mut rig = Rig::one("loop5");
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(rig.registers(0).r8, 5);
    assert_eq!(rig.coordinator.ended(), None);
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Ended(Ending::Exit(0)));
    assert_eq!(rig.coordinator.ended(), Some(&Ending::Exit(0)));
    let plan = rig.plan(RunMode::Continue);
    rig.coordinator.resume(&plan).unwrap_err();
    rig.coordinator.registers(VcpuId(0)).unwrap_err();
}

fn a_killed_guest_runs_nothing_more() {
    let mut demo = Booted::counting_demo(3, None);
    let bp = Breakpoint::exec(demo.at("count_up_here"));
    demo.set(bp);
    demo.go();
    demo.vm.kill();
    assert_eq!(demo.vm.ended(), Some(&Ending::Killed));
    // Its threads have ended, so there is nothing to wait for.
    assert_eq!(demo.counts(), demo.counts());
    assert_eq!(demo.vm.stop().unwrap().reason, StopReason::Ended(Ending::Killed));
    assert!(demo.console().contains("started by"), "{}", demo.console());
    assert_eq!(demo.guest_debug_exceptions(), 0);
    assert_eq!(demo::count_address(64), None);
}

/// Every field of [`Registers`], each with a value of its own that the processor can hold.
fn every_register_survives_the_round_trip() {
    let mut rig = Rig::one("hotmem");
    let before = rig.registers(0);
    let segment = |n: u64, attributes: u32| Segment {
        selector: 0x10 * n as u16,
        base: 0x1000_0000 * n,
        limit: 0xff_0fff + 0x1000 * n as u32,
        attributes,
    };
    let wanted = Registers {
        rax: 0x0101_0000_0000_0001,
        rbx: 0x0202_0000_0000_0002,
        rcx: 0x0303_0000_0000_0003,
        rdx: 0x0404_0000_0000_0004,
        rsi: 0x0505_0000_0000_0005,
        rdi: 0x0606_0000_0000_0006,
        rbp: 0x0707_0000_0000_0007,
        rsp: 0x0000_7fff_0000_0008,
        r8: 0x0808_0000_0000_0009,
        r9: 0x0909_0000_0000_000a,
        r10: 0x0a0a_0000_0000_000b,
        r11: 0x0b0b_0000_0000_000c,
        r12: 0x0c0c_0000_0000_000d,
        r13: 0x0d0d_0000_0000_000e,
        r14: 0x0e0e_0000_0000_000f,
        r15: 0x0f0f_0000_0000_0010,
        rip: at("hotmem_bp3"),
        // CF, PF, AF, ZF, SF, DF, OF, AC, ID, and the one that is always set.
        rflags: 0x24_0cd7,
        cs: Segment { selector: 0x08, base: 0, limit: u32::MAX, attributes: 0xa09b },
        ss: segment(2, 0xc093),
        ds: segment(3, 0xc093),
        es: segment(4, 0xc091),
        fs: segment(5, 0xc0f3),
        gs: segment(6, 0xd093),
        tr: Segment { limit: 0x1067, ..segment(7, 0x008b) },
        ldtr: Segment { limit: 0x1fff, ..segment(8, 0x0082) },
        gdtr: DescriptorTable { base: 0x9_0000_0000, limit: 0x1234 },
        idtr: DescriptorTable { base: 0xa_0000_0000, limit: 0x0567 },
        cr0: before.cr0 ^ (1 << 18 | 1 << 3),
        cr2: 0xffff_8000_0000_0b0b,
        cr3: 0x18_9000,
        cr4: before.cr4 ^ (1 << 7 | 1 << 2),
        cr8: 5,
        efer: before.efer ^ 1,
        apic_base: before.apic_base,
        kernel_gs_base: 0xffff_8000_0000_0c0c,
        star: 0x001b_0008_0000_0d0d,
        lstar: 0xffff_8000_0000_0e0e,
        fmask: 0x0000_0000_0004_0f00,
        dr: [0x1111_0000, 0x2222_0000, 0x3333_0000, 0xffff_8000_4444_0000],
        dr6: 0xffff_4ff5,
        dr7: 0x00d1_0702,
        fpu: Fpu {
            st: std::array::from_fn(|n| std::array::from_fn(|byte| (16 * n + byte) as u8)),
            fcw: 0x027f,
            fsw: 0x3801,
            ftwx: 0x5a,
            fop: 0x0123,
            fip: 0x4567_89ab,
            fdp: 0xcdef_0123,
            xmm: std::array::from_fn(|n| 0x0011_2233_4455_6677_8899_aabb_ccdd_ee00 + n as u128),
            mxcsr: 0x1fa0,
        },
    };
    rig.coordinator.set_registers(VcpuId(0), &wanted).unwrap();
    assert_eq!(differences(&rig.registers(0), &wanted), [""; 0]);
    // And back, which also says that nothing was stuck.
    rig.coordinator.set_registers(VcpuId(0), &before).unwrap();
    assert_eq!(differences(&rig.registers(0), &before), [""; 0]);
    // It still runs.
    let bp = Breakpoint::exec(at("hotmem_bp2"));
    rig.set(bp).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
}

/// The fields that differ, each as it is and as it should be.
fn differences(found: &Registers, expected: &Registers) -> Vec<String> {
    let (found, expected) = (format!("{found:#x?}"), format!("{expected:#x?}"));
    let pairs = found.lines().zip(expected.lines()).filter(|(found, expected)| found != expected);
    pairs.map(|(found, expected)| format!("{} not {}", found.trim(), expected.trim())).collect()
}

fn registers_that_cannot_be_change_nothing() {
    let mut rig = Rig::one("hotmem");
    let before = rig.registers(0);
    let changed = Registers { rax: 77, rip: at("hotmem_bp2"), cr2: 99, ..before };
    for wrong in [
        // DR7 and DR6 have 32 bits; long mode without paging does not exist.
        Registers { dr7: 1 << 40, ..changed },
        Registers { dr6: 1 << 40, ..changed },
        Registers { cr4: changed.cr4 & !(1 << 5), ..changed },
    ] {
        rig.coordinator.set_registers(VcpuId(0), &wrong).unwrap_err();
        assert_eq!(rig.registers(0), before);
    }
}

fn memory_is_read_through_the_guests_own_page_tables() {
    let mut guest = Booted::fixture(1, "remap", ap_start());
    let vcpu = VcpuId(0);
    let bp = Breakpoint::exec(guest.at("remap_call_b"));
    guest.set(bp);
    assert_eq!(guest.run_all().reason, StopReason::Breakpoint(bp));
    let read = |guest: &mut Booted, addr: u64, len: usize| {
        let mut bytes = vec![0xa5; len];
        let got = guest.vm.read_memory(vcpu, addr, &mut bytes).unwrap();
        assert!(bytes[got..].iter().all(|byte| *byte == 0xa5), "more was written than was said");
        bytes.truncate(got);
        bytes
    };
    // The same code directly, by 4 KiB pages elsewhere, and by one page of 1 GiB.
    let code = at("fx_hotmem");
    let mut physical = [0; 64];
    assert_eq!(guest.vm.read_physical(code, &mut physical), 64);
    assert_ne!(physical, [0; 64]);
    for window in [0, fixture::ALIAS, fixture::HUGE_ALIAS] {
        assert_eq!(read(&mut guest, window + code, 64), physical, "at {window:#x}");
    }
    // The guest has just led this page to the second of two.
    let [a, b] = [fixture::REMAP_A, fixture::REMAP_B].map(|page| read(&mut guest, page, 12));
    assert_ne!(a, b);
    assert_eq!(read(&mut guest, fixture::REMAP, 12), b);
    // Up to what is not there: a page that is not present, the end of a window, no RAM behind a mapping.
    assert_eq!(read(&mut guest, fixture::HOLE - 16, 64).len(), 16);
    assert_eq!(read(&mut guest, fixture::ALIAS + fixture::MEMORY - 8, 64).len(), 8);
    for nothing in [fixture::HOLE, fixture::MMIO, 0x2_0000_0000, 0x8000_0000_0000_0000, u64::MAX - 3] {
        assert_eq!(read(&mut guest, nothing, 8), [0u8; 0], "at {nothing:#x}");
    }
    // Written through one window, seen through the others; over the edge nothing is written at all.
    assert!(guest.vm.write_memory(vcpu, fixture::ALIAS + fixture::SOURCE, b"trapline").unwrap());
    assert_eq!(read(&mut guest, fixture::SOURCE, 8), b"trapline");
    let edge = read(&mut guest, fixture::HOLE - 4, 4);
    assert!(!guest.vm.write_memory(vcpu, fixture::HOLE - 4, &[0x5a; 8]).unwrap());
    assert_eq!(read(&mut guest, fixture::HOLE - 4, 4), edge);
}
