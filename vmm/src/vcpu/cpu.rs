//! What a vCPU thread can do with its vCPU. KVM implements it ([`super::kvm`]); so does the
//! model that the coordinator is checked against.

use std::io;

use super::{Activity, Registers};
use crate::debug::{
    Crash, DebugExit, DebugImage, Dr7, General, GuestRegisters, Overlay, PortHandler, SLOTS, StopReason,
};
use crate::memory::DeviceStore;
use crate::paging::Access;
use crate::state::VcpuState;

/// Why guest code stopped running. Parsed once from `kvm_run`; everything after matches on this.
#[derive(Debug)]
pub enum Exit {
    /// KVM_RUN came back for a signal or `immediate_exit`; nothing happened in the guest.
    Kicked,
    /// KVM_RUN wants to be called again: an AP has just left its wait for SIPI.
    Again,
    /// A port or MMIO access, already served. It is complete only after another entry (law C4).
    Served(Option<StopReason>),
    /// A store, or a part of one, into a page of RAM that is read-only for the guest. It is not done
    /// yet, although RIP is behind it already; like [`Served`](Self::Served), it is complete only after another entry.
    Store {
        /// Guest-physical address of the first byte.
        gpa: u64,
        /// What is stored, at most eight bytes.
        data: Vec<u8>,
    },
    /// #DB or #BP.
    Debug(DebugExit),
    /// The guest cannot go on.
    Crash(Crash),
}

/// Everything that one KVM_SET_GUEST_DEBUG says. The call replaces, it never adds (law 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arming {
    /// DR0-DR3.
    pub addresses: [u64; SLOTS],
    /// DR7.
    pub dr7: Dr7,
    /// Single-step.
    pub step: bool,
    /// Withhold interrupts, NMIs and SMIs (law 47).
    pub block_irq: bool,
    /// INT3 exits: there are patches.
    pub int3: bool,
}

impl Arming {
    /// Nothing armed at all.
    pub const OFF: Arming =
        Arming { addresses: [0; SLOTS], dr7: Dr7::NONE, step: false, block_irq: false, int3: false };

    /// These slots and the patches of the image, for running on.
    pub fn run(image: &DebugImage, overlay: &Overlay) -> Self {
        let int3 = !image.patches().is_empty();
        Arming { addresses: overlay.addresses(), dr7: overlay.dr7(), int3, ..Arming::OFF }
    }
}

/// What an instruction raises in the guest that executes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Raised {
    /// An exception, with its error code if it has one.
    Exception {
        /// Its vector.
        vector: u8,
        /// Its error code.
        error: Option<u32>,
    },
    /// INT n.
    Interrupt {
        /// Its vector.
        vector: u8,
    },
}

impl Raised {
    /// An exception without an error code.
    pub const fn exception(vector: u8) -> Self {
        Raised::Exception { vector, error: None }
    }

    /// An exception with the error code 0.
    pub const fn fault(vector: u8) -> Self {
        Raised::Exception { vector, error: Some(0) }
    }

    /// Whether the instruction that raises it has not been executed, so that a handler may have it
    /// tried again: any exception but #DB, NMI, #BP, #OF, #DF and #MC (SDM vol. 3, 6.5).
    pub const fn is_fault(self) -> bool {
        match self {
            Raised::Exception { vector, .. } => !matches!(vector, 1..=4 | 8 | 18),
            Raised::Interrupt { .. } => false,
        }
    }
}

/// A vCPU whose next instruction could be carried out without it: it is in 64-bit mode, and nothing
/// but that instruction is about to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Its general registers.
    pub general: General,
    /// Linear addresses have 57 bits, not 48.
    pub wide: bool,
    /// What the processor would fetch.
    pub code: [u8; 15],
    /// How many of those bytes it could fetch.
    pub fetched: usize,
}

/// What KVM_GUESTDBG_SINGLESTEP does in 64-bit ring 3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ring3 {
    /// It steps.
    Steps,
    /// The guest gets a #DB of ours, unless there is an interrupt shadow: then KVM emulates the
    /// instruction and steps it.
    StepsInShadow,
    /// The guest gets a #DB of ours, or nobody does.
    Never,
}

/// One vCPU, as its own thread sees it. Every method is called on that thread only (law 1).
pub trait Cpu {
    /// Called once, when the thread begins.
    fn begin(&mut self) {}

    /// Forgets kicks that have arrived. Whoever calls this looks at the inbox next (law C2).
    fn clear_kick(&mut self);

    /// Runs guest code until something happens.
    fn run(&mut self) -> Exit;

    /// Finishes a served access without running guest code; [`Exit::Kicked`] says that it is done.
    fn complete(&mut self) -> Exit;

    /// Replaces what is armed.
    fn arm(&mut self, arming: &Arming) -> io::Result<()>;

    /// Linear address of the next instruction.
    fn pc(&mut self) -> io::Result<u64>;

    /// All registers.
    fn registers(&mut self) -> io::Result<Registers>;

    /// Writes all registers. The caller arms again afterwards (law 7).
    fn set_registers(&mut self, registers: &Registers) -> io::Result<()>;

    /// General, segment and control registers, and what else is cheap to read: no FPU, no MSRs but
    /// EFER, no debug registers.
    fn state(&mut self) -> io::Result<Registers>;

    /// Writes the general registers, RIP and RFLAGS only. The caller arms again afterwards (law 7).
    fn set_general(&mut self, registers: &Registers) -> io::Result<()>;

    /// What the vCPU is doing.
    fn activity(&mut self) -> io::Result<Activity>;

    /// Carries out the HLT at RIP: the vCPU waits behind it for an interrupt.
    fn halt(&mut self) -> io::Result<()>;

    /// Guest-physical address of a linear one; `None` if it is not mapped.
    fn translate(&mut self, addr: u64) -> Option<u64>;

    /// The pages of page tables by which a linear address is translated.
    fn tables(&mut self, _addr: u64) -> Vec<u64> {
        Vec::new()
    }

    /// How many of the guest's accesses KVM has answered by emulation so far; `None` if it does not say.
    fn emulated_faults(&mut self) -> Option<u64> {
        None
    }

    /// Whether ring 3 may use what is at a linear address, as far as the page tables say.
    fn is_users(&mut self, _addr: u64) -> bool {
        false
    }

    /// Whether guest code where the vCPU stands, in 64-bit mode, gets at so many bytes of RAM at a linear
    /// address without a fault; `false` if that is not certain.
    fn may_access(&mut self, _addr: u64, _len: usize, _access: Access) -> bool {
        false
    }

    /// RAM from a guest-physical address on, as it is; how many bytes could be read.
    fn read_physical(&mut self, gpa: u64, into: &mut [u8]) -> usize;

    /// Writes RAM from a guest-physical address on; whether all of it could be written.
    fn write_physical(&mut self, gpa: u64, bytes: &[u8]) -> bool;

    /// From now on [`read`](Self::read) does not show the patches of this image.
    fn hide(&mut self, _patches_of: &DebugImage) {}

    /// Bytes at a linear address, without patches (law 55); how many could be read.
    fn read(&mut self, addr: u64, into: &mut [u8]) -> usize;

    /// Writes to a linear address; whether all of it could be written.
    fn write(&mut self, addr: u64, bytes: &[u8]) -> bool;

    /// Stores to a guest-physical address as an instruction would, and gives what was there in
    /// `old`, which is as long; how many bytes were RAM.
    fn exchange(&mut self, gpa: u64, new: &[u8], old: &mut [u8]) -> usize;

    /// What devices have stored to watched pages, since this was last asked on any vCPU.
    fn device_stores(&mut self) -> Vec<DeviceStore> {
        Vec::new()
    }

    /// Gives the guest its own #DB, with these DR6 causes added to its DR6 (laws 24, 25).
    fn reflect_db(&mut self, causes: u64) -> io::Result<()>;

    /// Gives the guest its own #BP for the INT3 at RIP (law 34).
    fn reflect_bp(&mut self) -> io::Result<()>;

    /// The guest's own DR0-3, DR6 and DR7 (law 30).
    fn guest_registers(&mut self) -> io::Result<GuestRegisters>;

    /// Writes them. The guest is the only one who sees the values.
    fn set_guest_registers(&mut self, registers: &GuestRegisters) -> io::Result<()>;

    /// Moves RIP by `len` and delivers at the next entry what the instruction there raises. The
    /// caller arms again afterwards (law 7).
    fn raise(&mut self, event: Raised, len: u64) -> io::Result<()>;

    /// The instruction at RIP was carried out for the guest: what STI or MOV SS held back until
    /// behind it is held back no longer.
    fn end_shadow(&mut self) -> io::Result<()>;

    /// Kicks itself every [`LOOK_INTERVAL`](crate::limits::LOOK_INTERVAL) from now on, or no more.
    fn kick_itself(&mut self, often: bool) -> io::Result<()>;

    /// Is kicked from now on whenever the guest writes a debug register, or no more; whether the host can do that.
    fn kick_at_dr_writes(&mut self, _on: bool) -> io::Result<bool> {
        Ok(false)
    }

    /// Whether such a kick has come since this was last asked.
    fn wrote_debug_registers(&mut self) -> bool {
        false
    }

    /// Where it stands, if an instruction may be carried out there for it.
    fn standing(&mut self) -> io::Result<Option<Standing>> {
        Ok(None)
    }

    /// Moves a vCPU that is [`standing`](Self::standing) on to the registers after its instruction.
    fn advance(&mut self, _to: &General) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// What single-step does in ring 3.
    fn ring_3(&mut self) -> Ring3 {
        Ring3::Steps
    }

    /// Puts the vCPU into an interrupt shadow, as MOV SS does.
    fn cast_shadow(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// NMIs may come again, as after IRET.
    fn unmask_nmi(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Whether an interrupt or NMI is on its way into the guest already, which nothing holds back.
    fn has_interrupt_on_its_way(&mut self) -> io::Result<bool> {
        Ok(false)
    }

    /// Everything that the vCPU is, as the guest has it. It is parked, with nothing half-done.
    fn save(&mut self) -> io::Result<VcpuState> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Makes it what was saved. The caller arms again afterwards (law 7). On error it is not fit to run.
    fn restore(&mut self, _state: &VcpuState) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Who decides about accesses to this port.
    fn port_handler(&self, _port: u16) -> Option<PortHandler> {
        None
    }

    /// Called before the first entry after a park, if it is not for a step: tells a paravirtual clock that time was stolen.
    fn resumed(&mut self) {}
}
