//! What the instructions at an address tell about the stack.

use super::Memory;

/// Whether there is memory to execute.
pub(super) fn is_there(memory: &dyn Memory, pc: u64) -> bool {
    memory.read(pc, &mut [0]) == 1
}

/// Whether a call instruction ends at `pc`, as one does before every return address (SDM vol. 2, CALL).
pub(super) fn is_behind_call(memory: &dyn Memory, pc: u64) -> bool {
    /// The longest call: REX or a segment prefix, opcode, ModRM, SIB, 32-bit displacement.
    const LONGEST: usize = 8;
    let mut bytes = [0; LONGEST];
    // Byte by byte from behind: there may be nothing before the first function of a page.
    let mut known = 0;
    for back in 1..=LONGEST {
        let mut byte = [0];
        if memory.read(pc.wrapping_sub(back as u64), &mut byte) == 0 {
            break;
        }
        bytes[LONGEST - back] = byte[0];
        known = back;
    }
    if known >= 5 && bytes[LONGEST - 5] == 0xe8 {
        return true;
    }
    (2..=known.min(7)).any(|length| {
        let instruction = &bytes[LONGEST - length..];
        instruction[0] == 0xff && indirect_call_length(&instruction[1..]) == Some(length)
    })
}

/// The length of the `call *..` whose ModRM byte comes first; `None` if it is another instruction.
fn indirect_call_length(modrm: &[u8]) -> Option<usize> {
    let (&first, rest) = modrm.split_first()?;
    let (mode, register, rm) = (first >> 6, first >> 3 & 7, first & 7);
    if register != 2 {
        return None;
    }
    let sib = usize::from(mode != 3 && rm == 4);
    let displacement = match mode {
        0 if rm == 5 => 4,
        0 if rm == 4 && rest.first()? & 7 == 5 => 4,
        1 => 1,
        2 => 4,
        _ => 0,
    };
    Some(2 + sib + displacement)
}
