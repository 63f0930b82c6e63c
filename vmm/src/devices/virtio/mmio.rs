//! The registers of a virtio-mmio device, version 2 (virtio 1.2, 4.2.2).

use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_FEATURES_OK;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES, VIRTIO_MMIO_DEVICE_FEATURES_SEL,
    VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK,
    VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH,
    VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};

use super::core::{Core, Inner, QUEUE_SIZE};
use crate::devices::DeviceEvent;
use crate::devices::bus::Device;

/// Offset of QueueNotify: a 32-bit write of 0 there is the kick of the only queue.
pub const NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"TRAP");

/// One page of registers.
#[derive(Debug)]
pub struct Mmio {
    core: Arc<Core>,
}

impl Mmio {
    pub(super) fn new(core: Arc<Core>) -> Self {
        Self { core }
    }

    fn register(&self, inner: &Inner, offset: u32) -> u32 {
        let first_queue = inner.queue_select == 0;
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.core.device_id,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => word(self.core.offered, inner.features_select),
            VIRTIO_MMIO_QUEUE_NUM_MAX if first_queue => QUEUE_SIZE.into(),
            VIRTIO_MMIO_QUEUE_READY if first_queue => inner.is_ready().into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => inner.interrupt,
            VIRTIO_MMIO_STATUS => inner.status,
            // No shared memory.
            VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_LEN_HIGH => u32::MAX,
            VIRTIO_MMIO_SHM_BASE_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    fn set_register(&self, inner: &mut Inner, offset: u32, value: u32) {
        let negotiating = inner.status & VIRTIO_CONFIG_S_FEATURES_OK == 0;
        // A queue that is in use stays where it is.
        let open = inner.queue_select == 0 && !inner.is_ready();
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => inner.features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => inner.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES if negotiating => {
                set_word(&mut inner.driver_features, inner.driver_features_select, value);
            }
            VIRTIO_MMIO_QUEUE_SEL => inner.queue_select = value,
            VIRTIO_MMIO_QUEUE_NUM if open => inner.queue.size = value,
            VIRTIO_MMIO_QUEUE_DESC_LOW if open => set_word(&mut inner.queue.descriptors, 0, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH if open => set_word(&mut inner.queue.descriptors, 1, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW if open => set_word(&mut inner.queue.driver, 0, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH if open => set_word(&mut inner.queue.driver, 1, value),
            VIRTIO_MMIO_QUEUE_USED_LOW if open => set_word(&mut inner.queue.device, 0, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH if open => set_word(&mut inner.queue.device, 1, value),
            VIRTIO_MMIO_QUEUE_READY if inner.queue_select == 0 => self.core.set_ready(inner, value & 1 == 1),
            // What KVM has not taken to the worker already.
            VIRTIO_MMIO_QUEUE_NOTIFY => self.core.wake(),
            VIRTIO_MMIO_INTERRUPT_ACK => inner.interrupt &= !value,
            VIRTIO_MMIO_STATUS => self.core.set_status(inner, value),
            _ => {}
        }
    }
}

/// One half of 64 bits; there are no others.
fn word(bits: u64, select: u32) -> u32 {
    match select {
        0 => bits as u32,
        1 => (bits >> 32) as u32,
        _ => 0,
    }
}

fn set_word(bits: &mut u64, select: u32, value: u32) {
    match select {
        0 => *bits = *bits & !0xffff_ffff | u64::from(value),
        1 => *bits = *bits & 0xffff_ffff | u64::from(value) << 32,
        // No feature beyond is offered, so that it must not be there (virtio 1.2, 2.2).
        _ => {}
    }
}

impl Device for Mmio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            // The configuration space, with accesses of any width.
            let rest = self.core.config.get(at as usize..).unwrap_or_default();
            for (byte, config) in data.iter_mut().zip(rest) {
                *byte = *config;
            }
        } else if let (Ok(data), 0) = (<&mut [u8; 4]>::try_from(data), offset % 4) {
            *data = self.register(&self.core.lock(), offset as u32).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<DeviceEvent> {
        // Nothing in the configuration spaces here can be written.
        if let (Ok(data), 0, true) = (<[u8; 4]>::try_from(data), offset % 4, offset < VIRTIO_MMIO_CONFIG.into()) {
            self.set_register(&mut self.core.lock(), offset as u32, u32::from_le_bytes(data));
        }
        None
    }
}
