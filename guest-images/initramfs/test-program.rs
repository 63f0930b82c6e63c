//! A static program for a guest that runs one: `test-program WORD [ARG]...`. Compiled by `guest-images/fetch-debian`.
//!
//!   exit N         ends with status N
//!   kill N         is killed by signal N
//!   lines N        prints N long lines, and nothing after the last
//!   system         checks what a program may expect of the system it runs on, a line for each
//!   tap            a TAP report of which one test fails; status 1
//!   acts REQUEST   writes REQUEST to /proc/trapline_acts (guest-images/module)
//!   nap N          sleeps for half a minute, and ends with status N
//!   sleep          for good

use std::ffi::c_int;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, exit};
use std::thread::sleep;
use std::time::{Duration, Instant};

const ACTS: &str = "/proc/trapline_acts";
/// Status of a check that failed.
const FAILED: i32 = 1;
const USAGE: i32 = 64;

unsafe extern "C" {
    fn raise(signal: c_int) -> c_int;
    fn fork() -> c_int;
    fn _exit(status: c_int) -> !;
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["exit", status] => exit(number(status)),
        // SAFETY: no handlers are installed.
        ["kill", signal] => _ = unsafe { raise(number(signal)) },
        ["lines", count] => lines(number(count)),
        ["system"] => system(),
        ["tap"] => tap(),
        ["acts", request] => acts(request),
        ["nap", status] => {
            println!("test-program: napping");
            sleep(Duration::from_secs(30));
            exit(number(status))
        }
        ["sleep"] => loop {
            sleep(Duration::from_secs(3600));
        },
        _ => {
            eprintln!("test-program: {words:?}? see its source");
            exit(USAGE)
        }
    }
}

fn number(text: &str) -> i32 {
    text.parse().unwrap_or_else(|_| {
        eprintln!("test-program: '{text}' is no number");
        exit(USAGE)
    })
}

fn lines(count: i32) {
    let mut out = io::stdout().lock();
    for n in 1..=count {
        let _ = writeln!(out, "line {n} {:-<60}", "");
    }
}

fn tap() {
    println!("TAP version 13\n1..4\nok 1 - opens\nnot ok 2 - reads\n# expected 3, got 4");
    println!("ok 3 - writes # SKIP there is no disk\nok 4 - closes");
    exit(FAILED)
}

fn acts(request: &str) {
    match OpenOptions::new().write(true).open(ACTS).and_then(|mut file| file.write_all(request.as_bytes())) {
        Ok(()) => println!("test-program: {request} is done"),
        Err(error) => {
            println!("test-program: {ACTS}: {error}");
            exit(FAILED)
        }
    }
}

/// Each check says its name and how it went.
fn system() {
    let checks: [(&str, fn() -> io::Result<bool>); 9] = [
        ("proc", || Ok(fs::read_to_string("/proc/self/stat")?.contains("test-program"))),
        ("sys", || Ok(Path::new("/sys/kernel/mm").is_dir())),
        ("null", || Ok(File::open("/dev/null")?.read(&mut [0])? == 0)),
        ("fds", || Ok(Path::new("/dev/fd/0").exists() && Path::new("/dev/stdout").exists())),
        ("tmp", || fs::write("/tmp/file", "x").map(|()| true)),
        ("run", || fs::write("/run/file", "x").map(|()| true)),
        ("loopback", loopback),
        ("environment", environment),
        ("orphans", orphans),
    ];
    let mut failed = false;
    for (name, check) in checks {
        let outcome = check();
        failed |= !matches!(outcome, Ok(true));
        println!("system {name}: {outcome:?}");
    }
    if failed {
        exit(FAILED)
    }
}

fn loopback() -> io::Result<bool> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    TcpStream::connect(listener.local_addr()?)?.write_all(b"x")?;
    Ok(listener.accept()?.0.read(&mut [0; 2])? == 1)
}

fn environment() -> io::Result<bool> {
    let is = |name: &str, value: &str| std::env::var(name).is_ok_and(|found| found.contains(value));
    // The last comes from the kernel's command line.
    Ok(is("PATH", "/usr/bin") && is("HOME", "/root") && is("TERM", "linux") && is("TRAPLINE_TEST", "boot"))
}

/// A grandchild whose parent has ended ends in its turn, and somebody waits for it.
fn orphans() -> io::Result<bool> {
    let mut middle = Command::new("/proc/self/exe");
    // SAFETY: between fork and exec the child does system calls only.
    unsafe {
        middle.pre_exec(|| {
            // The orphan goes on to run the program, its parent ends.
            if fork() > 0 {
                _exit(0);
            }
            Ok(())
        })
    };
    middle.args(["exit", "3"]).spawn()?.wait()?;
    let end = Instant::now() + Duration::from_secs(60);
    while Instant::now() < end {
        let mut zombies = 0;
        for entry in fs::read_dir("/proc")?.flatten() {
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            zombies += usize::from(stat.contains("(test-program) Z") || stat.contains("(exe) Z"));
        }
        if zombies == 0 {
            return Ok(true);
        }
        sleep(Duration::from_millis(100));
    }
    Ok(false)
}
