//! How a run ended, as one value with one exit code.

use std::fmt;
use std::time::Duration;

use trapline_vmm::debug::{Crash, Ending, StopReason};

use crate::report::VerdictKind;

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The guest ended by itself, with status 0 or by power-off or reset.
    Pass,
    /// The guest wrote this status, not 0, to the exit port.
    GuestFailed(u32),
    /// The guest switched off or restarted, and the program that was its purpose ([`initramfs`](crate::initramfs)) had not
    /// ended.
    NoStatus,
    /// The guest's kernel told pvpanic that it panicked.
    Panicked,
    /// The time given to the run was over.
    TimedOut(Duration),
    /// The guest could not go on.
    Died(Crash),
    /// A debugger killed it: that is how its user ends a session.
    Killed,
    /// A trap has ended the run.
    Trapped {
        /// Its index among the rules.
        trap: usize,
        /// 3, or 4 for one that means a panic.
        exit_code: u8,
        /// What happened, in a line.
        reason: String,
    },
    /// All was well, but these traps, which had to be hit, were not; by their names.
    Missed(Vec<String>),
    /// The guest ended well, but it has reported so many failed tests.
    TestsFailed(usize),
    /// The run could not go on, though the guest could: a module has come whose traps do not fit into the slots that are
    /// left, say.
    Aborted {
        /// 64 if what was asked for is wrong, 69 if this host cannot do it.
        exit_code: u8,
        /// What is wrong, in a line.
        reason: String,
    },
}

impl Verdict {
    /// The process exit code: 0 pass, 1 guest reported failure, 3 trap, 4 panic, 5 timeout, 6 guest died, 7 a
    /// trap that had to be hit was not, 64 or 69 what was asked for or this host does not let it go on.
    pub fn exit_code(&self) -> u8 {
        match self {
            Verdict::Pass | Verdict::Killed => 0,
            Verdict::GuestFailed(_) | Verdict::NoStatus | Verdict::TestsFailed(_) => 1,
            Verdict::Trapped { exit_code, .. } | Verdict::Aborted { exit_code, .. } => *exit_code,
            Verdict::Panicked => 4,
            Verdict::TimedOut(_) => 5,
            Verdict::Died(_) => 6,
            Verdict::Missed(_) => 7,
        }
    }

    /// In a word.
    pub fn kind(&self) -> VerdictKind {
        match self {
            Verdict::Pass => VerdictKind::Pass,
            Verdict::GuestFailed(_) | Verdict::NoStatus | Verdict::TestsFailed(_) => VerdictKind::GuestFailed,
            Verdict::Panicked | Verdict::Trapped { exit_code: 4, .. } => VerdictKind::Panic,
            Verdict::Trapped { .. } => VerdictKind::Trap,
            Verdict::TimedOut(_) => VerdictKind::Timeout,
            Verdict::Died(_) => VerdictKind::Died,
            Verdict::Killed => VerdictKind::Killed,
            Verdict::Missed(_) => VerdictKind::MustHit,
            Verdict::Aborted { .. } => VerdictKind::Aborted,
        }
    }

    /// How a run ends that cannot go on for this error. Of a rule that is shown with a caret only what is wrong with it.
    pub fn aborted(exit_code: u8, error: &str) -> Self {
        let lines: Vec<&str> = error.lines().filter(|line| !line.starts_with(' ')).collect();
        Verdict::Aborted { exit_code, reason: lines.join("; ") }
    }

    /// What a stop means when nobody is there to look at it; `None` if the guest can go on.
    pub fn of_stop(reason: &StopReason) -> Option<Self> {
        match reason {
            StopReason::GuestExit(0) | StopReason::GuestShutdown { .. } => Some(Verdict::Pass),
            StopReason::GuestExit(status) => Some(Verdict::GuestFailed(*status)),
            StopReason::GuestPanic => Some(Verdict::Panicked),
            StopReason::Crash(crash) => Some(Verdict::Died(crash.clone())),
            StopReason::Ended(ending) => Some(Verdict::from(ending)),
            StopReason::Breakpoint(_)
            | StopReason::Watchpoint { .. }
            | StopReason::Step
            | StopReason::CannotStep(_)
            | StopReason::Port(_)
            | StopReason::KernelEntry
            | StopReason::Interrupted => None,
        }
    }
}

impl From<&Ending> for Verdict {
    fn from(ending: &Ending) -> Self {
        match ending {
            Ending::Exit(0) | Ending::Shutdown => Verdict::Pass,
            Ending::Exit(status) => Verdict::GuestFailed(*status),
            Ending::Crash(crash) => Verdict::Died(crash.clone()),
            Ending::Killed => Verdict::Killed,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Pass => write!(f, "the guest ended"),
            Verdict::GuestFailed(status) => write!(f, "the guest ended with status {status}"),
            Verdict::NoStatus => write!(f, "the guest switched off or restarted before its program had ended"),
            Verdict::Panicked => write!(f, "the guest's kernel panicked"),
            Verdict::TimedOut(time) => write!(f, "the guest was still running after {time:?}"),
            Verdict::Died(crash) => write!(f, "the guest died: {crash}"),
            Verdict::Killed => write!(f, "the debugger killed the guest"),
            Verdict::Trapped { reason, .. } | Verdict::Aborted { reason, .. } => write!(f, "{reason}"),
            Verdict::Missed(names) => write!(f, "never hit: {}", names.join(", ")),
            Verdict::TestsFailed(1) => write!(f, "a test in the guest failed"),
            Verdict::TestsFailed(tests) => write!(f, "{tests} tests in the guest failed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_the_contract() {
        let died = Verdict::Died(Crash::TripleFault { state_lost: false });
        let cases = [
            (Verdict::Pass, 0),
            (Verdict::GuestFailed(7), 1),
            (Verdict::NoStatus, 1),
            (Verdict::Panicked, 4),
            (Verdict::TimedOut(Duration::from_secs(1)), 5),
            (died, 6),
            (Verdict::Killed, 0),
            (Verdict::Trapped { trap: 0, exit_code: 3, reason: "a".into() }, 3),
            (Verdict::Trapped { trap: 0, exit_code: 4, reason: "a".into() }, 4),
            (Verdict::Missed(vec!["a".into()]), 7),
            (Verdict::TestsFailed(2), 1),
            (Verdict::aborted(69, "a"), 69),
        ];
        for (verdict, code) in cases {
            assert_eq!(verdict.exit_code(), code, "{verdict}");
        }
    }
}
