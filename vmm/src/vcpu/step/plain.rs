//! Instructions of which it is known beforehand that they raise no exception: what makes them fault is
//! a memory operand at most, and the page tables say that it does not.
//!
//! Such a step needs no slots at the handlers of exceptions ([`super::Stepped::foresee`]), and slots
//! cost time at each entry. A doubt is no plain instruction.

use iced_x86::{
    CpuidFeature, FlowControl, Instruction, InstructionInfoFactory, InstructionInfoOptions, MemorySize, Mnemonic,
    OpAccess, OpKind,
};

use super::effect::Next;
use super::iret::is_canonical;
use crate::paging::Access;
use crate::vcpu::registers::operand;
use crate::vcpu::{Cpu, Registers};

const RFLAGS_AC: u64 = 1 << 18;
/// CET.
const CR4_CET: u64 = 1 << 23;
/// Most operands in memory: of CALL through memory, the pointer and the stack.
const MOST: usize = 2;

/// The memory operands, their addresses and lengths, of an instruction that faults for their sake or not at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Plain([Option<(u64, usize, Access)>; MOST]);

impl Plain {
    /// Whether it raises nothing now.
    pub(super) fn raises_nothing<C: Cpu>(&self, cpu: &mut C, next: Next) -> bool {
        let mut target = [0; 8];
        let leads_somewhere = match next {
            Next::Behind => true,
            Next::At(to) => is_canonical(to),
            Next::StoredAt(at) => cpu.read(at, &mut target) == 8 && is_canonical(u64::from_le_bytes(target)),
            Next::Unknown => false,
        };
        leads_somewhere && self.0.iter().flatten().all(|&(addr, len, access)| cpu.may_access(addr, len, access))
    }
}

/// With the operands of the instruction, if it is of the kind; in 64-bit mode, with these registers.
pub(super) fn plain(instruction: &Instruction, next: Next, registers: &Registers) -> Option<Plain> {
    let checks_alignment = registers.cpl() == 3 && registers.rflags & RFLAGS_AC != 0;
    if next == Next::Unknown || checks_alignment || registers.cr4 & CR4_CET != 0 || !is_of_the_kind(instruction) {
        return None;
    }
    let mut info = InstructionInfoFactory::new();
    let info = info.info_options(instruction, InstructionInfoOptions::NO_REGISTER_USAGE);
    let mut accesses = Plain::default();
    let mut free = accesses.0.iter_mut();
    for memory in info.used_memory() {
        let access = match memory.access() {
            OpAccess::None | OpAccess::NoMemAccess => continue,
            OpAccess::Read | OpAccess::CondRead => Access::Read,
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => Access::Write,
        };
        if memory.memory_size() == MemorySize::Unknown {
            return None;
        }
        let addr = memory.virtual_address(0, |register, _, _| operand(registers, register))?;
        *free.next()? = Some((addr, memory.memory_size().size(), access));
    }
    Some(accesses)
}

/// Integer instructions of old that touch general registers, status flags and memory.
fn is_of_the_kind(instruction: &Instruction) -> bool {
    use CpuidFeature::{CET_IBT, CMOV, INTEL186, INTEL286, INTEL386, INTEL486, INTEL8086, MULTIBYTENOP, X64};
    const KNOWN: [CpuidFeature; 9] =
        [INTEL8086, INTEL186, INTEL286, INTEL386, INTEL486, X64, CMOV, MULTIBYTENOP, CET_IBT];
    let is_general = |n| instruction.op_kind(n) != OpKind::Register || instruction.op_register(n).is_gpr();
    (0..instruction.op_count()).all(is_general)
        && instruction.cpuid_features().iter().all(|feature| KNOWN.contains(feature))
        && is_known(instruction)
}

fn is_known(instruction: &Instruction) -> bool {
    let is_bit_in_memory = instruction.op_count() > 0 && instruction.op0_kind() == OpKind::Memory;
    match instruction.mnemonic() {
        Mnemonic::Mov
        | Mnemonic::Movzx
        | Mnemonic::Movsx
        | Mnemonic::Movsxd
        | Mnemonic::Lea
        | Mnemonic::Add
        | Mnemonic::Adc
        | Mnemonic::Sub
        | Mnemonic::Sbb
        | Mnemonic::Inc
        | Mnemonic::Dec
        | Mnemonic::Neg
        | Mnemonic::Not
        | Mnemonic::And
        | Mnemonic::Or
        | Mnemonic::Xor
        | Mnemonic::Cmp
        | Mnemonic::Test
        | Mnemonic::Shl
        | Mnemonic::Shr
        | Mnemonic::Sar
        | Mnemonic::Rol
        | Mnemonic::Ror
        | Mnemonic::Imul
        | Mnemonic::Mul
        | Mnemonic::Xchg
        | Mnemonic::Xadd
        | Mnemonic::Cmpxchg
        | Mnemonic::Bswap
        | Mnemonic::Cwde
        | Mnemonic::Cdqe
        | Mnemonic::Cdq
        | Mnemonic::Cqo
        | Mnemonic::Push
        | Mnemonic::Pop
        | Mnemonic::Leave
        | Mnemonic::Call
        | Mnemonic::Ret
        | Mnemonic::Jmp
        | Mnemonic::Nop
        | Mnemonic::Endbr64 => true,
        // A bit offset in a register leads anywhere in memory.
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc => !is_bit_in_memory,
        _ => instruction.is_jcc_short_or_near() || is_setcc_or_cmovcc(instruction),
    }
}

fn is_setcc_or_cmovcc(instruction: &Instruction) -> bool {
    // Of the instructions with a condition only jumps and those two are without a string or FPU form
    // in what is known here.
    instruction.condition_code() != iced_x86::ConditionCode::None
        && instruction.flow_control() == FlowControl::Next
        && !instruction.is_string_instruction()
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    fn accesses(bytes: &[u8]) -> Option<Vec<(u64, usize, bool)>> {
        let registers = Registers { rbx: 0x5000, rsp: 0x7000, rcx: 2, ..Registers::default() };
        let instruction = Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE).decode();
        let plain = plain(&instruction, super::super::effect::next(&instruction, Some(&registers)), &registers)?;
        Some(plain.0.iter().flatten().map(|&(addr, len, access)| (addr, len, access == Access::Write)).collect())
    }

    #[test]
    fn operands_in_memory_are_known() {
        assert_eq!(accesses(&[0x90]), Some(vec![]));
        assert_eq!(accesses(&[0x48, 0x01, 0xd8]), Some(vec![]), "ADD RAX, RBX");
        assert_eq!(accesses(&[0x48, 0x8d, 0x03]), Some(vec![]), "LEA RAX, [RBX]");
        assert_eq!(accesses(&[0x48, 0x8b, 0x04, 0xcb]), Some(vec![(0x5010, 8, false)]), "MOV RAX, [RBX+RCX*8]");
        assert_eq!(accesses(&[0x88, 0x03]), Some(vec![(0x5000, 1, true)]), "MOV [RBX], AL");
        assert_eq!(accesses(&[0xf0, 0xff, 0x03]), Some(vec![(0x5000, 4, true)]), "LOCK INC [RBX]");
        assert_eq!(accesses(&[0x50]), Some(vec![(0x6ff8, 8, true)]), "PUSH RAX");
        assert_eq!(accesses(&[0xc3]), Some(vec![(0x7000, 8, false)]), "RET");
        assert_eq!(accesses(&[0xe8, 0, 0, 0, 0]), Some(vec![(0x6ff8, 8, true)]), "CALL");
        let mut both = accesses(&[0xff, 0x13]).unwrap();
        both.sort_unstable();
        assert_eq!(both, [(0x5000, 8, false), (0x6ff8, 8, true)], "CALL [RBX]");
        assert_eq!(accesses(&[0x0f, 0x94, 0x03]), Some(vec![(0x5000, 1, true)]), "SETE [RBX]");
    }

    #[test]
    fn what_may_fault_for_other_reasons_is_not_plain() {
        for (bytes, what) in [
            (&[0xf7, 0xf1][..], "DIV"),
            (&[0x0f, 0x0b], "UD2"),
            (&[0xcc], "INT3"),
            (&[0xf4], "HLT"),
            (&[0xfa], "CLI"),
            (&[0x8e, 0xd0], "MOV SS"),
            (&[0x8e, 0xd8], "MOV DS"),
            (&[0x0f, 0x20, 0xc0], "MOV RAX, CR0"),
            (&[0x0f, 0x21, 0xc0], "MOV RAX, DR0"),
            (&[0x9c], "PUSHF"),
            (&[0x9d], "POPF"),
            (&[0x48, 0xcf], "IRETQ"),
            (&[0xcb], "RETF"),
            (&[0x0f, 0x05], "SYSCALL"),
            (&[0xa4], "MOVSB"),
            (&[0xf3, 0xaa], "REP STOSB"),
            (&[0xe4, 0x80], "IN"),
            (&[0x0f, 0xa2], "CPUID"),
            (&[0x0f, 0x30], "WRMSR"),
            (&[0x0f, 0x01, 0xf8], "SWAPGS"),
            (&[0x0f, 0x58, 0xc1], "ADDPS"),
            (&[0xd9, 0xe8], "FLD1"),
            (&[0x0f, 0xa3, 0x0b], "BT [RBX], ECX"),
            (&[0x0f, 0xc7, 0x0b], "CMPXCHG8B"),
            (&[0xff, 0x2b], "JMP FAR [RBX]"),
            (&[0x66, 0x0f, 0x1f], "cut off"),
        ] {
            assert_eq!(accesses(bytes), None, "{what}");
        }
    }
}
