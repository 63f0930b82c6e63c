//! Whole runs of the built-in guests through the library, on this host's KVM.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use trapline_harness::Verdict;
use trapline_harness::bundle::{Bundle, SymbolFile};
use trapline_harness::report::{Outcome as Came, Report, VerdictKind};
use trapline_harness::run::{Kernel, Next, Outcome, Run, RunError, Supervisor};
use trapline_vmm::Vm;
use trapline_vmm::debug::{Disposition, ResumePlan, RunMode};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

#[path = "../examples/closures.rs"]
mod closures;

/// A bound against hanging.
const PATIENCE: Duration = Duration::from_secs(60);

fn demo(cmdline: &str) -> Run {
    let kernel = Kernel::Bytes("demo".to_owned(), trapline_guests::demo());
    Run::new(kernel).cpus(2).memory(64 << 20).cmdline(cmdline).timeout(PATIENCE)
}

fn acts(cmdline: &str) -> Run {
    let kernel = Kernel::Bytes("acts".to_owned(), trapline_guests::acts());
    Run::new(kernel).cpus(2).memory(32 << 20).cmdline(cmdline).timeout(PATIENCE)
}

fn functions(report: &Report) -> Vec<&str> {
    report.stop.as_ref().unwrap().backtrace.iter().map(|frame| frame.function.as_str()).collect()
}

fn hits(outcome: &Outcome, trap: usize) -> u64 {
    outcome.report.traps[trap].timing.hits.iter().sum()
}

fn wrong(run: Run) -> RunError {
    match run.prepare() {
        Ok(_) => panic!("it was prepared"),
        Err(error) => error,
    }
}

#[test]
fn a_trap_that_fires_ends_the_run_where_it_is() {
    let outcome = demo("quiet").trap("exec:count_up").run().unwrap();
    assert_eq!(outcome.exit_code(), 3);
    assert!(matches!(outcome.verdict, Verdict::Trapped { trap: 0, .. }));
    let stop = outcome.report.stop.as_ref().unwrap();
    assert_eq!(stop.at.as_deref(), Some("count_up"));
    let source = stop.source.as_ref().unwrap();
    assert!(source.file.ends_with("demo/demo.c"), "{source:?}");
    let line = trapline_guests_source("demo/demo.c").lines().nth(source.line as usize - 1).unwrap().to_owned();
    assert!(line.contains("count_up_here"), "line {} is {line:?}", source.line);
    assert_eq!(functions(&outcome.report)[..3], ["count_up", "count_a_round", "cpu_loop"]);
    assert_eq!(stop.timing.vcpus.len(), 2);
    let its = &stop.timing.vcpus[stop.vcpu.unwrap() as usize];
    assert_eq!((its.ran_on_us, its.registers["RIP"]), (0, outcome.report.traps[0].targets[0].address.unwrap()));
    assert_eq!(outcome.report.traps[0].outcome, Came::Fired);
}

fn trapline_guests_source(path: &str) -> String {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../guest-images/");
    fs::read_to_string(format!("{root}{path}")).unwrap()
}

#[test]
fn what_only_logs_and_counts_lets_the_guest_end_as_it_would() {
    let outcome = demo("quiet ticks=30 exit=7").trap("exec:tick =log").trap("exec:count_up =ignore").run().unwrap();
    assert_eq!((outcome.exit_code(), &outcome.verdict), (1, &Verdict::GuestFailed(7)));
    let ticks = hits(&outcome, 0);
    assert!(ticks >= 30, "{ticks}");
    let logged: Vec<u64> = outcome.report.timing.recent.iter().map(|hit| hit.timing.hits_before).collect();
    assert_eq!(logged, (ticks.saturating_sub(64)..ticks).collect::<Vec<_>>());
    assert!(outcome.report.timing.recent.iter().all(|hit| hit.trap == 0 && hit.at == "tick" && hit.vcpu == 0));
    assert!(hits(&outcome, 1) > 0);
    assert_eq!(outcome.report.verdict.guest_status, Some(7));
}

#[test]
fn a_watched_variable_is_told_with_what_it_was_and_is() {
    let outcome = demo("quiet").trap("write:rounds_published if old > 0 && new > old count=3").run().unwrap();
    assert_eq!(outcome.exit_code(), 3, "{}", outcome.verdict);
    let stop = outcome.report.stop.as_ref().unwrap();
    let change = stop.change.unwrap();
    let each = change.new - change.old;
    assert_eq!((change.old, each > 0), (3 * each, true), "{change:?}");
    assert_eq!(functions(&outcome.report)[0], "publish");
    assert_eq!((outcome.report.traps[0].timing.unmet, hits(&outcome, 0)), (1, 3));
}

#[test]
fn count_once_cpu_and_conditions_choose_the_hit() {
    let outcome = demo("quiet").trap("exec:count_up cpu=1 count=100").run().unwrap();
    let stop = outcome.report.stop.as_ref().unwrap();
    assert_eq!((stop.vcpu, outcome.report.traps[0].timing.hits.as_slice()), (Some(1), &[0, 100][..]));

    let outcome = demo("quiet").trap("exec:count_up once =log").trap("exec:tick count=3").run().unwrap();
    assert_eq!(outcome.report.traps[0].timing.hits.iter().sum::<u64>(), 1, "disarmed after the first");
    assert_eq!(hits(&outcome, 1), 3);
    let outcome = demo("quiet ticks=9").trap("exec:tick once =ignore").run().unwrap();
    assert_eq!((hits(&outcome, 0), outcome.report.timing.recent.len()), (1, 0));

    let outcome = demo("quiet ticks=5").trap("exec:tick if $cpu == 1").run().unwrap();
    assert_eq!((outcome.verdict, outcome.report.traps[0].timing.unmet), (Verdict::Pass, 5));
}

#[test]
fn what_has_to_be_hit_and_is_not_fails_the_run() {
    let outcome = demo("quiet ticks=5").trap("exec:tick must-hit =log").run().unwrap();
    assert_eq!((outcome.exit_code(), outcome.report.traps[0].outcome), (0, Came::Passed));
    let outcome = demo("quiet ticks=5").trap("exec:print_progress must-hit =log").run().unwrap();
    assert_eq!((outcome.exit_code(), outcome.report.traps[0].outcome), (7, Came::Missed));
    assert_eq!(outcome.report.verdict.kind, VerdictKind::MustHit);
    // A failure of the guest's own comes first.
    let outcome = demo("quiet ticks=5 exit=2").trap("exec:print_progress must-hit =log").run().unwrap();
    assert_eq!(outcome.exit_code(), 1);
}

#[test]
fn the_example_counts_a_thousand_calls_of_one_vcpu() {
    let (outcome, calls) = closures::count().unwrap();
    assert_eq!((outcome.exit_code(), calls.iter().max()), (3, Some(&1000)), "{}", outcome.verdict);
    assert_eq!(functions(&outcome.report)[0], "count_up");
}

#[test]
fn closures_see_each_hit_on_its_vcpu_and_decide() {
    let seen = Arc::new(AtomicU64::new(0));
    let counted = seen.clone();
    let outcome = demo("quiet")
        .trap_with("exec:count_up", move |hit| {
            let registers = hit.registers().unwrap();
            assert_eq!(registers.pc(), hit.pc());
            let mut code = [0];
            assert_eq!(hit.read(hit.pc(), &mut code), 1);
            match counted.fetch_add(1, Ordering::Relaxed) {
                49 => Disposition::Stop,
                _ => Disposition::Continue,
            }
        })
        .run()
        .unwrap();
    assert_eq!(outcome.exit_code(), 3);
    assert!((50..52).contains(&hits(&outcome, 0)), "{}", hits(&outcome, 0));
}

#[test]
fn a_function_that_returns_is_seen_at_its_return() {
    let outcome = demo("quiet").trap("ret:count_up count=10").run().unwrap();
    let stop = outcome.report.stop.as_ref().unwrap();
    assert!(stop.at.as_deref().unwrap().starts_with("count_up+0x"), "{:?}", stop.at);
    assert_eq!(functions(&outcome.report)[1], "count_a_round");
}

#[test]
fn ports_and_the_console_are_traps_too() {
    let outcome = demo("").trap("io:0x3f8 if $al == 'd' =log").trap("console:/demo guest/").run().unwrap();
    assert_eq!(outcome.exit_code(), 3);
    assert!(outcome.report.verdict.text.contains("Trapline demo guest"), "{}", outcome.report.verdict.text);
    assert!((1..10).contains(&hits(&outcome, 0)), "of all the letters the first is one: {}", hits(&outcome, 0));
    assert_eq!(outcome.report.timing.console_line, Some(1));
    let stop = outcome.report.stop.as_ref().unwrap();
    assert_eq!((stop.vcpu, stop.timing.vcpus.len()), (None, 2));

    let outcome = demo("ticks=3").trap("io:0x3f8 if jiffies == 0 =log").run().unwrap();
    let unmet = outcome.report.traps[0].timing.unmet;
    assert!(hits(&outcome, 0) > 0 && unmet > 0, "{} and {unmet}", hits(&outcome, 0));

    // Nothing answers there, and it is seen all the same.
    let outcome = acts("run=exit exit=0").trap("io:0xf4").run().unwrap();
    assert_eq!(outcome.exit_code(), 0, "the guest's end is no hit: {}", outcome.verdict);
}

#[test]
fn a_vcpu_with_interrupts_off_for_too_long_hangs() {
    for act in ["hang", "sleep"] {
        let outcome = acts(&format!("run={act} cpu=1")).trap("hang:1s").run().unwrap();
        assert_eq!(outcome.exit_code(), 3, "{}", outcome.verdict);
        assert!(outcome.report.verdict.text.contains("no progress"), "{}", outcome.report.verdict.text);
    }
    // One hang is one hit, however long it lasts. The other vCPU counts with interrupts off: it hangs, too.
    let run = acts("run=hang cpu=1").timeout(Duration::from_secs(3));
    let outcome = run.trap("hang:300ms =log").trap("hang:300ms count=3").trap("hang:400ms =bt").run().unwrap();
    assert_eq!((outcome.exit_code(), [0, 1, 2].map(|n| hits(&outcome, n))), (5, [2, 2, 2]), "{}", outcome.verdict);
    assert_eq!(outcome.report.stop.unwrap().vcpu, None, "the end of the time is about no vCPU");
}

#[test]
fn the_end_of_the_time_shows_what_every_vcpu_does() {
    let outcome = acts("run=hang cpu=1").timeout(Duration::from_millis(500)).trap("exec:hang_here =log").run().unwrap();
    assert_eq!(outcome.exit_code(), 5);
    let stop = outcome.report.stop.as_ref().unwrap();
    assert_eq!((stop.vcpu, stop.timing.vcpus.len()), (None, 2));
    let hangs = &stop.timing.vcpus[1];
    assert!(
        hangs.at.starts_with("hang_here") || hangs.backtrace.iter().any(|f| f.function.contains("hang")),
        "{hangs:?}"
    );
}

#[test]
fn a_triple_fault_is_the_guests_death_and_a_hit() {
    let outcome = acts("run=triple").trap("triple-fault").run().unwrap();
    assert_eq!((outcome.exit_code(), hits(&outcome, 0)), (6, 1));
    assert_eq!(outcome.report.traps[0].outcome, Came::Fired);
}

#[test]
fn a_report_is_a_directory_that_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("new/report");
    let outcome = demo("").trap("exec:tick count=2").report(&report).run().unwrap();
    assert_eq!(outcome.report.problems, Vec::<String>::new());
    let text = fs::read_to_string(report.join("report.json")).unwrap();
    assert_eq!(Report::read_json(&text).unwrap(), outcome.report);
    for (what, file) in &outcome.report.files {
        assert!(fs::metadata(report.join(file)).is_ok_and(|file| file.len() > 0), "{what}: {file}");
    }
    assert!(fs::read_to_string(report.join("console.log")).unwrap().contains("Trapline demo guest"));
    let core = fs::read(report.join("vmcore")).unwrap();
    assert_eq!(&core[..4], b"\x7fELF");
    let names: Vec<_> = fs::read_dir(&report).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| !name.to_string_lossy().ends_with(".part")), "{names:?}");
}

#[test]
fn a_snapshot_is_a_machine_beside_the_report_and_the_guest_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("report");
    let outcome = demo("quiet ticks=5").trap("exec:tick count=2 =snapshot").report(&report).run().unwrap();
    assert_eq!((outcome.exit_code(), hits(&outcome, 0)), (0, 5), "{}", outcome.verdict);
    assert_eq!(outcome.report.problems, Vec::<String>::new());
    for n in 1..=4 {
        let name = format!("snapshot-{n}");
        assert_eq!(outcome.report.files.get(&name), Some(&name));
        for file in ["vmcore", "state.json"] {
            assert!(fs::metadata(report.join(&name).join(file)).is_ok_and(|file| file.len() > 0), "{name}/{file}");
        }
    }
    assert!(!report.join("snapshot-5").exists() && !report.join("vmcore").exists());

    // What its run knows goes for it, too, as long as they lie together.
    let snapshot = Bundle::open(&report.join("snapshot-2")).unwrap();
    assert_eq!((snapshot.is_snapshot, snapshot.symbols()), (true, SymbolFile::Demo));
    assert_eq!(snapshot.summary(), "a snapshot; later: the guest ended");
    let alone = dir.path().join("alone");
    fs::rename(report.join("snapshot-2"), &alone).unwrap();
    let alone = Bundle::open(&alone).unwrap();
    assert_eq!((alone.is_snapshot, alone.symbols(), alone.report), (false, SymbolFile::None, None));
}

#[test]
fn a_report_has_nothing_of_the_run_before() {
    let dir = tempfile::tempdir().unwrap();
    let first = demo("quiet").trap("exec:tick =snapshot").trap("exec:tick count=2").report(dir.path()).run().unwrap();
    assert_eq!(first.exit_code(), 3);
    for name in ["vmcore", "state.json", "snapshot-1/vmcore"] {
        assert!(dir.path().join(name).exists(), "{name}");
    }
    fs::write(dir.path().join("notes"), "mine").unwrap();
    let second = demo("quiet ticks=3").report(dir.path()).run().unwrap();
    assert_eq!((second.exit_code(), &second.report.problems), (0, &Vec::new()));
    let mut names: Vec<String> =
        fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["console.log", "events.ndjson", "index.html", "junit.xml", "notes", "report.json"]);
}

#[test]
fn traps_that_were_never_armed_are_not_passed() {
    // More than the slots serve, in memory that this guest never maps.
    let rules = (0..6).map(|n| format!("exec:{:#x} =ignore", 0xffff_ffff_8100_0000_u64 + n));
    match rules.fold(demo("quiet ticks=3"), |run, rule| run.trap(rule)).run() {
        Ok(outcome) => {
            assert_eq!((&outcome.verdict, outcome.exit_code()), (&Verdict::Pass, 69));
            assert!(outcome.report.problems[0].contains("never armed"), "{:?}", outcome.report.problems);
        }
        Err(error) => assert!(error.is_hosts(), "{error}"),
    }
}

/// Lets the guest run until a line of the console has matched, which nobody has looked at then.
fn until_the_console_matches(vm: &mut Vm, supervisor: &mut Supervisor) {
    supervisor.begins();
    assert_eq!(vm.resume(&ResumePlan::all(vm.vcpus(), RunMode::Continue)).unwrap(), None);
    let console = supervisor.fds()[1];
    let epoll = Epoll::new().unwrap();
    epoll.ctl(ControlOperation::Add, console, EpollEvent::new(EventSet::IN, 0)).unwrap();
    assert_eq!(epoll.wait(60_000, &mut [EpollEvent::default()]).unwrap(), 1, "nothing was printed");
}

#[test]
fn what_the_console_said_last_is_heard_at_the_end() {
    let (mut vm, mut supervisor) = demo("quiet ticks=3").trap("console:/ends with status/").prepare().unwrap();
    until_the_console_matches(&mut vm, &mut supervisor);
    let outcome = supervisor.finish(&mut vm, Verdict::Pass, None);
    assert_eq!(outcome.exit_code(), 3, "{}", outcome.verdict);
    assert_eq!(outcome.report.stop.unwrap().timing.vcpus.len(), 2);
}

#[test]
fn a_guest_that_stands_for_somebody_else_is_not_let_go_on() {
    let (mut vm, mut supervisor) = demo("").trap("console:/demo guest/ =bt").prepare().unwrap();
    until_the_console_matches(&mut vm, &mut supervisor);
    vm.pause().unwrap();
    let console = supervisor.fds()[1];
    assert_eq!(supervisor.ready(&mut vm, console).unwrap(), Next::Nothing);
    assert_eq!(supervisor.recent().count(), 1);
}

#[test]
fn the_same_run_twice_differs_in_timing_only() {
    let run = || {
        let outcome = demo("quiet").cpus(1).trap("write:rounds_published count=5").run().unwrap();
        let mut value = serde_json::to_value(&outcome.report).unwrap();
        forget_timing(&mut value);
        value
    };
    assert_eq!(run(), run());
}

fn forget_timing(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(members) => {
            members.remove("timing");
            members.values_mut().for_each(forget_timing);
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(forget_timing),
        _ => {}
    }
}

#[test]
fn what_is_wrong_is_said_before_the_guest_runs() {
    let error = wrong(demo("").trap("exec:no_such_function"));
    assert!(!error.is_hosts() && error.to_string().contains("no_such_function"), "{error}");
    let both = wrong(demo("").trap("nonsense").trap("exec:neither"));
    assert!(matches!(&both, RunError::Rules(errors) if errors.len() == 1), "{both}");
    for (rule, says) in [
        ("exec:tick =gdb", "--gdb"),
        ("exec:tick =snapshot", "--report"),
        ("exec:tick cpu=2", "vCPUs 0 to 1"),
        ("io:0x40", "PIT"),
        ("exec:tick+0x10000", "is not in it"),
    ] {
        let error = wrong(demo("").trap(rule)).to_string();
        assert!(error.contains(says), "{rule}: {error}");
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = wrong(demo("").trap("exec:tick").report(file.path())).to_string();
    assert!(error.contains(&file.path().display().to_string()) && !error.contains('\n'), "{error}");
    let error = wrong(Run::new("/no/such/kernel")).to_string();
    assert!(error.contains("/no/such/kernel") && !error.contains('\n'), "{error}");
}

#[test]
fn five_thousand_traps_are_one_set() {
    // Every instruction of the demo's functions is too much to want; every byte of a hole costs no guest.
    let rules: Vec<String> = (0..5000).map(|n| format!("exec:{:#x} =ignore", 0x20_0000_u64 + 0x10_0000 + n)).collect();
    let run = rules.iter().fold(demo("quiet ticks=3"), |run, rule| run.trap(rule));
    match run.run() {
        Ok(outcome) => assert_eq!(outcome.verdict, Verdict::Pass),
        Err(error) => assert!(error.is_hosts(), "{error}"),
    }
}
