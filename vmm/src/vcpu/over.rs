//! Off a breakpoint without a step, where the instruction under it allows that (law 41).

use std::io;

use super::{Cpu, Standing};
use crate::debug::{DebugImage, INT3, carry_out};
use crate::limits::PAGE_SIZE;

/// Carries out the instruction at `pc`, where the vCPU stands; whether that was done. If not,
/// nothing has changed.
///
/// A full image stays armed: if the next instruction has a breakpoint, the entry that follows
/// finds it.
pub(crate) fn in_place<C: Cpu>(cpu: &mut C, image: &DebugImage, pc: u64) -> io::Result<bool> {
    let Some(Standing { general, wide, mut code, fetched }) = cpu.standing()? else { return Ok(false) };
    if general.rip != pc {
        return Ok(false);
    }
    hide_patches(cpu, image, pc, &mut code[..fetched]);
    let Some(after) = carry_out(&code[..fetched], &general, wide) else { return Ok(false) };
    cpu.advance(&after)?;
    Ok(true)
}

/// Puts what the guest has there in place of the INT3s that are ours.
pub(crate) fn hide_patches<C: Cpu>(cpu: &mut C, image: &DebugImage, pc: u64, code: &mut [u8]) {
    if image.patches().is_empty() {
        return;
    }
    let mut gpa = None;
    for (addr, byte) in (0..).map(|n| pc.wrapping_add(n)).zip(code) {
        gpa = match gpa {
            Some(before) if addr % PAGE_SIZE != 0 => Some(before + 1),
            _ => cpu.translate(addr),
        };
        // A byte that the guest has overwritten is the guest's.
        if let Some(patch) = gpa.and_then(|gpa| image.patch_at(gpa)).filter(|_| *byte == INT3) {
            *byte = patch.original;
        }
    }
}
