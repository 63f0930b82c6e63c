//! The answers of an earlier run, in a file of the user's. Whatever is wrong with it, it is as if it were not there.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Capabilities, HostIdentity, SCHEMA};

/// Far more than the answers take.
const MAX_FILE: u64 = 1 << 20;

/// What the probe is made of. Another one may ask in another way, and hears another answer.
const SOURCES: [(&str, &[u8]); 14] = [
    ("alarm.rs", include_bytes!("alarm.rs")),
    ("bench.rs", include_bytes!("bench.rs")),
    ("broken.rs", include_bytes!("broken.rs")),
    ("cache.rs", include_bytes!("cache.rs")),
    ("capabilities.rs", include_bytes!("capabilities.rs")),
    ("guests.rs", include_bytes!("guests.rs")),
    ("host.rs", include_bytes!("host.rs")),
    ("mod.rs", include_bytes!("mod.rs")),
    ("questions/exits.rs", include_bytes!("questions/exits.rs")),
    ("questions/guest_own.rs", include_bytes!("questions/guest_own.rs")),
    ("questions/inject.rs", include_bytes!("questions/inject.rs")),
    ("questions/mod.rs", include_bytes!("questions/mod.rs")),
    ("questions/slots.rs", include_bytes!("questions/slots.rs")),
    ("questions/step.rs", include_bytes!("questions/step.rs")),
];

/// What the file holds.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    /// Who has asked: [`program`].
    program: String,
    answers: Capabilities,
}

/// The version of this program and of its probe: answers that another one was given are none.
fn program() -> String {
    // FNV-1a.
    let hash = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    let probe = SOURCES.iter().flat_map(|(_, source)| *source).fold(0xcbf2_9ce4_8422_2325, hash);
    format!("{} {probe:016x}", env!("CARGO_PKG_VERSION"))
}

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
    let Kept { program: asked_by, answers } = serde_json::from_str(&text).ok()?;
    (answers.schema == SCHEMA && answers.host == *host && asked_by == program()).then_some(answers)
}

/// Written beside and renamed, so that a reader sees the old or the new, and never half of one.
fn save_to(path: &Path, capabilities: &Capabilities) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(folder)?;
    let mut text = serde_json::to_vec_pretty(&Kept { program: program(), answers: capabilities.clone() })?;
    text.push(b'\n');
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&text)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    fn recorded() -> Capabilities {
        serde_json::from_str(include_str!("../../../tests/doctor/svm.json")).unwrap()
    }

    fn saved() -> (TempDir, PathBuf, Capabilities) {
        let (folder, answers) = (TempDir::new().unwrap(), recorded());
        let file = folder.path().join("not/yet/there.json");
        save_to(&file, &answers).unwrap();
        (folder, file, answers)
    }

    #[test]
    fn what_was_saved_is_found() {
        let (_folder, file, answers) = saved();
        assert_eq!(load_from(&file, &answers.host), Some(answers));
        let beside: Vec<_> = fs::read_dir(file.parent().unwrap()).unwrap().collect();
        assert_eq!(beside.len(), 1, "{beside:?}");
    }

    #[test]
    fn another_hosts_answers_are_none() {
        let (_folder, file, answers) = saved();
        let same = answers.host;
        let mut parameters = same.parameters.clone();
        parameters.insert("kvm_amd.npt".to_owned(), "0".to_owned());
        for other in [
            HostIdentity { kernel: "6.1.0 #2".to_owned(), ..same.clone() },
            HostIdentity { module: "kvm_intel".to_owned(), ..same.clone() },
            HostIdentity { cpu_vendor: String::new(), ..same.clone() },
            HostIdentity { cpu_model: "1/2/3".to_owned(), ..same.clone() },
            HostIdentity { cpu_name: String::new(), ..same.clone() },
            HostIdentity { microcode: "0x1".to_owned(), ..same.clone() },
            HostIdentity { parameters, ..same.clone() },
        ] {
            assert_eq!(load_from(&file, &other), None, "{other:?}");
        }
        assert!(load_from(&file, &same).is_some());
    }

    #[test]
    fn another_programs_answers_are_none() {
        let (_folder, file, answers) = saved();
        let (version, probe) = program().split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
        assert_eq!(version, env!("CARGO_PKG_VERSION"));
        for other in [String::new(), version.clone(), format!("{version}.1 {probe}"), format!("{version} 0{probe}")] {
            let kept = Kept { program: other, answers: answers.clone() };
            fs::write(&file, serde_json::to_string(&kept).unwrap()).unwrap();
            assert_eq!(load_from(&file, &answers.host), None, "{:?}", kept.program);
        }
        // What builds before this one have written: the answers alone.
        fs::write(&file, serde_json::to_string(&answers).unwrap()).unwrap();
        assert_eq!(load_from(&file, &answers.host), None);
    }

    #[test]
    fn all_of_the_probe_counts() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/probe");
        let mut there = Vec::new();
        for below in ["", "questions/"] {
            let files = fs::read_dir(folder.join(below)).unwrap().map(|entry| entry.unwrap().file_name());
            let names = files.map(|name| format!("{below}{}", name.to_str().unwrap()));
            there.extend(names.filter(|name| name.ends_with(".rs")));
        }
        there.sort();
        assert_eq!(SOURCES.map(|(name, _)| name.to_owned()).to_vec(), there);
        for (name, source) in SOURCES {
            assert_eq!(fs::read(folder.join(name)).unwrap(), source, "{name}");
        }
    }

    #[test]
    fn an_older_or_newer_form_is_none() {
        let (_folder, file, answers) = saved();
        save_to(&file, &Capabilities { schema: SCHEMA + 1, ..answers.clone() }).unwrap();
        assert_eq!(load_from(&file, &answers.host), None);
        let text = serde_json::to_string(&Kept { program: program(), answers: answers.clone() }).unwrap();
        for (from, to) in [
            ("\"program\":\"", "\"program\":\"0"),
            ("\"answers\":", "\"capabilities\":"),
            ("\"x_cpl0\":\"fires\",", ""),
            ("\"x_cpl0\":", "\"x_cpl9\":"),
            ("\"x_cpl0\":\"fires\"", "\"x_cpl0\":\"sometimes\""),
            ("\"x_cpl0\":\"fires\"", "\"x_cpl0\":\"fires\",\"y\":1"),
        ] {
            assert!(text.contains(from));
            fs::write(&file, text.replacen(from, to, 1)).unwrap();
            assert_eq!(load_from(&file, &answers.host), None, "{to}");
        }
        fs::write(&file, text).unwrap();
        assert!(load_from(&file, &answers.host).is_some());
    }

    #[test]
    fn what_is_no_file_is_none() {
        let (folder, file, answers) = saved();
        assert_eq!(load_from(folder.path(), &answers.host), None);
        assert_eq!(load_from(&folder.path().join("nowhere"), &answers.host), None);
        assert_eq!(load_from(Path::new("/dev/zero"), &answers.host), None);
        // A file where a folder should be.
        assert!(save_to(&file.join("below.json"), &answers).is_err());
        // Far too large, and valid up to there.
        let mut text = serde_json::to_string(&answers).unwrap();
        text.push_str(&" ".repeat(MAX_FILE as usize));
        text.push('x');
        fs::write(&file, text).unwrap();
        let _ = load_from(&file, &answers.host);
    }

    #[test]
    fn the_folder_is_where_the_specification_puts_it() {
        let os = |text: &str| Some(OsString::from(text));
        assert_eq!(folder(os("/x"), os("/home/u")), Some("/x".into()));
        assert_eq!(folder(None, os("/home/u")), Some("/home/u/.cache".into()));
        for none in ["", "relative", "./x"] {
            assert_eq!(folder(os(none), os("/home/u")), Some("/home/u/.cache".into()));
            assert_eq!(folder(None, os(none)), None);
        }
        assert_eq!(folder(None, None), None);
    }

    #[test]
    fn a_reader_never_sees_half_of_it() {
        let (_folder, file, answers) = saved();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let writers: Vec<_> =
                (0..3).map(|_| scope.spawn(|| (0..50).for_each(|_| save_to(&file, &answers).unwrap()))).collect();
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(load_from(&file, &answers.host).as_ref(), Some(&answers));
                }
            });
            for writer in writers {
                writer.join().unwrap();
            }
            done.store(true, Ordering::Relaxed);
        });
    }

    proptest! {
        #[test]
        fn a_damaged_file_is_no_error(at in any::<prop::sample::Index>(), bytes in prop::collection::vec(any::<u8>(), 0..8), cut: bool) {
            let (_folder, file, answers) = saved();
            let mut text = fs::read(&file).unwrap();
            let at = at.index(text.len());
            let end = if cut { text.len() } else { text.len().min(at + bytes.len()) };
            text.splice(at..end, bytes);
            fs::write(&file, text).unwrap();
            if let Some(loaded) = load_from(&file, &answers.host) {
                prop_assert_eq!((loaded.schema, loaded.host), (SCHEMA, answers.host));
            }
        }

        #[test]
        fn any_bytes_are_no_error(bytes: Vec<u8>) {
            let (_folder, file, answers) = saved();
            fs::write(&file, bytes).unwrap();
            prop_assert_eq!(load_from(&file, &answers.host), None);
        }
    }
}
