//! What can be wrong with a kernel, an initrd or a command line: one line each, ending with what to do.

use std::io;

use thiserror::Error;

use super::Format;
use crate::limits::MAX_VCPUS;

/// Why an image cannot be booted. The text is one line that names format, field and remedy.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BootError {
    /// The image is of no format that we know.
    #[error(
        "the kernel is {what}; give an ELF (vmlinux, PVH, Multiboot or bare metal), a bzImage or a Multiboot image"
    )]
    Unrecognised {
        /// What the file looks like.
        what: String,
    },
    /// A field of the image does not make sense.
    #[error("{format} kernel: {field}: {problem}; {advice}")]
    Malformed {
        /// Format that the image claims to have.
        format: Format,
        /// Name of the field in the words of the format's specification.
        field: &'static str,
        /// What is wrong with it, with its value.
        problem: String,
        /// What to do.
        advice: &'static str,
    },
    /// The format asked for is not the one that the image has.
    #[error("the kernel is not a {wanted} image: {problem}; leave --boot-protocol out or give another one")]
    WrongProtocol {
        /// Format asked for.
        wanted: Format,
        /// What is missing.
        problem: &'static str,
    },
    /// The host could not read the kernel or the initrd.
    #[error("cannot read the {what}: {source}; check the file")]
    Read {
        /// "kernel" or "initrd".
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// A part of the kernel lies where the guest has no RAM.
    #[error(
        "{format} kernel: {part} needs guest memory at {start:#x}-{end:#x}, and the guest has none there (RAM below 4 GiB ends at {low_end:#x}); give more --memory or link the kernel lower"
    )]
    KernelOutsideMemory {
        /// Format of the kernel.
        format: Format,
        /// Which part.
        part: String,
        /// First guest-physical address that it needs.
        start: u64,
        /// End (exclusive); saturated.
        end: u64,
        /// End of the RAM below the PCI hole.
        low_end: u64,
    },
    /// A part of the kernel lies on something else.
    #[error(
        "{format} kernel: {part} at {start:#x}-{end:#x} overlaps {other}; link the kernel at 1 MiB or above, its parts apart"
    )]
    Overlap {
        /// Format of the kernel.
        format: Format,
        /// Which part.
        part: String,
        /// First guest-physical address of it.
        start: u64,
        /// End (exclusive).
        end: u64,
        /// What is there already.
        other: String,
    },
    /// The initrd does not fit beside the kernel.
    #[error(
        "the initrd of {size} bytes does not fit: {room} bytes of guest memory are free for it{limit}; give more --memory or a smaller initrd"
    )]
    InitrdTooLarge {
        /// Its size in bytes.
        size: u64,
        /// The most that would fit.
        room: u64,
        /// A limit of the kernel's own that applies, or nothing.
        limit: String,
    },
    /// The initrd has no bytes.
    #[error("the initrd is empty; leave --initrd out or give a file with content")]
    InitrdEmpty,
    /// The command line is longer than the kernel (or our area) takes.
    #[error("the command line has {len} bytes, and this {format} kernel takes {max}; shorten --cmdline")]
    CmdlineTooLong {
        /// Format of the kernel.
        format: Format,
        /// Its length in bytes.
        len: u64,
        /// Most bytes, without the terminating NUL.
        max: u64,
    },
    /// The command line has a NUL in it, where the kernel would see its end.
    #[error("the command line has a NUL byte at offset {offset}; take it out of --cmdline")]
    CmdlineNul {
        /// Offset of the first NUL.
        offset: usize,
    },
    /// The number of vCPUs is out of range.
    #[error("{cpus} vCPUs are out of range; give --cpus between 1 and {MAX_VCPUS}")]
    Cpus {
        /// The number asked for.
        cpus: u32,
    },
    /// Writing a table into guest memory failed, which the checks before it exclude.
    #[error("cannot write {what} into guest memory at {at:#x}: {reason}; this is a bug, please report it")]
    Write {
        /// What was written.
        what: &'static str,
        /// Where.
        at: u64,
        /// What guest memory said.
        reason: String,
    },
}

impl BootError {
    /// A [`BootError::Malformed`] without the field names at each place of use.
    pub(super) fn malformed(
        format: Format,
        field: &'static str,
        problem: impl Into<String>,
        advice: &'static str,
    ) -> Self {
        Self::Malformed { format, field, problem: problem.into(), advice }
    }
}

/// The advice for an image that ends before its own headers say so.
pub(super) const CUT_SHORT: &str = "the file is cut short, copy or build it again";
/// The advice for an image whose headers contradict themselves.
pub(super) const CORRUPT: &str = "the file is corrupt, copy or build it again";
