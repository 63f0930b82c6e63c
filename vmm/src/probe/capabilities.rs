//! What a host's KVM claims, and what it was seen doing: plain data.
//!
//! The field names and the names of the answers are the schema of `trapline doctor --json`.
//! A field or an answer that is added, renamed or dropped makes it a new [`SCHEMA`].

use serde::{Deserialize, Serialize};

use super::HostIdentity;
use crate::debug::Offer;

/// Version of the form of [`Capabilities`].
pub const SCHEMA: u32 = 2;

/// The answer to the question what this host's KVM can really do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capabilities {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Where this holds: the same kernel, KVM module and processor answer the same.
    pub host: HostIdentity,
    /// What KVM says of itself.
    pub claims: Claims,
    /// What tiny guests saw.
    pub seen: Seen,
    /// For each answer that is `unexpected`: its name and what happened, one line each.
    pub remarks: Vec<String>,
}

/// What KVM_CHECK_EXTENSION says (KVM API 4.4). No proof of anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    /// KVM_CAP_SET_GUEST_DEBUG: there is KVM_SET_GUEST_DEBUG at all.
    pub guest_debug: bool,
    /// KVM_CAP_SET_GUEST_DEBUG2: the KVM_GUESTDBG_* flags that are supported; 0 before Linux 5.13.
    pub guest_debug_flags: u32,
    /// KVM_GUESTDBG_USE_HW_BP among them: execution slots and data slots.
    pub hardware_breakpoints: bool,
    /// KVM_GUESTDBG_USE_SW_BP among them: INT3 exits.
    pub software_breakpoints: bool,
    /// KVM_GUESTDBG_SINGLESTEP among them.
    pub single_step: bool,
    /// KVM_GUESTDBG_BLOCKIRQ among them.
    pub block_irq: bool,
    /// KVM_CAP_READONLY_MEM: KVM_MEM_READONLY memory slots.
    pub readonly_memory: bool,
    /// KVM_CAP_EXCEPTION_PAYLOAD.
    pub exception_payload: bool,
    /// KVM_CAP_EXIT_ON_EMULATION_FAILURE.
    pub exit_on_emulation_failure: bool,
    /// KVM_CAP_DIRTY_LOG_RING (or its acquire/release form): bytes of the largest ring, 0 without.
    pub dirty_ring: u32,
}

macro_rules! answers {
    ($($(#[$doc:meta])* $name:ident { $($(#[$answer_doc:meta])* $answer:ident),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name {
            $($(#[$answer_doc])* $answer,)*
            /// Not asked, because of another answer.
            NotAsked,
            /// Something else; [`Capabilities::remarks`] says what.
            Unexpected,
        }

        impl Answer for $name {
            const UNEXPECTED: Self = Self::Unexpected;
        }
    )*};
}

/// What every answer has.
pub(super) trait Answer {
    const UNEXPECTED: Self;
}

answers! {
    /// A slot (debug register) armed through KVM_SET_GUEST_DEBUG, and guest code that meets it.
    Slot {
        /// KVM_EXIT_DEBUG, with the slot's bit in DR6, where the architecture says.
        Fires,
        /// KVM accepted it, and the guest ran on as if nothing were armed.
        Never,
        /// The guest got a #DB for what it knows nothing of.
        ToGuest,
    }

    /// An execution slot is hit, RFLAGS.RF is set by KVM_SET_REGS, the slot stays armed (law 38).
    ResumeFlag {
        /// The instruction is executed.
        Honoured,
        /// The slot is hit again, and without end.
        Ignored,
    }

    /// What belongs to an instruction that has not run yet, when the guest is left before it has (SDM
    /// vol. 3, 28.3: a processor keeps it).
    OverExit {
        /// It is still there.
        Kept,
        /// It is gone.
        Lost,
    }

    /// A step of an instruction for which the guest is left in between, and guest code behind it that
    /// is not stepped (law 51).
    StepOverExit {
        /// There is one trap.
        Exact,
        /// There is another one, behind it and without a cause.
        TrapsAgain,
    }

    /// Several slots on one access (law 20).
    MultiHit {
        /// DR6 has all bits.
        All,
        /// DR6 has the first slot's bit only.
        First,
    }

    /// INT3 under KVM_GUESTDBG_USE_SW_BP (law 54).
    Int3 {
        /// KVM_EXIT_DEBUG, exception 3, RIP on the INT3.
        DebugExit,
        /// KVM_EXIT_INTERNAL_ERROR with RIP on the INT3, restartable.
        InternalError,
        /// The guest gets #BP; we are not asked.
        ToGuest,
    }

    /// KVM_GUESTDBG_SINGLESTEP over plain instructions.
    Step {
        /// One KVM_EXIT_DEBUG after each instruction.
        Exact,
        /// As exact, but with exits in between that have made no progress.
        ExtraExits,
        /// The guest gets a #DB.
        ToGuest,
        /// The guest runs on.
        Never,
    }

    /// KVM_GUESTDBG_SINGLESTEP set once, and not again before each step (law 44).
    StickyStep {
        /// Every instruction stops.
        Stays,
        /// It is lost after an instruction that KVM emulated.
        LostAfterEmulation,
    }

    /// PUSHF while single-stepping: what the guest finds on its stack (law 45).
    PushedFlags {
        /// Its own flags.
        Clean,
        /// The trap flag that KVM had set to step it.
        HasTrapFlag,
    }

    /// DR7.GD in what is given to KVM_SET_GUEST_DEBUG, and the guest touches a debug register (law 31).
    DrAccess {
        /// KVM_EXIT_DEBUG with DR6.BD, before the instruction.
        Exits,
        /// No exit: the guest's changes can only be looked up.
        Never,
    }

    /// The guest's own debug registers.
    GuestSlots {
        /// The guest gets its #DB.
        ToGuest,
        /// KVM_EXIT_DEBUG: the VMM has to reflect it.
        ExitsToUs,
        /// Nothing happens.
        Never,
    }

    /// Debug registers that the guest wrote while slots of ours are armed (law 30).
    GuestDrValues {
        /// KVM_GET_DEBUGREGS has them.
        Readable,
        /// KVM_GET_DEBUGREGS has something else.
        Hidden,
    }

    /// The guest's own single-step (RFLAGS.TF) while slots of ours are armed (law 5).
    GuestTrapFlag {
        /// KVM_EXIT_DEBUG with DR6.BS: the VMM has to reflect it.
        ExitsToUs,
        /// The guest gets its #DB.
        ToGuest,
        /// Nothing happens.
        Never,
    }

    /// KVM_GUESTDBG_BLOCKIRQ and an interrupt that waits (law 47).
    BlockIrq {
        /// It waits until the step is over.
        Blocks,
        /// It is delivered in the step.
        Ignored,
    }

    /// KVM_GUESTDBG_INJECT_BP with RIP on the guest's INT3, after the exit that INT3 caused, if it does (law 34).
    InjectBp {
        /// The handler's frame has the address behind the INT3, as for the processor's own #BP.
        Advances,
        /// The handler's frame has the address of the INT3: RIP must be moved before.
        Stays,
        /// The handler's frame has an address from an exit before: SVM takes the return address from there.
        Elsewhere,
        /// There is no exception.
        Lost,
    }

    /// An exception given to the guest through KVM_SET_VCPU_EVENTS or KVM_GUESTDBG_INJECT_*.
    Inject {
        /// The guest's handler runs, and its frame has the RIP that was set.
        Delivered,
        /// The guest's handler runs, but its frame has the address of the next instruction.
        DeliveredBehind,
        /// The guest's handler runs, but its frame has an address from an exit before.
        DeliveredElsewhere,
        /// The guest's handler runs, but DR6 is not what KVM_SET_DEBUGREGS had set.
        DeliveredWithOtherDr6,
        /// There is no exception.
        Lost,
    }

    /// RIP at KVM_EXIT_IO for an OUT (law 50).
    OutRip {
        /// On the OUT, until the next KVM_RUN.
        OnInstruction,
        /// Behind it already.
        Behind,
    }

    /// A step over HLT (law 49).
    HaltStep {
        /// It stops behind the HLT, and the vCPU is halted.
        Halts,
        /// It stops behind the HLT, and the vCPU is not halted.
        RunsOn,
        /// It stops behind the HLT, the vCPU is not halted, and will be: after the next instruction that is not
        /// stepped, whatever that is. Such a HLT must not be stepped by KVM.
        HaltsLater,
        /// No stop: the vCPU is halted.
        NoStop,
    }

    /// Registers at KVM_EXIT_SHUTDOWN (law 72).
    TripleFault {
        /// As they were at the fault.
        KeepsState,
        /// Already reset.
        StateLost,
    }

    /// INT n, INT3 and INT1 with nothing armed (law 73).
    SoftwareInterrupt {
        /// The guest's handler runs.
        Delivered,
        /// KVM_EXIT_INTERNAL_ERROR with RIP on the instruction: the VMM has to reflect it.
        EmulationFailure,
        /// The guest gets #UD in place of it.
        InvalidOpcode,
    }

    /// A store to a KVM_MEM_READONLY memory slot (law 66).
    ReadonlyWrite {
        /// KVM_EXIT_MMIO with address and data, RIP behind the store, memory as it was.
        ExitsBehind,
        /// The same, with RIP on the store.
        ExitsBefore,
        /// The store was carried out, or dropped, without an exit.
        Never,
        /// KVM_EXIT_INTERNAL_ERROR.
        EmulationFailure,
    }

    /// A signal, while guest code runs that does not exit by itself (law C1).
    Kick {
        /// KVM_RUN returns.
        Interrupts,
        /// Guest code runs on for as long as it likes.
        Never,
    }

    /// An execution slot that is armed while a vCPU is in real mode. Never tried: where it fails, it takes
    /// the machine along.
    RealModeSlots {
        /// Known of this processor: QEMU's emulation of SVM crashes.
        CrashesTheMachine,
    }
}

/// What tiny guests saw. "CPL 0" is kernel code, "CPL 3" user code, both in 64-bit mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seen {
    /// An execution slot, in CPL 0.
    pub x_cpl0: Slot,
    /// An execution slot, in CPL 3.
    pub x_cpl3: Slot,
    /// A write slot, in CPL 0.
    pub w_data: Slot,
    /// A write slot, in CPL 3.
    pub w_data_cpl3: Slot,
    /// An access slot and a read, in CPL 0.
    pub rw_data: Slot,
    /// Two execution slots on one instruction, in CPL 0.
    pub multi_hit_x: MultiHit,
    /// A write slot and an access slot on one store, in CPL 0.
    pub multi_hit_data: MultiHit,
    /// RFLAGS.RF on an armed execution slot, in CPL 0.
    pub rf_honoured: ResumeFlag,
    /// RFLAGS.RF on an armed execution slot, when KVM has to map the instruction's page first, in CPL 0.
    pub rf_over_exit: OverExit,
    /// STI's interrupt shadow, at the exit of an execution slot behind it.
    pub shadow_over_exit: OverExit,
    /// INT3 in CPL 0.
    pub int3_cpl0: Int3,
    /// INT3 in CPL 3.
    pub int3_cpl3: Int3,
    /// Single-step in CPL 0.
    pub ss_cpl0: Step,
    /// Single-step in CPL 3.
    pub ss_cpl3: Step,
    /// Single-step in CPL 3, with the interrupt shadow set before each step (KVM_SET_VCPU_EVENTS).
    pub ss_cpl3_shadow: Step,
    /// Single-step that is set once, in CPL 0.
    pub ss_sticky: StickyStep,
    /// Single-step over a read that KVM emulates, in CPL 0.
    pub ss_over_exit: StepOverExit,
    /// PUSHF under single-step, in CPL 0.
    pub ss_pushf: PushedFlags,
    /// A step over HLT.
    pub hlt_halts: HaltStep,
    /// KVM_GUESTDBG_BLOCKIRQ.
    pub blockirq: BlockIrq,
    /// Debug register accesses of the guest, with DR7.GD armed by us.
    pub gd_exit: DrAccess,
    /// The guest's own execution breakpoint, nothing of ours armed.
    pub guest_x: GuestSlots,
    /// The guest's own write watchpoint, nothing of ours armed.
    pub guest_w: GuestSlots,
    /// The guest's own execution breakpoint while another slot is armed by us.
    pub guest_x_overlaid: GuestSlots,
    /// What the guest wrote to its debug registers while a slot is armed by us.
    pub guest_dr_values: GuestDrValues,
    /// The guest's own single-step while a slot is armed by us.
    pub guest_tf_overlaid: GuestTrapFlag,
    /// KVM_GUESTDBG_INJECT_BP.
    pub inject_bp_advances: InjectBp,
    /// #BP through KVM_SET_VCPU_EVENTS.
    pub inject_bp_events: Inject,
    /// KVM_GUESTDBG_INJECT_DB.
    pub inject_db: Inject,
    /// INT n in CPL 0.
    pub int_n_cpl0: SoftwareInterrupt,
    /// INT n in CPL 3.
    pub int_n_cpl3: SoftwareInterrupt,
    /// INT1 (ICEBP) in CPL 0.
    pub int1_cpl0: SoftwareInterrupt,
    /// INT3 in CPL 0 with nothing armed.
    pub guest_int3_cpl0: SoftwareInterrupt,
    /// OUT.
    pub out_rip_advanced: OutRip,
    /// A store to a read-only memory slot, in CPL 0.
    pub readonly_write: ReadonlyWrite,
    /// A store to a read-only memory slot, in CPL 3.
    pub readonly_write_cpl3: ReadonlyWrite,
    /// A triple fault.
    pub triple_fault: TripleFault,
    /// A signal during a loop.
    pub kick: Kick,
    /// Execution slots in real mode.
    pub x_real_mode: RealModeSlots,
}

impl Capabilities {
    /// Whether there is anything to debug with: execution slots or single-step in kernel code.
    pub fn is_usable(&self) -> bool {
        self.seen.x_cpl0 == Slot::Fires || self.can_step()
    }

    /// What breakpoints and watchpoints are served by here.
    pub fn offer(&self) -> Offer {
        Offer {
            data_slots: self.can_watch_in_hardware(),
            pages: self.can_watch_by_page(),
            patches: self.can_patch(),
            user_patches: self.can_patch_ring_3(),
        }
    }

    /// Whether data slots fire, for kernel code at least.
    pub fn can_watch_in_hardware(&self) -> bool {
        self.seen.w_data == Slot::Fires && self.seen.rw_data == Slot::Fires
    }

    /// Whether writes to a page can be caught by a read-only memory slot, for kernel code at least.
    pub fn can_watch_by_page(&self) -> bool {
        matches!(self.seen.readonly_write, ReadonlyWrite::ExitsBehind | ReadonlyWrite::ExitsBefore)
    }

    /// Whether an INT3 that we put into kernel code comes back to us.
    pub fn can_patch(&self) -> bool {
        matches!(self.seen.int3_cpl0, Int3::DebugExit | Int3::InternalError)
    }

    /// Whether one that we put into code of ring 3 does.
    pub fn can_patch_ring_3(&self) -> bool {
        matches!(self.seen.int3_cpl3, Int3::DebugExit | Int3::InternalError)
    }

    /// Whether kernel code can be single-stepped.
    pub fn can_step(&self) -> bool {
        matches!(self.seen.ss_cpl0, Step::Exact | Step::ExtraExits)
    }
}
