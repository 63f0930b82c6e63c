//! From stdin to the guest's serial port, with an escape on a terminal.

use std::io;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use trapline_vmm::devices::{Serial, Shared};
use vmm_sys_util::eventfd::EventFd;

/// Ctrl-A: what follows is for us.
const ESCAPE: u8 = 0x01;
/// Most bytes taken from stdin at once.
const CHUNK: usize = 1024;
/// How often to look for room in a full queue.
const ROOM_INTERVAL: Duration = Duration::from_millis(10);

/// What the user asked for from within the console.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Nothing,
    /// Ctrl-A x.
    Quit,
}

/// Reads stdin for the guest on a thread of its own, until it ends or the process does. Gives an
/// event that is raised when the user asks for the end of the run.
///
/// Not in the event loop: a vCPU that waits for a full pipe behind its console holds the serial
/// port, and whoever feeds that port waits too. And stdin may be a file, which no epoll takes.
/// Escapes are looked for on a terminal only: a pipe carries any bytes.
pub(crate) fn feed(serial: Shared<Serial>, room: EventFd, is_terminal: bool) -> io::Result<EventFd> {
    let quit = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    let asked = quit.try_clone()?;
    thread::Builder::new().name("console".to_owned()).spawn(move || {
        let mut escapes = is_terminal.then(Escape::default);
        loop {
            let most = serial.lock().input_room().min(CHUNK);
            if most == 0 {
                // Four kilobytes are waiting for a guest that does not read: there is no hurry.
                while room.read().is_err() {
                    thread::sleep(ROOM_INTERVAL);
                }
                continue;
            }
            let mut bytes = [0; CHUNK];
            let got = match rustix::io::read(io::stdin(), &mut bytes[..most]) {
                Ok(0) => return,
                Ok(got) => got,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {
                    // Whoever shares this terminal with us has made it non-blocking.
                    let _ = poll(&mut [PollFd::new(&io::stdin(), PollFlags::IN)], None);
                    continue;
                }
                Err(_) => return,
            };
            let (input, wants) = match &mut escapes {
                Some(escape) => escape.filter(&bytes[..got]),
                None => (bytes[..got].to_vec(), Asked::Nothing),
            };
            serial.lock().push_input(&input);
            if wants == Asked::Quit {
                let _ = asked.write(1);
                return;
            }
        }
    })?;
    Ok(quit)
}

/// Whether the last byte was the escape.
#[derive(Debug, Default)]
struct Escape {
    armed: bool,
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
