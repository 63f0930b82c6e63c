//! The guest's console, passed on and listened to.
//!
//! [`ConsoleLog`] is the sink of [`trapline_vmm::devices::Console`]. It hands every byte on as it is, and splits what went
//! by into lines. Each line is shown to the patterns of `console:` traps, to the TAP parser, and to what knows the few
//! lines of the kernel that a verdict needs. What they find is queued, and an eventfd wakes the event loop, which
//! holds the other end: a [`ConsoleHandle`].
//!
//! Bytes come on the threads of the vCPUs, one port access at a time. All work is done there, when a line is complete; it is
//! linear in the line's length, which is bounded, as is everything that is kept. The guest may print what it likes.

mod kernel;
mod lines;
mod tap;
mod text;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use regex::bytes::Regex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use kernel::KernelEnd;

use self::lines::Lines;
use self::tap::Tap;
use crate::initramfs;
use crate::report::{ConsoleLine, TestRecord};

/// Most events that wait for the event loop. Beyond that, tests wait where they are kept, and of each pattern one match has
/// room.
const MAX_EVENTS: usize = 4096;
/// Most bytes that the kept lines have.
const MAX_TAIL_BYTES: usize = 8 << 20;

/// How to listen.
#[derive(Debug, Default)]
pub struct ConsoleOptions {
    /// How many lines are kept.
    pub tail: usize,
    /// The patterns of `console:` traps.
    pub patterns: Vec<Regex>,
    /// Where every byte goes, too, unchanged. A file that cannot be written any more is given up
    /// ([`ConsoleHandle::problems`]).
    pub log: Option<File>,
}

/// What was found on the console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleEvent {
    /// A pattern matched in a line.
    Matched {
        /// Which one, in the order in which they were given.
        pattern: usize,
        /// The line's number, from 1.
        number: u64,
        /// The line.
        line: ConsoleLine,
    },
    /// The kernel starts the first user program.
    Booted {
        /// When, in milliseconds since the first guest instruction.
        at_ms: u64,
    },
    /// The kernel has panicked.
    Panic {
        /// What it says after `Kernel panic - not syncing: `.
        text: String,
    },
    /// The guest has reported a test. Diagnostics may still follow ([`ConsoleHandle::tests`]).
    Test(TestRecord),
}

/// The last lines of the console.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tail {
    /// How many lines went before these.
    pub before: u64,
    /// The lines.
    pub lines: Vec<ConsoleLine>,
}

/// The guest's end: give it to [`trapline_vmm::devices::Console::new`].
pub struct ConsoleLog {
    inner: Box<dyn Write + Send>,
    shared: Arc<Mutex<Heard>>,
}

impl std::fmt::Debug for ConsoleLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ConsoleLog")
    }
}

impl ConsoleLog {
    /// Passes everything on to `inner` ([`io::sink`] for nobody) and listens. Fails if there is no eventfd to be had.
    pub fn new(inner: impl Write + Send + 'static, options: ConsoleOptions) -> io::Result<(Self, ConsoleHandle)> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let heard = Heard {
            start: None,
            lines: Lines::default(),
            number: 0,
            tail: VecDeque::new(),
            tail_most: options.tail,
            tail_bytes: 0,
            matched: vec![0; options.patterns.len()],
            matched_in_partial: vec![false; options.patterns.len()],
            is_queued: vec![false; options.patterns.len()],
            lost: 0,
            patterns: options.patterns,
            tap: Tap::default(),
            booted_ms: None,
            panic: None,
            end: None,
            program_status: None,
            events: VecDeque::new(),
            event: event.try_clone()?,
            log: options.log.map(BufWriter::new),
            problem: None,
        };
        let shared = Arc::new(Mutex::new(heard));
        Ok((Self { inner: Box::new(inner), shared: shared.clone() }, ConsoleHandle { shared, event: Arc::new(event) }))
    }
}

impl Write for ConsoleLog {
    /// What the inner sink refuses is heard all the same: the reader of a pipe may be gone.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes);
        let taken = match &written {
            Ok(taken) => *taken,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(_) => bytes.len(),
        };
        locked(&self.shared).take(bytes.get(..taken).unwrap_or(bytes));
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// The event loop's end. Clones are the same.
#[derive(Debug, Clone)]
pub struct ConsoleHandle {
    shared: Arc<Mutex<Heard>>,
    event: Arc<EventFd>,
}

impl ConsoleHandle {
    /// Raised when [`ConsoleHandle::events`] has something to say. Read it before asking.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Lines are stamped with the time since `start`; before this is called, with 0.
    pub fn start(&self, start: Instant) {
        locked(&self.shared).start = Some(start);
    }

    /// What was found since the last call, in order.
    pub fn events(&self) -> Vec<ConsoleEvent> {
        let mut heard = locked(&self.shared);
        heard.is_queued.fill(false);
        let mut events: Vec<_> = heard.events.drain(..).collect();
        events.extend(std::iter::from_fn(|| heard.tap.next_told()).map(ConsoleEvent::Test));
        events
    }

    /// How many lines matched each pattern.
    pub fn matched(&self) -> Vec<u64> {
        locked(&self.shared).matched.clone()
    }

    /// The last lines, the one that is not complete yet among them.
    pub fn tail(&self) -> Tail {
        let heard = locked(&self.shared);
        let mut lines: Vec<_> = heard.tail.iter().cloned().collect();
        lines.extend(heard.partial());
        Tail { before: heard.number - heard.tail.len() as u64, lines }
    }

    /// The last line that is not blank, complete or not.
    pub fn last_line(&self) -> Option<ConsoleLine> {
        let heard = locked(&self.shared);
        let lines = heard.partial().into_iter().chain(heard.tail.iter().rev().take(16).cloned());
        lines.into_iter().find(|line| !line.text.trim().is_empty())
    }

    /// How many lines there were, the one that is not complete yet among them.
    pub fn line_count(&self) -> u64 {
        let heard = locked(&self.shared);
        heard.number + u64::from(!heard.lines.partial().is_empty())
    }

    /// The tests that the guest has reported so far. What its plans have and it has not reported is among them once
    /// the console is finished.
    pub fn tests(&self) -> Vec<TestRecord> {
        locked(&self.shared).tap.records().to_vec()
    }

    /// What the kernel said when it panicked.
    pub fn panic(&self) -> Option<String> {
        locked(&self.shared).panic.clone()
    }

    /// When the kernel started the first user program, since the first guest instruction.
    pub fn booted(&self) -> Option<Duration> {
        locked(&self.shared).booted_ms.map(Duration::from_millis)
    }

    /// How the kernel said that it ends.
    pub fn kernel_end(&self) -> Option<KernelEnd> {
        locked(&self.shared).end
    }

    /// The status of its program that our init printed, because the machine did not take it, before it switched off; see
    /// [`initramfs`].
    pub fn program_status(&self) -> Option<u8> {
        locked(&self.shared).program_status
    }

    /// What was lost, in words for the report: the log could not be written, or tests or matches were too many.
    pub fn problems(&self) -> Vec<String> {
        let heard = locked(&self.shared);
        let lost = (heard.lost > 0)
            .then(|| format!("{} lines that a console: trap matches were not counted, they came too fast", heard.lost));
        heard.problem.clone().into_iter().chain(heard.tap.problem()).chain(lost).collect()
    }

    /// Shows the line that is not complete to the patterns now, such as a prompt at which a guest waits. The completed line
    /// does not match them again.
    pub fn check_partial(&self) {
        let mut heard = locked(&self.shared);
        if let Some(line) = heard.partial() {
            let stripped = text::strip(heard.lines.partial());
            heard.match_patterns(&stripped, &line, true);
        }
    }

    /// The guest will print no more: the last line is complete, what is missing of its tests is missing, and the log is
    /// written.
    pub fn finish(&self) {
        locked(&self.shared).finish();
    }
}

/// What a line of the kernel's log says, without its time stamp.
pub(crate) fn message(line: &str) -> &str {
    &line[text::log_prefix(line)..]
}

fn locked(shared: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What was heard so far.
#[derive(Debug)]
struct Heard {
    start: Option<Instant>,
    lines: Lines,
    /// Of the last complete line.
    number: u64,
    tail: VecDeque<ConsoleLine>,
    tail_most: usize,
    tail_bytes: usize,
    patterns: Vec<Regex>,
    matched: Vec<u64>,
    /// Which have matched in the line that is not complete.
    matched_in_partial: Vec<bool>,
    /// Which have a match in the queue.
    is_queued: Vec<bool>,
    /// Matches that found no room.
    lost: u64,
    tap: Tap,
    booted_ms: Option<u64>,
    panic: Option<String>,
    end: Option<KernelEnd>,
    program_status: Option<u8>,
    events: VecDeque<ConsoleEvent>,
    event: EventFd,
    log: Option<BufWriter<File>>,
    problem: Option<String>,
}

impl Heard {
    fn take(&mut self, bytes: &[u8]) {
        self.log_bytes(bytes);
        for &byte in bytes {
            let mut complete = None;
            self.lines.push(byte, |line| complete = Some(line.to_owned()));
            if let Some(line) = complete {
                self.line(&line);
            }
        }
    }

    fn finish(&mut self) {
        let mut last = None;
        self.lines.finish(|line| last = Some(line.to_owned()));
        if let Some(line) = last {
            self.line(&line);
        }
        self.tap.finish(self.now_ms());
        self.tell_tests();
        if let Some(error) = self.log.as_mut().and_then(|log| log.flush().err()) {
            self.give_up_log(&error);
        }
    }

    /// Whole lines reach the file at once, so that others can follow it.
    fn log_bytes(&mut self, bytes: &[u8]) {
        let Some(log) = &mut self.log else { return };
        let mut written = log.write_all(bytes);
        if bytes.contains(&b'\n') {
            written = written.and_then(|()| log.flush());
        }
        if let Err(error) = written {
            self.give_up_log(&error);
        }
    }

    fn give_up_log(&mut self, error: &io::Error) {
        // What is in its buffer would be tried again when it is dropped.
        if let Some(log) = self.log.take() {
            drop(log.into_parts());
        }
        self.problem = Some(format!("the console's log is not complete: {error}"));
    }

    fn now_ms(&self) -> u64 {
        self.start.map_or(0, |start| u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    fn partial(&self) -> Option<ConsoleLine> {
        let partial = self.lines.partial();
        (!partial.is_empty()).then(|| ConsoleLine { at_ms: self.now_ms(), text: text::lossy(&text::strip(partial)) })
    }

    /// A complete line.
    fn line(&mut self, raw: &[u8]) {
        let stripped = text::strip(raw);
        let line = ConsoleLine { at_ms: self.now_ms(), text: text::lossy(&stripped) };
        self.match_patterns(&stripped, &line, false);
        self.number += 1;
        let message = message(&line.text);
        if self.booted_ms.is_none() && kernel::starts_first_program(message) {
            self.booted_ms = Some(line.at_ms);
            self.tell(ConsoleEvent::Booted { at_ms: line.at_ms });
        }
        if let (None, Some(text)) = (&self.panic, kernel::panic(message)) {
            self.panic = Some(text.to_owned());
            self.tell(ConsoleEvent::Panic { text: text.to_owned() });
        }
        self.end = kernel::end(message).or(self.end);
        self.program_status = initramfs::exit_line(&line.text).or(self.program_status);
        self.tap.line(&line.text, line.at_ms);
        self.tell_tests();
        self.keep(line);
    }

    /// `partial`: the line may go on, and is not counted yet.
    fn match_patterns(&mut self, stripped: &[u8], line: &ConsoleLine, partial: bool) {
        for pattern in 0..self.patterns.len() {
            if !self.matched_in_partial[pattern] && self.patterns[pattern].is_match(stripped) {
                self.matched[pattern] = self.matched[pattern].saturating_add(1);
                self.matched_in_partial[pattern] = true;
                let number = self.number + 1;
                self.tell(ConsoleEvent::Matched { pattern, number, line: line.clone() });
            }
        }
        if !partial {
            self.matched_in_partial.fill(false);
        }
    }

    fn tell_tests(&mut self) {
        while self.events.len() < MAX_EVENTS
            && let Some(test) = self.tap.next_told()
        {
            self.tell(ConsoleEvent::Test(test));
        }
    }

    /// A full queue is a loop that does not come round, or a guest that floods it. Whatever it is full of, a trap is to hear
    /// that it was hit.
    fn tell(&mut self, event: ConsoleEvent) {
        let has_room = match &event {
            ConsoleEvent::Matched { pattern, .. } => {
                let was_queued = std::mem::replace(&mut self.is_queued[*pattern], true);
                !was_queued || self.events.len() < MAX_EVENTS
            }
            // One of each, or looked at before.
            ConsoleEvent::Booted { .. } | ConsoleEvent::Panic { .. } | ConsoleEvent::Test(_) => true,
        };
        match has_room {
            true => self.events.push_back(event),
            false => self.lost += 1,
        }
        // It fails only when the counter is full, and then it is raised.
        let _ = self.event.write(1);
    }

    fn keep(&mut self, line: ConsoleLine) {
        self.tail_bytes += line.text.len();
        self.tail.push_back(line);
        while self.tail.len() > self.tail_most || self.tail_bytes > MAX_TAIL_BYTES {
            let Some(oldest) = self.tail.pop_front() else { break };
            self.tail_bytes -= oldest.text.len();
        }
    }
}

#[cfg(test)]
mod tests;
