//! `trapline-exit V`: ends the virtual machine with status V by writing the byte V to I/O port
//! 0xf4. A single file, compiled by `guest-images/initramfs/build`, for kernels without /dev/port.

use std::arch::asm;
use std::process::exit;

const EXIT_PORT: u16 = 0xf4;
/// x86-64 system call `ioperm(from, count, on)`.
const SYS_IOPERM: usize = 173;

fn main() {
    let mut args = std::env::args().skip(1);
    let (Some(arg), None) = (args.next(), args.next()) else {
        fail("one argument, a status from 0 to 255");
    };
    let Ok(status) = arg.parse::<u8>() else {
        fail(&format!("'{arg}' is not a status from 0 to 255"));
    };

    let result: isize;
    // SAFETY: ioperm only changes this thread's I/O permission bitmap; `syscall` clobbers rcx and
    // r11 and nothing else.
    unsafe {
        asm!("syscall", inlateout("rax") SYS_IOPERM => result, in("rdi") usize::from(EXIT_PORT),
             in("rsi") 1usize, in("rdx") 1usize, out("rcx") _, out("r11") _, options(nostack));
    }
    if result != 0 {
        fail(&format!(
            "ioperm refused port {EXIT_PORT:#x} (errno {})",
            -result
        ));
    }
    // SAFETY: ioperm granted this one port; the write has no effect on this process's memory.
    unsafe {
        asm!("out dx, al", in("dx") EXIT_PORT, in("al") status, options(nomem, nostack, preserves_flags));
    }
    fail("this machine has no exit port");
}

fn fail(what: &str) -> ! {
    eprintln!("trapline-exit: {what}");
    exit(1)
}
