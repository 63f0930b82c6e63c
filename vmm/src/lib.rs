//! The machine (boot, memory, devices, vCPU threads) and the debug core.
#![deny(unsafe_code)]

pub mod debug;
pub mod vcpu;
