//! vCPU threads: the only code that touches a vCPU.

mod registers;

pub use registers::{Activity, DescriptorTable, Fpu, Registers, Segment};
