//! Writing the files of a run.

use std::path::Path;

use trapline_vmm::Vm;
use trapline_vmm::coordinator::CoordinatorError;
use trapline_vmm::debug::VcpuId;
use trapline_vmm::vcpu::Registers;

use super::look::Seen;
use super::supervisor::Supervisor;
use crate::bundle::{self, WriteBundleError};
use crate::files::{WriteError, write_atomically};
use crate::report::Report;
use crate::vmcore::{self, Core, CoreError, Form};

/// Why a core could not be written.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Core(#[from] CoreError),
    #[error("no core: {0}")]
    Vcpu(#[from] CoordinatorError),
}

impl Supervisor {
    /// Writes the machine as it stands, where that was asked for; what went wrong, in words.
    pub(super) fn write_core(&mut self, vm: &mut Vm, report: &mut Report) -> Vec<String> {
        let mut problems = Vec::new();
        let wanted = self.outputs.vmcore.clone();
        if let Some(path) = &wanted {
            let form = if self.outputs.compress { Form::Kdump } else { Form::Elf };
            match self.core(vm, path, form) {
                Ok(()) => self.note(report, "vmcore", path),
                Err(trouble) => problems.push(trouble.to_string()),
            }
        }
        // Not compressed: it is what the guest's memory is taken from when the report is opened.
        if let Some(path) = self.outputs.in_report("vmcore") {
            match self.core(vm, &path, Form::Elf) {
                Ok(()) => {
                    self.note(report, "vmcore", &path);
                    problems.extend(self.state(vm, report).err().map(|error| error.to_string()));
                }
                Err(trouble) => problems.push(trouble.to_string()),
            }
        }
        problems
    }

    /// What makes a machine to come back to of the core.
    fn state(&self, vm: &mut Vm, report: &mut Report) -> Result<(), WriteBundleError> {
        let Some(dir) = &self.outputs.report else { return Ok(()) };
        bundle::write(vm, dir)?;
        self.note(report, "state", &dir.join(bundle::STATE));
        Ok(())
    }

    fn core(&mut self, vm: &mut Vm, path: &Path, form: Form) -> Result<(), Trouble> {
        let vcpus: Vec<Registers> =
            (0..vm.vcpus() as u32).map(|n| vm.registers(VcpuId(n))).collect::<Result<_, _>>()?;
        // With page-table isolation, a vCPU in user space does not see the kernel.
        let mut vmcoreinfo = Vec::new();
        for n in 0..vcpus.len() as u32 {
            if vmcoreinfo.is_empty() {
                vmcoreinfo = vmcore::vmcoreinfo(self.symbols(), &Seen::by(vm, VcpuId(n))?);
            }
        }
        let hide = |gpa: u64, bytes: &mut [u8]| vm.hide_breakpoints(gpa, bytes);
        vmcore::write(&Core { ram: vm.ram(), vcpus: &vcpus, vmcoreinfo, hide: &hide }, path, form)?;
        Ok(())
    }

    /// Saves the machine as it stands beside the report, for a trap that wants no more.
    pub(super) fn snapshot(&mut self, vm: &mut Vm, trap: usize) {
        let _ = (vm, trap);
    }

    /// Writes everything that is made from the report.
    pub(super) fn write_files(&mut self, report: &mut Report) {
        if let Some(dir) = self.outputs.report.clone() {
            self.note(report, "console", &dir.join("console.log"));
            self.note(report, "report", &dir.join("report.json"));
            self.note(report, "junit", &dir.join("junit.xml"));
            self.note(report, "events", &dir.join("events.ndjson"));
            self.note(report, "page", &dir.join("index.html"));
            let written = in_dir(&dir, report);
            report.problems.extend(written.err().map(|error| error.to_string()));
        }
        if let Some(path) = self.outputs.junit.clone() {
            let written = write_atomically(&path, |out| report.write_junit(out));
            report.problems.extend(written.err().map(|error| error.to_string()));
        }
    }

    /// A file of the report, by its place in the report's directory if it is there.
    fn note(&self, report: &mut Report, what: &str, path: &Path) {
        let inside = self.outputs.report.as_deref().and_then(|dir| path.strip_prefix(dir).ok());
        report.files.insert(what.to_owned(), inside.unwrap_or(path).display().to_string());
    }
}

fn in_dir(dir: &Path, report: &Report) -> Result<(), WriteError> {
    write_atomically(&dir.join("junit.xml"), |out| report.write_junit(out))?;
    write_atomically(&dir.join("index.html"), |out| report.write_page(out))?;
    // Last: whoever finds it finds all of the others.
    write_atomically(&dir.join("report.json"), |out| report.write_json(out))
}
