//! What of the unwinding tables is in the guest only: those of modules, of a kernel without a file, and code that the
//! kernel has copied.

use std::sync::OnceLock;

use super::orc::{self, Entry, Format};
use super::place::word;
use super::{Tables, code};
use crate::symbols::Memory;

/// ORC tables in guest memory: linear addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GuestOrc {
    /// Where `.orc_unwind_ip` is: a 32-bit place-relative address for each entry, sorted.
    pub(super) addresses: u64,
    /// Where `.orc_unwind` is.
    pub(super) entries: u64,
    /// How many.
    pub(super) count: u32,
}

/// Where `struct module` has its tables: `struct mod_arch_specific`.
#[derive(Debug, Clone, Copy)]
struct Members {
    addresses: u64,
    entries: u64,
    count: u64,
}

/// Finds them.
#[derive(Debug, Default)]
pub(super) struct Guest {
    members: OnceLock<Option<Members>>,
}

impl Guest {
    /// The entry for `addr`, of the module that it is in, or of the kernel if its tables are not in a file. `format` is
    /// that of the kernel's own table, if it is known.
    pub(super) fn entry(
        &self,
        tables: &impl Tables,
        format: Option<Format>,
        addr: u64,
        memory: &dyn Memory,
    ) -> Option<Entry> {
        let table = match tables.module(addr) {
            Some(module) => self.of_module(tables, module, memory)?,
            None if format.is_none() => of_kernel(tables)?,
            None => return None,
        };
        orc::find_in_guest(&table, format, addr, memory)
    }

    fn of_module(&self, tables: &impl Tables, module: u64, memory: &dyn Memory) -> Option<GuestOrc> {
        let find = || {
            let member = |path| tables.member("module", path);
            let (addresses, entries) = (member("arch.orc_unwind_ip")?, member("arch.orc_unwind")?);
            Some(Members { addresses, entries, count: member("arch.num_orcs")? })
        };
        let members = (*self.members.get_or_init(find))?;
        let at = |offset| word(memory, module.wrapping_add(offset));
        Some(GuestOrc {
            addresses: at(members.addresses)?,
            entries: at(members.entries)?,
            // The lower half of the word: it is an `unsigned int`.
            count: at(members.count)? as u32,
        })
    }
}

fn of_kernel(tables: &impl Tables) -> Option<GuestOrc> {
    let addresses = tables.symbol("__start_orc_unwind_ip")?;
    let end = tables.symbol("__stop_orc_unwind_ip")?;
    let count = u32::try_from(end.checked_sub(addresses)? / 4).ok()?;
    Some(GuestOrc { addresses, entries: tables.symbol("__start_orc_unwind")?, count })
}

/// So much of a trampoline is compared with what it was copied from. The function tracer changes calls further in.
const COMPARED: usize = 16;
/// Each trampoline begins a page, and none is longer.
const PAGE: u64 = 0x1000;

/// Where the code at `addr` was copied from, if it is in a trampoline that the function tracer has made: a copy of
/// `ftrace_caller` or `ftrace_regs_caller`, which leaves the stack as the original does.
pub(super) fn original(tables: &impl Tables, addr: u64, memory: &dyn Memory) -> Option<u64> {
    let copy = addr & !(PAGE - 1);
    let start_of = |at| {
        let mut bytes = [0; COMPARED];
        (memory.read(at, &mut bytes) == COMPARED).then_some(bytes)
    };
    let copied = start_of(copy)?;
    ["ftrace_caller", "ftrace_regs_caller"].into_iter().find_map(|name| {
        let start = tables.symbol(name)?;
        let original = start.wrapping_add(addr - copy);
        let end = tables.symbol(&format!("{name}_end"))?;
        (start <= original && original < end && start_of(start)? == copied && code::is_there(memory, original))
            .then_some(original)
    })
}
