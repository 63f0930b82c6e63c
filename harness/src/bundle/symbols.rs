//! Where the symbols of what ran are, and whether they still are.

use std::fs::File;
use std::path::{Path, PathBuf};

use object::Object;
use object::read::ReadCache;

use super::Bundle;

/// The file that gdb is to be given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SymbolFile {
    /// The guest that is built in.
    Demo,
    /// This one, which fits what ran as far as can be told.
    File(PathBuf),
    /// None: the report names none that has symbols.
    None,
    /// None that fits, in words.
    Changed(String),
}

impl Bundle {
    /// What gdb is to be given: of the files that the report names the first that is an ELF and has the build-id of
    /// what ran.
    pub fn symbols(&self) -> SymbolFile {
        let Some(report) = &self.report else { return SymbolFile::None };
        let input = &report.input;
        if input.kernel == "demo" && input.symbols.is_empty() {
            return SymbolFile::Demo;
        }
        let ran = input.build_id.as_deref();
        let mut changed = None;
        for path in input.symbols.iter().chain([&input.kernel]).map(PathBuf::from) {
            let Some(found) = build_id(&path) else { continue };
            match (ran, found) {
                (Some(ran), Some(found)) if ran != found => {
                    changed.get_or_insert(SymbolFile::Changed(format!(
                        "{} is not what ran: its build-id is {found}, and that of what ran is {ran}",
                        path.display()
                    )));
                }
                _ => return SymbolFile::File(path),
            }
        }
        changed.unwrap_or(SymbolFile::None)
    }
}

/// The build-id of an ELF in hex, if it has one; `None` for what is no ELF for a debugger to read.
fn build_id(path: &Path) -> Option<Option<String>> {
    let file = File::open(path).ok().filter(|file| file.metadata().is_ok_and(|there| there.is_file()))?;
    let cache = ReadCache::new(file);
    let elf = object::File::parse(&cache).ok()?;
    // A module has one of its own, and is no kernel.
    if elf.kind() == object::ObjectKind::Relocatable {
        return None;
    }
    let id = elf.build_id().ok().flatten();
    Some(id.map(|id| id.iter().map(|byte| format!("{byte:02x}")).collect()))
}
