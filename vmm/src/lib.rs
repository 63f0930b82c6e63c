//! The machine (guest memory, boot, devices, vCPU threads) and the debug core.
//!
//! [`Vm`] is the whole: it boots a guest, stopped at its first instruction, and hands out what a
//! debugger needs. Below it, [`debug`] is pure (what is armed, what a trap means), [`coordinator`]
//! makes all vCPUs follow one set of breakpoints, and [`vcpu`] runs guest code.

#![deny(unsafe_code)]

pub mod acpi;
pub mod boot;
pub mod coordinator;
pub mod cpuid;
pub mod debug;
pub mod devices;
pub mod ground;
pub mod limits;
#[cfg_attr(feature = "shuttle", allow(dead_code))]
mod machine;
pub mod memory;
#[cfg_attr(feature = "shuttle", allow(dead_code))]
mod memslots;
pub mod msrs;
pub mod paging;
pub mod probe;
pub mod state;
mod sync;
pub mod vcpu;
#[cfg(not(feature = "shuttle"))]
mod vm;

pub use machine::{HostError, KvmGround};
#[cfg(not(feature = "shuttle"))]
pub use vm::{RestoreConfig, VcpuHook, Vm, VmConfig, VmError};
