//! Text to tree: recursive descent, with the binary operators by precedence.

use super::super::cursor::{Cursor, Parse, in_name, starts_name};
use super::super::error::Fault;
use super::super::grammar;
use super::register::RETURNED;
use super::{Binary, Form, Kind, MAX_HEIGHT, MAX_NESTING, Node, Operand, Unary};

/// Which words have a meaning here, by what the rule watches for.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Allowed {
    /// `new`: watches and ports.
    pub(in super::super) values: bool,
    /// `old`: watches.
    pub(in super::super) before: bool,
    /// `$ret`: returns.
    pub(in super::super) returned: bool,
}

/// Reads an expression as far as it goes.
pub(in super::super) fn parse(cursor: &mut Cursor<'_>, allowed: Allowed) -> Parse<Node> {
    Parser { cursor, allowed, nesting: 0 }.binary(1).map(|tree| tree.node)
}

/// A tree with its height.
struct Tree {
    node: Node,
    height: u32,
}

impl Tree {
    fn leaf(node: Node) -> Self {
        Self { node, height: 1 }
    }
}

struct Parser<'c, 'a> {
    cursor: &'c mut Cursor<'a>,
    allowed: Allowed,
    nesting: u32,
}

impl Parser<'_, '_> {
    fn binary(&mut self, weakest: u8) -> Parse<Tree> {
        let start = self.cursor.at();
        let mut left = self.unary()?;
        loop {
            self.cursor.skip_space();
            let rest = self.cursor.rest();
            let Some(operator) = Binary::ALL.into_iter().find(|operator| rest.starts_with(operator.word())) else {
                break;
            };
            if operator.precedence() < weakest {
                break;
            }
            self.cursor.advance(operator.word().len());
            let right = self.binary(operator.precedence() + 1)?;
            let height = left.height.max(right.height) + 1;
            if height > MAX_HEIGHT {
                let message =
                    format!("the condition has too many parts in a row (the most is {MAX_HEIGHT}); split the rule");
                return Err(Fault::new(self.cursor.since(start), message));
            }
            let node = Node::Binary(operator, Box::new(left.node), Box::new(right.node));
            left = Tree { node, height };
        }
        Ok(left)
    }

    /// One level further in: `inner` at most [`MAX_NESTING`] times within itself.
    fn nested(&mut self, inner: impl FnOnce(&mut Self) -> Parse<Tree>) -> Parse<Tree> {
        if self.nesting >= MAX_NESTING {
            let message = format!("the condition nests too deep (the most is {MAX_NESTING} levels); simplify it");
            return Err(Fault::new(self.cursor.word_here(), message));
        }
        self.nesting += 1;
        let tree = inner(self)?;
        self.nesting -= 1;
        Ok(tree)
    }

    fn wrapped(&mut self, wrap: impl FnOnce(Box<Node>) -> Node) -> Parse<Tree> {
        let inner = self.nested(Self::unary)?;
        Ok(Tree { node: wrap(Box::new(inner.node)), height: inner.height + 1 })
    }

    fn unary(&mut self) -> Parse<Tree> {
        self.cursor.skip_space();
        let start = self.cursor.at();
        match self.cursor.peek() {
            Some('-') => {
                self.cursor.advance(1);
                self.wrapped(|of| Node::Unary(Unary::Negate, of))
            }
            Some('!') => {
                self.cursor.advance(1);
                self.wrapped(|of| Node::Unary(Unary::Not, of))
            }
            Some('~') => {
                self.cursor.advance(1);
                self.wrapped(|of| Node::Unary(Unary::Invert, of))
            }
            Some('*') => {
                self.cursor.advance(1);
                let kind = match self.pointer_cast()? {
                    Some(kind) => kind,
                    None => Kind::U64,
                };
                self.wrapped(|address| Node::Read(kind, address))
            }
            Some('&') => {
                self.cursor.advance(1);
                self.cursor.skip_space();
                let (name, span) = grammar::variable_name(self.cursor)?;
                Ok(Tree::leaf(Node::Address(name, span)))
            }
            Some('(') => {
                self.cursor.advance(1);
                if let Some(kind) = self.kind()? {
                    self.cursor.skip_space();
                    if self.cursor.peek() == Some('*') {
                        let message =
                            format!("a pointer must be read: write *({}*)(address) with a `*` in front", kind.word());
                        return Err(Fault::new(self.cursor.since(start), message));
                    }
                    self.close(start)?;
                    return self.wrapped(|of| Node::Cast(kind, of));
                }
                let inner = self.nested(|parser| parser.binary(1))?;
                self.close(start)?;
                Ok(inner)
            }
            Some('$') => self.register(),
            Some('\'') => self.character(),
            Some(c) if c.is_ascii_digit() => {
                let hex = self.cursor.rest().as_bytes().get(1).is_some_and(|byte| !byte.is_ascii_digit());
                let (value, _) = self.cursor.number("a number")?;
                Ok(Tree::leaf(Node::Number(value, if hex && value > 9 { Form::Hex } else { Form::Decimal })))
            }
            Some(c) if starts_name(c) => self.word(),
            _ => Err(Fault::new(
                self.cursor.word_here(),
                "a value is missing here: a number, $register, symbol, *(u32*)(address), old or new",
            )),
        }
    }

    fn close(&mut self, opened: usize) -> Parse<()> {
        self.cursor.skip_space();
        if self.cursor.eat(")") {
            return Ok(());
        }
        let (message, span) = match self.cursor.peek() {
            None => ("this parenthesis is never closed; add `)`", super::super::error::Span::new(opened, opened + 1)),
            Some(_) => ("an operator or `)` is missing here", self.cursor.word_here()),
        };
        Err(Fault::new(span, message))
    }

    /// The kind that stands here as a whole word, if one does.
    fn kind(&mut self) -> Parse<Option<Kind>> {
        self.cursor.skip_space();
        let mut ahead = self.cursor.clone();
        let (word, span) = ahead.take_while(in_name);
        if let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.word() == word) {
            *self.cursor = ahead;
            return Ok(Some(kind));
        }
        ahead.skip_space();
        if starts_with_letter(word) && ahead.peek() == Some('*') {
            ahead.advance(1);
            ahead.skip_space();
            if ahead.peek() == Some(')') {
                let message =
                    format!("`{word}` is no type that can be read; write u8, u16, u32, u64, i8, i16, i32 or i64");
                return Err(Fault::new(span, message));
            }
        }
        Ok(None)
    }

    /// `(KIND*)`, right after a `*`.
    fn pointer_cast(&mut self) -> Parse<Option<Kind>> {
        self.cursor.skip_space();
        let mut ahead = Parser { cursor: &mut self.cursor.clone(), allowed: self.allowed, nesting: self.nesting };
        let start = ahead.cursor.at();
        if !ahead.cursor.eat("(") {
            return Ok(None);
        }
        let Some(kind) = ahead.kind()? else { return Ok(None) };
        ahead.cursor.skip_space();
        if !ahead.cursor.eat("*") {
            return Ok(None);
        }
        ahead.close(start)?;
        let at = ahead.cursor.at();
        self.cursor.advance(at - self.cursor.at());
        Ok(Some(kind))
    }

    fn register(&mut self) -> Parse<Tree> {
        let start = self.cursor.at();
        self.cursor.advance(1);
        let (name, _) = self.cursor.take_while(in_name);
        let span = self.cursor.since(start);
        if name == "cpu" {
            return Ok(Tree::leaf(Node::Cpu));
        }
        if name == RETURNED && !self.allowed.returned {
            return Err(Fault::new(span, "only `ret:` rules have $ret; anywhere else write $rax"));
        }
        match Operand::named(name) {
            Some(operand) => Ok(Tree::leaf(Node::Register(operand))),
            None => Err(Fault::new(
                span,
                format!(
                    "`${name}` is no register; write $rax..$r15, $eax, $al, $rip, $rflags, $cr3, $cpu, $cpl, $arg1..$arg6 or $ret"
                ),
            )),
        }
    }

    fn character(&mut self) -> Parse<Tree> {
        let start = self.cursor.at();
        let rest = self.cursor.rest();
        let known: [(&str, u8); 6] =
            [(r"'\n'", b'\n'), (r"'\r'", b'\r'), (r"'\t'", b'\t'), (r"'\0'", 0), (r"'\\'", b'\\'), (r"'\''", b'\'')];
        if let Some((text, value)) = known.into_iter().find(|(text, _)| rest.starts_with(text)) {
            self.cursor.advance(text.len());
            return Ok(Tree::leaf(Node::Number(value.into(), Form::Char)));
        }
        match rest.as_bytes() {
            [b'\'', value, b'\'', ..] if (b' '..=b'~').contains(value) && !b"'\\".contains(value) => {
                self.cursor.advance(3);
                Ok(Tree::leaf(Node::Number((*value).into(), Form::Char)))
            }
            _ => {
                self.cursor.advance(rest[1..].find('\'').map_or(1, |end| end + 2));
                let message = r"this is no character; write one of ASCII between quotes, as 'a', '\n' or '\''";
                Err(Fault::new(self.cursor.since(start), message))
            }
        }
    }

    /// `old`, `new`, `sizeof(NAME)` or the name of a variable.
    fn word(&mut self) -> Parse<Tree> {
        let (name, span) = grammar::variable_name(self.cursor)?;
        let node = match (name.module.is_none(), name.path.as_str()) {
            (true, "old" | "new") if !self.allowed.values => {
                return Err(Fault::new(
                    span,
                    format!(
                        "only `write:`, `access:` and `io:` rules have `{name}`; for a variable of that name write *(u32*)(&{name})"
                    ),
                ));
            }
            (true, "old") if !self.allowed.before => {
                return Err(Fault::new(span, "nothing is known of a port before its access; leave `old` out"));
            }
            (true, "old") => Node::Old,
            (true, "new") => Node::New,
            (true, "sizeof") => {
                self.cursor.skip_space();
                let open = self.cursor.at();
                if !self.cursor.eat("(") {
                    return Err(Fault::new(self.cursor.word_here(), "write sizeof(symbol)"));
                }
                self.cursor.skip_space();
                let (name, span) = grammar::variable_name(self.cursor)?;
                self.close(open)?;
                Node::Size(name, span)
            }
            _ => Node::Variable(name, span),
        };
        Ok(Tree::leaf(node))
    }
}

fn starts_with_letter(word: &str) -> bool {
    word.chars().next().is_some_and(starts_name)
}
