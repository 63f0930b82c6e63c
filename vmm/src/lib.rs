//! Trapline's machine (guest memory, boot, devices, vCPU threads) and its debug core.

#![deny(unsafe_code)]

pub mod boot;
pub mod devices;
pub mod limits;
pub mod memory;
