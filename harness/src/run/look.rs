//! What a stopped guest shows: registers and backtraces of every vCPU, in a report's words.

use std::collections::BTreeMap;
use std::time::Instant;

use trapline_vmm::Vm;
use trapline_vmm::coordinator::CoordinatorError;
use trapline_vmm::debug::VcpuId;
use trapline_vmm::paging::Paging;
use trapline_vmm::vcpu::{Activity, Registers};

use crate::report::{Change, FrameRecord, Source, StopRecord, StopTiming, VcpuRecord};
use crate::symbols::{Location, Memory, Symbols};
use crate::unwind::{self, Unwinder};

/// Linear memory as one parked vCPU sees it, without breakpoints.
pub(crate) struct Seen<'a> {
    vm: &'a Vm,
    paging: Paging,
}

impl<'a> Seen<'a> {
    pub(crate) fn by(vm: &'a mut Vm, vcpu: VcpuId) -> Result<Self, CoordinatorError> {
        let paging = Paging::from(&vm.registers(vcpu)?);
        Ok(Seen { vm, paging })
    }
}

impl Memory for Seen<'_> {
    fn read(&self, addr: u64, into: &mut [u8]) -> usize {
        self.vm.read_linear(&self.paging, addr, into)
    }
}

/// `symbol+0xoffset`, or the address.
pub(crate) fn place(symbols: &Symbols, addr: u64) -> String {
    match symbols.locate(addr) {
        Some(location) => name(&location),
        None => format!("{addr:#x}"),
    }
}

/// `symbol+0xoffset`, with its module in front if it is in one.
pub(crate) fn name(location: &Location) -> String {
    let module = location.module.as_ref().map(|module| format!("{module}:")).unwrap_or_default();
    match location.offset {
        0 => format!("{module}{}", location.symbol),
        offset => format!("{module}{}+{offset:#x}", location.symbol),
    }
}

/// The innermost source line of an address.
pub(crate) fn source(symbols: &Symbols, addr: u64) -> Option<Source> {
    let line = symbols.lines(addr).into_iter().next()?;
    Some(Source { file: line.file?, line: line.line? })
}

/// The stop that ends a run, or that a report is to be made of.
pub(crate) struct Moment {
    pub(crate) reason: String,
    pub(crate) vcpu: Option<VcpuId>,
    pub(crate) change: Option<Change>,
    /// It stands behind the access that it stopped for, not on it.
    pub(crate) is_behind: bool,
    pub(crate) began: Instant,
    pub(crate) at: Instant,
}

/// Looks at the world, which is parked.
///
/// # Errors
/// A vCPU did not answer.
pub(crate) fn look(
    vm: &mut Vm,
    symbols: &Symbols,
    unwinder: &Unwinder,
    moment: &Moment,
) -> Result<StopRecord, CoordinatorError> {
    let vcpus = (0..vm.vcpus() as u32)
        .map(|n| look_at(vm, symbols, unwinder, VcpuId(n), moment))
        .collect::<Result<Vec<_>, _>>()?;
    let its = moment.vcpu.and_then(|vcpu| vcpus.get(vcpu.index()));
    let pc = match moment.vcpu {
        Some(vcpu) => Some(vm.registers(vcpu)?.pc()),
        None => None,
    };
    let back = u64::from(moment.is_behind);
    Ok(StopRecord {
        reason: moment.reason.clone(),
        vcpu: moment.vcpu.map(|vcpu| vcpu.0),
        at: its.map(|vcpu| vcpu.at.clone()),
        source: pc.and_then(|pc| source(symbols, pc.wrapping_sub(back))),
        change: moment.change,
        backtrace: its.map_or_else(Vec::new, |vcpu| vcpu.backtrace.clone()),
        timing: StopTiming { at_us: micros(moment.began, moment.at), vcpus },
    })
}

pub(crate) fn micros(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.saturating_duration_since(from).as_micros()).unwrap_or(u64::MAX)
}

fn look_at(
    vm: &mut Vm,
    symbols: &Symbols,
    unwinder: &Unwinder,
    vcpu: VcpuId,
    moment: &Moment,
) -> Result<VcpuRecord, CoordinatorError> {
    let glance = vm.glance(vcpu)?;
    let registers = vm.registers(vcpu)?;
    let (backtrace, backtrace_ends) = match glance.activity {
        Activity::WaitForSipi => (Vec::new(), None),
        _ => backtrace(vm, symbols, unwinder, vcpu, &registers)?,
    };
    Ok(VcpuRecord {
        vcpu: vcpu.0,
        activity: match glance.activity {
            Activity::Runnable => "running".to_owned(),
            Activity::Halted => "halted".to_owned(),
            Activity::WaitForSipi => "not started".to_owned(),
            Activity::Other(state) => format!("MP state {state}"),
        },
        ring: glance.cpl,
        interrupts: glance.interrupts,
        at: place(symbols, registers.pc()),
        registers: by_name(&registers),
        backtrace,
        backtrace_ends,
        ran_on_us: glance.parked.filter(|_| moment.vcpu != Some(vcpu)).map_or(0, |parked| micros(moment.at, parked)),
    })
}

/// The backtrace of a parked vCPU, and why it ends if that is not the end of its stack.
pub(crate) fn backtrace(
    vm: &mut Vm,
    symbols: &Symbols,
    unwinder: &Unwinder,
    vcpu: VcpuId,
    registers: &Registers,
) -> Result<(Vec<FrameRecord>, Option<String>), CoordinatorError> {
    let seen = Seen::by(vm, vcpu)?;
    let found = unwinder.unwind(registers, &seen);
    let ends = match &found.end {
        unwind::End::Complete | unwind::End::User => None,
        unwind::End::Lost(why) => Some((*why).to_owned()),
        unwind::End::TooDeep => Some("the stack is deeper than is looked".to_owned()),
    };
    Ok((unwind::records(symbols, &found), ends))
}

fn by_name(r: &Registers) -> BTreeMap<String, u64> {
    [
        ("RAX", r.rax),
        ("RBX", r.rbx),
        ("RCX", r.rcx),
        ("RDX", r.rdx),
        ("RSI", r.rsi),
        ("RDI", r.rdi),
        ("RBP", r.rbp),
        ("RSP", r.rsp),
        ("R8", r.r8),
        ("R9", r.r9),
        ("R10", r.r10),
        ("R11", r.r11),
        ("R12", r.r12),
        ("R13", r.r13),
        ("R14", r.r14),
        ("R15", r.r15),
        ("RIP", r.rip),
        ("RFLAGS", r.rflags),
        ("CR0", r.cr0),
        ("CR2", r.cr2),
        ("CR3", r.cr3),
        ("CR4", r.cr4),
        ("EFER", r.efer),
        ("FS.base", r.fs.base),
        ("GS.base", r.gs.base),
        ("KERNEL_GS_BASE", r.kernel_gs_base),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}
