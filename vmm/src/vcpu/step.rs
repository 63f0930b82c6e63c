//! One stepped instruction: what single-stepping does to the guest behind its back, and the
//! mending of it.
//!
//! KVM steps by setting TF in the real RFLAGS. An instruction that *stores* RFLAGS then stores
//! our TF where the guest will find it and trap on it later (law 45). So the instruction is
//! decoded before it runs, and what it stored is put right after.

use std::io;

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction};

use super::{Activity, Cpu, Registers};

/// RFLAGS.TF.
const TF: u64 = 1 << 8;

/// An instruction that is being stepped.
pub(crate) struct Stepped {
    from: u64,
    kind: Kind,
    /// It leads elsewhere: while RIP stands on it, it has not run.
    leads_on: bool,
    waiting: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Stores RFLAGS at the new top of the stack, as this many bytes.
    PushFlags(usize),
    /// Stores RFLAGS in R11.
    Syscall,
    /// Waits for an interrupt.
    Halt,
    /// A string instruction with a REP prefix: it traps between its iterations as well.
    Repeat,
    Other,
}

impl Stepped {
    /// Looks at the instruction at `pc`, which is to be stepped.
    pub(crate) fn begin<C: Cpu>(cpu: &mut C, pc: u64) -> io::Result<Self> {
        let mut bytes = [0; 15];
        let got = cpu.read(pc, &mut bytes);
        // Stepping outside 64-bit mode is exact as well; only what is mended is decoded, and
        // those encodings read the same there.
        let instruction = decode(&bytes[..got]);
        let kind = match kind(&instruction) {
            // Elsewhere it faults.
            Kind::Halt if cpu.registers()?.cpl() != 0 => Kind::Other,
            kind => kind,
        };
        let leads_on = kind != Kind::Repeat && instruction.flow_control() == FlowControl::Next;
        let waiting = cpu.activity()? == Activity::Halted;
        Ok(Stepped { from: pc, kind, leads_on, waiting })
    }

    /// Whether it is a HLT that is to be carried out in place: a step over it ends with the vCPU
    /// asleep behind it, and no two KVM flavours do that alike (law 49).
    pub(crate) fn halts(&self) -> bool {
        self.kind == Kind::Halt && !self.waiting
    }

    /// Whether the vCPU sleeps, and so must be allowed to take an interrupt.
    pub(crate) fn waits_for_interrupt(&self) -> bool {
        self.waiting
    }

    /// Whether a trap at `pc` is one between two iterations of the instruction, not its end.
    pub(crate) fn goes_on_at(&self, pc: u64) -> bool {
        self.kind == Kind::Repeat && pc == self.from
    }

    /// Whether a trap at `pc` says of a step that was none: some VT-x implementations trap once
    /// more without progress after they have left the guest in between (law 51).
    pub(crate) fn has_not_run_at(&self, pc: u64) -> bool {
        self.leads_on && pc == self.from
    }

    /// Puts right what the instruction did with the TF that the guest did not set.
    pub(crate) fn end<C: Cpu>(self, cpu: &mut C) {
        let mended = match self.kind {
            Kind::Halt | Kind::Repeat | Kind::Other => Ok(()),
            Kind::PushFlags(len) => scrub_pushed(cpu, len),
            Kind::Syscall => scrub_r11(cpu),
        };
        if let Err(error) = mended {
            tracing::warn!(%error, pc = self.from, "what single-step left in the guest could not be put right");
        }
    }
}

fn decode(bytes: &[u8]) -> Instruction {
    Decoder::new(64, bytes, DecoderOptions::NONE).decode()
}

fn kind(instruction: &Instruction) -> Kind {
    match instruction.code() {
        Code::Pushfq => Kind::PushFlags(8),
        Code::Pushfd => Kind::PushFlags(4),
        Code::Pushfw => Kind::PushFlags(2),
        Code::Syscall => Kind::Syscall,
        Code::Hlt => Kind::Halt,
        _ if instruction.is_string_instruction()
            && (instruction.has_rep_prefix() || instruction.has_repne_prefix()) =>
        {
            Kind::Repeat
        }
        _ => Kind::Other,
    }
}

fn guest_has_tf<C: Cpu>(cpu: &mut C) -> io::Result<bool> {
    cpu.guest_debug_state().map(|(tf, _)| tf)
}

fn scrub_pushed<C: Cpu>(cpu: &mut C, len: usize) -> io::Result<()> {
    if guest_has_tf(cpu)? {
        return Ok(());
    }
    let Registers { rsp, ss, .. } = cpu.registers()?;
    let top = rsp.wrapping_add(ss.base);
    let mut image = [0; 8];
    if cpu.read(top, &mut image[..len]) == len {
        let flags = u64::from_le_bytes(image);
        if flags & TF != 0 {
            cpu.write(top, &(flags & !TF).to_le_bytes()[..len]);
        }
    }
    Ok(())
}

fn scrub_r11<C: Cpu>(cpu: &mut C) -> io::Result<()> {
    let mut registers = cpu.registers()?;
    if registers.r11 & TF != 0 {
        registers.r11 &= !TF;
        cpu.set_registers(&registers)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(bytes: &[u8]) -> Kind {
        super::kind(&decode(bytes))
    }

    #[test]
    fn l45_instructions_that_store_rflags_are_known() {
        assert_eq!(kind(&[0x9c]), Kind::PushFlags(8));
        assert_eq!(kind(&[0x66, 0x9c]), Kind::PushFlags(2));
        assert_eq!(kind(&[0x0f, 0x05]), Kind::Syscall);
        assert_eq!(kind(&[0xf4]), Kind::Halt);
        assert_eq!(kind(&[0x90]), Kind::Other);
        assert_eq!(kind(&[0xf3, 0xaa]), Kind::Repeat);
        assert_eq!(kind(&[0xf3, 0x48, 0xa5]), Kind::Repeat);
        assert_eq!(kind(&[0xf2, 0xae]), Kind::Repeat);
        assert_eq!(kind(&[0xaa]), Kind::Other);
        assert_eq!(kind(&[0xf3, 0x90]), Kind::Other, "PAUSE");
        assert_eq!(kind(&[]), Kind::Other);
        assert_eq!(kind(&[0x0f]), Kind::Other);
    }
}
