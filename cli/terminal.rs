//! The user's terminal while it is the guest's: raw, and put back on every way out.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::process::getpgrp;
use rustix::termios::{self, InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios};

/// A terminal in raw mode. Dropping it restores what was.
pub(crate) struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Makes stdin raw if it is a terminal and this process is in its foreground; `None` if not.
    ///
    /// Output is left as it was, so that our own lines and the guest's both end as lines do.
    pub(crate) fn take() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        let fd = stdin.as_fd();
        if !termios::isatty(fd) || !is_foreground(fd) {
            return Ok(None);
        }
        let before = termios::tcgetattr(fd)?;
        let mut raw = before.clone();
        raw.local_modes &= !(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG | LocalModes::IEXTEN);
        raw.input_modes &= !(InputModes::ICRNL | InputModes::INLCR | InputModes::IXON | InputModes::ISTRIP);
        raw.special_codes[SpecialCodeIndex::VMIN] = 1;
        raw.special_codes[SpecialCodeIndex::VTIME] = 0;
        termios::tcsetattr(fd, OptionalActions::Now, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(io::stdin().as_fd(), OptionalActions::Now, &self.before);
    }
}

/// A background job that touched the terminal would be stopped by SIGTTOU.
fn is_foreground(fd: BorrowedFd<'_>) -> bool {
    termios::tcgetpgrp(fd).is_ok_and(|group| group == getpgrp())
}
