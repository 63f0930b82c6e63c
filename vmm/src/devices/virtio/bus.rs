//! The one way by which devices reach guest memory.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// A bus that one device at a time is on, and that the debugger can take for itself. Clones are the same bus.
///
/// Held at first: a machine's world stands until it is resumed.
#[derive(Debug, Clone, Default)]
pub struct DmaBus(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Held,
    Free,
    /// The machine is being taken apart.
    Over,
}

impl DmaBus {
    /// With `true`, no device touches guest memory any more once this returns; with `false` they go on.
    ///
    /// What a device does on the bus is bounded (no file is read or written meanwhile), and so is the wait.
    pub fn hold(&self, hold: bool) {
        self.set(if hold { State::Held } else { State::Free });
    }

    /// Nobody waits for the bus any more, and nobody gets it.
    pub(super) fn end(&self) {
        self.set(State::Over);
    }

    fn set(&self, state: State) {
        let mut now = self.lock();
        if *now != State::Over {
            *now = state;
        }
        drop(now);
        self.0.changed.notify_all();
    }

    /// Waits for the bus and does `work` on it; `None` when the machine is being taken apart.
    pub(super) fn pass<R>(&self, work: impl FnOnce() -> R) -> Option<R> {
        let mut state = self.lock();
        while *state == State::Held {
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        // The lock is what `hold` waits for.
        (*state == State::Free).then(work)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;
    use std::time::Duration;

    #[test]
    fn nothing_moves_while_it_is_held_and_all_goes_on_afterwards() {
        let (bus, count) = (DmaBus::default(), Arc::new(AtomicU64::new(0)));
        let worker = {
            let (bus, count) = (bus.clone(), count.clone());
            thread::spawn(move || while bus.pass(|| count.fetch_add(1, Ordering::Relaxed)).is_some() {})
        };
        let mut before = 0;
        for _ in 0..20 {
            bus.hold(false);
            while count.load(Ordering::Relaxed) == before {
                thread::yield_now();
            }
            bus.hold(true);
            before = count.load(Ordering::Relaxed);
            thread::sleep(Duration::from_millis(2));
            assert_eq!(count.load(Ordering::Relaxed), before);
        }
        bus.end();
        worker.join().unwrap();
        bus.hold(false);
        assert_eq!(bus.pass(|| ()), None, "over is over");
    }
}
