//! What a VMCOREINFO text says, as far as a core needs it itself.

use std::str;

/// `KEY=value` lines, from a guest: they may be anything.
pub(super) struct Info<'a>(pub(super) &'a [u8]);

impl<'a> Info<'a> {
    pub(super) fn value(&self, key: &str) -> Option<&'a str> {
        let lines = self.0.split(|byte| *byte == b'\n');
        let value = lines.filter_map(|line| line.strip_prefix(key.as_bytes())?.strip_prefix(b"=")).next()?;
        str::from_utf8(value).ok()
    }

    /// Where the kernel is loaded, relative to where it is linked.
    pub(super) fn phys_base(&self) -> Option<i64> {
        self.value("NUMBER(phys_base)")?.parse().ok()
    }

    /// Linear address of the kernel's page tables.
    pub(super) fn tables(&self) -> Option<u64> {
        u64::from_str_radix(self.value("SYMBOL(swapper_pg_dir)")?, 16).ok()
    }

    /// Whether they have five levels.
    pub(super) fn wide(&self) -> bool {
        self.value("NUMBER(pgtable_l5_enabled)").is_some_and(|value| value != "0")
    }
}
