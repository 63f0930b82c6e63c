//! What is known of the kernel, put together from its file and from those that were given.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::btf::{Btf, View};
use super::bzimage::BzImage;
use super::dwarf::Dwarf;
use super::elf::Elf;
use super::error::SymbolsError;
use super::file::Bytes;
use super::slide::Fingerprint;
use super::table::Table;
use super::types::{Place, Step, walk};
use super::{DEBUG_DIRECTORY, Sources, kallsyms, system_map};

/// The kernel's symbols, by addresses as linked.
#[derive(Debug, Default)]
pub(super) struct Kernel {
    pub(super) table: Table,
    /// What is booted, or a vmlinux that holds the same.
    pub(super) image: Option<Arc<Elf>>,
    /// Debug information: the image's own or that of a file beside it.
    pub(super) dwarf: Option<Dwarf>,
    btf: OnceLock<Option<Btf>>,
    /// Of the image: from its lowest to its highest address.
    pub(super) range: Range<u64>,
    pub(super) fingerprint: Fingerprint,
    pub(super) release: Option<String>,
    pub(super) build_id: Option<Vec<u8>>,
    /// Why there is no table.
    pub(super) nothing: Option<String>,
    /// Modules' files that were given.
    modules: Vec<Arc<Elf>>,
    /// Directories that were given.
    directories: Vec<PathBuf>,
    debug_dirs: Vec<PathBuf>,
    module_index: OnceLock<Vec<(String, PathBuf)>>,
    /// The bzImage that is booted, until something is known that has what is in it.
    packed: Option<(PathBuf, Bytes)>,
    /// Where the table came from, if not from the image.
    table_file: Option<PathBuf>,
}

impl Kernel {
    pub(super) fn open(sources: &Sources<'_>) -> Result<Self, SymbolsError> {
        let mut kernel = Kernel { debug_dirs: sources.debug_dirs.to_vec(), ..Kernel::default() };
        if kernel.debug_dirs.is_empty() {
            kernel.debug_dirs.push(PathBuf::from(DEBUG_DIRECTORY));
        }
        if let Some(path) = sources.kernel {
            kernel.add_kernel(path)?;
        }
        for path in sources.symbols {
            kernel.add_symbols(path)?;
        }
        kernel.add_installed();
        kernel.unpack()?;
        kernel.add_debug_file();
        kernel.take_kallsyms();
        kernel.finish();
        Ok(kernel)
    }

    fn add_kernel(&mut self, path: &Path) -> Result<(), SymbolsError> {
        let bytes = map(path)?;
        if !is_elf(&bytes) {
            match BzImage::parse(&bytes) {
                None => self.nothing = Some(format!("{} is neither ELF nor a bzImage", path.display())),
                Some(Err(why)) => self.nothing = Some(format!("{}: {why}", path.display())),
                Some(Ok(image)) => {
                    self.release = image.release().map(str::to_owned);
                    self.packed = Some((path.to_owned(), bytes));
                }
            }
            return Ok(());
        }
        match Elf::parse(path, Arc::new(bytes)) {
            Ok(elf) => self.take(&Arc::new(elf)),
            Err(error) => self.nothing = Some(error.to_string()),
        }
        Ok(())
    }

    fn add_symbols(&mut self, path: &Path) -> Result<(), SymbolsError> {
        if path.is_dir() {
            self.directories.push(path.to_owned());
            return Ok(());
        }
        let bytes = map(path)?;
        if is_elf(&bytes) {
            let elf = Arc::new(Elf::parse(path, Arc::new(bytes))?);
            if elf.relocatable {
                self.modules.push(elf);
                return Ok(());
            }
            self.same_build(&elf)?;
            if !elf.has_symbols() && !elf.has_dwarf() {
                let why = "has neither a symbol table nor debug information; give the file before it was stripped";
                return Err(SymbolsError::bad(path, why));
            }
            self.take(&elf);
        } else if system_map::is_one(&bytes) {
            let table = system_map::parse(path, &bytes)?;
            if self.table.is_empty() {
                self.table = table;
                self.table_file = Some(path.to_owned());
            }
        } else {
            return Err(SymbolsError::bad(path, "neither ELF (vmlinux, its debug file, a module) nor System.map"));
        }
        Ok(())
    }

    fn same_build(&self, elf: &Elf) -> Result<(), SymbolsError> {
        if let Some((kernel, bytes)) = &self.packed
            && let Some(Ok(image)) = BzImage::parse(bytes)
            && let Some(banner) = banner_in(elf)
            && !image.is_of(&banner)
        {
            return Err(SymbolsError::OtherKernel {
                path: elf.path().to_owned(),
                theirs: banner.trim_end().to_owned(),
                kernel: kernel.clone(),
                ours: image.version.unwrap_or_default(),
            });
        }
        match &self.image {
            Some(image) if differ(elf, image) => Err(other_kernel(elf, image)),
            _ => Ok(()),
        }
    }

    /// Takes what `elf` has and was not had before.
    fn take(&mut self, elf: &Arc<Elf>) {
        if elf.has_symbols() && self.table.is_empty() {
            self.table = elf.table();
            self.table_file = Some(elf.path().to_owned());
        }
        if self.dwarf.is_none() {
            self.dwarf = Dwarf::of(elf);
        }
        // A file with debug information only has no contents.
        if self.image.is_none() && elf.has_image() {
            self.image = Some(Arc::clone(elf));
        }
        if self.build_id.is_none() {
            self.build_id = elf.build_id().map(<[u8]>::to_vec);
        }
    }

    /// Looks for the vmlinux of a bzImage where distributions install it with its debug information.
    fn add_installed(&mut self) {
        let (Some(release), true, None) = (self.release.clone(), self.packed.is_some(), &self.image) else { return };
        // It comes from the file.
        if release.contains('/') || release.starts_with('.') {
            return;
        }
        let places = [
            format!("boot/vmlinux-{release}"),
            format!("lib/modules/{release}/vmlinux"),
            format!("usr/lib/modules/{release}/vmlinux"),
        ];
        let found = self.debug_dirs.iter().flat_map(|directory| places.iter().map(|place| directory.join(place)));
        for path in found.collect::<Vec<_>>() {
            let Ok(bytes) = Bytes::map(&path) else { continue };
            let Ok(elf) = Elf::parse(&path, Arc::new(bytes)) else { continue };
            if elf.has_symbols() && self.same_build(&elf).is_ok() {
                self.take(&Arc::new(elf));
                return;
            }
        }
    }

    /// Unpacks a bzImage, if no file was given that has what is in it.
    fn unpack(&mut self) -> Result<(), SymbolsError> {
        let Some((path, bytes)) = self.packed.take().filter(|_| self.image.is_none()) else { return Ok(()) };
        let Some(Ok(image)) = BzImage::parse(&bytes) else { return Ok(()) };
        let unpacked = image.unpack().and_then(|unpacked| {
            Elf::parse(&path, Arc::new(Bytes::Owned(unpacked))).map_err(|error| format!("in the bzImage is {error}"))
        });
        let elf = match unpacked {
            Ok(elf) => Arc::new(elf),
            Err(why) => {
                self.nothing = Some(format!("{}: {why}", path.display()));
                return Ok(());
            }
        };
        self.take(&elf);
        let other = self.dwarf.as_ref().map(Dwarf::elf).filter(|debug| differ(debug, &elf));
        match other {
            Some(other) => Err(other_kernel(other, &elf)),
            None => Ok(()),
        }
    }

    /// Reads the symbol table that the kernel carries in its data, if there is no better one.
    fn take_kallsyms(&mut self) {
        let Some(elf) = self.image.clone().filter(|_| self.table.is_empty()) else { return };
        let range = elf.range();
        let mut places = elf.sections().iter().filter(|section| section.alloc && !section.is_code());
        match places.find_map(|section| kallsyms::find(elf.contents(section), section.address, &range)) {
            Some(lines) => {
                self.table = system_map::table(lines.iter().map(|line| (line.0, line.1, line.2.as_str())), Some(&elf));
                self.table_file = Some(elf.path().to_owned());
            }
            None => {
                self.nothing = Some(format!(
                    "{} is stripped, and no kallsyms were found in it: was it built with CONFIG_KALLSYMS?",
                    elf.path().display()
                ));
            }
        }
    }

    /// Looks where distributions put the file with the debug information, if none was given.
    fn add_debug_file(&mut self) {
        let Some(image) = self.image.clone().filter(|_| self.dwarf.is_none() || self.table.is_empty()) else { return };
        let ours = image.build_id().map(<[u8]>::to_vec);
        for path in debug_files(&image, &self.debug_dirs) {
            let Ok(bytes) = Bytes::map(&path) else { continue };
            let Ok(elf) = Elf::parse(&path, Arc::new(bytes)) else { continue };
            // Without a build-id it is the name alone that says so, as with gdb.
            if ours.as_deref() == elf.build_id() && (elf.has_dwarf() || elf.has_symbols()) {
                self.take(&Arc::new(elf));
                return;
            }
        }
    }

    /// Works out what follows from what was read.
    fn finish(&mut self) {
        let named = |name: &str| self.table.named(name).map(|entry| entry.address).next();
        self.range = match (named("_text"), named("_end")) {
            (Some(text), Some(end)) if text < end => text..end,
            _ => {
                let elf = self.image.as_ref().or(self.dwarf.as_ref().map(Dwarf::elf));
                elf.map_or_else(|| self.table.span(), |elf| elf.range())
            }
        };
        let banner = named("linux_banner");
        self.fingerprint = Fingerprint::new(banner, self.image.as_deref());
        let banner = banner.and_then(|address| self.image.as_ref()?.linked(address));
        self.release = banner.and_then(release_of).or(self.release.take());
    }

    /// The kernel's BTF, if it has any.
    pub(super) fn btf(&self) -> Option<View<'_>> {
        let bytes = self.image.as_ref()?.data(".BTF");
        Some(self.btf.get_or_init(|| Btf::parse(bytes)).as_ref()?.on(bytes))
    }

    /// A member of a type.
    pub(super) fn field(&self, type_name: &str, steps: &[Step]) -> Option<Place> {
        if let Some(btf) = self.btf()
            && let Some(id) = btf.named(type_name)
        {
            return walk(&btf, id, type_name, steps).ok();
        }
        let reader = self.dwarf.as_ref()?.reader();
        let id = reader.type_named(type_name)?;
        walk(&reader, id, type_name, steps).ok()
    }

    /// The file of a module that was given, by the module's name.
    pub(super) fn module_file(&self, name: &str) -> Option<Arc<Elf>> {
        self.modules.iter().find(|elf| super::modules::is_file_of(elf.path(), name)).cloned()
    }

    pub(super) fn debug_dirs(&self) -> &[PathBuf] {
        &self.debug_dirs
    }

    /// The directories that were given.
    pub(super) fn directories(&self) -> &[PathBuf] {
        &self.directories
    }

    /// All modules' files that can be found, by the module's name; looked for once.
    pub(super) fn module_index(&self) -> &[(String, PathBuf)] {
        self.module_index.get_or_init(|| self.find_module_files())
    }

    pub(super) fn files(&self) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = self.table_file.iter().cloned().collect();
        files.extend(self.dwarf.as_ref().map(|dwarf| dwarf.elf().path().to_owned()));
        files.extend(self.modules.iter().map(|elf| elf.path().to_owned()));
        files.dedup();
        files
    }
}

fn map(path: &Path) -> Result<Bytes, SymbolsError> {
    Bytes::map(path).map_err(|error| SymbolsError::open(path, error))
}

/// Whether both have a build-id, and not the same.
fn differ(a: &Elf, b: &Elf) -> bool {
    a.build_id().zip(b.build_id()).is_some_and(|(a, b)| a != b)
}

fn other_kernel(file: &Elf, kernel: &Elf) -> SymbolsError {
    let id = |elf: &Elf| format!("build-id {}", hex(elf.build_id().unwrap_or_default()));
    SymbolsError::OtherKernel {
        path: file.path().to_owned(),
        theirs: id(file),
        kernel: kernel.path().to_owned(),
        ours: id(kernel),
    }
}

fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF")
}

/// Where the debug file of `elf` may be, the likeliest first.
pub(super) fn debug_files(elf: &Elf, debug_dirs: &[PathBuf]) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    if let Some((first, rest)) = elf.build_id().and_then(<[u8]>::split_first) {
        let name = format!(".build-id/{:02x}/{}.debug", first, hex(rest));
        paths.extend(debug_dirs.iter().map(|directory| directory.join(&name)));
    }
    let directory = elf.path().parent().unwrap_or(Path::new("."));
    // Only its file name: it comes from the file.
    if let Some(name) = elf.debuglink().and_then(|name| Path::new(name).file_name()) {
        paths.push(directory.join(name));
        paths.push(directory.join(".debug").join(name));
        if let Ok(directory) = fs::canonicalize(directory) {
            let inside = directory.strip_prefix("/").unwrap_or(&directory);
            paths.extend(debug_dirs.iter().map(|debug| debug.join(inside).join(name)));
        }
    }
    let mut beside = elf.path().as_os_str().to_owned();
    beside.push(".debug");
    paths.push(PathBuf::from(beside));
    paths
}

/// What a vmlinux says when it boots.
fn banner_in(elf: &Elf) -> Option<String> {
    let text = elf.linked(elf.address_of("linux_banner")?)?.split(|&byte| byte == 0).next()?;
    Some(String::from_utf8_lossy(text).into_owned())
}

/// The release in `Linux version RELEASE (..`.
fn release_of(banner: &[u8]) -> Option<String> {
    let rest = banner.strip_prefix(b"Linux version ")?;
    let release = rest.split(|&byte| byte == b' ' || byte == 0).next()?;
    std::str::from_utf8(release).ok().filter(|release| release.len() < 256).map(str::to_owned)
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
