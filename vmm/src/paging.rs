//! Linear to physical, through the guest's own page tables (SDM vol. 3, ch. 4).
//!
//! The tables are read from guest memory, whatever the guest has put there: an entry that points
//! outside RAM is the same as one that is not present. Permissions are not checked: a debugger
//! reads and patches what the guest could not.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory};

use crate::vcpu::Registers;

mod extents;

pub use extents::{Extent, Half};

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const HUGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Bits 51:12, the widest physical address there is.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const CR4_PKE: u64 = 1 << 22;
const CR4_PKS: u64 = 1 << 24;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;

/// What the walk needs to know of a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Paging {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
}

impl From<&Registers> for Paging {
    fn from(registers: &Registers) -> Self {
        let Registers { cr0, cr3, cr4, efer, .. } = *registers;
        Paging { cr0, cr3, cr4, efer }
    }
}

/// What an instruction wants of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// To be fetched from there.
    Fetch,
    /// To load.
    Read,
    /// To store.
    Write,
}

/// A translated address and how far the same mapping reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Guest physical address.
    pub gpa: u64,
    /// Bytes from there to the end of the page.
    pub left: u64,
    /// Ring 3 may use it, as far as the U/S bits say.
    pub user: bool,
}

impl Paging {
    /// Translates `gva`; `None` if it is not mapped or not canonical.
    pub fn translate(&self, memory: &GuestMemoryMmap, gva: u64) -> Option<Mapping> {
        if self.cr0 & CR0_PG == 0 || self.cr0 & CR0_PE == 0 {
            // 32-bit linear addresses, each its own physical one.
            return (gva >> 32 == 0).then(|| Mapping { gpa: gva, left: (1 << 32) - gva, user: false });
        }
        if self.efer & EFER_LMA != 0 {
            return self.walk_long(memory, gva, |_, _| true);
        }
        if gva >> 32 != 0 {
            return None;
        }
        if self.cr4 & CR4_PAE != 0 {
            // Four page-directory pointers, 32-byte aligned; they have no huge form.
            let pointer = entry_64(memory, (self.cr3 & 0xffff_ffe0) + (gva >> 30) * 8)?;
            return walk_64(memory, pointer & FRAME, gva & 0x3fff_ffff, 2, |_, _| true);
        }
        self.walk_32(memory, gva)
    }

    /// Whether linear addresses have 57 bits, not 48, in 64-bit mode.
    pub fn is_wide(&self) -> bool {
        self.cr4 & CR4_LA57 != 0
    }

    /// Four or five levels of eight-byte entries.
    fn walk_long(&self, memory: &GuestMemoryMmap, gva: u64, allows: impl FnMut(u64, u32) -> bool) -> Option<Mapping> {
        let levels = if self.is_wide() { 5 } else { 4 };
        let sign = (gva as i64) >> (12 + 9 * levels - 1);
        (sign == 0 || sign == -1).then(|| walk_64(memory, self.cr3 & FRAME, gva, levels, allows)).flatten()
    }

    /// The pages of page tables that lead to `gva` in 64-bit mode, as far as they are there.
    pub fn tables(&self, memory: &GuestMemoryMmap, gva: u64) -> Vec<u64> {
        if self.efer & EFER_LMA == 0 {
            return Vec::new();
        }
        let mut tables = vec![self.cr3 & FRAME];
        // It is of no interest here where they lead.
        let _ = self.walk_long(memory, gva, |entry, level| {
            if level > 0 && (level > 2 || entry & HUGE == 0) {
                tables.push(entry & FRAME);
            }
            true
        });
        tables
    }

    /// Two levels of four-byte entries, with 4 MiB pages and PSE-36.
    fn walk_32(&self, memory: &GuestMemoryMmap, gva: u64) -> Option<Mapping> {
        let directory = entry_32(memory, (self.cr3 & 0xffff_f000) + (gva >> 22) * 4)?;
        if self.cr4 & CR4_PSE != 0 && directory & HUGE != 0 {
            let offset = gva & 0x3f_ffff;
            return Some(Mapping {
                gpa: large_32(directory) | offset,
                left: 0x40_0000 - offset,
                user: directory & USER != 0,
            });
        }
        let table = entry_32(memory, (directory & 0xffff_f000) + (gva >> 12 & 0x3ff) * 4)?;
        let offset = gva & 0xfff;
        let user = directory & table & USER != 0;
        Some(Mapping { gpa: (table & 0xffff_f000) | offset, left: 0x1000 - offset, user })
    }

    /// Reads from `gva` on; how many bytes could be read before the first that is not there.
    pub fn read(&self, memory: &GuestMemoryMmap, gva: u64, into: &mut [u8]) -> usize {
        self.pieces(memory, gva, into.len(), |gpa, range| read_physical(memory, gpa, &mut into[range]))
    }

    /// As [`read`](Self::read); `show` gets each piece with its guest-physical address, and may change it.
    pub fn read_shown(
        &self,
        memory: &GuestMemoryMmap,
        gva: u64,
        into: &mut [u8],
        mut show: impl FnMut(u64, &mut [u8]),
    ) -> usize {
        self.pieces(memory, gva, into.len(), |gpa, range| {
            let got = read_physical(memory, gpa, &mut into[range.clone()]);
            show(gpa, &mut into[range][..got]);
            got
        })
    }

    /// Where `len` bytes from `gva` on lie, page by page; `None` if not all of them are RAM.
    pub fn places(&self, memory: &GuestMemoryMmap, gva: u64, len: usize) -> Option<Vec<(u64, Range<usize>)>> {
        let mut places = Vec::new();
        let there = self.pieces(memory, gva, len, |gpa, range| {
            places.push((gpa, range.clone()));
            backed(memory, gpa, range.len())
        });
        (there == len).then_some(places)
    }

    /// Reads what the processor would fetch from `gva` on in 64-bit mode, in ring 3 if `user`; how
    /// many bytes. It ends where the fetch would fault, or would have to set an accessed bit first.
    pub fn fetch(&self, memory: &GuestMemoryMmap, gva: u64, user: bool, into: &mut [u8]) -> usize {
        self.pieces_by(
            |at| self.fetchable(memory, at, user),
            gva,
            into.len(),
            |gpa, range| read_physical(memory, gpa, &mut into[range]),
        )
    }

    /// Translates `gva` for an instruction fetch (SDM vol. 3, 4.6.1).
    fn fetchable(&self, memory: &GuestMemoryMmap, gva: u64, user: bool) -> Option<Mapping> {
        let (mapping, all, any) = self.walk_valid(memory, gva)?;
        let is_user = all & USER != 0;
        let permitted = if user { is_user } else { !is_user || self.cr4 & CR4_SMEP == 0 };
        (permitted && any & NO_EXECUTE == 0).then_some(mapping)
    }

    /// Whether an instruction in 64-bit mode, in ring 3 if `user`, gets at `len` bytes of RAM at `gva`
    /// without a fault (SDM vol. 3, 4.6). What protection keys, RFLAGS.AC or CR0.WP would have to
    /// decide is `false`, and so is a page without its accessed bit.
    pub fn may_access(&self, memory: &GuestMemoryMmap, gva: u64, len: usize, user: bool, access: Access) -> bool {
        let translate = |at| {
            let (mapping, all, any) = self.walk_valid(memory, at)?;
            let is_user = all & USER != 0;
            let (keys, guard) = match access {
                _ if is_user && access == Access::Fetch => (0, CR4_SMEP),
                _ if is_user => (CR4_PKE, CR4_SMAP),
                _ => (CR4_PKS, 0),
            };
            let ring = if user { is_user } else { self.cr4 & guard == 0 };
            let may_run = any & NO_EXECUTE == 0;
            let permitted = match access {
                Access::Fetch => may_run,
                Access::Read => may_run || self.efer & EFER_NXE != 0,
                Access::Write => all & WRITABLE != 0 && (may_run || self.efer & EFER_NXE != 0),
            };
            (ring && permitted && self.cr4 & keys == 0).then_some(mapping)
        };
        let is_long = self.cr0 & CR0_PG != 0 && self.efer & EFER_LMA != 0;
        is_long && self.pieces_by(translate, gva, len, |gpa, range| backed(memory, gpa, range.len())) == len
    }

    /// Translates `gva` in long mode, and gives the bits that all entries on the way have and those that any
    /// has; `None` if a reserved bit is set or an accessed bit is not.
    fn walk_valid(&self, memory: &GuestMemoryMmap, gva: u64) -> Option<(Mapping, u64, u64)> {
        let (mut all, mut any) = (u64::MAX, 0);
        let mapping = self.walk_long(memory, gva, |entry, level| {
            (all, any) = (all & entry, any | entry);
            // Reserved: the size bit high up, and between a large page's PAT bit and its frame.
            let huge = entry & HUGE != 0 && level > 0;
            !(huge && (level > 2 || entry & ((1 << (12 + 9 * level)) - 1) & !0x1fff != 0))
        })?;
        (all & ACCESSED != 0).then_some((mapping, all, any))
    }

    /// Writes all of `bytes` from `gva` on; whether it was done. If not, nothing was written.
    pub fn write(&self, memory: &GuestMemoryMmap, gva: u64, bytes: &[u8]) -> bool {
        let there = self.pieces(memory, gva, bytes.len(), |gpa, range| backed(memory, gpa, range.len()));
        there == bytes.len()
            && self.pieces(memory, gva, bytes.len(), |gpa, range| write_physical(memory, gpa, &bytes[range]))
                == bytes.len()
    }

    /// Calls `each` for the pieces of the range that lie in one page; it says how many bytes of
    /// its piece it could handle. The sum, up to the first short one.
    fn pieces(
        &self,
        memory: &GuestMemoryMmap,
        gva: u64,
        len: usize,
        each: impl FnMut(u64, Range<usize>) -> usize,
    ) -> usize {
        self.pieces_by(|at| self.translate(memory, at), gva, len, each)
    }

    /// As [`pieces`](Self::pieces), with a translation of the caller's.
    fn pieces_by(
        &self,
        translate: impl Fn(u64) -> Option<Mapping>,
        gva: u64,
        len: usize,
        mut each: impl FnMut(u64, Range<usize>) -> usize,
    ) -> usize {
        let mut done = 0;
        while done < len {
            let Some(mapping) = gva.checked_add(done as u64).and_then(&translate) else { break };
            let want = (len - done).min(usize::try_from(mapping.left).unwrap_or(usize::MAX));
            let got = each(mapping.gpa, done..done + want);
            done += got;
            if got < want {
                break;
            }
        }
        done
    }
}

/// Walks `levels` levels of eight-byte entries. `allows` is asked about each entry and its level, 0
/// for that of a 4 KiB page.
fn walk_64(
    memory: &GuestMemoryMmap,
    mut table: u64,
    gva: u64,
    levels: u32,
    mut allows: impl FnMut(u64, u32) -> bool,
) -> Option<Mapping> {
    let mut user = true;
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let entry = entry_64(memory, table + (gva >> shift & 0x1ff) * 8).filter(|entry| allows(*entry, level))?;
        user &= entry & USER != 0;
        let is_leaf = level == 0 || (level <= 2 && entry & HUGE != 0);
        if is_leaf {
            let size = 1u64 << shift;
            let offset = gva & (size - 1);
            return Some(Mapping { gpa: (entry & FRAME & !(size - 1)) | offset, left: size - offset, user });
        }
        table = entry & FRAME;
    }
    None
}

/// The 4 MiB page that an entry of four bytes maps (PSE-36).
fn large_32(entry: u64) -> u64 {
    (entry & 0xffc0_0000) | ((entry >> 13) & 0xff) << 32
}

fn entry_64(memory: &GuestMemoryMmap, at: u64) -> Option<u64> {
    let entry: u64 = memory.read_obj(GuestAddress(at)).ok()?;
    (entry & PRESENT != 0).then_some(entry)
}

fn entry_32(memory: &GuestMemoryMmap, at: u64) -> Option<u64> {
    let entry: u32 = memory.read_obj(GuestAddress(at)).ok()?;
    (u64::from(entry) & PRESENT != 0).then_some(entry.into())
}

/// Reads RAM from `gpa` on; how many bytes could be read before the first that is not RAM.
pub fn read_physical(memory: &GuestMemoryMmap, gpa: u64, into: &mut [u8]) -> usize {
    memory.read(into, GuestAddress(gpa)).unwrap_or(0)
}

/// Writes RAM from `gpa` on; how many bytes could be written before the first that is not RAM.
pub fn write_physical(memory: &GuestMemoryMmap, gpa: u64, bytes: &[u8]) -> usize {
    memory.write(bytes, GuestAddress(gpa)).unwrap_or(0)
}

/// Writes all of `bytes` at `gpa`, or nothing; whether it was done.
pub fn write_all_physical(memory: &GuestMemoryMmap, gpa: u64, bytes: &[u8]) -> bool {
    backed(memory, gpa, bytes.len()) == bytes.len() && write_physical(memory, gpa, bytes) == bytes.len()
}

/// Stores `new` at `gpa` as the processor would, and gives what was there in `old`, which is as long; how many bytes
/// were RAM. An aligned store of 1, 2, 4 or 8 bytes is one access: another thread sees all of it or nothing, and of
/// two such stores one sees what the other has left.
pub fn exchange_physical(memory: &GuestMemoryMmap, gpa: u64, new: &[u8], old: &mut [u8]) -> usize {
    macro_rules! swap {
        ($value:ty, $atomic:ty) => {{
            let there = memory.get_slice(GuestAddress(gpa), new.len()).ok();
            if let (Some(there), Ok(bytes)) = (there, <[u8; size_of::<$value>()]>::try_from(new))
                && let Ok(there) = there.get_atomic_ref::<$atomic>(0)
            {
                let was = there.swap(<$value>::from_ne_bytes(bytes), Ordering::SeqCst);
                old.copy_from_slice(&was.to_ne_bytes());
                return new.len();
            }
        }};
    }
    match new.len() {
        1 => swap!(u8, AtomicU8),
        2 => swap!(u16, AtomicU16),
        4 => swap!(u32, AtomicU32),
        8 => swap!(u64, AtomicU64),
        _ => {}
    }
    let there = read_physical(memory, gpa, old);
    write_physical(memory, gpa, &new[..there.min(new.len())])
}

/// How many bytes from `gpa` on, up to `len`, are RAM.
pub(crate) fn backed(memory: &GuestMemoryMmap, gpa: u64, len: usize) -> usize {
    if len == 0 || memory.check_range(GuestAddress(gpa), len) {
        return len;
    }
    (0..len)
        .take_while(|&n| gpa.checked_add(n as u64).is_some_and(|at| memory.address_in_range(GuestAddress(at))))
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(super) fn memory() -> GuestMemoryMmap {
        // Two regions with a hole between them, as around the PCI hole.
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x40_0000), (GuestAddress(0x80_0000), 0x10_0000)]).unwrap()
    }

    pub(super) fn put(memory: &GuestMemoryMmap, at: u64, entry: u64) {
        memory.write_obj(entry, GuestAddress(at)).unwrap();
    }

    pub(super) const LONG: Paging = Paging { cr0: CR0_PG | CR0_PE, cr3: 0x1000, cr4: CR4_PAE, efer: EFER_LMA };

    #[test]
    fn four_levels_and_every_page_size() {
        let m = memory();
        put(&m, 0x1000, 0x2003);
        put(&m, 0x2000, 0x3003);
        put(&m, 0x2008, 0x83); // 1 GiB page at gva 0x4000_0000, gpa 0
        put(&m, 0x3000, 0x4003);
        put(&m, 0x3008, 0x20_0083); // 2 MiB page at gva 0x20_0000
        put(&m, 0x4000 + 8 * 5, 0x8000_0000_0000_9003); // 4 KiB page at gva 0x5000, NX set
        assert_eq!(LONG.translate(&m, 0x5123), Some(Mapping { gpa: 0x9123, left: 0xedd, user: false }));
        assert_eq!(LONG.translate(&m, 0x20_0010), Some(Mapping { gpa: 0x20_0010, left: 0x1f_fff0, user: false }));
        assert_eq!(LONG.translate(&m, 0x4000_0010), Some(Mapping { gpa: 0x10, left: 0x3fff_fff0, user: false }));
        assert_eq!(LONG.translate(&m, 0x6000), None);
        assert_eq!(LONG.translate(&m, 0x0000_8000_0000_0000), None, "not canonical");
        assert_eq!(LONG.translate(&m, 0xffff_8000_0000_0000), None, "canonical, not mapped");
    }

    #[test]
    fn what_ring_3_may_use_has_the_bit_on_every_level() {
        let m = memory();
        let entries = [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000), (0x4000, 0x9000)];
        for without in 0..5 {
            for (n, (at, next)) in entries.into_iter().enumerate() {
                put(&m, at, next | if n == without { 3 } else { 7 });
            }
            assert_eq!(LONG.translate(&m, 0x42), Some(Mapping { gpa: 0x9042, left: 0xfbe, user: without == 4 }));
        }
    }

    #[test]
    fn five_levels() {
        let m = memory();
        let paging = Paging { cr4: CR4_PAE | CR4_LA57, ..LONG };
        put(&m, 0x1000 + 8 * 511, 0x2003);
        put(&m, 0x2000, 0x3003);
        put(&m, 0x3000, 0x4003);
        put(&m, 0x4000, 0x5003);
        put(&m, 0x5000, 0x9003);
        assert_eq!(paging.translate(&m, 0xffff_0000_0000_0042).map(|x| x.gpa), Some(0x9042));
        assert_eq!(paging.translate(&m, 0x00ff_0000_0000_0042), None);
        assert_eq!(paging.translate(&m, 0x0100_0000_0000_0000), None, "not canonical with 57 bits");
    }

    #[test]
    fn what_the_processor_would_not_fetch_is_not_fetched() {
        const CODE: u64 = 0x9000;
        const FRAMES: [u64; 4] = [0x2000, 0x3000, 0x4000, CODE];
        let fetched = |changed: usize, set: u64, clear: u64, paging: Paging, user: bool| {
            let m = memory();
            for (n, frame) in FRAMES.into_iter().enumerate() {
                let entry = frame | PRESENT | USER | ACCESSED;
                let entry = if n == changed { (entry | set) & !clear } else { entry };
                put(&m, 0x1000 * (n as u64 + 1), entry);
            }
            paging.fetch(&m, 0xff8, user, &mut [0; 15])
        };
        let smep = Paging { cr4: CR4_PAE | CR4_SMEP, ..LONG };
        for level in 0..4 {
            assert_eq!(fetched(level, 0, 0, LONG, true), 8, "up to the end of what is mapped");
            assert_eq!(fetched(level, 0, PRESENT, LONG, true), 0);
            assert_eq!(fetched(level, 0, ACCESSED, LONG, true), 0);
            assert_eq!(fetched(level, NO_EXECUTE, 0, LONG, true), 0);
            assert_eq!(fetched(level, 0, USER, LONG, true), 0);
            assert_eq!(fetched(level, 0, USER, LONG, false), 8);
            assert_eq!(fetched(level, 0, 0, smep, false), 0, "ring 0 does not run ring 3's pages");
            assert_eq!(fetched(level, 0, USER, smep, false), 8);
        }
        assert_eq!(fetched(0, HUGE, 0, LONG, true), 0, "reserved");
        assert_eq!(fetched(2, HUGE, 0, LONG, true), 0, "reserved: a large page that is not aligned");
    }

    #[test]
    fn what_would_fault_is_not_accessed() {
        const DATA: u64 = 0x9000;
        const FRAMES: [u64; 4] = [0x2000, 0x3000, 0x4000, DATA];
        let nx = Paging { efer: LONG.efer | EFER_NXE, ..LONG };
        let with = |cr4: u64| Paging { cr4: CR4_PAE | cr4, ..nx };
        let may = |paging: Paging, user: bool, access: Access, clear: u64, set: u64| {
            // The same whichever level says it.
            let each = [0, 1, 2, 3].map(|changed| {
                let m = memory();
                for (n, frame) in FRAMES.into_iter().enumerate() {
                    let entry = frame | PRESENT | WRITABLE | USER | ACCESSED;
                    let entry = if n == changed { (entry | set) & !clear } else { entry };
                    put(&m, 0x1000 * (n as u64 + 1), entry);
                }
                assert!(!paging.may_access(&m, 0xff9, 8, user, access), "the next page is not mapped");
                paging.may_access(&m, 0xff8, 8, user, access)
            });
            assert_eq!(each, [each[0]; 4]);
            each[0]
        };
        use Access::{Fetch, Read, Write};
        for (user, access) in
            [(false, Fetch), (false, Read), (false, Write), (true, Fetch), (true, Read), (true, Write)]
        {
            assert!(may(nx, user, access, 0, 0));
            assert!(!may(nx, user, access, PRESENT, 0));
            assert!(!may(nx, user, access, ACCESSED, 0));
            assert_eq!(may(nx, user, access, USER, 0), !user);
            assert_eq!(may(nx, user, access, WRITABLE, 0), access != Write);
            assert_eq!(may(nx, user, access, 0, NO_EXECUTE), access != Fetch);
            assert!(!may(LONG, user, access, 0, NO_EXECUTE), "reserved without EFER.NXE");
            assert_eq!(may(with(CR4_SMEP), user, access, 0, 0), user || access != Fetch);
            assert_eq!(may(with(CR4_SMAP), user, access, 0, 0), user || access == Fetch);
            assert_eq!(may(with(CR4_PKE), user, access, 0, 0), access == Fetch);
            assert!(may(with(CR4_SMEP | CR4_SMAP), user, access, if user { 0 } else { USER }, 0));
            assert!(!may(Paging::default(), user, access, 0, 0), "no long mode");
        }
        assert!(!may(with(CR4_PKS), false, Write, USER, 0));
    }

    #[test]
    fn the_older_modes() {
        let m = memory();
        let real = Paging::default();
        assert_eq!(real.translate(&m, 0x9123).map(|x| x.gpa), Some(0x9123));
        assert_eq!(real.translate(&m, 1 << 32), None);
        let flat32 = Paging { cr0: CR0_PE | CR0_PG, cr3: 0x1000, cr4: CR4_PSE, efer: 0 };
        m.write_obj(0x2003u32, GuestAddress(0x1000)).unwrap();
        m.write_obj(0x0000_2083u32, GuestAddress(0x1004)).unwrap(); // 4 MiB page, PSE-36 bit 32
        m.write_obj(0x9003u32, GuestAddress(0x2004)).unwrap();
        assert_eq!(flat32.translate(&m, 0x1042).map(|x| x.gpa), Some(0x9042));
        assert_eq!(flat32.translate(&m, 0x40_0042).map(|x| x.gpa), Some(0x1_0000_0042));
        let pae = Paging { cr0: CR0_PE | CR0_PG, cr3: 0x1020, cr4: CR4_PAE, efer: 0 };
        put(&m, 0x1020, 0x5001);
        put(&m, 0x5000, 0x6003);
        put(&m, 0x6008, 0x9003);
        assert_eq!(pae.translate(&m, 0x1042).map(|x| x.gpa), Some(0x9042));
        assert_eq!(pae.translate(&m, 0x4000_0000), None);
    }

    #[test]
    fn reads_cross_pages_and_stop_short_where_nothing_is_mapped() {
        let m = memory();
        put(&m, 0x1000, 0x2003);
        put(&m, 0x2000, 0x3003);
        put(&m, 0x3000, 0x4003);
        put(&m, 0x4000, 0xa003); // gva 0 -> a000
        put(&m, 0x4008, 0x9003); // gva 1000 -> 9000
        put(&m, 0x4018, 0x50_0003); // gva 3000 -> the hole
        m.write_slice(b"abcd", GuestAddress(0xaffc)).unwrap();
        m.write_slice(b"efgh", GuestAddress(0x9000)).unwrap();
        let mut bytes = [0; 8];
        assert_eq!(LONG.read(&m, 0xffc, &mut bytes), 8);
        assert_eq!(&bytes, b"abcdefgh");
        let mut long = [0; 0x2000];
        assert_eq!(LONG.read(&m, 0x1000, &mut long), 0x1000);
        assert_eq!(LONG.read(&m, 0x2000, &mut long), 0);
        assert_eq!(LONG.read(&m, 0x3000, &mut long), 0, "mapped, but no RAM behind it");
        assert_eq!(LONG.read(&m, u64::MAX - 2, &mut long), 0);
        assert!(LONG.write(&m, 0xffe, b"WXYZ"));
        assert_eq!(LONG.read(&m, 0xffc, &mut bytes), 8);
        assert_eq!(&bytes, b"abWXYZgh");
        assert!(!LONG.write(&m, 0x1ffe, b"1234"), "half of it is not mapped");
        let mut tail = [0; 2];
        LONG.read(&m, 0x1ffe, &mut tail);
        assert_eq!(tail, [0, 0], "all or nothing");
    }

    #[test]
    fn an_exchange_gives_what_was_there() {
        let m = memory();
        m.write_slice(&[0xaa; 32], GuestAddress(0x1000)).unwrap();
        let mut bytes = [0xaa; 32];
        // Aligned, unaligned, odd sizes.
        for (at, len) in [(0, 1), (2, 2), (4, 4), (8, 8), (3, 2), (13, 8), (21, 3), (24, 8), (0, 8)] {
            let new: Vec<u8> = (0..len).map(|n| (at * 16 + n) as u8).collect();
            let mut old = vec![0; len];
            assert_eq!(exchange_physical(&m, 0x1000 + at as u64, &new, &mut old), len);
            assert_eq!(old, bytes[at..at + len]);
            bytes[at..at + len].copy_from_slice(&new);
            let mut now = [0; 32];
            m.read_slice(&mut now, GuestAddress(0x1000)).unwrap();
            assert_eq!(now, bytes);
        }
        let mut old = [0; 8];
        assert_eq!(exchange_physical(&m, 0x3f_fffc, &[1; 8], &mut old), 4, "the end of RAM");
        assert_eq!(exchange_physical(&m, 0x40_0000, &[1; 8], &mut old), 0);
        assert_eq!(exchange_physical(&m, u64::MAX, &[1; 8], &mut old), 0);
    }

    /// A second, slower reading of the four-level walk, entry by entry.
    fn naive(m: &GuestMemoryMmap, gva: u64) -> Option<u64> {
        let at = |table: u64, index: u64| m.read_obj::<u64>(GuestAddress((table & FRAME) + index * 8)).ok();
        let p4 = at(0x1000, gva / (1 << 39) % 512).filter(|e| e % 2 == 1)?;
        let p3 = at(p4, gva / (1 << 30) % 512).filter(|e| e % 2 == 1)?;
        if p3 / 128 % 2 == 1 {
            return Some((p3 & 0x000f_ffff_c000_0000) + gva % (1 << 30));
        }
        let p2 = at(p3, gva / (1 << 21) % 512).filter(|e| e % 2 == 1)?;
        if p2 / 128 % 2 == 1 {
            return Some((p2 & 0x000f_ffff_ffe0_0000) + gva % (1 << 21));
        }
        let p1 = at(p2, gva / 4096 % 512).filter(|e| e % 2 == 1)?;
        Some((p1 & FRAME) + gva % 4096)
    }

    proptest! {
        #[test]
        fn hostile_tables_agree_with_the_naive_walk(
            entries in prop::collection::vec((0u64..4, 0u64..512, any::<u64>(), 0u64..6), 0..200),
            gvas in prop::collection::vec(any::<u64>(), 1..50),
            cr0: u64, cr3: u64, cr4: u64, efer: u64,
        ) {
            let m = memory();
            for (table, index, noise, target) in entries {
                // Half of the entries point at the tables, the others anywhere.
                let entry = if target < 4 { (0x1000 * (target + 1)) | (noise & 0xfff) } else { noise };
                put(&m, 0x1000 * (table + 1) + index * 8, entry);
            }
            for gva in gvas {
                let low = gva & 0x0000_7fff_ffff_ffff;
                prop_assert_eq!(LONG.translate(&m, low).map(|x| x.gpa), naive(&m, low));
                // Any mode, any registers: no panic.
                let any = Paging { cr0, cr3, cr4, efer };
                let mut bytes = [0; 32];
                any.read(&m, gva, &mut bytes);
                any.write(&m, gva, &bytes);
            }
        }
    }
}
