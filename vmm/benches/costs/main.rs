//! What the debugger costs, in bare exits: KVM_RUN in a loop over a guest that does nothing but port
//! accesses, measured in the same run, in turns with what it is compared to.
//!
//! Costs are processor time of the vCPU's own thread, so that other work on the machine is not
//! counted; times between threads are what a clock on the wall says.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
#[path = "../../tests/laws/clock.rs"]
mod clock;
#[allow(dead_code)]
#[path = "../../tests/laws/inquest.rs"]
mod inquest;
#[allow(dead_code)]
#[path = "../../tests/laws/rig.rs"]
mod rig;
#[allow(dead_code)]
#[path = "../../tests/laws/spy.rs"]
mod spy;

mod guest;
mod report;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use trapline_guests::fixture;
use trapline_vmm::debug::{Breakpoint, Disposition, Handler, Owner, RunMode, StopReason, Trigger};

use guest::{Bare, Guest, PAGE, Program};
use report::{Goal, median, row};

/// How long each of two compared things runs in one turn.
const WINDOW: Duration = Duration::from_millis(200);
/// Turns; the median is told.
const TURNS: usize = 9;
/// Stops, changes and told steps that are timed one by one.
const TIMED: usize = 101;

fn main() {
    // Cargo adds an option of its own.
    let table = Table { only: std::env::args().skip(1).find(|argument| !argument.starts_with('-')) };
    println!("{:<50} {:>12} {:>14}   goal", "", "here", "in bare exits");
    let mut bare = Bare::new();
    let exit = median((0..TURNS).map(|_| bare.cost(WINDOW)).collect());
    row("a bare exit (KVM_RUN, port I/O)", exit, None, Goal::None);

    table.ratio("an ioctl that does nothing (KVM_GET_REGS)", Goal::None, || {
        let idle = Bare::new();
        move || idle.cost_of_an_ioctl()
    });
    table.ratio("a bare exit with registers both ways", Goal::None, || bare_of(Bare::with_registers()));
    table.ratio("a bare hit on a NOP, moved on by hand", Goal::None, || bare_of(Bare::with_breakpoint()));
    table.ratio("a bare hit on a store, stepped by hand", Goal::None, || bare_of(Bare::with_breakpoint_to_step()));
    table.ratio("a bare exit with four slots armed", Goal::None, || bare_of(Bare::with_four_slots()));
    table.ratio("a bare step, asked for each time", Goal::None, || bare_of(Bare::with_steps()));
    table.ratio("a counted hit, its instruction in place", Goal::AtMost(1.5), || counted(Program::NOP));
    table.ratio("a counted hit, its instruction stepped", Goal::AtMost(3.0), || counted(Program::STORE));
    table.ratio("a single step, in place", Goal::AtMost(1.3), || steps(Program::COUNT));
    table.ratio("a single step, by KVM", Goal::AtMost(1.3), || steps(Program::MEMORY));
    table.ratio("a store beside a watched range, on its page", Goal::None, || stores(fixture::SOURCE + 0x800));
    table.ratio("a counted store, watched by its page", Goal::None, || stores(fixture::SOURCE));
    table.timed("a single step that is told, on the wall", exit, told_steps);
    for cpus in [2, 4, 16] {
        table.timed(&format!("from a hit to {cpus} vCPUs parked, on the wall"), exit, || parks(cpus));
    }
    for cpus in [2, 4, 16] {
        table.timed(&format!("a change of the set on {cpus} running vCPUs"), exit, || changes(cpus));
    }
    // Where ring 0 is interpreted, ring 3 is what runs natively.
    table.slowdown("four slots armed in ring 3, none hit", || Guest::in_ring_3(Program::COUNT));
    table.slowdown("four slots armed in ring 0, none hit", || Guest::new(&[Program::COUNT]));
}

/// The rows that are wanted: all, or those whose name has this in it.
struct Table {
    only: Option<String>,
}

impl Table {
    fn has(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| name.contains(only))
    }

    /// What something costs, in turns with a bare exit.
    fn ratio<M: FnMut() -> f64>(&self, name: &str, goal: Goal, begin: impl FnOnce() -> M) {
        if self.has(name) {
            let (cost, ratio) = in_turns(&mut Bare::new(), &mut begin());
            row(name, cost, Some(ratio), goal);
        }
    }

    /// What a clock on the wall says, beside the cost of a bare exit.
    fn timed(&self, name: &str, exit: f64, times: impl FnOnce() -> Vec<f64>) {
        if self.has(name) {
            let time = median(times());
            row(name, time, Some(time / exit), Goal::None);
        }
    }

    fn slowdown(&self, name: &str, begin: impl FnOnce() -> Guest) {
        if self.has(name) {
            report::percent(name, slowdown(&mut begin()), 1.0);
        }
    }
}

fn bare_of(mut bare: Bare) -> impl FnMut() -> f64 {
    move || bare.cost(WINDOW)
}

/// The cost of one in seconds, and in bare exits of the same turn.
fn in_turns(bare: &mut Bare, what: &mut dyn FnMut() -> f64) -> (f64, f64) {
    let turns: Vec<_> = (0..TURNS).map(|_| (bare.cost(WINDOW), what())).collect();
    let costs = turns.iter().map(|(_, cost)| *cost).collect();
    (median(costs), median(turns.iter().map(|(exit, cost)| cost / exit).collect()))
}

/// A trap that counts, on the first instruction of a loop.
fn counted(program: Program) -> impl FnMut() -> f64 {
    let mut guest = Guest::new(&[program]);
    let hits = Arc::new(AtomicU64::new(0));
    let counter = hits.clone();
    let handler = Handler::new(move |_| {
        counter.fetch_add(1, Ordering::Relaxed);
        Disposition::Continue
    });
    let trap = Breakpoint::exec(program.place());
    guest.coordinator.set_trap(Owner::harness(1), trap, Some(handler)).unwrap();
    move || {
        let before = hits.load(Ordering::Relaxed);
        let spent = guest.run_for(WINDOW, RunMode::Continue);
        spent.as_secs_f64() / (hits.load(Ordering::Relaxed) - before) as f64
    }
}

/// Stores to the first bytes of a page, with `watched` on it watched by a handler that lets them pass.
fn stores(watched: u64) -> impl FnMut() -> f64 {
    let mut guest = Guest::new(&[Program::STORES]);
    let watch = Breakpoint::watch(watched, 8, Trigger::Write);
    let handler = Handler::new(|_| Disposition::Continue);
    guest.coordinator.set_trap(Owner::harness(1), watch, Some(handler)).unwrap();
    move || {
        let before = guest.count(0);
        let spent = guest.run_for(WINDOW, RunMode::Continue);
        spent.as_secs_f64() / (guest.count(0) - before) as f64
    }
}

/// Steps around a loop of two instructions that counts, all of them on the vCPU's own thread.
fn steps(program: Program) -> impl FnMut() -> f64 {
    let mut guest = Guest::new(&[program]);
    let count = |guest: &mut Guest| guest.count(0) + guest.counted_in_memory();
    move || {
        let before = count(&mut guest);
        let spent = guest.run_for(WINDOW, RunMode::StepRange { start: PAGE, end: PAGE + 0x1000 });
        spent.as_secs_f64() / (2 * (count(&mut guest) - before)) as f64
    }
}

/// Steps that each come back to the caller.
fn told_steps() -> Vec<f64> {
    let mut guest = Guest::new(&[Program::COUNT]);
    let mut step = || {
        let started = Instant::now();
        assert_eq!(guest.run(RunMode::Step), StopReason::Step);
        started.elapsed().as_secs_f64()
    };
    (0..TIMED).map(|_| step()).collect()
}

/// From a hit on vCPU 0 until the world is parked and its stop is there.
fn parks(cpus: usize) -> Vec<f64> {
    let mut programs = vec![Program::COUNT; cpus];
    programs[0] = Program::RARE;
    let mut guest = Guest::new(&programs);
    let hit = Arc::new(Mutex::new(Instant::now()));
    let when = hit.clone();
    let handler = Handler::new(move |_| {
        *when.lock().unwrap() = Instant::now();
        Disposition::Stop
    });
    let trap = Breakpoint::exec(Program::RARE.place());
    guest.coordinator.set_trap(Owner::harness(1), trap, Some(handler)).unwrap();
    let mut park = || {
        assert_eq!(guest.run(RunMode::Continue), StopReason::Breakpoint(trap));
        hit.lock().unwrap().elapsed().as_secs_f64()
    };
    (0..TIMED).map(|_| park()).collect()
}

/// A breakpoint comes or goes while all vCPUs run.
fn changes(cpus: usize) -> Vec<f64> {
    let mut guest = Guest::new(&vec![Program::COUNT; cpus]);
    let unhit = Breakpoint::exec(PAGE + 0xf00);
    guest.go(RunMode::Continue);
    let change = |n: usize| {
        let started = Instant::now();
        match n % 2 {
            0 => guest.coordinator.set_breakpoint(Owner::harness(1), unhit).unwrap(),
            _ => guest.coordinator.clear_breakpoint(Owner::harness(1), unhit).unwrap(),
        }
        started.elapsed().as_secs_f64()
    };
    (0..TIMED).map(change).collect()
}

/// How much slower a guest counts with four slots armed that it never hits, in per cent.
fn slowdown(guest: &mut Guest) -> f64 {
    // Elsewhere: emulators of a processor run a page with a breakpoint on it more slowly.
    let unhit: Vec<_> = (0..4).map(|n| Breakpoint::exec(fixture::SOURCE + n)).collect();
    let mut speed = |armed: bool| {
        for &breakpoint in &unhit {
            match armed {
                true => guest.coordinator.set_breakpoint(Owner::harness(1), breakpoint).unwrap(),
                false => guest.coordinator.clear_breakpoint(Owner::harness(1), breakpoint).unwrap(),
            }
        }
        let before = guest.count(0);
        let spent = guest.run_for(WINDOW, RunMode::Continue);
        (guest.count(0) - before) as f64 / spent.as_secs_f64()
    };
    // Armed and unarmed in turns; each unarmed run is compared to the two around it, so that a
    // machine that gets slower favours neither.
    let speeds: Vec<f64> = (0..4 * TURNS + 1).map(|n| speed(n % 2 == 0)).collect();
    let slower = speeds.windows(3).step_by(2).map(|around| (around[1] * 2.0 / (around[0] + around[2]) - 1.0) * 100.0);
    median(slower.collect())
}
