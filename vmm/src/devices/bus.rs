//! Dispatch of port and MMIO accesses to devices.
//!
//! The map is fixed before the guest runs; only devices have state, each behind its own lock, so that two vCPUs on
//! two devices do not wait for each other. No lock is held when an access returns.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use thiserror::Error;

use super::DeviceEvent;
use crate::debug::PortHandler;

/// A device on the bus.
pub trait Device: Send {
    /// Fills `data` from the registers at `offset` (from the start of the device's range). `data` lies inside the
    /// range; it holds all ones at the call, and what the device leaves alone reads as that.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes `data` for the registers at `offset`. `data` lies inside the range.
    fn write(&mut self, offset: u64, data: &[u8]) -> Option<DeviceEvent>;
}

/// A device that somebody besides the bus talks to, such as the console.
#[derive(Debug)]
pub struct Shared<D: ?Sized>(Arc<Mutex<D>>);

impl<D: ?Sized> Clone for Shared<D> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<D> Shared<D> {
    /// Makes a device shareable.
    pub fn new(device: D) -> Self {
        Self(Arc::new(Mutex::new(device)))
    }
}

impl<D: ?Sized> Shared<D> {
    /// The device. Held for the time of one access; a thread that panicked in it does not take the device along.
    pub fn lock(&self) -> MutexGuard<'_, D> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Two devices claim the same address.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("device addresses {start:#x}-{end:#x} are taken or empty; this is a bug, please report it")]
pub struct Taken {
    /// First address asked for.
    pub start: u64,
    /// End (exclusive).
    pub end: u64,
}

/// One range of addresses that a device answers to.
struct Mapping {
    range: Range<u64>,
    /// What the device calls the range's first address.
    base: u64,
    device: Arc<Mutex<dyn Device>>,
}

/// The devices of one address space, by address.
#[derive(Default)]
struct Map(Vec<Mapping>);

impl Map {
    fn insert(&mut self, new: Mapping) -> Result<(), Taken> {
        let (start, end) = (new.range.start, new.range.end);
        let overlaps = |other: &Mapping| start < other.range.end && other.range.start < end;
        if new.range.is_empty() || self.0.iter().any(overlaps) {
            return Err(Taken { start, end });
        }
        let at = self.0.partition_point(|other| other.range.start < start);
        self.0.insert(at, new);
        Ok(())
    }

    /// The device at an address, the offset in it, and the bytes from there to the end of its range.
    fn find(&self, address: u64) -> Option<(&Mutex<dyn Device>, u64, u64)> {
        let after = self.0.partition_point(|other| other.range.start <= address);
        let Mapping { range, base, device } = self.0.get(after.checked_sub(1)?)?;
        let offset = base + (address - range.start);
        range.contains(&address).then(|| (device.as_ref(), offset, range.end - address))
    }

    /// An access that one device takes whole goes there in one piece; any other is split into bytes, each of which
    /// goes where its address leads (that is what the 8-bit buses of old do).
    fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        match self.find(address) {
            Some((device, offset, room)) if data.len() as u64 <= room => {
                lock(device).read(offset, data);
            }
            _ => {
                for (address, byte) in (0..).map(|n| address.wrapping_add(n)).zip(data) {
                    if let Some((device, offset, _)) = self.find(address) {
                        lock(device).read(offset, std::slice::from_mut(byte));
                    }
                }
            }
        }
    }

    /// As [`Map::read`]. Of several events the first counts.
    fn write(&self, address: u64, data: &[u8]) -> Option<DeviceEvent> {
        match self.find(address) {
            Some((device, offset, room)) if data.len() as u64 <= room => lock(device).write(offset, data),
            _ => {
                let mut event = None;
                for (address, byte) in (0..).map(|n| address.wrapping_add(n)).zip(data) {
                    if let Some((device, offset, _)) = self.find(address) {
                        let this = lock(device).write(offset, std::slice::from_ref(byte));
                        event = event.or(this);
                    }
                }
                event
            }
        }
    }
}

fn lock(device: &Mutex<dyn Device>) -> MutexGuard<'_, dyn Device + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All devices of the machine. Share it between vCPU threads with an [`Arc`].
#[derive(Default)]
pub struct Bus {
    pio: Map,
    mmio: Map,
    /// Ports that somebody wants to hear of, whether a device is there or not. Set once, before the guest runs.
    trapped: OnceLock<BTreeMap<u16, PortHandler>>,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ranges = |map: &Map| map.0.iter().map(|m| m.range.clone()).collect::<Vec<_>>();
        f.debug_struct("Bus").field("pio", &ranges(&self.pio)).field("mmio", &ranges(&self.mmio)).finish()
    }
}

impl Bus {
    /// A bus without devices: reads give all ones, writes go nowhere.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a device at `ports` I/O ports from `first`.
    pub fn add_pio<D: Device + 'static>(&mut self, first: u16, ports: u16, device: &Shared<D>) -> Result<(), Taken> {
        self.add_pio_part(first, ports, 0, device)
    }

    /// Puts a part of a device at `ports` I/O ports from `first`, which the device knows as offset `base`.
    pub fn add_pio_part<D: Device + 'static>(
        &mut self,
        first: u16,
        ports: u16,
        base: u16,
        device: &Shared<D>,
    ) -> Result<(), Taken> {
        let (first, ports) = (u64::from(first), u64::from(ports));
        self.pio.insert(Mapping { range: first..first + ports, base: base.into(), device: device.0.clone() })
    }

    /// Puts a device at guest-physical addresses.
    pub fn add_mmio<D: Device + 'static>(&mut self, range: Range<u64>, device: &Shared<D>) -> Result<(), Taken> {
        self.mmio.insert(Mapping { range, base: 0, device: device.0.clone() })
    }

    /// Has accesses to these ports told. Only the first call counts, and it belongs before the guest's first instruction.
    pub(crate) fn trap_ports(&self, ports: BTreeMap<u16, PortHandler>) -> bool {
        self.trapped.set(ports).is_ok()
    }

    /// Who wants to hear of accesses to a port.
    pub(crate) fn port_handler(&self, port: u16) -> Option<&PortHandler> {
        self.trapped.get()?.get(&port)
    }

    /// One IN of 1, 2 or 4 bytes. For string instructions see [`Bus::pio_read_string`].
    pub fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.pio.read(port.into(), data);
    }

    /// One OUT of 1, 2 or 4 bytes. For string instructions see [`Bus::pio_write_string`].
    pub fn pio_write(&self, port: u16, data: &[u8]) -> Option<DeviceEvent> {
        self.pio.write(port.into(), data)
    }

    /// A REP INS as KVM reports it (`kvm_run.io`: `size` and `count`): `data` is `count` times `size` bytes, all from
    /// the same port. A size of 0 reads nothing.
    pub fn pio_read_string(&self, port: u16, size: usize, data: &mut [u8]) {
        if size > 0 {
            data.chunks_mut(size).for_each(|data| self.pio_read(port, data));
        }
    }

    /// A REP OUTS as KVM reports it; see [`Bus::pio_read_string`]. All of it is carried out; of several events the
    /// first counts.
    pub fn pio_write_string(&self, port: u16, size: usize, data: &[u8]) -> Option<DeviceEvent> {
        if size == 0 {
            return None;
        }
        data.chunks(size).map(|data| self.pio_write(port, data)).fold(None, Option::or)
    }

    /// A read of 1 to 8 bytes from an address that is not RAM.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.mmio.read(address, data);
    }

    /// A write of 1 to 8 bytes to an address that is not RAM.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> Option<DeviceEvent> {
        self.mmio.write(address, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Remembers what it was asked, answers with its offsets.
    #[derive(Debug, Default)]
    struct Recorder {
        writes: Vec<(u64, Vec<u8>)>,
        event: Option<DeviceEvent>,
    }

    impl Device for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            for (n, byte) in (offset..).zip(data) {
                *byte = n as u8;
            }
        }
        fn write(&mut self, offset: u64, data: &[u8]) -> Option<DeviceEvent> {
            self.writes.push((offset, data.to_vec()));
            self.event
        }
    }

    fn bus() -> (Bus, Shared<Recorder>, Shared<Recorder>) {
        let (a, b) = (Shared::new(Recorder::default()), Shared::new(Recorder::default()));
        let mut bus = Bus::new();
        bus.add_pio(0x10, 8, &a).unwrap();
        bus.add_pio(0x18, 2, &b).unwrap();
        bus.add_mmio(0xffff_ffff_ffff_fff8..u64::MAX, &a).unwrap();
        (bus, a, b)
    }

    #[test]
    fn nobody_answers_all_ones() {
        let (bus, a, _) = bus();
        let mut data = [0; 4];
        bus.pio_read(0x0c, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert_eq!(bus.pio_write(0x0c, &[1, 2, 3, 4]), None);
        bus.mmio_read(0, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert!(a.lock().writes.is_empty());
    }

    #[test]
    fn an_access_inside_one_device_arrives_whole() {
        let (bus, a, _) = bus();
        bus.pio_write(0x14, &[1, 2, 3, 4]);
        assert_eq!(a.lock().writes, [(4, vec![1, 2, 3, 4])]);
    }

    #[test]
    fn an_access_across_devices_is_split() {
        let (bus, a, b) = bus();
        bus.pio_write(0x17, &[1, 2, 3, 4]);
        assert_eq!(a.lock().writes, [(7, vec![1])]);
        assert_eq!(b.lock().writes, [(0, vec![2]), (1, vec![3])]);
        let mut data = [0; 4];
        bus.pio_read(0x0f, &mut data);
        assert_eq!(data, [0xff, 0, 1, 2]);
        bus.pio_read(0x17, &mut data);
        assert_eq!(data, [7, 0, 1, 0xff]);
    }

    #[test]
    fn string_accesses_stay_on_their_port() {
        let (bus, a, _) = bus();
        bus.pio_write_string(0x10, 2, &[1, 2, 3, 4]);
        assert_eq!(a.lock().writes, [(0, vec![1, 2]), (0, vec![3, 4])]);
        let mut data = [0; 3];
        bus.pio_read_string(0x13, 1, &mut data);
        assert_eq!(data, [3, 3, 3]);
        bus.pio_read_string(0x13, 0, &mut data);
        assert_eq!(bus.pio_write_string(0x13, 0, &data), None);
    }

    #[test]
    fn the_first_event_of_a_split_write_counts() {
        let (bus, a, b) = bus();
        a.lock().event = Some(DeviceEvent::Exit(1));
        b.lock().event = Some(DeviceEvent::Reset);
        assert_eq!(bus.pio_write(0x17, &[0, 0]), Some(DeviceEvent::Exit(1)));
        assert_eq!(bus.pio_write(0x18, &[0, 0]), Some(DeviceEvent::Reset));
    }

    #[test]
    fn overlapping_devices_are_refused() {
        let (mut bus, a, _) = bus();
        for (first, ports) in [(0x10, 1), (0x0f, 2), (0x17, 1), (0, 0)] {
            assert!(bus.add_pio(first, ports, &a).is_err(), "{first:#x}+{ports}");
        }
        bus.add_pio(0xffff, 1, &a).unwrap();
    }

    proptest! {
        #[test]
        fn any_access_reaches_exactly_the_registers_it_names(
            port in any::<u16>(), data in proptest::collection::vec(any::<u8>(), 0..64)
        ) {
            let (bus, a, b) = bus();
            bus.pio_write(port, &data);
            let mut seen = Vec::new();
            for (base, device) in [(0x10, a), (0x18, b)] {
                for (offset, bytes) in &device.lock().writes {
                    seen.extend((base + offset..).zip(bytes.iter().copied()));
                }
            }
            let ports = (u64::from(port)..).zip(data.iter().copied());
            let expected: Vec<_> = ports.filter(|(p, _)| (0x10..0x1a).contains(p)).collect();
            prop_assert_eq!(seen, expected);
        }

        #[test]
        fn mmio_at_the_end_of_the_address_space_wraps_without_harm(
            address in u64::MAX - 16.., mut data in proptest::collection::vec(any::<u8>(), 0..16)
        ) {
            let (bus, ..) = bus();
            bus.mmio_read(address, &mut data);
            bus.mmio_write(address, &data);
        }
    }
}
