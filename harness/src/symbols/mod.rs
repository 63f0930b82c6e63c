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

mod dwarf;
mod elf;
mod error;
mod file;
mod slide;
mod system_map;
mod table;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::dwarf::Dwarf;
use self::elf::Elf;
use self::file::Bytes;
use self::slide::Fingerprint;
use self::table::{Entry, Table};

pub use self::error::{LookupError, SymbolsError};
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
}

/// What was read of the kernel, by addresses as linked.
#[derive(Debug, Default)]
struct Kernel {
    table: Table,
    /// What is booted, or a vmlinux that holds the same.
    image: Option<Arc<Elf>>,
    /// With debug information: the image itself or a file beside it.
    dwarf: Option<Dwarf>,
    range: Range<u64>,
    fingerprint: Fingerprint,
    release: Option<String>,
    build_id: Option<Vec<u8>>,
    /// Why there is no table.
    nothing: Option<String>,
}

impl Symbols {
    /// Reads what `sources` name. A kernel that has no symbols, or is not of a form that symbols are read from, is no
    /// error: each name that is looked up says so.
    ///
    /// # Errors
    ///
    /// A file that was given for its symbols cannot be read, has none, or belongs to another kernel.
    pub fn open(sources: &Sources<'_>) -> Result<Self, SymbolsError> {
        let mut kernel = Kernel::default();
        if let Some(path) = sources.kernel {
            kernel.add_kernel(path)?;
        }
        for path in sources.symbols {
            kernel.add_symbols(path)?;
        }
        kernel.finish();
        Ok(Symbols { kernel: Arc::new(kernel), slide: 0 })
    }

    /// No symbols at all.
    pub fn none() -> Self {
        Symbols { kernel: Arc::new(Kernel::default()), slide: 0 }
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

    /// The functions of this name: several if several files have a static one of the name, or the compiler made
    /// clones. Sorted by address, each address once. `MODULE:NAME` looks in that module only.
    ///
    /// # Errors
    ///
    /// There is none, or none that can be trapped: the error says which and what to do.
    pub fn functions(&self, name: &str) -> Result<Vec<Symbol>, LookupError> {
        let found = self.found(name)?;
        let functions: Vec<&Symbol> =
            found.iter().filter(|(_, function)| *function).map(|(symbol, _)| symbol).collect();
        if functions.is_empty() {
            return Err(LookupError::NotAFunction { name: name.to_owned() });
        }
        let lasting: Vec<Symbol> =
            functions.iter().filter(|symbol| !self.discarded(symbol)).map(|&symbol| symbol.clone()).collect();
        match (lasting.is_empty(), functions.first()) {
            (true, Some(first)) => Err(self.init(name, first)),
            _ => Ok(lasting),
        }
    }

    /// All symbols of this name, whatever they are.
    pub fn find(&self, name: &str) -> Vec<Symbol> {
        self.found(name).unwrap_or_default().into_iter().map(|(symbol, _)| symbol).collect()
    }

    /// The address of a symbol of any kind; of several the lowest. None for numbers and per-cpu variables, which have none.
    pub fn address(&self, name: &str) -> Option<u64> {
        let has_address = |entry: &&Entry| !matches!(entry.class, Class::Absolute | Class::PerCpu);
        let entry = self.kernel.table.named(name).find(has_address)?;
        Some(self.to_run_time(entry.address))
    }

    /// What the address is in: the symbol that reaches over it, else the one before. Of several at one place a global one is
    /// preferred; padding (`__pfx_`) and per-cpu variables are never given.
    pub fn locate(&self, address: u64) -> Option<Location> {
        let linked = self.to_linked(address)?;
        let table = &self.kernel.table;
        let entry = table.at(linked)?;
        Some(Location {
            module: None,
            symbol: table.name(entry).to_owned(),
            offset: linked.wrapping_sub(entry.address),
            size: entry.size,
        })
    }

    /// The source lines of an address: the innermost inlined function first, and at last the function that the code is
    /// in. Empty if there is no debug information for it.
    ///
    /// A return address belongs to the call before it: ask for the address less one.
    pub fn lines(&self, address: u64) -> Vec<SourceLine> {
        let Some(linked) = self.to_linked(address) else { return Vec::new() };
        let mut lines = self.kernel.dwarf.as_ref().map(|dwarf| dwarf.lines(linked)).unwrap_or_default();
        for line in lines.iter_mut().filter(|line| line.function.is_empty()) {
            line.function = self.locate(address).map(|location| location.symbol).unwrap_or_default();
        }
        lines
    }

    /// Contents of a section of the kernel as linked, with the section's run-time address: `.orc_unwind`, `.rodata`, ..
    pub fn section(&self, name: &str) -> Option<(u64, &[u8])> {
        let kernel = &self.kernel;
        let elves = kernel.image.iter().chain(kernel.dwarf.as_ref().map(Dwarf::elf));
        let (elf, section) = elves.filter_map(|elf| Some((elf, elf.section(name)?))).next()?;
        let address = if section.alloc { self.to_run_time(section.address) } else { 0 };
        Some((address, elf.contents(section)))
    }

    /// What the kernel's image holds at a run-time address as linked, up to the end of the section. The running
    /// guest may have patched or relocated it since.
    pub fn linked_bytes(&self, address: u64) -> Option<&[u8]> {
        self.kernel.image.as_ref()?.linked(self.to_linked(address)?)
    }

    /// Every symbol that is called so, and whether it is a function.
    fn found(&self, name: &str) -> Result<Vec<(Symbol, bool)>, LookupError> {
        let table = &self.kernel.table;
        if table.is_empty() {
            return Err(LookupError::NoSymbols { why: self.kernel.nothing.clone() });
        }
        let mut found: Vec<(Symbol, bool)> =
            table.named(name).map(|entry| (self.symbol(entry, Match::Exact), entry.is_function())).collect();
        let suffixed = table.suffixed(name);
        let of = |wanted: Match| {
            suffixed
                .iter()
                .filter(move |(_, suffix)| suffix_means(suffix) == Some(wanted))
                .map(move |(entry, _)| (self.symbol(entry, wanted), entry.is_function()))
        };
        found.extend(of(Match::Clone));
        if found.is_empty() {
            found.extend(of(Match::Part));
        }
        if found.is_empty() {
            return Err(LookupError::Missing { name: name.to_owned(), similar: table.similar(name, SIMILAR) });
        }
        found.sort_by_key(|(symbol, _)| symbol.address);
        found.dedup_by_key(|(symbol, _)| symbol.address);
        Ok(found)
    }

    fn symbol(&self, entry: &Entry, matched: Match) -> Symbol {
        let address = match entry.class {
            Class::PerCpu | Class::Absolute => entry.address,
            _ => self.to_run_time(entry.address),
        };
        Symbol {
            name: self.kernel.table.name(entry).to_owned(),
            module: None,
            address,
            size: entry.size,
            class: entry.class,
            matched,
        }
    }

    /// Whether the symbol's memory is given back after boot.
    fn discarded(&self, symbol: &Symbol) -> bool {
        match symbol.class {
            Class::InitText | Class::InitData => true,
            // A module keeps it until it is unloaded.
            Class::ExitText => symbol.module.is_none(),
            _ => false,
        }
    }

    fn init(&self, name: &str, symbol: &Symbol) -> LookupError {
        let linked = self.to_linked(symbol.address).unwrap_or(symbol.address);
        let section = self.kernel.image.as_ref().and_then(|image| image.section_at(linked));
        let section = section.map(|section| section.name.as_str()).unwrap_or(match symbol.class {
            Class::InitText => ".init.text",
            Class::ExitText => ".exit.text",
            _ => ".init.data",
        });
        LookupError::Init { name: name.to_owned(), section: section.to_owned() }
    }

    fn to_run_time(&self, linked: u64) -> u64 {
        if self.kernel.range.contains(&linked) || linked == self.kernel.range.end {
            linked.wrapping_add(self.slide)
        } else {
            linked
        }
    }

    fn to_linked(&self, address: u64) -> Option<u64> {
        let linked = address.wrapping_sub(self.slide);
        self.kernel.range.contains(&linked).then_some(linked)
    }
}

/// So many similar names are told.
const SIMILAR: usize = 5;

/// What a suffix that the compiler put behind a name says; none if it is not the function or variable itself.
fn suffix_means(suffix: &str) -> Option<Match> {
    let mut meaning = Match::Clone;
    for part in suffix.split('.').filter(|part| !part.is_empty()) {
        match part {
            "part" => meaning = Match::Part,
            "isra" | "constprop" | "lto_priv" | "llvm" | "localalias" => {}
            // Not entered by a call: the unlikely half of the function, split off.
            "cold" => return None,
            number if number.bytes().all(|byte| byte.is_ascii_digit()) => {}
            _ => return None,
        }
    }
    Some(meaning)
}

impl Kernel {
    fn add_kernel(&mut self, path: &Path) -> Result<(), SymbolsError> {
        let bytes = Bytes::map(path).map_err(|error| SymbolsError::open(path, error))?;
        if !bytes.starts_with(b"\x7fELF") {
            self.nothing = Some(format!("{} is not an ELF file", path.display()));
            return Ok(());
        }
        let elf = Arc::new(Elf::parse(path, Arc::new(bytes))?);
        if !elf.has_symbols() {
            self.nothing = Some(format!("{} is stripped", path.display()));
        }
        self.take(&elf);
        Ok(())
    }

    fn add_symbols(&mut self, path: &Path) -> Result<(), SymbolsError> {
        let bytes = Bytes::map(path).map_err(|error| SymbolsError::open(path, error))?;
        if bytes.starts_with(b"\x7fELF") {
            let elf = Arc::new(Elf::parse(path, Arc::new(bytes))?);
            self.same_build(&elf)?;
            if !elf.has_symbols() {
                return Err(SymbolsError::bad(path, "has no symbol table; give the file before it was stripped"));
            }
            self.take(&elf);
        } else if system_map::is_one(&bytes) {
            let table = system_map::parse(path, &bytes)?;
            if self.table.is_empty() {
                self.table = table;
            }
        } else {
            return Err(SymbolsError::bad(path, "neither ELF (vmlinux, a module) nor System.map"));
        }
        Ok(())
    }

    fn same_build(&self, elf: &Elf) -> Result<(), SymbolsError> {
        let (Some(ours), Some(theirs), Some(image)) = (self.build_id.as_deref(), elf.build_id(), &self.image) else {
            return Ok(());
        };
        if ours == theirs {
            return Ok(());
        }
        Err(SymbolsError::OtherKernel {
            path: elf.path().to_owned(),
            theirs: format!("build-id {}", hex(theirs)),
            kernel: image.path().to_owned(),
            ours: format!("build-id {}", hex(ours)),
        })
    }

    /// Takes what `elf` has and was not had before.
    fn take(&mut self, elf: &Arc<Elf>) {
        if elf.has_symbols() && self.table.is_empty() {
            self.table = elf.table();
        }
        if self.dwarf.is_none() {
            self.dwarf = Dwarf::of(elf);
        }
        if self.image.is_none() {
            self.image = Some(Arc::clone(elf));
        }
        if self.build_id.is_none() {
            self.build_id = elf.build_id().map(<[u8]>::to_vec);
        }
    }

    /// Works out what follows from what was read.
    fn finish(&mut self) {
        let named = |name: &str| self.table.named(name).map(|entry| entry.address).next();
        self.range = match (named("_text"), named("_end")) {
            (Some(text), Some(end)) if text < end => text..end,
            _ => self.image.as_ref().map(|image| spanned(&image.bounds())).unwrap_or_else(|| self.table.span()),
        };
        self.fingerprint = Fingerprint::new(named("linux_banner"), self.image.as_deref());
        let banner = named("linux_banner").and_then(|address| self.image.as_ref()?.linked(address));
        self.release = banner.and_then(release_of);
    }
}

/// From the lowest to the highest of these ranges.
fn spanned(ranges: &[Range<u64>]) -> Range<u64> {
    let start = ranges.iter().map(|range| range.start).min().unwrap_or_default();
    let end = ranges.iter().map(|range| range.end).max().unwrap_or_default();
    start..end
}

/// The release in `Linux version RELEASE (..`.
fn release_of(banner: &[u8]) -> Option<String> {
    let rest = banner.strip_prefix(b"Linux version ")?;
    let release = rest.split(|&byte| byte == b' ' || byte == 0).next()?;
    std::str::from_utf8(release).ok().filter(|release| release.len() < 256).map(str::to_owned)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
