//! Traps with code of yours as their actions, on the built-in guest:
//!
//! ```console
//! $ cargo run --release -p trapline-harness --example closures
//! ```
//!
//! A closure runs on the thread of the vCPU that has hit, while the other vCPUs go on, and decides whether the guest does.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use trapline_harness::run::{Kernel, Outcome, Run, RunError};
use trapline_vmm::debug::Disposition;

/// Calls of `count_up` by each vCPU, until there were a thousand or the guest has ended.
pub(crate) fn count() -> Result<(Outcome, [u64; 2]), RunError> {
    let calls: Arc<[AtomicU64; 2]> = Arc::default();
    let counted = calls.clone();
    let outcome = Run::new(Kernel::Bytes("demo".to_owned(), trapline_guests::demo()))
        .cpus(2)
        .memory(64 << 20)
        .cmdline("quiet")
        .trap_with("exec:count_up", move |hit| {
            // What it counts up is behind its argument, `struct cpu *`; of the guest's memory as this vCPU sees it.
            let mut count = [0; 8];
            let argument = hit.registers().map_or(0, |registers| registers.rdi);
            let was_read = hit.read(argument, &mut count) == count.len();
            let before = counted[hit.vcpu().0 as usize].fetch_add(1, Ordering::Relaxed);
            let agrees = was_read && u64::from_le_bytes(count) >= before;
            if agrees && before + 1 < 1000 { Disposition::Continue } else { Disposition::Stop }
        })
        .trap("exec:tick =log")
        .timeout(Duration::from_secs(60))
        .run()?;
    Ok((outcome, calls.each_ref().map(|calls| calls.load(Ordering::Relaxed))))
}

#[allow(dead_code)]
fn main() -> Result<ExitCode, RunError> {
    let (outcome, calls) = count()?;
    println!("{}, after {} and {} calls", outcome.verdict, calls[0], calls[1]);
    for frame in outcome.report.stop.iter().flat_map(|stop| &stop.backtrace) {
        println!("  {}", frame.function);
    }
    Ok(ExitCode::from(outcome.exit_code()))
}
