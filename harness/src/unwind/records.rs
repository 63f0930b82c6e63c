//! A backtrace as a report tells it.

use super::{Backtrace, Frame, FrameKind};
use crate::report::{self, FrameRecord, Source};
use crate::symbols::{SourceLine, Symbols};

/// What user space is called: its addresses are chosen anew for each process, and it has no symbols here.
const USER_SPACE: &str = "user space";

/// The functions of a backtrace, innermost first, inlined ones among them.
pub fn records(symbols: &Symbols, backtrace: &Backtrace) -> Vec<FrameRecord> {
    let mut records = Vec::new();
    let mut is_first = true;
    for frame in &backtrace.frames {
        use report::FrameKind as Kind;
        let kind = match frame.kind {
            FrameKind::Call => Kind::Call,
            FrameKind::Exact if is_first => Kind::Call,
            FrameKind::Exact => Kind::Interrupt,
            FrameKind::User => Kind::User,
        };
        is_first = false;
        records.extend(of_frame(symbols, frame, kind));
    }
    records
}

fn of_frame(symbols: &Symbols, frame: &Frame, kind: report::FrameKind) -> Vec<FrameRecord> {
    let record = |function: String, offset: u64| FrameRecord {
        function,
        offset,
        module: None,
        inlined: false,
        source: None,
        kind,
    };
    if frame.kind == FrameKind::User {
        return vec![record(USER_SPACE.to_owned(), 0)];
    }
    let Some(found) = symbols.locate(frame.lookup()) else {
        return vec![record(format!("{:#x}", frame.pc), 0)];
    };
    let offset = found.offset.saturating_add(frame.pc.wrapping_sub(frame.lookup()));
    let here = FrameRecord { module: found.module.as_deref().map(str::to_owned), ..record(found.symbol, offset) };
    let lines = symbols.lines(frame.lookup());
    if lines.is_empty() {
        return vec![here];
    }
    lines
        .into_iter()
        .map(|line| FrameRecord {
            inlined: line.inlined,
            source: source(&line),
            function: if line.function.is_empty() { here.function.clone() } else { line.function },
            ..here.clone()
        })
        .collect()
}

fn source(line: &SourceLine) -> Option<Source> {
    Some(Source { file: line.file.clone()?, line: line.line? })
}
