//! The machine (boot, memory, devices, vCPU threads) and the debug core.
#![deny(unsafe_code)]

pub mod coordinator;
pub mod debug;
pub mod limits;
mod sync;
pub mod vcpu;
