//! System.map: what `nm` prints of a vmlinux, one `ADDRESS LETTER NAME` on each line.

use std::path::Path;

use super::elf::Elf;
use super::error::SymbolsError;
use super::table::{Builder, Class, Kind, Raw, Table};

/// Whether these are the first bytes of such a file.
pub(super) fn is_one(bytes: &[u8]) -> bool {
    // Debian's has one line only, which begins like a symbol and says where the real one is.
    let line = bytes.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let mut words = line.split(|byte| byte.is_ascii_whitespace());
    let mut word = || words.next().unwrap_or_default();
    let (address, letter) = (word(), word());
    address.len() >= 8 && address.iter().all(u8::is_ascii_hexdigit) && letter.len() == 1
}

/// Reads the whole of it. Lines of modules, which `/proc/kallsyms` has, are left out.
pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Table, SymbolsError> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        SymbolsError::bad(path, format!("not a System.map: no text at byte {}", error.valid_up_to()))
    })?;
    let mut lines = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let Some(parsed) = parse_line(line) else {
            let line: String = line.chars().take(120).collect();
            let why = format!("line {}: expected ADDRESS LETTER NAME as nm prints them, found `{line}`", number + 1);
            return Err(SymbolsError::bad(path, why));
        };
        lines.extend(parsed);
    }
    if lines.iter().all(|line| line.0 == 0) {
        let why =
            "all addresses are 0: a kernel shows those in /proc/kallsyms to root only (sysctl kernel.kptr_restrict)";
        return Err(SymbolsError::bad(path, why));
    }
    Ok(table(lines.into_iter(), None))
}

/// None: not a line of such a file; `Some(None)`: one of a module.
fn parse_line(line: &str) -> Option<Option<(u64, u8, &str)>> {
    let mut words = line.split_whitespace();
    let (address, letter, name) = (words.next()?, words.next()?, words.next()?);
    let address = u64::from_str_radix(address, 16).ok()?;
    let [letter] = letter.as_bytes() else { return None };
    letter.is_ascii_alphabetic().then_some(())?;
    match (words.next(), words.next()) {
        (None, _) => Some(Some((address, *letter, name))),
        (Some(module), None) if module.starts_with('[') => Some(None),
        _ => None,
    }
}

/// A table from addresses with `nm`'s letters, which kallsyms has as well: the classes follow from the letters and from
/// the linker script's own symbols, and from the sections where an image has them.
pub(super) fn table<'a>(lines: impl Iterator<Item = (u64, u8, &'a str)> + Clone, image: Option<&Elf>) -> Table {
    let named = |name: &str| lines.clone().find(|line| line.2 == name).map(|line| line.0);
    let between = |begin, end| match (named(begin), named(end)) {
        (Some(begin), Some(end)) => begin..end,
        _ => 0..0,
    };
    let init = between("__init_begin", "__init_end");
    let percpu = between("__per_cpu_start", "__per_cpu_end");
    let text_end = named("_etext").unwrap_or(u64::MAX);
    let by_letter = |address: u64, letter: u8| match letter.to_ascii_lowercase() {
        // Linked at 0, per-cpu variables are numbers to nm.
        _ if percpu.contains(&address) => Class::PerCpu,
        b'a' => Class::Absolute,
        b't' | b'w' | b'v' if init.contains(&address) => Class::InitText,
        _ if init.contains(&address) => Class::InitData,
        b't' => Class::Text,
        // Weak: code, mostly, and what is not code lies behind _etext.
        b'w' if address < text_end => Class::Text,
        b'r' => Class::ReadOnly,
        _ => Class::Data,
    };
    let mut builder = Builder::default();
    for (address, letter, name) in lines.clone().filter(|line| !line.1.eq_ignore_ascii_case(&b'u')) {
        let section = image.filter(|_| !letter.eq_ignore_ascii_case(&b'a'));
        let class = section.and_then(|image| image.class_at(address, &init));
        let class = class.unwrap_or_else(|| by_letter(address, letter));
        builder.add(&Raw { name, address, size: 0, kind: Kind::Unknown, class, global: letter.is_ascii_uppercase() });
    }
    builder.build(&image.map(Elf::bounds).unwrap_or_default())
}
