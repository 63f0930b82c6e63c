//! A console whose pipes are full, or open and silent, holds up nobody but the guest.

use std::io::Write;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use trapline_vmm::limits::CONSOLE_INPUT_QUEUE;

/// A bound against hanging.
const PATIENCE: Duration = Duration::from_secs(60);

/// Prints for ever: mov $0x3f8, %edx; mov $'a', %al; 1: out %al, (%dx); jmp 1b.
const PRINTS: &[u8] = &[0xba, 0xf8, 0x03, 0, 0, 0xb0, b'a', 0xee, 0xeb, 0xfd];
/// Waits a little, then reads for ever: mov $3000000, %ecx; loop .; mov $0x3fd, %edx; 1: in (%dx), %al;
/// test $1, %al; jz 1b; mov $0xf8, %dl; in (%dx), %al; mov $0xfd, %dl; jmp 1b.
const READS: &[u8] = &[
    0xb9, 0xc0, 0xc6, 0x2d, 0, 0xe2, 0xfe, 0xba, 0xfd, 0x03, 0, 0, 0xec, 0xa8, 0x01, 0x74, 0xfb, 0xb2, 0xf8, 0xec,
    0xb2, 0xfd, 0xeb, 0xf4,
];

/// The smallest ELF64 that boots: one segment, entered at its first byte.
fn elf(code: &[u8]) -> NamedTempFile {
    const ADDR: u64 = 0x10_0000;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    elf.extend([ADDR, 64].map(u64::to_le_bytes).concat());
    elf.extend([0; 12]);
    elf.extend([64u16, 56, 1, 64, 0, 0].map(u16::to_le_bytes).concat());
    elf.extend([1u32, 5].map(u32::to_le_bytes).concat());
    let len = code.len() as u64;
    elf.extend([120, ADDR, ADDR, len, len, 1].map(u64::to_le_bytes).concat());
    elf.extend(code);
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&elf).unwrap();
    file
}

fn start(kernel: &NamedTempFile) -> Child {
    Command::new(env!("CARGO_BIN_EXE_trapline"))
        .args(["run", "--cpus", "1", "--memory", "16M", "--timeout", "10s"])
        .arg(kernel.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("trapline starts")
}

/// Waits with the pipes held open and untouched.
fn end_of(mut child: Child) -> ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if started.elapsed() > PATIENCE {
            let _ = child.kill();
            panic!("it hangs");
        }
        sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_full_pipe_behind_the_console_does_not_keep_the_run_from_ending() {
    let kernel = elf(PRINTS);
    let child = start(&kernel);
    // So small that the guest fills it at once.
    rustix::pipe::fcntl_setpipe_size(child.stdout.as_ref().unwrap(), 4096).unwrap();
    assert_eq!(end_of(child).code(), Some(5));
}

#[test]
fn a_pipe_that_is_open_and_silent_does_not_hold_up_the_event_loop() {
    let kernel = elf(READS);
    let mut child = start(&kernel);
    // Just what fills the console's queue. When the guest makes room again there is nothing more to read.
    child.stdin.as_mut().unwrap().write_all(&[b'x'; CONSOLE_INPUT_QUEUE]).unwrap();
    assert_eq!(end_of(child).code(), Some(5));
}
