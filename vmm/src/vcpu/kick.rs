//! The kick: a signal whose handler makes the next, or the present, KVM_RUN return.
//!
//! Unsafe because a signal handler has to reach the `kvm_run` page of the thread it interrupts.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::mem;
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
}

pub(super) extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let run = RUN.get();
    if !run.is_null() {
        // SAFETY: the pointer was set on this very thread by `receive`, whose caller keeps the
        // page mapped until it clears it.
        let flag = unsafe { &raw mut (*run).immediate_exit };
        // SAFETY: one byte of that page, written volatile, that only this thread and KVM read.
        unsafe { flag.write_volatile(1) };
    }
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
