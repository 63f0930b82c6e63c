//! Single-step.

use std::time::Duration;

use super::super::bench::{Bench, Debug, Exit, On, Ring};
use super::super::guests::{COUNT, FAR, HALT, PUSH_FLAGS, READ_UNBACKED};
use super::super::{BlockIrq, HaltStep, PushedFlags, Step, StepOverExit, StickyStep, Unclear};
use super::unclear;

/// #DB.
const DB: u8 = 1;
const BS: u64 = 1 << 14;
const TF: u64 = 1 << 8;
const IF: u64 = 1 << 9;
/// The vector of the interrupt that waits.
const WAITING: u8 = 0x40;
/// How long a halted vCPU is waited for.
const HALTED: Duration = Duration::from_millis(20);
/// A bound against stops without progress.
const MOST_EXITS: u32 = 32;

/// Three instructions, each with a step armed for it.
pub(super) fn step(bench: &mut Bench, ring: Ring, shadow: bool) -> Result<Step, Unclear> {
    bench.begin(ring, &COUNT)?;
    let mut extra = 0;
    for next in 1..=3 {
        let (exit, more) = bench.step(shadow)?;
        extra += more;
        match exit {
            Exit::Debug { pc, .. } if pc == COUNT.at(next) => {}
            Exit::Debug { pc, .. } if bench.in_handler(pc, DB) => return Ok(Step::ToGuest),
            Exit::Vector(DB) => return Ok(Step::ToGuest),
            Exit::End => return Ok(Step::Never),
            exit => return unclear(exit, bench),
        }
    }
    Ok(if extra == 0 { Step::Exact } else { Step::ExtraExits })
}

/// Single-step is set once; then the guest is run from stop to stop, over a read that KVM emulates.
pub(super) fn sticky(bench: &mut Bench) -> Result<StickyStep, Unclear> {
    bench.begin(Ring::Kernel, &READ_UNBACKED)?;
    bench.arm(Debug::step())?;
    let (mut stops, mut last) = (0, READ_UNBACKED.at(0));
    for _ in 0..MOST_EXITS {
        match bench.run() {
            Exit::MmioRead { .. } => {}
            Exit::Debug { pc, .. } if pc == last => {}
            Exit::Debug { pc, .. } => (stops, last) = (stops + 1, pc),
            // Before the OUT there are five instructions.
            Exit::End if stops == 5 => return Ok(StickyStep::Stays),
            Exit::End if stops >= 1 => return Ok(StickyStep::LostAfterEmulation),
            exit => return unclear(exit, bench),
        }
    }
    Err(Unclear("no progress".to_owned()))
}

/// One step over the read that KVM emulates; a slot far away makes a trap behind it come to us.
pub(super) fn over_exit(bench: &mut Bench) -> Result<StepOverExit, Unclear> {
    let (read, behind) = (READ_UNBACKED.at(1), READ_UNBACKED.at(2));
    bench.begin(Ring::Kernel, &READ_UNBACKED)?;
    bench.set_regs(|regs| regs.rip = read)?;
    bench.arm(Debug::step())?;
    for _ in 0..MOST_EXITS {
        match bench.run() {
            Exit::MmioRead { .. } => {}
            Exit::Debug { pc, .. } if pc == read => bench.arm(Debug::step())?,
            Exit::Debug { pc, .. } if pc == behind => {
                bench.arm(Debug::slots(&[(FAR, On::Execute)]))?;
                return match bench.run() {
                    Exit::End => Ok(StepOverExit::Exact),
                    Exit::Debug { pc, dr6, .. } if pc == behind && dr6 & BS != 0 => Ok(StepOverExit::TrapsAgain),
                    exit => unclear(exit, bench),
                };
            }
            exit => return unclear(exit, bench),
        }
    }
    Err(Unclear("no progress".to_owned()))
}

pub(super) fn pushed_flags(bench: &mut Bench) -> Result<PushedFlags, Unclear> {
    bench.begin(Ring::Kernel, &PUSH_FLAGS)?;
    match bench.step(false)? {
        (Exit::Debug { pc, .. }, _) if pc == PUSH_FLAGS.at(1) => {
            let flags = bench.read_u64(bench.regs()?.rsp)?;
            Ok(if flags & TF == 0 { PushedFlags::Clean } else { PushedFlags::HasTrapFlag })
        }
        (exit, _) => unclear(exit, bench),
    }
}

/// A step over HLT, and whether what follows runs.
pub(super) fn halt(bench: &mut Bench) -> Result<HaltStep, Unclear> {
    bench.begin(Ring::Kernel, &HALT)?;
    bench.arm(Debug::step())?;
    let mut behind = false;
    for _ in 0..MOST_EXITS {
        match bench.run_for(HALTED) {
            Exit::Debug { pc, .. } if pc == HALT.at(0) => bench.arm(Debug::step())?,
            Exit::Debug { pc, .. } if pc == HALT.at(1) && bench.is_halted()? => return Ok(HaltStep::Halts),
            Exit::Debug { pc, .. } if pc == HALT.at(1) => {
                behind = true;
                bench.arm(Debug::default())?;
            }
            Exit::End if behind => return Ok(HaltStep::RunsOn),
            Exit::TooLong if bench.is_halted()? => {
                return Ok(if behind { HaltStep::HaltsLater } else { HaltStep::NoStop });
            }
            // It was given too little time.
            Exit::TooLong => {}
            exit => return unclear(exit, bench),
        }
    }
    Err(Unclear("no progress".to_owned()))
}

/// Steps with an interrupt waiting, which must be there when the steps are over.
pub(super) fn block_irq(bench: &mut Bench) -> Result<BlockIrq, Unclear> {
    bench.begin(Ring::Kernel, &COUNT)?;
    bench.set_regs(|regs| regs.rflags |= IF)?;
    bench.interrupt(WAITING)?;
    let mut steps = 0;
    for _ in 0..MOST_EXITS {
        bench.arm(Debug::step_without_interrupts())?;
        match bench.run() {
            Exit::Debug { pc, .. } if pc == COUNT.at(steps) => {}
            Exit::Debug { pc, .. } if pc == COUNT.at(steps + 1) => steps += 1,
            Exit::Debug { pc, .. } if bench.in_handler(pc, WAITING) => return Ok(BlockIrq::Ignored),
            Exit::Vector(WAITING) => return Ok(BlockIrq::Ignored),
            exit => return unclear(exit, bench),
        }
        if steps == 3 {
            bench.arm(Debug::default())?;
            return match bench.run() {
                Exit::Vector(WAITING) => Ok(BlockIrq::Blocks),
                exit => unclear(exit, bench),
            };
        }
    }
    Err(Unclear("no progress".to_owned()))
}
