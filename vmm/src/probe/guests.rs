//! The probe's guests: a few instructions each, at [`CODE`]. Each ends by itself, with an OUT.

/// Where a guest's first instruction lies.
pub(super) const CODE: u64 = 0x1_0000;
/// Ordinary memory for a guest to read and write.
pub(super) const DATA: u64 = 0x1_1000;
/// A page behind a read-only memory slot.
pub(super) const READONLY: u64 = 0x10_0000;
/// A page that no memory slot backs: every access is emulated.
pub(super) const UNBACKED: u64 = 0x1f_f000;
/// What lies far from everything that a guest does.
pub(super) const FAR: u64 = 0x5_0000;
/// A guest that has come to its end writes here.
pub(super) const END_PORT: u16 = 0xf4;
/// A guest that got an exception or interrupt writes its vector here.
pub(super) const VECTOR_PORT: u16 = 0xf5;
/// What INT n calls in these guests.
pub(super) const INT_VECTOR: u8 = 0x41;

/// One instruction: as the Intel manuals write it, and its bytes.
type Line = (&'static str, &'static [u8]);

/// A guest, as the instructions that it consists of.
pub(super) struct Guest(&'static [Line]);

impl Guest {
    /// The address of instruction `n`.
    pub(super) fn at(&self, n: usize) -> u64 {
        CODE + self.0[..n].iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>()
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|(_, bytes)| bytes.iter().copied()).collect()
    }
}

const NOP: Line = ("nop", &[0x90]);
const OUT: Line = ("out 0xf4, al", &[0xe6, 0xf4]);

/// Counts in R8 how often it got past its first instruction.
pub(super) const COUNT: Guest = Guest(&[NOP, ("inc r8", &[0x49, 0xff, 0xc0]), NOP, NOP, OUT]);
pub(super) const STORE: Guest =
    Guest(&[("mov [0x11000], rax", &[0x48, 0x89, 0x04, 0x25, 0x00, 0x10, 0x01, 0x00]), NOP, OUT]);
pub(super) const LOAD: Guest =
    Guest(&[("mov rax, [0x11000]", &[0x48, 0x8b, 0x04, 0x25, 0x00, 0x10, 0x01, 0x00]), NOP, OUT]);
pub(super) const STORE_READONLY: Guest =
    Guest(&[("mov [0x100000], rax", &[0x48, 0x89, 0x04, 0x25, 0x00, 0x00, 0x10, 0x00]), NOP, OUT]);
pub(super) const INT3: Guest = Guest(&[NOP, ("int3", &[0xcc]), NOP, OUT]);
pub(super) const INT_N: Guest = Guest(&[NOP, ("int 0x41", &[0xcd, INT_VECTOR]), NOP, OUT]);
pub(super) const INT1: Guest = Guest(&[NOP, ("int1", &[0xf1]), NOP, OUT]);
pub(super) const HALT: Guest = Guest(&[("hlt", &[0xf4]), NOP, OUT]);
pub(super) const INVALID: Guest = Guest(&[NOP, ("ud2", &[0x0f, 0x0b]), OUT]);
pub(super) const SHADOW: Guest = Guest(&[("sti", &[0xfb]), NOP, NOP, OUT]);
pub(super) const PUSH_FLAGS: Guest = Guest(&[("pushfq", &[0x9c]), NOP, OUT]);
pub(super) const READ_DR6: Guest = Guest(&[("mov rax, dr6", &[0x0f, 0x21, 0xf0]), NOP, OUT]);

/// An emulated read between plain instructions.
pub(super) const READ_UNBACKED: Guest =
    Guest(&[NOP, ("mov eax, [0x1ff000]", &[0x8b, 0x04, 0x25, 0x00, 0xf0, 0x1f, 0x00]), NOP, NOP, NOP, OUT]);

/// Sets a breakpoint of its own at [`OWN_BREAKPOINT`].
pub(super) const OWN_EXEC: Guest = Guest(&[
    ("mov rax, 0x10015", &[0x48, 0xc7, 0xc0, 0x15, 0x00, 0x01, 0x00]),
    ("mov dr0, rax", &[0x0f, 0x23, 0xc0]),
    ("mov rax, 0x402", &[0x48, 0xc7, 0xc0, 0x02, 0x04, 0x00, 0x00]),
    ("mov dr7, rax", &[0x0f, 0x23, 0xf8]),
    NOP,
    NOP,
    OUT,
]);
/// The instruction of [`OWN_EXEC`] that it sets its breakpoint on.
pub(super) const OWN_BREAKPOINT: usize = 5;

/// Watches [`DATA`] (8 bytes, writes) and writes there.
pub(super) const OWN_WATCH: Guest = Guest(&[
    ("mov rax, 0x11000", &[0x48, 0xc7, 0xc0, 0x00, 0x10, 0x01, 0x00]),
    ("mov dr0, rax", &[0x0f, 0x23, 0xc0]),
    ("mov rax, 0x90402", &[0x48, 0xc7, 0xc0, 0x02, 0x04, 0x09, 0x00]),
    ("mov dr7, rax", &[0x0f, 0x23, 0xf8]),
    ("mov [0x11000], rax", &[0x48, 0x89, 0x04, 0x25, 0x00, 0x10, 0x01, 0x00]),
    NOP,
    OUT,
]);

/// Steps itself by the trap flag, from its third instruction on.
pub(super) const OWN_STEP: Guest =
    Guest(&[("push 0x102", &[0x68, 0x02, 0x01, 0x00, 0x00]), ("popfq", &[0x9d]), NOP, NOP, OUT]);

/// Goes round RCX times.
pub(super) const LOOP: Guest = Guest(&[("dec rcx", &[0x48, 0xff, 0xc9]), ("jne 0x10000", &[0x75, 0xfb]), OUT]);

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, OpKind};

    use super::*;

    const ALL: [Guest; 17] = [
        COUNT,
        STORE,
        LOAD,
        STORE_READONLY,
        INT3,
        INT_N,
        INT1,
        HALT,
        INVALID,
        SHADOW,
        PUSH_FLAGS,
        READ_DR6,
        READ_UNBACKED,
        OWN_EXEC,
        OWN_WATCH,
        OWN_STEP,
        LOOP,
    ];

    /// The number that ends the text of an instruction.
    fn number(text: &str) -> Option<u64> {
        let digits = text.split("0x").nth(1)?;
        let end = digits.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(digits.len());
        u64::from_str_radix(&digits[..end], 16).ok()
    }

    #[test]
    fn the_bytes_are_what_the_text_says() {
        for guest in ALL {
            for (n, (text, bytes)) in guest.0.iter().enumerate() {
                let instruction = Decoder::with_ip(64, bytes, guest.at(n), DecoderOptions::NONE).decode();
                assert_eq!(instruction.len(), bytes.len(), "{text}");
                let mnemonic = format!("{:?}", instruction.mnemonic()).to_lowercase();
                assert_eq!(text.split(' ').next(), Some(mnemonic.as_str()), "{text}");
                let operands = instruction.op_kinds().zip(0..).find_map(|(kind, op)| match kind {
                    OpKind::Memory => Some(instruction.memory_displacement64()),
                    OpKind::NearBranch64 => Some(instruction.near_branch64()),
                    OpKind::Register => None,
                    _ => Some(instruction.immediate(op)),
                });
                if !text.starts_with("int") || text.contains(' ') {
                    assert_eq!(operands, number(text), "{text}");
                }
            }
        }
    }

    #[test]
    fn every_guest_ends_by_an_out() {
        for guest in ALL {
            assert_eq!(guest.0.last(), Some(&OUT));
        }
    }

    #[test]
    fn the_guests_own_breakpoint_is_on_its_instruction() {
        assert_eq!(number(OWN_EXEC.0[0].0), Some(OWN_EXEC.at(OWN_BREAKPOINT)));
    }
}
