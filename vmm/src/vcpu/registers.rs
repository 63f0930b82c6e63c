//! A vCPU's registers as plain data, for whoever looks at a parked vCPU.
//!
//! The layout is nobody's wire format: the gdb side and the harness each read the fields they
//! want. Everything here is the guest's own truth: TF is the guest's, DR0-7 are the guest's
//! (law 30), never what the debugger armed.

use std::time::Instant;

use iced_x86::Register;

/// A segment register with its hidden part (SDM vol. 3, 3.4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
    /// Access rights: type in bits 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15, unusable 16. Type, S, P and AVL of
    /// an unusable segment mean nothing and are 0.
    pub attributes: u32,
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// x87 and SSE state, as FXSAVE has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fpu {
    /// ST0-ST7, ten bytes each.
    pub st: [[u8; 10]; 8],
    /// Control word.
    pub fcw: u16,
    /// Status word.
    pub fsw: u16,
    /// Abridged tag word, one bit a register (1 = valid).
    pub ftwx: u8,
    /// Last opcode.
    pub fop: u16,
    /// Last instruction pointer.
    pub fip: u64,
    /// Last data pointer.
    pub fdp: u64,
    /// XMM0-XMM15.
    pub xmm: [u128; 16],
    /// MXCSR.
    pub mxcsr: u32,
}

/// The registers of one parked vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)] // the SDM's names say it
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rbp: u64,
    pub rsp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub tr: Segment,
    pub ldtr: Segment,
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub apic_base: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    pub star: u64,
    pub lstar: u64,
    /// IA32_FMASK.
    pub fmask: u64,
    pub dr: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
    pub fpu: Fpu,
}

impl Registers {
    /// The linear address of the next instruction: in long mode CS.base is zero.
    pub fn pc(&self) -> u64 {
        self.rip.wrapping_add(self.cs.base)
    }

    /// Current privilege level: SS.DPL (SDM vol. 3, 5.5), which is right in real mode too.
    pub fn cpl(&self) -> u8 {
        ((self.ss.attributes >> 5) & 3) as u8
    }
}

/// What a parked vCPU is doing, in the words of `info threads` (KVM API, KVM_GET_MP_STATE).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    /// It would run.
    Runnable,
    /// It waits for an interrupt after HLT.
    Halted,
    /// It waits for INIT and SIPI: an AP that was not started.
    WaitForSipi,
    /// KVM reports a state that this VMM does not know.
    Other(u32),
}

/// One look at a vCPU, which may be running.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Glance {
    /// Linear address of the next instruction.
    pub pc: u64,
    /// It takes interrupts: RFLAGS.IF.
    pub interrupts: bool,
    /// Current privilege level.
    pub cpl: u8,
    /// What it is doing.
    pub activity: Activity,
    /// Since when it is parked; `None` while it runs.
    pub parked: Option<Instant>,
}

/// What a register adds to an address: its value, or the base of a segment.
pub(crate) fn operand(r: &Registers, register: Register) -> Option<u64> {
    let value = match register.full_register() {
        Register::RAX => r.rax,
        Register::RBX => r.rbx,
        Register::RCX => r.rcx,
        Register::RDX => r.rdx,
        Register::RSI => r.rsi,
        Register::RDI => r.rdi,
        Register::RBP => r.rbp,
        Register::RSP => r.rsp,
        Register::R8 => r.r8,
        Register::R9 => r.r9,
        Register::R10 => r.r10,
        Register::R11 => r.r11,
        Register::R12 => r.r12,
        Register::R13 => r.r13,
        Register::R14 => r.r14,
        Register::R15 => r.r15,
        Register::FS => r.fs.base,
        Register::GS => r.gs.base,
        Register::CS | Register::SS | Register::DS | Register::ES => 0,
        _ => return None,
    };
    Some(if register.is_gpr32() { value & u64::from(u32::MAX) } else { value })
}
