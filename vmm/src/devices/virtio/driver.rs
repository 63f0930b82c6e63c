//! A driver for the tests: what a guest's does, with the registers and with memory, and what none should.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::{Backend, Device, Devices, Disk, DiskConfig, Mmio};
use crate::devices::bus::Device as _;
use crate::limits::MIB;
use crate::memory::GuestRam;

/// Where the driver has its rings and buffers.
pub(super) const DESCRIPTORS: u64 = 0x10_0000;
pub(super) const AVAILABLE: u64 = 0x10_2000;
pub(super) const USED: u64 = 0x10_3000;
pub(super) const HEADER: u64 = 0x10_4000;
pub(super) const STATUS: u64 = 0x10_5000;
pub(super) const DATA: u64 = 0x11_0000;

/// Status register: all that a driver says that is content.
pub(super) const ALL_OK: u32 = 15;
pub(super) const NEEDS_RESET: u32 = 64;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// A bound against hanging, not an expectation.
const PATIENCE: Duration = Duration::from_secs(60);

/// A disk image that goes away with the test.
pub(super) fn image(sectors: u64) -> (NamedTempFile, Vec<u8>) {
    let content: Vec<u8> = (0..sectors * 512).map(|n| (n / 512 * 7 + n % 251) as u8).collect();
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&content).unwrap();
    (file, content)
}

pub(super) fn disk(file: &NamedTempFile, read_only: bool) -> Disk {
    Disk::open(&DiskConfig { path: file.path().into(), read_only }).unwrap()
}

/// One device, and the machine around it as far as it needs one.
pub(super) struct Driver {
    pub(super) ram: GuestRam,
    pub(super) devices: Devices,
    registers: Mmio,
    pub(super) size: u16,
    next: u16,
    seen: u16,
}

impl Driver {
    /// A driver of a device that has not been looked at. The bus is free.
    pub(super) fn new(backend: impl Backend + 'static) -> Self {
        let ram = GuestRam::new(4 * MIB).unwrap();
        Self::with(ram, backend)
    }

    pub(super) fn with(ram: GuestRam, backend: impl Backend + 'static) -> Self {
        let devices = Devices::start(&ram, vec![(0, Box::new(backend))]).unwrap();
        let registers = devices.iter().next().unwrap().registers();
        devices.bus().hold(false);
        Self { ram, devices, registers, size: 16, next: 0, seen: 0 }
    }

    /// One that has gone through all of its start (virtio 1.2, 3.1.1 and 4.2.3.1).
    pub(super) fn started(backend: impl Backend + 'static) -> Self {
        let mut driver = Self::new(backend);
        driver.start();
        driver
    }

    pub(super) fn start(&mut self) {
        let flush = self.features() & 1 << VIRTIO_BLK_F_FLUSH;
        self.negotiate(1 << VIRTIO_F_VERSION_1 | flush);
        assert_eq!(self.get(0x70), 11, "features accepted");
        self.set_queue(self.size.into(), DESCRIPTORS, AVAILABLE, USED);
        assert_eq!(self.get(0x44), 1, "queue ready");
        self.set(0x70, ALL_OK);
        assert_eq!(self.get(0x70), ALL_OK);
        (self.next, self.seen) = (0, 0);
    }

    pub(super) fn features(&mut self) -> u64 {
        self.set(0x14, 0);
        let low = self.get(0x10);
        self.set(0x14, 1);
        u64::from(self.get(0x10)) << 32 | u64::from(low)
    }

    pub(super) fn negotiate(&mut self, features: u64) {
        self.set(0x70, 0);
        assert_eq!(self.get(0x70), 0);
        self.set(0x70, 1);
        self.set(0x70, 3);
        for (half, bits) in [(0, features), (1, features >> 32)] {
            self.set(0x24, half);
            self.set(0x20, bits as u32);
        }
        self.set(0x70, 11);
    }

    pub(super) fn set_queue(&mut self, size: u32, descriptors: u64, driver: u64, device: u64) {
        self.set(0x30, 0);
        self.set(0x38, size);
        for (register, at) in [(0x80, descriptors), (0x90, driver), (0xa0, device)] {
            self.set(register, at as u32);
            self.set(register + 4, (at >> 32) as u32);
        }
        for ring in [AVAILABLE, USED] {
            self.ram.device_write(ring, &[0; 0x800]);
        }
        self.set(0x44, 1);
    }

    pub(super) fn get(&mut self, register: u64) -> u32 {
        let mut word = [0xff; 4];
        self.registers.read(register, &mut word);
        u32::from_le_bytes(word)
    }

    pub(super) fn set(&mut self, register: u64, value: u32) {
        assert_eq!(self.registers.write(register, &value.to_le_bytes()), None);
    }

    pub(super) fn registers(&mut self) -> &mut Mmio {
        &mut self.registers
    }

    pub(super) fn device(&self) -> &Device {
        self.devices.iter().next().unwrap()
    }

    pub(super) fn put(&self, gpa: u64, bytes: &[u8]) {
        assert!(crate::paging::write_all_physical(self.ram.mem(), gpa, bytes));
    }

    pub(super) fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert_eq!(crate::paging::read_physical(self.ram.mem(), gpa, &mut bytes), len);
        bytes
    }

    /// Writes a descriptor.
    pub(super) fn describe(&self, table: u64, n: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        let words = [&gpa.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        self.put(table + 16 * u64::from(n), &words.concat());
    }

    /// Describes a chain from descriptor 0 on: `(gpa, len, to be written)`.
    pub(super) fn chain(&self, table: u64, pieces: &[(u64, u32, bool)]) {
        for (n, &(gpa, len, write)) in (0..).zip(pieces) {
            let last = usize::from(n) + 1 == pieces.len();
            let flags = if write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.describe(table, n, gpa, len, flags, n + 1);
        }
    }

    /// Makes the chain from `head` on available, and kicks as the guest's write would without KVM.
    pub(super) fn offer(&mut self, head: u16) {
        self.put(AVAILABLE + 4 + 2 * u64::from(self.next % self.size), &head.to_le_bytes());
        self.next = self.next.wrapping_add(1);
        self.put(AVAILABLE + 2, &self.next.to_le_bytes());
        self.set(0x50, 0);
    }

    /// How many answers there have been.
    pub(super) fn answers(&self) -> u16 {
        u16::from_le_bytes(self.bytes(USED + 2, 2).try_into().unwrap())
    }

    /// Waits for the next answer: head and length.
    pub(super) fn answer(&mut self) -> (u32, u32) {
        self.wait_for("an answer", |driver| driver.answers() != driver.seen);
        let element = self.bytes(USED + 4 + 8 * u64::from(self.seen % self.size), 8);
        self.seen = self.seen.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
        (word(0), word(4))
    }

    pub(super) fn wait_for(&mut self, what: &str, condition: impl Fn(&mut Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(Instant::now() < end, "{what} never came");
            std::thread::yield_now();
        }
    }

    /// One disk request with its data in these pieces; status and length of the answer.
    pub(super) fn request(&mut self, kind: u32, sector: u64, pieces: &[(u64, u32)], to_guest: bool) -> (u8, u32) {
        self.begin(kind, sector, pieces, to_guest);
        let (head, written) = self.answer();
        assert_eq!(head, 0);
        (self.bytes(STATUS, 1)[0], written)
    }

    pub(super) fn begin(&mut self, kind: u32, sector: u64, pieces: &[(u64, u32)], to_guest: bool) {
        self.put(HEADER, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
        self.put(STATUS, &[0xaa]);
        let mut chain = vec![(HEADER, 16, false)];
        chain.extend(pieces.iter().map(|&(gpa, len)| (gpa, len, to_guest)));
        chain.push((STATUS, 1, true));
        self.chain(DESCRIPTORS, &chain);
        self.offer(0);
    }

    /// How often the device has raised its interrupt since the last look.
    pub(super) fn edges(&self) -> u64 {
        self.device().irq().read().unwrap_or(0)
    }
}

/// What the file has now.
pub(super) fn content(file: &NamedTempFile) -> Vec<u8> {
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut File::open(file.path()).unwrap(), &mut bytes).unwrap();
    bytes
}

/// A device that does what a test tells it to.
pub(super) struct Scripted<F>(pub(super) F);

impl<F: FnMut(&super::Request<'_>) -> Result<u32, super::Fault> + Send> Backend for Scripted<F> {
    fn device_id(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        1 << 5
    }
    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3, 4, 5]
    }
    fn serve(&mut self, request: &super::Request<'_>) -> Result<u32, super::Fault> {
        (self.0)(request)
    }
}

/// Lets one thread wait for another.
#[derive(Clone, Default)]
pub(super) struct Step(Arc<(std::sync::Mutex<bool>, std::sync::Condvar)>);

impl Step {
    pub(super) fn done(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    pub(super) fn wait(&self) {
        let guard = self.0.0.lock().unwrap();
        let (_guard, waited) = self.0.1.wait_timeout_while(guard, PATIENCE, |done| !*done).unwrap();
        assert!(!waited.timed_out());
    }
}
