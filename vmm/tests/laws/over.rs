//! Laws 37, 40 and 41: off a breakpoint without a step.
//!
//! What is carried out in place must be what the processor does: the first tests here let the
//! guest's processor run thousands of instructions, and compare.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::kvm_regs;
use kvm_ioctls::{VcpuExit, VcpuFd};
use trapline_guests::fixture::{self, LogEntry, cpu_field};
use trapline_vmm::debug::{Breakpoint, Disposition, General, Handler, Owner, RunMode, StopReason, carry_out};
use trapline_vmm::memory::GuestRam;
use trapline_vmm::paging::write_all_physical;

use crate::clock::wait_for;
use crate::lane::Need::{Kick, ShadowOverExits};
use crate::law::{Law, law};
use crate::rig::{Begin, Rig, at, bare_machine, name, vcpu};

pub(crate) fn laws() -> Vec<Law> {
    vec![
        law!(l41_what_is_carried_out_in_place_is_what_the_processor_does),
        law!(l41_and_in_ring_3),
        law!(l41_no_form_of_nop_is_stepped),
        law!(l41_a_reserved_nop_is_not_stepped),
        law!(l41_a_nop_that_was_told_is_left_in_place),
        law!(l41_the_next_instruction_is_told_too),
        law!(l41_a_debuggers_step_is_in_place_too),
        law!(l41_a_trap_counts_before_the_debuggers_step),
        law!(l41_a_function_entry_is_crossed_without_a_step_on_every_vcpu, Kick),
        law!(l41_what_touches_memory_is_stepped),
        law!(l41_not_under_the_guests_own_trap_flag),
        law!(l41_not_in_the_shadow_of_sti, ShadowOverExits),
        law!(l41_registers_written_at_the_stop_are_what_it_starts_from),
        law!(l40_several_at_one_place_and_within_are_each_told_once),
    ]
}

/// Cases for each ring. Under Bochs an exit takes milliseconds.
fn cases() -> u64 {
    if crate::lane::lane() == "vmx" { 1500 } else { 12_000 }
}

/// A page that every ring may run and write.
const PAGE: u64 = fixture::WATCH;
/// Where the instruction stands, with room for jumps before and behind it.
const SITE: u64 = PAGE + 0x800;
/// `out %al, $port`: the processor comes by, and by where.
const STOPS: [u8; 2] = [0xe6, fixture::PORT_NOTHING as u8];
const LANDS: [u8; 2] = [0xe6, fixture::PORT_NOTHING as u8 + 1];

const IOPL: u64 = 0x3000;

/// Steele, Lea and Flood's generator: the same cases everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        of[(self.next() % of.len() as u64) as usize]
    }

    /// Values with all kinds of edges.
    fn value(&mut self) -> u64 {
        let edge = self.one_of(&[0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fff_ffff, 0x8000_0000, 1 << 63]);
        match self.next() % 4 {
            0 => edge,
            1 => u64::MAX << (self.next() % 64) | edge,
            _ => self.next(),
        }
    }
}

/// What follows an opcode.
#[derive(Clone, Copy)]
enum Rest {
    Nothing,
    /// Two registers.
    Registers,
    /// One register, and a digit of the opcode.
    Digit(u8),
    /// A digit, a register, and an immediate of 1 byte.
    DigitByte(u8),
    /// A digit, a register, and an immediate of 2 or 4 bytes.
    DigitLong(u8),
    /// A register and an address.
    Address,
    Byte,
    /// 2 or 4 bytes.
    Long,
    /// 2, 4 or 8 bytes.
    Full,
    /// A distance of 1 byte.
    Near,
    /// A distance of 4 bytes.
    Far,
}

/// Opcodes of the instructions that are to be carried out in place, and what follows them.
fn opcodes() -> Vec<(Vec<u8>, Rest)> {
    use Rest::*;
    let mut all = vec![
        (vec![0xf3, 0x0f, 0x1e, 0xfa], Nothing),
        (vec![0xf3, 0x0f, 0x1e, 0xfb], Nothing),
        (vec![0x0f, 0x1f], Address),
        (vec![0x0f, 0x1f], Digit(0)),
        (vec![0x8d], Address),
        (vec![0x8d], Address),
        (vec![0xeb], Near),
        (vec![0xe3], Near),
        (vec![0xe9], Far),
        (vec![0xff], Digit(4)),
        (vec![0xc6], DigitByte(0)),
        (vec![0xc7], DigitLong(0)),
        (vec![0xf6], DigitByte(0)),
        (vec![0xf7], DigitLong(0)),
        (vec![0xa8], Byte),
        (vec![0xa9], Long),
    ];
    for opcode in [0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0x63] {
        all.push((vec![opcode], Registers));
    }
    for opcode in [0xb6, 0xb7, 0xbe, 0xbf] {
        all.push((vec![0x0f, opcode], Registers));
    }
    for (opcode, digits) in [(0xf6, 2..=3), (0xf7, 2..=3), (0xfe, 0..=1), (0xff, 0..=1)] {
        all.extend(digits.map(|digit| (vec![opcode], Digit(digit))));
    }
    for digit in 0..8 {
        let group = digit << 3;
        all.extend((0..4).map(|form| (vec![group + form], Registers)));
        all.extend([(vec![group + 4], Byte), (vec![group + 5], Long)]);
        all.extend([(vec![0x80], DigitByte(digit)), (vec![0x81], DigitLong(digit)), (vec![0x83], DigitByte(digit))]);
    }
    for n in 0..8 {
        all.extend([(vec![0x90 + n], Nothing), (vec![0xb0 + n], Byte), (vec![0xb8 + n], Full)]);
        all.push((vec![0x0f, 0xc8 + n], Nothing));
    }
    for n in 0..16 {
        all.extend([(vec![0x0f, 0x40 + n], Registers), (vec![0x0f, 0x90 + n], Digit(0))]);
        all.extend([(vec![0x70 + n], Near), (vec![0x0f, 0x80 + n], Far)]);
    }
    all.extend([0x98, 0xf5, 0xf8, 0xf9, 0xfc, 0xfd].map(|opcode| (vec![opcode], Nothing)));
    all
}

/// One instruction, with prefixes of all kinds.
fn instruction(random: &mut Random, (opcode, rest): &(Vec<u8>, Rest)) -> Vec<u8> {
    let mut code = Vec::new();
    let prefix = random.next();
    let (short, address) = (prefix.is_multiple_of(5), (prefix >> 8).is_multiple_of(11));
    if short {
        code.push(0x66);
    }
    if address {
        code.push(0x67);
    }
    let rex = ((prefix >> 16) & 3 != 0).then_some(0x40 | (prefix >> 24) as u8 & 0xf);
    // REX stands right before the opcode, behind a prefix that belongs to it.
    let mandatory = usize::from(opcode[0] == 0xf3);
    code.extend(&opcode[..mandatory]);
    code.extend(rex);
    code.extend(&opcode[mandatory..]);
    let wide = rex.is_some_and(|rex| rex & 8 != 0);
    let long = if short && !wide { 2 } else { 4 };
    let modrm = random.next() as u8;
    let immediate = random.value().to_le_bytes();
    match *rest {
        Rest::Nothing => {}
        Rest::Registers => code.push(modrm | 0xc0),
        Rest::Digit(digit) => code.push(modrm & 7 | 0xc0 | digit << 3),
        Rest::DigitByte(digit) => code.extend([modrm & 7 | 0xc0 | digit << 3, immediate[0]]),
        Rest::DigitLong(digit) => {
            code.push(modrm & 7 | 0xc0 | digit << 3);
            code.extend(&immediate[..long]);
        }
        Rest::Address => {
            // Any of the three forms with memory; more bytes than it needs do no harm, they are cut off.
            code.push(random.one_of(&[0, 0x40, 0x80]) | modrm & 0x3f);
            code.push(random.next() as u8);
            code.extend(&immediate[..4]);
        }
        Rest::Byte => code.push(immediate[0]),
        Rest::Long => code.extend(&immediate[..long]),
        Rest::Full => code.extend(&immediate[..if wide { 8 } else { long }]),
        Rest::Near => code.push(immediate[0]),
        Rest::Far => code.extend((random.next() as i32 % 0x700).to_le_bytes()),
    }
    code
}

fn registers(general: &General) -> kvm_regs {
    let General { gpr, rip, rflags } = *general;
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = gpr;
    kvm_regs { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

/// Lets the processor run the instruction at [`SITE`] from these registers to the port access behind
/// it, or where it jumps to; the registers there.
fn run(fd: &mut VcpuFd, before: &General) -> Result<(kvm_regs, u16), String> {
    fd.set_regs(&registers(before)).unwrap();
    let port = match fd.run() {
        Ok(VcpuExit::IoOut(port, _)) => port,
        other => return Err(format!("{other:?}")),
    };
    let after = fd.get_regs().unwrap();
    // The access is done before anybody goes on (law C4).
    fd.set_kvm_immediate_exit(1);
    assert!(fd.run().is_err());
    fd.set_kvm_immediate_exit(0);
    Ok((after, port))
}

fn compare_with_the_processor(begin: Begin, iopl: u64) {
    let (vm, ram) = bare_machine();
    let mut fd = vcpu(&vm, 0, 1, begin);
    let mut random = Random(41);
    let opcodes = opcodes();
    let (mut equal, mut unknown) = (0, 0);
    while equal + unknown < cases() {
        let which = random.one_of(&(0..opcodes.len()).collect::<Vec<_>>());
        let mut code = instruction(&mut random, &opcodes[which]);
        code.resize(15, 0);
        let mut before = General { rip: SITE, rflags: 2 | iopl, ..General::default() };
        before.gpr = std::array::from_fn(|_| random.value());
        // CF, PF, AF, ZF, SF, DF, OF.
        before.rflags |= random.next() & 0xcd5;
        let target = PAGE + 0x20 + random.next() % 0x600;
        if matches!(opcodes[which].1, Rest::Digit(4)) {
            before.gpr.fill(target);
        }
        let Some(expected) = carry_out(&code, &before, false) else {
            unknown += 1;
            continue;
        };
        let len = length(&code);
        let behind = SITE + len as u64;
        code.truncate(len);
        let jumps = expected.rip != behind;
        let room = PAGE..PAGE + 0xff0;
        if jumps && (!room.contains(&expected.rip) || (SITE - 2..behind + 2).contains(&expected.rip)) {
            continue;
        }
        put(&ram, SITE, &code);
        put(&ram, behind, &STOPS);
        if jumps {
            put(&ram, expected.rip, &LANDS);
        }
        let shown = format!("{code:02x?} from {before:x?}");
        let (after, port) = run(&mut fd, &before).unwrap_or_else(|exit| panic!("{exit} of {shown}"));
        assert_eq!(port, fixture::PORT_NOTHING + u16::from(jumps), "{shown} leads elsewhere");
        // RIP stands at the port access or behind it: which one is the flavour's choice.
        assert!((0..=2).contains(&(after.rip - expected.rip)), "{:x} after {shown}", after.rip);
        // PVM keeps no IOPL of ring 3.
        let expected = General { rip: after.rip, rflags: expected.rflags & !IOPL | after.rflags & IOPL, ..expected };
        assert_eq!(registers(&expected), after, "{shown}");
        equal += 1;
    }
    assert!(unknown < equal / 8, "only {equal} of {} were carried out", equal + unknown);
}

/// The instruction's length, as the processor has it.
fn length(code: &[u8]) -> usize {
    iced_x86::Decoder::new(64, code, iced_x86::DecoderOptions::NONE).decode().len()
}

fn put(ram: &GuestRam, at: u64, bytes: &[u8]) {
    assert!(write_all_physical(ram.mem(), at, bytes));
}

fn l41_what_is_carried_out_in_place_is_what_the_processor_does() {
    compare_with_the_processor(Begin::Ring0("nops"), 0);
}

/// Where ring 0 is interpreted, this is the processor itself.
fn l41_and_in_ring_3() {
    compare_with_the_processor(Begin::Ring3("ring3_out"), IOPL);
}

/// A harness trap that counts and goes on.
fn counted(rig: &mut Rig, addr: u64) -> Arc<AtomicU64> {
    let count = Arc::new(AtomicU64::new(0));
    let counter = count.clone();
    let handler = Handler::new(move |_| {
        counter.fetch_add(1, Ordering::Relaxed);
        Disposition::Continue
    });
    rig.coordinator.set_trap(Owner::harness(1), Breakpoint::exec(addr), Some(handler)).unwrap();
    count
}

/// Single steps that a vCPU was armed for, and instructions that were carried out without one.
fn steps_and_advances(rig: &Rig, cpu: usize) -> (usize, u64) {
    rig.spies[cpu].look(|notes| (notes.armed.iter().filter(|arming| arming.step).count(), notes.advanced))
}

const NOPS: [&str; 12] = [
    "nop_1",
    "nop_2",
    "nop_66_66_90",
    "nop_3",
    "nop_4",
    "nop_5",
    "nop_6",
    "nop_7",
    "nop_8",
    "nop_9",
    "nop_endbr",
    "nop_xchg",
];

fn l41_no_form_of_nop_is_stepped() {
    for label in NOPS {
        let mut rig = Rig::one("nops");
        let hits = counted(&mut rig, at(label));
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
        assert_eq!((hits.load(Ordering::Relaxed), rig.registers(0).r8), (3, 3 * 13), "{label}");
        assert_eq!(steps_and_advances(&rig, 0), (0, 3), "{label}");
        // 87 c0 is none: it clears the upper half of RAX.
        let saved = |n| rig.word(fixture::saved_address(n).unwrap());
        assert_eq!([saved(0), saved(1)], [0x1122_3344_5566_7788, 0x5566_7788], "{label}");
        rig.assert_guest_undisturbed();
    }
}

fn l41_a_reserved_nop_is_not_stepped() {
    let mut rig = Rig::one("nop_hint");
    let hits = counted(&mut rig, at("nop_hint_0f19"));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!((hits.load(Ordering::Relaxed), rig.registers(0).r8), (1, 1));
    assert_eq!(steps_and_advances(&rig, 0), (0, 1));
}

fn l41_a_nop_that_was_told_is_left_in_place() {
    let mut rig = Rig::one("nops");
    let bp = Breakpoint::exec(at("nop_5"));
    rig.set(bp).unwrap();
    for round in 0..3 {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        assert_eq!((name(rig.pc(0)), rig.registers(0).r8), (name(bp.addr), round * 13 + 5));
    }
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(steps_and_advances(&rig, 0), (0, 3));
}

fn l41_the_next_instruction_is_told_too() {
    let mut rig = Rig::one("nops");
    let bps = [at("nop_endbr"), at("nop_endbr") + 4, at("nop_pause")].map(Breakpoint::exec);
    for bp in bps {
        rig.set(bp).unwrap();
    }
    for _ in 0..3 {
        for bp in bps {
            assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
            assert_eq!(name(rig.pc(0)), name(bp.addr));
        }
    }
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(rig.registers(0).r8, 3 * 13);
    // PAUSE may leave the guest; it is stepped.
    let (steps, advances) = steps_and_advances(&rig, 0);
    assert_eq!((steps > 0, advances), (true, 6));
}

fn l41_a_debuggers_step_is_in_place_too() {
    let mut rig = Rig::one("nops");
    rig.run_to("nop_1");
    let before = steps_and_advances(&rig, 0);
    for label in &NOPS[1..11] {
        // Over the NOP before, and over the count behind it.
        rig.step();
        assert_eq!(name(rig.step()), name(at(label)));
    }
    // ENDBR64 and its count; PAUSE is stepped.
    let range = RunMode::StepRange { start: at("nop_endbr"), end: at("nop_pause") };
    assert_eq!(rig.run_first(range), StopReason::Step);
    assert_eq!((name(rig.pc(0)), rig.registers(0).r8), (name(at("nop_pause")), 11));
    let after = steps_and_advances(&rig, 0);
    assert_eq!((after.0 - before.0, after.1 - before.1), (0, 22));
    rig.step();
    assert!(steps_and_advances(&rig, 0).0 > before.0);
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(rig.registers(0).r8, 3 * 13);
}

fn l41_a_trap_counts_before_the_debuggers_step() {
    let mut rig = Rig::one("nops");
    let hits = counted(&mut rig, at("nop_3"));
    rig.run_to("nop_1");
    let range = RunMode::StepRange { start: at("nops_round"), end: at("nops_end") };
    assert_eq!(rig.run_first(range), StopReason::Step);
    assert_eq!((name(rig.pc(0)), hits.load(Ordering::Relaxed), rig.registers(0).r8), (name(at("nops_end")), 3, 39));
}

fn l41_a_function_entry_is_crossed_without_a_step_on_every_vcpu() {
    let mut rig = Rig::all(2, "hotcall");
    let hits = ["fx_fentry", "fx_fentry_nop"].map(|label| counted(&mut rig, at(label)));
    assert_eq!(rig.go(), None);
    wait_for("both to count", || (0..2).all(|cpu| rig.field(cpu, cpu_field::FENTRY) > 200).then_some(()));
    rig.interrupt();
    let mut executed = [0; 2];
    for cpu in 0..2 {
        let (calls, pc) = (rig.field(cpu, cpu_field::FENTRY), rig.pc(cpu));
        // In the middle of the function it has come by, and has not counted yet.
        executed[0] += calls + u64::from(pc > at("fx_fentry") && pc <= at("fx_fentry_count"));
        executed[1] += calls + u64::from(pc > at("fx_fentry_nop") && pc <= at("fx_fentry_count"));
        let told = rig.registers(cpu).pc();
        assert_eq!(steps_and_advances(&rig, cpu as usize).0, 0, "at {}", name(told));
    }
    let hits = hits.map(|hits| hits.load(Ordering::Relaxed));
    for (hits, executed) in hits.into_iter().zip(executed) {
        // One that stands on it may have hit it already.
        assert!((executed..=executed + 2).contains(&hits), "{hits} hits, {executed} executions");
    }
    rig.assert_guest_undisturbed();
}

fn l41_what_touches_memory_is_stepped() {
    let mut rig = Rig::one("hotcall");
    let bp = Breakpoint::exec(at("fx_fentry_push"));
    rig.set(bp).unwrap();
    for calls in 0..5 {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        assert_eq!(rig.field(0, cpu_field::FENTRY), calls);
    }
    let (steps, advances) = steps_and_advances(&rig, 0);
    assert_eq!((steps >= 4, advances), (true, 0));
}

/// The guest is owed a #DB after each instruction, and gets it as it would without us.
fn l41_not_under_the_guests_own_trap_flag() {
    let log = |armed: bool| -> Vec<LogEntry> {
        let mut rig = Rig::one("own_tf");
        if armed {
            counted(&mut rig, at("tf1"));
        }
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
        assert_eq!(steps_and_advances(&rig, 0).1, 0);
        rig.log()
    };
    assert_eq!(log(true), log(false));
}

fn l41_not_in_the_shadow_of_sti() {
    let mut rig = Rig::one("step_sti");
    let hits = [at("s_sti_next"), at("s_sti_next2")].map(|addr| counted(&mut rig, addr));
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0));
    assert_eq!(hits.map(|hits| hits.load(Ordering::Relaxed)), [1, 1]);
    let (steps, advances) = steps_and_advances(&rig, 0);
    assert_eq!((steps, advances), (1, 1), "the second is in nobody's shadow");
    rig.assert_guest_undisturbed();
}

fn l41_registers_written_at_the_stop_are_what_it_starts_from() {
    let mut rig = Rig::one("nops");
    let bp = Breakpoint::exec(at("nop_xchg"));
    rig.set(bp).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
    let mut registers = rig.registers(0);
    (registers.rax, registers.r8) = (0xdead_beef_0000_0007, 100);
    rig.coordinator.set_registers(trapline_vmm::debug::VcpuId(0), &registers).unwrap();
    rig.clear(bp).unwrap();
    let next = Breakpoint::exec(at("nop_1"));
    rig.set(next).unwrap();
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(next));
    assert_eq!((rig.registers(0).rax, rig.registers(0).r8), (7, 101));
    assert_eq!(steps_and_advances(&rig, 0), (0, 1));
}

/// A gdb breakpoint and a harness trap at one instruction, another trap at the next one, whose
/// handler looks at the guest's code through the first: no lockup, and each is told once a call.
fn l40_several_at_one_place_and_within_are_each_told_once() {
    let mut rig = Rig::one("hotcall");
    let bp = Breakpoint::exec(at("fx_fentry"));
    let first = counted(&mut rig, bp.addr);
    let second = Arc::new(AtomicU64::new(0));
    let (counter, watched) = (second.clone(), first.clone());
    let handler = Handler::new(move |hit| {
        let mut code = [0; 4];
        assert_eq!((hit.read(bp.addr, &mut code), code), (4, [0xf3, 0x0f, 0x1e, 0xfa]));
        let hits = counter.fetch_add(1, Ordering::Relaxed) + 1;
        assert_eq!(watched.load(Ordering::Relaxed), hits, "out of order");
        Disposition::Continue
    });
    let within = Breakpoint::exec(at("fx_fentry_nop"));
    rig.coordinator.set_trap(Owner::harness(2), within, Some(handler)).unwrap();
    rig.set(bp).unwrap();
    for call in 0..20 {
        assert_eq!(rig.run_first(RunMode::Continue), StopReason::Breakpoint(bp));
        let told = [first.load(Ordering::Relaxed), second.load(Ordering::Relaxed), rig.field(0, cpu_field::FENTRY)];
        assert_eq!(told, [call + 1, call, call]);
    }
    assert_eq!(steps_and_advances(&rig, 0), (0, 38));
}
