//! A line on the terminal while the guest runs.

use std::io::{self, IsTerminal};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::words;

/// Times a second that it is drawn at most.
const RATE: u8 = 10;
/// Most columns of the console's last line.
const MAX_LINE: usize = 200;

/// What the line says.
#[derive(Debug, Clone, Copy, Default)]
pub struct State<'a> {
    /// Since the first guest instruction.
    pub elapsed: Duration,
    /// After what time the run is ended.
    pub timeout: Option<Duration>,
    /// Hits of all traps so far.
    pub hits: u64,
    /// Tests of the guest so far: reported, failed.
    pub tests: (u64, u64),
    /// The console's last line.
    pub line: &'a str,
}

/// The line. Dropped, it is gone from the terminal.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// On stderr, if it is a terminal that does not show the guest's console: `console_on_stdout` says whether that goes there.
    pub fn new(console_on_stdout: bool) -> Self {
        let shared =
            console_on_stdout && io::stdout().is_terminal() && same_device("/proc/self/fd/1", "/proc/self/fd/2");
        let shown = io::stderr().is_terminal() && !shared;
        Self::to(if shown { ProgressDrawTarget::stderr_with_hz(RATE) } else { ProgressDrawTarget::hidden() })
    }

    fn to(target: ProgressDrawTarget) -> Self {
        let bar = ProgressBar::with_draw_target(None, target);
        if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg}") {
            bar.set_style(style.tick_chars("|/-\\ "));
        }
        Self { bar }
    }

    /// Whether anything is shown. If not, ticks are for nothing.
    pub fn is_shown(&self) -> bool {
        !self.bar.is_hidden()
    }

    /// Draws it anew, some times a second.
    pub fn tick(&self, state: &State<'_>) {
        if self.is_shown() {
            self.bar.set_message(message(state));
            self.bar.tick();
        }
    }

    /// Runs what prints to the same terminal, with the line out of its way.
    pub fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        self.bar.suspend(print)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn message(state: &State<'_>) -> String {
    let mut parts = vec![match state.timeout {
        Some(timeout) => format!("{} of {} s", state.elapsed.as_secs(), timeout.as_secs()),
        None => format!("{} s", state.elapsed.as_secs()),
    }];
    if state.hits > 0 {
        parts.push(format!("{} hits", state.hits));
    }
    match state.tests {
        (0, _) => {}
        (tests, 0) => parts.push(format!("{tests} tests")),
        (tests, failed) => parts.push(format!("{tests} tests, {failed} failed")),
    }
    // A template of indicatif's would not be expanded here, but a TAB moves.
    parts.push(words::plain(state.line).replace('\t', " ").chars().take(MAX_LINE).collect());
    parts.join("  ")
}

fn same_device(one: &str, other: &str) -> bool {
    match (std::fs::metadata(one), std::fs::metadata(other)) {
        (Ok(one), Ok(other)) => one.rdev() == other.rdev(),
        // Better no progress than one in the middle of the console.
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_what_there_is() {
        let mut state = State { elapsed: Duration::from_millis(12_700), line: "a\tb\x1b[31m", ..State::default() };
        assert_eq!(message(&state), "12 s  a b[31m");
        state.timeout = Some(Duration::from_secs(60));
        state.hits = 3;
        state.tests = (7, 2);
        assert_eq!(message(&state), "12 of 60 s  3 hits  7 tests, 2 failed  a b[31m");
    }

    #[test]
    fn a_pipe_gets_no_progress() {
        let progress = Progress::to(ProgressDrawTarget::hidden());
        assert!(!progress.is_shown());
        progress.tick(&State::default());
        assert_eq!(progress.suspend(|| 7), 7);
    }
}
