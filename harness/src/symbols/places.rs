//! From an address to a name and to source lines.

use super::dwarf::Dwarf;
use super::{Location, SourceLine, Symbols};

impl Symbols {
    /// What the address is in: the symbol that reaches over it, else the one before. Of several at one place a global one is
    /// preferred; padding (`__pfx_`) and per-cpu variables are never given.
    pub fn locate(&self, address: u64) -> Option<Location> {
        let (table, at, module) = match self.to_linked(address) {
            Some(linked) => (&self.kernel.table, linked, None),
            None => {
                let module = self.module_at(address)?;
                (&module.table, address, Some(module.name.clone()))
            }
        };
        let entry = table.at(at)?;
        Some(Location {
            module,
            symbol: table.name(entry).to_owned(),
            offset: at.wrapping_sub(entry.address),
            size: entry.size,
        })
    }

    /// The source lines of an address: the innermost inlined function first, and at last the function that the code is
    /// in. Empty if there is no debug information for it.
    ///
    /// A return address belongs to the call before it: ask for the address less one.
    pub fn lines(&self, address: u64) -> Vec<SourceLine> {
        let (dwarf, at) = match self.to_linked(address) {
            Some(linked) => (self.kernel.dwarf.as_ref(), linked),
            None => (self.module_at(address).and_then(|module| module.dwarf.as_ref()), address),
        };
        let mut lines = dwarf.map(|dwarf| dwarf.lines(at)).unwrap_or_default();
        for line in lines.iter_mut().filter(|line| line.function.is_empty()) {
            line.function = self.locate(address).map(|location| location.symbol).unwrap_or_default();
        }
        lines
    }

    /// Contents of a section of the kernel as linked, with the section's run-time address (0 if it is not part of the
    /// image, such as `.debug_frame`): `.orc_unwind`, `.rodata`, .. None if it has no contents.
    pub fn section(&self, name: &str) -> Option<(u64, &[u8])> {
        let kernel = &self.kernel;
        let mut elves = kernel.image.iter().chain(kernel.dwarf.as_ref().map(Dwarf::elf));
        let Some((elf, section)) = elves.find_map(|elf| Some((elf, elf.section(name)?))) else {
            return self.bounded(name);
        };
        let address = if section.alloc { self.to_run_time(section.address) } else { 0 };
        Some((address, elf.contents(section)))
    }

    /// A section of an image without section headers, by the names that the linker script has put at its ends.
    fn bounded(&self, name: &str) -> Option<(u64, &[u8])> {
        let name = name.strip_prefix('.')?;
        let start = self.address(&format!("__start_{name}"))?;
        let end = self.address(&format!("__stop_{name}"))?;
        let bytes = self.linked_bytes(start)?;
        Some((start, bytes.get(..usize::try_from(end.checked_sub(start)?).ok()?)?))
    }

    /// What the kernel's image holds at a run-time address as linked, up to the end of the section. The running
    /// guest may have patched or relocated it since.
    pub fn linked_bytes(&self, address: u64) -> Option<&[u8]> {
        self.kernel.image.as_ref()?.linked(self.to_linked(address)?)
    }
}
