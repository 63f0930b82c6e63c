//! The product as its users have it: a guest booted by [`Vm`], its console, its memory.

use std::io;
use std::sync::{Arc, Mutex};

use trapline_guests::{demo, fixture, symbol};
use trapline_vmm::boot::{ApStart, BootRequest, Image};
use trapline_vmm::debug::{Breakpoint, Owner, ResumePlan, RunMode, Stop, VcpuId};
use trapline_vmm::devices::Console;
use trapline_vmm::limits::MIB;
use trapline_vmm::state::{MachineState, MemorySource};
use trapline_vmm::vcpu::Registers;
use trapline_vmm::{RestoreConfig, Vm, VmConfig, VmError};

use crate::clock::wait_with;
use crate::inquest::threads;
use crate::lane::Need;

/// Decides, before each arming of a vCPU, whether it fails.
pub(crate) type ArmHook = Arc<dyn Fn(VcpuId) -> io::Result<()> + Send + Sync>;

pub(crate) struct Booted {
    pub(crate) vm: Vm,
    pub(crate) image: &'static [u8],
    console: Arc<Mutex<Vec<u8>>>,
}

#[derive(Clone)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Booted {
    /// The demo guest, stopped while all its CPUs count.
    pub(crate) fn counting_demo(cpus: u32, hook: Option<ArmHook>) -> Self {
        let mut demo = Self::new(trapline_guests::demo(), cpus, "quiet", ap_start(), hook);
        demo.go();
        demo.wait_for("all CPUs to count", |demo| (0..cpus).all(|cpu| demo.count(cpu) > 0).then_some(()));
        demo.vm.stop().unwrap();
        demo
    }

    /// The fixture with properties for its CPUs.
    pub(crate) fn fixture(cpus: u32, properties: &str, ap_start: ApStart) -> Self {
        Self::new(fixture::image(), cpus, &format!("run={properties}"), ap_start, None)
    }

    /// The guest that does one thing.
    pub(crate) fn act(cpus: u32, what: &str) -> Self {
        Self::new(trapline_guests::acts(), cpus, &format!("run={what}"), ap_start(), None)
    }

    pub(crate) fn new(
        image: &'static [u8],
        cpus: u32,
        cmdline: &str,
        ap_start: ApStart,
        arm_hook: Option<ArmHook>,
    ) -> Self {
        let console = Arc::new(Mutex::new(Vec::new()));
        let boot = BootRequest {
            kernel: Image::Bytes(image),
            name: "guest",
            initrd: None,
            cmdline,
            cpus,
            ap_start,
            protocol: None,
        };
        let output = Console::new(Lines(console.clone()));
        let vm =
            Vm::boot(VmConfig { memory: 64 * MIB, boot, console: output, disks: vec![], rng: true, arm_hook }).unwrap();
        Booted { vm, image, console }
    }

    /// The machine as it is now, to be made again.
    pub(crate) fn save(&mut self) -> Saved {
        let state = self.vm.save();
        let state = self.must(state);
        let pages = self.vm.ram().ranges();
        let read = |(start, len): (u64, u64)| {
            let mut bytes = vec![0; len as usize];
            assert_eq!(self.vm.read_physical(start, &mut bytes), bytes.len());
            (start, bytes)
        };
        Saved { state, memory: pages.into_iter().map(read).collect(), image: self.image }
    }

    pub(crate) fn at(&self, label: &str) -> u64 {
        symbol(self.image, label).unwrap_or_else(|| panic!("the guest has no {label}"))
    }

    pub(crate) fn cpus(&self) -> u32 {
        self.vm.vcpus() as u32
    }

    pub(crate) fn plan(&self, mode: RunMode) -> ResumePlan {
        ResumePlan::all(self.vm.vcpus(), mode)
    }

    /// Only `vcpu`, in this mode.
    pub(crate) fn only(&self, vcpu: u32, mode: RunMode) -> ResumePlan {
        self.plan(RunMode::Parked).with(VcpuId(vcpu), mode)
    }

    /// All go on; nothing may be pending.
    pub(crate) fn go(&mut self) {
        let plan = self.plan(RunMode::Continue);
        let pending = self.vm.resume(&plan);
        assert_eq!(self.must(pending), None);
    }

    /// Goes on as `plan` says, until a stop.
    pub(crate) fn run(&mut self, plan: &ResumePlan) -> Stop {
        let pending = self.vm.resume(plan);
        match self.must(pending) {
            Some(pending) => pending,
            None => self.wait(),
        }
    }

    /// All go on, until a stop.
    pub(crate) fn run_all(&mut self) -> Stop {
        let plan = self.plan(RunMode::Continue);
        self.run(&plan)
    }

    pub(crate) fn wait(&mut self) -> Stop {
        self.wait_for("a stop", |booted| {
            let stop = booted.vm.poll();
            booted.must(stop)
        })
    }

    /// Waits for something of the guest; if it was in vain, the failure says how all stands.
    pub(crate) fn wait_for<T>(&mut self, what: &str, look: impl FnMut(&mut Self) -> Option<T>) -> T {
        wait_with(self, what, look, Self::inquest)
    }

    /// What must have worked; if it has not, the failure says how all stands.
    pub(crate) fn must<T, E: std::fmt::Display>(&mut self, result: Result<T, E>) -> T {
        result.unwrap_or_else(|error| panic!("{error}; {}", self.inquest()))
    }

    /// How all stands, for a failure: the threads, what the vCPUs did and where they are, the
    /// console. Stops the world.
    fn inquest(&mut self) -> String {
        // Only the demo guest counts there.
        let cpus = if symbol(self.image, "count_up_here").is_some() { self.cpus() } else { 0 };
        let counts = |booted: &Self| -> Vec<u64> { (0..cpus).map(|cpu| booted.count(cpu)).collect() };
        let before = counts(self);
        let threads = threads();
        let counted: Vec<u64> = counts(self).iter().zip(before).map(|(now, then)| now.wrapping_sub(then)).collect();
        let mut text = format!("{threads}\nrunning: {}; counted meanwhile: {counted:?}", self.vm.is_running());
        text += &format!("\nbreakpoints: {:x?}; stopping it gives {:x?}", self.vm.breakpoints(), self.vm.stop());
        while let Ok(Some(stop)) = self.vm.poll() {
            text += &format!("\nuntold: {stop:x?}");
        }
        for cpu in 0..self.cpus() {
            let activity = self.vm.activity(VcpuId(cpu));
            let registers = self.vm.registers(VcpuId(cpu));
            let place = registers.map(|r| (self.name(r.pc()), r.rflags, r.dr6, r.dr7));
            text += &format!("\nvCPU {cpu}: {activity:?}, pc, RFLAGS, DR6 and DR7 {place:x?}");
        }
        text += &format!("\ncounts: {:?}", counts(self));
        text + &format!("\n---- end of the console\n{}\n----", tail(&self.console()))
    }

    /// The symbol of the guest at or before `addr`.
    fn name(&self, addr: u64) -> String {
        let symbols = trapline_guests::symbols(self.image);
        let before = symbols.iter().filter(|symbol| symbol.1 <= addr).max_by_key(|symbol| symbol.1);
        before.map_or(format!("{addr:#x}"), |(name, start)| format!("{name}+{:#x}", addr - start))
    }

    pub(crate) fn set(&mut self, breakpoint: Breakpoint) {
        let set = self.vm.set_breakpoint(Owner::GDB, breakpoint);
        self.must(set);
    }

    pub(crate) fn clear(&mut self, breakpoint: Breakpoint) {
        let cleared = self.vm.clear_breakpoint(Owner::GDB, breakpoint);
        self.must(cleared);
    }

    pub(crate) fn registers(&mut self, cpu: u32) -> Registers {
        let registers = self.vm.registers(VcpuId(cpu));
        self.must(registers)
    }

    /// A u64 in guest memory; readable while the guest runs.
    pub(crate) fn word(&self, addr: u64) -> u64 {
        let mut bytes = [0; 8];
        assert_eq!(self.vm.read_physical(addr, &mut bytes), 8);
        u64::from_le_bytes(bytes)
    }

    /// How often a CPU of the demo has counted, at `count_up_here`.
    pub(crate) fn count(&self, cpu: u32) -> u64 {
        self.word(demo::count_address(cpu).unwrap())
    }

    pub(crate) fn counts(&self) -> Vec<u64> {
        (0..self.cpus()).map(|cpu| self.count(cpu)).collect()
    }

    /// #DB and #BP that the demo saw.
    pub(crate) fn guest_debug_exceptions(&self) -> u64 {
        self.word(self.at("debug_exceptions_seen")) + self.word(self.at("breakpoint_exceptions_seen"))
    }

    pub(crate) fn console(&self) -> String {
        String::from_utf8_lossy(&self.console.lock().unwrap()).into_owned()
    }
}

/// A machine that was saved, with its memory.
#[derive(Clone)]
pub(crate) struct Saved {
    pub(crate) state: MachineState,
    pub(crate) memory: Vec<(u64, Vec<u8>)>,
    image: &'static [u8],
}

impl MemorySource for Saved {
    fn ranges(&self) -> Vec<(u64, u64)> {
        self.memory.iter().map(|(start, bytes)| (*start, bytes.len() as u64)).collect()
    }

    fn read(&self, gpa: u64, into: &mut [u8]) -> io::Result<()> {
        let (start, bytes) = self.memory.iter().rfind(|(start, _)| *start <= gpa).unwrap();
        let at = (gpa - start) as usize;
        into.copy_from_slice(&bytes[at..at + into.len()]);
        Ok(())
    }
}

impl Saved {
    /// The machine again, by way of what is written to a file.
    pub(crate) fn restore(&self) -> Booted {
        let state = MachineState::from_json(self.state.to_json().as_bytes()).unwrap();
        assert!(state == self.state, "JSON changes it");
        self.try_restore(&state).unwrap()
    }

    /// A machine in another state, with this memory.
    pub(crate) fn try_restore(&self, state: &MachineState) -> Result<Booted, VmError> {
        let console = Arc::new(Mutex::new(Vec::new()));
        let output = Console::new(Lines(console.clone()));
        let config = RestoreConfig { state, memory: self, console: output, disks: Vec::new(), arm_hook: None };
        Ok(Booted { vm: Vm::restore(config)?, image: self.image, console })
    }
}

fn tail(text: &str) -> &str {
    let from = text.char_indices().rev().nth(2000).map_or(0, |(at, _)| at);
    &text[from..]
}

/// APs start as on a PC, where debugging that start does not take the machine along.
pub(crate) fn ap_start() -> ApStart {
    match Need::RealModeSlots.missing() {
        None => ApStart::Sipi,
        Some(_) => ApStart::Mailbox,
    }
}
