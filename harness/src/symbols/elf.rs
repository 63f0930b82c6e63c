//! An ELF file: its sections, decompressed when they are first asked for, and its symbols.

use std::borrow::Cow;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use object::read::elf::{ElfFile, FileHeader};
use object::{Object, ObjectKind, ObjectSection, ObjectSymbol, SectionFlags, SectionIndex, SymbolKind, elf};

use super::error::SymbolsError;
use super::file::Bytes;
use super::table::{Class, Kind, Raw, Table};

/// A section's contents are decompressed up to this; a header that says more is damaged.
const MOST_DECOMPRESSED: u64 = 8 << 30;

/// One ELF file.
#[derive(Debug)]
pub(super) struct Elf {
    path: PathBuf,
    bytes: Arc<Bytes>,
    /// Relocatable: a module before it is loaded.
    pub(super) relocatable: bool,
    sections: Vec<Section>,
    build_id: Option<Vec<u8>>,
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
        Ok(Elf {
            path: PathBuf::new(),
            bytes: Arc::new(Bytes::Owned(Vec::new())),
            relocatable: file.kind() == ObjectKind::Relocatable,
            sections,
            build_id: file.build_id().ok().flatten().map(<[u8]>::to_vec),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn build_id(&self) -> Option<&[u8]> {
        self.build_id.as_deref()
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

    /// Whether it has a symbol table.
    pub(super) fn has_symbols(&self) -> bool {
        self.section(".symtab").is_some()
    }

    /// Whether it has DWARF.
    pub(super) fn has_dwarf(&self) -> bool {
        self.section(".debug_info").is_some()
    }

    /// Its symbol table. Damaged symbols are left out.
    pub(super) fn table(&self) -> Table {
        let Ok(file) = object::File::parse(&**self.bytes) else { return Table::default() };
        let named = |name: &str| file.symbols().find(|symbol| symbol.name() == Ok(name)).map(|symbol| symbol.address());
        let init = match (self.linux(), named("__init_begin"), named("__init_end")) {
            (true, Some(begin), Some(end)) => begin..end,
            _ => 0..0,
        };
        let classes: Vec<(SectionIndex, Class)> =
            self.sections.iter().map(|section| (section.index, self.class(section, &init))).collect();
        let by_index = |index: SectionIndex| {
            // Sections stand in the order of their indices.
            let at = classes.binary_search_by_key(&index.0, |(index, _)| index.0).ok()?;
            classes.get(at).map(|&(_, class)| class)
        };
        let symbols = file.symbols().filter_map(|symbol| {
            let kind = match symbol.kind() {
                SymbolKind::Text => Kind::Function,
                SymbolKind::Data | SymbolKind::Tls => Kind::Variable,
                SymbolKind::Unknown | SymbolKind::Label => Kind::Unknown,
                _ => return None,
            };
            if symbol.is_undefined() {
                return None;
            }
            Some(Raw {
                name: symbol.name().ok()?,
                address: symbol.address(),
                size: symbol.size(),
                kind,
                class: symbol.section_index().and_then(by_index).unwrap_or(Class::Absolute),
                global: !symbol.is_local(),
            })
        });
        Table::new(symbols, &self.bounds())
    }

    /// The sections that are in memory as linked.
    pub(super) fn bounds(&self) -> Vec<Range<u64>> {
        self.sections.iter().filter(|section| section.alloc && section.size > 0).map(Section::range).collect()
    }

    /// Name of the section at this address.
    pub(super) fn section_at(&self, address: u64) -> Option<&Section> {
        self.sections.iter().find(|section| section.alloc && section.range().contains(&address))
    }

    /// Linux's linker script made it, and so its names mean what they mean there.
    fn linux(&self) -> bool {
        self.relocatable
            || self.sections.iter().any(|section| section.name == "__ksymtab" || section.name == ".init.text")
    }

    /// The class of a section's symbols. `init` is what is discarded after boot.
    pub(super) fn class(&self, section: &Section, init: &Range<u64>) -> Class {
        let name = section.name.as_str();
        let linux = self.linux();
        if !section.alloc {
            Class::Absolute
        } else if name.starts_with(".data..percpu") || name.starts_with(".data.percpu") {
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
