//! A keyboard controller without keyboard or mouse: enough to answer who asks, and the reset line that PCs have on it.

use serde::{Deserialize, Serialize};

use super::DeviceEvent;
use super::bus::Device;

/// Data port.
pub const DATA_PORT: u16 = 0x60;
/// Status (read) and command (write) port.
pub const COMMAND_PORT: u16 = 0x64;
/// Offsets under which the device knows its two ports.
pub const DATA: u16 = 0;
/// See [`DATA`].
pub const COMMAND: u16 = 4;

/// Status: there is a byte to read.
const OUTPUT_FULL: u8 = 1;
/// Status: self test passed, keyboard not locked. "Input full" is never set: commands take no time.
const READY: u8 = 0x14;

/// Output port: processor not in reset, A20 open.
const NOT_RESET: u8 = 1;
const OUTPUT_PORT: u8 = 0x03;

/// A command that is followed by a byte on the data port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Expect {
    ControlByte,
    OutputPort,
    /// For a device that is not there.
    Nothing,
}

/// The controller (ports 0x60 and 0x64). This is also how it is saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042 {
    control: u8,
    output: Option<u8>,
    expect: Option<Expect>,
}

impl I8042 {
    fn command(&mut self, command: u8) -> Option<DeviceEvent> {
        self.expect = None;
        match command {
            0x20 => self.output = Some(self.control),
            0x60 => self.expect = Some(Expect::ControlByte),
            // Self test passed.
            0xaa => self.output = Some(0x55),
            // Keyboard interface: no fault.
            0xab => self.output = Some(0x00),
            0xd0 => self.output = Some(OUTPUT_PORT),
            0xd1 => self.expect = Some(Expect::OutputPort),
            0xd2..=0xd4 => self.expect = Some(Expect::Nothing),
            // Pulses the output lines whose bit is 0; line 0 is the processor's reset.
            0xf0..=0xff if command & NOT_RESET == 0 => return Some(DeviceEvent::Reset),
            // Enabling and disabling of what is not there, and what nobody knows.
            _ => {}
        }
        None
    }

    fn data(&mut self, byte: u8) -> Option<DeviceEvent> {
        match self.expect.take() {
            Some(Expect::ControlByte) => self.control = byte,
            Some(Expect::OutputPort) if byte & NOT_RESET == 0 => return Some(DeviceEvent::Reset),
            Some(Expect::OutputPort | Expect::Nothing) | None => {}
        }
        None
    }
}

impl Device for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset == u64::from(COMMAND) {
            true => READY | self.output.map_or(0, |_| OUTPUT_FULL),
            false => self.output.take().unwrap_or(0),
        };
        if let Some(byte) = data.first_mut() {
            *byte = value;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<DeviceEvent> {
        let byte = *data.first()?;
        match offset == u64::from(COMMAND) {
            true => self.command(byte),
            false => self.data(byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(device: &mut I8042, byte: u8) -> Option<DeviceEvent> {
        device.write(COMMAND.into(), &[byte])
    }

    fn read(device: &mut I8042, offset: u16) -> u8 {
        let mut byte = [0xff];
        device.read(offset.into(), &mut byte);
        byte[0]
    }

    #[test]
    fn three_ways_to_reset() {
        let mut device = I8042::default();
        assert_eq!(command(&mut device, 0xfe), Some(DeviceEvent::Reset));
        assert_eq!(command(&mut device, 0xff), None, "pulses nothing");
        assert_eq!(command(&mut device, 0xd1), None);
        assert_eq!(device.write(0, &[0x02]), Some(DeviceEvent::Reset));
        assert_eq!(command(&mut device, 0xd1), None);
        assert_eq!(device.write(0, &[0x03]), None, "opens A20 only");
        assert_eq!(device.write(0, &[0x00]), None, "goes to no keyboard");
    }

    #[test]
    fn an_answer_is_there_until_it_is_read() {
        let mut device = I8042::default();
        assert_eq!(read(&mut device, COMMAND) & OUTPUT_FULL, 0);
        command(&mut device, 0xaa);
        assert_eq!(read(&mut device, COMMAND) & OUTPUT_FULL, OUTPUT_FULL);
        assert_eq!(read(&mut device, DATA), 0x55);
        assert_eq!(read(&mut device, COMMAND) & OUTPUT_FULL, 0);
        command(&mut device, 0x60);
        device.write(0, &[0x47]);
        command(&mut device, 0x20);
        assert_eq!(read(&mut device, DATA), 0x47);
    }

    #[test]
    fn the_controller_is_always_ready_for_input() {
        let mut device = I8042::default();
        for byte in 0..=0xef {
            command(&mut device, byte);
            assert_eq!(read(&mut device, COMMAND) & 2, 0, "after {byte:#x}");
        }
    }
}
