//! How a run ends when nobody is there: the guest's doing, and the exit code that is the contract.

use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};

use tempfile::NamedTempFile;

/// Runs the guest of many acts on two vCPUs with `input` at its console.
fn act(cmdline: &str, input: &[u8], options: &[&str]) -> Output {
    let mut kernel = NamedTempFile::new().unwrap();
    kernel.write_all(trapline_guests::acts()).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_trapline"))
        .args(["run", "--cpus", "2", "--memory", "32M", "--cmdline", cmdline])
        // A bound against hanging; where the timeout is the point, it is given.
        .args(if options.contains(&"--timeout") { &[][..] } else { &["--timeout", "60s"] })
        .args(options)
        .arg(kernel.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("trapline starts");
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || {
        // The guest may end before it has read all of it.
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().expect("trapline ends");
    writer.join().unwrap();
    output
}

#[track_caller]
fn ends(cmdline: &str, code: i32, says: &str) {
    let output = act(cmdline, b"", &[]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{cmdline}: {stderr}{}", String::from_utf8_lossy(&output.stdout));
    assert!(stderr.contains(says), "{cmdline}: {stderr}");
    assert!(stderr.lines().count() <= 1, "{cmdline}: {stderr}");
}

#[test]
fn the_exit_port() {
    ends("run=exit exit=0", 0, "");
    ends("run=exit exit=7", 1, "status 7");
    ends("run=exit exit=3 cpu=1", 1, "status 3");
}

#[test]
fn power_off_and_reset() {
    for way in ["reset-i8042", "reset-cf9", "reset-acpi", "off-acpi"] {
        ends(&format!("run={way}"), 0, "");
    }
}

#[test]
fn a_panic_that_pvpanic_reports() {
    ends("run=panic", 4, "panicked");
    ends("run=crash-loaded cpu=1", 4, "panicked");
}

#[test]
fn deaths() {
    ends("run=triple", 6, "triple fault");
    ends("run=triple cpu=1", 6, "triple fault");
    ends("run=fetch-hole", 6, "guest died");
}

#[test]
fn a_guest_that_does_nothing_any_more_is_timed_out() {
    for way in ["hang", "sleep"] {
        let output = act(&format!("run={way}"), b"", &["--timeout", "2s"]);
        assert_eq!(output.status.code(), Some(5), "{way}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("still running after 2s"));
    }
}

#[test]
fn the_console_takes_every_byte_of_a_pipe_in_both_directions() {
    // More than all queues on the way hold. ^D and q end the guest, so they come last.
    let input: Vec<u8> = (0..20_000).map(|n| b"abcdefghijklmnoprstuvwxyz\x01 \n"[n % 28]).collect();
    let output = act("run=echo exit=0", &[input.clone(), b"q".to_vec()].concat(), &[]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    // The guest ends its lines as terminals want them.
    let echoed: Vec<u8> = output.stdout.into_iter().filter(|&byte| byte != b'\r').collect();
    let at = echoed.windows(27).position(|bytes| bytes == &input[..27]).expect("the echo begins");
    assert!(echoed[at..].starts_with(&input), "bytes were lost or changed");
}

#[test]
fn the_console_goes_where_it_is_told() {
    let file = NamedTempFile::new().unwrap();
    let target = format!("file:{}", file.path().display());
    let output = act("run=flood lines=200 exit=0", b"", &["--console", &target]);
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stdout.is_empty());
    let written = fs::read_to_string(file.path()).unwrap();
    assert!(written.lines().count() >= 200, "{written}");
    let silent = act("run=flood lines=20 exit=0", b"", &["--console", "none"]);
    assert_eq!(silent.status.code(), Some(0));
    assert!(silent.stdout.is_empty());
}

#[test]
fn a_guest_that_pokes_at_everything_harms_nobody() {
    for (way, seed) in [("ports", 1), ("ports", 2), ("mmio", 1)] {
        let output = act(&format!("run={way} seed={seed} count=1000 exit=0"), b"", &[]);
        let code = output.status.code();
        // A random port may well be one that ends the machine.
        assert!(matches!(code, Some(0..=6)), "{way} {seed}: {code:?} {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn stdin_may_be_a_file_or_nothing_at_all() {
    let mut input = NamedTempFile::new().unwrap();
    input.write_all(b"hello\nq").unwrap();
    let mut kernel = NamedTempFile::new().unwrap();
    kernel.write_all(trapline_guests::acts()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_trapline"));
    command.args(["run", "--memory", "32M", "--timeout", "60s", "--cmdline", "run=echo exit=0"]).arg(kernel.path());
    let output = command.stdin(fs::File::open(input.path()).unwrap()).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&output.stdout).contains("hello"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_trapline"));
    let output =
        command.args(["run", "--timeout", "60s", "--cmdline", "ticks=2"]).stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
}
