//! `perf-bp [ROUNDS]`: breakpoints inside of the guest that count (perf_event_open of
//! PERF_TYPE_BREAKPOINT): on execution and on writes of this process, and on the execution of a
//! kernel function. Each count must be the number of times that it was passed.

mod sys;

use std::arch::{asm, global_asm};
use std::ffi::{c_int, c_long, c_ulong};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::FromRawFd;

use sys::{Checked, Pages, finish};

/// How often each place is passed.
const TURNS: u64 = 100;
/// The kernel function, and the number of the system call that it serves.
const KERNEL_FUNCTION: &str = "__x64_sys_getppid";
const SYS_GETPPID: usize = 110;

const SYS_PERF_EVENT_OPEN: c_long = 298;
const PERF_TYPE_BREAKPOINT: u32 = 5;
const PERF_FLAG_FD_CLOEXEC: c_ulong = 8;
const EXCLUDE_KERNEL: u64 = 1 << 5;
const EXCLUDE_HV: u64 = 1 << 6;
const HW_BREAKPOINT_W: u32 = 2;
const HW_BREAKPOINT_X: u32 = 4;
/// Bytes of a breakpoint on execution, as this interface wants it.
const X_LEN: u64 = 8;

/// `struct perf_event_attr`, PERF_ATTR_SIZE_VER1.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    bp_type: u32,
    bp_addr: u64,
    bp_len: u64,
}

unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
    #[link_name = "b_executed"]
    fn executed();
}

global_asm!(".globl b_executed", ".text", "b_executed:", "nop", "ret");

/// A breakpoint that counts while it is open.
struct Counter {
    name: &'static str,
    file: File,
}

impl Counter {
    fn open(name: &'static str, bp_type: u32, bp_addr: u64, bp_len: u64, flags: u64) -> Checked<Self> {
        let attributes = Attributes {
            kind: PERF_TYPE_BREAKPOINT,
            size: size_of::<Attributes>() as u32,
            flags,
            bp_type,
            bp_addr,
            bp_len,
            ..Default::default()
        };
        let (this, any_cpu, no_group): (c_int, c_int, c_int) = (0, -1, -1);
        let at = &raw const attributes;
        // SAFETY: the kernel reads `attributes` during the call.
        let fd = unsafe { syscall(SYS_PERF_EVENT_OPEN, at, this, any_cpu, no_group, PERF_FLAG_FD_CLOEXEC) };
        if fd < 0 {
            return Err(format!("perf_event_open for {name}: {}", io::Error::last_os_error()));
        }
        // SAFETY: a new file descriptor, which nobody else has.
        Ok(Counter { name, file: unsafe { File::from_raw_fd(fd as c_int) } })
    }

    fn count(&mut self) -> Checked<u64> {
        let mut bytes = [0; 8];
        self.file.read_exact(&mut bytes).map_err(|error| format!("reading the count of {}: {error}", self.name))?;
        Ok(u64::from_ne_bytes(bytes))
    }
}

fn kernel_function() -> Checked<u64> {
    let symbols = std::fs::read_to_string("/proc/kallsyms").map_err(|error| format!("/proc/kallsyms: {error}"))?;
    let line = symbols.lines().find(|line| line.split(' ').nth(2) == Some(KERNEL_FUNCTION));
    let address = line.and_then(|line| u64::from_str_radix(line.split(' ').next()?, 16).ok());
    address.filter(|address| *address != 0).ok_or_else(|| format!("/proc/kallsyms does not show {KERNEL_FUNCTION}"))
}

fn getppid() {
    // SAFETY: reads and writes no memory.
    unsafe {
        asm!("syscall", inlateout("rax") SYS_GETPPID => _, out("rcx") _, out("r11") _, options(nostack));
    }
}

/// What is counted, each some times a turn; other words and reads do not count.
fn turn(words: &Pages, number: u64) {
    let word = words.start().cast::<u64>();
    // SAFETY: it does nothing.
    unsafe { executed() };
    // SAFETY: inside of the mapping.
    unsafe { word.write_volatile(number) };
    getppid();
    let _ = words.word(0);
    // SAFETY: as above.
    unsafe { word.add(1).write_volatile(number) };
}

/// Two breakpoints at a time: a debugger outside may hold the other two.
fn round(kernel: u64) -> Checked<u64> {
    let words = Pages::shared(4096)?;
    // There before it is watched: what the kernel writes is not counted.
    turn(&words, 0);
    let user = EXCLUDE_KERNEL | EXCLUDE_HV;
    let exec = || Counter::open("exec", HW_BREAKPOINT_X, executed as *const () as u64, X_LEN, user);
    let write = || Counter::open("write", HW_BREAKPOINT_W, words.start() as u64, 8, user);
    let in_kernel = || Counter::open("kernel exec", HW_BREAKPOINT_X, kernel, X_LEN, EXCLUDE_HV);
    let mut hits = 0;
    let pairs: [[&dyn Fn() -> Checked<Counter>; 2]; 3] = [[&exec, &write], [&write, &in_kernel], [&in_kernel, &exec]];
    for [first, second] in pairs {
        let mut pair = [first()?, second()?];
        (0..TURNS).for_each(|number| turn(&words, number));
        for counter in &mut pair {
            let count = counter.count()?;
            if count != TURNS {
                return Err(format!("{} was counted {count} times, and passed {TURNS} times", counter.name));
            }
            hits += count;
        }
    }
    Ok(hits)
}

fn main() {
    let rounds = std::env::args().nth(1).and_then(|arg| arg.parse().ok()).unwrap_or(1);
    let outcome = kernel_function().and_then(|kernel| (0..rounds).map(|_| round(kernel)).sum::<Checked<u64>>());
    finish("perf-bp", outcome.map(|hits| format!("{hits} hits")))
}
