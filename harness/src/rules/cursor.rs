//! Reading a rule's text from left to right.

use super::error::{Fault, Span};

pub(super) type Parse<T> = Result<T, Fault>;

/// A place in a text that moves on over what was understood.
#[derive(Debug, Clone)]
pub(super) struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, at: 0 }
    }

    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or("")
    }

    pub(super) fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    pub(super) fn skip_space(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    pub(super) fn eat(&mut self, what: &str) -> bool {
        let found = self.rest().starts_with(what);
        if found {
            self.at += what.len();
        }
        found
    }

    /// The longest run of characters that `is` takes; may be empty.
    pub(super) fn take_while(&mut self, is: impl Fn(char) -> bool) -> (&'a str, Span) {
        let start = self.at;
        let rest = self.rest();
        let len = rest.find(|c| !is(c)).unwrap_or(rest.len());
        self.at += len;
        (&rest[..len], Span::new(start, self.at))
    }

    pub(super) fn advance(&mut self, bytes: usize) {
        self.at = (self.at + bytes).min(self.text.len());
    }

    pub(super) fn since(&self, start: usize) -> Span {
        Span::new(start, self.at)
    }

    /// The word that stands here, for a message about it: up to the next space, at least one character.
    pub(super) fn word_here(&self) -> Span {
        let len = self.rest().find(char::is_whitespace).unwrap_or(self.rest().len());
        Span::new(self.at, self.at + len)
    }

    pub(super) fn slice(&self, span: Span) -> &'a str {
        self.text.get(span.start as usize..span.end as usize).unwrap_or("")
    }

    /// A number: decimal, `0x` hexadecimal or `0b` binary. `what` names it in messages.
    pub(super) fn number(&mut self, what: &str) -> Parse<(u64, Span)> {
        let (digits, span) = self.take_while(|c| c.is_ascii_alphanumeric() || c == '_');
        if digits.is_empty() {
            return Err(Fault::new(self.word_here(), format!("{what} is missing here: a number such as 16 or 0x10")));
        }
        number(digits).map(|value| (value, span)).map_err(|why| Fault::new(span, format!("`{digits}` {why}")))
    }
}

fn number(digits: &str) -> Result<u64, String> {
    let (radix, body) = match digits.get(..2) {
        Some("0x" | "0X") => (16, &digits[2..]),
        Some("0b" | "0B") => (2, &digits[2..]),
        _ => (10, digits),
    };
    if radix == 10 && body.len() > 1 && body.starts_with('0') && body.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("begins with 0, which is octal in C; write it in decimal or with 0x".to_string());
    }
    if body.is_empty() || !body.chars().all(|c| c.is_digit(radix)) {
        return Err("is no number; write decimal or 0x hexadecimal, without a suffix".to_string());
    }
    u64::from_str_radix(body, radix).map_err(|_| "does not fit into 64 bits".to_string())
}

pub(super) fn starts_name(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_'
}

pub(super) fn in_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}
