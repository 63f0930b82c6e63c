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

/// All devices.
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
