//! Runs that nobody watches, as a CI job starts them: arguments in, exit code, lines and files out.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// The demo guest under `trapline WORD`, with these options.
fn trapline(word: &str, options: &[&str]) -> Output {
    let bound: &[&str] = match word {
        "run" if options.contains(&"--timeout") => &["--memory", "64M"],
        "run" => &["--timeout", "60s", "--memory", "64M"],
        _ => &[],
    };
    Command::new(env!("CARGO_BIN_EXE_trapline"))
        .arg(word)
        .args(bound)
        .args(options)
        .stdin(Stdio::null())
        .output()
        .expect("trapline starts")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn ends(options: &[&str], code: i32, says: &str) -> String {
    let output = trapline("run", options);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{options:?}: {said}");
    assert!(said.contains(says), "{options:?}: {said}");
    said
}

/// Names in a directory, those of hidden files too.
fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn exit_codes_are_the_contract() {
    ends(&["--cmdline", "quiet ticks=3", "--trap", "exec:tick =log"], 0, "");
    ends(&["--cmdline", "quiet ticks=3 exit=5"], 1, "status 5");
    ends(&["--cmdline", "quiet", "--trap", "exec:tick"], 3, "exec:tick: vCPU 0 at tick");
    ends(&["--cmdline", "quiet", "--timeout", "300ms", "--trap", "exec:print_progress"], 5, "still running");
    ends(&["--cmdline", "quiet ticks=3", "--trap", "exec:print_progress must-hit"], 7, "exec:print_progress");
}

#[test]
fn bad_rules_are_shown_with_a_caret_and_all_at_once() {
    let said = ends(&["--trap", "exec:tick =explode"], 64, "`=explode` is no action");
    assert!(said.contains("\n    exec:tick =explode\n              ^~~~~~~~\n"), "{said}");
    let said = ends(&["--trap", "exec:no_such", "--trap", "write:neither", "--trap", "exec:tick"], 64, "no_such");
    assert!(
        said.contains("`neither`") && said.lines().filter(|line| line.starts_with("trapline: ")).count() == 2,
        "{said}"
    );
}

#[test]
fn bad_toml_is_shown_by_line_and_column() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("traps.toml");
    let traps = file.to_str().unwrap();
    for (text, says) in [
        ("[[trap]]\nrule = \"exec:tick\"\ncolour = 1\n", "traps.toml:3:1: unknown field `colour`"),
        ("[[trap]]\nrule = \"exec:tick if $raxx\"\n", "traps.toml:2:22: `$raxx` is no register"),
        ("[[trap\n", "traps.toml:1:"),
    ] {
        fs::write(&file, text).unwrap();
        let said = ends(&["--traps", traps], 64, says);
        assert!(said.contains('^'), "{said}");
    }
    ends(&["--traps", "/no/such/traps.toml"], 64, "cannot read the traps in /no/such/traps.toml");
    fs::write(&file, "[[trap]]\nrule = \"exec:tick\"\nname = \"the third tick\"\ncount = 3\n").unwrap();
    ends(&["--cmdline", "quiet", "--traps", traps], 3, "the third tick");
}

#[test]
fn places_that_cannot_be_written_are_found_before_the_guest_runs() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "kept").unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    for options in [
        ["--report", &path("file")],
        ["--report", &path("file/below")],
        ["--junit", &path("no/such/junit.xml")],
        ["--vmcore", &path("file/core")],
        ["--vmcore", dir.path().to_str().unwrap()],
    ] {
        let output = trapline("run", &options);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(64), "{options:?}: {said}");
        assert_eq!((said.lines().count(), output.stdout.len()), (1, 0), "{options:?}: {said}");
        assert!(said.contains("cannot write") && said.contains(dir.path().to_str().unwrap()), "{said}");
    }
    assert_eq!((names(dir.path()), fs::read_to_string(&file).unwrap().as_str()), (vec!["file".to_owned()], "kept"));
}

/// Runs a command where `dir` is a file system of so many bytes. Needs the right to mount, its own or in a
/// user namespace.
fn on_a_small_disk(dir: &Path, size: &str, options: &[&str]) -> Output {
    let script =
        "mount -t tmpfs -o size=$1 tmpfs \"$2\" || exit 99; shift 2; \"$@\"; code=$?; ls -A \"$DIR\"; exit $code";
    let root = rustix::process::geteuid().is_root();
    Command::new("unshare")
        .args(if root { &["-m"][..] } else { &["-r", "-m"][..] })
        .args(["sh", "-c", script, "sh", size])
        .arg(dir)
        .arg(env!("CARGO_BIN_EXE_trapline"))
        .args(["run", "--timeout", "60s", "--memory", "64M", "--console", "none"])
        .args(options)
        .env("DIR", dir)
        .stdin(Stdio::null())
        .output()
        .expect("unshare starts")
}

#[test]
fn a_full_disk_costs_the_core_and_nothing_else() {
    let dir = TempDir::new().unwrap();
    let at = dir.path().to_str().unwrap();
    let output = on_a_small_disk(dir.path(), "120k", &["--cmdline", "quiet", "--trap", "exec:tick", "--report", at]);
    let (said, left) = (stderr(&output), String::from_utf8_lossy(&output.stdout).into_owned());
    assert_eq!(output.status.code(), Some(3), "the verdict is the trap's: {said}");
    let lines: Vec<&str> = said.lines().filter(|line| line.contains("no room for the core")).collect();
    assert_eq!(lines.len(), 1, "{said}");
    assert!(left.contains("report.json") && !left.contains("vmcore") && !left.contains(".trapline"), "{left}");

    // A run that is well, and whose report is not there: that is no pass.
    let output = on_a_small_disk(dir.path(), "8k", &["--cmdline", "quiet ticks=3", "--report", at]);
    assert_eq!(output.status.code(), Some(69), "{}", stderr(&output));
    assert!(stderr(&output).contains("the disk is full"), "{}", stderr(&output));
    assert!(!String::from_utf8_lossy(&output.stdout).contains(".trapline"));
}

#[test]
fn a_plan_says_what_would_serve_each_trap() {
    let output = trapline("plan", &["--trap", "exec:tick", "--trap", "write:rounds_published", "--trap", "hang:5s"]);
    let table = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{table}");
    let line = |what: &str| table.lines().find(|line| line.trim_start().starts_with(what)).unwrap_or_default();
    assert!(line("tick").ends_with("slot"), "{table}");
    assert!(line("rounds_published").contains("8 bytes"), "{table}");
    assert!(line("a vCPU without progress").ends_with("vmm"), "{table}");

    let output = trapline("plan", &["--json", "--trap", "exec:count_up =log"]);
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(plan["traps"][0]["action"], "log");
    assert_eq!(plan["traps"][0]["targets"][0]["what"], "count_up");
    assert_eq!(trapline("plan", &["--trap", "exec:no_such"]).status.code(), Some(64));
}

#[test]
fn a_trap_that_holds_the_guest_waits_for_gdb() {
    let dir = TempDir::new().unwrap();
    let socket = dir.path().join("gdb");
    let mut child = Command::new(env!("CARGO_BIN_EXE_trapline"))
        .args(["run", "--timeout", "60s", "--memory", "64M", "--console", "none", "--cmdline", "quiet"])
        .args(["--trap", "exec:tick count=3 =gdb", "--gdb", &format!("unix:{}", socket.display())])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("stands there until a debugger") {
        assert_ne!(lines.read_line(&mut said).unwrap(), 0, "{said}");
    }
    assert!(said.contains("exec:tick count=3 =gdb: vCPU 0 at tick"), "{said}");
    let elf = dir.path().join("demo.elf");
    fs::write(&elf, trapline_guests::demo()).unwrap();
    let gdb = Command::new("gdb")
        .args(["-nx", "-q", "-batch"])
        .arg(&elf)
        .args(["-ex", &format!("target remote {}", socket.display())])
        .args(["-ex", "p jiffies", "-ex", "p $pc == tick", "-ex", "hbreak tick", "-ex", "continue"])
        .args(["-ex", "p jiffies", "-ex", "kill"])
        .stdin(Stdio::null())
        .output()
        .expect("gdb starts");
    let printed = String::from_utf8_lossy(&gdb.stdout);
    assert!(printed.contains("$1 = 2") && printed.contains("$2 = 1"), "it stands at the third tick: {printed}");
    assert!(printed.contains("$3 = 3"), "and goes on from there: {printed}");
    let status = child.wait().unwrap();
    let _ = lines.read_to_string(&mut said);
    assert_eq!(status.code(), Some(0), "{said}");
}

#[test]
fn junit_is_written_on_its_own_too() {
    let dir = TempDir::new().unwrap();
    let junit = dir.path().join("out.xml");
    let at = junit.to_str().unwrap();
    ends(&["--cmdline", "quiet", "--trap", "exec:tick", "--trap", "exec:count_up =ignore", "--junit", at], 3, "");
    let text = fs::read_to_string(&junit).unwrap();
    assert!(text.contains("<failure") && text.contains("exec:tick") && text.contains("exec:count_up"), "{text}");
    assert_eq!(names(dir.path()), ["out.xml"]);
}
