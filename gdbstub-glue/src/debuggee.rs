//! What the stub needs of the thing it debugs.
//!
//! The VM's coordinator is one [`Debuggee`]; the protocol tests hold another, made of plain
//! memory. All calls are made while the world is stopped unless they say otherwise, and all
//! are bounded in time.

use trapline_vmm::debug::{Breakpoint, BreakpointError, ResumePlan, Stop, VcpuId};
use trapline_vmm::vcpu::{Activity, Registers};

/// A call that the debuggee could not carry out; one line, fit for gdb's screen.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct DebuggeeError(pub String);

/// What the stub needs of the thing it debugs.
pub trait Debuggee {
    /// Number of vCPUs, at least one. Never changes.
    fn vcpus(&self) -> usize;

    /// What `vcpu` is doing, for `info threads`.
    fn activity(&mut self, vcpu: VcpuId) -> Result<Activity, DebuggeeError>;

    /// All registers of `vcpu`.
    fn registers(&mut self, vcpu: VcpuId) -> Result<Registers, DebuggeeError>;

    /// Writes the registers of `vcpu`. On error nothing that the guest can see has changed.
    fn set_registers(&mut self, vcpu: VcpuId, registers: &Registers) -> Result<(), DebuggeeError>;

    /// Reads linear memory through the page tables of `vcpu`. Returns how many bytes from the
    /// start could be read: fewer than asked where a page is not present or no RAM is behind it.
    fn read_memory(&mut self, vcpu: VcpuId, addr: u64, into: &mut [u8]) -> Result<usize, DebuggeeError>;

    /// Writes linear memory through the page tables of `vcpu`, ignoring write protection (a
    /// debugger patches read-only text). All or nothing.
    fn write_memory(&mut self, vcpu: VcpuId, addr: u64, bytes: &[u8]) -> Result<(), DebuggeeError>;

    /// As [`read_memory`](Self::read_memory), by guest physical address.
    fn read_physical(&mut self, addr: u64, into: &mut [u8]) -> Result<usize, DebuggeeError>;

    /// As [`write_memory`](Self::write_memory), by guest physical address.
    fn write_physical(&mut self, addr: u64, bytes: &[u8]) -> Result<(), DebuggeeError>;

    /// Arms a breakpoint of the gdb user on every vCPU, or nowhere. Asking twice for the same
    /// is one breakpoint (RSP: `Z` packets are idempotent).
    fn set_breakpoint(&mut self, request: Breakpoint) -> Result<(), BreakpointError>;

    /// Disarms it on every vCPU.
    fn clear_breakpoint(&mut self, request: Breakpoint) -> Result<(), BreakpointError>;

    /// Lets the vCPUs go on and returns at once. `Some` is a stop that was pending (or that is
    /// final): then nothing has run.
    fn resume(&mut self, plan: &ResumePlan) -> Result<Option<Stop>, DebuggeeError>;

    /// Stops the world if it runs, and says what it is stopped for. Called at attach and at
    /// Ctrl-C; a hit that won the race is returned instead of
    /// [`Interrupted`](trapline_vmm::debug::StopReason::Interrupted).
    fn stop(&mut self) -> Result<Stop, DebuggeeError>;

    /// Forgets everything the gdb user armed, drops its pending stops and lets the guest run.
    fn detach(&mut self) -> Result<(), DebuggeeError>;

    /// Ends the guest.
    fn kill(&mut self);
}
