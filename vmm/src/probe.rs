//! What this host's KVM really does, as opposed to what it claims.
//!
//! Each question is answered by a tiny guest that does the thing, once per process. KVM reports
//! the same capability bits on flavours where a data watchpoint is accepted and never fires.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::boot::{ApStart, BootRequest, Format, Image};
use crate::debug::{Breakpoint, Owner, ResumePlan, RunMode, StopReason, Trigger};
use crate::devices::Console;
use crate::limits::{ACK_DEADLINE, MIN_MEMORY};
use crate::vm::{Vm, VmConfig};

/// Where the probe guest's code lies, and the byte that it writes.
const CODE: u64 = 0x10_0000;
const WATCHED: u64 = 0x11_0000;

/// Whether a write watchpoint fires for a store in ring 0. `Err` says why the probe could not run.
pub(crate) fn data_watch_fires() -> Result<bool, String> {
    static ANSWER: OnceLock<Result<bool, String>> = OnceLock::new();
    ANSWER
        .get_or_init(|| run_data_watch().map_err(|error| format!("the probe of this host's KVM failed: {error}")))
        .clone()
}

fn run_data_watch() -> Result<bool, String> {
    // mov %al, (WATCHED); out %al, $0xf4
    let mut code = vec![0x88, 0x04, 0x25];
    code.extend((WATCHED as u32).to_le_bytes());
    code.extend([0xe6, 0xf4]);
    let kernel = bare_metal_elf(&code);
    let boot = BootRequest {
        kernel: Image::Bytes(&kernel),
        name: "probe",
        initrd: None,
        cmdline: "",
        cpus: 1,
        ap_start: ApStart::Sipi,
        protocol: Some(Format::BareMetal),
    };
    let console = Console::new(std::io::sink());
    let mut vm = Vm::boot(VmConfig { memory: MIN_MEMORY, boot, console, arm_hook: None }).map_err(|e| e.to_string())?;
    let watch = Breakpoint::watch(WATCHED, 1, Trigger::Write);
    vm.arm(Owner::harness(0), watch).map_err(|e| e.to_string())?;
    vm.resume(&ResumePlan::all(1, RunMode::Continue)).map_err(|e| e.to_string())?;
    let started = Instant::now();
    while started.elapsed() < ACK_DEADLINE {
        match vm.poll().map_err(|e| e.to_string())? {
            Some(stop) => return Ok(matches!(stop.reason, StopReason::Watchpoint { .. })),
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    Err("the probe guest neither stopped nor ended".to_owned())
}

/// The smallest ELF64 that boots: one segment of `code` at [`CODE`], entered at its first byte.
fn bare_metal_elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let mut elf = Vec::new();
    // e_ident: ELF64, little-endian, version 1; ET_EXEC, EM_X86_64, version 1.
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0");
    elf.extend(CODE.to_le_bytes()); // e_entry
    elf.extend(64u64.to_le_bytes()); // e_phoff
    elf.extend([0; 12]); // e_shoff, e_flags
    for field in [64u16, 56, 1, 64, 0, 0] {
        elf.extend(field.to_le_bytes()); // e_ehsize, e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx
    }
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]); // PT_LOAD, R+X
    let len = code.len() as u64;
    for field in [HEADERS, CODE, CODE, len, len, 1] {
        elf.extend(field.to_le_bytes()); // p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
    }
    elf.extend(code);
    elf
}
