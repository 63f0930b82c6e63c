//! The virtual machine as KVM makes it, before any guest code runs: memory, interrupt
//! controllers, devices, vCPUs in their first state.
//!
//! Unsafe because KVM is given host memory to run the guest in.
#![allow(unsafe_code)]

pub(crate) mod chips;
mod ground;

use std::io;

use kvm_bindings::{
    CpuId, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_X86_TRIPLE_FAULT_EVENT,
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, KVM_MP_STATE_RUNNABLE,
    KVM_MSR_EXIT_REASON_FILTER, KVM_PIT_SPEAKER_DUMMY, Msrs, kvm_cpuid_entry2, kvm_enable_cap, kvm_lapic_state,
    kvm_mp_state, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd};

use crate::boot::{self, BootError, BootRequest, CpuState, Entry, layout};
use crate::cpuid::{self, Topology};
use crate::devices::{Console, Pc, serial, virtio};
use crate::memory::{GuestRam, Slot};
use crate::memslots::Change;
use crate::msrs;
use crate::state::{CpuidLeaf, MachineState, RestoreError};
use crate::vcpu::{ArmHook, KvmCpu};

pub use ground::KvmGround;

/// This host cannot run guests. Each says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// /dev/kvm is not there.
    #[error("/dev/kvm does not exist; load the kvm_intel or kvm_amd module, or enable virtualisation in the firmware")]
    NoKvm,
    /// /dev/kvm may not be opened.
    #[error(
        "no permission to open /dev/kvm; add yourself to its group (usually: sudo usermod -aG kvm $USER, then log in again)"
    )]
    Permission,
    /// /dev/kvm could not be opened for another reason.
    #[error("cannot open /dev/kvm: {0}; is another hypervisor using the processor's virtualisation?")]
    Open(io::Error),
    /// This KVM lacks something without which nothing here works.
    #[error("this host's KVM has no {0}; a kernel of 5.10 or later on x86-64 has it")]
    Missing(&'static str),
    /// KVM allows fewer vCPUs.
    #[error("this host's KVM allows at most {max} vCPUs; ask for fewer than {asked}")]
    TooManyVcpus {
        /// What was asked for.
        asked: u32,
        /// What KVM allows.
        max: usize,
    },
    /// A step of making the machine failed.
    #[error("KVM refused to {step}: {error}")]
    Setup {
        /// What was being done.
        step: &'static str,
        /// What it said.
        error: io::Error,
    },
}

fn setup<T>(step: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, HostError> {
    result.map_err(|error| HostError::Setup { step, error: error.into() })
}

/// Opens /dev/kvm and looks for what the debugger cannot do without.
pub(crate) fn open_kvm() -> Result<Kvm, HostError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV => HostError::NoKvm,
        libc::EACCES | libc::EPERM => HostError::Permission,
        errno => HostError::Open(io::Error::from_raw_os_error(errno)),
    })?;
    for (cap, name) in [
        (Cap::Irqchip, "in-kernel interrupt controllers"),
        (Cap::Pit2, "in-kernel PIT"),
        (Cap::ImmediateExit, "immediate_exit"),
        (Cap::Debugregs, "access to debug registers"),
        (Cap::VcpuEvents, "access to vCPU events"),
        (Cap::MpState, "access to the MP state"),
        (Cap::SyncRegs, "registers in the kvm_run page"),
        (Cap::ExtCpuid, "CPUID control"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(HostError::Missing(name));
        }
    }
    Ok(kvm)
}

/// A machine whose vCPUs have not run yet.
pub(crate) struct Machine {
    pub(crate) vm: VmFd,
    pub(crate) cpus: Vec<KvmCpu>,
    pub(crate) pc: Pc,
    /// What CPUID answers, for each vCPU.
    pub(crate) cpuid: Vec<Vec<CpuidLeaf>>,
    pub(crate) entry: Entry,
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error("{0}")]
    Device(String),
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

impl Machine {
    /// Makes a machine around `ram`, with the kernel loaded and every vCPU in its first state.
    pub(crate) fn new(
        ram: &GuestRam,
        request: &BootRequest<'_>,
        console: Console,
        virtio: &virtio::Devices,
        arm_hook: impl Fn(u32) -> Option<ArmHook>,
    ) -> Result<Self, MachineError> {
        // Everything that is wrong with the input is said before anything is asked of the host.
        let entry = boot::load_with(ram, request, &virtio.places())?;
        let kvm = open_kvm()?;
        let (vm, pc) = without_cpus(&kvm, ram, request.cpus, console, virtio)?;
        let supported = setup("list its CPUID", kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))?;
        let topology = Topology { cpus: request.cpus, tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer) };
        let (mut cpus, mut cpuid) = (Vec::new(), Vec::new());
        for n in 0..request.cpus {
            let fd = setup("create a vCPU", vm.create_vcpu(n.into()))?;
            let state = if n == 0 { Some(entry.bsp) } else { boot::ap_state(request.ap_start, n) };
            let entries = cpuid::vcpu_entries(supported.as_slice(), n, topology);
            init_vcpu(&fd, &entries, state)?;
            cpuid.push(entries.iter().map(CpuidLeaf::from).collect());
            cpus.push(KvmCpu::new(fd, pc.bus.clone(), ram.clone(), arm_hook(n)));
        }
        Ok(Self { vm, cpus, pc, cpuid, entry })
    }

    /// Makes a machine around `ram` for vCPUs that were saved, with their CPUID and nothing else of them.
    pub(crate) fn for_state(
        ram: &GuestRam,
        state: &MachineState,
        console: Console,
        virtio: &virtio::Devices,
        arm_hook: impl Fn(u32) -> Option<ArmHook>,
    ) -> Result<Self, MachineError> {
        let kvm = open_kvm()?;
        let supported = setup("list its CPUID", kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))?;
        let supported: Vec<CpuidLeaf> = supported.as_slice().iter().map(CpuidLeaf::from).collect();
        state.check_host(&supported)?;
        let (vm, pc) = without_cpus(&kvm, ram, state.cpuid.len() as u32, console, virtio)?;
        let mut cpus = Vec::new();
        for (n, cpuid) in (0..).zip(&state.cpuid) {
            let fd = setup("create a vCPU", vm.create_vcpu(n.into()))?;
            let entries: Vec<kvm_cpuid_entry2> = cpuid.iter().map(kvm_cpuid_entry2::from).collect();
            set_cpuid(&fd, &entries)?;
            cpus.push(KvmCpu::new(fd, pc.bus.clone(), ram.clone(), arm_hook(n)));
        }
        Ok(Self { vm, cpus, pc, cpuid: state.cpuid.clone(), entry: state.entry.clone() })
    }
}

/// A virtual machine with memory and devices.
fn without_cpus(
    kvm: &Kvm,
    ram: &GuestRam,
    cpus: u32,
    console: Console,
    virtio: &virtio::Devices,
) -> Result<(VmFd, Pc), MachineError> {
    let max = kvm.get_max_vcpus();
    if cpus as usize > max {
        return Err(HostError::TooManyVcpus { asked: cpus, max }.into());
    }
    let vm = new_vm(kvm)?;
    for slot in ram.slots() {
        set_memory_region(&vm, ram, Change { slot, read_only: false })
            .map_err(|error| HostError::Setup { step: "map guest memory", error })?;
    }
    let pc = Pc::new(ram, cpus as u8, console, virtio).map_err(|error| MachineError::Device(error.to_string()))?;
    let irq = pc.com1.lock().irq().map_err(|error| MachineError::Device(error.to_string()))?;
    setup("connect the console's interrupt", vm.register_irqfd(&irq, serial::COM1_IRQ))?;
    for device in virtio.iter() {
        connect(&vm, device)?;
    }
    Ok((vm, pc))
}

fn set_cpuid(fd: &VcpuFd, cpuid: &[kvm_cpuid_entry2]) -> Result<(), HostError> {
    let cpuid = CpuId::from_entries(cpuid)
        .map_err(|_| HostError::Setup { step: "set a vCPU's CPUID", error: io::ErrorKind::OutOfMemory.into() })?;
    setup("set a vCPU's CPUID", fd.set_cpuid2(&cpuid))
}

/// Interrupt and kick of a virtio device go through KVM alone (KVM API 4.75, 4.59).
fn connect(vm: &VmFd, device: &virtio::Device) -> Result<(), HostError> {
    setup("connect a virtio device's interrupt", vm.register_irqfd(device.irq(), device.place.gsi))?;
    let notify = IoEventAddress::Mmio(device.place.address + virtio::NOTIFY);
    setup("connect a virtio device's kick", vm.register_ioevent(device.kick(), &notify, 0u32))
}

/// KVM_SET_USER_MEMORY_REGION (KVM API 4.35), for a slot that maps a part of `ram`.
pub(crate) fn set_memory_region(vm: &VmFd, ram: &GuestRam, change: Change) -> io::Result<()> {
    let Change { slot, read_only } = change;
    let within = |whole: Slot| {
        let offset = slot.userspace_addr.checked_sub(whole.userspace_addr)?;
        (offset.checked_add(slot.memory_size)? <= whole.memory_size).then_some(())
    };
    if !ram.slots().into_iter().any(|whole| within(whole).is_some()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a memory slot outside of guest memory"));
    }
    let region = kvm_userspace_memory_region {
        slot: slot.slot,
        flags: if read_only { KVM_MEM_READONLY } else { 0 },
        guest_phys_addr: slot.guest_phys_addr,
        memory_size: slot.memory_size,
        userspace_addr: slot.userspace_addr,
    };
    // SAFETY: the range lies in a mapping of `ram`, as was just looked up. Every vCPU, the ground and
    // the `Vm` keep a clone of it, and nothing else lives in it.
    Ok(unsafe { vm.set_user_memory_region(region) }?)
}

/// The guest's writes to GS.base and LSTAR exit (KVM API 4.97, KVM_X86_SET_MSR_FILTER).
pub(crate) fn tell_msr_writes(vm: &VmFd) -> io::Result<()> {
    const FIRST: u32 = 0xc000_0080;
    const LSTAR: u32 = 0xc000_0082;
    const GS_BASE: u32 = 0xc000_0101;
    let mut enable = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..Default::default() };
    enable.args[0] = KVM_MSR_EXIT_REASON_FILTER.into();
    vm.enable_cap(&enable)?;
    let mut allowed = [0xff; 17];
    for msr in [LSTAR, GS_BASE] {
        let bit = msr - FIRST;
        allowed[bit as usize / 8] &= !(1 << (bit % 8));
    }
    let msr_count = allowed.len() as u32 * 8;
    let range = MsrFilterRange { flags: MsrFilterRangeFlags::WRITE, base: FIRST, msr_count, bitmap: &allowed };
    Ok(vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[range])?)
}

/// None of the guest's writes to MSRs exit.
pub(crate) fn tell_no_msr_writes(vm: &VmFd) -> io::Result<()> {
    Ok(vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[])?)
}

pub(crate) fn new_vm(kvm: &Kvm) -> Result<VmFd, HostError> {
    let vm = setup("create a virtual machine", kvm.create_vm())?;
    setup("place its identity map", vm.set_identity_map_address(layout::KVM_IDENTITY_MAP))?;
    setup("place its TSS", vm.set_tss_address(layout::KVM_TSS as usize))?;
    setup("create the interrupt controllers", vm.create_irq_chip())?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    setup("create the PIT", vm.create_pit2(pit))?;
    // Without the first, reading vCPU events changes them (KVM API 4.31); without the second,
    // upstream KVM also queues #UD for what it could not emulate; without the third, events leave out a
    // triple fault that is about to be reported. Older kernels have none of them.
    for cap in [KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_X86_TRIPLE_FAULT_EVENT] {
        let mut enable = kvm_enable_cap { cap, ..Default::default() };
        enable.args[0] = 1;
        if let Err(error) = vm.enable_cap(&enable) {
            tracing::debug!(cap, %error, "KVM capability not enabled");
        }
    }
    Ok(vm)
}

/// Sets everything of a vCPU that exists before its first instruction. Without a state it waits
/// for INIT and SIPI, as KVM made it.
fn init_vcpu(fd: &VcpuFd, cpuid: &[kvm_cpuid_entry2], state: Option<CpuState>) -> Result<(), HostError> {
    set_cpuid(fd, cpuid)?;
    for entry in msrs::boot_msrs() {
        let msr = Msrs::from_entries(&[entry])
            .map_err(|_| HostError::Setup { step: "set a vCPU's MSRs", error: io::ErrorKind::OutOfMemory.into() })?;
        // One at a time: an MSR that this host lacks must not keep the others from being set.
        if !matches!(fd.set_msrs(&msr), Ok(1)) {
            tracing::debug!(msr = format_args!("{:#x}", entry.index), "this host's KVM does not take the MSR");
        }
    }
    let mut lapic = setup("read a local APIC", fd.get_lapic())?;
    wire_lapic(&mut lapic);
    setup("set a local APIC", fd.set_lapic(&lapic))?;
    if let Some(state) = state {
        let sregs = setup("read a vCPU's registers", fd.get_sregs())?;
        setup("set a vCPU's system registers", fd.set_sregs(&boot::system_registers(&state, &sregs)))?;
        setup("set a vCPU's registers", fd.set_regs(&boot::registers(&state)))?;
        setup("make a vCPU runnable", fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }))?;
    }
    Ok(())
}

/// LINT0 takes the PIC's interrupts and LINT1 is NMI, as firmware leaves them (MP specification 5.1).
fn wire_lapic(lapic: &mut kvm_lapic_state) {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const EXTINT: u32 = 0x700;
    const NMI: u32 = 0x400;
    for (offset, mode) in [(LVT_LINT0, EXTINT), (LVT_LINT1, NMI)] {
        for (byte, value) in lapic.regs[offset..offset + 4].iter_mut().zip(mode.to_le_bytes()) {
            *byte = value as _;
        }
    }
}
