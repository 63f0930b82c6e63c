//! Writing the files of a run.

use trapline_vmm::Vm;

use super::supervisor::Supervisor;
use crate::report::Report;

impl Supervisor {
    /// Writes the machine as it stands, if that was asked for; what went wrong, in words.
    pub(super) fn write_core(&mut self, _vm: &mut Vm, _report: &mut Report) -> Vec<String> {
        Vec::new()
    }

    /// Saves the machine as it stands beside the report, for a trap that wants no more.
    pub(super) fn snapshot(&mut self, _vm: &mut Vm, _trap: usize) {}

    /// Writes everything that is made from the report.
    pub(super) fn write_files(&mut self, report: &mut Report) {
        let _ = report;
    }
}
