//! A bare-metal guest that does one thing: `run=NAME` on the command line.
//!
//! | name           | what happens                                                     |
//! |----------------|------------------------------------------------------------------|
//! | `exit`         | the exit port, with `exit=V` (0)                                 |
//! | `triple`       | a triple fault at `triple_here`                                  |
//! | `reset-i8042`  | a reset by the keyboard controller                               |
//! | `reset-cf9`    | a reset by port 0xcf9                                            |
//! | `reset-acpi`   | a reset by the FADT's reset register                             |
//! | `off-acpi`     | power off: S5 by PM1a                                            |
//! | `panic`        | pvpanic (0x505): panicked                                        |
//! | `crash-loaded` | pvpanic: a crash kernel takes over                               |
//! | `exception`    | #UD at `exception_here`; the guest says so and exits with 99     |
//! | `fetch-hole`   | a call into the PCI hole: KVM cannot emulate the fetch           |
//! | `clac`         | CLAC at `clac_here`, which the PVM flavour does not interpret    |
//! | `hang`         | spins at `hang_here`, interrupts off                             |
//! | `sleep`        | halts, interrupts off                                            |
//! | `echo`         | echoes the console; `q` or ^D ends with `exit=V`                 |
//! | `flood`        | `lines=N` (1000) numbered lines, then `exit=V`                   |
//! | `ports`        | `count=N` (20000) accesses to random ports, then `exit=V`        |
//! | `mmio`         | the same to random addresses in the PCI hole                     |
//!
//! `cpu=N` lets CPU N act (0) while the others count at `busy_here`; `seed=N` begins
//! another random sequence. An act that should have ended the machine and did not says
//! `acts: still here after NAME` and exits with [`crate::STATUS_EXCEPTION`]; a command
//! line it does not understand, with [`crate::STATUS_USAGE`].

/// The names that `run=` takes.
pub const NAMES: &[&str] = &[
    "exit",
    "triple",
    "reset-i8042",
    "reset-cf9",
    "reset-acpi",
    "off-acpi",
    "panic",
    "crash-loaded",
    "exception",
    "fetch-hole",
    "clac",
    "hang",
    "sleep",
    "echo",
    "flood",
    "ports",
    "mmio",
];
