//! The debug core in gdb's words.
#![forbid(unsafe_code)]

pub mod address;
mod arch;
mod debuggee;
mod framing;
pub mod limits;

pub use address::{Address, AddressError};
pub use debuggee::{Debuggee, DebuggeeError};
