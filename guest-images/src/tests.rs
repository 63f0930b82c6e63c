//! What the images promise, and that every KVM flavour can run them.

use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic};
use object::{Object, ObjectSection, ObjectSegment, ObjectSymbol, SectionKind};

use crate::{acts, demo, fixture, formats, symbol};

/// An image, and the symbols in it whose code may do what others may not.
struct Image {
    name: &'static str,
    bytes: &'static [u8],
    exempt: &'static [&'static str],
}

const IMAGES: &[fn() -> Image] = &[
    || Image { name: "demo", bytes: crate::demo(), exempt: &[] },
    || Image { name: "acts", bytes: crate::acts(), exempt: &["clac_here"] },
    || Image { name: "multiboot32", bytes: formats::multiboot32(), exempt: &[] },
    || Image { name: "multiboot64", bytes: formats::multiboot64(), exempt: &[] },
    || Image { name: "pvh", bytes: formats::pvh(), exempt: &[] },
    || Image {
        name: "fixture",
        bytes: fixture::image(),
        // What exits or goes another way where ring 0 is interpreted, and ring 3.
        exempt: &[
            "i1",
            "i3",
            "i3_long",
            "i3_loop",
            "int_n_at",
            "nop_hint_0f19",
            "s_int",
            "u_int",
            "u_int3",
            "u_sse",
            "u_sse_store",
            "w_movnti",
            "w_sse",
            "w_sse_load",
        ],
    },
];

/// What the slowest and narrowest KVM flavour interprets in ring 0.
const INTERPRETED: &[CpuidFeature] = &[
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CET_IBT,
    CpuidFeature::CMOV,
    CpuidFeature::CPUID,
    CpuidFeature::CX8,
    CpuidFeature::MSR,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PAUSE,
    CpuidFeature::SYSCALL,
    CpuidFeature::TSC,
];

/// Of those, what it does not interpret after all.
const REFUSED: &[Mnemonic] = &[
    Mnemonic::Int,
    Mnemonic::Int1,
    Mnemonic::Int3,
    Mnemonic::Lar,
    Mnemonic::Lsl,
    Mnemonic::Verr,
    Mnemonic::Verw,
    Mnemonic::Enter,
    Mnemonic::Sysenter,
    Mnemonic::INVALID,
];

fn interpreted(instruction: &Instruction) -> bool {
    !REFUSED.contains(&instruction.mnemonic())
        && instruction.cpuid_features().iter().all(|feature| INTERPRETED.contains(feature))
}

/// All instructions of the executable sections, by linear decoding.
fn instructions(image: &Image) -> Vec<Instruction> {
    let file = object::File::parse(image.bytes).expect(image.name);
    let mut all = Vec::new();
    for section in file.sections() {
        if section.kind() == SectionKind::Text {
            let code = section.data().expect("section data");
            all.extend(decoded(&file, section.address(), code));
        }
    }
    all
}

/// Decodes code as 64-bit, but from `_start` to `format_long` (if there is one) as
/// 32-bit.
fn decoded(file: &object::File<'_>, address: u64, code: &[u8]) -> Vec<Instruction> {
    let find = |name| file.symbol_by_name(name).map(|symbol| symbol.address());
    let part = |bits, from: u64, to: u64| {
        let range = usize::try_from(from - address).expect("small")..usize::try_from(to - address).expect("small");
        Decoder::with_ip(bits, &code[range], from, DecoderOptions::NONE).iter().collect::<Vec<_>>()
    };
    let end = address + code.len() as u64;
    let Some(long) = find("format_long") else {
        return part(64, address, end);
    };
    let start = find("_start").expect("an entry");
    assert!((address..end).contains(&start) && (start..end).contains(&long));
    [part(64, address, start), part(32, start, long), part(64, long, end)].concat()
}

/// The symbol at or before an address.
fn owner<'a>(file: &'a object::File<'_>, address: u64) -> &'a str {
    file.symbols()
        .filter(|symbol| symbol.address() <= address)
        .max_by_key(|symbol| symbol.address())
        .and_then(|symbol| symbol.name().ok())
        .unwrap_or("?")
}

#[test]
fn images_hold_only_what_ring_0_can_run_everywhere() {
    for image in IMAGES.iter().map(|image| image()) {
        let file = object::File::parse(image.bytes).expect(image.name);
        let all = instructions(&image);
        assert!(all.len() > 20, "{}: no code", image.name);
        for instruction in all.iter().filter(|i| !interpreted(i)) {
            let owner = owner(&file, instruction.ip());
            assert!(
                image.exempt.contains(&owner),
                "{}: {:?} at {:#x} in {owner}",
                image.name,
                instruction.mnemonic(),
                instruction.ip(),
            );
        }
    }
}

/// The check above would be worthless if it let these pass.
#[test]
fn the_check_refuses_what_it_must() {
    let refused: &[(&str, &[u8])] = &[
        ("popcnt", &[0xf3, 0x0f, 0xb8, 0xc0]),
        ("tzcnt", &[0xf3, 0x0f, 0xbc, 0xc0]),
        ("lzcnt", &[0xf3, 0x0f, 0xbd, 0xc0]),
        ("pxor", &[0x66, 0x0f, 0xef, 0xc0]),
        ("fld1", &[0xd9, 0xe8]),
        ("cmpxchg16b", &[0x48, 0x0f, 0xc7, 0x0f]),
        ("int3", &[0xcc]),
        ("int 0x80", &[0xcd, 0x80]),
        ("int1", &[0xf1]),
        ("vmcall", &[0x0f, 0x01, 0xc1]),
        ("clac", &[0x0f, 0x01, 0xca]),
        ("rdtscp", &[0x0f, 0x01, 0xf9]),
        ("xgetbv", &[0x0f, 0x01, 0xd0]),
    ];
    for (name, bytes) in refused {
        let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        assert!(!interpreted(&instruction), "{name}");
    }
    let fine: &[(&str, &[u8])] = &[
        ("endbr64", &[0xf3, 0x0f, 0x1e, 0xfa]),
        ("nopl", &[0x0f, 0x1f, 0x44, 0x00, 0x00]),
        ("lock incq (rdi)", &[0xf0, 0x48, 0xff, 0x07]),
        ("iretq", &[0x48, 0xcf]),
        ("rep stosb", &[0xf3, 0xaa]),
    ];
    for (name, bytes) in fine {
        let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        assert!(interpreted(&instruction), "{name}");
    }
}

#[test]
fn images_name_no_build_path() {
    let here = env!("CARGO_MANIFEST_DIR").as_bytes();
    for image in IMAGES.iter().map(|image| image()) {
        let found = image.bytes.windows(here.len()).any(|part| part == here);
        assert!(!found, "{} names the directory it was built in", image.name);
    }
}

/// It runs where nothing else is, and says nothing of where it was built.
#[test]
fn init_stands_alone() {
    let image = crate::init();
    let file = object::File::parse(image).expect("an ELF");
    assert_eq!(file.kind(), object::ObjectKind::Executable);
    assert!(file.section_by_name(".interp").is_none() && file.section_by_name(".dynamic").is_none());
    let entry = crate::entry(image).expect("entry");
    assert!(file.segments().any(|segment| (segment.address()..segment.address() + segment.size()).contains(&entry)));
    let here = env!("CARGO_MANIFEST_DIR").as_bytes();
    assert!(!image.windows(here.len()).any(|part| part == here));
}

#[test]
fn entries_lie_in_executable_segments() {
    for image in IMAGES.iter().map(|image| image()) {
        let entry = crate::entry(image.bytes).expect("entry");
        let file = object::File::parse(image.bytes).expect(image.name);
        let inside = file.sections().any(|section| {
            section.kind() == SectionKind::Text
                && (section.address()..section.address() + section.size()).contains(&entry)
        });
        assert!(inside, "{}: entry {entry:#x} is not in code", image.name);
    }
}

#[test]
fn images_have_source_lines() {
    for image in IMAGES.iter().map(|image| image()) {
        let file = object::File::parse(image.bytes).expect(image.name);
        let lines = file.section_by_name(".debug_line").expect("line table");
        assert!(lines.size() > 100, "{}: no source lines", image.name);
    }
}

#[test]
fn a_missing_symbol_or_image_is_none() {
    assert_eq!(symbol(crate::demo(), "no_such_symbol"), None);
    assert_eq!(symbol(b"not an image", "count_up"), None);
    assert_eq!(crate::entry(&[]), None);
    assert!(crate::symbols(b"\x7fELF").is_empty());
}

#[test]
fn the_demo_has_what_its_documentation_names() {
    for name in [
        "_start",
        "guest_main",
        "ap_start",
        "ap_main",
        "cpu_loop",
        "count_a_round",
        "count_up",
        "count_up_here",
        "count_up_traced",
        "count_up_traced_here",
        "publish",
        "tick",
        "print_progress",
        "jiffies",
        "last_writer",
        "rounds_published",
        "stop_request",
        "exit_status",
        "debug_exceptions_seen",
        "breakpoint_exceptions_seen",
        "cpus",
        "cpu_count",
    ] {
        assert!(symbol(crate::demo(), name).is_some(), "no {name}");
    }
    let file = object::File::parse(crate::demo()).expect("demo");
    let cpus = file.symbol_by_name("cpus").expect("cpus");
    assert_eq!(cpus.size(), demo::CPU_SIZE * u64::from(crate::MAX_CPUS));
    assert_eq!(demo::count_address(0), Some(cpus.address()));
    assert_eq!(demo::count_address(64), None);
}

/// The counting label is one instruction, a locked-in `inc` of the right field.
#[test]
fn counting_is_one_instruction() {
    let image = IMAGES[0]();
    let all = instructions(&image);
    for (label, offset) in [("count_up_here", demo::COUNT_OFFSET), ("count_up_traced_here", demo::TRACED_COUNT_OFFSET)]
    {
        let at = symbol(image.bytes, label).expect(label);
        let here = all.iter().find(|i| i.ip() == at).expect("an instruction");
        assert_eq!(here.mnemonic(), Mnemonic::Inc, "{label}");
        assert_eq!(here.memory_displacement64(), offset, "{label}");
    }
}

/// As the functions of a distribution's kernel begin.
#[test]
fn the_traced_function_begins_as_linux_functions_do() {
    let at = symbol(crate::demo(), "count_up_traced").expect("count_up_traced");
    let file = object::File::parse(crate::demo()).expect("demo");
    let text = file.section_by_name(".text").expect(".text");
    let begin = text.data_range(at, 9).expect("data").expect("nine bytes");
    assert_eq!(begin, [0xf3, 0x0f, 0x1e, 0xfa, 0x0f, 0x1f, 0x44, 0, 0]);
}

/// The rows that the image holds: name, entry, 1 if it is for all CPUs.
fn rows() -> Vec<(String, u64, u64)> {
    let file = object::File::parse(fixture::image()).expect("fixture");
    let section = file.section_by_name("fx_properties").expect("the table");
    let data = section.data().expect("data");
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
    data.chunks_exact(48)
        .map(|row| {
            let name = row[..32].iter().take_while(|&&b| b != 0).copied().collect();
            let name = String::from_utf8(name).expect("a name");
            (name, word(&row[32..40]), word(&row[40..48]))
        })
        .collect()
}

#[test]
fn the_fixture_and_its_table_agree() {
    let rows = rows();
    assert_eq!(rows.len(), fixture::PROPERTIES.len());
    for property in fixture::PROPERTIES {
        let name = property.name;
        let (_, entry, cpus) =
            rows.iter().find(|row| row.0 == name).unwrap_or_else(|| panic!("{name} is not in the image"));
        assert_eq!(fixture::entry(name), Some(*entry), "{name}");
        assert_eq!(*cpus == 1, property.cpus == fixture::Cpus::All, "{name}");
        for label in property.labels {
            assert!(fixture::label(label).is_some(), "{name}: no label {label}");
        }
    }
}

#[test]
fn an_unknown_property_or_cpu_is_none() {
    assert_eq!(fixture::entry("no_such_property"), None);
    assert_eq!(fixture::entry("cpu"), None); // fx_cpu exists, but is none
    assert_eq!(fixture::start("loop5", 64), None);
    assert_eq!(fixture::start("loop5", u32::MAX), None);
    assert_eq!(fixture::start_in_ring_3("loop5", 0), None);
    assert_eq!(fixture::cpu_address(64, 0), None);
    assert_eq!(fixture::saved_address(16), None);
}

/// The numbers of fixture.h and layout.h that Rust repeats.
#[test]
fn the_fixture_and_its_header_agree() {
    use fixture::{cpu_field, flag, user_field, vector};
    let header = concat!(include_str!("../common/layout.h"), include_str!("../fixture/fixture.h"));
    let number = |name: &str| {
        let text = header
            .lines()
            .filter_map(|line| line.strip_prefix("#define "))
            .filter_map(|line| line.strip_prefix(name))
            .find_map(|rest| rest.strip_prefix(' '))
            .unwrap_or_else(|| panic!("no {name}"));
        let text = text.split_whitespace().next().expect("a number");
        let parsed = text.strip_prefix("0x").map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16));
        parsed.unwrap_or_else(|_| panic!("{name} is no number"))
    };
    for (name, value) in [
        ("MAX_CPUS", u64::from(crate::MAX_CPUS)),
        ("STATUS_EXCEPTION", u64::from(crate::STATUS_EXCEPTION)),
        ("STATUS_USAGE", u64::from(crate::STATUS_USAGE)),
        ("CPU_SIZE", demo::CPU_SIZE),
        ("END", fixture::MEMORY),
        ("WATCH", fixture::WATCH),
        ("SOURCE", fixture::SOURCE),
        ("REMAP", fixture::REMAP),
        ("REMAP_A", fixture::REMAP_A),
        ("REMAP_B", fixture::REMAP_B),
        ("HOLE", fixture::HOLE),
        ("READ_ONLY", fixture::READ_ONLY),
        ("ALIAS", fixture::ALIAS),
        ("HUGE_ALIAS", fixture::HUGE_ALIAS),
        ("MMIO", fixture::MMIO),
        ("MMIO_STRIDE", fixture::MMIO_STRIDE),
        ("PORT_NOTHING", u64::from(fixture::PORT_NOTHING)),
        ("PORT_EXIT", u64::from(fixture::PORT_EXIT)),
        ("VECTOR_MESSAGE", u64::from(vector::MESSAGE)),
        ("VECTOR_SOFTWARE", u64::from(vector::SOFTWARE)),
        ("VECTOR_TIMER", u64::from(vector::TIMER)),
        ("VECTOR_EXTERNAL", u64::from(vector::EXTERNAL)),
        ("CPU_HITS", cpu_field::HITS),
        ("CPU_ID", cpu_field::ID),
        ("CPU_FLAGS", cpu_field::FLAGS),
        ("CPU_RESUME", cpu_field::RESUME),
        ("CPU_DONE", cpu_field::DONE),
        ("CPU_DB", cpu_field::DB),
        ("CPU_BP", cpu_field::BP),
        ("CPU_TIMER", cpu_field::TIMER),
        ("CPU_WAKEUPS", cpu_field::WAKEUPS),
        ("CPU_SYSCALLS", cpu_field::SYSCALLS),
        ("CPU_R11", cpu_field::R11),
        ("CPU_MMIO_WRITES", cpu_field::MMIO_WRITES),
        ("CPU_MMIO_READS", cpu_field::MMIO_READS),
        ("CPU_MMIO_LAST", cpu_field::MMIO_LAST),
        ("CPU_PLAIN", cpu_field::PLAIN),
        ("CPU_FENTRY", cpu_field::FENTRY),
        ("CPU_ROUNDS", cpu_field::ROUNDS),
        ("CPU_SECOND", cpu_field::SECOND),
        ("USER_HITS", user_field::HITS),
        ("USER_SAVED_RFLAGS", user_field::SAVED_RFLAGS),
        ("FLAG_SET_RF", flag::SET_RF),
        ("FLAG_KEEP_DR6", flag::KEEP_DR6),
        ("FLAG_CLEAR_TF", flag::CLEAR_TF),
        ("LOG_ENTRIES", fixture::LOG_ENTRIES),
        ("LOG_SIZE", fixture::LOG_SIZE as u64),
    ] {
        assert_eq!(value, number(name), "{name}");
    }
    let start = fixture::start("loop5", 3).expect("a start");
    assert_eq!(start.cr3, number("PML4"));
    assert_eq!(start.gdt.base, number("GDT"));
    assert_eq!(start.idt.base, number("IDT"));
    assert_eq!(start.tss.base, number("TSS") + 3 * number("TSS_STRIDE"));
    assert_eq!(u64::from(start.tss.limit), number("TSS_LIMIT"));
    assert_eq!(u64::from(start.tr), number("SEL_TSS") + 3 * 16);
    assert_eq!(start.gs_base - fixture::cpu_address(0, 0).expect("a block"), 3 * number("CPU_BLOCK_SIZE"));
    assert_eq!(start.fs_base, number("USER_CPU") + 3 * number("USER_CPU_SIZE"));
    let user = fixture::start_in_ring_3("ring3_line", 3).expect("a start");
    assert_eq!(user.rsp, number("USER_STACKS") + 4 * number("USER_STACK_SIZE"));
    assert_eq!(u64::from(user.cs), number("SEL_USER_CODE"));
    assert_eq!(u64::from(user.ss), number("SEL_USER_DATA"));
}

/// Memory as a loader sets it up: all PT_LOAD segments at their physical address.
fn loaded(image: &[u8]) -> Vec<u8> {
    let file = object::File::parse(image).expect("an image");
    let mut memory = vec![0; usize::try_from(fixture::MEMORY).expect("small")];
    for segment in file.segments() {
        let data = segment.data().expect("data");
        let at = usize::try_from(segment.address()).expect("small");
        memory[at..at + data.len()].copy_from_slice(data);
    }
    memory
}

/// Walks the fixture's page tables: physical address and whether ring 3 may go there.
fn walk(memory: &[u8], address: u64) -> Option<(u64, bool)> {
    let entry = |table: u64, index: u64| {
        let at = usize::try_from(table + index % 512 * 8).expect("small");
        u64::from_le_bytes(memory[at..at + 8].try_into().expect("8 bytes"))
    };
    let mut table = fixture::start("loop5", 0)?.cr3;
    let mut user = true;
    for shift in [39, 30, 21, 12] {
        let found = entry(table, address >> shift);
        user &= found & 4 != 0;
        if found & 1 == 0 {
            return None;
        }
        let base = found & 0x000f_ffff_ffff_f000;
        if shift == 12 || found & 0x80 != 0 {
            let inside = (1 << shift) - 1;
            return Some((base & !inside | address & inside, user));
        }
        table = base;
    }
    None
}

#[test]
fn the_fixtures_page_tables_are_as_documented() {
    let memory = loaded(fixture::image());
    for page in (0..fixture::MEMORY).step_by(4096) {
        let user = (0x200000..0x240000).contains(&page);
        let expected = match page {
            fixture::HOLE => None,
            fixture::REMAP => Some((fixture::REMAP_A + 5, user)),
            _ => Some((page + 5, user)),
        };
        assert_eq!(walk(&memory, page + 5), expected, "{page:#x}");
        assert_eq!(walk(&memory, fixture::ALIAS + page + 5), expected, "{page:#x}");
        let huge = walk(&memory, fixture::HUGE_ALIAS + page + 5);
        assert_eq!(huge, Some((page + 5, false)), "{page:#x}");
    }
    for address in [0x40_0000, 0x1234_5678, fixture::MMIO, 0xfee0_0020, 0xffff_ffff] {
        assert_eq!(walk(&memory, address), Some((address, false)), "{address:#x}");
    }
    assert_eq!(walk(&memory, fixture::ALIAS + fixture::MEMORY), None);
    assert_eq!(walk(&memory, 0x2_0000_0000), None);
}

/// Each gate of the IDT leads to the stub of its vector.
#[test]
fn the_fixtures_interrupt_gates_lead_to_their_stubs() {
    let memory = loaded(fixture::image());
    let idt = usize::try_from(fixture::start("loop5", 0).expect("a start").idt.base).expect("small");
    for vector in 0..256 {
        let gate = &memory[idt + vector * 16..idt + vector * 16 + 16];
        let word =
            |at: usize, bytes: usize| gate[at..at + bytes].iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte));
        let target = word(0, 2) | word(6, 2) << 16 | word(8, 4) << 32;
        let stub = fixture::label(&format!("fx_vector_{vector}"));
        assert_eq!(Some(target), stub, "vector {vector}");
        assert_eq!(word(2, 2), 0x08, "vector {vector}: selector");
        let gate_type = if matches!(vector, 1 | 3 | 4 | 0x41) { 0xee } else { 0x8e };
        assert_eq!(word(5, 1), gate_type, "vector {vector}: type");
        // The stub pushes its own number, after 0 where the CPU gives no error code.
        let code = &memory[usize::try_from(target).expect("small")..][..16];
        let mut decoder = Decoder::with_ip(64, code, target, DecoderOptions::NONE);
        let has_error = [8, 10, 11, 12, 13, 14, 17, 21, 29, 30].contains(&vector);
        if !has_error {
            assert_eq!(decoder.decode().immediate(0), 0, "vector {vector}");
        }
        let number = decoder.decode().immediate(0);
        assert_eq!(number, vector as u64, "vector {vector}");
        let to = decoder.decode().near_branch_target();
        assert_eq!(Some(to), fixture::label("fx_trap"), "vector {vector}");
    }
}

#[test]
fn a_log_entry_is_decoded_in_the_order_of_its_fields() {
    let mut bytes = [0; fixture::LOG_SIZE];
    for (at, byte) in (1u8..).zip(bytes.chunks_exact_mut(8)) {
        byte[0] = at;
    }
    let entry = fixture::LogEntry::decode(&bytes);
    let fields = [
        entry.vector,
        entry.error,
        entry.rip,
        entry.cs,
        entry.rflags,
        entry.rsp,
        entry.dr6,
        entry.dr7,
        entry.cr2,
        entry.cpu,
    ];
    assert_eq!(fields, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
}

#[test]
fn the_acts_are_those_of_the_image() {
    let file = object::File::parse(crate::acts()).expect("acts");
    let data = file.section_by_name(".rodata").expect(".rodata");
    let data = data.data().expect("data");
    for name in acts::NAMES {
        let text = [b"\0", name.as_bytes(), b"\0"].concat();
        let found = data.windows(text.len()).any(|part| part == text) || data.starts_with(&text[1..]);
        assert!(found, "the image does not know {name}");
    }
    let table = file.symbol_by_name("acts").expect("the table").size();
    assert_eq!(table, acts::NAMES.len() as u64 * 16);
}

/// The header that a Multiboot 1 loader looks for in the first 8 KiB of the file.
#[test]
fn multiboot_images_have_their_header_and_class() {
    for (image, is_64) in [(formats::multiboot32(), false), (formats::multiboot64(), true)] {
        let word = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().expect("4 bytes"));
        let header = (0..8192 - 12).step_by(4).find(|&at| word(at) == 0x1bad_b002);
        let at = header.expect("a header");
        let sum = word(at).wrapping_add(word(at + 4)).wrapping_add(word(at + 8));
        assert_eq!(sum, 0);
        assert_eq!(object::File::parse(image).expect("ELF").is_64(), is_64);
        assert!(symbol(image, "spin_here").is_some());
    }
}

#[test]
fn the_pvh_image_has_its_note() {
    let image = formats::pvh();
    let file = object::File::parse(image).expect("ELF");
    let note = file.section_by_name(".note.pvh").expect("a note");
    let note = note.data().expect("data");
    let word = |at: usize| u32::from_le_bytes(note[at..at + 4].try_into().expect("4 bytes"));
    assert_eq!((word(0), word(4), word(8)), (4, 8, 18));
    assert_eq!(&note[12..16], b"Xen\0");
    assert_eq!(Some(u64::from(word(16))), symbol(image, "_start"));
    let head = &image[..8192];
    assert!(!head.windows(4).any(|part| part == 0x1bad_b002_u32.to_le_bytes()));
}
