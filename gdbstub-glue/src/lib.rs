//! The debug core in gdb's words.
#![forbid(unsafe_code)]

mod debuggee;

pub use debuggee::{Debuggee, DebuggeeError};
