//! DWARF of one file: which unit an address is in, and what that unit says.
//!
//! Nothing is parsed before it is asked for. An address is looked up in `.debug_aranges`, and then one unit is read;
//! its parsed form is not kept, because what a person wants to know are a few dozen addresses.

mod entries;
mod lines;
mod search;
mod types;

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use gimli::{DebugInfoOffset, EndianSlice, RunTimeEndian, UnitHeader};

use super::elf::Elf;

pub(super) type Slice<'a> = EndianSlice<'a, RunTimeEndian>;
pub(super) type Sections<'a> = gimli::Dwarf<Slice<'a>>;

/// A file with DWARF.
#[derive(Debug)]
pub(super) struct Dwarf {
    elf: Arc<Elf>,
    /// From `.debug_aranges`.
    aranges: OnceLock<UnitIndex>,
    /// From each unit's own entry, for what `.debug_aranges` does not have.
    all: OnceLock<UnitIndex>,
    /// Where each unit begins in `.debug_info`.
    starts: OnceLock<Vec<usize>>,
}

impl Dwarf {
    /// Of `elf`, if it has any.
    pub(super) fn of(elf: &Arc<Elf>) -> Option<Self> {
        let dwarf =
            || Dwarf { elf: Arc::clone(elf), aranges: OnceLock::new(), all: OnceLock::new(), starts: OnceLock::new() };
        elf.has_dwarf().then(dwarf)
    }

    /// The file.
    pub(super) fn elf(&self) -> &Arc<Elf> {
        &self.elf
    }

    fn slice(&self, name: &str) -> Slice<'_> {
        EndianSlice::new(self.elf.data(name), RunTimeEndian::Little)
    }

    fn sections(&self) -> Sections<'_> {
        let load = |id: gimli::SectionId| Ok::<_, std::convert::Infallible>(self.slice(id.name()));
        match Sections::load(load) {
            Ok(sections) => sections,
            Err(never) => match never {},
        }
    }

    /// The unit that the linked address `address` is in, as an offset into `.debug_info`.
    fn unit_of(&self, address: u64) -> Option<DebugInfoOffset> {
        let aranges = self.aranges.get_or_init(|| UnitIndex::from_aranges(&self.sections()));
        let found = aranges.find(address);
        // clang writes no .debug_aranges.
        found.or_else(|| self.all.get_or_init(|| UnitIndex::from_units(&self.sections())).find(address))
    }

    /// Where each unit begins in `.debug_info`, in rising order.
    fn starts(&self) -> &[usize] {
        self.starts.get_or_init(|| {
            let mut starts = Vec::new();
            let mut units = self.sections().units();
            while let Ok(Some(header)) = units.next() {
                starts.extend(header.debug_info_offset().map(|offset| offset.0));
            }
            starts
        })
    }

    /// The unit's header and its bytes' place in `.debug_info`.
    fn header<'a>(
        &self,
        sections: &Sections<'a>,
        offset: DebugInfoOffset,
    ) -> gimli::Result<(UnitHeader<Slice<'a>>, Range<usize>)> {
        let header = sections.debug_info.header_from_offset(offset)?;
        let len = header.length_including_self();
        Ok((header, offset.0..offset.0.saturating_add(len)))
    }
}

/// Which unit has which addresses.
#[derive(Debug, Default)]
struct UnitIndex {
    /// By begin.
    ranges: Vec<UnitRange>,
}

#[derive(Debug)]
struct UnitRange {
    begin: u64,
    end: u64,
    /// The highest end of all ranges up to here.
    reach: u64,
    unit: DebugInfoOffset,
}

impl UnitIndex {
    fn new(mut ranges: Vec<UnitRange>) -> Self {
        ranges.retain(|range| range.begin < range.end);
        ranges.sort_by_key(|range| (range.begin, range.end, range.unit.0));
        let mut reach = 0;
        for range in &mut ranges {
            reach = range.end.max(reach);
            range.reach = reach;
        }
        UnitIndex { ranges }
    }

    fn from_aranges(sections: &Sections<'_>) -> Self {
        let mut ranges = Vec::new();
        let mut headers = sections.debug_aranges.headers();
        while let Ok(Some(header)) = headers.next() {
            let unit = header.debug_info_offset();
            let mut entries = header.entries();
            while let Ok(Some(entry)) = entries.next() {
                let range = entry.range();
                ranges.push(UnitRange { begin: range.begin, end: range.end, reach: 0, unit });
            }
        }
        UnitIndex::new(ranges)
    }

    fn from_units(sections: &Sections<'_>) -> Self {
        let mut found = Vec::new();
        let mut headers = sections.units();
        while let Ok(Some(header)) = headers.next() {
            let Some(offset) = header.debug_info_offset() else { continue };
            let Ok(unit) = sections.unit(header) else { continue };
            let Ok(mut ranges) = sections.unit_ranges(&unit) else { continue };
            while let Ok(Some(range)) = ranges.next() {
                found.push(UnitRange { begin: range.begin, end: range.end, reach: 0, unit: offset });
            }
        }
        UnitIndex::new(found)
    }

    fn find(&self, address: u64) -> Option<DebugInfoOffset> {
        let end = self.ranges.partition_point(|range| range.begin <= address);
        self.ranges
            .get(..end)?
            .iter()
            .rev()
            .take_while(|range| range.reach > address)
            .find(|range| range.end > address)
            .map(|range| range.unit)
    }
}
