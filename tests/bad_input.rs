//! Bad input: one clear line that says what to do, the right exit code, never a panic.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

const USAGE: i32 = 64;
const UNAVAILABLE: i32 = 69;

fn trapline(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_trapline"))
        .arg("run")
        .args(arguments)
        // A bound, should something boot that must not.
        .args(if arguments.contains(&"--timeout") { &[][..] } else { &["--timeout", "20s"] })
        .stdin(Stdio::null())
        .output()
        .expect("trapline starts")
}

/// The error line, after checking that it is the only one and that the exit code is right.
#[track_caller]
fn refused(arguments: &[&str], code: i32) -> String {
    let output = trapline(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{arguments:?}: {stderr}");
    assert!(stderr.starts_with("trapline: "), "{stderr}");
    assert!(output.stdout.is_empty(), "{arguments:?}");
    stderr
}

/// As [`refused`], with a word that the line must contain: what to do or what is wrong.
#[track_caller]
fn refused_saying(arguments: &[&str], code: i32, word: &str) {
    let line = refused(arguments, code);
    assert!(line.contains(word), "{arguments:?}: '{word}' is not in: {line}");
}

fn file(directory: &TempDir, name: &str, content: &[u8]) -> String {
    let path = directory.path().join(name);
    fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn numbers_out_of_range() {
    refused_saying(&["--cpus", "0"], USAGE, "from 1 to 64");
    refused_saying(&["--cpus", "10000"], USAGE, "from 1 to 64");
    refused_saying(&["--memory", "1"], USAGE, "such as 256M");
    refused_saying(&["--memory", "99999999999999G"], USAGE, "such as 256M");
    refused_saying(&["--memory", "2000001"], USAGE, "256M");
    refused_saying(&["--timeout", "soon"], USAGE, "such as 500ms");
}

#[test]
fn options_that_do_not_exist_or_fit() {
    refused_saying(&["--frobnicate"], USAGE, "--frobnicate");
    refused_saying(&["--wait"], USAGE, "--gdb");
    refused_saying(&["--gdb", "here"], USAGE, ":1234");
    refused_saying(&["--gdb", ":99999"], USAGE, "65535");
    refused_saying(&["--gdb", "0.0.0.0:0"], USAGE, "--gdb-expose");
    refused_saying(&["--gdb", "unix:/nonexistent/socket"], USAGE, "mkdir");
    refused_saying(&["--console", "printer"], USAGE, "stdio, none or file:PATH");
    refused_saying(&["--console", "file:/nonexistent/console"], USAGE, "another file");
    refused_saying(&["--boot-protocol", "bzimage"], USAGE, "not a bzImage");
}

#[test]
fn files_that_cannot_be_read() {
    refused_saying(&["/nonexistent/vmlinux"], USAGE, "check the path");
    refused_saying(&["/"], USAGE, "directory");
    refused_saying(&["--initrd", "/nonexistent/initrd"], USAGE, "check the path");
}

#[test]
fn kernels_that_are_none() {
    let directory = TempDir::new().unwrap();
    refused_saying(&[&file(&directory, "empty", b"")], USAGE, "empty");
    refused_saying(&[&file(&directory, "text", b"#!/bin/sh\nexit 0\n")], USAGE, "bzImage");
    // An ELF, but a program of this machine: it wants an operating system.
    let line = refused(&[env!("CARGO_BIN_EXE_trapline")], USAGE);
    assert!(line.contains("ELF"), "{line}");
}

#[test]
fn truncated_and_random_kernels_of_each_format() {
    let directory = TempDir::new().unwrap();
    let kernels = [
        ("demo", trapline_guests::demo().to_vec()),
        ("multiboot32", trapline_guests::formats::multiboot32().to_vec()),
        ("multiboot64", trapline_guests::formats::multiboot64().to_vec()),
        ("pvh", trapline_guests::formats::pvh().to_vec()),
        ("bzimage", bzimage()),
    ];
    for (name, kernel) in kernels {
        for length in [4, 52, 100, 600, 1100, kernel.len() / 2] {
            let path = file(&directory, name, &kernel[..length.min(kernel.len() - 1)]);
            refused(&[&path], USAGE);
        }
        // The magic is right and all the rest is noise.
        let mut noise = kernel.clone();
        let keep = if name == "bzimage" { 0x206 } else { 20 };
        for (n, byte) in noise.iter_mut().enumerate().skip(keep) {
            *byte = (n as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3];
        }
        refused(&[&file(&directory, name, &noise)], USAGE);
    }
}

/// The header of a bzImage, which promises more than there is.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 0x4000];
    image[0x1f1] = 31; // setup_sects
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&[0x0f, 0x02]); // version 2.15
    image
}

#[test]
fn an_initrd_larger_than_memory() {
    let directory = TempDir::new().unwrap();
    let path = file(&directory, "initrd", b"");
    fs::File::options().write(true).open(&path).unwrap().set_len(1 << 30).unwrap();
    refused_saying(&["--memory", "64M", "--initrd", &path], USAGE, "--memory");
}

#[test]
fn a_command_line_that_is_too_long() {
    refused_saying(&["--cmdline", &"x".repeat(100_000)], USAGE, "--cmdline");
}

#[test]
fn an_occupied_port() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!(":{}", taken.local_addr().unwrap().port());
    refused_saying(&["--gdb", &address], UNAVAILABLE, "in use");
}

#[test]
fn a_socket_path_that_is_a_file_is_not_touched() {
    let directory = TempDir::new().unwrap();
    let path = file(&directory, "precious", b"precious");
    refused_saying(&["--gdb", &format!("unix:{path}")], USAGE, "no socket");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

#[test]
fn no_permission_on_dev_kvm() {
    // As root every file may be opened; somebody else has to try.
    let program = Path::new(env!("CARGO_BIN_EXE_trapline"));
    let directory = TempDir::new_in("/tmp").unwrap();
    let copy = directory.path().join("trapline");
    // By another process: a test beside this one that forks while we have the copy open for
    // writing would keep it busy ("Text file busy").
    assert!(Command::new("cp").arg(program).arg(&copy).status().expect("cp").success());
    fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let is_root = rustix::process::geteuid().is_root();
    for args in [&["run", "--timeout", "20s"][..], &["doctor"], &["doctor", "--json"]] {
        let mut command = if is_root {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&copy);
            command
        } else {
            Command::new(&copy)
        };
        let output = command.args(args).stdin(Stdio::null()).output().expect("trapline starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        if !Path::new("/dev/kvm").exists() {
            assert!(stderr.contains("/dev/kvm does not exist"), "{stderr}");
            assert_eq!(output.status.code(), Some(UNAVAILABLE));
        } else if is_root {
            assert!(stderr.contains("no permission to open /dev/kvm"), "{stderr}");
            assert_eq!(output.status.code(), Some(UNAVAILABLE));
            assert!(output.stdout.is_empty());
        } else if args[0] == "doctor" && output.status.success() {
            continue;
        }
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}
