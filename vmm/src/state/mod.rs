//! A whole machine as data: saved here, restored in another process, on another day, on another host.
//!
//! ```text
//!   Vm::save ──► MachineState ── to_json ──► state.json ── from_json ──► MachineState ──► Vm::restore
//!                                  guest memory ──► vmcore ──► MemorySource ──────────────────┘
//! ```
//!
//! The state is the guest's alone (law 69): no breakpoint, no patch, no protected page, no step of ours is in it, and
//! nothing is half done, because only a parked machine is saved (law C4). Memory is not in it; whoever keeps it reads
//! it with [`Vm::read_physical`](crate::Vm::read_physical), which does not show patches.
//!
//! The types are ours and not KVM's structs, so that what was written can be read when those have grown. They say what
//! a manual says, in its words; large areas that a manual lays out byte by byte are [`Blob`]s. [`SCHEMA`] grows when a
//! member changes its meaning, or when one is added without which an older Trapline would restore something else.
//!
//! **Time** stands still while a machine is a file: TSC, kvmclock and timers go on from where they were. The real-time
//! clock shows the host's time.

mod check;
mod chips;
mod devices;
mod features;
mod hex;
mod stop;
#[cfg(test)]
mod tests;
mod vcpu;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub(crate) use check::is_same_tsc;
pub use check::{Host, RestoreError};
pub use chips::{ChipState, IOAPIC_PINS, IoApicState, PicState, PitAccess, PitChannel, PitState};
pub use devices::{DeviceState, DiskState};
pub use hex::{Blob, Word};
pub use stop::{ReasonState, StopState};
pub use vcpu::{
    ActivityState, CpuidLeaf, DebugState, EventState, ExceptionState, GeneralState, OwedState, SegmentState, SmmState,
    SystemState, TableState, VcpuState,
};

use crate::boot::Entry;
use crate::coordinator::CoordinatorError;
use crate::devices::virtio::VirtioState;

/// The version of what is written.
pub const SCHEMA: u32 = 1;

/// A parked machine without its memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Where it ran.
    pub host: Host,
    /// Guest memory in bytes.
    pub memory: u64,
    /// What was booted, and where it was put.
    pub entry: Entry,
    /// What CPUID answers on each vCPU, as KVM was told: some flavours tell something else when they are asked.
    pub cpuid: Vec<Vec<CpuidLeaf>>,
    /// Each vCPU, by its number.
    pub vcpus: Vec<VcpuState>,
    /// What KVM keeps for all of them.
    pub chips: ChipState,
    /// The devices.
    pub devices: DeviceState,
    /// The virtio devices, by their places.
    pub virtio: BTreeMap<u32, VirtioState>,
    /// The disks, in their order.
    pub disks: Vec<DiskState>,
    /// The vCPU that the last stop was about.
    pub vcpu: u32,
    /// Stops that are (still, or again) to be told before the guest goes on: those after which it cannot, and those that
    /// nobody was told of. Breakpoints are not among them.
    pub stops: Vec<StopState>,
}

/// Why a machine was not saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// It runs, it is over, or a vCPU could not say what it holds.
    #[error("the machine cannot be saved: {0}")]
    Vcpu(#[from] CoordinatorError),
    /// KVM did not tell.
    #[error("the machine cannot be saved: KVM refused to {step}: {error}")]
    Kvm {
        /// What was being done.
        step: &'static str,
        /// What it said.
        error: std::io::Error,
    },
}

/// A part of a state holds what no machine of ours has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the {0} in it cannot be that of a machine")]
pub struct BrokenState(pub &'static str);

/// Where the contents of guest memory come from.
pub trait MemorySource {
    /// What is there, as (guest-physical address, length), ascending. All else is zero.
    fn ranges(&self) -> Vec<(u64, u64)>;

    /// Fills `into` from `gpa` on; all of it lies in one of the ranges.
    ///
    /// # Errors
    /// What reading says. The machine is not restored then.
    fn read(&self, gpa: u64, into: &mut [u8]) -> std::io::Result<()>;
}

impl MachineState {
    /// As JSON, indented.
    pub fn to_json(&self) -> String {
        // Only a map with keys that are no text, or an `impl Serialize` that says so, can fail here.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// From JSON of this version or an older one.
    ///
    /// # Errors
    /// One line that says what is wrong with it, whatever it is.
    pub fn from_json(json: &[u8]) -> Result<Self, RestoreError> {
        #[derive(Deserialize)]
        struct Version {
            schema: u64,
        }
        let unreadable = |error: serde_json::Error| RestoreError::Unreadable(error.to_string());
        let Version { schema } = serde_json::from_slice(json).map_err(unreadable)?;
        if schema != u64::from(SCHEMA) {
            return Err(RestoreError::Schema { schema });
        }
        let state: MachineState = serde_json::from_slice(json).map_err(unreadable)?;
        state.check()?;
        Ok(state)
    }
}
