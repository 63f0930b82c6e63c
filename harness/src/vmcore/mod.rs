//! The guest's memory and registers as a core file, for gdb, drgn and crash.
//!
//! ```text
//!   Core: RAM, registers, VMCOREINFO
//!     │  notes.rs       CORE/PRSTATUS and QEMU for each vCPU, VMCOREINFO
//!     │  layout.rs      which linear addresses lead to RAM, by the guest's page tables
//!     ├─ elf.rs         Form::Elf: a PT_LOAD for each of them; zero pages are holes in the file
//!     └─ kdump.rs       Form::Kdump: each page compressed, zero pages shared
//!          │  file.rs   a temporary file beside the wanted one, renamed when it is whole
//! ```
//!
//! A core is that of a machine, not of a crashed kernel: the notes are what QEMU's dump-guest-memory
//! writes, one for each vCPU whatever it was doing, numbered from 1. drgn and crash walk the page tables by
//! themselves, starting from VMCOREINFO. gdb reads what has a PT_LOAD only, so an ELF core has one for
//! each stretch that the kernel has mapped: its image, the direct map, stacks, per-CPU areas, modules.
//!
//! Guests other than Linux have no VMCOREINFO; their ELF cores are for gdb.

mod elf;
mod file;
mod info;
mod kdump;
mod layout;
mod notes;
mod ram;
#[cfg(test)]
mod tests;
mod vmcoreinfo;

use std::path::Path;

use trapline_vmm::memory::GuestRam;
use trapline_vmm::vcpu::Registers;

pub use file::CoreError;
pub use vmcoreinfo::vmcoreinfo;

/// What a core is made of.
pub struct Core<'a> {
    /// The guest's memory. Nothing may run while it is written.
    pub ram: &'a GuestRam,
    /// Registers of all vCPUs, by number.
    pub vcpus: &'a [Registers],
    /// The VMCOREINFO text, see [`vmcoreinfo()`]; empty if the guest is not Linux.
    pub vmcoreinfo: Vec<u8>,
    /// Gets each piece of RAM with its guest-physical address before it is written, and takes the
    /// debugger's own breakpoints out of it.
    pub hide: &'a dyn Fn(u64, &mut [u8]),
}

/// How a core is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// ELF, sparse: for gdb, drgn and crash.
    Elf,
    /// Compressed, page by page: for drgn and crash.
    Kdump,
}

/// Writes `core` to `path` and gives the length of the file, holes included. What was there before is
/// replaced when all has been written, and stays if anything fails.
pub fn write(core: &Core<'_>, path: &Path, form: Form) -> Result<u64, CoreError> {
    match form {
        Form::Elf => elf::write(core, path),
        Form::Kdump => kdump::write(core, path),
    }
}
