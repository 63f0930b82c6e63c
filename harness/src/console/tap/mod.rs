//! What the guest's tests say: TAP 12 to 14, KTAP 1 and 2, kselftest's and KUnit's habits.
//!
//! Lines come among others, with the kernel log's columns before them or without, and may end anywhere: kernels under test
//! crash. So nothing is an error here. A line that says nothing about a test is passed over, and what a plan announced
//! and nobody reported is a record, too.
//!
//! A stream is a stack of levels, told apart by the column at which their lines begin:
//!
//! ```text
//!     TAP version 13                     level 0, column 0
//!     1..2
//!     # selftests: net: udp              what comes is of that name
//!     # TAP version 13                   level 1, behind the `#` at column 0
//!     # ok 1 bind
//!     ok 1 selftests: net: udp           ends level 1, and names it
//!         KTAP version 1                 level 1, column 4
//!         # Subtest: list                names it
//!         1..3
//!         # list_add: EXPECTATION ..     for the next result of the level, if that is a failure
//!         not ok 1 list_add
//! ```
//!
//! A kernel module may put its name before all that it says (`pr_fmt`). Where `NAME: KTAP version 1` begins a stream, the
//! name is taken off the lines that have it.

mod interleaved;
mod syntax;

use std::collections::BTreeSet;

use self::interleaved::Mender;
use self::syntax::{ResultLine, Syntax};
use super::text;
use crate::report::{TestRecord, TestResult, TestTiming};

/// Bounds for a hostile guest: records, bytes of all their words, levels, characters of a name or line, lines of diagnostics
/// of a test, and records of what a level's plan has and nobody reported.
const MAX_RECORDS: usize = 100_000;
const MAX_BYTES: usize = 16 << 20;
const MAX_LEVELS: usize = 8;
const MAX_CHARS: usize = 512;
const MAX_DIAGNOSTICS: usize = 64;
const MAX_MISSING: usize = 1000;

/// The parser, and what it has found.
#[derive(Debug, Default)]
pub(super) struct Tap {
    mender: Mender,
    /// Empty between streams.
    levels: Vec<Level>,
    /// Number of the stream.
    stream: u32,
    /// The stream has said `TAP version`.
    versioned: bool,
    /// What a module puts before each of its lines.
    module: Option<String>,
    /// Name of the subtest that comes next.
    pending_name: Option<String>,
    /// Column of a YAML block that has begun.
    yaml: Option<usize>,
    records: Vec<TestRecord>,
    bytes: usize,
    dropped: u64,
    /// Records that [`Tap::next_told`] has given.
    told: usize,
}

/// One test with its subtests; at the bottom the stream itself.
#[derive(Debug, Default)]
struct Level {
    column: usize,
    /// Its lines stand behind a `#` at this column.
    behind: Option<usize>,
    name: Option<String>,
    plan: Option<u64>,
    /// Numbers of its results.
    seen: BTreeSet<u64>,
    numbered: bool,
    /// Its first record, or a subtest's.
    first: usize,
    /// Lines that came since the last result.
    diagnostics: Vec<String>,
    /// The record that a YAML block, or Perl's words about a failure, would belong to.
    last: Option<usize>,
    /// Subtests that ended without a result.
    unfinished: Vec<String>,
}

impl Tap {
    /// Takes a line of the console, without escapes.
    pub(super) fn line(&mut self, line: &str, at_ms: u64) {
        for line in self.mender.mend(line) {
            self.whole_line(&line, at_ms);
        }
    }

    /// All records so far, in the order of their lines.
    pub(super) fn records(&self) -> &[TestRecord] {
        &self.records
    }

    /// The next record that has not been given yet, if all its suites' names are known.
    pub(super) fn next_told(&mut self) -> Option<TestRecord> {
        let next = self.records.get(self.told)?;
        if next.suite.iter().any(String::is_empty) {
            return None;
        }
        self.told += 1;
        Some(next.clone())
    }

    /// No line will come any more.
    pub(super) fn finish(&mut self, at_ms: u64) {
        for line in self.mender.finish() {
            self.whole_line(&line, at_ms);
        }
        self.end_stream(at_ms);
    }

    /// What was too much.
    pub(super) fn problem(&self) -> Option<String> {
        (self.dropped > 0).then(|| {
            format!("the guest reported more tests than are kept: {} of them are not in this report", self.dropped)
        })
    }

    fn whole_line(&mut self, line: &str, at_ms: u64) {
        let line = line[text::log_prefix(line)..].trim_end();
        if let Some(module) = syntax::module_of_version(line) {
            self.module = Some(module.to_owned());
        }
        let line = self.module.as_deref().and_then(|module| line.strip_prefix(module)).unwrap_or(line);
        let (column, body) = self.unindent(line);
        if body.is_empty() || self.in_yaml(column, body) {
            return;
        }
        match syntax::parse(body) {
            Syntax::Version => self.version(column, None, at_ms),
            Syntax::Plan { last, skip } => self.plan(column, last, skip, at_ms),
            Syntax::Result(found) => {
                let kept = self.result(column, found, at_ms);
                if !kept {
                    self.other(column, body);
                }
            }
            Syntax::Bail(reason) => self.bail(reason, at_ms),
            Syntax::Subtest(name) => self.subtest(column, name, at_ms),
            Syntax::Comment(text) => self.comment(column, text, at_ms),
            Syntax::YamlStart => {
                let level = self.levels.last().filter(|level| column > level.column && level.last.is_some());
                self.yaml = level.map(|_| column);
            }
            Syntax::Other => self.other(column, body),
        }
    }

    /// Takes indentation off, and each `#` that the lines of a level stand behind.
    fn unindent<'a>(&self, line: &'a str) -> (usize, &'a str) {
        let mut column = 0;
        let mut body = line;
        loop {
            let indented = body.trim_start_matches(' ');
            column += body.len() - indented.len();
            body = indented;
            let behind = self.levels.iter().any(|level| level.behind == Some(column));
            match body.strip_prefix("# ") {
                Some(inner) if behind => {
                    column += 2;
                    body = inner;
                }
                _ => return (column, body),
            }
        }
    }

    fn version(&mut self, column: usize, behind: Option<usize>, at_ms: u64) {
        match self.levels.first() {
            Some(base) if column > base.column + 1 => {
                self.close_down_to(column - 1, None, at_ms);
                self.open(column, behind);
            }
            _ => {
                self.end_stream(at_ms);
                self.begin(column);
                self.versioned = true;
            }
        }
    }

    fn plan(&mut self, column: usize, last: u64, skip: Option<&str>, at_ms: u64) {
        if self.levels.is_empty() {
            if column > 0 {
                return;
            }
            self.begin(column);
        }
        self.level_at(column, None, at_ms);
        let at_base = self.levels.len() == 1;
        if at_base && self.levels.first().is_some_and(|base| base.plan.is_some() && !base.seen.is_empty()) {
            // One that has said all of it: another program goes on.
            self.end_stream(at_ms);
            self.begin(column);
        }
        let Some(level) = self.levels.last_mut() else { return };
        if level.plan.is_none() {
            level.plan = Some(last);
            if let (0, Some(reason), true) = (last, skip, at_base) {
                let reason = (!reason.is_empty()).then(|| bounded(reason));
                self.record(0, "(all)".to_owned(), TestResult::Skipped, reason, 0, at_ms);
            }
        }
    }

    /// Whether it is a result, and not prose.
    fn result(&mut self, column: usize, found: ResultLine<'_>, at_ms: u64) -> bool {
        if self.levels.is_empty() {
            if column > 0 || found.number.is_none() {
                return false;
            }
            self.begin(column);
        }
        if !found.sure && (!self.versioned || self.levels.last().is_some_and(|level| level.numbered)) {
            return false;
        }
        let name = bounded(&syntax::unescaped(found.name));
        let (subtests, words) = self.level_at(column, Some(&name), at_ms);
        let Some(level) = self.levels.last_mut() else { return false };
        let number = found.number.unwrap_or_else(|| level.seen.last().map_or(1, |last| last.saturating_add(1)));
        level.numbered |= found.number.is_some();
        let mut message: Vec<_> = found.message.map(bounded).into_iter().collect();
        let diagnostics = std::mem::take(&mut level.diagnostics);
        if found.result == TestResult::Failed {
            message.extend(words.into_iter().chain(diagnostics));
        }
        let message = (!message.is_empty()).then(|| message.join("\n"));
        let last = self.record(number, name, found.result, message, subtests, at_ms);
        if let Some(level) = self.levels.last_mut() {
            if last.is_some() {
                level.seen.insert(number);
            }
            level.last = last;
        }
        true
    }

    fn bail(&mut self, reason: &str, at_ms: u64) {
        if self.levels.is_empty() {
            return;
        }
        self.close_down_to(0, None, at_ms);
        let reason = (!reason.is_empty()).then(|| bounded(reason));
        let number = self.levels.last().and_then(|base| base.seen.last()).map_or(1, |last| last.saturating_add(1));
        self.record(number, "Bail out!".to_owned(), TestResult::Failed, reason, 0, at_ms);
        self.end_stream(at_ms);
    }

    fn subtest(&mut self, column: usize, name: &str, at_ms: u64) {
        let Some(top) = self.levels.last() else { return };
        let name = bounded(name);
        if column > top.column + 1 {
            self.open(column, None);
        } else if self.levels.len() == 1 || column + 1 < top.column {
            self.close_down_to(column, None, at_ms);
            self.pending_name = Some(name);
            return;
        }
        match self.levels.last_mut() {
            Some(top) if top.name.is_none() && top.seen.is_empty() => top.name = Some(name),
            _ => self.pending_name = Some(name),
        }
    }

    fn comment(&mut self, column: usize, text: &str, at_ms: u64) {
        if self.levels.is_empty() {
            return;
        }
        // kselftest puts a `#` before all that a test says.
        let inner = text.trim_start();
        match syntax::parse(inner) {
            Syntax::Version => return self.version(column + 2, Some(column), at_ms),
            Syntax::Plan { last, skip } if self.pending_name.is_some() => {
                self.version(column + 2, Some(column), at_ms);
                return self.plan(column + 2, last, skip, at_ms);
            }
            _ => {}
        }
        let Some(level) = self.levels.iter_mut().rev().find(|level| level.column <= column) else { return };
        if inner.starts_with("selftests: ") {
            // What was said before is not about this one.
            level.diagnostics.clear();
            self.pending_name = Some(bounded(inner));
            return;
        }
        if inner.is_empty() {
            return;
        }
        // Perl's Test::More explains a failure after the fact.
        let perl = inner.starts_with("Failed test") || inner.starts_with("Failed (TODO) test");
        match level.last {
            Some(last) if level.diagnostics.is_empty() && (perl || text.starts_with("  ")) => {
                self.add_to(last, text.trim_start());
            }
            _ => {
                level.last = None;
                keep(&mut level.diagnostics, text);
            }
        }
    }

    /// A line that belongs to a subtest only because it is indented like one.
    fn other(&mut self, column: usize, body: &str) {
        if let Some(level) = self.levels.last_mut()
            && level.column > 0
            && column >= level.column
        {
            let indented = format!("{:indent$}{body}", "", indent = column - level.column);
            keep(&mut level.diagnostics, &indented);
        }
    }

    /// Whether the line is one of a YAML block. What is indented less has cut it off.
    fn in_yaml(&mut self, column: usize, body: &str) -> bool {
        let Some(start) = self.yaml else { return false };
        if column < start || (column == start && body == "...") {
            self.yaml = None;
            return column == start;
        }
        if let Some(last) = self.levels.last().and_then(|level| level.last) {
            self.add_to(last, &format!("{:indent$}{body}", "", indent = column - start));
        }
        true
    }

    fn begin(&mut self, column: usize) {
        self.stream = self.stream.saturating_add(1);
        self.versioned = false;
        self.pending_name = None;
        self.levels = vec![Level { column, first: self.records.len(), ..Level::default() }];
    }

    fn end_stream(&mut self, at_ms: u64) {
        self.yaml = None;
        if !self.levels.is_empty() {
            self.close_down_to(0, None, at_ms);
            self.missing(at_ms);
            self.levels.clear();
        }
    }

    /// Makes the level of that column the top one: subtests are closed, or one is opened. Gives how many tests the closed
    /// ones had and what they said last.
    fn level_at(&mut self, column: usize, name: Option<&str>, at_ms: u64) -> (u64, Vec<String>) {
        let closed = self.close_down_to(column, name, at_ms);
        if self.levels.last().is_some_and(|top| column > top.column + 1) {
            self.open(column, None);
        }
        closed
    }

    fn open(&mut self, column: usize, behind: Option<usize>) {
        if self.levels.len() < MAX_LEVELS {
            let name = self.pending_name.take();
            self.levels.push(Level { column, behind, name, first: self.records.len(), ..Level::default() });
        }
    }

    /// Closes all subtests to the right of that column. `result`: the name in the line that has closed them.
    fn close_down_to(&mut self, column: usize, result: Option<&str>, at_ms: u64) -> (u64, Vec<String>) {
        let mut closed = (0, Vec::new());
        while self.levels.len() > 1 && self.levels.last().is_some_and(|top| top.column > column + 1) {
            self.missing(at_ms);
            let depth = self.levels.len() - 1;
            let Some(level) = self.levels.pop() else { break };
            let is_the_results = self.levels.last().is_some_and(|top| top.column <= column + 1);
            let result = result.filter(|name| is_the_results && !name.is_empty());
            let name = level.name.or_else(|| result.map(str::to_owned)).unwrap_or_else(|| "unnamed".to_owned());
            // Those that came before the name was known: it may come late, or not at all.
            for record in &mut self.records[level.first..] {
                if let Some(suite) = record.suite.get_mut(depth - 1).filter(|suite| suite.is_empty()) {
                    self.bytes += name.len();
                    suite.clone_from(&name);
                }
            }
            closed = (level.seen.len() as u64, level.diagnostics);
            if let (false, Some(parent)) = (is_the_results && result.is_some(), self.levels.last_mut())
                && parent.unfinished.len() < MAX_MISSING
            {
                parent.unfinished.push(name);
            }
        }
        closed
    }

    /// Records what the top level's plan has and nobody reported.
    fn missing(&mut self, at_ms: u64) {
        let Some(level) = self.levels.last_mut() else { return };
        let seen = std::mem::take(&mut level.seen);
        let mut names = std::mem::take(&mut level.unfinished).into_iter();
        let plan = level.plan.unwrap_or_else(|| {
            // Without a plan, what has begun at least.
            seen.last().copied().unwrap_or(0).saturating_add(names.len() as u64)
        });
        let reported = seen.range(1..=plan.max(1)).count() as u64;
        let absent = if level.plan.is_some() { plan.saturating_sub(reported) } else { names.len() as u64 };
        let numbers: Vec<u64> = (1..=plan)
            .filter(|number| !seen.contains(number))
            .take(usize::try_from(absent).unwrap_or(usize::MAX).min(MAX_MISSING))
            .collect();
        level.seen = seen;
        let rest = absent - numbers.len() as u64;
        let last = numbers.last().copied();
        for number in numbers {
            let more = (rest > 0 && Some(number) == last).then(|| format!("and {rest} more that the plan has"));
            self.record(number, names.next().unwrap_or_default(), TestResult::Missing, more, 0, at_ms);
        }
    }

    /// A record in the top level, unless there are too many.
    fn record(
        &mut self,
        number: u64,
        name: String,
        result: TestResult,
        message: Option<String>,
        subtests: u64,
        at_ms: u64,
    ) -> Option<usize> {
        let suite: Vec<_> = self.levels.iter().skip(1).map(|level| level.name.clone().unwrap_or_default()).collect();
        let bytes = name.len() + message.as_ref().map_or(0, String::len) + suite.iter().map(String::len).sum::<usize>();
        if self.records.len() >= MAX_RECORDS || self.bytes + bytes > MAX_BYTES {
            self.dropped = self.dropped.saturating_add(1);
            return None;
        }
        self.bytes += bytes;
        let timing = TestTiming { at_ms };
        let stream = self.stream;
        self.records.push(TestRecord { suite, number, name, result, message, stream, subtests, timing });
        Some(self.records.len() - 1)
    }

    /// Adds a line to what is said about a failed test.
    fn add_to(&mut self, record: usize, line: &str) {
        let line = bounded(line);
        let Some(record) = self.records.get_mut(record) else { return };
        if record.result != TestResult::Failed || self.bytes + line.len() > MAX_BYTES {
            return;
        }
        let message = record.message.get_or_insert_default();
        if message.lines().count() < MAX_DIAGNOSTICS {
            self.bytes += line.len() + 1;
            if !message.is_empty() {
                message.push('\n');
            }
            message.push_str(&line);
        }
    }
}

fn keep(diagnostics: &mut Vec<String>, line: &str) {
    if diagnostics.len() < MAX_DIAGNOSTICS {
        diagnostics.push(bounded(line));
    }
}

fn bounded(text: &str) -> String {
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}..", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests;
