//! From a stopped vCPU's registers and memory to its backtrace.
//!
//! ```text
//! registers ──► Place ──► step ──► Place ──► step ──► .. ──► End
//!                          │ pc has an ORC entry     orc.rs    what the kernel itself unwinds by; knows its assembly
//!                          │  (in a file, or only in the guest: guest.rs)
//!                          │ else call frame info    cfi.rs    .debug_frame, .eh_frame
//!                          │ else %rbp, %rsp         chain.rs  frame pointers; function starts, leaves, calls to nowhere
//! ```
//!
//! ORC comes first because objtool has followed the instructions: it knows what inline assembly pushes, and where entry
//! code has put the registers of whom it interrupted. Call frame information, which compilers write and gdb uses,
//! knows neither.
//!
//! Nothing that is read can be relied on: the tables may be broken, and the stack is the guest's. A step that
//! does not lead to a plausible frame ends the backtrace with a word on why; no step leads back to a frame that
//! was there already, and there are never more than [`MOST_FRAMES`].

mod cfi;
mod chain;
mod code;
mod guest;
mod orc;
mod place;
mod records;
mod tables;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::OnceLock;

use trapline_vmm::vcpu::Registers;

use cfi::CallFrames;
use guest::Guest;
use orc::{Kind, OrcTable};
use place::{Place, RBP};
pub use records::records;
pub use tables::Tables;

use crate::symbols::{Memory, Symbols};

/// Most frames of a backtrace. Linux's stacks are 16 KiB, and its deepest chains of calls some 100.
pub const MOST_FRAMES: usize = 256;

const NOTHING_KNOWN: &str = "nothing is known about this code";

/// How exact the address of a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// The next instruction: of the vCPU itself, of what an interrupt or exception has interrupted, or of a thread that has not
    /// begun.
    Exact,
    /// A return address. The call stands before it: look up the names of `pc - 1`.
    Call,
    /// User space. It is the last frame.
    User,
}

/// One function that has been entered and not been left. What was inlined into it has no frame of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Linear address.
    pub pc: u64,
    /// The stack pointer when `pc` is executed (again).
    pub sp: u64,
    /// What `pc` is.
    pub kind: FrameKind,
}

impl Frame {
    /// The address whose function and source line are meant.
    pub fn lookup(&self) -> u64 {
        match self.kind {
            FrameKind::Call => self.pc.wrapping_sub(1),
            FrameKind::Exact | FrameKind::User => self.pc,
        }
    }
}

/// Why a backtrace has no more frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The first function of its stack.
    Complete,
    /// The last frame is in user space.
    User,
    /// There is more, but it was not found; why.
    Lost(&'static str),
    /// There are more than [`MOST_FRAMES`].
    TooDeep,
}

/// The frames of one vCPU, innermost first: at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backtrace {
    /// The frames.
    pub frames: Vec<Frame>,
    /// Why it ends after the last.
    pub end: End,
}

/// Unwinds the stacks of one kernel. Its tables are read when they are first needed, and kept.
pub struct Unwinder<T = Symbols> {
    tables: T,
    orc: OnceLock<Option<OrcTable>>,
    guest: Guest,
    call_frames: OnceLock<CallFrames>,
}

impl<T: Tables> Unwinder<T> {
    /// With the tables of one kernel.
    pub fn new(tables: T) -> Self {
        Self { tables, orc: OnceLock::new(), guest: Guest::default(), call_frames: OnceLock::new() }
    }

    /// The backtrace of a vCPU that has these registers, and reads this memory.
    pub fn unwind(&self, registers: &Registers, memory: &dyn Memory) -> Backtrace {
        let (places, end) = self.places(registers, memory);
        Backtrace { frames: places.iter().map(Place::frame).collect(), end }
    }

    /// RBP in each of the frames that [`unwind`](Self::unwind) gives, where it is known: with it a debugger can go on from
    /// a frame.
    pub fn frame_pointers(&self, registers: &Registers, memory: &dyn Memory) -> Vec<Option<u64>> {
        self.places(registers, memory).0.iter().map(|place| place.value(RBP)).collect()
    }

    fn places(&self, registers: &Registers, memory: &dyn Memory) -> (Vec<Place>, End) {
        let mut place = Place::of(registers);
        let mut places = vec![place];
        let end = loop {
            if place.kind == FrameKind::User {
                break End::User;
            }
            if !in_64_bit_mode(registers) {
                break End::Lost("the vCPU is not in 64-bit mode");
            }
            if places.len() == MOST_FRAMES {
                break End::TooDeep;
            }
            place = match self.step(&place, memory) {
                Ok(next) => next,
                Err(end) => break end,
            };
            if places.iter().any(|before| before.frame() == place.frame()) {
                break End::Lost("the stack leads back into itself");
            }
            places.push(place);
        };
        (places, end)
    }

    /// Who called, or was interrupted.
    fn step(&self, place: &Place, memory: &dyn Memory) -> Result<Place, End> {
        if place.kind == FrameKind::Exact && !code::is_there(memory, place.pc) {
            // A call to nowhere has done nothing but push its return address.
            return chain::leaf(place, memory);
        }
        let mut next = self.unchecked_step(place, memory)?;
        if next.kind == FrameKind::Call && self.begins_threads(next.pc) {
            next.kind = FrameKind::Exact;
        }
        let is_elsewhere = place.pc >> 63 != next.pc >> 63 || !code::is_there(memory, next.pc);
        if next.kind == FrameKind::Call && is_elsewhere {
            return Err(End::Lost("the return address is not one of code"));
        }
        Ok(next)
    }

    fn unchecked_step(&self, place: &Place, memory: &dyn Memory) -> Result<Place, End> {
        let lookup = place.frame().lookup();
        if let Some(entry) = self.orc_entry(lookup, memory) {
            match entry.kind {
                Kind::End => return Err(End::Complete),
                Kind::Undefined => {}
                Kind::Call | Kind::Registers | Kind::Iret => return orc::step(entry, place, memory),
            }
        }
        if let Some(thunks) = self.thunks().filter(|thunks| thunks.contains(&lookup)) {
            // Half way through a retpoline there is an address of its own on top of its caller's.
            let mut caller = chain::leaf(place, memory)?;
            while thunks.contains(&caller.pc) {
                caller = chain::leaf(&caller, memory)?;
            }
            return Ok(caller);
        }
        let call_frames = self.call_frames.get_or_init(|| CallFrames::read(&self.tables));
        match call_frames.step(&self.tables, lookup, place, memory) {
            Some(stepped) => stepped,
            None => match chain::step(place, self.tables.function(lookup), memory) {
                // A kernel with ORC uses RBP for anything.
                Err(End::Complete) if self.image_orc().is_some() => Err(End::Lost(NOTHING_KNOWN)),
                stepped => stepped,
            },
        }
    }

    /// Whether a new thread begins there when it is switched to for the first time. Nobody has called that; the kernel's own
    /// unwinder knows it by name, too.
    fn begins_threads(&self, pc: u64) -> bool {
        ["ret_from_fork_asm", "ret_from_fork"].iter().any(|name| self.tables.symbol(name) == Some(pc))
    }

    /// The code by which a kernel calls through a register, of which no table knows anything.
    fn thunks(&self) -> Option<Range<u64>> {
        self.tables.function(self.tables.symbol("__x86_indirect_thunk_array")?)
    }

    fn image_orc(&self) -> Option<&OrcTable> {
        self.orc.get_or_init(|| OrcTable::read(&self.tables)).as_ref()
    }

    fn orc_entry(&self, addr: u64, memory: &dyn Memory) -> Option<orc::Entry> {
        self.orc_entry_of(addr, memory).or_else(|| {
            let original = guest::original(&self.tables, addr, memory)?;
            self.orc_entry_of(original, memory)
        })
    }

    /// What ORC says of `addr`; `None` if it says nothing.
    fn orc_entry_of(&self, addr: u64, memory: &dyn Memory) -> Option<orc::Entry> {
        let image = self.image_orc();
        let entry = image.and_then(|table| table.find(addr)).filter(|entry| entry.kind != Kind::Undefined);
        entry.or_else(|| self.guest.entry(&self.tables, image.map(OrcTable::format), addr, memory))
    }
}

/// The backtrace of a vCPU, for once; an [`Unwinder`] keeps what it has read.
pub fn unwind(tables: impl Tables, registers: &Registers, memory: &dyn Memory) -> Backtrace {
    Unwinder::new(tables).unwind(registers, memory)
}

/// Long mode is active and the code segment is a 64-bit one (SDM vol. 3, 3.4.5).
fn in_64_bit_mode(registers: &Registers) -> bool {
    const EFER_LMA: u64 = 1 << 10;
    const CS_L: u32 = 1 << 13;
    registers.efer & EFER_LMA != 0 && registers.cs.attributes & CS_L != 0
}
