//! Symbols of Debian's kernel, compared with what nm, addr2line and gdb say of the same file. Runs after
//! guest-images/fetch-debian; needs no KVM.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::OnceLock;

use libtest_mimic::{Arguments, Trial};
use trapline_harness::symbols::{Class, LookupError, Memory, ModulesError, Sources, Symbols};

fn main() -> ExitCode {
    let missing = ["vmlinux", "vmlinuz"].into_iter().any(|name| !file(name).is_file());
    let trials: Vec<(&str, fn())> = vec![
        ("every_address_that_nm_has_is_found_by_name", names_and_addresses),
        ("lines_with_inlines_are_those_of_addr2line", lines),
        ("variables_are_where_gdb_has_them", variables),
        ("each_kind_of_refusal_occurs_in_a_real_kernel", refusals),
        ("the_kallsyms_of_a_bzimage_are_the_symbols_of_its_vmlinux", kallsyms),
        ("btf_and_dwarf_agree_on_structures", btf),
        ("sections_of_a_bzimage_are_those_of_its_vmlinux", sections),
        ("the_list_of_modules_is_known", modules),
        ("the_slide_is_found_in_moved_memory", slide),
        ("a_vmlinux_of_another_build_is_refused", another_build),
    ];
    let trials = trials.into_iter().map(|(name, run)| {
        let trial = Trial::test(name, move || {
            run();
            Ok(())
        });
        if missing {
            trial.with_kind("no Debian kernel: run guest-images/fetch-debian").with_ignored_flag(true)
        } else {
            trial
        }
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}

fn file(name: &str) -> PathBuf {
    let target = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    std::env::var_os("TRAPLINE_CACHE_DIR").map_or_else(target, PathBuf::from).join("guests/debian").join(name)
}

fn open(name: &str) -> Symbols {
    let nowhere = [PathBuf::from("/nonexistent")];
    Symbols::open(&Sources { kernel: Some(&file(name)), symbols: &[], debug_dirs: &nowhere }).unwrap()
}

fn vmlinux() -> &'static Symbols {
    static SYMBOLS: OnceLock<Symbols> = OnceLock::new();
    SYMBOLS.get_or_init(|| open("vmlinux"))
}

/// What is in the bzImage alone.
fn vmlinuz() -> &'static Symbols {
    static SYMBOLS: OnceLock<Symbols> = OnceLock::new();
    SYMBOLS.get_or_init(|| open("vmlinuz"))
}

/// What `nm` prints: address, letter, name.
fn nm() -> &'static [(u64, char, String)] {
    static LINES: OnceLock<Vec<(u64, char, String)>> = OnceLock::new();
    LINES.get_or_init(|| {
        let output = Command::new("nm").arg(file("vmlinux")).output().expect("nm of binutils");
        let text = String::from_utf8(output.stdout).unwrap();
        let parse = |line: &str| {
            let mut words = line.split(' ');
            let address = u64::from_str_radix(words.next()?, 16).ok()?;
            Some((address, words.next()?.chars().next()?, words.next()?.to_owned()))
        };
        let lines: Vec<_> = text.lines().filter_map(parse).collect();
        assert!(lines.len() > 100_000, "nm found {} symbols", lines.len());
        lines
    })
}

/// Some of many, spread evenly.
fn some<T>(all: &[T], count: usize) -> impl Iterator<Item = &T> {
    all.iter().step_by((all.len() / count).max(1))
}

fn is_text(letter: char) -> bool {
    matches!(letter, 't' | 'T' | 'W')
}

fn names_and_addresses() {
    let symbols = vmlinux();
    for (address, letter, name) in nm() {
        let found = symbols.find(name);
        assert!(found.iter().any(|found| found.address == *address), "{letter} {name} at {address:#x}: {found:x?}");
    }
    // What names an address is one of the symbols that nm has there.
    let mut at: BTreeMap<u64, Vec<&str>> = BTreeMap::new();
    for (address, letter, name) in nm() {
        if !letter.eq_ignore_ascii_case(&'a') {
            at.entry(*address).or_default().push(name);
        }
    }
    let text: Vec<&(u64, char, String)> = nm().iter().filter(|(_, letter, _)| is_text(*letter)).collect();
    let mut checked = 0;
    for (address, _, name) in some(&text, 5000).filter(|(.., name)| !name.starts_with("__pfx_")) {
        let location = symbols.locate(*address).unwrap();
        assert_eq!(location.offset, 0, "{name} at {address:#x}: {location:?}");
        assert!(at[address].contains(&location.symbol.as_str()), "{name} at {address:#x}: {location:?}");
        assert!(!location.symbol.starts_with("__pfx_"), "{location:?}");
        checked += 1;
    }
    assert!(checked > 1000);
}

/// What `addr2line -i -f` prints for an address: function, file and line of each level.
fn addr2line(addresses: &[u64]) -> Vec<Vec<(String, String, Option<u32>)>> {
    // -a prints each address before its lines.
    let mut command = Command::new("addr2line");
    command.args(["-a", "-i", "-f", "-e"]).arg(file("vmlinux")).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("addr2line of binutils");
    let mut stdin = child.stdin.take().unwrap();
    let input: String = addresses.iter().map(|address| format!("{address:#x}\n")).collect();
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut found = Vec::new();
    let mut lines = text.lines().peekable();
    while lines.next().is_some() {
        let mut levels = Vec::new();
        while let Some(function) = lines.next_if(|line| !line.starts_with("0x")) {
            // A line may end with ` (discriminator 3)`.
            let place = lines.next().unwrap().split(" (").next().unwrap();
            let (file, line) = place.rsplit_once(':').unwrap();
            levels.push((function.to_owned(), file.to_owned(), line.parse().ok()));
        }
        found.push(levels);
    }
    found
}

fn lines() {
    let symbols = vmlinux();
    let functions: Vec<&(u64, char, String)> =
        nm().iter().filter(|(_, letter, name)| is_text(*letter) && !name.starts_with("__pfx_")).collect();
    // In the midst of functions, where others are inlined; the first bytes are the same in all of them.
    let addresses: Vec<u64> = some(&functions, 500)
        .filter_map(|(address, ..)| {
            let location = symbols.locate(*address)?;
            Some(address + location.size * 3 / 5)
        })
        .collect();
    let expected = addr2line(&addresses);
    assert_eq!(expected.len(), addresses.len());
    let (mut inlined, mut differing) = (0, Vec::new());
    for (address, expected) in addresses.iter().zip(&expected) {
        let known: Vec<_> =
            expected.iter().filter(|(function, file, _)| function != "??" || !file.starts_with("??")).collect();
        let lines = symbols.lines(*address);
        inlined += usize::from(lines.len() > 1);
        let same = known.len() == lines.len()
            && known.iter().zip(&lines).all(|((function, file, number), line)| {
                let named = function == "??" || *function == line.function;
                named && line.line == number.filter(|&line| line != 0) && same_file(file, line.file.as_deref())
            });
        if !same {
            differing.push((address, known, lines));
        }
    }
    assert!(inlined > 100, "{inlined} of {} addresses are in inlined functions", addresses.len());
    // The two take different ones of several line entries for a few addresses.
    assert!(differing.len() * 100 <= addresses.len(), "{} of {}: {differing:#x?}", differing.len(), addresses.len());
    let of_the_tree = |line: &trapline_harness::symbols::SourceLine| line.file.clone();
    let files: BTreeSet<String> =
        addresses.iter().flat_map(|at| symbols.lines(*at)).filter_map(|line| of_the_tree(&line)).collect();
    assert!(files.iter().any(|file| file.starts_with("kernel/")), "{files:?}");
    assert!(files.iter().all(|file| !file.starts_with('/')), "{files:?}");
}

/// addr2line prints the path with the build directory in front.
fn same_file(theirs: &str, ours: Option<&str>) -> bool {
    let theirs = theirs.replace("/./", "/");
    match ours {
        None => theirs.starts_with("??"),
        Some(ours) => theirs.ends_with(ours.trim_start_matches("../")),
    }
}

/// What gdb prints for each expression.
fn gdb(expressions: &[String]) -> Vec<String> {
    let mut command = Command::new("gdb");
    command.args(["-nx", "-batch"]);
    for expression in expressions {
        command.arg("-ex").arg(format!("output {expression}")).arg("-ex").arg("echo \\n");
    }
    let output = command.arg(file("vmlinux")).output().expect("gdb");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), expressions.len(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    lines
}

fn variables() {
    let paths = [
        "init_task.flags",
        "init_task.comm",
        "init_task.comm[5]",
        "init_task.se.run_node.rb_left",
        "init_task.thread.sp",
        "init_task.pending.signal.sig[0]",
        "init_task.tasks.next",
        "system_state",
        "jiffies_64",
        "modules.next",
        "init_mm.pgd",
        "init_mm.mm_users.counter",
        "init_uts_ns.name.release",
        "boot_cpu_data.x86_model_id[3]",
        "console_printk[2]",
        "sysctl_sched_base_slice",
    ];
    let expressions: Vec<String> =
        paths.iter().flat_map(|path| [format!("/x (unsigned long)&({path})"), format!("sizeof({path})")]).collect();
    let answers = gdb(&expressions);
    for (path, answer) in paths.iter().zip(answers.chunks(2)) {
        let variable = vmlinux().variable(path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let expected = (answer[0].clone(), answer[1].clone());
        assert_eq!((format!("{:#x}", variable.address), variable.size.to_string()), expected, "{path}");
        assert!(variable.type_name.is_some(), "{path}");
    }
    // The linker script makes one of the other.
    assert_eq!(vmlinux().variable("jiffies").unwrap().size, 8);
}

fn refusals() {
    let symbols = vmlinux();
    assert!(matches!(symbols.functions("start_kernel"), Err(LookupError::Init { .. })));
    assert!(matches!(symbols.variable("runqueues"), Err(LookupError::PerCpu { .. })));
    assert!(matches!(symbols.variable("init_task.nothing"), Err(LookupError::NoSuchMember { .. })));
    assert!(matches!(symbols.variable("init_task.sched_reset_on_fork"), Err(LookupError::Bitfield { .. })));
    assert!(matches!(symbols.functions("init_task"), Err(LookupError::NotAFunction { .. })));
    assert!(matches!(symbols.variable("panic"), Err(LookupError::NotAVariable { .. })));
    let Err(LookupError::Missing { similar, .. }) = symbols.functions("do_sys_opn") else { panic!() };
    assert!(similar.contains(&"do_sys_open".to_owned()), "{similar:?}");
    let Err(LookupError::Inlined { into, .. }) = symbols.functions("is_ksym_addr") else { panic!() };
    assert!(into.iter().all(|caller| !symbols.find(caller).is_empty()), "{into:?}");
    assert!(into.contains(&"kallsyms_lookup_size_offset".to_owned()), "{into:?}");
    assert!(matches!(vmlinuz().functions("start_kernel"), Err(LookupError::Init { .. })));
    assert!(matches!(vmlinuz().variable("runqueues"), Err(LookupError::PerCpu { .. })));
    assert!(matches!(vmlinuz().variable("init_task.flags"), Err(LookupError::NoTypes { .. })));
    // Several files have a static function of this name; each of them is found, and nothing else.
    let mut expected: Vec<u64> = nm().iter().filter(|line| line.2 == "c_show").map(|line| line.0).collect();
    expected.sort_unstable();
    let found: Vec<u64> = symbols.functions("c_show").unwrap().iter().map(|found| found.address).collect();
    assert!(found.len() > 1);
    assert_eq!(found, expected);
}

fn kallsyms() {
    let symbols = vmlinuz();
    assert_eq!(symbols.release(), vmlinux().release());
    assert_eq!(symbols.build_id(), vmlinux().build_id());
    assert_eq!(symbols.kernel_range(), vmlinux().kernel_range());
    let (mut found, mut lost) = (0, Vec::new());
    for (address, letter, name) in
        nm().iter().filter(|(_, letter, _)| is_text(*letter) || matches!(letter, 'd' | 'D' | 'b' | 'B' | 'r' | 'R'))
    {
        // Names for the linker or the assembler only, which scripts/mksysmap leaves out.
        let left_out = ["__ksymtab", "__kstrtab", "__crc_", "__kcrctab", "__UNIQUE_ID", "__pi_", "L0", ".L", "$"];
        if left_out.iter().any(|start| name.starts_with(start)) {
            continue;
        }
        if symbols.find(name).iter().any(|found| found.address == *address) {
            found += 1;
        } else {
            lost.push((address, letter, name));
        }
    }
    assert!(found > 100_000, "{found}");
    assert!(lost.len() * 200 < found, "{} of {found}: {:x?}", lost.len(), &lost[..lost.len().min(40)]);
    assert!(
        lost.iter().all(|(_, letter, _)| !is_text(**letter)),
        "{:x?}",
        lost.iter().filter(|(_, letter, _)| is_text(**letter)).collect::<Vec<_>>()
    );
    // An address has the same name and class, and at least the size.
    let functions: Vec<&(u64, char, String)> = nm().iter().filter(|(_, letter, _)| is_text(*letter)).collect();
    for (address, _, name) in some(&functions, 2000) {
        let sized = |symbols: &Symbols| symbols.find(name).into_iter().find(|found| found.address == *address).unwrap();
        let (whole, bare) = (sized(vmlinux()), sized(symbols));
        assert_eq!((&whole.name, whole.class), (&bare.name, bare.class), "{name}");
        assert!(bare.size >= whole.size, "{whole:x?} {bare:x?}");
    }
    assert_eq!(symbols.find("runqueues")[0].class, Class::PerCpu);
}

fn btf() {
    // The bzImage has no DWARF, and variables are not looked up in BTF.
    for member in ["flags", "comm", "se.vruntime", "thread.sp", "tasks.prev", "exit_code", "mm"] {
        let dwarf = vmlinux().variable(&format!("init_task.{member}")).unwrap();
        let btf = vmlinuz().field("task_struct", member).unwrap();
        let start = vmlinux().address("init_task").unwrap();
        assert_eq!((btf.offset, btf.size), (dwarf.address - start, dwarf.size), "{member}");
        assert_eq!(Some(btf.type_name), dwarf.type_name, "{member}");
    }
    let module = vmlinuz().field("module", "").unwrap();
    let answer = gdb(&["sizeof(struct module)".to_owned(), "/d (long)&((struct module *)0)->kallsyms".to_owned()]);
    assert_eq!(module.size.to_string(), answer[0]);
    assert_eq!(vmlinuz().field("module", "kallsyms").unwrap().offset.to_string(), answer[1]);
}

fn sections() {
    for name in [".orc_unwind_ip", ".orc_unwind", ".rodata", ".text", ".BTF"] {
        let (ours, theirs) = (vmlinuz().section(name), vmlinux().section(name));
        assert!(ours.is_some_and(|(_, bytes)| !bytes.is_empty()), "{name}");
        assert!(ours == theirs, "{name}");
    }
    assert_eq!(vmlinux().section(".debug_frame").map(|(address, _)| address), Some(0));
    assert_eq!(vmlinux().section(".nothing"), None);
}

fn modules() {
    /// The image only: a guest that has not loaded a module, and one whose list leads out of it.
    struct Image(Option<u64>);
    impl Memory for Image {
        fn read(&self, address: u64, into: &mut [u8]) -> usize {
            let head = vmlinux().address("modules").unwrap();
            match self.0 {
                Some(first) if address == head => {
                    into.copy_from_slice(&first.to_le_bytes());
                    into.len()
                }
                _ => Moved(0).read(address, into),
            }
        }
    }
    for symbols in [vmlinux(), vmlinuz()] {
        assert_eq!(symbols.guest_modules(&Image(None)).unwrap().len(), 0);
        let lost = symbols.guest_modules(&Image(Some(0xffff_ffff_c000_0008)));
        assert!(matches!(lost, Err(ModulesError::Damaged { address: 0xffff_ffff_c000_0008, .. })), "{lost:?}");
    }
}

/// The kernel's image at another place.
struct Moved(u64);

impl Memory for Moved {
    fn read(&self, address: u64, into: &mut [u8]) -> usize {
        let Some(bytes) = vmlinux().linked_bytes(address.wrapping_sub(self.0)) else { return 0 };
        let len = bytes.len().min(into.len());
        into[..len].copy_from_slice(&bytes[..len]);
        len
    }
}

fn slide() {
    let panic = vmlinux().address("panic").unwrap();
    for slide in [0, 0x20_0000, 0x1e60_0000, 0x3a00_0000] {
        for symbols in [vmlinux(), vmlinuz()] {
            assert_eq!(symbols.find_slide(&Moved(slide), panic + slide), Some(slide), "{slide:#x}");
            let moved = symbols.with_slide(slide);
            assert_eq!(moved.address("panic"), Some(panic + slide));
            assert_eq!(moved.locate(panic + slide + 1).unwrap().symbol, "panic");
            assert_eq!(moved.lines(panic + slide), symbols.lines(panic));
        }
        assert_eq!(vmlinux().find_slide(&Moved(slide), 0x40_0000), None);
    }
    // Not by a multiple of 2 MiB: something else that has the same bytes.
    assert_eq!(vmlinux().find_slide(&Moved(0x1000), panic), None);
}

fn another_build() {
    // The same file with another day in its banner.
    let mut bytes = std::fs::read(file("vmlinuz")).unwrap();
    let version = bytes.windows(5).position(|bytes| bytes == b"#1 SM").unwrap();
    bytes[version + 1] = b'2';
    let mut other = tempfile::NamedTempFile::new().unwrap();
    other.write_all(&bytes).unwrap();
    let symbols = [file("vmlinux")];
    let sources = |kernel| Sources { kernel: Some(kernel), symbols: &symbols, debug_dirs: &[] };
    let error = Symbols::open(&sources(other.path())).unwrap_err().to_string();
    assert!(error.contains("vmlinux: made with another kernel: Linux version "), "{error}");
    let both = Symbols::open(&sources(&file("vmlinuz"))).unwrap();
    assert!(both.variable("init_task.flags").is_ok());
    assert_eq!(both.release(), vmlinux().release());
}
