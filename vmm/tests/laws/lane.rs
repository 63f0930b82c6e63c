//! What this host's KVM can do, as far as the law tests depend on it: found out by trying.
//!
//! Two things cannot be tried, because where they fail they take the machine along: those are known
//! by the name of the lane (`TRAPLINE_LANE`, set by the scripts in tests/lanes).

use std::path::Path;
use std::sync::OnceLock;

use trapline_guests::fixture;
use trapline_vmm::debug::{Breakpoint, RunMode, StopReason, Trigger};

use crate::rig::{Begin, Rig, at};

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
    /// DR6 shows several slots that were hit at once.
    SeveralHits,
    /// The guest's own DR7.GD works while slots of ours are armed. KVM's SVM code does not look at it.
    GeneralDetect,
    /// An execution slot may be armed while a vCPU is in real mode. QEMU's SVM emulation crashes.
    RealModeSlots,
    /// The debug core does not do this yet on these flavours of KVM (issue 3).
    Issue3On(&'static [Flavour]),
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
            Need::RealModeSlots => (lane() != "svm", "no exec slot in real mode"),
            Need::GeneralDetect => (flavour() != Some(Flavour::Amd), "no GD beside ours"),
            Need::DataWatch => (probe(&DATA_WATCH, data_watch), "no data watch"),
            Need::ExecInRing3 => (probe(&EXEC_IN_RING_3, exec_in_ring_3), "no exec slot in ring 3"),
            Need::StepInRing3 => (probe(&STEP_IN_RING_3, step_in_ring_3), "no step in ring 3"),
            Need::SeveralHits => (probe(&SEVERAL_HITS, several_hits), "one hit per DR6"),
            Need::Issue3On(flavours) => (!flavour().is_some_and(|here| flavours.contains(&here)), "issue 3"),
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

static DATA_WATCH: OnceLock<bool> = OnceLock::new();
static EXEC_IN_RING_3: OnceLock<bool> = OnceLock::new();
static STEP_IN_RING_3: OnceLock<bool> = OnceLock::new();
static SEVERAL_HITS: OnceLock<bool> = OnceLock::new();

fn probe(answer: &OnceLock<bool>, ask: fn() -> bool) -> bool {
    *answer.get_or_init(ask)
}

fn data_watch() -> bool {
    let mut rig = Rig::one("watch_exec");
    rig.set(Breakpoint::watch(fixture::WATCH, 8, Trigger::Write)).unwrap();
    matches!(rig.run_first(RunMode::Continue), StopReason::Watchpoint { .. })
}

fn exec_in_ring_3() -> bool {
    let mut rig = Rig::new(&[Begin::Ring3("ring3_line")]);
    rig.set(Breakpoint::exec(at("u_bp1"))).unwrap();
    matches!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(_))
}

fn step_in_ring_3() -> bool {
    let mut rig = Rig::new(&[Begin::Ring3("ring3_line")]);
    rig.run_first(RunMode::Step) == StopReason::Step && rig.pc(0) == at("u_bp1")
}

fn several_hits() -> bool {
    if !probe(&DATA_WATCH, data_watch) {
        return false;
    }
    let mut rig = Rig::one("watch_exec");
    rig.set(Breakpoint::watch(fixture::WATCH, 8, Trigger::Write)).unwrap();
    rig.set(Breakpoint::watch(fixture::WATCH, 8, Trigger::Access)).unwrap();
    rig.run_first(RunMode::Continue);
    rig.coordinator.take_stop().is_some()
}
