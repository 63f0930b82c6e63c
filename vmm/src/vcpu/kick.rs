//! The kick: a signal whose handler makes the next, or the present, KVM_RUN return.
//!
//! Unsafe because a signal handler has to reach the `kvm_run` page of the thread it interrupts.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::thread::JoinHandle;

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
