//! An initial RAM disk made from a program, or from a directory: no tools in the guest, no root on the host.
//!
//! ```no_run
//! use trapline_harness::initramfs::{self, Initramfs};
//!
//! let initramfs = Initramfs::exec("./my-test".as_ref(), ["--all"])?;
//! let initrd = initramfs.to_file()?; // BootRequest::initrd takes it
//! let cmdline = initramfs::CMDLINE;
//! # Ok::<(), initramfs::InitramfsError>(())
//! ```
//!
//! | made by                   | `/init`                 | what it runs                                        |
//! |---------------------------|-------------------------|-----------------------------------------------------|
//! | [`Initramfs::exec`]       | ours                    | a program of this machine, packed as `/bin/NAME`    |
//! | [`Initramfs::rootfs_exec`]| ours                    | a program of the directory                          |
//! | [`Initramfs::rootfs`]     | the directory's own     | what that does                                      |
//!
//! Our init ([`trapline_guests::init`]) mounts `/proc`, `/sys` (debugfs and tracefs below it), `/dev`, `/tmp` and `/run`,
//! brings up the loopback interface, loads the [modules](Initramfs::module), and runs the program on the console as its
//! only other process. The program's exit status becomes the guest's: N as it is, 128 + S if signal S killed it, 127 and
//! 126 if it is not there or cannot be executed, each with a line on the console.
//!
//! The status goes out by port 0xf4; by the same register in memory ([`EXIT_PAGE`](trapline_vmm::boot::layout::EXIT_PAGE))
//! where the kernel or the processor refuses the port; and where neither is to be had as the console's last line before
//! the machine is switched off, for which there is [`exit_line`]. A guest that goes down in another way has failed
//! ([`Verdict::NoStatus`](crate::Verdict::NoStatus)).
//!
//! Equal input gives an equal archive: names in order, no times, no inode numbers of the host.

mod cpio;
mod error;
mod libraries;
mod modules;
mod program;
mod tree;

#[cfg(test)]
mod tests;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{BufWriter, Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use cpio::{Archive, Node};
pub use error::InitramfsError;
use program::Executable;

/// The kernel command line for a guest whose user gives none: the console is on the port that we show, and a kernel that
/// panics ends the run at once.
pub const CMDLINE: &str = "console=ttyS0 panic=-1";

/// Where init finds its orders; see `guest-images/init/init.c`.
const COMMAND: &str = "lib/trapline/command";
const ENVIRONMENT: &str = "lib/trapline/environment";
const MODULES: &str = "lib/trapline/modules";

/// The program's environment, besides the boot parameters that the kernel does not know.
const VARIABLES: [&str; 3] =
    ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "TERM=linux"];

/// An initial RAM disk that is not written yet.
#[derive(Debug)]
pub struct Initramfs {
    archive: Archive,
    modules: usize,
    origin: String,
    notes: Vec<String>,
    tells_status: bool,
}

impl Initramfs {
    /// A guest that runs one program of this machine, as `/bin/NAME`, with `args` behind its name.
    ///
    /// A dynamic executable gets the shared libraries that it and they name, from where this machine's loader would
    /// take them; [`notes`](Self::notes) lists them. What it opens by itself while it runs is not packed.
    pub fn exec<A: AsRef<OsStr>>(program: &Path, args: impl IntoIterator<Item = A>) -> Result<Self, InitramfsError> {
        let executable = Executable::of_host(program)?;
        let name = program.file_name().ok_or_else(|| InitramfsError::NotAFile { path: program.into() })?;
        let args = collect(args);
        let mut this = Self::new(described("exec", program, &args));
        let place = [b"bin/", name.as_bytes()].concat();
        this.archive.put(&place, Node::host_file(program, 0o755)?)?;
        let mut variables: Vec<Vec<u8>> = Vec::new();
        if let Some(interpreter) = &executable.interpreter {
            let libraries = libraries::of(program, &executable, interpreter)?;
            for file in &libraries.files {
                this.archive.put(file.as_os_str().as_bytes(), Node::host_file(file, 0o755)?)?;
            }
            if !libraries.directories.is_empty() {
                let directories: Vec<&[u8]> = libraries.directories.iter().map(|d| d.as_os_str().as_bytes()).collect();
                variables.push([b"LD_LIBRARY_PATH=", directories.join(&b':').as_slice()].concat());
            }
            let packed: Vec<_> = libraries.files.iter().map(|file| file.display().to_string()).collect();
            this.notes.push(format!("{} is dynamic: packed with {}", program.display(), packed.join(", ")));
        }
        this.run(&[b"/", place.as_slice()].concat(), &args, &variables)?;
        Ok(this)
    }

    /// A guest with the files of `dir`, whose own `/init` is what the kernel starts (or what `rdinit=` on its command
    /// line says).
    ///
    /// Owners are kept, but for files of the calling user, which become root's. Directories that other file systems are
    /// mounted on stay empty, and [`notes`](Self::notes) names them.
    pub fn rootfs(dir: &Path) -> Result<Self, InitramfsError> {
        let mut this = Self::new(format!("rootfs {}", dir.display()));
        tree::read(dir, &mut this.archive, &mut this.notes)?;
        this.archive.put_if_absent(b"dev/console", Node::character(0o600, 5, 1))?;
        Ok(this)
    }

    /// A guest with the files of `dir` that runs one program of theirs: a path, or a name to be found in the
    /// directories of the usual `PATH`. An `/init` in `dir` is replaced by ours.
    pub fn rootfs_exec<A: AsRef<OsStr>>(
        dir: &Path,
        program: &OsStr,
        args: impl IntoIterator<Item = A>,
    ) -> Result<Self, InitramfsError> {
        let mut this = Self::rootfs(dir)?;
        let args = collect(args);
        this.origin = format!("{} {}", this.origin, described("exec", Path::new(program), &args));
        let place = program::find_in(&this.archive, dir, program)?;
        this.archive.remove(b"init");
        this.run(&place, &args, &[])?;
        Ok(this)
    }

    /// A kernel module (`.ko`, or compressed as `.ko.xz`, `.ko.zst`, `.ko.gz`) for our init to load before it runs the
    /// program; in the order of the calls, so a module comes after those that it needs.
    pub fn module(&mut self, file: &Path) -> Result<(), InitramfsError> {
        let (name, contents) = modules::read(file)?;
        let place = [format!("{MODULES}/{:04}-", self.modules).as_bytes(), &name].concat();
        self.modules += 1;
        self.archive.put(&place, Node::bytes(contents, 0o644))
    }

    /// What a user should know about how it was made, a line each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What it is made from, in words: `exec ./my-test --all`.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Whether there is a file of that absolute path in it, symbolic links followed.
    pub fn contains(&self, path: &str) -> bool {
        self.archive.find(path.as_bytes()).is_some()
    }

    /// Writes the archive (cpio, "newc"). Returns its size in bytes.
    pub fn write_to(&self, out: &mut dyn Write) -> Result<u64, InitramfsError> {
        self.archive.write_to(out)
    }

    /// The archive in a temporary file without a name, which goes away with the handle.
    pub fn to_file(&self) -> Result<File, InitramfsError> {
        let no_room = |source| InitramfsError::Write { source };
        let mut out = BufWriter::new(tempfile::tempfile().map_err(no_room)?);
        self.write_to(&mut out)?;
        let mut file = out.into_inner().map_err(|error| no_room(error.into_error()))?;
        file.rewind().map_err(no_room)?;
        Ok(file)
    }

    fn new(origin: String) -> Self {
        Self { archive: Archive::default(), modules: 0, origin, notes: Vec::new(), tells_status: false }
    }

    /// Whether its init is ours: such a guest ends with a status.
    pub fn tells_status(&self) -> bool {
        self.tells_status
    }

    /// Makes our init what the kernel starts, and `program` (absolute, of the guest) what it runs.
    fn run(&mut self, program: &[u8], args: &[OsString], variables: &[Vec<u8>]) -> Result<(), InitramfsError> {
        let strings = [program, program].into_iter().chain(args.iter().map(|arg| arg.as_bytes()));
        let variables = VARIABLES.iter().map(|variable| variable.as_bytes()).chain(variables.iter().map(Vec::as_slice));
        self.tells_status = true;
        self.archive.put(b"init", Node::bytes(trapline_guests::init().to_vec(), 0o755))?;
        self.archive.put(COMMAND.as_bytes(), Node::bytes(terminated(strings)?, 0o644))?;
        self.archive.put(ENVIRONMENT.as_bytes(), Node::bytes(terminated(variables)?, 0o644))?;
        for directory in ["dev", "proc", "sys", "tmp", "run", "root"] {
            self.archive.put_if_absent(directory.as_bytes(), Node::directory(0o755))?;
        }
        self.archive.put_if_absent(b"dev/console", Node::character(0o600, 5, 1))
    }
}

/// The status in the line that our init prints last where it could not tell it by the exit register.
pub fn exit_line(line: &str) -> Option<u8> {
    let (_, status) = line.trim_end().split_once(trapline_guests::INIT_EXIT_LINE)?;
    status.parse().ok()
}

fn collect<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Vec<OsString> {
    args.into_iter().map(|arg| arg.as_ref().to_owned()).collect()
}

fn described(what: &str, program: &Path, args: &[OsString]) -> String {
    let mut text = format!("{what} {}", program.display());
    for arg in args {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text
}

/// Strings as init reads them.
fn terminated<'a>(strings: impl Iterator<Item = &'a [u8]>) -> Result<Vec<u8>, InitramfsError> {
    let mut bytes = Vec::new();
    for string in strings {
        if string.contains(&0) {
            return Err(InitramfsError::NulInArgument);
        }
        bytes.extend_from_slice(string);
        bytes.push(0);
    }
    if bytes.len() >= MAX_COMMAND {
        return Err(InitramfsError::TooManyArguments { len: bytes.len(), max: MAX_COMMAND });
    }
    Ok(bytes)
}

/// What init has room for, in bytes (`MAX_BYTES` there).
const MAX_COMMAND: usize = 2 << 20;
