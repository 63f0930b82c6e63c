//! One table of symbols, whatever it was read from: by name and by address.

use std::cmp::Reverse;
use std::ops::Range;

/// What kind of memory a symbol is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// Code that stays.
    Text,
    /// Data that is not written to.
    ReadOnly,
    /// Data, zeroed data included.
    Data,
    /// Code that is discarded after boot, or after the module's start.
    InitText,
    /// Data that is discarded after boot, or after the module's start.
    InitData,
    /// Code that runs only when a module is unloaded; in a kernel's image it is discarded after boot.
    ExitText,
    /// A per-cpu variable: the address is that of a template or an offset.
    PerCpu,
    /// A number, not an address.
    Absolute,
}

impl Class {
    /// Whether code is there.
    pub fn is_code(self) -> bool {
        matches!(self, Class::Text | Class::InitText | Class::ExitText)
    }
}

/// What a symbol says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Function,
    Variable,
    /// The source does not tell: it follows from where the symbol is.
    Unknown,
}

/// A symbol as its source has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Raw<'a> {
    pub(super) name: &'a str,
    pub(super) address: u64,
    /// 0: unknown.
    pub(super) size: u64,
    pub(super) kind: Kind,
    pub(super) class: Class,
    pub(super) global: bool,
}

/// A symbol in the table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) address: u64,
    pub(super) size: u64,
    name: (u32, u32),
    pub(super) class: Class,
    pub(super) kind: Kind,
    pub(super) global: bool,
}

impl Entry {
    pub(super) fn is_function(&self) -> bool {
        match self.kind {
            Kind::Function => true,
            Kind::Variable => false,
            Kind::Unknown => self.class.is_code(),
        }
    }
}

/// Symbols, sorted by address and by name.
#[derive(Debug, Default)]
pub(super) struct Table {
    names: String,
    /// By address; of those at one address, the one that names it best comes first.
    entries: Vec<Entry>,
    /// Indices into `entries`, by name and then by address.
    by_name: Vec<u32>,
}

/// No kernel has more; a file that says so is damaged.
const MOST: usize = 1 << 24;

/// Symbols that are to become a table.
#[derive(Debug, Default)]
pub(super) struct Builder {
    names: String,
    entries: Vec<Entry>,
}

impl Builder {
    /// Adds a symbol; one without a name is left out.
    pub(super) fn add(&mut self, raw: &Raw<'_>) {
        let place = (u32::try_from(self.names.len()), u32::try_from(raw.name.len()));
        let (Ok(start), Ok(len)) = place else { return };
        if len == 0 || start.checked_add(len).is_none() || self.entries.len() >= MOST {
            return;
        }
        self.names.push_str(raw.name);
        self.entries.push(Entry {
            address: raw.address,
            size: raw.size,
            name: (start, len),
            class: raw.class,
            kind: raw.kind,
            global: raw.global,
        });
    }

    /// Sorts them. Those without a size get that of another name for the same thing, else the distance to the next one,
    /// at most up to the end of the range in `bounds` that they are in.
    pub(super) fn build(self, bounds: &[Range<u64>]) -> Table {
        let mut table = Table { names: self.names, entries: self.entries, by_name: Vec::new() };
        table.sort();
        table.derive_sizes(bounds);
        table
    }
}

impl Table {
    fn sort(&mut self) {
        let names = &self.names;
        let name = |entry: &Entry| slice(names, entry.name);
        self.entries.sort_by_key(|entry| entry.address);
        for group in self.entries.chunk_by_mut(|a, b| a.address == b.address).filter(|group| group.len() > 1) {
            group.sort_by(|a, b| (rank(a, name(a)), name(a)).cmp(&(rank(b, name(b)), name(b))));
        }
        self.entries.dedup_by(|b, a| a.address == b.address && name(a) == name(b));
        // Most names differ in their first bytes, which compare faster as a number.
        let mut by_name: Vec<(u64, u32)> =
            (0..).zip(&self.entries).map(|(index, entry)| (first_bytes(name(entry)), index)).collect();
        let entries = &self.entries;
        let whole = |index: u32| entries.get(index as usize).map(|entry| (name(entry), index));
        by_name.sort_unstable_by(|a, b| a.0.cmp(&b.0).then_with(|| whole(a.1).cmp(&whole(b.1))));
        self.by_name = by_name.into_iter().map(|(_, index)| index).collect();
    }

    fn derive_sizes(&mut self, bounds: &[Range<u64>]) {
        let mut next: Option<u64> = None;
        for group in self.entries.chunk_by_mut(|a, b| a.address == b.address).rev() {
            let Some(address) = group.first().map(|entry| entry.address) else { continue };
            if group.iter().all(|entry| entry.class == Class::Absolute) {
                continue;
            }
            if group.iter().all(|entry| entry.size != 0) {
                next = Some(address);
                continue;
            }
            let bound = bounds.iter().find(|bound| bound.contains(&address)).map(|bound| bound.end);
            let end = next.into_iter().chain(bound).min().unwrap_or(address);
            // Another name for the same thing, which the linker or an assembler made, has no size of its own.
            let largest = |function| {
                let same = group.iter().filter(|entry| entry.is_function() == function);
                same.map(|entry| entry.size).max().filter(|&size| size != 0)
            };
            let sizes = [false, true].map(|function| largest(function).unwrap_or(end.saturating_sub(address)));
            for entry in group.iter_mut().filter(|entry| entry.size == 0 && entry.class != Class::Absolute) {
                let [variable, function] = sizes;
                entry.size = if entry.is_function() { function } else { variable };
            }
            next = Some(address);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn name(&self, entry: &Entry) -> &str {
        slice(&self.names, entry.name)
    }

    /// From the lowest to the highest address of what is in memory.
    pub(super) fn span(&self) -> Range<u64> {
        let mut inside = self.entries.iter().filter(|entry| !matches!(entry.class, Class::Absolute | Class::PerCpu));
        let Some(first) = inside.next() else { return 0..0 };
        let end = inside.map(|entry| entry.address.saturating_add(entry.size.max(1))).max();
        first.address..end.unwrap_or(first.address).max(first.address.saturating_add(first.size.max(1)))
    }

    /// All symbols whose name begins with `prefix`, by name and then by address.
    fn starting(&self, prefix: &str) -> impl Iterator<Item = &Entry> {
        let name = |index: u32| self.entries.get(index as usize).map_or("", |entry| self.name(entry));
        let first = self.by_name.partition_point(|&index| name(index) < prefix);
        self.by_name
            .iter()
            .skip(first)
            .take_while(move |&&index| name(index).starts_with(prefix))
            .filter_map(|&index| self.entries.get(index as usize))
    }

    /// The symbols of exactly this name, by address.
    pub(super) fn named(&self, name: &str) -> impl Iterator<Item = &Entry> {
        let len = name.len();
        self.starting(name).take_while(move |entry| entry.name.1 as usize == len)
    }

    /// The symbols of this name to which the compiler has added a suffix, such as `.isra.0`, with the suffix.
    pub(super) fn suffixed(&self, name: &str) -> Vec<(&Entry, &str)> {
        let with_dot = format!("{name}.");
        self.starting(&with_dot).map(|entry| (entry, self.name(entry).get(name.len()..).unwrap_or_default())).collect()
    }

    /// The symbol that `address` is in: the nearest below that reaches over it, else the nearest below.
    pub(super) fn at(&self, address: u64) -> Option<&Entry> {
        let end = self.entries.partition_point(|entry| entry.address <= address);
        let below = self.entries.get(..end)?;
        let mut nearest = None;
        let mut group: Option<u64> = None;
        for (index, entry) in below.iter().enumerate().rev() {
            if !locatable(entry, self.name(entry)) {
                continue;
            }
            if group.is_none_or(|group| group != entry.address) {
                group = Some(entry.address);
            }
            // The best of those at this address stands first.
            let first = below.get(..index).unwrap_or_default().partition_point(|other| other.address < entry.address);
            let best = below.get(first..=index)?.iter().find(|entry| locatable(entry, self.name(entry)))?;
            if address.wrapping_sub(best.address) < best.size {
                return Some(best);
            }
            nearest = nearest.or(Some(best));
            // A label inside of a function ends before the function does; that is all that is looked for.
            if end - index > LOOK_BACK {
                break;
            }
        }
        nearest
    }

    /// Names near to `name`, the nearest first.
    pub(super) fn similar(&self, name: &str, most: usize) -> Vec<String> {
        let candidates = self.entries.iter().map(|entry| self.name(entry));
        similar(name, candidates, most)
    }
}

/// So many symbols below an address are looked at for one that reaches over it.
const LOOK_BACK: usize = 32;

fn slice(names: &str, (start, len): (u32, u32)) -> &str {
    let start = start as usize;
    names.get(start..start.saturating_add(len as usize)).unwrap_or_default()
}

fn first_bytes(name: &str) -> u64 {
    name.bytes().chain(std::iter::repeat(0)).take(8).fold(0, |number, byte| number << 8 | u64::from(byte))
}

/// Whether a symbol may name an address: padding in front of functions and numbers do not.
fn locatable(entry: &Entry, name: &str) -> bool {
    !matches!(entry.class, Class::Absolute | Class::PerCpu)
        && !name.starts_with("__pfx_")
        && !name.starts_with("__cfi_")
}

/// Orders the symbols at one address: less is better.
fn rank(entry: &Entry, name: &str) -> impl Ord + use<> {
    let marker =
        ["_text", "_stext", "_etext", "__start_", "__stop_", "__end_"].iter().any(|mark| name.starts_with(mark))
            || name.ends_with("_start")
            || name.ends_with("_begin")
            || name.ends_with("_end");
    (
        name.starts_with("__pfx_") || name.starts_with("__cfi_"),
        entry.kind == Kind::Unknown,
        !entry.global,
        marker,
        name.bytes().take_while(|&byte| byte == b'_').count(),
        Reverse(entry.size),
    )
}

/// Of `candidates`, those near to `name`, the nearest first and each once.
pub(super) fn similar<'a>(name: &str, candidates: impl Iterator<Item = &'a str>, most: usize) -> Vec<String> {
    let limit = (name.len() / 4).clamp(1, 3);
    let lower = name.to_ascii_lowercase();
    let mut near: Vec<(usize, &str)> = candidates
        .filter(|candidate| candidate.len().abs_diff(name.len()) <= limit && !candidate.starts_with("__pfx_"))
        .filter_map(|candidate| {
            let distance = strsim::osa_distance(&lower, &candidate.to_ascii_lowercase());
            (distance <= limit).then_some((distance, candidate))
        })
        .collect();
    near.sort_unstable();
    near.dedup();
    near.into_iter().take(most).map(|(_, name)| name.to_owned()).collect()
}
