//! What this host's KVM really does, as opposed to what it claims.
//!
//! KVM reports the same capability bits on flavours where a data watchpoint is accepted and never
//! fires. So each question is put to a tiny guest that does the thing, on a virtual machine of its
//! own ([`capabilities()`]): `bench` is that machine, `guests` are the guests, `questions` ask, and
//! `alarm` sees to it that no guest can hold the asker. The answers are kept for as long as
//! the kernel, the KVM module, the processor and this program stay the same (`cache`).

mod alarm;
mod bench;
mod broken;
mod cache;
mod capabilities;
mod guests;
mod host;
mod questions;

use std::io;
use std::sync::{Mutex, PoisonError};

pub use broken::BrokenClaim;
pub use capabilities::{
    BlockIrq, Capabilities, Claims, DrAccess, GuestDrValues, GuestSlots, GuestTrapFlag, HaltStep, Inject, InjectBp,
    Int3, Kick, MultiHit, OutRip, OverExit, PushedFlags, ReadonlyWrite, RealModeSlots, ResumeFlag, SCHEMA, Seen, Slot,
    SoftwareInterrupt, Step, StepOverExit, StickyStep, TripleFault,
};
pub use host::HostIdentity;

use crate::machine::HostError;
use bench::Bench;

/// Why nothing is known about this host.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// There is no usable KVM.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The memory for the probe's guest cannot be had.
    #[error("cannot make the guest that tries out this host's KVM: {0}")]
    Memory(String),
    /// The probe's thread cannot be had.
    #[error("cannot start the probe's thread: {0}; raise the limit of threads (ulimit -u)")]
    Thread(io::Error),
    /// A guest runs for ever and no signal ends it.
    #[error("this host's KVM does not let go of a guest that was told to stop; restart the machine")]
    Stuck,
    /// A bug of ours.
    #[error("the probe of this host's KVM failed; please report it, with what it has printed")]
    Panicked,
}

/// Why a question has no answer: what happened in place of one.
#[derive(Debug)]
struct Unclear(String);

/// What this process knows already.
static KNOWN: Mutex<Option<Capabilities>> = Mutex::new(None);

/// What this host's KVM can really do: from this process's memory, from the cache file, or else by
/// trying it out, which takes a fraction of a second. Errors are not remembered.
///
/// The cache file is `$XDG_CACHE_HOME/trapline/capabilities-2.json` (`~/.cache` without the
/// variable). One that cannot be read or written, or that is another host's or another version's of this
/// program, is as good as none.
pub fn capabilities() -> Result<Capabilities, ProbeError> {
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = &*known {
        return Ok(known.clone());
    }
    // Whoever may not use KVM has no use for what is known about it.
    crate::machine::open_kvm()?;
    let host = HostIdentity::of_this_host();
    let found = match cache::load(&host) {
        Some(cached) => cached,
        None => ask_and_save(host)?,
    };
    Ok(known.insert(found).clone())
}

/// As [`capabilities()`], but always by trying it out; the cache is written anew.
pub fn capabilities_afresh() -> Result<Capabilities, ProbeError> {
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let found = ask_and_save(HostIdentity::of_this_host())?;
    Ok(known.insert(found).clone())
}

fn ask_and_save(host: HostIdentity) -> Result<Capabilities, ProbeError> {
    let asked = alarm::watched(move |alarm| {
        let mut bench = Bench::new(alarm)?;
        let claims = bench.claims();
        let (seen, remarks) = questions::ask_all(&mut bench, &host);
        Ok((Capabilities { schema: SCHEMA, host, claims, seen, remarks }, bench.ran_late()))
    });
    let (found, late) = asked?;
    // An answer for want of time is none to keep.
    if !late {
        cache::save(&found);
    }
    Ok(found)
}
