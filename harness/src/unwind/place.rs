//! Where in a chain of calls the unwinder is, and with which registers.

use trapline_vmm::vcpu::Registers;

use super::{End, Frame, FrameKind, Memory};

/// Numbers of the registers in the psABI's DWARF mapping.
pub(super) const RDX: usize = 1;
pub(super) const RBX: usize = 3;
pub(super) const RDI: usize = 5;
pub(super) const RBP: usize = 6;
pub(super) const RSP: usize = 7;
pub(super) const R10: usize = 10;
pub(super) const R12: usize = 12;
pub(super) const R13: usize = 13;
pub(super) const R15: usize = 15;
pub(super) const COUNT: usize = 16;

/// The general registers by DWARF number, as far as they are known.
pub(super) type General = [Option<u64>; COUNT];

/// One frame, with what is needed to find the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) pc: u64,
    pub(super) sp: u64,
    pub(super) kind: FrameKind,
    /// RSP among them is not looked at: it is `sp`.
    pub(super) general: General,
}

impl Place {
    pub(super) fn of(registers: &Registers) -> Self {
        let r = registers;
        let general = [
            r.rax, r.rdx, r.rcx, r.rbx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14,
            r.r15,
        ];
        let kind = if r.cpl() == 3 { FrameKind::User } else { FrameKind::Exact };
        // In real mode the stack has a base too, but nobody unwinds it.
        Self { pc: r.pc(), sp: r.rsp, kind, general: general.map(Some) }
    }

    pub(super) fn frame(&self) -> Frame {
        Frame { pc: self.pc, sp: self.sp, kind: self.kind }
    }

    /// A register's value, if it is known.
    pub(super) fn value(&self, register: usize) -> Option<u64> {
        if register == RSP { Some(self.sp) } else { self.general.get(register).copied().flatten() }
    }

    /// The caller, whose return address stands right below `sp`. Nothing is known of the other registers but RBP.
    pub(super) fn caller(sp: u64, rbp: Option<u64>, memory: &dyn Memory) -> Result<Self, End> {
        let pc = word(memory, sp.wrapping_sub(8)).ok_or(NO_STACK)?;
        let mut general = [None; COUNT];
        general[RBP] = rbp;
        Ok(Self { pc, sp, kind: FrameKind::Call, general })
    }

    /// What a `struct pt_regs` at `addr` saved.
    pub(super) fn of_pt_regs(addr: u64, is_call: bool, memory: &dyn Memory) -> Result<Self, End> {
        const R15_TO_RDI: [usize; 15] = [
            R15, 14, R13, R12, RBP, RBX, 11, R10, 9, 8, 0, /* RAX */
            2, /* RCX */
            RDX, 4, /* RSI */
            RDI,
        ];
        let saved: [u64; 15] = words(memory, addr).ok_or(NO_STACK)?;
        let mut general = [None; COUNT];
        for (register, value) in R15_TO_RDI.into_iter().zip(saved) {
            general[register] = Some(value);
        }
        // Behind them is orig_ax.
        Self::of_iret_frame(addr.wrapping_add(16 * 8), is_call, general, memory)
    }

    /// What the processor saved at `addr` when it was interrupted; it had these general registers.
    pub(super) fn of_iret_frame(addr: u64, is_call: bool, general: General, memory: &dyn Memory) -> Result<Self, End> {
        let [pc, cs, _flags, sp, _ss] = words(memory, addr).ok_or(NO_STACK)?;
        let kind = match (cs & 3, is_call) {
            (3, _) => FrameKind::User,
            (_, false) => FrameKind::Exact,
            (_, true) => FrameKind::Call,
        };
        Ok(Self { pc, sp, kind, general })
    }
}

const NO_STACK: End = End::Lost("the stack cannot be read");

/// Eight bytes of memory.
pub(super) fn word(memory: &dyn Memory, addr: u64) -> Option<u64> {
    words(memory, addr).map(|[word]| word)
}

/// `N` words of memory.
fn words<const N: usize>(memory: &dyn Memory, addr: u64) -> Option<[u64; N]> {
    let mut words = [0; N];
    let mut at = addr;
    for word in &mut words {
        let mut bytes = [0; 8];
        if memory.read(at, &mut bytes) < bytes.len() {
            return None;
        }
        *word = u64::from_le_bytes(bytes);
        at = at.wrapping_add(8);
    }
    Some(words)
}
