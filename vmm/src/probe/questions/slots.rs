//! Slots that are armed by us.

use super::super::bench::{Bench, Debug, Exit, On, Ring};
use super::super::guests::{COUNT, DATA, Guest, LOAD, SHADOW, STORE};
use super::super::{HostIdentity, MultiHit, OverExit, RealModeSlots, ResumeFlag, Slot, Unclear};
use super::unclear;

/// #DB.
const DB: u32 = 1;
const RF: u64 = 1 << 16;

/// A slot on the second instruction of [`COUNT`].
pub(super) fn exec(bench: &mut Bench, ring: Ring) -> Result<Slot, Unclear> {
    fires(bench, ring, &COUNT, &[(COUNT.at(1), On::Execute)], COUNT.at(1))
}

pub(super) fn write(bench: &mut Bench, ring: Ring) -> Result<Slot, Unclear> {
    fires(bench, ring, &STORE, &[(DATA, On::Write)], STORE.at(1))
}

pub(super) fn access(bench: &mut Bench) -> Result<Slot, Unclear> {
    fires(bench, Ring::Kernel, &LOAD, &[(DATA, On::Access)], LOAD.at(1))
}

fn fires(bench: &mut Bench, ring: Ring, guest: &Guest, slots: &[(u64, On)], at: u64) -> Result<Slot, Unclear> {
    bench.begin(ring, guest)?;
    bench.arm(Debug::slots(slots))?;
    match bench.run() {
        Exit::Debug { exception: DB, pc, dr6 } if pc == at && dr6 & 0xf == 1 => Ok(Slot::Fires),
        Exit::End => Ok(Slot::Never),
        Exit::Vector(1) => Ok(Slot::ToGuest),
        exit => unclear(exit, bench),
    }
}

pub(super) fn several_exec(bench: &mut Bench, alone: Slot) -> Result<MultiHit, Unclear> {
    if alone != Slot::Fires {
        return Ok(MultiHit::NotAsked);
    }
    both(bench, &COUNT, [(COUNT.at(1), On::Execute); 2])
}

pub(super) fn several_data(bench: &mut Bench, alone: Slot) -> Result<MultiHit, Unclear> {
    if alone != Slot::Fires {
        return Ok(MultiHit::NotAsked);
    }
    both(bench, &STORE, [(DATA, On::Write), (DATA, On::Access)])
}

fn both(bench: &mut Bench, guest: &Guest, slots: [(u64, On); 2]) -> Result<MultiHit, Unclear> {
    bench.begin(Ring::Kernel, guest)?;
    bench.arm(Debug::slots(&slots))?;
    match bench.run() {
        Exit::Debug { exception: DB, dr6, .. } if dr6 & 0xf == 0b11 => Ok(MultiHit::All),
        Exit::Debug { exception: DB, dr6, .. } if dr6 & 0xf == 0b01 => Ok(MultiHit::First),
        exit => unclear(exit, bench),
    }
}

pub(super) fn resume_flag(bench: &mut Bench, alone: Slot) -> Result<ResumeFlag, Unclear> {
    if alone != Slot::Fires {
        return Ok(ResumeFlag::NotAsked);
    }
    if exec(bench, Ring::Kernel)? != Slot::Fires {
        return Err(Unclear("the slot did not fire the second time".to_owned()));
    }
    bench.set_regs(|regs| regs.rflags |= RF)?;
    bench.arm(Debug::slots(&[(COUNT.at(1), On::Execute)]))?;
    match bench.run() {
        Exit::End if bench.regs()?.r8 == 1 => Ok(ResumeFlag::Honoured),
        Exit::Debug { pc, .. } if pc == COUNT.at(1) && bench.regs()?.r8 == 0 => Ok(ResumeFlag::Ignored),
        exit => unclear(exit, bench),
    }
}

/// As [`resume_flag`], but KVM has nothing mapped when it enters the guest.
pub(super) fn resume_flag_over_exit(bench: &mut Bench, alone: ResumeFlag) -> Result<OverExit, Unclear> {
    if alone != ResumeFlag::Honoured {
        return Ok(OverExit::NotAsked);
    }
    if exec(bench, Ring::Kernel)? != Slot::Fires {
        return Err(Unclear("the slot did not fire the second time".to_owned()));
    }
    bench.set_regs(|regs| regs.rflags |= RF)?;
    bench.map_again()?;
    match bench.run() {
        Exit::End if bench.regs()?.r8 == 1 => Ok(OverExit::Kept),
        Exit::Debug { pc, .. } if pc == COUNT.at(1) && bench.regs()?.r8 == 0 => Ok(OverExit::Lost),
        exit => unclear(exit, bench),
    }
}

pub(super) fn shadow_over_exit(bench: &mut Bench, alone: Slot) -> Result<OverExit, Unclear> {
    if alone != Slot::Fires {
        return Ok(OverExit::NotAsked);
    }
    bench.begin(Ring::Kernel, &SHADOW)?;
    bench.arm(Debug::slots(&[(SHADOW.at(1), On::Execute)]))?;
    match bench.run() {
        Exit::Debug { pc, .. } if pc == SHADOW.at(1) => {
            Ok(if bench.has_shadow()? { OverExit::Kept } else { OverExit::Lost })
        }
        exit => unclear(exit, bench),
    }
}

/// Known from the processor's name, and never tried.
pub(super) fn real_mode(host: &HostIdentity) -> RealModeSlots {
    // Seen with QEMU 10.0, 10.1 and 11.1.
    if host.module == "kvm_amd" && host.cpu_name.starts_with("QEMU TCG") {
        RealModeSlots::CrashesTheMachine
    } else {
        RealModeSlots::NotAsked
    }
}
