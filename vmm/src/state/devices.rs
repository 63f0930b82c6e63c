//! The machine's own devices. Those without a state are not here: exit port, pvpanic, debug console.

use serde::{Deserialize, Serialize};

use super::Blob;
use crate::devices::cmos::CmosState;
use crate::devices::debug_ports::PostCode;
use crate::devices::fw_cfg::FwCfgState;
use crate::devices::i8042::I8042;
use crate::devices::pm::PowerManagement;
use crate::devices::reset::{PortA, ResetControl};
use crate::devices::serial::SerialState;
use crate::devices::virtio::DiskConfig;

/// A disk: where its bytes are, which are not in the state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskState {
    /// The image's path as it was given; what is not UTF-8 is replaced.
    pub path: String,
    /// The guest could not write to it.
    pub read_only: bool,
}

impl From<&DiskConfig> for DiskState {
    fn from(disk: &DiskConfig) -> Self {
        DiskState { path: disk.path.to_string_lossy().into_owned(), read_only: disk.read_only }
    }
}

/// All devices but those on virtio.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// COM1.
    pub serial: SerialState,
    /// CMOS memory. Its clock shows the host's time and has no state.
    pub cmos: CmosState,
    /// Keyboard controller.
    pub i8042: I8042,
    /// ACPI registers.
    pub power: PowerManagement,
    /// Firmware configuration.
    pub fw_cfg: FwCfgState,
    /// The page of the wakeup mailbox.
    pub mailbox: Blob,
    /// Port 0x92.
    pub port_a: PortA,
    /// Port 0xcf9.
    pub reset: ResetControl,
    /// Port 0x80.
    pub post: PostCode,
}
