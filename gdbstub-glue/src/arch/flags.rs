//! The names of bits.

/// A register whose bits have names: `(name, first bit, last bit)`.
pub(crate) struct Flags {
    pub(super) id: &'static str,
    pub(super) fields: &'static [(&'static str, u8, u8)],
}

impl Flags {
    /// The fields of `value` that are not zero, as gdb writes them: `PE WP RW0=1`.
    pub(crate) fn words(&self, value: u64) -> String {
        let mut words = Vec::new();
        for &(name, first, last) in self.fields {
            let field = value >> first & (u64::MAX >> (63 - (last - first)));
            match (field, last > first) {
                (0, _) => {}
                _ if name.is_empty() => {}
                (_, false) => words.push(name.to_owned()),
                (field, true) => words.push(format!("{name}={field:x}")),
            }
        }
        words.join(" ")
    }
}

const fn bit(name: &'static str, at: u8) -> (&'static str, u8, u8) {
    (name, at, at)
}

pub(crate) const EFLAGS: Flags = Flags {
    id: "i386_eflags",
    fields: &[
        bit("CF", 0),
        bit("", 1),
        bit("PF", 2),
        bit("AF", 4),
        bit("ZF", 6),
        bit("SF", 7),
        bit("TF", 8),
        bit("IF", 9),
        bit("DF", 10),
        bit("OF", 11),
        ("IOPL", 12, 13),
        bit("NT", 14),
        bit("RF", 16),
        bit("VM", 17),
        bit("AC", 18),
        bit("VIF", 19),
        bit("VIP", 20),
        bit("ID", 21),
    ],
};

pub(super) const MXCSR: Flags = Flags {
    id: "i386_mxcsr",
    fields: &[
        bit("IE", 0),
        bit("DE", 1),
        bit("ZE", 2),
        bit("OE", 3),
        bit("UE", 4),
        bit("PE", 5),
        bit("DAZ", 6),
        bit("IM", 7),
        bit("DM", 8),
        bit("ZM", 9),
        bit("OM", 10),
        bit("UM", 11),
        bit("PM", 12),
        ("RC", 13, 14),
        bit("FZ", 15),
    ],
};

pub(crate) const CR0: Flags = Flags {
    id: "cr0_flags",
    fields: &[
        bit("PE", 0),
        bit("MP", 1),
        bit("EM", 2),
        bit("TS", 3),
        bit("ET", 4),
        bit("NE", 5),
        bit("WP", 16),
        bit("AM", 18),
        bit("NW", 29),
        bit("CD", 30),
        bit("PG", 31),
    ],
};

pub(crate) const EFER: Flags = Flags {
    id: "efer_flags",
    fields: &[
        bit("SCE", 0),
        bit("LME", 8),
        bit("LMA", 10),
        bit("NXE", 11),
        bit("SVME", 12),
        bit("LMSLE", 13),
        bit("FFXSR", 14),
        bit("TCE", 15),
        bit("AUTOIBRS", 21),
    ],
};

/// Without BLD and RTM, which are set when nothing happened.
pub(crate) const DR6: Flags = Flags {
    id: "dr6_flags",
    fields: &[bit("B0", 0), bit("B1", 1), bit("B2", 2), bit("B3", 3), bit("BD", 13), bit("BS", 14), bit("BT", 15)],
};

pub(crate) const DR7: Flags = Flags {
    id: "dr7_flags",
    fields: &[
        bit("L0", 0),
        bit("G0", 1),
        bit("L1", 2),
        bit("G1", 3),
        bit("L2", 4),
        bit("G2", 5),
        bit("L3", 6),
        bit("G3", 7),
        bit("LE", 8),
        bit("GE", 9),
        bit("RTM", 11),
        bit("GD", 13),
        ("RW0", 16, 17),
        ("LEN0", 18, 19),
        ("RW1", 20, 21),
        ("LEN1", 22, 23),
        ("RW2", 24, 25),
        ("LEN2", 26, 27),
        ("RW3", 28, 29),
        ("LEN3", 30, 31),
    ],
};

/// Not part of target.xml: a flags register of 64 bits could not be assigned to.
pub(crate) const CR4: Flags = Flags {
    id: "cr4_flags",
    fields: &[
        bit("VME", 0),
        bit("PVI", 1),
        bit("TSD", 2),
        bit("DE", 3),
        bit("PSE", 4),
        bit("PAE", 5),
        bit("MCE", 6),
        bit("PGE", 7),
        bit("PCE", 8),
        bit("OSFXSR", 9),
        bit("OSXMMEXCPT", 10),
        bit("UMIP", 11),
        bit("LA57", 12),
        bit("VMXE", 13),
        bit("SMXE", 14),
        bit("FSGSBASE", 16),
        bit("PCIDE", 17),
        bit("OSXSAVE", 18),
        bit("KL", 19),
        bit("SMEP", 20),
        bit("SMAP", 21),
        bit("PKE", 22),
        bit("CET", 23),
        bit("PKS", 24),
        bit("UINTR", 25),
        bit("FRED", 32),
    ],
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_gdbs() {
        assert_eq!(CR0.words(0x8005_0033), "PE MP ET NE WP AM PG");
        assert_eq!(EFER.words(0xd01), "SCE LME LMA NXE");
        assert_eq!(DR7.words(0x1_0402), "G0 RW0=1");
        assert_eq!(CR4.words(1 << 32 | 0x20), "PAE FRED");
        assert_eq!(EFLAGS.words(0x3202), "IF IOPL=3");
    }
}
