//! Programs that are built here, with the compiler that builds the guests.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A directory with what was built.
pub(super) struct Built {
    directory: tempfile::TempDir,
}

impl Built {
    pub(super) fn new() -> Self {
        Built { directory: tempfile::tempdir().unwrap() }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(super) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Compiles `source` to `name`, as a kernel is linked.
    pub(super) fn kernel(&self, name: &str, source: &str, flags: &[&str]) -> PathBuf {
        let linked = ["-static", "-no-pie", "-Wl,-Ttext=0xffffffff81000000", "-Wl,--build-id", "-Wl,-e,0"];
        let mut all = linked.to_vec();
        all.extend(flags);
        self.compile(name, source, &all)
    }

    /// Compiles `source` to the object file `name`, as a module is.
    pub(super) fn module(&self, name: &str, source: &str, flags: &[&str]) -> PathBuf {
        let mut all = vec!["-r", "-Wl,--build-id"];
        all.extend(flags);
        self.compile(name, source, &all)
    }

    fn compile(&self, name: &str, source: &str, flags: &[&str]) -> PathBuf {
        let file = format!("{name}.c");
        std::fs::write(self.path(&file), source).unwrap();
        let common = [
            "-g",
            "-O2",
            "-std=gnu11",
            "-ffreestanding",
            "-fno-pic",
            "-mcmodel=kernel",
            "-nostdlib",
            "-fno-stack-protector",
        ];
        let mut command = Command::new("cc");
        // Relative, so that the file's name does not depend on the directory.
        command.current_dir(self.directory()).args(common).args(flags).args(["-o", name, &file]);
        run(&mut command);
        self.path(name)
    }

    /// Runs objcopy in the directory.
    pub(super) fn objcopy(&self, args: &[&str]) {
        run(Command::new("objcopy").current_dir(self.directory()).args(args));
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
