//! What the registers and the worker of one device share: its status, what was negotiated, and its queue.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::bus::DmaBus;
use super::request::{Fault, Parts, Request};
use super::state::{QueueState, StateError, VirtioState};
use crate::memory::GuestRam;

/// Most entries of a queue.
pub(super) const QUEUE_SIZE: u16 = 256;

/// Features that every device here has: it is no legacy device, and it takes indirect descriptors.
const COMMON: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Status bits that a driver can set.
const DRIVERS_BITS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_FAILED;

/// What a device does, behind transport and queue. Its methods run on the device's own thread.
pub trait Backend: Send {
    /// The device type (virtio 1.2, 5).
    fn device_id(&self) -> u32;

    /// The features of this device type that it offers, as bits.
    fn features(&self) -> u64;

    /// Its configuration space, which never changes.
    fn config(&self) -> Vec<u8>;

    /// Serves one request. May take long, and hears by a [`Fault`] that nobody waits for it any more. Gives how many
    /// bytes, from the first that the device may write, it has written.
    fn serve(&mut self, request: &Request<'_>) -> Result<u32, Fault>;
}

/// What both sides share.
#[derive(Debug)]
pub struct Core {
    pub(super) device_id: u32,
    pub(super) offered: u64,
    pub(super) config: Vec<u8>,
    ram: GuestRam,
    bus: DmaBus,
    irq: EventFd,
    kick: EventFd,
    over: AtomicBool,
    inner: Mutex<Inner>,
}

/// The registers, and the queue once it is ready.
#[derive(Debug, Default)]
pub(super) struct Inner {
    pub(super) status: u32,
    pub(super) interrupt: u32,
    pub(super) features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u32,
    pub(super) queue: Registers,
    ready: Option<Queue>,
    /// Counts resets: what was begun before one is nobody's business any more.
    generation: u64,
}

/// What the driver has written about the only queue.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Registers {
    pub(super) size: u32,
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
}

impl Core {
    pub(super) fn new(backend: &dyn Backend, ram: GuestRam, bus: DmaBus) -> io::Result<Self> {
        Ok(Self {
            device_id: backend.device_id(),
            offered: backend.features() | COMMON,
            config: backend.config(),
            ram,
            bus,
            irq: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            // The worker waits in reading it.
            kick: EventFd::new(libc::EFD_CLOEXEC)?,
            over: AtomicBool::new(false),
            inner: Mutex::default(),
        })
    }

    pub(super) fn irq(&self) -> &EventFd {
        &self.irq
    }

    pub(super) fn kick(&self) -> &EventFd {
        &self.kick
    }

    pub(super) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the worker. Fails only when the counter is full, and then it is awake.
    pub(super) fn wake(&self) {
        let _ = self.kick.write(1);
    }

    pub(super) fn end(&self) {
        self.over.store(true, Ordering::Release);
        self.wake();
    }

    /// Waits until there may be something to do; `false`: there never will be.
    pub(super) fn wait(&self) -> bool {
        let read = self.kick.read();
        !self.over.load(Ordering::Acquire) && read.is_ok()
    }

    /// Does `work` on the bus, with the device as it is in `generation`.
    pub(super) fn pass<R>(&self, generation: u64, work: impl FnOnce(&mut Inner) -> R) -> Result<R, Fault> {
        let done = self.bus.pass(|| {
            let mut inner = self.lock();
            (inner.generation == generation && inner.is_live()).then(|| work(&mut inner))
        });
        done.flatten().ok_or(Fault::Gone)
    }

    /// The next request, if there is one.
    pub(super) fn next(&self) -> Option<Request<'_>> {
        let looked = self.bus.pass(|| {
            let mut inner = self.lock();
            if !inner.is_live() {
                return None;
            }
            match inner.peek(&self.ram) {
                Ok(parts) => parts.map(|parts| Request::new(self, inner.generation, parts, inner.driver_features)),
                Err(broken) => {
                    self.break_off(&mut inner, broken);
                    None
                }
            }
        });
        looked.flatten()
    }

    /// The request is done, or has turned out to be none.
    pub(super) fn complete(&self, request: &Request<'_>, result: Result<u32, Fault>) {
        let head = request.head();
        // Gone: nobody wants to hear.
        let _ = match result {
            Ok(written) => self.pass(request.generation(), |inner| match inner.put_back(&self.ram, head, written) {
                Ok(true) => self.interrupt(inner, VIRTIO_MMIO_INT_VRING),
                Ok(false) => inner.interrupt |= VIRTIO_MMIO_INT_VRING,
                Err(broken) => self.break_off(inner, broken),
            }),
            Err(Fault::Broken(why)) => self.pass(request.generation(), |inner| self.break_off(inner, why)),
            Err(Fault::Gone) => Ok(()),
        };
    }

    /// The driver does not keep to the rules: the device waits for a reset.
    fn break_off(&self, inner: &mut Inner, why: &'static str) {
        // Once until the guest resets it, so that it cannot fill the log at no cost.
        tracing::warn!(device = self.device_id, why, "a virtio device of the guest's needs a reset");
        inner.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        if inner.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.interrupt(inner, VIRTIO_MMIO_INT_CONFIG);
        }
    }

    fn interrupt(&self, inner: &mut Inner, why: u32) {
        inner.interrupt |= why;
        // Fails only when the counter is full, and then the edge is on its way already.
        let _ = self.irq.write(1);
    }

    /// A write to Status.
    pub(super) fn set_status(&self, inner: &mut Inner, value: u32) {
        if value == 0 {
            *inner = Inner { generation: inner.generation.wrapping_add(1), ..Inner::default() };
            return;
        }
        let mut new = value & DRIVERS_BITS & !inner.status;
        let accepted = inner.driver_features & !self.offered == 0 && inner.has_feature(VIRTIO_F_VERSION_1);
        if !accepted {
            new &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if (inner.status | new) & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            new &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        inner.status |= new;
        if new & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.wake();
        }
    }

    /// A write to QueueReady.
    pub(super) fn set_ready(&self, inner: &mut Inner, ready: bool) {
        if !ready {
            if inner.ready.take().is_some() {
                inner.generation = inner.generation.wrapping_add(1);
            }
        } else if inner.ready.is_none() && inner.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            match inner.queue.make(&self.ram, 0, 0) {
                Ok(queue) => inner.ready = Some(queue),
                Err(why) => self.break_off(inner, why),
            }
        }
    }

    /// The device as plain data. Meaningful while the bus is held.
    pub fn save(&self) -> VirtioState {
        let inner = self.lock();
        VirtioState {
            device_id: self.device_id,
            status: inner.status,
            interrupt: inner.interrupt,
            features_select: inner.features_select,
            driver_features_select: inner.driver_features_select,
            driver_features: inner.driver_features,
            queue_select: inner.queue_select,
            queue: QueueState {
                size: inner.queue.size,
                descriptors: inner.queue.descriptors,
                driver: inner.queue.driver,
                device: inner.queue.device,
                at: inner.ready.as_ref().map(|queue| (queue.next_avail(), queue.next_used())),
            },
        }
    }

    /// Whether [`restore`](Self::restore) would take it.
    pub fn check(&self, state: &VirtioState) -> Result<(), StateError> {
        self.made_of(state).map(drop)
    }

    /// Goes on as the device that was saved. Guest memory is back already.
    pub fn restore(&self, state: &VirtioState) -> Result<(), StateError> {
        let new = self.made_of(state)?;
        let mut inner = self.lock();
        *inner = Inner { generation: inner.generation.wrapping_add(1), ..new };
        // An edge or a kick may have been on its way; one too many does no harm.
        if inner.interrupt != 0 {
            let _ = self.irq.write(1);
        }
        self.wake();
        Ok(())
    }

    fn made_of(&self, state: &VirtioState) -> Result<Inner, StateError> {
        let bad = |why| StateError::Bad { device_id: self.device_id, why };
        if state.device_id != self.device_id {
            return Err(StateError::Other { is: self.device_id, was: state.device_id });
        }
        if state.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 && state.driver_features & !self.offered != 0 {
            return Err(bad("this device does not have all of its features"));
        }
        let QueueState { size, descriptors, driver, device, at } = state.queue;
        let queue = Registers { size, descriptors, driver, device };
        let ready = at.map(|(avail, used)| queue.make(&self.ram, avail, used)).transpose().map_err(bad)?;
        Ok(Inner {
            status: state.status,
            interrupt: state.interrupt,
            features_select: state.features_select,
            driver_features_select: state.driver_features_select,
            driver_features: state.driver_features,
            queue_select: state.queue_select,
            queue,
            ready,
            generation: 0,
        })
    }
}

impl Inner {
    pub(super) fn has_feature(&self, bit: u32) -> bool {
        self.driver_features >> bit & 1 == 1
    }

    pub(super) fn is_ready(&self) -> bool {
        self.ready.is_some()
    }

    /// Queues are served.
    fn is_live(&self) -> bool {
        let stopped = VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED;
        self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 && self.status & stopped == 0 && self.ready.is_some()
    }

    /// The first request that is not done. It stays the first until it is.
    fn peek(&mut self, ram: &GuestRam) -> Result<Option<Parts>, &'static str> {
        let Some(queue) = &mut self.ready else { return Ok(None) };
        let (next, size) = (queue.next_avail(), queue.size());
        let mut heads = queue.iter(ram.mem()).map_err(|_| "its available ring is not one")?;
        let chain = heads.next();
        queue.set_next_avail(next);
        chain.map(|chain| Parts::of(chain, ram, size)).transpose()
    }

    /// Gives the first request back to the driver; whether that is worth an interrupt.
    fn put_back(&mut self, ram: &GuestRam, head: u16, written: u32) -> Result<bool, &'static str> {
        let Some(queue) = &mut self.ready else { return Ok(false) };
        let element = queue.used_ring() + 4 + 8 * u64::from(queue.next_used() % queue.size());
        let index = queue.used_ring() + 2;
        // Element and index are written by one call, and each may be watched.
        let mut done = false;
        ram.told(element, 8, || {
            ram.told(index, 2, || {
                done = queue.add_used(ram.mem(), head, written).is_ok();
                done
            })
        });
        if !done {
            return Err("its used ring is not one");
        }
        queue.set_next_avail(queue.next_avail().wrapping_add(1));
        let flags: u16 =
            ram.mem().read_obj(GuestAddress(queue.avail_ring())).map_err(|_| "its available ring is gone")?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}

impl Registers {
    /// The queue that they describe, if it is one.
    fn make(&self, ram: &GuestRam, next_avail: u16, next_used: u16) -> Result<Queue, &'static str> {
        let mut queue = Queue::new(QUEUE_SIZE).map_err(|_| "there is no such queue")?;
        let size = u16::try_from(self.size).map_err(|_| "its queue is too large")?;
        queue.try_set_size(size).map_err(|_| "its queue's size is 0, too large or no power of two")?;
        // The crate takes a ring at 0 for one that was not set.
        if self.driver == 0 {
            return Err("its available ring is at 0");
        }
        let set = queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(self.driver)))
            .and_then(|()| queue.try_set_used_ring_address(GuestAddress(self.device)));
        set.map_err(|_| "its queue is not aligned")?;
        // Two bytes for an index of events behind each ring (virtio 1.2, 2.7).
        let entries = u64::from(size);
        for (at, len) in
            [(self.descriptors, 16 * entries), (self.driver, 6 + 2 * entries), (self.device, 6 + 8 * entries)]
        {
            if at.checked_add(len).is_none() || !ram.mem().check_range(GuestAddress(at), len as usize) {
                return Err("its queue is not in RAM");
            }
        }
        queue.set_next_avail(next_avail);
        queue.set_next_used(next_used);
        queue.set_ready(true);
        Ok(queue)
    }
}
