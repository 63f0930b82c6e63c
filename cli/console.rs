//! From stdin to the guest's serial port, with an escape on a terminal.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use rustix::io::Errno;
use trapline_vmm::devices::{Serial, Shared};

/// Ctrl-A: what follows is for us.
const ESCAPE: u8 = 0x01;
/// Most bytes taken from stdin at once.
const CHUNK: usize = 1024;

/// What the user asked for from within the console.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    Nothing,
    /// Ctrl-A x.
    Quit,
}

/// The input side of the console.
pub(crate) struct ConsoleInput {
    serial: Shared<Serial>,
    escapes: Option<Escape>,
    ended: bool,
    /// Stdin is a file: epoll refuses it, and it never blocks.
    pub(crate) always_ready: bool,
    /// The event loop watches stdin now.
    pub(crate) watched: bool,
}

/// Whether the last byte was the escape.
#[derive(Debug, Default)]
struct Escape {
    armed: bool,
}

impl ConsoleInput {
    /// Input for `serial`. Escapes are looked for on a terminal only: a pipe carries any bytes.
    pub(crate) fn new(serial: Shared<Serial>, is_terminal: bool) -> Self {
        Self { serial, escapes: is_terminal.then(Escape::default), ended: false, always_ready: false, watched: false }
    }

    pub(crate) fn fd(&self) -> RawFd {
        io::stdin().as_raw_fd()
    }

    /// Whether stdin is to be looked at: it has not ended and the guest has room.
    pub(crate) fn wants_input(&self) -> bool {
        !self.ended && self.serial.lock().input_room() > 0
    }

    /// Takes what stdin has now, as far as the guest has room for it.
    pub(crate) fn pump(&mut self) -> Asked {
        let room = self.serial.lock().input_room().min(CHUNK);
        if room == 0 || self.ended {
            return Asked::Nothing;
        }
        let mut bytes = [0; CHUNK];
        // One read, past the standard library's buffer: what lay there would never become readable.
        let got = match rustix::io::read(io::stdin(), &mut bytes[..room]) {
            Ok(got) => got,
            Err(Errno::AGAIN | Errno::INTR) => return Asked::Nothing,
            Err(_) => 0,
        };
        self.ended = got == 0;
        let (input, asked) = match &mut self.escapes {
            Some(escape) => escape.filter(&bytes[..got]),
            None => (bytes[..got].to_vec(), Asked::Nothing),
        };
        self.serial.lock().push_input(&input);
        asked
    }
}

impl Escape {
    /// Takes the escapes out: Ctrl-A x quits, Ctrl-A a (or twice Ctrl-A) is a Ctrl-A, Ctrl-A and
    /// anything else is that thing.
    fn filter(&mut self, bytes: &[u8]) -> (Vec<u8>, Asked) {
        let mut input = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            match (std::mem::take(&mut self.armed), byte) {
                (false, ESCAPE) => self.armed = true,
                (true, b'x' | b'X') => return (input, Asked::Quit),
                (true, b'a' | ESCAPE) => input.push(ESCAPE),
                (_, byte) => input.push(byte),
            }
        }
        (input, Asked::Nothing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_taken_out_across_reads() {
        let mut escape = Escape::default();
        assert_eq!(escape.filter(b"ab\x01"), (b"ab".to_vec(), Asked::Nothing));
        assert_eq!(escape.filter(b"a\x01\x01\x01q"), (b"\x01\x01q".to_vec(), Asked::Nothing));
        assert_eq!(escape.filter(b"c\x01xd"), (b"c".to_vec(), Asked::Quit));
    }
}
