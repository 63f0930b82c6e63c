//! RAM as a core has it: one range after the other, without the pages that are zero.

use trapline_vmm::limits::PAGE_SIZE;
use trapline_vmm::paging::read_physical;

use super::{Core, CoreError};

/// How much is read at a time: large enough for few system calls, small enough for the cache.
const CHUNK: usize = 1 << 20;
pub(super) const PAGE: usize = PAGE_SIZE as usize;
const ZEROS: [u8; PAGE] = [0; PAGE];
/// Zero pages between two others that are written nevertheless: fewer and longer writes.
const BRIDGED: usize = 15;

/// RAM and where each range of it is in the file.
pub(super) struct Ram<'a> {
    core: &'a Core<'a>,
    ranges: Vec<(u64, u64, u64)>,
}

/// Bytes to be written.
pub(super) struct Run<'a> {
    /// From the beginning of RAM in the file.
    pub(super) offset: u64,
    /// Whole pages.
    pub(super) bytes: &'a [u8],
}

impl<'a> Ram<'a> {
    pub(super) fn new(core: &'a Core<'a>) -> Self {
        let mut offset = 0;
        let place = |(gpa, len)| {
            let at = offset;
            offset += len;
            (at, gpa, len)
        };
        Self { core, ranges: core.ram.ranges().into_iter().map(place).collect() }
    }

    /// `(offset in the file, guest-physical address, length)`, lowest first.
    pub(super) fn ranges(&self) -> &[(u64, u64, u64)] {
        &self.ranges
    }

    /// Where `gpa`, which is RAM, is in the file.
    pub(super) fn offset(&self, gpa: u64) -> u64 {
        let range = self.ranges.iter().rev().find(|(_, start, _)| *start <= gpa);
        range.map_or(gpa, |(offset, start, _)| offset + (gpa - start))
    }

    /// How many pages there are.
    pub(super) fn pages(&self) -> u64 {
        self.core.ram.size() / PAGE_SIZE
    }

    /// Calls `each` for all RAM, without breakpoints, in pieces of `size` bytes, which is a multiple of a page's, or
    /// what is left of a range, until it fails.
    pub(super) fn each_piece(
        &self,
        size: usize,
        mut each: impl FnMut(u64, &[u8]) -> Result<(), CoreError>,
    ) -> Result<(), CoreError> {
        let mut buffer = vec![0; size];
        for &(offset, gpa, len) in &self.ranges {
            for at in (0..len).step_by(size) {
                let piece = &mut buffer[..size.min((len - at) as usize)];
                let got = read_physical(self.core.ram.mem(), gpa + at, piece);
                piece[got..].fill(0);
                (self.core.hide)(gpa + at, piece);
                each(offset + at, piece)?;
            }
        }
        Ok(())
    }

    /// Calls `each` for all RAM but for long runs of zeros.
    pub(super) fn each_run(&self, mut each: impl FnMut(Run<'_>) -> Result<(), CoreError>) -> Result<(), CoreError> {
        self.each_piece(CHUNK, |offset, chunk| {
            runs(chunk).try_for_each(|(from, to)| each(Run { offset: offset + from as u64, bytes: &chunk[from..to] }))
        })
    }
}

/// Where the stretches of `chunk` that are to be written begin and end.
fn runs(chunk: &[u8]) -> impl Iterator<Item = (usize, usize)> {
    let mut pages = chunk.chunks(PAGE).enumerate().filter(|(_, page)| !is_zero(page)).map(|(n, _)| n).peekable();
    std::iter::from_fn(move || {
        let first = pages.next()?;
        let mut last = first;
        while let Some(next) = pages.next_if(|next| next - last <= BRIDGED + 1) {
            last = next;
        }
        Some((first * PAGE, chunk.len().min((last + 1) * PAGE)))
    })
}

/// Whether all of a page is zero.
pub(super) fn is_zero(page: &[u8]) -> bool {
    page == &ZEROS[..page.len()]
}
