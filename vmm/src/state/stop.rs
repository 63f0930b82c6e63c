//! Stops that outlive the debugger that was to be told of them.

use serde::{Deserialize, Serialize};

use crate::debug::{Crash, Stop, StopReason, VcpuId};

/// A stop that no breakpoint made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopState {
    /// Which vCPU.
    pub vcpu: u32,
    /// Why.
    pub reason: ReasonState,
}

/// What happened to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReasonState {
    /// It wrote this value to the exit port.
    Exit(u32),
    /// It switched itself off.
    PowerOff,
    /// It reset the machine.
    Reset,
    /// It told pvpanic that it panicked.
    Panic,
    /// It cannot go on.
    Crash(Crash),
}

impl StopState {
    /// `None` for what belongs to a breakpoint or to the debugger: that is gone with it.
    pub fn of(stop: &Stop) -> Option<Self> {
        let reason = match &stop.reason {
            StopReason::GuestExit(value) => ReasonState::Exit(*value),
            StopReason::GuestShutdown { reset: false } => ReasonState::PowerOff,
            StopReason::GuestShutdown { reset: true } => ReasonState::Reset,
            StopReason::GuestPanic => ReasonState::Panic,
            // Without the watchpoint there is nothing wrong with the guest.
            StopReason::Crash(crash) if crash.is_mendable() => return None,
            StopReason::Crash(Crash::WatchedPage { crash, .. }) => ReasonState::Crash(Crash::clone(crash)),
            StopReason::Crash(crash) => ReasonState::Crash(crash.clone()),
            StopReason::Breakpoint(_)
            | StopReason::Watchpoint { .. }
            | StopReason::Port(_)
            | StopReason::KernelEntry
            | StopReason::Step
            | StopReason::CannotStep(_)
            | StopReason::Interrupted
            | StopReason::Ended(_) => return None,
        };
        Some(StopState { vcpu: stop.vcpu.0, reason })
    }

    /// The stop.
    pub fn stop(&self) -> Stop {
        let reason = match &self.reason {
            ReasonState::Exit(value) => StopReason::GuestExit(*value),
            ReasonState::PowerOff => StopReason::GuestShutdown { reset: false },
            ReasonState::Reset => StopReason::GuestShutdown { reset: true },
            ReasonState::Panic => StopReason::GuestPanic,
            ReasonState::Crash(crash) => StopReason::Crash(crash.clone()),
        };
        Stop::new(VcpuId(self.vcpu), reason)
    }
}
