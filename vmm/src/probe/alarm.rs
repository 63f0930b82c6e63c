//! Runs the probe on a thread of its own, and gets it out of a guest that does not end.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use super::ProbeError;
use crate::limits::{KICK_INTERVAL, PROBE_STUCK};
use crate::vcpu::kick;

/// What the probe's thread tells its watcher.
enum Beat<T> {
    /// It enters the guest, for this long at most.
    Enters(Duration),
    /// It has left the guest.
    Left,
    /// It is through.
    Done(T),
}

/// The probe thread's side of the alarm.
pub(super) struct Alarm {
    tell: Box<dyn Fn(Option<Duration>) + Send>,
    rang: Arc<AtomicBool>,
}

impl Alarm {
    /// Begins a run of the guest, which is kicked when it takes longer than `limit`.
    pub(super) fn set(&self, limit: Duration) {
        self.rang.store(false, Ordering::SeqCst);
        (self.tell)(Some(limit));
    }

    /// The run has ended.
    pub(super) fn unset(&self) {
        (self.tell)(None);
    }

    /// Whether the present or last run took too long.
    pub(super) fn rang(&self) -> bool {
        self.rang.load(Ordering::SeqCst)
    }
}

/// Runs `work` on a thread of its own; it sets the alarm around each run of a guest.
pub(super) fn watched<T: Send + 'static>(
    work: impl FnOnce(Alarm) -> Result<T, ProbeError> + Send + 'static,
) -> Result<T, ProbeError> {
    kick::install().map_err(ProbeError::Thread)?;
    let (tell, hear) = mpsc::channel();
    let rang = Arc::new(AtomicBool::new(false));
    let alarm = Alarm { tell: beats(tell.clone()), rang: rang.clone() };
    let thread = thread::Builder::new()
        .name("probe".to_owned())
        .spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(|| work(alarm)));
            // Nobody listens any more after the watcher has given up.
            let _ = tell.send(Beat::Done(result));
        })
        .map_err(ProbeError::Thread)?;
    let mut due: Option<Instant> = None;
    loop {
        let beat = match due {
            None => hear.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(due) => hear.recv_timeout(due.saturating_duration_since(Instant::now()).max(KICK_INTERVAL)),
        };
        match beat {
            Ok(Beat::Enters(limit)) => due = Some(Instant::now() + limit),
            Ok(Beat::Left) => due = None,
            Ok(Beat::Done(result)) => {
                let _ = thread.join();
                return result.unwrap_or(Err(ProbeError::Panicked));
            }
            Err(RecvTimeoutError::Timeout) => {
                if due.is_some_and(|due| due.elapsed() > PROBE_STUCK) {
                    return Err(ProbeError::Stuck);
                }
                rang.store(true, Ordering::SeqCst);
                kick::send(&thread);
            }
            Err(RecvTimeoutError::Disconnected) => return Err(ProbeError::Panicked),
        }
    }
}

fn beats<T: Send + 'static>(tell: Sender<Beat<T>>) -> Box<dyn Fn(Option<Duration>) + Send> {
    Box::new(move |limit| {
        let _ = tell.send(limit.map_or(Beat::Left, Beat::Enters));
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_work_gives_is_what_the_caller_gets() {
        assert_eq!(watched(|_| Ok(7)).unwrap(), 7);
        assert!(matches!(watched::<()>(|_| Err(ProbeError::Stuck)), Err(ProbeError::Stuck)));
    }

    #[test]
    fn a_run_that_takes_too_long_is_told_so() {
        let rang = watched(|alarm| {
            alarm.set(Duration::from_millis(1));
            while !alarm.rang() {
                thread::yield_now();
            }
            alarm.unset();
            Ok(alarm.rang())
        });
        assert!(rang.unwrap());
    }

    #[test]
    fn a_short_run_is_left_alone() {
        let rang = watched(|alarm| {
            (0..100).for_each(|_| {
                alarm.set(Duration::from_secs(600));
                alarm.unset();
            });
            Ok(alarm.rang())
        });
        assert!(!rang.unwrap());
    }
}
