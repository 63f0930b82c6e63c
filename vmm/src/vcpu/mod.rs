//! vCPU threads: the only code that touches a vCPU.
//!
//! [`Cpu`] is what a thread can do with its vCPU, `thread` is the loop that obeys the
//! [coordinator](crate::coordinator) and runs the guest, `protocol` is what the two say to each
//! other, and `kvm` turns it all into ioctls.

mod cpu;
mod dr_access;
mod dr_writes;
mod guest_level;
#[cfg_attr(feature = "shuttle", allow(dead_code))]
pub mod kick;
mod kvm;
mod kvm_state;
mod over;
pub(crate) mod protocol;
mod raised;
mod registers;
mod stats;
mod step;
mod store;
mod synced;
pub(crate) mod thread;
mod unserved;
mod xsave;

pub use cpu::{Arming, Cpu, Exit, Raised, Ring3, Standing};
pub use kvm::{ArmHook, KvmCpu};
pub use registers::{Activity, DescriptorTable, Fpu, Glance, Registers, Segment};
