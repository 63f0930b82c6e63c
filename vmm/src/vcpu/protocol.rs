//! What the coordinator and the vCPU threads say to each other.
//!
//! Every [`Command`] is answered exactly once, with the number it came with; a vCPU that finds
//! something out by itself parks and then says so with an [`Event`]. Both travel through one
//! channel, so that an event is always seen before the answer that was sent after it.

use super::{Activity, Glance, Registers};
use crate::debug::{DebugImage, Notice, Piece, RunMode, Stop, VcpuId};
use crate::state::VcpuState;
use crate::sync::Arc;

/// From the coordinator to one vCPU thread.
#[derive(Debug)]
pub(crate) struct Command {
    pub(crate) seq: u64,
    pub(crate) request: Request,
}

#[derive(Debug, Clone)]
pub(crate) enum Request {
    /// Make this image the one in force, now.
    Install(Arc<DebugImage>),
    /// Stop running guest code, with no access left half-done.
    Park,
    /// Go on in this mode.
    Resume(RunMode),
    /// Go on as before, if it was a Park that stopped it and not a reason of its own.
    Unpark,
    /// What was reported at the present pc was never told to anybody: report it again, unless a
    /// handler has heard of it.
    Untell,
    /// All other vCPUs are parked: step over the patch on which this one waits to be alone.
    StepOver,
    /// Devices have stored to watched pages by themselves: tell those who watch, if it runs.
    TellDeviceStores,
    ReadRegisters,
    WriteRegisters(Box<Registers>),
    ReadActivity,
    /// What it is doing now, whether it runs or not.
    Glance,
    /// Translate each of these linear ranges, `(addr, len)`.
    Locate(Vec<(u64, u64)>),
    /// Say everything that the vCPU is.
    Save,
    /// Be what was saved.
    Restore(Box<VcpuState>),
    /// Disarm everything and end the thread.
    Quit,
}

/// From a vCPU thread to the coordinator.
#[derive(Debug)]
pub(crate) enum Message {
    Answer(Answer),
    Event(Event),
    /// This vCPU has parked itself until it may step over a patch with all others parked.
    WantsAlone(VcpuId),
    Notice(Notice),
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) vcpu: VcpuId,
    pub(crate) seq: u64,
    pub(crate) result: Result<Reply, String>,
}

#[derive(Debug)]
pub(crate) enum Reply {
    Done,
    Registers(Box<Registers>),
    Activity(Activity),
    State(Box<VcpuState>),
    Glance(Glance),
    /// For each range its pieces in guest-physical memory; `None` if not all of it is mapped.
    Located(Vec<Option<Located>>),
}

/// Where a linear range is.
#[derive(Debug, Clone)]
pub(crate) struct Located {
    pub(crate) pieces: Vec<Piece>,
    /// Its first byte can be ring 3's.
    pub(crate) user: bool,
}

/// A vCPU has parked itself for these stops of its own. Never empty.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) stops: Vec<Stop>,
}
