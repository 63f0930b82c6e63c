//! One instruction carried out without the processor, to get off a breakpoint (law 41).
//!
//! A single step costs an entry into the guest, and arming before and after it. Most functions
//! begin with instructions that touch registers only: what those do is worked out here, from the
//! registers before. Whatever this does not know, in whatever state, is `None`, and is stepped.
//!
//! Each instruction that is known here is held against the processor by the law tests.

use iced_x86::{Code, ConditionCode, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

const CF: u64 = 1;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const TF: u64 = 1 << 8;
const DF: u64 = 1 << 10;
const OF: u64 = 1 << 11;
const RF: u64 = 1 << 16;

/// Flags that arithmetic computes.
const STATUS: u64 = CF | PF | AF | ZF | SF | OF;

const RCX: usize = 1;

/// The general registers, RIP and RFLAGS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct General {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8-R15: the order in which instructions number them.
    pub gpr: [u64; 16],
    /// Offset of the next instruction in CS.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
}

/// The registers after the instruction that `code` begins with, in 64-bit mode. `wide` says that
/// linear addresses have 57 bits (CR4.LA57).
///
/// `None` if it is not known here exactly: it touches memory or state other than these registers,
/// it faults, or a trap of the guest's own TF is owed after it.
pub fn carry_out(code: &[u8], before: &General, wide: bool) -> Option<General> {
    if before.rflags & TF != 0 {
        return None;
    }
    let instruction = Decoder::with_ip(64, code, before.rip, DecoderOptions::NONE).decode();
    // Without a meaning on these instructions, and there are processors that give them one.
    if instruction.is_invalid()
        || instruction.has_lock_prefix()
        || instruction.has_rep_prefix()
        || instruction.has_repne_prefix()
    {
        return None;
    }
    let mut machine = Machine { state: *before };
    // RF lasts until the next instruction is done.
    machine.state.rflags &= !RF;
    machine.state.rip = instruction.next_ip();
    machine.run(&instruction, code)?;
    is_canonical(machine.state.rip, wide).then_some(machine.state)
}

/// Whether the address can be fetched from at all (SDM vol. 1, 3.3.7.1).
fn is_canonical(addr: u64, wide: bool) -> bool {
    let sign = (addr as i64) >> if wide { 56 } else { 47 };
    sign == 0 || sign == -1
}

/// A result, and the status flags that go with it.
type Computed = (u64, u64);

struct Machine {
    state: General,
}

impl Machine {
    fn run(&mut self, it: &Instruction, code: &[u8]) -> Option<()> {
        match it.mnemonic() {
            // A memory operand of these is never accessed.
            Mnemonic::Nop | Mnemonic::Endbr32 | Mnemonic::Endbr64 => {}
            Mnemonic::Reservednop if is_hint(it.code()) => {}
            Mnemonic::Mov => {
                let value = self.value(it, 1)?;
                self.put(it, 0, value)?;
            }
            Mnemonic::Movzx => {
                let value = self.register(it, 1)?;
                self.put(it, 0, value)?;
            }
            Mnemonic::Movsx | Mnemonic::Movsxd => {
                let value = sign_extend(self.register(it, 1)?, self.bits(it, 1)?);
                self.put(it, 0, value)?;
            }
            Mnemonic::Lea => {
                // No segment takes part.
                let get = |register: Register, _: usize, _: usize| match register {
                    _ if register.is_segment_register() => Some(0),
                    _ => self.get(register),
                };
                let addr = it.virtual_address(1, 0, get)?;
                self.put(it, 0, addr)?;
            }
            Mnemonic::Xchg => {
                let (a, b) = (self.register(it, 0)?, self.register(it, 1)?);
                self.put(it, 0, b)?;
                self.put(it, 1, a)?;
            }
            Mnemonic::Bswap => {
                let bits = self.bits(it, 0)?;
                // With 16 bits the result is undefined.
                if bits < 32 {
                    return None;
                }
                let value = self.register(it, 0)?;
                self.put(it, 0, value.swap_bytes() >> (64 - bits))?;
            }
            Mnemonic::Not => {
                let value = self.register(it, 0)?;
                self.put(it, 0, !value)?;
            }
            Mnemonic::Cbw => self.extend(8, 16),
            Mnemonic::Cwde => self.extend(16, 32),
            Mnemonic::Cdqe => self.extend(32, 64),
            Mnemonic::Clc => self.state.rflags &= !CF,
            Mnemonic::Stc => self.state.rflags |= CF,
            Mnemonic::Cmc => self.state.rflags ^= CF,
            Mnemonic::Cld => self.state.rflags &= !DF,
            Mnemonic::Std => self.state.rflags |= DF,
            Mnemonic::Jmp | Mnemonic::Jrcxz | Mnemonic::Jecxz => self.jump(it, code)?,
            _ if it.is_jcc_short_or_near() => self.jump(it, code)?,
            _ if it.condition_code() != ConditionCode::None => self.conditional(it)?,
            _ => self.arithmetic(it)?,
        }
        Some(())
    }

    /// Near jumps within the code segment.
    fn jump(&mut self, it: &Instruction, code: &[u8]) -> Option<()> {
        // Intel's processors ignore an operand-size prefix here, AMD's do not.
        if code.iter().take(it.len()).take_while(|byte| is_prefix(**byte)).any(|byte| *byte == 0x66) {
            return None;
        }
        let target = match it.op0_kind() {
            OpKind::NearBranch64 => it.near_branch64(),
            OpKind::Register if it.op0_register().is_gpr64() => self.register(it, 0)?,
            _ => return None,
        };
        let taken = match it.mnemonic() {
            Mnemonic::Jmp => true,
            Mnemonic::Jrcxz => self.state.gpr[RCX] == 0,
            Mnemonic::Jecxz => self.state.gpr[RCX] & mask(32) == 0,
            _ => self.holds(it.condition_code())?,
        };
        if taken {
            self.state.rip = target;
        }
        Some(())
    }

    /// SETcc and CMOVcc.
    fn conditional(&mut self, it: &Instruction) -> Option<()> {
        let holds = self.holds(it.condition_code())?;
        match it.op_count() {
            1 => self.put(it, 0, holds.into()),
            // A move that is not made clears the upper half all the same.
            2 => {
                let (old, new) = (self.register(it, 0)?, self.register(it, 1)?);
                self.put(it, 0, if holds { new } else { old })
            }
            _ => None,
        }
    }

    fn arithmetic(&mut self, it: &Instruction) -> Option<()> {
        let bits = self.bits(it, 0)?;
        let a = self.register(it, 0)?;
        let carry = self.state.rflags & CF;
        let kept = |(result, flags): Computed| (result, flags & !CF | carry);
        let (result, flags) = match it.mnemonic() {
            Mnemonic::Inc => kept(add(a, 1, 0, bits)),
            Mnemonic::Dec => kept(subtract(a, 1, 0, bits)),
            Mnemonic::Neg => subtract(0, a, 0, bits),
            Mnemonic::Add => add(a, self.value(it, 1)?, 0, bits),
            Mnemonic::Adc => add(a, self.value(it, 1)?, carry, bits),
            Mnemonic::Sub | Mnemonic::Cmp => subtract(a, self.value(it, 1)?, 0, bits),
            Mnemonic::Sbb => subtract(a, self.value(it, 1)?, carry, bits),
            Mnemonic::And | Mnemonic::Test => logic(a & self.value(it, 1)?, bits),
            Mnemonic::Or => logic(a | self.value(it, 1)?, bits),
            Mnemonic::Xor => logic(a ^ self.value(it, 1)?, bits),
            _ => return None,
        };
        if !matches!(it.mnemonic(), Mnemonic::Cmp | Mnemonic::Test) {
            self.put(it, 0, result)?;
        }
        self.state.rflags = self.state.rflags & !STATUS | flags;
        Some(())
    }

    /// Sign-extends the lower part of RAX into a longer one.
    fn extend(&mut self, from: u32, to: u32) {
        let value = sign_extend(self.state.gpr[0] & mask(from), from);
        self.state.gpr[0] = merge(self.state.gpr[0], value, to);
    }

    fn holds(&self, condition: ConditionCode) -> Option<bool> {
        let is = |flag: u64| self.state.rflags & flag != 0;
        let less = is(SF) != is(OF);
        Some(match condition {
            ConditionCode::o => is(OF),
            ConditionCode::no => !is(OF),
            ConditionCode::b => is(CF),
            ConditionCode::ae => !is(CF),
            ConditionCode::e => is(ZF),
            ConditionCode::ne => !is(ZF),
            ConditionCode::be => is(CF) || is(ZF),
            ConditionCode::a => !is(CF) && !is(ZF),
            ConditionCode::s => is(SF),
            ConditionCode::ns => !is(SF),
            ConditionCode::p => is(PF),
            ConditionCode::np => !is(PF),
            ConditionCode::l => less,
            ConditionCode::ge => !less,
            ConditionCode::le => is(ZF) || less,
            ConditionCode::g => !is(ZF) && !less,
            ConditionCode::None => return None,
        })
    }

    /// The operand's general register. Any other operand is not known here.
    fn operand(&self, it: &Instruction, n: u32) -> Option<Register> {
        let is_register = n < it.op_count() && it.op_kind(n) == OpKind::Register;
        is_register.then(|| it.op_register(n)).filter(|register| register.is_gpr())
    }

    fn bits(&self, it: &Instruction, n: u32) -> Option<u32> {
        Some(self.operand(it, n)?.size() as u32 * 8)
    }

    /// A register operand, zero-extended.
    fn register(&self, it: &Instruction, n: u32) -> Option<u64> {
        self.get(self.operand(it, n)?)
    }

    /// A register operand, zero-extended, or an immediate one, sign-extended as its form says.
    fn value(&self, it: &Instruction, n: u32) -> Option<u64> {
        it.try_immediate(n).ok().or_else(|| self.register(it, n))
    }

    fn get(&self, register: Register) -> Option<u64> {
        let whole = *self.state.gpr.get(register.full_register().number())?;
        register.is_gpr().then(|| whole >> shift(register) & mask(register.size() as u32 * 8))
    }

    fn put(&mut self, it: &Instruction, n: u32, value: u64) -> Option<()> {
        let register = self.operand(it, n)?;
        let whole = self.state.gpr.get_mut(register.full_register().number())?;
        *whole = match shift(register) {
            0 => merge(*whole, value, register.size() as u32 * 8),
            shift => *whole & !(mask(8) << shift) | (value & mask(8)) << shift,
        };
        Some(())
    }
}

/// Hints that no extension has claimed (SDM vol. 2, table A-3).
fn is_hint(code: Code) -> bool {
    matches!(
        code,
        Code::Reservednop_rm16_r16_0F19
            | Code::Reservednop_rm32_r32_0F19
            | Code::Reservednop_rm64_r64_0F19
            | Code::Reservednop_rm16_r16_0F1F
            | Code::Reservednop_rm32_r32_0F1F
            | Code::Reservednop_rm64_r64_0F1F
    )
}

/// Legacy and REX prefixes.
fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
}

/// AH, CH, DH and BH are the second byte of their register.
fn shift(register: Register) -> u32 {
    match register {
        Register::AH | Register::CH | Register::DH | Register::BH => 8,
        _ => 0,
    }
}

fn mask(bits: u32) -> u64 {
    u64::MAX >> (64 - bits)
}

/// Writes the lower `bits` of a register. A 32-bit write clears the upper half, a shorter one
/// leaves the rest alone (SDM vol. 1, 3.4.1.1).
fn merge(whole: u64, value: u64, bits: u32) -> u64 {
    let kept = if bits < 32 { !mask(bits) } else { 0 };
    whole & kept | value & mask(bits)
}

fn sign_extend(value: u64, bits: u32) -> u64 {
    ((value << (64 - bits)) as i64 >> (64 - bits)) as u64
}

fn add(a: u64, b: u64, carry: u64, bits: u32) -> Computed {
    let b = b & mask(bits);
    let sum = u128::from(a) + u128::from(b) + u128::from(carry);
    let result = sum as u64 & mask(bits);
    let overflow = (a ^ result) & (b ^ result);
    (result, flags(result, bits) | carries(a ^ b ^ result, sum >> bits != 0, overflow, bits))
}

fn subtract(a: u64, b: u64, borrow: u64, bits: u32) -> Computed {
    let b = b & mask(bits);
    let result = a.wrapping_sub(b).wrapping_sub(borrow) & mask(bits);
    let borrows = u128::from(a) < u128::from(b) + u128::from(borrow);
    let overflow = (a ^ b) & (a ^ result);
    (result, flags(result, bits) | carries(a ^ b ^ result, borrows, overflow, bits))
}

/// AND, OR, XOR: CF and OF are cleared. AF is undefined by the manual, and cleared by every
/// processor and emulator that the law tests have met.
fn logic(result: u64, bits: u32) -> Computed {
    (result & mask(bits), flags(result & mask(bits), bits))
}

/// PF, ZF and SF of a result.
fn flags(result: u64, bits: u32) -> u64 {
    let mut flags = 0;
    if (result as u8).count_ones().is_multiple_of(2) {
        flags |= PF;
    }
    if result == 0 {
        flags |= ZF;
    }
    if result >> (bits - 1) & 1 != 0 {
        flags |= SF;
    }
    flags
}

/// AF from the carries into each bit, CF, and OF from the sign of `overflow`.
fn carries(into: u64, carry: bool, overflow: u64, bits: u32) -> u64 {
    let mut flags = into & AF;
    if carry {
        flags |= CF;
    }
    if overflow >> (bits - 1) & 1 != 0 {
        flags |= OF;
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const AT: u64 = 0xffff_ffff_8100_0000;

    fn general(rflags: u64) -> General {
        General { gpr: std::array::from_fn(|n| 0x1111_1111_1111_1111 * n as u64), rip: AT, rflags }
    }

    fn after(code: &[u8]) -> Option<General> {
        carry_out(code, &general(2), false)
    }

    #[test]
    fn l41_a_nop_moves_rip_alone() {
        let forms: [&[u8]; 10] = [
            &[0x90],
            &[0x66, 0x90],
            &[0x66, 0x66, 0x90],
            &[0x48, 0x90],
            &[0x0f, 0x1f, 0x00],
            &[0x0f, 0x1f, 0x44, 0x00, 0x00],
            &[0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
            &[0x0f, 0x19, 0xc0],
            &[0xf3, 0x0f, 0x1e, 0xfa],
            &[0xf3, 0x0f, 0x1e, 0xfb],
        ];
        for form in forms {
            let expected = General { rip: AT + form.len() as u64, ..general(2) };
            assert_eq!(after(form), Some(expected), "{form:02x?}");
        }
    }

    #[test]
    fn l41_87_c0_is_no_nop() {
        let before = General { gpr: [u64::MAX; 16], ..general(2) };
        assert_eq!(carry_out(&[0x87, 0xc0], &before, false).unwrap().gpr[0], 0xffff_ffff);
    }

    #[test]
    fn l41_rf_ends_and_tf_is_left_to_the_step() {
        assert_eq!(carry_out(&[0x90], &general(2 | RF), false).unwrap().rflags, 2);
        assert_eq!(carry_out(&[0x90], &general(2 | TF), false), None);
    }

    #[test]
    fn what_is_not_known_is_left_to_the_step() {
        let forms: [&[u8]; 30] = [
            &[],
            &[0x0f],
            &[0xf3, 0x90],                   // pause
            &[0xf2, 0x90],                   // with a prefix that means nothing here
            &[0xf0, 0xff, 0xc0],             // lock inc eax: #UD
            &[0x55],                         // push rbp
            &[0x5d],                         // pop rbp
            &[0xc3],                         // ret
            &[0xe8, 0, 0, 0, 0],             // call
            &[0x89, 0x00],                   // mov [rax], eax
            &[0x8b, 0x00],                   // mov eax, [rax]
            &[0x03, 0x00],                   // add eax, [rax]
            &[0x87, 0x00],                   // xchg [rax], eax
            &[0xff, 0x20],                   // jmp [rax]
            &[0x66, 0xff, 0xe0],             // jmp rax, as Intel has it
            &[0x66, 0xeb, 0x00],             // the same
            &[0x66, 0x48, 0x74, 0x00],       // the same, behind REX
            &[0x8e, 0xd0],                   // mov ss, eax
            &[0x8c, 0xd0],                   // mov eax, ss
            &[0x0f, 0x22, 0xd8],             // mov cr3, rax
            &[0x0f, 0x23, 0xf8],             // mov dr7, rax
            &[0xfb],                         // sti
            &[0xfa],                         // cli
            &[0xf4],                         // hlt
            &[0xcc],                         // int3
            &[0x0f, 0x05],                   // syscall
            &[0x0f, 0x0b],                   // ud2
            &[0x66, 0x0f, 0xc8],             // bswap ax
            &[0xd3, 0xe0],                   // shl eax, cl
            &[0xf3, 0x48, 0x0f, 0x1e, 0xc8], // rdssp
        ];
        for form in forms {
            assert_eq!(after(form), None, "{form:02x?}");
        }
    }

    #[test]
    fn jumps_that_fault_are_left_to_the_step() {
        let jump = |rax: u64, wide: bool| {
            let before = General { gpr: [rax; 16], ..general(2) };
            carry_out(&[0xff, 0xe0], &before, wide).map(|after| after.rip)
        };
        assert_eq!(jump(0x7fff_ffff_ffff, false), Some(0x7fff_ffff_ffff));
        assert_eq!(jump(0x8000_0000_0000, false), None);
        assert_eq!(jump(0x8000_0000_0000, true), Some(0x8000_0000_0000));
        assert_eq!(jump(0x0100_0000_0000_0000, true), None);
        let last = General { rip: 0x7fff_ffff_ffff, ..general(2) };
        assert_eq!(carry_out(&[0x90], &last, false), None, "nothing comes behind it");
    }

    #[test]
    fn a_jump_is_taken_as_the_flags_say() {
        let to = |code: &[u8], rflags| carry_out(code, &general(rflags), false).unwrap().rip - AT;
        assert_eq!([to(&[0x74, 0x10], 2), to(&[0x74, 0x10], 2 | ZF)], [2, 0x12]);
        assert_eq!([to(&[0x7c, 0x10], 2 | SF | OF), to(&[0x7c, 0x10], 2 | SF)], [2, 0x12]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_digested(
            code in prop::collection::vec(any::<u8>(), 0..16), gpr: [u64; 16], rip: u64, rflags: u64, wide: bool,
        ) {
            let before = General { gpr, rip, rflags };
            if let Some(after) = carry_out(&code, &before, wide) {
                // Nothing but the status flags, DF and RF can change.
                prop_assert_eq!((after.rflags ^ before.rflags) & !(STATUS | DF | RF), 0);
                prop_assert_eq!(after.rflags & RF, 0);
            }
        }
    }
}
