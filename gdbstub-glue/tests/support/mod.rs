//! What the protocol tests and the example share: a machine made of plain memory, the event
//! loop that a VMM would have, and a client without a debugger.
#![allow(dead_code, reason = "each user takes what it needs")]
#![allow(unreachable_pub, reason = "the example is a crate of its own")]
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, or ends the example")]

pub mod event_loop;
pub mod fake;
pub mod machine;
pub mod raw;
