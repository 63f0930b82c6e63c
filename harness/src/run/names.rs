//! Names of rules and conditions, looked up in a kernel's symbols.

use crate::rules::{Name, Names, Variable};
use crate::symbols::Symbols;

impl Names for Symbols {
    fn variable(&self, name: &Name) -> Result<Variable, String> {
        let found = Symbols::variable(self, &name.to_string()).map_err(|error| error.to_string())?;
        let signed = found.type_name.as_deref().is_some_and(is_signed);
        Ok(Variable { address: found.address, len: found.size, signed })
    }

    fn address(&self, name: &Name) -> Result<u64, String> {
        let text = name.to_string();
        if let Some(address) = Symbols::address(self, &text) {
            return Ok(address);
        }
        match Symbols::variable(self, &text) {
            Ok(variable) => Ok(variable.address),
            Err(error) => Err(error.to_string()),
        }
    }

    fn size(&self, name: &Name) -> Result<u64, String> {
        let text = name.to_string();
        if let Ok(functions) = self.functions(&text)
            && let [function] = functions.as_slice()
        {
            return Ok(function.size);
        }
        Symbols::variable(self, &text).map(|variable| variable.size).map_err(|error| error.to_string())
    }
}

/// Whether C calls a type of this name a signed integer.
fn is_signed(name: &str) -> bool {
    let words: Vec<&str> =
        name.split_ascii_whitespace().filter(|word| !matches!(*word, "const" | "volatile")).collect();
    match words.as_slice() {
        ["char" | "s8" | "s16" | "s32" | "s64" | "__s8" | "__s16" | "__s32" | "__s64" | "ssize_t" | "ptrdiff_t"] => {
            true
        }
        words => {
            words.iter().all(|word| matches!(*word, "signed" | "short" | "int" | "long" | "char")) && !words.is_empty()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sign_is_that_of_the_c_type() {
        for name in ["int", "long int", "const volatile long long int", "short int", "signed char", "char", "s64"] {
            assert!(is_signed(name), "{name}");
        }
        for name in ["unsigned int", "long unsigned int", "u64", "struct list_head", "void *", "_Bool", "atomic_t", ""]
        {
            assert!(!is_signed(name), "{name}");
        }
    }
}
