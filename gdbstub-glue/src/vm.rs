//! The real debuggee: a [`Vm`].

use trapline_vmm::Vm;
use trapline_vmm::coordinator::CoordinatorError;
use trapline_vmm::debug::{Breakpoint, BreakpointError, Level, Owner, ResumePlan, Stop, VcpuId};
use trapline_vmm::vcpu::{Activity, Registers};

use crate::{Debuggee, DebuggeeError};

impl From<CoordinatorError> for DebuggeeError {
    fn from(error: CoordinatorError) -> Self {
        DebuggeeError(error.to_string())
    }
}

/// What a write to memory that is not there says.
fn not_all_there(addr: u64, len: usize) -> DebuggeeError {
    DebuggeeError(format!("not all of the {len} bytes at {addr:#x} are mapped to RAM; nothing was written"))
}

impl Debuggee for Vm {
    fn vcpus(&self) -> usize {
        Vm::vcpus(self)
    }

    fn activity(&mut self, vcpu: VcpuId) -> Result<Activity, DebuggeeError> {
        Ok(Vm::activity(self, vcpu)?)
    }

    fn registers(&mut self, vcpu: VcpuId) -> Result<Registers, DebuggeeError> {
        Ok(Vm::registers(self, vcpu)?)
    }

    fn set_registers(&mut self, vcpu: VcpuId, registers: &Registers) -> Result<(), DebuggeeError> {
        Ok(Vm::set_registers(self, vcpu, registers)?)
    }

    fn read_memory(&mut self, vcpu: VcpuId, addr: u64, into: &mut [u8]) -> Result<usize, DebuggeeError> {
        Ok(Vm::read_memory(self, vcpu, addr, into)?)
    }

    fn write_memory(&mut self, vcpu: VcpuId, addr: u64, bytes: &[u8]) -> Result<(), DebuggeeError> {
        if Vm::write_memory(self, vcpu, addr, bytes)? { Ok(()) } else { Err(not_all_there(addr, bytes.len())) }
    }

    fn read_physical(&mut self, addr: u64, into: &mut [u8]) -> Result<usize, DebuggeeError> {
        Ok(Vm::read_physical(self, addr, into))
    }

    fn write_physical(&mut self, addr: u64, bytes: &[u8]) -> Result<(), DebuggeeError> {
        if Vm::write_physical(self, addr, bytes)? { Ok(()) } else { Err(not_all_there(addr, bytes.len())) }
    }

    fn set_breakpoint(&mut self, request: Breakpoint) -> Result<(), BreakpointError> {
        Vm::set_breakpoint(self, Owner::GDB, request)
    }

    fn clear_breakpoint(&mut self, request: Breakpoint) -> Result<(), BreakpointError> {
        Vm::clear_breakpoint(self, Owner::GDB, request)
    }

    fn resume(&mut self, plan: &ResumePlan) -> Result<Option<Stop>, DebuggeeError> {
        Ok(Vm::resume(self, plan)?)
    }

    fn stop(&mut self) -> Result<Stop, DebuggeeError> {
        Ok(Vm::stop(self)?)
    }

    fn detach(&mut self) -> Result<(), DebuggeeError> {
        Ok(Vm::release(self, Level::Gdb)?)
    }

    fn kill(&mut self) {
        Vm::kill(self);
    }
}
