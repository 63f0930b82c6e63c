//! Tree to code: names become addresses, and each operation learns whether it is signed.

use super::super::error::Fault;
use super::super::{Name, RuleError};
use super::eval::{Code, Condition, Operation};
use super::{Expr, Kind, Names, Node};

impl Expr {
    /// Looks the names up. Bind again when addresses have moved.
    ///
    /// # Errors
    ///
    /// If a name leads nowhere or to something that has no 64-bit value, with the caret under it.
    pub fn bind(&self, names: &dyn Names) -> Result<Condition, RuleError> {
        match bind(&self.root, names) {
            Ok(value) => Ok(Condition::new(value.code)),
            Err(fault) => Err(self.source.error(fault)),
        }
    }

    /// The names in it, in the order in which they stand.
    pub fn names(&self) -> Vec<&Name> {
        let mut found = Vec::new();
        collect(&self.root, &mut found);
        found
    }
}

fn collect<'n>(node: &'n Node, found: &mut Vec<&'n Name>) {
    match node {
        Node::Variable(name, _) | Node::Address(name, _) | Node::Size(name, _) => found.push(name),
        Node::Read(_, inner) | Node::Cast(_, inner) | Node::Unary(_, inner) => collect(inner, found),
        Node::Binary(_, left, right) => {
            collect(left, found);
            collect(right, found);
        }
        Node::Number(..) | Node::Register(_) | Node::Cpu | Node::Old | Node::New => {}
    }
}

/// Code, and whether its value is signed.
struct Value {
    code: Code,
    signed: bool,
}

impl Value {
    fn unsigned(code: Code) -> Self {
        Self { code, signed: false }
    }
}

fn bind(node: &Node, names: &dyn Names) -> Result<Value, Fault> {
    Ok(match node {
        Node::Number(value, _) => Value::unsigned(Code::Number(*value)),
        Node::Register(operand) => Value::unsigned(Code::Register(operand)),
        Node::Cpu => Value::unsigned(Code::Cpu),
        Node::Old => Value::unsigned(Code::Old),
        Node::New => Value::unsigned(Code::New),
        Node::Variable(name, span) => {
            let variable = names.variable(name).map_err(|why| Fault::new(*span, why))?;
            let Some(kind) = Kind::new(variable.len, variable.signed) else {
                let len = variable.len;
                let message = format!(
                    "`{name}` has {len} bytes, which is no number; name a member of it, or read a part: *(u64*)(&{name})"
                );
                return Err(Fault::new(*span, message));
            };
            let address = Box::new(Code::Number(variable.address));
            Value { code: Code::Read(kind, address), signed: variable.signed }
        }
        Node::Address(name, span) => {
            Value::unsigned(Code::Number(names.address(name).map_err(|why| Fault::new(*span, why))?))
        }
        Node::Size(name, span) => {
            Value::unsigned(Code::Number(names.size(name).map_err(|why| Fault::new(*span, why))?))
        }
        Node::Read(kind, address) => {
            let address = bind(address, names)?;
            Value { code: Code::Read(*kind, Box::new(address.code)), signed: kind.is_signed() }
        }
        Node::Cast(kind, of) => {
            let of = bind(of, names)?;
            Value { code: Code::Widen(*kind, Box::new(of.code)), signed: kind.is_signed() }
        }
        Node::Unary(operator, of) => {
            let of = bind(of, names)?;
            let signed = of.signed && *operator != super::Unary::Not;
            Value { code: Code::Unary(*operator, Box::new(of.code)), signed }
        }
        Node::Binary(operator, left, right) => {
            let (left, right) = (bind(left, names)?, bind(right, names)?);
            let (operation, signed) = Operation::of(*operator, left.signed, right.signed);
            Value { code: Code::Binary(operation, Box::new(left.code), Box::new(right.code)), signed }
        }
    })
}
