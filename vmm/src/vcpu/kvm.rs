//! A vCPU as KVM has it: every ioctl on a vCPU file descriptor is in this file.
//!
//! Unsafe because what an exit means is read from the `kvm_run` page, a C union that the kernel
//! fills in.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr;
use std::slice;
use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_OUT,
    KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_X86_WRMSR, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_INJECT_DB, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP, KVM_INTERNAL_ERROR_EMULATION, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_SHADOW, Msrs, kvm_dtable, kvm_guest_debug,
    kvm_guest_debug_arch, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_run, kvm_segment, kvm_sregs, kvm_vcpu_events,
    kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::dr_writes::{DrWrites, take_write};
use super::stats::Counter;
use super::synced::SyncedFd;
use super::xsave::{put_fpu, to_fpu};
use super::{Activity, Arming, Cpu, DescriptorTable, Exit, Fpu, Raised, Registers, Ring3, Segment, Standing, kick};
use crate::debug::{
    Crash, DebugExit, DebugImage, Dr6, GENERAL_DETECT, General, GuestRegisters, PortAccess, PortHandler, StopReason,
};
use crate::devices::{Bus, DeviceEvent};
use crate::limits::LOOK_INTERVAL;
use crate::memory::{DeviceStore, GuestRam};
use crate::paging::{Access, Paging, exchange_physical, read_physical, write_all_physical};
use crate::probe::{Step, StickyStep};
use crate::state::VcpuState;

const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_FMASK: u32 = 0xc000_0084;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;

/// INT1, which raises #DB without any cause bit.
const INT1: u8 = 0xf1;
const HLT: u8 = 0xf4;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RF: u64 = 1 << 16;
const CR4_CET: u64 = 1 << 23;
/// Most bytes of one instruction.
const MAX_INSTRUCTION: usize = 15;

/// Guest debugging with nothing armed. It is never off: with it off, KVM leaves the debug registers to the guest
/// at the first access, from before the next entry on. If the vCPU is kicked in between and armed, the guest
/// reads our registers as its own, and KVM takes them for the guest's (seen with kvm_amd of Linux 6.1).
const QUIET: u32 = KVM_GUESTDBG_ENABLE;

/// So many exits behind a trap bring the registers along: one is seldom alone, and other exits are no dearer for what is
/// armed.
const FRESH_EXITS: u32 = 16;

/// A hook that tests use to make the arming of a vCPU fail.
pub type ArmHook = Arc<dyn Fn(&Arming) -> io::Result<()> + Send + Sync>;

/// One vCPU on KVM.
pub struct KvmCpu {
    pub(super) fd: SyncedFd,
    bus: Arc<Bus>,
    ram: GuestRam,
    arm_hook: Option<ArmHook>,
    /// Its patches are not shown.
    hidden: DebugImage,
    /// Its own timer, once it was needed.
    timer: Option<kick::Timer>,
    /// Kicks at what its guest writes to debug registers, once they were needed; not every host has them.
    dr_writes: Option<io::Result<DrWrites>>,
    /// KVM's count of emulated accesses, once it was needed, if it has one.
    emulated_faults: Option<Option<Counter>>,
    /// The last exit, if it was a trap.
    trapped: Option<DebugExit>,
    /// It was runnable when it was looked at, and was not entered since.
    awake: bool,
    /// What KVM was last told, and whether it goes on stepping ring 0 until it is told otherwise: not
    /// every KVM does, and who is not asked has not stepped yet.
    told: Option<Arming>,
    step_stays: Option<bool>,
}

impl KvmCpu {
    /// Takes over a vCPU whose initial state is set.
    pub fn new(fd: VcpuFd, bus: Arc<Bus>, ram: GuestRam, arm_hook: Option<ArmHook>) -> Self {
        Self {
            fd: SyncedFd::new(fd),
            bus,
            ram,
            arm_hook,
            hidden: DebugImage::default(),
            timer: None,
            dr_writes: None,
            emulated_faults: None,
            trapped: None,
            awake: false,
            told: None,
            step_stays: None,
        }
    }

    fn enter(&mut self) -> Exit {
        // The crate's own reading of the exit loses the width of string I/O and all of an
        // internal error, so the page is read here, once.
        (self.trapped, self.awake) = (None, false);
        let exit = match self.fd.run() {
            Ok(()) => self.parse(),
            Err(error) => match error.errno() {
                libc::EINTR => Exit::Kicked,
                libc::EAGAIN => Exit::Again,
                errno => Exit::Crash(Crash::RunFailed { errno }),
            },
        };
        if !matches!(exit, Exit::Kicked | Exit::Again | Exit::Served(_)) {
            self.fd.want(FRESH_EXITS);
        }
        exit
    }

    /// Turns the exit in the `kvm_run` page into an [`Exit`], serving what a device serves.
    fn parse(&mut self) -> Exit {
        let bus = Arc::clone(&self.bus);
        let run: *mut kvm_run = self.fd.get_kvm_run();
        // SAFETY: the page is mapped as long as `self.fd` lives, and the kernel writes it only
        // during KVM_RUN, which this thread is not in.
        let exit = unsafe { &mut *run };
        // What the union holds is said by `exit_reason`; each arm reads its own member only.
        let body = &mut exit.__bindgen_anon_1;
        match exit.exit_reason {
            KVM_EXIT_IO => {
                // SAFETY: KVM_EXIT_IO fills `io`.
                let io = unsafe { body.io };
                let len = usize::from(io.size) * io.count as usize;
                // SAFETY: the kernel puts the data at `data_offset` in the mapped area.
                let start = unsafe { run.cast::<u8>().add(io.data_offset as usize) };
                // SAFETY: `count * size` bytes of it, which nothing else refers to.
                let data = unsafe { slice::from_raw_parts_mut(start, len) };
                let write = u32::from(io.direction) == KVM_EXIT_IO_OUT;
                let exit = if write {
                    served(bus.pio_write_string(io.port, io.size.into(), data))
                } else {
                    bus.pio_read_string(io.port, io.size.into(), data);
                    Exit::Served(None)
                };
                match exit {
                    Exit::Served(None) if bus.port_handler(io.port).is_some() => {
                        let first = data.iter().take(usize::from(io.size).min(4)).rev();
                        let value = first.fold(0, |value, byte| value << 8 | u32::from(*byte));
                        let access = PortAccess { port: io.port, size: io.size, write, value };
                        Exit::Served(Some(StopReason::Port(access)))
                    }
                    exit => exit,
                }
            }
            KVM_EXIT_MMIO => {
                // SAFETY: KVM_EXIT_MMIO fills `mmio`.
                let mmio = unsafe { &mut body.mmio };
                let len = (mmio.len as usize).min(mmio.data.len());
                let data = &mut mmio.data[..len];
                if mmio.is_write != 0 {
                    // RAM that is read-only for the guest: a page with watchpoints on it (law 66).
                    if self.ram.mem().address_in_range(GuestAddress(mmio.phys_addr)) {
                        return Exit::Store { gpa: mmio.phys_addr, data: data.to_vec() };
                    }
                    served(bus.mmio_write(mmio.phys_addr, data))
                } else {
                    bus.mmio_read(mmio.phys_addr, data);
                    Exit::Served(None)
                }
            }
            KVM_EXIT_DEBUG => {
                // SAFETY: KVM_EXIT_DEBUG fills `debug`.
                let debug = unsafe { body.debug.arch };
                let exit = DebugExit { exception: debug.exception, pc: debug.pc, dr6: debug.dr6 };
                self.trapped = Some(exit);
                Exit::Debug(exit)
            }
            KVM_EXIT_X86_WRMSR => {
                // SAFETY: KVM_EXIT_X86_WRMSR fills `msr`.
                let msr = unsafe { &mut body.msr };
                let (index, data) = (msr.index, msr.data);
                // The filter says only that it is told; the guest gets what it asks for, or its #GP.
                msr.error = u8::from(!self.write_msr(index, data));
                let in_kernel = self.fd.get_regs().is_ok_and(|regs| regs.rip >> 63 == 1);
                Exit::Served(in_kernel.then_some(StopReason::KernelEntry))
            }
            KVM_EXIT_INTR => Exit::Kicked,
            KVM_EXIT_SHUTDOWN => Exit::Crash(Crash::TripleFault { state_lost: self.looks_reset() }),
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: KVM_EXIT_FAIL_ENTRY fills `fail_entry`.
                let reason = unsafe { body.fail_entry.hardware_entry_failure_reason };
                Exit::Crash(Crash::FailEntry { reason })
            }
            KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: KVM_EXIT_INTERNAL_ERROR fills `internal`.
                let suberror = unsafe { body.internal.suberror };
                if suberror != KVM_INTERNAL_ERROR_EMULATION {
                    return Exit::Crash(Crash::Internal { suberror });
                }
                // SAFETY: another view of the same words for this suberror.
                let failure = unsafe { body.emulation_failure };
                // SAFETY: plain bytes, valid whatever they are.
                let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
                let (size, bytes) = (usize::from(instruction.insn_size), instruction.insn_bytes);
                // Flag 0 says that the bytes are there; they need three words of `data`.
                let given = failure.flags & 1 != 0 && failure.ndata >= 3;
                let bytes = if given { bytes[..size.min(bytes.len())].to_vec() } else { self.bytes_at_pc() };
                Exit::Crash(Crash::EmulationFailure { bytes })
            }
            reason => Exit::Crash(Crash::UnknownExit { reason }),
        }
    }

    /// Writes one MSR for the guest; whether KVM took it.
    fn write_msr(&mut self, index: u32, data: u64) -> bool {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        let Ok(msr) = Msrs::from_entries(&[entry]) else { return false };
        matches!(self.fd.set_msrs(&msr), Ok(1))
    }

    /// What KVM_GET_STATS_FD gives.
    fn stats(&self) -> Option<File> {
        /// `_IO(KVMIO, 0xce)`.
        const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
        // SAFETY: it takes no argument, and gives a file descriptor or -1.
        let fd = unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_GET_STATS_FD, 0) };
        // SAFETY: a new file descriptor, which nobody else has.
        (fd >= 0).then(|| unsafe { File::from_raw_fd(fd) })
    }

    fn bytes_at_pc(&mut self) -> Vec<u8> {
        let mut bytes = vec![0; MAX_INSTRUCTION];
        let got = self.pc().map_or(0, |pc| self.read(pc, &mut bytes));
        bytes.truncate(got);
        bytes
    }

    /// SVM resets the vCPU before it reports a shutdown: then RIP stands at the reset vector.
    fn looks_reset(&self) -> bool {
        let (Ok(regs), Ok(sregs)) = (self.fd.get_regs(), self.fd.get_sregs()) else { return false };
        regs.rip == 0xfff0 && sregs.cs.base == 0xffff_0000
    }

    /// Whether it has just come out of the guest with a trap, and not behind a HLT: then it is
    /// runnable, and that costs no ioctl to know.
    fn has_just_trapped_awake(&mut self) -> bool {
        let Some(exit) = self.trapped.filter(|_| self.fd.is_fresh()) else { return false };
        let mut before = [HLT];
        !Dr6(exit.dr6).single_step() || self.read(exit.pc.wrapping_sub(1), &mut before) == 1 && before[0] != HLT
    }

    /// Whether the next instruction is stepped because the last one was (law 44).
    fn goes_on_stepping(&mut self) -> bool {
        let stays = *self.step_stays.get_or_insert_with(|| {
            crate::probe::capabilities().is_ok_and(|can| can.seen.ss_sticky == StickyStep::Stays)
        });
        // The probe has asked in ring 0.
        stays && self.fd.is_fresh() && self.fd.get_sregs().is_ok_and(|sregs| sregs.cs.dpl == 0)
    }

    fn paging(&self) -> io::Result<Paging> {
        Ok(paging_of(&self.fd.get_sregs()?))
    }

    /// Adds `flags` to one call that arms nothing; the caller arms again.
    fn inject(&mut self, flags: u32) -> io::Result<()> {
        self.told = None;
        Ok(self.fd.set_guest_debug(&kvm_guest_debug { control: flags, ..Default::default() })?)
    }

    fn msrs(&self) -> io::Result<[u64; 4]> {
        let entries = MSRS.map(|index| kvm_msr_entry { index, ..Default::default() });
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        self.fd.get_msrs(&mut msrs)?;
        let mut values = [0; 4];
        for (value, entry) in values.iter_mut().zip(msrs.as_slice()) {
            *value = entry.data;
        }
        Ok(values)
    }

    fn set_fpu(&self, fpu: &Fpu) -> io::Result<()> {
        let mut area = self.fd.get_xsave()?;
        put_fpu(&mut area.region, fpu);
        self.set_xsave(&area)
    }

    pub(super) fn set_xsave(&self, area: &kvm_xsave) -> io::Result<()> {
        // SAFETY: KVM reads more than this area only of a process that has asked for dynamic
        // features (arch_prctl ARCH_REQ_XCOMP_GUEST_PERM), which this one never does.
        Ok(unsafe { self.fd.set_xsave(area) }?)
    }

    /// Nothing that was known of it counts any more.
    pub(super) fn forget(&mut self) {
        self.fd.forget();
        (self.trapped, self.awake, self.told) = (None, false, None);
    }

    fn set_msrs(&mut self, values: [u64; 4]) -> io::Result<()> {
        let entries: Vec<_> = MSRS
            .into_iter()
            .zip(values)
            .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() })
            .collect();
        let msrs = Msrs::from_entries(&entries).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let set = self.fd.set_msrs(&msrs)?;
        if set == entries.len() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
    }

    /// Writes everything, in the order in which nothing undoes what came before (law 7).
    fn write_all(&mut self, wanted: &Registers, now: &Registers) -> io::Result<()> {
        if !same_system_registers(wanted, now) {
            // Pending interrupts and whatever the plain data leaves out stay as they are.
            let mut sregs = self.fd.get_sregs()?;
            put_system_registers(&mut sregs, wanted);
            self.fd.set_sregs(&sregs)?;
        }
        if !same_general_registers(wanted, now) {
            self.fd.set_regs(&general_registers(wanted))?;
        }
        if wanted.fpu != now.fpu {
            self.set_fpu(&wanted.fpu)?;
        }
        if msr_values(wanted) != msr_values(now) {
            self.set_msrs(msr_values(wanted))?;
        }
        if (wanted.dr, wanted.dr6, wanted.dr7) != (now.dr, now.dr6, now.dr7) {
            let mut debug = self.fd.get_debug_regs()?;
            (debug.db, debug.dr6, debug.dr7) = (wanted.dr, wanted.dr6, wanted.dr7);
            self.fd.set_debug_regs(&debug)?;
        }
        Ok(())
    }
}

impl Cpu for KvmCpu {
    fn begin(&mut self) {
        kick::receive(self.fd.get_kvm_run());
        if let Err(error) = self.fd.set_guest_debug(&kvm_guest_debug { control: QUIET, ..Default::default() }) {
            tracing::warn!(%error, "guest debugging cannot be switched on");
        }
    }

    fn clear_kick(&mut self) {
        self.fd.set_kvm_immediate_exit(0);
    }

    fn run(&mut self) -> Exit {
        self.enter()
    }

    fn complete(&mut self) -> Exit {
        self.fd.set_kvm_immediate_exit(1);
        let exit = self.enter();
        // A kick that came meanwhile is not lost: its sender repeats it, and the thread looks at
        // its inbox before it enters the guest again.
        self.fd.set_kvm_immediate_exit(0);
        exit
    }

    fn arm(&mut self, arming: &Arming) -> io::Result<()> {
        if let Some(hook) = &self.arm_hook {
            hook(arming)?;
        }
        if arming.step && self.told == Some(*arming) && self.goes_on_stepping() {
            return Ok(());
        }
        self.told = None;
        let mut control = QUIET;
        let has_slots = arming.dr7 != crate::debug::Dr7::NONE;
        // With either of these flags every #DB of the guest's own exits to us, so they are set
        // only while they are needed (law 5).
        if has_slots {
            control |= KVM_GUESTDBG_USE_HW_BP;
        }
        if arming.step {
            control |= KVM_GUESTDBG_SINGLESTEP;
        }
        if arming.int3 {
            control |= KVM_GUESTDBG_USE_SW_BP;
        }
        if arming.step && arming.block_irq {
            control |= KVM_GUESTDBG_BLOCKIRQ;
        }
        // As it will be behind a trap: a step is one.
        if arming.step {
            self.fd.want(FRESH_EXITS);
        }
        let mut arch = kvm_guest_debug_arch::default();
        arch.debugreg[..4].copy_from_slice(&arming.addresses);
        // Where it works, every access of the guest's to its own debug registers exits (law 31).
        arch.debugreg[7] = arming.dr7.bits() | if has_slots { GENERAL_DETECT } else { 0 };
        self.fd.set_guest_debug(&kvm_guest_debug { control, arch, ..Default::default() })?;
        self.told = Some(*arming);
        Ok(())
    }

    fn pc(&mut self) -> io::Result<u64> {
        let (regs, sregs) = (self.fd.get_regs()?, self.fd.get_sregs()?);
        Ok(regs.rip.wrapping_add(sregs.cs.base))
    }

    fn registers(&mut self) -> io::Result<Registers> {
        let mut registers = Registers::default();
        take_general_registers(&mut registers, &self.fd.get_regs()?);
        take_system_registers(&mut registers, &self.fd.get_sregs()?);
        registers.fpu = to_fpu(&self.fd.get_xsave()?.region);
        [registers.star, registers.lstar, registers.fmask, registers.kernel_gs_base] = self.msrs()?;
        let debug = self.fd.get_debug_regs()?;
        (registers.dr, registers.dr6, registers.dr7) = (debug.db, debug.dr6, debug.dr7);
        Ok(registers)
    }

    fn set_registers(&mut self, registers: &Registers) -> io::Result<()> {
        let before = self.registers()?;
        self.write_all(registers, &before).inspect_err(|_| {
            // Some of it may have been taken: put back what was, all of it.
            if let Ok(now) = self.registers() {
                let _ = self.write_all(&before, &now);
            }
        })
    }

    fn state(&mut self) -> io::Result<Registers> {
        let mut registers = Registers::default();
        take_general_registers(&mut registers, &self.fd.get_regs()?);
        take_system_registers(&mut registers, &self.fd.get_sregs()?);
        Ok(registers)
    }

    fn set_general(&mut self, registers: &Registers) -> io::Result<()> {
        Ok(self.fd.set_regs(&general_registers(registers))?)
    }

    fn activity(&mut self) -> io::Result<Activity> {
        if self.has_just_trapped_awake() {
            return Ok(Activity::Runnable);
        }
        Ok(match self.fd.get_mp_state()?.mp_state {
            KVM_MP_STATE_RUNNABLE => Activity::Runnable,
            KVM_MP_STATE_HALTED => Activity::Halted,
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => Activity::WaitForSipi,
            other => Activity::Other(other),
        })
    }

    fn halt(&mut self) -> io::Result<()> {
        self.awake = false;
        let mut regs = self.fd.get_regs()?;
        regs.rip = regs.rip.wrapping_add(1);
        self.fd.set_regs(&regs)?;
        // In the shadow of STI, as it usually is, no interrupt would ever wake it.
        self.end_shadow()?;
        Ok(self.fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_HALTED })?)
    }

    fn translate(&mut self, addr: u64) -> Option<u64> {
        Some(self.paging().ok()?.translate(self.ram.mem(), addr)?.gpa)
    }

    fn tables(&mut self, addr: u64) -> Vec<u64> {
        self.paging().map_or_else(|_| Vec::new(), |paging| paging.tables(self.ram.mem(), addr))
    }

    fn emulated_faults(&mut self) -> Option<u64> {
        if self.emulated_faults.is_none() {
            self.emulated_faults = Some(self.stats().and_then(|file| Counter::find(file, "pf_emulate")));
        }
        self.emulated_faults.as_ref()?.as_ref()?.value()
    }

    fn is_users(&mut self, addr: u64) -> bool {
        self.paging().is_ok_and(|paging| paging.translate(self.ram.mem(), addr).is_some_and(|mapping| mapping.user))
    }

    fn may_access(&mut self, addr: u64, len: usize, access: Access) -> bool {
        let Ok(sregs) = self.fd.get_sregs() else { return false };
        paging_of(&sregs).may_access(self.ram.mem(), addr, len, sregs.cs.dpl == 3, access)
    }

    fn read_physical(&mut self, gpa: u64, into: &mut [u8]) -> usize {
        read_physical(self.ram.mem(), gpa, into)
    }

    fn write_physical(&mut self, gpa: u64, bytes: &[u8]) -> bool {
        write_all_physical(self.ram.mem(), gpa, bytes)
    }

    fn hide(&mut self, patches_of: &DebugImage) {
        self.hidden = patches_of.clone();
    }

    fn read(&mut self, addr: u64, into: &mut [u8]) -> usize {
        let Ok(paging) = self.paging() else { return 0 };
        paging.read_shown(self.ram.mem(), addr, into, |gpa, bytes| self.hidden.hide_patches(gpa, bytes))
    }

    fn write(&mut self, addr: u64, bytes: &[u8]) -> bool {
        self.paging().is_ok_and(|paging| paging.write(self.ram.mem(), addr, bytes))
    }

    fn exchange(&mut self, gpa: u64, new: &[u8], old: &mut [u8]) -> usize {
        exchange_physical(self.ram.mem(), gpa, new, old)
    }

    fn device_stores(&mut self) -> Vec<DeviceStore> {
        self.ram.take_device_stores()
    }

    fn reflect_db(&mut self, causes: u64) -> io::Result<()> {
        if causes == 0 {
            // VT-x exits on INT1 itself and leaves RIP there; the guest's handler expects it behind.
            let mut byte = [0];
            let mut regs = self.fd.get_regs()?;
            let pc = self.pc()?;
            if self.read(pc, &mut byte) == 1 && byte[0] == INT1 {
                regs.rip = regs.rip.wrapping_add(1);
                self.fd.set_regs(&regs)?;
            }
        }
        let mut debug = self.fd.get_debug_regs()?;
        debug.dr6 = Dr6(debug.dr6).accumulate(causes).0;
        // The processor clears GD when it delivers a #DB, so that the handler can do its work.
        debug.dr7 &= !GENERAL_DETECT;
        self.fd.set_debug_regs(&debug)?;
        // With TF set, a shadow left behind by STI or MOV SS fails the next entry on VT-x (B13).
        self.end_shadow()?;
        // Without a payload: the guest sees the DR6 that was just set (law 25).
        self.inject(KVM_GUESTDBG_INJECT_DB)
    }

    fn reflect_bp(&mut self) -> io::Result<()> {
        self.inject(KVM_GUESTDBG_INJECT_BP)
    }

    fn guest_registers(&mut self) -> io::Result<GuestRegisters> {
        let debug = self.fd.get_debug_regs()?;
        Ok(GuestRegisters { db: debug.db, dr6: debug.dr6, dr7: debug.dr7 })
    }

    fn set_guest_registers(&mut self, registers: &GuestRegisters) -> io::Result<()> {
        let mut debug = self.fd.get_debug_regs()?;
        (debug.db, debug.dr6, debug.dr7) = (registers.db, registers.dr6, registers.dr7);
        Ok(self.fd.set_debug_regs(&debug)?)
    }

    fn raise(&mut self, event: Raised, len: u64) -> io::Result<()> {
        let mut regs = self.fd.get_regs()?;
        regs.rip = regs.rip.wrapping_add(len);
        // The processor pushes it for every fault (SDM vol. 3, 18.3.1.1); KVM does for its own only.
        if event.is_fault() {
            regs.rflags |= RFLAGS_RF;
        }
        self.fd.set_regs(&regs)?;
        let mut events = self.fd.get_vcpu_events()?;
        events.interrupt.shadow = 0;
        events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
        match event {
            Raised::Exception { vector, error } => {
                (events.exception.injected, events.exception.pending) = (1, 0);
                events.exception.nr = vector;
                events.exception.has_error_code = error.is_some().into();
                events.exception.error_code = error.unwrap_or(0);
            }
            Raised::Interrupt { vector } => {
                (events.interrupt.injected, events.interrupt.soft, events.interrupt.nr) = (1, 1, vector);
            }
        }
        Ok(self.fd.set_vcpu_events(&events)?)
    }

    fn end_shadow(&mut self) -> io::Result<()> {
        let mut events = self.fd.get_vcpu_events()?;
        if events.interrupt.shadow == 0 {
            return Ok(());
        }
        events.interrupt.shadow = 0;
        events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
        Ok(self.fd.set_vcpu_events(&events)?)
    }

    fn kick_itself(&mut self, often: bool) -> io::Result<()> {
        if self.timer.is_none() && often {
            self.timer = Some(kick::Timer::new()?);
        }
        self.timer.as_ref().map_or(Ok(()), |timer| timer.set(if often { LOOK_INTERVAL } else { Duration::ZERO }))
    }

    fn kick_at_dr_writes(&mut self, on: bool) -> io::Result<bool> {
        if self.dr_writes.is_none() && on {
            let writes = DrWrites::new();
            if let Err(error) = &writes {
                tracing::debug!(%error, "what the guest writes to its debug registers is seen late");
            }
            self.dr_writes = Some(writes);
        }
        match &self.dr_writes {
            Some(Ok(writes)) => writes.set(on).map(|()| true),
            _ => Ok(false),
        }
    }

    fn wrote_debug_registers(&mut self) -> bool {
        take_write()
    }

    fn standing(&mut self) -> io::Result<Option<Standing>> {
        self.awake = self.awake || self.activity()? == Activity::Runnable;
        if !self.awake {
            return Ok(None);
        }
        self.fd.refresh()?;
        let (sregs, events) = (self.fd.get_sregs()?, self.fd.get_vcpu_events()?);
        let long = sregs.efer & EFER_LMA != 0 && sregs.cs.l != 0;
        // With branch tracking an instruction has to be the one that a jump may lead to.
        if !long || sregs.cr4 & CR4_CET != 0 || !is_quiet(&events) {
            return Ok(None);
        }
        let regs = self.fd.get_regs()?;
        let paging = paging_of(&sregs);
        let mut code = [0; MAX_INSTRUCTION];
        let fetched = paging.fetch(self.ram.mem(), regs.rip, sregs.ss.dpl == 3, &mut code);
        Ok(Some(Standing { general: to_general(&regs), wide: paging.is_wide(), code, fetched }))
    }

    fn advance(&mut self, to: &General) -> io::Result<()> {
        self.fd.set_regs_at_entry(&from_general(to));
        Ok(())
    }

    fn ring_3(&mut self) -> Ring3 {
        // Without an answer: what KVM promises.
        crate::probe::capabilities().map_or(Ring3::Steps, |can| match (can.seen.ss_cpl3, can.seen.ss_cpl3_shadow) {
            (Step::ToGuest | Step::Never, Step::Exact) => Ring3::StepsInShadow,
            (Step::ToGuest | Step::Never, _) => Ring3::Never,
            _ => Ring3::Steps,
        })
    }

    fn cast_shadow(&mut self) -> io::Result<()> {
        let mut events = self.fd.get_vcpu_events()?;
        events.interrupt.shadow = 1;
        events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
        Ok(self.fd.set_vcpu_events(&events)?)
    }

    fn unmask_nmi(&mut self) -> io::Result<()> {
        let mut events = self.fd.get_vcpu_events()?;
        if events.nmi.masked == 0 {
            return Ok(());
        }
        events.nmi.masked = 0;
        Ok(self.fd.set_vcpu_events(&events)?)
    }

    fn has_interrupt_on_its_way(&mut self) -> io::Result<bool> {
        let events = self.fd.get_vcpu_events()?;
        Ok(events.interrupt.injected | events.nmi.injected != 0)
    }

    fn save(&mut self) -> io::Result<VcpuState> {
        self.read_state()
    }

    fn restore(&mut self, state: &VcpuState) -> io::Result<()> {
        self.write_state(state)
    }

    fn port_handler(&self, port: u16) -> Option<PortHandler> {
        self.bus.port_handler(port).cloned()
    }

    fn resumed(&mut self) {
        // EINVAL: the guest has no kvmclock, and so no watchdog that looks at it.
        let _ = self.fd.kvmclock_ctrl();
    }
}

impl Drop for KvmCpu {
    fn drop(&mut self) {
        // The page goes away with the file descriptor; dropped on its own thread, where it began.
        kick::receive(ptr::null_mut());
    }
}

fn paging_of(sregs: &kvm_sregs) -> Paging {
    Paging { cr0: sregs.cr0, cr3: sregs.cr3, cr4: sregs.cr4, efer: sregs.efer }
}

fn served(event: Option<DeviceEvent>) -> Exit {
    Exit::Served(event.map(|event| match event {
        DeviceEvent::Exit(value) => StopReason::GuestExit(value),
        DeviceEvent::Reset => StopReason::GuestShutdown { reset: true },
        DeviceEvent::PowerOff => StopReason::GuestShutdown { reset: false },
        DeviceEvent::Panicked | DeviceEvent::CrashLoaded => StopReason::GuestPanic,
    }))
}

const MSRS: [u32; 4] = [MSR_STAR, MSR_LSTAR, MSR_FMASK, MSR_KERNEL_GS_BASE];

fn msr_values(r: &Registers) -> [u64; 4] {
    [r.star, r.lstar, r.fmask, r.kernel_gs_base]
}

/// Lists the fields that two structs share under other or equal names, once for both directions.
macro_rules! general {
    ($to:expr, $from:expr) => {
        general!(@ $to, $from, rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags)
    };
    (@ $to:expr, $from:expr, $($name:ident)*) => { $( $to.$name = $from.$name; )* };
}

fn take_general_registers(to: &mut Registers, from: &kvm_regs) {
    general!(to, from);
}

fn general_registers(from: &Registers) -> kvm_regs {
    let mut to = kvm_regs::default();
    general!(to, from);
    to
}

fn to_general(regs: &kvm_regs) -> General {
    let kvm_regs { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags } = *regs;
    let gpr = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
    General { gpr, rip, rflags }
}

fn from_general(general: &General) -> kvm_regs {
    let General { gpr, rip, rflags } = *general;
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = gpr;
    kvm_regs { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

/// Whether nothing is on its way into the guest that belongs before or to the next instruction, such
/// as an exception that was given to it there, and no shadow of STI or MOV SS ends with it.
fn is_quiet(events: &kvm_vcpu_events) -> bool {
    let exception = events.exception.injected | events.exception.pending | events.triple_fault.pending;
    let other = events.interrupt.injected | events.nmi.injected | events.interrupt.shadow;
    exception | other == 0
}

fn same_general_registers(a: &Registers, b: &Registers) -> bool {
    general_registers(a) == general_registers(b)
}

fn take_system_registers(to: &mut Registers, from: &kvm_sregs) {
    to.cs = to_segment(&from.cs);
    to.ss = to_segment(&from.ss);
    to.ds = to_segment(&from.ds);
    to.es = to_segment(&from.es);
    to.fs = to_segment(&from.fs);
    to.gs = to_segment(&from.gs);
    to.tr = to_segment(&from.tr);
    to.ldtr = to_segment(&from.ldt);
    to.gdtr = DescriptorTable { base: from.gdt.base, limit: from.gdt.limit };
    to.idtr = DescriptorTable { base: from.idt.base, limit: from.idt.limit };
    (to.cr0, to.cr2, to.cr3, to.cr4, to.cr8) = (from.cr0, from.cr2, from.cr3, from.cr4, from.cr8);
    (to.efer, to.apic_base) = (from.efer, from.apic_base);
}

fn put_system_registers(to: &mut kvm_sregs, from: &Registers) {
    to.cs = from_segment(&from.cs);
    to.ss = from_segment(&from.ss);
    to.ds = from_segment(&from.ds);
    to.es = from_segment(&from.es);
    to.fs = from_segment(&from.fs);
    to.gs = from_segment(&from.gs);
    to.tr = from_segment(&from.tr);
    to.ldt = from_segment(&from.ldtr);
    to.gdt = kvm_dtable { base: from.gdtr.base, limit: from.gdtr.limit, ..Default::default() };
    to.idt = kvm_dtable { base: from.idtr.base, limit: from.idtr.limit, ..Default::default() };
    (to.cr0, to.cr2, to.cr3, to.cr4, to.cr8) = (from.cr0, from.cr2, from.cr3, from.cr4, from.cr8);
    (to.efer, to.apic_base) = (from.efer, from.apic_base);
}

fn same_system_registers(a: &Registers, b: &Registers) -> bool {
    let of = |registers| {
        let mut sregs = kvm_sregs::default();
        put_system_registers(&mut sregs, registers);
        sregs
    };
    of(a) == of(b)
}

/// What an unusable segment leaves undefined in its access rights (SDM vol. 3, 28.3.2; it keeps the DPL of SS, and L, D/B
/// and G of CS) is left out: kvm_intel sets the accessed bit of whatever it is given, and so would not tell the
/// same as before of a segment that was only read and written back.
pub(super) fn to_segment(from: &kvm_segment) -> Segment {
    let bit = |value: u8, at: u32| u32::from(value & 1) << at;
    let defined = if from.unusable & 1 != 0 { !UNDEFINED_IF_UNUSABLE } else { !0 };
    let attributes = u32::from(from.type_ & 0xf)
        | bit(from.s, 4)
        | u32::from(from.dpl & 3) << 5
        | bit(from.present, 7)
        | bit(from.avl, 12)
        | bit(from.l, 13)
        | bit(from.db, 14)
        | bit(from.g, 15)
        | bit(from.unusable, 16);
    Segment { selector: from.selector, base: from.base, limit: from.limit, attributes: attributes & defined }
}

/// Type, S, P and AVL of [`Segment::attributes`].
const UNDEFINED_IF_UNUSABLE: u32 = 0xf | 1 << 4 | 1 << 7 | 1 << 12;

pub(super) fn from_segment(from: &Segment) -> kvm_segment {
    let bit = |at: u32| (from.attributes >> at & 1) as u8;
    kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: (from.attributes & 0xf) as u8,
        s: bit(4),
        dpl: (from.attributes >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: bit(16),
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn segments_survive_the_round_trip(base: u64, limit: u32, selector: u16, attributes in 0u32..0x2_0000) {
            // Bits 11:8 are not part of the format.
            let attributes = attributes & !0xf00;
            let undefined = if attributes >> 16 == 1 { UNDEFINED_IF_UNUSABLE } else { 0 };
            let segment = Segment { selector, base, limit, attributes };
            let again = Segment { attributes: attributes & !undefined, ..segment };
            prop_assert_eq!(to_segment(&from_segment(&segment)), again);
        }
    }
}
