//! Where the guest's exceptions lead, and the frame that they leave (SDM vol. 3, 6.14): long mode only.

use super::super::{Cpu, Registers};
use super::TF;

/// EFER.LMA.
const LONG_MODE: u64 = 1 << 10;
/// RFLAGS.RF: set in the frame of a fault.
const RF: u64 = 1 << 16;
/// Bytes of one gate.
const GATE: usize = 16;
/// The exceptions of the processor: the gates that are read at once.
const EXCEPTIONS: usize = 32;
/// A present interrupt or trap gate: P and S and type, but for the bit that tells the two apart.
const PRESENT: u8 = 1 << 7;
const GATE_TYPE: u8 = 0x0e;

/// The guest's IDT, as far as a step looks at it.
pub(super) struct Gates {
    base: u64,
    limit: usize,
    exceptions: [u8; GATE * EXCEPTIONS],
    got: usize,
}

impl Gates {
    /// Reads the gates of the processor's exceptions. Outside long mode there are none: real mode
    /// and 32-bit guests are stepped as their KVM does it.
    pub(super) fn read<C: Cpu>(cpu: &mut C, registers: &Registers) -> Self {
        let (base, limit) = (registers.idtr.base, usize::from(registers.idtr.limit));
        let mut gates = Gates { base, limit, exceptions: [0; GATE * EXCEPTIONS], got: 0 };
        if registers.efer & LONG_MODE != 0 {
            gates.got = cpu.read(base, &mut gates.exceptions);
        }
        gates
    }

    /// The first instruction of the handler of `vector`.
    pub(super) fn handler<C: Cpu>(&self, cpu: &mut C, vector: u8) -> Option<u64> {
        let from = usize::from(vector) * GATE;
        if self.got == 0 || from + GATE - 1 > self.limit {
            return None;
        }
        let mut gate = [0; GATE];
        if let Some(known) = self.exceptions[..self.got].get(from..from + GATE) {
            gate.copy_from_slice(known);
        } else if cpu.read(self.base.wrapping_add(from as u64), &mut gate) != GATE {
            return None;
        }
        let kind = gate[5];
        if kind & PRESENT == 0 || kind & 0x1e != GATE_TYPE {
            return None;
        }
        let word = |at: usize| u64::from(u16::from_le_bytes([gate[at], gate[at + 1]]));
        Some(word(0) | word(6) << 16 | word(8) << 32 | word(10) << 48)
    }
}

/// What an exception has pushed: RIP, CS, RFLAGS, RSP, SS, eight bytes each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(super) rip: u64,
    rflags: u64,
    rflags_at: u64,
}

impl Frame {
    /// The frame at the top of the stack of a vCPU that stands at the first instruction of a
    /// handler. Whether there is an error code below it is found out by looking for one of the
    /// addresses from which the vCPU may have come.
    pub(super) fn find<C: Cpu>(cpu: &mut C, rsp: u64, cs: u16, from: &[u64]) -> Option<Self> {
        let mut bytes = [0; 32];
        let got = cpu.read(rsp, &mut bytes);
        let word = |n: usize| {
            let end = 8 * n + 8;
            (end <= got).then(|| u64::from_le_bytes(bytes[8 * n..end].try_into().unwrap_or_default()))
        };
        (0..2).find_map(|error_code| {
            let (rip, pushed_cs, rflags) = (word(error_code)?, word(error_code + 1)?, word(error_code + 2)?);
            let rflags_at = rsp.wrapping_add(8 * (error_code as u64 + 2));
            let is_it = from.contains(&rip) && pushed_cs & 0xffff == u64::from(cs);
            is_it.then_some(Frame { rip, rflags, rflags_at })
        })
    }

    /// Whether it is still there, and leads back to where it was pushed, with `rsp`. A handler that
    /// has returned by it leaves it below the stack.
    pub(super) fn leads_back<C: Cpu>(&self, cpu: &mut C, rsp: u64) -> bool {
        let mut bytes = [0; 32];
        let got = cpu.read(self.rflags_at.wrapping_sub(16), &mut bytes);
        let word = |n: usize| u64::from_le_bytes(bytes[8 * n..8 * n + 8].try_into().unwrap_or_default());
        got == bytes.len() && (word(0), word(3)) == (self.rip, rsp) && word(2) & RF != 0
    }

    /// Makes TF in it the guest's own.
    pub(super) fn put_tf<C: Cpu>(&self, cpu: &mut C, tf: bool) {
        let wanted = with_tf(self.rflags, tf);
        if wanted != self.rflags {
            cpu.write(self.rflags_at, &wanted.to_le_bytes());
        }
    }
}

/// `rflags` with TF as given.
pub(super) const fn with_tf(rflags: u64, tf: bool) -> u64 {
    if tf { rflags | TF } else { rflags & !TF }
}
