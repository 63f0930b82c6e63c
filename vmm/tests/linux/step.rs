//! One vCPU of the guest, stepped and looked at: where a step may lead, and whether the guest can
//! see the TF that is ours.

use std::collections::BTreeMap;

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Register};
use trapline_vmm::debug::{Breakpoint, Owner, RunMode, StopReason, VcpuId};
use trapline_vmm::vcpu::Registers;

use crate::guest::Guest;

/// RFLAGS.TF.
const TF: u64 = 1 << 8;
/// Linux's code segments: the kernel's and the user's.
const KERNEL_CS: u64 = 0x10;
const USER_CS: u64 = 0x33;
/// Findings that are kept; a wrong step is seldom alone.
const MOST_FINDINGS: usize = 20;

/// Steps one vCPU and keeps what was wrong, and where it came by.
pub(crate) struct Stepper {
    vcpu: VcpuId,
    /// What the other vCPUs do meanwhile.
    others: RunMode,
    pub(crate) steps: u64,
    /// How many instructions of each function; `user` for all user programs.
    pub(crate) seen: BTreeMap<String, u64>,
    findings: Vec<String>,
    now: Registers,
}

impl Stepper {
    pub(crate) fn new(guest: &mut Guest, vcpu: VcpuId, others: RunMode) -> Self {
        let now = guest.registers(vcpu);
        Stepper { vcpu, others, steps: 0, seen: BTreeMap::new(), findings: Vec::new(), now }
    }

    /// It has run on since the last step.
    pub(crate) fn look(&mut self, guest: &mut Guest) {
        self.now = guest.registers(self.vcpu);
    }

    pub(crate) fn pc(&self) -> u64 {
        self.now.pc()
    }

    /// How many instructions of a function it has stepped.
    pub(crate) fn passed(&self, function: &str) -> u64 {
        self.seen.get(function).copied().unwrap_or_default()
    }

    fn found(&mut self, guest: &Guest, from: u64, what: &str) {
        if self.findings.len() < MOST_FINDINGS {
            let (from, to) = (guest.symbols.name(from), guest.symbols.name(self.pc()));
            self.findings.push(format!("step {} from {from} to {to}: {what}", self.steps));
        }
    }

    pub(crate) fn assert_nothing_found(&self) {
        assert!(self.findings.is_empty(), "{:#?}", self.findings);
    }

    /// Runs through a function that reads the paravirtual clock. On a host whose TSC is not stable, such as
    /// the svm lane's L1, KVM gives the clock a new version at each entry, and the
    /// function begins again for as long as it is stepped. Whether there was one.
    pub(crate) fn run_through_clock(&mut self, guest: &mut Guest) -> bool {
        let from = self.pc();
        let function = guest.symbols.function(from);
        if !function.starts_with("pvclock_clocksource_read") || guest.symbols.at(function) != from {
            return false;
        }
        let (behind, rsp) = (guest.word(self.vcpu, self.now.rsp).unwrap(), self.now.rsp + 8);
        let bp = Breakpoint::exec(behind);
        guest.vm.set_breakpoint(Owner::GDB, bp).unwrap();
        let plan = guest.all(self.others).with(self.vcpu, RunMode::Continue);
        loop {
            let stop = guest.run(&plan);
            assert_eq!(stop.reason, StopReason::Breakpoint(bp), "on the way out of {}", guest.symbols.name(from));
            self.look(guest);
            // Others use the clock as well, interrupts of this vCPU among them.
            if stop.vcpu == self.vcpu && self.now.rsp == rsp {
                break;
            }
        }
        guest.vm.clear_breakpoint(Owner::GDB, bp).unwrap();
        true
    }

    /// One step; a step that is told as something else, or of another vCPU, ends the test.
    pub(crate) fn step(&mut self, guest: &mut Guest) {
        let before = self.now;
        let from = before.pc();
        let instruction = decode(guest, self.vcpu, from);
        let covered = loads_ss(&instruction).then(|| decode(guest, self.vcpu, instruction.next_ip()));
        self.look_before(guest, &instruction);
        let plan = guest.all(self.others).with(self.vcpu, RunMode::Step);
        let stop = guest.run(&plan);
        assert_eq!(
            (stop.vcpu, &stop.reason),
            (self.vcpu, &StopReason::Step),
            "step {} from {}",
            self.steps,
            guest.symbols.name(from)
        );
        self.steps += 1;
        self.look(guest);
        let function = guest.symbols.function(from).to_owned();
        *self.seen.entry(function).or_default() += 1;
        if !self.leads(guest, covered.as_ref().unwrap_or(&instruction), self.pc()) {
            self.found(guest, from, &format!("{:?} does not lead there", instruction.code()));
        }
        self.look_behind(guest, from, &instruction);
    }

    /// What an instruction is about to take as RFLAGS.
    fn look_before(&mut self, guest: &mut Guest, instruction: &Instruction) {
        let flags = match instruction.code() {
            Code::Iretq => guest.word(self.vcpu, self.now.rsp + 16),
            Code::Popfq => guest.word(self.vcpu, self.now.rsp),
            Code::Sysretq => Some(self.now.r11),
            _ => None,
        };
        if flags.is_some_and(|flags| flags & TF != 0) {
            self.found(guest, self.pc(), &format!("{:?} will take a TF from {flags:x?}", instruction.code()));
        }
    }

    /// What the step has left where the guest finds it.
    fn look_behind(&mut self, guest: &mut Guest, from: u64, instruction: &Instruction) {
        let Registers { rflags, rsp, r11, .. } = self.now;
        let pc = self.pc();
        let mut places = vec![("RFLAGS", Some(rflags))];
        if matches!(instruction.code(), Code::Pushfq | Code::Pushfd | Code::Pushfw) {
            places.push(("what PUSHF stored", guest.word(self.vcpu, rsp)));
        }
        if instruction.code() == Code::Syscall {
            places.push(("R11 behind SYSCALL", Some(r11)));
        }
        let function = guest.symbols.function(pc);
        if function.starts_with("asm_") && guest.symbols.at(function) == pc {
            // An error code comes first, or else CS stands here.
            let has_code = |cs: u64| cs != KERNEL_CS && cs != USER_CS;
            let frame = guest.word(self.vcpu, rsp + 8).map(|cs| if has_code(cs) { rsp + 8 } else { rsp });
            places.push(("an exception's frame", frame.and_then(|frame| guest.word(self.vcpu, frame + 16))));
        }
        for (what, flags) in places {
            if flags.is_none_or(|flags| flags & TF != 0) {
                self.found(guest, from, &format!("{what} is {flags:x?}"));
            }
        }
    }

    /// Whether one instruction can lead to `to`: by itself, or by a fault.
    fn leads(&self, guest: &Guest, instruction: &Instruction, to: u64) -> bool {
        let function = guest.symbols.function(to);
        if function.starts_with("asm_exc_") && guest.symbols.at(function) == to {
            return true;
        }
        let (next, target) = (instruction.next_ip(), instruction.near_branch_target());
        match instruction.flow_control() {
            FlowControl::Next => {
                let repeats = instruction.has_rep_prefix() || instruction.has_repne_prefix();
                to == next || repeats && to == instruction.ip()
            }
            FlowControl::UnconditionalBranch => to == target,
            FlowControl::ConditionalBranch => to == target || to == next,
            FlowControl::Call if instruction.code() == Code::Syscall => {
                to == next || to == guest.symbols.at("entry_SYSCALL_64")
            }
            FlowControl::Call => to == target,
            // From memory or a register.
            FlowControl::Return | FlowControl::IndirectBranch | FlowControl::IndirectCall => true,
            FlowControl::Interrupt | FlowControl::XbeginXabortXend | FlowControl::Exception => false,
        }
    }
}

/// One trap covers it and the instruction behind it.
fn loads_ss(instruction: &Instruction) -> bool {
    matches!(instruction.code(), Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16)
        && instruction.op0_register() == Register::SS
}

fn decode(guest: &mut Guest, vcpu: VcpuId, pc: u64) -> Instruction {
    let mut bytes = [0; 15];
    let got = guest.vm.read_memory(vcpu, pc, &mut bytes).unwrap();
    Decoder::with_ip(64, &bytes[..got], pc, DecoderOptions::NONE).decode()
}
