//! Why the world stopped, and how it is to go on.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Breakpoint, Owner};

/// A vCPU by its index, which is also its APIC ID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VcpuId(pub u32);

impl VcpuId {
    /// The index into per-vCPU tables.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for VcpuId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vCPU {}", self.0)
    }
}

/// One stop, told once. The whole world is parked when somebody sees this.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop {
    /// The vCPU that it is about.
    pub vcpu: VcpuId,
    /// What happened there.
    pub reason: StopReason,
    /// Whose breakpoint it was; `None` if it was nobody's doing, or a step or an interrupt.
    pub owner: Option<Owner>,
}

impl Stop {
    /// A stop that belongs to no breakpoint.
    pub const fn new(vcpu: VcpuId, reason: StopReason) -> Self {
        Stop { vcpu, reason, owner: None }
    }
}

/// The bytes of a watched range before and after a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Linear address of the first byte that was stored and watched.
    pub addr: u64,
    /// What was there.
    pub old: Vec<u8>,
    /// What is there now.
    pub new: Vec<u8>,
}

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}:", self.addr)?;
        self.old.iter().try_for_each(|byte| write!(f, " {byte:02x}"))?;
        write!(f, " ->")?;
        self.new.iter().try_for_each(|byte| write!(f, " {byte:02x}"))
    }
}

/// One IN or OUT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortAccess {
    /// The port.
    pub port: u16,
    /// Bytes of one access: 1, 2 or 4.
    pub size: u8,
    /// OUT rather than IN.
    pub write: bool,
    /// What was written or read, zero-extended; of a string instruction the first.
    pub value: u32,
}

impl fmt::Display for PortAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { port, size, write, value } = self;
        let digits = usize::from(*size) * 2;
        if *write {
            write!(f, "{value:#0$x} written to port {port:#x}", digits + 2)
        } else {
            write!(f, "{value:#0$x} read from port {port:#x}", digits + 2)
        }
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// An execution breakpoint, before its instruction ran.
    Breakpoint(Breakpoint),
    /// A watchpoint, after the access. `addr` is the first watched byte of the slot that
    /// matched, which lies inside the range that was asked for.
    Watchpoint {
        /// The request as it was made.
        request: Breakpoint,
        /// The slot's data address.
        addr: u64,
        /// What was stored, where the access was seen and not only its address.
        stored: Option<Stored>,
    },
    /// The single step is done.
    Step,
    /// The single step that was asked for cannot be made on this host; nothing has run. Why, and
    /// what to do instead.
    CannotStep(&'static str),
    /// Somebody asked for a stop (Ctrl-C, attach, a library call).
    Interrupted,
    /// A port was accessed that somebody wants to hear of; the access is done.
    Port(PortAccess),
    /// Guest code runs at a kernel's addresses for the first time, as [`Vm::tell_kernel_entry`](crate::Vm::tell_kernel_entry)
    /// was asked to say.
    KernelEntry,
    /// The guest wrote this value to the exit port 0xf4. It can be inspected; resuming ends the run.
    GuestExit(u32),
    /// The guest asked for power-off or reset. It can be inspected; resuming ends the run.
    GuestShutdown {
        /// Reset rather than power-off.
        reset: bool,
    },
    /// The guest told pvpanic that it panicked. It can be inspected and resumed.
    GuestPanic,
    /// The guest cannot go on. It can be inspected; resuming ends the run.
    Crash(Crash),
    /// The run is over: nothing is left to inspect.
    Ended(Ending),
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The guest wrote this value to the exit port.
    Exit(u32),
    /// Power-off or reset.
    Shutdown,
    /// It crashed.
    Crash(Crash),
    /// Somebody killed it.
    Killed,
}

/// Why a guest cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Crash {
    /// KVM_EXIT_SHUTDOWN: a triple fault. `state_lost` where KVM has already reset the vCPU (SVM).
    TripleFault {
        /// The registers are those of a reset vCPU.
        state_lost: bool,
    },
    /// KVM_EXIT_INTERNAL_ERROR, suberror 1: KVM could not emulate the instruction.
    EmulationFailure {
        /// The bytes at RIP, as KVM gave them (empty if it gave none).
        bytes: Vec<u8>,
    },
    /// The guest stores to a page that is read-only for a watchpoint, in a way that KVM hands over to
    /// nobody: an instruction that it cannot emulate, the frame of an exception, or on AMD any use of the
    /// page as a page table (law 66).
    #[serde(skip)] // it is about a watchpoint, which is not the guest's
    WatchedPage {
        /// What KVM reported.
        crash: Box<Crash>,
        /// A watchpoint on that page.
        request: Breakpoint,
    },
    /// KVM enters the guest again and again, and nothing happens there.
    NoProgress,
    /// KVM_EXIT_INTERNAL_ERROR with another suberror.
    Internal {
        /// `kvm_run.internal.suberror`.
        suberror: u32,
    },
    /// KVM_EXIT_FAIL_ENTRY: the processor refused the guest state.
    FailEntry {
        /// `hardware_entry_failure_reason`.
        reason: u64,
    },
    /// An exit that this VMM does not know.
    UnknownExit {
        /// `kvm_run.exit_reason`.
        reason: u32,
    },
    /// KVM_RUN itself failed.
    RunFailed {
        /// The errno.
        errno: i32,
    },
    /// What the vCPU was to be entered with could not be read or set.
    EntryFailed {
        /// What the ioctl said.
        error: String,
    },
}

impl Crash {
    /// Whether the guest can go on after this, once the watchpoint that caused it is gone: an instruction
    /// that could not be emulated has changed nothing, and neither has one that is never done.
    pub fn is_mendable(&self) -> bool {
        let changes_nothing = |crash: &Crash| matches!(crash, Crash::EmulationFailure { .. } | Crash::NoProgress);
        matches!(self, Crash::WatchedPage { crash, .. } if changes_nothing(crash))
    }
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Crash::TripleFault { state_lost: false } => write!(f, "triple fault"),
            Crash::TripleFault { state_lost: true } => {
                write!(f, "triple fault (this KVM has already reset the vCPU's registers)")
            }
            Crash::EmulationFailure { bytes } if bytes.is_empty() => {
                write!(f, "KVM could not fetch or emulate the instruction")
            }
            Crash::EmulationFailure { bytes } => {
                write!(f, "KVM cannot emulate the instruction at RIP, bytes")?;
                bytes.iter().try_for_each(|b| write!(f, " {b:02x}"))
            }
            Crash::WatchedPage { crash, request } => write!(
                f,
                "{crash}; it stores to a page that is read-only for the {request}, which KVM cannot hand over: \
                 delete that watchpoint"
            ),
            Crash::NoProgress => write!(f, "KVM enters the guest again and again without progress"),
            Crash::Internal { suberror } => write!(f, "KVM internal error, suberror {suberror}"),
            Crash::FailEntry { reason } => write!(f, "the processor refused the guest state, reason {reason:#x}"),
            Crash::UnknownExit { reason } => write!(f, "KVM exit {reason}, which this VMM does not know"),
            Crash::EntryFailed { error } => write!(f, "the vCPU could not be made ready for KVM_RUN: {error}"),
            Crash::RunFailed { errno } => {
                write!(f, "KVM_RUN failed: {}", std::io::Error::from_raw_os_error(*errno))
            }
        }
    }
}

/// How one vCPU goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunMode {
    /// Until something happens.
    Continue,
    /// One instruction, interrupts blocked.
    Step,
    /// Steps while RIP stays inside `start .. end` (`vCont;r`).
    StepRange {
        /// First address of the range.
        start: u64,
        /// First address behind the range.
        end: u64,
    },
    /// Not at all: it stays parked while others run (scheduler-locking).
    Parked,
}

/// How every vCPU goes on. Total by construction: each vCPU has exactly one mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResumePlan {
    modes: Vec<RunMode>,
}

impl ResumePlan {
    /// All `vcpus` vCPUs in one mode.
    pub fn all(vcpus: usize, mode: RunMode) -> Self {
        Self { modes: vec![mode; vcpus] }
    }

    /// The same plan with another mode for `vcpu`. A vCPU that does not exist changes nothing.
    #[must_use]
    pub fn with(mut self, vcpu: VcpuId, mode: RunMode) -> Self {
        if let Some(slot) = self.modes.get_mut(vcpu.index()) {
            *slot = mode;
        }
        self
    }

    /// The mode of `vcpu`; [`RunMode::Parked`] for one that does not exist.
    pub fn mode(&self, vcpu: VcpuId) -> RunMode {
        self.modes.get(vcpu.index()).copied().unwrap_or(RunMode::Parked)
    }
}
