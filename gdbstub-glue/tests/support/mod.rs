//! What the protocol tests and the example share: a machine made of plain memory, and the event
//! loop that a VMM would have.
#![allow(dead_code, reason = "each user takes what it needs")]
#![allow(unreachable_pub, reason = "the example is a crate of its own")]
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, or ends the example")]

pub mod clients;
pub mod event_loop;
pub mod fake;
