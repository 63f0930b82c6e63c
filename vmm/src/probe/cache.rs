//! The answers of an earlier run, in a file of the user's. Whatever is wrong with it, it is as if it were not there.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::{Capabilities, HostIdentity, SCHEMA};

/// Far more than the answers take.
const MAX_FILE: u64 = 1 << 20;

/// The cached answers about `host`.
pub(super) fn load(host: &HostIdentity) -> Option<Capabilities> {
    load_from(&file()?, host)
}

/// Keeps the answers for later.
pub(super) fn save(capabilities: &Capabilities) {
    let Some(file) = file() else { return };
    if let Err(error) = save_to(&file, capabilities) {
        tracing::debug!(file = %file.display(), %error, "what this host can do is not cached");
    }
}

fn file() -> Option<PathBuf> {
    let folder = folder(env::var_os("XDG_CACHE_HOME"), env::var_os("HOME"))?;
    Some(folder.join("trapline").join(format!("capabilities-{SCHEMA}.json")))
}

/// The XDG base directory specification: a relative path is to be ignored.
fn folder(xdg: Option<OsString>, home: Option<OsString>) -> Option<PathBuf> {
    let absolute = |path: Option<OsString>| path.map(PathBuf::from).filter(|path| path.is_absolute());
    absolute(xdg).or_else(|| Some(absolute(home)?.join(".cache")))
}

fn load_from(path: &Path, host: &HostIdentity) -> Option<Capabilities> {
    // A FIFO in its place must not be waited for.
    if !fs::metadata(path).ok()?.is_file() {
        return None;
    }
    let mut text = String::new();
    File::open(path).ok()?.take(MAX_FILE).read_to_string(&mut text).ok()?;
    let cached: Capabilities = serde_json::from_str(&text).ok()?;
    (cached.schema == SCHEMA && cached.host == *host).then_some(cached)
}

/// Written beside and renamed, so that a reader sees the old or the new, and never half of one.
fn save_to(path: &Path, capabilities: &Capabilities) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(folder)?;
    let mut text = serde_json::to_vec_pretty(capabilities)?;
    text.push(b'\n');
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&text)?;
    file.persist(path)?;
    Ok(())
}
