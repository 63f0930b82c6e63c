//! What a person reads on the terminal when a run has ended.

use std::fmt::Write;
use std::io::{self, IsTerminal};

use super::words::{self, plain};
use super::{FrameRecord, Outcome, Report, TestRecord, TestResult, TrapRecord};

/// Most frames, failed tests and missed traps that are shown.
const MAX_FRAMES: usize = 16;
const MAX_TESTS: usize = 10;
/// Most columns of a function's name before its source line.
const MAX_NAME: usize = 40;

/// Whether text is coloured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Letters only.
    Plain,
    /// With the escapes of ECMA-48.
    Coloured,
}

impl Style {
    /// Colours on a terminal that has them, unless `NO_COLOR` is set to something.
    pub fn of_stderr() -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        if !unwanted && io::stderr().is_terminal() { Style::Coloured } else { Style::Plain }
    }

    fn paint(self, code: &str, text: &str) -> String {
        match self {
            Style::Plain => text.to_owned(),
            Style::Coloured => format!("\x1b[{code}m{text}\x1b[0m"),
        }
    }

    fn faint(self, text: &str) -> String {
        self.paint("2", text)
    }

    fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }
}

const RED: &str = "1;31";
const GREEN: &str = "1;32";
const YELLOW: &str = "33";

impl Report {
    /// The verdict, the rule, where, the backtrace, what else is wrong, and the files. Lines, the last ended.
    pub fn summary(&self, style: Style) -> String {
        let mut lines = Summary { style, text: String::new() };
        lines.verdict(self);
        lines.stop(self);
        lines.traps(&self.traps);
        lines.tests(&self.tests);
        for problem in &self.problems {
            lines.row("problem", &style.paint(YELLOW, &plain(problem)));
        }
        if !self.files.is_empty() {
            let files: Vec<_> = self.files.values().map(|file| plain(file)).collect();
            lines.row("files", &files.join(" "));
        }
        lines.text
    }
}

struct Summary {
    style: Style,
    text: String,
}

impl Summary {
    fn row(&mut self, label: &str, what: &str) {
        let label = self.style.faint(&format!("{label:>8}"));
        let _ = writeln!(self.text, "{label}  {what}");
    }

    fn verdict(&mut self, report: &Report) {
        let verdict = &report.verdict;
        let (colour, word) = if verdict.exit_code == 0 { (GREEN, "PASS") } else { (RED, "FAIL") };
        let rest = format!("exit code {}, {}", verdict.exit_code, words::seconds(report.timing.duration_ms));
        let style = self.style;
        let _ = writeln!(
            self.text,
            "trapline: {}  {}  {}",
            style.paint(colour, word),
            style.bold(&plain(&verdict.text)),
            style.faint(&rest)
        );
        if let Some(trap) = verdict.trap.and_then(|trap| report.traps.get(trap)) {
            self.row("rule", &plain(&trap.rule));
        }
    }

    fn stop(&mut self, report: &Report) {
        let Some(stop) = &report.stop else { return };
        let style = self.style;
        if let Some(at) = &stop.at {
            let mut place = style.bold(&plain(at));
            if let Some(vcpu) = stop.vcpu {
                let _ = write!(place, " on vCPU {vcpu}");
            }
            if let Some(source) = &stop.source {
                let _ = write!(place, ", {}", plain(&words::source(source)));
            }
            self.row("at", &place);
        } else if let Some(vcpu) = stop.vcpu {
            self.row("on", &format!("vCPU {vcpu}"));
        }
        if let Some(change) = &stop.change {
            self.row("value", &words::change(change));
        }
        self.backtrace(&stop.backtrace);
        // Of a timeout each vCPU tells.
        if stop.backtrace.is_empty() || stop.timing.vcpus.len() > 1 {
            for vcpu in stop.timing.vcpus.iter().filter(|vcpu| stop.vcpu != Some(vcpu.vcpu)).take(MAX_FRAMES) {
                let interrupts = if vcpu.interrupts { "" } else { ", interrupts off" };
                self.row(
                    &format!("vCPU {}", vcpu.vcpu),
                    &format!("{} at {}{interrupts}", plain(&vcpu.activity), plain(&vcpu.at)),
                );
            }
        }
    }

    fn backtrace(&mut self, frames: &[FrameRecord]) {
        let named: Vec<_> = frames.iter().take(MAX_FRAMES).map(|frame| (plain(&words::named(frame)), frame)).collect();
        let width = named.iter().map(|(name, _)| name.chars().count()).max().unwrap_or_default().min(MAX_NAME);
        for (at, (name, frame)) in named.iter().enumerate() {
            let mut line = format!("{name:width$}");
            if let Some(source) = &frame.source {
                let _ = write!(line, "  {}", self.style.faint(&plain(&words::source(source))));
            }
            self.row(&format!("#{at}"), line.trim_end());
        }
        if frames.len() > MAX_FRAMES {
            self.row("", &format!("and {} more", frames.len() - MAX_FRAMES));
        }
    }

    fn traps(&mut self, traps: &[TrapRecord]) {
        for trap in traps.iter().filter(|trap| trap.outcome == Outcome::Missed).take(MAX_TESTS) {
            self.row("not hit", &self.style.paint(RED, &plain(&trap.rule)));
        }
        for trap in traps.iter().filter(|trap| trap.outcome != Outcome::Fired) {
            let hits = trap.timing.hits.iter().fold(0u64, |sum, hits| sum.saturating_add(*hits));
            if hits > 0 {
                self.row("hits", &format!("{hits} of {}", plain(&trap.name)));
            }
        }
    }

    fn tests(&mut self, tests: &[TestRecord]) {
        if tests.is_empty() {
            return;
        }
        self.row("tests", &words::tally(tests));
        // A suite that fails with its tests says nothing new.
        let new = |test: &&TestRecord| test.subtests == 0 || test.message.is_some();
        let bad = |test: &&TestRecord| matches!(test.result, TestResult::Failed | TestResult::Missing);
        let failed = || tests.iter().filter(bad).filter(new);
        for test in failed().take(MAX_TESTS) {
            let first = test.message.as_deref().and_then(|message| message.lines().next()).unwrap_or_default();
            let name = self.style.paint(RED, &plain(&words::test_path(test)));
            self.row(words::result(test.result), format!("{name}  {}", self.style.faint(&plain(first))).trim_end());
        }
        let rest = failed().count().saturating_sub(MAX_TESTS);
        if rest > 0 {
            self.row("", &format!("and {rest} more"));
        }
    }
}
