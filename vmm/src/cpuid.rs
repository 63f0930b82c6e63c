//! CPUID as the guest sees it: what KVM can do, with one package of as many cores as there are vCPUs, one thread each.
//!
//! The APIC id of vCPU n is n. Every leaf that speaks of processors says the same: Linux believes the first that it finds,
//! and warns where two differ. Leaf by leaf (SDM 2A CPUID; AMD APM 3 appendix E; Linux, Documentation/virt/kvm/x86/cpuid.rst):
//!
//! | leaf                 | changed to                                                                        |
//! |----------------------|-----------------------------------------------------------------------------------|
//! | 1                    | APIC id, logical processors, HTT; hypervisor, x2APIC and TSC-deadline bits        |
//! | 4, 0x8000001D        | L1 and L2 are each core's own, the rest is shared by all; cores per package       |
//! | 0xA, 0x80000022      | zero: no performance counters (they would count the debugger's own steps)         |
//! | 0xB, 0x1F            | made anew: threads, cores                                                         |
//! | 0x40000000, ...1     | "KVMKVMKVM"; kvmclock and no I/O delay, nothing by which KVM writes to guest memory otherwise |
//! | 0x80000001           | CmpLegacy (AMD); no extended performance counters                                 |
//! | 0x80000008           | cores, width of a core's id (AMD)                                                 |
//! | 0x8000001E           | APIC id, core id, one thread, one node (AMD)                                      |
//! | 0x80000026           | left out: Linux falls back to 0xB                                                 |

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::state::{CpuidLeaf, Word};

impl From<&kvm_cpuid_entry2> for CpuidLeaf {
    fn from(entry: &kvm_cpuid_entry2) -> Self {
        let [function, index, eax, ebx, ecx, edx] =
            [entry.function, entry.index, entry.eax, entry.ebx, entry.ecx, entry.edx].map(Word::from);
        CpuidLeaf { function, index, indexed: entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0, eax, ebx, ecx, edx }
    }
}

/// An entry for KVM_SET_CPUID2; of each register the low 32 bits.
impl From<&CpuidLeaf> for kvm_cpuid_entry2 {
    fn from(leaf: &CpuidLeaf) -> Self {
        let [function, index, eax, ebx, ecx, edx] =
            [leaf.function, leaf.index, leaf.eax, leaf.ebx, leaf.ecx, leaf.edx].map(|word| word.0 as u32);
        let flags = if leaf.indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
        kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
    }
}

/// What the entries are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Number of vCPUs, at least 1.
    pub cpus: u32,
    /// KVM_CAP_TSC_DEADLINE_TIMER: the local APIC's timer has the mode. KVM_GET_SUPPORTED_CPUID of older kernels does
    /// not say.
    pub tsc_deadline: bool,
}

impl Topology {
    /// Room for the ids of all cores: a power of two.
    fn id_space(self) -> u32 {
        self.cpus.next_power_of_two()
    }

    /// Bits of a core's id.
    fn id_width(self) -> u32 {
        self.id_space().trailing_zeros()
    }
}

const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;

const EXT1_ECX_CMP_LEGACY: u32 = 1 << 1;
/// Core, northbridge and L2 counters.
const EXT1_ECX_PERF: u32 = 1 << 23 | 1 << 24 | 1 << 28;

const KVM_SIGNATURE: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
const HYPERVISOR_LEAVES: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4fff_ffff;
/// KVM_FEATURE_CLOCKSOURCE, NOP_IO_DELAY, CLOCKSOURCE2, CLOCKSOURCE_STABLE_BIT.
const KVM_FEATURES_KEPT: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 24;

/// Types of a level in leaf 0xB and 0x1F.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The entries for KVM_SET_CPUID2 of vCPU `id` (below `topology.cpus`), from those of KVM_GET_SUPPORTED_CPUID.
pub fn vcpu_entries(supported: &[kvm_cpuid_entry2], id: u32, topology: Topology) -> Vec<kvm_cpuid_entry2> {
    let leaf0 = supported.iter().find(|entry| entry.function == 0);
    let max_leaf = leaf0.map_or(0, |entry| entry.eax);
    let amd = leaf0.is_some_and(is_amd);
    let made_here = |function: u32| {
        matches!(function, 0xb | 0x1f | 0x8000_0026)
            || HYPERVISOR_LEAVES.contains(&function) && function != KVM_FEATURES
    };
    let mut entries: Vec<_> = supported
        .iter()
        .filter(|entry| !made_here(entry.function))
        .map(|entry| adjust(*entry, id, topology, amd))
        .collect();
    for leaf in [0xb, 0x1f] {
        if leaf <= max_leaf {
            entries.extend(topology_levels(leaf, id, topology));
        }
    }
    let [ebx, ecx, edx] = [*b"KVMK", *b"VMKV", *b"M\0\0\0"].map(u32::from_le_bytes);
    entries.push(kvm_cpuid_entry2 { function: KVM_SIGNATURE, eax: KVM_FEATURES, ebx, ecx, edx, ..Default::default() });
    entries
}

/// Whether leaf 0 names AMD or its licensee.
fn is_amd(leaf0: &kvm_cpuid_entry2) -> bool {
    let name = [leaf0.ebx, leaf0.edx, leaf0.ecx].map(u32::to_le_bytes).concat();
    name == b"AuthenticAMD" || name == b"HygonGenuine"
}

/// One entry with what is said of processors put right.
fn adjust(mut entry: kvm_cpuid_entry2, id: u32, topology: Topology, amd: bool) -> kvm_cpuid_entry2 {
    let several = topology.cpus > 1;
    match entry.function {
        1 => {
            let logical = topology.id_space().min(0xff);
            entry.ebx = (entry.ebx & 0xffff) | logical << 16 | id << 24;
            entry.ecx |= LEAF1_ECX_HYPERVISOR | LEAF1_ECX_X2APIC;
            set(&mut entry.ecx, LEAF1_ECX_TSC_DEADLINE, topology.tsc_deadline);
            set(&mut entry.edx, LEAF1_EDX_HTT, several);
        }
        4 => {
            entry.eax = cache(entry.eax, topology);
            if entry.eax & 0x1f != 0 {
                let cores = (topology.id_space() - 1).min(0x3f);
                entry.eax = (entry.eax & 0x03ff_ffff) | cores << 26;
            }
        }
        0xa | 0x8000_0022 => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        KVM_FEATURES => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (entry.eax & KVM_FEATURES_KEPT, 0, 0, 0);
        }
        0x8000_0001 => {
            entry.ecx &= !EXT1_ECX_PERF;
            if amd {
                set(&mut entry.ecx, EXT1_ECX_CMP_LEGACY, several);
            }
        }
        0x8000_0008 if amd => {
            let cores = (topology.cpus - 1).min(0xff);
            entry.ecx = (entry.ecx & !0xf0ff) | topology.id_width() << 12 | cores;
        }
        0x8000_001d => entry.eax = cache(entry.eax, topology),
        0x8000_001e => {
            (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0);
        }
        _ => {}
    }
    entry
}

/// EAX of a cache's description: who shares it. Bits 4:0 are its type (0: none), 7:5 its level.
fn cache(eax: u32, topology: Topology) -> u32 {
    if eax & 0x1f == 0 {
        return eax;
    }
    let level = eax >> 5 & 7;
    let sharing = if level <= 2 { 1 } else { topology.id_space() };
    (eax & !0x03ff_c000) | (sharing - 1) << 14
}

/// The levels of leaf 0xB or 0x1F: threads of a core, cores of the package, end.
fn topology_levels(leaf: u32, id: u32, topology: Topology) -> [kvm_cpuid_entry2; 3] {
    let level = |index, shift, processors, kind: u32| kvm_cpuid_entry2 {
        function: leaf,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: kind << 8 | index,
        edx: id,
        ..Default::default()
    };
    [level(0, 0, 1, LEVEL_THREAD), level(1, topology.id_width(), topology.cpus, LEVEL_CORE), level(2, 0, 0, 0)]
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on { *register | bit } else { *register & !bit };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// As KVM describes an Intel host: 8 cores with 2 threads, foreign APIC ids.
    fn intel() -> Vec<kvm_cpuid_entry2> {
        let [ebx, edx, ecx] = [*b"Genu", *b"ineI", *b"ntel"].map(u32::from_le_bytes);
        vec![
            leaf(0, 0, [0x20, ebx, ecx, edx]),
            leaf(1, 0, [0x806f8, 0x1310_0800, 0xfffa_3203, 0x1f8b_fbff]),
            leaf(4, 0, [0x1c00_4121, 0x02c0_003f, 0x3f, 0]),
            leaf(4, 2, [0x1c00_4143, 0x03c0_003f, 0x7ff, 0]),
            leaf(4, 3, [0x1c03_c163, 0x0380_003f, 0x9fff, 4]),
            leaf(4, 4, [0, 0, 0, 0]),
            leaf(0xa, 0, [0x0830_0805, 0, 0, 0x603]),
            leaf(0xb, 0, [0, 0, 0, 0x13]),
            leaf(0x1f, 0, [0, 0, 0, 0x13]),
            leaf(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
            leaf(0x4000_0001, 0, [0x0100_7efb, 0, 0, 1]),
            leaf(0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
            leaf(0x8000_0008, 0, [0x3039, 0, 0, 0]),
        ]
    }

    /// As KVM describes an AMD host.
    fn amd() -> Vec<kvm_cpuid_entry2> {
        let [ebx, edx, ecx] = [*b"Auth", *b"enti", *b"cAMD"].map(u32::from_le_bytes);
        vec![
            leaf(0, 0, [0x10, ebx, ecx, edx]),
            leaf(1, 0, [0xa20f12, 0x0510_0800, 0xfef8_3203, 0x1789_fbff]),
            leaf(0xb, 0, [0, 0, 0, 5]),
            leaf(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0xa20f12, 0, 0x75c2_37ff, 0x2fd3_fbff]),
            leaf(0x8000_0008, 0, [0x3030, 0x111e_f657, 0x700f, 0x1_0000]),
            leaf(0x8000_001d, 0, [0x4121, 0x01c0_003f, 0x3f, 0]),
            leaf(0x8000_001d, 2, [0x4143, 0x01c0_003f, 0x3ff, 2]),
            leaf(0x8000_001d, 3, [0x3c163, 0x03c0_003f, 0x7fff, 1]),
            leaf(0x8000_001e, 0, [5, 0x102, 0, 0]),
            leaf(0x8000_0022, 0, [1, 6, 0, 0]),
            leaf(0x8000_0026, 0, [1, 2, 0x100, 5]),
        ]
    }

    const CPUS: [u32; 6] = [1, 2, 3, 4, 63, 64];

    fn of(supported: &[kvm_cpuid_entry2], cpus: u32, id: u32) -> Vec<kvm_cpuid_entry2> {
        vcpu_entries(supported, id, Topology { cpus, tsc_deadline: true })
    }

    fn get(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = entries.iter().filter(|e| (e.function, e.index) == (function, index));
        let entry = *found.next().unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"));
        assert!(found.next().is_none(), "leaf {function:#x}.{index} twice");
        entry
    }

    /// (package, core, thread) of a vCPU by leaf 0xB or 0x1F, as the SDM's algorithm goes (3A 9.9.3.1).
    fn by_levels(entries: &[kvm_cpuid_entry2], leaf: u32) -> (u32, u32, u32) {
        let (mut thread_shift, mut package_shift, mut apic_id) = (0, 0, None);
        for index in 0.. {
            let level = get(entries, leaf, index);
            assert_eq!(level.ecx & 0xff, index);
            let kind = level.ecx >> 8 & 0xff;
            if kind == 0 {
                break;
            }
            assert!(*apic_id.get_or_insert(level.edx) == level.edx);
            if kind == LEVEL_THREAD {
                thread_shift = level.eax & 0x1f;
            }
            package_shift = level.eax & 0x1f;
        }
        let id = apic_id.unwrap();
        let below = id & ((1 << package_shift) - 1);
        (id >> package_shift, below >> thread_shift, below & ((1 << thread_shift) - 1))
    }

    #[test]
    fn one_package_n_cores_by_every_leaf_that_says_so() {
        for supported in [intel(), amd()] {
            for cpus in CPUS {
                let mut cores = BTreeSet::new();
                for id in 0..cpus {
                    let entries = of(&supported, cpus, id);
                    let (package, core, thread) = by_levels(&entries, 0xb);
                    assert_eq!((package, thread), (0, 0), "{cpus} vCPUs, {id}");
                    cores.insert(core);
                    assert_eq!(get(&entries, 0xb, 1).ebx, cpus);
                    let leaf1 = get(&entries, 1, 0);
                    assert_eq!(leaf1.ebx >> 24, id);
                    assert_eq!(leaf1.edx & LEAF1_EDX_HTT != 0, cpus > 1);
                    let logical = leaf1.ebx >> 16 & 0xff;
                    assert!(logical >= cpus && logical.is_power_of_two());
                }
                assert_eq!(cores.len() as u32, cpus);
            }
        }
    }

    #[test]
    fn intel_leaf_4_and_1f_agree() {
        for cpus in CPUS {
            for id in 0..cpus {
                let entries = of(&intel(), cpus, id);
                assert_eq!(by_levels(&entries, 0x1f), (0, id, 0));
                for index in [0, 2, 3] {
                    let eax = get(&entries, 4, index).eax;
                    assert_eq!((eax >> 26) + 1, cpus.next_power_of_two());
                    let sharing = (eax >> 14 & 0xfff) + 1;
                    let all = cpus.next_power_of_two();
                    assert_eq!(sharing, if index == 3 { all } else { 1 });
                }
                assert_eq!(get(&entries, 4, 4).eax, 0, "the list's end stays the end");
            }
        }
        let entries = of(&intel(), 4, 1);
        assert_eq!(get(&entries, 0x8000_0008, 0).ecx, 0, "reserved on Intel");
        assert_eq!(get(&entries, 0x8000_0001, 0).ecx & EXT1_ECX_CMP_LEGACY, 0);
    }

    #[test]
    fn amd_extended_leaves_agree() {
        for cpus in CPUS {
            for id in 0..cpus {
                let entries = of(&amd(), cpus, id);
                let size = get(&entries, 0x8000_0008, 0).ecx;
                assert_eq!((size & 0xff) + 1, cpus);
                assert_eq!(id >> (size >> 12 & 0xf), 0, "package 0");
                assert!(1 << (size >> 12 & 0xf) >= cpus);
                let node = get(&entries, 0x8000_001e, 0);
                assert_eq!((node.eax, node.ebx & 0xff), (id, id));
                assert_eq!((node.ebx >> 8 & 0xff, node.ecx), (0, 0), "1 thread, node 0 of 1");
                let legacy = get(&entries, 0x8000_0001, 0).ecx & EXT1_ECX_CMP_LEGACY;
                assert_eq!(legacy != 0, cpus > 1);
                assert!(entries.iter().all(|e| e.function != 0x8000_0026));
                let l3 = get(&entries, 0x8000_001d, 3).eax;
                assert_eq!((l3 >> 14 & 0xfff) + 1, cpus.next_power_of_two());
                assert_eq!(get(&entries, 0x8000_001d, 2).eax >> 14 & 0xfff, 0);
            }
        }
    }

    #[test]
    fn timer_and_hypervisor_bits() {
        for tsc_deadline in [false, true] {
            let entries = vcpu_entries(&amd(), 0, Topology { cpus: 2, tsc_deadline });
            let ecx = get(&entries, 1, 0).ecx;
            assert_eq!(ecx & LEAF1_ECX_TSC_DEADLINE != 0, tsc_deadline);
            assert_ne!(ecx & LEAF1_ECX_HYPERVISOR, 0);
            assert_ne!(ecx & LEAF1_ECX_X2APIC, 0);
        }
    }

    #[test]
    fn kvm_shows_itself_with_the_clock_and_little_else() {
        for supported in [intel(), amd()] {
            let entries = of(&supported, 2, 1);
            let signature = get(&entries, KVM_SIGNATURE, 0);
            let name = [signature.ebx, signature.ecx, signature.edx];
            assert_eq!(name.map(u32::to_le_bytes).concat(), b"KVMKVMKVM\0\0\0");
            assert_eq!(signature.eax, KVM_FEATURES);
            assert_eq!(get(&entries, KVM_FEATURES, 0).eax, 0x0100_000b);
        }
    }

    #[test]
    fn there_are_no_performance_counters() {
        assert_eq!(get(&of(&intel(), 2, 0), 0xa, 0).eax, 0);
        assert_eq!(get(&of(&amd(), 2, 0), 0x8000_0022, 0).eax, 0);
        assert_eq!(get(&of(&amd(), 2, 0), 0x8000_0001, 0).ecx & EXT1_ECX_PERF, 0);
    }

    #[test]
    fn an_old_processor_gets_no_leaf_beyond_its_last() {
        let mut supported = amd();
        supported[0].eax = 0xa;
        let entries = of(&supported, 2, 1);
        assert!(entries.iter().all(|e| e.function != 0xb && e.function != 0x1f));
        assert!(of(&[], 1, 0).iter().all(|e| e.function == KVM_SIGNATURE));
    }
}
