//! The lines of a Linux kernel that a verdict needs.

/// How the kernel says that it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelEnd {
    /// `reboot: Restarting system`
    Restart,
    /// `reboot: Power down`
    PowerOff,
    /// `reboot: System halted`: it is there, and will do nothing any more.
    Halt,
}

/// `Run /init as init process`. A kernel that is told to be quiet does not say it.
pub(super) fn starts_first_program(message: &str) -> bool {
    message.strip_prefix("Run ").is_some_and(|rest| rest.ends_with(" as init process"))
}

/// What a panic is about.
pub(super) fn panic(message: &str) -> Option<&str> {
    let rest = message.strip_prefix("Kernel panic - not syncing")?;
    Some(rest.strip_prefix(':').unwrap_or(rest).trim())
}

/// How the kernel ends, if it says so in this line.
pub(super) fn end(message: &str) -> Option<KernelEnd> {
    let rest = message.strip_prefix("reboot: ")?;
    if rest.starts_with("Restarting system") {
        Some(KernelEnd::Restart)
    } else if rest.starts_with("Power down") || rest.starts_with("Power off") {
        Some(KernelEnd::PowerOff)
    } else if rest.starts_with("System halted") {
        Some(KernelEnd::Halt)
    } else {
        None
    }
}
