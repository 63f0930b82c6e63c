//! Evaluation at a hit: no allocation, and nothing is looked at that does not matter.

use std::fmt;

use super::register::{Operand, Register};
use super::{Binary, Kind, Unary};

/// What a condition may look at: one vCPU that has hit a trap.
pub trait Context {
    /// A register's value; `None` if it cannot be read. Asked for only if it matters, so that registers may be fetched then.
    fn register(&mut self, register: Register) -> Option<u64>;

    /// Reads linear memory as this vCPU sees it, into the slice from its beginning; how many bytes could be read.
    fn read(&mut self, address: u64, into: &mut [u8]) -> usize;

    /// The vCPU's number, from 0.
    fn cpu(&self) -> u32;

    /// What a watched range of at most 8 bytes held before, widened with zeros; `None` if that is not known.
    fn old(&self) -> Option<u64>;

    /// What it holds now.
    fn new_value(&self) -> Option<u64>;
}

/// Why a condition has no value at a hit. The condition counts as not met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EvalError {
    /// A division or remainder by zero.
    DivisionByZero,
    /// So many bytes cannot be read at this linear address.
    Unreadable {
        /// The first byte's address.
        address: u64,
        /// How many bytes.
        len: usize,
    },
    /// The vCPU's registers cannot be read.
    NoRegister(Register),
    /// `old` or `new` is not known at this hit.
    NoValue,
}

impl std::error::Error for EvalError {}

impl fmt::Display for EvalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EvalError::DivisionByZero => f.write_str("division by zero"),
            EvalError::Unreadable { address, len } => write!(f, "{len} bytes at {address:#x} cannot be read"),
            EvalError::NoRegister(register) => write!(f, "the register {register:?} cannot be read"),
            EvalError::NoValue => f.write_str("the old or new value is not known"),
        }
    }
}

/// What a condition may look at when it is evaluated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Needs {
    /// Registers of the vCPU ($cpu is none).
    pub registers: bool,
    /// The guest's memory.
    pub memory: bool,
    /// What a watched range held before.
    pub old: bool,
    /// What it holds now.
    pub new: bool,
}

/// A condition whose names are looked up.
#[derive(Debug, Clone)]
pub struct Condition {
    code: Code,
    needs: Needs,
}

impl Condition {
    pub(super) fn new(code: Code) -> Self {
        let mut needs = Needs::default();
        code.collect(&mut needs);
        Self { code, needs }
    }

    /// Whether it is met: its value is not 0.
    ///
    /// # Errors
    ///
    /// If it has no value; it counts as not met then.
    pub fn holds(&self, context: &mut dyn Context) -> Result<bool, EvalError> {
        self.value(context).map(|value| value != 0)
    }

    /// The expression's value.
    ///
    /// # Errors
    ///
    /// As [`Condition::holds`].
    pub fn value(&self, context: &mut dyn Context) -> Result<u64, EvalError> {
        self.code.value(context)
    }

    /// What it may look at.
    pub fn needs(&self) -> Needs {
        self.needs
    }

    /// Whether it may look at registers.
    pub fn needs_registers(&self) -> bool {
        self.needs.registers
    }
}

/// An expression that needs no names.
#[derive(Debug, Clone)]
pub(super) enum Code {
    Number(u64),
    Register(&'static Operand),
    Cpu,
    Old,
    New,
    Read(Kind, Box<Code>),
    Widen(Kind, Box<Code>),
    Unary(Unary, Box<Code>),
    Binary(Operation, Box<Code>, Box<Code>),
}

/// A binary operator that knows its signedness.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operation {
    operator: Binary,
    signed: bool,
}

impl Operation {
    /// The operation on operands of these signs, and whether its result is signed.
    pub(super) fn of(operator: Binary, left: bool, right: bool) -> (Self, bool) {
        let either = left || right;
        let (signed, result) = match operator {
            Binary::ShiftLeft | Binary::ShiftRight => (left, left),
            Binary::Less
            | Binary::LessEqual
            | Binary::Greater
            | Binary::GreaterEqual
            | Binary::Equal
            | Binary::NotEqual
            | Binary::BothTrue
            | Binary::EitherTrue => (either, false),
            Binary::Multiply
            | Binary::Divide
            | Binary::Remainder
            | Binary::Add
            | Binary::Subtract
            | Binary::And
            | Binary::Xor
            | Binary::Or => (either, either),
        };
        (Self { operator, signed }, result)
    }
}

impl Code {
    fn collect(&self, needs: &mut Needs) {
        match self {
            Code::Number(_) | Code::Cpu => {}
            Code::Register(_) => needs.registers = true,
            Code::Old => needs.old = true,
            Code::New => needs.new = true,
            Code::Read(_, address) => {
                needs.memory = true;
                address.collect(needs);
            }
            Code::Widen(_, of) | Code::Unary(_, of) => of.collect(needs),
            Code::Binary(_, left, right) => {
                left.collect(needs);
                right.collect(needs);
            }
        }
    }

    // The tree's height is bounded (`MAX_HEIGHT`), and with it this recursion.
    fn value(&self, context: &mut dyn Context) -> Result<u64, EvalError> {
        Ok(match self {
            Code::Number(value) => *value,
            Code::Register(operand) => {
                let register = operand.register;
                operand.of(context.register(register).ok_or(EvalError::NoRegister(register))?)
            }
            Code::Cpu => u64::from(context.cpu()),
            Code::Old => context.old().ok_or(EvalError::NoValue)?,
            Code::New => context.new_value().ok_or(EvalError::NoValue)?,
            Code::Read(kind, address) => {
                let (address, len) = (address.value(context)?, kind.bytes());
                let mut bytes = [0; 8];
                if context.read(address, &mut bytes[..len]) < len {
                    return Err(EvalError::Unreadable { address, len });
                }
                kind.widen(u64::from_le_bytes(bytes))
            }
            Code::Widen(kind, of) => kind.widen(of.value(context)?),
            Code::Unary(operator, of) => {
                let of = of.value(context)?;
                match operator {
                    Unary::Negate => of.wrapping_neg(),
                    Unary::Not => u64::from(of == 0),
                    Unary::Invert => !of,
                }
            }
            Code::Binary(operation, left, right) => {
                let left = left.value(context)?;
                match (operation.operator, left != 0) {
                    (Binary::BothTrue, false) => 0,
                    (Binary::EitherTrue, true) => 1,
                    _ => operation.of_values(left, right.value(context)?)?,
                }
            }
        })
    }
}

impl Operation {
    fn of_values(self, left: u64, right: u64) -> Result<u64, EvalError> {
        let (a, b) = (left as i64, right as i64);
        // A shift by so much that all bits are gone; of a signed value to the right, the sign is left.
        let far = right >= 64;
        let divisible = |quotient: u64| if right == 0 { Err(EvalError::DivisionByZero) } else { Ok(quotient) };
        Ok(match (self.operator, self.signed) {
            (Binary::Multiply, _) => left.wrapping_mul(right),
            (Binary::Divide, false) => divisible(left.checked_div(right).unwrap_or(0))?,
            (Binary::Divide, true) if b == -1 => left.wrapping_neg(),
            (Binary::Divide, true) => divisible(a.checked_div(b).unwrap_or(0) as u64)?,
            (Binary::Remainder, false) => divisible(left.checked_rem(right).unwrap_or(0))?,
            (Binary::Remainder, true) if b == -1 => 0,
            (Binary::Remainder, true) => divisible(a.checked_rem(b).unwrap_or(0) as u64)?,
            (Binary::Add, _) => left.wrapping_add(right),
            (Binary::Subtract, _) => left.wrapping_sub(right),
            (Binary::ShiftLeft, _) => {
                if far {
                    0
                } else {
                    left << right
                }
            }
            (Binary::ShiftRight, false) => {
                if far {
                    0
                } else {
                    left >> right
                }
            }
            (Binary::ShiftRight, true) => (a >> right.min(63)) as u64,
            (Binary::Less, false) => u64::from(left < right),
            (Binary::Less, true) => u64::from(a < b),
            (Binary::LessEqual, false) => u64::from(left <= right),
            (Binary::LessEqual, true) => u64::from(a <= b),
            (Binary::Greater, false) => u64::from(left > right),
            (Binary::Greater, true) => u64::from(a > b),
            (Binary::GreaterEqual, false) => u64::from(left >= right),
            (Binary::GreaterEqual, true) => u64::from(a >= b),
            (Binary::Equal, _) => u64::from(left == right),
            (Binary::NotEqual, _) => u64::from(left != right),
            (Binary::And, _) => left & right,
            (Binary::Xor, _) => left ^ right,
            (Binary::Or, _) => left | right,
            (Binary::BothTrue, _) => u64::from(left != 0 && right != 0),
            (Binary::EitherTrue, _) => u64::from(left != 0 || right != 0),
        })
    }
}
