//! One guest in the boot formats that enter in 32-bit mode: it goes to long mode,
//! says how it was started and what it was given (command line, modules, memory),
//! and ends with status 0.
//!
//! Each line begins with `format: `: `started by Multiboot` or `started by PVH`,
//! `lower KiB: N`, `upper KiB: N`, `module: NAME`, `module bytes: N`, `module sum: N`
//! (of its bytes), `RAM KiB by the map: N`, `version: N` and `RSDP found: 0|1` (PVH),
//! `word: W` for each word of the command line, `ends with status N`.
//!
//! Command line: `exit=V` sets the status, `spin` stays at the label `spin_here`,
//! which counts the u64 `spin_count`. Labels on the way: `_start` (32-bit, no paging),
//! `format_paging` (the instruction before CR0.PG), `format_long` (64-bit).

/// Multiboot 1, ELF32.
pub fn multiboot32() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/multiboot32.elf"))
}

/// Multiboot 1, ELF64.
pub fn multiboot64() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/multiboot64.elf"))
}

/// PVH, ELF64 with a Xen note of type 18.
pub fn pvh() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/pvh.elf"))
}
