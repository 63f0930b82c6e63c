//! The features of CPUID that a guest may use once it was told of them.

use std::fmt;

use super::{CpuidLeaf, Word};

/// One register of one leaf: those whose bits are features.
struct Register {
    leaf: u32,
    index: u32,
    name: &'static str,
    of: fn(&CpuidLeaf) -> Word,
    /// Bits that say something else, or that we set ourselves whatever the host has.
    ignored: u32,
    /// Names as in Linux's /proc/cpuinfo, from bit 0 up; `-` where there is none.
    names: &'static str,
}

/// OSXSAVE follows CR4; x2APIC, TSC-deadline timer and "hypervisor" are the machine's own.
const LEAF_1_ECX: u32 = 1 << 27 | 1 << 21 | 1 << 24 | 1 << 31;
/// Several threads.
const LEAF_1_EDX: u32 = 1 << 28;
/// OSPKE follows CR4.
const LEAF_7_ECX: u32 = 1 << 4;
/// Several cores in the manner of old.
const EXTENDED_ECX: u32 = 1 << 1;

const REGISTERS: &[Register] = &[
    Register {
        leaf: 1,
        index: 0,
        name: "ECX",
        of: |leaf| leaf.ecx,
        ignored: LEAF_1_ECX,
        names: "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 \
                sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    },
    Register {
        leaf: 1,
        index: 0,
        name: "EDX",
        of: |leaf| leaf.edx,
        ignored: LEAF_1_EDX,
        names: "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr \
                sse sse2 ss ht tm ia64 pbe",
    },
    Register {
        leaf: 7,
        index: 0,
        name: "EBX",
        of: |leaf| leaf.ebx,
        ignored: 0,
        names: "fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm cqm - mpx rdt_a avx512f avx512dq rdseed \
                adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    },
    Register {
        leaf: 7,
        index: 0,
        name: "ECX",
        of: |leaf| leaf.ecx,
        ignored: LEAF_7_ECX,
        names: "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni \
                avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b \
                enqcmd sgx_lc pks",
    },
    Register {
        leaf: 7,
        index: 0,
        name: "EDX",
        of: |leaf| leaf.edx,
        ignored: 0,
        names: "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect - md_clear - - - serialize hybrid_cpu \
                tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 ibrs stibp flush_l1d \
                arch_capabilities core_capabilities ssbd",
    },
    Register { leaf: 7, index: 1, name: "EAX", of: |leaf| leaf.eax, ignored: 0, names: "" },
    Register { leaf: 0xd, index: 0, name: "EAX", of: |leaf| leaf.eax, ignored: 0, names: "" },
    Register { leaf: 0xd, index: 0, name: "EDX", of: |leaf| leaf.edx, ignored: 0, names: "" },
    Register {
        leaf: 0xd,
        index: 1,
        name: "EAX",
        of: |leaf| leaf.eax,
        ignored: 0,
        names: "xsaveopt xsavec xgetbv1 xsaves xfd",
    },
    Register {
        leaf: 0x4000_0001,
        index: 0,
        name: "EAX",
        of: |leaf| leaf.eax,
        ignored: 0,
        names: "kvmclock nop_io_delay - kvmclock2",
    },
    Register {
        leaf: 0x8000_0001,
        index: 0,
        name: "ECX",
        of: |leaf| leaf.ecx,
        ignored: EXTENDED_ECX,
        names: "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp \
                fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    },
    Register {
        leaf: 0x8000_0001,
        index: 0,
        name: "EDX",
        of: |leaf| leaf.edx,
        ignored: 0,
        names: "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - mmxext mmx fxsr \
                fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    },
    Register {
        leaf: 0x8000_0007,
        index: 0,
        name: "EDX",
        of: |leaf| leaf.edx,
        ignored: 0,
        names: "- - - - - - - - nonstop_tsc",
    },
    Register {
        leaf: 0x8000_0008,
        index: 0,
        name: "EBX",
        of: |leaf| leaf.ebx,
        ignored: 0,
        names: "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - ibpb - ibrs stibp",
    },
    Register { leaf: 0x8000_0021, index: 0, name: "EAX", of: |leaf| leaf.eax, ignored: 0, names: "" },
];

/// A feature that is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Missing {
    leaf: u32,
    index: u32,
    register: &'static str,
    bit: u32,
    name: Option<&'static str>,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Missing { leaf, index, register, bit, name } = self;
        match name {
            Some(name) => f.write_str(name),
            None => write!(f, "CPUID {leaf:#x}.{index} {register} bit {bit}"),
        }
    }
}

/// The features of `told` that are not in `supported`.
pub(super) fn missing(told: &[CpuidLeaf], supported: &[CpuidLeaf]) -> Vec<Missing> {
    REGISTERS
        .iter()
        .flat_map(|register| {
            let bits = |leaves: &[CpuidLeaf]| bits(leaves, register);
            let lacks = bits(told) & !bits(supported) & !register.ignored;
            (0..32).filter(move |bit| lacks & 1 << bit != 0).map(|bit| Missing {
                leaf: register.leaf,
                index: register.index,
                register: register.name,
                bit,
                name: register.names.split_whitespace().nth(bit as usize).filter(|name| *name != "-"),
            })
        })
        .collect()
}

fn bits(leaves: &[CpuidLeaf], register: &Register) -> u32 {
    let of = |leaf: &&CpuidLeaf| {
        leaf.function == register.leaf.into() && (!leaf.indexed || leaf.index == register.index.into())
    };
    // Where the index does not count there is one leaf, that of index 0.
    leaves
        .iter()
        .find(of)
        .filter(|leaf| leaf.indexed || register.index == 0)
        .map_or(0, |leaf| (register.of)(leaf).0 as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidLeaf {
        let indexed = matches!(function, 7 | 0xd);
        let [eax, ebx, ecx, edx] = [eax, ebx, ecx, edx].map(Word::from);
        CpuidLeaf { function: function.into(), index: index.into(), indexed, eax, ebx, ecx, edx }
    }

    fn names(told: &[CpuidLeaf], supported: &[CpuidLeaf]) -> Vec<String> {
        missing(told, supported).iter().map(Missing::to_string).collect()
    }

    #[test]
    fn what_is_missing_is_named() {
        let here = [leaf(1, 0, [0x800f12, 0, 1 << 20, 1]), leaf(7, 0, [1, 0, 0, 0]), leaf(7, 1, [1 << 4, 0, 0, 0])];
        let told = [
            leaf(1, 0, [0x123456, 0xff, 1 << 20 | 1 << 23, 1 | 1 << 26]),
            leaf(7, 0, [2, 1 << 5, 0, 0]),
            leaf(7, 1, [1 << 4 | 1 << 5, 0, 0, 0]),
        ];
        assert_eq!(names(&told, &here), ["popcnt", "sse2", "avx2", "CPUID 0x7.1 EAX bit 5"]);
        assert_eq!(names(&here, &here), [""; 0]);
        assert_eq!(names(&here, &told), [""; 0], "more is no harm");
    }

    #[test]
    fn what_the_machine_sets_itself_is_not_the_hosts() {
        let told = [leaf(1, 0, [0, 0, LEAF_1_ECX, LEAF_1_EDX]), leaf(0x8000_0001, 0, [0, 0, EXTENDED_ECX, 0])];
        assert_eq!(names(&told, &[]), [""; 0]);
    }

    #[test]
    fn a_register_has_no_more_names_than_bits() {
        for register in REGISTERS {
            assert!(register.names.split_whitespace().count() <= 32, "{:#x} {}", register.leaf, register.name);
        }
        // Some that are known from elsewhere, each at the far end of a list.
        let bit = |leaf, name: &str| {
            let in_leaf = REGISTERS.iter().filter(|register| register.leaf == leaf);
            in_leaf.filter_map(|register| register.names.split_whitespace().position(|n| n == name)).collect::<Vec<_>>()
        };
        for (leaf, name, expected) in [
            (1, "rdrand", 30),
            (1, "pbe", 31),
            (7, "avx512vl", 31),
            (7, "pks", 31),
            (7, "ssbd", 31),
            (7, "la57", 16),
            (0x8000_0001, "mwaitx", 29),
            (0x8000_0001, "lm", 29),
            (0x8000_0001, "3dnow", 31),
            (0x8000_0008, "stibp", 15),
            (0x8000_0007, "nonstop_tsc", 8),
        ] {
            assert_eq!(bit(leaf, name), [expected], "{name}");
        }
    }
}
