//! The shared libraries of a dynamic executable, as this machine's loader would find them (ld.so(8)): DT_RPATH,
//! `LD_LIBRARY_PATH`, DT_RUNPATH, `/etc/ld.so.conf`, the usual directories. Nothing of the program's is executed.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::InitramfsError;
use super::program::{Executable, is_file};

/// Where loaders look without being told, of the distributions that there are.
const USUAL_64: &[&str] =
    &["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"];
const USUAL_32: &[&str] =
    &["/lib/i386-linux-gnu", "/usr/lib/i386-linux-gnu", "/lib32", "/usr/lib32", "/lib", "/usr/lib"];

/// A configuration that includes itself is read so often.
const MAX_INCLUDES: usize = 64;

/// What has to be in the guest beside the program.
#[derive(Debug, Default)]
pub(super) struct Libraries {
    /// Absolute paths, the loader first.
    pub(super) files: Vec<PathBuf>,
    /// Directories of libraries in which the guest's loader does not look by itself.
    pub(super) directories: Vec<PathBuf>,
}

/// The loader and the libraries that a program, and they in turn, name.
pub(super) fn of(program: &Path, executable: &Executable, loader: &[u8]) -> Result<Libraries, InitramfsError> {
    let loader = PathBuf::from(OsStr::from_bytes(loader));
    let missing = |needed_by: &Path, library: &[u8], searched: &[PathBuf]| InitramfsError::NoLibrary {
        needed_by: needed_by.into(),
        library: String::from_utf8_lossy(library).into_owned(),
        searched: searched.iter().map(|d| d.display().to_string()).collect::<Vec<_>>().join(", "),
    };
    if !loader.is_absolute() || !is_file(&loader) {
        return Err(missing(program, loader.as_os_str().as_bytes(), &[PathBuf::from("/")]));
    }
    let usual: Vec<PathBuf> = if executable.is_64 { USUAL_64 } else { USUAL_32 }.iter().map(PathBuf::from).collect();
    let mut configured = Vec::new();
    read_configuration(Path::new("/etc/ld.so.conf"), &mut configured, &mut 0);
    let told = std::env::var_os("LD_LIBRARY_PATH").map(|value| directories(value.as_bytes(), program));

    let mut found = Libraries { files: vec![loader.clone()], directories: Vec::new() };
    let mut known: BTreeSet<Vec<u8>> = loader.file_name().map(|name| name.as_bytes().to_vec()).into_iter().collect();
    // Whose libraries are still to be found, with the DT_RPATHs of those that brought them in.
    let mut waiting = vec![(program.to_path_buf(), executable.needed.clone(), search(program, executable))];
    while let Some((from, needed, (rpath, runpath))) = waiting.pop() {
        for name in needed {
            if !known.insert(name.clone()) {
                continue;
            }
            let own = [rpath.as_slice(), told.as_deref().unwrap_or_default(), &runpath].concat();
            let places: Vec<PathBuf> = match name.contains(&b'/') {
                true => vec![PathBuf::from("/")],
                false => [own.as_slice(), &configured, &usual].concat(),
            };
            let library = places.iter().find_map(|place| {
                let path = place.join(OsStr::from_bytes(&name));
                let library = Executable::library(&path).filter(|library| library.is_64 == executable.is_64)?;
                Some((path, place.clone(), library))
            });
            let Some((path, place, library)) = library else {
                return Err(missing(&from, &name, &places));
            };
            // $ORIGIN leads elsewhere in the guest, and there is no cache of what is configured.
            if !usual.contains(&place) && !found.directories.contains(&place) && !name.contains(&b'/') {
                found.directories.push(place);
            }
            let (more, runpath) = search(&path, &library);
            waiting.push((path.clone(), library.needed, ([rpath.as_slice(), &more].concat(), runpath)));
            found.files.push(path);
        }
    }
    found.files[1..].sort();
    Ok(found)
}

/// The directories of DT_RPATH and DT_RUNPATH.
fn search(file: &Path, executable: &Executable) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let of = |paths: &Option<Vec<u8>>| directories(paths.as_deref().unwrap_or_default(), file);
    (of(&executable.rpath), of(&executable.runpath))
}

/// A list of directories, with `$ORIGIN` put in; relative ones have no meaning in the guest and are left out.
fn directories(list: &[u8], file: &Path) -> Vec<PathBuf> {
    let origin = fs::canonicalize(file).ok().and_then(|file| file.parent().map(Path::to_path_buf)).unwrap_or_default();
    let mut all = Vec::new();
    for part in list.split(|byte| matches!(byte, b':' | b';')) {
        let rest = part.strip_prefix(b"$ORIGIN").or_else(|| part.strip_prefix(b"${ORIGIN}"));
        let directory = match rest {
            Some(rest) => [origin.as_os_str().as_bytes(), rest].concat(),
            None => part.to_vec(),
        };
        let directory = PathBuf::from(OsStr::from_bytes(&directory));
        if let Some(directory) = directory.is_absolute().then(|| fs::canonicalize(directory).ok()).flatten() {
            all.push(directory);
        }
    }
    all
}

/// The directories of `/etc/ld.so.conf` and of what it includes; one that cannot be read has none.
fn read_configuration(file: &Path, into: &mut Vec<PathBuf>, files: &mut usize) {
    *files += 1;
    let Ok(text) = fs::read_to_string(file) else { return };
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        match line.strip_prefix("include").filter(|rest| rest.starts_with([' ', '\t'])) {
            Some(pattern) if *files < MAX_INCLUDES => {
                for file in matching(&file.with_file_name("").join(pattern.trim())) {
                    read_configuration(&file, into, files);
                }
            }
            Some(_) => {}
            None if line.starts_with('/') => into.push(PathBuf::from(line)),
            None => {}
        }
    }
}

/// The files of a pattern with one `*` in its last component, in order.
fn matching(pattern: &Path) -> Vec<PathBuf> {
    let name = pattern.file_name().unwrap_or_default().as_bytes();
    let Some(star) = name.iter().position(|&byte| byte == b'*') else {
        return vec![pattern.to_path_buf()];
    };
    let (start, end) = (&name[..star], &name[star + 1..]);
    let entries = pattern.parent().and_then(|directory| fs::read_dir(directory).ok());
    let mut files: Vec<PathBuf> = entries.into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.retain(|file| {
        let name = file.file_name().unwrap_or_default().as_bytes();
        name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
    });
    files.sort();
    files
}
