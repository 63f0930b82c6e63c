//! The exit port: a guest ends the run with a status of its own.
//!
//! The same register is at guest-physical [`EXIT_PAGE`](crate::boot::layout::EXIT_PAGE), for a program in a guest whose
//! kernel lets it map `/dev/mem` but gives it no ports (no ioperm, no `/dev/port`), and for emulated processors that
//! fault on ports in ring 3.

use super::DeviceEvent;
use super::bus::Device;

/// First of the four ports.
pub const PORT: u16 = 0xf4;
/// So that a write of 4 bytes is one access.
pub const PORTS: u16 = 4;

/// Port 0xf4, or the page: a write of value v in 1, 2 or 4 bytes ends the run with status v. Reads give all ones.
#[derive(Clone, Copy, Debug, Default)]
pub struct ExitPort;

impl Device for ExitPort {
    fn read(&mut self, _: u64, _: &mut [u8]) {}

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<DeviceEvent> {
        if offset != 0 {
            return None;
        }
        let mut value = [0; 4];
        let len = data.len().min(value.len());
        value[..len].copy_from_slice(&data[..len]);
        Some(DeviceEvent::Exit(u32::from_le_bytes(value)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::{Bus, Shared};

    #[test]
    fn the_value_written_is_the_status() {
        let mut bus = Bus::new();
        bus.add_pio(PORT, PORTS, &Shared::new(ExitPort)).unwrap();
        let exit = |n| Some(DeviceEvent::Exit(n));
        assert_eq!(bus.pio_write(PORT, &[0]), exit(0));
        assert_eq!(bus.pio_write(PORT, &[0x34, 0x12]), exit(0x1234));
        assert_eq!(bus.pio_write(PORT, &[1, 2, 3, 4]), exit(0x0403_0201));
        assert_eq!(bus.pio_write(PORT + 1, &[7]), None);
    }
}
