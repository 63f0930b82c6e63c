//! Writing the files of a run.

use std::fs;
use std::path::Path;

use trapline_vmm::Vm;
use trapline_vmm::coordinator::CoordinatorError;
use trapline_vmm::debug::VcpuId;
use trapline_vmm::vcpu::Registers;

use super::look::Seen;
use super::outputs::{self, CONSOLE, EVENTS, JUNIT, PAGE};
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
    #[error(transparent)]
    State(#[from] WriteBundleError),
    #[error(transparent)]
    Write(#[from] WriteError),
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
        if let Some(dir) = self.outputs.report.clone() {
            match self.machine(vm, &dir) {
                Ok(()) => {
                    self.note(report, "vmcore", &dir.join(bundle::CORE));
                    self.note(report, "state", &dir.join(bundle::STATE));
                }
                Err(trouble) => problems.push(trouble.to_string()),
            }
        }
        problems
    }

    /// Saves the machine, which stands, so that `trapline open` finds it in `dir`.
    fn machine(&mut self, vm: &mut Vm, dir: &Path) -> Result<(), Trouble> {
        // Not compressed: it is what the guest's memory is taken from.
        self.core(vm, &dir.join(bundle::CORE), Form::Elf)?;
        Ok(bundle::write(vm, dir)?)
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

    /// Saves the machine as it stands in a directory of its own beside the report, for a trap that wants no more.
    pub(super) fn snapshot(&mut self, vm: &mut Vm) {
        let name = outputs::snapshot(self.snapshots.len() + 1);
        let Some(dir) = self.outputs.in_report(&name) else { return };
        let made = fs::create_dir_all(&dir).map_err(|source| Trouble::Write(WriteError { path: dir.clone(), source }));
        match made.and_then(|()| self.machine(vm, &dir)) {
            Ok(()) => self.snapshots.push(name),
            Err(trouble) => {
                // Empty again, or somebody else's.
                let _ = fs::remove_dir(&dir);
                self.problems.push(trouble.to_string());
            }
        }
    }

    /// Writes everything that is made from the report.
    pub(super) fn write_files(&mut self, report: &mut Report) {
        if let Some(dir) = self.outputs.report.clone() {
            self.note(report, "console", &dir.join(CONSOLE));
            self.note(report, "report", &dir.join(bundle::REPORT));
            self.note(report, "junit", &dir.join(JUNIT));
            self.note(report, "events", &dir.join(EVENTS));
            self.note(report, "page", &dir.join(PAGE));
            for name in &self.snapshots {
                self.note(report, name, &dir.join(name));
            }
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
    write_atomically(&dir.join(JUNIT), |out| report.write_junit(out))?;
    write_atomically(&dir.join(PAGE), |out| report.write_page(out))?;
    // Last: whoever finds it finds all of the others.
    write_atomically(&dir.join(bundle::REPORT), |out| report.write_json(out))
}
