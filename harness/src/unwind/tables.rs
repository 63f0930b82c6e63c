//! What the unwinder asks of others.

use std::ops::Range;

use crate::symbols::{Memory, Symbols};

/// The tables and names of one kernel, at the addresses where it runs.
pub trait Tables {
    /// A section of the kernel's image: its run-time address (0 if it is not loaded) and its contents as linked.
    fn section(&self, name: &str) -> Option<(u64, &[u8])>;

    /// What the running kernel has been moved by, to be added (wrapping) to an address as linked.
    fn slide(&self) -> u64;

    /// Where the function that contains `addr` begins and ends.
    fn function(&self, addr: u64) -> Option<Range<u64>>;

    /// ORC tables in guest memory for `addr`: those of the module it is in, or the kernel's own if there is no file
    /// with them.
    fn guest_orc(&self, addr: u64, memory: &dyn Memory) -> Option<GuestOrc>;
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

    fn guest_orc(&self, addr: u64, _memory: &dyn Memory) -> Option<GuestOrc> {
        // Names without a file, from System.map, say where the kernel has its own table.
        self.locate(addr)?;
        let [addresses, end, entries] =
            ["__start_orc_unwind_ip", "__stop_orc_unwind_ip", "__start_orc_unwind"].map(|name| self.address(name));
        let addresses = addresses?;
        let count = u32::try_from(end?.checked_sub(addresses)? / 4).ok()?;
        Some(GuestOrc { addresses, entries: entries?, count })
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

    fn guest_orc(&self, addr: u64, memory: &dyn Memory) -> Option<GuestOrc> {
        (**self).guest_orc(addr, memory)
    }
}

/// ORC tables in guest memory: linear addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestOrc {
    /// Where `.orc_unwind_ip` is: a 32-bit place-relative address for each entry, sorted.
    pub addresses: u64,
    /// Where `.orc_unwind` is.
    pub entries: u64,
    /// How many.
    pub count: u32,
}
