//! The built-in demo guest: every CPU counts, and there is something to trap.
//!
//! Functions worth a breakpoint: `count_up` (hot; every CPU), `count_up_traced`
//! (the same, but beginning with `endbr64` and a nop of five bytes as Linux's
//! functions do), `publish` (every 64th round), `count_a_round`, `cpu_loop`,
//! `tick` and `print_progress` (CPU 0). The labels `count_up_here` and
//! `count_up_traced_here` stand on the very instruction that counts, so that
//! hits there and [`count_address`] can be compared exactly.
//!
//! Variables worth a watchpoint: `jiffies` (u64, ten times a second), `last_writer`
//! (u32) and `rounds_published` (u64), `stop_request` (u32; non-zero ends the
//! guest with `exit_status`). What must stay 0: `debug_exceptions_seen` and
//! `breakpoint_exceptions_seen` (u64), the #DB and #BP that reached the guest.
//!
//! Command line: `ticks=N` ends it after N ticks, `exit=V` sets the status for
//! that and for `stop_request`, `quiet` stops the progress lines. `q` on the
//! console ends it with status 0.

use crate::MAX_CPUS;

/// Size of one `struct cpu` in the array `cpus`.
pub const CPU_SIZE: u64 = 64;

/// Offset in `struct cpu` of the u64 that `count_up` increments.
pub const COUNT_OFFSET: u64 = 0;

/// Offset in `struct cpu` of the u64 that `count_up_traced` increments.
pub const TRACED_COUNT_OFFSET: u64 = 8;

/// Offset in `struct cpu` of the u64 that counts the rounds, at the end of `count_a_round`.
pub const ROUNDS_OFFSET: u64 = 16;

/// Where CPU number `cpu` (0 is the boot processor, the others in MADT order)
/// keeps how often it ran `count_up_here`; `None` beyond the last possible CPU.
pub fn count_address(cpu: u32) -> Option<u64> {
    Some(cpu_address(cpu)? + COUNT_OFFSET)
}

/// As [`count_address`], for `count_up_traced_here`.
pub fn traced_count_address(cpu: u32) -> Option<u64> {
    Some(cpu_address(cpu)? + TRACED_COUNT_OFFSET)
}

/// As [`count_address`], for the rounds: how often `count_a_round` was left.
pub fn rounds_address(cpu: u32) -> Option<u64> {
    Some(cpu_address(cpu)? + ROUNDS_OFFSET)
}

fn cpu_address(cpu: u32) -> Option<u64> {
    let first = crate::symbol(crate::demo(), "cpus")?;
    (cpu < MAX_CPUS).then(|| first + u64::from(cpu) * CPU_SIZE)
}
