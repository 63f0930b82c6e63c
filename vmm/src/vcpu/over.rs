//! Off a breakpoint without a step, where the instruction under it allows that (law 41).

use std::io;

use super::{Cpu, Standing};
use crate::debug::{DebugImage, General, INT3, carry_out};
use crate::limits::PAGE_SIZE;

/// The registers behind the instruction at `pc`, where the vCPU stands, if it can be carried out in
/// place; [`Cpu::advance`] does it then. `crossing`: the breakpoints there have been told.
///
/// If the next instruction has a breakpoint, the entry that follows finds it.
pub(crate) fn in_place<C: Cpu>(
    cpu: &mut C,
    image: &DebugImage,
    pc: u64,
    crossing: bool,
) -> io::Result<Option<General>> {
    let Some(Standing { general, wide, mut code, fetched }) = cpu.standing()? else { return Ok(None) };
    if general.rip != pc {
        return Ok(None);
    }
    let is_patched = hide_patches(cpu, image, pc, &mut code[..fetched]);
    if is_patched && !crossing {
        return Ok(None);
    }
    Ok(carry_out(&code[..fetched], &general, wide))
}

/// Puts what the guest has there in place of the INT3s that are ours; whether one is at `pc`.
pub(crate) fn hide_patches<C: Cpu>(cpu: &mut C, image: &DebugImage, pc: u64, code: &mut [u8]) -> bool {
    if image.patches().is_empty() {
        return false;
    }
    let (mut gpa, mut at_pc) = (None, false);
    for (addr, byte) in (0..).map(|n| pc.wrapping_add(n)).zip(code) {
        gpa = match gpa {
            Some(before) if addr % PAGE_SIZE != 0 => Some(before + 1),
            _ => cpu.translate(addr),
        };
        // A byte that the guest has overwritten is the guest's.
        if let Some(patch) = gpa.and_then(|gpa| image.patch_at(gpa)).filter(|_| *byte == INT3) {
            *byte = patch.original;
            at_pc |= addr == pc;
        }
    }
    at_pc
}
