//! Where a function returns: the instructions that do it, found in its code.
//!
//! A trap on each of them costs no more at a hit than one on the function itself, and stops nobody. What is not
//! found that way is said instead of missed: a function that ends by jumping into another one returns there.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, OpKind};

use super::look;
use crate::symbols::{Symbol, Symbols};

/// Most bytes of a function that are looked at.
const MOST: u64 = 1 << 20;

/// Addresses of all instructions by which `function` returns to its caller.
///
/// # Errors
/// One line that says why they are not known.
pub(crate) fn sites(symbols: &Symbols, function: &Symbol) -> Result<Vec<u64>, String> {
    let name = &function.name;
    let unknown = |why: &str| format!("where `{name}` returns is not known: {why}");
    let len = function.size;
    if len == 0 || len > MOST {
        return Err(unknown("its size is not known; trap a place in it with exec:NAME+OFFSET"));
    }
    let code = symbols
        .linked_bytes(function.address)
        .and_then(|code| code.get(..usize::try_from(len).ok()?))
        .ok_or_else(|| unknown("there is no code of it at hand; give --symbols vmlinux"))?;
    let inside = function.address..function.address + len;
    let thunks: Vec<u64> = symbols.functions("__x86_return_thunk").into_iter().flatten().map(|s| s.address).collect();
    let mut sites = Vec::new();
    let mut decoder = Decoder::with_ip(64, code, function.address, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        let at = instruction.ip();
        match instruction.flow_control() {
            FlowControl::Return => sites.push(at),
            FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch
                if instruction.op0_kind() == OpKind::NearBranch64 =>
            {
                let to = instruction.near_branch_target();
                if thunks.contains(&to) {
                    sites.push(at);
                } else if !inside.contains(&to) && !is_its_own(symbols, name, to) {
                    let there = symbols.locate(to).map_or_else(|| format!("{to:#x}"), |to| look::name(&to));
                    return Err(format!(
                        "`{name}` ends at +{:#x} by jumping to `{there}`, which returns for it: trap ret:{there} as well, \
                         or exec:{name}",
                        at - function.address
                    ));
                }
            }
            _ => {}
        }
    }
    if sites.is_empty() {
        return Err(format!("`{name}` has no instruction that returns; trap exec:{name}"));
    }
    Ok(sites)
}

/// Whether an address is in a part of this function that the compiler has put elsewhere.
fn is_its_own(symbols: &Symbols, name: &str, addr: u64) -> bool {
    symbols
        .locate(addr)
        .is_some_and(|location| location.symbol.strip_prefix(name).is_some_and(|rest| rest.starts_with(".cold")))
}
