//! Parts of a report as plain text, for the forms that carry some.

use std::fmt::Write;

use super::{Change, FrameKind, FrameRecord, Report, Source, TestRecord, TrapRecord};

/// `file:line`
pub(super) fn source(source: &Source) -> String {
    format!("{}:{}", source.file, source.line)
}

/// `0x1 -> 0x2`
pub(super) fn change(change: &Change) -> String {
    format!("{:#x} -> {:#x}", change.old, change.new)
}

/// `symbol+0x12 [module]`; an inlined function has no offset of its own.
pub(super) fn function(frame: &FrameRecord) -> String {
    let mut name = frame.function.clone();
    if frame.offset > 0 && !frame.inlined {
        let _ = write!(name, "+{:#x}", frame.offset);
    }
    if let Some(module) = &frame.module {
        let _ = write!(name, " [{module}]");
    }
    name
}

/// What a frame is beside a plain call.
pub(super) fn remark(frame: &FrameRecord) -> Option<&'static str> {
    match (frame.inlined, frame.kind) {
        (true, _) => Some("inlined"),
        (false, FrameKind::Interrupt) => Some("interrupted"),
        (false, FrameKind::User) => Some("user space"),
        (false, FrameKind::Call) => None,
    }
}

/// A line for each frame, as a kernel writes it, with its source line.
pub(super) fn backtrace(frames: &[FrameRecord]) -> String {
    let mut text = String::new();
    for frame in frames {
        let _ = write!(text, "  {}", function(frame));
        if let Some(remark) = remark(frame) {
            let _ = write!(text, " ({remark})");
        }
        if let Some(place) = &frame.source {
            let _ = write!(text, " at {}", source(place));
        }
        text.push('\n');
    }
    text
}

/// What ended the run: reason, place, change, backtrace. Empty if nothing stopped it.
pub(super) fn stop(report: &Report) -> String {
    let Some(stop) = &report.stop else { return String::new() };
    let mut text = format!("{}\n", stop.reason);
    if let Some(at) = &stop.at {
        let _ = write!(text, "at {at}");
        if let Some(place) = &stop.source {
            let _ = write!(text, " ({})", source(place));
        }
        text.push('\n');
    }
    if let Some(values) = &stop.change {
        let _ = writeln!(text, "value {}", change(values));
    }
    if !stop.backtrace.is_empty() {
        let _ = write!(text, "backtrace of vCPU {}:\n{}", stop.vcpu.unwrap_or_default(), backtrace(&stop.backtrace));
    }
    text
}

/// What a trap watches, a line each.
pub(super) fn targets(trap: &TrapRecord) -> String {
    let mut text = String::new();
    for target in &trap.targets {
        let _ = writeln!(text, "{}: {}", target.what, target.mechanism);
    }
    text
}

/// The test's name, or its number if it has none.
pub(super) fn test_name(test: &TestRecord) -> String {
    if test.name.is_empty() { format!("test {}", test.number) } else { test.name.clone() }
}
