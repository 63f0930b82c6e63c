//! A debuggee without KVM: vCPUs that interpret a handful of x86 instructions over plain memory.
//!
//! It keeps the contract of `Debuggee` in the simplest way that can be right, so that a test that
//! fails accuses the stub. RAM is 64 KiB of physical memory. Linear addresses: the same numbers
//! from 0x1000 on, with a hole at [`HOLE`], and all of it once more from [`KERNEL`] on.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use trapline_gdbstub_glue::{Debuggee, DebuggeeError};
use trapline_vmm::debug::{
    Breakpoint, BreakpointError, Crash, Ending, ResumePlan, RunMode, Stop, StopReason, Trigger, VcpuId,
};
use trapline_vmm::vcpu::{Activity, Registers, Segment};

pub const RAM: u64 = 0x1_0000;
pub const KERNEL: u64 = 0xffff_8000_0000_0000;
/// A page that physical memory has and no page table maps low.
pub const HOLE: u64 = 0x8000;
/// Where the vCPUs start: a loop of NOPs, one increment of [`COUNTER`] and one load of it.
pub const CODE: u64 = 0x1000;
/// The increment in the loop.
pub const INCREMENT: u64 = CODE + 8;
/// The load in the loop.
pub const LOAD: u64 = INCREMENT + 7;
/// The call in the loop.
pub const CALL: u64 = LOAD + 7;
/// The function that it calls.
pub const FUNCTION: u64 = 0x1100;
/// Other code that a test may jump to.
pub const UD2: u64 = 0x1200;
pub const EXIT: u64 = 0x1210;
pub const HLT: u64 = 0x1220;
/// What the loop increments.
pub const COUNTER: u64 = 0x3000;
pub const SLOTS: usize = 4;

/// What tests look at from outside the thread that runs the machine.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub running: bool,
    pub killed: bool,
    /// It cannot run any more, by its own doing.
    pub ended: bool,
    pub detached: usize,
    pub armed: Vec<Breakpoint>,
    /// Every byte that a client wrote, and where.
    pub written: Vec<(u64, Vec<u8>)>,
    /// Instructions carried out, by vCPU.
    pub steps: Vec<u64>,
    /// The plans of all resumptions.
    pub plans: Vec<ResumePlan>,
}

pub struct Fake {
    registers: Vec<Registers>,
    activity: Vec<Activity>,
    ram: Vec<u8>,
    armed: Vec<Breakpoint>,
    running: Option<ResumePlan>,
    /// Where each vCPU has told of a breakpoint and has not moved since: it gets past that one.
    /// One that stands on a breakpoint and has not told does not.
    told: Vec<Option<u64>>,
    pending: VecDeque<Stop>,
    last: Stop,
    ended: Option<Ending>,
    pub seen: Arc<Mutex<Seen>>,
    /// The next calls of these kinds fail with this text.
    pub failing_resume: Option<String>,
    pub failing_set: Option<String>,
    pub failing_stop: Option<String>,
    pub failing_detach: Option<String>,
}

impl Fake {
    pub fn new(vcpus: usize) -> Self {
        let mut ram = vec![0; RAM as usize];
        let mut at = CODE as usize;
        let mut emit = |bytes: &[u8]| {
            ram[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        let relative = |next: u64, to: u64| (to.wrapping_sub(next) as u32).to_le_bytes();
        emit(&[0x90; 8]);
        emit(&[0x48, 0xff, 0x05]); // inc qword ptr [rip + COUNTER]
        emit(&relative(INCREMENT + 7, COUNTER));
        emit(&[0x48, 0x8b, 0x05]); // mov rax, [rip + COUNTER]
        emit(&relative(LOAD + 7, COUNTER));
        emit(&[0xe8]); // call FUNCTION
        emit(&relative(CALL + 5, FUNCTION));
        let end = CALL + 5;
        emit(&[0xeb, (CODE.wrapping_sub(end + 2)) as u8]); // jmp CODE
        ram[FUNCTION as usize..][..4].copy_from_slice(&[0x90, 0x90, 0x90, 0xc3]);
        ram[UD2 as usize..][..2].copy_from_slice(&[0x0f, 0x0b]);
        ram[EXIT as usize..][..2].copy_from_slice(&[0xe6, 0xf4]); // out 0xf4, al
        ram[HLT as usize] = 0xf4;

        let registers: Vec<_> = (0..vcpus as u64).map(start).collect();
        let seen = Seen { steps: vec![0; vcpus], ..Seen::default() };
        Self {
            activity: vec![Activity::Runnable; vcpus],
            told: vec![None; vcpus],
            running: Some(ResumePlan::all(vcpus, RunMode::Continue)),
            registers,
            ram,
            armed: Vec::new(),
            pending: VecDeque::new(),
            last: Stop::new(VcpuId(0), StopReason::Interrupted),
            ended: None,
            seen: Arc::new(Mutex::new(Seen { running: true, ..seen })),
            failing_resume: None,
            failing_set: None,
            failing_stop: None,
            failing_detach: None,
        }
    }

    /// Stops before its first instruction.
    pub fn stopped(vcpus: usize) -> Self {
        let mut fake = Self::new(vcpus);
        fake.park();
        fake
    }

    /// Makes something happen, as a guest would, on the next resumption or in the middle of a run.
    pub fn happens(&mut self, vcpu: u32, reason: StopReason) {
        self.pending.push_back(Stop::new(VcpuId(vcpu), reason));
    }

    pub fn set_activity(&mut self, vcpu: usize, activity: Activity) {
        self.activity[vcpu] = activity;
    }

    pub fn register_file(&mut self, vcpu: usize) -> &mut Registers {
        &mut self.registers[vcpu]
    }

    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Runs for a while. Every vCPU that runs carries out one instruction a round.
    pub fn run(&mut self, rounds: usize) -> Option<Stop> {
        let plan = self.running.clone()?;
        for _ in 0..rounds {
            for vcpu in 0..self.registers.len() {
                let mode = plan.mode(VcpuId(vcpu as u32));
                if mode == RunMode::Parked || self.activity[vcpu] != Activity::Runnable {
                    continue;
                }
                if let Some(reason) = self.execute(vcpu, mode) {
                    self.pending.push_back(Stop::new(VcpuId(vcpu as u32), reason));
                }
            }
            if let Some(stop) = self.next_pending() {
                self.park();
                return Some(stop);
            }
        }
        None
    }

    fn park(&mut self) {
        self.running = None;
        self.seen.lock().unwrap().running = false;
    }

    fn end(&mut self, ending: Ending) {
        self.ended = Some(ending);
        self.seen.lock().unwrap().ended = true;
    }

    /// Hits on breakpoints that are gone are forgotten.
    fn drop_gone(&mut self) {
        let armed = &self.armed;
        self.pending.retain(|stop| match &stop.reason {
            StopReason::Breakpoint(request) | StopReason::Watchpoint { request, .. } => armed.contains(request),
            _ => true,
        });
    }

    /// The next stop to tell.
    fn next_pending(&mut self) -> Option<Stop> {
        let stop = self.pending.pop_front()?;
        if let StopReason::Breakpoint(request) = stop.reason {
            self.told[stop.vcpu.index()] = Some(request.addr);
        }
        self.last = stop.clone();
        Some(stop)
    }

    fn execute(&mut self, vcpu: usize, mode: RunMode) -> Option<StopReason> {
        let rip = self.registers[vcpu].rip;
        let over = self.told[vcpu].take() == Some(rip) || mode == RunMode::Step;
        if !over && self.armed.contains(&Breakpoint::exec(rip)) {
            return Some(StopReason::Breakpoint(Breakpoint::exec(rip)));
        }
        let mut code = [0; 8];
        self.linear(rip, &mut code);
        let displacement = |at: usize| i64::from(i32::from_le_bytes(code[at..at + 4].try_into().unwrap())) as u64;
        let mut access = None;
        let mut next = rip.wrapping_add(1);
        match code {
            [0x90, ..] => {}
            [0xeb, to, ..] => next = rip.wrapping_add(2).wrapping_add(i64::from(to as i8) as u64),
            [0xe8, ..] => {
                let rsp = self.registers[vcpu].rsp.wrapping_sub(8);
                self.registers[vcpu].rsp = rsp;
                self.poke(rsp, &rip.wrapping_add(5).to_le_bytes());
                next = rip.wrapping_add(5).wrapping_add(displacement(1));
            }
            [0xc3, ..] => {
                let mut to = [0; 8];
                self.linear(self.registers[vcpu].rsp, &mut to);
                self.registers[vcpu].rsp = self.registers[vcpu].rsp.wrapping_add(8);
                next = u64::from_le_bytes(to);
            }
            [0x48, 0xff, 0x05, ..] => {
                next = rip.wrapping_add(7);
                let addr = next.wrapping_add(displacement(3));
                let mut value = [0; 8];
                self.linear(addr, &mut value);
                self.poke(addr, &u64::from_le_bytes(value).wrapping_add(1).to_le_bytes());
                access = Some((addr, true));
            }
            [0x48, 0x8b, 0x05, ..] => {
                next = rip.wrapping_add(7);
                let addr = next.wrapping_add(displacement(3));
                let mut value = [0; 8];
                self.linear(addr, &mut value);
                self.registers[vcpu].rax = u64::from_le_bytes(value);
                access = Some((addr, false));
            }
            [0xf4, ..] => self.activity[vcpu] = Activity::Halted,
            [0xe6, 0xf4, ..] => {
                let status = self.registers[vcpu].rax as u32 & 0xff;
                self.end(Ending::Exit(status));
                return Some(StopReason::GuestExit(status));
            }
            _ => {
                let crash = Crash::TripleFault { state_lost: false };
                self.end(Ending::Crash(crash.clone()));
                return Some(StopReason::Crash(crash));
            }
        }
        self.registers[vcpu].rip = next;
        self.seen.lock().unwrap().steps[vcpu] += 1;
        let watch = access.and_then(|(addr, write)| self.watched(addr, write));
        watch.or(match mode {
            RunMode::Step => Some(StopReason::Step),
            RunMode::StepRange { start, end } if !(start..end).contains(&next) => Some(StopReason::Step),
            _ => None,
        })
    }

    fn watched(&self, addr: u64, write: bool) -> Option<StopReason> {
        let request = *self.armed.iter().find(|b| {
            let overlaps = addr <= b.addr.saturating_add(b.len - 1) && b.addr <= addr.saturating_add(7);
            overlaps && matches!((b.on, write), (Trigger::Write, true) | (Trigger::Read | Trigger::Access, _))
        })?;
        // The slot's base: eight aligned bytes of the range.
        Some(StopReason::Watchpoint { request, addr: (addr & !7).max(request.addr), stored: None })
    }

    /// How many slots this set of requests takes.
    fn slots(armed: &[Breakpoint]) -> usize {
        armed.iter().map(|b| if b.on == Trigger::Execute { 1 } else { b.len.div_ceil(8) as usize }).sum()
    }

    fn physical(addr: u64) -> Option<usize> {
        match addr {
            KERNEL.. => Some((addr - KERNEL) as usize),
            HOLE..0x9000 => None,
            0x1000..RAM => Some(addr as usize),
            _ => None,
        }
        .filter(|&at| at < RAM as usize)
    }

    fn linear(&self, addr: u64, into: &mut [u8]) -> usize {
        for (i, byte) in into.iter_mut().enumerate() {
            match addr.checked_add(i as u64).and_then(Self::physical) {
                Some(at) => *byte = self.ram[at],
                None => return i,
            }
        }
        into.len()
    }

    fn poke(&mut self, addr: u64, bytes: &[u8]) {
        for (i, &byte) in (0..).zip(bytes) {
            if let Some(at) = addr.checked_add(i).and_then(Self::physical) {
                self.ram[at] = byte;
            }
        }
    }

    pub fn counter(&self) -> u64 {
        u64::from_le_bytes(self.ram[COUNTER as usize..][..8].try_into().unwrap())
    }
}

/// Distinct values everywhere, in 64-bit mode.
fn start(vcpu: u64) -> Registers {
    let v = vcpu << 32;
    let mut fpu = trapline_vmm::vcpu::Fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    for (i, xmm) in (1u128..).zip(fpu.xmm.iter_mut()) {
        *xmm = i << 64 | i;
    }
    let flat = |selector, attributes| Segment { selector, base: 0, limit: u32::MAX, attributes };
    Registers {
        rax: v | 0xa0,
        rbx: v | 0xb0,
        rcx: v | 0xc0,
        rdx: v | 0xd0,
        rsi: v | 0x51,
        rdi: v | 0xd1,
        rbp: 0x7000 + vcpu * 0x100,
        rsp: 0x6000 + vcpu * 0x100,
        r8: v | 8,
        r9: v | 9,
        r10: v | 10,
        r11: v | 11,
        r12: v | 12,
        r13: v | 13,
        r14: v | 14,
        r15: v | 15,
        rip: CODE,
        rflags: 0x246,
        cs: flat(0x10, 0xa09b),
        ss: flat(0x18, 0xc093),
        ds: flat(0x20, 0xc093),
        es: flat(0x28, 0xc093),
        fs: Segment { base: 0xf5_0000 + vcpu, ..flat(0x30, 0xc093) },
        gs: Segment { base: 0x65_0000 + vcpu, ..flat(0x38, 0xc093) },
        cr0: 0x8005_0033,
        cr2: 0x2222,
        cr3: 0x10_0000 + (vcpu << 12),
        cr4: 0x6f0,
        cr8: 0,
        efer: 0xd01,
        apic_base: 0xfee0_0900,
        kernel_gs_base: 0xffff_8880_0000_0000 + vcpu,
        star: 0x23_0010 << 32,
        lstar: 0xffff_ffff_81e0_0000,
        fmask: 0x47700,
        dr6: 0xffff_0ff0,
        dr7: 0x400,
        fpu,
        ..Registers::default()
    }
}

fn error(text: impl Into<String>) -> DebuggeeError {
    DebuggeeError(text.into())
}

impl Debuggee for Fake {
    fn vcpus(&self) -> usize {
        self.registers.len()
    }

    fn activity(&mut self, vcpu: VcpuId) -> Result<Activity, DebuggeeError> {
        self.activity.get(vcpu.index()).copied().ok_or_else(|| error("no such vCPU"))
    }

    fn registers(&mut self, vcpu: VcpuId) -> Result<Registers, DebuggeeError> {
        assert!(self.running.is_none(), "registers of a running vCPU");
        self.registers.get(vcpu.index()).copied().ok_or_else(|| error("no such vCPU"))
    }

    fn set_registers(&mut self, vcpu: VcpuId, registers: &Registers) -> Result<(), DebuggeeError> {
        assert!(self.running.is_none(), "registers of a running vCPU");
        if registers.cr4 >> 33 != 0 {
            return Err(error("KVM refuses these registers: EINVAL"));
        }
        *self.registers.get_mut(vcpu.index()).ok_or_else(|| error("no such vCPU"))? = *registers;
        Ok(())
    }

    fn read_memory(&mut self, _vcpu: VcpuId, addr: u64, into: &mut [u8]) -> Result<usize, DebuggeeError> {
        assert!(self.running.is_none(), "memory of a running guest");
        Ok(self.linear(addr, into))
    }

    fn write_memory(&mut self, _vcpu: VcpuId, addr: u64, bytes: &[u8]) -> Result<(), DebuggeeError> {
        assert!(self.running.is_none(), "memory of a running guest");
        self.seen.lock().unwrap().written.push((addr, bytes.to_vec()));
        let mapped = (0..bytes.len() as u64).all(|i| addr.checked_add(i).and_then(Self::physical).is_some());
        if !mapped {
            return Err(error(format!("{addr:#x} is not mapped")));
        }
        for (addr, byte) in (addr..).zip(bytes) {
            self.poke(addr, &[*byte]);
        }
        Ok(())
    }

    fn read_physical(&mut self, addr: u64, into: &mut [u8]) -> Result<usize, DebuggeeError> {
        let len = RAM.saturating_sub(addr).min(into.len() as u64) as usize;
        into[..len].copy_from_slice(&self.ram[addr.min(RAM) as usize..][..len]);
        Ok(len)
    }

    fn write_physical(&mut self, addr: u64, bytes: &[u8]) -> Result<(), DebuggeeError> {
        self.seen.lock().unwrap().written.push((addr, bytes.to_vec()));
        let room = self.ram.get_mut(usize::try_from(addr).unwrap_or(usize::MAX)..).unwrap_or_default();
        room.get_mut(..bytes.len()).ok_or_else(|| error("no RAM there"))?.copy_from_slice(bytes);
        Ok(())
    }

    fn set_breakpoint(&mut self, request: Breakpoint) -> Result<(), BreakpointError> {
        assert!(self.running.is_none(), "breakpoints of a running guest");
        if let Some(why) = self.failing_set.take() {
            return Err(BreakpointError::Apply(why));
        }
        if self.armed.contains(&request) {
            return Ok(());
        }
        if request.len > 32 {
            return Err(BreakpointError::Invalid { request, why: "it is longer than four slots" });
        }
        let (taken, needed) = (Self::slots(&self.armed), Self::slots(&[request]));
        if taken + needed > SLOTS {
            return Err(BreakpointError::NoSlot { request, needed, free: SLOTS - taken });
        }
        self.armed.push(request);
        self.seen.lock().unwrap().armed = self.armed.clone();
        Ok(())
    }

    fn clear_breakpoint(&mut self, request: Breakpoint) -> Result<(), BreakpointError> {
        let before = self.armed.len();
        self.armed.retain(|b| *b != request);
        self.drop_gone();
        self.seen.lock().unwrap().armed = self.armed.clone();
        if self.armed.len() == before { Err(BreakpointError::NotSet { request }) } else { Ok(()) }
    }

    fn resume(&mut self, plan: &ResumePlan) -> Result<Option<Stop>, DebuggeeError> {
        if let Some(why) = self.failing_resume.take() {
            return Err(error(why));
        }
        if let Some(ending) = self.ended.clone() {
            return Ok(Some(Stop::new(self.last.vcpu, StopReason::Ended(ending))));
        }
        self.seen.lock().unwrap().plans.push(plan.clone());
        if let Some(stop) = self.next_pending() {
            return Ok(Some(stop));
        }
        self.running = Some(plan.clone());
        self.seen.lock().unwrap().running = true;
        Ok(None)
    }

    fn stop(&mut self) -> Result<Stop, DebuggeeError> {
        if let Some(why) = self.failing_stop.take() {
            return Err(error(why));
        }
        if let Some(plan) = self.running.clone() {
            self.park();
            let lowest = (0..self.registers.len() as u32).map(VcpuId).find(|&v| plan.mode(v) != RunMode::Parked);
            if let Some(stop) = self.next_pending() {
                return Ok(stop);
            }
            self.last = Stop::new(lowest.unwrap_or(VcpuId(0)), StopReason::Interrupted);
        }
        Ok(self.last.clone())
    }

    fn detach(&mut self) -> Result<(), DebuggeeError> {
        if let Some(why) = self.failing_detach.take() {
            return Err(error(why));
        }
        self.armed.clear();
        self.pending.clear();
        self.running = Some(ResumePlan::all(self.registers.len(), RunMode::Continue));
        let mut seen = self.seen.lock().unwrap();
        seen.armed.clear();
        seen.detached += 1;
        seen.running = true;
        Ok(())
    }

    fn kill(&mut self) {
        self.park();
        self.ended = Some(Ending::Killed);
        self.seen.lock().unwrap().killed = true;
    }
}
