//! The directory that a run leaves behind (`--report`), as a machine to come back to.
//!
//! ```text
//!   report.json   what happened             index.html, junit.xml, console.log: the same for others
//!   vmcore        memory, an ELF core       for gdb, drgn and crash, too
//!   state.json    all else of the machine   trapline_vmm::state
//! ```
//!
//! [`write()`] adds the last of them when the others are there; [`Bundle`] reads them again, in another process, on
//! another day. Everything in a bundle is foreign input: whatever is wrong with it is one line.

mod memory;
mod symbols;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use thiserror::Error;
use trapline_vmm::devices::Console;
use trapline_vmm::devices::virtio::DiskConfig;
use trapline_vmm::state::{MachineState, RestoreError, SaveError};
use trapline_vmm::{RestoreConfig, Vm, VmError};

use crate::files::{WriteError, write_atomically};
use crate::report::{ReadError, Report};

pub use memory::CoreMemory;
pub use symbols::SymbolFile;

/// Name of the machine's state.
pub const STATE: &str = "state.json";
/// Name of its memory.
pub const CORE: &str = "vmcore";
/// Name of the report.
pub const REPORT: &str = "report.json";

/// Most bytes of a state or a report that are read: far more than any of ours has.
const MOST_JSON: u64 = 256 << 20;

/// A machine could not be added to a bundle. Nothing is left of it.
#[derive(Debug, Error)]
pub enum WriteBundleError {
    /// The machine did not say what it is.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// It cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Adds the parked machine's state to the bundle in `dir`, whose `vmcore` is that of the same stop.
pub fn write(vm: &mut Vm, dir: &Path) -> Result<(), WriteBundleError> {
    let state = vm.save()?;
    Ok(write_atomically(&dir.join(STATE), |out| out.write_all(state.to_json().as_bytes()))?)
}

/// What is no bundle, or cannot be read.
#[derive(Debug, Error)]
pub enum BundleError {
    /// Something of it is not there.
    #[error("{} is no bundle of trapline's: {what}; name the directory that was given to --report", dir.display())]
    NotABundle {
        /// What was named.
        dir: PathBuf,
        /// What is missing.
        what: String,
    },
    /// The system did not let us read it.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of it is larger than any that was written.
    #[error("{} has {size} bytes, more than any of ours; the bundle is damaged", path.display())]
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// The state is no state.
    #[error("{}: {source}", path.display())]
    State {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        source: RestoreError,
    },
    /// The core is no core, or of another machine.
    #[error("{}: {what}", path.display())]
    Core {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The report is no report.
    #[error("{}: {source}", path.display())]
    Report {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        source: ReadError,
    },
}

/// A bundle that was read.
#[derive(Debug)]
pub struct Bundle {
    /// The report; `None` if there is none, as of a machine that was saved by somebody else. That of a snapshot is its run's,
    /// beside which it lies.
    pub report: Option<Report>,
    /// It was saved on the way, and the run went on.
    pub is_snapshot: bool,
    /// The machine.
    pub state: MachineState,
    /// Its memory.
    pub memory: CoreMemory,
}

impl Bundle {
    /// Reads the bundle in `dir`: everything but the contents of memory.
    pub fn open(dir: &Path) -> Result<Self, BundleError> {
        let not_a_bundle = |what: String| BundleError::NotABundle { dir: dir.to_owned(), what };
        match dir.metadata() {
            Ok(there) if there.is_dir() => {}
            Ok(_) => return Err(not_a_bundle("it is no directory".to_owned())),
            Err(error) => return Err(not_a_bundle(error.to_string())),
        }
        let path = dir.join(STATE);
        let json = read_json(&path)?.ok_or_else(|| not_a_bundle(format!("it has no {STATE}")))?;
        let state = MachineState::from_json(&json).map_err(|source| BundleError::State { path, source })?;
        let path = dir.join(CORE);
        let memory = match File::open(&path) {
            Ok(file) => CoreMemory::read(file, state.memory),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(not_a_bundle(format!("it has no {CORE}")));
            }
            Err(source) => return Err(BundleError::Read { path, source }),
        };
        let memory = memory.map_err(|what| BundleError::Core { path, what })?;
        let path = dir.join(REPORT);
        let report = match read_json(&path)? {
            Some(json) => Some(read_report(&json).map_err(|source| BundleError::Report { path, source })?),
            None => None,
        };
        let of_run = if report.is_none() { report_beside(dir) } else { None };
        Ok(Self { is_snapshot: of_run.is_some(), report: report.or(of_run), state, memory })
    }

    /// What the run came to and where it stands, in a line.
    pub fn summary(&self) -> String {
        let Some(report) = &self.report else {
            return format!("a machine of {} vCPUs without a report", self.state.vcpus.len());
        };
        if self.is_snapshot {
            return one_line(&format!("a snapshot; later: {}", report.verdict.text));
        }
        let mut line = report.verdict.text.clone();
        if let Some(source) = report.stop.as_ref().and_then(|stop| stop.source.as_ref()) {
            line += &format!(", {}:{}", source.file, source.line);
        }
        one_line(&line)
    }

    /// The machine, parked where it was.
    ///
    /// `disks`: those that [`MachineState::disks`] names, or copies of them.
    pub fn restore(&self, console: Console, disks: Vec<DiskConfig>) -> Result<Vm, VmError> {
        Vm::restore(RestoreConfig { state: &self.state, memory: &self.memory, console, disks, arm_hook: None })
    }
}

/// Without what would move a terminal's cursor or change its colours.
pub fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// A file's bytes; `None` if it is not there.
fn read_json(path: &Path) -> Result<Option<Vec<u8>>, BundleError> {
    let failed = |source| BundleError::Read { path: path.to_owned(), source };
    // Before it is opened: a FIFO would keep us waiting.
    match path.metadata() {
        Ok(there) if !there.is_file() => return Err(failed(io::Error::other("it is no file"))),
        Ok(there) if there.len() > MOST_JSON => {
            return Err(BundleError::TooLarge { path: path.to_owned(), size: there.len() });
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(MOST_JSON).read_to_end(&mut bytes)).map_err(failed)?;
    Ok(Some(bytes))
}

/// The report of the run that has left a snapshot in `dir`, if it still lies there.
fn report_beside(dir: &Path) -> Option<Report> {
    let dir = dir.canonicalize().ok()?;
    let name = dir.file_name()?.to_str()?;
    let report = read_report(&read_json(&dir.parent()?.join(REPORT)).ok()??).ok()?;
    report.files.values().any(|file| file == name).then_some(report)
}

fn read_report(json: &[u8]) -> Result<Report, ReadError> {
    Report::read_json(&String::from_utf8_lossy(json))
}
