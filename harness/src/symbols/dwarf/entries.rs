//! Entries of `.debug_info` by their place in the section.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use gimli::{AttributeValue, DebugInfoOffset, DwAt, UnitOffset};

use super::{Dwarf, Sections, Slice};

pub(super) type Unit<'a> = gimli::Unit<Slice<'a>>;
pub(super) type Entry<'a> = gimli::DebuggingInformationEntry<Slice<'a>>;

/// The sections of one file, and the units that one question has led to.
pub(in crate::symbols) struct Reader<'a> {
    pub(super) dwarf: &'a Dwarf,
    pub(super) sections: Sections<'a>,
    units: RefCell<HashMap<usize, Option<Rc<Unit<'a>>>>>,
}

/// An entry, with its unit.
#[derive(Clone)]
pub(super) struct Found<'a> {
    pub(super) unit: Rc<Unit<'a>>,
    pub(super) entry: Entry<'a>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(dwarf: &'a Dwarf) -> Self {
        Reader { dwarf, sections: dwarf.sections(), units: RefCell::default() }
    }

    /// The unit that has the byte `at` of `.debug_info`.
    pub(super) fn unit_around(&self, at: usize) -> Option<Rc<Unit<'a>>> {
        let starts = self.dwarf.starts();
        let start = *starts.get(starts.partition_point(|&start| start <= at).checked_sub(1)?)?;
        let read = || {
            let header = self.sections.debug_info.header_from_offset(DebugInfoOffset(start)).ok()?;
            self.sections.unit(header).ok().map(Rc::new)
        };
        self.units.borrow_mut().entry(start).or_insert_with(read).clone()
    }

    /// The entry that begins at the byte `at`.
    pub(super) fn entry_at(&self, at: usize) -> Option<Found<'a>> {
        let unit = self.unit_around(at)?;
        let offset = DebugInfoOffset(at).to_unit_offset(&unit.header)?;
        let entry = unit.entry(offset).ok()?;
        Some(Found { unit, entry })
    }

    /// The entry that has the byte `at` in its attributes.
    pub(super) fn entry_around(&self, at: usize) -> Option<Found<'a>> {
        let unit = self.unit_around(at)?;
        let wanted = DebugInfoOffset(at).to_unit_offset(&unit.header)?;
        let mut entries = unit.entries_raw(None).ok()?;
        while !entries.is_empty() {
            let begin = entries.next_offset();
            let Some(abbreviation) = entries.read_abbreviation().ok()? else { continue };
            entries.skip_attributes(abbreviation.attributes()).ok()?;
            if entries.next_offset() > wanted {
                let entry = unit.entry(begin).ok().filter(|_| begin <= wanted)?;
                return Some(Found { unit, entry });
            }
        }
        None
    }

    /// A string attribute.
    pub(super) fn string(&self, found: &Found<'a>, attribute: DwAt) -> Option<String> {
        let value = found.entry.attr(attribute)?.value();
        let text = self.sections.attr_string(&found.unit, value).ok()?;
        Some(text.to_string_lossy().into_owned())
    }

    /// Where in `.debug_info` the entry is that an attribute refers to.
    pub(super) fn target(&self, found: &Found<'a>, attribute: DwAt) -> Option<usize> {
        match found.entry.attr(attribute)?.value() {
            AttributeValue::UnitRef(offset) => Some(offset.to_debug_info_offset(&found.unit.header)?.0),
            AttributeValue::DebugInfoRef(DebugInfoOffset(offset)) => Some(offset),
            _ => None,
        }
    }

    /// Whether the entry's name is `name`, its own or that of the one it completes or is a copy of.
    pub(super) fn name(&self, found: &Found<'a>) -> Option<String> {
        let mut found = found.clone();
        for _ in 0..8 {
            if let Some(name) = self.string(&found, gimli::DW_AT_name) {
                return Some(name);
            }
            let next = self
                .target(&found, gimli::DW_AT_abstract_origin)
                .or_else(|| self.target(&found, gimli::DW_AT_specification))?;
            found = self.entry_at(next)?;
        }
        None
    }
}

impl Found<'_> {
    /// Where in `.debug_info` it begins.
    pub(super) fn place(&self) -> Option<usize> {
        Some(self.entry.offset().to_debug_info_offset(&self.unit.header)?.0)
    }

    pub(super) fn number(&self, attribute: DwAt) -> Option<u64> {
        self.entry.attr(attribute)?.udata_value()
    }

    pub(super) fn offset(&self) -> UnitOffset {
        self.entry.offset()
    }
}
