//! The files that a run leaves behind.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::files::{AtomicFile, WriteError};

/// What is to be written, and where.
#[derive(Debug, Clone, Default)]
pub struct Outputs {
    /// A directory for everything: report, page, JUnit, events, console, and what a debugger needs to go back to the stop.
    pub report: Option<PathBuf>,
    /// JUnit XML, as CI systems read it.
    pub junit: Option<PathBuf>,
    /// One JSON object a line, while it runs.
    pub events: Option<PathBuf>,
    /// The guest's memory and registers, if the run does not pass.
    pub vmcore: Option<PathBuf>,
    /// The core is to be compressed (kdump's format) instead of ELF.
    pub compress: bool,
}

impl Outputs {
    /// Whether nothing is to be written.
    pub fn is_empty(&self) -> bool {
        self.report.is_none() && self.junit.is_none() && self.events.is_none() && self.vmcore.is_none()
    }

    /// Makes sure that all of it can be written: the directory is made, and each place tried.
    ///
    /// # Errors
    /// The first that cannot.
    pub(crate) fn try_out(&self) -> Result<(), WriteError> {
        if let Some(dir) = &self.report {
            fs::create_dir_all(dir).map_err(|source| WriteError { path: dir.clone(), source })?;
            try_file(&dir.join("report.json"))?;
        }
        [&self.junit, &self.vmcore].into_iter().flatten().try_for_each(|path| try_file(path))
    }

    /// A file in the report directory.
    pub(crate) fn in_report(&self, name: &str) -> Option<PathBuf> {
        self.report.as_ref().map(|dir| dir.join(name))
    }

    /// The file that keeps the console, begun anew.
    pub(crate) fn console_log(&self) -> Result<Option<File>, WriteError> {
        let Some(path) = self.in_report("console.log") else { return Ok(None) };
        File::create(&path).map(Some).map_err(|source| WriteError { path, source })
    }
}

fn try_file(path: &Path) -> Result<(), WriteError> {
    AtomicFile::create(path).map(drop)
}
