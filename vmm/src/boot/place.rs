//! Finds out where things go before anything is written: what lies outside of RAM or on something else is an error.

use std::ops::Range;

use super::error::BootError;
use super::{Format, layout};
use crate::limits::PAGE_SIZE;
use crate::memory::GuestRam;

/// The ranges that are taken so far.
#[derive(Debug)]
pub(super) struct Placement<'a> {
    ram: &'a GuestRam,
    format: Format,
    taken: Vec<(Range<u64>, String)>,
}

impl<'a> Placement<'a> {
    /// Nothing but our own tables is there yet.
    pub(super) fn new(ram: &'a GuestRam, format: Format) -> Self {
        let taken = layout::TAKEN.map(|(range, what)| (range, what.to_owned()));
        Self { ram, format, taken: taken.to_vec() }
    }

    /// Takes `len` bytes from `start` for a part of the kernel, or says what is wrong with it.
    pub(super) fn claim(&mut self, part: String, start: u64, len: u64) -> Result<(), BootError> {
        let outside = |end| BootError::KernelOutsideMemory {
            format: self.format,
            part: part.clone(),
            start,
            end,
            low_end: self.ram.low_end(),
        };
        let end = start.checked_add(len).ok_or_else(|| outside(u64::MAX))?;
        let in_ram = |(from, size): (u64, u64)| from <= start && end - from <= size;
        if !self.ram.ranges().into_iter().any(in_ram) {
            return Err(outside(end));
        }
        if let Some(other) = self.conflict(&(start..end)) {
            return Err(BootError::Overlap { format: self.format, part, start, end, other: other.to_owned() });
        }
        self.taken.push((start..end, part));
        Ok(())
    }

    /// Whether a range lies in RAM and is free.
    pub(super) fn is_free(&self, start: u64, len: u64) -> bool {
        start.checked_add(len).is_some_and(|end| end <= self.ram.low_end() && self.conflict(&(start..end)).is_none())
    }

    /// End (exclusive) of the highest range taken below the PCI hole, at least 1 MiB.
    pub(super) fn top(&self) -> u64 {
        let ends = self.taken.iter().map(|(range, _)| range.end);
        ends.filter(|end| *end <= self.ram.low_end()).max().unwrap_or(0).max(layout::HIGH_RAM_START)
    }

    /// Takes the highest page-aligned place for the initrd that ends at or below `limit` (an exclusive address).
    pub(super) fn initrd_high(&mut self, size: u64, limit: u64, limit_words: &str) -> Result<u64, BootError> {
        let limit = limit.min(self.ram.low_end());
        let mut room = 0;
        // The gaps between what is taken, highest first. There are never more than a few.
        let mut ceilings: Vec<u64> = self.taken.iter().map(|(range, _)| range.start).collect();
        ceilings.push(limit);
        ceilings.retain(|ceiling| *ceiling <= limit && *ceiling > layout::HIGH_RAM_START);
        ceilings.sort_unstable_by(|a, b| b.cmp(a));
        for ceiling in ceilings {
            let floors = self.taken.iter().map(|(range, _)| range.end);
            let floor = floors.filter(|end| *end <= ceiling).max().unwrap_or(0);
            let inside = self.taken.iter().any(|(range, _)| range.start < ceiling && ceiling <= range.end);
            let floor = round_up(floor.max(layout::HIGH_RAM_START));
            if inside || floor >= ceiling {
                continue;
            }
            room = room.max(ceiling - floor);
            let start = ceiling.saturating_sub(size) / PAGE_SIZE * PAGE_SIZE;
            if start >= floor {
                self.taken.push((start..start + size, "the initrd".to_owned()));
                return Ok(start);
            }
        }
        Err(BootError::InitrdTooLarge { size, room, limit: limit_words.to_owned() })
    }

    /// Takes the first page after everything else for the initrd (Multiboot kernels expect modules near).
    pub(super) fn initrd_after_kernel(&mut self, size: u64) -> Result<u64, BootError> {
        let start = round_up(self.top());
        let room = self.ram.low_end().saturating_sub(start);
        if size > room {
            return Err(BootError::InitrdTooLarge { size, room, limit: String::new() });
        }
        self.taken.push((start..start + size, "the initrd".to_owned()));
        Ok(start)
    }

    fn conflict(&self, range: &Range<u64>) -> Option<&str> {
        let overlaps = |other: &Range<u64>| range.start < other.end && other.start < range.end;
        self.taken.iter().find(|(other, _)| overlaps(other)).map(|(_, what)| what.as_str())
    }
}

/// The next page boundary; addresses here are below 2^40.
fn round_up(address: u64) -> u64 {
    address.next_multiple_of(PAGE_SIZE)
}
