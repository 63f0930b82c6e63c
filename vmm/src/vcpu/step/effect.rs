//! What one instruction does with RFLAGS, and where it leads: decoded before it is stepped.

use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::plain::{Plain, plain};
use crate::paging::Access;
use crate::vcpu::registers::operand;
use crate::vcpu::{Cpu, Registers};

/// EFER.LMA.
const LONG_MODE: u64 = 1 << 10;
/// CS.L and CS.D in [`crate::vcpu::Segment::attributes`].
const CODE_64: u32 = 1 << 13;
const CODE_32: u32 = 1 << 14;

/// One decoded instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Effect {
    /// Its linear address, and that of the instruction behind it.
    pub(super) at: u64,
    pub(super) behind: u64,
    pub(super) kind: Kind,
    pub(super) next: Next,
    /// Of an instruction that faults for the sake of its memory operands or not at all.
    pub(super) plain: Option<Plain>,
    /// It reads or writes memory, a stack included.
    pub(super) uses_memory: bool,
    /// KVM's emulator carries it out, and does so right.
    pub(super) is_emulated: bool,
}

/// Where an instruction leads, unless it faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// To the one behind it, if anywhere.
    Behind,
    /// Here, or to the one behind it.
    At(u64),
    /// To the address of eight bytes that is stored here.
    StoredAt(u64),
    Unknown,
}

/// What an instruction does that a step has to know of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Stores RFLAGS at the new top of the stack, as this many bytes.
    PushFlags(usize),
    /// Loads RFLAGS from the top of the stack, as this many bytes.
    PopFlags(usize),
    /// IRET with fields of this many bytes: RIP, CS, RFLAGS.
    Iret(usize),
    /// Stores RFLAGS in R11 and goes to LSTAR.
    Syscall,
    /// Loads RFLAGS from R11 and goes to RCX; `wide`: into 64-bit code.
    Sysret {
        wide: bool,
    },
    /// Raises this vector, RIP behind the instruction.
    Interrupt(u8),
    /// Raises #DE now and then.
    Divide,
    /// Raises #UD, or cannot be fetched.
    Undefined,
    /// Waits for an interrupt.
    Halt,
    /// A string instruction with a REP prefix: it traps between its iterations as well.
    Repeat,
    /// Holds back the trap until the instruction behind it is done, too (SDM vol. 3, 6.8.3).
    LoadSs,
    /// May find the FPU switched off.
    Fpu,
    Other,
}

impl Effect {
    /// Whether it is certain to raise no exception.
    pub(super) fn raises_nothing<C: Cpu>(&self, cpu: &mut C) -> bool {
        let Some(plain) = self.plain.filter(|_| self.kind == Kind::Other) else { return false };
        let len = self.behind.wrapping_sub(self.at) as usize;
        cpu.may_access(self.at, len, Access::Fetch) && plain.raises_nothing(cpu, self.next)
    }
}

/// Decodes what `bytes`, found at the linear address `at`, mean to a vCPU with these registers.
pub(super) fn decode(bytes: &[u8], at: u64, registers: &Registers) -> Effect {
    let bitness = bitness(registers);
    let wide = (bitness == 64).then_some(registers);
    let instruction = Decoder::with_ip(bitness, bytes, at, DecoderOptions::NONE).decode();
    let next = next(&instruction, wide);
    Effect {
        at,
        behind: at.wrapping_add(instruction.len() as u64),
        kind: kind(&instruction, registers.cpl()),
        next,
        plain: wide.and_then(|registers| plain(&instruction, next, registers)),
        uses_memory: instruction.is_stack_instruction() || instruction.op_kinds().any(is_memory),
        is_emulated: is_emulated(&instruction),
    }
}

fn bitness(registers: &Registers) -> u32 {
    if registers.efer & LONG_MODE != 0 && registers.cs.attributes & CODE_64 != 0 {
        64
    } else if registers.cs.attributes & CODE_32 != 0 {
        32
    } else {
        16
    }
}

/// `registers`: of a vCPU in 64-bit mode, where linear addresses are what the instruction says.
pub(super) fn next(instruction: &Instruction, registers: Option<&Registers>) -> Next {
    let known = match (instruction.flow_control(), registers) {
        (FlowControl::Next | FlowControl::Exception, _) => Some(Next::Behind),
        _ if matches!(instruction.code(), Code::Vmcall | Code::Vmmcall) => Some(Next::Behind),
        (_, None) => None,
        (FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch | FlowControl::Call, _) => {
            (instruction.op0_kind() == OpKind::NearBranch64).then(|| Next::At(instruction.near_branch64()))
        }
        (FlowControl::Return, Some(registers)) => {
            let pops_eight_bytes = matches!(
                instruction.code(),
                Code::Retnq | Code::Retnq_imm16 | Code::Retfq | Code::Retfq_imm16 | Code::Iretq
            );
            pops_eight_bytes.then_some(Next::StoredAt(registers.rsp))
        }
        (FlowControl::IndirectBranch | FlowControl::IndirectCall, Some(registers)) => match instruction.code() {
            Code::Jmp_rm64 | Code::Call_rm64 if instruction.op0_kind() == OpKind::Register => {
                operand(registers, instruction.op0_register()).map(Next::At)
            }
            Code::Jmp_rm64 | Code::Call_rm64 => {
                instruction.virtual_address(0, 0, |register, _, _| operand(registers, register)).map(Next::StoredAt)
            }
            _ => None,
        },
        _ => None,
    };
    known.unwrap_or(Next::Unknown)
}

fn kind(instruction: &Instruction, cpl: u8) -> Kind {
    match instruction.code() {
        Code::Pushfq => Kind::PushFlags(8),
        Code::Pushfd => Kind::PushFlags(4),
        Code::Pushfw => Kind::PushFlags(2),
        Code::Popfq => Kind::PopFlags(8),
        Code::Popfd => Kind::PopFlags(4),
        Code::Popfw => Kind::PopFlags(2),
        Code::Iretq => Kind::Iret(8),
        Code::Iretd => Kind::Iret(4),
        Code::Iretw => Kind::Iret(2),
        Code::Syscall => Kind::Syscall,
        Code::Sysretd | Code::Sysretq => Kind::Sysret { wide: instruction.code() == Code::Sysretq },
        Code::Int1 => Kind::Interrupt(1),
        Code::Int3 => Kind::Interrupt(3),
        Code::Into => Kind::Interrupt(4),
        Code::Int_imm8 => Kind::Interrupt(instruction.immediate8()),
        // In ring 3 it faults.
        Code::Hlt if cpl == 0 => Kind::Halt,
        Code::INVALID | Code::Ud2 | Code::Ud0_r16_rm16 | Code::Ud0_r32_rm32 | Code::Ud0_r64_rm64 => Kind::Undefined,
        Code::Ud1_r16_rm16 | Code::Ud1_r32_rm32 | Code::Ud1_r64_rm64 => Kind::Undefined,
        Code::Div_rm8 | Code::Div_rm16 | Code::Div_rm32 | Code::Div_rm64 => Kind::Divide,
        Code::Idiv_rm8 | Code::Idiv_rm16 | Code::Idiv_rm32 | Code::Idiv_rm64 => Kind::Divide,
        Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16
            if instruction.op0_register() == Register::SS =>
        {
            Kind::LoadSs
        }
        Code::Popw_SS | Code::Popd_SS => Kind::LoadSs,
        _ if instruction.is_string_instruction()
            && (instruction.has_rep_prefix() || instruction.has_repne_prefix()) =>
        {
            Kind::Repeat
        }
        _ if uses_fpu(instruction) => Kind::Fpu,
        _ => Kind::Other,
    }
}

/// x87, MMX, SSE and whatever came later.
fn uses_fpu(instruction: &Instruction) -> bool {
    let of_fpu = |register: Register| register.is_vector_register() || register.is_mm();
    instruction.cpuid_features().contains(&CpuidFeature::FPU)
        || (0..instruction.op_count()).any(|n| of_fpu(instruction.op_register(n)))
}

/// Of what the emulator knows, the part that programs are made of; measured with Linux 6.18. It takes
/// TZCNT for BSF and LZCNT for BSR, as the oldest processors do.
fn is_emulated(instruction: &Instruction) -> bool {
    use CpuidFeature::{
        CET_IBT, CMOV, CPUID, CX8, INTEL186, INTEL286, INTEL386, INTEL486, INTEL8086, MULTIBYTENOP, PAUSE, SYSCALL,
        TSC, X64,
    };
    const KNOWN: [CpuidFeature; 14] = [
        INTEL8086,
        INTEL186,
        INTEL286,
        INTEL386,
        INTEL486,
        X64,
        CMOV,
        CPUID,
        CX8,
        MULTIBYTENOP,
        PAUSE,
        TSC,
        CET_IBT,
        SYSCALL,
    ];
    let unknown = matches!(
        instruction.mnemonic(),
        Mnemonic::Int
            | Mnemonic::Int1
            | Mnemonic::Int3
            | Mnemonic::Into
            | Mnemonic::Enter
            | Mnemonic::Lar
            | Mnemonic::Lsl
            | Mnemonic::Verr
            | Mnemonic::Verw
            | Mnemonic::Wait
    );
    !unknown && instruction.cpuid_features().iter().all(|feature| KNOWN.contains(feature))
}

fn is_memory(kind: OpKind) -> bool {
    match kind {
        OpKind::Memory
        | OpKind::MemorySegSI
        | OpKind::MemorySegESI
        | OpKind::MemorySegRSI
        | OpKind::MemorySegDI
        | OpKind::MemorySegEDI
        | OpKind::MemorySegRDI
        | OpKind::MemoryESDI
        | OpKind::MemoryESEDI
        | OpKind::MemoryESRDI => true,
        OpKind::Register
        | OpKind::NearBranch16
        | OpKind::NearBranch32
        | OpKind::NearBranch64
        | OpKind::FarBranch16
        | OpKind::FarBranch32
        | OpKind::Immediate8
        | OpKind::Immediate8_2nd
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vcpu::Segment;

    fn long_mode() -> Registers {
        let cs = Segment { attributes: CODE_64, ..Segment::default() };
        Registers { efer: LONG_MODE, cs, ..Registers::default() }
    }

    fn kind(bytes: &[u8]) -> Kind {
        decode(bytes, 0x1000, &long_mode()).kind
    }

    #[test]
    fn l45_instructions_that_store_or_load_rflags_are_known() {
        assert_eq!(kind(&[0x9c]), Kind::PushFlags(8));
        assert_eq!(kind(&[0x66, 0x9c]), Kind::PushFlags(2));
        assert_eq!(kind(&[0x9d]), Kind::PopFlags(8));
        assert_eq!(kind(&[0x66, 0x9d]), Kind::PopFlags(2));
        assert_eq!(kind(&[0x48, 0xcf]), Kind::Iret(8));
        assert_eq!(kind(&[0xcf]), Kind::Iret(4));
        assert_eq!(kind(&[0x66, 0xcf]), Kind::Iret(2));
        assert_eq!(kind(&[0x0f, 0x05]), Kind::Syscall);
        assert_eq!(kind(&[0x48, 0x0f, 0x07]), Kind::Sysret { wide: true });
        assert_eq!(kind(&[0x0f, 0x07]), Kind::Sysret { wide: false });
    }

    #[test]
    fn l49_instructions_that_raise_an_exception_are_known() {
        assert_eq!(kind(&[0xcc]), Kind::Interrupt(3));
        assert_eq!(kind(&[0xf1]), Kind::Interrupt(1));
        assert_eq!(kind(&[0xcd, 0x80]), Kind::Interrupt(0x80));
        assert_eq!(kind(&[0xcd, 0x03]), Kind::Interrupt(3));
        assert_eq!(kind(&[0x0f, 0x0b]), Kind::Undefined);
        assert_eq!(kind(&[0x0f, 0xb9, 0xc0]), Kind::Undefined);
        assert_eq!(kind(&[]), Kind::Undefined);
        assert_eq!(kind(&[0x0f]), Kind::Undefined);
        assert_eq!(kind(&[0xf7, 0xf1]), Kind::Divide);
        assert_eq!(kind(&[0x0f, 0x58, 0xc1]), Kind::Fpu, "ADDPS");
        assert_eq!(kind(&[0x0f, 0x6f, 0x00]), Kind::Fpu, "MOVQ");
        assert_eq!(kind(&[0xd9, 0xe8]), Kind::Fpu, "FLD1");
    }

    #[test]
    fn l49_instructions_that_stop_in_their_own_way_are_known() {
        assert_eq!(kind(&[0xf4]), Kind::Halt);
        assert_eq!(kind(&[0xf3, 0xaa]), Kind::Repeat);
        assert_eq!(kind(&[0xf3, 0x48, 0xa5]), Kind::Repeat);
        assert_eq!(kind(&[0xf2, 0xae]), Kind::Repeat);
        assert_eq!(kind(&[0x8e, 0xd0]), Kind::LoadSs);
        assert_eq!(kind(&[0x8e, 0xd8]), Kind::Other, "MOV DS");
        assert_eq!(kind(&[0xaa]), Kind::Other);
        assert_eq!(kind(&[0xf3, 0x90]), Kind::Other, "PAUSE");
        assert_eq!(kind(&[0x90]), Kind::Other);
    }

    #[test]
    fn the_mode_decides_what_the_bytes_mean() {
        let mut registers = long_mode();
        // DEC EAX and NOP, or one NOP with REX.W.
        assert_eq!(decode(&[0x48, 0x90], 0x1000, &registers).behind, 0x1002);
        registers.cs.attributes = CODE_32;
        assert_eq!(decode(&[0x48, 0x90], 0x1000, &registers).behind, 0x1001);
        registers.cs.attributes = 0;
        assert_eq!(decode(&[0x9c], 0x1000, &registers).kind, Kind::PushFlags(2));
    }

    #[test]
    fn what_the_emulator_does_not_do_is_known() {
        let emulated = |bytes: &[u8]| decode(bytes, 0, &long_mode()).is_emulated;
        for bytes in [
            &[0x48, 0x01, 0xd8][..],   // add %rbx, %rax
            &[0x9c],                   // pushf
            &[0xe8, 0, 0, 0, 0],       // call
            &[0xf3, 0x48, 0xab],       // rep stosq
            &[0xf0, 0x48, 0xff, 0x00], // lock inc
            &[0x48, 0x0f, 0x44, 0xc1], // cmov
            &[0x0f, 0x1f, 0x40, 0x00], // nop
            &[0xf3, 0x0f, 0x1e, 0xfa], // endbr64
            &[0x0f, 0x0b],             // ud2
            &[0x0f, 0xa2],             // cpuid
            &[0xf3, 0x90],             // pause
            &[0x0f, 0xa3, 0xc8],       // bt
        ] {
            assert!(emulated(bytes), "{bytes:x?}");
        }
        for bytes in [
            &[0xcc][..],                     // int3
            &[0xcd, 0x80],                   // int $0x80
            &[0x0f, 0x58, 0xc1],             // addps
            &[0xf3, 0x0f, 0xb8, 0xc1],       // popcnt
            &[0xf3, 0x0f, 0xbc, 0xc1],       // tzcnt
            &[0xf3, 0x0f, 0xbd, 0xc1],       // lzcnt
            &[0x9b],                         // fwait
            &[0xd9, 0xe8],                   // fld1
            &[0x48, 0x0f, 0xc7, 0x08],       // cmpxchg16b
            &[0x0f, 0x01, 0xf9],             // rdtscp
            &[0x0f, 0x01, 0xd0],             // xgetbv
            &[0xc4, 0xe2, 0xf0, 0xf3, 0xc8], // blsr
            &[0x0f, 0x02, 0xc1],             // lar
        ] {
            assert!(!emulated(bytes), "{bytes:x?}");
        }
    }

    #[test]
    fn where_it_leads_is_known() {
        let registers = Registers { rbx: 0x5000, rsp: 0x7000, rcx: 0x10, ..long_mode() };
        let next = |bytes: &[u8]| decode(bytes, 0x1000, &registers).next;
        assert_eq!(next(&[0x90]), Next::Behind);
        assert_eq!(next(&[0xf3, 0xaa]), Next::Behind, "REP STOSB");
        assert_eq!(next(&[0xeb, 0xfe]), Next::At(0x1000), "JMP to itself");
        assert_eq!(next(&[0x74, 0x02]), Next::At(0x1004), "JZ");
        assert_eq!(next(&[0xe2, 0xfe]), Next::At(0x1000), "LOOP");
        assert_eq!(next(&[0xe8, 0, 0, 0, 0]), Next::At(0x1005), "CALL");
        assert_eq!(next(&[0xff, 0xe3]), Next::At(0x5000), "JMP RBX");
        assert_eq!(next(&[0xff, 0x64, 0xcb, 0x08]), Next::StoredAt(0x5088), "JMP [RBX+RCX*8+8]");
        assert_eq!(next(&[0xff, 0x15, 0x10, 0, 0, 0]), Next::StoredAt(0x1016), "CALL [RIP+16]");
        assert_eq!(next(&[0xc3]), Next::StoredAt(0x7000), "RET");
        assert_eq!(next(&[0x48, 0xcf]), Next::StoredAt(0x7000), "IRETQ");
        assert_eq!(next(&[0x48, 0xcb]), Next::StoredAt(0x7000), "RETF");
        assert_eq!(next(&[0x0f, 0x0b]), Next::Behind, "UD2");
        assert_eq!(next(&[0x0f, 0x01, 0xc1]), Next::Behind, "VMCALL");
        assert_eq!(next(&[0xcb]), Next::Unknown, "RETF, four bytes");
        assert_eq!(next(&[0x0f, 0x05]), Next::Unknown, "SYSCALL");
        assert_eq!(next(&[0xcc]), Next::Unknown, "INT3");
        let registers = Registers { cs: Segment::default(), ..registers };
        assert_eq!(decode(&[0xeb, 0xfe], 0x1000, &registers).next, Next::Unknown, "in real mode");
    }

    #[test]
    fn only_register_operands_leave_memory_alone() {
        let uses = |bytes: &[u8]| decode(bytes, 0, &long_mode()).uses_memory;
        assert!(!uses(&[0x48, 0x01, 0xd8]), "ADD RAX, RBX");
        assert!(!uses(&[0x90]));
        assert!(uses(&[0x48, 0x8b, 0x03]), "MOV RAX, [RBX]");
        assert!(uses(&[0x50]), "PUSH RAX");
        assert!(uses(&[0xaa]), "STOSB");
    }
}
