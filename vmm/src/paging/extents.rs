//! All that a guest's page tables map, in order, for whoever wants the whole and not one address.

use std::collections::HashMap;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{CR0_PE, CR0_PG, CR4_PAE, CR4_PSE, EFER_LMA, FRAME, HUGE, PRESENT, Paging, large_32};

/// How often one table may be reached in one walk. Kernels do map one table at two or three places;
/// tables that are shared all over (the shadow of KASAN, or a guest's that means harm) would make
/// 2^36 pages of a few.
const VISITS: u8 = 4;

/// A stretch of linear addresses that leads to one stretch of physical ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First linear address.
    pub gva: u64,
    /// Where it leads, as a guest-physical address.
    pub gpa: u64,
    /// Length in bytes, never 0.
    pub len: u64,
}

/// One half of the linear addresses. Without 64-bit paging, all of them are the lower half.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// From 0 up: the user's in 64-bit Linux.
    Lower,
    /// Up to 2^64: the kernel's.
    Upper,
}

impl Paging {
    /// Calls `each` for what is mapped in one half, ascending and as long as possible, until it says
    /// `false`. The physical side need not be RAM. A page of tables that leads to itself or is shared by
    /// many is followed a few times only, so the walk ends soon whatever the guest has made.
    pub fn extents(&self, memory: &GuestMemoryMmap, half: Half, each: &mut dyn FnMut(Extent) -> bool) {
        let mut walk = Walk { memory, visits: HashMap::new(), last: None, each, more: true };
        let paged = self.cr0 & CR0_PG != 0 && self.cr0 & CR0_PE != 0;
        match half {
            Half::Lower if !paged => walk.leaf(0, 0, 1 << 32),
            _ if paged && self.efer & EFER_LMA != 0 => {
                let levels = if self.is_wide() { 5 } else { 4 };
                let top = if half == Half::Lower { 0..256 } else { 256..512 };
                walk.table(self.cr3 & FRAME, levels - 1, 0, levels, top);
            }
            Half::Lower if self.cr4 & CR4_PAE != 0 => walk.pointers(self.cr3 & 0xffff_ffe0),
            Half::Lower => walk.directory_32(self.cr3 & 0xffff_f000, self.cr4 & CR4_PSE != 0),
            Half::Upper => {}
        }
        walk.finish();
    }
}

/// A walk under way.
struct Walk<'a> {
    memory: &'a GuestMemoryMmap,
    visits: HashMap<(u64, u32), u8>,
    /// Found, and perhaps not at its end yet.
    last: Option<Extent>,
    each: &'a mut dyn FnMut(Extent) -> bool,
    more: bool,
}

impl Walk<'_> {
    /// The entries `which` of the table at `table`, whose first would map `base`.
    fn table(&mut self, table: u64, level: u32, base: u64, levels: u32, which: std::ops::Range<usize>) {
        let visits = self.visits.entry((table, level)).or_default();
        if *visits == VISITS {
            return;
        }
        *visits += 1;
        let mut bytes = [0; 4096];
        if self.memory.read_slice(&mut bytes, GuestAddress(table)).is_err() {
            return;
        }
        let shift = 12 + 9 * level;
        let (entries, _) = bytes.as_chunks::<8>();
        for (entry, index) in entries[which.clone()].iter().zip((which.start as u64)..) {
            let entry = u64::from_le_bytes(*entry);
            if !self.more {
                return;
            }
            if entry & PRESENT == 0 {
                continue;
            }
            let gva = sign_extend(base | index << shift, levels);
            let size = 1 << shift;
            if level == 0 || (level <= 2 && entry & HUGE != 0) {
                self.leaf(gva, entry & FRAME & !(size - 1), size);
            } else {
                self.table(entry & FRAME, level - 1, gva, levels, 0..512);
            }
        }
    }

    /// The four page-directory pointers of PAE paging.
    fn pointers(&mut self, at: u64) {
        for index in 0..4 {
            let pointer: u64 = self.memory.read_obj(GuestAddress(at + index * 8)).unwrap_or(0);
            if pointer & PRESENT != 0 && self.more {
                // Linear addresses have 32 bits here: nothing is extended.
                self.table(pointer & FRAME, 1, index << 30, 5, 0..512);
            }
        }
    }

    /// Paging with four-byte entries.
    fn directory_32(&mut self, directory: u64, large: bool) {
        for (index, entry) in self.entries_32(directory).into_iter().enumerate() {
            let base = (index as u64) << 22;
            if entry & PRESENT == 0 || !self.more {
                continue;
            }
            if large && entry & HUGE != 0 {
                self.leaf(base, large_32(entry), 1 << 22);
                continue;
            }
            for (index, entry) in self.entries_32(entry & 0xffff_f000).into_iter().enumerate() {
                if entry & PRESENT != 0 && self.more {
                    self.leaf(base | (index as u64) << 12, entry & 0xffff_f000, 1 << 12);
                }
            }
        }
    }

    fn entries_32(&self, table: u64) -> Vec<u64> {
        let mut bytes = [0; 4096];
        if self.memory.read_slice(&mut bytes, GuestAddress(table)).is_err() {
            return Vec::new();
        }
        let (entries, _) = bytes.as_chunks::<4>();
        entries.iter().map(|entry| u32::from_le_bytes(*entry).into()).collect()
    }

    /// A mapped page; it comes after all that were found before.
    fn leaf(&mut self, gva: u64, gpa: u64, len: u64) {
        if let Some(last) = &mut self.last
            && last.gva.checked_add(last.len) == Some(gva)
            && last.gpa.checked_add(last.len) == Some(gpa)
        {
            last.len += len;
            return;
        }
        self.finish();
        self.last = Some(Extent { gva, gpa, len });
    }

    fn finish(&mut self) {
        if let Some(extent) = self.last.take().filter(|_| self.more) {
            self.more = (self.each)(extent);
        }
    }
}

/// Copies the highest bit that `levels` levels translate into those above it.
fn sign_extend(gva: u64, levels: u32) -> u64 {
    let unused = 64 - (12 + 9 * levels);
    ((gva << unused) as i64 >> unused) as u64
}

#[cfg(test)]
mod tests {
    use super::super::tests::{LONG, memory, put};
    use super::*;
    use crate::paging::CR4_LA57;
    use proptest::prelude::*;

    fn all(paging: &Paging, m: &GuestMemoryMmap, half: Half) -> Vec<Extent> {
        let mut found = Vec::new();
        paging.extents(m, half, &mut |extent| {
            found.push(extent);
            true
        });
        found
    }

    #[test]
    fn neighbours_are_one_extent_and_large_pages_keep_their_size() {
        let m = memory();
        put(&m, 0x1000 + 511 * 8, 0x2003);
        put(&m, 0x1000, 0x2003);
        put(&m, 0x2000 + 510 * 8, 0x3003);
        put(&m, 0x3000, 0x4003);
        put(&m, 0x3000 + 8, 0x20_0083);
        for (index, frame) in [(3, 0x7000), (4, 0x8000), (5, 0x6000), (511, 0x1f_f000)] {
            put(&m, 0x4000 + index * 8, frame | 3);
        }
        let expected = |base: u64| {
            [(0x3000, 0x7000, 0x2000), (0x5000, 0x6000, 0x1000), (0x1f_f000, 0x1f_f000, 0x20_1000)]
                .map(|(at, gpa, len)| Extent { gva: base + at, gpa, len })
        };
        assert_eq!(all(&LONG, &m, Half::Upper), expected(0xffff_ffff_8000_0000));
        assert_eq!(all(&LONG, &m, Half::Lower), expected(510 << 30));
        let mut first = Vec::new();
        LONG.extents(&m, Half::Upper, &mut |extent| {
            first.push(extent);
            false
        });
        assert_eq!(first, expected(0xffff_ffff_8000_0000)[..1]);
    }

    #[test]
    fn a_table_that_leads_to_itself_ends() {
        let m = memory();
        for index in 0..512 {
            put(&m, 0x1000 + index * 8, 0x1003);
        }
        assert!(all(&LONG, &m, Half::Upper).len() < 10_000);
        let wide = Paging { cr4: LONG.cr4 | CR4_LA57, ..LONG };
        assert!(all(&wide, &m, Half::Upper).len() < 10_000);
    }

    #[test]
    fn without_long_mode_all_is_in_the_lower_half() {
        let m = memory();
        let off = Paging { cr0: 1, ..Paging::default() };
        assert_eq!(all(&off, &m, Half::Lower), [Extent { gva: 0, gpa: 0, len: 1 << 32 }]);
        let pae = Paging { cr0: CR0_PE | CR0_PG, cr3: 0x1020, cr4: CR4_PAE, efer: 0 };
        put(&m, 0x1020 + 3 * 8, 0x2001);
        put(&m, 0x2000, 0x20_0083);
        put(&m, 0x2000 + 511 * 8, 0x40_0083);
        let expected = [(0xc000_0000, 0x20_0000), (0xffe0_0000, 0x40_0000)];
        assert_eq!(all(&pae, &m, Half::Lower), expected.map(|(gva, gpa)| Extent { gva, gpa, len: 0x20_0000 }));
        let plain = Paging { cr0: CR0_PE | CR0_PG, cr3: 0x3000, cr4: CR4_PSE, efer: 0 };
        m.write_obj(0x4003_u32, GuestAddress(0x3000)).unwrap();
        m.write_obj(0x5003_u32, GuestAddress(0x4000 + 1023 * 4)).unwrap();
        m.write_obj(0x0080_2083_u32, GuestAddress(0x3000 + 1023 * 4)).unwrap();
        let expected = [
            Extent { gva: 0x3f_f000, gpa: 0x5000, len: 0x1000 },
            Extent { gva: 0xffc0_0000, gpa: 0x1_0080_0000, len: 0x40_0000 },
        ];
        assert_eq!(all(&plain, &m, Half::Lower), expected);
        for paging in [off, pae, plain] {
            assert_eq!(all(&paging, &m, Half::Upper), []);
        }
    }

    proptest! {
        #[test]
        fn extents_are_what_translates(
            entries in prop::collection::vec((0u64..4, 0u64..512, any::<u64>(), 0u64..6), 0..60),
            probes in prop::collection::vec(any::<u64>(), 1..50),
            cr0: u64, cr3: u64, cr4: u64, efer: u64,
        ) {
            let m = memory();
            for (table, index, noise, target) in entries {
                let entry = if target < 4 { (0x1000 * (target + 1)) | (noise & 0xfff) } else { noise };
                put(&m, 0x1000 * (table + 1) + index * 8, entry);
            }
            for half in [Half::Lower, Half::Upper] {
                let found = all(&LONG, &m, half);
                let mut end = 0_u64;
                for (n, extent) in found.iter().enumerate() {
                    prop_assert!(extent.gva >= end && extent.len > 0);
                    prop_assert_eq!(extent.gva >> 63, u64::from(half == Half::Upper));
                    end = extent.gva.saturating_add(extent.len);
                    for at in [0, extent.len - 1, probes[n % probes.len()] % extent.len] {
                        prop_assert_eq!(LONG.translate(&m, extent.gva + at).map(|x| x.gpa), Some(extent.gpa + at));
                    }
                }
                // Any mode, any registers: no panic, and an end.
                all(&Paging { cr0, cr3, cr4, efer }, &m, half);
            }
        }
    }
}
