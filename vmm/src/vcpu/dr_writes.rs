//! What an SVM guest writes to its debug registers, told by the host kernel's tracing.
//!
//! On SVM a MOV to a debug register exits to KVM, and no further. KVM passes its tracepoint `kvm_exit`
//! before it carries the write out: a perf event on that, filtered to these exits, sends this thread a
//! signal, which is there before the guest goes on and ends KVM_RUN as a kick does. Who may not trace
//! the kernel, or has another KVM, goes without, and looks at the registers now and then instead.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::register_signal_handler;

use super::kick::on_kick;

thread_local! {
    /// The guest of this thread's vCPU has written a debug register. Const-initialised and without a
    /// destructor, so that the handler can set it at any moment.
    static WROTE: Cell<bool> = const { Cell::new(false) };
}

extern "C" fn on_write(number: c_int, info: *mut siginfo_t, context: *mut c_void) {
    WROTE.set(true);
    on_kick(number, info, context);
}

/// MOV to DR0-7 among SVM's exit codes (AMD APM vol. 2, appendix C), as the tracepoint has them.
const WRITES: &CStr = c"isa == 2 && exit_reason >= 48 && exit_reason <= 55";
/// Is there where KVM's SVM code is in use.
const SVM: &str = "/sys/module/kvm_amd";
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

/// A perf event that kicks a vCPU thread at each MOV to a debug register of its guest.
pub(crate) struct DrWrites(OwnedFd);

impl DrWrites {
    /// Those of the calling thread, which do not kick it yet.
    ///
    /// # Errors
    /// Where KVM is not on SVM; and what the kernel says to who may not trace it (CAP_PERFMON, and to read tracefs).
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
        if !Path::new(SVM).exists() {
            return Err(io::ErrorKind::Unsupported.into());
        }
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
