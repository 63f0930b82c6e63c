//! Conditions: C-like expressions over 64-bit values.
//!
//! *Every value has 64 bits and is unsigned, unless it comes from an `i8`..`i64` cast or read or from a variable whose C type is
//! signed. An operation with a signed operand is signed; so is its result.* It matters to `/ % < <= > >=`; what `>>` does is
//! decided by its left operand alone. Comparisons, `!`, `&&` and `||` give an unsigned 0 or 1. Narrower values are widened when they
//! are read: unsigned ones with zeros, signed ones with their sign. Nothing overflows: results wrap around at 64 bits, and a shift by
//! 64 or more leaves zeros (or the sign).
//!
//! An [`Expr`] is what was written. [`Expr::bind`] looks its names up and gives a [`Condition`], which is evaluated on the vCPU's
//! thread at each hit: without allocation, and looking only at what it needs.

mod bind;
mod eval;
mod parse;
mod print;
mod register;

use std::fmt;

pub use eval::{Condition, Context, EvalError, Needs};
pub use register::Register;

pub(super) use parse::{Allowed, parse};

use super::Name;
use super::error::{Source, Span};
use register::Operand;

/// The highest tree that an expression may be, which bounds every recursion over it.
pub(super) const MAX_HEIGHT: u32 = 200;
/// The deepest that parentheses and unary operators may nest, which bounds the parser's recursion.
pub(super) const MAX_NESTING: u32 = 64;

/// A condition as it was written: names are not looked up yet.
///
/// It displays in canonical form: one space around binary operators and only the parentheses that are needed.
#[derive(Debug, Clone)]
pub struct Expr {
    pub(super) root: Node,
    /// The text that the spans in the tree are of.
    pub(super) source: Source,
}

impl PartialEq for Expr {
    fn eq(&self, other: &Self) -> bool {
        self.root == other.root
    }
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.root.fmt(f)
    }
}

/// How wide a value is, and whether it has a sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Kind {
    U8,
    U16,
    U32,
    U64,
    I8,
    I16,
    I32,
    I64,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 8] = [Kind::U8, Kind::U16, Kind::U32, Kind::U64, Kind::I8, Kind::I16, Kind::I32, Kind::I64];

    /// As conditions write it.
    pub fn word(self) -> &'static str {
        match self {
            Kind::U8 => "u8",
            Kind::U16 => "u16",
            Kind::U32 => "u32",
            Kind::U64 => "u64",
            Kind::I8 => "i8",
            Kind::I16 => "i16",
            Kind::I32 => "i32",
            Kind::I64 => "i64",
        }
    }

    /// The kind of a value of `len` bytes; `None` if no kind is that long.
    pub fn new(len: u64, signed: bool) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.bytes() as u64 == len && kind.is_signed() == signed)
    }

    /// Its length in bytes.
    pub fn bytes(self) -> usize {
        match self {
            Kind::U8 | Kind::I8 => 1,
            Kind::U16 | Kind::I16 => 2,
            Kind::U32 | Kind::I32 => 4,
            Kind::U64 | Kind::I64 => 8,
        }
    }

    /// Whether its highest bit is a sign.
    pub fn is_signed(self) -> bool {
        matches!(self, Kind::I8 | Kind::I16 | Kind::I32 | Kind::I64)
    }

    /// The value's low bits, widened to 64 as this kind is.
    pub fn widen(self, value: u64) -> u64 {
        match self {
            Kind::U8 => u64::from(value as u8),
            Kind::U16 => u64::from(value as u16),
            Kind::U32 => u64::from(value as u32),
            Kind::U64 | Kind::I64 => value,
            Kind::I8 => value as i8 as u64,
            Kind::I16 => value as i16 as u64,
            Kind::I32 => value as i32 as u64,
        }
    }
}

/// Where names are looked up; a kernel's symbols are one.
pub trait Names {
    /// The variable or member that a name such as `jiffies_64`, `init_task.flags`, `a[3].b` or `ext4:counter` leads to.
    ///
    /// # Errors
    ///
    /// One line that says why there is none and what to do.
    fn variable(&self, name: &Name) -> Result<Variable, String>;

    /// The address of a symbol, function or not, or of a member as in [`Names::variable`].
    ///
    /// # Errors
    ///
    /// One line that says why there is none and what to do.
    fn address(&self, name: &Name) -> Result<u64, String>;

    /// The size in bytes of the code or data of a symbol.
    ///
    /// # Errors
    ///
    /// One line that says why it is not known and what to do.
    fn size(&self, name: &Name) -> Result<u64, String>;
}

/// A variable in the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variable {
    /// Linear address of its first byte.
    pub address: u64,
    /// Its size in bytes.
    pub len: u64,
    /// Whether it is of a signed integer type.
    pub signed: bool,
}

/// An expression's tree. Its height is at most [`MAX_HEIGHT`].
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    Number(u64, Form),
    Register(&'static Operand),
    Cpu,
    Old,
    New,
    /// The value of a variable.
    Variable(Name, Span),
    /// `&name`
    Address(Name, Span),
    /// `sizeof(name)`
    Size(Name, Span),
    /// `*(KIND*)address`
    Read(Kind, Box<Node>),
    /// `(KIND)value`
    Cast(Kind, Box<Node>),
    Unary(Unary, Box<Node>),
    Binary(Binary, Box<Node>, Box<Node>),
}

/// How a number was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Decimal,
    Hex,
    Char,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unary {
    Negate,
    Not,
    Invert,
}

impl Unary {
    pub(super) fn word(self) -> &'static str {
        match self {
            Unary::Negate => "-",
            Unary::Not => "!",
            Unary::Invert => "~",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Binary {
    Multiply,
    Divide,
    Remainder,
    Add,
    Subtract,
    ShiftLeft,
    ShiftRight,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    Equal,
    NotEqual,
    And,
    Xor,
    Or,
    BothTrue,
    EitherTrue,
}

impl Binary {
    /// Every operator, one that begins with another before it.
    pub(super) const ALL: [Binary; 18] = [
        Binary::ShiftLeft,
        Binary::ShiftRight,
        Binary::LessEqual,
        Binary::GreaterEqual,
        Binary::Equal,
        Binary::NotEqual,
        Binary::BothTrue,
        Binary::EitherTrue,
        Binary::Multiply,
        Binary::Divide,
        Binary::Remainder,
        Binary::Add,
        Binary::Subtract,
        Binary::Less,
        Binary::Greater,
        Binary::And,
        Binary::Xor,
        Binary::Or,
    ];

    pub(super) fn word(self) -> &'static str {
        match self {
            Binary::Multiply => "*",
            Binary::Divide => "/",
            Binary::Remainder => "%",
            Binary::Add => "+",
            Binary::Subtract => "-",
            Binary::ShiftLeft => "<<",
            Binary::ShiftRight => ">>",
            Binary::Less => "<",
            Binary::LessEqual => "<=",
            Binary::Greater => ">",
            Binary::GreaterEqual => ">=",
            Binary::Equal => "==",
            Binary::NotEqual => "!=",
            Binary::And => "&",
            Binary::Xor => "^",
            Binary::Or => "|",
            Binary::BothTrue => "&&",
            Binary::EitherTrue => "||",
        }
    }

    /// C's precedence: the higher binds the tighter. All of them group from the left.
    pub(super) fn precedence(self) -> u8 {
        match self {
            Binary::Multiply | Binary::Divide | Binary::Remainder => 10,
            Binary::Add | Binary::Subtract => 9,
            Binary::ShiftLeft | Binary::ShiftRight => 8,
            Binary::Less | Binary::LessEqual | Binary::Greater | Binary::GreaterEqual => 7,
            Binary::Equal | Binary::NotEqual => 6,
            Binary::And => 5,
            Binary::Xor => 4,
            Binary::Or => 3,
            Binary::BothTrue => 2,
            Binary::EitherTrue => 1,
        }
    }
}
