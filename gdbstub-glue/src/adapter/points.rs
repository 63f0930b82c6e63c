//! Breakpoints and watchpoints.
//!
//! `Z0` (gdb's `break`) is served like `Z1`: by a hardware slot on every vCPU, and beyond the four by
//! an INT3 that the debuggee hides and steps over with care, where the host allows that. Were `Z0`
//! unknown, gdb would write the INT3 itself, and other vCPUs would run through it while it is out;
//! so it is never answered with "unknown", not even when nothing is left to serve it.
//!
//! gdb may hold a `Z0` and a `Z1` at one address; to the debuggee they are one breakpoint, which
//! goes when the last of them goes.
//!
//! gdb takes all its breakpoints away at every stop and sets them again at the next resumption.
//! Nothing can run in between, so a removal waits for the resumption and is forgotten if the
//! breakpoint is back by then. That saves two updates of all vCPUs for each breakpoint and stop.
//! And a second vCPU's hit, which waits for its turn to be told, is not taken for a hit on
//! a breakpoint that is gone.

use gdbstub::target::TargetResult;
use gdbstub::target::ext::breakpoints::{
    Breakpoints, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint, SwBreakpointOps, WatchKind,
};
use trapline_vmm::debug::{Breakpoint, BreakpointError, Trigger};

use super::{Adapter, EINVAL, EIO, ENOSPC, View};
use crate::debuggee::Debuggee;
use crate::limits::BREAKPOINTS;
use crate::packet::PointKind;

/// A breakpoint of the client's.
pub(super) struct Armed {
    kind: PointKind,
    request: Breakpoint,
    /// The client has removed it. It goes when the guest goes on, unless it is back by then.
    leaving: bool,
}

impl<D: Debuggee> Adapter<D> {
    fn insert(&mut self, kind: PointKind, request: Breakpoint) -> TargetResult<bool, Self> {
        if request.len == 0 || request.addr.checked_add(request.len - 1).is_none() {
            return Err(self.fail(EINVAL, format!("{request} cannot be set: there are no such bytes")));
        }
        if let Some(armed) = self.view.armed.iter_mut().find(|a| (a.kind, a.request) == (kind, request)) {
            armed.leaving = false;
            return Ok(true);
        }
        if self.view.armed.len() >= BREAKPOINTS {
            return Err(self.fail(ENOSPC, format!("{BREAKPOINTS} breakpoints are set; delete some first")));
        }
        self.set(request).map_err(|error| {
            // gdb 13 shows no text for a failed Z0: let our own terminal say it.
            tracing::warn!("{error}");
            self.fail(errno(&error), error.to_string())
        })?;
        self.view.armed.push(Armed { kind, request, leaving: false });
        Ok(true)
    }

    fn set(&mut self, request: Breakpoint) -> Result<(), BreakpointError> {
        if self.view.armed.iter().any(|a| a.request == request) {
            return Ok(()); // of another kind
        }
        match self.debuggee.set_breakpoint(request) {
            Err(BreakpointError::NoSlot { .. }) if self.view.armed.iter().any(|a| a.leaving) => {
                self.remove_leaving()?;
                self.debuggee.set_breakpoint(request)
            }
            result => result,
        }
    }

    /// Removing what is not there is no error: RSP wants `z` to be idempotent.
    fn remove(&mut self, kind: PointKind, request: Breakpoint) -> TargetResult<bool, Self> {
        if let Some(armed) = self.view.armed.iter_mut().find(|a| (a.kind, a.request) == (kind, request)) {
            armed.leaving = true;
        }
        Ok(true)
    }

    /// Carries out the removals. On error what could not be removed is still set, and leaving.
    pub(super) fn remove_leaving(&mut self) -> Result<(), BreakpointError> {
        while let Some(at) = self.view.armed.iter().position(|a| a.leaving) {
            let request = self.view.armed[at].request;
            let held = self.view.armed.iter().enumerate().any(|(i, a)| i != at && a.request == request);
            if !held {
                match self.debuggee.clear_breakpoint(request) {
                    Ok(()) | Err(BreakpointError::NotSet { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            self.view.armed.swap_remove(at);
        }
        Ok(())
    }

    /// What the debuggee holds for the client, without repetitions.
    pub(super) fn armed(&self) -> Vec<Breakpoint> {
        let mut armed: Vec<_> = self.view.armed.iter().map(|a| a.request).collect();
        armed.sort_unstable_by_key(|b| (b.addr, b.on, b.len));
        armed.dedup();
        armed
    }
}

impl View {
    /// Whether the client knows a breakpoint as a software breakpoint (`Z0`) only.
    pub(crate) fn is_software(&self, request: Breakpoint) -> bool {
        let mut kinds = self.armed.iter().filter(|a| a.request == request).map(|a| a.kind).peekable();
        kinds.peek().is_some() && kinds.all(|kind| kind == PointKind::Software)
    }
}

fn errno(error: &BreakpointError) -> u8 {
    match error {
        BreakpointError::NoSlot { .. } => ENOSPC,
        BreakpointError::Invalid { .. }
        | BreakpointError::Unsupported { .. }
        | BreakpointError::NotMapped { .. }
        | BreakpointError::NotSet { .. } => EINVAL,
        BreakpointError::Apply(_) => EIO,
    }
}

fn watch(addr: u64, len: u64, kind: WatchKind) -> (PointKind, Breakpoint) {
    let (kind, on) = match kind {
        WatchKind::Write => (PointKind::Write, Trigger::Write),
        WatchKind::Read => (PointKind::Read, Trigger::Read),
        WatchKind::ReadWrite => (PointKind::Access, Trigger::Access),
    };
    (kind, Breakpoint::watch(addr, len, on))
}

impl<D: Debuggee> Breakpoints for Adapter<D> {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

// The kind of an x86 breakpoint is the length of the INT3 that the client would have written;
// a slot matches the first byte of the instruction whatever it says.
impl<D: Debuggee> SwBreakpoint for Adapter<D> {
    fn add_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.insert(PointKind::Software, Breakpoint::exec(addr))
    }

    fn remove_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.remove(PointKind::Software, Breakpoint::exec(addr))
    }
}

impl<D: Debuggee> HwBreakpoint for Adapter<D> {
    fn add_hw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.insert(PointKind::Hardware, Breakpoint::exec(addr))
    }

    fn remove_hw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.remove(PointKind::Hardware, Breakpoint::exec(addr))
    }
}

impl<D: Debuggee> HwWatchpoint for Adapter<D> {
    fn add_hw_watchpoint(&mut self, addr: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        let (kind, request) = watch(addr, len, kind);
        self.insert(kind, request)
    }

    fn remove_hw_watchpoint(&mut self, addr: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        let (kind, request) = watch(addr, len, kind);
        self.remove(kind, request)
    }
}
