//! `hw-watch [ROUNDS]`: a debugger inside of the guest that uses the processor's breakpoints on a
//! child (PTRACE_POKEUSER of `u_debugreg`): one on execution, one on a write, one on any access.
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

/// A breakpoint as the debugger arms it and as it shows.
struct Slot {
    name: &'static str,
    number: usize,
    addr: u64,
    /// R/W and LEN as DR7 has them.
    condition: u64,
    length: u64,
    /// Where the child stops.
    stops_at: u64,
}

fn slots(words: &Pages) -> [Slot; 3] {
    let word = |n: usize| words.start() as u64 + 8 * n as u64;
    let place = |label: *const u8| label as u64;
    let (executed, written, read) =
        (place(&raw const w_executed), place(&raw const w_written), place(&raw const w_read));
    [
        Slot { name: "exec", number: 0, addr: executed, condition: 0, length: 0, stops_at: executed },
        // Not the numbers that are free first, so that a mix-up of numbers shows.
        Slot { name: "write", number: 2, addr: word(WRITTEN), condition: 1, length: 2, stops_at: written },
        Slot { name: "access", number: 3, addr: word(READ), condition: 3, length: 2, stops_at: read },
    ]
}

fn arm(child: &mut Child, slots: &[Slot]) -> Checked<u64> {
    let mut dr7 = DR7_BASE;
    for slot in slots {
        child.set_debug_register(slot.number, slot.addr)?;
        dr7 |= 1 << (2 * slot.number) | (slot.condition | slot.length << 2) << (16 + 4 * slot.number);
    }
    child.set_debug_register(7, dr7)?;
    Ok(dr7)
}

/// One child, with all slots armed and then, for half of its turns, disarmed.
fn round() -> Checked<usize> {
    let words = Pages::new(4096)?;
    let slots = slots(&words);
    // SAFETY: the page is there, and the code keeps to the calling convention.
    let mut child = Child::traced(|| unsafe { turns(words.start()) })?;
    let dr7 = arm(&mut child, &slots)?;
    let mut hits = 0;
    for turn in 0..TURNS {
        for slot in &slots {
            let name = slot.name;
            let status = child.go()?;
            if status != Status::Stopped(SIGTRAP) {
                return Err(format!("turn {turn}, {name}: {status:?} instead of a hit"));
            }
            let registers = child.registers()?;
            if registers.rip != slot.stops_at {
                let of = slots.iter().find(|other| other.stops_at == registers.rip).map_or("none", |other| other.name);
                return Err(format!("turn {turn}, {name}: stops at {:#x}, the place of {of}", registers.rip));
            }
            let dr6 = child.debug_register(6)?;
            if dr6 & 0xe00f != 1 << slot.number {
                return Err(format!("turn {turn}, {name}: DR6 is {dr6:#x}"));
            }
            if registers.rflags & TF != 0 {
                return Err(format!("turn {turn}, {name}: TF is set in {:#x}", registers.rflags));
            }
            let mut expected = [(0, slots[0].addr), (2, slots[1].addr), (3, slots[2].addr), (7, dr7)].into_iter();
            if let Some((n, value)) = expected.find(|(n, value)| child.debug_register(*n) != Ok(*value)) {
                return Err(format!("turn {turn}: DR{n} is {:x?}, not {value:#x}", child.debug_register(n)));
            }
            child.set_debug_register(6, 0)?;
            hits += 1;
        }
        if words.word(OTHER) != turn as u64 + 1 {
            return Err(format!("turn {turn}: the child is in its turn {}", words.word(OTHER)));
        }
        if turn == TURNS / 2 {
            child.set_debug_register(7, DR7_BASE)?;
            break;
        }
    }
    match child.go()? {
        Status::Exited(0) if words.word(OTHER) == TURNS as u64 => Ok(hits),
        other => Err(format!("disarmed, it ended with {other:?} in turn {}", words.word(OTHER))),
    }
}

fn main() {
    let rounds = std::env::args().nth(1).and_then(|arg| arg.parse().ok()).unwrap_or(1);
    let outcome = (0..rounds).map(|_| round()).sum::<Checked<usize>>().map(|hits| format!("{hits} hits"));
    finish("hw-watch", outcome)
}
