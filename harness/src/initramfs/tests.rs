//! What comes out is read back: by the system's cpio, and by a reader of our own where that says too little.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use proptest::prelude::*;
use tempfile::TempDir;

use super::cpio::{Archive, Contents, Node, S_IFDIR, S_IFLNK, S_IFREG};
use super::*;

const S_IFIFO: u32 = 0o010_000;
const S_IFBLK: u32 = 0o060_000;

/// One entry of an archive, as it is there.
#[derive(Debug, Clone, PartialEq)]
struct Entry {
    inode: u32,
    mode: u32,
    owner: (u32, u32),
    links: u32,
    time: u32,
    device: (u32, u32),
    contents: Vec<u8>,
}

/// Reads "newc" by its description, and insists on all of it.
fn entries(bytes: &[u8]) -> Vec<(String, Entry)> {
    let mut all = Vec::new();
    let mut at = 0;
    loop {
        assert_eq!(&bytes[at..at + 6], b"070701", "no header at {at}");
        let field = |n: usize| {
            let text = std::str::from_utf8(&bytes[at + 6 + 8 * n..][..8]).unwrap();
            u32::from_str_radix(text, 16).unwrap()
        };
        assert_eq!(field(12), 0, "checksum");
        let (size, name_size) = (field(6) as usize, field(11) as usize);
        let name = &bytes[at + 110..][..name_size];
        let name = String::from_utf8(name.strip_suffix(b"\0").unwrap().to_vec()).unwrap();
        let start = (at + 110 + name_size).next_multiple_of(4);
        let entry = Entry {
            inode: field(0),
            mode: field(1),
            owner: (field(2), field(3)),
            links: field(4),
            time: field(5),
            device: (field(9), field(10)),
            contents: bytes[start..start + size].to_vec(),
        };
        at = (start + size).next_multiple_of(4);
        if name == "TRAILER!!!" {
            assert_eq!(at, bytes.len());
            return all;
        }
        all.push((name, entry));
    }
}

fn written(initramfs: &Initramfs) -> Vec<u8> {
    let mut bytes = Vec::new();
    let len = initramfs.write_to(&mut bytes).unwrap();
    assert_eq!(len, bytes.len() as u64);
    bytes
}

fn read_back(initramfs: &Initramfs) -> BTreeMap<String, Entry> {
    entries(&written(initramfs)).into_iter().collect()
}

fn file(dir: &Path, name: &str, contents: &[u8], mode: u32) -> PathBuf {
    let path = dir.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, contents).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    path
}

/// A directory with one of each kind that needs no root.
fn sample() -> TempDir {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    // Made in no order.
    file(root, "usr/bin/tool", trapline_guests::init(), 0o755);
    file(root, "a.b", b"one", 0o640);
    file(root, "a/z", b"", 0o600);
    fs::hard_link(root.join("a.b"), root.join("a/second name")).unwrap();
    fs::hard_link(root.join("a.b"), root.join("0")).unwrap();
    symlink("usr/bin", root.join("bin")).unwrap();
    symlink("/nowhere", root.join("dangling")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, root.join("fifo"), 0o600.into()).unwrap();
    fs::set_permissions(root.join("a"), fs::Permissions::from_mode(0o1777)).unwrap();
    dir
}

#[test]
fn a_directory_comes_back_as_it_is() {
    let dir = sample();
    let found = read_back(&Initramfs::rootfs(dir.path()).unwrap());
    let names: Vec<_> = found.keys().map(String::as_str).collect();
    let expected = [
        "0",
        "a",
        "a.b",
        "a/second name",
        "a/z",
        "bin",
        "dangling",
        "dev",
        "dev/console",
        "fifo",
        "usr",
        "usr/bin",
        "usr/bin/tool",
    ];
    assert_eq!(names, expected);
    assert_eq!(found["a"].mode, S_IFDIR | 0o1777);
    assert_eq!(found["fifo"].mode, S_IFIFO | 0o600);
    assert_eq!((found["bin"].mode & 0o170_000, found["bin"].contents.as_slice()), (S_IFLNK, b"usr/bin".as_slice()));
    assert_eq!(found["dev/console"].device, (5, 1));
    assert_eq!(found["usr/bin/tool"].contents, trapline_guests::init());
    assert!(found.values().all(|entry| entry.time == 0 && entry.owner == (0, 0)), "{found:?}");
    // Three names of one file: the last holds it.
    let named = ["0", "a.b", "a/second name"].map(|name| &found[name]);
    assert!(named.iter().all(|entry| entry.links == 3 && entry.inode == named[0].inode), "{named:?}");
    assert_eq!(named.map(|entry| entry.contents.as_slice()), [b"".as_slice(), b"", b"one"]);
    let of_others =
        found.iter().filter(|(name, entry)| entry.inode == named[0].inode && !name.contains(['0', 'b', ' ']));
    assert_eq!(of_others.count(), 0);
}

/// The directories come before what is in them, as the kernel needs it.
#[test]
fn directories_come_first() {
    let mut archive = Archive::default();
    for path in ["b/c/d", "/b/a", "a-b", "a/b"] {
        archive.put(path.as_bytes(), Node::bytes(vec![1], 0o644)).unwrap();
    }
    let mut bytes = Vec::new();
    archive.write_to(&mut bytes).unwrap();
    let names: Vec<_> = entries(&bytes).into_iter().map(|(name, _)| name).collect();
    for (n, name) in names.iter().enumerate() {
        if let Some((parent, _)) = name.rsplit_once('/') {
            assert!(names[..n].iter().any(|earlier| earlier == parent), "{name} comes before {parent}: {names:?}");
        }
    }
}

#[test]
fn equal_input_gives_equal_archives() {
    let (one, two) = (sample(), sample());
    let bytes = |dir: &TempDir| written(&Initramfs::rootfs(dir.path()).unwrap());
    assert_eq!(bytes(&one), bytes(&two));
}

/// Runs the system's cpio over an archive. `None` where there is none.
fn cpio(arguments: &[&str], archive: &[u8], dir: &Path) -> Option<String> {
    let mut command = Command::new("cpio");
    command.args(arguments).current_dir(dir).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("not compared: there is no cpio here");
            return None;
        }
        other => other.unwrap(),
    };
    let mut input = child.stdin.take().unwrap();
    let archive = archive.to_vec();
    let feeder = std::thread::spawn(move || input.write_all(&archive));
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(!said.contains("cpio:"), "{said}");
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn the_systems_cpio_extracts_it() {
    let dir = sample();
    let mut initramfs = Initramfs::rootfs(dir.path()).unwrap();
    // Devices can be made by root alone; their listing is below.
    initramfs.archive.remove(b"dev/console");
    let out = TempDir::new().unwrap();
    if cpio(&["-i", "-d", "--no-preserve-owner"], &written(&initramfs), out.path()).is_none() {
        return;
    }
    let compared =
        Command::new("diff").arg("-r").arg("--no-dereference").args([dir.path(), out.path()]).output().unwrap();
    let said = String::from_utf8_lossy(&compared.stdout);
    // diff cannot compare FIFOs, and there is one more directory.
    let differences: Vec<_> = said.lines().filter(|line| !line.contains("fifo") && !line.ends_with(": dev")).collect();
    assert!(differences.is_empty(), "{said}");
    let inode = |name: &str| std::os::unix::fs::MetadataExt::ino(&fs::metadata(out.path().join(name)).unwrap());
    assert_eq!((inode("0"), inode("0")), (inode("a.b"), inode("a/second name")));
    let mode = |name: &str| fs::metadata(out.path().join(name)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("a"), mode("a.b"), mode("usr/bin/tool")), (0o1777, 0o640, 0o755));
}

#[test]
fn the_systems_cpio_lists_devices_and_owners() {
    let mut archive = Archive::default();
    let special = |mode, device, (uid, gid)| Node { mode, uid, gid, device, contents: Contents::None, shared: None };
    archive.put(b"/dev/console", Node::character(0o600, 5, 1)).unwrap();
    archive.put(b"/dev/disk", special(S_IFBLK | 0o660, (253, 17), (0, 6))).unwrap();
    archive.put(b"pipe", special(S_IFIFO | 0o622, (0, 0), (1000, 4_000_000_000))).unwrap();
    let mut bytes = Vec::new();
    archive.write_to(&mut bytes).unwrap();
    let Some(listing) = cpio(&["-t", "-v", "-n"], &bytes, Path::new("/")) else { return };
    let words: Vec<Vec<&str>> = listing.lines().map(|line| line.split_whitespace().collect()).collect();
    let of = |name: &str| words.iter().find(|line| line.last() == Some(&name)).unwrap_or_else(|| panic!("{listing}"));
    assert_eq!(of("dev/console")[..6], ["crw-------", "1", "0", "0", "5,", "1"]);
    assert_eq!(of("dev/disk")[..6], ["brw-rw----", "1", "0", "6", "253,", "17"]);
    assert_eq!(of("pipe")[..4], ["prw--w--w-", "1", "1000", "4000000000"]);
}

#[test]
fn init_finds_the_program_and_its_arguments() {
    let dir = TempDir::new().unwrap();
    let program = file(dir.path(), "my test", trapline_guests::init(), 0o600);
    let initramfs = Initramfs::exec(&program, ["-x", "", "two words"]).unwrap();
    let found = read_back(&initramfs);
    assert_eq!(found["lib/trapline/command"].contents, b"/bin/my test\0/bin/my test\0-x\0\0two words\0");
    assert!(found["lib/trapline/environment"].contents.starts_with(b"PATH="));
    assert_eq!((found["init"].mode, found["init"].contents.as_slice()), (S_IFREG | 0o755, trapline_guests::init()));
    assert_eq!(found["bin/my test"].mode, S_IFREG | 0o755);
    assert!(["dev/console", "proc", "sys", "tmp", "run", "root"].iter().all(|name| found.contains_key(*name)));
    assert_eq!(initramfs.origin(), format!("exec {} -x  two words", program.display()));
    assert_eq!(initramfs.notes(), [""; 0]);
    let mut in_file = Vec::new();
    std::io::Read::read_to_end(&mut initramfs.to_file().unwrap(), &mut in_file).unwrap();
    assert_eq!(in_file, written(&initramfs));
}

/// This very test is dynamic, where the C library is.
#[test]
fn a_dynamic_program_brings_its_libraries() {
    let program = std::env::current_exe().unwrap();
    let Some(interpreter) = Executable::of_host(&program).unwrap().interpreter else { return };
    let initramfs = Initramfs::exec(&program, [""; 0]).unwrap();
    let interpreter = String::from_utf8(interpreter).unwrap();
    assert!(initramfs.contains(&interpreter), "no {interpreter}");
    let [note] = initramfs.notes() else { panic!("{:?}", initramfs.notes()) };
    // What the system's loader says it would load.
    let listed = Command::new(&interpreter).arg("--list").arg(&program).output().unwrap();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let paths: Vec<&str> =
        listed.lines().filter_map(|line| line.split_once("=> ")?.1.split_whitespace().next()).collect();
    assert!(paths.iter().any(|path| path.contains("libc.so")), "{listed}");
    for path in paths {
        assert!(initramfs.contains(path) && note.contains(path), "{path} is not packed: {note}");
    }
}

#[test]
fn libraries_are_found_by_runpath() {
    let dir = TempDir::new().unwrap();
    let source = |name: &str, text: &str| file(dir.path(), name, text.as_bytes(), 0o644);
    let cc = |arguments: &[&str]| {
        let made = Command::new("cc").args(arguments).current_dir(dir.path()).status();
        assert!(made.unwrap().success(), "{arguments:?}");
    };
    source("inner.c", "int inner(void) { return 1; }");
    source("outer.c", "int inner(void); int outer(void) { return inner(); }");
    source("main.c", "int outer(void); int main(void) { return outer(); }");
    fs::create_dir(dir.path().join("lib")).unwrap();
    cc(&["-shared", "-fPIC", "-o", "lib/libinner.so", "inner.c"]);
    cc(&["-shared", "-fPIC", "-o", "lib/libouter.so", "outer.c", "-Llib", "-linner", "-Wl,-rpath,$ORIGIN"]);
    let link = ["-o", "main", "main.c", "-Llib", "-louter", "-Wl,--allow-shlib-undefined", "-Wl,-rpath-link,lib"];
    cc(&[link.as_slice(), &["-Wl,-rpath,$ORIGIN/lib"]].concat());
    let initramfs = Initramfs::exec(&dir.path().join("main"), [""; 0]).unwrap();
    let lib = fs::canonicalize(dir.path()).unwrap().join("lib");
    for name in ["libinner.so", "libouter.so"] {
        assert!(initramfs.contains(lib.join(name).to_str().unwrap()), "{:?}", initramfs.notes());
    }
    let environment = String::from_utf8(read_back(&initramfs)["lib/trapline/environment"].contents.clone()).unwrap();
    assert!(environment.contains(&format!("\0LD_LIBRARY_PATH={}\0", lib.display())), "{environment:?}");

    // Without the runpath it is nowhere.
    cc(&link);
    let error = Initramfs::exec(&dir.path().join("main"), [""; 0]).unwrap_err().to_string();
    assert!(error.contains("needs libouter.so, which is in none of"), "{error}");
}

fn refused(path: &Path) -> String {
    Initramfs::exec(path, [""; 0]).unwrap_err().to_string()
}

#[test]
fn what_is_no_program_is_refused_with_words() {
    let dir = TempDir::new().unwrap();
    let elf = |name: &str, at: usize, value: u8| {
        let mut bytes = trapline_guests::init().to_vec();
        bytes[at] = value;
        file(dir.path(), name, &bytes, 0o755)
    };
    let cases = [
        (dir.path().to_path_buf(), "is not a regular file"),
        (dir.path().join("none"), "cannot read"),
        (file(dir.path(), "script", b"#!/bin/sh -e\nexit 1\n", 0o755), "is a script"),
        (file(dir.path(), "text", b"hello", 0o755), "no ELF executable"),
        (file(dir.path(), "empty", b"", 0o755), "an empty file"),
        (elf("arm", 18, 183), "an ELF for AArch64"),
        (elf("object", 16, 1), "an object file or a core dump"),
        (file(dir.path(), "short", &trapline_guests::init()[..80], 0o755), "a damaged ELF"),
    ];
    for (path, words) in cases {
        let error = refused(&path);
        assert!(error.contains(words) && error.contains(&path.display().to_string()), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    assert!(refused(&dir.path().join("script")).contains("put it and /bin/sh into"));
}

#[test]
fn a_file_of_4_gib_is_refused() {
    let dir = TempDir::new().unwrap();
    let large = fs::File::create(dir.path().join("large")).unwrap();
    large.set_len((1 << 32) - 1).unwrap();
    Initramfs::rootfs(dir.path()).unwrap();
    large.set_len(1 << 32).unwrap();
    let error = Initramfs::rootfs(dir.path()).unwrap_err();
    assert!(matches!(error, InitramfsError::TooLarge { size: 0x1_0000_0000, .. }), "{error}");
}

#[test]
fn a_file_that_shrinks_is_told() {
    let dir = TempDir::new().unwrap();
    let path = file(dir.path(), "log", &[7; 100_000], 0o644);
    let initramfs = Initramfs::rootfs(dir.path()).unwrap();
    fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"more").unwrap();
    assert_eq!(read_back(&initramfs)["log"].contents.len(), 100_000, "what is added is left out");
    fs::write(&path, b"less").unwrap();
    let error = initramfs.write_to(&mut Vec::new()).unwrap_err();
    assert!(matches!(&error, InitramfsError::Changed { path: named } if *named == path), "{error}");
}

#[test]
fn a_full_disk_is_told() {
    let initramfs = Initramfs::rootfs(sample().path()).unwrap();
    let mut full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let error = initramfs.write_to(&mut full).unwrap_err();
    assert!(matches!(error, InitramfsError::Write { .. }), "{error}");
}

#[test]
fn a_program_of_the_directory() {
    let dir = sample();
    let run = |program: &str| Initramfs::rootfs_exec(dir.path(), program.as_ref(), ["x"]);
    file(dir.path(), "init", b"their own", 0o755);
    for program in ["/usr/bin/tool", "usr/bin/tool", "/bin/tool"] {
        let found = read_back(&run(program).unwrap());
        let path = format!("/{}", program.trim_start_matches('/'));
        assert_eq!(found["lib/trapline/command"].contents, format!("{path}\0{path}\0x\0").as_bytes());
        assert_eq!(found["init"].contents, trapline_guests::init());
    }
    // By name, as a shell would.
    assert_eq!(read_back(&run("tool").unwrap())["lib/trapline/command"].contents, b"/usr/bin/tool\0/usr/bin/tool\0x\0");

    file(dir.path(), "good script", b"#! /bin/tool -x\n", 0o755);
    file(dir.path(), "bad script", b"#!/usr/bin/perl\n", 0o755);
    run("/good script").unwrap();
    symlink("loop", dir.path().join("loop")).unwrap();
    let cases = [
        ("/usr/bin/none", "there is no program /usr/bin/none in "),
        ("none", "there is no program none in "),
        ("/bad script", "needs /usr/bin/perl, which is not there"),
        ("/a.b", "is not executable"),
        ("/fifo", "is not a regular file"),
        ("/a", "is not a regular file"),
        ("/loop", "there is no program"),
        ("/init", "cannot run in an x86-64 guest: it is no ELF executable"),
        ("", "there is no program"),
    ];
    for (program, words) in cases {
        let error = run(program).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

/// A distribution's `/lib` is a link to a directory that comes later in the archive.
#[test]
fn our_files_go_where_links_lead() {
    let dir = sample();
    symlink("usr/lib", dir.path().join("lib")).unwrap();
    fs::create_dir(dir.path().join("usr/lib")).unwrap();
    let found = read_back(&Initramfs::rootfs_exec(dir.path(), "tool".as_ref(), [""; 0]).unwrap());
    assert!(found.contains_key("usr/lib/trapline/command"), "{:?}", found.keys());
    assert!(!found.contains_key("lib/trapline"));
    assert_eq!(found["lib"].contents, b"usr/lib");

    fs::remove_file(dir.path().join("lib")).unwrap();
    fs::write(dir.path().join("lib"), "a file").unwrap();
    let error = Initramfs::rootfs_exec(dir.path(), "tool".as_ref(), [""; 0]).unwrap_err().to_string();
    assert!(error.contains("/lib cannot be put into the guest") || error.contains("/lib/trapline"), "{error}");
}

#[test]
fn not_a_directory() {
    let dir = sample();
    let error = Initramfs::rootfs(&dir.path().join("a.b")).unwrap_err();
    assert!(matches!(error, InitramfsError::NotADirectory { .. }), "{error}");
    let error = Initramfs::rootfs(&dir.path().join("none")).unwrap_err();
    assert!(matches!(error, InitramfsError::Read { .. }), "{error}");
}

#[test]
fn arguments_have_no_nul_and_an_end() {
    let dir = sample();
    let run = |arg: &[u8]| Initramfs::rootfs_exec(dir.path(), "tool".as_ref(), [OsStr::from_bytes(arg)]);
    assert!(matches!(run(b"a\0b"), Err(InitramfsError::NulInArgument)));
    assert!(matches!(run(&vec![b'a'; MAX_COMMAND]), Err(InitramfsError::TooManyArguments { .. })));
}

/// A relocatable ELF with a `.modinfo`, as small as they come.
fn module() -> Vec<u8> {
    let names = b"\0.modinfo\0.shstrtab\0";
    let info = b"license=GPL\0";
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let sections = 64 + (names.len() + info.len()) as u64;
    bytes.extend_from_slice(&[1, 0, 62, 0, 1, 0, 0, 0]);
    for word in [0, 0, sections] {
        bytes.extend_from_slice(&u64::to_le_bytes(word));
    }
    bytes.extend_from_slice(&[0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 64, 0, 3, 0, 2, 0]);
    bytes.extend_from_slice(names);
    bytes.extend_from_slice(info);
    let at = |kind: u32, name: u32, offset: usize, len: usize| {
        let mut header = [name.to_le_bytes(), kind.to_le_bytes()].concat();
        for word in [0, 0, offset as u64, len as u64, 0, 1, 0] {
            header.extend_from_slice(&u64::to_le_bytes(word));
        }
        header
    };
    bytes.extend(at(0, 0, 0, 0));
    bytes.extend(at(1, 1, 64 + names.len(), info.len()));
    bytes.extend(at(3, 10, 64, names.len()));
    bytes
}

#[test]
fn modules_are_unpacked_and_numbered() {
    let dir = sample();
    let mut initramfs = Initramfs::rootfs_exec(dir.path(), "tool".as_ref(), [""; 0]).unwrap();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&module()).unwrap();
    initramfs.module(&file(dir.path(), "z.ko", &module(), 0o644)).unwrap();
    initramfs.module(&file(dir.path(), "a.ko.gz", &gzip.finish().unwrap(), 0o644)).unwrap();
    for (tool, name) in [("xz", "m.ko.xz"), ("zstd", "m.ko.zst")] {
        let plain = file(dir.path(), "m.ko", &module(), 0o644);
        match Command::new(tool).args(["-q", "-k", "-f"]).arg(&plain).status() {
            Ok(status) if status.success() => initramfs.module(&dir.path().join(name)).unwrap(),
            _ => eprintln!("not compared: there is no {tool} here"),
        }
    }
    let found = read_back(&initramfs);
    let modules: Vec<_> = found.iter().filter(|(name, _)| name.starts_with("lib/trapline/modules/")).collect();
    assert_eq!(modules[0].0, "lib/trapline/modules/0000-z.ko");
    assert_eq!(modules[1].0, "lib/trapline/modules/0001-a.ko");
    assert!(modules.iter().all(|(_, entry)| entry.contents == module()), "{modules:?}");
}

#[test]
fn what_is_no_module_is_refused_with_words() {
    let dir = sample();
    let mut foreign = module();
    foreign[18] = 183;
    let mut not_a_module = module();
    not_a_module[66] = b'x';
    let cases = [
        (file(dir.path(), "foreign.ko", &foreign, 0o644), "for another machine"),
        (file(dir.path(), "plain.o", &not_a_module, 0o644), "it has no .modinfo"),
        (dir.path().join("usr/bin/tool"), "no relocatable ELF"),
        (file(dir.path(), "text.ko", b"hello", 0o644), "no ELF"),
        (file(dir.path(), "cut.ko.xz", b"\xfd7zXZ\0", 0o644), "damaged compression"),
        (file(dir.path(), "cut.ko.zst", b"\x28\xb5\x2f\xfd", 0o644), "damaged compression"),
        (file(dir.path(), "cut.ko.gz", b"\x1f\x8b", 0o644), "damaged compression"),
    ];
    let mut initramfs = Initramfs::rootfs(dir.path()).unwrap();
    for (path, words) in cases {
        let error = initramfs.module(&path).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn the_last_line_of_init() {
    assert_eq!(exit_line("trapline-init: exit 7\r\n"), Some(7));
    // Behind what another process printed without a line end.
    assert_eq!(exit_line("half a linetrapline-init: exit 255"), Some(255));
    for other in ["trapline-init: exit", "trapline-init: exit 256", "trapline-init: exit x", "exit 7", ""] {
        assert_eq!(exit_line(other), None, "{other}");
    }
}

/// What init itself prints is what is looked for.
#[test]
fn init_prints_the_line_that_is_looked_for() {
    let image = trapline_guests::init();
    for part in ["trapline-init: \0", "exit \0"] {
        assert!(image.windows(part.len()).any(|bytes| bytes == part.as_bytes()), "{part}");
    }
    assert_eq!(trapline_guests::INIT_EXIT_LINE, "trapline-init: exit ");
    assert!(Executable::of_host(&file(TempDir::new().unwrap().path(), "init", image, 0o755)).is_ok());
}

proptest! {
    /// A program from anywhere is refused or packed, whatever it claims to be.
    #[test]
    fn no_elf_makes_it_panic(changes in proptest::collection::vec((0usize..4096, any::<u8>()), 1..20)) {
        let mut bytes = Vec::new();
        let this = fs::File::open(std::env::current_exe().unwrap()).unwrap();
        std::io::Read::read_to_end(&mut std::io::Read::take(this, 1 << 16), &mut bytes).unwrap();
        for (at, value) in changes {
            bytes[at] = value;
        }
        let dir = TempDir::new().unwrap();
        let path = file(dir.path(), "program", &bytes, 0o755);
        let _ = Initramfs::exec(&path, [""; 0]);
    }
}
