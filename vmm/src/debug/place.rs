//! Where a request lies in guest-physical memory, and what this host can do with it there.
//!
//! Slots know linear addresses. What goes beyond them, INT3 patches and read-only pages, changes
//! or protects guest memory itself, and so is a matter of physical addresses (law 57).

use super::{Breakpoint, Handler, Owner};

/// The opcode of a patch.
pub const INT3: u8 = 0xcc;

/// How one request is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mechanism {
    /// In debug registers, on every vCPU.
    Slots,
    /// By an INT3 in guest memory.
    Patch,
    /// By making its pages read-only, so that stores exit.
    Pages,
}

/// Which mechanisms serve on this host. Execution slots always do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// Data slots fire.
    pub data_slots: bool,
    /// INT3 in guest code comes to us and not to the guest.
    pub patches: bool,
    /// In ring 3, too.
    pub user_patches: bool,
    /// A store to a read-only page exits with its data.
    pub pages: bool,
}

impl Offer {
    /// The debug registers and nothing else.
    pub const SLOTS: Offer = Offer { data_slots: true, patches: false, user_patches: false, pages: false };
}

/// A piece of a request's range that lies in one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Bytes; it does not cross the end of a 4 KiB page.
    pub len: u64,
}

/// Where the bytes of a request were in guest-physical memory when it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// In the order of their linear addresses.
    pub pieces: Vec<Piece>,
    /// What the first byte held. A patch puts it back.
    pub original: u8,
    /// Ring 3 may use it.
    pub user: bool,
}

/// One thing that a change of the set does.
#[derive(Debug, Clone)]
pub enum Change {
    /// Hold `request` for `owner`.
    Set {
        /// Who asks.
        owner: Owner,
        /// What for.
        request: Breakpoint,
        /// What decides about a hit; without one every hit stops the world.
        handler: Option<Handler>,
        /// Where it lies; `None` if it is not mapped or nobody has looked: then only slots serve it.
        place: Option<Place>,
    },
    /// Hold it no longer.
    Clear {
        /// Who asks.
        owner: Owner,
        /// What for.
        request: Breakpoint,
    },
}
