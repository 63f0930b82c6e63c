//! The test fixture: one small property of a guest each, at a known symbol.
//!
//! Used in two ways.
//!
//! *On a bare virtual machine*: load the `PT_LOAD` segments of [`image`] into
//! memory (all below [`MEMORY`]), set one vCPU's registers as [`start`] says, and
//! run. The image brings its own page tables, GDT, IDT and TSSs. Everything up to
//! [`MEMORY`] is mapped by 4 KiB pages, the rest of the first 4 GiB by 2 MiB pages;
//! [`ALIAS`] and [`HUGE_ALIAS`] show the beginning again.
//!
//! *Booted by the VMM* as a bare-metal ELF64: `run=NAME` on the command line
//! gives the property to every CPU (or CPU 0, if it is for one), `run=A,B,C` to
//! CPU 0, 1, 2, `run=list` prints the names, `exit=V` sets the status at the end.
//!
//! Every exception and interrupt the guest takes, but for its own timer, goes
//! into a log: [`log_entry_address`], [`LogEntry::decode`].

mod properties;

use crate::{MAX_CPUS, symbol};

pub use crate::STATUS_EXCEPTION;
pub use properties::PROPERTIES;

/// The fixture guest, ELF64.
pub fn image() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/fixture.elf"))
}

/// Which CPUs a property is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cpus {
    /// It uses something that exists once; started on one CPU.
    One,
    /// Any number of CPUs may run it at once.
    All,
}

/// How a property ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    /// By itself: a byte to [`PORT_EXIT`].
    Exit,
    /// Never.
    Never,
    /// When something from outside happens: an interrupt or an NMI.
    Waits,
    /// With a triple fault.
    Dies,
}

/// One property of the fixture.
#[derive(Clone, Copy, Debug)]
pub struct Property {
    /// Its name on the command line; its entry is the symbol `fx_` + name.
    pub name: &'static str,
    /// Which CPUs may run it.
    pub cpus: Cpus,
    /// How it ends.
    pub ends: Ends,
    /// Whether the PVM flavour of KVM, which interprets ring 0, runs it as
    /// written: `false` for INT n, INT3, INT1, which are emulation failures there,
    /// and for SYSCALL, which stays in ring 3.
    pub on_pvm: bool,
    /// What it is for.
    pub about: &'static str,
    /// Instructions and data worth naming in a test.
    pub labels: &'static [&'static str],
}

/// The address of a property's entry, by name; `None` if there is none.
pub fn entry(name: &str) -> Option<u64> {
    property(name)?;
    label(&format!("fx_{name}"))
}

/// A property by name.
pub fn property(name: &str) -> Option<&'static Property> {
    PROPERTIES.iter().find(|property| property.name == name)
}

/// The address of any symbol of the fixture.
pub fn label(name: &str) -> Option<u64> {
    symbol(image(), name)
}

/// Guest-physical memory the fixture needs, in bytes from 0.
pub const MEMORY: u64 = 0x400000;

/// Two watched pages, `WATCH` and the one after it; ring 3 may use them too.
pub const WATCH: u64 = 0x228000;

/// A page of text that string instructions read, and scratch memory.
pub const SOURCE: u64 = 0x22a000;

/// A virtual page behind which `remap` swaps [`REMAP_A`] and [`REMAP_B`].
pub const REMAP: u64 = 0x232000;

/// The first page [`REMAP`] leads to.
pub const REMAP_A: u64 = 0x230000;

/// The second page [`REMAP`] leads to.
pub const REMAP_B: u64 = 0x231000;

/// A page that is not present until its first touch (#PF maps it).
pub const HOLE: u64 = 0x233000;

/// A page that is not writable until its first write (#PF makes it so).
pub const READ_ONLY: u64 = 0x234000;

/// Virtual address at which the first 4 MiB are mapped again, by 4 KiB pages.
pub const ALIAS: u64 = 0x1_0000_0000;

/// Virtual address at which the first GiB is mapped again, by one page.
pub const HUGE_ALIAS: u64 = 0x1_4000_0000;

/// Guest-physical address of the device that `mmio_loop` and `step` talk to; a
/// test that counts its accesses leaves it unbacked. CPU n writes a u64 at
/// `MMIO + n * MMIO_STRIDE` and reads one 8 bytes further.
pub const MMIO: u64 = 0xd000_0000;

/// Distance of two CPUs' registers at [`MMIO`].
pub const MMIO_STRIDE: u64 = 16;

/// A port that must answer and do nothing.
pub const PORT_NOTHING: u16 = 0x80;

/// The port whose write ends the run, with the written byte as the status.
pub const PORT_EXIT: u16 = 0xf4;

/// Interrupt vectors with a meaning. Every other one from 32 up is logged and
/// acknowledged at the local APIC.
pub mod vector {
    /// For interrupts that a test sends: logged and acknowledged.
    pub const MESSAGE: u8 = 0x40;
    /// For INT n, in every ring: logged.
    pub const SOFTWARE: u8 = 0x41;
    /// The guest's timer: counted in [`super::cpu_field::TIMER`], not logged.
    pub const TIMER: u8 = 0x42;
    /// Logged, not acknowledged: for machines without a local APIC.
    pub const EXTERNAL: u8 = 0x43;
}

/// Offsets of u64 fields in a CPU's block; see [`cpu_address`].
pub mod cpu_field {
    /// How often the property's counted instruction ran.
    pub const HITS: u64 = 0x00;
    /// The CPU's number.
    pub const ID: u64 = 0x08;
    /// What the #DB handler does: bits of [`super::flag`].
    pub const FLAGS: u64 = 0x10;
    /// Where the next fault resumes, once; with 0 it is fatal
    /// (exit status [`super::STATUS_EXCEPTION`]).
    pub const RESUME: u64 = 0x18;
    /// How often the CPU came to the end of a property.
    pub const DONE: u64 = 0x30;
    /// #DB taken.
    pub const DB: u64 = 0x38;
    /// #BP taken.
    pub const BP: u64 = 0x40;
    /// Timer interrupts taken.
    pub const TIMER: u64 = 0x48;
    /// Times that HLT returned.
    pub const WAKEUPS: u64 = 0x50;
    /// System calls taken.
    pub const SYSCALLS: u64 = 0x58;
    /// R11 at the last system call.
    pub const R11: u64 = 0x60;
    /// Device writes that have been done.
    pub const MMIO_WRITES: u64 = 0x68;
    /// Device reads that have been done.
    pub const MMIO_READS: u64 = 0x70;
    /// What the last device read gave.
    pub const MMIO_LAST: u64 = 0x78;
    /// Calls of `fx_plain`.
    pub const PLAIN: u64 = 0x80;
    /// Calls of `fx_fentry`.
    pub const FENTRY: u64 = 0x88;
    /// Rounds of a loop.
    pub const ROUNDS: u64 = 0x90;
    /// As [`HITS`], for the other of two.
    pub const SECOND: u64 = 0x98;
}

/// Offsets of u64 fields in a CPU's block for ring 3; see [`user_address`].
pub mod user_field {
    /// How often the property's counted instruction ran.
    pub const HITS: u64 = 0x00;
    /// RFLAGS as PUSHF saved them.
    pub const SAVED_RFLAGS: u64 = 0x10;
}

/// Bits of [`cpu_field::FLAGS`].
pub mod flag {
    /// Set RF in the frame: go on past the guest's own breakpoint.
    pub const SET_RF: u64 = 1;
    /// Do not reset DR6.
    pub const KEEP_DR6: u64 = 2;
    /// Clear TF in the frame.
    pub const CLEAR_TF: u64 = 4;
    /// #PF on the hole: sleep until an interrupt comes before it is mapped.
    pub const SLEEP: u64 = 8;
}

const CPU_BLOCK_SIZE: u64 = 256;
const USER_CPU_SIZE: u64 = 64;
const USER_CPU: u64 = 0x210000;
const USER_STACKS: u64 = 0x211000;
const USER_STACK_SIZE: u64 = 1024;
const STACK_SIZE: u64 = 8192;
const PML4: u64 = 0x180000;
const GDT: u64 = 0x18a000;
const GDT_LIMIT: u16 = 48 + 64 * 16 - 1;
const IDT: u64 = 0x18b000;
const TSS: u64 = 0x18c000;
const TSS_STRIDE: u64 = 256;
const TSS_LIMIT: u16 = 0x88;

const SEL_CODE: u16 = 0x08;
const SEL_DATA: u16 = 0x10;
const SEL_USER_DATA: u16 = 0x1b;
const SEL_USER_CODE: u16 = 0x23;
const SEL_TSS: u16 = 0x30;

/// A descriptor table register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// Linear address.
    pub base: u64,
    /// Its last byte's offset.
    pub limit: u16,
}

/// Registers of one vCPU at the start of a property; all others are 0 or as after
/// reset. Code segments are 64-bit (L=1), flat; data segments flat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// The property's entry.
    pub rip: u64,
    /// Top of this CPU's stack.
    pub rsp: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// CS selector; its RPL is the CPL.
    pub cs: u16,
    /// SS, DS and ES selector.
    pub ss: u16,
    /// FS base: [`user_address`].
    pub fs_base: u64,
    /// GS base: [`cpu_address`].
    pub gs_base: u64,
    /// GDTR.
    pub gdt: Table,
    /// IDTR.
    pub idt: Table,
    /// TR's selector.
    pub tr: u16,
    /// TR's base and limit; type 11, a busy 64-bit TSS.
    pub tss: Table,
    /// IA32_STAR (0xc0000081).
    pub star: u64,
    /// IA32_LSTAR (0xc0000082).
    pub lstar: u64,
    /// IA32_FMASK (0xc0000084).
    pub fmask: u64,
}

/// Registers with which CPU `cpu` starts the property `name` in ring 0; `None`
/// when there is no such property or CPU.
pub fn start(name: &str, cpu: u32) -> Option<Start> {
    let number = u64::from(cpu);
    let selector = SEL_TSS + u16::try_from(cpu).ok()?.checked_mul(16)?;
    if cpu >= MAX_CPUS {
        return None;
    }
    Some(Start {
        rip: entry(name)?,
        rsp: label("boot_stacks")? + (number + 1) * STACK_SIZE,
        rflags: 0x2,
        cr0: 0x8001_0033, // PG WP NE ET MP PE
        cr3: PML4,
        cr4: 0x620,  // OSXMMEXCPT OSFXSR PAE
        efer: 0x501, // LMA LME SCE
        cs: SEL_CODE,
        ss: SEL_DATA,
        fs_base: user_address(cpu, 0)?,
        gs_base: cpu_address(cpu, 0)?,
        gdt: Table { base: GDT, limit: GDT_LIMIT },
        idt: Table { base: IDT, limit: 0xfff },
        tr: selector,
        tss: Table { base: TSS + number * TSS_STRIDE, limit: TSS_LIMIT },
        star: u64::from(SEL_DATA | 3) << 48 | u64::from(SEL_CODE) << 32,
        lstar: label("fx_syscall")?,
        fmask: 0x47700,
    })
}

/// As [`start`], but in ring 3 from the first instruction: for the properties
/// `ring3_*`, whose code there is `u_` + name.
pub fn start_in_ring_3(name: &str, cpu: u32) -> Option<Start> {
    Some(Start {
        rip: label(&format!("u_{name}"))?,
        // IOPL 3 for the one that needs it.
        rflags: if name == "ring3_out" { 0x3002 } else { 0x2 },
        rsp: USER_STACKS + (u64::from(cpu) + 1) * USER_STACK_SIZE,
        cs: SEL_USER_CODE,
        ss: SEL_USER_DATA,
        ..start(name, cpu)?
    })
}

/// The address of a field of CPU `cpu`'s block ([`cpu_field`]); `None` beyond the
/// last possible CPU.
pub fn cpu_address(cpu: u32, field: u64) -> Option<u64> {
    let blocks = label("fx_cpu")?;
    (cpu < MAX_CPUS).then(|| blocks + u64::from(cpu) * CPU_BLOCK_SIZE + field)
}

/// The address of a field of CPU `cpu`'s block for ring 3 ([`user_field`]).
pub fn user_address(cpu: u32, field: u64) -> Option<u64> {
    (cpu < MAX_CPUS).then(|| USER_CPU + u64::from(cpu) * USER_CPU_SIZE + field)
}

/// The address of `fx_saved[index]`, a u64 that a property leaves behind.
pub fn saved_address(index: u64) -> Option<u64> {
    (index < 16).then_some(label("fx_saved")? + index * 8)
}

/// Entries in the log; the n-th exception (from 0) is in entry n modulo this.
pub const LOG_ENTRIES: u64 = 256;

/// Bytes of one entry of the log.
pub const LOG_SIZE: usize = 128;

/// The address of the u64 that counts the log's entries ever written.
pub fn log_count_address() -> Option<u64> {
    label("fx_log_count")
}

/// The address of the log entry of the n-th exception (from 0).
pub fn log_entry_address(n: u64) -> Option<u64> {
    Some(label("fx_log")? + n % LOG_ENTRIES * LOG_SIZE as u64)
}

/// One exception or interrupt that the guest took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogEntry {
    /// Its vector.
    pub vector: u64,
    /// Its error code; 0 if it has none.
    pub error: u64,
    /// RIP in its frame.
    pub rip: u64,
    /// CS in its frame.
    pub cs: u64,
    /// RFLAGS in its frame.
    pub rflags: u64,
    /// RSP in its frame.
    pub rsp: u64,
    /// DR6, of a #DB; else 0.
    pub dr6: u64,
    /// DR7, of a #DB; else 0.
    pub dr7: u64,
    /// CR2, of a #PF; else 0.
    pub cr2: u64,
    /// The CPU that took it.
    pub cpu: u64,
}

impl LogEntry {
    /// Reads an entry from the guest's memory at [`log_entry_address`].
    pub fn decode(bytes: &[u8; LOG_SIZE]) -> Self {
        let field = |offset: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[offset..offset + 8]);
            u64::from_le_bytes(word)
        };
        Self {
            vector: field(0x00),
            error: field(0x08),
            rip: field(0x10),
            cs: field(0x18),
            rflags: field(0x20),
            rsp: field(0x28),
            dr6: field(0x30),
            dr7: field(0x38),
            cr2: field(0x40),
            cpu: field(0x48),
        }
    }
}
