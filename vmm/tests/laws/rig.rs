//! The product's coordinator, vCPU threads and KVM vCPUs around a bare virtual machine that runs
//! the test fixture: no boot, no firmware, each vCPU begins at a property of its own.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_bindings::{
    CpuId, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE,
    Msrs, kvm_dtable, kvm_enable_cap, kvm_mp_state, kvm_msi, kvm_msr_entry, kvm_regs, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use object::{Object, ObjectSection, ObjectSegment, SectionKind};
use trapline_guests::fixture::{self, LOG_SIZE, LogEntry, Start};
use trapline_vmm::KvmGround;
use trapline_vmm::boot::layout;
use trapline_vmm::coordinator::{Coordinator, Kick};
use trapline_vmm::cpuid::{Topology, vcpu_entries};
use trapline_vmm::debug::{Breakpoint, BreakpointError, Offer, Owner, ResumePlan, RunMode, Stop, StopReason, VcpuId};
use trapline_vmm::devices::bus::{Bus, Device, Shared};
use trapline_vmm::devices::{DeviceEvent, ExitPort, exit};
use trapline_vmm::memory::GuestRam;
use trapline_vmm::paging::{read_physical, write_all_physical};
use trapline_vmm::vcpu::{Activity, Arming, KvmCpu, Registers, kick};

use crate::clock::{Monitor, PATIENCE, wait_for};
use crate::spy::{Spied, Spy};

/// How a vCPU of the rig begins.
#[derive(Clone, Copy)]
pub(crate) enum Begin {
    /// With a property, in ring 0.
    Ring0(&'static str),
    /// With a property, in ring 3 from its first instruction.
    Ring3(&'static str),
    /// Not before another vCPU sends it INIT and SIPI.
    WaitForSipi,
}

/// The device at [`fixture::MMIO`] and [`fixture::PORT_NOTHING`]: remembers what was written and
/// answers a read with how many reads there were before.
#[derive(Default)]
pub(crate) struct Recorder {
    pub(crate) writes: Vec<(u64, u64)>,
    pub(crate) reads: u64,
    /// What is written to it goes there, too.
    pub(crate) copies_to: Option<(GuestRam, u64)>,
}

impl Device for Recorder {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.copy_from_slice(&self.reads.to_le_bytes()[..data.len()]);
        self.reads += 1;
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<DeviceEvent> {
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        self.writes.push((offset, u64::from_le_bytes(value)));
        if let Some((ram, to)) = &self.copies_to {
            assert!(ram.device_write(*to, data));
        }
        None
    }
}

/// A bare machine under the coordinator.
pub(crate) struct Rig {
    // Dropped first: its threads use everything below.
    pub(crate) coordinator: Coordinator,
    pub(crate) spies: Vec<Spy>,
    pub(crate) mmio: Shared<Recorder>,
    pub(crate) ports: Shared<Recorder>,
    /// The vCPUs' file descriptors, for a test that breaks law 1 on purpose.
    pub(crate) raw: Vec<RawFd>,
    events: Arc<Monitor<u64>>,
    ram: GuestRam,
    vm: Arc<VmFd>,
}

impl Rig {
    /// One vCPU in ring 0.
    pub(crate) fn one(property: &'static str) -> Self {
        Self::new(&[Begin::Ring0(property)])
    }

    /// `cpus` vCPUs in ring 0, all with one property.
    pub(crate) fn all(cpus: usize, property: &'static str) -> Self {
        Self::new(&vec![Begin::Ring0(property); cpus])
    }

    pub(crate) fn new(begins: &[Begin]) -> Self {
        let (vm, ram) = bare_machine();
        let vm = Arc::new(vm);
        let events = Monitor::new(0);
        let rung = events.clone();
        ram.on_device_store(move || rung.change(|count| *count += 1));
        let (mmio, ports) = (Shared::new(Recorder::default()), Shared::new(Recorder::default()));
        let mut bus = Bus::new();
        bus.add_mmio(fixture::MMIO..fixture::MMIO + 0x1000, &mmio).unwrap();
        bus.add_pio(fixture::PORT_NOTHING, 1, &ports).unwrap();
        bus.add_pio(exit::PORT, exit::PORTS, &Shared::new(ExitPort)).unwrap();
        let bus = Arc::new(bus);
        kick::install().unwrap();
        let spies: Vec<Spy> = begins.iter().map(|_| Spy::new()).collect();
        let mut raw = Vec::new();
        let mut cpus = Vec::new();
        for ((n, begin), spy) in begins.iter().enumerate().zip(&spies) {
            let fd = vcpu(&vm, n as u32, begins.len() as u32, *begin);
            raw.push(fd.as_raw_fd());
            let cpu = Spied { cpu: KvmCpu::new(fd, bus.clone(), ram.clone(), None), spy: spy.clone() };
            let watched = spy.clone();
            let kick: Kick = Box::new(move |thread: &JoinHandle<()>| {
                watched.kicked();
                kick::send(thread);
            });
            cpus.push((cpu, kick));
        }
        let notify = events.clone();
        let mut coordinator = Coordinator::new(cpus, move || notify.change(|count| *count += 1)).unwrap();
        coordinator.use_ground(Box::new(KvmGround::new(vm.clone(), ram.clone())), Offer::SLOTS);
        Rig { coordinator, spies, mmio, ports, raw, events, ram, vm }
    }

    /// What finds no slot from now on becomes a patch.
    pub(crate) fn offer_patches(&mut self) {
        self.coordinator.set_offer(Offer { patches: true, ..Offer::SLOTS });
    }

    /// Serves write watchpoints by read-only pages, whatever else this host can do.
    pub(crate) fn with_pages(mut self) -> Self {
        self.coordinator.set_offer(Offer { data_slots: false, pages: true, ..Offer::SLOTS });
        self
    }

    /// What the guest writes to its port goes to this address, too.
    pub(crate) fn copy_port_to(&mut self, gpa: u64) {
        self.ports.lock().copies_to = Some((self.ram.clone(), gpa));
    }

    /// Data slots first, then read-only pages.
    pub(crate) fn offer_slots_and_pages(&mut self) {
        self.coordinator.set_offer(Offer { pages: true, ..Offer::SLOTS });
    }

    pub(crate) fn cpus(&self) -> usize {
        self.spies.len()
    }

    /// What every vCPU that does not step is to be armed with: the image in force, bit by bit.
    pub(crate) fn published(&self) -> Arming {
        let image = self.coordinator.image();
        Arming {
            addresses: image.addresses(),
            dr7: image.dr7(),
            step: false,
            block_irq: false,
            int3: !image.patches().is_empty(),
        }
    }

    /// All vCPUs in one mode.
    pub(crate) fn plan(&self, mode: RunMode) -> ResumePlan {
        ResumePlan::all(self.cpus(), mode)
    }

    /// Only `vcpu`, in this mode.
    pub(crate) fn only(&self, vcpu: u32, mode: RunMode) -> ResumePlan {
        self.plan(RunMode::Parked).with(VcpuId(vcpu), mode)
    }

    /// All go on. `Some` is a stop that was pending.
    pub(crate) fn go(&mut self) -> Option<Stop> {
        let plan = self.plan(RunMode::Continue);
        self.coordinator.resume(&plan).unwrap()
    }

    /// Goes on as `plan` says, until a stop.
    pub(crate) fn run(&mut self, plan: &ResumePlan) -> Stop {
        match self.coordinator.resume(plan).unwrap() {
            Some(pending) => pending,
            None => self.wait(),
        }
    }

    /// All go on, until a stop.
    pub(crate) fn run_all(&mut self) -> Stop {
        let plan = self.plan(RunMode::Continue);
        self.run(&plan)
    }

    /// Only vCPU 0 goes on, until a stop; it must be the vCPU 0's.
    pub(crate) fn run_first(&mut self, mode: RunMode) -> StopReason {
        let plan = self.only(0, mode);
        let stop = self.run(&plan);
        assert_eq!(stop.vcpu, VcpuId(0));
        stop.reason
    }

    /// One instruction of vCPU 0; where it leads.
    pub(crate) fn step(&mut self) -> u64 {
        assert_eq!(self.run_first(RunMode::Step), StopReason::Step);
        self.pc(0)
    }

    /// Waits for a stop.
    pub(crate) fn wait(&mut self) -> Stop {
        loop {
            let seen = *self.events.lock();
            if let Some(stop) = self.coordinator.poll().unwrap() {
                return stop;
            }
            assert!(self.events.wait(PATIENCE, |count| *count != seen), "no stop came");
        }
    }

    /// Stops the world, which must not stop by itself.
    pub(crate) fn interrupt(&mut self) {
        self.coordinator.stop().unwrap();
        assert_eq!(self.coordinator.take_stop(), None, "something stopped by itself");
    }

    /// Lets all run until `cpu` sleeps; leaves the world stopped.
    pub(crate) fn run_until_asleep(&mut self, cpu: u32) {
        wait_for("it to sleep", || {
            assert_eq!(self.go(), None);
            self.interrupt();
            (self.coordinator.activity(VcpuId(cpu)).unwrap() == Activity::Halted).then_some(())
        });
    }

    /// Runs vCPU 0 to `label`, with a breakpoint that is gone again afterwards.
    pub(crate) fn run_to(&mut self, label: &str) {
        let there = Breakpoint::exec(at(label));
        self.set(there).unwrap();
        assert_eq!(self.run_first(RunMode::Continue), StopReason::Breakpoint(there));
        self.clear(there).unwrap();
        assert_eq!(self.pc(0), at(label));
    }

    pub(crate) fn set(&mut self, breakpoint: Breakpoint) -> Result<(), BreakpointError> {
        self.coordinator.set_breakpoint(Owner::GDB, breakpoint)
    }

    pub(crate) fn clear(&mut self, breakpoint: Breakpoint) -> Result<(), BreakpointError> {
        self.coordinator.clear_breakpoint(Owner::GDB, breakpoint)
    }

    pub(crate) fn registers(&mut self, cpu: u32) -> Registers {
        self.coordinator.registers(VcpuId(cpu)).unwrap()
    }

    pub(crate) fn pc(&mut self, cpu: u32) -> u64 {
        self.registers(cpu).pc()
    }

    /// What is in guest memory, patches and all.
    pub(crate) fn read_ram(&self, addr: u64, into: &mut [u8]) {
        assert_eq!(read_physical(self.ram.mem(), addr, into), into.len());
    }

    /// All of the guest's code, as it is in memory.
    pub(crate) fn code(&self) -> Vec<u8> {
        let file = object::File::parse(fixture::image()).unwrap();
        let text = file.sections().filter(|section| section.kind() == SectionKind::Text);
        text.flat_map(|section| {
            let mut bytes = vec![0; section.size() as usize];
            self.read_ram(section.address(), &mut bytes);
            bytes
        })
        .collect()
    }

    /// A u64 in guest memory; readable while the guest runs.
    pub(crate) fn word(&self, addr: u64) -> u64 {
        let mut bytes = [0; 8];
        assert_eq!(read_physical(self.ram.mem(), addr, &mut bytes), 8);
        u64::from_le_bytes(bytes)
    }

    /// A device writes guest memory on a thread of its own.
    pub(crate) fn store_as_device(&self, gpa: u64, bytes: &[u8]) -> JoinHandle<()> {
        let (ram, bytes) = (self.ram.clone(), bytes.to_vec());
        std::thread::spawn(move || assert!(ram.device_write(gpa, &bytes)))
    }

    /// Writes guest memory as the debugger does.
    pub(crate) fn write_memory(&self, addr: u64, bytes: &[u8]) -> bool {
        write_all_physical(self.ram.mem(), addr, bytes)
    }

    /// The guest on this CPU has a paravirtual clock (kvmclock) at this address. The CPU must be parked.
    pub(crate) fn give_clock(&self, cpu: usize, gpa: u64) {
        const KVM_SET_MSRS: libc::c_ulong = 0x4008_ae89;
        const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
        let entry = kvm_msr_entry { index: MSR_KVM_SYSTEM_TIME_NEW, data: gpa | 1, ..Default::default() };
        let msrs = Msrs::from_entries(&[entry]).unwrap();
        // SAFETY: the ioctl reads the header and the one entry that it announces; a bad descriptor is an error.
        let set = unsafe { libc::ioctl(self.raw[cpu], KVM_SET_MSRS, msrs.as_fam_struct_ptr()) };
        assert_eq!(set, 1, "KVM has no kvmclock");
    }

    /// A field of a CPU's block.
    pub(crate) fn field(&self, cpu: u32, field: u64) -> u64 {
        self.word(fixture::cpu_address(cpu, field).unwrap())
    }

    /// What the guest logged: every exception and interrupt that it took.
    pub(crate) fn log(&self) -> Vec<LogEntry> {
        let count = self.word(fixture::log_count_address().unwrap());
        assert!(count <= fixture::LOG_ENTRIES, "the log has wrapped around");
        let entry = |n| {
            let mut bytes = [0; LOG_SIZE];
            let from = fixture::log_entry_address(n).unwrap();
            assert_eq!(read_physical(self.ram.mem(), from, &mut bytes), LOG_SIZE);
            LogEntry::decode(&bytes)
        };
        (0..count).map(entry).collect()
    }

    /// Device accesses so far: memory written and read, ports written and read.
    pub(crate) fn accesses(&self) -> [u64; 4] {
        let count = |device: &Shared<Recorder>| {
            let device = device.lock();
            [device.writes.len() as u64, device.reads]
        };
        let ([mmio_writes, mmio_reads], [port_writes, port_reads]) = (count(&self.mmio), count(&self.ports));
        [mmio_writes, mmio_reads, port_writes, port_reads]
    }

    /// The guest has seen no #DB and no #BP.
    pub(crate) fn assert_guest_undisturbed(&self) {
        use fixture::cpu_field::{BP, DB};
        for cpu in 0..self.cpus() as u32 {
            let seen = [self.field(cpu, DB), self.field(cpu, BP)];
            assert_eq!(seen, [0, 0], "vCPU {cpu} took #DB and #BP: {:x?}", self.log());
        }
    }

    /// Sends `vector` to the local APIC of `cpu`.
    pub(crate) fn interrupt_guest(&self, cpu: u32, vector: u8) {
        let msi = kvm_msi { address_lo: 0xfee0_0000 | cpu << 12, data: vector.into(), ..Default::default() };
        assert_eq!(self.vm.signal_msi(msi).unwrap(), 1, "nobody took the interrupt");
    }
}

/// The stop of a vCPU at a breakpoint of gdb's.
pub(crate) fn hit(cpu: u32, breakpoint: Breakpoint) -> Stop {
    Stop { vcpu: VcpuId(cpu), reason: StopReason::Breakpoint(breakpoint), owner: Some(Owner::GDB) }
}

/// The address of a symbol of the fixture.
pub(crate) fn at(label: &str) -> u64 {
    fixture::label(label).unwrap_or_else(|| panic!("the fixture has no {label}"))
}

/// The symbol of the fixture at or before `addr`, for messages.
pub(crate) fn name(addr: u64) -> String {
    let symbols = trapline_guests::symbols(fixture::image());
    let before = symbols.iter().filter(|symbol| symbol.1 <= addr).max_by_key(|symbol| symbol.1);
    match before {
        Some((name, start)) if addr - start < 0x1000 => format!("{name}+{:#x}", addr - start),
        _ => format!("{addr:#x}"),
    }
}

/// A virtual machine with the fixture in its memory.
pub(crate) fn bare_machine() -> (VmFd, GuestRam) {
    let kvm = Kvm::new().unwrap();
    let ram = GuestRam::new(fixture::MEMORY).unwrap();
    let file = object::File::parse(fixture::image()).unwrap();
    for segment in file.segments() {
        assert!(write_all_physical(ram.mem(), segment.address(), segment.data().unwrap()));
    }
    let vm = kvm.create_vm().unwrap();
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).unwrap();
    vm.set_tss_address(layout::KVM_TSS as usize).unwrap();
    vm.create_irq_chip().unwrap();
    for cap in [KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_EXIT_ON_EMULATION_FAILURE] {
        let mut enable = kvm_enable_cap { cap, ..Default::default() };
        enable.args[0] = 1;
        // As the product: older kernels have neither.
        let _ = vm.enable_cap(&enable);
    }
    for slot in ram.slots() {
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags: 0,
            guest_phys_addr: slot.guest_phys_addr,
            memory_size: slot.memory_size,
            userspace_addr: slot.userspace_addr,
        };
        // SAFETY: the range is a mapping of `ram`, which the vCPUs and the rig keep alive.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
    }
    (vm, ram)
}

pub(crate) fn vcpu(vm: &VmFd, n: u32, cpus: u32, begin: Begin) -> VcpuFd {
    let kvm = Kvm::new().unwrap();
    let fd = vm.create_vcpu(n.into()).unwrap();
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    let entries = vcpu_entries(supported.as_slice(), n, Topology { cpus, tsc_deadline: true });
    fd.set_cpuid2(&CpuId::from_entries(&entries).unwrap()).unwrap();
    let start = match begin {
        Begin::Ring0(property) => fixture::start(property, n),
        Begin::Ring3(property) => fixture::start_in_ring_3(property, n),
        Begin::WaitForSipi => return fd,
    };
    enable_lapic(&fd);
    place(&fd, &start.expect("a property of the fixture"));
    fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
    fd
}

/// A local APIC takes no interrupts before its spurious-interrupt register says so.
fn enable_lapic(fd: &VcpuFd) {
    const SPURIOUS: usize = 0xf0;
    let mut lapic = fd.get_lapic().unwrap();
    for (byte, value) in lapic.regs[SPURIOUS..].iter_mut().zip(0x1ffu32.to_le_bytes()) {
        *byte = value as _;
    }
    fd.set_lapic(&lapic).unwrap();
}

fn place(fd: &VcpuFd, start: &Start) {
    let mut sregs = fd.get_sregs().unwrap();
    let ring = (start.cs & 3) as u8;
    let code = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: start.cs,
        type_: 11,
        present: 1,
        dpl: ring,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: start.ss, type_: 3, l: 0, db: 1, ..code };
    (sregs.cs, sregs.ss, sregs.ds, sregs.es) = (code, data, data, data);
    sregs.fs = kvm_segment { base: start.fs_base, ..data };
    sregs.gs = kvm_segment { base: start.gs_base, ..data };
    sregs.tr = kvm_segment {
        base: start.tss.base,
        limit: start.tss.limit.into(),
        selector: start.tr,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    sregs.ldt = kvm_segment { type_: 2, unusable: 1, ..Default::default() };
    sregs.gdt = kvm_dtable { base: start.gdt.base, limit: start.gdt.limit, ..Default::default() };
    sregs.idt = kvm_dtable { base: start.idt.base, limit: start.idt.limit, ..Default::default() };
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (start.cr0, start.cr3, start.cr4, start.efer);
    fd.set_sregs(&sregs).unwrap();
    fd.set_regs(&kvm_regs { rip: start.rip, rsp: start.rsp, rflags: start.rflags, ..Default::default() }).unwrap();
    for (index, data) in [(0xc000_0081, start.star), (0xc000_0082, start.lstar), (0xc000_0084, start.fmask)] {
        let msr = Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }]).unwrap();
        assert_eq!(fd.set_msrs(&msr).unwrap(), 1);
    }
}

/// KVM_GET_MP_STATE by file descriptor, from whatever thread; 0 if it worked.
pub(crate) fn read_mp_state(fd: RawFd) -> i32 {
    const KVM_GET_MP_STATE: libc::c_ulong = 0x8004_ae98;
    let mut state = kvm_mp_state::default();
    // SAFETY: the ioctl writes one `kvm_mp_state`; a bad descriptor is an error.
    unsafe { libc::ioctl(fd, KVM_GET_MP_STATE, &mut state) }
}

/// KVM_NMI by file descriptor; 0 if it worked.
pub(crate) fn send_nmi(fd: RawFd) -> i32 {
    const KVM_NMI: libc::c_ulong = 0xae9a;
    // SAFETY: the ioctl takes no argument; a bad descriptor is an error.
    unsafe { libc::ioctl(fd, KVM_NMI) }
}

/// Signals a thread that must still be there.
pub(crate) fn send_signal(thread: libc::pthread_t, signal: i32) {
    // SAFETY: the caller keeps the thread alive (and its coordinator, which joins it).
    let sent = unsafe { libc::pthread_kill(thread, signal) };
    assert_eq!(sent, 0);
}
