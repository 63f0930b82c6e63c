//! Symbols of a guest kernel: from a name to an address before the guest runs, and from an address to a name and
//! source lines when it has stopped.
//!
//! ```text
//!   --kernel vmlinux ─┐                        .symtab | System.map | kallsyms ──► Table   name <-> address
//!   --kernel bzImage ─┼─► Sources ─► Symbols   DWARF ──► lines, variables, fields
//!   --symbols FILE.. ─┘                        BTF   ──► fields, where there is no DWARF
//! ```
//!
//! [`Symbols`] is immutable and shared between threads. Addresses that are given out and taken are those of the running
//! guest: the slide that KASLR has chosen is in them, once [`Symbols::with_slide`] was told. Before that they are as
//! linked.
//!
//! # The slide
//!
//! A kernel that was built with `CONFIG_RANDOMIZE_BASE` moves itself while it boots, unless `nokaslr` is on its command
//! line. What is needed to find out where to is *one* address inside of its image at run time: the program counter of any
//! vCPU that stops in the kernel's half of the address space (a module's code or the BPF JIT's is not in the image), or,
//! once a vCPU has set it, its `MSR_LSTAR`, which is where system calls enter. [`Symbols::find_slide`] then asks the guest's memory.
//! It does so from the first instruction on that runs at the kernel's own addresses.

mod btf;
mod bzimage;
mod dwarf;
mod elf;
mod error;
mod file;
mod kallsyms;
mod kernel;
mod lookup;
mod modules;
mod places;
mod slide;
mod system_map;
mod table;
#[cfg(test)]
mod tests;
mod types;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::kernel::Kernel;
use self::modules::Module;

pub use self::error::{LookupError, SymbolsError};
pub use self::modules::{LoadedModule, ModuleState, ModulesError};
pub use self::table::Class;

/// Linear memory as one vCPU sees it.
pub trait Memory {
    /// Reads from `address` on; returns how many bytes of `into` could be read. What is not mapped ends it.
    fn read(&self, address: u64, into: &mut [u8]) -> usize;
}

/// Where symbols are to come from.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sources<'a> {
    /// The kernel that is booted: ELF or bzImage.
    pub kernel: Option<&'a Path>,
    /// What the user gave: a vmlinux, its debug file, System.map, modules (`.ko`, `.ko.debug`), or directories of these.
    pub symbols: &'a [PathBuf],
    /// Where debug files are, as gdb's `debug-file-directory`. Empty: [`DEBUG_DIRECTORY`].
    pub debug_dirs: &'a [PathBuf],
}

/// Where distributions install debug files.
pub const DEBUG_DIRECTORY: &str = "/usr/lib/debug";

/// Why it is this symbol that was found for a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// The symbol has exactly this name.
    Exact,
    /// The compiler made a version of the function with another signature or for constant arguments (`.isra.0`,
    /// `.constprop.0`), or renamed a local name (`.llvm.123`, `.lto_priv.0`).
    Clone,
    /// The compiler put a part of the function into one of its own (`.part.0`) and inlined the rest: it is reached on some of the
    /// function's paths only.
    Part,
}

/// A symbol that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Symbol {
    /// Its name in the symbol table, with the compiler's suffix if there is one.
    pub name: String,
    /// The module that it is in; none for the kernel itself.
    pub module: Option<Arc<str>>,
    /// Where it is.
    pub address: u64,
    /// Bytes; where the symbol table has no sizes, those to the next symbol.
    pub size: u64,
    /// What kind of memory it is in.
    pub class: Class,
    /// How its name relates to the one that was looked up.
    pub matched: Match,
}

/// An address in terms of a symbol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The module; none for the kernel itself.
    pub module: Option<Arc<str>>,
    /// The symbol's name, with the compiler's suffix if it has one.
    pub symbol: String,
    /// The address less the symbol's; less than `size` unless the address is in the padding behind it.
    pub offset: u64,
    /// The symbol's size in bytes.
    pub size: u64,
}

/// A place in the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceLine {
    /// The function, as the source calls it.
    pub function: String,
    /// Its file, relative to the directory that the kernel was built in if it is below that.
    pub file: Option<String>,
    /// Line, from 1 on.
    pub line: Option<u32>,
    /// Column, from 1 on.
    pub column: Option<u32>,
    /// The function is inlined into that of the next line.
    pub inlined: bool,
}

/// A variable, or a member of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variable {
    /// As it was asked for.
    pub path: String,
    /// The module that it is in; none for the kernel itself.
    pub module: Option<Arc<str>>,
    /// Where it is.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    /// Its type as C writes it, if types are known.
    pub type_name: Option<String>,
    /// What kind of memory it is in.
    pub class: Class,
}

/// A member of a structure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// Bytes from the structure's start.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// Its type as C writes it.
    pub type_name: String,
    /// Number of elements, if it is an array.
    pub elements: Option<u64>,
}

/// The symbols of one kernel and its modules.
#[derive(Debug, Clone)]
pub struct Symbols {
    kernel: Arc<Kernel>,
    slide: u64,
    modules: Arc<[Module]>,
}

impl Symbols {
    /// Reads what `sources` name. A kernel that has no symbols, or is not of a form that symbols are read from, is no
    /// error: each name that is looked up says so.
    ///
    /// # Errors
    ///
    /// A file that was given for its symbols cannot be read, has none, or belongs to another kernel.
    pub fn open(sources: &Sources<'_>) -> Result<Self, SymbolsError> {
        Ok(Self::of(Kernel::open(sources)?))
    }

    /// No symbols at all.
    pub fn none() -> Self {
        Self::of(Kernel::default())
    }

    fn of(kernel: Kernel) -> Self {
        Symbols { kernel: Arc::new(kernel), slide: 0, modules: Arc::new([]) }
    }

    /// Whether there is not one symbol.
    pub fn is_empty(&self) -> bool {
        self.kernel.table.is_empty()
    }

    /// The same, of a kernel that has moved by `slide`.
    pub fn with_slide(&self, slide: u64) -> Self {
        Symbols { slide, ..self.clone() }
    }

    /// By how much the kernel has moved from where it was linked to, as far as is known; wraps.
    pub fn slide(&self) -> u64 {
        self.slide
    }

    /// Where the kernel's image lies as linked, without the slide; empty if that is not known.
    pub fn kernel_range(&self) -> Range<u64> {
        self.kernel.range.clone()
    }

    /// The slide of the kernel that runs in `memory`. `pc` is any address inside of the running kernel's image (see
    /// the module's page). None if the memory at none of the possible places is this kernel's.
    pub fn find_slide(&self, memory: &dyn Memory, pc: u64) -> Option<u64> {
        self.kernel.fingerprint.find(&self.kernel.range, memory, pc)
    }

    /// The kernel's release, as `uname -r` has it.
    pub fn release(&self) -> Option<&str> {
        self.kernel.release.as_deref()
    }

    /// The kernel's GNU build-id.
    pub fn build_id(&self) -> Option<&[u8]> {
        self.kernel.build_id.as_deref()
    }

    /// The files that symbols and debug information come from.
    pub fn files(&self) -> Vec<PathBuf> {
        self.kernel.files()
    }

    fn to_run_time(&self, linked: u64) -> u64 {
        let range = &self.kernel.range;
        if range.contains(&linked) || linked == range.end { linked.wrapping_add(self.slide) } else { linked }
    }

    fn to_linked(&self, address: u64) -> Option<u64> {
        let linked = address.wrapping_sub(self.slide);
        self.kernel.range.contains(&linked).then_some(linked)
    }
}
