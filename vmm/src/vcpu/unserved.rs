//! Stores into a read-only page that KVM cannot hand over, so that they do not pass for the guest's own fault.
//!
//! KVM hands over what its emulator can carry out: not every SSE or AVX store, and not the frame that the
//! processor pushes for an exception or interrupt. The one is an emulation failure, the other a triple fault or
//! an emulation failure, by flavour of KVM.

use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory, OpAccess, Register};

use super::cpu::Cpu;
use super::{Registers, thread::VcpuThread};
use crate::debug::{Breakpoint, Crash};
use crate::limits::PAGE_SIZE;

/// Most bytes of one instruction.
const MAX_INSTRUCTION: usize = 15;
/// What a frame can take: five words, an error code, and what aligning it leaves out.
const FRAME: u64 = 64;
/// Offsets in a 64-bit TSS: RSP0-2, and IST1-7 (SDM vol. 3, figure 8-11).
const TSS_STACKS: [u64; 10] = [0x04, 0x0c, 0x14, 0x24, 0x2c, 0x34, 0x3c, 0x44, 0x4c, 0x54];

impl<C: Cpu> VcpuThread<C> {
    /// What a crash is due to, if that is a page that is read-only for a watchpoint.
    pub(super) fn explain(&mut self, crash: Crash) -> Crash {
        let may_be = matches!(crash, Crash::EmulationFailure { .. } | Crash::TripleFault { state_lost: false });
        if self.image.ranges().is_empty() || !may_be {
            return crash;
        }
        let Ok(registers) = self.cpu.registers() else { return crash };
        let mut stores = self.instruction_stores(&registers);
        stores.extend(self.stacks(&registers).into_iter().map(|top| (top.wrapping_sub(FRAME), FRAME)));
        let watched = stores.into_iter().find_map(|(addr, len)| self.watched_page(addr, len));
        match watched {
            Some(request) => Crash::WatchedPage { crash: Box::new(crash), request },
            None => crash,
        }
    }

    /// Where the instruction at RIP stores, as address and length.
    fn instruction_stores(&mut self, registers: &Registers) -> Vec<(u64, u64)> {
        let mut bytes = [0; MAX_INSTRUCTION];
        let got = self.cpu.read(registers.pc(), &mut bytes);
        let instruction = Decoder::with_ip(64, &bytes[..got], registers.rip, DecoderOptions::NONE).decode();
        let mut factory = InstructionInfoFactory::new();
        let writes = [OpAccess::Write, OpAccess::CondWrite, OpAccess::ReadWrite, OpAccess::ReadCondWrite];
        let memory = factory.info(&instruction).used_memory().iter().filter(|used| writes.contains(&used.access()));
        memory
            .filter_map(|used| {
                let addr = used.virtual_address(0, |register, _, _| value(registers, register))?;
                Some((addr, (used.memory_size().size() as u64).max(1)))
            })
            .collect()
    }

    /// The stacks that a frame can be pushed to: the present one, and those of the TSS.
    fn stacks(&mut self, registers: &Registers) -> Vec<u64> {
        let mut tops = vec![registers.rsp.wrapping_add(registers.ss.base)];
        for offset in TSS_STACKS {
            let mut top = [0; 8];
            if self.cpu.read(registers.tr.base.wrapping_add(offset), &mut top) == top.len() {
                tops.push(u64::from_le_bytes(top));
            }
        }
        tops
    }

    /// The watchpoint for which a page of this linear range is read-only.
    fn watched_page(&mut self, addr: u64, len: u64) -> Option<Breakpoint> {
        let ends = [addr, addr.checked_add(len - 1)?];
        ends.into_iter().find_map(|addr| {
            let page = self.cpu.translate(addr)? & !(PAGE_SIZE - 1);
            let watched = self.image.ranges_in(page, PAGE_SIZE).next();
            watched.map(|range| range.behind.request)
        })
    }
}

/// What a register adds to an address: its value, or the base of a segment.
fn value(r: &Registers, register: Register) -> Option<u64> {
    let value = match register.full_register() {
        Register::RAX => r.rax,
        Register::RBX => r.rbx,
        Register::RCX => r.rcx,
        Register::RDX => r.rdx,
        Register::RSI => r.rsi,
        Register::RDI => r.rdi,
        Register::RBP => r.rbp,
        Register::RSP => r.rsp,
        Register::R8 => r.r8,
        Register::R9 => r.r9,
        Register::R10 => r.r10,
        Register::R11 => r.r11,
        Register::R12 => r.r12,
        Register::R13 => r.r13,
        Register::R14 => r.r14,
        Register::R15 => r.r15,
        Register::FS => r.fs.base,
        Register::GS => r.gs.base,
        Register::CS | Register::SS | Register::DS | Register::ES => 0,
        _ => return None,
    };
    Some(if register.is_gpr32() { value & u64::from(u32::MAX) } else { value })
}
