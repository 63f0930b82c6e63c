//! Stores into a read-only page that KVM cannot hand over, so that they do not pass for the guest's own fault.
//!
//! KVM hands over what its emulator can carry out: not every SSE or AVX store, and not the frame that the
//! processor pushes for an exception or interrupt. The one is an emulation failure, the other a triple fault or
//! an emulation failure, by flavour of KVM.
//!
//! With nested paging it may be neither: KVM takes the fault, emulates an instruction that has nothing to do with
//! it or none at all, and enters the guest again, for ever; or it reports an instruction
//! that only raises something and is raised here (law 73), for ever. On AMD every walk of the guest's page tables counts as a store
//! to them. The vCPU kicks itself now and then, and if it never gets on while KVM's count of
//! such faults does, it is stuck.

use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory, OpAccess};

use super::cpu::Cpu;
use super::registers::operand;
use super::{Registers, thread::VcpuThread};
use crate::debug::{Breakpoint, Crash, StopReason};
use crate::limits::PAGE_SIZE;

/// Most bytes of one instruction.
const MAX_INSTRUCTION: usize = 15;
/// What a frame can take: five words, an error code, and what aligning it leaves out.
const FRAME: u64 = 64;
/// Offsets in a 64-bit TSS: RSP0-2, and IST1-7 (SDM vol. 3, figure 8-11).
const TSS_STACKS: [u64; 10] = [0x04, 0x0c, 0x14, 0x24, 0x2c, 0x34, 0x3c, 0x44, 0x4c, 0x54];

/// Looks in a row that find a vCPU where it was, before it is said to be stuck.
const LOOKS: u32 = 20;

/// What the looks have found.
#[derive(Debug, Default)]
pub(super) struct Progress {
    last: Option<Look>,
    /// Looks in a row at which it had not got on.
    without: u32,
}

#[derive(Debug, Clone, Copy)]
struct Look {
    registers: Registers,
    /// An interrupt is being delivered to it.
    interrupted: bool,
    faults: u64,
}

impl Progress {
    /// Whether it is stuck.
    fn see(&mut self, now: Look) -> bool {
        let Some(last) = self.last.replace(now) else { return false };
        let got_on = now.registers != last.registers && !(now.interrupted && last.interrupted);
        if got_on {
            self.without = 0;
        } else if now.faults != last.faults {
            // Otherwise it has not run since, or runs in circles by itself.
            self.without += 1;
        }
        self.without >= LOOKS
    }
}

impl<C: Cpu> VcpuThread<C> {
    /// Whether pages are read-only for watchpoints, and KVM tells what shows that this has stopped the vCPU.
    pub(super) fn may_get_stuck(&mut self) -> bool {
        !self.image.ranges().is_empty() && self.cpu.emulated_faults().is_some()
    }

    /// Whether a page that is read-only for a watchpoint has stopped the vCPU for good; it is told then.
    pub(super) fn is_stuck(&mut self) -> bool {
        let stuck = self.stuck();
        let is_stuck = stuck.is_some();
        if let Some(crash) = stuck {
            self.stop(StopReason::Crash(crash));
        }
        is_stuck
    }

    fn stuck(&mut self) -> Option<Crash> {
        let watched = !self.image.ranges().is_empty();
        let Some(faults) = watched.then(|| self.cpu.emulated_faults()).flatten() else {
            self.progress = Progress::default();
            return None;
        };
        let (registers, interrupted) = (self.cpu.state().ok()?, self.cpu.has_interrupt_on_its_way().ok()?);
        if !self.progress.see(Look { registers, interrupted, faults }) {
            return None;
        }
        self.progress = Progress::default();
        let request = self.watched_store(&registers).or_else(|| self.watched_table(&registers))?;
        Some(Crash::WatchedPage { crash: Box::new(Crash::NoProgress), request })
    }

    /// What a crash is due to, if that is a page that is read-only for a watchpoint.
    pub(super) fn explain(&mut self, crash: Crash) -> Crash {
        let may_be = matches!(crash, Crash::EmulationFailure { .. } | Crash::TripleFault { state_lost: false });
        if self.image.ranges().is_empty() || !may_be {
            return crash;
        }
        let Ok(registers) = self.cpu.registers() else { return crash };
        match self.watched_store(&registers) {
            Some(request) => Crash::WatchedPage { crash: Box::new(crash), request },
            None => crash,
        }
    }

    /// The watchpoint for which a page is read-only that the instruction at RIP, or a frame, is stored to.
    fn watched_store(&mut self, registers: &Registers) -> Option<Breakpoint> {
        let mut stores = self.instruction_stores(registers);
        stores.extend(self.stacks(registers).into_iter().map(|top| (top.wrapping_sub(FRAME), FRAME)));
        stores.into_iter().find_map(|(addr, len)| self.watched_page(addr, len))
    }

    /// The watchpoint for which a page table is read-only that the instruction at RIP, or a frame, needs.
    fn watched_table(&mut self, registers: &Registers) -> Option<Breakpoint> {
        let mut used = vec![registers.pc(), registers.idtr.base, registers.gdtr.base, registers.tr.base];
        used.extend(self.instruction_uses(registers).into_iter().map(|(addr, _, _)| addr));
        used.extend(self.stacks(registers).into_iter().map(|top| top.wrapping_sub(FRAME)));
        let tables: Vec<u64> = used.into_iter().flat_map(|addr| self.cpu.tables(addr)).collect();
        tables.into_iter().find_map(|page| self.watching(page))
    }

    /// A watchpoint on the page.
    fn watching(&self, page: u64) -> Option<Breakpoint> {
        self.image.ranges_in(page, PAGE_SIZE).next().map(|range| range.behind.request)
    }

    /// Where the instruction at RIP stores, as address and length.
    fn instruction_stores(&mut self, registers: &Registers) -> Vec<(u64, u64)> {
        let writes = [OpAccess::Write, OpAccess::CondWrite, OpAccess::ReadWrite, OpAccess::ReadCondWrite];
        let uses = self.instruction_uses(registers).into_iter();
        uses.filter(|(_, _, access)| writes.contains(access)).map(|(addr, len, _)| (addr, len)).collect()
    }

    /// The memory that the instruction at RIP uses, as address and length.
    fn instruction_uses(&mut self, registers: &Registers) -> Vec<(u64, u64, OpAccess)> {
        let mut bytes = [0; MAX_INSTRUCTION];
        let got = self.cpu.read(registers.pc(), &mut bytes);
        let instruction = Decoder::with_ip(64, &bytes[..got], registers.rip, DecoderOptions::NONE).decode();
        let mut factory = InstructionInfoFactory::new();
        let memory = factory.info(&instruction).used_memory().iter();
        memory
            .filter_map(|used| {
                let addr = used.virtual_address(0, |register, _, _| operand(registers, register))?;
                Some((addr, (used.memory_size().size() as u64).max(1), used.access()))
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
            self.watching(page)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(rip: u64, interrupted: bool, faults: u64) -> Look {
        Look { registers: Registers { rip, ..Registers::default() }, interrupted, faults }
    }

    /// Whether it is found stuck within a hundred looks.
    fn is_stuck(look_at: impl Fn(u64) -> Look) -> bool {
        let mut progress = Progress::default();
        (0..100).any(|n| progress.see(look_at(n)))
    }

    #[test]
    fn l66_who_takes_faults_where_it_stands_is_stuck() {
        assert!(is_stuck(|n| look(5, false, n)));
        assert!(is_stuck(|n| look(n, true, n)), "an interrupt that is never delivered");
        // Now and then it has not run between two looks.
        assert!(is_stuck(|n| look(5, false, n / 3)));
    }

    #[test]
    fn l66_who_gets_on_is_not_stuck() {
        assert!(!is_stuck(|n| look(n, false, n)));
        assert!(!is_stuck(|n| look(n / 10, false, n)));
        assert!(!is_stuck(|_| look(5, false, 7)), "it waits in a loop of its own");
        assert!(!is_stuck(|n| look(n, n % 2 == 0, n)), "interrupts come and go");
    }
}
