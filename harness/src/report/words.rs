//! Parts of a report as plain text, for the forms that carry some.

use std::fmt::Write;

use super::{Change, FrameKind, FrameRecord, Outcome, Report, Source, TestRecord, TestResult, TrapRecord, VerdictKind};

/// In one line, for a terminal: without what a terminal, or a reader's eye, takes for more than text.
pub(crate) fn plain(text: &str) -> String {
    plain_lines(text).replace('\n', " ")
}

/// The same, but lines stay lines.
pub(super) fn plain_lines(text: &str) -> String {
    let kept = |&char: &char| char == '\n' || char == '\t' || !char.is_control() && !is_bidi(char);
    text.replace("\r\n", "\n").replace('\r', "\n").chars().filter(kept).collect()
}

/// What reorders the text around it (UAX 9).
fn is_bidi(char: char) -> bool {
    matches!(char, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// How a run ended, for a title.
pub(super) fn kind(kind: VerdictKind) -> &'static str {
    match kind {
        VerdictKind::Pass => "passed",
        VerdictKind::GuestFailed => "guest failed",
        VerdictKind::Trap => "trap fired",
        VerdictKind::Panic => "kernel panic",
        VerdictKind::Timeout => "timeout",
        VerdictKind::Died => "guest died",
        VerdictKind::MustHit => "trap not hit",
        VerdictKind::Killed => "ended from outside",
        VerdictKind::Aborted => "run aborted",
    }
}

/// What came of a trap, in a word.
pub(super) fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Passed => "passed",
        Outcome::Fired => "fired",
        Outcome::Missed => "missed",
    }
}

/// How a test went, in a word.
pub(super) fn result(result: TestResult) -> &'static str {
    match result {
        TestResult::Ok => "ok",
        TestResult::Failed => "failed",
        TestResult::Skipped => "skipped",
        TestResult::Todo => "todo",
        TestResult::Missing => "missing",
    }
}

/// `2 failed, 1 missing, 12 ok`: those that there are, the worst first. Suites are not counted beside their tests.
pub(super) fn tally(tests: &[TestRecord]) -> String {
    use TestResult::*;
    let count = |wanted| tests.iter().filter(|test| test.subtests == 0 && test.result == wanted).count();
    let counts = [Failed, Missing, Todo, Skipped, Ok].map(|wanted| (count(wanted), result(wanted)));
    counts
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, word)| format!("{count} {word}"))
        .collect::<Vec<_>>()
        .join(", ")
}

/// `1.234 s`, of milliseconds.
pub(super) fn seconds(ms: u64) -> String {
    format!("{}.{:03} s", ms / 1000, ms % 1000)
}

/// `1.234567 s`, of microseconds.
pub(super) fn microseconds(us: u64) -> String {
    format!("{}.{:06} s", us / 1_000_000, us % 1_000_000)
}

/// The suites and the name.
pub(super) fn test_path(test: &TestRecord) -> String {
    test.suite.iter().chain([&test_name(test)]).map(String::as_str).collect::<Vec<_>>().join(" / ")
}

/// `file:line`
pub(super) fn source(source: &Source) -> String {
    format!("{}:{}", source.file, source.line)
}

/// `0x1 -> 0x2`
pub(super) fn change(change: &Change) -> String {
    format!("{:#x} -> {:#x}", change.old, change.new)
}

/// `symbol+0x12 [module]`; an inlined function has no offset of its own.
pub(super) fn function(frame: &FrameRecord) -> String {
    let mut name = frame.function.clone();
    if frame.offset > 0 && !frame.inlined {
        let _ = write!(name, "+{:#x}", frame.offset);
    }
    if let Some(module) = &frame.module {
        let _ = write!(name, " [{module}]");
    }
    name
}

/// What a frame is beside a plain call.
pub(super) fn remark(frame: &FrameRecord) -> Option<&'static str> {
    match (frame.inlined, frame.kind) {
        (true, _) => Some("inlined"),
        (false, FrameKind::Interrupt) => Some("interrupted"),
        (false, FrameKind::User) => Some("user space"),
        (false, FrameKind::Call) => None,
    }
}

/// The function with its remark.
pub(super) fn named(frame: &FrameRecord) -> String {
    match remark(frame) {
        Some(remark) => format!("{} ({remark})", function(frame)),
        None => function(frame),
    }
}

/// A line for each frame, as a kernel writes it, with its source line.
pub(super) fn backtrace(frames: &[FrameRecord]) -> String {
    let mut text = String::new();
    for frame in frames {
        let _ = write!(text, "  {}", named(frame));
        if let Some(place) = &frame.source {
            let _ = write!(text, " at {}", source(place));
        }
        text.push('\n');
    }
    text
}

/// What ended the run: reason, place, change, backtrace. Empty if nothing stopped it.
pub(super) fn stop(report: &Report) -> String {
    let Some(stop) = &report.stop else { return String::new() };
    let mut text = format!("{}\n", stop.reason);
    if let Some(at) = &stop.at {
        let _ = write!(text, "at {at}");
        if let Some(place) = &stop.source {
            let _ = write!(text, " ({})", source(place));
        }
        text.push('\n');
    } else if let Some(vcpu) = stop.vcpu {
        let _ = writeln!(text, "on vCPU {vcpu}");
    }
    if let Some(values) = &stop.change {
        let _ = writeln!(text, "value {}", change(values));
    }
    if !stop.backtrace.is_empty() {
        let _ = write!(text, "backtrace of vCPU {}:\n{}", stop.vcpu.unwrap_or_default(), backtrace(&stop.backtrace));
    }
    text
}

/// What each vCPU was doing when the run was stopped, with its backtrace. Empty if nothing stopped it.
pub(super) fn vcpus(report: &Report) -> String {
    let mut text = String::new();
    for vcpu in report.stop.iter().flat_map(|stop| &stop.timing.vcpus) {
        let interrupts = if vcpu.interrupts { "" } else { ", interrupts off" };
        let _ = writeln!(text, "vCPU {}: {} at {}{interrupts}", vcpu.vcpu, vcpu.activity, vcpu.at);
        text.push_str(&backtrace(&vcpu.backtrace));
        if let Some(why) = &vcpu.backtrace_ends {
            let _ = writeln!(text, "  it ends there: {why}");
        }
    }
    text
}

/// What a trap watches, a line each.
pub(super) fn targets(trap: &TrapRecord) -> String {
    let mut text = String::new();
    for target in &trap.targets {
        let _ = writeln!(text, "{}: {}", target.what, target.mechanism);
    }
    text
}

/// The test's name, or its number if it has none.
pub(super) fn test_name(test: &TestRecord) -> String {
    if test.name.is_empty() { format!("test {}", test.number) } else { test.name.clone() }
}
