//! Writes cores of Debian's kernel, for tests/headless/cores to open. Runs where KVM boots Linux, after
//! guest-images/fetch-debian:
//!
//!     cores-* FOLDER      into FOLDER, with what is known of each in FOLDER/NAME.json
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod guest;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{env, fs};

use trapline_harness::vmcore::{self, Core, CoreError, Form};
use trapline_vmm::debug::VcpuId;

use guest::Guest;

/// Programs that the guest has at the panic.
const SLEEPERS: usize = 3;

fn main() -> ExitCode {
    // As a test binary among others, it has nothing to do: what it writes is for another program.
    let folder = match env::args_os().nth(1) {
        Some(folder) if !folder.to_string_lossy().starts_with('-') => PathBuf::from(folder),
        _ => {
            println!("nothing to do without a folder for the cores: see tests/headless/cores");
            return ExitCode::SUCCESS;
        }
    };
    fs::create_dir_all(&folder).unwrap();
    early(&folder);
    panicked(&folder, "nokaslr", "panic");
    panicked(&folder, "kaslr", "moved");
    ExitCode::SUCCESS
}

/// Long before the kernel has VMCOREINFO.
fn early(folder: &Path) {
    let mut guest = Guest::load("nokaslr");
    let vcpu = guest.run_to("rest_init");
    write(&mut guest, vcpu, folder, "early");
}

/// A panic by sysrq on vCPU 0, stopped at the first instruction of `panic`.
fn panicked(folder: &Path, kaslr: &str, name: &str) {
    let mut guest = Guest::load(kaslr);
    guest.run_until("waiting for commands");
    guest.learn_slide();
    assert_eq!(kaslr == "kaslr", guest.symbols.slide() != 0, "KASLR may choose to move nothing, but hardly ever does");
    for _ in 0..SLEEPERS {
        guest.command("sleep 100000 &");
    }
    guest.command("echo something in the log >/dev/kmsg");
    guest.start("taskset -c 0 sh -c 'echo the shell is $$; echo c >/proc/sysrq-trigger'");
    let vcpu = guest.run_to("panic");
    assert_eq!(vcpu, VcpuId(0), "the CPU that it was pinned to");
    write(&mut guest, vcpu, folder, name);
    if name == "panic" {
        full_disk(&mut guest, vcpu);
    }
}

/// Writes cores in both forms, says how long each took, and what is known.
fn write(guest: &mut Guest, vcpu: VcpuId, folder: &Path, name: &str) {
    let core = guest.core(vcpu);
    let core = Core {
        ram: guest.vm.ram(),
        vcpus: &core.0,
        vmcoreinfo: core.1,
        hide: &|gpa, bytes| guest.vm.hide_breakpoints(gpa, bytes),
    };
    for form in [Form::Elf, Form::Kdump] {
        // Once into memory: what it costs without the lane's slow files.
        let scratch = tempfile::tempdir().unwrap();
        for folder in [scratch.path(), folder] {
            let path = folder.join(format!("{name}.{form:?}").to_lowercase());
            let started = Instant::now();
            let len = vmcore::write(&core, &path, form).unwrap();
            let took = started.elapsed();
            let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&path).unwrap());
            println!("{}: {len} bytes, {} on disk, {took:.2?}", path.display(), blocks * 512);
        }
    }
    let known = serde_json::json!({
        "vcpu": vcpu.0,
        "vcpus": core.vcpus.len(),
        "shell": guest.said("the shell is "),
        "sleepers": SLEEPERS,
        "pc": core.vcpus.iter().map(|registers| registers.rip).collect::<Vec<_>>(),
        "slide": guest.symbols.slide(),
        "release": guest.symbols.release(),
        "vmcoreinfo": String::from_utf8_lossy(&core.vmcoreinfo),
    });
    fs::write(folder.join(format!("{name}.json")), known.to_string()).unwrap();
}

/// A disk that is too small: one line, and nothing left on it.
fn full_disk(guest: &mut Guest, vcpu: VcpuId) {
    let Some(disk) = env::var_os("TRAPLINE_SMALL_DISK").map(PathBuf::from) else {
        println!("no small disk to fill");
        return;
    };
    let (registers, vmcoreinfo) = guest.core(vcpu);
    let core = Core { ram: guest.vm.ram(), vcpus: &registers, vmcoreinfo, hide: &|_, _| () };
    for form in [Form::Elf, Form::Kdump] {
        let path = disk.join("vmcore");
        let error = vmcore::write(&core, &path, form).unwrap_err();
        assert!(matches!(error, CoreError::Full { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains(path.to_str().unwrap()) && text.contains("MiB") && !text.contains('\n'), "{text}");
        assert_eq!(fs::read_dir(&disk).unwrap().count(), 0, "something is left");
        println!("{text}");
    }
}

/// A bound against hanging: a loaded machine that emulates another one takes its time.
const PATIENCE: Duration = Duration::from_secs(300);
