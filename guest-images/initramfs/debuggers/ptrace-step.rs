//! `ptrace-step [ROUNDS]`: a single-step debugger inside of the guest. It steps a child through a
//! stretch of known instructions and checks where each step ends and what the child sees of it.
//!
//! What the child sees is what Linux on x86 shows: PUSHF and SYSCALL's R11 have the TF that the
//! debugger's step has set, and the debugger's own look at the flags does not.

mod sys;

use std::arch::global_asm;
use std::ffi::c_int;

use sys::{Checked, Child, Pages, SIGTRAP, SIGUSR1, Status, TF, finish};

/// DR6.BS.
const BS: u64 = 1 << 14;
/// Iterations of the loop and of REP MOVSB in the stretch.
const LOOPS: usize = 40;
const MOVES: usize = 3;

// stretch(results: rdi, fresh: rsi): `results` is shared with the debugger, `fresh` a page that
// is not there yet. Each instruction is a place with a name; two tables say where and what.
global_asm!(
    ".macro place name",
    "p_\\name:",
    ".pushsection .rodata.p_offsets, \"a\"",
    ".4byte p_\\name - p_begin",
    ".popsection",
    ".pushsection .rodata.p_names, \"a\"",
    ".ascii \"\\name \"",
    ".popsection",
    ".endm",
    ".pushsection .rodata.p_offsets, \"a\"",
    ".balign 4",
    "p_offsets:",
    ".popsection",
    ".pushsection .rodata.p_names, \"a\"",
    "p_names:",
    ".popsection",
    ".globl p_begin, p_offsets, p_names, p_names_end",
    ".text",
    "p_begin:",
    "place nop", "nop",
    "place push_rbx", "push rbx",
    // PUSHF, and what it stored.
    "place pushf", "pushfq",
    "place pop_image", "pop rax",
    "place keep_image", "mov [rdi], rax",
    // An instruction that a hypervisor carries out.
    "place leaf", "xor eax, eax",
    "place cpuid", "cpuid",
    // getpid
    "place getpid", "mov eax, 39",
    "place syscall", "syscall",
    "place keep_pid", "mov [rdi + 16], rax",
    "place keep_r11", "mov [rdi + 24], r11",
    // A page fault that the kernel mends.
    "place fault", "mov byte ptr [rsi], 1",
    "place behind_fault", "inc qword ptr [rdi + 32]",
    // One step for each iteration.
    "place save_rdi", "mov r8, rdi",
    "place save_rsi", "mov r9, rsi",
    "place to", "lea rdi, [rsi + 16]",
    "place count", "mov ecx, {moves}",
    "place rep", "rep movsb",
    "place restore_rdi", "mov rdi, r8",
    // kill(pid, SIGUSR1): the handler runs before the next instruction.
    "place kill_pid", "mov rdi, [r8 + 16]",
    "place kill_signal", "mov esi, 10",
    "place kill_number", "mov eax, 62",
    "place kill", "syscall",
    "place behind_kill", "mov rdi, r8",
    "place loops", "mov ecx, {loops}",
    "place loop", "dec ecx",
    "place loop_end", "jnz p_loop",
    // POPF of an image without TF: the debugger's goes, and the step ends all the same.
    "place pushf_again", "pushfq",
    "place clear_tf", "btr qword ptr [rsp], 8",
    "place popf", "popfq",
    "place behind_popf", "nop",
    "place pushf_third", "pushfq",
    "place pop_third", "pop rax",
    "place keep_third", "mov [r8 + 8], rax",
    "place pop_rbx", "pop rbx",
    "place end", "ret",
    // The handler of SIGUSR1 and the way back.
    "place handler", "nop",
    "place handler_end", "ret",
    "place restorer", "mov eax, 15",
    "place sigreturn", "syscall",
    ".pushsection .rodata.p_names, \"a\"",
    "p_names_end:",
    ".popsection",
    moves = const MOVES,
    loops = const LOOPS,
);

unsafe extern "C" {
    #[link_name = "p_begin"]
    fn stretch(results: *mut u8, fresh: *mut u8);
    static p_offsets: u32;
    static p_names: u8;
    static p_names_end: u8;
}

/// The stretch's instructions, in order: name and address.
struct Stretch(Vec<(&'static str, u64)>);

impl Stretch {
    fn find() -> Self {
        let begin = stretch as *const () as u64;
        let (first, last) = (&raw const p_names, &raw const p_names_end);
        // SAFETY: both are ends of one table.
        let len = unsafe { last.offset_from(first) } as usize;
        // SAFETY: `len` bytes of it, which nobody writes.
        let names = unsafe { std::slice::from_raw_parts(first, len) };
        let names: Vec<_> = std::str::from_utf8(names).unwrap().split_terminator(' ').collect();
        // SAFETY: the macro puts an offset into this table with each name.
        let offsets = unsafe { std::slice::from_raw_parts(&raw const p_offsets, names.len()) };
        Stretch(names.into_iter().zip(offsets).map(|(name, offset)| (name, begin + u64::from(*offset))).collect())
    }

    fn at(&self, name: &str) -> u64 {
        self.0[self.number(name)].1
    }

    fn number(&self, name: &str) -> usize {
        self.0.iter().position(|place| place.0 == name).unwrap()
    }

    fn name(&self, rip: u64) -> String {
        let place = self.0.iter().find(|place| place.1 == rip);
        place.map_or_else(|| format!("{rip:#x}"), |place| place.0.to_owned())
    }

    /// Every stop of a debugger that steps from the first instruction to behind the last: the
    /// place and the signal that it stops with.
    fn stops(&self) -> Vec<(u64, c_int)> {
        let line = |from: &str, to: &str| self.0[self.number(from)..=self.number(to)].iter().map(|place| place.1);
        let mut stops: Vec<u64> = line("push_rbx", "rep").collect();
        stops.extend([self.at("rep"); MOVES - 1]);
        stops.extend(line("restore_rdi", "behind_kill"));
        // The signal is pending when the step over the system call is told.
        let signal = stops.len();
        stops.push(self.at("behind_kill"));
        stops.extend(line("handler", "sigreturn"));
        stops.extend(line("behind_kill", "loops"));
        (0..LOOPS).for_each(|_| stops.extend(line("loop", "loop_end")));
        stops.extend(line("pushf_again", "end"));
        stops.into_iter().enumerate().map(|(n, at)| (at, if n == signal { SIGUSR1 } else { SIGTRAP })).collect()
    }
}

/// `struct kernel_sigaction`.
#[repr(C)]
struct Action {
    handler: u64,
    flags: u64,
    restorer: u64,
    mask: u64,
}

fn handle_sigusr1(stretch: &Stretch) -> Checked<()> {
    const SYS_RT_SIGACTION: usize = 13;
    const SA_RESTORER: u64 = 0x0400_0000;
    let action =
        Action { handler: stretch.at("handler"), flags: SA_RESTORER, restorer: stretch.at("restorer"), mask: 0 };
    let result: isize;
    // SAFETY: `action` outlives the call; the handler and what it returns to touch nothing.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") SYS_RT_SIGACTION => result, in("rdi") SIGUSR1,
                        in("rsi") &raw const action, in("rdx") 0, in("r10") 8, out("rcx") _, out("r11") _,
                        options(nostack));
    }
    if result == 0 { Ok(()) } else { Err(format!("rt_sigaction: errno {}", -result)) }
}

/// One child, stepped through all of it; how many steps that were.
fn round(places: &Stretch) -> Checked<usize> {
    let results = Pages::shared(4096)?;
    let fresh = Pages::shared(4096)?;
    // SAFETY: both pages are there, and the stretch keeps to the calling convention.
    let mut child = Child::traced(|| unsafe { stretch(results.start(), fresh.start()) })?;
    // On to the stretch: what is on the way is the compiler's, but it is all steps as well.
    let mut steps = 0;
    while child.registers()?.rip != places.at("nop") {
        match child.step(0)? {
            Status::Stopped(SIGTRAP) if steps < 5000 => steps += 1,
            other => return Err(format!("on the way: {other:?} after {steps} steps")),
        }
    }
    let mut signal = 0;
    let mut at = places.at("nop");
    for (n, (place, with)) in places.stops().into_iter().enumerate() {
        let mut status = child.step(signal)?;
        // QEMU's processor traps once more when all iterations are done.
        if at == places.at("rep") && place != at && child.registers().is_ok_and(|now| (now.rip, now.rcx) == (at, 0)) {
            status = child.step(0)?;
        }
        let where_from = places.name(at);
        if status != Status::Stopped(with) {
            return Err(format!("step {n} from {where_from}: {status:?} instead of signal {with}"));
        }
        let registers = child.registers()?;
        if registers.rip != place {
            let (is, should) = (places.name(registers.rip), places.name(place));
            return Err(format!("step {n} from {where_from} ends at {is} instead of {should}"));
        }
        // The debugger's own TF is hidden from it, until a stepped POPF makes Linux lose track of
        // whose it is (arch/x86/kernel/step.c).
        let lost = (places.at("behind_popf") + 1..=places.at("end")).contains(&place);
        if (registers.rflags & TF != 0) != lost {
            return Err(format!("step {n} from {where_from}: the debugger is shown {:#x}", registers.rflags));
        }
        // A trap behind an instruction, as opposed to what the kernel makes of a system call.
        let trapped = ["keep_pid", "behind_kill", "handler"].iter().all(|name| places.at(name) != place);
        let dr6 = child.debug_register(6)?;
        if trapped && dr6 & (BS | 0xf) != BS {
            return Err(format!("step {n} from {where_from}: DR6 is {dr6:#x}"));
        }
        signal = if with == SIGTRAP { 0 } else { with };
        (at, steps) = (place, steps + 1);
    }
    // Let go, nothing of the stepping is left in the child.
    child.clear_tf()?;
    match child.go()? {
        Status::Exited(0) => {}
        other => return Err(format!("let go, the child ended with {other:?}")),
    }
    let shown = |n: usize| results.word(n) & TF != 0;
    for (n, what, tf) in [(0, "PUSHF", true), (1, "PUSHF behind POPF", true), (3, "SYSCALL's R11", true)] {
        if shown(n) != tf {
            return Err(format!("{what} shows {:#x}", results.word(n)));
        }
    }
    if results.word(4) != 1 || fresh.byte(0) != 1 || fresh.byte(16) != 1 {
        return Err("the child's stores are not there, or there twice".to_owned());
    }
    Ok(steps)
}

fn main() {
    let rounds = std::env::args().nth(1).and_then(|arg| arg.parse().ok()).unwrap_or(1);
    let places = Stretch::find();
    let outcome = handle_sigusr1(&places).and_then(|()| {
        let steps = (0..rounds).map(|_| round(&places)).sum::<Checked<usize>>()?;
        Ok(format!("{steps} steps"))
    });
    finish("ptrace-step", outcome)
}
