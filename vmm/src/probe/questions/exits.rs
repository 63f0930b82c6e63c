//! What else a guest exits for, and how.

use std::time::{Duration, Instant};

use super::super::bench::{Bench, Debug, Exit, Ring};
use super::super::guests::{COUNT, Guest, INT_N, INT_VECTOR, INT1, INT3, INVALID, LOOP, READONLY, STORE_READONLY};
use super::super::{Int3, Kick, OutRip, ReadonlyWrite, SoftwareInterrupt, TripleFault, Unclear};
use super::unclear;

const DB: u8 = 1;
const BP: u8 = 3;
const UD: u8 = 6;

/// INT3 under KVM_GUESTDBG_USE_SW_BP.
pub(super) fn int3(bench: &mut Bench, ring: Ring) -> Result<Int3, Unclear> {
    bench.begin(ring, &INT3)?;
    bench.arm(Debug::software_breakpoints())?;
    match bench.run() {
        Exit::Debug { exception: 3, pc, .. } if pc == INT3.at(1) && bench.rip()? == pc => Ok(Int3::DebugExit),
        Exit::InternalError if bench.rip()? == INT3.at(1) => Ok(Int3::InternalError),
        Exit::Vector(BP) => Ok(Int3::ToGuest),
        exit => unclear(exit, bench),
    }
}

pub(super) fn int_n(bench: &mut Bench, ring: Ring) -> Result<SoftwareInterrupt, Unclear> {
    software_interrupt(bench, ring, &INT_N, INT_VECTOR)
}

pub(super) fn int1(bench: &mut Bench) -> Result<SoftwareInterrupt, Unclear> {
    software_interrupt(bench, Ring::Kernel, &INT1, DB)
}

pub(super) fn guest_int3(bench: &mut Bench) -> Result<SoftwareInterrupt, Unclear> {
    software_interrupt(bench, Ring::Kernel, &INT3, BP)
}

fn software_interrupt(bench: &mut Bench, ring: Ring, guest: &Guest, vector: u8) -> Result<SoftwareInterrupt, Unclear> {
    bench.begin(ring, guest)?;
    match bench.run() {
        Exit::Vector(got) if got == vector && bench.frame_rip()? == guest.at(2) => Ok(SoftwareInterrupt::Delivered),
        Exit::InternalError if bench.rip()? == guest.at(1) => Ok(SoftwareInterrupt::EmulationFailure),
        Exit::Vector(UD) => Ok(SoftwareInterrupt::InvalidOpcode),
        exit => unclear(exit, bench),
    }
}

pub(super) fn out_rip(bench: &mut Bench) -> Result<OutRip, Unclear> {
    bench.begin(Ring::Kernel, &COUNT)?;
    match (bench.run(), bench.rip()?) {
        (Exit::End, rip) if rip == COUNT.at(4) => Ok(OutRip::OnInstruction),
        (Exit::End, rip) if rip == COUNT.at(5) => Ok(OutRip::Behind),
        (exit, _) => unclear(exit, bench),
    }
}

pub(super) fn readonly_write(bench: &mut Bench, ring: Ring) -> Result<ReadonlyWrite, Unclear> {
    const VALUE: u64 = 0x1122_3344_5566_7788;
    bench.begin(ring, &STORE_READONLY)?;
    bench.set_regs(|regs| regs.rax = VALUE)?;
    let before = bench.read_u64(READONLY)?;
    let exit = bench.run();
    match (&exit, bench.rip()?) {
        (Exit::MmioWrite { address: READONLY, data }, rip)
            if *data == VALUE.to_le_bytes() && bench.read_u64(READONLY)? == before =>
        {
            Ok(if rip == STORE_READONLY.at(1) { ReadonlyWrite::ExitsBehind } else { ReadonlyWrite::ExitsBefore })
        }
        (Exit::End, _) => Ok(ReadonlyWrite::Never),
        (Exit::InternalError, _) => Ok(ReadonlyWrite::EmulationFailure),
        _ => unclear(exit, bench),
    }
}

/// A loop that ends by itself, but not soon: whether a signal ends it before.
///
/// Guests must not depend on being kicked where kicks may not work. On a host with one processor
/// that does not take its timer's interrupt either, the sender of the kick would not even run.
pub(super) fn kick(bench: &mut Bench) -> Result<Kick, Unclear> {
    const KICK_AFTER: Duration = Duration::from_millis(5);
    // On a loaded machine the kick may be late, but hardly by that much.
    const LONG: Duration = Duration::from_secs(2);
    // An emulator's clock may run slower than its guests.
    const MANY: u64 = 1 << 26;
    let mut times: u64 = 10_000;
    loop {
        bench.begin(Ring::Kernel, &LOOP)?;
        bench.set_regs(|regs| regs.rcx = times)?;
        let started = Instant::now();
        match bench.run_for(KICK_AFTER) {
            Exit::TooLong => return Ok(Kick::Interrupts),
            Exit::End if times >= MANY || started.elapsed() >= LONG => return Ok(Kick::Never),
            Exit::End => times = times.saturating_mul(4),
            exit => return Err(Unclear(format!("{exit:x?} in a loop"))),
        }
    }
}

/// An exception without a handler.
pub(super) fn triple_fault(bench: &mut Bench) -> Result<TripleFault, Unclear> {
    bench.begin(Ring::Kernel, &INVALID)?;
    bench.drop_handlers()?;
    match bench.run() {
        Exit::Shutdown if bench.rip()? == INVALID.at(1) => Ok(TripleFault::KeepsState),
        Exit::Shutdown => Ok(TripleFault::StateLost),
        exit => unclear(exit, bench),
    }
}
