//! The grammar of one rule.
//!
//! ```text
//! RULE    := WHAT CLAUSE*                        clauses in any order, each at most once
//! WHAT    := exec: PLACE | ret: NAME | write: PLACE [: LEN] | access: PLACE [: LEN] | io: PORT
//!          | hang: TIME | console: /REGEX/ | triple-fault | ALIAS
//! PLACE   := ( NAME | NUMBER ) [+ NUMBER]
//! NAME    := [MODULE :] SYMBOL                   a symbol begins with a letter or _, a length with a digit
//! CLAUSE  := if EXPR | count=N | once | cpu=N | must-hit | =ACTION
//! ```

use std::time::Duration;

use super::condition::{self, Allowed, Expr};
use super::cursor::{Cursor, Parse, in_name, starts_name};
use super::error::{Fault, Source, Span};
use super::{Action, Alias, MAX_RULE, Name, Pattern, Place, Rule, RuleError, Target, What};

pub(super) fn rule(source: Source) -> Result<Rule, RuleError> {
    match Reader::new(&source).rule() {
        Ok(rule) => Ok(rule),
        Err(fault) => Err(source.error(fault)),
    }
}

struct Reader<'a> {
    source: &'a Source,
    cursor: Cursor<'a>,
}

impl<'a> Reader<'a> {
    fn new(source: &'a Source) -> Self {
        Self { source, cursor: Cursor::new(&source.text) }
    }

    fn rule(mut self) -> Parse<Rule> {
        if self.source.text.len() > MAX_RULE {
            let span = Span::new(MAX_RULE, MAX_RULE);
            return Err(Fault::new(span, format!("the rule is too long (the most is {MAX_RULE} bytes); split it")));
        }
        self.cursor.skip_space();
        let start = self.cursor.at();
        let what = self.what()?;
        let subject = self.cursor.since(start);
        if self.cursor.peek().is_some_and(|c| !c.is_whitespace() && c != '=') {
            return Err(self.stray(&what));
        }
        let mut rule = Rule {
            text: self.source.text.trim().to_string(),
            name: None,
            origin: self.source.origin.clone(),
            what,
            condition: None,
            count: None,
            once: false,
            cpu: None,
            must_hit: false,
            action: Action::default(),
            source: self.source.clone(),
            subject,
        };
        let mut seen = Vec::new();
        loop {
            self.cursor.skip_space();
            if self.cursor.peek().is_none() {
                return Ok(rule);
            }
            self.clause(&mut rule, &mut seen)?;
        }
    }

    /// What stands right behind a WHAT that is complete.
    fn stray(&self, what: &What) -> Fault {
        let message = match (what, self.cursor.peek()) {
            (What::Exec(_) | What::Return(_), Some(':')) => {
                "a length belongs to write: and access: only; leave it out, and write a module as MODULE:SYMBOL"
            }
            (What::Return(_), Some('+')) => {
                "ret: takes a function's name alone; for a place inside of it write exec:NAME+off"
            }
            (What::Write(_) | What::Access(_), Some('[')) => "an index must be a number, as in a[3].b",
            (What::Exec(_) | What::Write(_) | What::Access(_), Some('-')) if self.cursor.rest().starts_with("->") => {
                "a pointer is not followed; write its own address, or a member of a variable as a.b"
            }
            (What::Exec(_) | What::Write(_) | What::Access(_) | What::Return(_), Some('-')) => {
                "`-` cannot stand in a place: offsets go forward (+8), and module names are written with `_`"
            }
            (What::Write(_) | What::Access(_), Some(':')) => {
                "a length must be a number of bytes, as in write:jiffies:8"
            }
            (What::Console(_), Some(_)) => {
                "flags go into the regex, as in console:/(?i)bug/; what follows it needs a space"
            }
            (What::TripleFault | What::Alias(_), Some(':')) => "this one takes nothing after a colon; leave it out",
            _ => "this does not belong here; put a space before what follows, such as `if`, `count=2` or `=log`",
        };
        Fault::new(self.cursor.word_here(), message)
    }

    fn what(&mut self) -> Parse<What> {
        let (word, span) = self.cursor.take_while(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
        let colon = self.cursor.peek() == Some(':');
        if !colon {
            if word == "triple-fault" {
                return Ok(What::TripleFault);
            }
            if let Some(alias) = Alias::named(word) {
                return Ok(What::Alias(alias));
            }
            return Err(self.unknown(word, span));
        }
        let allowed = ["exec", "ret", "write", "access", "io", "hang", "console"];
        if !allowed.contains(&word) {
            return match Alias::named(word) {
                Some(alias) => Ok(What::Alias(alias)),
                None if word == "triple-fault" => Ok(What::TripleFault),
                None => Err(self.unknown(word, span)),
            };
        }
        self.cursor.advance(1);
        match word {
            "exec" => self.code_place().map(What::Exec),
            "ret" => {
                if self.cursor.peek().is_some_and(|c| c.is_ascii_digit()) {
                    let message =
                        "ret: takes a function's name; for an address write exec: with that of its return instruction";
                    return Err(Fault::new(self.cursor.word_here(), message));
                }
                self.code_name().map(What::Return)
            }
            "write" => self.target(word).map(What::Write),
            "access" => self.target(word).map(What::Access),
            "io" => self.port().map(What::Io),
            "hang" => self.time().map(What::Hang),
            _ => self.pattern().map(What::Console),
        }
    }

    fn unknown(&self, word: &str, span: Span) -> Fault {
        let aliases: Vec<_> = Alias::ALL.iter().map(|alias| alias.word()).collect();
        let forms = format!(
            "exec:SYMBOL, ret:SYMBOL, write:SYMBOL, access:SYMBOL, io:PORT, hang:10s, console:/regex/, triple-fault, {}",
            aliases.join(", ")
        );
        let (span, message) = match word {
            "" if self.cursor.peek().is_none() => (span, format!("the rule is empty; write one of {forms}")),
            "" => (self.cursor.word_here(), format!("a rule begins with one of {forms}")),
            "exec" | "ret" | "write" | "access" => (span, format!("what to trap is missing; write {word}:SYMBOL")),
            "io" => (span, "the port is missing; write io:0x60".to_string()),
            "hang" => (span, "the time is missing; write hang:10s".to_string()),
            "console" => (span, "the regex is missing; write console:/regex/".to_string()),
            _ => (span, format!("`{word}` is no trap; write one of {forms}")),
        };
        Fault::new(span, message)
    }

    fn code_place(&mut self) -> Parse<Place> {
        match self.cursor.peek() {
            Some(c) if c.is_ascii_digit() => self.address(),
            _ => {
                let name = self.code_name()?;
                Ok(Place::Symbol { name, offset: self.offset()?.unwrap_or(0) })
            }
        }
    }

    /// A symbol of code: compilers put dots into those (`foo.part.0`), and some languages more.
    fn code_name(&mut self) -> Parse<Name> {
        name_of(&mut self.cursor, |cursor| {
            let (symbol, span) = cursor.take_while(|c| in_name(c) || matches!(c, '.' | '$' | '@'));
            Ok((symbol.to_string(), span))
        })
        .map(|(name, _)| name)
    }

    fn address(&mut self) -> Parse<Place> {
        let start = self.cursor.at();
        let (address, _) = self.cursor.number("the address")?;
        match address.checked_add(self.offset()?.unwrap_or(0)) {
            Some(address) => Ok(Place::Address(address)),
            None => Err(Fault::new(self.cursor.since(start), "this is past the last address")),
        }
    }

    fn offset(&mut self) -> Parse<Option<u64>> {
        if !self.cursor.eat("+") {
            return Ok(None);
        }
        self.cursor.number("the offset").map(|(offset, _)| Some(offset))
    }

    fn target(&mut self, word: &str) -> Parse<Target> {
        let start = self.cursor.at();
        let place = match self.cursor.peek() {
            Some(c) if c.is_ascii_digit() => self.address()?,
            _ => {
                let (name, _) = variable_name(&mut self.cursor)?;
                Place::Symbol { name, offset: self.offset()?.unwrap_or(0) }
            }
        };
        let len = match self.cursor.rest().as_bytes() {
            [b':', b'0'..=b'9', ..] => {
                self.cursor.advance(1);
                let (len, span) = self.cursor.number("the length")?;
                if len == 0 {
                    return Err(Fault::new(span, "a range of 0 bytes is never touched; write at least 1"));
                }
                if matches!(place, Place::Address(address) if address.checked_add(len - 1).is_none()) {
                    return Err(Fault::new(span, "the range reaches past the last address; make it shorter"));
                }
                Some(len)
            }
            _ => None,
        };
        if len.is_none() && matches!(place, Place::Address(_)) && self.cursor.peek().is_none_or(|c| c != ':') {
            let written = self.cursor.slice(self.cursor.since(start));
            let message = format!("an address has no size of its own; say how many bytes: {word}:{written}:8");
            return Err(Fault::new(self.cursor.since(start), message));
        }
        Ok(Target { place, len })
    }

    fn port(&mut self) -> Parse<u16> {
        let (port, span) = self.cursor.number("the port")?;
        u16::try_from(port).map_err(|_| Fault::new(span, "the last I/O port is 0xffff"))
    }

    fn time(&mut self) -> Parse<Duration> {
        let (text, span) = self.cursor.take_while(|c| c.is_ascii_alphanumeric() || c == '.');
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let millis = match &text[digits.len()..] {
            "ms" => Some(1),
            "" | "s" => Some(1000),
            "m" => Some(60_000),
            "h" => Some(3_600_000),
            _ => None,
        };
        let millis = millis.and_then(|unit: u64| digits.parse::<u64>().ok()?.checked_mul(unit));
        match millis {
            Some(millis @ 1..=86_400_000) => Ok(Duration::from_millis(millis)),
            _ => Err(Fault::new(span, "this is no time between 1ms and a day; write 500ms, 10s or 5m")),
        }
    }

    fn pattern(&mut self) -> Parse<Pattern> {
        let start = self.cursor.at();
        if !self.cursor.eat("/") {
            return Err(Fault::new(self.cursor.word_here(), "write the regex between slashes: console:/regex/"));
        }
        let mut text = String::new();
        let mut escaped = false;
        let mut closed = false;
        for c in self.cursor.rest().chars() {
            self.cursor.advance(c.len_utf8());
            match c {
                '/' if !escaped => {
                    closed = true;
                    break;
                }
                // A slash means itself in a regex, with or without the backslash that kept it from ending this one.
                '/' => {
                    text.pop();
                    text.push('/');
                }
                _ => text.push(c),
            }
            escaped = c == '\\' && !escaped;
        }
        let span = self.cursor.since(start);
        if !closed {
            return Err(Fault::new(span, r"the regex is never closed; add `/` (and write a slash within it as `\/`)"));
        }
        if text.is_empty() {
            return Err(Fault::new(
                span,
                "an empty regex matches every line; write what to look for, or /^/ for all lines",
            ));
        }
        Pattern::new(&text).map_err(|message| Fault::new(span, message))
    }

    fn clause(&mut self, rule: &mut Rule, seen: &mut Vec<&'static str>) -> Parse<()> {
        let start = self.cursor.at();
        if self.cursor.eat("=") {
            self.cursor.skip_space();
            let (word, _) = self.cursor.take_while(|c| in_name(c) || c == '-');
            once("=ACTION", self.cursor.since(start), seen)?;
            rule.action = action(word).ok_or_else(|| {
                let word = self.cursor.slice(self.cursor.since(start));
                let message = format!("`{word}` is no action; {} (in a condition, equality is `==`)", actions());
                Fault::new(self.cursor.since(start), message)
            })?;
            return Ok(());
        }
        let (word, span) = self.cursor.take_while(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
        match word {
            "if" => {
                once("if", span, seen)?;
                let allowed = Allowed {
                    values: matches!(rule.what, What::Write(_) | What::Access(_) | What::Io(_)),
                    returned: matches!(rule.what, What::Return(_)),
                };
                if matches!(rule.what, What::Hang(_) | What::Console(_) | What::TripleFault) {
                    let message = "a condition is about one vCPU at a trap; leave it out here";
                    return Err(Fault::new(span, message));
                }
                let root = condition::parse(&mut self.cursor, allowed)?;
                rule.condition = Some(Expr { root, source: self.source.clone() });
            }
            "once" => {
                once("once", span, seen)?;
                rule.once = true;
            }
            "must-hit" => {
                once("must-hit", span, seen)?;
                rule.must_hit = true;
            }
            "count" => {
                once("count", span, seen)?;
                let (count, span) = self.value(word, "count=3")?;
                if count == 0 {
                    return Err(Fault::new(span, "count=1 is the first hit; write at least 1"));
                }
                rule.count = Some(count);
            }
            "cpu" => {
                once("cpu", span, seen)?;
                let (cpu, value) = self.value(word, "cpu=0")?;
                if matches!(rule.what, What::Hang(_) | What::Console(_) | What::TripleFault) {
                    return Err(Fault::new(
                        span,
                        "this is about the whole machine, not about one vCPU; leave cpu= out",
                    ));
                }
                rule.cpu = Some(u32::try_from(cpu).map_err(|_| Fault::new(value, "there is no such vCPU"))?);
            }
            _ => return Err(self.no_clause(start, word)),
        }
        Ok(())
    }

    fn value(&mut self, word: &str, example: &str) -> Parse<(u64, Span)> {
        self.cursor.skip_space();
        if !self.cursor.eat("=") {
            return Err(Fault::new(self.cursor.word_here(), format!("`{word}` needs a number: {example}")));
        }
        self.cursor.skip_space();
        self.cursor.number(word)
    }

    fn no_clause(&self, start: usize, word: &str) -> Fault {
        const CLAUSES: &str = "if CONDITION, count=N, once, cpu=N, must-hit or =ACTION";
        let mut span = self.cursor.since(start);
        if span.start == span.end {
            span = self.cursor.word_here();
        }
        let written = self.cursor.slice(span);
        let message = match word {
            _ if action(word).is_some() => format!("an action is written with `=`: ={word}"),
            "must_hit" | "musthit" => "write must-hit".to_string(),
            "and" | "or" | "not" => format!("`{word}` is no operator here; write `&&`, `||` or `!`"),
            _ => format!("`{written}` cannot stand here; what may follow is {CLAUSES}"),
        };
        Fault::new(span, message)
    }
}

fn once(clause: &'static str, span: Span, seen: &mut Vec<&'static str>) -> Parse<()> {
    if seen.contains(&clause) {
        return Err(Fault::new(span, format!("`{clause}` stands here a second time; leave one out")));
    }
    seen.push(clause);
    Ok(())
}

pub(super) fn action(word: &str) -> Option<Action> {
    Action::ALL.into_iter().find(|action| action.word() == word)
}

pub(super) fn actions() -> String {
    let words: Vec<_> = Action::ALL.iter().map(|action| format!("={}", action.word())).collect();
    format!("write {}", words.join(", "))
}

/// A variable, with its module, members and indices, as conditions and watches name it.
pub(super) fn variable_name(cursor: &mut Cursor<'_>) -> Parse<(Name, Span)> {
    name_of(cursor, path)
}

/// `[MODULE:]SYMBOL`, the symbol read by `symbol`.
fn name_of(
    cursor: &mut Cursor<'_>,
    mut symbol: impl FnMut(&mut Cursor<'_>) -> Parse<(String, Span)>,
) -> Parse<(Name, Span)> {
    let start = cursor.at();
    if !cursor.peek().is_some_and(starts_name) {
        return Err(Fault::new(cursor.word_here(), "a symbol's name is missing here"));
    }
    let mut ahead = cursor.clone();
    let (module, _) = ahead.take_while(in_name);
    // MODULE:SYMBOL and SYMBOL:LENGTH differ by what follows the colon.
    let module = match ahead.eat(":") && ahead.peek().is_some_and(starts_name) {
        true => {
            *cursor = ahead;
            Some(module.to_string())
        }
        false => None,
    };
    let (path, _) = symbol(cursor)?;
    Ok((Name { module, path }, cursor.since(start)))
}

fn path(cursor: &mut Cursor<'_>) -> Parse<(String, Span)> {
    let start = cursor.at();
    let (symbol, _) = cursor.take_while(in_name);
    let mut path = symbol.to_string();
    loop {
        match cursor.peek() {
            Some('.') => {
                cursor.advance(1);
                // A member, or a number that the compiler gave to one of several statics (`warned.3`).
                let (member, _) = cursor.take_while(in_name);
                if member.is_empty() {
                    return Err(Fault::new(cursor.word_here(), "a member's name is missing after the dot"));
                }
                path.push('.');
                path.push_str(member);
            }
            Some('[') => {
                let open = cursor.at();
                cursor.advance(1);
                let (index, _) = cursor.number("an index")?;
                if !cursor.eat("]") {
                    return Err(Fault::new(cursor.since(open), "an index must be a number in brackets, as in a[3].b"));
                }
                path.push_str(&format!("[{index}]"));
            }
            _ if cursor.rest().starts_with("->") => {
                let message = "a pointer is not followed by `->`; read through it: *(u64*)(pointer + offset)";
                return Err(Fault::new(Span::new(cursor.at(), cursor.at() + 2), message));
            }
            _ => return Ok((path, cursor.since(start))),
        }
    }
}
