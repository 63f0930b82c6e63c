//! What keeps a run from beginning, or from going on.

use std::io;
use std::path::PathBuf;

use trapline_vmm::VmError;
use trapline_vmm::coordinator::CoordinatorError;
use trapline_vmm::debug::BreakpointError;
use trapline_vmm::probe::ProbeError;

use crate::Verdict;
use crate::files::WriteError;
use crate::initramfs::InitramfsError;
use crate::rules::RuleError;
use crate::symbols::SymbolsError;

/// Bad input (sysexits.h).
const EX_USAGE: u8 = 64;
/// This host cannot do it.
pub(super) const EX_UNAVAILABLE: u8 = 69;

/// A run that cannot be. Each says what to do about it; whose fault it is, is the caller's to decide.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A file that the guest is to be made of.
    #[error("cannot open the {what} {}: {source}; check the path", path.display())]
    Open {
        /// What it is.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Rules that mean nothing here: all of them.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Rules(Vec<RuleError>),
    /// A rule wants what was not asked for.
    #[error("{0}")]
    Usage(String),
    /// Files with symbols.
    #[error(transparent)]
    Symbols(#[from] SymbolsError),
    /// The initial RAM disk cannot be made.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// A file of the report cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// There is no machine.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// What this host can do cannot be found out.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// This host cannot serve these traps, each in words.
    #[error("{}", .0.join("\n"))]
    Refused(Vec<String>),
    /// This host cannot serve the traps.
    #[error("{0}; `trapline plan` shows what serves each trap here")]
    Arm(#[from] BreakpointError),
    /// Where the kernel is, and so where its symbols are, cannot be found out.
    #[error("{0}")]
    Kaslr(String),
    /// A vCPU failed.
    #[error(transparent)]
    Vcpu(#[from] CoordinatorError),
    /// Timers, eventfds.
    #[error("{0}; raise the limit of open files (ulimit -n)")]
    Resources(#[from] io::Error),
}

impl RunError {
    /// The exit code of `trapline run` for it.
    pub fn exit_code(&self) -> u8 {
        if self.is_hosts() { EX_UNAVAILABLE } else { EX_USAGE }
    }

    /// How a run ends that has begun and cannot go on.
    pub(super) fn verdict(&self) -> Verdict {
        Verdict::aborted(self.exit_code(), &self.to_string())
    }

    /// Whether it is this host that cannot, rather than what was asked that is wrong.
    pub fn is_hosts(&self) -> bool {
        match self {
            RunError::Vm(error) => error.is_hosts(),
            RunError::Refused(_)
            | RunError::Probe(_)
            | RunError::Arm(_)
            | RunError::Kaslr(_)
            | RunError::Vcpu(_)
            | RunError::Resources(_) => true,
            _ => false,
        }
    }
}
