//! Traps as rules: what to watch in a guest, under which condition, and what to do then.
//!
//! ```text
//!  --trap 'write:init_task.flags if new & 0x40 count=2 =log'        traps.toml: [[trap]] rule = "…"
//!      │                                                                │ file.rs
//!      └──────────────► grammar.rs ◄────────────────────────────────────┘
//!                           │ Rule { what, condition, count, once, cpu, must_hit, action }      words.rs prints it
//!              ┌────────────┴──────────────┐
//!          What (place, alias/)       Expr (condition/)          before boot, with the kernel's symbols:
//!              │ Alias::functions          │ Expr::bind
//!              ▼                           ▼
//!        where traps are armed         Condition, evaluated on the vCPU's thread at each hit
//! ```
//!
//! Everything here is pure: names are resolved through [`Names`], registers and memory read through [`Context`].
//! docs/traps.md is the user's page.

mod alias;
mod condition;
mod cursor;
mod error;
mod file;
mod grammar;
mod words;

#[cfg(test)]
mod tests;

use std::time::Duration;

use regex::bytes::{Regex, RegexBuilder};

pub use alias::{Alias, Event, Seen};
pub use condition::{Condition, Context, EvalError, Expr, Kind, Names, Needs, Register, Variable};
use error::{Fault, Source};
pub use error::{Origin, RuleError, Span};
pub use file::{MAX_FILE, from_toml};

/// The longest text of one rule, in bytes.
pub const MAX_RULE: usize = 4096;
/// The most memory that a console regex may take once compiled, in bytes.
pub const MAX_REGEX: usize = 1 << 20;

/// Reads one rule, as `--trap` takes it.
///
/// # Errors
///
/// If the text is no rule: what is wrong, with a caret under the column.
pub fn parse(text: &str) -> Result<Rule, RuleError> {
    parse_from(text, Origin::Flag)
}

/// Reads one rule that was written at `origin`, which only its messages say.
///
/// # Errors
///
/// As [`parse`].
pub fn parse_from(text: &str, origin: Origin) -> Result<Rule, RuleError> {
    grammar::rule(Source::new(text, origin))
}

/// One trap: what to watch for and what to do then.
///
/// It displays in canonical form, which parses to an equal rule. Rules are equal if they mean the same: their text,
/// name and origin do not count.
#[derive(Debug, Clone)]
pub struct Rule {
    /// As it was written.
    pub text: String,
    /// The name that reports use; `None`: the text is the name.
    pub name: Option<String>,
    /// Where it was written.
    pub origin: Origin,
    /// What is watched for.
    pub what: What,
    /// A hit under which this is false does not count.
    pub condition: Option<Expr>,
    /// The action is taken from the N-th hit on; at least 1.
    pub count: Option<u64>,
    /// The action is taken once at most; then the trap is disarmed.
    pub once: bool,
    /// Only hits of this vCPU count.
    pub cpu: Option<u32>,
    /// A run in which this was never hit is a failure.
    pub must_hit: bool,
    /// What to do at a hit.
    pub action: Action,
    source: Source,
    subject: Span,
}

impl Rule {
    /// The name that reports use: the given one, or else the rule as it was written.
    pub fn title(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.text)
    }

    /// An error about what this rule watches, such as a symbol that is missing, with the caret under it.
    pub fn refuse(&self, message: impl Into<String>) -> RuleError {
        self.source.error(Fault::new(self.subject, message))
    }

    /// The exit code of a run that this rule ends: 4 for panics and oopses, otherwise 3.
    pub fn exit_code(&self) -> u8 {
        match self.what {
            What::Alias(alias) => alias.exit_code(),
            _ => 3,
        }
    }
}

impl PartialEq for Rule {
    fn eq(&self, other: &Self) -> bool {
        self.what == other.what
            && self.condition == other.condition
            && self.count == other.count
            && self.once == other.once
            && self.cpu == other.cpu
            && self.must_hit == other.must_hit
            && self.action == other.action
    }
}

/// What a rule watches for.
#[derive(Debug, Clone, PartialEq)]
pub enum What {
    /// `exec:PLACE`: the instruction at this place is about to be executed.
    Exec(Place),
    /// `ret:NAME`: this function returns to its caller.
    Return(Name),
    /// `write:PLACE[:LEN]`: these bytes are written.
    Write(Target),
    /// `access:PLACE[:LEN]`: these bytes are read or written.
    Access(Target),
    /// A failure that the kernel detects itself, by its alias.
    Alias(Alias),
    /// `triple-fault`: the guest cannot go on.
    TripleFault,
    /// `hang:TIME`: for so long no vCPU makes progress.
    Hang(Duration),
    /// `console:/REGEX/`: a line of the guest's console matches.
    Console(Pattern),
    /// `io:PORT`: the guest reads or writes this I/O port.
    Io(u16),
}

/// A symbol's name, with the module it belongs to if that was written: `ext4:ext4_sync_fs`.
///
/// It displays as it is written. For `exec:` and `ret:` the path is a symbol, which may hold dots (`foo.part.0`); for watches
/// and in conditions it is a variable with the members and indices that lead into it (`init_task.flags`, `a[3].b`).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Name {
    /// The module, as `lsmod` writes it; `None`: wherever the name is found, the kernel first.
    pub module: Option<String>,
    /// The symbol and what leads into it, without spaces.
    pub path: String,
}

/// A linear address, or a name with an offset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// As it was written, `+offset` added: KASLR does not move it.
    Address(u64),
    /// The symbol's address plus an offset in bytes.
    Symbol {
        /// The symbol.
        name: Name,
        /// Bytes from its beginning.
        offset: u64,
    },
}

/// A range of linear addresses to watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its first byte.
    pub place: Place,
    /// Its length in bytes, at least 1; `None`: what the symbol's type says. A raw address always has one.
    pub len: Option<u64>,
}

impl Target {
    /// The address and the length of the range, for a variable of `size` bytes at `address` that the name led to.
    ///
    /// # Errors
    ///
    /// One line, if the range wraps around, or if without a given length nothing of the variable is left.
    pub fn range(&self, address: u64, size: u64) -> Result<(u64, u64), String> {
        let (start, left) = match &self.place {
            Place::Address(address) => (Some(*address), 0),
            Place::Symbol { offset, .. } => (address.checked_add(*offset), size.saturating_sub(*offset)),
        };
        let len = self.len.unwrap_or(left);
        if len == 0 {
            return Err(match &self.place {
                Place::Symbol { name, offset } if size > 0 => format!(
                    "`{name}` has {size} bytes, so nothing of it is left at +{offset:#x}; say how many bytes: +{offset:#x}:8"
                ),
                _ => format!("the size of `{}` is not known; say how many bytes: {}:8", self.place, self.place),
            });
        }
        match start {
            Some(start) if start.checked_add(len - 1).is_some() => Ok((start, len)),
            _ => Err(format!("{len} bytes at {} reach past the last address", self.place)),
        }
    }
}

/// A regular expression on the bytes of one line of the console, with its text.
#[derive(Debug, Clone)]
pub struct Pattern {
    regex: Regex,
}

impl Pattern {
    /// A pattern from the text of a regular expression.
    ///
    /// # Errors
    ///
    /// One line, if it is none.
    pub fn new(regex: &str) -> Result<Self, String> {
        let built = RegexBuilder::new(regex).size_limit(MAX_REGEX).dfa_size_limit(MAX_REGEX).build();
        built.map(|regex| Self { regex }).map_err(|error| match error {
            regex::Error::CompiledTooBig(limit) => {
                format!("the regex needs more than {limit} bytes once compiled; make it simpler")
            }
            error => {
                // The crate draws a picture over several lines; the last one says what is wrong.
                let text = error.to_string();
                let why = text.lines().last().unwrap_or("").trim_start_matches("error: ");
                format!("the regex is wrong: {why}")
            }
        })
    }

    /// The compiled expression.
    pub fn regex(&self) -> &Regex {
        &self.regex
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.regex.as_str() == other.regex.as_str()
    }
}

/// What is done at a hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum Action {
    /// The run ends and has failed.
    #[default]
    Fail,
    /// The hit is written down; the guest goes on.
    Log,
    /// The hit is written down with all vCPUs' backtraces; the guest goes on.
    Backtrace,
    /// The machine's state is saved; the guest goes on.
    Snapshot,
    /// The guest stops and waits for gdb.
    Gdb,
    /// The hit is counted, nothing else.
    Ignore,
}

impl Action {
    /// Every action.
    pub const ALL: [Action; 6] =
        [Action::Fail, Action::Log, Action::Backtrace, Action::Snapshot, Action::Gdb, Action::Ignore];

    /// As rules write it.
    pub fn word(self) -> &'static str {
        match self {
            Action::Fail => "fail",
            Action::Log => "log",
            Action::Backtrace => "bt",
            Action::Snapshot => "snapshot",
            Action::Gdb => "gdb",
            Action::Ignore => "ignore",
        }
    }
}
