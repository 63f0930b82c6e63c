//! Whether a file can be executed in the guest, and what it needs there.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use object::read::elf::{Dyn, FileHeader, ProgramHeader};
use object::{Endianness, FileKind, ReadCache, ReadRef, elf};

use super::InitramfsError;
use super::cpio::{Archive, Contents, Node, S_IFREG, lossy};

/// What the kernel reads of a script's first line (BINPRM_BUF_SIZE).
const FIRST_LINE: u64 = 256;
/// How many interpreters of interpreters the kernel follows.
const MAX_INTERPRETERS: usize = 5;
/// No program names more.
const MAX_NEEDED: usize = 4096;

/// An ELF that an x86-64 kernel can execute, or a library of one.
#[derive(Debug)]
pub(super) struct Executable {
    /// 64-bit, not 32-bit.
    pub(super) is_64: bool,
    /// The loader of a dynamic executable (PT_INTERP).
    pub(super) interpreter: Option<Vec<u8>>,
    /// DT_NEEDED.
    pub(super) needed: Vec<Vec<u8>>,
    /// DT_RPATH, which DT_RUNPATH puts out of force.
    pub(super) rpath: Option<Vec<u8>>,
    pub(super) runpath: Option<Vec<u8>>,
    is_executable: bool,
}

impl Executable {
    /// A program of this machine.
    pub(super) fn of_host(path: &Path) -> Result<Self, InitramfsError> {
        let wrong = |what: String| InitramfsError::NotAProgram { path: path.into(), what };
        match Kind::of(path)? {
            Kind::Script(interpreter) => {
                Err(InitramfsError::Script { path: path.into(), interpreter: lossy(&interpreter) })
            }
            Kind::Elf(elf) if !elf.is_executable => Err(wrong("an object file or a core dump".to_owned())),
            Kind::Elf(elf) if elf.interpreter.is_none() && !elf.needed.is_empty() => {
                Err(wrong("a shared library".to_owned()))
            }
            Kind::Elf(elf) => Ok(elf),
            Kind::Other(what) => Err(wrong(what)),
        }
    }

    /// A shared library; `None` if it is something else.
    pub(super) fn library(path: &Path) -> Option<Self> {
        match Kind::of(path) {
            Ok(Kind::Elf(elf)) => Some(elf),
            _ => None,
        }
    }
}

/// What the kernel would take a file for.
enum Kind {
    Script(Vec<u8>),
    Elf(Executable),
    /// With what it is instead, in words.
    Other(String),
}

impl Kind {
    fn of(path: &Path) -> Result<Self, InitramfsError> {
        let failed = |source| InitramfsError::Read { path: path.into(), source };
        let mut file = File::open(path).map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(InitramfsError::NotAFile { path: path.into() });
        }
        let mut start = Vec::new();
        (&mut file).take(FIRST_LINE).read_to_end(&mut start).map_err(failed)?;
        if let Some(line) = start.strip_prefix(b"#!") {
            let mut words =
                line.split(|byte| matches!(byte, b' ' | b'\t' | b'\n' | 0)).skip_while(|word| word.is_empty());
            return Ok(Self::Script(words.next().unwrap_or_default().to_vec()));
        }
        let cache = ReadCache::new(file);
        let parsed = match FileKind::parse(&cache) {
            Ok(FileKind::Elf64) => parse::<elf::FileHeader64<Endianness>, _>(&cache),
            Ok(FileKind::Elf32) => parse::<elf::FileHeader32<Endianness>, _>(&cache),
            _ if start.is_empty() => return Ok(Self::Other("an empty file".to_owned())),
            _ => return Ok(Self::Other("no ELF executable".to_owned())),
        };
        Ok(match parsed {
            Ok(Parsed::Here(executable)) => Self::Elf(executable),
            Ok(Parsed::Machine(machine)) => Self::Other(format!("an ELF for {}", machine_name(machine))),
            Err(Damaged(problem)) => Self::Other(format!("a damaged ELF ({problem})")),
        })
    }
}

enum Parsed {
    Here(Executable),
    /// For another machine (e_machine).
    Machine(u16),
}

/// What cannot be right in an ELF.
struct Damaged(String);

impl From<object::read::Error> for Damaged {
    fn from(error: object::read::Error) -> Self {
        Self(error.to_string())
    }
}

fn parse<'data, E, R>(data: R) -> Result<Parsed, Damaged>
where
    E: FileHeader<Endian = Endianness>,
    R: ReadRef<'data>,
{
    let header = E::parse(data)?;
    let endian = header.endian()?;
    let machine = header.e_machine(endian);
    if !matches!((machine, header.is_class_64()), (elf::EM_X86_64, true) | (elf::EM_386, false)) {
        return Ok(Parsed::Machine(machine.0));
    }
    let segments = header.program_headers(endian, data)?;
    let mut executable = Executable {
        is_64: header.is_class_64(),
        interpreter: None,
        needed: Vec::new(),
        rpath: None,
        runpath: None,
        is_executable: matches!(header.e_type(endian), elf::ET_EXEC | elf::ET_DYN),
    };
    let at = |address: u64| {
        segments.iter().filter(|s| s.p_type(endian) == elf::PT_LOAD).find_map(|segment| {
            let offset = address.checked_sub(segment.p_vaddr(endian).into())?;
            let size: u64 = segment.p_filesz(endian).into();
            let start: u64 = segment.p_offset(endian).into();
            (offset < size).then_some((start.checked_add(offset)?, size - offset))
        })
    };
    let mut strings = None;
    let mut named = Vec::new();
    for segment in segments {
        if let Some(interpreter) = segment.interpreter(endian, data)? {
            executable.interpreter = Some(interpreter.to_vec());
        }
        for entry in segment.dynamic(endian, data)?.unwrap_or_default() {
            let value: u64 = entry.d_val(endian).into();
            match entry.d_tag(endian) {
                elf::DT_NULL => break,
                elf::DT_STRTAB => strings = Some(value),
                tag @ (elf::DT_NEEDED | elf::DT_RPATH | elf::DT_RUNPATH) if named.len() < MAX_NEEDED => {
                    named.push((tag, value));
                }
                _ => {}
            }
        }
    }
    for (tag, offset) in named {
        let bad = || Damaged("bad string in its dynamic section".to_owned());
        let place = strings.and_then(|table: u64| at(table.checked_add(offset)?)).ok_or_else(bad)?;
        let end = place.0.checked_add(place.1).ok_or_else(bad)?;
        let string = data.read_bytes_at_until(place.0..end, 0).map_err(|()| bad())?.to_vec();
        match tag {
            elf::DT_NEEDED => executable.needed.push(string),
            elf::DT_RPATH => executable.rpath = Some(string),
            _ => executable.runpath = Some(string),
        }
    }
    if executable.runpath.is_some() {
        executable.rpath = None;
    }
    Ok(Parsed::Here(executable))
}

fn machine_name(machine: u16) -> String {
    match machine {
        3 => "32-bit x86".to_owned(),
        40 => "ARM".to_owned(),
        62 => "x86-64 with 32-bit addresses (x32)".to_owned(),
        183 => "AArch64".to_owned(),
        243 => "RISC-V".to_owned(),
        other => format!("machine {other}"),
    }
}

/// The absolute path of a program in the guest, once everything that can be known of it beforehand is fine.
pub(super) fn find_in(archive: &Archive, dir: &Path, program: &OsStr) -> Result<Vec<u8>, InitramfsError> {
    let none = || InitramfsError::NoProgram { program: program.to_string_lossy().into_owned(), dir: dir.into() };
    let path = match program.as_bytes() {
        [] => return Err(none()),
        name if name.contains(&b'/') => [b"/", name.strip_prefix(b"/").unwrap_or(name)].concat(),
        name => {
            let (_, directories) = super::VARIABLES[0].split_once('=').unwrap_or_default();
            let mut paths = directories.split(':').map(|directory| [directory.as_bytes(), b"/", name].concat());
            paths.find(|path| archive.find(path).is_some()).ok_or_else(none)?
        }
    };
    let mut next = path.clone();
    for _ in 0..MAX_INTERPRETERS {
        let bad = |problem: String| InitramfsError::BadProgram { program: lossy(&next), dir: dir.into(), problem };
        let (_, node) = archive.find(&next).ok_or_else(none)?;
        let interpreter = interpreter(node).map_err(|error| match error {
            Unfit::Because(problem) => bad(problem),
            Unfit::Error(error) => error,
        })?;
        let Some(interpreter) = interpreter else { break };
        if archive.find(&interpreter).is_none() {
            return Err(bad(format!("needs {}, which is not there", lossy(&interpreter))));
        }
        next = interpreter;
    }
    Ok(path)
}

enum Unfit {
    Because(String),
    Error(InitramfsError),
}

/// What executes a file, if that is not the kernel itself.
fn interpreter(node: &Node) -> Result<Option<Vec<u8>>, Unfit> {
    let because = |problem: &str| Err(Unfit::Because(problem.to_owned()));
    if !node.is(S_IFREG) {
        return because("is not a regular file; name a program");
    }
    if node.mode & 0o111 == 0 {
        return because("is not executable; set its mode (chmod +x)");
    }
    // A file that we made ourselves is none to run.
    let Contents::Host { path, .. } = &node.contents else { return Ok(None) };
    match Kind::of(path).map_err(Unfit::Error)? {
        Kind::Script(interpreter) => Ok(Some(interpreter)),
        Kind::Elf(elf) if elf.is_executable => Ok(elf.interpreter),
        Kind::Elf(_) => because("is an object file or a core dump; name a program"),
        // The kernel may know a format that we do not (binfmt_misc), but not before the guest has told it.
        Kind::Other(what) => Err(Unfit::Because(format!("cannot run in an x86-64 guest: it is {what}"))),
    }
}

/// Whether a host's path leads to a regular file.
pub(super) fn is_file(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file())
}
