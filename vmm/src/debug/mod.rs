//! The debug core: what is armed, what a trap means, what happens at resume.
//!
//! Everything here is pure: no KVM, no threads, no I/O. One owner (the
//! [coordinator](crate::coordinator)) changes the [`SlotTable`]; every change is
//! turned into one immutable [`DebugImage`] that all vCPU threads install; each
//! vCPU thread reads its own traps against the image *it* had installed.
//!
//! ```text
//!  Breakpoint request ─► SlotTable ─► DebugImage ─► every vCPU ─► OK or all as before
//!                                        │
//!  KVM_EXIT_DEBUG ─► classify(image) ◄───┘ ─► StopReason ─► coordinator ─► gdb, harness
//! ```

mod breakpoint;
mod classify;
mod guest;
mod handler;
mod image;
mod inplace;
mod place;
mod registers;
mod slots;
mod stop;

pub use breakpoint::{Breakpoint, BreakpointError, Level, Owner, Trigger};
pub use classify::{BP, Causes, DebugExit, Expectation, GuestView, classify};
pub use guest::{GENERAL_DETECT, GuestBreakpoint, GuestBreakpoints, GuestRegisters, Overlay, Remembered};
pub(crate) use handler::GuestState;
pub use handler::{Disposition, Handler, Hit, PortHandler, PortHit};
pub use image::{DebugImage, Epoch, Patch, Slot, SlotOwner, WatchedRange};
pub use inplace::{General, carry_out};
pub use place::{Change, INT3, Mechanism, Offer, Piece, Place};
pub use registers::{Dr6, Dr7, SLOTS, SlotCondition, SlotLen};
pub use slots::{Notice, Prepared, SlotTable};
pub use stop::{Crash, Ending, PortAccess, ResumePlan, RunMode, Stop, StopReason, Stored, VcpuId};
