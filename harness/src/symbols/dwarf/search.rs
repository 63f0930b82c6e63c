//! Entries found by what they contain.
//!
//! There is no index to rely on: compilers write none that all kernels have. But an entry has its bytes in one piece: a
//! variable's location is the operation `addr` with the address that the symbol table has, and a name is
//! an offset into `.debug_str`. So the section is searched for those bytes, which costs little more than to read it, and
//! each hit is then confirmed by parsing the unit that it is in.

use std::rc::Rc;

use gimli::{AttributeValue, Section as _};
use memchr::memmem;

use super::Dwarf;
use super::entries::{Found, Reader, Unit};
use crate::symbols::types::Types;

/// So many hits are parsed at most for one question.
const MOST_HITS: usize = 512;

/// So many functions are named as those that have inlined another one.
const MOST_CALLERS: usize = 8;

/// So many units are looked through for those.
const MOST_UNITS: usize = 16;

impl<'a> Reader<'a> {
    /// The type of the variable `name` at the linked address `address`.
    pub(in crate::symbols) fn variable(&self, name: &str, address: u64) -> Option<usize> {
        let info = self.sections.debug_info.reader().slice();
        // DW_FORM_exprloc of nine bytes: DW_OP_addr and an address.
        let mut pattern = vec![9, gimli::DW_OP_addr.0];
        pattern.extend(address.to_le_bytes());
        for at in memmem::find_iter(info, &pattern).take(MOST_HITS) {
            let Some(found) = self.entry_around(at) else { continue };
            if self.is_variable(&found, name, |value| located(value) == Some(address)) {
                return self.declared(&found);
            }
        }
        // A name that the linker script or an assembler made has no definition, but C declares it.
        self.variable_by_index(name, address).or_else(|| {
            let is_declared = |found: &Found<'a>| {
                found.entry.tag() == gimli::DW_TAG_variable
                    && found.entry.has_attr(gimli::DW_AT_external)
                    && found.entry.has_attr(gimli::DW_AT_declaration)
            };
            self.named(name).find(is_declared).and_then(|found| self.declared(&found))
        })
    }

    /// The same where addresses are in `.debug_addr`, as clang has them.
    fn variable_by_index(&self, name: &str, address: u64) -> Option<usize> {
        let units = self.units_using(".debug_addr", &address.to_le_bytes(), |unit| unit.addr_base.0);
        units.into_iter().find_map(|unit| {
            let mut entries = unit.entries();
            while let Ok(Some(entry)) = entries.next_dfs() {
                let found = Found { unit: Rc::clone(&unit), entry: entry.clone() };
                let is_there = |value| self.indexed(&found, value) == Some(address);
                if self.is_variable(&found, name, is_there) {
                    return self.declared(&found);
                }
            }
            None
        })
    }

    /// The units whose part of a section of indexed values has `value`. A unit's part begins at its base.
    fn units_using(&self, section: &str, value: &[u8], base: impl Fn(&Unit<'a>) -> usize) -> Vec<Rc<Unit<'a>>> {
        let section = self.dwarf.elf().data(section);
        let mut hits = memmem::find_iter(section, value).take(MOST_HITS).peekable();
        if hits.peek().is_none() {
            return Vec::new();
        }
        let all = self.dwarf.starts().iter().filter_map(|&start| self.unit_around(start));
        let mut units: Vec<(usize, Rc<Unit<'a>>)> = all.map(|unit| (base(&unit), unit)).collect();
        units.sort_by_key(|(base, _)| *base);
        let mut found: Vec<usize> =
            hits.filter_map(|at| units.partition_point(|(base, _)| *base <= at).checked_sub(1)).collect();
        found.dedup();
        found.into_iter().filter_map(|index| units.get(index).map(|(_, unit)| Rc::clone(unit))).collect()
    }

    fn indexed(&self, found: &Found<'a>, value: AttributeValue<super::Slice<'a>>) -> Option<u64> {
        let AttributeValue::Exprloc(expression) = value else { return None };
        match expression.operations(found.unit.encoding()).next().ok()?? {
            gimli::Operation::AddressIndex { index } => self.sections.address(&found.unit, index).ok(),
            _ => None,
        }
    }

    fn is_variable(
        &self,
        found: &Found<'a>,
        name: &str,
        is_there: impl Fn(AttributeValue<super::Slice<'a>>) -> bool,
    ) -> bool {
        found.entry.tag() == gimli::DW_TAG_variable
            && found.entry.attr(gimli::DW_AT_location).is_some_and(|attr| is_there(attr.value()))
            // A static variable within a function is `name.5` in the symbol table.
            && self.name(found).is_none_or(|found| name == found || name.starts_with(&format!("{found}.")))
    }

    /// A definition has a type of its own, or that of the declaration it completes.
    fn declared(&self, found: &Found<'a>) -> Option<usize> {
        let mut found = found.clone();
        for _ in 0..8 {
            if let Some(of) = self.target(&found, gimli::DW_AT_type) {
                return Some(of);
            }
            let next = self
                .target(&found, gimli::DW_AT_specification)
                .or_else(|| self.target(&found, gimli::DW_AT_abstract_origin))?;
            found = self.entry_at(next)?;
        }
        None
    }

    /// The structure or union `name` with its members, else the typedef.
    pub(in crate::symbols) fn type_named(&self, name: &str) -> Option<usize> {
        let mut typedef = None;
        for found in self.named(name) {
            match found.entry.tag() {
                gimli::DW_TAG_structure_type | gimli::DW_TAG_union_type | gimli::DW_TAG_class_type
                    if found.number(gimli::DW_AT_byte_size).is_some()
                        && found.entry.attr(gimli::DW_AT_declaration).is_none() =>
                {
                    return found.place();
                }
                gimli::DW_TAG_typedef if typedef.is_none() => typedef = found.place(),
                _ => {}
            }
        }
        typedef.filter(|&id| self.node(id).is_some())
    }

    /// The functions into which `name` is inlined; none if it is no function that the compiler has inlined.
    pub(in crate::symbols) fn inlined_into(&self, name: &str) -> Option<Vec<String>> {
        let mut inlined = false;
        let mut callers: Vec<String> = Vec::new();
        let mut units = 0;
        for found in self.named(name) {
            if found.entry.tag() != gimli::DW_TAG_subprogram || found.entry.attr(gimli::DW_AT_inline).is_none() {
                continue;
            }
            inlined = true;
            units += 1;
            for caller in self.callers(&found) {
                if !callers.contains(&caller) {
                    callers.push(caller);
                }
            }
            if callers.len() >= MOST_CALLERS || units >= MOST_UNITS {
                break;
            }
        }
        callers.truncate(MOST_CALLERS);
        inlined.then_some(callers)
    }

    /// The functions of the same unit that have a copy of this one.
    fn callers(&self, inlined: &Found<'a>) -> Vec<String> {
        let mut callers = Vec::new();
        let place = inlined.place();
        let mut entries = inlined.unit.entries();
        // The function that has code which the entries at hand are in, and its depth.
        let mut function: Option<(isize, Found<'a>)> = None;
        while let Ok(Some(entry)) = entries.next_dfs() {
            let tag = entry.tag();
            if tag != gimli::DW_TAG_subprogram && tag != gimli::DW_TAG_inlined_subroutine {
                continue;
            }
            let found = Found { unit: inlined.unit.clone(), entry: entry.clone() };
            if function.as_ref().is_some_and(|(depth, _)| entry.depth() <= *depth) {
                function = None;
            }
            if tag == gimli::DW_TAG_subprogram {
                let has_code = entry.has_attr(gimli::DW_AT_low_pc) || entry.has_attr(gimli::DW_AT_ranges);
                if has_code {
                    function = Some((entry.depth(), found));
                }
            } else if self.target(&found, gimli::DW_AT_abstract_origin) == place
                && let Some((_, function)) = &function
            {
                callers.extend(self.name(function));
            }
        }
        callers
    }

    /// Entries that have `name` as their name.
    fn named<'r>(&'r self, name: &'r str) -> impl Iterator<Item = Found<'a>> + 'r {
        let strings = self.string_offsets(name);
        let mut patterns: Vec<Vec<u8>> = strings.iter().map(|offset| offset.to_le_bytes().to_vec()).collect();
        if patterns.is_empty() || name.len() < size_of::<u32>() {
            // It stands in the entry itself.
            patterns.push(terminated(name));
        }
        let info: &'a [u8] = self.sections.debug_info.reader().slice();
        let direct = patterns
            .into_iter()
            .flat_map(move |pattern| hits(info, pattern).take(MOST_HITS))
            .filter_map(|at| self.entry_around(at));
        // As clang has them.
        let indexed = strings
            .into_iter()
            .flat_map(|offset| {
                self.units_using(".debug_str_offsets", &offset.to_le_bytes(), |unit| unit.str_offsets_base.0)
            })
            .flat_map(|unit| {
                let mut found = Vec::new();
                let mut entries = unit.entries();
                while let Ok(Some(entry)) = entries.next_dfs() {
                    let entry = Found { unit: Rc::clone(&unit), entry: entry.clone() };
                    if self.string(&entry, gimli::DW_AT_name).as_deref() == Some(name) {
                        found.push(entry);
                    }
                }
                found
            });
        direct.chain(indexed).filter(move |found| self.string(found, gimli::DW_AT_name).as_deref() == Some(name))
    }

    /// Where in `.debug_str` a name is.
    fn string_offsets(&self, name: &str) -> Vec<u32> {
        let strings = self.dwarf.elf().data(".debug_str");
        let mut whole = Vec::new();
        // The end of a longer name serves as well, where the linker merges strings.
        let mut ends = Vec::new();
        for at in memmem::find_iter(strings, &terminated(name)).take(MOST_HITS) {
            let before = at.checked_sub(1).and_then(|before| strings.get(before));
            let list = if before.is_none_or(|&byte| byte == 0) { &mut whole } else { &mut ends };
            list.extend(u32::try_from(at));
        }
        if whole.is_empty() { ends } else { whole }
    }
}

fn terminated(name: &str) -> Vec<u8> {
    let mut text = name.as_bytes().to_vec();
    text.push(0);
    text
}

/// Where `pattern` is, one after the other as they are asked for.
fn hits(haystack: &[u8], pattern: Vec<u8>) -> impl Iterator<Item = usize> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let at = memmem::find(haystack.get(from..)?, &pattern)?.checked_add(from)?;
        from = at + 1;
        Some(at)
    })
}

impl Dwarf {
    /// Answers questions about entries.
    pub(in crate::symbols) fn reader(&self) -> Reader<'_> {
        Reader::new(self)
    }
}

/// The address in a location that is one.
fn located(value: AttributeValue<super::Slice<'_>>) -> Option<u64> {
    let AttributeValue::Exprloc(expression) = value else { return None };
    let bytes = expression.0.slice();
    match bytes.split_first() {
        Some((&op, address)) if op == gimli::DW_OP_addr.0 => Some(u64::from_le_bytes(address.try_into().ok()?)),
        _ => None,
    }
}
