//! What objtool found out about the kernel's code beside what the compiler said of it.

use std::collections::BTreeMap;
use std::ops::Range;

use trapline_harness::symbols::{Memory, Sources, Symbols};
use trapline_harness::unwind::{Backtrace, Tables, Unwinder};
use trapline_vmm::vcpu::{Registers, Segment};

use crate::guests::debian;

/// One of `.orc_unwind` and `.debug_frame`, without the other.
struct Only<'a>(&'a Symbols, &'static [&'static str]);

/// The kernel's image as the guest has it, without a file.
struct Guest<'a>(&'a Symbols);

impl Tables for Guest<'_> {
    fn section(&self, _name: &str) -> Option<(u64, &[u8])> {
        None
    }

    fn slide(&self) -> u64 {
        0
    }

    fn function(&self, _addr: u64) -> Option<Range<u64>> {
        None
    }

    fn symbol(&self, name: &str) -> Option<u64> {
        self.0.address(name)
    }

    fn module(&self, _addr: u64) -> Option<u64> {
        None
    }

    fn member(&self, _structure: &str, _path: &str) -> Option<u64> {
        None
    }
}

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

/// The kernel's image, and around it memory in which every word is a return address.
struct Full<'a>(u64, &'a Symbols);

impl Memory for Full<'_> {
    fn read(&self, addr: u64, into: &mut [u8]) -> usize {
        if let Some(image) = self.1.linked_bytes(addr).and_then(|image| image.get(..into.len())) {
            into.copy_from_slice(image);
            return into.len();
        }
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
    let in_guest = Unwinder::new(Guest(&symbols));
    let memory = Full(text, &symbols);
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
        assert_eq!(callers.0, caller(in_guest.unwind(&registers, &memory)), "{pc:#x} by ORC in a file and in memory");
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
    for member in ["arch.orc_unwind_ip", "arch.orc_unwind", "arch.num_orcs"] {
        assert!(symbols.member("module", member).is_some(), "where modules have {member} is not known");
    }
    // Inline assembly that pushes or switches stacks, and functions that align theirs.
    assert!(same > 10_000 && differ.len() * 1000 < same, "{} of {same} differ", differ.len());
}
