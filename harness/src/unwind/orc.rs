//! ORC, the kernel's own unwind tables (Documentation/arch/x86/orc-unwinder.rst; arch/x86/include/asm/orc_types.h).
//!
//! `.orc_unwind_ip` has the addresses at which an entry begins to hold, `.orc_unwind` the entries: six bytes each, two
//! signed offsets and a word of bit fields. The fields have been renumbered twice; a table does not say by which
//! numbering it was made (kernels from 6.4 on have a hash in `.orc_header`, of a header file that changes for other
//! reasons as well), but it shows: most entries are of plain calls.

use super::guest::GuestOrc;
use super::place::{Place, R10, R13, RBP, RDI, RDX, word};
use super::{End, Memory, Tables};

const ENTRY: usize = 6;
/// Entries of a module's table that are looked at to find out how it is made.
const SAMPLE: u32 = 512;

/// How the bit fields are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// 4.14 to 6.2: type in two bits (0 call, 1 registers, 2 IRET frame), then `end`.
    V1,
    /// 6.3: the same with `signal` between them.
    V2,
    /// From 6.4 on: type in three bits (0 undefined, 1 end, 2 call, 3 registers, 4 IRET frame), then `signal`.
    V3,
}

/// What an entry's frame looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing is known.
    Undefined,
    /// There is no caller.
    End,
    /// Called: the return address is below the caller's stack pointer.
    Call,
    /// Interrupted: a full `struct pt_regs`.
    Registers,
    /// Interrupted: only what the processor pushes.
    Iret,
}

/// An entry, by its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) kind: Kind,
    /// The next frame's address is that of an instruction, and not a return address.
    signal: bool,
    sp_register: u8,
    sp_offset: i16,
    bp_register: u8,
    bp_offset: i16,
}

impl Format {
    /// From what a table's entries look like; `None` if there is not one that would tell.
    fn guess<'a>(entries: impl Iterator<Item = &'a [u8; ENTRY]>) -> Option<Self> {
        let (mut call_is_0, mut call_is_2, mut has_v2_signal) = (0_u32, 0_u32, false);
        for &[.., registers, flags] in entries {
            // Entries without a stack pointer have a type of their own in V3 only.
            if registers & 0xf == UNDEFINED {
                continue;
            }
            match flags & 7 {
                0 => call_is_0 += 1,
                2 => call_is_2 += 1,
                // In V1 this would be a frame with registers that is the last one of its stack.
                5 | 6 => has_v2_signal = true,
                _ => {}
            }
        }
        match (call_is_0, call_is_2) {
            (0, 0) => None,
            (old, new) if new >= old => Some(Format::V3),
            _ if has_v2_signal => Some(Format::V2),
            _ => Some(Format::V1),
        }
    }

    fn decode(self, raw: &[u8; ENTRY]) -> Entry {
        let [sp_low, sp_high, bp_low, bp_high, registers, flags] = *raw;
        let sp_register = registers & 0xf;
        let old_kind = |end: bool| match flags & 3 {
            _ if sp_register == UNDEFINED && end => Kind::End,
            _ if sp_register == UNDEFINED => Kind::Undefined,
            0 => Kind::Call,
            1 => Kind::Registers,
            2 => Kind::Iret,
            _ => Kind::Undefined,
        };
        let (kind, signal) = match self {
            Format::V1 => {
                let kind = old_kind(flags & 4 != 0);
                (kind, matches!(kind, Kind::Registers | Kind::Iret))
            }
            Format::V2 => (old_kind(flags & 8 != 0), flags & 4 != 0),
            Format::V3 => {
                let kind = match flags & 7 {
                    1 => Kind::End,
                    2 => Kind::Call,
                    3 => Kind::Registers,
                    4 => Kind::Iret,
                    _ => Kind::Undefined,
                };
                (kind, flags & 8 != 0)
            }
        };
        Entry {
            kind,
            signal,
            sp_register,
            sp_offset: i16::from_le_bytes([sp_low, sp_high]),
            bp_register: registers >> 4,
            bp_offset: i16::from_le_bytes([bp_low, bp_high]),
        }
    }
}

/// The table of a kernel image.
pub(super) struct OrcTable {
    format: Format,
    /// Where each entry begins to hold, ascending, with the entry.
    entries: Vec<(u64, [u8; ENTRY])>,
}

impl OrcTable {
    /// From the image's sections, if it has them.
    pub(super) fn read(tables: &impl Tables) -> Option<Self> {
        let (place, addresses) = tables.section(".orc_unwind_ip")?;
        let (_, entries) = tables.section(".orc_unwind")?;
        Self::new(place, addresses, entries)
    }

    /// `place` is where the addresses are loaded.
    fn new(place: u64, addresses: &[u8], entries: &[u8]) -> Option<Self> {
        let (offsets, _) = addresses.as_chunks::<4>();
        let (raw, _) = entries.as_chunks::<ENTRY>();
        let format = Format::guess(raw.iter())?;
        let starts = (0..).zip(offsets).map(|(n, offset)| start(place, n, *offset));
        let mut entries: Vec<_> = starts.zip(raw.iter().copied()).collect();
        // Linked kernels before 5.6 sort them when they boot. Where two begin at one address, the one that
        // only says that something has ended there comes first, so that the other one is found.
        let says_nothing = |raw: &[u8; ENTRY]| format.decode(raw).kind == Kind::Undefined;
        entries.sort_by_key(|(start, raw)| (*start, !says_nothing(raw)));
        Some(Self { format, entries })
    }

    pub(super) fn format(&self) -> Format {
        self.format
    }

    /// The entry that holds at `addr`.
    pub(super) fn find(&self, addr: u64) -> Option<Entry> {
        let behind = self.entries.partition_point(|(start, _)| *start <= addr);
        let (_, raw) = self.entries.get(behind.checked_sub(1)?)?;
        Some(self.format.decode(raw))
    }
}

/// Where entry `n` begins to hold: its address is relative to the place that it is stored at.
fn start(place: u64, n: u64, offset: [u8; 4]) -> u64 {
    place.wrapping_add(n * 4).wrapping_add_signed(i32::from_le_bytes(offset).into())
}

/// The entry that holds at `addr`, of a table in guest memory. `format` is that of the kernel, if it is known.
pub(super) fn find_in_guest(table: &GuestOrc, format: Option<Format>, addr: u64, memory: &dyn Memory) -> Option<Entry> {
    let start_of = |n: u32| {
        let mut offset = [0; 4];
        let at = table.addresses.wrapping_add(u64::from(n) * 4);
        (memory.read(at, &mut offset) == offset.len()).then(|| start(table.addresses, n.into(), offset))
    };
    let raw = |n: u32| {
        let mut raw = [0; ENTRY];
        let at = table.entries.wrapping_add(u64::from(n) * ENTRY as u64);
        (memory.read(at, &mut raw) == raw.len()).then_some(raw)
    };
    // The first that begins behind `addr`.
    let (mut from, mut to) = (0, table.count);
    while from < to {
        let middle = from + (to - from) / 2;
        if start_of(middle)? <= addr { from = middle + 1 } else { to = middle }
    }
    let found = raw(from.checked_sub(1)?)?;
    let format = match format {
        Some(format) => format,
        None => {
            let sample: Vec<_> = (0..table.count.min(SAMPLE)).map_while(raw).collect();
            Format::guess(sample.iter())?
        }
    };
    Some(format.decode(&found))
}

// ORC_REG_*, the same in all kernels.
const UNDEFINED: u8 = 0;
const PREV_SP: u8 = 1;
const DX: u8 = 2;
const DI: u8 = 3;
const BP: u8 = 4;
const SP: u8 = 5;
const R10_: u8 = 6;
const R13_: u8 = 7;
const BP_INDIRECT: u8 = 8;
const SP_INDIRECT: u8 = 9;

/// Bytes of an error code, or of what stands for it, and of what the processor pushes before.
const ERROR_CODE: i64 = 8;
const IRET_FRAME: u64 = 5 * 8;

/// The next frame, by what `entry` says of `place`.
pub(super) fn step(entry: Entry, place: &Place, memory: &dyn Memory) -> Result<Place, End> {
    let bad_stack = End::Lost("the stack cannot be read");
    let unknown = End::Lost("a register that the next frame depends on is not known here");
    let value = |register| place.value(register).ok_or(unknown);
    let read = |addr| word(memory, addr).ok_or(bad_stack);

    let offset = i64::from(entry.sp_offset);
    let sp = match entry.sp_register {
        SP => place.sp.wrapping_add_signed(offset),
        BP => value(RBP)?.wrapping_add_signed(offset),
        // Where a stack has been switched: the other one's pointer is on top of this one. Kernels before
        // 5.13 meant something else by it, and never used it.
        SP_INDIRECT => read(place.sp)?.wrapping_add_signed(offset),
        BP_INDIRECT => read(value(RBP)?.wrapping_add_signed(offset))?,
        R10_ => value(R10)?,
        R13_ => value(R13)?,
        DI => value(RDI)?,
        DX => value(RDX)?,
        _ => return Err(End::Lost("the kernel's ORC table has an entry of an unknown kind")),
    };

    let saved_rbp = match entry.bp_register {
        UNDEFINED => None,
        PREV_SP => Some(read(sp.wrapping_add_signed(entry.bp_offset.into()))?),
        BP => Some(read(value(RBP)?.wrapping_add_signed(entry.bp_offset.into()))?),
        _ => return Err(End::Lost("the kernel's ORC table has an entry of an unknown kind")),
    };

    let mut next = match entry.kind {
        Kind::Call => {
            let switches = matches!(entry.sp_register, SP_INDIRECT | BP_INDIRECT);
            if sp <= place.sp && !switches {
                return Err(End::Lost("the stack pointer goes the wrong way"));
            }
            let next = Place::caller(sp, place.value(RBP), memory)?;
            if entry.signal { Place { kind: super::FrameKind::Exact, ..next } } else { next }
        }
        Kind::Registers => Place::of_pt_regs(sp, !entry.signal, memory)?,
        // Around the call of error_entry() or paranoid_entry() the rest is saved as soon as they have saved it, below their
        // return address. The entry does not know; but the processor pushes to an aligned stack (SDM vol. 3, 7.14.2).
        Kind::Iret
            if entry.sp_register == SP && offset == ERROR_CODE && !sp.wrapping_add(IRET_FRAME).is_multiple_of(16) =>
        {
            Place::of_pt_regs(place.sp, !entry.signal, memory)?
        }
        // Entry code that has not saved the registers yet has not changed them either.
        Kind::Iret => Place::of_iret_frame(sp, !entry.signal, place.general, memory)?,
        Kind::Undefined | Kind::End => return Err(End::Lost(super::NOTHING_KNOWN)),
    };
    if let Some(rbp) = saved_rbp {
        next.general[RBP] = Some(rbp);
    }
    Ok(next)
}
