//! Made-up kernels: a few tables, a stack, and what must come of them.

mod cfi;
mod hostile;
mod orc;

use std::collections::BTreeMap;
use std::ops::Range;

use trapline_vmm::vcpu::{Registers, Segment};

use super::*;
use crate::symbols::Memory;

/// Memory that is mapped in pieces.
#[derive(Debug, Clone, Default)]
struct Ram(BTreeMap<u64, Vec<u8>>);

impl Ram {
    fn with(mut self, at: u64, bytes: impl Into<Vec<u8>>) -> Self {
        self.0.insert(at, bytes.into());
        self
    }

    fn words(self, at: u64, words: &[u64]) -> Self {
        self.with(at, words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>())
    }

    /// Text of NOPs in which a call ends before each of `returns`.
    fn text(self, range: Range<u64>, returns: &[u64]) -> Self {
        let mut text = vec![0x90; (range.end - range.start) as usize];
        for back in returns {
            text[(back - range.start) as usize - 5] = 0xe8;
        }
        self.with(range.start, text)
    }
}

impl Memory for Ram {
    fn read(&self, addr: u64, into: &mut [u8]) -> usize {
        let Some((start, bytes)) = self.0.range(..=addr).next_back() else { return 0 };
        let there = usize::try_from(addr - start).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
        let got = there.len().min(into.len());
        into[..got].copy_from_slice(&there[..got]);
        got
    }
}

/// What a kernel's image has.
#[derive(Debug, Clone, Default)]
struct Image {
    sections: BTreeMap<&'static str, (u64, Vec<u8>)>,
    /// All of its functions are one.
    function: Range<u64>,
    symbols: BTreeMap<String, u64>,
    /// All that is not the kernel's own is a module's, whose `struct module` is here.
    module: Option<u64>,
    slide: u64,
}

impl Tables for Image {
    fn section(&self, name: &str) -> Option<(u64, &[u8])> {
        self.sections.get(name).map(|(at, bytes)| (*at, bytes.as_slice()))
    }

    fn slide(&self) -> u64 {
        self.slide
    }

    fn function(&self, addr: u64) -> Option<Range<u64>> {
        Some(self.function.clone()).filter(|function| function.contains(&addr))
    }

    fn symbol(&self, name: &str) -> Option<u64> {
        self.symbols.get(name).copied()
    }

    fn module(&self, addr: u64) -> Option<u64> {
        self.module.filter(|_| !(TEXT..TEXT + 0x10_0000).contains(&addr))
    }

    fn member(&self, structure: &str, path: &str) -> Option<u64> {
        let members = ["arch.orc_unwind", "arch.num_orcs", "arch.orc_unwind_ip"];
        let at = members.iter().position(|member| structure == "module" && *member == path)?;
        Some(0x20 + at as u64 * 8)
    }
}

/// A kernel's text, and where its stack is.
const TEXT: u64 = 0xffff_ffff_8100_0000;
const STACK: u64 = 0xffff_c900_0000_1000;

/// A vCPU in ring 0 of 64-bit mode.
fn kernel_at(rip: u64, rsp: u64) -> Registers {
    let cs = Segment { selector: 0x10, attributes: 1 << 13, ..Segment::default() };
    Registers { rip, rsp, cs, efer: 1 << 10, ..Registers::default() }
}

fn pcs(backtrace: &Backtrace) -> Vec<u64> {
    backtrace.frames.iter().map(|frame| frame.pc).collect()
}

/// Where [`interrupted`] was.
struct Saved {
    ip: u64,
    cs: u64,
    sp: u64,
    bp: u64,
}

/// A `struct pt_regs`: 21 words.
fn pt_regs(saved: &Saved) -> Vec<u64> {
    let mut words: Vec<u64> = (0..16).map(|n| 0x1000 + n).collect();
    words[4] = saved.bp;
    words.extend([saved.ip, saved.cs, 0x202, saved.sp, 0x18]);
    words
}

#[test]
fn user_space_is_one_frame() {
    let mut registers = kernel_at(0x40_1000, 0x7fff_0000);
    registers.ss.attributes = 3 << 5;
    let backtrace = unwind(Image::default(), &registers, &Ram::default());
    assert_eq!(backtrace.frames, [Frame { pc: 0x40_1000, sp: 0x7fff_0000, kind: FrameKind::User }]);
    assert_eq!(backtrace.end, End::User);
}

#[test]
fn outside_of_64_bit_mode_there_is_one_frame() {
    let mut real = Registers { rip: 0x10, rsp: 0x100, ..Registers::default() };
    real.cs.base = 0xf0000;
    let backtrace = unwind(Image::default(), &real, &Ram::default().with(0, vec![0xe8; 0x10_0000]));
    assert_eq!(pcs(&backtrace), [0xf0010]);
    assert!(matches!(backtrace.end, End::Lost(_)));
}

/// A chain of frame pointers that ends with zero.
fn chained() -> Ram {
    Ram::default()
        .text(TEXT..TEXT + 0x1000, &[TEXT + 0x105, TEXT + 0x205])
        .words(STACK + 0x10, &[STACK + 0x30, TEXT + 0x105])
        .words(STACK + 0x30, &[0, TEXT + 0x205])
}

#[test]
fn frame_pointers_lead_to_the_first_function() {
    let mut registers = kernel_at(TEXT + 0x50, STACK);
    registers.rbp = STACK + 0x10;
    let backtrace = unwind(Image::default(), &registers, &chained());
    let expected = [
        Frame { pc: TEXT + 0x50, sp: STACK, kind: FrameKind::Exact },
        Frame { pc: TEXT + 0x105, sp: STACK + 0x20, kind: FrameKind::Call },
        Frame { pc: TEXT + 0x205, sp: STACK + 0x40, kind: FrameKind::Call },
    ];
    assert_eq!((backtrace.frames.as_slice(), backtrace.end), (&expected[..], End::Complete));
    assert_eq!(backtrace.frames[1].lookup(), TEXT + 0x104);
}

/// Prologue and epilogue, instruction by instruction: `(offset of pc, bytes of the return address above RSP)`.
#[test]
fn a_frame_that_is_half_built_is_found() {
    let code = [
        0xf3, 0x0f, 0x1e, 0xfa, // 0: endbr64
        0x0f, 0x1f, 0x44, 0x00, 0x00, // 4: nopl, for the function tracer
        0x55, // 9: push %rbp
        0x48, 0x89, 0xe5, // 10: mov %rsp, %rbp
        0x90, // 13
        0x5d, // 14: pop %rbp
        0xc3, // 15: ret
        0x5d, // 16: pop %rbp
        0xe9, 0, 0x10, 0, 0, // 17: jmp to another function
        0xe9, 0, 0, 0, 0, // 22: jmp within this one
        0x90,
    ];
    let function = TEXT + 0x800;
    let image = Image { function: function..function + code.len() as u64, ..Image::default() };
    let caller_rbp = STACK + 0x100;
    let cases = [(0, 0), (4, 0), (9, 0), (10, 8), (14, 8), (15, 0), (16, 8), (17, 0)];
    for (at, above) in cases {
        let frame = if above == 8 { vec![caller_rbp, TEXT + 0x105] } else { vec![TEXT + 0x105] };
        let memory = Ram::default()
            .text(TEXT..TEXT + 0x800, &[TEXT + 0x105, TEXT + 0x205])
            .with(function, code)
            .words(STACK, &frame)
            .words(caller_rbp, &[0, TEXT + 0x205]);
        let mut registers = kernel_at(function + at, STACK);
        // Right before `pop` RBP is still the function's own, and as good.
        registers.rbp = if above == 8 && at != 10 { STACK } else { caller_rbp };
        let backtrace = unwind(&image, &registers, &memory);
        assert_eq!(pcs(&backtrace), [function + at, TEXT + 0x105, TEXT + 0x205], "at {at}");
        assert_eq!(backtrace.frames[1].sp, STACK + above + 8, "at {at}");
    }
    // In its body RBP is right, whatever is on top of the stack.
    for at in [13, 22, 27] {
        let memory = Ram::default()
            .text(TEXT..TEXT + 0x800, &[TEXT + 0x105, TEXT + 0x205])
            .with(function, code)
            .words(STACK, &[TEXT + 0x205, TEXT + 0x205, 0, TEXT + 0x105]);
        let mut registers = kernel_at(function + at, STACK);
        registers.rbp = STACK + 16;
        assert_eq!(pcs(&unwind(&image, &registers, &memory)), [function + at, TEXT + 0x105], "at {at}");
    }
}

#[test]
fn frame_pointers_lead_through_an_interrupt_and_out_of_a_kernel_thread() {
    let regs = STACK + 0x100;
    let top = STACK + 0x800;
    let memory = chained()
        .words(STACK + 0x400, &[regs | 1, TEXT + 0x105])
        .words(regs, &pt_regs(&Saved { ip: TEXT + 0x300, cs: 0x10, sp: STACK + 0x600, bp: STACK + 0x620 }))
        .words(STACK + 0x620, &[top | 1, TEXT + 0x205])
        .words(top, &[0; 21]);
    let mut registers = kernel_at(TEXT + 0x50, STACK + 0x3f0);
    registers.rbp = STACK + 0x400;
    let backtrace = unwind(Image::default(), &registers, &memory);
    assert_eq!(pcs(&backtrace), [TEXT + 0x50, TEXT + 0x105, TEXT + 0x300, TEXT + 0x205]);
    assert_eq!(backtrace.frames[2], Frame { pc: TEXT + 0x300, sp: STACK + 0x600, kind: FrameKind::Exact });
    assert_eq!(backtrace.end, End::Complete);
}

#[test]
fn a_call_through_null_is_followed_back() {
    let memory = chained().words(STACK, &[TEXT + 0x105]);
    let mut registers = kernel_at(0, STACK);
    registers.rbp = STACK + 0x30;
    let backtrace = unwind(Image::default(), &registers, &memory);
    assert_eq!(pcs(&backtrace), [0, TEXT + 0x105, TEXT + 0x205]);
    assert_eq!(backtrace.end, End::Complete);
}

#[test]
fn calls_are_told_from_other_instructions() {
    let calls: [&[u8]; 9] = [
        &[0xe8, 1, 2, 3, 4],
        &[0xff, 0xd0],                         // call *%rax
        &[0x41, 0xff, 0xd3],                   // call *%r11
        &[0xff, 0x10],                         // call *(%rax)
        &[0xff, 0x50, 8],                      // call *8(%rax)
        &[0xff, 0x54, 0x24, 8],                // call *8(%rsp)
        &[0xff, 0x15, 1, 2, 3, 4],             // call *x(%rip)
        &[0xff, 0x14, 0xc5, 1, 2, 3, 4],       // call *x(,%rax,8)
        &[0x2e, 0xff, 0x94, 0xc3, 1, 2, 3, 4], // cs call *x(%rbx,%rax,8)
    ];
    for call in calls {
        let memory = Ram::default().with(0x1000, [&[0x90; 8], call].concat());
        let pc = 0x1008 + call.len() as u64;
        assert!(code::is_behind_call(&memory, pc), "{call:02x?}");
        // It may stand at the very beginning of what is mapped.
        assert!(code::is_behind_call(&Ram::default().with(0x1000, call), 0x1000 + call.len() as u64), "{call:02x?}");
        assert!(!code::is_behind_call(&memory, pc + 1) || call.len() == 8, "{call:02x?}");
    }
    let others: [&[u8]; 4] = [&[0xff, 0xe0], &[0xff, 0xc0], &[0xff, 0x70, 8], &[0x90; 8]];
    for other in others {
        let memory = Ram::default().with(0x1000, [&[0x90; 8], other].concat());
        assert!(!code::is_behind_call(&memory, 0x1008 + other.len() as u64), "{other:02x?}");
    }
    assert!(!code::is_behind_call(&Ram::default(), 0));
}

#[test]
fn a_retpoline_half_way_is_left_by_its_callers_address() {
    let thunks = TEXT + 0x5000..TEXT + 0x5400;
    let caller = TEXT + 0x1234;
    let image = Image {
        function: thunks.clone(),
        symbols: BTreeMap::from([("__x86_indirect_thunk_array".to_owned(), thunks.start)]),
        ..Image::default()
    };
    let inside = thunks.start + 5;
    let ram = Ram::default().text(TEXT..TEXT + 0x8000, &[caller, inside]);
    // Behind the thunk's own call, and before it.
    for (pc, stack) in [(inside + 1, vec![inside, caller, 0, 0]), (thunks.start, vec![caller, 0, 0])] {
        let memory = ram.clone().words(STACK, &stack);
        let found = unwind(&image, &kernel_at(pc, STACK), &memory);
        assert_eq!(pcs(&found)[..2], [pc, caller], "{found:?}");
        assert_eq!(found.frames[1].sp, STACK + 8 * (stack.len() as u64 - 2));
    }
}
