//! What a hit of a rule costs that stops nobody, in bare exits, measured in turns as `vmm/benches/costs` does.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
#[path = "../../vmm/tests/laws/clock.rs"]
mod clock;
#[allow(dead_code)]
#[path = "../../vmm/benches/costs/guest.rs"]
mod guest;
#[allow(dead_code)]
#[path = "../../vmm/tests/laws/inquest.rs"]
mod inquest;
#[allow(dead_code)]
#[path = "../../vmm/benches/costs/report.rs"]
mod report;
#[allow(dead_code)]
#[path = "../../vmm/tests/laws/rig.rs"]
mod rig;
#[allow(dead_code)]
#[path = "../../vmm/tests/laws/spy.rs"]
mod spy;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use trapline_harness::rules;
use trapline_harness::run::rule_handler;
use trapline_vmm::debug::{Breakpoint, Disposition, Handler, Owner, RunMode};

use guest::{Bare, Guest, Program};
use report::{Goal, median, row};

/// How long each of two compared things runs in one turn.
const WINDOW: Duration = Duration::from_millis(200);
/// Turns; the median is told.
const TURNS: usize = 9;

fn main() {
    println!("{:<50} {:>12} {:>14}   goal", "", "here", "in bare exits");
    for (what, rule, goal) in [
        ("a hit that is counted", "exec:0x1000 =ignore", Goal::None),
        ("a hit whose condition is false", "exec:0x1000 if $rcx == 1", Goal::None),
        ("a hit that is logged", "exec:0x1000 =log", Goal::AtMost(2.0)),
    ] {
        let mut hits = hits_of(rule);
        let mut bare = Bare::new();
        let turns: Vec<_> = (0..TURNS).map(|_| (bare.cost(WINDOW), hits())).collect();
        let ratio = median(turns.iter().map(|(exit, hit)| hit / exit).collect());
        row(what, median(turns.iter().map(|(_, hit)| *hit).collect()), Some(ratio), goal);
    }
}

/// The cost of one hit of this rule, on the first instruction of a loop; another thread empties the log, as the event
/// loop does.
fn hits_of(rule: &str) -> impl FnMut() -> f64 {
    let mut guest = Guest::new(&[Program::NOP]);
    let (handler, log) = rule_handler(&rules::parse(rule).unwrap(), 1).unwrap();
    let count = Arc::new(AtomicU64::new(0));
    let counted = count.clone();
    // Who counts beside the rule is the measurement's: a hit whose condition is false is counted nowhere else.
    let both = Handler::new(move |hit| {
        counted.fetch_add(1, Ordering::Relaxed);
        assert_eq!(handler.ask(hit), Disposition::Continue);
        Disposition::Continue
    });
    guest.coordinator.set_trap(Owner::harness(0), Breakpoint::exec(Program::NOP.place()), Some(both)).unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let emptier = Emptier { over: over.clone(), thread: Some(thread::spawn(move || empty(&log, &over))) };
    move || {
        let _ = &emptier;
        let before = count.load(Ordering::Relaxed);
        let spent = guest.run_for(WINDOW, RunMode::Continue);
        spent.as_secs_f64() / (count.load(Ordering::Relaxed) - before) as f64
    }
}

fn empty(log: &trapline_harness::run::Hits, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        log.take();
        thread::sleep(Duration::from_millis(100));
    }
}

/// Ends with what it serves.
struct Emptier {
    over: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Drop for Emptier {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}
