//! `fresh-pages FILE`: takes a page, writes it, gives it back, lets others run, for ever: system
//! calls, page faults and switches of process, for a debugger outside to step through. FILE holds
//! how often it has done so. A debug exception that is not its own ends it.

mod sys;

use std::arch::asm;
use std::fs::File;
use std::os::unix::fs::FileExt;

use sys::{Checked, Pages, finish};

const SYS_SCHED_YIELD: usize = 24;

fn sched_yield() {
    // SAFETY: reads and writes no memory.
    unsafe {
        asm!("syscall", inlateout("rax") SYS_SCHED_YIELD => _, out("rcx") _, out("r11") _, options(nostack));
    }
}

fn turn(file: &File, number: u64) -> Checked<()> {
    let pages = Pages::private(4096)?;
    // SAFETY: inside of the mapping.
    unsafe { pages.start().cast::<u64>().write_volatile(number) };
    sched_yield();
    if pages.word(0) != number {
        return Err(format!("a page holds {} instead of {number}", pages.word(0)));
    }
    file.write_all_at(format!("{number}\n").as_bytes(), 0).map_err(|error| error.to_string())
}

fn main() {
    let outcome = std::env::args().nth(1).ok_or("takes the file for its progress".to_owned()).and_then(|path| {
        let file = File::create(&path).map_err(|error| format!("{path}: {error}"))?;
        (1..).try_for_each(|number| turn(&file, number))
    });
    finish("fresh-pages", outcome.map(|()| String::new()))
}
