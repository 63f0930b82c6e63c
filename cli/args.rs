//! The command line: what it takes, and what it refuses before anything is started.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use trapline_gdbstub_glue::Address;
use trapline_harness::initramfs;
use trapline_vmm::boot::{ApStart, Format};
use trapline_vmm::devices::virtio::DiskConfig;
use trapline_vmm::limits::{MAX_MEMORY, MAX_VCPUS, MIB, MIN_MEMORY};

/// What the help of `run` ends with.
const RUN_AFTER: &str = "\
Examples:
  trapline run --gdb :1234 --wait
  trapline run vmlinuz --initrd initrd --cpus 2 --cmdline 'console=ttyS0 nokaslr' --gdb :1234 --wait
  trapline run vmlinuz --initrd initrd --symbols vmlinux --trap panic --trap 'write:init_task.flags =log' \
               --timeout 60s --report out
  trapline run vmlinuz --timeout 60s --exec ./my-test some-argument -- --verbose

Exit codes:
    0  the guest ended by itself, or the debugger killed it
    1  the guest reported failure: it wrote a value other than 0 to port 0xf4, or a failed test (TAP, KTAP)
    3  a trap fired
    4  the guest's kernel panicked: a trap on it, pvpanic, or the console says so
    5  --timeout was over
    6  the guest died: triple fault, or KVM could not go on
    7  a trap with must-hit was never hit
   64  bad input: command line, kernel, initrd, a trap, a place that cannot be written
   69  this host cannot do it: no usable /dev/kvm, an occupied port, a trap that nothing serves here; or
       all was well and the report could not be written
  130  Ctrl-A x; with another number from 129 on, a signal ended the run (128 + its number)";

/// What the help of `plan` ends with.
const PLAN_AFTER: &str = "\
Takes what `run` takes, and says what would serve each trap on this host: a slot of the debug registers, a
software breakpoint, a protected page, Trapline itself, or nothing.

Exit codes:
    0  every trap would be served
   64  bad input, such as a symbol that is not there
   69  this host cannot serve one of them";

/// What the help of `open` ends with.
const OPEN_AFTER: &str = "\
BUNDLE is the directory that `run --report` has written, on this host or on another one with a processor of
the same vendor. All registers, memory and devices are as they were; breakpoints are not part of it. Time
has stood still for the guest, but for its real-time clock. gdb may look around, step, and let it go on.

Exit codes:
    0 to 6  as those of `run`, if the guest is let go on to its end
   64  bad input: what is no bundle, or damaged
   69  this host cannot do it: another processor vendor or KVM, features that the guest was told of and
       that are not here, no usable /dev/kvm, an occupied port
  130  Ctrl-A x; with another number from 129 on, a signal ended it (128 + its number)";

/// What the help of `doctor` ends with.
const DOCTOR_AFTER: &str = "\
Tiny guests try each mechanism; nothing is installed and nothing of this machine is changed. What they
saw is kept in ~/.cache/trapline, for `run`, until the kernel, the KVM module, the processor or Trapline
itself changes.

Exit codes:
    0  a debugger is usable here
   69  it is not: no usable /dev/kvm, or neither breakpoints nor single-step work";

/// A debugger that sits under a guest kernel.
#[derive(Debug, Parser)]
#[command(name = "trapline", version, about, propagate_version = true, arg_required_else_help = false)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boots a guest on KVM and runs it, under a gdb stub if asked to
    #[command(after_help = RUN_AFTER)]
    Run(Box<RunArgs>),
    /// Shows what the traps of a run would become, without running it
    #[command(after_help = PLAN_AFTER)]
    Plan(Box<PlanArgs>),
    /// Opens the report of a run: a debugger at the very instruction where it ended
    #[command(after_help = OPEN_AFTER)]
    Open(OpenArgs),
    /// Shows what this host's KVM can really do, as opposed to what it claims
    #[command(after_help = DOCTOR_AFTER)]
    Doctor(DoctorArgs),
    /// Writes the built-in demo guest, an ELF with symbols, to a file
    DemoGuest {
        /// The file to write
        output: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// For machines: one JSON object, described in the user guide
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// bzImage, ELF vmlinux, Multiboot 1 image or bare-metal ELF64 [default: the built-in demo guest]
    #[arg(value_name = "KERNEL")]
    pub(crate) kernel: Option<PathBuf>,

    /// KERNEL, as an option
    #[arg(long = "kernel", value_name = "FILE", conflicts_with = "kernel")]
    pub(crate) kernel_option: Option<PathBuf>,

    /// Initial RAM disk, or the one module of a PVH or Multiboot kernel
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) made: MadeInitrd,

    /// Kernel command line [default: empty; with --exec or --rootfs 'console=ttyS0 panic=-1']
    #[arg(long, value_name = "STRING")]
    pub(crate) cmdline: Option<String>,

    /// Raw disk image or block device, as the next virtio disk (/dev/vda, ..); FILE,ro: not to be written
    #[arg(long = "disk", value_name = "FILE[,ro]", value_parser = parse_disk)]
    pub(crate) disks: Vec<DiskConfig>,

    /// Number of vCPUs [default: 1, or 2 for the built-in guest]
    #[arg(long, value_name = "N", value_parser = parse_cpus)]
    pub(crate) cpus: Option<u32>,

    /// Guest memory, with suffix K, M or G
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_memory)]
    pub(crate) memory: u64,

    /// Serve gdb here: :PORT (loopback), HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    pub(crate) gdb: Option<Address>,

    /// Allow an ADDR that other machines can reach: whoever connects there controls the guest
    #[arg(long, requires = "gdb")]
    pub(crate) gdb_expose: bool,

    /// Hold the guest at its first instruction until gdb continues it
    #[arg(long, requires = "gdb")]
    pub(crate) wait: bool,

    /// End the run with exit code 5 after this time (such as 500ms, 60s, 5m)
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub(crate) timeout: Option<Duration>,

    /// Where the guest's console goes: stdio, none or file:PATH
    #[arg(long, value_name = "WHERE", default_value = "stdio", value_parser = parse_console)]
    pub(crate) console: ConsoleTarget,

    #[command(flatten)]
    pub(crate) headless: HeadlessArgs,

    /// How the other vCPUs are started
    #[arg(long, value_name = "HOW", default_value = "sipi")]
    pub(crate) ap_start: ApStartArg,

    /// Boot the kernel as this format instead of what it looks like
    #[arg(long, value_name = "FORMAT")]
    pub(crate) boot_protocol: Option<FormatArg>,
}

/// What a run that nobody watches is asked for.
#[derive(Debug, Args)]
#[command(next_help_heading = "Traps and reports")]
pub(crate) struct HeadlessArgs {
    /// A trap: what to watch, when, and what to do then; docs/traps.md has the grammar
    #[arg(long = "trap", value_name = "RULE", allow_hyphen_values = true)]
    pub(crate) traps: Vec<String>,

    /// Traps from a TOML file
    #[arg(long = "traps", value_name = "FILE")]
    pub(crate) trap_files: Vec<PathBuf>,

    /// Symbols: vmlinux, its debug file, System.map, a module [default: the kernel's own]
    #[arg(long, value_name = "FILE")]
    pub(crate) symbols: Vec<PathBuf>,

    /// Write a report into this directory: a page, JSON, JUnit, console, and a core to come back to with `trapline open`
    #[arg(long, value_name = "DIR")]
    pub(crate) report: Option<PathBuf>,

    /// Write JUnit XML
    #[arg(long, value_name = "FILE")]
    pub(crate) junit: Option<PathBuf>,

    /// Write what happens as it happens, one JSON object a line
    #[arg(long, value_name = "FILE")]
    pub(crate) events: Option<PathBuf>,

    /// Write the guest's memory and registers, for gdb, drgn and crash, if the run does not pass
    #[arg(long, value_name = "FILE")]
    pub(crate) vmcore: Option<PathBuf>,

    /// Compress the core: kdump's format, which crash and drgn read, and gdb does not
    #[arg(long)]
    pub(crate) compress: bool,
}

impl HeadlessArgs {
    /// Whether anything of it was asked for.
    pub(crate) fn is_wanted(&self) -> bool {
        let files = [&self.report, &self.junit, &self.events, &self.vmcore];
        !self.traps.is_empty() || !self.trap_files.is_empty() || files.iter().any(|file| file.is_some())
    }
}

#[derive(Debug, Args)]
pub(crate) struct OpenArgs {
    /// Directory of the report
    pub(crate) bundle: PathBuf,

    /// Where gdb is served: :PORT (loopback), HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR", default_value = ":1234")]
    pub(crate) gdb: Address,

    /// Let ADDR be reachable from other machines, without any password
    #[arg(long)]
    pub(crate) gdb_expose: bool,

    /// Where the guest's console goes from here on: stdio, none or file:PATH
    #[arg(long, value_name = "WHERE", default_value = "stdio", value_parser = parse_console)]
    pub(crate) console: ConsoleTarget,

    /// The guest's disks in their order, or copies of them [default: those that it had, if it could not write to any]
    #[arg(long = "disk", value_name = "FILE[,ro]", value_parser = parse_disk)]
    pub(crate) disks: Vec<DiskConfig>,

    /// End it after this time, such as 60s or 5m
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub(crate) timeout: Option<Duration>,
}

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) run: RunArgs,

    /// For machines: one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// An initrd that is made for this run.
#[derive(Debug, Args)]
#[command(next_help_heading = "Initial RAM disk made for the run")]
pub(crate) struct MadeInitrd {
    /// Boot Linux to run this program; its exit status ends the run. ARGs that begin with - go behind --
    #[arg(long, value_names = ["PROGRAM", "ARG"], num_args = 1.., conflicts_with = "initrd")]
    pub(crate) exec: Vec<OsString>,

    /// Make this directory the guest's /, with its own /init, or to run --exec's PROGRAM of it
    #[arg(long, value_name = "DIR", conflicts_with = "initrd")]
    pub(crate) rootfs: Option<PathBuf>,

    /// Load this kernel module (.ko, also .xz, .zst, .gz) before the program runs; may be repeated, in that order
    #[arg(long, value_name = "FILE", requires = "exec")]
    pub(crate) module: Vec<PathBuf>,

    /// More arguments for --exec's PROGRAM
    #[arg(last = true, value_name = "ARG", requires = "exec")]
    pub(crate) exec_args: Vec<OsString>,
}

impl MadeInitrd {
    /// Whether one is to be made.
    pub(crate) fn is_wanted(&self) -> bool {
        !self.exec.is_empty() || self.rootfs.is_some()
    }
}

impl RunArgs {
    /// The kernel command line, with its default.
    pub(crate) fn cmdline(&self) -> &str {
        match &self.cmdline {
            Some(cmdline) => cmdline,
            None if self.made.is_wanted() => initramfs::CMDLINE,
            None => "",
        }
    }

    /// The kernel, whichever way it was given.
    pub(crate) fn kernel(&self) -> Option<&PathBuf> {
        self.kernel.as_ref().or(self.kernel_option.as_ref())
    }

    /// The number of vCPUs, with its default.
    pub(crate) fn cpus(&self) -> u32 {
        self.cpus.unwrap_or(if self.kernel().is_none() { 2 } else { 1 })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ConsoleTarget {
    Stdio,
    None,
    File(PathBuf),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ApStartArg {
    /// INIT and SIPI, through real mode, as on a PC
    Sipi,
    /// The ACPI wakeup mailbox, in long mode from their first instruction (Linux 5.17 and later)
    Mailbox,
}

impl From<ApStartArg> for ApStart {
    fn from(arg: ApStartArg) -> Self {
        match arg {
            ApStartArg::Sipi => ApStart::Sipi,
            ApStartArg::Mailbox => ApStart::Mailbox,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormatArg {
    /// Linux bzImage
    Bzimage,
    /// ELF with a PVH note
    Pvh,
    /// Linux vmlinux, 64-bit entry
    Linux64,
    /// Multiboot 1
    Multiboot,
    /// ELF64, entered in long mode
    BareMetal,
}

impl From<FormatArg> for Format {
    fn from(arg: FormatArg) -> Self {
        match arg {
            FormatArg::Bzimage => Format::BzImage,
            FormatArg::Pvh => Format::Pvh,
            FormatArg::Linux64 => Format::Linux64,
            FormatArg::Multiboot => Format::Multiboot,
            FormatArg::BareMetal => Format::BareMetal,
        }
    }
}

fn parse_cpus(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(cpus) if (1..=MAX_VCPUS).contains(&cpus) => Ok(cpus),
        _ => Err(format!("give a number of vCPUs from 1 to {MAX_VCPUS}")),
    }
}

fn parse_memory(text: &str) -> Result<u64, String> {
    let advice = format!("give a size from {} M to {} M, such as 256M or 2G", MIN_MEMORY / MIB, MAX_MEMORY / MIB);
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| advice.clone())?;
    match number.checked_mul(1 << shift) {
        Some(bytes) if (MIN_MEMORY..=MAX_MEMORY).contains(&bytes) => Ok(bytes),
        _ => Err(advice),
    }
}

fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    let (path, read_only) = text.strip_suffix(",ro").map_or((text, false), |path| (path, true));
    match path {
        "" => Err("give a file, or a file and ,ro".to_owned()),
        path => Ok(DiskConfig { path: path.into(), read_only }),
    }
}

fn parse_time(text: &str) -> Result<Duration, String> {
    let advice = || "give a time such as 500ms, 60s or 5m".to_owned();
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..at].parse().map_err(|_| advice())?;
    let millis = match &text[at..] {
        "ms" => Some(number),
        "" | "s" => number.checked_mul(1_000),
        "m" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        _ => None,
    };
    // A century is as good as no limit, and far from where timers overflow.
    match millis {
        Some(millis @ 1..3_000_000_000_000) => Ok(Duration::from_millis(millis)),
        _ => Err(advice()),
    }
}

fn parse_console(text: &str) -> Result<ConsoleTarget, String> {
    match text.split_once(':') {
        None if text == "stdio" => Ok(ConsoleTarget::Stdio),
        None if text == "none" => Ok(ConsoleTarget::None),
        Some(("file", path)) if !path.is_empty() => Ok(ConsoleTarget::File(path.into())),
        _ => Err("give stdio, none or file:PATH".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    fn run_args(line: &str) -> Result<RunArgs, String> {
        let words = ["trapline", "run"].into_iter().chain(line.split(' '));
        match Cli::try_parse_from(words).map_err(|error| error.to_string())?.command {
            Command::Run(args) => Ok(*args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_program_and_its_arguments() {
        let args = run_args("vmlinuz --exec ./test one two --cpus 2 -- --three -4").unwrap();
        assert_eq!(args.made.exec, ["./test", "one", "two"]);
        assert_eq!(args.made.exec_args, ["--three", "-4"]);
        assert_eq!((args.cpus(), args.cmdline()), (2, initramfs::CMDLINE));
        let args = run_args("--kernel vmlinuz --cmdline quiet --exec ./test -- -v").unwrap();
        assert_eq!(args.made.exec, ["./test"]);
        assert_eq!((args.made.exec_args, args.cmdline), (vec!["-v".into()], Some("quiet".to_owned())));
        assert_eq!(run_args("vmlinuz").unwrap().cmdline(), "");
        for bad in ["v --exec t --initrd i", "v --rootfs d --initrd i", "v --module m", "v -- x", "v --exec"] {
            assert!(run_args(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_memory("256M"), Ok(256 << 20));
        assert_eq!(parse_memory("4g"), Ok(4 << 30));
        assert_eq!(parse_memory("4194304"), Ok(4 << 20));
        for bad in ["", "M", "0", "-1", "1.5G", "256MB", "99999999999G", "1K", "é"] {
            assert!(parse_memory(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(parse_time("60s"), Ok(Duration::from_secs(60)));
        assert_eq!(parse_time("2"), Ok(Duration::from_secs(2)));
        assert_eq!(parse_time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_time("5m"), Ok(Duration::from_secs(300)));
        for bad in ["", "s", "0", "-1s", "1.5s", "9999999999999999999s", "18446744073709551615m", "1 s", "1é"] {
            assert!(parse_time(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn vcpus() {
        assert_eq!(parse_cpus("64"), Ok(64));
        for bad in ["0", "65", "10000", "-1", "two", ""] {
            assert!(parse_cpus(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn disks() {
        let disk = |path: &str, read_only| Ok(DiskConfig { path: path.into(), read_only });
        assert_eq!(parse_disk("a.img"), disk("a.img", false));
        assert_eq!(parse_disk("a,b.img,ro"), disk("a,b.img", true));
        assert_eq!(parse_disk("a.img,rw"), disk("a.img,rw", false));
        for bad in ["", ",ro"] {
            assert!(parse_disk(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn consoles() {
        assert_eq!(parse_console("file:/x"), Ok(ConsoleTarget::File("/x".into())));
        for bad in ["", "file:", "file", "stdio:", "tty"] {
            assert!(parse_console(bad).is_err(), "{bad}");
        }
    }
}
