//! A virtio device as plain data.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Everything of one device that the guest can tell apart. What is behind it (the bytes of a disk) is not in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioState {
    /// The device type (virtio 1.2, 5).
    pub device_id: u32,
    /// Status register.
    pub status: u32,
    /// InterruptStatus register.
    pub interrupt: u32,
    /// DeviceFeaturesSel register.
    pub features_select: u32,
    /// DriverFeaturesSel register.
    pub driver_features_select: u32,
    /// The features that the driver has taken.
    pub driver_features: u64,
    /// QueueSel register.
    pub queue_select: u32,
    /// The only queue.
    pub queue: QueueState,
}

/// A queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// Number of entries.
    pub size: u32,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the driver's ring (available).
    pub driver: u64,
    /// Guest-physical address of the device's ring (used).
    pub device: u64,
    /// If it is ready: the index in each ring, the driver's and the device's, of what is next.
    pub at: Option<(u16, u16)>,
}

/// A state that does not fit the machine.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum StateError {
    /// The machine lacks a device.
    #[error("the saved machine has a virtio device in place {slot} and this one has none; give the same disks again")]
    NoDevice {
        /// Its place.
        slot: u32,
    },
    /// The machine has one device more.
    #[error("the saved machine has no virtio device in place {slot}; give the same disks again")]
    NoState {
        /// Its place.
        slot: u32,
    },
    /// It is another kind of device.
    #[error("a saved virtio device is of type {was} and this machine's is of type {is}; give the same disks again")]
    Other {
        /// This machine's.
        is: u32,
        /// The saved one's.
        was: u32,
    },
    /// It cannot have been saved from such a device.
    #[error("the state of a virtio device of type {device_id} is not usable: {why}")]
    Bad {
        /// Its type.
        device_id: u32,
        /// What is wrong with it.
        why: &'static str,
    },
}
