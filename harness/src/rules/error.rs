//! What is wrong with a rule, and the column it is wrong at.

use std::fmt;
use std::sync::Arc;

/// Where a rule was written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Origin {
    /// A `--trap` flag.
    #[default]
    Flag,
    /// Given to the library by a program.
    Program,
    /// A TOML file.
    File {
        /// The file's name as it was given.
        file: Arc<str>,
        /// Line of the rule's first byte, from 1.
        line: u32,
        /// Its column, from 1, in characters.
        column: u32,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Flag => f.write_str("--trap"),
            Origin::Program => f.write_str("trap"),
            Origin::File { file, line, column } => write!(f, "{file}:{line}:{column}"),
        }
    }
}

/// A part of a rule's text, in bytes. Two spans always compare equal: where something was written is no part of what it means.
#[derive(Debug, Clone, Copy, Default)]
pub struct Span {
    pub(super) start: u32,
    pub(super) end: u32,
}

impl Span {
    pub(super) fn new(start: usize, end: usize) -> Self {
        // Texts are limited to `MAX_RULE` and `MAX_FILE`, far below 4 GiB.
        Self { start: start as u32, end: end.max(start) as u32 }
    }
}

impl PartialEq for Span {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Span {}

/// What a parser found: a message and where. It becomes a [`RuleError`] once the text around it is known.
#[derive(Debug)]
pub(super) struct Fault {
    pub(super) span: Span,
    pub(super) message: String,
}

impl Fault {
    pub(super) fn new(span: Span, message: impl Into<String>) -> Self {
        Self { span, message: message.into() }
    }
}

/// A rule's text, where it came from, and for a file which byte of it each byte of the text is.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub(super) text: Arc<str>,
    pub(super) origin: Origin,
    in_file: Option<Arc<InFile>>,
}

/// The place of a rule's text in its file.
#[derive(Debug)]
pub(super) struct InFile {
    pub(super) file: Arc<str>,
    pub(super) contents: Arc<str>,
    /// For each byte of the text, and for its end, the byte of the file that says it.
    pub(super) bytes: Vec<u32>,
}

impl Source {
    pub(super) fn new(text: &str, origin: Origin) -> Self {
        Self { text: text.into(), origin, in_file: None }
    }

    pub(super) fn in_file(text: &str, origin: Origin, place: InFile) -> Self {
        Self { text: text.into(), origin, in_file: Some(Arc::new(place)) }
    }

    pub(super) fn error(&self, fault: Fault) -> RuleError {
        let Fault { span, message } = fault;
        match &self.in_file {
            None => RuleError::new(self.origin.clone(), &self.text, span, message),
            Some(place) => {
                let byte = |at: u32| place.bytes.get(at as usize).or(place.bytes.last()).copied().unwrap_or(0);
                let start = byte(span.start);
                // The end is that of the last byte: what follows it in the text may be lines away in the file.
                let end = if span.end > span.start { byte(span.end - 1) + 1 } else { start };
                RuleError::in_file(&place.file, &place.contents, Span::new(start as usize, end as usize), message)
            }
        }
    }
}

/// A rule that cannot be used.
///
/// It displays as three lines: where and what, the line that was written, and a caret under the column (and tildes under
/// the rest of what is wrong):
///
/// ```text
/// --trap: `$raxx` is no register; write $rax..$r15, $eax, $al, $rip, $cr3, $cpu, $arg1..$arg6 or $ret
///     exec:do_exit if $raxx == 1
///                     ^~~~~
/// ```
///
/// In a file the first line begins with `FILE:LINE:COLUMN:`. Lines and columns count from 1, columns in characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleError {
    origin: Origin,
    message: String,
    line: String,
    column: usize,
    width: usize,
}

impl std::error::Error for RuleError {}

/// The most characters of a long line that are shown on each side of the caret.
const SHOWN: usize = 100;

impl RuleError {
    pub(super) fn new(origin: Origin, line: &str, span: Span, message: String) -> Self {
        let start = floor_char_boundary(line, span.start as usize);
        let end = floor_char_boundary(line, span.end as usize).max(start);
        let column = line[..start].chars().count() + 1;
        let width = line[start..end].chars().count().max(1);
        let message = message.replace(|c: char| c.is_control(), "\u{fffd}");
        Self { origin, message, line: line.to_string(), column, width }
    }

    /// An error at `span` of a file: the line is looked up.
    pub(super) fn in_file(file: &Arc<str>, contents: &str, span: Span, message: String) -> Self {
        let start = floor_char_boundary(contents, span.start as usize);
        let line_start = contents[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let line_end = contents[start..].find('\n').map_or(contents.len(), |newline| start + newline);
        let line = contents[line_start..line_end].trim_end_matches('\r');
        let number = contents[..start].bytes().filter(|byte| *byte == b'\n').count() + 1;
        let in_line = Span::new(start - line_start, (span.end as usize).min(line_end).saturating_sub(line_start));
        let mut error = Self::new(Origin::Flag, line, in_line, message);
        error.origin = Origin::File { file: file.clone(), line: number as u32, column: error.column as u32 };
        error
    }

    /// What is wrong and what to do: one line, without the place.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Where it was written; of a file, the very line and column.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The column, from 1, in characters of the line that is shown.
    pub fn column(&self) -> usize {
        self.column
    }

    /// The same for a rule that did not come from a flag.
    pub fn from_origin(mut self, origin: Origin) -> Self {
        self.origin = origin;
        self
    }
}

impl fmt::Display for RuleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let skipped = (self.column - 1).saturating_sub(SHOWN);
        let shown: String = self
            .line
            .chars()
            .skip(skipped)
            .take(2 * SHOWN)
            .map(|c| {
                if c == '\t' {
                    ' '
                } else if c.is_control() {
                    '\u{fffd}'
                } else {
                    c
                }
            })
            .collect();
        let before = self.column - 1 - skipped;
        let room = shown.chars().count().saturating_sub(before).max(1);
        let tildes = "~".repeat(self.width.min(room) - 1);
        write!(f, "{}: {}\n    {}\n    {:before$}^{tildes}", self.origin, self.message, shown.trim_end(), "")
    }
}

fn floor_char_boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}
