//! The guest's modules: which are loaded, where, and what symbols they have.
//!
//! A module's addresses are chosen when it is loaded, so they are read from the guest: [`Symbols::guest_modules`] walks
//! the kernel's list of modules and takes the symbols that the guest itself keeps of each (`CONFIG_KALLSYMS`).
//! [`Symbols::with_modules`] adds what the module's file has, if there is one: types and source lines. A section of the file is
//! where the symbols that both know say it is.

mod file;
mod guest;

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use self::guest::GuestSymbol;
use super::Symbols;
use super::dwarf::Dwarf;
use super::table::{Builder, Class, Kind, Raw, Table};

/// What a module is about to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModuleState {
    /// It runs.
    Live,
    /// It is there, but its init function has not returned.
    Coming,
    /// It is being unloaded.
    Going,
    /// It is being put together; nothing of it can be relied on.
    Unformed,
}

/// A module that the guest has loaded.
#[derive(Clone)]
pub struct LoadedModule {
    /// As `lsmod` shows it.
    pub name: String,
    /// Where its `struct module` is, for what is not told here: [`Symbols::field`] knows the members.
    pub address: u64,
    /// What it is about to do.
    pub state: ModuleState,
    /// Its code: that which stays, and that of its start until it is discarded.
    pub text: Vec<Range<u64>>,
    /// All of its memory, code included.
    pub memory: Vec<Range<u64>>,
    /// The part of its memory that is discarded once it is live.
    init: Vec<Range<u64>>,
    /// GNU build-id, if the guest keeps it (`CONFIG_STACKTRACE_BUILD_ID`).
    pub build_id: Option<Vec<u8>>,
    symbols: Arc<[GuestSymbol]>,
}

impl fmt::Debug for LoadedModule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadedModule")
            .field("name", &self.name)
            .field("state", &self.state)
            .field("memory", &self.memory)
            .field("symbols", &self.symbols.len())
            .finish_non_exhaustive()
    }
}

/// Why the guest's modules cannot be told.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ModulesError {
    /// The kernel's symbols have no list of modules.
    #[error(
        "these symbols do not say where the kernel's list of modules is (`modules`): it has none, or was built without CONFIG_KALLSYMS_ALL; give its vmlinux with --symbols"
    )]
    NoList,
    /// The layout of `struct module` is not known.
    #[error(
        "these symbols do not say what `struct {0}` looks like; give a vmlinux with debug information or BTF with --symbols"
    )]
    NoTypes(&'static str),
    /// The list leads nowhere, or in circles; before the kernel has set up its memory, or after something overwrote it.
    #[error("the guest's list of modules is damaged at {address:#x}, after {} modules", found.len())]
    Damaged {
        /// What could not be followed.
        address: u64,
        /// The modules up to there.
        found: Vec<LoadedModule>,
    },
}

/// A module whose symbols are known. Addresses are run-time.
#[derive(Debug)]
pub(super) struct Module {
    pub(super) name: Arc<str>,
    /// Of its `struct module`.
    address: u64,
    pub(super) table: Table,
    pub(super) dwarf: Option<Dwarf>,
    ranges: Vec<Range<u64>>,
}

impl Module {
    /// A file may have `-` where the kernel has `_`.
    pub(super) fn is_called(&self, name: &str) -> bool {
        same_name(&self.name, name)
    }
}

impl Symbols {
    /// The same, with the symbols of these modules and of no others. Their files are looked for among those that were
    /// given with `--symbols`, then by build-id, then by name where distributions install them; a file that does not
    /// fit what the guest has is left out.
    pub fn with_modules(&self, modules: &[LoadedModule]) -> Symbols {
        let modules = modules.iter().map(|module| self.module(module)).collect();
        Symbols { modules, ..self.clone() }
    }

    /// The names of the modules whose symbols are known.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.modules.iter().map(|module| &*module.name)
    }

    /// Where the `struct module` is of the module whose memory has this address.
    pub fn struct_module(&self, address: u64) -> Option<u64> {
        self.module_at(address).map(|module| module.address)
    }

    fn module(&self, loaded: &LoadedModule) -> Module {
        let file = self.kernel.file_of(loaded);
        let mut builder = Builder::default();
        for symbol in loaded.symbols.iter() {
            builder.add(&Raw {
                name: &symbol.name,
                address: symbol.address,
                size: symbol.size,
                kind: Kind::Unknown,
                class: loaded.class(symbol),
                global: symbol.letter.is_ascii_uppercase(),
            });
        }
        if let Some(elf) = &file {
            let inside = |address| loaded.memory.iter().any(|range| range.contains(&address));
            elf.each_symbol(|raw| {
                if inside(raw.address) {
                    builder.add(raw);
                }
            });
        }
        let table = builder.build(&loaded.memory);
        Module {
            name: Arc::from(loaded.name.as_str()),
            address: loaded.address,
            table,
            dwarf: file.as_ref().and_then(Dwarf::of),
            ranges: loaded.memory.clone(),
        }
    }

    /// The module whose memory has this address.
    pub(super) fn module_at(&self, address: u64) -> Option<&Module> {
        self.modules.iter().find(|module| module.ranges.iter().any(|range| range.contains(&address)))
    }
}

impl LoadedModule {
    fn class(&self, symbol: &GuestSymbol) -> Class {
        let within = |ranges: &[Range<u64>]| ranges.iter().any(|range| range.contains(&symbol.address));
        let letter = symbol.letter.to_ascii_lowercase();
        if letter == b'a' {
            Class::Absolute
        } else if !within(&self.memory) {
            Class::PerCpu
        } else {
            match (within(&self.text), within(&self.init)) {
                (true, true) => Class::InitText,
                (true, false) => Class::Text,
                (false, true) => Class::InitData,
                (false, false) if letter == b'r' => Class::ReadOnly,
                (false, false) => Class::Data,
            }
        }
    }
}

fn same_name(a: &str, b: &str) -> bool {
    let plain = |byte: u8| if byte == b'-' { b'_' } else { byte };
    a.bytes().map(plain).eq(b.bytes().map(plain))
}

/// The name of the module that a file is of, by the file's name: `NAME.ko`, `NAME.ko.debug`.
fn name_of(path: &Path) -> Option<&str> {
    let (stem, rest) = path.file_name()?.to_str()?.split_once(".ko")?;
    matches!(rest, "" | ".debug").then_some(stem)
}

/// Whether a file is that of the module `name`.
pub(super) fn is_file_of(path: &Path, name: &str) -> bool {
    let stem = name_of(path).or_else(|| path.file_stem()?.to_str());
    stem.is_some_and(|stem| same_name(stem, name))
}
