//! MOV to and from a debug register, carried out on the guest's own registers.
//!
//! On VT-x the overlay sets DR7.GD, so that each such instruction exits before it runs. KVM has
//! the processor's registers for us and the guest's aside (law 31); what the guest moves is the latter.

use iced_x86::{Code, Decoder, DecoderOptions, Register};

use super::Registers;
use crate::debug::{Dr6, GuestRegisters};

/// RFLAGS.RF.
const RF: u64 = 1 << 16;
/// CR4.DE: DR4 and DR5 do not exist; otherwise they are DR6 and DR7.
const CR4_DE: u64 = 1 << 3;
/// EFER.LMA.
const LMA: u64 = 1 << 10;
/// Of a code segment's attributes: 64-bit code.
const CS_L: u32 = 1 << 13;
/// 32-bit code.
const CS_D: u32 = 1 << 14;
/// What of DR6 can be written on a processor that has neither bus-lock traps nor transactions:
/// B0-B3, BD, BS, BT. Everything else reads as after reset.
const DR6_WRITABLE: u64 = 0b1111 | Dr6::BD | Dr6::BS | Dr6::BT;
/// What of DR7 can be written: bits 9:0, RTM, GD and the conditions. Bit 10 reads as one.
const DR7_WRITABLE: u64 = 0xffff_2bff;
const DR7_FIXED: u64 = 1 << 10;

/// What became of the instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// It is done: the registers are those behind it.
    Done,
    /// It raises the guest's own #DB with BD, since the guest has set GD (law 35).
    Detected,
    /// It raises #UD.
    Undefined,
    /// It raises #GP(0).
    Protected,
    /// It is something else.
    Other,
}

/// Carries out the instruction in `bytes` on the guest's `own` debug registers and the others.
/// They are changed only if it is [done](Access::Done).
///
/// The order of the checks is the processor's: existence, privilege, general detect, value
/// (SDM vol. 2, MOV to/from debug registers; vol. 3, 18.2.2).
pub(crate) fn carry_out(bytes: &[u8], registers: &mut Registers, own: &mut GuestRegisters) -> Access {
    let instruction = Decoder::new(bitness(registers), bytes, DecoderOptions::NONE).decode();
    let (number, general, writes) = match instruction.code() {
        Code::Mov_r64_dr | Code::Mov_r32_dr => (instruction.op1_register(), instruction.op0_register(), false),
        Code::Mov_dr_r64 | Code::Mov_dr_r32 => (instruction.op0_register(), instruction.op1_register(), true),
        _ => return Access::Other,
    };
    let number = match number {
        Register::DR4 | Register::DR5 if registers.cr4 & CR4_DE != 0 => return Access::Undefined,
        Register::DR0 => 0,
        Register::DR1 => 1,
        Register::DR2 => 2,
        Register::DR3 => 3,
        Register::DR4 | Register::DR6 => 6,
        Register::DR5 | Register::DR7 => 7,
        _ => return Access::Undefined,
    };
    if registers.cpl() != 0 {
        return Access::Protected;
    }
    if own.general_detect() {
        return Access::Detected;
    }
    let wide = instruction.code() == Code::Mov_r64_dr || instruction.code() == Code::Mov_dr_r64;
    let mask = if wide { u64::MAX } else { u64::from(u32::MAX) };
    let mut after = *registers;
    let Some(general) = general_register(&mut after, general) else { return Access::Other };
    if writes {
        let value = *general & mask;
        if number >= 6 && value > u64::from(u32::MAX) {
            return Access::Protected;
        }
        match number {
            6 => own.dr6 = value & DR6_WRITABLE | Dr6::RESET & !DR6_WRITABLE,
            7 => own.dr7 = value & DR7_WRITABLE | DR7_FIXED,
            n => own.db[n] = value,
        }
    } else {
        *general = mask
            & match number {
                6 => own.dr6,
                7 => own.dr7,
                n => own.db[n],
            };
    }
    after.rip = after.rip.wrapping_add(instruction.len() as u64);
    if bitness(registers) != 64 {
        after.rip &= u64::from(u32::MAX);
    }
    after.rflags &= !RF;
    *registers = after;
    Access::Done
}

fn bitness(registers: &Registers) -> u32 {
    match registers.cs.attributes {
        cs if registers.efer & LMA != 0 && cs & CS_L != 0 => 64,
        cs if cs & CS_D != 0 => 32,
        _ => 16,
    }
}

fn general_register(registers: &mut Registers, name: Register) -> Option<&mut u64> {
    Some(match name.full_register() {
        Register::RAX => &mut registers.rax,
        Register::RCX => &mut registers.rcx,
        Register::RDX => &mut registers.rdx,
        Register::RBX => &mut registers.rbx,
        Register::RSP => &mut registers.rsp,
        Register::RBP => &mut registers.rbp,
        Register::RSI => &mut registers.rsi,
        Register::RDI => &mut registers.rdi,
        Register::R8 => &mut registers.r8,
        Register::R9 => &mut registers.r9,
        Register::R10 => &mut registers.r10,
        Register::R11 => &mut registers.r11,
        Register::R12 => &mut registers.r12,
        Register::R13 => &mut registers.r13,
        Register::R14 => &mut registers.r14,
        Register::R15 => &mut registers.r15,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALUES: [u64; 6] = [0, 0x400, 0xffff_0ff1, 0xffff_ffff, 1 << 32, u64::MAX];

    /// A vCPU in 64-bit mode, each general register with a value of its own.
    fn registers(cpl: u8, de: bool) -> Registers {
        let mut registers = Registers { efer: LMA, rip: 0x1000, rflags: 0x2 | RF, ..Registers::default() };
        (registers.cs.attributes, registers.ss.attributes) = (CS_L, u32::from(cpl) << 5);
        registers.cr4 = if de { CR4_DE } else { 0 };
        registers
    }

    fn general(registers: &Registers) -> [u64; 16] {
        let Registers { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15, .. } = *registers;
        [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15]
    }

    /// The general register with this number of the encoding.
    fn set(registers: &mut Registers, n: usize, value: u64) {
        let Registers { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15, .. } = registers;
        *[rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15][n] = value;
    }

    /// All sixteen general registers, all sixteen numbers of a debug register, both directions.
    #[test]
    fn l30_every_access_is_carried_out_as_the_processor_does() {
        let own = GuestRegisters { db: [0x11, 0x22, 0x33, 0x44], dr6: 0xffff_4ff1, dr7: 0x455 };
        for (number, gpr, writes, value) in (0u8..16)
            .flat_map(|number| (0u8..16).map(move |gpr| (number, gpr)))
            .flat_map(|(number, gpr)| [false, true].map(|writes| (number, gpr, writes)))
            .flat_map(|(number, gpr, writes)| VALUES.map(|value| (number, gpr, writes, value)))
        {
            for (cpl, de, gd) in [(0, false, false), (0, true, false), (0, false, true), (3, false, true)] {
                let opcode = if writes { 0x23 } else { 0x21 };
                let code = [0x40 | number >> 3 << 2 | gpr >> 3, 0x0f, opcode, 0xc0 | (number & 7) << 3 | gpr & 7];
                let mut before = registers(cpl, de);
                set(&mut before, gpr.into(), value);
                let own = GuestRegisters { dr7: own.dr7 | if gd { 1 << 13 } else { 0 }, ..own };
                let (mut after, mut own_after) = (before, own);
                let access = carry_out(&code, &mut after, &mut own_after);
                let exists = !(de && (number == 4 || number == 5));
                let upper_half = writes && number >= 4 && value >> 32 != 0;
                let expected = match (exists, cpl, gd) {
                    // No such encoding: the processor raises #UD before it could exit.
                    _ if number >= 8 => Access::Other,
                    (false, ..) => Access::Undefined,
                    (_, 3, _) => Access::Protected,
                    (.., true) => Access::Detected,
                    _ if upper_half => Access::Protected,
                    _ => Access::Done,
                };
                assert_eq!(access, expected, "{code:x?} {value:#x} cpl {cpl} de {de} gd {gd}");
                if access != Access::Done {
                    assert_eq!((after, own_after), (before, own), "{code:x?} changed something");
                    continue;
                }
                assert_eq!((after.rip, after.rflags), (0x1004, 0x2));
                let number = if number == 4 || number == 5 { number + 2 } else { number };
                let mut wanted = own;
                let mut moved = general(&before);
                match (writes, number) {
                    (true, 6) => wanted.dr6 = 0xffff_0ff0 | value & 0xe00f,
                    (true, 7) => wanted.dr7 = 0x400 | value & 0xffff_2bff,
                    (true, n) => wanted.db[usize::from(n)] = value,
                    (false, 6) => moved[usize::from(gpr)] = own.dr6,
                    (false, 7) => moved[usize::from(gpr)] = own.dr7,
                    (false, n) => moved[usize::from(gpr)] = own.db[usize::from(n)],
                }
                assert_eq!((own_after, general(&after)), (wanted, moved), "{code:x?} {value:#x}");
            }
        }
    }

    #[test]
    fn other_instructions_and_other_modes() {
        let mut own = GuestRegisters { db: [0x1_2345_6789, 0, 0, 0], dr6: 0, dr7: 0x400 };
        for other in [&[0x90][..], &[0x0f, 0x21], &[0x0f, 0x20, 0xc0], &[], &[0xf0, 0x0f, 0x21, 0xc0]] {
            assert_eq!(carry_out(other, &mut registers(0, false), &mut own), Access::Other, "{other:x?}");
        }
        // 32-bit code: half of the register.
        let mut legacy =
            Registers { cs: crate::vcpu::Segment { attributes: CS_D, ..Default::default() }, ..Registers::default() };
        legacy.rip = 0xffff_fffd;
        assert_eq!(carry_out(&[0x0f, 0x21, 0xc0], &mut legacy, &mut own), Access::Done);
        assert_eq!((legacy.rax, legacy.rip), (0x2345_6789, 0));
    }
}
