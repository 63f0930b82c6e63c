//! `trapline doctor`, as people and scripts see it.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use trapline_vmm::probe;

/// The command, with a cache of its own below `home` or, without, with nowhere to put one.
fn doctor(home: Option<&Path>, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trapline"));
    command.arg("doctor").args(args).env_remove("XDG_CACHE_HOME").env_remove("HOME").stdin(Stdio::null());
    if let Some(home) = home {
        command.env("HOME", home);
    }
    command
}

#[track_caller]
fn succeeds(mut command: Command) -> String {
    let Output { status, stdout, stderr } = command.output().expect("trapline starts");
    let stderr = String::from_utf8_lossy(&stderr);
    assert_eq!(status.code(), Some(0), "{stderr}");
    assert_eq!(stderr, "");
    String::from_utf8(stdout).expect("UTF-8")
}

fn cache_of(home: &Path) -> std::path::PathBuf {
    home.join(format!(".cache/trapline/capabilities-{}.json", probe::SCHEMA))
}

#[test]
fn a_table_for_people() {
    let home = TempDir::new().unwrap();
    let text = succeeds(doctor(Some(home.path()), &[]));
    for line in text.lines() {
        assert!(line.chars().count() <= 80 && line == line.trim_end(), "{line}");
        assert!(!line.contains('\x1b'), "{line}");
    }
    for expected in ["claimed", "seen", "served by", "Breakpoints\n", "  kernel code ", "Single-step\n"] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    assert!(text.ends_with("\nA debugger is usable here.\n"), "{text}");
    // What the library says is in it, here and on every other KVM.
    let host = probe::capabilities().unwrap();
    assert!(text.starts_with(&host.host.module), "{text}");
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for broken in host.broken_claims() {
        assert!(words.contains(&format!("{}: {}", broken.claim, broken.what)), "{broken:?}: {text}");
    }
    let never = text.lines().filter(|line| line.contains("writes of kernel code") && line.contains("NEVER")).count();
    assert_eq!(never, usize::from(host.seen.w_data == probe::Slot::Never), "{text}");
}

#[test]
fn json_for_machines_is_the_librarys_answer() {
    let home = TempDir::new().unwrap();
    let mut printed: Value = serde_json::from_str(&succeeds(doctor(Some(home.path()), &["--json"]))).expect("JSON");
    let answer = probe::capabilities().unwrap();
    let object = printed.as_object_mut().expect("an object");
    assert_eq!(object.remove("usable"), Some(answer.is_usable().into()));
    assert_eq!(object.remove("broken_claims"), Some(serde_json::to_value(answer.broken_claims()).unwrap()));
    let gap = object.remove("guest_dr_gap_ms").expect("told");
    match answer.seen.gd_exit {
        probe::DrAccess::Exits => assert_eq!(gap, 0),
        probe::DrAccess::Never => assert_eq!(gap, trapline_vmm::limits::LOOK_INTERVAL.as_millis() as u64),
        _ => assert_eq!(gap, Value::Null),
    }
    assert_eq!(printed["schema"], probe::SCHEMA);
    assert_eq!(printed, serde_json::to_value(&answer).unwrap());
    let cached: Value = serde_json::from_slice(&fs::read(cache_of(home.path())).unwrap()).expect("JSON");
    assert_eq!(cached["answers"], printed);
    let program = cached["program"].as_str().expect("who asked");
    assert!(program.starts_with(concat!(env!("CARGO_PKG_VERSION"), " ")), "{program}");
}

#[test]
fn a_cache_that_is_wrong_or_cannot_be_written_is_no_error() {
    let home = TempDir::new().unwrap();
    let cache = cache_of(home.path());
    let good = succeeds(doctor(Some(home.path()), &["--json"]));
    let cached = fs::read_to_string(&cache).unwrap();
    // The doctor does not believe what somebody wrote there.
    for wrong in ["", "{", "[]", &cached[..cached.len() / 2], &cached.replace("fires", "never")] {
        fs::write(&cache, wrong).unwrap();
        assert_eq!(succeeds(doctor(Some(home.path()), &["--json"])), good);
        assert_eq!(fs::read_to_string(&cache).unwrap(), cached);
    }
    // A folder in its place; a file in place of its folder; nowhere at all.
    fs::remove_file(&cache).unwrap();
    fs::create_dir_all(cache.join("x")).unwrap();
    assert_eq!(succeeds(doctor(Some(home.path()), &["--json"])), good);
    let file = home.path().join("file");
    fs::write(&file, "").unwrap();
    assert_eq!(succeeds(doctor(Some(&file), &["--json"])), good);
    assert_eq!(succeeds(doctor(Some(Path::new("/proc")), &["--json"])), good);
    assert_eq!(succeeds(doctor(None, &["--json"])), good);
    let mut elsewhere = doctor(Some(&file), &["--json"]);
    elsewhere.env("XDG_CACHE_HOME", home.path().join("elsewhere"));
    assert_eq!(succeeds(elsewhere), good);
    assert!(home.path().join("elsewhere/trapline").is_dir());
}

#[test]
fn many_at_once_agree() {
    let home = TempDir::new().unwrap();
    let start = || doctor(Some(home.path()), &["--json"]).stdout(Stdio::piped()).spawn().expect("trapline starts");
    let children: Vec<_> = (0..4).map(|_| start()).collect();
    let outputs: Vec<_> = children.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    for output in &outputs {
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&outputs[0].stdout));
    }
    let left: Vec<_> = fs::read_dir(cache_of(home.path()).parent().unwrap()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn a_reader_that_goes_away_and_a_full_disk() {
    let mut child = doctor(None, &[]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("trapline starts");
    drop(child.stdout.take());
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!((child.wait().unwrap().code(), stderr.as_str()), (Some(0), ""));
    let full = File::options().write(true).open("/dev/full").unwrap();
    let Output { status, stderr, .. } = doctor(None, &[]).stdout(full).output().unwrap();
    let stderr = String::from_utf8_lossy(&stderr);
    assert_ne!(status.code(), Some(0));
    assert!(stderr.starts_with("trapline: cannot write to stdout") && stderr.lines().count() == 1, "{stderr}");
}

#[test]
fn bad_options_are_one_line() {
    let output = doctor(None, &["--jason"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), stderr.lines().count()), (Some(64), 1), "{stderr}");
    assert!(output.stdout.is_empty());
}
