//! The registers that conditions know, by name.

use trapline_vmm::vcpu::Registers;

/// A whole register of a vCPU, as a 64-bit value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Register {
    Rax,
    Rbx,
    Rcx,
    Rdx,
    Rsi,
    Rdi,
    Rbp,
    Rsp,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
    Rip,
    Rflags,
    Cr0,
    Cr2,
    Cr3,
    Cr4,
    FsBase,
    GsBase,
    /// The current privilege level, 0 to 3.
    Cpl,
}

impl Register {
    /// Its value in a vCPU's registers.
    pub fn of(self, registers: &Registers) -> u64 {
        match self {
            Register::Rax => registers.rax,
            Register::Rbx => registers.rbx,
            Register::Rcx => registers.rcx,
            Register::Rdx => registers.rdx,
            Register::Rsi => registers.rsi,
            Register::Rdi => registers.rdi,
            Register::Rbp => registers.rbp,
            Register::Rsp => registers.rsp,
            Register::R8 => registers.r8,
            Register::R9 => registers.r9,
            Register::R10 => registers.r10,
            Register::R11 => registers.r11,
            Register::R12 => registers.r12,
            Register::R13 => registers.r13,
            Register::R14 => registers.r14,
            Register::R15 => registers.r15,
            Register::Rip => registers.rip,
            Register::Rflags => registers.rflags,
            Register::Cr0 => registers.cr0,
            Register::Cr2 => registers.cr2,
            Register::Cr3 => registers.cr3,
            Register::Cr4 => registers.cr4,
            Register::FsBase => registers.fs.base,
            Register::GsBase => registers.gs.base,
            Register::Cpl => u64::from(registers.cpl()),
        }
    }
}

/// A name as written after `$`, and the bits of the register that it stands for.
#[derive(Debug, PartialEq, Eq)]
pub(in super::super) struct Operand {
    pub(in super::super) name: &'static str,
    pub(in super::super) register: Register,
    shift: u8,
    mask: u64,
}

impl Operand {
    pub(super) fn of(&self, whole: u64) -> u64 {
        (whole >> self.shift) & self.mask
    }

    pub(super) fn named(name: &str) -> Option<&'static Self> {
        OPERANDS.iter().find(|operand| operand.name == name)
    }
}

const fn part(name: &'static str, register: Register, shift: u8, mask: u64) -> Operand {
    Operand { name, register, shift, mask }
}

const fn whole(name: &'static str, register: Register) -> Operand {
    part(name, register, 0, u64::MAX)
}

const fn dword(name: &'static str, register: Register) -> Operand {
    part(name, register, 0, 0xffff_ffff)
}

const fn word(name: &'static str, register: Register) -> Operand {
    part(name, register, 0, 0xffff)
}

const fn byte(name: &'static str, register: Register) -> Operand {
    part(name, register, 0, 0xff)
}

const fn high_byte(name: &'static str, register: Register) -> Operand {
    part(name, register, 8, 0xff)
}

/// What a `ret:` rule's function returned.
pub(super) const RETURNED: &str = "ret";

/// Every name. `argN` are the integer arguments of a function at its first instruction (System V ABI for x86-64, 3.2.3).
static OPERANDS: &[Operand] = {
    use Register::*;
    &[
        whole("rax", Rax),
        dword("eax", Rax),
        word("ax", Rax),
        byte("al", Rax),
        high_byte("ah", Rax),
        whole("rbx", Rbx),
        dword("ebx", Rbx),
        word("bx", Rbx),
        byte("bl", Rbx),
        high_byte("bh", Rbx),
        whole("rcx", Rcx),
        dword("ecx", Rcx),
        word("cx", Rcx),
        byte("cl", Rcx),
        high_byte("ch", Rcx),
        whole("rdx", Rdx),
        dword("edx", Rdx),
        word("dx", Rdx),
        byte("dl", Rdx),
        high_byte("dh", Rdx),
        whole("rsi", Rsi),
        dword("esi", Rsi),
        word("si", Rsi),
        byte("sil", Rsi),
        whole("rdi", Rdi),
        dword("edi", Rdi),
        word("di", Rdi),
        byte("dil", Rdi),
        whole("rbp", Rbp),
        dword("ebp", Rbp),
        word("bp", Rbp),
        byte("bpl", Rbp),
        whole("rsp", Rsp),
        dword("esp", Rsp),
        word("sp", Rsp),
        byte("spl", Rsp),
        whole("r8", R8),
        dword("r8d", R8),
        word("r8w", R8),
        byte("r8b", R8),
        whole("r9", R9),
        dword("r9d", R9),
        word("r9w", R9),
        byte("r9b", R9),
        whole("r10", R10),
        dword("r10d", R10),
        word("r10w", R10),
        byte("r10b", R10),
        whole("r11", R11),
        dword("r11d", R11),
        word("r11w", R11),
        byte("r11b", R11),
        whole("r12", R12),
        dword("r12d", R12),
        word("r12w", R12),
        byte("r12b", R12),
        whole("r13", R13),
        dword("r13d", R13),
        word("r13w", R13),
        byte("r13b", R13),
        whole("r14", R14),
        dword("r14d", R14),
        word("r14w", R14),
        byte("r14b", R14),
        whole("r15", R15),
        dword("r15d", R15),
        word("r15w", R15),
        byte("r15b", R15),
        whole("rip", Rip),
        dword("eip", Rip),
        whole("rflags", Rflags),
        dword("eflags", Rflags),
        whole("cr0", Cr0),
        whole("cr2", Cr2),
        whole("cr3", Cr3),
        whole("cr4", Cr4),
        whole("fs_base", FsBase),
        whole("gs_base", GsBase),
        byte("cpl", Cpl),
        whole("arg1", Rdi),
        whole("arg2", Rsi),
        whole("arg3", Rdx),
        whole("arg4", Rcx),
        whole("arg5", R8),
        whole("arg6", R9),
        whole(RETURNED, Rax),
    ]
};

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_unique_and_parts_are_of_their_register() {
        let names: HashSet<_> = OPERANDS.iter().map(|operand| operand.name).collect();
        assert_eq!(names.len(), OPERANDS.len());
        let value = 0x1122_3344_5566_7788;
        let of = |name: &str| Operand::named(name).unwrap().of(value);
        assert_eq!([of("rax"), of("eax"), of("ax"), of("al"), of("ah")], [value, 0x5566_7788, 0x7788, 0x88, 0x77]);
        assert_eq!([of("r15"), of("r15d"), of("r15w"), of("r15b")], [value, 0x5566_7788, 0x7788, 0x88]);
        assert_eq!(Operand::named("RAX"), None);
    }

    #[test]
    fn each_register_is_read_from_its_field() {
        let mut registers = Registers { rax: 1, rdi: 2, r9: 3, rip: 4, cr3: 5, ..Registers::default() };
        registers.gs.base = 6;
        registers.ss.attributes = 3 << 5;
        use Register::*;
        assert_eq!([Rax, Rdi, R9, Rip, Cr3, GsBase, Cpl].map(|r| r.of(&registers)), [1, 2, 3, 4, 5, 6, 3]);
    }
}
