//! The ELF notes of a core: what each vCPU's registers were, and VMCOREINFO.
//!
//! Two notes a vCPU, as QEMU's dump-guest-memory writes them. NT_PRSTATUS has what the kernel's own
//! crash dump would have, for gdb and drgn; its pid is the number of the CPU plus one, by which drgn finds
//! it. The QEMU note has the control registers and tables; where crash sees one, it takes the
//! registers of every vCPU as they are in NT_PRSTATUS, and not of the one that panicked only.

use trapline_vmm::vcpu::{DescriptorTable, Registers, Segment};

/// Type of a note with a thread's general registers (elf.h).
const NT_PRSTATUS: u32 = 1;
/// Size of x86-64's `struct elf_prstatus`.
const PRSTATUS_SIZE: usize = 336;
/// Offset of `pr_pid` in it.
const PR_PID: usize = 32;
/// Offset of `pr_reg`, which has the layout of `struct user_regs_struct`.
const PR_REG: usize = 112;
/// Version of `struct QEMUCPUState`.
const QEMU_VERSION: u32 = 1;
/// Its size with the last member, kernel_gs_base.
const QEMU_SIZE: u32 = 440;

/// All notes of a core, as they stand in the file.
pub(super) fn notes(vcpus: &[Registers], vmcoreinfo: &[u8]) -> Vec<u8> {
    let mut notes = Vec::new();
    for (registers, pid) in vcpus.iter().zip(1_u32..) {
        push(&mut notes, "CORE", NT_PRSTATUS, &prstatus(registers, pid));
    }
    for registers in vcpus {
        push(&mut notes, "QEMU", 0, &qemu(registers));
    }
    if !vmcoreinfo.is_empty() {
        push(&mut notes, "VMCOREINFO", 0, vmcoreinfo);
    }
    notes
}

/// Appends one note; name and contents are padded to four bytes.
fn push(notes: &mut Vec<u8>, name: &str, kind: u32, contents: &[u8]) {
    // Notes are read with 32-bit lengths; nothing here comes near that.
    for word in [name.len() as u32 + 1, contents.len() as u32, kind] {
        notes.extend(word.to_le_bytes());
    }
    for bytes in [&[name.as_bytes(), &[0]].concat(), contents] {
        notes.extend(bytes);
        notes.resize(padded(notes.len() as u64) as usize, 0);
    }
}

/// The room that `len` bytes of a note take.
pub(super) fn padded(len: u64) -> u64 {
    len.next_multiple_of(4)
}

fn prstatus(r: &Registers, pid: u32) -> [u8; PRSTATUS_SIZE] {
    // No system call is to be restarted: what orig_rax says then.
    let orig_rax = u64::MAX;
    let selector = |segment: &Segment| u64::from(segment.selector);
    let registers = [
        r.r15,
        r.r14,
        r.r13,
        r.r12,
        r.rbp,
        r.rbx,
        r.r11,
        r.r10,
        r.r9,
        r.r8,
        r.rax,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        orig_rax,
        r.rip,
        selector(&r.cs),
        r.rflags,
        r.rsp,
        selector(&r.ss),
        r.fs.base,
        r.gs.base,
        selector(&r.ds),
        selector(&r.es),
        selector(&r.fs),
        selector(&r.gs),
    ];
    let mut note = [0; PRSTATUS_SIZE];
    note[PR_PID..PR_PID + 4].copy_from_slice(&pid.to_le_bytes());
    let (words, _) = note[PR_REG..].as_chunks_mut::<8>();
    for (word, register) in words.iter_mut().zip(registers) {
        *word = register.to_le_bytes();
    }
    note
}

/// QEMU's `struct QEMUCPUState` (target/i386/arch_dump.c).
fn qemu(r: &Registers) -> Vec<u8> {
    let mut note = Vec::new();
    note.extend(QEMU_VERSION.to_le_bytes());
    note.extend(QEMU_SIZE.to_le_bytes());
    let general = [
        r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15,
        r.rip, r.rflags,
    ];
    note.extend(general.iter().flat_map(|register| register.to_le_bytes()));
    let table = |table: &DescriptorTable| Segment { base: table.base, limit: table.limit.into(), ..Segment::default() };
    for segment in [r.cs, r.ds, r.es, r.fs, r.gs, r.ss, r.ldtr, r.tr, table(&r.gdtr), table(&r.idtr)] {
        // The attributes as they stand in the upper half of a descriptor (SDM vol. 3, 3.4.5).
        let flags = (segment.attributes & 0xf0ff) << 8;
        for word in [u32::from(segment.selector), segment.limit, flags, 0] {
            note.extend(word.to_le_bytes());
        }
        note.extend(segment.base.to_le_bytes());
    }
    // CR1 does not exist.
    for register in [r.cr0, 0, r.cr2, r.cr3, r.cr4, r.kernel_gs_base] {
        note.extend(register.to_le_bytes());
    }
    note
}
