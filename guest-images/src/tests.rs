//! What the images promise, and that every KVM flavour can run them.

use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic};
use object::{Object, ObjectSection, ObjectSymbol, SectionKind};

use crate::{demo, symbol};

/// An image, and the symbols in it whose code may do what others may not.
struct Image {
    name: &'static str,
    bytes: &'static [u8],
    exempt: &'static [&'static str],
}

const IMAGES: &[fn() -> Image] = &[|| Image {
    name: "demo",
    bytes: crate::demo(),
    exempt: &[],
}];

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
        && instruction
            .cpuid_features()
            .iter()
            .all(|feature| INTERPRETED.contains(feature))
}

/// All instructions of the executable sections, by linear decoding.
fn instructions(image: &Image) -> Vec<Instruction> {
    let file = object::File::parse(image.bytes).expect(image.name);
    let bits = if file.is_64() { 64 } else { 32 };
    let mut all = Vec::new();
    for section in file.sections() {
        if section.kind() == SectionKind::Text {
            let code = section.data().expect("section data");
            let mut decoder = Decoder::with_ip(bits, code, section.address(), DecoderOptions::NONE);
            all.extend(decoder.iter());
        }
    }
    all
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
    for (label, offset) in [
        ("count_up_here", demo::COUNT_OFFSET),
        ("count_up_traced_here", demo::TRACED_COUNT_OFFSET),
    ] {
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
