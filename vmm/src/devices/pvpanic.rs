//! pvpanic: the guest's kernel says that it has panicked (QEMU, docs/specs/pvpanic.rst).

use super::DeviceEvent;
use super::bus::Device;

/// The one port.
pub const PORT: u16 = 0x505;

const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 1 << 1;

/// Port 0x505: reads say which reports are understood, writes report.
#[derive(Clone, Copy, Debug, Default)]
pub struct PvPanic;

impl Device for PvPanic {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&mut self, _: u64, data: &[u8]) -> Option<DeviceEvent> {
        match data.first()? {
            byte if byte & PANICKED != 0 => Some(DeviceEvent::Panicked),
            byte if byte & CRASH_LOADED != 0 => Some(DeviceEvent::CrashLoaded),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_reported_is_what_was_offered() {
        let mut device = PvPanic;
        let mut features = [0];
        device.read(0, &mut features);
        assert_eq!(features, [3]);
        assert_eq!(device.write(0, &[1]), Some(DeviceEvent::Panicked));
        assert_eq!(device.write(0, &[2]), Some(DeviceEvent::CrashLoaded));
        assert_eq!(device.write(0, &[0xfc]), None);
    }
}
