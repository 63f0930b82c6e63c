//! Without tables: frame pointers, and what the instructions around the program counter tell.

use std::ops::Range;

use super::place::{Place, RBP, word};
use super::{End, FrameKind, Memory, code};

/// Bytes of a function that set its frame up, with what may stand before: ENDBR64 and a call of, or a gap for, the
/// function tracer.
const PROLOGUE: usize = 4 + 5 + PUSH_RBP.len() + 4;
const ENDBR64: &[u8] = &[0xf3, 0x0f, 0x1e, 0xfa];
const TRACER_GAP: &[u8] = &[0x0f, 0x1f, 0x44, 0x00, 0x00];
const CALL: u8 = 0xe8;
const PUSH_RBP: &[u8] = &[0x55];
/// Both encodings of `mov %rsp, %rbp`.
const MOV_RSP_RBP: [&[u8]; 2] = [&[0x48, 0x89, 0xe5], &[0x48, 0x8b, 0xec]];
const POP_RBP: u8 = 0x5d;

/// What of a frame is on the stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Built {
    /// The return address, at the stack pointer.
    ReturnAddress,
    /// The caller's RBP, at the stack pointer, and the return address.
    Both,
    /// RBP points to the caller's RBP, and above it is the return address.
    All,
}

/// Who called `place`, which is in this function if that is known.
pub(super) fn step(place: &Place, function: Option<Range<u64>>, memory: &dyn Memory) -> Result<Place, End> {
    if place.kind == FrameKind::Exact {
        match function.map(|function| built(place.pc, function, memory)) {
            Some(Built::ReturnAddress) => return leaf(place, memory),
            Some(Built::Both) => {
                let rbp = word(memory, place.sp);
                let caller = Place::caller(place.sp.wrapping_add(16), rbp, memory)?;
                if code::is_behind_call(memory, caller.pc) {
                    return Ok(caller);
                }
            }
            Some(Built::All) | None => {}
        }
    }
    let linked = linked(place, memory);
    match linked {
        Err(End::Lost(_)) if place.kind == FrameKind::Exact => leaf(place, memory).or(linked),
        _ => linked,
    }
}

/// The caller of code that has pushed nothing.
pub(super) fn leaf(place: &Place, memory: &dyn Memory) -> Result<Place, End> {
    let caller = Place::caller(place.sp.wrapping_add(8), place.value(RBP), memory)?;
    if code::is_behind_call(memory, caller.pc) {
        Ok(caller)
    } else {
        Err(End::Lost("nothing is known about this code, and no return address is on top of the stack"))
    }
}

/// The caller by the frame pointer.
fn linked(place: &Place, memory: &dyn Memory) -> Result<Place, End> {
    let rbp = place.value(RBP).ok_or(End::Lost("nothing is known about this code, nor its frame pointer"))?;
    if rbp == 0 {
        return Err(End::Complete);
    }
    // Linux marks a pointer to the registers that it has saved (ENCODE_FRAME_POINTER).
    if rbp & 1 == 1 && rbp >> 63 == 1 {
        let saved = Place::of_pt_regs(rbp - 1, false, memory)?;
        // Above a kernel thread's first function they are all zero.
        return if saved.pc == 0 { Err(End::Complete) } else { Ok(saved) };
    }
    if rbp < place.sp || !rbp.is_multiple_of(8) {
        return Err(End::Lost("nothing is known about this code, and RBP is no frame pointer"));
    }
    let caller = Place::caller(rbp.wrapping_add(16), word(memory, rbp), memory)?;
    if caller.pc == 0 {
        // What a loader leaves above the first function.
        return Err(End::Complete);
    }
    if !code::is_behind_call(memory, caller.pc) {
        return Err(End::Lost("nothing is known about this code, and RBP is no frame pointer"));
    }
    Ok(caller)
}

/// How far `function` has built its frame, or torn it down, when it is at `pc`.
fn built(pc: u64, function: Range<u64>, memory: &dyn Memory) -> Built {
    let mut bytes = [0; PROLOGUE];
    let got = memory.read(function.start, &mut bytes);
    let (mut rest, mut passed) = (&bytes[..got], 0);
    for gap in [ENDBR64, TRACER_GAP] {
        let traces = gap == TRACER_GAP && rest.first() == Some(&CALL) && rest.len() >= gap.len();
        if rest.starts_with(gap) || traces {
            rest = &rest[gap.len()..];
            passed += gap.len() as u64;
        }
    }
    let done = pc.saturating_sub(function.start);
    if done <= passed {
        return Built::ReturnAddress;
    }
    if let Some(behind) = rest.strip_prefix(PUSH_RBP)
        && done == passed + PUSH_RBP.len() as u64
        && MOV_RSP_RBP.iter().any(|mov| behind.starts_with(mov))
    {
        return Built::Both;
    }
    torn_down(pc, &function, memory)
}

/// What is left of a frame at an instruction that ends a function.
fn torn_down(pc: u64, function: &Range<u64>, memory: &dyn Memory) -> Built {
    let mut bytes = [0; 6];
    let got = memory.read(pc, &mut bytes);
    let bytes = &bytes[..got];
    match bytes {
        [POP_RBP, rest @ ..] if leaves(pc.wrapping_add(1), rest, function) => Built::Both,
        _ if leaves(pc, bytes, function) => Built::ReturnAddress,
        _ => Built::All,
    }
}

/// Whether the instruction at `pc` returns, or jumps to another function.
fn leaves(pc: u64, bytes: &[u8], function: &Range<u64>) -> bool {
    match bytes {
        [0xc3 | 0xc2, ..] | [0xf3, 0xc3, ..] => true,
        [0xe9, a, b, c, d, ..] => {
            let target = pc.wrapping_add(5).wrapping_add_signed(i32::from_le_bytes([*a, *b, *c, *d]).into());
            !function.contains(&target)
        }
        _ => false,
    }
}
