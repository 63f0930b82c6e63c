//! A guest under the debugger: the machine, its coordinator, and its memory.

mod saved;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::boot::{BootError, BootRequest, Entry};
use crate::coordinator::{Coordinator, CoordinatorError, Kick};
use crate::debug::{
    Breakpoint, BreakpointError, Ending, Handler, INT3, Level, Mechanism, Notice, Offer, Owner, PortHandler,
    ResumePlan, Stop, StopReason, VcpuId,
};
use crate::devices::virtio::{self, Backend, Disk, DiskConfig, DiskError, Entropy};
use crate::devices::{Console, Pc, Serial, Shared};
use crate::machine::{self, HostError, KvmGround, Machine, MachineError};
use crate::memory::{GuestRam, MemoryError};
use crate::paging::{self, Paging};
use crate::probe;
use crate::state::{CpuidLeaf, RestoreError};
use crate::vcpu::{Activity, ArmHook, Glance, Registers, kick};

pub use saved::RestoreConfig;

/// What to make a guest from.
pub struct VmConfig<'a> {
    /// Guest memory in bytes.
    pub memory: u64,
    /// Kernel, initrd, command line, vCPUs.
    pub boot: BootRequest<'a>,
    /// Where the console's output goes.
    pub console: Console,
    /// Its disks, in the order in which the guest is to find them.
    pub disks: Vec<DiskConfig>,
    /// Whether it has a source of random bytes (virtio-rng).
    pub rng: bool,
    /// For tests: asked before each vCPU is armed, so that an ioctl can be made to fail.
    pub arm_hook: Option<VcpuHook>,
}

/// Asked before a vCPU is armed.
pub type VcpuHook = Arc<dyn Fn(VcpuId) -> io::Result<()> + Send + Sync>;

/// Why there is no guest. The severity is the caller's to decide.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The host cannot.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The kernel, initrd or command line cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The memory cannot be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// It cannot be restored from the state that was given.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// A disk cannot be attached.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Threads, eventfds.
    #[error("cannot start the machine: {0}; raise the limits of open files and threads (ulimit -n, ulimit -u)")]
    Resources(String),
}

impl VmError {
    /// Whether it is this host that cannot, rather than what was asked that is wrong.
    pub const fn is_hosts(&self) -> bool {
        match self {
            VmError::Host(_) | VmError::Resources(_) => true,
            VmError::Restore(error) => error.is_of_this_host(),
            VmError::Boot(_) | VmError::Memory(_) | VmError::Disk(_) => false,
        }
    }
}

impl From<MachineError> for VmError {
    fn from(error: MachineError) -> Self {
        match error {
            MachineError::Host(error) => VmError::Host(error),
            MachineError::Boot(error) => VmError::Boot(error),
            MachineError::Device(error) => VmError::Resources(error),
            MachineError::Restore(error) => VmError::Restore(error),
        }
    }
}

/// The hook for each vCPU.
fn hook_for(hook: Option<VcpuHook>) -> impl Fn(u32) -> Option<ArmHook> {
    move |n| {
        let hook = hook.clone()?;
        Some(Arc::new(move |_| hook(VcpuId(n))))
    }
}

/// The virtio devices, each at its place.
fn start_virtio(ram: &GuestRam, disks: &[DiskConfig], rng: bool) -> Result<virtio::Devices, VmError> {
    let disks = Disk::open_all(disks)?;
    let rng = rng.then(|| (virtio::ENTROPY_SLOT, Box::new(Entropy) as Box<dyn Backend>));
    let disks = (virtio::ENTROPY_SLOT + 1..).zip(disks).map(|(slot, disk)| (slot, Box::new(disk) as Box<dyn Backend>));
    virtio::Devices::start(ram, rng.into_iter().chain(disks).collect())
        .map_err(|error| VmError::Resources(error.to_string()))
}

/// A guest under the debugger. Made stopped, before its first instruction.
pub struct Vm {
    // Dropped first: its threads use everything below.
    coordinator: Coordinator,
    /// The coordinator knows what this host serves beyond the slots.
    offered: bool,
    ram: GuestRam,
    pc: Pc,
    cpuid: Vec<Vec<CpuidLeaf>>,
    virtio: virtio::Devices,
    disks: Vec<DiskConfig>,
    entry: Entry,
    events: EventFd,
    // Keeps the interrupt controllers alive for as long as devices raise lines.
    vm: Arc<VmFd>,
}

impl Vm {
    /// Makes the machine and loads the kernel. No guest code has run when this returns.
    pub fn boot(config: VmConfig<'_>) -> Result<Self, VmError> {
        let ram = GuestRam::new(config.memory)?;
        let virtio = start_virtio(&ram, &config.disks, config.rng)?;
        let machine = Machine::new(&ram, &config.boot, config.console, &virtio, hook_for(config.arm_hook))?;
        Self::around(machine, ram, virtio, config.disks)
    }

    /// The machine as its users have it, parked.
    fn around(
        machine: Machine,
        ram: GuestRam,
        virtio: virtio::Devices,
        disks: Vec<DiskConfig>,
    ) -> Result<Self, VmError> {
        let resources = |error: io::Error| VmError::Resources(error.to_string());
        kick::install().map_err(resources)?;
        let events = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(resources)?;
        let notify = Arc::new(events.try_clone().map_err(resources)?);
        let cpus = machine.cpus.into_iter().map(|cpu| (cpu, Box::new(kick::send) as Kick)).collect();
        let mut coordinator = Coordinator::new(cpus, move || {
            // Fails only when the counter is full, and then it is readable already.
            let _ = notify.write(1);
        })
        .map_err(resources)?;
        let vm = Arc::new(machine.vm);
        let ground = KvmGround::new(vm.clone(), ram.clone()).with_devices(virtio.bus().clone());
        coordinator.use_ground(Box::new(ground), Offer::SLOTS);
        let bell = events.try_clone().map_err(resources)?;
        ram.on_device_store(move || _ = bell.write(1));
        let Machine { pc, cpuid, entry, .. } = machine;
        Ok(Self { coordinator, ram, pc, cpuid, virtio, disks, entry, events, offered: false, vm })
    }

    /// Readable whenever [`poll`](Self::poll) may have something to say.
    pub fn events(&self) -> &EventFd {
        &self.events
    }

    /// The console's input side.
    pub fn serial(&self) -> &Shared<Serial> {
        &self.pc.com1
    }

    /// The disks and the source of random bytes.
    pub fn virtio(&self) -> &virtio::Devices {
        &self.virtio
    }

    /// What was loaded and where.
    pub fn entry(&self) -> &Entry {
        &self.entry
    }

    /// Guest memory.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> usize {
        self.coordinator.vcpus()
    }

    /// Whether guest code may be running.
    pub fn is_running(&self) -> bool {
        self.coordinator.is_running()
    }

    /// How the run ended, if it has.
    pub fn ended(&self) -> Option<&Ending> {
        self.coordinator.ended()
    }

    /// The breakpoints in force.
    pub fn breakpoints(&self) -> Vec<(Owner, Breakpoint)> {
        self.coordinator.breakpoints()
    }

    /// Arms `request` on every vCPU, or nowhere; works while the guest runs. What this host's KVM
    /// would accept and never trigger is served in another way, or refused.
    pub fn set_breakpoint(&mut self, owner: Owner, request: Breakpoint) -> Result<(), BreakpointError> {
        self.learn_offer(&[request])?;
        self.coordinator.set_breakpoint(owner, request)
    }

    /// As [`set_breakpoint`](Self::set_breakpoint), with a handler that decides about each hit on
    /// the vCPU's own thread: one that says [`Continue`](crate::debug::Disposition::Continue)
    /// stops nobody.
    pub fn set_trap(&mut self, owner: Owner, request: Breakpoint, handler: Handler) -> Result<(), BreakpointError> {
        self.learn_offer(&[request])?;
        self.coordinator.set_trap(owner, request, Some(handler))
    }

    /// As [`set_trap`](Self::set_trap), all of them or none, in one change: for thousands at once.
    pub fn set_traps(
        &mut self,
        owner: Owner,
        requests: Vec<(Breakpoint, Option<Handler>)>,
    ) -> Result<(), BreakpointError> {
        let plain: Vec<Breakpoint> = requests.iter().map(|(request, _)| *request).collect();
        self.learn_offer(&plain)?;
        self.coordinator.set_traps(owner, requests)
    }

    /// Disarms all of `requests` on every vCPU, or none of them, in one change.
    pub fn clear_traps(&mut self, owner: Owner, requests: &[Breakpoint]) -> Result<(), BreakpointError> {
        self.coordinator.clear_traps(owner, requests)
    }

    /// Takes what this host serves from its probe, before the first request. A host that cannot be
    /// asked serves execution slots: no watchpoint, for nobody knows whether it would ever fire.
    fn learn_offer(&mut self, requests: &[Breakpoint]) -> Result<(), BreakpointError> {
        if self.offered {
            return Ok(());
        }
        match probe::capabilities() {
            Ok(host) => {
                self.coordinator.set_offer(host.offer());
                self.offered = true;
                Ok(())
            }
            Err(error) => match requests.iter().find(|request| request.on.is_watch()) {
                Some(&request) => Err(BreakpointError::Unsupported { request, why: error.to_string() }),
                None => Ok(()),
            },
        }
    }

    /// Disarms `request` on every vCPU, or nowhere; works while the guest runs.
    pub fn clear_breakpoint(&mut self, owner: Owner, request: Breakpoint) -> Result<(), BreakpointError> {
        self.coordinator.clear_breakpoint(owner, request)
    }

    /// Whose requests have lost what served them to a higher level since the last call, or have
    /// got it back, oldest first. The guest's own breakpoints are among them.
    pub fn take_notices(&mut self) -> Vec<Notice> {
        self.coordinator.take_notices()
    }

    /// Lets the guest go on. `Some` is a stop that was pending: then nothing has run.
    pub fn resume(&mut self, plan: &ResumePlan) -> Result<Option<Stop>, CoordinatorError> {
        let stop = self.coordinator.resume(plan)?;
        self.ring_for_device_stores();
        Ok(stop)
    }

    /// What devices stored and no vCPU could be told of yet wants another look.
    fn ring_for_device_stores(&self) {
        if self.is_running() && self.ram.has_device_stores() {
            let _ = self.events.write(1);
        }
    }

    /// How the guest was resumed last.
    pub fn last_plan(&self) -> ResumePlan {
        self.coordinator.last_plan()
    }

    /// Looks for a stop, without waiting; the world is parked when there is one.
    pub fn poll(&mut self) -> Result<Option<Stop>, CoordinatorError> {
        // Emptied before the look, so that what comes later wakes the poller again.
        let _ = self.events.read();
        let stop = self.coordinator.poll()?;
        self.ring_for_device_stores();
        Ok(stop)
    }

    /// Stops the world and says for what: a stop that won the race, or
    /// [`StopReason::Interrupted`] on the first vCPU that ran.
    pub fn stop(&mut self) -> Result<Stop, CoordinatorError> {
        if let Some(ending) = self.ended() {
            return Ok(Stop::new(VcpuId(0), StopReason::Ended(ending.clone())));
        }
        self.coordinator.stop()?;
        let interrupted = Stop::new(self.coordinator.first_resumed(), StopReason::Interrupted);
        Ok(self.coordinator.take_stop().unwrap_or(interrupted))
    }

    /// Stops the world for the caller's own ends. What else has happened is told by the next [`resume`](Self::resume).
    pub fn pause(&mut self) -> Result<(), CoordinatorError> {
        self.coordinator.stop()
    }

    /// Drops what `level` armed and what was not told yet, and lets the guest go on.
    pub fn release(&mut self, level: Level) -> Result<(), CoordinatorError> {
        self.coordinator.release(level)?;
        // Something of the guest's own may be left to tell: one more look.
        let _ = self.events.write(1);
        Ok(())
    }

    /// Ends the guest.
    pub fn kill(&mut self) {
        self.coordinator.kill();
    }

    /// All registers of a parked vCPU.
    pub fn registers(&mut self, vcpu: VcpuId) -> Result<Registers, CoordinatorError> {
        self.coordinator.registers(vcpu)
    }

    /// Writes the registers of a parked vCPU; on error nothing has changed.
    pub fn set_registers(&mut self, vcpu: VcpuId, registers: &Registers) -> Result<(), CoordinatorError> {
        self.coordinator.set_registers(vcpu, registers)
    }

    /// What a parked vCPU is doing.
    pub fn activity(&mut self, vcpu: VcpuId) -> Result<Activity, CoordinatorError> {
        self.coordinator.activity(vcpu)
    }

    /// One look at a vCPU, whether it runs or not. A running one is kicked for it, which it hardly notices.
    pub fn glance(&mut self, vcpu: VcpuId) -> Result<Glance, CoordinatorError> {
        self.coordinator.glance(vcpu)
    }

    /// What serves `request` of `owner`; `None` if it waits for slots, or is not held.
    pub fn mechanism(&self, owner: Owner, request: Breakpoint) -> Option<Mechanism> {
        self.coordinator.mechanism(owner, request)
    }

    /// Has the handlers asked about each access to these ports, served by a device or not: of those that exit to
    /// the VMM, which the ports of KVM's own devices do not. Belongs before the first resume, and works once.
    pub fn trap_ports(&self, ports: BTreeMap<u16, PortHandler>) -> bool {
        self.pc.bus.trap_ports(ports)
    }

    /// Stops with [`StopReason::KernelEntry`] as soon as guest code runs at a kernel's addresses (the upper half)
    /// and sets GS.base or the entry of SYSCALL there, which every 64-bit kernel does among its first instructions:
    /// the moment from which the slide of a relocated kernel can be known. Said once; on a KVM that
    /// cannot say it (before Linux 5.10) an error.
    pub fn tell_kernel_entry(&self) -> io::Result<()> {
        machine::tell_msr_writes(&self.vm)
    }

    /// No more of [`tell_kernel_entry`](Self::tell_kernel_entry): the MSRs are the guest's alone again.
    pub fn kernel_entry_is_known(&self) -> io::Result<()> {
        machine::tell_no_msr_writes(&self.vm)
    }

    /// Reads linear memory as `vcpu` sees it, without breakpoints (law 55); how many bytes could be read.
    pub fn read_memory(&mut self, vcpu: VcpuId, addr: u64, into: &mut [u8]) -> Result<usize, CoordinatorError> {
        let paging = Paging::from(&self.registers(vcpu)?);
        Ok(self.read_linear(&paging, addr, into))
    }

    /// Reads linear memory through page tables that are known already, without breakpoints; how many bytes could be read.
    /// It waits for nobody.
    pub fn read_linear(&self, paging: &Paging, addr: u64, into: &mut [u8]) -> usize {
        let image = self.coordinator.image();
        paging.read_shown(self.ram.mem(), addr, into, |gpa, bytes| image.hide_patches(gpa, bytes))
    }

    /// Writes linear memory as `vcpu` sees it; whether all of it was there. If not, nothing was written.
    /// Breakpoints in it stay, and what was written is there when they go.
    pub fn write_memory(&mut self, vcpu: VcpuId, addr: u64, bytes: &[u8]) -> Result<bool, CoordinatorError> {
        let paging = Paging::from(&self.registers(vcpu)?);
        match paging.places(self.ram.mem(), addr, bytes.len()) {
            Some(places) => self.write_places(&places, bytes),
            None => Ok(false),
        }
    }

    /// Reads guest-physical memory, without breakpoints; how many bytes could be read.
    pub fn read_physical(&self, addr: u64, into: &mut [u8]) -> usize {
        let got = paging::read_physical(self.ram.mem(), addr, into);
        self.coordinator.image().hide_patches(addr, &mut into[..got]);
        got
    }

    /// Takes the breakpoints out of what was read of guest memory from `gpa` on.
    pub fn hide_breakpoints(&self, gpa: u64, bytes: &mut [u8]) {
        self.coordinator.image().hide_patches(gpa, bytes);
    }

    /// Writes guest-physical memory; whether all of it was RAM. If not, nothing was written.
    /// Breakpoints in it stay, and what was written is there when they go.
    pub fn write_physical(&mut self, addr: u64, bytes: &[u8]) -> Result<bool, CoordinatorError> {
        if paging::backed(self.ram.mem(), addr, bytes.len()) < bytes.len() {
            return Ok(false);
        }
        self.write_places(&[(addr, 0..bytes.len())], bytes)
    }

    /// Writes `bytes` to places that are all RAM: `(gpa, which of the bytes)`.
    fn write_places(&mut self, places: &[(u64, Range<usize>)], bytes: &[u8]) -> Result<bool, CoordinatorError> {
        let under: Vec<(u64, u8)> = places
            .iter()
            .flat_map(|(gpa, range)| {
                let byte = move |at: u64| bytes[range.start + (at - gpa) as usize];
                self.patched(*gpa, range.len()).map(move |at| (at, byte(at)))
            })
            .collect();
        self.coordinator.write_under_patches(&under)?;
        let mut written = true;
        for (gpa, range) in places {
            // Around the patches that are still there: an INT3 that was written under one has taken its place.
            let kept: Vec<u64> = self.patched(*gpa, range.len()).collect();
            let mut from = 0;
            for to in kept.iter().map(|at| (at - gpa) as usize).chain([range.len()]) {
                let piece = &bytes[range.start + from.min(to)..range.start + to];
                written &= paging::write_all_physical(self.ram.mem(), gpa + from as u64, piece);
                from = to + 1;
            }
        }
        Ok(written)
    }

    /// Addresses of the patches that stand in memory among `len` bytes from `gpa` on.
    fn patched(&self, gpa: u64, len: usize) -> impl Iterator<Item = u64> {
        let patches = self.coordinator.image().patches_in(gpa, len as u64).iter().map(|patch| patch.gpa);
        patches.filter(|at| {
            let mut byte = [0];
            paging::read_physical(self.ram.mem(), *at, &mut byte) == 1 && byte[0] == INT3
        })
    }
}
