//! Builds the guests with the system's C compiler driver (`CC`, else `cc`).
//!
//! Each guest becomes one ELF file in `OUT_DIR`, which `src/lib.rs` includes.
//! Debug information names the sources relative to the repository's root, so
//! that gdb, started there, finds them and no build path is left in an image.

use std::collections::BTreeSet;
use std::env;
use std::error::Error;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// One guest, or a program that runs in one: its linker script and what is linked.
struct Guest {
    name: &'static str,
    /// `None`: the linker's own, for a program of Linux user space.
    script: Option<&'static str>,
    /// Macros for the linker script and options for the linker.
    script_flags: &'static [&'static str],
    link_flags: &'static [&'static str],
    parts: &'static [&'static [Source]],
}

/// One C or assembler file, relative to this directory.
struct Source {
    path: &'static str,
    flags: &'static [&'static str],
}

/// A file whose functions begin with their own first instruction.
const fn source(path: &'static str) -> Source {
    Source { path, flags: &["-fcf-protection=none"] }
}

/// A file whose functions begin as in a Linux kernel: `endbr64` and a nop of
/// five bytes.
const fn traced_source(path: &'static str) -> Source {
    Source { path, flags: &["-fcf-protection=branch", "-pg", "-mfentry", "-mnop-mcount"] }
}

/// Entry, console, and the start of all CPUs.
const SMP: &[Source] = &[
    source("common/boot.S"),
    source("common/trampoline.S"),
    source("common/acpi.c"),
    source("common/cmdline.c"),
    source("common/console.c"),
    source("common/end.c"),
    source("common/lapic.c"),
    source("common/smp.c"),
];

/// Tables and handlers of a guest that expects no exception.
const PLAIN_TABLES: &[Source] = &[source("common/tables.S"), source("common/traps.S"), source("common/traps.c")];

const DEMO: &[Source] = &[source("demo/demo.c"), traced_source("demo/traced.c")];

const FIXTURE: &[Source] = &[
    source("fixture/tables.S"),
    source("fixture/traps.S"),
    source("fixture/fixture.c"),
    source("fixture/c_properties.S"),
    source("fixture/breakpoints.S"),
    source("fixture/patches.S"),
    source("fixture/watchpoints.S"),
    source("fixture/steps.S"),
    source("fixture/own_debug.S"),
    source("fixture/own_levels.S"),
    source("fixture/devices.S"),
    source("fixture/ring3.S"),
    source("fixture/faults.S"),
];

const INIT: &[Source] = &[source("init/init.c")];

const ACTS: &[Source] = &[source("acts/acts.c")];

/// What the guests that are entered in 32-bit mode share.
const FORMAT: &[Source] =
    &[source("common/cmdline.c"), source("common/console.c"), source("common/end.c"), source("formats/format.c")];

const GUESTS: &[Guest] = &[
    bare_metal("demo", "common/guest.ld", &[SMP, PLAIN_TABLES, DEMO]),
    bare_metal("acts", "common/guest.ld", &[SMP, PLAIN_TABLES, ACTS]),
    bare_metal("fixture", "fixture/fixture.ld", &[SMP, FIXTURE]),
    Guest {
        name: "multiboot32",
        script: Some("formats/format.ld"),
        script_flags: &[],
        link_flags: &["-Wl,--oformat,elf32-i386"],
        parts: &[MULTIBOOT_ENTRY, FORMAT, PLAIN_TABLES],
    },
    Guest {
        name: "multiboot64",
        script: Some("formats/format.ld"),
        script_flags: &[],
        link_flags: &[],
        parts: &[MULTIBOOT_ENTRY, FORMAT, PLAIN_TABLES],
    },
    Guest {
        name: "pvh",
        script: Some("formats/format.ld"),
        script_flags: &["-DPVH"],
        link_flags: &[],
        parts: &[PVH_ENTRY, FORMAT, PLAIN_TABLES],
    },
    Guest { name: "init", script: None, script_flags: &[], link_flags: &["-Wl,-s"], parts: &[INIT] },
];

const MULTIBOOT_ENTRY: &[Source] = &[Source { path: "formats/entry32.S", flags: &["-DMULTIBOOT"] }];

const PVH_ENTRY: &[Source] = &[Source { path: "formats/entry32.S", flags: &["-DPVH"] }];

/// An ELF64 for the VMM's bare-metal handoff.
const fn bare_metal(name: &'static str, script: &'static str, parts: &'static [&'static [Source]]) -> Guest {
    Guest { name, script: Some(script), script_flags: &[], link_flags: &[], parts }
}

/// Directories with sources.
const TREES: &[&str] = &["acts", "common", "demo", "fixture", "formats", "init"];

const COMPILE: &[&str] = &[
    "-m64",
    "-std=gnu11",
    "-ffreestanding",
    "-nostdinc",
    "-fno-pic",
    "-no-pie",
    "-mcmodel=small",
    // Ring 0 is interpreted on one KVM flavour, without SSE and x87.
    "-mgeneral-regs-only",
    // Interrupt handlers use the interrupted stack.
    "-mno-red-zone",
    "-fno-stack-protector",
    "-fno-common",
    // For people who read the guest in a debugger.
    "-Og",
    "-g",
    "-fno-omit-frame-pointer",
    "-mno-omit-leaf-frame-pointer",
    "-fno-optimize-sibling-calls",
    // .debug_frame instead of .eh_frame
    "-fno-asynchronous-unwind-tables",
    "-Wall",
    "-Wextra",
    "-Icommon",
];

const LINK: &[&str] = &[
    "-m64",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none",
    "-Wl,-z,max-page-size=4096",
    "-Wl,-z,noexecstack",
    "-Wl,--fatal-warnings",
];

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            for line in error.to_string().lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn build() -> Outcome<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=CC");
    for tree in TREES {
        println!("cargo::rerun-if-changed={tree}");
    }
    let toolchain = Toolchain::from_environment()?;
    let mut made = BTreeSet::new();
    for guest in GUESTS {
        let mut objects = Vec::new();
        for source in guest.parts.iter().copied().flatten() {
            let object = toolchain.object(source);
            if made.insert(object.clone()) {
                toolchain.compile(source, &object)?;
            }
            objects.push(object);
        }
        toolchain.link(guest, &objects)?;
    }
    Ok(())
}

/// The C compiler driver and where it works.
struct Toolchain {
    /// Program, then arguments that belong to it (`CC="ccache gcc"`).
    driver: Vec<String>,
    here: PathBuf,
    out: PathBuf,
}

impl Toolchain {
    fn from_environment() -> Outcome<Self> {
        let named = env::var("CC").unwrap_or_default();
        let mut driver: Vec<String> = named.split_whitespace().map(str::to_owned).collect();
        if driver.is_empty() {
            driver.push("cc".to_owned());
        }
        Ok(Self {
            driver,
            here: PathBuf::from(env::var("CARGO_MANIFEST_DIR")?),
            out: PathBuf::from(env::var("OUT_DIR")?),
        })
    }

    /// Where the object of a source goes, in `OUT_DIR`. A source that is built in
    /// two ways has two.
    fn object(&self, source: &Source) -> PathBuf {
        let variant: String = source.flags.iter().filter(|f| f.starts_with("-D")).copied().collect();
        self.out.join(source.path.replace('/', "-") + &variant + ".o")
    }

    fn compile(&self, source: &Source, object: &Path) -> Outcome<()> {
        let mut command = self.command();
        command
            .args(COMPILE)
            .args(source.flags)
            .arg(self.without_build_path())
            .args(["-c", source.path, "-o"])
            .arg(object);
        self.run(command, source.path)
    }

    /// Links one guest. Linker scripts may use the guests' header files.
    fn link(&self, guest: &Guest, objects: &[PathBuf]) -> Outcome<()> {
        let mut link = self.command();
        link.args(LINK).args(guest.link_flags);
        if let Some(source) = guest.script {
            let script = self.out.join(guest.name).with_extension("ld");
            let mut command = self.command();
            command
                .args(["-E", "-P", "-undef", "-x", "c", "-Icommon"])
                .args(guest.script_flags)
                .args([source, "-o"])
                .arg(&script);
            self.run(command, source)?;
            link.arg("-T").arg(script);
        }
        link.args(objects).arg("-o").arg(self.out.join(guest.name).with_extension("elf"));
        self.run(link, guest.name)
    }

    fn command(&self) -> Command {
        let mut words = self.driver.iter();
        let mut command = Command::new(words.next().map_or(OsStr::new("cc"), OsStr::new));
        command.args(words).current_dir(&self.here).env("LC_ALL", "C");
        command
    }

    /// Makes this directory's name `guest-images`, as seen from the repository.
    fn without_build_path(&self) -> String {
        let name = self.here.file_name().map_or(Path::new("guest-images"), Path::new);
        format!("-ffile-prefix-map={}={}", self.here.display(), name.display())
    }

    fn run(&self, mut command: Command, what: &str) -> Outcome<()> {
        let driver = self.driver.join(" ");
        let output = command.output().map_err(|error| {
            format!(
                "guest {what}: cannot start the C compiler `{driver}`: {error}; \
                 install gcc and binutils, or set CC"
            )
        })?;
        let said = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            return Err(format!(
                "guest {what}: `{driver}` failed; the guests need GCC for x86-64 \
                 (set CC to one)\n{said}"
            )
            .into());
        }
        for line in said.lines() {
            println!("cargo::warning={line}");
        }
        Ok(())
    }
}
