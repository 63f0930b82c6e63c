//! A rule in canonical form. It parses to an equal rule.

use std::fmt;

use super::{Action, Name, Pattern, Place, Rule, Target, What};

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.what.fmt(f)?;
        if let Some(condition) = &self.condition {
            write!(f, " if {condition}")?;
        }
        if let Some(count) = self.count {
            write!(f, " count={count}")?;
        }
        if self.once {
            f.write_str(" once")?;
        }
        if let Some(cpu) = self.cpu {
            write!(f, " cpu={cpu}")?;
        }
        if self.must_hit {
            f.write_str(" must-hit")?;
        }
        if self.action != Action::default() {
            write!(f, " ={}", self.action)?;
        }
        Ok(())
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            What::Exec(place) => write!(f, "exec:{place}"),
            What::Return(name) => write!(f, "ret:{name}"),
            What::Write(target) => write!(f, "write:{target}"),
            What::Access(target) => write!(f, "access:{target}"),
            What::Alias(alias) => alias.fmt(f),
            What::TripleFault => f.write_str("triple-fault"),
            What::Hang(time) => match time.as_millis() {
                millis if millis % 60_000 == 0 => write!(f, "hang:{}m", millis / 60_000),
                millis if millis % 1000 == 0 => write!(f, "hang:{}s", millis / 1000),
                millis => write!(f, "hang:{millis}ms"),
            },
            What::Console(pattern) => write!(f, "console:{pattern}"),
            What::Io(port) => write!(f, "io:{port:#x}"),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(module) = &self.module {
            write!(f, "{module}:")?;
        }
        f.write_str(&self.path)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Address(address) => write!(f, "{address:#x}"),
            Place::Symbol { name, offset: 0 } => name.fmt(f),
            Place::Symbol { name, offset } => write!(f, "{name}+{offset:#x}"),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.place.fmt(f)?;
        match self.len {
            Some(len) => write!(f, ":{len}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("/")?;
        let mut escaped = false;
        for c in self.regex.as_str().chars() {
            match c {
                '/' if !escaped => f.write_str(r"\/")?,
                _ => write!(f, "{c}")?,
            }
            escaped = c == '\\' && !escaped;
        }
        f.write_str("/")
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}
