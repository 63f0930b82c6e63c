//! Ten thousand steps of a kernel and its programs: through system calls, page faults, interrupts,
//! switches of process and returns to user code (laws 45 to 49, seed row D4).

use trapline_vmm::debug::{RunMode, VcpuId};

use crate::guest::Guest;
use crate::step::Stepper;

/// A stretch of steps.
struct Leg {
    /// The function at whose first instruction it starts.
    start: &'static str,
    least: u64,
    /// It goes on until it has come by here.
    until: &'static str,
}

/// Each comes by its end soon. Where a kernel waits until something is done in time, such as until it has read
/// the clock between two ticks of another CPU, it does not get on for as long as it is stepped.
const LEGS: [Leg; 5] = [
    Leg { start: "entry_SYSCALL_64", least: 2500, until: "do_syscall_64" },
    Leg { start: "asm_exc_page_fault", least: 2500, until: "handle_mm_fault" },
    Leg { start: "asm_sysvec_apic_timer_interrupt", least: 1500, until: "__sysvec_apic_timer_interrupt" },
    Leg { start: "swapgs_restore_regs_and_return_to_usermode", least: 1000, until: "user" },
    // Another process comes back to where it was switched from.
    Leg { start: "__switch_to_asm", least: 2500, until: "__schedule" },
];

/// A leg that is so many times as long as it should be has lost its way.
const TOO_LONG: u64 = 6;

/// What must have been stepped through, at least.
const WAYPOINTS: [&str; 8] = [
    "user",
    "entry_SYSCALL_64",
    "do_syscall_64",
    "asm_exc_page_fault",
    "handle_mm_fault",
    "asm_sysvec_apic_timer_interrupt",
    "__schedule",
    "__switch_to",
];

/// The CPU that is stepped.
const STEPPED: VcpuId = VcpuId(0);

/// A program's file and its CPU: two that take turns on the CPU that is stepped.
const STEPPED_PROGRAMS: [(&str, u32); 2] = [("/tmp/a", 0), ("/tmp/b", 0)];
const ALL_PROGRAMS: [(&str, u32); 3] = [("/tmp/a", 0), ("/tmp/b", 0), ("/tmp/c", 1)];

/// The other vCPU sleeps: parked in the middle of something it would keep what it has locked.
pub(crate) fn alone() {
    session(RunMode::Parked, &STEPPED_PROGRAMS);
}

pub(crate) fn beside_a_running_vcpu() {
    session(RunMode::Continue, &ALL_PROGRAMS);
}

fn session(others: RunMode, programs: &[(&str, u32)]) {
    let mut guest = Guest::boot();
    for (file, cpu) in programs {
        guest.command(&format!("taskset -c {cpu} fresh-pages {file} &"));
    }
    let before = progress(&mut guest, programs);
    guest.vm.stop().unwrap();
    let mut stepper = Stepper::new(&mut guest, STEPPED, others);
    let started = std::time::Instant::now();
    for leg in LEGS {
        let start = guest.symbols.at(leg.start);
        while guest.run_to(start) != STEPPED {}
        stepper.look(&mut guest);
        assert_eq!(stepper.pc(), start);
        let (first, passed) = (stepper.steps, stepper.passed(leg.until));
        while stepper.steps < first + leg.least || stepper.passed(leg.until) == passed {
            if !stepper.run_through_clock(&mut guest) {
                stepper.step(&mut guest);
            }
            if stepper.steps - first > TOO_LONG * leg.least {
                let at = guest.symbols.name(stepper.pc());
                println!("  from {} it never comes by {}; it is at {at}", leg.start, leg.until);
                break;
            }
        }
    }
    println!("  {} steps in {:?}", stepper.steps, started.elapsed());
    // Free again it works as before, and so do its programs.
    guest.go();
    let mut after = progress(&mut guest, programs);
    for _ in 0..20 {
        if before.iter().zip(&after).all(|(before, after)| after > before) {
            break;
        }
        after = progress(&mut guest, programs);
    }
    let advanced = before.iter().zip(&after).all(|(before, after)| after > before);
    assert!(advanced, "the stepped programs do not go on: {before:?}, then {after:?}; {}", guest.console());
    guest.assert_undisturbed();
    stepper.assert_nothing_found();
    let missed: Vec<_> = WAYPOINTS.iter().filter(|name| stepper.passed(name) == 0).collect();
    assert!(missed.is_empty(), "not stepped through: {missed:?}, but {:?}", stepper.seen);
}

/// How far each of the programs is.
fn progress(guest: &mut Guest, programs: &[(&str, u32)]) -> Vec<u64> {
    let files: Vec<_> = programs.iter().map(|program| program.0).collect();
    let printed = guest.command(&format!("sleep 0.2; cat {}", files.join(" ")));
    let numbers: Vec<u64> = printed.lines().filter_map(|line| line.trim().parse().ok()).collect();
    assert_eq!(numbers.len(), programs.len(), "the programs' files hold {printed}");
    numbers
}
