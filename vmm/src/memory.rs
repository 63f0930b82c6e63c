//! Guest memory: RAM below the PCI hole, the rest from 4 GiB, and the map that the guest is told.
//!
//! ```text
//!  0          3 GiB        4 GiB
//!  | RAM ...  | PCI hole   | RAM that did not fit below ...
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::boot::layout;
use crate::debug::INT3;
use crate::limits::{MAX_MEMORY, MIB, MIN_MEMORY, PAGE_SIZE, PCI_HOLE_END, PCI_HOLE_START};
use crate::paging::{read_physical, write_all_physical};

/// Why guest memory could not be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The size is outside of what a machine may have.
    #[error(
        "guest memory of {size} bytes is out of range; give between {} MiB and {} MiB",
        MIN_MEMORY / MIB,
        MAX_MEMORY / MIB
    )]
    OutOfRange {
        /// The size asked for, in bytes.
        size: u64,
    },
    /// The size is no multiple of the page size.
    #[error("guest memory of {size} bytes is not a whole number of pages; give a multiple of {PAGE_SIZE} bytes")]
    NotPaged {
        /// The size asked for, in bytes.
        size: u64,
    },
    /// The host refused the mapping.
    #[error("the host cannot map {size} bytes of guest memory ({reason}); ask for less memory")]
    Map {
        /// The size asked for, in bytes.
        size: u64,
        /// What the host said.
        reason: String,
    },
}

/// What a range of the guest-physical address space is, with the numbers of the ACPI specification (15.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Kind {
    /// Usable RAM.
    Ram = 1,
    /// Not to be used by the guest.
    Reserved = 2,
    /// RAM that firmware keeps for as long as the machine runs.
    AcpiNvs = 4,
}

/// One line of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct E820Entry {
    /// First guest-physical address.
    pub start: u64,
    /// Length in bytes, never 0.
    pub size: u64,
    /// What it is.
    pub kind: E820Kind,
}

/// One memory slot for KVM_SET_USER_MEMORY_REGION (KVM API 4.35).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Slot number, from 0.
    pub slot: u32,
    /// First guest-physical address, page aligned.
    pub guest_phys_addr: u64,
    /// Length in bytes, a multiple of the page size.
    pub memory_size: u64,
    /// Address of the mapping in this process. Valid for as long as the [`GuestRam`] (or a clone of it) lives.
    pub userspace_addr: u64,
}

/// The guest's RAM. Cloning shares the memory.
#[derive(Clone, Debug)]
pub struct GuestRam {
    mem: GuestMemoryMmap,
    size: u64,
    watched: Arc<Watched>,
}

/// What a device has stored to a page that somebody watches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceStore {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// What was there.
    pub old: Vec<u8>,
    /// What is there now.
    pub new: Vec<u8>,
}

/// What the debugger does to guest memory, as far as it is the devices' business.
#[derive(Default)]
struct Watched {
    /// The pages that somebody watches.
    pages: RwLock<BTreeSet<u64>>,
    /// The stores of devices to them that nobody has looked at yet.
    stores: Mutex<Vec<DeviceStore>>,
    any: AtomicBool,
    /// Rung when there is one.
    bell: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// The bytes under INT3 patches, by address.
    patched: RwLock<BTreeMap<u64, u8>>,
}

impl std::fmt::Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watched").field("pages", &self.pages).field("stores", &self.stores).finish_non_exhaustive()
    }
}

impl GuestRam {
    /// Maps `size` bytes of zeroed RAM (pages are taken from the host as the guest touches them).
    pub fn new(size: u64) -> Result<Self, MemoryError> {
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&size) {
            return Err(MemoryError::OutOfRange { size });
        }
        if !size.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::NotPaged { size });
        }
        let map = |reason: String| MemoryError::Map { size, reason };
        let ranges = ram_ranges(size)
            .into_iter()
            .map(|(start, len)| match usize::try_from(len) {
                Ok(len) => Ok((GuestAddress(start), len)),
                Err(e) => Err(map(e.to_string())),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mem = GuestMemoryMmap::from_ranges(&ranges).map_err(|e| map(e.to_string()))?;
        Ok(Self { mem, size, watched: Arc::default() })
    }

    /// The memory itself, by guest-physical address.
    pub fn mem(&self) -> &GuestMemoryMmap {
        &self.mem
    }

    /// All RAM, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// End (exclusive) of the RAM below the PCI hole.
    pub fn low_end(&self) -> u64 {
        self.size.min(PCI_HOLE_START)
    }

    /// Bytes of RAM from 4 GiB up.
    pub fn high_size(&self) -> u64 {
        self.size - self.low_end()
    }

    /// The ranges of RAM as (start, length), lowest first.
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        ram_ranges(self.size)
    }

    /// Writes for a device, on behalf of the guest; whether all of it was RAM. If not, nothing was
    /// written. What goes to a watched page is told to those who watch, as a store of the guest's would be (law 65).
    ///
    /// Whoever is not the guest writes to [`mem`](Self::mem), and nobody is told.
    pub fn device_write(&self, gpa: u64, bytes: &[u8]) -> bool {
        self.told(gpa, bytes.len(), || write_all_physical(&self.mem, gpa, bytes))
    }

    /// Runs `store`, which writes `len` bytes at `gpa` for a device and says whether it did, and tells those who watch.
    pub(crate) fn told(&self, gpa: u64, len: usize, store: impl FnOnce() -> bool) -> bool {
        if len == 0 || !self.is_watched(gpa, len as u64) {
            return store();
        }
        let (mut old, mut new) = (vec![0; len], vec![0; len]);
        let done = read_physical(&self.mem, gpa, &mut old) == len && store();
        if done && read_physical(&self.mem, gpa, &mut new) == len {
            lock(&self.watched.stores).push(DeviceStore { gpa, old, new });
            self.watched.any.store(true, Ordering::Release);
            if let Some(ring) = self.watched.bell.get() {
                ring();
            }
        }
        done
    }

    /// Reads for a device, on behalf of the guest; whether all of it was RAM. Patches are not shown: what goes to a
    /// disk must not have our INT3 in it (law 55).
    pub fn device_read(&self, gpa: u64, into: &mut [u8]) -> bool {
        let done = read_physical(&self.mem, gpa, into) == into.len();
        let patched = self.watched.patched.read().unwrap_or_else(PoisonError::into_inner);
        for (at, original) in patched.range(gpa..gpa.saturating_add(into.len() as u64)) {
            // What the guest has written over a patch is its own.
            if let Some(byte) = into.get_mut((at - gpa) as usize).filter(|byte| **byte == INT3) {
                *byte = *original;
            }
        }
        done
    }

    /// The byte at `gpa` is replaced: notes a patch that comes or goes.
    pub(crate) fn patching(&self, gpa: u64, from: u8, to: u8) {
        let mut patched = self.watched.patched.write().unwrap_or_else(PoisonError::into_inner);
        match (from, to) {
            (_, INT3) => _ = patched.insert(gpa, from),
            (INT3, _) => _ = patched.remove(&gpa),
            _ => {}
        }
    }

    /// Whom to call, on whatever thread, when a device has stored to a watched page. The first call counts.
    pub fn on_device_store(&self, ring: impl Fn() + Send + Sync + 'static) {
        let _ = self.watched.bell.set(Box::new(ring));
    }

    /// Whether [`take_device_stores`](Self::take_device_stores) would give any.
    pub(crate) fn has_device_stores(&self) -> bool {
        self.watched.any.load(Ordering::Acquire)
    }

    fn is_watched(&self, gpa: u64, len: u64) -> bool {
        let pages = self.watched.pages.read().unwrap_or_else(PoisonError::into_inner);
        let page = gpa & !(PAGE_SIZE - 1);
        pages.range(page..=gpa.saturating_add(len - 1)).next().is_some()
    }

    /// From now on these pages (by address) are watched, and no others.
    pub(crate) fn watch(&self, pages: &BTreeSet<u64>) {
        self.watched.pages.write().unwrap_or_else(PoisonError::into_inner).clone_from(pages);
    }

    /// What devices have stored to watched pages since the last call, oldest first.
    pub(crate) fn take_device_stores(&self) -> Vec<DeviceStore> {
        // This is asked after every access to a device, and nearly always in vain.
        if !self.watched.any.swap(false, Ordering::Acquire) {
            return Vec::new();
        }
        std::mem::take(&mut *lock(&self.watched.stores))
    }

    /// The memory slots to give to KVM.
    pub fn slots(&self) -> Vec<Slot> {
        (0..)
            .zip(self.mem.iter())
            .map(|(slot, region)| Slot {
                slot,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            })
            .collect()
    }

    /// The memory map that every boot protocol hands to the guest, ascending and without overlap.
    pub fn e820(&self) -> Vec<E820Entry> {
        let entry = |start: u64, end: u64, kind| E820Entry { start, size: end - start, kind };
        let mut map = vec![
            entry(0, layout::NVS_START, E820Kind::Ram),
            entry(layout::NVS_START, layout::NVS_END, E820Kind::AcpiNvs),
            entry(layout::NVS_END, layout::VGA_START, E820Kind::Reserved),
            entry(layout::ACPI_START, layout::ACPI_END, E820Kind::Reserved),
            entry(layout::HIGH_RAM_START, self.low_end(), E820Kind::Ram),
            entry(layout::KVM_IDENTITY_MAP, layout::KVM_PAGES_END, E820Kind::Reserved),
        ];
        if self.high_size() > 0 {
            map.push(entry(PCI_HOLE_END, PCI_HOLE_END + self.high_size(), E820Kind::Ram));
        }
        map
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where `size` bytes of RAM are, split around the PCI hole: (start, length), lowest first.
pub fn ram_ranges(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(PCI_HOLE_START);
    let mut ranges = vec![(0, low)];
    if size > low {
        ranges.push((PCI_HOLE_END, size - low));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::GIB;

    #[test]
    fn ram_is_split_around_the_pci_hole() {
        assert_eq!(ram_ranges(256 * MIB), [(0, 256 * MIB)]);
        assert_eq!(ram_ranges(3 * GIB), [(0, 3 * GIB)]);
        assert_eq!(ram_ranges(3 * GIB + PAGE_SIZE), [(0, 3 * GIB), (4 * GIB, PAGE_SIZE)]);
    }

    #[test]
    fn l65_a_devices_stores_to_watched_pages_are_kept_for_the_debugger() {
        let ram = GuestRam::new(4 * MIB).unwrap();
        assert!(ram.device_write(0x2ffe, &[1; 4]));
        assert_eq!(ram.take_device_stores(), []);
        ram.watch(&BTreeSet::from([0x3000]));
        assert!(ram.device_write(0x2ffe, &[2; 4]), "across the end of the page before");
        assert!(ram.device_write(0x3fff, &[3; 2]), "its last byte");
        assert!(ram.device_write(0x2000, &[4; 0x1000]) && ram.device_write(0x4000, &[5; 8]), "beside");
        assert!(!ram.device_write(4 * MIB - 1, &[6; 2]), "beyond RAM");
        let store = |gpa, old: &[u8], new: &[u8]| DeviceStore { gpa, old: old.to_vec(), new: new.to_vec() };
        assert_eq!(ram.take_device_stores(), [store(0x2ffe, &[1; 4], &[2; 4]), store(0x3fff, &[0; 2], &[3; 2])]);
        assert_eq!(ram.take_device_stores(), []);
        ram.watch(&BTreeSet::new());
        assert!(ram.device_write(0x3000, &[7; 8]));
        assert_eq!(ram.take_device_stores(), []);
    }

    #[test]
    fn l65_the_bell_rings_for_watched_pages_only() {
        let ram = GuestRam::new(4 * MIB).unwrap();
        let rung = Arc::new(Mutex::new(0));
        let ring = rung.clone();
        ram.on_device_store(move || *ring.lock().unwrap() += 1);
        ram.watch(&BTreeSet::from([0x3000]));
        assert!(ram.device_write(0x4000, &[1]));
        assert_eq!((*rung.lock().unwrap(), ram.has_device_stores()), (0, false));
        assert!(ram.device_write(0x3000, &[1]));
        assert_eq!((*rung.lock().unwrap(), ram.has_device_stores()), (1, true));
    }

    #[test]
    fn l55_devices_read_what_is_under_patches() {
        use crate::ground::{Ground, RamGround};
        let ram = GuestRam::new(4 * MIB).unwrap();
        let mut ground = RamGround(ram.clone());
        assert!(ram.device_write(0x1000, &[1, 2, 3, INT3]));
        let read = || {
            let mut bytes = [0; 4];
            assert!(ram.device_read(0x1000, &mut bytes));
            bytes
        };
        assert!(ground.replace(0x1001, 2, INT3).unwrap());
        assert!(!ground.replace(0x1002, 9, INT3).unwrap(), "no patch comes of it");
        assert_eq!(read(), [1, 2, 3, INT3], "the guest's own INT3 stays");
        assert!(ram.device_write(0x1001, &[7]));
        assert_eq!(read(), [1, 7, 3, INT3], "what is written over a patch is the guest's");
        assert!(!ground.replace(0x1001, INT3, 2).unwrap());
        assert!(ram.device_write(0x1001, &[INT3]));
        assert_eq!(read(), [1, INT3, 3, INT3], "the patch is gone");
    }

    #[test]
    fn slots_cover_all_ram_and_are_page_aligned() {
        let ram = GuestRam::new(5 * GIB).unwrap();
        let slots = ram.slots();
        assert_eq!(slots.iter().map(|s| s.memory_size).sum::<u64>(), 5 * GIB);
        assert_eq!(slots[0].guest_phys_addr, 0);
        assert_eq!(slots[1].guest_phys_addr, 4 * GIB);
        for (i, slot) in slots.iter().enumerate() {
            assert_eq!(slot.slot as usize, i);
            assert_eq!(slot.userspace_addr % PAGE_SIZE, 0);
            assert_ne!(slot.userspace_addr, 0);
        }
    }

    #[test]
    fn sizes_out_of_range_are_one_clear_line() {
        for size in [0, 1, MIN_MEMORY - PAGE_SIZE, MIN_MEMORY + 1, MAX_MEMORY + PAGE_SIZE, u64::MAX] {
            let text = GuestRam::new(size).unwrap_err().to_string();
            assert!(text.contains(&size.to_string()), "{text}");
            assert!(!text.contains('\n'), "{text}");
        }
    }

    #[test]
    fn memory_map_ascends_without_overlap_and_its_ram_exists() {
        for size in [MIN_MEMORY, 64 * MIB, 3 * GIB, 3 * GIB + PAGE_SIZE, 6 * GIB] {
            let ram = GuestRam::new(size).unwrap();
            let map = ram.e820();
            for pair in map.windows(2) {
                assert!(pair[0].start + pair[0].size <= pair[1].start, "{size}: {pair:?}");
            }
            for entry in map.iter().filter(|e| e.kind != E820Kind::Reserved) {
                assert!(entry.size > 0);
                let whole = usize::try_from(entry.size).unwrap();
                assert!(ram.mem().check_range(GuestAddress(entry.start), whole), "{size}: {entry:?}");
            }
        }
    }
}
