//! Ports that kernels under development print to.

use std::io::Write;

use serde::{Deserialize, Serialize};

use super::DeviceEvent;
use super::bus::Device;
use super::serial::Console;

/// The debug console of Bochs and QEMU.
pub const DEBUGCON_PORT: u16 = 0xe9;
/// Power-on self test codes.
pub const POST_PORT: u16 = 0x80;

/// Port 0xe9: what is written appears on the console; reads give 0xe9, by which kernels know that it is there.
#[derive(Debug)]
pub struct DebugCon(
    /// Where it goes.
    pub Console,
);

impl Device for DebugCon {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(DEBUGCON_PORT as u8);
    }

    fn write(&mut self, _: u64, data: &[u8]) -> Option<DeviceEvent> {
        let done = self.0.write_all(data).and_then(|()| self.0.flush());
        if let Err(error) = done {
            tracing::debug!(%error, "debug console output lost");
        }
        None
    }
}

/// Port 0x80: keeps the last code. Linux writes to it to let some time pass. This is also how it is
/// saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PostCode {
    /// What was written last.
    pub code: u8,
}

impl Device for PostCode {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(self.code);
    }

    fn write(&mut self, _: u64, data: &[u8]) -> Option<DeviceEvent> {
        self.code = *data.first()?;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn debugcon_writes_to_the_console() {
        struct Send(mpsc::Sender<Vec<u8>>);
        impl Write for Send {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                let sent = self.0.send(bytes.to_vec());
                sent.map(|()| bytes.len()).map_err(std::io::Error::other)
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let (sender, receiver) = mpsc::channel();
        let mut device = DebugCon(Console::new(Send(sender)));
        device.write(0, b"x");
        assert_eq!(receiver.recv().unwrap(), b"x");
        drop(receiver);
        device.write(0, b"y");
        let mut byte = [0];
        device.read(0, &mut byte);
        assert_eq!(byte, [0xe9]);
    }

    #[test]
    fn the_last_post_code_stays() {
        let mut device = PostCode::default();
        device.write(0, &[0x42]);
        let mut byte = [0];
        device.read(0, &mut byte);
        assert_eq!((byte[0], device.code), (0x42, 0x42));
    }
}
