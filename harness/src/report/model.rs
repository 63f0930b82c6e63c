//! What a run came to, as data. Everything that is written about a run (report.json, JUnit, the page, annotations) is
//! made from one [`Report`].
//!
//! Two runs of the same input give equal reports but for what depends on the moment: times, register values, where
//! the other vCPUs were, the console's text with its time stamps. All of that stands in members named `timing`, and
//! nothing else does.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The version of the schema. It grows when a member changes its meaning or goes; new members do not change it.
pub const SCHEMA: u32 = 1;

/// One run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Version of Trapline.
    pub trapline: String,
    /// How it ended.
    pub verdict: VerdictRecord,
    /// What was run.
    pub input: Input,
    /// One for each rule, in the order in which they were given.
    pub traps: Vec<TrapRecord>,
    /// The stop that ended the run, if one did; on a timeout what every vCPU was doing.
    pub stop: Option<StopRecord>,
    /// Each test that the guest reported in TAP or KTAP, in its order.
    pub tests: Vec<TestRecord>,
    /// Files of this report, by what they are (`vmcore`, `console`, ..), relative to its directory.
    pub files: BTreeMap<String, String>,
    /// What went wrong with the report itself, such as a core that found no room.
    pub problems: Vec<String>,
    /// What differs from run to run.
    pub timing: ReportTiming,
}

/// The part of a [`Report`] that depends on the moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ReportTiming {
    /// When the run began: seconds since 1970, UTC.
    pub started: u64,
    /// From the first guest instruction to the end, in milliseconds.
    pub duration_ms: u64,
    /// From the first guest instruction until the guest's first user program ran, if that was seen; milliseconds.
    pub boot_ms: Option<u64>,
    /// How far the kernel has moved itself (KASLR), as far as that was found: what gdb takes behind `symbol-file -o`. Another in
    /// each run.
    #[serde(default)]
    pub kernel_slide: u64,
    /// The traps that were hit and logged last, oldest first.
    pub recent: Vec<HitRecord>,
    /// The console's last lines.
    pub console: Vec<ConsoleLine>,
    /// Lines of the console that are not among these any more. The first of `console` is the line after them.
    pub console_lines_before: u64,
    /// The line of the console, counted from 1, that was the last at the stop, or that a `console:` trap was about.
    pub console_line: Option<u64>,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct VerdictRecord {
    /// In a word.
    pub kind: VerdictKind,
    /// The exit code of `trapline run`.
    pub exit_code: u8,
    /// One line for a person.
    pub text: String,
    /// The status that the guest gave, if it gave one.
    pub guest_status: Option<u32>,
    /// The trap that decided, as an index into [`Report::traps`].
    pub trap: Option<usize>,
}

/// How a run ended, in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum VerdictKind {
    /// The guest ended by itself, with status 0.
    Pass,
    /// The guest gave a status that is not 0.
    GuestFailed,
    /// A trap fired.
    Trap,
    /// The guest's kernel panicked or oopsed.
    Panic,
    /// The time was over.
    Timeout,
    /// The guest could not go on, as by a triple fault.
    Died,
    /// A trap that was to be hit was not.
    MustHit,
    /// A debugger or a signal ended it.
    Killed,
    /// The run could not go on, though the guest could.
    Aborted,
}

/// What was run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Input {
    /// The kernel's path as it was given.
    pub kernel: String,
    /// Its release, as `uname -r` has it, if the symbols tell.
    pub release: Option<String>,
    /// GNU build-id in hex, if it has one.
    pub build_id: Option<String>,
    /// The initrd's path, or what it was made from.
    pub initrd: Option<String>,
    /// Kernel command line.
    pub cmdline: String,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// `--timeout` in milliseconds.
    pub timeout_ms: Option<u64>,
    /// Files with symbols.
    pub symbols: Vec<String>,
    /// The KVM that it ran on: `kvm_amd`, `kvm_intel`, ..
    pub kvm: String,
}

/// One rule and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct TrapRecord {
    /// The rule as it was written.
    pub rule: String,
    /// Its name: given in TOML, else the rule's text.
    pub name: String,
    /// `fail`, `log`, `bt`, `snapshot`, `gdb` or `ignore`.
    pub action: String,
    /// What it watches and how.
    pub targets: Vec<TargetRecord>,
    /// What came of it.
    pub outcome: Outcome,
    /// What differs from run to run.
    pub timing: TrapTiming,
}

/// What came of a trap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It was not hit, or hit as it was to be.
    Passed,
    /// It ended the run.
    Fired,
    /// It was to be hit (`must-hit`) and was not.
    Missed,
}

/// The part of a [`TrapRecord`] that depends on the moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct TrapTiming {
    /// How often it was hit with its condition true, on each vCPU.
    pub hits: Vec<u64>,
    /// How often its condition was false, or could not be evaluated.
    pub unmet: u64,
}

/// One address (or other source) of a trap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct TargetRecord {
    /// Symbol with offset, module in front; or `console`, `hang`, `triple-fault`, `port 0x..`.
    pub what: String,
    /// Linear address as linked.
    pub address: Option<u64>,
    /// Bytes, of a watched range.
    pub len: Option<u64>,
    /// `slot`, `software breakpoint`, `protected page`, `vmm` (it needs nothing of the processor), `refused: WHY`,
    /// `waits for MODULE`.
    pub mechanism: String,
}

/// One hit of a trap.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct HitRecord {
    /// Index into [`Report::traps`].
    pub trap: usize,
    /// Which vCPU.
    pub vcpu: u32,
    /// Where: `symbol+0xoffset`, or the address if it has no name.
    pub at: String,
    /// Source line, if known.
    pub source: Option<Source>,
    /// Value before and after, of a watched variable of at most eight bytes.
    pub change: Option<Change>,
    /// Backtrace, if the action asked for it.
    pub backtrace: Vec<FrameRecord>,
    /// What differs from run to run.
    pub timing: HitTiming,
}

/// The part of a [`HitRecord`] that depends on the moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct HitTiming {
    /// Microseconds since the first guest instruction.
    pub at_us: u64,
    /// RIP.
    pub pc: u64,
    /// How often this trap has been hit before.
    pub hits_before: u64,
}

/// Value of a variable before and after a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Change {
    /// Before, little-endian, zero-extended.
    pub old: u64,
    /// After.
    pub new: u64,
}

/// The world when it was stopped for good.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct StopRecord {
    /// Why, in a line.
    pub reason: String,
    /// The vCPU that it is about; `None` for a timeout.
    pub vcpu: Option<u32>,
    /// Where that vCPU is, as `symbol+0xoffset`.
    pub at: Option<String>,
    /// The source line there; for a watchpoint that of the access.
    pub source: Option<Source>,
    /// What a watched variable was and became.
    pub change: Option<Change>,
    /// The backtrace of that vCPU; empty for a timeout.
    pub backtrace: Vec<FrameRecord>,
    /// What differs from run to run.
    pub timing: StopTiming,
}

/// The part of a [`StopRecord`] that depends on the moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct StopTiming {
    /// Microseconds since the first guest instruction.
    pub at_us: u64,
    /// Every vCPU, the one that stopped among them.
    pub vcpus: Vec<VcpuRecord>,
}

/// One vCPU at a stop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct VcpuRecord {
    /// Its number.
    pub vcpu: u32,
    /// `running`, `halted`, `not started`.
    pub activity: String,
    /// 0 to 3.
    pub ring: u8,
    /// Whether it takes interrupts (RFLAGS.IF).
    pub interrupts: bool,
    /// Where it is, as `symbol+0xoffset`.
    pub at: String,
    /// General registers, RIP, RFLAGS, CR0-CR4, segment bases, by their names in the SDM.
    pub registers: BTreeMap<String, u64>,
    /// Its backtrace.
    pub backtrace: Vec<FrameRecord>,
    /// Why the backtrace ends where it does, if that is not the end of the stack.
    pub backtrace_ends: Option<String>,
    /// How long it ran on after the hit of the vCPU that stopped, in microseconds; 0 for that one.
    pub ran_on_us: u64,
}

/// One function of a backtrace, innermost first. An inlined one has a record of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct FrameRecord {
    /// Its name; the address in hex if it has none.
    pub function: String,
    /// Bytes from the start of the function that it was inlined into, or is.
    pub offset: u64,
    /// The module, if it is not the kernel itself.
    pub module: Option<String>,
    /// Inlined into the next record's function.
    pub inlined: bool,
    /// Source line.
    pub source: Option<Source>,
    /// How the one inside of it came to be.
    pub kind: FrameKind,
}

/// What a frame is to the one inside of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum FrameKind {
    /// It has called it; or it is the innermost.
    Call,
    /// It was interrupted by it.
    Interrupt,
    /// The program in user space.
    User,
}

/// A place in the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Source {
    /// Path as the compiler saw it.
    pub file: String,
    /// Line, from 1.
    pub line: u32,
}

/// One line of the console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ConsoleLine {
    /// Milliseconds since the first guest instruction, when it was complete.
    pub at_ms: u64,
    /// Without its line end; what is not UTF-8 is replaced.
    pub text: String,
}

/// One test that the guest reported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct TestRecord {
    /// Names of the suites that it is in, outermost first (KTAP subtests).
    pub suite: Vec<String>,
    /// Its number in the innermost.
    pub number: u64,
    /// Its name.
    pub name: String,
    /// How it went.
    pub result: TestResult,
    /// The directive's words; if it failed, the diagnostic lines that belong to it, too.
    pub message: Option<String>,
    /// Which of the guest's TAP streams it is in, from 1. A new `TAP version` or `KTAP version` begins one.
    pub stream: u32,
    /// How many of the other records are tests inside of this one. It is a suite if there are any.
    pub subtests: u64,
    /// What differs from run to run.
    pub timing: TestTiming,
}

/// The part of a [`TestRecord`] that depends on the moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct TestTiming {
    /// Milliseconds since the first guest instruction, when its line was complete.
    pub at_ms: u64,
}

/// How a test of the guest went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum TestResult {
    /// `ok`.
    Ok,
    /// `not ok`, or the stream was given up (`Bail out!`).
    Failed,
    /// `# SKIP`.
    Skipped,
    /// `# TODO` or `# XFAIL`: expected to fail, and did.
    Todo,
    /// The plan has it, the output does not.
    Missing,
}
