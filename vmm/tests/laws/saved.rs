//! Laws 69 and 70 for a whole machine: saved, and made again elsewhere.

use trapline_guests::fixture::cpu_field::{HITS, TIMER, WAKEUPS};
use trapline_guests::fixture::{self, LogEntry};
use trapline_vmm::VmError;
use trapline_vmm::boot::ApStart;
use trapline_vmm::debug::{Breakpoint, Crash, Dr6, Ending, Owner, RunMode, Stop, StopReason, Trigger, VcpuId};
use trapline_vmm::state::{
    ActivityState, Blob, CpuidLeaf, ExceptionState, MachineState, ReasonState, RestoreError, Word,
};
use trapline_vmm::vcpu::{Activity, Registers};

use crate::booted::{Booted, Saved, ap_start};
use crate::clock::wait_for;
use crate::lane::Need::{self, Kick};
use crate::law::{Law, law};
use crate::rig::hit;

pub(crate) fn laws() -> Vec<Law> {
    vec![
        law!(l69_a_saved_machine_is_the_same_elsewhere, Kick),
        law!(l69_and_goes_on_to_the_same_end, Kick),
        law!(l69_nothing_armed_is_saved, Kick),
        law!(l69_its_timers_go_on, Kick),
        law!(l69_who_sleeps_sleeps_and_is_woken, Kick),
        law!(l69_an_ap_that_was_not_started_is_started, Kick),
        law!(l69_its_debug_registers_go_on),
        law!(l69_what_was_on_its_way_arrives),
        law!(l69_what_nobody_was_told_of_is_told),
        law!(l69_where_it_crashed_it_crashes_again, Kick),
        law!(l69_what_this_host_cannot_be_is_said),
        law!(l70_a_restored_machine_is_debugged_as_any_other, Kick),
    ]
}

const MSR_TSC: Word = Word(0x10);
const MSR_TSC_DEADLINE: Word = Word(0x6e0);
const RFLAGS_IF: u64 = 1 << 9;

/// All registers of all vCPUs.
fn registers(guest: &mut Booted) -> Vec<Registers> {
    (0..guest.cpus()).map(|cpu| guest.registers(cpu)).collect()
}

/// A state without what goes on with the time, also while the machine is parked.
fn timeless(mut state: MachineState) -> MachineState {
    const CURRENT_COUNT: usize = 0x390;
    state.chips.clock_ns = 0;
    for vcpu in &mut state.vcpus {
        vcpu.msrs.insert(MSR_TSC, Word(0));
        vcpu.msrs.insert(MSR_TSC_DEADLINE, Word(0));
        let mut lapic = vcpu.lapic.padded::<1024>().unwrap();
        lapic[CURRENT_COUNT..CURRENT_COUNT + 4].fill(0);
        vcpu.lapic = Blob::new(&lapic);
    }
    state
}

fn assert_same(saved: &Saved, again: &mut Booted) {
    let now = again.save();
    assert!(now.memory == saved.memory, "memory differs");
    assert_same_state(&now.state, &saved.state, "restored");
}

/// Says which lines differ.
fn assert_same_state(now: &MachineState, then: &MachineState, what: &str) {
    let [now, then] = [now, then].map(|state| timeless(state.clone()).to_json());
    let lines = now.lines().zip(then.lines()).filter(|(now, then)| now != then);
    let differ: Vec<_> = lines.take(8).map(|(now, then)| format!("{} was {}", now.trim(), then.trim())).collect();
    assert!(now == then, "{what}: {differ:#?}");
}

/// A word of one CPU of the fixture.
fn field(guest: &Booted, cpu: u32, field: u64) -> u64 {
    guest.word(fixture::cpu_address(cpu, field).unwrap())
}

fn log(guest: &Booted) -> Vec<LogEntry> {
    let count = guest.word(fixture::log_count_address().unwrap());
    let entry = |n| {
        let mut bytes = [0; fixture::LOG_SIZE];
        assert_eq!(guest.vm.read_physical(fixture::log_entry_address(n).unwrap(), &mut bytes), bytes.len());
        LogEntry::decode(&bytes)
    };
    (0..count).map(entry).collect()
}

fn l69_a_saved_machine_is_the_same_elsewhere() {
    let mut demo = Booted::counting_demo(2, None);
    let bp = Breakpoint::exec(demo.at("count_up_here"));
    demo.set(bp);
    (0..100).for_each(|_| drop(demo.run_all()));
    let (saved, before) = (demo.save(), registers(&mut demo));
    let mut again = saved.restore();
    assert_eq!(registers(&mut again), before);
    assert_same(&saved, &mut again);
    assert_eq!(again.vm.breakpoints(), []);
    // Both go on, each on its own.
    let counts = demo.counts();
    demo.clear(bp);
    for guest in [&mut demo, &mut again] {
        assert_eq!(guest.counts(), counts);
        guest.go();
        guest.wait_for("all to count", |guest| {
            assert_eq!(guest.vm.poll().unwrap(), None);
            guest.counts().iter().zip(&counts).all(|(now, then)| *now > then + 1000).then_some(())
        });
        guest.vm.stop().unwrap();
        assert_eq!(guest.guest_debug_exceptions(), 0);
    }
}

/// One CPU prints, in the middle of a line when it is saved, and ends the run; the other counts.
fn l69_and_goes_on_to_the_same_end() {
    let mut guest = Booted::act(2, "flood lines=50 exit=7 cpu=1");
    let bp = Breakpoint::exec(guest.at("console_char"));
    guest.set(bp);
    (0..300).for_each(|_| drop(guest.run_all()));
    let (saved, printed) = (guest.save(), guest.console().len());
    guest.clear(bp);
    assert_eq!(guest.run_all().reason, StopReason::GuestExit(7));
    let rest = guest.console().split_off(printed);
    assert!(rest.ends_with("line 50\n") || rest.ends_with("line 50\r\n"), "{rest:?}");
    // Any number of times.
    for _ in 0..2 {
        let mut again = saved.restore();
        let stop = again.run_all();
        assert_eq!((stop.vcpu, stop.reason), (VcpuId(1), StopReason::GuestExit(7)));
        assert_eq!(again.console(), rest);
    }
}

fn l69_nothing_armed_is_saved() {
    let mut demo = Booted::counting_demo(2, None);
    let bare = demo.save();
    let same = |demo: &mut Booted, armed: &str| {
        let now = demo.save();
        assert_same_state(&now.state, &bare.state, armed);
        assert!(now.memory == bare.memory, "memory differs, {armed}");
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
    demo.clear(Breakpoint::exec(traced + 3));
    let watch = Breakpoint::watch(demo.at("debug_exceptions_seen"), 8, Trigger::Write);
    let watched = demo.vm.set_breakpoint(Owner::GDB, watch).is_ok();
    same(&mut demo, if watched { "and a watchpoint" } else { "and no watchpoint" });
    // With all of it armed, what is made again has none of it.
    let saved = demo.save();
    let mut again = saved.restore();
    again.go();
    again.wait_for("all to count", |again| {
        assert_eq!(again.vm.poll().unwrap(), None);
        let counts = again.counts();
        let before = demo.counts();
        counts.iter().zip(before).all(|(now, then)| *now > then + 1000).then_some(())
    });
}

fn l69_its_timers_go_on() {
    let mut guest = Booted::fixture(2, "irqspin_timer", ap_start());
    let ticks = |guest: &Booted| [0, 1].map(|cpu| field(guest, cpu, TIMER));
    let tick_on = |guest: &mut Booted, from: [u64; 2]| {
        guest.go();
        guest.wait_for("both timers", |guest| {
            assert_eq!(guest.vm.poll().unwrap(), None);
            ticks(guest).iter().zip(from).all(|(now, then)| *now > then + 5).then_some(())
        });
        guest.vm.stop().unwrap();
    };
    tick_on(&mut guest, [0, 0]);
    // In the middle of the handler or not, with an interrupt pending or not.
    for _ in 0..5 {
        let before = ticks(&guest);
        let mut again = guest.save().restore();
        assert_eq!(ticks(&again), before);
        tick_on(&mut again, before);
        assert_eq!(log(&again), []);
        guest = again;
    }
}

fn l69_who_sleeps_sleeps_and_is_woken() {
    let mut guest = Booted::fixture(2, "hlt_timer", ap_start());
    guest.go();
    let wakeups = |guest: &Booted| field(guest, 1, WAKEUPS);
    guest.wait_for("wakeups", |guest| (wakeups(guest) > 2).then_some(()));
    guest.wait_for("vCPU 1 to be found asleep", |guest| {
        guest.vm.stop().unwrap();
        let asleep = guest.vm.activity(VcpuId(1)).unwrap() == Activity::Halted;
        if !asleep {
            guest.go();
        }
        asleep.then_some(())
    });
    let (saved, before) = (guest.save(), wakeups(&guest));
    assert_eq!(saved.state.vcpus[1].activity, ActivityState::Halted);
    let mut again = saved.restore();
    assert_eq!(again.vm.activity(VcpuId(1)).unwrap(), Activity::Halted);
    assert_eq!(again.registers(1).pc(), again.at("hlt_timer_woken"));
    again.go();
    wait_for("it to be woken", || (wakeups(&again) > before + 5).then_some(()));
}

fn l69_an_ap_that_was_not_started_is_started() {
    let mut guest = Booted::fixture(2, "hotmem", ApStart::Sipi);
    let bp = Breakpoint::exec(guest.at("guest_main"));
    guest.set(bp);
    assert_eq!(guest.run_all(), hit(0, bp));
    let saved = guest.save();
    assert_eq!(saved.state.vcpus[1].activity, ActivityState::Uninitialized);
    let mut again = saved.restore();
    assert_eq!(again.vm.activity(VcpuId(1)).unwrap(), Activity::WaitForSipi);
    again.go();
    again.wait_for("both to count", |again| {
        assert_eq!(again.vm.poll().unwrap(), None);
        [0, 1].iter().all(|&cpu| field(again, cpu, HITS) > 100).then_some(())
    });
}

/// The guest has armed two breakpoints of its own; ours are elsewhere.
fn l69_its_debug_registers_go_on() {
    let mut guest = Booted::fixture(1, "own_dr6", ap_start());
    let (armed, far) = (Breakpoint::exec(guest.at("da_armed")), Breakpoint::exec(guest.at("step_begin")));
    guest.set(armed);
    assert_eq!(guest.run_all(), hit(0, armed));
    guest.set(far);
    let (first, second) = (guest.at("da_first"), guest.at("da_second"));
    let registers = guest.registers(0);
    assert_eq!(registers.dr[..2], [first, second]);
    let mut again = guest.save().restore();
    assert_eq!(again.registers(0), registers);
    [armed, far].into_iter().for_each(|bp| guest.clear(bp));
    let end = |mut guest: Booted| {
        assert_eq!(guest.run_all().reason, StopReason::GuestExit(0));
        log(&guest).iter().map(|entry| (entry.vector, entry.rip, entry.dr6)).collect::<Vec<_>>()
    };
    let taken = end(again);
    assert_eq!(taken.iter().map(|(vector, rip, _)| (*vector, *rip)).collect::<Vec<_>>(), [(1, first), (1, second)]);
    assert_eq!(taken, end(guest));
}

/// A #DB that the debugger owes, an exception and an NMI on their way: kept, and taken.
fn l69_what_was_on_its_way_arrives() {
    let mut guest = Booted::fixture(1, "loop5", ap_start());
    let bp = Breakpoint::exec(guest.at("loop5_bp"));
    guest.set(bp);
    assert_eq!(guest.run_all(), hit(0, bp));
    let saved = guest.save();
    let arrives = |what: &str, change: &dyn Fn(&mut MachineState), vector, exit| {
        let mut state = saved.state.clone();
        change(&mut state);
        let mut again = saved.try_restore(&state).unwrap();
        assert_same_state(&again.save().state, &state, what);
        let end = again.run_all().reason;
        let log: Vec<_> = log(&again).iter().map(|entry| (entry.vector, entry.rip)).collect();
        assert_eq!((log, end), (vec![(vector, bp.addr)], StopReason::GuestExit(exit)), "{what}");
    };
    arrives("owed", &|state| state.vcpus[0].owed.db = Some(Word(Dr6::BS)), 1, 0);
    arrives("an NMI", &|state| state.vcpus[0].events.nmi_pending = 1, 2, 0);
    let fault = ExceptionState { vector: 13, error_code: Some(0), injected: true, payload: None };
    // The fixture's handlers end the run at what its properties do not expect.
    arrives("an exception", &|state| state.vcpus[0].events.exception = Some(fault), 13, 99);
    // One that the guest lets in: VMX enters with no other (SDM vol. 3, 27.3.1.4).
    let interrupt = |state: &mut MachineState| {
        state.vcpus[0].events.interrupt = Some(0x41);
        state.vcpus[0].general.rflags.0 |= RFLAGS_IF;
    };
    arrives("an interrupt", &interrupt, 0x41, 0);
}

/// A vCPU has ended the run in the same window in which the other was stopped for a breakpoint.
fn l69_what_nobody_was_told_of_is_told() {
    let mut guest = Booted::act(1, "exit exit=5");
    assert_eq!(guest.run_all().reason, StopReason::GuestExit(5));
    let saved = guest.save();
    assert_eq!(saved.state.stops.iter().map(|stop| &stop.reason).collect::<Vec<_>>(), [&ReasonState::Exit(5)]);
    let mut again = saved.restore();
    assert_eq!(again.run_all(), Stop::new(VcpuId(0), StopReason::GuestExit(5)));
    assert_eq!(again.run_all().reason, StopReason::Ended(Ending::Exit(5)));
    assert!(again.vm.save().is_err(), "it is over");
}

fn l69_where_it_crashed_it_crashes_again() {
    let mut guest = Booted::act(2, "triple cpu=1");
    let StopReason::Crash(crash @ Crash::TripleFault { .. }) = guest.run_all().reason else {
        panic!("no triple fault")
    };
    let before = registers(&mut guest);
    let mut again = guest.save().restore();
    assert_eq!(registers(&mut again), before);
    // To who comes and asks, and to who lets it go on.
    let stopped = Stop::new(VcpuId(1), StopReason::Crash(crash.clone()));
    assert_eq!(again.save().restore().vm.stop().unwrap(), stopped);
    assert_eq!(again.run_all(), stopped);
    assert_eq!(registers(&mut again), before, "nothing has run");
    assert_eq!(again.run_all().reason, StopReason::Ended(Ending::Crash(crash)));
}

fn l69_what_this_host_cannot_be_is_said() {
    let mut guest = Booted::act(1, "exit");
    let saved = guest.save();
    let refused = |change: &dyn Fn(&mut MachineState), says: &str| {
        let mut state = saved.state.clone();
        change(&mut state);
        let error = saved.try_restore(&state).err().unwrap_or_else(|| panic!("taken: {says}"));
        let text = error.to_string();
        assert!(text.contains(says) && !text.contains('\n'), "{text}");
    };
    refused(&|state| leaf(state, 0).ebx = Word(u64::from(u32::from_le_bytes(*b"Cent"))), "processor by Cent");
    refused(&|state| state.host.kvm = "kvm_else".to_owned(), "under kvm_else");
    refused(&|state| leaf(state, 7).ecx.0 |= 1 << 15, "lacks CPUID 0x7.0 ECX bit 15, which");
    refused(&|state| state.memory = 3 << 20, "where the machine has no memory");
    refused(&|state| state.memory = 1, "guest memory of 1 bytes");
    refused(&|state| state.vcpus[0].system.cr0 = Word(1 << 31), "KVM refused to set the system registers");
    refused(&|state| _ = state.vcpus[0].msrs.insert(Word(0xc000_0080), Word(u64::MAX)), "in MSR 0xc0000080");
    let json = saved.state.to_json();
    let newer = json.replacen("\"schema\": 1", "\"schema\": 2", 1);
    let error = MachineState::from_json(newer.as_bytes()).unwrap_err();
    assert!(matches!(error, RestoreError::Schema { schema: 2 }), "{error}");
    let none = VmError::Restore(MachineState::from_json(b"{}").unwrap_err());
    assert!(none.to_string().contains("schema"), "{none}");
}

fn leaf(state: &mut MachineState, function: u64) -> &mut CpuidLeaf {
    let of = |leaf: &&mut CpuidLeaf| leaf.function == Word(function) && leaf.index == Word(0);
    state.cpuid[0].iter_mut().find(of).unwrap()
}

/// Stands on what was a breakpoint: steps, hits again, each crossing once.
fn l70_a_restored_machine_is_debugged_as_any_other() {
    let mut guest = Booted::fixture(1, "loop5", ap_start());
    let bp = Breakpoint::exec(guest.at("loop5_bp"));
    guest.set(bp);
    assert_eq!(guest.run_all(), hit(0, bp));
    assert_eq!(guest.run_all(), hit(0, bp));
    let saved = guest.save();
    let step = guest.plan(RunMode::Step);
    assert_eq!(guest.run(&step).reason, StopReason::Step);
    let stepped = guest.registers(0);
    for round in 0..20 {
        let mut again = saved.restore();
        match round % 2 {
            // As gdb does it that stands there.
            0 => {
                assert_eq!(again.run(&step).reason, StopReason::Step);
                assert_eq!(again.registers(0), stepped);
                again.set(bp);
            }
            // Set anew it is hit where it stands.
            _ => {
                again.set(bp);
                assert_eq!(again.run_all(), hit(0, bp));
            }
        }
        for _ in 0..3 {
            assert_eq!(again.run_all(), hit(0, bp), "round {round}");
        }
        assert_eq!(again.run_all().reason, StopReason::GuestExit(0), "round {round}");
        assert_eq!(log(&again), []);
    }
}
