//! The register file as gdb sees it.
//!
//! [`table`] is the one list of registers: number, name, width, type, how it is read and what
//! may be written. `target.xml` and the `g` frame are both made from it, so they cannot
//! disagree.

pub(crate) mod flags;
mod table;
mod xml;

pub(crate) use table::{FRAME, Register};
pub(crate) use xml::target_xml;

/// Register numbers that have a meaning outside the table: those that a stop reply carries
/// along, so that clients need not ask for them.
pub(crate) mod number {
    pub(crate) const RBP: usize = 6;
    pub(crate) const RSP: usize = 7;
    pub(crate) const RIP: usize = 16;
}
