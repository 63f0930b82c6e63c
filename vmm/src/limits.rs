//! Every limit of the machine in one place, with its unit.

use std::time::Duration;

/// How long a vCPU thread may take to answer before the operation fails and names it. A thread that only
/// waits for a CPU of a busy host has been seen to take more than ten seconds.
pub const ACK_DEADLINE: Duration = Duration::from_secs(30);

/// How long the end of a run waits for a vCPU thread that does not answer; nothing depends on it any more.
pub const QUIT_DEADLINE: Duration = Duration::from_secs(10);

/// How long to wait for an answer before the vCPU is kicked again.
pub const KICK_INTERVAL: Duration = Duration::from_millis(2);

/// How long a breakpoint that the guest sets in its own debug registers may go unseen while slots
/// of ours are armed, on a KVM that does not report the access (SVM, PVM): at the latest after
/// this much time of running, a vCPU looks.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// How long a guest of the probe may run; they have a few instructions each.
pub const PROBE_RUN: Duration = Duration::from_secs(10);

/// How long the probe's vCPU is kicked before it is given up.
pub const PROBE_STUCK: Duration = Duration::from_secs(60);

/// Most vCPUs of one machine. xAPIC ids (8 bits) and the tables sized by it are far from full at this number.
pub const MAX_VCPUS: u32 = 64;

/// One kibibyte, in bytes.
pub const KIB: u64 = 1 << 10;
/// One mebibyte, in bytes.
pub const MIB: u64 = 1 << 20;
/// One gibibyte, in bytes.
pub const GIB: u64 = 1 << 30;

/// Size of a guest page, in bytes; guest memory is a multiple of it.
pub const PAGE_SIZE: u64 = 4 * KIB;

/// Most bytes of one watched range. Every page of it can cost a memory slot of KVM's.
pub const MAX_WATCHED: u64 = 64 * MIB;

/// Least guest memory, in bytes: the first MiB belongs to tables and firmware areas, an image needs some more.
pub const MIN_MEMORY: u64 = 2 * MIB;
/// Most guest memory, in bytes. Above the 39 physical address bits of the smallest hosts nothing could be mapped.
pub const MAX_MEMORY: u64 = 256 * GIB;

/// First guest-physical address that is not RAM although more RAM follows: the PCI hole, where MMIO lives.
pub const PCI_HOLE_START: u64 = 0xC000_0000;
/// End (exclusive) of the PCI hole; RAM that did not fit below goes on here.
pub const PCI_HOLE_END: u64 = 4 * GIB;

/// Most bytes of console input held for a guest that does not read; the event loop stops reading the terminal then.
pub const CONSOLE_INPUT_QUEUE: usize = 4096;

/// Most program headers of an ELF kernel; real kernels have fewer than ten.
pub const MAX_PROGRAM_HEADERS: usize = 256;
/// Most bytes of one ELF note segment that is searched for the PVH note.
pub const MAX_NOTE_SEGMENT: u64 = MIB;
