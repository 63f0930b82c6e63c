//! The guest's own debug registers and trap flag, alone and beside a slot of ours.

use super::super::bench::{Bench, Debug, Exit, On, Ring};
use super::super::guests::{FAR, Guest, OWN_BREAKPOINT, OWN_EXEC, OWN_STEP, OWN_WATCH, READ_DR6};
use super::super::{DrAccess, GuestDrValues, GuestSlots, GuestTrapFlag, Unclear};
use super::unclear;

/// #DB.
const DB: u8 = 1;
const BD: u64 = 1 << 13;
const BS: u64 = 1 << 14;

/// A slot of ours that nothing hits.
fn overlay() -> Debug {
    Debug::slots(&[(FAR, On::Execute)])
}

pub(super) fn guarded_access(bench: &mut Bench) -> Result<DrAccess, Unclear> {
    bench.begin(Ring::Kernel, &READ_DR6)?;
    bench.arm(overlay().guarded())?;
    match bench.run() {
        Exit::Debug { pc, dr6, .. } if pc == READ_DR6.at(0) && dr6 & BD != 0 => Ok(DrAccess::Exits),
        Exit::End => Ok(DrAccess::Never),
        exit => unclear(exit, bench),
    }
}

pub(super) fn exec(bench: &mut Bench) -> Result<GuestSlots, Unclear> {
    own(bench, &OWN_EXEC, None)
}

pub(super) fn write(bench: &mut Bench) -> Result<GuestSlots, Unclear> {
    own(bench, &OWN_WATCH, None)
}

pub(super) fn exec_overlaid(bench: &mut Bench) -> Result<GuestSlots, Unclear> {
    own(bench, &OWN_EXEC, Some(overlay()))
}

fn own(bench: &mut Bench, guest: &Guest, debug: Option<Debug>) -> Result<GuestSlots, Unclear> {
    bench.begin(Ring::Kernel, guest)?;
    if let Some(debug) = debug {
        bench.arm(debug)?;
    }
    match bench.run() {
        Exit::Vector(DB) => Ok(GuestSlots::ToGuest),
        Exit::Debug { .. } => Ok(GuestSlots::ExitsToUs),
        Exit::End => Ok(GuestSlots::Never),
        exit => unclear(exit, bench),
    }
}

/// What the guest wrote to DR0, once it has.
pub(super) fn values(bench: &mut Bench) -> Result<GuestDrValues, Unclear> {
    exec_overlaid(bench)?;
    let dr0 = bench.debug_registers()?.db[0];
    Ok(if dr0 == OWN_EXEC.at(OWN_BREAKPOINT) { GuestDrValues::Readable } else { GuestDrValues::Hidden })
}

pub(super) fn trap_flag_overlaid(bench: &mut Bench) -> Result<GuestTrapFlag, Unclear> {
    bench.begin(Ring::Kernel, &OWN_STEP)?;
    bench.arm(overlay())?;
    match bench.run() {
        Exit::Debug { dr6, .. } if dr6 & BS != 0 => Ok(GuestTrapFlag::ExitsToUs),
        Exit::Vector(DB) => Ok(GuestTrapFlag::ToGuest),
        Exit::End => Ok(GuestTrapFlag::Never),
        exit => unclear(exit, bench),
    }
}
