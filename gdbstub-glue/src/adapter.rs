//! The debuggee in gdbstub's words.
//!
//! This module and its children ([`resume`], [`points`], [`monitor`]) are the only ones that
//! implement gdbstub's traits. What reaches them was validated by [`crate::front`]; they
//! check again what costs nothing, because gdbstub hands dead thread-ids through.

mod monitor;
mod points;
mod resume;

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::ops::{Deref, DerefMut};

use gdbstub::arch::Arch;
use gdbstub::common::Tid;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{MultiThreadBase, MultiThreadResumeOps};
use gdbstub::target::ext::base::single_register_access::{SingleRegisterAccess, SingleRegisterAccessOps};
use gdbstub::target::ext::breakpoints::BreakpointsOps;
use gdbstub::target::ext::monitor_cmd::MonitorCmdOps;
use gdbstub::target::ext::target_description_xml_override::{
    TargetDescriptionXmlOverride, TargetDescriptionXmlOverrideOps,
};
use gdbstub::target::{TargetError, TargetResult};
use trapline_vmm::debug::{Stop, StopReason, VcpuId};
use trapline_vmm::vcpu::Registers;

use crate::arch::{FRAME, Register, target_xml};
use crate::debuggee::{Debuggee, DebuggeeError};
use crate::limits::STOP_HISTORY;
pub(crate) use monitor::mode;
use points::Armed;
use resume::Actions;

/// The debuggee, with what one gdb session remembers about it.
///
/// It derefs to the debuggee: whoever owns it uses the debuggee through it as if the stub were
/// not there.
pub(crate) struct Adapter<D> {
    debuggee: D,
    pub(crate) view: View,
}

/// What the session remembers. It begins anew with every client.
pub(crate) struct View {
    /// Why the world stopped last: the answer to `?`.
    pub(crate) stop: Stop,
    /// The vCPU that registers and memory are read from (`Hg`).
    pub(crate) selected: VcpuId,
    /// Memory is addressed physically.
    pub(crate) physical: bool,
    /// What the client has set.
    armed: Vec<Armed>,
    /// The resumption that gdbstub is putting together.
    actions: Actions,
    /// What came of it: set by `resume`, taken by the session.
    pub(crate) resumed: Option<Result<Option<Stop>, DebuggeeError>>,
    /// In words, why the last call failed.
    pub(crate) failure: Option<String>,
    /// The last stops, oldest first, each with its number.
    history: VecDeque<(u64, Stop)>,
    stops: u64,
}

impl View {
    fn new(stop: Stop) -> Self {
        let mut view = View {
            selected: stop.vcpu,
            stop: stop.clone(),
            physical: false,
            armed: Vec::new(),
            actions: Actions::default(),
            resumed: None,
            failure: None,
            history: VecDeque::new(),
            stops: 0,
        };
        view.stopped(stop);
        view
    }

    /// The world has stopped: the stop's vCPU is the one to look at.
    pub(crate) fn stopped(&mut self, stop: Stop) {
        if self.history.len() == STOP_HISTORY {
            self.history.pop_front();
        }
        self.stops += 1;
        self.history.push_back((self.stops, stop.clone()));
        self.selected = stop.vcpu;
        self.stop = stop;
    }
}

impl<D: Debuggee> Adapter<D> {
    pub(crate) fn new(debuggee: D) -> Self {
        let stop = Stop::new(VcpuId(0), StopReason::Interrupted);
        Self { debuggee, view: View::new(stop) }
    }

    pub(crate) fn into_inner(self) -> D {
        self.debuggee
    }

    /// Forgets the last client.
    pub(crate) fn begin(&mut self, stop: Stop) {
        self.view = View::new(stop);
    }

    /// The vCPU behind a thread-id; they count from 1.
    pub(crate) fn vcpu(&self, tid: u64) -> Option<VcpuId> {
        let index = u32::try_from(tid.checked_sub(1)?).ok()?;
        ((index as usize) < self.debuggee.vcpus()).then_some(VcpuId(index))
    }

    /// All of them.
    pub(crate) fn vcpu_ids(&self) -> impl Iterator<Item = VcpuId> + use<D> {
        (0..u32::try_from(self.debuggee.vcpus()).unwrap_or(u32::MAX)).map(VcpuId)
    }

    fn vcpu_of(&mut self, tid: Tid) -> TargetResult<VcpuId, Self> {
        self.vcpu(tid.get() as u64).ok_or_else(|| self.fail(ESRCH, format!("there is no thread {tid}")))
    }

    /// An error reply with this number; the session knows the words.
    fn fail(&mut self, errno: u8, words: impl Into<String>) -> TargetError<Fatal> {
        self.view.failure = Some(words.into());
        TargetError::Errno(errno)
    }

    /// Reads as much as there is from `addr` on, without wrapping at the end of the address space.
    fn read(&mut self, vcpu: VcpuId, addr: u64, into: &mut [u8]) -> Result<usize, DebuggeeError> {
        let room = usize::try_from(u64::MAX - addr).unwrap_or(usize::MAX).saturating_add(1);
        let len = into.len().min(room);
        let into = &mut into[..len];
        let read = if self.view.physical {
            self.debuggee.read_physical(addr, into)?
        } else {
            self.debuggee.read_memory(vcpu, addr, into)?
        };
        Ok(read.min(len))
    }
}

impl<D> Deref for Adapter<D> {
    type Target = D;

    fn deref(&self) -> &D {
        &self.debuggee
    }
}

impl<D> DerefMut for Adapter<D> {
    fn deref_mut(&mut self) -> &mut D {
        &mut self.debuggee
    }
}

/// The thread-id of a vCPU: RSP's count from 1.
pub(crate) fn tid(vcpu: VcpuId) -> u64 {
    u64::from(vcpu.0) + 1
}

const ESRCH: u8 = 3;
const EIO: u8 = 5;
const EFAULT: u8 = 14;
const EINVAL: u8 = 22;
const ENOSPC: u8 = 28;

/// The session cannot go on. Nothing in our side of gdbstub says so: every failure of the
/// debuggee is told to the client, who decides.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fatal {}

/// x86-64 as gdbstub's type parameters.
pub(crate) enum X86 {}

impl Arch for X86 {
    type Usize = u64;
    type Registers = Frame;
    type BreakpointKind = usize;
    type RegId = Register;
}

impl gdbstub::arch::RegId for Register {
    fn from_raw_id(id: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        let register = Register::new(id)?;
        Some((register, NonZeroUsize::new(register.size())))
    }

    fn to_raw_id(&self) -> Option<usize> {
        Some(self.number())
    }
}

/// A `g` frame: the bytes of all registers in order.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Frame {
    bytes: Vec<u8>,
}

impl Frame {
    fn of(registers: &Registers) -> Self {
        let mut bytes = Vec::with_capacity(FRAME);
        Register::all().for_each(|r| bytes.extend_from_slice(r.read(registers).as_ref()));
        Self { bytes }
    }

    /// Writes all registers, or none.
    fn write_to(&self, registers: &mut Registers) -> Result<(), String> {
        let mut changed = *registers;
        let mut rest = self.bytes.as_slice();
        for register in Register::all() {
            let (value, more) = rest.split_at_checked(register.size()).ok_or("the register frame is too short")?;
            register.write(&mut changed, value)?;
            rest = more;
        }
        *registers = changed;
        Ok(())
    }
}

impl gdbstub::arch::Registers for Frame {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        let offset: usize =
            Register::all().take_while(|r| r.number() != crate::arch::number::RIP).map(Register::size).sum();
        let mut pc = [0; 8];
        if let Some(bytes) = self.bytes.get(offset..offset + pc.len()) {
            pc.copy_from_slice(bytes);
        }
        u64::from_le_bytes(pc)
    }

    fn gdb_serialize(&self, write_byte: impl FnMut(Option<u8>)) {
        self.bytes.iter().copied().map(Some).for_each(write_byte);
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        if bytes.len() != FRAME {
            return Err(());
        }
        self.bytes = bytes.to_vec();
        Ok(())
    }
}

impl<D: Debuggee> gdbstub::target::Target for Adapter<D> {
    type Arch = X86;
    type Error = Fatal;

    fn base_ops(&mut self) -> BaseOps<'_, X86, Fatal> {
        BaseOps::MultiThread(self)
    }

    // Shortened by our framing, for replies of ours and of gdbstub's alike.
    fn use_rle(&self) -> bool {
        false
    }

    // A guest has no processes that could fork.
    fn use_fork_stop_reason(&self) -> bool {
        false
    }

    fn use_vfork_stop_reason(&self) -> bool {
        false
    }

    fn use_vforkdone_stop_reason(&self) -> bool {
        false
    }

    fn use_lldb_register_info(&self) -> bool {
        false
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }

    fn support_target_description_xml_override(&mut self) -> Option<TargetDescriptionXmlOverrideOps<'_, Self>> {
        Some(self)
    }
}

impl<D: Debuggee> MultiThreadBase for Adapter<D> {
    fn read_registers(&mut self, frame: &mut Frame, tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.vcpu_of(tid)?;
        let registers = self.debuggee.registers(vcpu).map_err(|e| self.fail(EIO, e.0))?;
        *frame = Frame::of(&registers);
        Ok(())
    }

    fn write_registers(&mut self, frame: &Frame, tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.vcpu_of(tid)?;
        let mut registers = self.debuggee.registers(vcpu).map_err(|e| self.fail(EIO, e.0))?;
        frame.write_to(&mut registers).map_err(|why| self.fail(EINVAL, why))?;
        self.debuggee.set_registers(vcpu, &registers).map_err(|e| self.fail(EIO, e.0))
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, addr: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let vcpu = self.vcpu_of(tid)?;
        match self.read(vcpu, addr, data) {
            Ok(0) if !data.is_empty() => Err(self.fail(EFAULT, format!("there is no memory at {addr:#x}"))),
            Ok(read) => Ok(read),
            Err(e) => Err(self.fail(EFAULT, e.0)),
        }
    }

    fn write_addrs(&mut self, addr: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.vcpu_of(tid)?;
        if data.is_empty() {
            return Ok(()); // gdb asks with an empty write whether X is known
        }
        if addr.checked_add(data.len() as u64 - 1).is_none() {
            return Err(self.fail(EFAULT, format!("there is no memory at {addr:#x}")));
        }
        let written = if self.view.physical {
            self.debuggee.write_physical(addr, data)
        } else {
            self.debuggee.write_memory(vcpu, addr, data)
        };
        written.map_err(|e| self.fail(EFAULT, e.0))
    }

    fn list_active_threads(&mut self, active: &mut dyn FnMut(Tid)) -> Result<(), Fatal> {
        self.vcpu_ids().filter_map(|v| Tid::new(tid(v) as usize)).for_each(active);
        Ok(())
    }

    fn is_thread_alive(&mut self, tid: Tid) -> Result<bool, Fatal> {
        Ok(self.vcpu(tid.get() as u64).is_some())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl<D: Debuggee> SingleRegisterAccess<Tid> for Adapter<D> {
    fn read_register(&mut self, tid: Tid, register: Register, into: &mut [u8]) -> TargetResult<usize, Self> {
        let vcpu = self.vcpu_of(tid)?;
        let registers = self.debuggee.registers(vcpu).map_err(|e| self.fail(EIO, e.0))?;
        let value = register.read(&registers);
        let value = value.as_ref();
        into.get_mut(..value.len()).ok_or(TargetError::NonFatal)?.copy_from_slice(value);
        Ok(value.len())
    }

    fn write_register(&mut self, tid: Tid, register: Register, value: &[u8]) -> TargetResult<(), Self> {
        let vcpu = self.vcpu_of(tid)?;
        let mut registers = self.debuggee.registers(vcpu).map_err(|e| self.fail(EIO, e.0))?;
        let before = registers;
        register.write(&mut registers, value).map_err(|why| self.fail(EINVAL, why))?;
        if registers == before {
            return Ok(());
        }
        self.debuggee.set_registers(vcpu, &registers).map_err(|e| self.fail(EIO, e.0))
    }
}

impl<D: Debuggee> TargetDescriptionXmlOverride for Adapter<D> {
    fn target_description_xml(
        &self,
        annex: &[u8],
        offset: u64,
        length: usize,
        buf: &mut [u8],
    ) -> TargetResult<usize, Self> {
        if annex != b"target.xml" {
            return Err(TargetError::Errno(0)); // RSP: E00 for a bad annex
        }
        let xml = target_xml().as_bytes();
        let rest = usize::try_from(offset).ok().and_then(|offset| xml.get(offset..)).unwrap_or_default();
        let len = rest.len().min(length).min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }
}
