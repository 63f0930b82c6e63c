//! What objtool found out about the kernel's code beside what the compiler said of it.

use std::collections::BTreeMap;
use std::ops::Range;

use trapline_harness::symbols::{Memory, Sources, Symbols};
use trapline_harness::unwind::{Backtrace, Tables, Unwinder};
use trapline_vmm::vcpu::{Registers, Segment};

use crate::guests::debian;

/// One of `.orc_unwind` and `.debug_frame`, without the other.
struct Only<'a>(&'a Symbols, &'static [&'static str]);

const ORC: &[&str] = &[".orc_unwind", ".orc_unwind_ip"];
const CALL_FRAMES: &[&str] = &[".debug_frame"];

impl Tables for Only<'_> {
    fn section(&self, name: &str) -> Option<(u64, &[u8])> {
        self.0.section(name).filter(|_| self.1.contains(&name))
    }

    fn slide(&self) -> u64 {
        0
    }

    fn function(&self, _addr: u64) -> Option<Range<u64>> {
        None
    }

    fn symbol(&self, _name: &str) -> Option<u64> {
        None
    }

    fn module(&self, _addr: u64) -> Option<u64> {
        None
    }

    fn member(&self, _structure: &str, _path: &str) -> Option<u64> {
        None
    }
}

/// Where the registers that frames are found by point to, far from each other.
const STACK: u64 = 0xffff_c900_0000_0000;
const APART: u64 = 0x10_0000;

/// Memory in which every word is a return address.
struct Full(u64);

impl Memory for Full {
    fn read(&self, _addr: u64, into: &mut [u8]) -> usize {
        for (at, byte) in into.iter_mut().enumerate() {
            *byte = self.0.to_le_bytes()[at % 8];
        }
        into.len()
    }
}

/// So many bytes are between the places that are compared: an odd number, to meet instructions at any offset.
const EVERY: usize = 211;

pub(crate) fn all_over_the_kernel() {
    let vmlinux = debian().join("vmlinux");
    let symbols = Symbols::open(&Sources { kernel: Some(&vmlinux), ..Sources::default() }).unwrap();
    let (text, code) = symbols.section(".text").unwrap();
    let (orc, call_frames) = (Unwinder::new(Only(&symbols, ORC)), Unwinder::new(Only(&symbols, CALL_FRAMES)));
    let memory = Full(text);
    let cs = Segment { selector: 0x10, attributes: 1 << 13, ..Segment::default() };
    let registers = Registers {
        rsp: STACK,
        rbp: STACK + APART,
        r10: STACK + 2 * APART,
        r13: STACK + 3 * APART,
        rdi: STACK + 4 * APART,
        rdx: STACK + 5 * APART,
        cs,
        efer: 1 << 10,
        ..Registers::default()
    };
    let (mut same, mut differ) = (0_usize, BTreeMap::new());
    for pc in (text..text + code.len() as u64).step_by(EVERY) {
        let registers = Registers { rip: pc, ..registers };
        let caller = |backtrace: Backtrace| backtrace.frames.get(1).copied();
        let callers = (caller(orc.unwind(&registers, &memory)), caller(call_frames.unwind(&registers, &memory)));
        // What one of them does not describe is not compared: assembly, padding.
        let (Some(by_orc), Some(by_call_frames)) = callers else { continue };
        if by_orc == by_call_frames {
            same += 1;
        } else {
            let at = symbols.locate(pc).map(|found| format!("{}+{:#x}", found.symbol, found.offset));
            differ.insert(at, [by_orc, by_call_frames].map(|frame| frame.sp.wrapping_sub(STACK)));
        }
    }
    println!(
        "  {same} places of the kernel's text have the same caller by both, {} have not: {differ:x?}",
        differ.len()
    );
    // Inline assembly that pushes or switches stacks, and functions that align theirs.
    assert!(same > 10_000 && differ.len() * 1000 < same, "{} of {same} differ", differ.len());
}
