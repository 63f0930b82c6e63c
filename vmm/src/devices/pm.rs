//! ACPI fixed hardware: the PM1a event and control registers (ACPI 6.5, 4.8.3). The machine has no events to report, so
//! the interrupt (SCI) is never raised; what matters is that the guest can switch itself off.

use serde::{Deserialize, Serialize};

use super::DeviceEvent;
use super::bus::Device;

/// PM1a event block: status, then enable.
pub const EVENT_PORT: u16 = 0x600;
/// Its length in bytes.
pub const EVENT_LEN: u8 = 4;
/// PM1a control block.
pub const CONTROL_PORT: u16 = 0x604;
/// Its length in bytes.
pub const CONTROL_LEN: u8 = 2;
/// Ports of both blocks.
pub const PORTS: u16 = 6;

/// SLP_TYP that the DSDT gives for S5, soft off.
pub const SLEEP_TYPE_S5: u8 = 5;

const ENABLE: u64 = 2;
const CONTROL: u64 = (CONTROL_PORT - EVENT_PORT) as u64;

/// The machine is in ACPI mode, always.
const SCI_EN: u16 = 1;
const SLP_TYP_SHIFT: u32 = 10;
const SLP_TYP_MASK: u16 = 7;
const SLP_EN: u16 = 1 << 13;

/// The PM1a registers. This is also how they are saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerManagement {
    enable: u16,
    control: u16,
}

impl PowerManagement {
    fn register(&self, offset: u64) -> u16 {
        match offset {
            ENABLE => self.enable,
            CONTROL => self.control | SCI_EN,
            // Status: nothing ever happened.
            _ => 0,
        }
    }
}

impl Device for PowerManagement {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.register(at & !1).to_le_bytes()[(at & 1) as usize];
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<DeviceEvent> {
        for (at, byte) in (offset..).zip(data) {
            let register = match at & !1 {
                ENABLE => &mut self.enable,
                CONTROL => &mut self.control,
                _ => continue,
            };
            let mut bytes = register.to_le_bytes();
            bytes[(at & 1) as usize] = *byte;
            *register = u16::from_le_bytes(bytes);
        }
        let go = self.control & SLP_EN != 0;
        // Write-only: reads as 0.
        self.control &= !SLP_EN;
        let sleep_type = self.control >> SLP_TYP_SHIFT & SLP_TYP_MASK;
        (go && sleep_type == u16::from(SLEEP_TYPE_S5)).then_some(DeviceEvent::PowerOff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::{Bus, Shared};

    fn bus() -> Bus {
        let mut bus = Bus::new();
        let pm = Shared::new(PowerManagement::default());
        bus.add_pio(EVENT_PORT, PORTS, &pm).unwrap();
        bus
    }

    fn inw(bus: &Bus, port: u16) -> u16 {
        let mut data = [0; 2];
        bus.pio_read(port, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn s5_powers_off_in_one_write_or_two() {
        let bus = bus();
        let s5 = u16::from(SLEEP_TYPE_S5) << SLP_TYP_SHIFT;
        assert_eq!(bus.pio_write(CONTROL_PORT, &s5.to_le_bytes()), None);
        let off = bus.pio_write(CONTROL_PORT, &(s5 | SLP_EN).to_le_bytes());
        assert_eq!(off, Some(DeviceEvent::PowerOff));
        let off = bus.pio_write(CONTROL_PORT + 1, &[((s5 | SLP_EN) >> 8) as u8]);
        assert_eq!(off, Some(DeviceEvent::PowerOff));
    }

    #[test]
    fn other_sleep_states_do_nothing() {
        let bus = bus();
        for sleep_type in (0..8).filter(|t| *t != u16::from(SLEEP_TYPE_S5)) {
            let value = sleep_type << SLP_TYP_SHIFT | SLP_EN;
            assert_eq!(bus.pio_write(CONTROL_PORT, &value.to_le_bytes()), None);
        }
    }

    #[test]
    fn registers_read_back_as_linux_expects() {
        let bus = bus();
        assert_eq!(inw(&bus, CONTROL_PORT) & SCI_EN, SCI_EN);
        bus.pio_write(EVENT_PORT, &[0xff; 4]);
        assert_eq!(inw(&bus, EVENT_PORT), 0, "no event");
        assert_eq!(inw(&bus, EVENT_PORT + 2), 0xffff, "enable bits");
    }
}
