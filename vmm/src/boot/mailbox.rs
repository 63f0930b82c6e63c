//! AP start by the ACPI wakeup mailbox (ACPI 6.5, 5.2.12.19): APs wait in long mode, in a loop of ours, until the guest
//! writes an APIC id, an address and a command into a page that the MADT names. The page is a device,
//! [`crate::devices::mailbox`].
//!
//! Debuggers want this for guests that are to be trapped from their first instruction on: no vCPU is ever in real mode.

use super::error::BootError;
use super::{CpuState, layout, tables};
use crate::devices::mailbox::PARK_PORT;
use crate::memory::GuestRam;

/// The loop. RDI = own APIC id, RSI = mailbox. The read of the port comes back when the AP is called, or now and then.
///
/// The APIC id is looked at before the command, and both before the address: the guest fills in id and address, then
/// sets the command, and does the next only after the command was cleared. So who sees its own id and then the command
/// sees the address that goes with them; who looked at the command first could take an older one's.
///
/// ```text
///     again: lea  edx, [rdi + 0x5c0]
///            in   al, dx
///            cmp  [rsi+4], edi
///            jne  again
///            cmp  word [rsi], 1      ; wake up
///            jne  again
///            mov  rax, [rsi+8]
///            mov  word [rsi], 0      ; done: the guest may use the mailbox again
///            jmp  rax
/// ```
#[rustfmt::skip]
const LOOP: [u8; 29] = [
    0x8d, 0x97, PARK_PORT.to_le_bytes()[0], PARK_PORT.to_le_bytes()[1], 0x00, 0x00,
    0xec,
    0x39, 0x7e, 0x04,
    0x75, 0xf4,
    0x66, 0x83, 0x3e, 0x01,
    0x75, 0xee,
    0x48, 0x8b, 0x46, 0x08,
    0x66, 0xc7, 0x06, 0x00, 0x00,
    0xff, 0xe0,
];

/// Writes the loop. The page tables and the GDT that the APs use are those of [`tables`].
pub(super) fn write(ram: &GuestRam) -> Result<(), BootError> {
    tables::put(ram.mem(), "the APs' loop", layout::AP_LOOP, &LOOP)
}

/// The state of the AP with this APIC id before its first instruction.
pub(super) fn ap_state(apic_id: u32) -> CpuState {
    CpuState::Long64 {
        cr3: layout::PAGE_TABLES,
        rip: layout::AP_LOOP,
        // The loop needs no stack, and the guest brings its own.
        rsp: 0,
        rdi: apic_id.into(),
        rsi: layout::AP_MAILBOX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Register};

    #[test]
    fn the_loop_is_the_one_in_its_description() {
        let code: Vec<Instruction> =
            Decoder::with_ip(64, &LOOP, layout::AP_LOOP, DecoderOptions::NONE).iter().collect();
        let codes: Vec<Code> = code.iter().map(Instruction::code).collect();
        let expected = [
            Code::Lea_r32_m,
            Code::In_AL_DX,
            Code::Cmp_rm32_r32,
            Code::Jne_rel8_64,
            Code::Cmp_rm16_imm8,
            Code::Jne_rel8_64,
            Code::Mov_r64_rm64,
            Code::Mov_rm16_imm16,
            Code::Jmp_rm64,
        ];
        assert_eq!(codes, expected);
        for jump in [3, 5] {
            assert_eq!(code[jump].near_branch_target(), layout::AP_LOOP);
        }
        let operand = |n: usize| (code[n].memory_base(), code[n].memory_displacement64());
        assert_eq!(operand(0), (Register::RDI, PARK_PORT.into()));
        let mailbox = [2, 4, 6, 7].map(operand);
        assert_eq!(mailbox, [4, 0, 8, 0].map(|at| (Register::RSI, at)));
        assert_eq!((code[2].op1_register(), code[6].op0_register()), (Register::EDI, Register::RAX));
        assert_eq!((code[4].immediate(1), code[7].immediate(1)), (1, 0));
        assert_eq!(code[8].op0_register(), Register::RAX);
    }
}
