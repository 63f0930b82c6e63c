//! What the debuggers in the guest share: the C library's calls, as far as std has none, and a
//! child that is traced.
// Each program uses some of it.
#![allow(dead_code)]

use std::ffi::{c_int, c_long, c_uint, c_ulong, c_void};
use std::io;

pub const SIGTRAP: c_int = 5;
pub const SIGUSR1: c_int = 10;
pub const SIGSTOP: c_int = 19;

/// RFLAGS.TF.
pub const TF: u64 = 1 << 8;

const PTRACE_TRACEME: c_uint = 0;
const PTRACE_PEEKUSER: c_uint = 3;
const PTRACE_POKEUSER: c_uint = 6;
const PTRACE_CONT: c_uint = 7;
const PTRACE_SINGLESTEP: c_uint = 9;
const PTRACE_GETREGS: c_uint = 12;

/// Offsets of `regs.eflags` and `u_debugreg` in `struct user`.
const RFLAGS: c_ulong = 144;
const DEBUG_REGISTERS: c_ulong = 848;

/// `struct user_regs_struct`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

unsafe extern "C" {
    fn fork() -> c_int;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn ptrace(request: c_uint, ...) -> c_long;
    fn raise(signal: c_int) -> c_int;
    fn kill(pid: c_int, signal: c_int) -> c_int;
    fn _exit(status: c_int) -> !;
    fn mmap(addr: *mut c_void, len: usize, prot: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void;
    fn munmap(addr: *mut c_void, len: usize) -> c_int;
}

/// Why a program's check failed, in words.
pub type Checked<T> = Result<T, String>;

/// Says how it went, in the one line that is waited for, and ends.
pub fn finish(name: &str, outcome: Checked<String>) -> ! {
    let status = match outcome {
        Ok(what) => {
            println!("{name}: ok {what}");
            0
        }
        Err(what) => {
            println!("{name}: FAILED {what}");
            1
        }
    };
    std::process::exit(status)
}

fn errno(what: &str) -> String {
    format!("{what}: {}", io::Error::last_os_error())
}

/// How a child that is traced stands still, or has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Stopped(c_int),
    Exited(c_int),
    Killed(c_int),
}

/// A child that is traced by this process. Dropping it ends it.
pub struct Child {
    pid: c_int,
    ended: bool,
}

impl Child {
    /// Forks a child that asks to be traced, stops, and then runs `body` to its end.
    pub fn traced(body: impl FnOnce()) -> Checked<Self> {
        // SAFETY: this process has one thread, so the child may go on like it.
        let pid = unsafe { fork() };
        if pid < 0 {
            return Err(errno("fork"));
        }
        if pid == 0 {
            // SAFETY: no pointers are involved.
            let refused = unsafe { ptrace(PTRACE_TRACEME, 0 as c_ulong, 0 as c_ulong, 0 as c_ulong) };
            if refused == 0 {
                // SAFETY: stops this process until its parent lets it go on.
                unsafe { raise(SIGSTOP) };
                body();
            }
            // SAFETY: nothing of the child's is to be cleaned up.
            unsafe { _exit(if refused == 0 { 0 } else { 99 }) };
        }
        let mut child = Child { pid, ended: false };
        match child.wait()? {
            Status::Stopped(SIGSTOP) => Ok(child),
            other => Err(format!("the child does not stop first: {other:?}")),
        }
    }

    /// Until it stands still or has ended.
    pub fn wait(&mut self) -> Checked<Status> {
        let mut status = 0;
        // SAFETY: `status` is where the kernel is to write it.
        if unsafe { waitpid(self.pid, &mut status, 0) } != self.pid {
            return Err(errno("waitpid"));
        }
        let status = match (status & 0x7f, status >> 8 & 0xff) {
            (0x7f, signal) => return Ok(Status::Stopped(signal)),
            (0, value) => Status::Exited(value),
            (signal, _) => Status::Killed(signal),
        };
        self.ended = true;
        Ok(status)
    }

    fn request(&self, request: c_uint, addr: c_ulong, data: c_ulong, what: &str) -> Checked<()> {
        // SAFETY: these requests write nothing in this process.
        if unsafe { ptrace(request, self.pid, addr, data) } == -1 {
            return Err(errno(what));
        }
        Ok(())
    }

    /// One instruction, with `signal` (or 0) delivered first.
    pub fn step(&mut self, signal: c_int) -> Checked<Status> {
        self.request(PTRACE_SINGLESTEP, 0, signal as c_ulong, "PTRACE_SINGLESTEP")?;
        self.wait()
    }

    /// On, until it stops or ends.
    pub fn go(&mut self) -> Checked<Status> {
        self.request(PTRACE_CONT, 0, 0, "PTRACE_CONT")?;
        self.wait()
    }

    pub fn registers(&self) -> Checked<Registers> {
        let mut registers = Registers::default();
        // SAFETY: the kernel fills a user_regs_struct, which `registers` is.
        if unsafe { ptrace(PTRACE_GETREGS, self.pid, 0 as c_ulong, &raw mut registers) } == -1 {
            return Err(errno("PTRACE_GETREGS"));
        }
        Ok(registers)
    }

    pub fn clear_tf(&mut self) -> Checked<()> {
        let rflags = self.registers()?.rflags & !TF;
        self.request(PTRACE_POKEUSER, RFLAGS, rflags as c_ulong, "PTRACE_POKEUSER of RFLAGS")
    }

    pub fn debug_register(&self, n: usize) -> Checked<u64> {
        let offset = DEBUG_REGISTERS + 8 * n as c_ulong;
        // SAFETY: the C library passes a place of its own for the value, and returns it.
        Ok(unsafe { ptrace(PTRACE_PEEKUSER, self.pid, offset, 0 as c_ulong) } as u64)
    }

    pub fn set_debug_register(&mut self, n: usize, value: u64) -> Checked<()> {
        let offset = DEBUG_REGISTERS + 8 * n as c_ulong;
        self.request(PTRACE_POKEUSER, offset, value as c_ulong, &format!("PTRACE_POKEUSER of DR{n}"))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.ended {
            // SAFETY: the child is this process's own and has not been waited for.
            unsafe { kill(self.pid, 9) };
            let _ = self.wait();
        }
    }
}

const PROT_READ_WRITE: c_int = 3;
const MAP_SHARED: c_int = 1;
const MAP_PRIVATE: c_int = 2;
const MAP_ANONYMOUS: c_int = 0x20;

/// Pages that are zero and not there before the first access.
pub struct Pages {
    start: *mut u8,
    len: usize,
}

impl Pages {
    /// Shared with the children of this process.
    pub fn shared(len: usize) -> Checked<Self> {
        Self::map(len, MAP_SHARED)
    }

    /// This process's alone.
    pub fn private(len: usize) -> Checked<Self> {
        Self::map(len, MAP_PRIVATE)
    }

    fn map(len: usize, kind: c_int) -> Checked<Self> {
        // SAFETY: a new mapping, of which nobody has a pointer yet.
        let start = unsafe { mmap(std::ptr::null_mut(), len, PROT_READ_WRITE, kind | MAP_ANONYMOUS, -1, 0) };
        if start as isize == -1 {
            return Err(errno("mmap"));
        }
        Ok(Pages { start: start.cast(), len })
    }

    pub fn start(&self) -> *mut u8 {
        self.start
    }

    pub fn word(&self, n: usize) -> u64 {
        assert!((n + 1) * 8 <= self.len);
        // SAFETY: inside of the mapping; a traced child that writes it stands still.
        unsafe { self.start.cast::<u64>().add(n).read_volatile() }
    }

    pub fn byte(&self, n: usize) -> u8 {
        assert!(n < self.len);
        // SAFETY: as above.
        unsafe { self.start.add(n).read_volatile() }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: nobody uses the mapping any more.
        unsafe { munmap(self.start.cast(), self.len) };
    }
}
