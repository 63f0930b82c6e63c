//! An ELF file: its sections, decompressed when they are first asked for, and its symbols.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use object::read::elf::{ElfFile, FileHeader};
use object::{
    Object, ObjectKind, ObjectSection, ObjectSegment, ObjectSymbol, RelocationKind, RelocationTarget, SectionFlags,
    SectionIndex, SymbolKind, elf,
};

use super::error::SymbolsError;
use super::file::Bytes;
use super::table::{Builder, Class, Kind, Raw, Table};

/// A section's contents are decompressed up to this; a header that says more is damaged.
const MOST_DECOMPRESSED: u64 = 8 << 30;

/// One ELF file.
#[derive(Debug)]
pub(super) struct Elf {
    path: PathBuf,
    bytes: Arc<Bytes>,
    /// Relocatable: a module before it is loaded.
    pub(super) relocatable: bool,
    /// Linux's linker scripts made it, and so section names mean what they mean there.
    linux: bool,
    sections: Vec<Section>,
    build_id: Option<Vec<u8>>,
    debuglink: Option<String>,
}

/// One section.
#[derive(Debug)]
pub(super) struct Section {
    pub(super) name: String,
    /// As linked; of a module, where it was loaded.
    pub(super) address: u64,
    pub(super) size: u64,
    /// It is part of the running kernel's or module's memory.
    pub(super) alloc: bool,
    exec: bool,
    write: bool,
    /// Where its bytes are in the file; none for zeroed data.
    file: Range<usize>,
    compressed: bool,
    index: SectionIndex,
    /// Decompressed or relocated contents.
    made: OnceLock<Vec<u8>>,
}

impl Section {
    pub(super) fn range(&self) -> Range<u64> {
        self.address..self.address.saturating_add(self.size)
    }

    pub(super) fn is_code(&self) -> bool {
        self.exec
    }

    fn is_percpu(&self) -> bool {
        self.name.starts_with(".data..percpu") || self.name.starts_with(".data.percpu")
    }

    fn has_contents(&self) -> bool {
        !self.file.is_empty() || self.made.get().is_some_and(|made| !made.is_empty())
    }
}

impl Elf {
    /// Reads headers only.
    pub(super) fn parse(path: &Path, bytes: Arc<Bytes>) -> Result<Self, SymbolsError> {
        let bad = |why: object::Error| SymbolsError::bad(path, format!("not a sound ELF file: {why}"));
        let kind = object::FileKind::parse(&**bytes).map_err(bad)?;
        let mut elf = match kind {
            object::FileKind::Elf64 => {
                Self::sections_of::<elf::FileHeader64<object::Endianness>>(&bytes).map_err(bad)?
            }
            object::FileKind::Elf32 => {
                Self::sections_of::<elf::FileHeader32<object::Endianness>>(&bytes).map_err(bad)?
            }
            _ => return Err(SymbolsError::bad(path, "not an ELF file")),
        };
        elf.path = path.to_owned();
        elf.bytes = bytes;
        Ok(elf)
    }

    fn sections_of<H: FileHeader<Endian = object::Endianness>>(bytes: &[u8]) -> Result<Self, object::Error> {
        let file = ElfFile::<H>::parse(bytes)?;
        let mut sections = Vec::new();
        for section in file.sections() {
            let SectionFlags::Elf { sh_flags, sh_type } = section.flags() else { continue };
            let name = String::from_utf8_lossy(section.name_bytes().unwrap_or_default()).into_owned();
            let range = section.compressed_file_range();
            let compressed = range.as_ref().is_ok_and(|range| range.format != object::CompressionFormat::None);
            let size = match &range {
                Ok(range) if compressed => range.uncompressed_size,
                _ => section.size(),
            };
            let flag = |flag| sh_flags.0 & flag != 0;
            sections.push(Section {
                name: match name.strip_prefix(".zdebug_") {
                    Some(rest) => format!(".debug_{rest}"),
                    None => name,
                },
                address: section.address(),
                size,
                alloc: flag(elf::SHF_ALLOC.0),
                exec: flag(elf::SHF_EXECINSTR.0),
                write: flag(elf::SHF_WRITE.0),
                file: contents(sh_type == elf::SHT_NOBITS, section.file_range(), bytes.len()),
                compressed,
                index: section.index(),
                made: OnceLock::new(),
            });
        }
        if !sections.iter().any(|section| section.alloc) {
            sections.extend(file.segments().enumerate().map(|(number, segment)| Section {
                name: format!("segment {number}"),
                address: segment.address(),
                size: segment.size(),
                alloc: true,
                exec: segment.permissions().executable(),
                write: segment.permissions().writable(),
                file: contents(false, Some(segment.file_range()), bytes.len()),
                compressed: false,
                // No section of the file.
                index: SectionIndex(usize::MAX),
                made: OnceLock::new(),
            }));
        }
        let relocatable = file.kind() == ObjectKind::Relocatable;
        let linux = |section: &Section| section.name == "__ksymtab" || section.name == ".init.text";
        Ok(Elf {
            path: PathBuf::new(),
            bytes: Arc::new(Bytes::Owned(Vec::new())),
            relocatable,
            linux: relocatable || sections.iter().any(linux),
            sections,
            build_id: file.build_id().ok().flatten().map(<[u8]>::to_vec),
            debuglink: file.gnu_debuglink().ok().flatten().map(|(name, _)| String::from_utf8_lossy(name).into_owned()),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn build_id(&self) -> Option<&[u8]> {
        self.build_id.as_deref()
    }

    /// Name of the file with its debug information, if it names one.
    pub(super) fn debuglink(&self) -> Option<&str> {
        self.debuglink.as_deref()
    }

    pub(super) fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The first section of this name that has contents.
    pub(super) fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.name == name && section.has_contents())
    }

    /// A section's contents; empty if it has none or they are damaged.
    pub(super) fn contents<'a>(&'a self, section: &'a Section) -> &'a [u8] {
        if let Some(made) = section.made.get() {
            return made;
        }
        if section.compressed {
            return section.made.get_or_init(|| self.decompress(section).unwrap_or_default());
        }
        self.bytes.get(section.file.clone()).unwrap_or_default()
    }

    /// Contents by name; empty if there is no such section.
    pub(super) fn data(&self, name: &str) -> &[u8] {
        self.section(name).map_or(&[], |section| self.contents(section))
    }

    fn decompress(&self, section: &Section) -> Option<Vec<u8>> {
        let file = object::File::parse(&**self.bytes).ok()?;
        let section = file.section_by_index(section.index).ok()?;
        let data = section.compressed_data().ok()?;
        if data.uncompressed_size > MOST_DECOMPRESSED {
            return None;
        }
        data.decompress().ok().map(Cow::into_owned)
    }

    /// What the image holds at this address as linked, up to the end of the section; none if it is zeroed data or
    /// outside of the file.
    pub(super) fn linked(&self, address: u64) -> Option<&[u8]> {
        let section = self
            .sections
            .iter()
            .find(|section| section.alloc && section.has_contents() && section.range().contains(&address))?;
        let from = usize::try_from(address.checked_sub(section.address)?).ok()?;
        self.contents(section).get(from..)
    }

    /// Whether it has what is loaded into memory, and not its debug information alone.
    pub(super) fn has_image(&self) -> bool {
        self.sections.iter().any(|section| section.alloc && section.exec && section.has_contents())
    }

    /// Whether it has a symbol table.
    pub(super) fn has_symbols(&self) -> bool {
        self.section(".symtab").is_some()
    }

    /// Whether it has DWARF.
    pub(super) fn has_dwarf(&self) -> bool {
        self.section(".debug_info").is_some()
    }

    /// The value of a symbol, by going through all of them.
    pub(super) fn address_of(&self, name: &str) -> Option<u64> {
        let file = object::File::parse(&**self.bytes).ok()?;
        let symbol = file.symbols().find(|symbol| symbol.name() == Ok(name));
        symbol.map(|symbol| symbol.address())
    }

    /// Its symbol table. Damaged symbols are left out.
    pub(super) fn table(&self) -> Table {
        let mut builder = Builder::default();
        self.each_symbol(|raw| builder.add(raw));
        builder.build(&self.bounds())
    }

    /// Calls `with` for each of its symbols. Those of a module are where its sections were placed.
    pub(super) fn each_symbol(&self, mut with: impl FnMut(&Raw<'_>)) {
        let Ok(file) = object::File::parse(&**self.bytes) else { return };
        let init = match (self.linux, self.address_of("__init_begin"), self.address_of("__init_end")) {
            (true, Some(begin), Some(end)) => begin..end,
            _ => 0..0,
        };
        let classes: Vec<Class> = self.sections.iter().map(|section| self.class(section, &init)).collect();
        for symbol in file.symbols().filter(|symbol| !symbol.is_undefined()) {
            let kind = match symbol.kind() {
                SymbolKind::Text => Kind::Function,
                SymbolKind::Data | SymbolKind::Tls => Kind::Variable,
                SymbolKind::Unknown | SymbolKind::Label => Kind::Unknown,
                _ => continue,
            };
            let section = symbol.section_index().and_then(|index| self.position(index));
            let base = match section.and_then(|position| self.sections.get(position)) {
                Some(section) if self.relocatable => section.address,
                _ => 0,
            };
            let Ok(name) = symbol.name() else { continue };
            with(&Raw {
                name,
                address: symbol.address().wrapping_add(base),
                size: symbol.size(),
                kind,
                class: section.and_then(|position| classes.get(position).copied()).unwrap_or(Class::Absolute),
                global: !symbol.is_local(),
            });
        }
    }

    /// Calls `with` for each symbol that is in a section: its name, the section's number and its value, which in a
    /// module is its offset in the section.
    pub(super) fn each_in_section(&self, mut with: impl FnMut(&str, usize, u64)) {
        let Ok(file) = object::File::parse(&**self.bytes) else { return };
        for symbol in file.symbols().filter(|symbol| !symbol.is_undefined()) {
            if let (Ok(name), Some(index)) = (symbol.name(), symbol.section_index())
                && !name.is_empty()
            {
                with(name, index.0, symbol.address());
            }
        }
    }

    /// Where in `sections` the one with this index is.
    fn position(&self, index: SectionIndex) -> Option<usize> {
        self.sections.binary_search_by_key(&index.0, |section| section.index.0).ok()
    }

    /// A module with its sections at `places`, by their numbers: what refers to them is relocated in the debug
    /// information. Sections without a place are taken out of the image.
    pub(super) fn placed(&self, places: &HashMap<usize, u64>) -> Option<Self> {
        let mut placed = Elf::parse(&self.path, Arc::clone(&self.bytes)).ok()?;
        for section in &mut placed.sections {
            match places.get(&section.index.0) {
                Some(&address) => section.address = address,
                None => section.alloc = false,
            }
        }
        let file = object::File::parse(&**self.bytes).ok()?;
        for section in file.sections() {
            let Some(own) = placed.position(section.index()).and_then(|at| placed.sections.get(at)) else { continue };
            if own.name.starts_with(".debug_") && !own.file.is_empty() {
                let contents = placed.relocated(&file, &section).unwrap_or_default();
                // Nobody else has this file yet.
                let _ = own.made.set(contents);
            }
        }
        Some(placed)
    }

    /// The contents of a section of debug information after relocation.
    fn relocated<'a>(&self, file: &object::File<'a>, section: &object::Section<'a, '_>) -> Option<Vec<u8>> {
        let data = section.compressed_data().ok()?;
        if data.uncompressed_size > MOST_DECOMPRESSED {
            return None;
        }
        let mut contents = data.decompress().ok()?.into_owned();
        for (offset, relocation) in section.relocations() {
            let RelocationTarget::Symbol(index) = relocation.target() else { continue };
            let Ok(symbol) = file.symbol_by_index(index) else { continue };
            let section = symbol.section_index().and_then(|index| self.position(index));
            let base = section.and_then(|at| self.sections.get(at)).filter(|section| section.alloc);
            let base = base.map(|section| section.address).unwrap_or_default();
            let value = base.wrapping_add(symbol.address()).wrapping_add_signed(relocation.addend());
            if relocation.kind() != RelocationKind::Absolute {
                continue;
            }
            let Ok(at) = usize::try_from(offset) else { continue };
            let bytes = value.to_le_bytes();
            let len = usize::from(relocation.size() / 8).min(bytes.len());
            let into = at.checked_add(len).and_then(|end| contents.get_mut(at..end));
            if let (Some(into), Some(from)) = (into, bytes.get(..len)) {
                into.copy_from_slice(from);
            }
        }
        Some(contents)
    }

    /// The sections that are in memory as linked.
    pub(super) fn bounds(&self) -> Vec<Range<u64>> {
        self.sections.iter().filter(|section| section.alloc && section.size > 0).map(Section::range).collect()
    }

    /// From the lowest to the highest address of the image; per-cpu variables may be linked elsewhere.
    pub(super) fn range(&self) -> Range<u64> {
        let sections =
            || self.sections.iter().filter(|section| section.alloc && section.size > 0 && !section.is_percpu());
        let start = sections().map(|section| section.address).min().unwrap_or_default();
        let end = sections().map(|section| section.range().end).max().unwrap_or_default();
        start..end
    }

    /// Name of the section at this address.
    pub(super) fn section_at(&self, address: u64) -> Option<&Section> {
        self.sections.iter().find(|section| section.alloc && section.range().contains(&address))
    }

    /// The class of what is at this address.
    pub(super) fn class_at(&self, address: u64, init: &Range<u64>) -> Option<Class> {
        self.section_at(address).map(|section| self.class(section, init))
    }

    /// The class of a section's symbols. `init` is what is discarded after boot.
    pub(super) fn class(&self, section: &Section, init: &Range<u64>) -> Class {
        let name = section.name.as_str();
        let linux = self.linux;
        if !section.alloc {
            Class::Absolute
        } else if section.is_percpu() {
            Class::PerCpu
        } else if linux && name.starts_with(".exit.") && section.exec {
            Class::ExitText
        } else if linux && name.starts_with(".init.") || init.contains(&section.address) {
            if section.exec { Class::InitText } else { Class::InitData }
        } else if section.exec {
            Class::Text
        } else if section.write && !name.starts_with(".rodata") {
            Class::Data
        } else {
            Class::ReadOnly
        }
    }
}

fn contents(zeroed: bool, range: Option<(u64, u64)>, len: usize) -> Range<usize> {
    let none = 0..0;
    if zeroed {
        return none;
    }
    let Some((start, size)) = range else { return none };
    let (Ok(start), Ok(size)) = (usize::try_from(start), usize::try_from(size)) else { return none };
    match start.checked_add(size) {
        Some(end) if end <= len => start..end,
        _ => none,
    }
}
