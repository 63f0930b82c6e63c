//! kallsyms: the symbol table that a kernel carries in its own read-only data.
//!
//! A bzImage has no symbol table, but with `CONFIG_KALLSYMS` the kernel knows its symbols, and those tables can be read
//! before it boots. Nothing says where they are, so they are known by what they must be (scripts/kallsyms.c writes them):
//!
//! ```text
//!   token_table   256 strings, one after the other: what a byte of a packed name stands for
//!   token_index   256 x u16: where each of them begins
//!   num_syms      u32
//!   names         for each symbol: a length (one or two bytes), then so many bytes, each a token; the first
//!                 letter of the unpacked text is nm's letter for it
//!   markers       u32 for each 256th symbol: where in names it begins
//!   offsets       i32 for each symbol, in rising order of address
//!   relative_base u64
//! ```
//!
//! Up to 6.3 the order is offsets, relative_base, num_syms, names, markers, (6.2 and 6.3: seqs_of_names), token_table,
//! token_index; since 6.4 it is num_syms, names, markers, token_table, token_index, offsets, relative_base, seqs_of_names.
//! Each begins at a multiple of 8.
//!
//! How an offset becomes an address: with per-cpu variables linked at 0, a positive one is an address and a negative
//! one counts from `relative_base - 1` downwards from 0 (up to 6.14 on SMP); else it is unsigned and added to
//! `relative_base`; without `relative_base` it is added to its own place. Kernels without
//! `CONFIG_KALLSYMS_BASE_RELATIVE` have u64 addresses. The one that gives rising addresses within the image is right.

use std::ops::Range;

const TOKENS: usize = 256;

/// Fewer symbols has no kernel; more has none either.
const COUNT: Range<usize> = 512..(1 << 22);

/// Per-cpu variables that are linked at 0 are below this.
const PERCPU_LIMIT: u64 = 64 << 20;

/// A symbol: address, `nm`'s letter, name.
pub(super) type Line = (u64, u8, String);

/// Finds the tables in `bytes`, which are linked at `address`, and reads them. `image` is where the kernel's addresses
/// are. None if there are no tables, or they contradict each other.
pub(super) fn find(bytes: &[u8], address: u64, image: &Range<u64>) -> Option<Vec<Line>> {
    let mut from = 0;
    while let Some(tokens) = Tokens::find(bytes, from) {
        if let Some(lines) = with_tokens(bytes, address, image, &tokens) {
            return Some(lines);
        }
        from = tokens.index + 4;
    }
    None
}

fn with_tokens(bytes: &[u8], address: u64, image: &Range<u64>, tokens: &Tokens<'_>) -> Option<Vec<Line>> {
    let names = Names::find(bytes, tokens.table)?;
    let entries = names.unpack(bytes, tokens)?;
    let addresses = addresses(bytes, address, image, tokens, &names)?;
    Some(addresses.into_iter().zip(entries).map(|(address, (letter, name))| (address, letter, name)).collect())
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn quad(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// The token table and its index.
struct Tokens<'a> {
    /// Where the table begins.
    table: usize,
    /// Where the index begins.
    index: usize,
    texts: Vec<&'a [u8]>,
}

impl<'a> Tokens<'a> {
    /// The first at or behind `from`.
    fn find(bytes: &'a [u8], from: usize) -> Option<Self> {
        let mut at = from.next_multiple_of(4);
        while at < bytes.len() {
            // 256 rising numbers, the first of them 0.
            if half(bytes, at)? == 0
                && half(bytes, at + 2)? != 0
                && let Some(index) = rising(bytes, at)
                && let Some(tokens) = Self::before(bytes, at, &index)
            {
                return Some(tokens);
            }
            at += 4;
        }
        None
    }

    /// The table whose index is at `at`, if one ends there.
    fn before(bytes: &'a [u8], at: usize, index: &[usize]) -> Option<Self> {
        let last = *index.last()?;
        // The last string is some bytes long, and padding follows.
        let nearest = at.checked_sub(last + 2)?;
        let furthest = nearest.saturating_sub(1024);
        (furthest..=nearest).rev().find_map(|table| {
            let text = |&start: &usize| bytes.get(table + start..at)?.split(|&byte| byte == 0).next();
            let texts: Vec<&[u8]> = index.iter().map(text).collect::<Option<_>>()?;
            // Each string ends where the next begins.
            let whole = texts
                .iter()
                .zip(index)
                .zip(index.iter().skip(1))
                .all(|((text, start), next)| !text.is_empty() && start + text.len() + 1 == *next);
            let end = table + last + texts.last()?.len();
            let padded = bytes.get(end..at)?.iter().all(|&byte| byte == 0) && at - end <= 8 && at > end;
            (whole && padded && !texts.last()?.is_empty()).then_some(Tokens { table, index: at, texts })
        })
    }
}

fn rising(bytes: &[u8], at: usize) -> Option<Vec<usize>> {
    let mut index = Vec::with_capacity(TOKENS);
    for number in 0..TOKENS {
        let value = usize::from(half(bytes, at + 2 * number)?);
        if index.last().is_some_and(|&last| value < last + 2) {
            return None;
        }
        index.push(value);
    }
    Some(index)
}

/// The packed names.
struct Names {
    /// Where `num_syms` is.
    start: usize,
    count: usize,
    /// Where the packed names begin.
    names: usize,
    markers: usize,
}

impl Names {
    /// The names that end somewhere before `end`.
    fn find(bytes: &[u8], end: usize) -> Option<Self> {
        let mut at = end.checked_sub(8)? & !3;
        loop {
            if word(bytes, at) == Some(0)
                && let Some(names) = Self::before_markers(bytes, at, end)
            {
                return Some(names);
            }
            at = at.checked_sub(4)?;
        }
    }

    /// The names whose markers begin at `at`, if these are markers.
    fn before_markers(bytes: &[u8], at: usize, end: usize) -> Option<Self> {
        // 256 names take at least 2 bytes each, and at most a few hundred.
        const STEP: Range<usize> = 512..(256 * 512);
        let mut markers = vec![0usize];
        while at + 4 * markers.len() < end {
            let next = word(bytes, at + 4 * markers.len())? as usize;
            if !markers.last().is_some_and(|last| next.checked_sub(*last).is_some_and(|step| STEP.contains(&step))) {
                break;
            }
            markers.push(next);
        }
        if markers.len() < 2 {
            return None;
        }
        // From the shortest names that fit to the longest.
        let furthest = at.saturating_sub(markers.last()? + STEP.end + 16);
        let mut start = at.checked_sub(16)? & !3;
        while start >= furthest {
            if let Some(names) = Self::at(bytes, start, at, &markers) {
                return Some(names);
            }
            start = start.checked_sub(4)?;
        }
        None
    }

    /// The names with `num_syms` at `start`, if every marker agrees.
    fn at(bytes: &[u8], start: usize, markers_at: usize, markers: &[usize]) -> Option<Self> {
        let count = word(bytes, start)? as usize;
        if !COUNT.contains(&count) || word(bytes, start + 4)? != 0 {
            return None;
        }
        let names = start + 8;
        let used = markers.get(..count.div_ceil(TOKENS))?;
        // Looked at from its end, a wrong start is found out at once.
        let last = names.checked_add(*used.last()?)?;
        let tail = count - (used.len() - 1) * TOKENS;
        let end = (0..tail).try_fold(last, |at, _| next_name(bytes, at, markers_at))?;
        if end.next_multiple_of(8) != markers_at && end.next_multiple_of(4) != markers_at {
            return None;
        }
        let mut at = names;
        for number in 0..count {
            if number % TOKENS == 0 && used.get(number / TOKENS).is_none_or(|marker| names + marker != at) {
                return None;
            }
            at = next_name(bytes, at, markers_at)?;
        }
        Some(Names { start, count, names, markers: markers_at })
    }

    fn unpack(&self, bytes: &[u8], tokens: &Tokens<'_>) -> Option<Vec<(u8, String)>> {
        let mut at = self.names;
        let mut entries = Vec::with_capacity(self.count);
        let mut text = Vec::new();
        for _ in 0..self.count {
            let (start, end) = name_at(bytes, at, self.markers)?;
            text.clear();
            for token in bytes.get(start..end)? {
                text.extend_from_slice(tokens.texts.get(usize::from(*token))?);
            }
            let (letter, name) = text.split_first()?;
            if !letter.is_ascii_alphabetic() || name.is_empty() {
                return None;
            }
            entries.push((*letter, String::from_utf8_lossy(name).into_owned()));
            at = end;
        }
        Some(entries)
    }
}

/// Where the packed name at `at` has its bytes; they end before `limit`.
fn name_at(bytes: &[u8], at: usize, limit: usize) -> Option<(usize, usize)> {
    let first = usize::from(*bytes.get(at)?);
    let (start, len) = if first & 0x80 == 0 {
        (at + 1, first)
    } else {
        (at + 2, first & 0x7f | usize::from(*bytes.get(at + 1)?) << 7)
    };
    let end = start.checked_add(len)?;
    (len > 0 && end <= limit).then_some((start, end))
}

fn next_name(bytes: &[u8], at: usize, limit: usize) -> Option<usize> {
    name_at(bytes, at, limit).map(|(_, end)| end)
}

/// The symbols' addresses, in whichever of the ways they are kept.
fn addresses(bytes: &[u8], linked: u64, image: &Range<u64>, tokens: &Tokens<'_>, names: &Names) -> Option<Vec<u64>> {
    let count = names.count;
    let offsets_size = count.checked_mul(4)?.next_multiple_of(8);
    let behind = (tokens.index + 2 * TOKENS).next_multiple_of(8);
    // Since 6.4, and before.
    let layouts = [
        (Some(behind), behind.checked_add(offsets_size)),
        (names.start.checked_sub(8).and_then(|base| base.checked_sub(offsets_size)), names.start.checked_sub(8)),
    ];
    for (offsets, base) in layouts {
        let Some(offsets) = offsets else { continue };
        let offset = |number: usize| Some(word(bytes, offsets + 4 * number)?.cast_signed());
        let base = base.and_then(|base| quad(bytes, base)).filter(|base| *base != 0);
        let with_percpu = |number| {
            let offset = i64::from(offset(number)?);
            let distance = offset.unsigned_abs();
            if offset >= 0 { Some(distance) } else { base?.checked_sub(1)?.checked_add(distance) }
        };
        let plain = |number| base?.checked_add(u64::from(offset(number)?.cast_unsigned()));
        let placed = |number: usize| {
            let place = linked.checked_add((offsets + 4 * number) as u64)?;
            place.checked_add_signed(i64::from(offset(number)?))
        };
        let found = sound(count, image, with_percpu)
            .or_else(|| sound(count, image, plain))
            .or_else(|| sound(count, image, placed));
        if found.is_some() {
            return found;
        }
    }
    let absolute = [Some(behind), names.start.checked_sub(count.checked_mul(8)?)];
    absolute.into_iter().flatten().find_map(|at| sound(count, image, |number| quad(bytes, at + 8 * number)))
}

/// The addresses, if they rise and are where a kernel's are.
fn sound(count: usize, image: &Range<u64>, address: impl Fn(usize) -> Option<u64>) -> Option<Vec<u64>> {
    let mut addresses: Vec<u64> = Vec::with_capacity(count);
    let mut inside = 0;
    for number in 0..count {
        let address = address(number)?;
        if addresses.last().is_some_and(|&last| address < last) {
            return None;
        }
        if image.start <= address && address <= image.end {
            inside += 1;
        } else if address >= PERCPU_LIMIT {
            return None;
        }
        addresses.push(address);
    }
    (inside > count / 2).then_some(addresses)
}

#[cfg(test)]
mod tests;
