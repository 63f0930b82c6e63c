//! `hw-watch [ROUNDS]`: a debugger inside of the guest that uses the processor's breakpoints on a
//! child (PTRACE_POKEUSER of `u_debugreg`): on execution, on writes, on any access, two at a time.
//! It checks where the child stops, with which bit of DR6, and how often.

mod sys;

use std::arch::global_asm;

use sys::{Checked, Child, Pages, SIGTRAP, Status, TF, finish};

/// How often the child passes each place.
const TURNS: usize = 25;

/// Where the child's words are: watched for writes, watched for accesses, between them and not
/// watched.
const WRITTEN: usize = 0;
const READ: usize = 4;
const OTHER: usize = 2;

/// DR7: LE, GE and the fixed bit. Linux shows them as they were written.
const DR7_BASE: u64 = 0x700;
/// DR6's bits that tell a cause.
const DR6_CAUSES: u64 = 0xe00f;

// turns(words: rdi): every place that is to be hit, and one of each kind that is not.
global_asm!(
    ".globl w_begin, w_executed, w_written, w_read",
    ".text",
    "w_begin:",
    "mov ecx, {turns}",
    "1:",
    "inc qword ptr [rdi + {other}]",
    "w_executed:",
    "nop",
    "mov qword ptr [rdi + {write}], rcx",
    "w_written:",
    "nop",
    // A read does not trip the write watchpoint.
    "mov rax, [rdi + {write}]",
    // The last two bytes of the watched word: an access of a part of it.
    "mov ax, [rdi + {read} + 6]",
    "w_read:",
    "nop",
    "dec ecx",
    "jnz 1b",
    "ret",
    turns = const TURNS,
    other = const OTHER * 8,
    write = const WRITTEN * 8,
    read = const READ * 8,
);

unsafe extern "C" {
    #[link_name = "w_begin"]
    fn turns(words: *mut u8);
    static w_executed: u8;
    static w_written: u8;
    static w_read: u8;
}

/// A breakpoint as the debugger arms it, and where it stops the child.
#[derive(Clone, Copy)]
struct Slot {
    name: &'static str,
    number: usize,
    addr: u64,
    /// R/W and LEN as DR7 has them.
    condition: u64,
    length: u64,
    stops_at: u64,
}

impl Slot {
    fn enabled(&self) -> u64 {
        1 << (2 * self.number) | (self.condition | self.length << 2) << (16 + 4 * self.number)
    }
}

/// Two at a time: a debugger outside may hold the other two. Their numbers are not those that a
/// mix-up would give them.
fn pairs(words: &Pages) -> [[Slot; 2]; 3] {
    let word = |n: usize| words.start() as u64 + 8 * n as u64;
    let executed = &raw const w_executed as u64;
    let (behind_write, behind_access) = (&raw const w_written as u64, &raw const w_read as u64);
    let exec = Slot { name: "exec", number: 1, addr: executed, condition: 0, length: 0, stops_at: executed };
    let write = Slot { name: "write", number: 2, addr: word(WRITTEN), condition: 1, length: 2, stops_at: behind_write };
    let access = Slot { name: "access", number: 3, addr: word(READ), condition: 3, length: 2, stops_at: behind_access };
    [[exec, write], [Slot { number: 0, ..write }, access], [Slot { number: 3, ..exec }, Slot { number: 0, ..access }]]
}

/// What PTRACE_PEEKUSER is to show while `slots` are armed.
fn shown(slots: &[Slot; 2]) -> [(usize, u64); 3] {
    let dr7 = slots.iter().fold(DR7_BASE, |dr7, slot| dr7 | slot.enabled());
    [(slots[0].number, slots[0].addr), (slots[1].number, slots[1].addr), (7, dr7)]
}

/// The next hit is to be on `slot`, with nothing else to be seen.
fn hit(child: &mut Child, slot: &Slot, armed: &[Slot; 2]) -> Checked<()> {
    let status = child.go()?;
    if status != Status::Stopped(SIGTRAP) {
        return Err(format!("{status:?} instead of a hit"));
    }
    let registers = child.registers()?;
    if registers.rip != slot.stops_at {
        return Err(format!("stops at {:#x} instead of {:#x}", registers.rip, slot.stops_at));
    }
    let dr6 = child.debug_register(6)?;
    if dr6 & DR6_CAUSES != 1 << slot.number {
        return Err(format!("DR6 is {dr6:#x}, not bit {}", slot.number));
    }
    if registers.rflags & TF != 0 {
        return Err(format!("TF is set in {:#x}", registers.rflags));
    }
    for (n, value) in shown(armed) {
        let is = child.debug_register(n)?;
        if is != value {
            return Err(format!("DR{n} is {is:#x} instead of {value:#x}"));
        }
    }
    child.set_debug_register(6, 0)
}

/// One child that runs into two breakpoints for half of its turns, and then without any to its end.
fn child(words: &Pages, slots: &[Slot; 2]) -> Checked<usize> {
    let before = words.word(OTHER);
    // SAFETY: the page is there, and the code keeps to the calling convention.
    let mut child = Child::traced(|| unsafe { turns(words.start()) })?;
    for (n, value) in shown(slots) {
        child.set_debug_register(n, value)?;
    }
    for turn in 1..=TURNS / 2 {
        for slot in slots {
            hit(&mut child, slot, slots).map_err(|error| format!("{}, turn {turn}: {error}", slot.name))?;
        }
        if words.word(OTHER) != before + turn as u64 {
            return Err(format!("turn {turn}: the child is in its turn {}", words.word(OTHER) - before));
        }
    }
    child.set_debug_register(7, DR7_BASE)?;
    match child.go()? {
        Status::Exited(0) if words.word(OTHER) == before + TURNS as u64 => Ok(2 * (TURNS / 2)),
        other => Err(format!("disarmed, it ended with {other:?} in turn {}", words.word(OTHER) - before)),
    }
}

fn round() -> Checked<usize> {
    let words = Pages::shared(4096)?;
    pairs(&words).iter().map(|slots| child(&words, slots)).sum()
}

fn main() {
    let rounds = std::env::args().nth(1).and_then(|arg| arg.parse().ok()).unwrap_or(1);
    let outcome = (0..rounds).map(|_| round()).sum::<Checked<usize>>().map(|hits| format!("{hits} hits"));
    finish("hw-watch", outcome)
}
