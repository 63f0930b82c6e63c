//! The thread that serves one device.

use std::io;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use super::core::{Backend, Core};
use crate::limits::QUIT_DEADLINE;

/// A worker, from outside.
pub(super) struct Worker {
    thread: Option<JoinHandle<()>>,
    /// Disconnected when the thread is at its end.
    alive: mpsc::Receiver<()>,
}

impl Worker {
    pub(super) fn start(name: &str, core: Arc<Core>, mut backend: Box<dyn Backend>) -> io::Result<Self> {
        let (token, alive) = mpsc::channel();
        let work = move || {
            while core.wait() {
                while let Some(request) = core.next() {
                    let result = backend.serve(&request);
                    core.complete(&request, result);
                }
            }
            drop(backend);
            drop(token);
        };
        let thread = thread::Builder::new().name(name.to_owned()).spawn(work)?;
        Ok(Self { thread: Some(thread), alive })
    }

    /// Waits for its end, which was asked for. One that hangs in a disk is left behind: it has nothing but its file
    /// and a reference to memory.
    pub(super) fn end(&mut self) {
        let ended = self.alive.recv_timeout(QUIT_DEADLINE) == Err(mpsc::RecvTimeoutError::Disconnected);
        if let Some(thread) = self.thread.take().filter(|_| ended) {
            let _ = thread.join();
        }
    }
}
