//! Debian's kernel with our initramfs, which runs what is typed on its console.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use trapline_harness::symbols::{Memory, Sources, Symbols};
use trapline_harness::vmcore;
use trapline_vmm::boot::{ApStart, BootRequest, Image};
use trapline_vmm::debug::{Breakpoint, Owner, ResumePlan, RunMode, Stop, StopReason, VcpuId};
use trapline_vmm::devices::Console;
use trapline_vmm::limits::MIB;
use trapline_vmm::memory::GuestRam;
use trapline_vmm::paging::Paging;
use trapline_vmm::vcpu::Registers;
use trapline_vmm::{Vm, VmConfig};

use crate::PATIENCE;

const CPUS: u32 = 2;

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

/// Linear memory as one vCPU sees it.
struct Seen {
    ram: GuestRam,
    paging: Paging,
}

impl Memory for Seen {
    fn read(&self, address: u64, into: &mut [u8]) -> usize {
        self.paging.read(self.ram.mem(), address, into)
    }
}

fn folder() -> PathBuf {
    let target = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    std::env::var_os("TRAPLINE_CACHE_DIR").map_or_else(target, PathBuf::from).join("guests/debian")
}

impl Guest {
    /// Loaded; nothing has run.
    pub(crate) fn load(kaslr: &str) -> Self {
        let folder = folder();
        let open = |name: &str| {
            let path = folder.join(name);
            File::open(&path).unwrap_or_else(|error| panic!("{}: {error}; guest-images/fetch-debian", path.display()))
        };
        let (image, initrd) = (open("vmlinuz"), open("initrd"));
        let console = Arc::new(Mutex::new(Vec::new()));
        let cmdline = format!("console=ttyS0 {kaslr} panic=-1 trapline.mode=commands");
        let boot = BootRequest {
            kernel: Image::File(&image),
            name: "vmlinuz",
            initrd: Some(Image::File(&initrd)),
            cmdline: &cmdline,
            cpus: CPUS,
            // In the svm lane an execution slot armed while a vCPU is in real mode crashes QEMU.
            ap_start: ApStart::Mailbox,
            protocol: None,
        };
        let output = Console::new(Lines(console.clone()));
        let vm =
            Vm::boot(VmConfig { memory: 512 * MIB, boot, console: output, disks: vec![], rng: true, arm_hook: None })
                .unwrap();
        let vmlinux = folder.join("vmlinux");
        let symbols = Symbols::open(&Sources { kernel: Some(&vmlinux), ..Sources::default() }).unwrap();
        Guest { vm, symbols, console }
    }

    /// Registers of all vCPUs, and VMCOREINFO as seen by `vcpu`.
    pub(crate) fn core(&mut self, vcpu: VcpuId) -> (Vec<Registers>, Vec<u8>) {
        let memory = self.memory(vcpu);
        let registers = (0..CPUS).map(|n| self.vm.registers(VcpuId(n)).unwrap()).collect();
        (registers, vmcore::vmcoreinfo(&self.symbols, &memory))
    }

    fn memory(&mut self, vcpu: VcpuId) -> Seen {
        let paging = Paging::from(&self.vm.registers(vcpu).unwrap());
        Seen { ram: self.vm.ram().clone(), paging }
    }

    /// Finds out where the kernel is, from where system calls enter it.
    pub(crate) fn learn_slide(&mut self) {
        if self.vm.is_running() {
            let stop = self.vm.stop().unwrap();
            assert_eq!(stop.reason, StopReason::Interrupted);
        }
        let memory = self.memory(VcpuId(0));
        let entry = self.vm.registers(VcpuId(0)).unwrap().lstar;
        let slide = self.symbols.find_slide(&memory, entry).expect("the kernel is somewhere");
        self.symbols = self.symbols.with_slide(slide);
    }

    fn go(&mut self) -> Option<Stop> {
        if self.vm.is_running() {
            return None;
        }
        self.vm.resume(&ResumePlan::all(self.vm.vcpus(), RunMode::Continue)).unwrap()
    }

    /// Goes on until a vCPU enters this function.
    pub(crate) fn run_to(&mut self, function: &str) -> VcpuId {
        let at = Breakpoint::exec(self.symbols.functions(function).unwrap()[0].address);
        self.vm.set_breakpoint(Owner::GDB, at).unwrap();
        let stop = match self.go() {
            Some(stop) => stop,
            None => self.until(function, |guest| guest.vm.poll().unwrap()),
        };
        self.vm.clear_breakpoint(Owner::GDB, at).unwrap();
        assert_eq!(stop.reason, StopReason::Breakpoint(at));
        stop.vcpu
    }

    /// Goes on until the console has said `text`.
    pub(crate) fn run_until(&mut self, text: &str) {
        assert_eq!(self.go(), None);
        self.until(text, |guest| {
            if let Some(stop) = guest.vm.poll().unwrap() {
                panic!("{stop:?} before '{text}'\n{}", guest.console());
            }
            guest.console().contains(text).then_some(())
        });
    }

    /// Types a command.
    pub(crate) fn start(&mut self, command: &str) {
        let line = format!("{command}\n");
        assert_eq!(self.vm.serial().lock().push_input(line.as_bytes()), line.len(), "the console takes no input");
    }

    /// Runs a command; it is to end with status 0.
    pub(crate) fn command(&mut self, command: &str) {
        let done = format!("trapline-guest: done 0: {command}");
        let times = |guest: &Self| guest.console().matches(&done).count();
        let before = times(self);
        self.start(command);
        assert_eq!(self.go(), None);
        self.until(command, |guest| {
            assert_eq!(guest.vm.poll().unwrap(), None);
            (times(guest) > before).then_some(())
        });
    }

    /// The word that the console has said behind `text`.
    pub(crate) fn said(&self, text: &str) -> Option<String> {
        let console = self.console();
        console.split_once(text)?.1.split_whitespace().next().map(str::to_owned)
    }

    fn until<T>(&mut self, what: &str, mut look: impl FnMut(&mut Self) -> Option<T>) -> T {
        let started = Instant::now();
        loop {
            if let Some(found) = look(self) {
                return found;
            }
            assert!(started.elapsed() < PATIENCE, "waited in vain for '{what}'\n{}", self.console());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn console(&self) -> String {
        String::from_utf8_lossy(&self.console.lock().unwrap()).into_owned()
    }
}
