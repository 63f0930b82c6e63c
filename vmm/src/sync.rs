//! Threads and channels, so that the coordinator can be model-checked.
//!
//! With feature `shuttle` the same names are shuttle's, whose scheduler explores interleavings.
//! Shuttle has no clock: there a deadline is a number of turns given to the other threads.

#[cfg(not(feature = "shuttle"))]
pub(crate) use std::{
    sync::{Arc, mpsc},
    thread,
};

#[cfg(feature = "shuttle")]
pub(crate) use shuttle::{
    sync::{Arc, mpsc},
    thread,
};

pub(crate) use deadline::Deadline;

/// What a bounded wait ended with, if not with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missed {
    /// The time given to this wait is over.
    Timeout,
    /// Nobody can send any more.
    Disconnected,
}

#[cfg(not(feature = "shuttle"))]
mod deadline {
    use super::{Missed, mpsc};
    use std::time::{Duration, Instant};

    /// A moment by which something must have happened.
    pub(crate) struct Deadline(Instant);

    impl Deadline {
        pub(crate) fn after(time: Duration) -> Self {
            Deadline(Instant::now() + time)
        }

        pub(crate) fn is_over(&self) -> bool {
            Instant::now() >= self.0
        }

        /// Waits for a message for at most `turn`, and not beyond the deadline.
        pub(crate) fn recv<T>(&self, from: &mpsc::Receiver<T>, turn: Duration) -> Result<T, Missed> {
            let left = self.0.saturating_duration_since(Instant::now());
            from.recv_timeout(turn.min(left)).map_err(|error| match error {
                mpsc::RecvTimeoutError::Timeout => Missed::Timeout,
                mpsc::RecvTimeoutError::Disconnected => Missed::Disconnected,
            })
        }
    }
}

#[cfg(feature = "shuttle")]
mod deadline {
    use super::{Missed, mpsc, thread};
    use std::cell::Cell;
    use std::time::Duration;

    /// A number of turns that the other threads get; one turn stands for a hundred milliseconds.
    pub(crate) struct Deadline(Cell<u128>);

    impl Deadline {
        pub(crate) fn after(time: Duration) -> Self {
            Deadline(Cell::new(time.as_millis() / 100))
        }

        pub(crate) fn is_over(&self) -> bool {
            self.0.get() == 0
        }

        pub(crate) fn recv<T>(&self, from: &mpsc::Receiver<T>, _turn: Duration) -> Result<T, Missed> {
            match from.try_recv() {
                Ok(message) => Ok(message),
                Err(mpsc::TryRecvError::Disconnected) => Err(Missed::Disconnected),
                Err(mpsc::TryRecvError::Empty) => {
                    self.0.set(self.0.get().saturating_sub(1));
                    thread::yield_now();
                    Err(Missed::Timeout)
                }
            }
        }
    }
}
