//! Guests that do one thing, on a bare vCPU and under the product's coordinator.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug,
    kvm_regs,
};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd, VmFd};
use trapline_guests::fixture;
use trapline_vmm::KvmGround;
use trapline_vmm::coordinator::{Coordinator, Kick};
use trapline_vmm::debug::{Offer, ResumePlan, RunMode, StopReason, VcpuId};
use trapline_vmm::devices::bus::Bus;
use trapline_vmm::memory::GuestRam;
use trapline_vmm::paging::{read_physical, write_all_physical};
use trapline_vmm::vcpu::{KvmCpu, kick};

use crate::clock::{Monitor, PATIENCE};
use crate::rig::{Begin, bare_machine, vcpu};

/// Where the programs stand: a page that every ring may run.
pub(crate) const PAGE: u64 = fixture::WATCH;

/// What [`Program::MEMORY`] counts, and where it finds its way back.
const COUNTER: u64 = PAGE + 0x800;
const POINTER: u64 = PAGE + 0x808;

const RING_0: Begin = Begin::Ring0("jump_self");
const RING_3: Begin = Begin::Ring3("ring3_loop");

/// A loop without an end. Its first instruction is the one to put a breakpoint on.
#[derive(Clone, Copy)]
pub(crate) struct Program {
    offset: u64,
    code: &'static [u8],
    /// Where in the code the breakpoint belongs.
    place: u64,
}

impl Program {
    /// `1: out %al, $0x80; jmp 1b`
    pub(crate) const OUT: Program = Program { offset: 0, code: &[0xe6, 0x80, 0xeb, 0xfc], place: 0 };
    /// `1: nop; jmp 1b`
    pub(crate) const NOP: Program = Program { offset: 0x100, code: &[0x90, 0xeb, 0xfd], place: 0 };
    /// `1: mov %rax, (%rsp); jmp 1b`
    pub(crate) const STORE: Program = Program { offset: 0x200, code: &[0x48, 0x89, 0x04, 0x24, 0xeb, 0xfa], place: 0 };
    /// `1: inc %rcx; jmp 1b`
    pub(crate) const COUNT: Program = Program { offset: 0x300, code: &[0x48, 0xff, 0xc1, 0xeb, 0xfb], place: 0 };
    /// `1: inc %rcx; mov %rcx, SOURCE; jmp 1b`
    pub(crate) const STORES: Program = Program {
        offset: 0x500,
        code: &[0x48, 0xff, 0xc1, 0x48, 0x89, 0x0c, 0x25, 0x00, 0xa0, 0x22, 0x00, 0xeb, 0xf3],
        place: 3,
    };
    /// `1: mov $10000, %ecx; 2: dec %ecx; jnz 2b; nop; jmp 1b`, and the place is the NOP.
    pub(crate) const RARE: Program =
        Program { offset: 0x400, code: &[0xb9, 0x10, 0x27, 0, 0, 0xff, 0xc9, 0x75, 0xfc, 0x90, 0xeb, 0xf4], place: 9 };

    /// `1: incq COUNTER; jmp *POINTER`, which leads back: nothing of it can be done in place.
    pub(crate) const MEMORY: Program = Program {
        offset: 0x600,
        code: &[0x48, 0xff, 0x04, 0x25, 0x00, 0x88, 0x22, 0, 0xff, 0x24, 0x25, 0x08, 0x88, 0x22, 0],
        place: 0,
    };

    /// The address of the instruction that a breakpoint belongs on.
    pub(crate) fn place(self) -> u64 {
        PAGE + self.offset + self.place
    }

    fn begins(self, fd: &VcpuFd) {
        let regs = fd.get_regs().unwrap();
        fd.set_regs(&kvm_regs { rip: PAGE + self.offset, ..regs }).unwrap();
    }
}

/// Every vCPU is put into one of the programs, and into the ring in which it began.
fn machine(programs: &[Program], begin: Begin) -> (VmFd, GuestRam, Vec<VcpuFd>) {
    let (vm, ram) = bare_machine();
    let make = |(n, program): (usize, &Program)| {
        let fd = vcpu(&vm, n as u32, programs.len() as u32, begin);
        assert!(write_all_physical(ram.mem(), PAGE + program.offset, program.code));
        program.begins(&fd);
        fd
    };
    assert!(write_all_physical(ram.mem(), POINTER, &(PAGE + Program::MEMORY.offset).to_le_bytes()));
    let fds = programs.iter().enumerate().map(make).collect();
    (vm, ram, fds)
}

/// A vCPU in a loop around KVM_RUN, with nothing of ours between.
pub(crate) struct Bare {
    fd: VcpuFd,
    /// What each exit brings along, and each entry takes.
    registers: bool,
    /// What is said to KVM before the entries that make one, in turn; nothing at all before a single one.
    said: Vec<kvm_guest_debug>,
    _machine: (VmFd, GuestRam),
}

impl Bare {
    /// One whose exits bring all registers along, and whose entries take the general ones, as a
    /// counted hit needs it.
    pub(crate) fn with_registers() -> Self {
        Self::new().synced()
    }

    /// One that does nothing but run into a breakpoint on a NOP and be moved on: what a counted hit
    /// costs without us.
    pub(crate) fn with_breakpoint() -> Self {
        let bare = Self::of(Program::NOP).synced();
        bare.fd.set_guest_debug(&slot(Program::NOP)).unwrap();
        bare
    }

    /// The same on a store, which is stepped over with the slot disarmed.
    pub(crate) fn with_breakpoint_to_step() -> Self {
        Bare { said: vec![slot(Program::STORE), step()], ..Self::of(Program::STORE) }
    }

    /// One that is stepped: what a step costs without us.
    pub(crate) fn with_steps() -> Self {
        Bare { said: vec![step()], ..Self::of(Program::MEMORY) }
    }

    /// One that has four breakpoints where it never comes by: what debug registers cost each entry and exit.
    pub(crate) fn with_four_slots() -> Self {
        let bare = Self::new();
        let mut debug = kvm_guest_debug { control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, ..Default::default() };
        for (slot, place) in debug.arch.debugreg[..4].iter_mut().zip(fixture::SOURCE..) {
            *slot = place;
        }
        debug.arch.debugreg[7] = 0x4aa;
        bare.fd.set_guest_debug(&debug).unwrap();
        bare
    }

    fn synced(mut self) -> Self {
        for registers in [SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents] {
            self.fd.set_sync_valid_reg(registers);
        }
        Bare { registers: true, ..self }
    }

    /// Seconds of this thread's processor time for an ioctl that only looks.
    pub(crate) fn cost_of_an_ioctl(&self) -> f64 {
        const TIMES: u32 = 10_000;
        let began = thread_time();
        for _ in 0..TIMES {
            self.fd.get_regs().unwrap();
        }
        ((thread_time() - began) / TIMES).as_secs_f64()
    }

    pub(crate) fn new() -> Self {
        Self::of(Program::OUT)
    }

    fn of(program: Program) -> Self {
        let (vm, ram, fds) = machine(&[program], RING_0);
        Bare { fd: fds.into_iter().next().unwrap(), registers: false, said: Vec::new(), _machine: (vm, ram) }
    }

    /// Seconds of this thread's processor time for one.
    pub(crate) fn cost(&mut self, window: Duration) -> f64 {
        let (began, started, mut times) = (thread_time(), Instant::now(), 0u64);
        while started.elapsed() < window {
            for _ in 0..100 {
                for n in 0..self.said.len().max(1) {
                    if let Some(debug) = self.said.get(n) {
                        self.fd.set_guest_debug(debug).unwrap();
                    }
                    self.enter();
                }
            }
            times += 100;
        }
        (thread_time() - began).as_secs_f64() / times as f64
    }

    fn enter(&mut self) {
        match self.fd.run() {
            Ok(VcpuExit::IoOut(..)) => {}
            Ok(VcpuExit::Debug(_)) if !self.said.is_empty() => {}
            Ok(VcpuExit::Debug(_)) => self.fd.sync_regs_mut().regs.rip += 1,
            other => panic!("{other:?}"),
        }
        if self.registers {
            self.fd.set_sync_dirty_reg(SyncReg::Register);
        }
    }
}

/// An execution slot on the program's place.
fn slot(program: Program) -> kvm_guest_debug {
    let mut debug = kvm_guest_debug { control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, ..Default::default() };
    debug.arch.debugreg[0] = program.place();
    debug.arch.debugreg[7] = 0x402;
    debug
}

fn step() -> kvm_guest_debug {
    let control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ;
    kvm_guest_debug { control, ..Default::default() }
}

/// A machine under the coordinator.
pub(crate) struct Guest {
    // Dropped first: its threads use everything below.
    pub(crate) coordinator: Coordinator,
    events: Arc<Monitor<u64>>,
    machine: (Arc<VmFd>, GuestRam),
}

impl Guest {
    pub(crate) fn new(programs: &[Program]) -> Self {
        Self::of(machine(programs, RING_0))
    }

    pub(crate) fn in_ring_3(program: Program) -> Self {
        Self::of(machine(&[program], RING_3))
    }

    fn of((vm, ram, fds): (VmFd, GuestRam, Vec<VcpuFd>)) -> Self {
        kick::install().unwrap();
        let bus = Arc::new(Bus::new());
        let make = |fd| (KvmCpu::new(fd, bus.clone(), ram.clone(), None), Box::new(kick::send) as Kick);
        let cpus = fds.into_iter().map(make).collect();
        let events = Monitor::new(0);
        let notify = events.clone();
        let mut coordinator = Coordinator::new(cpus, move || notify.change(|count| *count += 1)).unwrap();
        let vm = Arc::new(vm);
        let pages = Offer { data_slots: false, pages: true, ..Offer::SLOTS };
        coordinator.use_ground(Box::new(KvmGround::new(vm.clone(), ram.clone())), pages);
        Guest { coordinator, events, machine: (vm, ram) }
    }

    pub(crate) fn go(&mut self, mode: RunMode) {
        let plan = ResumePlan::all(self.coordinator.vcpus(), mode);
        assert_eq!(self.coordinator.resume(&plan).unwrap(), None);
    }

    /// Runs until a stop.
    pub(crate) fn run(&mut self, mode: RunMode) -> StopReason {
        self.go(mode);
        loop {
            let seen = *self.events.lock();
            if let Some(stop) = self.coordinator.poll().unwrap() {
                return stop.reason;
            }
            assert!(self.events.wait(PATIENCE, |count| *count != seen), "no stop came");
        }
    }

    /// Runs for a while; the processor time of vCPU 0's thread meanwhile.
    pub(crate) fn run_for(&mut self, window: Duration, mode: RunMode) -> Duration {
        let before = vcpu_time();
        self.go(mode);
        std::thread::sleep(window);
        self.coordinator.stop().unwrap();
        assert_eq!(self.coordinator.take_stop(), None, "it stopped by itself");
        vcpu_time() - before
    }

    /// What [`Program::MEMORY`] has counted.
    pub(crate) fn counted_in_memory(&self) -> u64 {
        let mut bytes = [0; 8];
        assert_eq!(read_physical(self.machine.1.mem(), COUNTER, &mut bytes), 8);
        u64::from_le_bytes(bytes)
    }

    /// What [`Program::COUNT`] and [`Program::STORES`] have counted.
    pub(crate) fn count(&mut self, cpu: u32) -> u64 {
        self.coordinator.registers(VcpuId(cpu)).unwrap().rcx
    }
}

fn thread_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(now).unwrap()
}

/// Processor time of vCPU 0's thread, guest code included, as the scheduler counts it.
fn vcpu_time() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let is_vcpu =
        |task: &std::path::PathBuf| std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name == "vcpu0\n");
    let task = tasks.into_iter().find(is_vcpu).expect("a thread called vcpu0");
    let text = std::fs::read_to_string(task.join("schedstat")).expect("a kernel with scheduler statistics");
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}
