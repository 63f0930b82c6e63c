//! Source lines of an address, with the functions that were inlined there.

use addr2line::Context;
use gimli::{DebugInfo, EndianSlice, RunTimeEndian};

use super::{Dwarf, Sections, Slice};
use crate::symbols::SourceLine;

impl Dwarf {
    /// What stands at a linked address, the innermost inlined function first; empty if nothing is known or the unit
    /// is damaged. The function's name is empty where DWARF has none, as for assembler.
    pub(in crate::symbols) fn lines(&self, address: u64) -> Vec<SourceLine> {
        let Some(offset) = self.unit_of(address) else { return Vec::new() };
        let sections = self.sections();
        let Ok((header, range)) = self.header(&sections, offset) else { return Vec::new() };
        let directory = sections.unit(header).ok().and_then(|unit| unit.comp_dir);
        let directory = directory.map(|bytes| tidy(&bytes.to_string_lossy()) + "/");
        // The unit alone, so that its 3,000 neighbours need not be looked at.
        let mut unit = self.sections();
        let bytes = self.elf.data(".debug_info").get(range).unwrap_or_default();
        unit.debug_info = DebugInfo::from(EndianSlice::new(bytes, RunTimeEndian::Little));
        unit.debug_aranges = Slice::new(&[], RunTimeEndian::Little).into();
        // Units that were optimised as one at link time refer to each other.
        let mut lines = frames(unit, address).or_else(|_| frames(sections, address)).unwrap_or_default();
        for line in &mut lines {
            if let (Some(file), Some(directory)) = (&mut line.file, &directory)
                && let Some(inside) = file.strip_prefix(directory.as_str())
            {
                *file = inside.to_owned();
            }
        }
        lines
    }
}

fn frames(sections: Sections<'_>, address: u64) -> gimli::Result<Vec<SourceLine>> {
    let context = Context::from_dwarf(sections)?;
    let mut frames = context.find_frames(address).skip_all_loads()?;
    let mut lines = Vec::new();
    while let Some(frame) = frames.next()? {
        let function = match &frame.function {
            Some(name) => name.demangle()?.into_owned(),
            None => String::new(),
        };
        let location = frame.location;
        lines.push(SourceLine {
            function,
            file: location.as_ref().and_then(|at| at.file).map(tidy),
            line: location.as_ref().and_then(|at| at.line).filter(|&line| line != 0),
            column: location.as_ref().and_then(|at| at.column).filter(|&column| column != 0),
            inlined: true,
        });
    }
    if let Some(outermost) = lines.last_mut() {
        outermost.inlined = false;
    }
    Ok(lines)
}

/// A path without `.` and without `..` where that can be done by its text alone.
fn tidy(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "." | "" => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => {
                parts.pop();
            }
            _ => parts.push(part),
        }
    }
    let root = if path.starts_with('/') { "/" } else { "" };
    format!("{root}{}", parts.join("/"))
}
