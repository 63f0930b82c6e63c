//! Our backtrace beside gdb's.
//!
//! gdb unwinds by call frame information. It is no reference for the frame behind
//!
//! - a function that has none, as most of the kernel's assembly: gdb guesses;
//! - a function that has switched stacks by inline assembly, of which its call frame information does not know.
//!
//! The comparison goes on there all the same: gdb is shown the registers that our unwinder says the next frame has, and
//! asked anew. Two things are no difference: gdb also lists functions that have left by a jump to the next one, which it
//! concludes from call sites (they have no frame any more, and gdb marks them as tail calls); and within a function of
//! assembly our names are of the nearest label, as in the kernel's own backtraces, and gdb's of the function.

use std::cell::Cell;
use std::collections::BTreeMap;

use gimli::{BaseAddresses, CieOrFde, DebugFrame, LittleEndian, UnwindSection};
use trapline_harness::symbols::{Memory, Symbol, Symbols};
use trapline_harness::unwind::{Backtrace, End, Frame, FrameKind, Unwinder, records};
use trapline_vmm::Vm;
use trapline_vmm::debug::VcpuId;
use trapline_vmm::paging::Paging;
use trapline_vmm::vcpu::Registers;

use crate::gdb::{Bench, GdbFrame, GdbStack};

/// More than any frame of Linux has, whose stacks are 16 KiB.
const LARGEST_FRAME: u64 = 0x4000;

/// What a thread returns to that has not run before.
const BEGINS_THREADS: [&str; 2] = ["ret_from_fork_asm", "ret_from_fork"];

/// Memory as a vCPU with these registers sees it.
pub(crate) struct Seen<'a> {
    vm: &'a Vm,
    paging: Paging,
    pub(crate) reads: Cell<u64>,
}

impl<'a> Seen<'a> {
    pub(crate) fn by(registers: &Registers, vm: &'a Vm) -> Self {
        Seen { vm, paging: registers.into(), reads: Cell::new(0) }
    }
}

impl Memory for Seen<'_> {
    fn read(&self, addr: u64, into: &mut [u8]) -> usize {
        self.reads.set(self.reads.get() + 1);
        self.paging.read(self.vm.ram().mem(), addr, into)
    }
}

/// A kernel's symbols and tables, and what was compared with them.
pub(crate) struct Comparison {
    symbols: Symbols,
    unwinder: Unwinder,
    /// Functions that gdb has call frame information of, sorted.
    described: Vec<(u64, u64)>,
    pub(crate) tally: Tally,
}

/// What was compared.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Backtraces, one for each vCPU at each stop.
    backtraces: usize,
    /// Frames of both that were equal.
    frames: usize,
    /// Functions, inlined ones included, that were equal.
    functions: usize,
    /// Of these, how many had the same source line. (gdb leaves rows of the line table out that are no statements.)
    lines: usize,
    /// Functions without a frame that gdb has added.
    tail_calls: usize,
    /// How often gdb was asked anew behind a function that it cannot unwind.
    resumed: usize,
    /// How the backtraces ended.
    ends: BTreeMap<String, usize>,
    /// Frames of a backtrace.
    deepest: usize,
    /// How they differed.
    differences: Vec<String>,
}

impl Comparison {
    pub(crate) fn new(symbols: Symbols) -> Self {
        let unwinder = Unwinder::new(symbols.clone());
        let described = described(&symbols);
        Comparison { symbols, unwinder, described, tally: Tally::default() }
    }

    /// Compares the backtraces of all vCPUs.
    pub(crate) fn all(&mut self, bench: &mut Bench) {
        for vcpu in (0..bench.vm.vcpus() as u32).map(VcpuId) {
            self.one(bench, vcpu);
        }
    }

    fn one(&mut self, bench: &mut Bench, vcpu: VcpuId) {
        let registers = bench.vm.registers(vcpu).unwrap();
        let (backtrace, pointers) = {
            let memory = Seen::by(&registers, &bench.vm);
            (self.unwinder.unwind(&registers, &memory), self.unwinder.frame_pointers(&registers, &memory))
        };
        self.tally.backtraces += 1;
        self.tally.deepest = self.tally.deepest.max(backtrace.frames.len());
        *self.tally.ends.entry(format!("{:?}", backtrace.end)).or_default() += 1;
        let compared = self.compare(bench, vcpu, &registers, &backtrace, &pointers);
        bench.vm.set_registers(vcpu, &registers).unwrap();
        let lost = match backtrace.end {
            End::Complete | End::User => None,
            End::Lost(why) => Some(why.to_owned()),
            End::TooDeep => Some("too deep".to_owned()),
        };
        for difference in compared.err().into_iter().chain(lost) {
            let text = format!("{vcpu}: {difference}\n{}", self.show(&backtrace));
            println!("{text}");
            self.tally.differences.push(text);
        }
    }

    /// Frame by frame; what differs is said.
    fn compare(
        &mut self,
        bench: &mut Bench,
        vcpu: VcpuId,
        registers: &Registers,
        backtrace: &Backtrace,
        pointers: &[Option<u64>],
    ) -> Result<(), String> {
        let mut at = 0;
        let mut now = *registers;
        while at < backtrace.frames.len() {
            let frame = backtrace.frames[at];
            if at > 0 {
                if frame.kind == FrameKind::User {
                    // gdb knows nothing of what user space was doing.
                    return Ok(());
                }
                let names = self.names(&backtrace.frames[at - 1]);
                now.rbp = pointers[at].unwrap_or(now.rbp);
                now = match self.is_thread_that_has_not_begun(&frame) {
                    true => Registers { rip: frame.pc, rsp: frame.sp, ..now },
                    false => registers_of(&frame, &now, names.last().map(String::as_str), bench)?,
                };
                bench.vm.set_registers(vcpu, &now).unwrap();
                self.tally.resumed += 1;
            }
            let left = &backtrace.frames[at..];
            let theirs = bench.stack(vcpu, left.len() + 1);
            at += self.compare_until_guess(left, backtrace.end, &theirs, at > 0)?;
        }
        Ok(())
    }

    /// How many frames gdb knows about and were equal. `is_shown`: gdb was shown the lookup address of the first.
    fn compare_until_guess(
        &mut self,
        ours: &[Frame],
        end: End,
        theirs: &GdbStack,
        is_shown: bool,
    ) -> Result<usize, String> {
        // Each frame with what is inlined into it, which gdb lists before it.
        let groups = theirs.frames.split_inclusive(|frame| frame.kind != "inline");
        let (left, on_stack): (Vec<_>, Vec<_>) =
            groups.partition(|group| group.last().is_some_and(|frame| frame.kind == "tailcall"));
        self.tally.tail_calls += left.len();
        let on_stack = on_stack.concat();
        let mut rest = on_stack.as_slice();
        for (n, frame) in ours.iter().enumerate() {
            // For gdb it is a return address, of a call in the function before.
            if n > 0 && self.is_thread_that_has_not_begun(frame) {
                return Ok(n);
            }
            let whole = rest.iter().position(|frame| frame.kind != "inline").ok_or_else(|| {
                format!(
                    "gdb ends before frame {n}: {}; it says {}",
                    said(theirs),
                    theirs.ended.as_deref().unwrap_or("?")
                )
            })?;
            let (same, behind) = rest.split_at(whole + 1);
            rest = behind;
            let pc = if is_shown && n == 0 { frame.lookup() } else { frame.pc };
            if same[whole].pc != pc {
                return Err(format!("frame {n} is at {pc:#x}, gdb's at {:#x}: {}", same[whole].pc, said(theirs)));
            }
            if frame.kind == FrameKind::User {
                self.tally.frames += 1;
                return Ok(n + 1);
            }
            self.compare_functions(frame, same).map_err(|what| format!("frame {n}: {what}: {}", said(theirs)))?;
            self.tally.frames += 1;
            let switches_stacks = ours.get(n + 1).is_some_and(|next| next.sp.wrapping_sub(frame.sp) > LARGEST_FRAME);
            if !self.is_described(frame.lookup()) || switches_stacks {
                return Ok(n + 1);
            }
        }
        match rest.first() {
            Some(more) if end == End::Complete => Err(format!("gdb goes on with {:?}: {}", more.name, said(theirs))),
            _ => Ok(ours.len()),
        }
    }

    fn compare_functions(&mut self, frame: &Frame, theirs: &[GdbFrame]) -> Result<(), String> {
        let backtrace = Backtrace { frames: vec![*frame], end: End::Complete };
        let ours = records(&self.symbols, &backtrace);
        let names: Vec<&str> = ours.iter().map(|record| record.function.as_str()).collect();
        let gdbs: Vec<&str> = theirs.iter().map(|frame| frame.name.as_deref().unwrap_or("??")).collect();
        if names.len() != gdbs.len() || !names.iter().zip(&gdbs).all(|(ours, gdbs)| self.is_same(ours, gdbs, frame)) {
            return Err(format!("{:#x} is {names:?}, by gdb {gdbs:?}", frame.pc));
        }
        self.tally.functions += ours.len();
        for (ours, theirs) in ours.iter().zip(theirs) {
            let line = ours.source.as_ref().map(|source| source.line);
            self.tally.lines += usize::from(line.unwrap_or(0) == theirs.line);
        }
        Ok(())
    }

    /// Whether both names are of what `frame` is in: they are the same, or ours is of a label in gdb's function.
    fn is_same(&self, ours: &str, gdbs: &str, frame: &Frame) -> bool {
        let addr = frame.lookup();
        let spans = |symbol: &Symbol| (symbol.address..symbol.address + symbol.size).contains(&addr);
        ours == gdbs || !self.is_described(addr) && self.symbols.find(gdbs).iter().any(spans)
    }

    fn is_thread_that_has_not_begun(&self, frame: &Frame) -> bool {
        BEGINS_THREADS.iter().any(|name| self.symbols.address(name) == Some(frame.pc))
    }

    /// The function that a frame is in, behind those that are inlined there.
    fn names(&self, frame: &Frame) -> Vec<String> {
        let one = Backtrace { frames: vec![*frame], end: End::Complete };
        records(&self.symbols, &one).into_iter().map(|record| record.function).collect()
    }

    fn is_described(&self, addr: u64) -> bool {
        let behind = self.described.partition_point(|(start, _)| *start <= addr);
        behind > 0 && addr < self.described[behind - 1].1
    }

    fn show(&self, backtrace: &Backtrace) -> String {
        let mut text = String::new();
        for frame in &backtrace.frames {
            let names = self.names(frame);
            let cfi = if self.is_described(frame.lookup()) { "" } else { " (gdb knows nothing)" };
            text += &format!("    {:#x} sp {:#x} {:?} {}{cfi}\n", frame.pc, frame.sp, frame.kind, names.join(" < "));
        }
        text + &format!("    {:?}", backtrace.end)
    }
}

impl Tally {
    /// One line for the log.
    pub(crate) fn print(&self) {
        println!(
            "  {} backtraces, up to {} frames deep: {} frames with {} functions equal gdb's, {} of them with the same \
             line; gdb asked anew {} times, and left {} tail calls aside; ends: {:?}",
            self.backtraces,
            self.deepest,
            self.frames,
            self.functions,
            self.lines,
            self.resumed,
            self.tail_calls,
            self.ends
        );
    }

    /// Nothing differed, and enough was compared: so many frames, so many times behind a function that gdb cannot unwind.
    pub(crate) fn assert_equal(&self, frames: usize, resumed: usize) {
        assert!(self.differences.is_empty(), "{} backtraces differ", self.differences.len());
        assert!(self.frames >= frames && self.resumed >= resumed, "too little was compared");
        assert!(self.lines * 20 >= self.functions * 19, "more than one line in twenty is another than gdb's");
    }
}

/// The registers that a vCPU would have, had it got back to `frame` from `function`; they were `inner` further in.
fn registers_of(frame: &Frame, inner: &Registers, function: Option<&str>, bench: &Bench) -> Result<Registers, String> {
    let mut registers = Registers { rip: frame.lookup(), rsp: frame.sp, ..*inner };
    if frame.kind == FrameKind::Exact {
        // An interrupt without a stack of its own: the processor has aligned the stack pointer to 16 bytes, pushed five
        // words, and entry code the other sixteen of a `struct pt_regs`.
        let saved = (frame.sp & !15).wrapping_sub(21 * 8);
        // Entry code that has not got round to pushing them all has not changed any either.
        if (saved + 1..=saved + 16 * 8).contains(&inner.rsp) {
            return Ok(registers);
        }
        let mut bytes = [0; 21 * 8];
        let got = Seen::by(inner, &bench.vm).read(saved, &mut bytes);
        let words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        if got < bytes.len() || words[16] != frame.pc || words[19] != frame.sp {
            return Err(format!("no saved registers at {saved:#x} lead to {:#x}", frame.pc));
        }
        let general: [u64; 15] = words[..15].try_into().unwrap();
        [
            registers.r15,
            registers.r14,
            registers.r13,
            registers.r12,
            registers.rbp,
            registers.rbx,
            registers.r11,
            registers.r10,
            registers.r9,
            registers.r8,
            registers.rax,
            registers.rcx,
            registers.rdx,
            registers.rsi,
            registers.rdi,
        ] = general;
    }
    // What __switch_to_asm() has on the stack that it leaves or has come to, and what of that it has still to pop.
    let switches = frame.kind == FrameKind::Call && function == Some("__switch_to_asm");
    let pushed = frame.sp.wrapping_sub(7 * 8);
    let registers_pushed = [
        &mut registers.r15,
        &mut registers.r14,
        &mut registers.r13,
        &mut registers.r12,
        &mut registers.rbx,
        &mut registers.rbp,
    ];
    for (addr, register) in
        (pushed..).step_by(8).zip(registers_pushed).filter(|(addr, _)| switches && *addr >= inner.rsp)
    {
        let mut word = [0; 8];
        if Seen::by(inner, &bench.vm).read(addr, &mut word) < word.len() {
            return Err(format!("no registers at {addr:#x} lead to {:#x}", frame.pc));
        }
        *register = u64::from_le_bytes(word);
    }
    Ok(registers)
}

/// gdb's stack in a line.
fn said(stack: &GdbStack) -> String {
    let frames = stack.frames.iter().map(|frame| {
        let name = frame.name.as_deref().unwrap_or("??");
        format!(
            "{:#x} {name}{}",
            frame.pc,
            if frame.kind == "normal" { "".into() } else { format!(" ({})", frame.kind) }
        )
    });
    frames.collect::<Vec<_>>().join(", ")
}

/// The functions in `.debug_frame`.
fn described(symbols: &Symbols) -> Vec<(u64, u64)> {
    let Some((_, bytes)) = symbols.section(".debug_frame") else { return Vec::new() };
    let section = DebugFrame::new(bytes, LittleEndian);
    let bases = BaseAddresses::default();
    let mut entries = section.entries(&bases);
    let mut described = Vec::new();
    while let Some(entry) = entries.next().unwrap() {
        if let CieOrFde::Fde(partial) = entry {
            let function = partial.parse(DebugFrame::cie_from_offset).unwrap();
            let slide = symbols.slide();
            described
                .push((function.initial_address().wrapping_add(slide), function.end_address().wrapping_add(slide)));
        }
    }
    described.sort_unstable();
    described
}
