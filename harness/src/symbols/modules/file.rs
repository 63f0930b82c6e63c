//! A module's file: finding it, and putting its sections where the guest has them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{LoadedModule, name_of, same_name};
use crate::symbols::elf::Elf;
use crate::symbols::file::Bytes;
use crate::symbols::kernel::{Kernel, debug_files, hex};

/// Directories are gone through no deeper than this.
const DEPTH: u32 = 12;

/// So many files are looked at in all.
const MOST_FILES: usize = 200_000;

/// A section is believed to be where most symbols say, if so many of them agree: three of four.
const AGREE: (usize, usize) = (3, 4);

impl Kernel {
    /// The module's file with its sections where the guest has them, if one is found that fits.
    pub(super) fn file_of(&self, loaded: &LoadedModule) -> Option<Arc<Elf>> {
        let given = self.module_file(&loaded.name).into_iter();
        let found = self.module_paths(loaded).into_iter().filter_map(|path| {
            let bytes = Bytes::map(&path).ok()?;
            Elf::parse(&path, Arc::new(bytes)).ok().filter(|elf| elf.relocatable).map(Arc::new)
        });
        given.chain(found).find_map(|elf| {
            let differs = |(ours, theirs): (&[u8], &Vec<u8>)| ours != theirs.get(..ours.len()).unwrap_or_default();
            if elf.build_id().zip(loaded.build_id.as_ref()).is_some_and(differs) {
                return None;
            }
            let elf = if elf.has_dwarf() { elf } else { self.with_debug_file(&elf).unwrap_or(elf) };
            let places = places(&elf, loaded)?;
            elf.placed(&places).map(Arc::new)
        })
    }

    /// The file with the debug information of a module's file.
    fn with_debug_file(&self, elf: &Elf) -> Option<Arc<Elf>> {
        debug_files(elf, self.debug_dirs()).into_iter().find_map(|path| {
            let debug = Elf::parse(&path, Arc::new(Bytes::map(&path).ok()?)).ok()?;
            let same =
                debug.build_id() == elf.build_id() && debug.relocatable && debug.has_dwarf() && debug.has_symbols();
            same.then(|| Arc::new(debug))
        })
    }

    /// Where the module's file may be.
    fn module_paths(&self, loaded: &LoadedModule) -> Vec<PathBuf> {
        let mut paths = Vec::new();
        if let Some((first, rest)) = loaded.build_id.as_deref().and_then(<[u8]>::split_first) {
            let name = format!(".build-id/{first:02x}/{}.debug", hex(rest));
            paths.extend(self.debug_dirs().iter().map(|directory| directory.join(&name)));
        }
        let index = self.module_index();
        let named = index.iter().filter(|(name, _)| same_name(name, &loaded.name));
        paths.extend(named.map(|(_, path)| path.clone()));
        paths
    }

    /// All modules' files in the directories that were given and where distributions put them.
    pub(in crate::symbols) fn find_module_files(&self) -> Vec<(String, PathBuf)> {
        let mut roots: Vec<PathBuf> = self.directories().to_vec();
        if let Some(release) =
            self.release.as_deref().filter(|release| !release.contains('/') && !release.starts_with('.'))
        {
            let debug = self.debug_dirs().iter();
            roots.extend(debug.clone().map(|directory| directory.join("lib/modules").join(release)));
            roots.extend(debug.map(|directory| directory.join("usr/lib/modules").join(release)));
            roots.push(Path::new("/lib/modules").join(release));
        }
        let mut found = Vec::new();
        for root in roots {
            collect(&root, DEPTH, &mut found);
        }
        found
    }
}

fn collect(directory: &Path, depth: u32, found: &mut Vec<(String, PathBuf)>) {
    let (Some(depth), Ok(entries)) = (depth.checked_sub(1), fs::read_dir(directory)) else { return };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        if found.len() >= MOST_FILES {
            return;
        }
        match (name_of(&path), path.symlink_metadata()) {
            (_, Ok(metadata)) if metadata.is_dir() => collect(&path, depth, found),
            (Some(name), Ok(_)) => found.push((name.to_owned(), path)),
            _ => {}
        }
    }
}

/// Where each of the file's sections is in the guest, by the symbols that are in both. None if they contradict each
/// other, or have nothing in common.
fn places(elf: &Elf, loaded: &LoadedModule) -> Option<HashMap<usize, u64>> {
    // A name that several symbols have says nothing.
    let mut guest: HashMap<&str, Option<u64>> = HashMap::new();
    for symbol in loaded.symbols.iter() {
        guest.entry(&symbol.name).and_modify(|address| *address = None).or_insert(Some(symbol.address));
    }
    let mut file: HashMap<String, Option<(usize, u64)>> = HashMap::new();
    elf.each_in_section(|name, section, value| {
        file.entry(name.to_owned()).and_modify(|place| *place = None).or_insert(Some((section, value)));
    });
    let mut votes: HashMap<usize, HashMap<u64, usize>> = HashMap::new();
    for (name, place) in &file {
        if let (Some((section, value)), Some(Some(address))) = (place, guest.get(name.as_str())) {
            *votes.entry(*section).or_default().entry(address.wrapping_sub(*value)).or_default() += 1;
        }
    }
    let mut places = HashMap::new();
    for (section, votes) in votes {
        let all: usize = votes.values().sum();
        let (base, most) = votes.into_iter().max_by_key(|&(base, count)| (count, base))?;
        if most.saturating_mul(AGREE.1) < all.saturating_mul(AGREE.0) {
            return None;
        }
        places.insert(section, base);
    }
    (!places.is_empty()).then_some(places)
}
