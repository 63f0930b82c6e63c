//! `trapline doctor`: what this host's KVM can really do, for people and for machines.

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;
use trapline_vmm::debug::Offer;
use trapline_vmm::limits::LOOK_INTERVAL;
use trapline_vmm::probe::{
    self, BlockIrq, BrokenClaim, Capabilities, DrAccess, GuestSlots, GuestTrapFlag, HaltStep, InjectBp, Int3, Kick,
    MultiHit, OverExit, PushedFlags, ReadonlyWrite, RealModeSlots, ResumeFlag, Slot, SoftwareInterrupt, Step,
    StepOverExit, TripleFault,
};

use crate::args::DoctorArgs;

/// Widths of the table's columns but the last; with it, a line has 80 columns at most.
const NAME: usize = 29;
const CLAIMED: usize = 9;
const SEEN: usize = 19;
const WIDTH: usize = 80;

/// Nothing here to debug with.
#[derive(Debug)]
pub(crate) struct NotUsable;

impl fmt::Display for NotUsable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "this host's KVM has neither breakpoints nor single-step that work; use another host or kernel")
    }
}

impl std::error::Error for NotUsable {}

/// What --json prints: the library's answer, and what follows from it.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    capabilities: &'a Capabilities,
    usable: bool,
    broken_claims: Vec<BrokenClaim>,
    guest_dr_gap_ms: Option<u64>,
}

/// Tries everything out, always afresh.
pub(crate) fn doctor(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let host = probe::capabilities_afresh()?;
    let text = if args.json { json(&host)? } else { table(&host) };
    match io::stdout().write_all(text.as_bytes()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        result => result.context("cannot write to stdout")?,
    }
    if !host.is_usable() {
        return Err(NotUsable.into());
    }
    Ok(ExitCode::SUCCESS)
}

fn json(host: &Capabilities) -> anyhow::Result<String> {
    let report = Report {
        capabilities: host,
        usable: host.is_usable(),
        broken_claims: host.broken_claims(),
        guest_dr_gap_ms: guest_dr_gap_ms(host),
    };
    Ok(serde_json::to_string_pretty(&report)? + "\n")
}

/// How long it may take until a breakpoint that the guest sets in its own debug registers is served
/// beside ours: 0 where such a write comes to us, none where that is not known.
fn guest_dr_gap_ms(host: &Capabilities) -> Option<u64> {
    match host.seen.gd_exit {
        DrAccess::Exits => Some(0),
        DrAccess::Never => u64::try_from(LOOK_INTERVAL.as_millis()).ok(),
        DrAccess::NotAsked | DrAccess::Unexpected => None,
    }
}

/// One line of the table.
struct Row {
    name: &'static str,
    claimed: Option<bool>,
    seen: &'static str,
    served: Cow<'static, str>,
}

fn row(
    name: &'static str,
    claimed: impl Into<Option<bool>>,
    seen: &'static str,
    served: impl Into<Cow<'static, str>>,
) -> Row {
    Row { name, claimed: claimed.into(), seen, served: served.into() }
}

fn table(host: &Capabilities) -> String {
    let mut text = heading(host);
    text += &line("", "claimed", "seen", "served by");
    for (title, rows) in sections(host) {
        let _ = writeln!(text, "{title}");
        for Row { name, claimed, seen, served } in rows {
            let claimed = claimed.map_or("", |claimed| if claimed { "yes" } else { "no" });
            text += &line(&format!("  {name}"), claimed, seen, &served);
        }
    }
    text += "\nclaimed: what this KVM says it can do. seen: what small guests saw it do, in\n\
             capitals where a debugger would expect better. served by: what is used here.\n";
    let broken = host.broken_claims();
    if !broken.is_empty() {
        text += "\nClaimed by this KVM, and not so:\n";
        for BrokenClaim { claim, what, .. } in broken {
            text += &item(&format!("{claim}: {what}"));
        }
    }
    let notes = notes(host);
    if !notes.is_empty() {
        text += "\nGood to know:\n";
        notes.iter().for_each(|note| text += &item(note));
    }
    if !host.remarks.is_empty() {
        text += "\nNot understood (please report):\n";
        host.remarks.iter().for_each(|remark| text += &item(remark));
    }
    let verdict = if host.is_usable() { "A debugger is usable here." } else { "No debugger is usable here." };
    let _ = write!(text, "\n{verdict}\n");
    text
}

fn heading(host: &Capabilities) -> String {
    let release = host.host.kernel.split(' ').next().unwrap_or_default();
    let parts = [&*host.host.module, release, &*host.host.cpu_name];
    let known: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    let text = known.join(", ");
    match text.char_indices().nth(WIDTH - 1) {
        Some((at, _)) => format!("{}\n\n", text[..at].trim_end()),
        None => text + "\n\n",
    }
}

fn line(name: &str, claimed: &str, seen: &str, served: &str) -> String {
    let text = format!("{name:NAME$}{claimed:CLAIMED$}{seen:SEEN$}{served}");
    text.trim_end().to_owned() + "\n"
}

/// A list item, broken into lines at its spaces.
fn item(text: &str) -> String {
    let mut out = String::from("  -");
    let mut column = out.len();
    for word in text.split_whitespace() {
        if column + 1 + word.len() > WIDTH && column > 4 {
            out += "\n   ";
            column = 3;
        }
        out += " ";
        out += word;
        column += 1 + word.len();
    }
    out + "\n"
}

fn sections(host: &Capabilities) -> [(&'static str, Vec<Row>); 5] {
    let (claims, seen, offer) = (&host.claims, &host.seen, host.offer());
    let hardware = claims.hardware_breakpoints;
    [
        (
            "Breakpoints",
            vec![
                row("kernel code", hardware, slot(seen.x_cpl0), by_slots(seen.x_cpl0, "")),
                row("user code", hardware, slot(seen.x_cpl3), by_slots(seen.x_cpl3, NOT_SERVED)),
                row("INT3, kernel code", claims.software_breakpoints, int3(seen.int3_cpl0), by_patches(offer.patches)),
                row(
                    "INT3, user code",
                    claims.software_breakpoints,
                    int3(seen.int3_cpl3),
                    by_patches(offer.user_patches),
                ),
            ],
        ),
        (
            "Watchpoints",
            vec![
                row("writes of kernel code", hardware, slot(seen.w_data), by_watches(seen.w_data, offer)),
                row("writes of user code", hardware, slot(seen.w_data_cpl3), by_watches(seen.w_data_cpl3, offer)),
                row("reads and writes", hardware, slot(seen.rw_data), by_slots(seen.rw_data, "refused")),
                row("read-only pages, kernel", claims.readonly_memory, readonly(seen.readonly_write), by_pages(offer)),
                row(
                    "read-only pages, user",
                    claims.readonly_memory,
                    readonly(seen.readonly_write_cpl3),
                    by_pages(offer),
                ),
            ],
        ),
        (
            "Single-step",
            vec![
                row("kernel code", claims.single_step, step(seen.ss_cpl0), by_kvm(seen.ss_cpl0)),
                row("user code", claims.single_step, step(seen.ss_cpl3), by_kvm_in_user_code(host)),
                row("interrupts held back", claims.block_irq, block_irq(seen.blockirq), by_block_irq(seen.blockirq)),
                row("HLT", None, halt(seen.hlt_halts), "Trapline itself"),
            ],
        ),
        (
            "The guest's own debugging",
            vec![
                row("its breakpoints, alone", None, guest_slots(seen.guest_x), by_guest(seen.guest_x)),
                row("its watchpoints, alone", None, guest_slots(seen.guest_w), by_guest(seen.guest_w)),
                row("its breakpoints beside ours", None, guest_slots(seen.guest_x_overlaid), "slots that we leave"),
                row("its steps beside ours", None, guest_step(seen.guest_tf_overlaid), by_us(seen.guest_tf_overlaid)),
                row("its writes to DR0-7", None, dr_access(seen.gd_exit), by_looks(host)),
            ],
        ),
        ("Control", vec![row("stopping a running vCPU", None, kick(seen.kick), by_signal(seen.kick))]),
    ]
}

fn slot(slot: Slot) -> &'static str {
    match slot {
        Slot::Fires => "fires",
        Slot::Never => "NEVER FIRES",
        Slot::ToGuest => "GOES TO THE GUEST",
        Slot::NotAsked => NOT_ASKED,
        Slot::Unexpected => UNEXPECTED,
    }
}

fn by_slots(slot: Slot, otherwise: &'static str) -> &'static str {
    if slot == Slot::Fires { "debug registers" } else { otherwise }
}

fn by_watches(slot: Slot, offer: Offer) -> &'static str {
    match slot {
        Slot::Fires => "debug registers",
        _ if offer.pages => "read-only pages",
        _ => "refused",
    }
}

fn by_patches(offered: bool) -> &'static str {
    if offered { "beyond four slots" } else { "not used" }
}

fn by_pages(offer: Offer) -> &'static str {
    match offer {
        Offer { pages: false, .. } => "not used",
        Offer { data_slots: true, .. } => "beyond four slots",
        _ => "in place of slots",
    }
}

fn by_kvm(step: Step) -> &'static str {
    if matches!(step, Step::Exact | Step::ExtraExits) { "KVM" } else { NOT_SERVED }
}

fn by_kvm_in_user_code(host: &Capabilities) -> &'static str {
    if steps_user_code_in_part(host) { "KVM, in part" } else { by_kvm(host.seen.ss_cpl3) }
}

/// Ring 3 may have another way than ring 0, for some instructions.
fn steps_user_code_in_part(host: &Capabilities) -> bool {
    by_kvm(host.seen.ss_cpl3) == NOT_SERVED && matches!(host.seen.ss_cpl3_shadow, Step::Exact)
}

fn by_block_irq(block: BlockIrq) -> &'static str {
    if block == BlockIrq::Blocks { "KVM" } else { NOT_SERVED }
}

fn by_guest(slots: GuestSlots) -> &'static str {
    if slots == GuestSlots::ToGuest { "the guest" } else { NOT_SERVED }
}

fn by_us(step: GuestTrapFlag) -> &'static str {
    match step {
        GuestTrapFlag::ExitsToUs => "Trapline itself",
        GuestTrapFlag::ToGuest => "the guest",
        _ => NOT_SERVED,
    }
}

/// How it is found out what the guest wants in its debug registers.
fn by_looks(host: &Capabilities) -> String {
    match guest_dr_gap_ms(host) {
        Some(0) => "Trapline itself".to_owned(),
        Some(gap) => format!("a look every {gap} ms"),
        None => NOT_SERVED.to_owned(),
    }
}

fn by_signal(kick: Kick) -> &'static str {
    if kick == Kick::Interrupts { "a signal" } else { NOT_SERVED }
}

const NOT_SERVED: &str = "not served";
const NOT_ASKED: &str = "not asked";
const UNEXPECTED: &str = "NOT UNDERSTOOD";

fn int3(int3: Int3) -> &'static str {
    match int3 {
        Int3::DebugExit => "exits",
        Int3::InternalError => "EMULATION FAILURE",
        Int3::ToGuest => "GOES TO THE GUEST",
        Int3::NotAsked => NOT_ASKED,
        Int3::Unexpected => UNEXPECTED,
    }
}

fn readonly(write: ReadonlyWrite) -> &'static str {
    match write {
        ReadonlyWrite::ExitsBehind | ReadonlyWrite::ExitsBefore => "write exits",
        ReadonlyWrite::Never => "NEVER EXITS",
        ReadonlyWrite::EmulationFailure => "EMULATION FAILURE",
        ReadonlyWrite::NotAsked => NOT_ASKED,
        ReadonlyWrite::Unexpected => UNEXPECTED,
    }
}

fn step(step: Step) -> &'static str {
    match step {
        Step::Exact => "exact",
        Step::ExtraExits => "with extra exits",
        Step::ToGuest => "GOES TO THE GUEST",
        Step::Never => "NEVER STOPS",
        Step::NotAsked => NOT_ASKED,
        Step::Unexpected => UNEXPECTED,
    }
}

fn block_irq(block: BlockIrq) -> &'static str {
    match block {
        BlockIrq::Blocks => "yes",
        BlockIrq::Ignored => "NO",
        BlockIrq::NotAsked => NOT_ASKED,
        BlockIrq::Unexpected => UNEXPECTED,
    }
}

fn halt(halt: HaltStep) -> &'static str {
    match halt {
        HaltStep::Halts => "halts",
        HaltStep::RunsOn => "DOES NOT HALT",
        HaltStep::HaltsLater => "HALTS TOO LATE",
        HaltStep::NoStop => "halts, no stop",
        HaltStep::NotAsked => NOT_ASKED,
        HaltStep::Unexpected => UNEXPECTED,
    }
}

fn guest_slots(slots: GuestSlots) -> &'static str {
    match slots {
        GuestSlots::ToGuest => "fire",
        GuestSlots::ExitsToUs => "exit to us",
        GuestSlots::Never => "NEVER FIRE",
        GuestSlots::NotAsked => NOT_ASKED,
        GuestSlots::Unexpected => UNEXPECTED,
    }
}

fn guest_step(step: GuestTrapFlag) -> &'static str {
    match step {
        GuestTrapFlag::ExitsToUs => "exit to us",
        GuestTrapFlag::ToGuest => "go to the guest",
        GuestTrapFlag::Never => "NEVER STOP",
        GuestTrapFlag::NotAsked => NOT_ASKED,
        GuestTrapFlag::Unexpected => UNEXPECTED,
    }
}

fn dr_access(access: DrAccess) -> &'static str {
    match access {
        DrAccess::Exits => "exit",
        DrAccess::Never => "do not exit",
        DrAccess::NotAsked => NOT_ASKED,
        DrAccess::Unexpected => UNEXPECTED,
    }
}

fn kick(kick: Kick) -> &'static str {
    match kick {
        Kick::Interrupts => "works",
        Kick::Never => "NEVER STOPS",
        Kick::NotAsked => NOT_ASKED,
        Kick::Unexpected => UNEXPECTED,
    }
}

/// What the table has no line for and a user may run into.
fn notes(host: &Capabilities) -> Vec<String> {
    let seen = &host.seen;
    let mut notes: Vec<String> = Vec::new();
    if let Some(gap) = guest_dr_gap_ms(host).filter(|gap| *gap > 0) {
        // The tracing of KVM's SVM code tells of these writes (`dr_writes` in the library).
        let unless =
            if host.host.module == "kvm_amd" { " Who may trace the host's kernel, as root, misses none." } else { "" };
        notes.push(format!(
            "This KVM does not say when the guest writes its own debug registers. While a slot of ours is armed, a \
             breakpoint that the guest sets for the first time may be missed for up to {gap} ms of running.{unless}",
        ));
    }
    let mut note = |holds: bool, text: &str| {
        if holds {
            notes.push(text.to_owned());
        }
    };
    note(
        steps_user_code_in_part(host),
        "User code is stepped over instructions that KVM can emulate; a step of others is refused, with a reason.",
    );
    note(
        seen.rf_honoured == ResumeFlag::Ignored,
        "RFLAGS.RF does not skip a breakpoint of ours: it is stepped over with the slot off.",
    );
    note(
        seen.rf_over_exit == OverExit::Lost,
        "A breakpoint on an instruction that faults may be told again when the guest's handler returns.",
    );
    note(
        seen.ss_over_exit == StepOverExit::TrapsAgain,
        "After the step of an instruction that KVM emulates the guest may get a #DB that is nobody's.",
    );
    note(seen.multi_hit_data == MultiHit::First, "Of several watchpoints hit at once, the first only is told.");
    note(seen.ss_pushf == PushedFlags::HasTrapFlag, "A stepped PUSHF stores our trap flag: it is taken out again.");
    note(
        seen.hlt_halts == HaltStep::HaltsLater,
        "KVM carries out a stepped HLT after all, one instruction late, wherever that is.",
    );
    let failures = [seen.int_n_cpl0, seen.int1_cpl0, seen.guest_int3_cpl0];
    note(
        failures.contains(&SoftwareInterrupt::EmulationFailure),
        "INT n, INT1 or INT3 in kernel code is an emulation failure for this KVM.",
    );
    note(seen.int_n_cpl3 == SoftwareInterrupt::InvalidOpcode, "INT n in user code raises #UD in the guest.");
    note(
        matches!(seen.inject_bp_advances, InjectBp::Lost | InjectBp::Elsewhere),
        "A #BP that is given to the guest is lost, or returns to a wrong address.",
    );
    note(seen.triple_fault == TripleFault::StateLost, "After a triple fault the vCPU's registers are lost.");
    note(
        seen.x_real_mode == RealModeSlots::CrashesTheMachine,
        "A breakpoint that is armed while a vCPU starts in real mode crashes this machine's emulator: use \
         --ap-start mailbox.",
    );
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(text: &str) -> Capabilities {
        serde_json::from_str(text).expect("a recorded answer")
    }

    fn hosts() -> [Capabilities; 3] {
        [
            include_str!("../tests/doctor/host.json"),
            include_str!("../tests/doctor/svm.json"),
            include_str!("../tests/doctor/vmx.json"),
        ]
        .map(recorded)
    }

    #[test]
    fn no_line_is_wider_than_a_terminal() {
        for mut host in hosts() {
            host.host.cpu_name = "Überlanger Name ".repeat(20);
            host.remarks = vec!["a remark that goes on ".repeat(20), "x".repeat(70)];
            for line in table(&host).lines() {
                assert!(line.chars().count() <= WIDTH, "{line}");
                assert_eq!(line, line.trim_end());
            }
        }
    }

    #[test]
    fn what_is_claimed_and_does_not_work_is_told() {
        let [host, svm, _] = hosts();
        let text = table(&host);
        assert!(text.contains("  writes of kernel code      yes      NEVER FIRES"), "{text}");
        assert!(text.contains("  - KVM_GUESTDBG_USE_HW_BP: write slots never fire in kernel code\n"), "{text}");
        assert!(text.contains("  - KVM_GUESTDBG_USE_SW_BP: INT3 in kernel code is an emulation failure\n"), "{text}");
        let text = table(&svm);
        assert!(text.contains("  writes of kernel code      yes      fires              debug registers\n"), "{text}");
        assert!(text.contains("INT3 in kernel code goes to the guest\n") && !text.contains("never fire"), "{text}");
    }

    #[test]
    fn how_long_a_write_of_the_guest_may_go_unseen_is_told() {
        let [host, svm, vmx] = hosts();
        for missed in [host, svm] {
            let text = table(&missed);
            assert!(
                text.contains("  its writes to DR0-7                 do not exit        a look every 10 ms\n"),
                "{text}"
            );
            assert!(text.contains("up to 10 ms"), "{text}");
            assert_eq!(text.contains("misses none"), missed.host.module == "kvm_amd", "{text}");
            assert_eq!(guest_dr_gap_ms(&missed), Some(10));
        }
        let text = table(&vmx);
        assert!(text.contains("  its writes to DR0-7                 exit               Trapline itself\n"), "{text}");
        assert!(!text.contains("10 ms"), "{text}");
        assert_eq!(guest_dr_gap_ms(&vmx), Some(0));
    }

    #[test]
    fn a_host_where_nothing_works_is_said_to_be_useless() {
        let [mut host, ..] = hosts();
        host.seen.x_cpl0 = Slot::Never;
        assert!(host.is_usable());
        host.seen.ss_cpl0 = Step::Never;
        assert!(!host.is_usable());
        assert!(table(&host).ends_with("\nNo debugger is usable here.\n"));
    }

    #[test]
    fn the_json_is_the_librarys_answer_and_what_follows() {
        for host in hosts() {
            let mut value: serde_json::Value = serde_json::from_str(&json(&host).expect("text")).expect("JSON");
            let object = value.as_object_mut().expect("an object");
            assert_eq!(object.remove("usable"), Some(true.into()));
            assert_eq!(object.remove("guest_dr_gap_ms"), Some(guest_dr_gap_ms(&host).into()));
            let broken = object.remove("broken_claims").expect("a list");
            assert_eq!(broken.as_array().map(Vec::len), Some(host.broken_claims().len()));
            assert_eq!(serde_json::from_value::<Capabilities>(value).expect("the library's form"), host);
        }
    }
}
