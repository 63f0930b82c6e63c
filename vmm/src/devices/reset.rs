//! The two reset registers of PC chipsets.

use serde::{Deserialize, Serialize};

use super::DeviceEvent;
use super::bus::Device;

/// First port of the PCI configuration mechanism; the reset register is inside it.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// Configuration address and data.
pub const PCI_CONFIG_PORTS: u16 = 8;
/// Reset control register.
pub const RESET_PORT: u16 = 0xcf9;
/// What to write there for a reset: hard reset, and go.
pub const RESET_VALUE: u8 = 0x06;

/// System control port A.
pub const PORT_A: u16 = 0x92;

const GO: u8 = 1 << 2;
const FAST_RESET: u8 = 1;
const A20: u8 = 1 << 1;

/// Ports 0xcf8 to 0xcff: no PCI (reads give all ones), and the reset register at 0xcf9. They are one device because a
/// 4-byte configuration address written to 0xcf8 covers 0xcf9 and must not reset anything.
/// This is also how it is saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetControl {
    value: u8,
}

const OFFSET: u64 = (RESET_PORT - PCI_CONFIG_PORT) as u64;

impl Device for ResetControl {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (OFFSET, [byte]) = (offset, data) {
            *byte = self.value;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<DeviceEvent> {
        if let (OFFSET, [byte]) = (offset, data) {
            self.value = byte & !GO;
            return (byte & GO != 0).then_some(DeviceEvent::Reset);
        }
        None
    }
}

/// Port 0x92: A20 (always open, the bit is only kept) and fast reset. This is also how it is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortA {
    value: u8,
}

impl Default for PortA {
    fn default() -> Self {
        Self { value: A20 }
    }
}

impl Device for PortA {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(self.value);
    }

    fn write(&mut self, _: u64, data: &[u8]) -> Option<DeviceEvent> {
        let byte = *data.first()?;
        self.value = byte & !FAST_RESET;
        (byte & FAST_RESET != 0).then_some(DeviceEvent::Reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::{Bus, Shared};

    fn bus() -> Bus {
        let mut bus = Bus::new();
        let control = Shared::new(ResetControl::default());
        bus.add_pio(PCI_CONFIG_PORT, PCI_CONFIG_PORTS, &control).unwrap();
        bus.add_pio(PORT_A, 1, &Shared::new(PortA::default())).unwrap();
        bus
    }

    #[test]
    fn only_the_go_bit_of_the_reset_register_resets() {
        let bus = bus();
        assert_eq!(bus.pio_write(RESET_PORT, &[0x02]), None);
        let reset = bus.pio_write(RESET_PORT, &[RESET_VALUE]);
        assert_eq!(reset, Some(DeviceEvent::Reset));
    }

    #[test]
    fn a_pci_configuration_address_is_no_reset() {
        let bus = bus();
        assert_eq!(bus.pio_write(PCI_CONFIG_PORT, &0x8000_ff04u32.to_le_bytes()), None);
        let mut data = [0; 4];
        bus.pio_read(PCI_CONFIG_PORT + 4, &mut data);
        assert_eq!(data, [0xff; 4], "no PCI device answers");
    }

    #[test]
    fn port_a_keeps_a20_and_resets() {
        let bus = bus();
        let mut data = [0];
        bus.pio_read(PORT_A, &mut data);
        assert_eq!(data, [A20]);
        assert_eq!(bus.pio_write(PORT_A, &[A20]), None);
        let reset = bus.pio_write(PORT_A, &[A20 | FAST_RESET]);
        assert_eq!(reset, Some(DeviceEvent::Reset));
    }
}
