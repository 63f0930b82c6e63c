//! What a trap does on the vCPU's own thread, before anybody is stopped.
//!
//! A trap that only counts, or whose condition is false, never leaves that thread: no kick, no
//! message. That is what makes traps on hot functions affordable.

use std::fmt;
use std::sync::Arc;

use super::{Breakpoint, Owner, PortAccess, Stored, VcpuId};
use crate::vcpu::Registers;

/// What a handler has decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// Nobody else needs to know; the guest goes on.
    Continue,
    /// Stop the world and tell.
    Stop,
}

/// One hit, as its handler sees it: on the thread of the vCPU, which does not run meanwhile.
pub struct Hit<'a> {
    /// Whose breakpoint it is.
    pub owner: Owner,
    /// Which.
    pub request: Breakpoint,
    /// The vCPU that hit it.
    pub vcpu: VcpuId,
    /// Linear address of the next instruction: that of the breakpoint, or the one behind the
    /// access for a watchpoint.
    pub pc: u64,
    /// What was stored where, if a write watchpoint is served by read-only pages.
    pub stored: Option<&'a Stored>,
    pub(crate) state: &'a mut dyn GuestState,
}

/// The part of a vCPU that a handler may look at.
pub(crate) trait GuestState {
    /// All registers.
    fn registers(&mut self) -> std::io::Result<Registers>;
    /// Those that cost least.
    fn state(&mut self) -> std::io::Result<Registers>;
    /// Bytes at a linear address; how many could be read.
    fn read(&mut self, addr: u64, into: &mut [u8]) -> usize;
}

impl Hit<'_> {
    /// The vCPU's registers. They cost some ioctls: a handler that can do without should.
    ///
    /// # Errors
    /// What KVM said.
    pub fn registers(&mut self) -> std::io::Result<Registers> {
        self.state.registers()
    }

    /// The general, segment and control registers, which the exit has brought along; the others are zero.
    ///
    /// # Errors
    /// What KVM said.
    pub fn state(&mut self) -> std::io::Result<Registers> {
        self.state.state()
    }

    /// Reads linear memory as the vCPU sees it; how many bytes could be read.
    pub fn read(&mut self, addr: u64, into: &mut [u8]) -> usize {
        self.state.read(addr, into)
    }
}

impl fmt::Debug for Hit<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hit")
            .field("owner", &self.owner)
            .field("request", &self.request)
            .field("vcpu", &self.vcpu)
            .field("pc", &self.pc)
            .finish_non_exhaustive()
    }
}

/// One access to a port, as its handler sees it: on the thread of the vCPU, after the access.
pub struct PortHit<'a> {
    /// The vCPU that made it.
    pub vcpu: VcpuId,
    /// What it did.
    pub access: PortAccess,
    pub(crate) state: &'a mut dyn GuestState,
}

impl PortHit<'_> {
    /// The general, segment and control registers; the others are zero. RIP may still stand on the
    /// instruction.
    ///
    /// # Errors
    /// What KVM said.
    pub fn state(&mut self) -> std::io::Result<Registers> {
        self.state.state()
    }

    /// Reads linear memory as the vCPU sees it; how many bytes could be read.
    pub fn read(&mut self, addr: u64, into: &mut [u8]) -> usize {
        self.state.read(addr, into)
    }
}

impl fmt::Debug for PortHit<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortHit").field("vcpu", &self.vcpu).field("access", &self.access).finish_non_exhaustive()
    }
}

/// Called for every access to a port that is trapped, as a [`Handler`] is for hits.
#[derive(Clone)]
pub struct PortHandler(Arc<dyn Fn(&mut PortHit<'_>) -> Disposition + Send + Sync>);

impl PortHandler {
    /// A handler from a closure. It must not block.
    pub fn new(handler: impl Fn(&mut PortHit<'_>) -> Disposition + Send + Sync + 'static) -> Self {
        PortHandler(Arc::new(handler))
    }

    pub(crate) fn call(&self, hit: &mut PortHit<'_>) -> Disposition {
        (self.0)(hit)
    }
}

impl fmt::Debug for PortHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PortHandler")
    }
}

/// Called for every hit, on the thread of the vCPU that hit it; several vCPUs call it at once.
#[derive(Clone)]
pub struct Handler(Arc<dyn Fn(&mut Hit<'_>) -> Disposition + Send + Sync>);

impl Handler {
    /// A handler from a closure. It must not block: the vCPU waits for it, and so does whoever
    /// stops the world.
    pub fn new(handler: impl Fn(&mut Hit<'_>) -> Disposition + Send + Sync + 'static) -> Self {
        Handler(Arc::new(handler))
    }

    /// What it says to a hit: for a handler that asks another one.
    pub fn ask(&self, hit: &mut Hit<'_>) -> Disposition {
        (self.0)(hit)
    }
}

impl fmt::Debug for Handler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Handler")
    }
}

impl PartialEq for Handler {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Handler {}
