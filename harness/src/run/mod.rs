//! A run that nobody watches, from its description to its report.
//!
//! ```text
//!  Run (kernel, rules, outputs) ─► prepare: rules resolved, files writable, machine made ─► Vm + Supervisor
//!                                                                                             │
//!       the owner of the event loop (Run::run, or the `trapline` command)  ◄── Next ──────────┤ stopped, ready
//!                                                                                             ▼
//!                                           Verdict, Report and every file of it  ◄──── Supervisor::finish
//! ```
//!
//! What can be wrong is wrong before the guest's first instruction: a rule's symbol that is not there, a directory that
//! cannot be written, a host that cannot serve a trap.
//!
//! ```no_run
//! use std::time::Duration;
//! use trapline_harness::run::Run;
//!
//! let outcome = Run::new("vmlinuz")
//!     .initrd("fs.cpio")
//!     .cmdline("console=ttyS0 panic=-1")
//!     .trap("panic")
//!     .trap("write:init_task.flags if new & 0x40 =log")
//!     .trap_with("exec:vfs_read", |hit| {
//!         println!("vCPU {} at {:#x}", hit.vcpu().0, hit.pc());
//!         trapline_vmm::debug::Disposition::Continue
//!     })
//!     .timeout(Duration::from_secs(60))
//!     .report("report")
//!     .run()?;
//! println!("{}: {}", outcome.verdict.exit_code(), outcome.verdict);
//! # Ok::<(), trapline_harness::run::RunError>(())
//! ```

mod arming;
mod error;
mod finish;
mod look;
mod modules;
mod names;
mod outputs;
mod plan;
mod prepare;
mod returns;
mod supervisor;
mod trap;
mod watch_loop;
mod watchdog;
mod write;

pub use error::RunError;
pub use finish::Outcome;
pub use outputs::Outputs;
pub use plan::{By, Plan, Planned, PlannedPoint};
pub use prepare::{Kernel, Run};
pub use supervisor::{Ended, Next, Supervisor};
pub use trap::{Callback, Hits, TrapHit, rule_handler};
