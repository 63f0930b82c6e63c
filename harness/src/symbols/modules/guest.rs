//! The list of modules in the guest's memory. All of it is the guest's word: sizes are bounded, and so are lists.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use super::{LoadedModule, ModuleState, ModulesError};
use crate::symbols::{Memory, Symbols};

/// The kernel has fewer modules.
const MOST_MODULES: usize = 4096;

/// A module has fewer symbols.
const MOST_SYMBOLS: u64 = 1 << 19;

/// The names of a module's symbols take less.
const MOST_STRINGS: u64 = 32 << 20;

/// A module's memory is smaller.
const MOST_MEMORY: u64 = 1 << 30;

/// Bytes of an Elf64_Sym.
const ELF_SYMBOL: usize = 24;

/// A symbol that the guest keeps of a module.
#[derive(Debug)]
pub(super) struct GuestSymbol {
    pub(super) name: String,
    pub(super) address: u64,
    pub(super) size: u64,
    /// `nm`'s.
    pub(super) letter: u8,
}

/// Where things are in `struct module`.
struct Layout {
    list: u64,
    name: (u64, u64),
    state: u64,
    memory: MemoryLayout,
    build_id: Option<(u64, u64)>,
    kallsyms: Option<KallsymsLayout>,
}

enum MemoryLayout {
    /// Since 6.4: an array with one entry for each kind of memory.
    Kinds { offset: u64, count: u64, step: u64, base: u64, size: u64 },
    /// Before: one piece that stays and one for the start.
    Two { pieces: [u64; 2], base: u64, size: u64, text_size: u64 },
}

struct KallsymsLayout {
    /// Of the pointer in `struct module`.
    pointer: u64,
    symbols: u64,
    count: u64,
    strings: u64,
    /// Since 5.2; before, the letter is in the symbol's `st_info`.
    letters: Option<u64>,
}

/// `enum mod_mem_type`: code and, from this one on, what is discarded after the start.
const KIND_TEXT: u64 = 0;
const KIND_INIT_TEXT: u64 = 4;

impl Layout {
    fn new(symbols: &Symbols) -> Result<Self, ModulesError> {
        let field = |name, member| symbols.field(name, member).map(|field| field.offset);
        let of_module = |member| field("module", member).ok_or(ModulesError::NoTypes("module"));
        let name = symbols.field("module", "name").ok_or(ModulesError::NoTypes("module"))?;
        let memory = match symbols.field("module", "mem").and_then(|mem| Some((mem.elements.filter(|&n| n > 0)?, mem)))
        {
            Some((count, mem)) => MemoryLayout::Kinds {
                offset: mem.offset,
                count: count.min(64),
                step: mem.size / count,
                base: field("module_memory", "base").ok_or(ModulesError::NoTypes("module_memory"))?,
                size: field("module_memory", "size").ok_or(ModulesError::NoTypes("module_memory"))?,
            },
            None => {
                let of_layout = |member| field("module_layout", member).ok_or(ModulesError::NoTypes("module_layout"));
                MemoryLayout::Two {
                    pieces: [of_module("core_layout")?, of_module("init_layout")?],
                    base: of_layout("base")?,
                    size: of_layout("size")?,
                    text_size: of_layout("text_size")?,
                }
            }
        };
        let kallsyms = || {
            Some(KallsymsLayout {
                pointer: field("module", "kallsyms")?,
                symbols: field("mod_kallsyms", "symtab")?,
                count: field("mod_kallsyms", "num_symtab")?,
                strings: field("mod_kallsyms", "strtab")?,
                letters: field("mod_kallsyms", "typetab"),
            })
        };
        Ok(Layout {
            list: of_module("list")?,
            name: (name.offset, name.size.min(256)),
            state: of_module("state")?,
            memory,
            build_id: symbols.field("module", "build_id").map(|field| (field.offset, field.size.min(64))),
            kallsyms: kallsyms(),
        })
    }
}

impl Symbols {
    /// The modules that the guest has loaded, in the order of its list (the newest first), with the symbols that it
    /// keeps of each. The list is read as it is: stop the guest before, or bear with a list that changes meanwhile.
    ///
    /// # Errors
    ///
    /// These symbols do not tell where and what the list is, or the list is damaged; the error has the modules up to
    /// there.
    pub fn guest_modules(&self, memory: &dyn Memory) -> Result<Vec<LoadedModule>, ModulesError> {
        let head = self.address("modules").ok_or(ModulesError::NoList)?;
        let layout = Layout::new(self)?;
        let mut found = Vec::new();
        let mut seen = HashSet::from([head]);
        let mut at = head;
        loop {
            let Some(next) = pointer(memory, at) else { return Err(ModulesError::Damaged { address: at, found }) };
            if next == head {
                return Ok(found);
            }
            let new = seen.insert(next) && found.len() < MOST_MODULES;
            let module = new.then(|| read_module(memory, next.wrapping_sub(layout.list), &layout)).flatten();
            match module {
                Some(module) => found.push(module),
                None => return Err(ModulesError::Damaged { address: next, found }),
            }
            at = next;
        }
    }
}

fn read_module(memory: &dyn Memory, address: u64, layout: &Layout) -> Option<LoadedModule> {
    let at = |offset: u64| address.wrapping_add(offset);
    let name = bytes(memory, at(layout.name.0), layout.name.1)?;
    let name = name.split(|&byte| byte == 0).next().filter(|name| !name.is_empty())?;
    // A name goes into reports and file names.
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    let name = String::from_utf8(name.to_vec()).ok().filter(|name| name.bytes().all(|byte| allowed(&byte)))?;
    let state = match u32::from_le_bytes(exactly(memory, at(layout.state))?) {
        0 => ModuleState::Live,
        1 => ModuleState::Coming,
        2 => ModuleState::Going,
        _ => ModuleState::Unformed,
    };
    let build_id = layout.build_id.and_then(|(offset, len)| bytes(memory, at(offset), len));
    let mut module = LoadedModule {
        name,
        address,
        state,
        text: Vec::new(),
        memory: Vec::new(),
        init: Vec::new(),
        build_id: build_id.filter(|id| id.iter().any(|&byte| byte != 0)),
        symbols: Arc::new([]),
    };
    if state == ModuleState::Unformed {
        return Some(module);
    }
    read_memory(memory, &mut module, &layout.memory)?;
    if let Some(kallsyms) = &layout.kallsyms {
        module.symbols = read_symbols(memory, address, kallsyms).unwrap_or_default().into();
    }
    Some(module)
}

fn read_memory(memory: &dyn Memory, module: &mut LoadedModule, layout: &MemoryLayout) -> Option<()> {
    let address = module.address;
    let read = |from: u64, base: u64, size: u64| {
        let base = pointer(memory, from.wrapping_add(base))?;
        let size = u64::from(u32::from_le_bytes(exactly(memory, from.wrapping_add(size))?));
        Some((base, size.min(MOST_MEMORY)))
    };
    match *layout {
        MemoryLayout::Kinds { offset, count, step, base, size } => {
            for kind in 0..count {
                let from = address.wrapping_add(offset).wrapping_add(kind.wrapping_mul(step));
                let Some(range) = range(read(from, base, size)?) else { continue };
                if kind == KIND_TEXT || kind == KIND_INIT_TEXT {
                    module.text.push(range.clone());
                }
                if kind >= KIND_INIT_TEXT {
                    module.init.push(range.clone());
                }
                module.memory.push(range);
            }
        }
        MemoryLayout::Two { pieces, base, size, text_size } => {
            for (index, piece) in pieces.into_iter().enumerate() {
                let from = address.wrapping_add(piece);
                let Some(all) = range(read(from, base, size)?) else { continue };
                module.text.extend(range(read(from, base, text_size)?));
                if index == 1 {
                    module.init.push(all.clone());
                }
                module.memory.push(all);
            }
        }
    }
    Some(())
}

/// Nothing is empty, at 0 or beyond the end of the address space.
fn range((base, size): (u64, u64)) -> Option<Range<u64>> {
    let end = base.checked_add(size)?;
    (base != 0 && size != 0).then_some(base..end)
}

fn read_symbols(memory: &dyn Memory, module: u64, layout: &KallsymsLayout) -> Option<Vec<GuestSymbol>> {
    let kallsyms = pointer(memory, module.wrapping_add(layout.pointer)).filter(|&at| at != 0)?;
    let at = |offset: u64| kallsyms.wrapping_add(offset);
    let count = u64::from(u32::from_le_bytes(exactly(memory, at(layout.count))?)).min(MOST_SYMBOLS);
    let table = bytes(memory, pointer(memory, at(layout.symbols))?, count.checked_mul(ELF_SYMBOL as u64)?)?;
    let letters = match layout.letters {
        Some(letters) => Some(bytes(memory, pointer(memory, at(letters))?, count)?),
        None => None,
    };
    let (symbols, _) = table.as_chunks::<ELF_SYMBOL>();
    let name_at =
        |symbol: &[u8; ELF_SYMBOL]| u64::from(u32::from_le_bytes([symbol[0], symbol[1], symbol[2], symbol[3]]));
    let last = symbols.iter().map(name_at).max()?;
    let strings = at_most(memory, pointer(memory, at(layout.strings))?, (last + 512).min(MOST_STRINGS));
    let mut found = Vec::new();
    for (index, symbol) in symbols.iter().enumerate() {
        let [_, _, _, _, info, _, section, section_high, rest @ ..] = symbol;
        let (value, size) = rest.split_first_chunk::<8>()?;
        let letter = letters.as_ref().map_or(Some(*info), |letters| letters.get(index).copied());
        let name = strings.get(usize::try_from(name_at(symbol)).ok()?..);
        let name = name.and_then(|text| text.split(|&byte| byte == 0).next()).unwrap_or_default();
        let (Some(letter), Ok(name)) = (letter, std::str::from_utf8(name)) else { continue };
        let undefined = (*section, *section_high) == (0, 0) || letter.eq_ignore_ascii_case(&b'u');
        if name.is_empty() || name.len() > 512 || undefined || !letter.is_ascii_alphabetic() {
            continue;
        }
        found.push(GuestSymbol {
            name: name.to_owned(),
            address: u64::from_le_bytes(*value),
            size: u64::from_le_bytes(size.try_into().ok()?),
            letter,
        });
    }
    Some(found)
}

fn exactly<const N: usize>(memory: &dyn Memory, address: u64) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    (memory.read(address, &mut bytes) == N).then_some(bytes)
}

fn pointer(memory: &dyn Memory, address: u64) -> Option<u64> {
    exactly(memory, address).map(u64::from_le_bytes)
}

/// Exactly so many bytes.
fn bytes(memory: &dyn Memory, address: u64, len: u64) -> Option<Vec<u8>> {
    let bytes = at_most(memory, address, len);
    (bytes.len() as u64 == len).then_some(bytes)
}

/// So many bytes, or up to where they end. Read in pieces, so that a size alone costs no memory.
fn at_most(memory: &dyn Memory, address: u64, len: u64) -> Vec<u8> {
    const PIECE: usize = 1 << 20;
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < len {
        let start = bytes.len();
        let piece = PIECE.min(usize::try_from(len - start as u64).unwrap_or(PIECE));
        bytes.resize(start + piece, 0);
        let read = memory.read(address.wrapping_add(start as u64), bytes.get_mut(start..).unwrap_or_default());
        if read < piece {
            bytes.truncate(start + read);
            break;
        }
    }
    bytes
}
