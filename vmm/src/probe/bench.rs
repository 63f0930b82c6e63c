//! A bare virtual machine with one vCPU, as KVM makes it: what the probe's guests run on.
//!
//! Not the product's machine and coordinator: those mend what KVM does, and the question is what
//! it does raw. Unsafe because KVM is given host memory to run the guest in.
#![allow(unsafe_code)]

use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_INJECT_DB,
    KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY,
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVM_VCPUEVENT_VALID_SHADOW, kvm_debugregs, kvm_dtable, kvm_guest_debug,
    kvm_guest_debug_arch, kvm_lapic_state, kvm_mp_state, kvm_msi, kvm_regs, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region, kvm_vcpu_events,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};

use super::alarm::Alarm;
use super::capabilities::Claims;
use super::guests::{CODE, DATA, END_PORT, Guest, READONLY, UNBACKED, VECTOR_PORT};
use super::{ProbeError, Unclear};
use crate::cpuid::{self, Topology};
use crate::limits::{MIN_MEMORY, PAGE_SIZE, PROBE_RUN};
use crate::machine::{new_vm, open_kvm};
use crate::memory::GuestRam;
use crate::vcpu::kick;

const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
/// For each vector, [`HANDLER_SIZE`] bytes of code that write its number to [`VECTOR_PORT`].
const HANDLERS: u64 = 0x4000;
const HANDLER_SIZE: u64 = 8;
const VECTORS: u64 = 0x48;
/// Four levels of page tables; the last maps 2 MiB, each page to itself.
const PAGE_TABLES: u64 = 0x6000;
const KERNEL_STACK: u64 = 0x3_0000;
const USER_STACK: u64 = 0x2_0000;

const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x10;
const USER_DATA: u16 = 0x18 | 3;
const USER_CODE: u16 = 0x20 | 3;
const TASK: u16 = 0x28;

/// PE, MP, ET, NE, WP, PG.
const CR0: u64 = 0x8001_0033;
/// DE, PAE.
const CR4: u64 = 0x28;
/// LME, LMA.
const EFER: u64 = 0x500;
/// The bit that is always 1; user code gets I/O privilege level 3, so that it may end by an OUT.
const KERNEL_FLAGS: u64 = 0x2;
const USER_FLAGS: u64 = 0x3002;
const DR7_FIXED: u64 = 0x400;
const DR7_GD: u64 = 1 << 13;
const DR6_RESET: u64 = 0xffff_0ff0;

/// The privilege level that a guest begins in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ring {
    Kernel,
    User,
}

/// What a slot is armed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum On {
    Execute,
    /// Eight bytes.
    Write,
    /// Eight bytes.
    Access,
}

/// One KVM_SET_GUEST_DEBUG.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Debug {
    flags: u32,
    addresses: [u64; 4],
    dr7: u64,
}

impl Debug {
    /// These slots, from number 0 on.
    pub(super) fn slots(slots: &[(u64, On)]) -> Self {
        let mut debug = Self { flags: KVM_GUESTDBG_USE_HW_BP, addresses: [0; 4], dr7: DR7_FIXED };
        for (n, ((address, on), into)) in slots.iter().zip(&mut debug.addresses).enumerate() {
            *into = *address;
            // R/W in bits 0-1, LEN in bits 2-3 (10: eight bytes).
            let kind: u64 = match on {
                On::Execute => 0b0000,
                On::Write => 0b1001,
                On::Access => 0b1011,
            };
            debug.dr7 |= 0b10 << (2 * n) | kind << (16 + 4 * n);
        }
        debug
    }

    pub(super) fn step() -> Self {
        Self { flags: KVM_GUESTDBG_SINGLESTEP, ..Self::default() }
    }

    pub(super) fn step_without_interrupts() -> Self {
        Self { flags: KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ, ..Self::default() }
    }

    pub(super) fn software_breakpoints() -> Self {
        Self { flags: KVM_GUESTDBG_USE_SW_BP, ..Self::default() }
    }

    pub(super) fn inject_bp() -> Self {
        Self { flags: KVM_GUESTDBG_INJECT_BP, ..Self::default() }
    }

    pub(super) fn inject_db() -> Self {
        Self { flags: KVM_GUESTDBG_INJECT_DB, ..Self::default() }
    }

    /// With DR7.GD.
    pub(super) fn guarded(self) -> Self {
        Self { dr7: self.dr7 | DR7_GD, ..self }
    }
}

/// How a run of a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// It came to its last instruction.
    End,
    /// It was interrupted by this exception or vector.
    Vector(u8),
    Debug {
        exception: u32,
        pc: u64,
        dr6: u64,
    },
    MmioRead {
        address: u64,
    },
    MmioWrite {
        address: u64,
        data: Vec<u8>,
    },
    Shutdown,
    InternalError,
    /// The alarm ended it.
    TooLong,
    Other(String),
}

pub(super) struct Bench {
    // Dropped in this order: the memory goes last.
    vcpu: VcpuFd,
    vm: VmFd,
    ram: GuestRam,
    /// Where the guests' code lies.
    low: kvm_userspace_memory_region,
    sregs: kvm_sregs,
    lapic: kvm_lapic_state,
    alarm: Alarm,
    claims: Claims,
    ran_late: bool,
}

impl Bench {
    pub(super) fn new(alarm: Alarm) -> Result<Self, ProbeError> {
        let kvm = open_kvm()?;
        let vm = new_vm(&kvm)?;
        let ram = GuestRam::new(MIN_MEMORY).map_err(|error| ProbeError::Memory(error.to_string()))?;
        let host = ram.slots().first().map_or(0, |slot| slot.userspace_addr);
        let parts = [(0, READONLY, 0), (READONLY, PAGE_SIZE, KVM_MEM_READONLY), (READONLY + PAGE_SIZE, 0, 0)];
        let mut low = kvm_userspace_memory_region::default();
        for (slot, (start, size, flags)) in (0..).zip(parts) {
            let size = if size == 0 { UNBACKED - start } else { size };
            let region = kvm_userspace_memory_region {
                slot,
                flags: if kvm.check_extension(Cap::ReadonlyMem) { flags } else { 0 },
                guest_phys_addr: start,
                memory_size: size,
                userspace_addr: host + start,
            };
            // SAFETY: the three ranges lie in the one mapping of `ram` (UNBACKED is below its end), which the bench
            // keeps until `vm` and `vcpu` are gone; nothing else lives in it.
            unsafe { vm.set_user_memory_region(region) }.map_err(refused("map the probe's memory"))?;
            if slot == 0 {
                low = region;
            }
        }
        let mut vcpu = vm.create_vcpu(0).map_err(refused("create a vCPU"))?;
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("list its CPUID"))?;
        let topology = Topology { cpus: 1, tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer) };
        let cpuid = CpuId::from_entries(&cpuid::vcpu_entries(supported.as_slice(), 0, topology))
            .map_err(|_| ProbeError::Memory("too many CPUID entries".to_owned()))?;
        vcpu.set_cpuid2(&cpuid).map_err(refused("set a vCPU's CPUID"))?;
        let sregs = vcpu.get_sregs().map_err(refused("read a vCPU's registers"))?;
        let mut lapic = vcpu.get_lapic().map_err(refused("read a local APIC"))?;
        // The spurious-interrupt vector register: the local APIC is on.
        for (byte, value) in lapic.regs[0xf0..0xf4].iter_mut().zip(0x1ffu32.to_le_bytes()) {
            *byte = value as _;
        }
        kick::receive(vcpu.get_kvm_run());
        let claims = claims(&kvm);
        let bench = Self { vcpu, vm, ram, low, sregs, lapic, alarm, claims, ran_late: false };
        bench.write_tables().map_err(|Unclear(what)| ProbeError::Memory(what))?;
        Ok(bench)
    }

    pub(super) fn claims(&self) -> Claims {
        self.claims
    }

    /// Whether a guest had to be ended that should have ended by itself.
    pub(super) fn ran_late(&self) -> bool {
        self.ran_late
    }

    /// Puts `guest` into memory and the vCPU before its first instruction, with nothing armed or pending.
    pub(super) fn begin(&mut self, ring: Ring, guest: &Guest) -> Result<(), Unclear> {
        // What the last guest's exit left to be completed is completed now, or it would be later.
        self.vcpu.set_kvm_immediate_exit(1);
        let _ = self.vcpu.run();
        self.vcpu.set_kvm_immediate_exit(0);
        let mut code = vec![0; PAGE_SIZE as usize];
        let bytes = guest.bytes();
        code[..bytes.len()].copy_from_slice(&bytes);
        self.write(CODE, &code)?;
        self.write(DATA, &[0; 8])?;
        self.arm(Debug::default())?;
        self.vcpu.set_lapic(&self.lapic).map_err(unclear("reset the local APIC"))?;
        let runnable = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
        self.vcpu.set_mp_state(runnable).map_err(unclear("make the vCPU runnable"))?;
        self.vcpu.set_sregs(&system_registers(&self.sregs, ring)).map_err(unclear("set system registers"))?;
        let (rflags, rsp) = match ring {
            Ring::Kernel => (KERNEL_FLAGS, KERNEL_STACK),
            Ring::User => (USER_FLAGS, USER_STACK),
        };
        let regs = kvm_regs { rip: guest.at(0), rsp, rflags, ..Default::default() };
        self.vcpu.set_regs(&regs).map_err(unclear("set registers"))?;
        let debug = kvm_debugregs { dr6: DR6_RESET, dr7: DR7_FIXED, ..Default::default() };
        self.vcpu.set_debug_regs(&debug).map_err(unclear("set debug registers"))?;
        let none = kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_SHADOW, ..Default::default() };
        self.vcpu.set_vcpu_events(&none).map_err(unclear("clear what is pending"))
    }

    pub(super) fn arm(&self, debug: Debug) -> Result<(), Unclear> {
        let mut arch = kvm_guest_debug_arch::default();
        arch.debugreg[..4].copy_from_slice(&debug.addresses);
        arch.debugreg[7] = debug.dr7;
        let enable = if debug.flags == 0 { 0 } else { KVM_GUESTDBG_ENABLE };
        let control = debug.flags | enable;
        self.vcpu
            .set_guest_debug(&kvm_guest_debug { control, arch, ..Default::default() })
            .map_err(unclear(&format!("take guest debug flags {control:#x}")))
    }

    /// Runs the guest until it exits; a kick ends what takes too long.
    pub(super) fn run(&mut self) -> Exit {
        let exit = self.run_for(PROBE_RUN);
        self.ran_late |= exit == Exit::TooLong;
        exit
    }

    pub(super) fn run_for(&mut self, limit: Duration) -> Exit {
        self.alarm.set(limit);
        let exit = loop {
            match self.vcpu.run() {
                Ok(exit) => break exit.into(),
                Err(error) if error.errno() == libc::EAGAIN => {}
                Err(error) if error.errno() == libc::EINTR => {
                    if self.alarm.rang() {
                        break Exit::TooLong;
                    }
                    // Somebody else's signal.
                    self.vcpu.set_kvm_immediate_exit(0);
                }
                Err(error) => break Exit::Other(format!("KVM_RUN failed: {error}")),
            }
        };
        self.alarm.unset();
        self.vcpu.set_kvm_immediate_exit(0);
        exit
    }

    /// Arms single-step and runs, over exits that have made no progress; how many of those there were.
    ///
    /// `shadow` sets the interrupt shadow before, as after STI.
    pub(super) fn step(&mut self, shadow: bool) -> Result<(Exit, u32), Unclear> {
        const PATIENCE: u32 = 16;
        let start = self.rip()?;
        for extra in 0..PATIENCE {
            if shadow {
                self.set_shadow()?;
            }
            self.arm(Debug::step())?;
            let exit = self.run();
            if !matches!(exit, Exit::Debug { pc, .. } if pc == start) {
                return Ok((exit, extra));
            }
        }
        Err(Unclear(format!("{PATIENCE} exits without progress")))
    }

    pub(super) fn rip(&self) -> Result<u64, Unclear> {
        Ok(self.regs()?.rip)
    }

    pub(super) fn regs(&self) -> Result<kvm_regs, Unclear> {
        self.vcpu.get_regs().map_err(unclear("read registers"))
    }

    pub(super) fn set_regs(&self, change: impl FnOnce(&mut kvm_regs)) -> Result<(), Unclear> {
        let mut regs = self.regs()?;
        change(&mut regs);
        self.vcpu.set_regs(&regs).map_err(unclear("set registers"))
    }

    /// DR0-3, DR6, DR7 of the guest's own.
    pub(super) fn debug_registers(&self) -> Result<kvm_debugregs, Unclear> {
        self.vcpu.get_debug_regs().map_err(unclear("read debug registers"))
    }

    pub(super) fn set_dr6(&self, dr6: u64) -> Result<(), Unclear> {
        let debug = kvm_debugregs { dr6, ..self.debug_registers()? };
        self.vcpu.set_debug_regs(&debug).map_err(unclear("set debug registers"))
    }

    pub(super) fn is_halted(&self) -> Result<bool, Unclear> {
        let state = self.vcpu.get_mp_state().map_err(unclear("read the vCPU's state"))?;
        Ok(state.mp_state == KVM_MP_STATE_HALTED)
    }

    /// Gives the guest an exception without an error code, as it is at its present RIP.
    pub(super) fn inject(&self, vector: u8) -> Result<(), Unclear> {
        let mut events = self.vcpu.get_vcpu_events().map_err(unclear("read events"))?;
        (events.exception.injected, events.exception.nr) = (1, vector);
        self.vcpu.set_vcpu_events(&events).map_err(unclear("set events"))
    }

    /// Takes the guests' code away and gives it back: KVM forgets what it has mapped of it.
    pub(super) fn map_again(&self) -> Result<(), Unclear> {
        let none = kvm_userspace_memory_region { memory_size: 0, ..self.low };
        // SAFETY: an empty range refers to no memory.
        unsafe { self.vm.set_user_memory_region(none) }.map_err(unclear("unmap memory"))?;
        // SAFETY: as it was mapped at first, and `ram` is still there.
        unsafe { self.vm.set_user_memory_region(self.low) }.map_err(unclear("map memory"))
    }

    /// Whether the instruction at RIP is in the shadow of STI or MOV SS.
    pub(super) fn has_shadow(&self) -> Result<bool, Unclear> {
        let events = self.vcpu.get_vcpu_events().map_err(unclear("read events"))?;
        Ok(events.interrupt.shadow != 0)
    }

    fn set_shadow(&self) -> Result<(), Unclear> {
        let mut events = self.vcpu.get_vcpu_events().map_err(unclear("read events"))?;
        events.interrupt.shadow = 1;
        events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
        self.vcpu.set_vcpu_events(&events).map_err(unclear("set events"))
    }

    /// Makes an interrupt wait at the local APIC.
    pub(super) fn interrupt(&self, vector: u8) -> Result<(), Unclear> {
        let msi = kvm_msi { address_lo: 0xfee0_0000, data: vector.into(), ..Default::default() };
        match self.vm.signal_msi(msi) {
            Ok(1..) => Ok(()),
            Ok(_) => Err(Unclear("the interrupt was not delivered".to_owned())),
            Err(error) => Err(unclear("deliver an interrupt")(error)),
        }
    }

    pub(super) fn read_u64(&self, address: u64) -> Result<u64, Unclear> {
        self.ram.mem().read_obj(GuestAddress(address)).map_err(|error| Unclear(format!("guest memory: {error}")))
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Unclear> {
        let memory = self.ram.mem();
        memory.write_slice(bytes, GuestAddress(address)).map_err(|error| Unclear(format!("guest memory: {error}")))
    }

    /// What stands on the stack of the handler that has just written its vector: the interrupted RIP.
    pub(super) fn frame_rip(&self) -> Result<u64, Unclear> {
        self.read_u64(self.regs()?.rsp)
    }

    /// Whether `pc` is in the handler of `vector`.
    pub(super) fn in_handler(&self, pc: u64, vector: u8) -> bool {
        let handler = HANDLERS + u64::from(vector) * HANDLER_SIZE;
        (handler..handler + HANDLER_SIZE).contains(&pc)
    }

    fn write_tables(&self) -> Result<(), Unclear> {
        let put = |address: u64, value: u64| self.write(address, &value.to_le_bytes());
        let task = 0x0000_8900_0000_0067 | (TSS & 0xff_ffff) << 16;
        let gdt = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff, task];
        for (n, descriptor) in (0..).zip(gdt) {
            put(GDT + 8 * n, descriptor)?;
        }
        put(GDT + 8 * gdt.len() as u64, TSS >> 32)?;
        // RSP0.
        put(TSS + 4, KERNEL_STACK)?;
        for vector in 0..VECTORS {
            let handler = HANDLERS + vector * HANDLER_SIZE;
            // mov al, vector; out 0xf5, al
            self.write(handler, &[0xb0, vector as u8, 0xe6, VECTOR_PORT as u8])?;
            // A present interrupt gate that every privilege level may call.
            put(
                IDT + 16 * vector,
                handler & 0xffff | u64::from(KERNEL_CODE) << 16 | 0xee00 << 32 | (handler >> 16) << 48,
            )?;
            put(IDT + 16 * vector + 8, 0)?;
        }
        const PRESENT_WRITABLE_USER: u64 = 7;
        for level in 0..3 {
            let table = PAGE_TABLES + level * PAGE_SIZE;
            put(table, (table + PAGE_SIZE) | PRESENT_WRITABLE_USER)?;
        }
        for page in 0..MIN_MEMORY / PAGE_SIZE {
            put(PAGE_TABLES + 3 * PAGE_SIZE + 8 * page, (page * PAGE_SIZE) | PRESENT_WRITABLE_USER)?;
        }
        Ok(())
    }

    /// Leaves the guest without exception handlers.
    pub(super) fn drop_handlers(&self) -> Result<(), Unclear> {
        let mut sregs = self.vcpu.get_sregs().map_err(unclear("read system registers"))?;
        sregs.idt.limit = 0;
        self.vcpu.set_sregs(&sregs).map_err(unclear("set system registers"))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        kick::receive(std::ptr::null_mut());
    }
}

impl From<VcpuExit<'_>> for Exit {
    fn from(exit: VcpuExit<'_>) -> Self {
        match exit {
            VcpuExit::IoOut(END_PORT, _) => Exit::End,
            VcpuExit::IoOut(VECTOR_PORT, [vector, ..]) => Exit::Vector(*vector),
            VcpuExit::Debug(debug) => Exit::Debug { exception: debug.exception, pc: debug.pc, dr6: debug.dr6 },
            VcpuExit::MmioRead(address, data) => {
                data.fill(0);
                Exit::MmioRead { address }
            }
            VcpuExit::MmioWrite(address, data) => Exit::MmioWrite { address, data: data.to_vec() },
            VcpuExit::Shutdown => Exit::Shutdown,
            VcpuExit::InternalError => Exit::InternalError,
            other => Exit::Other(format!("{other:?}")),
        }
    }
}

fn claims(kvm: &Kvm) -> Claims {
    let number = |cap: u32| u32::try_from(kvm.check_extension_raw(cap.into())).unwrap_or(0);
    let guest_debug = number(kvm_bindings::KVM_CAP_SET_GUEST_DEBUG) != 0;
    let flags = number(kvm_bindings::KVM_CAP_SET_GUEST_DEBUG2);
    // Linux before 5.13 had these three and no way to say so.
    let old = guest_debug && flags == 0;
    Claims {
        guest_debug,
        guest_debug_flags: flags,
        hardware_breakpoints: old || flags & KVM_GUESTDBG_USE_HW_BP != 0,
        software_breakpoints: old || flags & KVM_GUESTDBG_USE_SW_BP != 0,
        single_step: old || flags & KVM_GUESTDBG_SINGLESTEP != 0,
        block_irq: flags & KVM_GUESTDBG_BLOCKIRQ != 0,
        readonly_memory: number(kvm_bindings::KVM_CAP_READONLY_MEM) != 0,
        exception_payload: number(kvm_bindings::KVM_CAP_EXCEPTION_PAYLOAD) != 0,
        exit_on_emulation_failure: number(kvm_bindings::KVM_CAP_EXIT_ON_EMULATION_FAILURE) != 0,
        dirty_ring: number(kvm_bindings::KVM_CAP_DIRTY_LOG_RING)
            .max(number(kvm_bindings::KVM_CAP_DIRTY_LOG_RING_ACQ_REL)),
    }
}

fn system_registers(current: &kvm_sregs, ring: Ring) -> kvm_sregs {
    let segment = |selector: u16, type_: u8, l: u8| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: (selector & 3) as u8,
        db: 1 - l,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    };
    let (code, data) = match ring {
        Ring::Kernel => (KERNEL_CODE, KERNEL_DATA),
        Ring::User => (USER_CODE, USER_DATA),
    };
    let data = segment(data, 3, 0);
    kvm_sregs {
        cs: segment(code, 11, 1),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        // A busy 64-bit TSS: VM entry takes no other (SDM 3C 26.3.1.2).
        tr: kvm_segment { base: TSS, limit: 0x67, selector: TASK, type_: 11, present: 1, ..Default::default() },
        ldt: kvm_segment { type_: 2, unusable: 1, ..Default::default() },
        gdt: kvm_dtable { base: GDT, limit: 0x37, ..Default::default() },
        idt: kvm_dtable { base: IDT, limit: (16 * VECTORS - 1) as u16, ..Default::default() },
        cr0: CR0,
        cr2: 0,
        cr3: PAGE_TABLES,
        cr4: CR4,
        cr8: 0,
        efer: EFER,
        interrupt_bitmap: [0; 4],
        ..*current
    }
}

fn refused(step: &'static str) -> impl Fn(kvm_ioctls::Error) -> ProbeError {
    move |error| ProbeError::Host(crate::HostError::Setup { step, error: error.into() })
}

fn unclear(step: &str) -> impl Fn(kvm_ioctls::Error) -> Unclear {
    move |error| Unclear(format!("KVM refused to {step}: {error}"))
}
