//! A console whose pipe is full holds up nobody but the guest.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use std::io::Write;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

/// A bound against hanging.
const PATIENCE: Duration = Duration::from_secs(60);

/// Prints for ever: mov $0x3f8, %edx; mov $'a', %al; 1: out %al, (%dx); jmp 1b.
const PRINTS: &[u8] = &[0xba, 0xf8, 0x03, 0, 0, 0xb0, b'a', 0xee, 0xeb, 0xfd];
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
