//! Off a breakpoint without a step, where the instruction under it allows that (law 41).

use std::io;

use super::{Cpu, Standing};
use crate::debug::carry_out;

/// Carries out the instruction at `pc`, where the vCPU stands; whether that was done. If not,
/// nothing has changed.
///
/// A full image stays armed: if the next instruction has a breakpoint, the entry that follows
/// finds it.
pub(crate) fn in_place<C: Cpu>(cpu: &mut C, pc: u64) -> io::Result<bool> {
    let Some(Standing { general, wide, code, fetched }) = cpu.standing()? else { return Ok(false) };
    if general.rip != pc {
        return Ok(false);
    }
    let Some(after) = carry_out(&code[..fetched], &general, wide) else { return Ok(false) };
    cpu.advance(&after)?;
    Ok(true)
}
