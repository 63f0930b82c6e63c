//! Debian's kernel with our initramfs, which runs what is typed on its console.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use trapline_vmm::boot::{ApStart, BootRequest, Image};
use trapline_vmm::debug::{Breakpoint, Owner, ResumePlan, RunMode, Stop, StopReason, VcpuId};
use trapline_vmm::devices::Console;
use trapline_vmm::limits::MIB;
use trapline_vmm::vcpu::Registers;
use trapline_vmm::{Vm, VmConfig};

use crate::symbols::Symbols;

/// A bound against hanging: a loaded machine that emulates another one takes its time.
const PATIENCE: Duration = Duration::from_secs(300);

pub(crate) const CPUS: u32 = 2;

/// What debuggers leave behind in a kernel's log when they do it wrong.
const DAMAGE: [&str; 9] = [
    "exc_debug",
    "exc_int3",
    "WARNING",
    "BUG:",
    "Oops",
    "traps:",
    "general protection",
    "Trace/breakpoint trap",
    "Segmentation fault",
];

pub(crate) struct Guest {
    pub(crate) vm: Vm,
    pub(crate) symbols: Symbols,
    console: Arc<Mutex<Vec<u8>>>,
}

struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn folder() -> PathBuf {
    let target = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    std::env::var_os("TRAPLINE_CACHE_DIR").map_or_else(target, PathBuf::from).join("guests/debian")
}

/// Why no Linux can be run here.
pub(crate) fn missing() -> Option<&'static str> {
    let boots_linux = ["kvm_amd", "kvm_intel"].iter().any(|name| Path::new("/sys/module").join(name).exists());
    if !boots_linux {
        return Some("no KVM that boots Linux");
    }
    let lane = std::env::var("TRAPLINE_LANE").unwrap_or_default();
    // The lane that is meant for it has it.
    let there = folder().join("vmlinux").exists() || lane == "svm";
    (!there).then_some("no guest: guest-images/fetch-debian")
}

impl Guest {
    /// Booted, and waiting for commands.
    pub(crate) fn boot() -> Self {
        let open = |name: &str| {
            let path = folder().join(name);
            File::open(&path).unwrap_or_else(|error| panic!("{}: {error}; guest-images/fetch-debian", path.display()))
        };
        let (kernel, initrd) = (open("vmlinuz"), open("initrd"));
        let console = Arc::new(Mutex::new(Vec::new()));
        let boot = BootRequest {
            kernel: Image::File(&kernel),
            name: "vmlinuz",
            initrd: Some(Image::File(&initrd)),
            // A vCPU that is stepped is late, and the kernel's watchdogs would rightly say so.
            cmdline: "console=ttyS0 nokaslr panic=-1 nowatchdog rcupdate.rcu_cpu_stall_suppress=1 \
                      trapline.mode=commands",
            cpus: CPUS,
            // In the svm lane an execution slot armed while a vCPU is in real mode crashes QEMU.
            ap_start: ApStart::Mailbox,
            protocol: None,
        };
        let output = Console::new(Lines(console.clone()));
        let vm =
            Vm::boot(VmConfig { memory: 512 * MIB, boot, console: output, disks: vec![], rng: true, arm_hook: None })
                .unwrap();
        let symbols = Symbols::read(&folder().join("vmlinux"));
        let mut guest = Guest { vm, symbols, console };
        if let Some(stop) = guest.stop_before(0, "waiting for commands") {
            panic!("{stop:?} before it is up; the console ends with\n{}", guest.last_lines());
        }
        guest
    }

    pub(crate) fn console(&self) -> String {
        String::from_utf8_lossy(&self.console.lock().unwrap()).into_owned()
    }

    /// All go on; nothing may be pending.
    pub(crate) fn go(&mut self) {
        let plan = self.all(RunMode::Continue);
        assert_eq!(self.vm.resume(&plan).unwrap(), None);
    }

    pub(crate) fn all(&self, mode: RunMode) -> ResumePlan {
        ResumePlan::all(self.vm.vcpus(), mode)
    }

    /// Goes on as `plan` says, until a stop.
    pub(crate) fn run(&mut self, plan: &ResumePlan) -> Stop {
        if let Some(pending) = self.vm.resume(plan).unwrap() {
            return pending;
        }
        self.until("a stop", |guest| guest.vm.poll().unwrap())
    }

    /// All go on, until the breakpoint at `addr` stops one.
    pub(crate) fn run_to(&mut self, addr: u64) -> VcpuId {
        let bp = Breakpoint::exec(addr);
        self.vm.set_breakpoint(Owner::GDB, bp).unwrap();
        let plan = self.all(RunMode::Continue);
        let stop = self.run(&plan);
        self.vm.clear_breakpoint(Owner::GDB, bp).unwrap();
        assert_eq!(stop.reason, StopReason::Breakpoint(bp), "on the way to {}", self.symbols.name(addr));
        stop.vcpu
    }

    pub(crate) fn registers(&mut self, vcpu: VcpuId) -> Registers {
        self.vm.registers(vcpu).unwrap()
    }

    pub(crate) fn word(&mut self, vcpu: VcpuId, addr: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        (self.vm.read_memory(vcpu, addr, &mut bytes).unwrap() == 8).then(|| u64::from_le_bytes(bytes))
    }

    fn until<T>(&mut self, what: &str, mut look: impl FnMut(&mut Self) -> Option<T>) -> T {
        let started = Instant::now();
        let mut looks = 0;
        loop {
            if let Some(found) = look(self) {
                return found;
            }
            if started.elapsed() > PATIENCE {
                panic!("waited {PATIENCE:?} in vain for {what}: {}\n{}", self.places(), self.last_lines());
            }
            looks += 1;
            // A step takes microseconds, a command seconds.
            match looks {
                ..1000 => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(200)),
            }
        }
    }

    /// Where all vCPUs are.
    fn places(&mut self) -> String {
        if let Err(error) = self.vm.stop() {
            return format!("cannot stop it: {error}");
        }
        let place =
            |vcpu: u32| format!("vCPU {vcpu} at {}", self.symbols.name(self.vm.registers(VcpuId(vcpu)).unwrap().pc()));
        (0..CPUS).map(place).collect::<Vec<_>>().join(", ")
    }

    fn last_lines(&self) -> String {
        let console = self.console();
        let lines: Vec<_> = console.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// Types a command.
    pub(crate) fn start(&mut self, command: &str) {
        let line = format!("{command}\n");
        let taken = self.vm.serial().lock().push_input(line.as_bytes());
        assert_eq!(taken, line.len(), "the console takes no input");
    }

    /// What the console says once a command is done with this status.
    pub(crate) fn done(command: &str, status: u32) -> String {
        format!("trapline-guest: done {status}: {command}")
    }

    /// Goes on, if it stands, until a stop; `None` if what the console says, from byte `since` on,
    /// contains `text` first.
    pub(crate) fn stop_before(&mut self, since: usize, text: &str) -> Option<Stop> {
        if !self.vm.is_running()
            && let Some(pending) = self.vm.resume(&self.all(RunMode::Continue)).unwrap()
        {
            return Some(pending);
        }
        let mut seen = since;
        self.until(text, |guest| {
            let stop = guest.vm.poll().unwrap();
            let len = guest.console.lock().unwrap().len();
            let has_said = stop.is_none() && len != seen && guest.console()[since..].contains(text);
            seen = len;
            if has_said { Some(None) } else { stop.map(Some) }
        })
    }

    /// Runs a command while the guest runs; what it printed. It is to end with status 0.
    pub(crate) fn command(&mut self, command: &str) -> String {
        let before = self.console().len();
        self.start(command);
        if let Some(stop) = self.stop_before(before, &format!(": {command}")) {
            panic!("{stop:?} during {command}; the console ends with\n{}", self.last_lines());
        }
        let printed = self.console()[before..].to_owned();
        assert!(printed.contains(&Self::done(command, 0)), "{command} says\n{printed}");
        printed
    }

    /// The kernel's log and the shell's words show no sign of what a debugger can do to a guest.
    pub(crate) fn assert_undisturbed(&self) {
        let console = self.console();
        let damage: Vec<_> = console.lines().filter(|line| DAMAGE.iter().any(|word| line.contains(word))).collect();
        assert!(damage.is_empty(), "the guest noticed us: {damage:#?}\n{}", self.last_lines());
    }
}
