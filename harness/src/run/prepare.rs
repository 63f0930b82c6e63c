//! From the description of a run to a machine that has not run yet, and its supervisor.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use trapline_vmm::boot::{ApStart, BootRequest, Format, Image};
use trapline_vmm::debug::Disposition;
use trapline_vmm::devices::Console;
use trapline_vmm::devices::virtio::DiskConfig;
use trapline_vmm::limits::MIB;
use trapline_vmm::probe;
use trapline_vmm::{Vm, VmConfig};

use super::finish::Outcome;
use super::plan::{By, Plan};
use super::supervisor::{Setup, Supervisor};
use super::trap::{Callback, TrapHit};
use super::{Outputs, RunError};
use crate::console::{ConsoleLog, ConsoleOptions};
use crate::initramfs::Initramfs;
use crate::report::{Input, TargetRecord};
use crate::rules::{self, Action, Rule};
use crate::symbols::{Sources, Symbols};

/// Lines of the console that a report shows.
const CONSOLE_LINES: usize = 1000;

/// What is booted.
#[derive(Debug, Clone)]
pub enum Kernel {
    /// A file: bzImage, ELF, Multiboot.
    File(PathBuf),
    /// A kernel in memory, and what to call it.
    Bytes(String, &'static [u8]),
}

impl From<&str> for Kernel {
    fn from(path: &str) -> Self {
        Kernel::File(path.into())
    }
}

impl From<&Path> for Kernel {
    fn from(path: &Path) -> Self {
        Kernel::File(path.to_owned())
    }
}

impl From<PathBuf> for Kernel {
    fn from(path: PathBuf) -> Self {
        Kernel::File(path)
    }
}

impl Kernel {
    fn name(&self) -> String {
        match self {
            Kernel::File(path) => path.display().to_string(),
            Kernel::Bytes(name, _) => name.clone(),
        }
    }
}

/// A run, described.
pub struct Run {
    kernel: Kernel,
    initrd: Option<Initrd>,
    cmdline: String,
    cpus: u32,
    memory: u64,
    ap_start: ApStart,
    disks: Vec<DiskConfig>,
    protocol: Option<Format>,
    symbols: Vec<PathBuf>,
    rules: Vec<(Wanted, Option<Callback>)>,
    timeout: Option<Duration>,
    outputs: Outputs,
    console: Option<Box<dyn Write + Send>>,
    has_gdb: bool,
}

/// The initial RAM disk.
enum Initrd {
    File(PathBuf),
    Made(Box<Initramfs>),
}

/// A rule, or the text of one.
enum Wanted {
    Text(String),
    Rule(Box<Rule>),
}

impl Run {
    /// A run of this kernel: one vCPU, 256 MiB, nothing trapped, no time limit, no console.
    pub fn new(kernel: impl Into<Kernel>) -> Self {
        Self {
            kernel: kernel.into(),
            initrd: None,
            cmdline: String::new(),
            cpus: 1,
            memory: 256 * MIB,
            ap_start: ApStart::Sipi,
            disks: Vec::new(),
            protocol: None,
            symbols: Vec::new(),
            rules: Vec::new(),
            timeout: None,
            outputs: Outputs::default(),
            console: None,
            has_gdb: false,
        }
    }

    /// Initial RAM disk, or the one module of a PVH or Multiboot kernel.
    #[must_use]
    pub fn initrd(mut self, path: impl Into<PathBuf>) -> Self {
        self.initrd = Some(Initrd::File(path.into()));
        self
    }

    /// An initial RAM disk that is made for this run, from a program or a directory.
    #[must_use]
    pub fn initramfs(mut self, made: Initramfs) -> Self {
        self.initrd = Some(Initrd::Made(Box::new(made)));
        self
    }

    /// Kernel command line.
    #[must_use]
    pub fn cmdline(mut self, cmdline: impl Into<String>) -> Self {
        self.cmdline = cmdline.into();
        self
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Guest memory in bytes.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// How the other vCPUs are started.
    #[must_use]
    pub fn ap_start(mut self, how: ApStart) -> Self {
        self.ap_start = how;
        self
    }

    /// A disk image, the next one of the guest's (/dev/vda, /dev/vdb, ..).
    #[must_use]
    pub fn disk(mut self, disk: DiskConfig) -> Self {
        self.disks.push(disk);
        self
    }

    /// Boots the kernel as this format instead of what it looks like.
    #[must_use]
    pub fn protocol(mut self, format: Format) -> Self {
        self.protocol = Some(format);
        self
    }

    /// A file with symbols: vmlinux, its debug file, System.map, a module.
    #[must_use]
    pub fn symbols(mut self, path: impl Into<PathBuf>) -> Self {
        self.symbols.push(path.into());
        self
    }

    /// A trap, as `--trap` takes it (docs/traps.md). What is wrong with it is said by [`prepare`](Self::prepare).
    #[must_use]
    pub fn trap(mut self, rule: impl Into<String>) -> Self {
        self.rules.push((Wanted::Text(rule.into()), None));
        self
    }

    /// A trap from a rule that has been read already.
    #[must_use]
    pub fn rule(mut self, rule: Rule) -> Self {
        self.rules.push((Wanted::Rule(Box::new(rule)), None));
        self
    }

    /// A trap whose hits are `callback`'s to decide about, on the thread of the vCPU that hit it:
    /// [`Disposition::Continue`] lets the guest go on and stops nobody, [`Disposition::Stop`] is followed by the rule's action.
    #[must_use]
    pub fn trap_with(
        mut self,
        rule: impl Into<String>,
        callback: impl Fn(&mut TrapHit<'_, '_>) -> Disposition + Send + Sync + 'static,
    ) -> Self {
        self.rules.push((Wanted::Text(rule.into()), Some(std::sync::Arc::new(callback))));
        self
    }

    /// Ends the run after this time.
    #[must_use]
    pub fn timeout(mut self, time: Duration) -> Self {
        self.timeout = Some(time);
        self
    }

    /// Writes a report into this directory.
    #[must_use]
    pub fn report(mut self, dir: impl Into<PathBuf>) -> Self {
        self.outputs.report = Some(dir.into());
        self
    }

    /// Writes these files.
    #[must_use]
    pub fn outputs(mut self, outputs: Outputs) -> Self {
        self.outputs = outputs;
        self
    }

    /// Where the guest's console goes.
    #[must_use]
    pub fn console(mut self, sink: impl Write + Send + 'static) -> Self {
        self.console = Some(Box::new(sink));
        self
    }

    /// A debugger may come, so that `=gdb` has somebody to wait for.
    #[must_use]
    pub fn gdb(mut self, may_come: bool) -> Self {
        self.has_gdb = may_come;
        self
    }

    /// What the rules come to on this host, without a guest.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare).
    pub fn plan(self) -> Result<(Plan, Vec<Vec<TargetRecord>>), RunError> {
        let symbols = self.open_symbols()?;
        let (plan, _) = self.resolve(&symbols)?;
        let records = plan.records(probe::capabilities()?.offer());
        Ok((plan, records))
    }

    /// Makes the machine, with everything armed that can be before its first instruction.
    ///
    /// # Errors
    /// Whatever would keep the run from being what was asked for. Nothing of the guest has run.
    pub fn prepare(mut self) -> Result<(Vm, Supervisor), RunError> {
        let symbols = self.open_symbols()?;
        let console = self.console.take();
        let (plan, callbacks) = self.resolve(&symbols)?;
        let records = match plan.traps.is_empty() {
            true => Vec::new(),
            false => plan.records(probe::capabilities()?.offer()),
        };
        let refused = |record: &TargetRecord| {
            record.mechanism.strip_prefix("refused: ").map(|why| format!("{}: {why}", record.what))
        };
        let refused: Vec<String> = records.iter().flatten().filter_map(refused).collect();
        if !refused.is_empty() {
            return Err(RunError::Refused(refused));
        }
        self.outputs.try_out()?;
        self.outputs.begin_anew()?;
        let patterns = plan.traps.iter().flat_map(|trap| &trap.points).filter_map(|point| match &point.by {
            By::Console(pattern) => Some(pattern.regex().clone()),
            _ => None,
        });
        let options =
            ConsoleOptions { tail: CONSOLE_LINES, patterns: patterns.collect(), log: self.outputs.console_log()? };
        let (log, heard) = ConsoleLog::new(console.unwrap_or_else(|| Box::new(io::sink())), options)?;
        let open = |what: &'static str, path: &Path| {
            File::open(path).map_err(|source| RunError::Open { what, path: path.to_owned(), source })
        };
        let kernel = match &self.kernel {
            Kernel::File(path) => Some(open("kernel", path)?),
            Kernel::Bytes(..) => None,
        };
        let initrd = match &self.initrd {
            Some(Initrd::File(path)) => Some(open("initrd", path)?),
            Some(Initrd::Made(made)) => Some(made.to_file()?),
            None => None,
        };
        let name = self.kernel.name();
        let boot = BootRequest {
            kernel: match (&self.kernel, &kernel) {
                (Kernel::Bytes(_, bytes), _) => Image::Bytes(bytes),
                (_, Some(file)) => Image::File(file),
                (_, None) => Image::Bytes(&[]),
            },
            name: &name,
            initrd: initrd.as_ref().map(Image::File),
            cmdline: &self.cmdline,
            cpus: self.cpus,
            ap_start: self.ap_start,
            protocol: self.protocol,
        };
        let config = VmConfig {
            memory: self.memory,
            boot,
            console: Console::new(log),
            disks: self.disks.clone(),
            rng: true,
            arm_hook: None,
        };
        let mut vm = Vm::boot(config)?;
        // The decompressor in a bzImage moves what it unpacks; nothing else does.
        let is_told_not_to = self.cmdline.split_ascii_whitespace().any(|word| word == "nokaslr");
        let may_move = vm.entry().format == Format::BzImage && !is_told_not_to;
        let setup = Setup {
            plan,
            records,
            callbacks,
            input: self.input(&symbols),
            symbols,
            may_move,
            console: heard,
            outputs: self.outputs,
            tells_status: matches!(&self.initrd, Some(Initrd::Made(made)) if made.tells_status()),
            timeout: self.timeout,
        };
        let supervisor = Supervisor::new(&mut vm, setup)?;
        Ok((vm, supervisor))
    }

    /// Runs the guest to its end.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare), and if the host fails while the guest runs.
    pub fn run(self) -> Result<Outcome, RunError> {
        let (vm, supervisor) = self.prepare()?;
        super::watch_loop::run(vm, supervisor)
    }

    /// Nothing is read if nobody wants to know.
    fn open_symbols(&self) -> Result<Symbols, RunError> {
        if self.rules.is_empty() && self.outputs.is_empty() {
            return Ok(Symbols::none());
        }
        let in_file;
        let kernel = match &self.kernel {
            Kernel::File(path) => path.as_path(),
            Kernel::Bytes(_, bytes) => {
                let mut file = tempfile::NamedTempFile::new()?;
                file.write_all(bytes)?;
                in_file = file;
                in_file.path()
            }
        };
        Ok(Symbols::open(&Sources { kernel: Some(kernel), symbols: &self.symbols, ..Sources::default() })?)
    }

    fn resolve(&self, symbols: &Symbols) -> Result<(Plan, BTreeMap<usize, Callback>), RunError> {
        let mut wrong = Vec::new();
        let mut read = Vec::new();
        let mut callbacks = BTreeMap::new();
        for (wanted, callback) in &self.rules {
            let rule = match wanted {
                Wanted::Text(text) => rules::parse(text),
                Wanted::Rule(rule) => Ok(Rule::clone(rule)),
            };
            match rule {
                Ok(rule) => {
                    if let Some(callback) = callback {
                        callbacks.insert(read.len(), callback.clone());
                    }
                    read.push(rule);
                }
                Err(error) => wrong.push(error),
            }
        }
        for rule in &read {
            if rule.action == Action::Gdb && !self.has_gdb {
                wrong.push(rule.refuse("nobody can come to look: =gdb needs --gdb ADDR"));
            }
            if rule.action == Action::Snapshot && self.outputs.report.is_none() {
                wrong.push(rule.refuse("there is no place for it: =snapshot needs --report DIR"));
            }
            if rule.cpu.is_some_and(|cpu| cpu >= self.cpus) {
                wrong.push(rule.refuse(format!("the guest has vCPUs 0 to {}", self.cpus.saturating_sub(1))));
            }
        }
        if !wrong.is_empty() {
            return Err(RunError::Rules(wrong));
        }
        Ok((Plan::new(read, symbols).map_err(RunError::Rules)?, callbacks))
    }

    fn input(&self, symbols: &Symbols) -> Input {
        let hex = |id: &[u8]| id.iter().map(|byte| format!("{byte:02x}")).collect();
        Input {
            kernel: self.kernel.name(),
            release: symbols.release().map(str::to_owned),
            build_id: symbols.build_id().map(hex),
            initrd: self.initrd.as_ref().map(|initrd| match initrd {
                Initrd::File(path) => path.display().to_string(),
                Initrd::Made(made) => made.origin().to_owned(),
            }),
            cmdline: self.cmdline.clone(),
            cpus: self.cpus,
            memory: self.memory,
            timeout_ms: self.timeout.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
            symbols: self.symbols.iter().map(|path| path.display().to_string()).collect(),
            kvm: probe::capabilities().map(|host| host.host.module).unwrap_or_default(),
        }
    }
}
