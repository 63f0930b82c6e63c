//! Every limit of the stub, in one place.

/// Longest packet that we accept, `$` and checksum included, in bytes; told to gdb as
/// `PacketSize`. On loopback more than this buys nothing: one packet then carries 8 KiB of memory.
pub const PACKET_SIZE: usize = 16 * 1024;

/// Longest packet body: [`PACKET_SIZE`] without `$`, `#` and two checksum digits.
pub const PACKET_BODY: usize = PACKET_SIZE - 4;

/// Most bytes of guest memory that one `m` packet returns; a longer request is a short read,
/// which gdb and lldb both take up where it ended.
pub const MEMORY_READ: usize = PACKET_BODY / 2;

/// Most bytes that are taken from the socket at once, so that one chatty client leaves the
/// event loop to others in between.
pub const INPUT_CHUNK: usize = 16 * 1024;

/// Bytes of unsent output from which on no further packet is answered (nor read) until the
/// client has taken some.
pub const OUTPUT_HIGH_WATER: usize = 64 * 1024;

/// Bytes of unsent output at which the client is given up. Unreachable for a client that is
/// held back at [`OUTPUT_HIGH_WATER`]; it bounds what a mistake of ours could cost.
pub const OUTPUT_LIMIT: usize = 512 * 1024;

/// Connections that are accepted (and, beyond the first, refused) per readiness event.
pub const ACCEPTS_PER_EVENT: usize = 16;

/// Connections without a say that are kept until the other side has closed them.
pub const LEAVING: usize = 4;

/// Breakpoint requests that one client may hold at a time. The hardware has four slots; the
/// debuggee decides. This only bounds our own list.
pub const BREAKPOINTS: usize = 1024;

/// Stops that `monitor stops` remembers.
pub const STOP_HISTORY: usize = 32;

/// Longest text of an error reply or console line, in bytes.
pub const TEXT: usize = 1024;

/// How often what the present client has sent is read before another one is turned away.
pub const READS_BEFORE_REFUSAL: usize = 32;
