//! A [`CpuState`] in the words of KVM_SET_REGS and KVM_SET_SREGS. Pure: nothing here talks to KVM.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use super::tables::{CODE32, CODE64, DATA, GDT_ENTRIES, TASK, TSS_LIMIT};
use super::{CpuState, layout};

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;

/// Bit 1 of RFLAGS always reads as 1; interrupts, direction and trap flag are off.
const RFLAGS: u64 = 2;

/// The general registers of a state, complete: what the protocol does not name is 0.
pub fn registers(state: &CpuState) -> kvm_regs {
    match *state {
        CpuState::Long64 { rip, rsp, rdi, rsi, .. } => {
            kvm_regs { rip, rsp, rdi, rsi, rflags: RFLAGS, ..Default::default() }
        }
        CpuState::Protected32 { eip, esp, eax, ebx } => kvm_regs {
            rip: eip.into(),
            rsp: esp.into(),
            rax: eax.into(),
            rbx: ebx.into(),
            rflags: RFLAGS,
            ..Default::default()
        },
    }
}

/// The system registers of a state. `current` is what KVM_GET_SREGS says of the vCPU: what is KVM's (the APIC base,
/// which also says who is the boot processor) stays as it is.
///
/// Long mode has SSE switched on (CR4.OSFXSR and OSXMMEXCPT), so that compiled bare-metal code runs, and the NX bit of page
/// tables: an AP of a recent Linux (seen with 6.12) that was woken through the mailbox goes onto Linux's page tables, which have it,
/// without a look at EFER.
pub fn system_registers(state: &CpuState, current: &kvm_sregs) -> kvm_sregs {
    let data = segment(DATA, 3, false, false);
    let base = kvm_sregs {
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: kvm_segment {
            base: layout::TSS,
            limit: TSS_LIMIT,
            selector: TASK,
            // Busy 64-bit (in protected mode: 32-bit) TSS: VM entry takes no other type (SDM 3C 26.3.1.2).
            type_: 11,
            present: 1,
            ..Default::default()
        },
        ldt: kvm_segment { type_: 2, unusable: 1, ..Default::default() },
        gdt: kvm_dtable { base: layout::GDT, limit: (size_of_val(&GDT_ENTRIES) - 1) as u16, ..Default::default() },
        idt: kvm_dtable::default(),
        cr0: CR0_PE | CR0_ET | CR0_NE,
        cr2: 0,
        cr3: 0,
        cr4: 0,
        cr8: 0,
        efer: 0,
        ..*current
    };
    match *state {
        CpuState::Long64 { cr3, .. } => kvm_sregs {
            cs: segment(CODE64, 11, true, true),
            cr0: base.cr0 | CR0_MP | CR0_WP | CR0_PG,
            cr3,
            cr4: CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT,
            efer: EFER_LME | EFER_LMA | EFER_NXE,
            ..base
        },
        CpuState::Protected32 { .. } => kvm_sregs { cs: segment(CODE32, 11, true, false), ..base },
    }
}

/// A flat segment at privilege level 0, as its descriptor in the GDT has it.
fn segment(selector: u16, type_: u8, code: bool, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!(code && long)),
        s: 1,
        l: u8::from(long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes a descriptor as the processor does when a selector is loaded (SDM 3A 3.4.5).
    fn descriptor(selector: u16) -> kvm_segment {
        let raw = GDT_ENTRIES[usize::from(selector / 8)];
        let bit = |n: u32| (raw >> n & 1) as u8;
        let limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
        let g = bit(55);
        kvm_segment {
            base: raw >> 16 & 0xff_ffff | raw >> 32 & 0xff00_0000,
            limit: if g == 1 { limit << 12 | 0xfff } else { limit },
            selector,
            type_: (raw >> 40 & 0xf) as u8,
            present: bit(47),
            dpl: (raw >> 45 & 3) as u8,
            db: bit(54),
            s: bit(44),
            l: bit(53),
            g,
            avl: bit(52),
            unusable: 0,
            padding: 0,
        }
    }

    fn long() -> CpuState {
        CpuState::Long64 { cr3: layout::PAGE_TABLES, rip: 0x10_0000, rsp: layout::STACK_TOP, rdi: 1, rsi: 2 }
    }

    fn protected() -> CpuState {
        CpuState::Protected32 { eip: 0x10_0000, esp: 0x8_8000, eax: 0x2BAD_B002, ebx: 0x8_0000 }
    }

    #[test]
    fn segments_are_what_the_gdt_says() {
        for state in [long(), protected()] {
            let sregs = system_registers(&state, &kvm_sregs::default());
            for seg in [sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss, sregs.tr] {
                assert_eq!(seg, descriptor(seg.selector), "{state:?}");
            }
        }
    }

    #[test]
    fn long_mode_is_on_in_all_three_places() {
        let sregs = system_registers(&long(), &kvm_sregs::default());
        assert_eq!(sregs.cr0 & (CR0_PG | CR0_PE), CR0_PG | CR0_PE);
        assert_eq!(sregs.cr4 & CR4_PAE, CR4_PAE);
        assert_eq!(sregs.efer, EFER_LME | EFER_LMA | EFER_NXE);
        assert_eq!((sregs.cs.l, sregs.cs.db), (1, 0));
        assert_eq!(sregs.cr3, layout::PAGE_TABLES);
    }

    #[test]
    fn protected_mode_has_paging_off_and_32_bit_code() {
        let sregs = system_registers(&protected(), &kvm_sregs::default());
        assert_eq!(sregs.cr0 & (CR0_PG | CR0_PE), CR0_PE);
        assert_eq!((sregs.efer, sregs.cr4), (0, 0));
        assert_eq!((sregs.cs.l, sregs.cs.db), (0, 1));
        let regs = registers(&protected());
        assert_eq!((regs.rax, regs.rbx, regs.rflags), (0x2BAD_B002, 0x8_0000, 2));
    }

    #[test]
    fn what_is_kvms_stays() {
        let current = kvm_sregs { apic_base: 0xfee0_0900, cr2: 7, cr8: 7, ..Default::default() };
        let sregs = system_registers(&long(), &current);
        assert_eq!((sregs.apic_base, sregs.cr2, sregs.cr8), (0xfee0_0900, 0, 0));
    }
}
