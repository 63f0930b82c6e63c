//! IRETQ and SYSRET from ring 0 into 64-bit ring 3, carried out without an entry.
//!
//! For KVM flavours that run ring 3 natively and do not step there: they lose the step at this
//! instruction and stop at the next entry of the kernel. Whatever would make it fault (SDM vol. 2,
//! IRET, SYSRET) is left to KVM: the fault then leads to its handler, and the step ends there.

use std::io;

use super::super::{Cpu, Registers, Segment};

const RFLAGS_ALWAYS: u64 = 1 << 1;
const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_NT: u64 = 1 << 14;
/// What IRETQ in ring 0 loads: all flags but VM, VIF and VIP, which it must find clear here.
const RFLAGS_LOADED: u64 = 0x0025_7fd5;
/// What SYSRET loads: it clears RF, and VM.
const SYSRET_LOADED: u64 = 0x003c_7fd7;
/// Descriptor bits 8 to 23 of the second word, as [`Segment::attributes`] has them.
const PRESENT: u32 = 1 << 7;
const CODE_OR_DATA: u32 = 1 << 4;
const TYPE_CODE: u32 = 1 << 3;
const TYPE_CONFORMING: u32 = 1 << 2;
const TYPE_WRITABLE: u32 = 1 << 1;
const LONG: u32 = 1 << 13;
const BIG: u32 = 1 << 14;
const PAGES: u32 = 1 << 15;
const UNUSABLE: u32 = 1 << 16;

/// Where IRETQ leads.
struct Frame {
    rip: u64,
    cs: u16,
    rflags: u64,
    rsp: u64,
    ss: u16,
}

/// The instruction that leads there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Return {
    Iret,
    /// SYSRET with REX.W.
    Sysret,
}

/// Whether the IRETQ at RIP leads into ring 3.
pub(super) fn leads_to_ring_3<C: Cpu>(cpu: &mut C, registers: &Registers) -> bool {
    frame(cpu, registers).is_some_and(|frame| frame.cs & 3 == 3)
}

impl Return {
    /// Carries out the instruction at RIP; whether that was done. If not, nothing has changed.
    ///
    /// TF is left clear: what it loads of it is the step's business.
    pub(crate) fn carry_out<C: Cpu>(self, cpu: &mut C) -> io::Result<bool> {
        let before = cpu.registers()?;
        let after = match self {
            Return::Iret => frame(cpu, &before).and_then(|frame| returned(cpu, &before, &frame)),
            Return::Sysret => sysret(&before),
        };
        let Some(after) = after else { return Ok(false) };
        cpu.set_registers(&after)?;
        if self == Return::Iret {
            // It ends an NMI handler, whether it ran in one or not.
            cpu.unmask_nmi()?;
        }
        Ok(true)
    }
}

/// The registers behind SYSRET, which loads no descriptors.
fn sysret(before: &Registers) -> Option<Registers> {
    const SYSCALL_ENABLE: u64 = 1;
    if before.efer & SYSCALL_ENABLE == 0 || !is_canonical(before.rcx) {
        return None;
    }
    let selector = (before.star >> 48) as u16;
    let flat = |offset: u16, attributes| Segment {
        selector: selector.wrapping_add(offset) | 3,
        base: 0,
        limit: u32::MAX,
        attributes,
    };
    let user = PRESENT | CODE_OR_DATA | 3 << 5 | PAGES | 1;
    let mut after = *before;
    after.cs = flat(16, user | TYPE_CODE | TYPE_WRITABLE | LONG);
    after.ss = flat(8, user | TYPE_WRITABLE | BIG);
    after.rip = before.rcx;
    after.rflags = before.r11 & SYSRET_LOADED & !RFLAGS_TF | RFLAGS_ALWAYS;
    Some(after)
}

/// Canonical with 48 bits, and so with 57 too.
pub(super) fn is_canonical(addr: u64) -> bool {
    (addr << 16).cast_signed() >> 16 == addr.cast_signed()
}

fn frame<C: Cpu>(cpu: &mut C, registers: &Registers) -> Option<Frame> {
    let mut bytes = [0; 40];
    if cpu.read(registers.rsp, &mut bytes) != bytes.len() {
        return None;
    }
    let word = |n: usize| u64::from_le_bytes(bytes[8 * n..8 * n + 8].try_into().unwrap_or_default());
    Some(Frame { rip: word(0), cs: word(1) as u16, rflags: word(2), rsp: word(3), ss: word(4) as u16 })
}

/// The registers behind it; `None` if it might fault.
fn returned<C: Cpu>(cpu: &mut C, before: &Registers, frame: &Frame) -> Option<Registers> {
    let cs = user_segment(cpu, before, frame.cs)?;
    let ss = user_segment(cpu, before, frame.ss)?;
    let is_code_64 = cs.attributes & (TYPE_CODE | TYPE_CONFORMING | LONG | BIG) == TYPE_CODE | LONG;
    let is_stack = ss.attributes & (TYPE_CODE | TYPE_WRITABLE) == TYPE_WRITABLE;
    let flags_fit = frame.rflags & !(RFLAGS_LOADED | RFLAGS_ALWAYS) == 0 && before.rflags & RFLAGS_NT == 0;
    if !(is_code_64 && is_stack && is_canonical(frame.rip) && flags_fit) {
        return None;
    }
    let mut after = *before;
    (after.rip, after.rsp, after.cs, after.ss) = (frame.rip, frame.rsp, cs, ss);
    after.rflags = frame.rflags & RFLAGS_LOADED & !RFLAGS_TF | RFLAGS_ALWAYS;
    for segment in [&mut after.ds, &mut after.es, &mut after.fs, &mut after.gs] {
        drop_if_ring_0s(segment);
    }
    Some(after)
}

/// A segment that ring 3 may not use is not left to it. Its base stays, which FS and GS are used by.
fn drop_if_ring_0s(segment: &mut Segment) {
    let conforming = TYPE_CODE | TYPE_CONFORMING;
    if segment.attributes & UNUSABLE == 0 && dpl(segment) < 3 && segment.attributes & conforming != conforming {
        *segment = Segment { base: segment.base, attributes: UNUSABLE, ..Segment::default() };
    }
}

fn dpl(segment: &Segment) -> u32 {
    segment.attributes >> 5 & 3
}

/// The segment of ring 3 that `selector` names in the GDT.
fn user_segment<C: Cpu>(cpu: &mut C, registers: &Registers, selector: u16) -> Option<Segment> {
    const LOCAL: u16 = 1 << 2;
    let offset = selector & !7;
    if selector & 3 != 3 || selector & LOCAL != 0 || offset == 0 || offset + 7 > registers.gdtr.limit {
        return None;
    }
    let mut bytes = [0; 8];
    if cpu.read(registers.gdtr.base.wrapping_add(offset.into()), &mut bytes) != bytes.len() {
        return None;
    }
    let descriptor = u64::from_le_bytes(bytes);
    let attributes = (descriptor >> 40) as u32 & 0xf0ff;
    let limit = (descriptor & 0xffff) as u32 | (descriptor >> 32) as u32 & 0xf_0000;
    let limit = if attributes & PAGES != 0 { limit << 12 | 0xfff } else { limit };
    let base = descriptor >> 16 & 0xff_ffff | descriptor >> 56 << 24;
    let segment = Segment { selector, base, limit, attributes: attributes | 1 };
    (attributes & PRESENT != 0 && attributes & CODE_OR_DATA != 0 && dpl(&segment) == 3).then_some(segment)
}
