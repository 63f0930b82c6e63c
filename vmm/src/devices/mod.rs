//! The machine's devices: few, small, and hostile guests are their normal case.
//!
//! Every device is reached through [`Bus`], which any vCPU thread may call. What an access means for the machine as a
//! whole comes back as a [`DeviceEvent`]; devices stop and end nothing themselves.

pub mod bus;
pub mod cmos;
pub mod debug_ports;
pub mod exit;
pub mod fw_cfg;
pub mod i8042;
pub mod mailbox;
pub mod pc;
pub mod pm;
pub mod pvpanic;
pub mod reset;
pub mod serial;
pub mod virtio;

pub use bus::{Bus, Device, Shared};
pub use exit::ExitPort;
pub use pc::{DeviceError, Pc};
pub use serial::{Console, Serial};

/// Something that an access made happen to the machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceEvent {
    /// The guest ends the run with this status (port 0xf4).
    Exit(u32),
    /// The guest resets the machine (keyboard controller, port 0xcf9, port 0x92, ACPI reset register).
    Reset,
    /// The guest switches the machine off (ACPI S5).
    PowerOff,
    /// The guest's kernel has panicked (pvpanic).
    Panicked,
    /// The guest's kernel has panicked and started its crash kernel (pvpanic).
    CrashLoaded,
}
