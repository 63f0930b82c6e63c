//! The guests whose stacks are looked at.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use trapline_harness::symbols::{Sources, Symbols};
use trapline_vmm::boot::{ApStart, BootRequest, Image};
use trapline_vmm::devices::Console;
use trapline_vmm::limits::MIB;
use trapline_vmm::{Vm, VmConfig};

use crate::compare::Comparison;
use crate::gdb::{Bench, all_run};

/// A bound against hanging.
const PATIENCE: Duration = Duration::from_secs(600);
/// How often the guest is stopped.
const STOPS: usize = 100;
/// Longest time between two stops.
const LONGEST_MS: u64 = 60;

#[derive(Clone, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl Write for Said {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Said {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

/// Where guest-images/fetch-debian has put the kernel.
pub(crate) fn debian() -> PathBuf {
    let target = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    std::env::var_os("TRAPLINE_CACHE_DIR").map_or_else(target, PathBuf::from).join("guests/debian")
}

/// Numbers that look random (xorshift64*), the same ones for the same seed.
struct Random(u64);

impl Random {
    /// From TRAPLINE_SEED, or the clock; said, so that a failure can be repeated as far as a running guest can be.
    fn seeded() -> Self {
        let clock = || std::time::UNIX_EPOCH.elapsed().map_or(1, |since| since.as_nanos() as u64);
        let seed = std::env::var("TRAPLINE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(clock);
        println!("  TRAPLINE_SEED={seed}");
        Random(seed | 1)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % bound
    }
}

/// Runs until the console says something.
fn run_until_said(vm: &mut Vm, said: &Said, what: &str) {
    let plan = all_run(vm);
    assert_eq!(vm.resume(&plan).unwrap(), None);
    let started = Instant::now();
    while !said.text().contains(what) {
        assert!(started.elapsed() < PATIENCE, "'{what}' was not said: {}", said.text());
        if let Some(stop) = vm.poll().unwrap() {
            panic!("{stop:?} before '{what}' was said: {}", said.text());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Stops a guest at random moments and compares all backtraces, `STOPS` times.
fn at_random_stops(mut bench: Bench, symbols: Symbols) -> Comparison {
    let mut comparison = Comparison::new(symbols);
    let mut random = Random::seeded();
    for _ in 0..STOPS {
        bench.run_for(Duration::from_micros(random.below(LONGEST_MS * 1000)));
        comparison.all(&mut bench);
    }
    bench.vm.kill();
    comparison.tally.print();
    comparison
}

/// The built-in guest: C without frame pointers, described by call frame information.
pub(crate) fn demo() {
    let mut file = tempfile::Builder::new().suffix(".elf").tempfile().unwrap();
    file.write_all(trapline_guests::demo()).unwrap();
    let said = Said::default();
    let boot = BootRequest {
        kernel: Image::Bytes(trapline_guests::demo()),
        name: "demo",
        initrd: None,
        cmdline: "",
        cpus: 2,
        ap_start: ApStart::Mailbox,
        protocol: None,
    };
    let mut vm = Vm::boot(VmConfig {
        memory: 64 * MIB,
        boot,
        console: Console::new(said.clone()),
        disks: Vec::new(),
        rng: false,
        arm_hook: None,
    })
    .unwrap();
    run_until_said(&mut vm, &said, "tick");
    let symbols = Symbols::open(&Sources { kernel: Some(file.path()), ..Sources::default() }).unwrap();
    let comparison = at_random_stops(Bench::attach(vm, file.path()), symbols);
    comparison.tally.assert_equal(4 * STOPS, 0);
}

/// A distribution's kernel that forks, reads, and is interrupted.
pub(crate) fn linux() {
    let vmlinux = debian().join("vmlinux");
    let symbols = Symbols::open(&Sources { kernel: Some(&vmlinux), ..Sources::default() }).unwrap();
    let comparison = at_random_stops(Bench::attach(boot_linux(), &vmlinux), symbols);
    comparison.tally.assert_equal(4 * STOPS, STOPS / 10);
}

fn boot_linux() -> Vm {
    let open = |name: &str| {
        let path = debian().join(name);
        File::open(&path).unwrap_or_else(|error| panic!("{}: {error}; guest-images/fetch-debian", path.display()))
    };
    let (kernel, initrd) = (open("vmlinuz"), open("initrd"));
    let said = Said::default();
    let boot = BootRequest {
        kernel: Image::File(&kernel),
        name: "vmlinuz",
        initrd: Some(Image::File(&initrd)),
        // It stands for seconds while gdb looks at it, and its watchdogs would rightly say so.
        cmdline: "console=ttyS0 nokaslr panic=-1 nowatchdog rcupdate.rcu_cpu_stall_suppress=1 trapline.mode=busy",
        cpus: 2,
        ap_start: ApStart::Mailbox,
        protocol: None,
    };
    let mut vm = Vm::boot(VmConfig {
        memory: 512 * MIB,
        boot,
        console: Console::new(said.clone()),
        disks: Vec::new(),
        rng: false,
        arm_hook: None,
    })
    .unwrap();
    run_until_said(&mut vm, &said, "trapline-guest: tick 2");
    vm
}
