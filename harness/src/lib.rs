//! Trapline without a person: what a run amounts to.
//!
//! A run ends with a [`Verdict`]; a script sees its exit code, a person its one line.
#![deny(unsafe_code)]

pub mod bundle;
pub mod console;
pub mod files;
pub mod initramfs;
pub mod report;
pub mod rules;
pub mod run;
pub mod symbols;
pub mod unwind;
mod verdict;
pub mod vmcore;

pub use verdict::Verdict;
