//! Trapline's small guests, built from source, one ELF image each.
//!
//! The images are made by `build.rs` with the system's C compiler and carry
//! debug information that names their sources relative to the repository's
//! root. [`symbol`] finds an address in them by name.
//!
//! All bare-metal guests expect the same handoff: long mode, the first 4 GiB
//! identity-mapped, interrupts off, RDI = the address of an `hvm_start_info`
//! (whose command line they read) or 0. They print on COM1 (0x3f8, polled) and end the run with a
//! byte written to port 0xf4, their exit status. CPUs are found in the ACPI
//! MADT and started by its wakeup mailbox (type 16) if there is one, else by
//! INIT and SIPI.

#![forbid(unsafe_code)]

pub mod acts;
pub mod demo;
mod elf;
pub mod fixture;
pub mod formats;

pub use elf::{entry, symbol, symbols};

/// Exit status of a guest that took an exception it has no use for.
pub const STATUS_EXCEPTION: u8 = 99;

/// Exit status of a guest that was asked for something it does not know.
pub const STATUS_USAGE: u8 = 64;

/// Most CPUs a guest starts.
pub const MAX_CPUS: u32 = 64;

/// The guest that does one thing, mostly a way to end; see [`mod@acts`].
pub fn acts() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/acts.elf"))
}

/// The demo guest; see [`mod@demo`].
pub fn demo() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/demo.elf"))
}

/// PID 1 for a Linux guest that runs one program: a static executable, to be `/init` of an initramfs.
///
/// The head of `init/init.c` says what it reads and what it does. If the machine does not take the program's exit
/// status, it prints [`INIT_EXIT_LINE`] with the status behind and powers off.
pub fn init() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/init.elf"))
}

/// What stands before the status, in decimal, in the last line that [`init`] prints where nothing took the status.
pub const INIT_EXIT_LINE: &str = "trapline-init: exit ";

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;
