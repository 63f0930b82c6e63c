//! Tree to canonical text.

use std::fmt;

use super::{Form, Node};

/// Binds tighter than every binary operator.
const UNARY: u8 = 11;

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.print(f, 0)
    }
}

impl Node {
    /// Prints it, in parentheses if it binds less tightly than `tightness`.
    fn print(&self, f: &mut fmt::Formatter<'_>, tightness: u8) -> fmt::Result {
        match self {
            Node::Number(value, Form::Decimal) => write!(f, "{value}"),
            Node::Number(value, Form::Hex) => write!(f, "{value:#x}"),
            Node::Number(value, Form::Char) => match u8::try_from(*value) {
                Ok(0) => f.write_str(r"'\0'"),
                Ok(c @ (b'\n' | b'\r' | b'\t' | b'\\' | b'\'')) => write!(f, "'{}'", c.escape_ascii()),
                Ok(c) => write!(f, "'{}'", char::from(c)),
                Err(_) => write!(f, "{value:#x}"),
            },
            Node::Register(operand) => write!(f, "${}", operand.name),
            Node::Cpu => f.write_str("$cpu"),
            Node::Old => f.write_str("old"),
            Node::New => f.write_str("new"),
            Node::Variable(name, _) => write!(f, "{name}"),
            Node::Address(name, _) => write!(f, "&{name}"),
            Node::Size(name, _) => write!(f, "sizeof({name})"),
            Node::Read(kind, address) => {
                write!(f, "*({}*)", kind.word())?;
                address.print(f, UNARY)
            }
            Node::Cast(kind, of) => {
                write!(f, "({})", kind.word())?;
                of.print(f, UNARY)
            }
            Node::Unary(operator, of) => {
                f.write_str(operator.word())?;
                of.print(f, UNARY)
            }
            Node::Binary(operator, left, right) => {
                let precedence = operator.precedence();
                let open = precedence < tightness;
                if open {
                    f.write_str("(")?;
                }
                left.print(f, precedence)?;
                write!(f, " {} ", operator.word())?;
                right.print(f, precedence + 1)?;
                if open {
                    f.write_str(")")?;
                }
                Ok(())
            }
        }
    }
}
