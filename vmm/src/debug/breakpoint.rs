//! What an owner asks for, before any slot is chosen.

use std::fmt;

/// What makes a breakpoint trigger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Trigger {
    /// Execution of the instruction whose first byte is at the address (`Z1`).
    Execute,
    /// A store into the range (`Z2`).
    Write,
    /// A load from the range (`Z3`). The hardware has no such condition (SDM vol. 3,
    /// 18.2.4): it is armed as [`Trigger::Access`] and told apart by its reader, who
    /// sees whether the value changed.
    Read,
    /// A load from or a store into the range (`Z4`).
    Access,
}

impl Trigger {
    /// Whether this is a data condition, reported after the access.
    pub const fn is_watch(self) -> bool {
        !matches!(self, Trigger::Execute)
    }
}

/// A request: trigger on this kind of access to `addr .. addr + len`.
///
/// Addresses are linear (law 8): the same breakpoint is in force in every address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Breakpoint {
    /// First linear address.
    pub addr: u64,
    /// Length in bytes; 1 for [`Trigger::Execute`]. A watched range may have any length that
    /// the free slots can cover (four slots of eight aligned bytes at best).
    pub len: u64,
    /// What triggers it.
    pub on: Trigger,
}

impl Breakpoint {
    /// An execution breakpoint at `addr`.
    pub const fn exec(addr: u64) -> Self {
        Self { addr, len: 1, on: Trigger::Execute }
    }

    /// A watchpoint on `addr .. addr + len`.
    pub const fn watch(addr: u64, len: u64, on: Trigger) -> Self {
        Self { addr, len, on }
    }
}

impl fmt::Display for Breakpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.on {
            Trigger::Execute => write!(f, "exec breakpoint at {:#x}", self.addr),
            Trigger::Write => write!(f, "write watchpoint on {:#x} ({} bytes)", self.addr, self.len),
            Trigger::Read => write!(f, "read watchpoint on {:#x} ({} bytes)", self.addr, self.len),
            Trigger::Access => write!(f, "access watchpoint on {:#x} ({} bytes)", self.addr, self.len),
        }
    }
}

/// Owner levels, low to high (law 27). A higher level may evict a lower one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Level {
    /// The guest's own debug registers.
    Guest,
    /// A trap rule or a harness closure.
    Harness,
    /// The person at the gdb prompt.
    Gdb,
}

/// Who asked: a level and a number that the asker chose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Owner {
    /// The level that decides who yields when slots run out.
    pub level: Level,
    /// Distinguishes owners of one level.
    pub id: u32,
}

impl Owner {
    /// The gdb user. There is one: a second client is refused.
    pub const GDB: Owner = Owner { level: Level::Gdb, id: 0 };

    /// A harness owner.
    pub const fn harness(id: u32) -> Self {
        Owner { level: Level::Harness, id }
    }
}

/// Why a breakpoint could not be set or removed. Nothing changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BreakpointError {
    /// All four slots are taken by this level or a higher one.
    #[error("{request}: hardware slots needed {needed}, free {free} of 4; delete a breakpoint or watchpoint first")]
    NoSlot {
        /// What was asked for.
        request: Breakpoint,
        /// Slots that the request needs beyond those it can share.
        needed: usize,
        /// Slots that are free for its level.
        free: usize,
    },
    /// The request has no meaning in the debug registers.
    #[error("{request} cannot be set: {why}")]
    Invalid {
        /// What was asked for.
        request: Breakpoint,
        /// What is wrong with it.
        why: &'static str,
    },
    /// This host's KVM accepts the request and never triggers it, as its probe showed.
    #[error("{request} is refused: {why}")]
    Unsupported {
        /// What was asked for.
        request: Breakpoint,
        /// What the probe saw.
        why: String,
    },
    /// It can be served only in guest memory, and has no place there.
    #[error("{request} needs more than the hardware slots that are free, and its bytes are not mapped to RAM now")]
    NotMapped {
        /// What was asked for.
        request: Breakpoint,
    },
    /// The owner holds no such breakpoint.
    #[error("there is no {request} to remove")]
    NotSet {
        /// What was asked for.
        request: Breakpoint,
    },
    /// The change could not be carried out on every vCPU; the old set is in force everywhere.
    #[error("the change was undone: {0}")]
    Apply(String),
}

impl BreakpointError {
    /// What was asked for, where it is about that.
    pub fn request(&self) -> Option<Breakpoint> {
        match self {
            BreakpointError::NoSlot { request, .. }
            | BreakpointError::Invalid { request, .. }
            | BreakpointError::Unsupported { request, .. }
            | BreakpointError::NotMapped { request }
            | BreakpointError::NotSet { request } => Some(*request),
            BreakpointError::Apply(_) => None,
        }
    }
}
