//! Exceptions that we give to the guest.

use super::super::bench::{Bench, Debug, Exit, Ring};
use super::super::guests::{COUNT, INT3};
use super::super::{Inject, InjectBp, Unclear};
use super::unclear;

const DB: u8 = 1;
const BP: u8 = 3;
/// BS and B2: what no guest of ours causes by itself.
const DR6: u64 = 0xffff_4ff4;

/// The guest meets its own INT3, under KVM_GUESTDBG_USE_SW_BP; what then reaches its handler, if
/// RIP is left where it is?
pub(super) fn breakpoint(bench: &mut Bench) -> Result<InjectBp, Unclear> {
    bench.begin(Ring::Kernel, &INT3)?;
    bench.arm(Debug::software_breakpoints())?;
    match bench.run() {
        Exit::Debug { .. } | Exit::InternalError if bench.rip()? == INT3.at(1) => {}
        // It went to the guest: back before it.
        Exit::Vector(BP) => {
            bench.begin(Ring::Kernel, &INT3)?;
            bench.set_regs(|regs| regs.rip = INT3.at(1))?;
        }
        exit => return unclear(exit, bench),
    }
    bench.arm(Debug::inject_bp())?;
    match bench.run() {
        Exit::Vector(BP) if bench.frame_rip()? == INT3.at(2) => Ok(InjectBp::Advances),
        Exit::Vector(BP) if bench.frame_rip()? == INT3.at(1) => Ok(InjectBp::Stays),
        Exit::Vector(BP) => Ok(InjectBp::Elsewhere),
        Exit::End | Exit::InternalError => Ok(InjectBp::Lost),
        exit => unclear(exit, bench),
    }
}

/// #BP by KVM_SET_VCPU_EVENTS, where there is no INT3.
pub(super) fn breakpoint_by_events(bench: &mut Bench) -> Result<Inject, Unclear> {
    bench.begin(Ring::Kernel, &COUNT)?;
    bench.inject(BP)?;
    match bench.run() {
        Exit::Vector(BP) if bench.frame_rip()? == COUNT.at(0) => Ok(Inject::Delivered),
        Exit::Vector(BP) if bench.frame_rip()? == COUNT.at(1) => Ok(Inject::DeliveredBehind),
        Exit::Vector(BP) => Ok(Inject::DeliveredElsewhere),
        Exit::End => Ok(Inject::Lost),
        exit => unclear(exit, bench),
    }
}

/// #DB by KVM_GUESTDBG_INJECT_DB, with a DR6 that was set before.
pub(super) fn debug(bench: &mut Bench) -> Result<Inject, Unclear> {
    bench.begin(Ring::Kernel, &COUNT)?;
    bench.set_dr6(DR6)?;
    bench.arm(Debug::inject_db())?;
    match bench.run() {
        Exit::Vector(DB) if bench.debug_registers()?.dr6 == DR6 => Ok(Inject::Delivered),
        Exit::Vector(DB) => Ok(Inject::DeliveredWithOtherDr6),
        Exit::End => Ok(Inject::Lost),
        exit => unclear(exit, bench),
    }
}
