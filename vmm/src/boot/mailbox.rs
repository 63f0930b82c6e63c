//! AP start by the ACPI wakeup mailbox (ACPI 6.5, 5.2.12.19): APs wait in long mode, in a loop of ours, until the guest
//! writes an APIC id, an address and a command into a page that the MADT names.
//!
//! Debuggers want this for guests that are to be trapped from their first instruction on: no vCPU is ever in real mode.

use super::error::BootError;
use super::{CpuState, layout, tables};
use crate::limits::PAGE_SIZE;
use crate::memory::GuestRam;

/// Offsets in the mailbox: command (2 bytes), APIC id (4 bytes), address to go to (8 bytes).
const APIC_ID: usize = 4;

/// An APIC id that no processor has.
const NOBODY: u32 = u32::MAX;

/// The loop. RDI = own APIC id, RSI = mailbox.
///
/// The APIC id is looked at before the command, and both before the address: the guest fills in id and address, then
/// sets the command, and does the next only after the command was cleared. So who sees its own id and then the command
/// sees the address that goes with them; who looked at the command first could take an older one's.
///
/// ```text
///     again: pause
///            cmp  [rsi+4], edi
///            jne  again
///            cmp  word [rsi], 1      ; wake up
///            jne  again
///            mov  rax, [rsi+8]
///            mov  word [rsi], 0      ; done: the guest may use the mailbox again
///            jmp  rax
/// ```
#[rustfmt::skip]
const LOOP: [u8; 24] = [
    0xf3, 0x90,
    0x39, 0x7e, 0x04,
    0x75, 0xf9,
    0x66, 0x83, 0x3e, 0x01,
    0x75, 0xf3,
    0x48, 0x8b, 0x46, 0x08,
    0x66, 0xc7, 0x06, 0x00, 0x00,
    0xff, 0xe0,
];

/// Writes the loop and an empty mailbox. The page tables and the GDT that the APs use are those of [`tables`].
pub(super) fn write(ram: &GuestRam) -> Result<(), BootError> {
    let mut mailbox = [0; PAGE_SIZE as usize];
    mailbox[APIC_ID..APIC_ID + 4].copy_from_slice(&NOBODY.to_le_bytes());
    tables::put(ram.mem(), "the wakeup mailbox", layout::AP_MAILBOX, &mailbox)?;
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
