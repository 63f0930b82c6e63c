//! What can be wrong with what an initramfs is made from.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why an initramfs could not be made. Paths are of this machine unless the words say otherwise.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum InitramfsError {
    /// The file system said no.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which file or directory.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// A program or module that is none, by its kind of file.
    #[error("{} is not a regular file; name the program itself", path.display())]
    NotAFile {
        /// Which.
        path: PathBuf,
    },
    /// `--rootfs` with something else.
    #[error("{} is not a directory; give the directory that is to be the guest's /", path.display())]
    NotADirectory {
        /// Which.
        path: PathBuf,
    },
    /// A script needs an interpreter.
    #[error(
        "{} is a script, and a guest made of one program has nothing to run it with; put it and {interpreter} into a \
         directory and use --rootfs", path.display()
    )]
    Script {
        /// Which.
        path: PathBuf,
        /// What stands behind its `#!`.
        interpreter: String,
    },
    /// An ELF for another machine, or none at all.
    #[error("{} cannot run in an x86-64 guest: it is {what}; build it for x86_64-unknown-linux", path.display())]
    NotAProgram {
        /// Which.
        path: PathBuf,
        /// What it is instead.
        what: String,
    },
    /// A shared library of a dynamic executable.
    #[error(
        "{} needs {library}, which is in none of {searched}; link the program statically, set LD_LIBRARY_PATH, or use \
         --rootfs", needed_by.display()
    )]
    NoLibrary {
        /// Who needs it.
        needed_by: PathBuf,
        /// Its name.
        library: String,
        /// The directories looked into.
        searched: String,
    },
    /// The program is to be one of the guest's, and is not.
    #[error("there is no program {program} in {}; name one of the guest's, such as /bin/sh", dir.display())]
    NoProgram {
        /// As it was given.
        program: String,
        /// The guest's `/`.
        dir: PathBuf,
    },
    /// The program in the guest could not be executed.
    #[error("{program} in {} {problem}", dir.display())]
    BadProgram {
        /// Its path in the guest.
        program: String,
        /// The guest's `/`.
        dir: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Not a kernel module.
    #[error("{} is no kernel module for x86-64: {problem}; give a .ko, .ko.xz, .ko.zst or .ko.gz file", path.display())]
    NotAModule {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The format has 32 bits for a file's size.
    #[error("{} has {size} bytes; an initramfs takes files below 4 GiB: use a disk image", path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// The kernel would leave it out without a word.
    #[error("the name of {name} is longer than the {max} bytes that the kernel takes; use shorter directories")]
    NameTooLong {
        /// The path in the guest.
        name: String,
        /// How long it may be.
        max: usize,
    },
    /// A file where a directory should be.
    #[error("{name} cannot be put into the guest: {problem}")]
    NoPlace {
        /// The path in the guest.
        name: String,
        /// What is in the way.
        problem: &'static str,
    },
    /// Somebody writes to a file while we read it.
    #[error("{} became shorter while it was read; try again when nothing writes to it", path.display())]
    Changed {
        /// Which.
        path: PathBuf,
    },
    /// A program's argument ends at its first NUL.
    #[error("an argument of the program has a NUL byte in it")]
    NulInArgument,
    /// More arguments than a program can be given.
    #[error("the program's arguments have {len} bytes; at most {max} can be given")]
    TooManyArguments {
        /// How many bytes there are.
        len: usize,
        /// How many there may be.
        max: usize,
    },
    /// The archive found no room.
    #[error("cannot write the initramfs: {source}; make room in the temporary directory (TMPDIR)")]
    Write {
        /// What the file system said.
        source: io::Error,
    },
}
