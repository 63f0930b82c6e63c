//! The list of registers.
//!
//! Numbers 0-58 are gdb's own (i386.core, i386.sse, i386.segments); the rest is ours, with
//! QEMU's names where QEMU has the register. What may be written:
//!
//! * everything below `rip`, the x87 and SSE state, `fs_base`, `gs_base`, `k_gs_base`, the
//!   control registers, the guest's debug registers, GDTR, IDTR and the SYSCALL MSRs: yes, where
//!   the value can exist in the register. What only the processor can judge (say, CR4 bits that
//!   this CPU lacks) is judged by KVM, and its refusal is passed on.
//! * `eflags`: the bits that POPF has, and VM; bit 1 is always set.
//! * segment selectors: in real and virtual-8086 mode, where the base follows. In protected mode
//!   a selector means nothing without its descriptor, so there they are read-only.
//! * `ftag`: only empty or not empty is stored by the processor; the rest is computed.
//! * TR, LDTR, the APIC base: no.
//!
//! Writing the value that a register has is always accepted: clients save and restore in bulk.

use trapline_vmm::vcpu::{Registers, Segment};

/// Why a value was not written: a piece of a sentence that begins with the register's name.
pub(crate) type Refused = String;

/// Who knows a register: each is a `<feature>` of target.xml.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Feature {
    Core,
    Sse,
    Segments,
    System,
}

pub(super) struct Entry {
    pub(super) name: &'static str,
    pub(super) bits: usize,
    pub(super) kind: &'static str,
    pub(super) group: Option<&'static str>,
    pub(super) feature: Feature,
    get: fn(&Registers) -> u128,
    set: fn(&mut Registers, u128) -> Result<(), Refused>,
}

/// A register by gdb's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Register(usize);

impl Register {
    /// The register with this number.
    pub(crate) fn new(number: usize) -> Option<Self> {
        (number < COUNT).then_some(Self(number))
    }

    /// Looks a register up by name.
    #[cfg(test)]
    pub(crate) fn named(name: &str) -> Option<Self> {
        TABLE.iter().position(|e| e.name == name).map(Self)
    }

    /// All of them, in the order of their numbers.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        (0..COUNT).map(Self)
    }

    /// Its number.
    pub(crate) fn number(self) -> usize {
        self.0
    }

    /// Its name in target.xml.
    pub(crate) fn name(self) -> &'static str {
        TABLE[self.0].name
    }

    /// Its size on the wire, in bytes: 1 to 16.
    pub(crate) fn size(self) -> usize {
        TABLE[self.0].bits / 8
    }

    /// Its value, in guest byte order.
    pub(crate) fn read(self, registers: &Registers) -> impl AsRef<[u8]> + use<> {
        Value { bytes: (TABLE[self.0].get)(registers).to_le_bytes(), len: self.size() }
    }

    /// Its value as a number.
    #[cfg(test)]
    pub(crate) fn value(self, registers: &Registers) -> u128 {
        (TABLE[self.0].get)(registers)
    }

    /// Writes it. `bytes` must have exactly its size. On error nothing changed.
    pub(crate) fn write(self, registers: &mut Registers, bytes: &[u8]) -> Result<(), Refused> {
        let entry = &TABLE[self.0];
        if bytes.len() != self.size() {
            return Err(format!("{} has {} bytes, not {}", entry.name, self.size(), bytes.len()));
        }
        let mut wide = [0; 16];
        wide[..bytes.len()].copy_from_slice(bytes);
        let value = u128::from_le_bytes(wide);
        if (entry.get)(registers) == value {
            return Ok(());
        }
        let mut changed = *registers;
        (entry.set)(&mut changed, value).map_err(|why| format!("{} {why}", entry.name))?;
        *registers = changed;
        Ok(())
    }
}

struct Value {
    bytes: [u8; 16],
    len: usize,
}

impl AsRef<[u8]> for Value {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Whether `addr` is canonical, with 4- or 5-level paging as CR4.LA57 says.
pub(crate) fn canonical(registers: &Registers, addr: u64) -> bool {
    const CR4_LA57: u64 = 1 << 12;
    let unused = if registers.cr4 & CR4_LA57 != 0 { 64 - 57 } else { 64 - 48 };
    (((addr << unused) as i64) >> unused) as u64 == addr
}

const EFER_LMA: u64 = 1 << 10;
const CR0_PE: u64 = 1;
const RFLAGS_VM: u64 = 1 << 17;
/// RFLAGS bits that software can change (SDM vol. 1, 3.4.3); bit 1 reads as one.
const RFLAGS_WRITABLE: u64 = 0x003f_7fd5;
const MXCSR_WRITABLE: u32 = 0xffff;

/// An address that VM entry or WRMSR insists on being canonical.
fn address(registers: &Registers, value: u128) -> Result<u64, Refused> {
    let addr = value as u64;
    if canonical(registers, addr) { Ok(addr) } else { Err(format!("cannot be {addr:#x}: not a canonical address")) }
}

/// A value that must leave the bits outside `mask` zero.
fn masked(value: u128, mask: u64) -> Result<u64, Refused> {
    let value = value as u64;
    if value & !mask == 0 { Ok(value) } else { Err(format!("has no bits {:#x}", value & !mask)) }
}

fn read_only(why: &str) -> Result<(), Refused> {
    Err(format!("is read-only: {why}"))
}

fn set_rip(registers: &mut Registers, value: u128) -> Result<(), Refused> {
    registers.rip =
        if registers.efer & EFER_LMA != 0 { address(registers, value)? } else { masked(value, 0xffff_ffff)? };
    Ok(())
}

fn set_eflags(registers: &mut Registers, value: u128) -> Result<(), Refused> {
    let flags = masked(value, RFLAGS_WRITABLE | 2)?;
    if flags & RFLAGS_VM != 0 && registers.efer & EFER_LMA != 0 {
        return Err("cannot have VM: there is no virtual-8086 mode in long mode".into());
    }
    registers.rflags = registers.rflags & !0xffff_ffff | flags | 2;
    Ok(())
}

fn set_selector(
    registers: &mut Registers,
    value: u128,
    segment: fn(&mut Registers) -> &mut Segment,
) -> Result<(), Refused> {
    let selector = masked(value, 0xffff)? as u16;
    if registers.cr0 & CR0_PE != 0 && registers.rflags & RFLAGS_VM == 0 {
        return read_only("in protected mode a selector means nothing without its descriptor");
    }
    let segment = segment(registers);
    segment.selector = selector;
    segment.base = u64::from(selector) << 4;
    Ok(())
}

fn st(registers: &Registers, i: usize) -> u128 {
    let mut wide = [0; 16];
    wide[..10].copy_from_slice(&registers.fpu.st[i]);
    u128::from_le_bytes(wide)
}

fn set_st(registers: &mut Registers, i: usize, value: u128) -> Result<(), Refused> {
    registers.fpu.st[i].copy_from_slice(&value.to_le_bytes()[..10]);
    Ok(())
}

/// The tag word of FSAVE, from the abridged one of FXSAVE and the registers' contents
/// (SDM vol. 1, 10.5.1.1). The tag word counts physical registers, the stack counts from TOP.
fn full_tag(registers: &Registers) -> u128 {
    const VALID: u16 = 0;
    const ZERO: u16 = 1;
    const SPECIAL: u16 = 2;
    const EMPTY: u16 = 3;
    let top = usize::from(registers.fpu.fsw >> 11 & 7);
    let tag_of = |physical: usize| {
        if registers.fpu.ftwx >> physical & 1 == 0 {
            return EMPTY;
        }
        let value = st(registers, (physical + 8 - top) % 8);
        let (exponent, significand) = (value >> 64 & 0x7fff, value as u64);
        match (exponent, significand) {
            (0, 0) => ZERO,
            (0 | 0x7fff, _) => SPECIAL,
            (_, s) if s >> 63 == 0 => SPECIAL,
            _ => VALID,
        }
    };
    u128::from((0..8).fold(0, |word, i| word | tag_of(i) << (2 * i)))
}

fn set_full_tag(registers: &mut Registers, value: u128) -> Result<(), Refused> {
    let word = masked(value, 0xffff)?;
    registers.fpu.ftwx = (0..8).fold(0, |abridged, i| abridged | u8::from(word >> (2 * i) & 3 != 3) << i);
    Ok(())
}

macro_rules! entry {
    ($feature:ident, $name:literal, $bits:literal, $kind:literal, $group:expr, $get:expr, $set:expr) => {
        Entry { name: $name, bits: $bits, kind: $kind, group: $group, feature: Feature::$feature, get: $get, set: $set }
    };
}

/// A 64-bit register in which every value can stand.
macro_rules! free {
    ($feature:ident, $name:literal, $kind:literal, $($field:tt)+) => {
        entry!($feature, $name, 64, $kind, None, |r| r.$($field)+.into(), |r, v| {
            r.$($field)+ = v as u64;
            Ok(())
        })
    };
}

/// A linear address.
macro_rules! linear {
    ($feature:ident, $name:literal, $kind:literal, $($field:tt)+) => {
        entry!($feature, $name, 64, $kind, None, |r| r.$($field)+.into(), |r, v| {
            r.$($field)+ = address(r, v)?;
            Ok(())
        })
    };
}

/// A register with bits that must be zero.
macro_rules! bits {
    ($feature:ident, $name:literal, $bits:literal, $kind:literal, $mask:expr, $($field:tt)+) => {
        entry!($feature, $name, $bits, $kind, None, |r| r.$($field)+.into(), |r, v| {
            r.$($field)+ = masked(v, $mask)? as _;
            Ok(())
        })
    };
}

macro_rules! selector {
    ($name:literal, $field:ident) => {
        entry!(Core, $name, 32, "int32", None, |r| r.$field.selector.into(), |r, v| set_selector(r, v, |r| {
            &mut r.$field
        }))
    };
}

macro_rules! stack {
    ($name:literal, $i:literal) => {
        entry!(Core, $name, 80, "i387_ext", None, |r| st(r, $i), |r, v| set_st(r, $i, v))
    };
}

macro_rules! x87 {
    ($name:literal, $get:expr, $set:expr) => {
        entry!(Core, $name, 32, "int", Some("float"), $get, $set)
    };
}

macro_rules! xmm {
    ($name:literal, $i:literal) => {
        entry!(Sse, $name, 128, "vec128", None, |r| r.fpu.xmm[$i], |r, v| {
            r.fpu.xmm[$i] = v;
            Ok(())
        })
    };
}

macro_rules! fixed {
    ($name:literal, $bits:literal, $kind:literal, $why:literal, $($field:tt)+) => {
        entry!(System, $name, $bits, $kind, None, |r| r.$($field)+.into(), |_, _| read_only($why))
    };
}

pub(super) const TABLE: &[Entry] = &[
    free!(Core, "rax", "int64", rax),
    free!(Core, "rbx", "int64", rbx),
    free!(Core, "rcx", "int64", rcx),
    free!(Core, "rdx", "int64", rdx),
    free!(Core, "rsi", "int64", rsi),
    free!(Core, "rdi", "int64", rdi),
    free!(Core, "rbp", "data_ptr", rbp),
    free!(Core, "rsp", "data_ptr", rsp),
    free!(Core, "r8", "int64", r8),
    free!(Core, "r9", "int64", r9),
    free!(Core, "r10", "int64", r10),
    free!(Core, "r11", "int64", r11),
    free!(Core, "r12", "int64", r12),
    free!(Core, "r13", "int64", r13),
    free!(Core, "r14", "int64", r14),
    free!(Core, "r15", "int64", r15),
    entry!(Core, "rip", 64, "code_ptr", None, |r| r.rip.into(), set_rip),
    entry!(Core, "eflags", 32, "i386_eflags", None, |r| u128::from(r.rflags as u32), set_eflags),
    selector!("cs", cs),
    selector!("ss", ss),
    selector!("ds", ds),
    selector!("es", es),
    selector!("fs", fs),
    selector!("gs", gs),
    stack!("st0", 0),
    stack!("st1", 1),
    stack!("st2", 2),
    stack!("st3", 3),
    stack!("st4", 4),
    stack!("st5", 5),
    stack!("st6", 6),
    stack!("st7", 7),
    x87!("fctrl", |r| r.fpu.fcw.into(), |r, v| {
        r.fpu.fcw = masked(v, 0xffff)? as u16;
        Ok(())
    }),
    x87!("fstat", |r| r.fpu.fsw.into(), |r, v| {
        r.fpu.fsw = masked(v, 0xffff)? as u16;
        Ok(())
    }),
    x87!("ftag", full_tag, set_full_tag),
    // FXSAVE64 has 64-bit pointers in place of selector and offset: the two halves are shown
    // where gdb looks for them in a native process.
    x87!("fiseg", |r| (r.fpu.fip >> 32).into(), |r, v| {
        r.fpu.fip = (v as u64) << 32 | r.fpu.fip & 0xffff_ffff;
        Ok(())
    }),
    x87!("fioff", |r| (r.fpu.fip & 0xffff_ffff).into(), |r, v| {
        r.fpu.fip = r.fpu.fip >> 32 << 32 | v as u64;
        Ok(())
    }),
    x87!("foseg", |r| (r.fpu.fdp >> 32).into(), |r, v| {
        r.fpu.fdp = (v as u64) << 32 | r.fpu.fdp & 0xffff_ffff;
        Ok(())
    }),
    x87!("fooff", |r| (r.fpu.fdp & 0xffff_ffff).into(), |r, v| {
        r.fpu.fdp = r.fpu.fdp >> 32 << 32 | v as u64;
        Ok(())
    }),
    x87!("fop", |r| r.fpu.fop.into(), |r, v| {
        r.fpu.fop = masked(v, 0x7ff)? as u16;
        Ok(())
    }),
    xmm!("xmm0", 0),
    xmm!("xmm1", 1),
    xmm!("xmm2", 2),
    xmm!("xmm3", 3),
    xmm!("xmm4", 4),
    xmm!("xmm5", 5),
    xmm!("xmm6", 6),
    xmm!("xmm7", 7),
    xmm!("xmm8", 8),
    xmm!("xmm9", 9),
    xmm!("xmm10", 10),
    xmm!("xmm11", 11),
    xmm!("xmm12", 12),
    xmm!("xmm13", 13),
    xmm!("xmm14", 14),
    xmm!("xmm15", 15),
    entry!(Sse, "mxcsr", 32, "i386_mxcsr", Some("vector"), |r| r.fpu.mxcsr.into(), |r, v| {
        r.fpu.mxcsr = masked(v, MXCSR_WRITABLE.into())? as u32;
        Ok(())
    }),
    linear!(Segments, "fs_base", "int", fs.base),
    linear!(Segments, "gs_base", "int", gs.base),
    linear!(System, "k_gs_base", "int", kernel_gs_base),
    bits!(System, "cr0", 32, "cr0_flags", 0xffff_ffff, cr0),
    free!(System, "cr2", "data_ptr", cr2),
    free!(System, "cr3", "uint64", cr3),
    free!(System, "cr4", "uint64", cr4),
    bits!(System, "cr8", 64, "uint64", 0xf, cr8),
    bits!(System, "efer", 32, "efer_flags", 0xffff_ffff, efer),
    free!(System, "dr0", "data_ptr", dr[0]),
    free!(System, "dr1", "data_ptr", dr[1]),
    free!(System, "dr2", "data_ptr", dr[2]),
    free!(System, "dr3", "data_ptr", dr[3]),
    bits!(System, "dr6", 32, "dr6_flags", 0xffff_ffff, dr6),
    bits!(System, "dr7", 32, "dr7_flags", 0xffff_ffff, dr7),
    linear!(System, "gdtr_base", "data_ptr", gdtr.base),
    bits!(System, "gdtr_limit", 32, "uint32", 0xffff, gdtr.limit),
    linear!(System, "idtr_base", "data_ptr", idtr.base),
    bits!(System, "idtr_limit", 32, "uint32", 0xffff, idtr.limit),
    fixed!("tr", 32, "uint32", "it means nothing without its descriptor", tr.selector),
    fixed!("tr_base", 64, "data_ptr", "it belongs to TR's descriptor", tr.base),
    fixed!("tr_limit", 32, "uint32", "it belongs to TR's descriptor", tr.limit),
    fixed!("ldtr", 32, "uint32", "it means nothing without its descriptor", ldtr.selector),
    fixed!("ldtr_base", 64, "data_ptr", "it belongs to LDTR's descriptor", ldtr.base),
    fixed!("ldtr_limit", 32, "uint32", "it belongs to LDTR's descriptor", ldtr.limit),
    free!(System, "star", "uint64", star),
    linear!(System, "lstar", "code_ptr", lstar),
    bits!(System, "fmask", 64, "uint64", 0xffff_ffff, fmask),
    fixed!("apic_base", 64, "uint64", "the APIC is where the VMM emulates it", apic_base),
];

/// Number of registers.
pub(crate) const COUNT: usize = TABLE.len();

/// Length of a `g` frame in bytes: all registers in order.
pub(crate) const FRAME: usize = {
    let mut bytes = 0;
    let mut i = 0;
    while i < COUNT {
        bytes += TABLE[i].bits / 8;
        i += 1;
    }
    bytes
};

#[cfg(test)]
mod tests {
    use super::super::number;
    use super::*;
    use proptest::prelude::*;

    fn named(name: &str) -> Register {
        Register::named(name).unwrap()
    }

    fn long_mode() -> Registers {
        Registers { cr0: 0x8005_0033, cr4: 0x20, efer: 0xd01, rflags: 2, ..Registers::default() }
    }

    fn write(registers: &mut Registers, name: &str, value: u128) -> Result<(), Refused> {
        let register = named(name);
        register.write(registers, &value.to_le_bytes()[..register.size()])
    }

    #[test]
    fn the_numbers_are_gdbs() {
        for (name, number) in [
            ("rax", 0),
            ("rbp", number::RBP),
            ("rsp", number::RSP),
            ("rip", number::RIP),
            ("eflags", 17),
            ("gs", 23),
            ("st0", 24),
            ("fctrl", 32),
            ("fop", 39),
            ("xmm0", 40),
            ("mxcsr", 56),
            ("fs_base", 57),
            ("gs_base", 58),
        ] {
            assert_eq!(named(name).number(), number, "{name}");
        }
    }

    #[test]
    fn names_are_unique_and_qemus_are_there() {
        let mut names: Vec<_> = Register::all().map(Register::name).collect();
        for name in ["fs_base", "gs_base", "k_gs_base", "cr0", "cr2", "cr3", "cr4", "cr8", "efer"] {
            assert!(names.contains(&name), "{name}");
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), COUNT);
    }

    /// Values that differ from register to register, each one that the register can hold.
    fn distinct(register: Register) -> u128 {
        let n = register.number() as u128 + 1;
        match register.name() {
            "eflags" => 0x46,
            "cs" | "ss" | "ds" | "es" | "fs" | "gs" => 0x100 * n,
            "fctrl" | "fstat" | "fop" | "mxcsr" | "gdtr_limit" | "idtr_limit" => n,
            "ftag" => 0xffff,
            "cr8" => 5,
            name if name.starts_with("st") && register.size() == 10 => n << 64 | 1 << 63 | n << 8,
            "fmask" => 0x47700,
            _ if register.size() == 4 => (0x0100_0000 * n) | n,
            // Canonical, and different in every byte position that is free.
            _ if register.size() == 8 => 0x0000_1122_3300_0000 + n,
            _ => n << 96 | n << 64 | n << 32 | n,
        }
    }

    const READ_ONLY: [&str; 7] = ["tr", "tr_base", "tr_limit", "ldtr", "ldtr_base", "ldtr_limit", "apic_base"];

    #[test]
    fn every_register_keeps_its_own_value() {
        // Real mode: there the selectors can be written too.
        let mut registers = Registers { rflags: 2, ..Registers::default() };
        for register in Register::all().filter(|r| !READ_ONLY.contains(&r.name()) && r.name() != "ftag") {
            // EFER and RIP last in their own ways: long mode changes what RIP may be.
            if ["rip", "efer", "cr0"].contains(&register.name()) {
                continue;
            }
            write(&mut registers, register.name(), distinct(register)).unwrap();
        }
        write(&mut registers, "rip", 0xfff0).unwrap();
        write(&mut registers, "efer", 0x501).unwrap();
        write(&mut registers, "cr0", 0x11).unwrap();
        for register in Register::all().filter(|r| !READ_ONLY.contains(&r.name())) {
            let expected = match register.name() {
                "rip" => 0xfff0,
                "efer" => 0x501,
                "cr0" => 0x11,
                "ftag" => 0xffff, // all empty
                // The base follows its selector in real mode, and was then written itself.
                _ => distinct(register),
            };
            assert_eq!(register.value(&registers), expected, "{}", register.name());
        }
    }

    #[test]
    fn every_writable_bit_is_written_and_no_other_register_moves() {
        for register in Register::all().filter(|r| !READ_ONLY.contains(&r.name())) {
            for bit in 0..register.size() * 8 {
                let mut registers = Registers { rflags: 2, ..Registers::default() };
                let before = registers;
                let value = register.value(&registers) ^ 1 << bit;
                if register.write(&mut registers, &value.to_le_bytes()[..register.size()]).is_err() {
                    assert_eq!(registers, before, "{} bit {bit}: refused, yet changed", register.name());
                    continue;
                }
                if register.name() == "ftag" {
                    continue; // derived: see below
                }
                let expected = if register.name() == "eflags" { value | 2 } else { value };
                assert_eq!(register.value(&registers), expected, "{} bit {bit}", register.name());
                for other in Register::all().filter(|&o| o != register) {
                    let follows = match register.name() {
                        "fs" => other.name() == "fs_base",
                        "gs" => other.name() == "gs_base",
                        "fstat" => other.name() == "ftag",
                        _ => false,
                    };
                    assert!(
                        follows || other.value(&registers) == other.value(&before),
                        "writing {} moved {}",
                        register.name(),
                        other.name()
                    );
                }
            }
        }
    }

    #[test]
    fn how_many_bits_each_register_has() {
        let writable = |name: &str| {
            let register = named(name);
            (0..register.size() * 8).filter(|bit| write(&mut Registers::default(), name, 1 << bit).is_ok()).count()
        };
        for (name, bits) in [
            ("rax", 64),
            ("eflags", 19), // 18, and bit 1, which is always set
            ("cs", 16),
            ("st3", 80),
            ("fop", 11),
            ("fctrl", 16),
            ("xmm15", 128),
            ("mxcsr", 16),
            ("cr0", 32),
            ("cr3", 64),
            ("cr4", 64),
            ("cr8", 4),
            ("efer", 32),
            ("dr7", 32),
            ("gdtr_limit", 16),
            ("star", 64),
            ("fmask", 32),
            // One bit alone in the upper 17 is not canonical.
            ("lstar", 47),
            ("fs_base", 47),
        ] {
            assert_eq!(writable(name), bits, "{name}");
        }
    }

    #[test]
    fn what_is_read_only_says_so_but_takes_its_own_value() {
        let mut registers = long_mode();
        registers.tr.selector = 0x40;
        registers.cs.selector = 0x10;
        for name in READ_ONLY.into_iter().chain(["cs", "ss", "ds", "es", "fs", "gs"]) {
            let own = named(name).value(&registers);
            write(&mut registers, name, own).unwrap();
            let error = write(&mut registers, name, own + 8).unwrap_err();
            assert!(error.starts_with(&format!("{name} is read-only: ")), "{error}");
        }
    }

    #[test]
    fn what_would_break_vm_entry_is_refused() {
        let mut registers = long_mode();
        for (name, value) in [
            ("rip", 1u128 << 47),
            ("gs_base", 0x8000_0000_0000_0000),
            ("lstar", 0xffff_7fff_ffff_ffff),
            ("eflags", 1 << 15),
            ("eflags", 1 << 17),
            ("mxcsr", 1 << 16),
            ("cr8", 16),
        ] {
            let before = registers;
            assert!(write(&mut registers, name, value).is_err(), "{name} = {value:#x}");
            assert_eq!(registers, before);
        }
        write(&mut registers, "rip", 0xffff_ffff_8100_0000).unwrap();
        registers.cr4 |= 1 << 12;
        write(&mut registers, "gs_base", 0x00ff_ffff_ffff_ffff).unwrap();
        write(&mut registers, "eflags", 0).unwrap();
        assert_eq!(registers.rflags, 2);
    }

    #[test]
    fn a_value_of_the_wrong_size_is_refused() {
        let mut registers = long_mode();
        for size in [0, 1, 7, 9, 16, 64] {
            assert!(named("rax").write(&mut registers, &vec![1; size]).is_err());
        }
        assert_eq!(registers, long_mode());
    }

    #[test]
    fn the_tag_word_is_computed_from_the_stack() {
        let mut registers = long_mode();
        registers.fpu.fsw = 6 << 11; // TOP = 6: ST0 is physical register 6
        registers.fpu.ftwx = 0b1100_0001;
        write(&mut registers, "st0", 0x3fff_8000_0000_0000_0000).unwrap(); // 1.0
        write(&mut registers, "st1", 0).unwrap(); // physical 7
        write(&mut registers, "st2", 0x7fff_8000_0000_0000_0000).unwrap(); // infinity, physical 0
        assert_eq!(named("ftag").value(&registers), 0b01_00_11_11_11_11_11_10);
        write(&mut registers, "ftag", 0b11_00_11_11_11_11_00_01).unwrap();
        assert_eq!(registers.fpu.ftwx, 0b0100_0011);
    }

    proptest! {
        #[test]
        fn no_value_panics(number in 0..COUNT, bytes in proptest::collection::vec(any::<u8>(), 0..20), efer in any::<u64>(), cr0 in any::<u64>()) {
            let mut registers = Registers { efer, cr0, ..Registers::default() };
            let before = registers;
            if Register::new(number).unwrap().write(&mut registers, &bytes).is_err() {
                prop_assert_eq!(registers, before);
            }
        }
    }
}
