//! What this host's KVM can do, as far as the law tests depend on it: the product's own probe says
//! so, and the kind of a skipped trial names the probe's field.
//!
//! What belongs to the emulator under a lane and not to its KVM is known by the name of the lane
//! (`TRAPLINE_LANE`, set by the scripts in tests/lanes).

use std::path::Path;
use std::sync::OnceLock;

use trapline_vmm::probe::{self, Capabilities, MultiHit, OverExit, RealModeSlots, Seen, Slot, Step, StepOverExit};

/// What a trial needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Guest code that does not exit by itself can be interrupted. Under Bochs it cannot.
    Kick,
    /// A data slot fires.
    DataWatch,
    /// An execution slot fires in ring 3.
    ExecInRing3,
    /// Single-step in ring 3 is reported to us.
    StepInRing3,
    /// SYSCALL changes the ring, and SYSRET does. The PVM flavour has its own ways between the rings.
    Syscall,
    /// DR6 shows several slots that were hit at once.
    SeveralHits,
    /// INT3 in ring 0 comes to us: breakpoints can be patched into guest code.
    Patches,
    /// The guest's own DR7.GD works while slots of ours are armed. KVM's SVM code does not look at it.
    GeneralDetect,
    /// The host's kernel lets us trace what SVM guests write to their debug registers, as the svm lane's does.
    DrWrites,
    /// An execution slot may be armed while a vCPU is in real mode. QEMU's SVM emulation crashes.
    RealModeSlots,
    /// RFLAGS.RF is kept when the guest is left before the instruction has run. Bochs 2.7 loses it
    /// (SDM vol. 3, 28.3.3: an EPT violation saves it as 1).
    ResumeFlagOverExits,
    /// The shadow of STI is kept at the exit of a breakpoint behind it. Bochs 2.7 loses it (SDM vol. 3, 28.3.4).
    ShadowOverExits,
    /// A step traps once, even if the guest is left in the middle of it. Bochs 2.7 keeps the trap for
    /// the next entry, whosever that is, and cured it later (SDM vol. 3, 28.3.4: it is saved as clear).
    StepsOverExits,
    /// A page of page tables can be read-only for the guest: its stores there are told, and its walks go on. With
    /// nested paging they do not.
    WatchedTables,
    /// They do not, and it is found out: KVM counts what it emulates, and can be kicked.
    StuckTables,
    /// The probe's answers on this KVM are recorded.
    Record,
}

/// The kernel module behind /dev/kvm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavour {
    Pvm,
    Amd,
    Intel,
}

impl Need {
    /// What is missing here, in the words of the trial's kind.
    pub(crate) fn missing(self) -> Option<&'static str> {
        let (there, missing) = match self {
            Need::Kick => (lane() != "vmx", "no kick"),
            Need::RealModeSlots => {
                (seen().x_real_mode != RealModeSlots::CrashesTheMachine, "no exec slot in real mode: x_real_mode")
            }
            Need::Patches => (capabilities().can_patch(), "INT3 goes to the guest: int3_cpl0"),
            Need::GeneralDetect => (flavour() != Some(Flavour::Amd), "no GD beside ours"),
            Need::DrWrites => (lane() == "svm", "KVM's exits are not traced"),
            Need::DataWatch => (capabilities().can_watch_in_hardware(), "no data watch: w_data, rw_data"),
            Need::ExecInRing3 => (seen().x_cpl3 == Slot::Fires, "no exec slot in ring 3: x_cpl3"),
            Need::StepInRing3 => {
                let steps = |seen| matches!(seen, Step::Exact | Step::ExtraExits);
                (steps(seen().ss_cpl3) || steps(seen().ss_cpl3_shadow), "no step in ring 3: ss_cpl3")
            }
            Need::Syscall => (flavour() != Some(Flavour::Pvm), "no SYSCALL between the rings"),
            Need::SeveralHits => (seen().multi_hit_data == MultiHit::All, "one hit per DR6: multi_hit_data"),
            Need::ResumeFlagOverExits => (seen().rf_over_exit != OverExit::Lost, "RF is lost in an exit: rf_over_exit"),
            Need::ShadowOverExits => {
                (seen().shadow_over_exit != OverExit::Lost, "no STI shadow at an exit: shadow_over_exit")
            }
            Need::StepsOverExits => {
                (seen().ss_over_exit != StepOverExit::TrapsAgain, "a step traps again: ss_over_exit")
            }
            Need::WatchedTables => (flavour() == Some(Flavour::Pvm), "page tables cannot be watched"),
            Need::StuckTables => (flavour() == Some(Flavour::Amd), "no nested paging, or no kick"),
            Need::Record => (crate::doctor::record().is_some(), "no record of this KVM"),
        };
        (!there).then_some(missing)
    }
}

/// What every trial needs and is missing: guests cannot be run here at all.
pub(crate) fn missing_everywhere() -> Option<&'static str> {
    static THERE: OnceLock<bool> = OnceLock::new();
    (!THERE.get_or_init(|| kvm_ioctls::Kvm::new().is_ok())).then_some("no usable /dev/kvm")
}

/// Which KVM this is.
pub(crate) fn flavour() -> Option<Flavour> {
    let modules = [("kvm_pvm", Flavour::Pvm), ("kvm_amd", Flavour::Amd), ("kvm_intel", Flavour::Intel)];
    modules.into_iter().find(|(name, _)| Path::new("/sys/module").join(name).exists()).map(|(_, flavour)| flavour)
}

/// The lane's name, empty on a machine of its own.
pub(crate) fn lane() -> &'static str {
    static LANE: OnceLock<String> = OnceLock::new();
    LANE.get_or_init(|| std::env::var("TRAPLINE_LANE").unwrap_or_default())
}

/// The probe's answer, from its cache if it has one of this host.
pub(crate) fn capabilities() -> &'static Capabilities {
    static ANSWER: OnceLock<Capabilities> = OnceLock::new();
    ANSWER.get_or_init(|| probe::capabilities().expect("there is a KVM, and it can be probed"))
}

fn seen() -> &'static Seen {
    &capabilities().seen
}
