//! The files that a run leaves behind.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::RunError;
use crate::bundle;
use crate::files::{AtomicFile, WriteError};
use crate::report::{Event, Events};

/// Names in the report's directory, beside those of a [`bundle`].
pub(crate) const PAGE: &str = "index.html";
pub(crate) const JUNIT: &str = "junit.xml";
pub(crate) const EVENTS: &str = "events.ndjson";
pub(crate) const CONSOLE: &str = "console.log";

/// The directory of the n-th machine that was saved on the way.
pub(crate) fn snapshot(n: usize) -> String {
    format!("snapshot-{n}")
}

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
            try_file(&dir.join(bundle::REPORT))?;
        }
        [&self.junit, &self.vmcore].into_iter().flatten().try_for_each(|path| try_file(path))
    }

    /// Takes away what an earlier run has left in the report's directory: its core, say, would be taken for this run's.
    ///
    /// # Errors
    /// The first file that cannot be removed.
    pub(crate) fn begin_anew(&self) -> Result<(), WriteError> {
        let Some(dir) = &self.report else { return Ok(()) };
        // First the one that says what the others are.
        for name in [bundle::REPORT, PAGE, JUNIT, EVENTS, bundle::STATE, bundle::CORE] {
            remove(&dir.join(name))?;
        }
        for snapshot in (1..).map(|n| dir.join(snapshot(n))).take_while(|dir| dir.is_dir()) {
            remove(&snapshot.join(bundle::STATE))?;
            remove(&snapshot.join(bundle::CORE))?;
            // What else is in it is not ours.
            let _ = fs::remove_dir(snapshot);
        }
        Ok(())
    }

    /// The streams of events: where they were asked for, as they come; in the report when they are complete.
    pub(crate) fn streams(&self) -> Result<Vec<Stream>, RunError> {
        let mut streams = Vec::new();
        if let Some(path) = &self.events {
            let file = File::create(path).map_err(|source| WriteError { path: path.clone(), source })?;
            streams.push(Stream { events: Events::new(file)?, pending: None });
        }
        if let Some(path) = self.in_report(EVENTS) {
            let mut pending = AtomicFile::create(&path)?;
            let file = pending.file().try_clone()?;
            streams.push(Stream { events: Events::new(file)?, pending: Some(pending) });
        }
        Ok(streams)
    }

    /// A file in the report directory.
    pub(crate) fn in_report(&self, name: &str) -> Option<PathBuf> {
        self.report.as_ref().map(|dir| dir.join(name))
    }

    /// The file that keeps the console, begun anew.
    pub(crate) fn console_log(&self) -> Result<Option<File>, WriteError> {
        let Some(path) = self.in_report(CONSOLE) else { return Ok(None) };
        File::create(&path).map(Some).map_err(|source| WriteError { path, source })
    }
}

/// One stream of events.
#[derive(Debug)]
pub(crate) struct Stream {
    events: Events,
    pending: Option<AtomicFile>,
}

impl Stream {
    pub(crate) fn emit(&mut self, at: Duration, event: Event<'_>) {
        self.events.emit(at, event);
    }

    /// Waits until all of it is written; what went wrong, in words.
    pub(crate) fn finish(self) -> Option<String> {
        let problem = self.events.finish(PATIENCE);
        match (problem, self.pending) {
            (None, Some(pending)) => pending.commit().err().map(|error| error.to_string()),
            (problem, _) => problem,
        }
    }
}

/// How long the end of a run waits for a reader of events.
const PATIENCE: Duration = Duration::from_secs(5);

/// Removes a file; what is none, or a link to elsewhere, was not made by a run.
fn remove(path: &Path) -> Result<(), WriteError> {
    match fs::symlink_metadata(path) {
        Ok(there) if there.is_file() => {
            fs::remove_file(path).map_err(|source| WriteError { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn try_file(path: &Path) -> Result<(), WriteError> {
    AtomicFile::create(path).map(drop)
}
