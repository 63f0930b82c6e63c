//! Trapline without a person: what a run amounts to.
//!
//! A run ends with a [`Verdict`]; a script sees its exit code, a person its one line.
#![forbid(unsafe_code)]

pub mod initramfs;
pub mod report;
mod verdict;

pub use verdict::Verdict;
