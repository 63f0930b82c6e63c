//! The model-specific registers that a vCPU starts with, and those that belong to its state.

use kvm_bindings::kvm_msr_entry;

/// Numbers from SDM 4, the AMD APM 2 appendix A and, for KVM's own, Linux's Documentation/virt/kvm/x86/msr.rst.
mod number {
    pub(super) const TSC: u32 = 0x10;
    pub(super) const PAT: u32 = 0x277;
    pub(super) const SYSENTER_CS: u32 = 0x174;
    pub(super) const SYSENTER_ESP: u32 = 0x175;
    pub(super) const SYSENTER_EIP: u32 = 0x176;
    pub(super) const MISC_ENABLE: u32 = 0x1a0;
    pub(super) const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub(super) const TSC_DEADLINE: u32 = 0x6e0;
    pub(super) const EFER: u32 = 0xc000_0080;
    pub(super) const STAR: u32 = 0xc000_0081;
    pub(super) const LSTAR: u32 = 0xc000_0082;
    pub(super) const CSTAR: u32 = 0xc000_0083;
    pub(super) const SYSCALL_MASK: u32 = 0xc000_0084;
    pub(super) const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub(super) const TSC_AUX: u32 = 0xc000_0103;
    pub(super) const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
    pub(super) const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
}

/// REP MOVS and STOS are fast: Linux looks at it before it uses them.
const FAST_STRINGS: u64 = 1;
/// MTRRs on, everything write-back: there is no device memory that needs another type.
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;

/// MSRs of Hyper-V's interface (TLFS, appendix C).
const HYPER_V: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_ffff;

/// Eight ranges, the fixed ranges of the first MiB, and the type of all else (SDM vol. 3, 12.11).
const MTRRS: [std::ops::RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, number::MTRR_DEF_TYPE..=number::MTRR_DEF_TYPE];

/// What firmware would have left in a vCPU's MSRs, for KVM_SET_MSRS. KVM says how many it took; one that it refuses is
/// one that this host does not have.
pub fn boot_msrs() -> Vec<kvm_msr_entry> {
    [
        (number::SYSENTER_CS, 0),
        (number::SYSENTER_ESP, 0),
        (number::SYSENTER_EIP, 0),
        (number::STAR, 0),
        (number::LSTAR, 0),
        (number::CSTAR, 0),
        (number::SYSCALL_MASK, 0),
        (number::KERNEL_GS_BASE, 0),
        (number::TSC, 0),
        (number::MISC_ENABLE, FAST_STRINGS),
        (number::MTRR_DEF_TYPE, MTRR_ON_WRITE_BACK),
    ]
    .into_iter()
    .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() })
    .collect()
}

/// The MSRs to save and restore with a vCPU: those of KVM_GET_MSR_INDEX_LIST and the MTRRs, which that leaves out, each
/// once, in an order in which they can be written back. The deadline is last because writing the TSC moves it. Hyper-V's
/// are left out: the guest is not told of them, and some count whether it runs or not.
pub fn state_msrs(index_list: &[u32]) -> Vec<u32> {
    let listed = index_list.iter().copied().filter(|index| !HYPER_V.contains(index));
    let mut msrs: Vec<u32> = listed.chain(MTRRS.into_iter().flatten()).collect();
    msrs.sort_unstable_by_key(|index| (*index == number::TSC_DEADLINE, *index));
    msrs.dedup();
    msrs
}

/// Whether a guest that was given this MSR cannot do without its value.
pub fn is_vital(index: u32) -> bool {
    const FS_BASE: u32 = 0xc000_0100;
    matches!(
        index,
        number::TSC
            | number::TSC_DEADLINE
            | number::SYSENTER_CS..=number::SYSENTER_EIP
            | number::PAT
            | number::EFER..=number::SYSCALL_MASK
            | FS_BASE..=number::TSC_AUX
            | number::KVM_WALL_CLOCK..=number::KVM_SYSTEM_TIME
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deadline_is_restored_after_the_tsc() {
        let msrs = state_msrs(&[0x6e0, 0xc000_0081, 0x10, 0x174, 0x10, 0x4000_0020]);
        assert_eq!(
            msrs.iter().filter(|index| !(0x200..0x300).contains(*index)).collect::<Vec<_>>(),
            [&0x10, &0x174, &0xc000_0081, &0x6e0]
        );
        assert!(msrs.contains(&0x2ff) && msrs.contains(&0x26f));
    }

    #[test]
    fn every_boot_msr_is_set_once() {
        let mut indices: Vec<_> = boot_msrs().iter().map(|msr| msr.index).collect();
        let count = indices.len();
        indices.sort_unstable();
        indices.dedup();
        assert_eq!(indices.len(), count);
    }
}
