//! How a run ended, as one value with one exit code.

use std::fmt;
use std::time::Duration;

use trapline_vmm::debug::{Crash, Ending, StopReason};

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The guest ended by itself, with status 0 or by power-off or reset.
    Pass,
    /// The guest wrote this status, not 0, to the exit port.
    GuestFailed(u32),
    /// The guest's kernel told pvpanic that it panicked.
    Panicked,
    /// The time given to the run was over.
    TimedOut(Duration),
    /// The guest could not go on.
    Died(Crash),
    /// A debugger killed it: that is how its user ends a session.
    Killed,
}

impl Verdict {
    /// The process exit code: 0 pass, 1 guest reported failure, 4 panic, 5 timeout, 6 guest died.
    pub fn exit_code(&self) -> u8 {
        match self {
            Verdict::Pass | Verdict::Killed => 0,
            Verdict::GuestFailed(_) => 1,
            Verdict::Panicked => 4,
            Verdict::TimedOut(_) => 5,
            Verdict::Died(_) => 6,
        }
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
            Verdict::Panicked => write!(f, "the guest's kernel panicked"),
            Verdict::TimedOut(time) => write!(f, "the guest was still running after {time:?}"),
            Verdict::Died(crash) => write!(f, "the guest died: {crash}"),
            Verdict::Killed => write!(f, "the debugger killed the guest"),
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
            (Verdict::Panicked, 4),
            (Verdict::TimedOut(Duration::from_secs(1)), 5),
            (died, 6),
            (Verdict::Killed, 0),
        ];
        for (verdict, code) in cases {
            assert_eq!(verdict.exit_code(), code, "{verdict}");
        }
    }
}
