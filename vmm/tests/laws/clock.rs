//! Waiting, always for a bounded time. The bounds are against hanging; no test asserts a duration.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::inquest::threads;

/// Long enough for a loaded machine that emulates another one.
pub(crate) const PATIENCE: Duration = Duration::from_secs(240);

/// Most of the time between two looks that counts as waiting: a machine that stood still meanwhile
/// has not let the guest run either.
const LOOK: Duration = Duration::from_millis(100);

/// Looks again and again until `look` finds something.
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    wait_with(&mut (), what, |()| look(), |()| threads())
}

/// As [`wait_for`], with something to look at; if it was in vain, `tell` says how that stands.
pub(crate) fn wait_with<W, T>(
    world: &mut W,
    what: &str,
    mut look: impl FnMut(&mut W) -> Option<T>,
    tell: impl FnOnce(&mut W) -> String,
) -> T {
    let mut waited = Duration::ZERO;
    loop {
        let looked = Instant::now();
        if let Some(found) = look(world) {
            return found;
        }
        assert!(waited < PATIENCE, "waited {waited:?} in vain for {what}; {}", tell(world));
        std::thread::sleep(Duration::from_micros(200));
        waited += looked.elapsed().min(LOOK);
    }
}

/// Something behind a lock whose changes can be waited for.
pub(crate) struct Monitor<T> {
    value: Mutex<T>,
    changed: Condvar,
}

impl<T> Monitor<T> {
    pub(crate) fn new(value: T) -> Arc<Self> {
        Arc::new(Self { value: Mutex::new(value), changed: Condvar::new() })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        // A failed test leaves its vCPU threads behind; they may go on.
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn change<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        result
    }

    /// Whether `until` came true in time.
    pub(crate) fn wait(&self, time: Duration, mut until: impl FnMut(&mut T) -> bool) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), time, |value| !until(value));
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}
