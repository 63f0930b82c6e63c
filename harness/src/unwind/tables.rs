//! What the unwinder asks of others.

use std::ops::Range;

use crate::symbols::Symbols;

/// The tables and names of one kernel, at the addresses where it runs.
pub trait Tables {
    /// A section of the kernel's image: its run-time address (0 if it is not loaded) and its contents as linked.
    fn section(&self, name: &str) -> Option<(u64, &[u8])>;

    /// What the running kernel has been moved by, to be added (wrapping) to an address as linked.
    fn slide(&self) -> u64;

    /// Where the function that contains `addr` begins and ends.
    fn function(&self, addr: u64) -> Option<Range<u64>>;

    /// Where a symbol of the kernel's is.
    fn symbol(&self, name: &str) -> Option<u64>;

    /// Where the `struct module` is of the module that has `addr`.
    fn module(&self, addr: u64) -> Option<u64>;

    /// Where a structure of the kernel's has a member: bytes from its start.
    fn member(&self, structure: &str, path: &str) -> Option<u64>;
}

impl Tables for Symbols {
    fn section(&self, name: &str) -> Option<(u64, &[u8])> {
        self.section(name)
    }

    fn slide(&self) -> u64 {
        self.slide()
    }

    fn function(&self, addr: u64) -> Option<Range<u64>> {
        let found = self.locate(addr)?;
        let start = addr.checked_sub(found.offset)?;
        Some(start..start.checked_add(found.size)?).filter(|function| function.contains(&addr))
    }

    fn symbol(&self, name: &str) -> Option<u64> {
        self.address(name)
    }

    fn module(&self, addr: u64) -> Option<u64> {
        self.struct_module(addr)
    }

    fn member(&self, structure: &str, path: &str) -> Option<u64> {
        self.field(structure, path).map(|field| field.offset)
    }
}

impl<T: Tables + ?Sized> Tables for &T {
    fn section(&self, name: &str) -> Option<(u64, &[u8])> {
        (**self).section(name)
    }

    fn slide(&self) -> u64 {
        (**self).slide()
    }

    fn function(&self, addr: u64) -> Option<Range<u64>> {
        (**self).function(addr)
    }

    fn symbol(&self, name: &str) -> Option<u64> {
        (**self).symbol(name)
    }

    fn module(&self, addr: u64) -> Option<u64> {
        (**self).module(addr)
    }

    fn member(&self, structure: &str, path: &str) -> Option<u64> {
        (**self).member(structure, path)
    }
}
