//! A vCPU file descriptor that knows what KVM has said already.
//!
//! With KVM_CAP_SYNC_REGS an exit brings the general registers, the system registers and the events
//! along in the `kvm_run` page, and an entry takes general registers from there. So a breakpoint can
//! be counted and left behind with no ioctl but KVM_RUN. The methods have the names of the ioctls
//! that they stand for, and answer from the page while it is certain to say what KVM would.

use std::ops::{Deref, DerefMut};

use kvm_bindings::{
    KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_INJECT_DB, KVM_GUESTDBG_SINGLESTEP, KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS,
    KVM_SYNC_X86_SREGS, Msrs, kvm_guest_debug, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events,
};
use kvm_ioctls::VcpuFd;
use libc::{EAGAIN, EINTR};

type Result<T> = std::result::Result<T, kvm_ioctls::Error>;

/// What comes along with an exit.
const ALL: u32 = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;

pub(super) struct SyncedFd {
    fd: VcpuFd,
    /// So many exits are to bring registers along.
    wanted: u32,
    /// The page's general registers are the vCPU's.
    general: bool,
    /// The page's system registers and events are the vCPU's.
    system: bool,
    /// The page's general registers are newer than KVM's.
    unwritten: bool,
    /// KVM was told to single-step: it hides TF, and drops it when it is told to stop (law 46).
    stepping: bool,
}

/// The ioctls that neither read nor change what is kept here.
impl Deref for SyncedFd {
    type Target = VcpuFd;

    fn deref(&self) -> &VcpuFd {
        &self.fd
    }
}

impl DerefMut for SyncedFd {
    fn deref_mut(&mut self) -> &mut VcpuFd {
        &mut self.fd
    }
}

impl SyncedFd {
    pub(super) fn new(fd: VcpuFd) -> Self {
        Self { fd, wanted: 0, general: false, system: false, unwritten: false, stepping: false }
    }

    /// The next so many exits are to bring registers along: it costs some time at each.
    pub(super) fn want(&mut self, exits: u32) {
        self.wanted = exits;
    }

    /// Whether the last exit was the last that happened to this vCPU: nobody has touched it since.
    pub(super) fn is_fresh(&self) -> bool {
        self.general && self.system
    }

    /// What was known does not count any more, nor what was to be written.
    pub(super) fn forget(&mut self) {
        (self.general, self.system, self.unwritten) = (false, false, false);
    }

    /// Asks for whatever is not known: what follows costs no ioctl, until something changes.
    pub(super) fn refresh(&mut self) -> Result<()> {
        if !self.general {
            self.fd.sync_regs_mut().regs = self.fd.get_regs()?;
            self.general = true;
        }
        if !self.system {
            let (sregs, events) = (self.fd.get_sregs()?, self.fd.get_vcpu_events()?);
            let page = self.fd.sync_regs_mut();
            (page.sregs, page.events) = (sregs, events);
            self.system = true;
        }
        Ok(())
    }

    /// KVM_SET_MSRS; some of them are system registers, too.
    pub(super) fn set_msrs(&mut self, msrs: &Msrs) -> Result<usize> {
        self.flush()?;
        self.system = false;
        self.fd.set_msrs(msrs)
    }

    /// KVM_RUN.
    pub(super) fn run(&mut self) -> Result<()> {
        let page = self.fd.get_kvm_run();
        let wanted = self.wanted > 0;
        self.wanted = self.wanted.saturating_sub(1);
        page.kvm_valid_regs = if wanted { ALL.into() } else { 0 };
        page.kvm_dirty_regs = if self.unwritten { KVM_SYNC_X86_REGS.into() } else { 0 };
        let result = self.fd.run().map(|_| ());
        let came_out = match &result {
            Ok(()) => true,
            Err(error) => matches!(error.errno(), EINTR | EAGAIN),
        };
        self.unwritten = false;
        self.general = wanted && came_out;
        self.system = self.general;
        result
    }

    pub(super) fn get_regs(&self) -> Result<kvm_regs> {
        if self.general { Ok(self.fd.sync_regs().regs) } else { self.fd.get_regs() }
    }

    pub(super) fn get_sregs(&self) -> Result<kvm_sregs> {
        if self.system { Ok(self.fd.sync_regs().sregs) } else { self.fd.get_sregs() }
    }

    pub(super) fn get_vcpu_events(&self) -> Result<kvm_vcpu_events> {
        if self.system { Ok(self.fd.sync_regs().events) } else { self.fd.get_vcpu_events() }
    }

    pub(super) fn set_regs(&mut self, regs: &kvm_regs) -> Result<()> {
        (self.general, self.unwritten) = (false, false);
        // It clears pending exceptions (law 7).
        self.system = false;
        self.fd.set_regs(regs)
    }

    /// As [`set_regs`](Self::set_regs), with the next entry.
    pub(super) fn set_regs_at_entry(&mut self, regs: &kvm_regs) {
        self.fd.sync_regs_mut().regs = *regs;
        (self.general, self.unwritten) = (true, true);
    }

    pub(super) fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<()> {
        self.flush()?;
        self.system = false;
        self.fd.set_sregs(sregs)
    }

    pub(super) fn set_vcpu_events(&mut self, events: &kvm_vcpu_events) -> Result<()> {
        self.flush()?;
        (self.general, self.system) = (false, false);
        self.fd.set_vcpu_events(events)
    }

    pub(super) fn set_guest_debug(&mut self, debug: &kvm_guest_debug) -> Result<()> {
        // KVM steps from the RIP that it has.
        self.flush()?;
        let steps = debug.control & KVM_GUESTDBG_SINGLESTEP != 0;
        let injects = debug.control & (KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP) != 0;
        if steps || self.stepping || injects {
            (self.general, self.system) = (false, false);
        }
        self.stepping = steps;
        self.fd.set_guest_debug(debug)
    }

    /// It takes a pending INIT or SIPI as well, which changes everything.
    pub(super) fn get_mp_state(&mut self) -> Result<kvm_mp_state> {
        self.flush()?;
        (self.general, self.system) = (false, false);
        self.fd.get_mp_state()
    }

    /// Tells KVM what it does not know yet.
    fn flush(&mut self) -> Result<()> {
        if self.unwritten {
            let regs = self.fd.sync_regs().regs;
            self.set_regs(&regs)?;
        }
        Ok(())
    }
}
