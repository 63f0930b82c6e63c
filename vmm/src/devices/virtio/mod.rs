//! Virtio devices: disks and a source of random bytes (virtio 1.2, over virtio-mmio).
//!
//! ```text
//!   vCPU threads                                               one worker thread a device
//!   registers ──────► Mmio ──►┌──────────────────────┐
//!   QueueNotify ──► ioeventfd │ Core: status, queue, │ ◄── Request ── Backend (a file, getrandom)
//!   interrupt  ◄── irqfd ◄────│ what was negotiated  │
//!                             └──────────────────────┘ ── DmaBus ──► guest memory
//! ```
//!
//! A vCPU never waits for a disk: a kick goes to the worker through KVM, and the worker holds the core's lock only
//! while it looks at the queue or copies a piece of a request.
//!
//! All of the devices' accesses to guest memory go over one [`DmaBus`]. When the debugger stops the world it takes the
//! bus: from then on no byte of guest memory changes, and what the devices still have to say waits for the guest to
//! go on. That a disk is slow makes no stop late.
//!
//! One request is served after the other, and its place in the queue moves on when it is done. So a device's whole
//! state ([`VirtioState`]) is plain data at any time that the world stands: a request that is only half done is begun
//! again.
//!
//! A guest that breaks the rules loses the device (DEVICE_NEEDS_RESET) until it resets it, and nothing else. It
//! cannot reach beyond its own RAM.

mod block;
mod bus;
mod core;
mod entropy;
mod mmio;
mod request;
mod state;
mod worker;

#[cfg(test)]
mod driver;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

pub use self::block::{Disk, DiskConfig, DiskError};
pub use self::bus::DmaBus;
pub use self::core::{Backend, Core};
pub use self::entropy::Entropy;
pub use self::mmio::{Mmio, NOTIFY};
pub use self::request::{Fault, Request};
pub use self::state::{QueueState, StateError, VirtioState};

use self::worker::Worker;
use crate::boot::layout;
use crate::limits::PAGE_SIZE;
use crate::memory::GuestRam;

/// Where a device is found: its page of registers and its interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which of the places it is, from 0.
    pub slot: u32,
    /// Guest-physical address of its registers.
    pub address: u64,
    /// Its interrupt, edge triggered, active high: a pin of the I/O APIC that no ISA device has.
    pub gsi: u32,
}

/// Number of places. There are as many pins of the I/O APIC behind the 16 of the ISA bus.
pub const PLACES: u32 = 8;

impl Place {
    /// The place with this number; `None` from [`PLACES`] on.
    pub fn new(slot: u32) -> Option<Self> {
        let first_gsi = 16;
        let address = layout::VIRTIO + u64::from(slot) * PAGE_SIZE;
        (slot < PLACES).then_some(Self { slot, address, gsi: first_gsi + slot })
    }
}

/// The place of the source of random bytes. Disks have those behind it, in order.
pub const ENTROPY_SLOT: u32 = 0;

/// Most disks of one machine.
pub const MAX_DISKS: usize = PLACES as usize - 1;

/// A device at its place.
pub struct Device {
    /// Where.
    pub place: Place,
    core: Arc<Core>,
    worker: Worker,
}

impl Device {
    /// Its registers, for the bus.
    pub fn registers(&self) -> Mmio {
        Mmio::new(self.core.clone())
    }

    /// Written to for an interrupt.
    pub fn irq(&self) -> &EventFd {
        self.core.irq()
    }

    /// To be written to when the guest writes 0 to [`NOTIFY`].
    pub fn kick(&self) -> &EventFd {
        self.core.kick()
    }
}

/// The virtio devices of one machine. They are held at first; see [`DmaBus`].
#[derive(Default)]
pub struct Devices {
    bus: DmaBus,
    devices: Vec<Device>,
}

impl Devices {
    /// Starts one worker for each backend, which has the place with the given number. Two in one place, or none such,
    /// are an error.
    pub fn start(ram: &GuestRam, backends: Vec<(u32, Box<dyn Backend>)>) -> io::Result<Self> {
        let mut devices = Self::default();
        for (slot, backend) in backends {
            let place = Place::new(slot).filter(|place| devices.devices.iter().all(|other| other.place != *place));
            let place = place.ok_or_else(|| io::Error::other(format!("there is no free virtio place {slot}")))?;
            let core = Arc::new(Core::new(&*backend, ram.clone(), devices.bus.clone())?);
            let worker = Worker::start(&format!("virtio{slot}"), core.clone(), backend)?;
            devices.devices.push(Device { place, core, worker });
        }
        Ok(devices)
    }

    /// What all of them reach guest memory by.
    pub fn bus(&self) -> &DmaBus {
        &self.bus
    }

    /// The devices.
    pub fn iter(&self) -> impl Iterator<Item = &Device> {
        self.devices.iter()
    }

    /// The places that are taken.
    pub fn places(&self) -> Vec<Place> {
        self.devices.iter().map(|device| device.place).collect()
    }

    /// The state of each device, by its slot. Meaningful while the bus is held.
    pub fn save(&self) -> Vec<(u32, VirtioState)> {
        self.devices.iter().map(|device| (device.place.slot, device.core.save())).collect()
    }

    /// Gives each device the state that [`save`](Self::save) has given, while the bus is held. Guest memory is back
    /// already. On error no device has changed.
    pub fn restore(&self, states: &[(u32, VirtioState)]) -> Result<(), StateError> {
        let find = |device: &Device| states.iter().find(|(slot, _)| *slot == device.place.slot).map(|(_, state)| state);
        if let Some((slot, _)) = states.iter().find(|(slot, _)| self.iter().all(|device| device.place.slot != *slot)) {
            return Err(StateError::NoDevice { slot: *slot });
        }
        let found = self.iter().map(|device| {
            let state = find(device).ok_or(StateError::NoState { slot: device.place.slot })?;
            device.core.check(state).map(|()| (device, state))
        });
        for (device, state) in found.collect::<Result<Vec<_>, _>>()? {
            device.core.restore(state)?;
        }
        Ok(())
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        self.bus.end();
        for device in &mut self.devices {
            device.core.end();
            device.worker.end();
        }
    }
}

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.places()).finish()
    }
}
