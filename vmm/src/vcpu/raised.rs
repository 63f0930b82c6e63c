//! Instructions that do nothing but raise an exception or interrupt, for a KVM that cannot
//! emulate them (laws 34, 59a, 73).

use iced_x86::{Code, Decoder, DecoderOptions};

use super::Raised;

const UNDEFINED: u8 = 6;
const BREAKPOINT: u8 = 3;

/// What an instruction raises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Soft {
    /// INT1: #DB without a cause, behind the instruction.
    Debug,
    /// This, with RIP moved by so many bytes.
    Raised(Raised, u64),
}

/// What the instruction in `bytes` raises, if that is all it does.
pub(crate) fn raised_by(bytes: &[u8]) -> Option<Soft> {
    let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
    let len = instruction.len() as u64;
    Some(match instruction.code() {
        Code::Int3 => Soft::Raised(Raised::exception(BREAKPOINT), len),
        // INT 3 of two bytes goes through the same gate.
        Code::Int_imm8 => Soft::Raised(Raised::Interrupt { vector: instruction.immediate8() }, len),
        Code::Int1 => Soft::Debug,
        Code::Ud0
        | Code::Ud0_r16_rm16
        | Code::Ud0_r32_rm32
        | Code::Ud0_r64_rm64
        | Code::Ud1_r16_rm16
        | Code::Ud1_r32_rm32
        | Code::Ud1_r64_rm64
        | Code::Ud2 => Soft::Raised(Raised::exception(UNDEFINED), 0),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn l73_instructions_that_only_raise_something_are_known() {
        let interrupt = |vector, len| Some(Soft::Raised(Raised::Interrupt { vector }, len));
        assert_eq!(raised_by(&[0xcc]), Some(Soft::Raised(Raised::exception(3), 1)));
        assert_eq!(raised_by(&[0xcc, 0x90, 0x90]), Some(Soft::Raised(Raised::exception(3), 1)));
        assert_eq!(raised_by(&[0xcd, 0x03]), interrupt(3, 2));
        assert_eq!(raised_by(&[0xcd, 0x80, 0x90]), interrupt(0x80, 2));
        assert_eq!(raised_by(&[0xf1]), Some(Soft::Debug));
        assert_eq!(raised_by(&[0x0f, 0xff, 0xc0]), Some(Soft::Raised(Raised::exception(6), 0)));
        assert_eq!(raised_by(&[0x0f, 0xb9, 0xc0]), Some(Soft::Raised(Raised::exception(6), 0)));
        for other in [&[0x90][..], &[0xcd], &[], &[0x0f], &[0x0f, 0xc7, 0x08], &[0xf0, 0xcc], &[0xce]] {
            assert_eq!(raised_by(other), None, "{other:x?}");
        }
    }
}
