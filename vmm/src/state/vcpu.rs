//! One vCPU, as plain data.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Blob, Word};

/// Everything that makes up a parked vCPU. Nothing in it is the debugger's: TF and DR0-7 are the guest's own (laws 30,
/// 46).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VcpuState {
    /// Frequency of the TSC in kHz; 0 if KVM does not say.
    pub tsc_khz: u32,
    /// Whether it would run.
    pub activity: ActivityState,
    /// General registers, RIP and RFLAGS.
    pub general: GeneralState,
    /// Segments, descriptor tables, control registers.
    pub system: SystemState,
    /// The guest's own debug registers.
    pub debug: DebugState,
    /// x87, SSE, AVX and so on, in the processor's own layout (SDM vol. 1, 13.4).
    pub xsave: Blob,
    /// Extended control registers, by number; XCR0 says what XSAVE saves.
    pub xcrs: BTreeMap<u32, Word>,
    /// The local APIC's registers, in its own layout (SDM vol. 3, 11.4.1).
    pub lapic: Blob,
    /// Model-specific registers, by number.
    pub msrs: BTreeMap<Word, Word>,
    /// What is on its way into the guest.
    pub events: EventState,
    /// What the debugger still has to give to the guest.
    pub owed: OwedState,
}

/// One answer of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the SDM's names say it
pub struct CpuidLeaf {
    pub function: Word,
    pub index: Word,
    /// The index counts (KVM_CPUID_FLAG_SIGNIFCANT_INDEX).
    pub indexed: bool,
    pub eax: Word,
    pub ebx: Word,
    pub ecx: Word,
    pub edx: Word,
}

/// What a vCPU is doing (KVM API, KVM_GET_MP_STATE).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ActivityState {
    /// It would run.
    #[default]
    Runnable,
    /// It waits for INIT.
    Uninitialized,
    /// It waits for SIPI.
    InitReceived,
    /// It waits for an interrupt.
    Halted,
    /// It is about to begin.
    SipiReceived,
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident: $($field:ident)*) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
        #[allow(missing_docs)] // the SDM's names say it
        pub struct $name { $(pub $field: Word),* }
    };
}

words! {
    /// General registers, RIP and RFLAGS.
    GeneralState: rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags
}

words! {
    /// A segment register with its hidden part. Attributes as in [`Segment`](crate::vcpu::Segment).
    SegmentState: selector base limit attributes
}

words! {
    /// GDTR or IDTR.
    TableState: base limit
}

/// System registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[allow(missing_docs)] // the SDM's names say it
pub struct SystemState {
    pub cs: SegmentState,
    pub ss: SegmentState,
    pub ds: SegmentState,
    pub es: SegmentState,
    pub fs: SegmentState,
    pub gs: SegmentState,
    pub tr: SegmentState,
    pub ldtr: SegmentState,
    pub gdtr: TableState,
    pub idtr: TableState,
    pub cr0: Word,
    pub cr2: Word,
    pub cr3: Word,
    pub cr4: Word,
    pub cr8: Word,
    pub efer: Word,
    pub apic_base: Word,
}

/// The guest's own debug registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[allow(missing_docs)] // the SDM's names say it
pub struct DebugState {
    pub dr: [Word; 4],
    pub dr6: Word,
    pub dr7: Word,
}

/// What is on its way into the guest (KVM API, KVM_GET_VCPU_EVENTS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct EventState {
    /// An exception whose delivery has begun, or that is to be delivered next.
    pub exception: Option<ExceptionState>,
    /// An interrupt whose delivery has begun: its vector.
    pub interrupt: Option<u8>,
    /// It is one of INT n's.
    pub soft: bool,
    /// In the shadow of STI (2) or MOV SS (1).
    pub shadow: u8,
    /// The delivery of an NMI has begun.
    pub nmi_injected: bool,
    /// NMIs that wait.
    pub nmi_pending: u8,
    /// NMIs are held back until IRET.
    pub nmi_masked: bool,
    /// System management mode.
    pub smm: SmmState,
    /// A triple fault that was not reported yet.
    pub triple_fault: bool,
}

/// An exception on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExceptionState {
    /// Its vector.
    pub vector: u8,
    /// Its error code, if it has one.
    pub error_code: Option<u32>,
    /// Its delivery has begun; otherwise it can still be replaced by another.
    pub injected: bool,
    /// What it will change when it is delivered: CR2 of #PF, DR6 of #DB.
    pub payload: Option<Word>,
}

/// System management mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SmmState {
    /// It is in it.
    pub inside: bool,
    /// An SMI waits.
    pub pending: bool,
    /// It came while NMIs were masked.
    pub inside_nmi: bool,
    /// INIT has come meanwhile.
    pub latched_init: bool,
}

/// What a vCPU's thread has taken from the guest and has not given yet: it does so right before the next entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct OwedState {
    /// A #DB with these causes of DR6 (law 25).
    pub db: Option<Word>,
    /// The guest steps itself, and the instruction before this linear address was stepped by us (law 46).
    pub trap_at: Option<Word>,
}
