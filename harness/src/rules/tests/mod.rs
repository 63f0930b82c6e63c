mod bad;
mod documentation;
mod evaluation;
mod good;

use std::collections::HashMap;

use super::{Context, Name, Names, Register, Variable};

/// A guest of a few variables, registers and bytes.
#[derive(Default)]
struct Guest {
    variables: HashMap<&'static str, Variable>,
    registers: HashMap<Register, u64>,
    memory: HashMap<u64, u8>,
    cpu: u32,
    old: Option<u64>,
    new: Option<u64>,
    /// Registers that were asked for.
    asked: Vec<Register>,
}

impl Guest {
    fn variable(mut self, name: &'static str, address: u64, len: u64, signed: bool) -> Self {
        self.variables.insert(name, Variable { address, len, signed });
        self
    }

    fn bytes(mut self, address: u64, bytes: &[u8]) -> Self {
        self.memory.extend(bytes.iter().enumerate().map(|(at, byte)| (address.wrapping_add(at as u64), *byte)));
        self
    }

    fn register(mut self, register: Register, value: u64) -> Self {
        self.registers.insert(register, value);
        self
    }
}

impl Names for Guest {
    fn variable(&self, name: &Name) -> Result<Variable, String> {
        self.variables
            .get(name.to_string().as_str())
            .copied()
            .ok_or_else(|| format!("there is no `{name}`; try another"))
    }

    fn address(&self, name: &Name) -> Result<u64, String> {
        Names::variable(self, name).map(|variable| variable.address)
    }

    fn size(&self, name: &Name) -> Result<u64, String> {
        Names::variable(self, name).map(|variable| variable.len)
    }
}

impl Context for Guest {
    fn register(&mut self, register: Register) -> Option<u64> {
        self.asked.push(register);
        self.registers.get(&register).copied()
    }

    fn read(&mut self, address: u64, into: &mut [u8]) -> usize {
        for (at, byte) in into.iter_mut().enumerate() {
            match self.memory.get(&address.wrapping_add(at as u64)) {
                Some(found) => *byte = *found,
                None => return at,
            }
        }
        into.len()
    }

    fn cpu(&self) -> u32 {
        self.cpu
    }

    fn old(&self) -> Option<u64> {
        self.old
    }

    fn new_value(&self) -> Option<u64> {
        self.new
    }
}
