//! Names and addresses of the kernel's code, from its vmlinux.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use object::{Object, ObjectSection, ReadCache};

/// `Elf64_Sym`.
const SYMBOL_SIZE: usize = 24;
/// Symbol types: none given, a function.
const KINDS: [u8; 2] = [0, 2];

pub(crate) struct Symbols {
    by_name: HashMap<String, u64>,
    /// Sorted by address.
    code: Vec<(u64, String)>,
}

impl Symbols {
    pub(crate) fn read(vmlinux: &Path) -> Self {
        let file = ReadCache::new(File::open(vmlinux).unwrap());
        let object = object::File::parse(&file).unwrap();
        // Read as a whole: a look into the file for each of 100,000 names takes minutes.
        let section = |name: &str| object.section_by_name(name).unwrap().data().unwrap();
        let (symbols, names) = (section(".symtab"), section(".strtab"));
        let mut code: Vec<(u64, String)> = symbols
            .chunks_exact(SYMBOL_SIZE)
            .filter(|symbol| KINDS.contains(&(symbol[4] & 0xf)) && symbol[15] & 0x80 != 0)
            .map(|symbol| {
                let name = &names[u32::from_le_bytes(symbol[..4].try_into().unwrap()) as usize..];
                let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
                let addr = u64::from_le_bytes(symbol[8..16].try_into().unwrap());
                (addr, String::from_utf8_lossy(name).into_owned())
            })
            .filter(|(_, name)| !name.is_empty() && !name.starts_with("__pfx_"))
            .collect();
        code.sort();
        let by_name = code.iter().map(|(addr, name)| (name.clone(), *addr)).collect();
        Symbols { by_name, code }
    }

    pub(crate) fn at(&self, name: &str) -> u64 {
        *self.by_name.get(name).unwrap_or_else(|| panic!("vmlinux has no {name}"))
    }

    /// The function that `pc` is in; `user` for a user program's code.
    pub(crate) fn function(&self, pc: u64) -> &str {
        if pc >> 63 == 0 {
            return "user";
        }
        let behind = self.code.partition_point(|(addr, _)| *addr <= pc);
        behind.checked_sub(1).map_or("?", |n| &self.code[n].1)
    }

    /// As `function+0x1c`.
    pub(crate) fn name(&self, pc: u64) -> String {
        match self.by_name.get(self.function(pc)) {
            Some(start) => format!("{}+{:#x}", self.function(pc), pc - start),
            None => format!("{pc:#x}"),
        }
    }
}
