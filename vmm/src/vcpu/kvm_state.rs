//! A vCPU's state out of KVM and into it again.
//!
//! Order matters in both directions (KVM API, and what its ioctls do on the side):
//!
//! - reading: the MP state first, because asking for it takes a pending INIT or SIPI, which changes everything else;
//! - writing: system registers before the local APIC (APIC base resets it), both before MSRs (the TSC deadline counts
//!   only in the mode that the local APIC's timer has, and after the TSC), general registers before events (they drop
//!   what is pending).

use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, KVM_STATE_NESTED_GIF_SET, KVM_STATE_NESTED_GUEST_MODE, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SMM, KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
    Msrs, kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
    kvm_vcpu_events, kvm_xcr, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, KvmNestedStateBuffer};

use super::Segment;
use super::kvm::{KvmCpu, from_segment, to_segment};
use crate::msrs;
use crate::state::{
    ActivityState, Blob, DebugState, EventState, ExceptionState, GeneralState, OwedState, SegmentState, SmmState,
    SystemState, TableState, VcpuState, Word, is_same_tsc,
};

const CR4_VMXE: u64 = 1 << 13;
const EFER_SVME: u64 = 1 << 12;

/// Most MSRs of one call (KVM's MAX_IO_MSRS), rounded down.
const MSRS_PER_CALL: usize = 200;
/// Size of the area of KVM_GET_XSAVE in bytes. Who does not ask for dynamic features (AMX) never needs more.
const XSAVE_SIZE: usize = 4096;
/// Size of the local APIC's registers in bytes.
const LAPIC_SIZE: usize = 1024;

/// What every host has of them, once.
struct HostKvm {
    msrs: Vec<u32>,
    scales_tsc: bool,
    has_nested_state: bool,
    has_triple_fault: bool,
}

impl HostKvm {
    fn get() -> io::Result<&'static HostKvm> {
        static HOST: OnceLock<HostKvm> = OnceLock::new();
        if let Some(host) = HOST.get() {
            return Ok(host);
        }
        let kvm = Kvm::new()?;
        let list = kvm.get_msr_index_list()?;
        let host = HostKvm {
            msrs: msrs::state_msrs(list.as_slice()),
            scales_tsc: kvm.check_extension(Cap::TscControl),
            has_nested_state: kvm.check_extension(Cap::NestedState),
            has_triple_fault: kvm.check_extension_raw(kvm_bindings::KVM_CAP_X86_TRIPLE_FAULT_EVENT.into()) > 0,
        };
        Ok(HOST.get_or_init(|| host))
    }
}

/// Names the step that failed.
fn step<T>(what: &str, result: Result<T, impl Into<io::Error>>) -> io::Result<T> {
    result.map_err(|error| {
        let error = error.into();
        io::Error::new(error.kind(), format!("KVM refused to {what}: {error}"))
    })
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the {what} in the state cannot be that of a vCPU"))
}

impl KvmCpu {
    /// Everything; what is owed is the thread's to add.
    pub(super) fn read_state(&mut self) -> io::Result<VcpuState> {
        let host = HostKvm::get()?;
        let activity = match step("tell the MP state", self.fd.get_mp_state())?.mp_state {
            KVM_MP_STATE_RUNNABLE => ActivityState::Runnable,
            KVM_MP_STATE_UNINITIALIZED => ActivityState::Uninitialized,
            KVM_MP_STATE_INIT_RECEIVED => ActivityState::InitReceived,
            KVM_MP_STATE_HALTED => ActivityState::Halted,
            KVM_MP_STATE_SIPI_RECEIVED => ActivityState::SipiReceived,
            other => {
                return Err(io::Error::other(format!("it is in MP state {other}, which this Trapline does not know")));
            }
        };
        let sregs = step("tell the system registers", self.fd.get_sregs())?;
        self.refuse_nested(host, &sregs)?;
        let xcrs = step("tell the extended control registers", self.fd.get_xcrs())?;
        let debug = step("tell the debug registers", self.fd.get_debug_regs())?;
        let lapic = step("tell the local APIC", self.fd.get_lapic())?;
        let xsave = step("tell the FPU state", self.fd.get_xsave())?;
        Ok(VcpuState {
            // An old KVM does not say: then it is the host's, and nobody can tell whether it differs.
            tsc_khz: self.fd.get_tsc_khz().unwrap_or(0),
            activity,
            general: general_state(&step("tell the registers", self.fd.get_regs())?),
            system: system_state(&sregs),
            debug: DebugState { dr: debug.db.map(Word), dr6: Word(debug.dr6), dr7: Word(debug.dr7) },
            xsave: Blob::new(&xsave.region.map(u32::to_le_bytes).concat()),
            xcrs: xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).map(|xcr| (xcr.xcr, Word(xcr.value))).collect(),
            lapic: Blob::new(&lapic.regs.map(|byte| byte as u8)),
            msrs: self.read_msrs(host)?,
            events: event_state(&step("tell the events", self.fd.get_vcpu_events())?),
            owed: OwedState::default(),
        })
    }

    /// Makes the vCPU what it was. CPUID is that of the machine that this is a vCPU of. On error it is neither what it was
    /// nor what it should be.
    pub(super) fn write_state(&mut self, state: &VcpuState) -> io::Result<()> {
        let host = HostKvm::get()?;
        self.set_tsc_frequency(host, state.tsc_khz);
        step("set the system registers", self.fd.set_sregs(&sregs(&state.system)))?;
        step("set the registers", self.fd.set_regs(&regs(&state.general)))?;
        let area: [u8; XSAVE_SIZE] = state.xsave.padded().ok_or_else(|| broken("FPU state"))?;
        let mut xsave = kvm_xsave::default();
        for (word, bytes) in xsave.region.iter_mut().zip(area.chunks_exact(4)) {
            *word = bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
        }
        step("set the FPU state", self.set_xsave(&xsave))?;
        self.set_xcrs(state)?;
        let DebugState { dr, dr6, dr7 } = state.debug;
        let debug = kvm_debugregs { db: dr.map(|dr| dr.0), dr6: dr6.0, dr7: dr7.0, ..Default::default() };
        step("set the debug registers", self.fd.set_debug_regs(&debug))?;
        let registers: [u8; LAPIC_SIZE] = state.lapic.padded().ok_or_else(|| broken("local APIC"))?;
        step("set the local APIC", self.fd.set_lapic(&kvm_lapic_state { regs: registers.map(|byte| byte as _) }))?;
        self.write_msrs(host, state)?;
        let mp_state = match state.activity {
            ActivityState::Runnable => KVM_MP_STATE_RUNNABLE,
            ActivityState::Uninitialized => KVM_MP_STATE_UNINITIALIZED,
            ActivityState::InitReceived => KVM_MP_STATE_INIT_RECEIVED,
            ActivityState::Halted => KVM_MP_STATE_HALTED,
            ActivityState::SipiReceived => KVM_MP_STATE_SIPI_RECEIVED,
        };
        step("set the MP state", self.fd.set_mp_state(kvm_mp_state { mp_state }))?;
        step("set the events", self.fd.set_vcpu_events(&vcpu_events(&state.events, host.has_triple_fault)))?;
        self.forget();
        Ok(())
    }

    /// What runs below a hypervisor in the guest is not saved.
    fn refuse_nested(&self, host: &HostKvm, sregs: &kvm_sregs) -> io::Result<()> {
        let mut uses = sregs.cr4 & CR4_VMXE != 0;
        if host.has_nested_state {
            let mut nested = KvmNestedStateBuffer::empty();
            step("tell the nested state", self.fd.nested_state(&mut nested))?;
            let flags = u32::from(nested.flags);
            uses |= flags & KVM_STATE_NESTED_GUEST_MODE != 0;
            uses |= sregs.efer & EFER_SVME != 0 && flags & KVM_STATE_NESTED_GIF_SET == 0;
        }
        match uses {
            true => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the guest is a hypervisor itself and in use as one; that is not saved",
            )),
            false => Ok(()),
        }
    }

    fn set_tsc_frequency(&self, host: &HostKvm, khz: u32) {
        let here = self.fd.get_tsc_khz().unwrap_or(0);
        if is_same_tsc(khz, here) {
            return;
        }
        let scaled = host.scales_tsc && self.fd.set_tsc_khz(khz).is_ok();
        if !scaled {
            tracing::warn!(
                "the guest's time stamp counter ran at {khz} kHz and runs at {here} kHz here; the guest's clock is wrong by that"
            );
        }
    }

    fn set_xcrs(&self, state: &VcpuState) -> io::Result<()> {
        let mut xcrs = kvm_xcrs { nr_xcrs: state.xcrs.len() as u32, ..Default::default() };
        if state.xcrs.len() > xcrs.xcrs.len() {
            return Err(broken("extended control registers"));
        }
        for (to, (&xcr, value)) in xcrs.xcrs.iter_mut().zip(&state.xcrs) {
            *to = kvm_xcr { xcr, value: value.0, ..Default::default() };
        }
        // None: a processor without XSAVE.
        if state.xcrs.is_empty() { Ok(()) } else { step("set the extended control registers", self.fd.set_xcrs(&xcrs)) }
    }

    /// Those that KVM lists and tells; a few it lists and refuses.
    fn read_msrs(&self, host: &HostKvm) -> io::Result<BTreeMap<Word, Word>> {
        let mut values = BTreeMap::new();
        let mut rest = &host.msrs[..];
        while !rest.is_empty() {
            let (now, _) = rest.split_at(rest.len().min(MSRS_PER_CALL));
            let mut msrs = entries(now.iter().map(|&index| (index, 0)))?;
            let read = step("tell the MSRs", self.fd.get_msrs(&mut msrs))?.min(now.len());
            values.extend(msrs.as_slice()[..read].iter().map(|msr| (Word::from(msr.index), Word(msr.data))));
            // The one behind those that it told is one that it does not tell.
            rest = &rest[(read + usize::from(read < now.len()))..];
        }
        Ok(values)
    }

    fn write_msrs(&mut self, host: &HostKvm, state: &VcpuState) -> io::Result<()> {
        let saved = |index: &u32| state.msrs.get(&Word::from(*index)).map(|value| (*index, value.0));
        let all: Vec<(u32, u64)> = host.msrs.iter().filter_map(saved).collect();
        let mut rest = &all[..];
        while !rest.is_empty() {
            let (now, _) = rest.split_at(rest.len().min(MSRS_PER_CALL));
            let set = step("set the MSRs", self.fd.set_msrs(&entries(now.iter().copied())?))?.min(now.len());
            if let Some(&(index, value)) = now.get(set) {
                self.without_msr(index, value)?;
            }
            rest = &rest[(set + usize::from(set < now.len()))..];
        }
        let unknown = |index: &Word| !u32::try_from(index.0).is_ok_and(|index| host.msrs.contains(&index));
        for (index, value) in state.msrs.iter().filter(|(index, value)| unknown(index) && value.0 != 0) {
            let index = u32::try_from(index.0).map_err(|_| broken("list of MSRs"))?;
            missing_msr(index, value.0)?;
        }
        Ok(())
    }

    /// KVM has refused an MSR. That is none's loss if it has that value anyway.
    fn without_msr(&self, index: u32, value: u64) -> io::Result<()> {
        let mut msr = entries([(index, 0)])?;
        let has = matches!(self.fd.get_msrs(&mut msr), Ok(1)).then(|| msr.as_slice()[0].data);
        if has == Some(value) || has.is_none() && value == 0 {
            return Ok(());
        }
        missing_msr(index, value)
    }
}

/// This host does not take an MSR's value: the guest cannot do without those that it runs by, and hardly notices others.
fn missing_msr(index: u32, value: u64) -> io::Result<()> {
    if msrs::is_vital(index) {
        return Err(io::Error::other(format!("it cannot have the value {value:#x} in MSR {index:#x}")));
    }
    tracing::warn!("this host's KVM does not take {value:#x} in MSR {index:#x}; the guest goes on without");
    Ok(())
}

fn entries(msrs: impl IntoIterator<Item = (u32, u64)>) -> io::Result<Msrs> {
    let entries: Vec<kvm_msr_entry> =
        msrs.into_iter().map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))
}

/// Copies fields of the same name, wrapped or not.
macro_rules! words {
    ($to:ident <- $from:expr; $($field:ident)*) => { $to { $($field: Word::from($from.$field)),* } };
    ($to:expr, $from:expr; $($field:ident)*) => { $($to.$field = $from.$field.0;)* };
}

fn general_state(regs: &kvm_regs) -> GeneralState {
    words!(GeneralState <- regs; rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags)
}

fn regs(state: &GeneralState) -> kvm_regs {
    let mut regs = kvm_regs::default();
    words!(regs, state; rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags);
    regs
}

fn segment_state(segment: &kvm_segment) -> SegmentState {
    let segment = to_segment(segment);
    words!(SegmentState <- segment; selector base limit attributes)
}

/// What does not fit into a segment register is cut off: KVM judges what is left.
fn segment(state: &SegmentState) -> kvm_segment {
    let SegmentState { selector, base, limit, attributes } = *state;
    from_segment(&Segment {
        selector: selector.0 as u16,
        base: base.0,
        limit: limit.0 as u32,
        attributes: attributes.0 as u32,
    })
}

fn table_state(table: &kvm_dtable) -> TableState {
    words!(TableState <- table; base limit)
}

fn table(state: &TableState) -> kvm_dtable {
    kvm_dtable { base: state.base.0, limit: state.limit.0 as u16, ..Default::default() }
}

fn system_state(sregs: &kvm_sregs) -> SystemState {
    SystemState {
        cs: segment_state(&sregs.cs),
        ss: segment_state(&sregs.ss),
        ds: segment_state(&sregs.ds),
        es: segment_state(&sregs.es),
        fs: segment_state(&sregs.fs),
        gs: segment_state(&sregs.gs),
        tr: segment_state(&sregs.tr),
        ldtr: segment_state(&sregs.ldt),
        gdtr: table_state(&sregs.gdt),
        idtr: table_state(&sregs.idt),
        cr0: Word(sregs.cr0),
        cr2: Word(sregs.cr2),
        cr3: Word(sregs.cr3),
        cr4: Word(sregs.cr4),
        cr8: Word(sregs.cr8),
        efer: Word(sregs.efer),
        apic_base: Word(sregs.apic_base),
    }
}

/// Without the interrupt that is on its way: it is among the events.
fn sregs(state: &SystemState) -> kvm_sregs {
    let mut sregs = kvm_sregs {
        cs: segment(&state.cs),
        ss: segment(&state.ss),
        ds: segment(&state.ds),
        es: segment(&state.es),
        fs: segment(&state.fs),
        gs: segment(&state.gs),
        tr: segment(&state.tr),
        ldt: segment(&state.ldtr),
        gdt: table(&state.gdtr),
        idt: table(&state.idtr),
        ..Default::default()
    };
    words!(sregs, state; cr0 cr2 cr3 cr4 cr8 efer apic_base);
    sregs
}

fn event_state(events: &kvm_vcpu_events) -> EventState {
    let exception = events.exception;
    let is_there = exception.injected | exception.pending != 0;
    EventState {
        exception: is_there.then(|| ExceptionState {
            vector: exception.nr,
            error_code: (exception.has_error_code != 0).then_some(exception.error_code),
            injected: exception.injected != 0,
            payload: (events.exception_has_payload != 0).then_some(Word(events.exception_payload)),
        }),
        interrupt: (events.interrupt.injected != 0).then_some(events.interrupt.nr),
        soft: events.interrupt.soft != 0,
        shadow: events.interrupt.shadow,
        nmi_injected: events.nmi.injected != 0,
        nmi_pending: events.nmi.pending,
        nmi_masked: events.nmi.masked != 0,
        smm: SmmState {
            inside: events.smi.smm != 0,
            pending: events.smi.pending != 0,
            inside_nmi: events.smi.smm_inside_nmi != 0,
            latched_init: events.smi.latched_init != 0,
        },
        triple_fault: events.triple_fault.pending != 0,
    }
}

fn vcpu_events(state: &EventState, has_triple_fault: bool) -> kvm_vcpu_events {
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM,
        ..Default::default()
    };
    if let Some(exception) = state.exception {
        if !exception.injected {
            // Without it KVM takes none that is not injected.
            events.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
        }
        (events.exception.injected, events.exception.pending) =
            (exception.injected.into(), (!exception.injected).into());
        events.exception.nr = exception.vector;
        events.exception.has_error_code = exception.error_code.is_some().into();
        events.exception.error_code = exception.error_code.unwrap_or(0);
        events.exception_has_payload = exception.payload.is_some().into();
        events.exception_payload = exception.payload.map_or(0, |payload| payload.0);
    }
    events.interrupt.injected = state.interrupt.is_some().into();
    events.interrupt.nr = state.interrupt.unwrap_or(0);
    events.interrupt.soft = state.soft.into();
    events.interrupt.shadow = state.shadow;
    events.nmi.injected = state.nmi_injected.into();
    events.nmi.pending = state.nmi_pending;
    events.nmi.masked = state.nmi_masked.into();
    events.smi.smm = state.smm.inside.into();
    events.smi.pending = state.smm.pending.into();
    events.smi.smm_inside_nmi = state.smm.inside_nmi.into();
    events.smi.latched_init = state.smm.latched_init.into();
    if has_triple_fault {
        events.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        events.triple_fault.pending = state.triple_fault.into();
    }
    events
}
