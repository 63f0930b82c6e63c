//! The kick: a signal whose handler makes the next, or the present, KVM_RUN return.
//!
//! Unsafe because a signal handler has to reach the `kvm_run` page of the thread it interrupts.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::CStr;
use std::fs;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::kvm_run;
use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{Killable, register_signal_handler};

/// Offset from SIGRTMIN. The first real-time signals are used by libc and by tools.
const SIGNAL: c_int = 3;

thread_local! {
    /// The `kvm_run` page of this thread's vCPU. Const-initialised and without a destructor, so
    /// that the handler can read it at any moment.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(null_mut()) };
    /// The guest of this thread's vCPU has written a debug register.
    static WROTE: Cell<bool> = const { Cell::new(false) };
}

extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let run = RUN.get();
    if !run.is_null() {
        // SAFETY: the pointer was set on this very thread by `receive`, whose caller keeps the
        // page mapped until it clears it.
        let flag = unsafe { &raw mut (*run).immediate_exit };
        // SAFETY: one byte of that page, written volatile, that only this thread and KVM read.
        unsafe { flag.write_volatile(1) };
    }
}

extern "C" fn on_write(number: c_int, info: *mut siginfo_t, context: *mut c_void) {
    WROTE.set(true);
    on_kick(number, info, context);
}

/// The signal of the kick.
pub fn signal() -> c_int {
    libc::SIGRTMIN() + SIGNAL
}

/// Installs the handler, once for the process. Whoever makes vCPU threads calls this before.
pub fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(signal(), on_kick).map_err(|error| error.errno()))
        .map_err(io::Error::from_raw_os_error)
}

/// Makes kicks of this thread reach `run`; null to stop that.
pub(crate) fn receive(run: *mut kvm_run) {
    RUN.set(run);
}

/// Kicks the thread. One that has ended is not there to be interrupted, and that is fine.
pub fn send(thread: &JoinHandle<()>) {
    let _ = thread.kill(signal());
}

/// A timer by which a vCPU thread kicks itself.
pub(crate) struct Timer(libc::timer_t);

// A timer belongs to the process, and is only kept by the vCPU that the thread owns.
// SAFETY: the id is a number that any thread of the process may use.
unsafe impl Send for Timer {}

impl Timer {
    /// A timer of the calling thread, which it kicks. It does not run yet.
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: plain numbers and pointers, for which zero is a value.
        let mut event: libc::sigevent = unsafe { mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal();
        // SAFETY: always succeeds, and has no precondition.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut id: libc::timer_t = null_mut();
        // SAFETY: both point to live values of the types that the call reads and writes.
        match unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut id) } {
            0 => Ok(Timer(id)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Kicks every `interval` from now on; with zero, no more.
    pub(crate) fn set(&self, interval: Duration) -> io::Result<()> {
        let nanoseconds = i64::from(interval.subsec_nanos());
        let seconds = i64::try_from(interval.as_secs()).unwrap_or(i64::MAX);
        let every = libc::timespec { tv_sec: seconds, tv_nsec: nanoseconds };
        let times = libc::itimerspec { it_interval: every, it_value: every };
        // SAFETY: the timer lives as long as `self`; the old setting is not asked for.
        match unsafe { libc::timer_settime(self.0, 0, &raw const times, null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and deleted here only.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// MOV to DR0-7 among SVM's exit codes (AMD APM vol. 2, appendix C), as the tracepoint has them.
const WRITES: &CStr = c"isa == 2 && exit_reason >= 48 && exit_reason <= 55";
/// Where the kernel shows the number of that tracepoint.
const TRACEPOINT: [&str; 2] =
    ["/sys/kernel/tracing/events/kvm/kvm_exit/id", "/sys/kernel/debug/tracing/events/kvm/kvm_exit/id"];

/// `struct perf_event_attr`, PERF_ATTR_SIZE_VER0.
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
}

/// `struct f_owner_ex`.
#[repr(C)]
struct Owner {
    kind: c_int,
    id: libc::pid_t,
}

/// The kernel's tracing, which kicks a vCPU thread at each MOV to a debug register of its guest. On SVM such a
/// move exits to KVM and no further; its tracepoint is passed before it is carried out, and
/// the signal is there before the guest goes on.
pub(crate) struct DrWrites(OwnedFd);

impl DrWrites {
    /// Those of the calling thread, which do not kick it yet.
    ///
    /// # Errors
    /// What the kernel says: who may not trace it (CAP_PERFMON, and to read tracefs) goes without.
    pub(crate) fn new() -> io::Result<Self> {
        const TYPE_TRACEPOINT: u32 = 2;
        const DISABLED: u64 = 1;
        const FD_CLOEXEC: libc::c_ulong = 8;
        /// PERF_EVENT_IOC_SET_FILTER.
        const SET_FILTER: libc::c_ulong = 0x4008_2406;
        /// F_SETSIG, F_SETOWN_EX and its F_OWNER_TID.
        const SET_SIGNAL: c_int = 10;
        const SET_OWNER: c_int = 15;
        const OWNER_TID: c_int = 0;
        let id = TRACEPOINT.iter().find_map(|path| fs::read_to_string(path).ok()).ok_or(io::ErrorKind::NotFound)?;
        let attributes = Attributes {
            kind: TYPE_TRACEPOINT,
            size: size_of::<Attributes>() as u32,
            config: id.trim().parse().map_err(|_| io::ErrorKind::InvalidData)?,
            sample_period: 1,
            wakeup_events: 1,
            flags: DISABLED,
            ..Attributes::default()
        };
        let (this, any_cpu, no_group): (c_int, c_int, c_int) = (0, -1, -1);
        // An ordinary signal: of these one is never lost for want of memory, and by default it is ignored.
        register_signal_handler(libc::SIGURG, on_write).map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        // SAFETY: the kernel reads `attributes` during the call.
        let fd = unsafe {
            libc::syscall(libc::SYS_perf_event_open, &raw const attributes, this, any_cpu, no_group, FD_CLOEXEC)
        };
        let fd = c_int::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: a new file descriptor, which nobody else has.
        let writes = DrWrites(unsafe { OwnedFd::from_raw_fd(fd) });
        // SAFETY: the kernel reads the string during the call.
        checked(unsafe { libc::ioctl(fd, SET_FILTER, WRITES.as_ptr()) })?;
        // SAFETY: always succeeds, and has no precondition.
        let owner = Owner { kind: OWNER_TID, id: unsafe { libc::gettid() } };
        // SAFETY: the kernel reads `owner` during the call.
        checked(unsafe { libc::fcntl(fd, SET_OWNER, &raw const owner) })?;
        // SAFETY: plain numbers.
        checked(unsafe { libc::fcntl(fd, SET_SIGNAL, libc::SIGURG) })?;
        // SAFETY: plain numbers.
        checked(unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_ASYNC) })?;
        Ok(writes)
    }

    /// Kicks from now on, or no more.
    pub(crate) fn set(&self, on: bool) -> io::Result<()> {
        /// PERF_EVENT_IOC_ENABLE and PERF_EVENT_IOC_DISABLE.
        const ENABLE: libc::c_ulong = 0x2400;
        const DISABLE: libc::c_ulong = 0x2401;
        // SAFETY: plain numbers.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), if on { ENABLE } else { DISABLE }, 0) })
    }
}

/// Whether the guest of the calling thread has written a debug register since this was last asked, as far
/// as [`DrWrites`] tell.
pub(crate) fn take_write() -> bool {
    WROTE.replace(false)
}

fn checked(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
