//! What happens, while it happens: NDJSON, one object a line.
//!
//! Each line has the members `event` (its kind), `data`, and `timing` (when). A thread of its own writes them, so that a reader
//! who is slow, or gone, costs lines and never holds up the run.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, channel, sync_channel};
use std::thread;
use std::time::Duration;

use serde::Serialize;

use super::{HitRecord, Input, StopRecord, TargetRecord, TestRecord, VerdictRecord};

/// Most lines that wait for the reader.
const MAX_WAITING: usize = 4096;

/// One event. Indices of traps are those of [`super::Report::traps`].
#[derive(Debug, Clone, Copy, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "event", content = "data", rename_all = "kebab-case")]
pub enum Event<'a> {
    /// The guest is about to run its first instruction. Always the first line.
    Start {
        /// [`super::SCHEMA`].
        schema: u32,
        /// Version of Trapline.
        trapline: &'a str,
        /// What is run.
        input: &'a Input,
    },
    /// A trap is armed, or armed in more places than before.
    Armed {
        /// Which one.
        trap: usize,
        /// Its rule.
        rule: &'a str,
        /// What it watches by now.
        targets: &'a [TargetRecord],
    },
    /// The guest's kernel starts the first user program.
    Boot {},
    /// A trap was hit, and its action is more than a line: `fail`, `bt`, `snapshot`, `gdb`.
    Hit(&'a HitRecord),
    /// A trap was hit whose action is `log`.
    Log(&'a HitRecord),
    /// The guest reported a test.
    Test(&'a TestRecord),
    /// The guest's kernel says on the console that it has panicked.
    Panic {
        /// What it says of the reason.
        text: &'a str,
    },
    /// The world was stopped for good.
    Stop(&'a StopRecord),
    /// How the run ended. Always the last line.
    Verdict(&'a VerdictRecord),
}

/// A line.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Line<'a> {
    #[serde(flatten)]
    event: Event<'a>,
    timing: LineTiming,
}

/// When it happened.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct LineTiming {
    /// Microseconds since the first guest instruction.
    at_us: u64,
}

impl<'a> Line<'a> {
    pub(super) fn new(at: Duration, event: Event<'a>) -> Self {
        Self { event, timing: LineTiming { at_us: u64::try_from(at.as_micros()).unwrap_or(u64::MAX) } }
    }
}

/// Where events go.
#[derive(Debug)]
pub struct Events {
    lines: Option<SyncSender<Vec<u8>>>,
    ended: Receiver<io::Result<()>>,
    pub(super) lost: u64,
}

impl Events {
    /// Writes to `out`, each line at once and whole. Fails if there is no thread to be had.
    pub fn new(mut out: impl Write + Send + 'static) -> io::Result<Self> {
        let (lines, waiting) = sync_channel::<Vec<u8>>(MAX_WAITING);
        let (end, ended) = channel();
        thread::Builder::new().name("events".to_owned()).spawn(move || {
            let written = waiting.iter().try_for_each(|line| out.write_all(&line).and_then(|()| out.flush()));
            drop(waiting);
            // Nobody may be waiting for it any more.
            let _ = end.send(written);
        })?;
        Ok(Self { lines: Some(lines), ended, lost: 0 })
    }

    /// Hands a line over. Never waits.
    pub fn emit(&mut self, at: Duration, event: Event<'_>) {
        let Some(lines) = &self.lines else { return };
        // Plain data: there is nothing in it that has no JSON.
        let Ok(mut line) = serde_json::to_vec(&Line::new(at, event)) else { return };
        line.push(b'\n');
        match lines.try_send(line) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => self.lost = self.lost.saturating_add(1),
            Err(TrySendError::Disconnected(_)) => self.lines = None,
        }
    }

    /// Waits until all lines are written, at most for `patience`. Says what went wrong, for the report.
    pub fn finish(mut self, patience: Duration) -> Option<String> {
        drop(self.lines.take());
        match self.ended.recv_timeout(patience) {
            Ok(Ok(())) if self.lost == 0 => None,
            Ok(Ok(())) => Some(format!("{} events are missing: their reader was too slow", self.lost)),
            Ok(Err(error)) => Some(format!("the events are not complete: {error}")),
            Err(RecvTimeoutError::Timeout) => Some("the events are not complete: nobody reads them".to_owned()),
            Err(RecvTimeoutError::Disconnected) => Some("the events are not complete: their writer died".to_owned()),
        }
    }
}
