//! The debug core in gdb's words.
//!
//! A gdb (or lldb) connects, and sees the guest as one process whose threads are the vCPUs:
//!
//! ```text
//!  socket ─► server ─► session ─► framing ─► packet ─► front ─► engine (gdbstub) ─► adapter ─► Debuggee
//!               ▲         │                              │                            │
//!               └─ bytes ─┴────────── framing ◄──────────┴─────────── stop ◄──────────┘
//! ```
//!
//! * [`server`](Server): sockets, readiness, one client at a time.
//! * `session`: one client; stopped or running.
//! * `framing`: bytes to packets: checksums, acknowledgements, noise.
//! * `packet`, `front`: what a packet says, and who answers it. gdbstub ends a session over any
//!   malformed packet; it only sees packets that we wrote.
//! * `engine`: gdbstub's state machine. `adapter`: the [`Debuggee`] in gdbstub's words.
//! * `arch`: the registers and `target.xml`. `stop`: a stop as gdb reads it.
#![forbid(unsafe_code)]

mod adapter;
pub mod address;
mod arch;
mod debuggee;
mod engine;
mod framing;
mod front;
pub mod limits;
mod packet;
mod server;
mod session;
mod stop;
mod target;
mod threads;
mod vm;

pub use address::{Address, AddressError, Listening};
pub use debuggee::{Debuggee, DebuggeeError};
pub use server::{Interest, Outcome, Server};
pub use target::Target;
