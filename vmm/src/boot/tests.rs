//! Every format, from images built here: what is loaded, what the first vCPU sees, and what is said about bad input.

use std::io::{Seek, Write};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::testing::{Bz, Elf, Part, multiboot_header, note};
use super::*;
use crate::limits::{GIB, MIB, PAGE_SIZE};

const CODE: &[u8] = b"\xfa\xf4 the code of the kernel";

fn request(kernel: &[u8]) -> BootRequest<'_> {
    BootRequest {
        kernel: kernel.into(),
        name: "my kernel",
        initrd: None,
        cmdline: "console=ttyS0 quiet",
        cpus: 2,
        ap_start: ApStart::Sipi,
        protocol: None,
    }
}

fn ram(mib: u64) -> GuestRam {
    GuestRam::new(mib * MIB).unwrap()
}

fn boot(ram: &GuestRam, kernel: &[u8]) -> Entry {
    load(ram, &request(kernel)).unwrap()
}

fn refused(kernel: &[u8]) -> BootError {
    load(&ram(16), &request(kernel)).unwrap_err()
}

fn bytes(ram: &GuestRam, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.mem().read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn u32_at(ram: &GuestRam, at: u64) -> u32 {
    u32::from_le_bytes(bytes(ram, at, 4).try_into().unwrap())
}

fn u64_at(ram: &GuestRam, at: u64) -> u64 {
    u64::from_le_bytes(bytes(ram, at, 8).try_into().unwrap())
}

/// A NUL-terminated string.
fn string_at(ram: &GuestRam, at: u64) -> String {
    let bytes = bytes(ram, at, 4096);
    let len = bytes.iter().position(|byte| *byte == 0).unwrap();
    String::from_utf8(bytes[..len].to_vec()).unwrap()
}

/// (start, size, kind) of the memory map as the guest should get it.
fn expected_map(ram: &GuestRam) -> Vec<(u64, u64, u32)> {
    ram.e820().iter().map(|entry| (entry.start, entry.size, entry.kind as u32)).collect()
}

/// The memory map from a table of entries `stride` bytes apart, address first.
fn map_at(ram: &GuestRam, at: u64, stride: u64, entries: u64) -> Vec<(u64, u64, u32)> {
    let entry = |n| {
        let at = at + n * stride;
        (u64_at(ram, at), u64_at(ram, at + 8), u32_at(ram, at + 16))
    };
    (0..entries).map(entry).collect()
}

/// One line, and it says what to do after a semicolon.
fn check_text(error: &BootError) {
    let text = error.to_string();
    assert!(!text.contains('\n') && text.contains("; "), "{text:?}");
}

// --- images of every format

fn bare_metal() -> Vec<u8> {
    Elf::new64(0x10_0000, vec![Part::load(0x10_0000, CODE).bss(0x1000)]).build()
}

fn pvh() -> Vec<u8> {
    let code = Part::load(0x20_0000, CODE).linked(0xffff_ffff_8020_0000);
    Elf::new64(0x20_0000, vec![code, Part::pvh(0x20_0004)]).build()
}

fn linux64() -> Vec<u8> {
    let code = Part::load(0x20_0000, CODE).linked(0xffff_ffff_8020_0000);
    let elf = Elf::new64(0x20_0000, vec![code]);
    Elf { sections: vec![".text", ".init.text", "__ksymtab"], ..elf }.build()
}

fn multiboot(is_64: bool) -> Vec<u8> {
    let content = [multiboot_header(3, None), CODE.to_vec()].concat();
    let code = Part::load(0x10_0000, &content).linked(0xc010_0000).bss(0x2000);
    Elf { is_64, ..Elf::new32(0xc010_000c, vec![code]) }.build()
}

fn multiboot_addresses() -> Vec<u8> {
    // 16 bytes of something before the header, and 8 bytes that are not loaded before that.
    let header = multiboot_header(0, Some([0x10_0010, 0x10_0000, 0, 0x10_4000, 0x10_0030]));
    [vec![0x11; 8], vec![0x22; 16], header, CODE.to_vec()].concat()
}

fn every_format() -> Vec<(Format, Vec<u8>)> {
    vec![
        (Format::BareMetal, bare_metal()),
        (Format::Pvh, pvh()),
        (Format::Linux64, linux64()),
        (Format::Multiboot, multiboot(false)),
        (Format::Multiboot, multiboot(true)),
        (Format::Multiboot, multiboot_addresses()),
        (Format::BzImage, Bz::default().build()),
    ]
}

// --- what is loaded

#[test]
fn every_format_is_known_by_its_content() {
    for (format, image) in every_format() {
        assert_eq!(boot(&ram(16), &image).format, format);
    }
}

#[test]
fn a_file_gives_the_same_as_bytes() {
    for (format, image) in every_format() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&image).unwrap();
        file.seek(std::io::SeekFrom::Start(7)).unwrap();
        let mut initrd = tempfile::tempfile().unwrap();
        initrd.write_all(b"an initrd").unwrap();
        let (from_bytes, from_file) = (ram(16), ram(16));
        let by_bytes = BootRequest { initrd: Some(b"an initrd"[..].into()), ..request(&image) };
        let by_file = BootRequest { kernel: (&file).into(), initrd: Some((&initrd).into()), ..by_bytes };
        assert_eq!(load(&from_bytes, &by_bytes).unwrap(), load(&from_file, &by_file).unwrap());
        let all = 16 * MIB as usize;
        assert!(bytes(&from_bytes, 0, all) == bytes(&from_file, 0, all), "{format}");
    }
}

#[test]
fn bare_metal_starts_in_long_mode_with_its_information_in_rdi() {
    let ram = ram(16);
    let entry = boot(&ram, &bare_metal());
    let expected =
        CpuState::Long64 { cr3: layout::PAGE_TABLES, rip: 0x10_0000, rsp: 0x8_7ff8, rdi: layout::BOOT_INFO, rsi: 2 };
    assert_eq!(entry.bsp, expected);
    assert_eq!(entry.kernel, 0x10_0000..0x10_1000 + CODE.len() as u64);
    assert_eq!(bytes(&ram, 0x10_0000, CODE.len()), CODE);
    check_start_info(&ram, &entry);
}

#[test]
fn pvh_starts_in_protected_mode_at_the_notes_address() {
    let ram = ram(16);
    let initrd = vec![0x5a; 5000];
    let image = pvh();
    let entry = load(&ram, &BootRequest { initrd: Some((&initrd).into()), ..request(&image) }).unwrap();
    let expected = CpuState::Protected32 { eip: 0x20_0004, esp: 0x8_8000, eax: 0, ebx: 0x8_0000 };
    assert_eq!(entry.bsp, expected);
    assert_eq!(bytes(&ram, 0x20_0000, CODE.len()), CODE, "at its physical address");
    check_start_info(&ram, &entry);
    let at = entry.initrd.unwrap();
    assert_eq!((at.end - at.start, at.start % PAGE_SIZE), (5000, 0));
    assert!(at.end <= ram.low_end() && at.end > ram.low_end() - PAGE_SIZE, "at the top");
    assert_eq!(bytes(&ram, at.start, 5000), initrd);
}

/// Xen, public/arch-x86/hvm/start_info.h.
fn check_start_info(ram: &GuestRam, entry: &Entry) {
    let at = layout::BOOT_INFO;
    assert_eq!((u32_at(ram, at), u32_at(ram, at + 4)), (0x336e_c578, 1));
    assert_eq!(string_at(ram, u64_at(ram, at + 24)), "console=ttyS0 quiet");
    assert_eq!(bytes(ram, u64_at(ram, at + 32), 8), b"RSD PTR ");
    let count = u32_at(ram, at + 48);
    assert_eq!(map_at(ram, u64_at(ram, at + 40), 24, count.into()), expected_map(ram));
    let modules = u64_at(ram, at + 16);
    match &entry.initrd {
        None => assert_eq!((u32_at(ram, at + 12), modules), (0, 0)),
        Some(range) => {
            assert_eq!(u32_at(ram, at + 12), 1);
            assert_eq!((u64_at(ram, modules), u64_at(ram, modules + 8)), (range.start, range.end - range.start));
        }
    }
}

#[test]
fn linux_starts_at_startup_64_with_a_zero_page_in_rsi() {
    let ram = ram(16);
    let entry = boot(&ram, &linux64());
    let expected =
        CpuState::Long64 { cr3: layout::PAGE_TABLES, rip: 0x20_0000, rsp: 0x8_8000, rdi: 0, rsi: layout::BOOT_INFO };
    assert_eq!(entry.bsp, expected);
    check_zero_page(&ram, &entry);
}

/// Linux, Documentation/arch/x86/zero-page.rst.
fn check_zero_page(ram: &GuestRam, entry: &Entry) {
    let at = layout::BOOT_INFO;
    assert_eq!(bytes(ram, at + 0x202, 4), b"HdrS");
    assert_eq!(bytes(ram, at + 0x1fe, 2), [0x55, 0xaa]);
    assert_eq!(bytes(ram, at + 0x210, 1), [0xff], "type_of_loader");
    assert_eq!(bytes(ram, at + 0x1ef, 1), [0], "sentinel");
    assert_eq!(string_at(ram, u32_at(ram, at + 0x228).into()), "console=ttyS0 quiet");
    assert_eq!(bytes(ram, u64_at(ram, at + 0x70), 8), b"RSD PTR ");
    assert_eq!(u64_at(ram, at + 0x250), 0, "setup_data");
    let count = bytes(ram, at + 0x1e8, 1)[0];
    assert_eq!(map_at(ram, at + 0x2d0, 20, count.into()), expected_map(ram));
    let (start, size) = (u32_at(ram, at + 0x218), u32_at(ram, at + 0x21c));
    let initrd = entry.initrd.clone().unwrap_or(0..0);
    assert_eq!((u64::from(start), u64::from(size)), (initrd.start, initrd.end - initrd.start));
}

#[test]
fn linux_is_told_from_bare_metal_by_sections_or_banner_and_by_request() {
    let code = Part::load(0x20_0000, b"... Linux version 6.12 ...").linked(0xffff_ffff_8020_0000);
    let stripped = Elf::new64(0x20_0000, vec![code.clone()]);
    assert_eq!(boot(&ram(16), &stripped.build()).format, Format::Linux64);

    // A kernel that talks about Linux but has other sections; linked where it is loaded.
    let other = Part::load(0x20_0000, b"... Linux version 6.12 ...");
    let sections = vec![".text", ".init.text"];
    let image = Elf { sections, ..Elf::new64(0x20_0000, vec![other]) }.build();
    assert_eq!(boot(&ram(16), &image).format, Format::BareMetal);
    let forced = BootRequest { protocol: Some(Format::Linux64), ..request(&image) };
    assert_eq!(load(&ram(16), &forced).unwrap().format, Format::Linux64);

    // The banner across the seams of a search in pieces.
    for offset in [MIB - 20, MIB - 7, MIB - 1, 2 * MIB - 14] {
        let mut content = vec![b'.'; 3 * MIB as usize];
        content[offset as usize..][..14].copy_from_slice(b"Linux version ");
        let image = Elf::new64(0x20_0000, vec![Part::load(0x20_0000, &content)]).build();
        assert_eq!(boot(&ram(16), &image).format, Format::Linux64, "{offset:#x}");
    }
}

#[test]
fn a_pvh_kernel_can_be_booted_another_way_on_request() {
    let image = pvh();
    let forced = BootRequest { protocol: Some(Format::Linux64), ..request(&image) };
    let entry = load(&ram(16), &forced).unwrap();
    assert_eq!(entry.format, Format::Linux64);
    assert!(matches!(entry.bsp, CpuState::Long64 { rip: 0x20_0000, .. }));
}

#[test]
fn multiboot_elf_images_of_both_classes() {
    for is_64 in [false, true] {
        let ram = ram(16);
        let entry = boot(&ram, &multiboot(is_64));
        // e_entry is virtual and becomes physical.
        check_multiboot(&ram, &entry, 0x10_000c);
        assert_eq!(bytes(&ram, 0x10_000c, CODE.len()), CODE);
        assert_eq!(entry.kernel, 0x10_0000..0x10_200c + CODE.len() as u64);
    }
}

#[test]
fn multiboot_address_fields_say_what_goes_where() {
    let ram = ram(16);
    let entry = boot(&ram, &multiboot_addresses());
    check_multiboot(&ram, &entry, 0x10_0030);
    assert_eq!(entry.kernel, 0x10_0000..0x10_4000);
    assert_eq!(bytes(&ram, 0x10_0000, 16), [0x22; 16]);
    assert_eq!(u32_at(&ram, 0x10_0010), 0x1BAD_B002);
    assert_eq!(bytes(&ram, 0x10_0030, CODE.len()), CODE);
}

#[test]
fn a_multiboot_module_follows_the_kernel() {
    let ram = ram(16);
    let (image, initrd) = (multiboot(false), vec![0x77; 3 * PAGE_SIZE as usize + 1]);
    let request = BootRequest { initrd: Some((&initrd).into()), cmdline: "", ..request(&image) };
    let entry = load(&ram, &request).unwrap();
    let at = entry.initrd.clone().unwrap();
    assert_eq!(at.start, entry.kernel.end.next_multiple_of(PAGE_SIZE));
    assert_eq!(bytes(&ram, at.start, initrd.len()), initrd);
    let info = layout::BOOT_INFO;
    assert_eq!(u32_at(&ram, info) & 1 << 3, 1 << 3);
    let list = u64::from(u32_at(&ram, info + 24));
    assert_eq!(u32_at(&ram, info + 20), 1);
    assert_eq!((u64::from(u32_at(&ram, list)), u64::from(u32_at(&ram, list + 4))), (at.start, at.end));
    assert_eq!(string_at(&ram, u32_at(&ram, list + 8).into()), "initrd");
    assert_eq!(string_at(&ram, u32_at(&ram, info + 16).into()), "my_kernel");
}

/// Multiboot Specification 3.2 and 3.3.
fn check_multiboot(ram: &GuestRam, entry: &Entry, eip: u32) {
    let expected = CpuState::Protected32 { eip, esp: 0x8_8000, eax: 0x2BAD_B002, ebx: 0x8_0000 };
    assert_eq!(entry.bsp, expected);
    let at = layout::BOOT_INFO;
    let flags = u32_at(ram, at);
    assert_eq!(flags & (1 | 1 << 2 | 1 << 6 | 1 << 9), 1 | 1 << 2 | 1 << 6 | 1 << 9);
    assert_eq!((u32_at(ram, at + 4), u32_at(ram, at + 8)), (576, 15 * 1024));
    assert_eq!(string_at(ram, u32_at(ram, at + 16).into()), "my_kernel console=ttyS0 quiet");
    assert_eq!(string_at(ram, u32_at(ram, at + 64).into()), "Trapline");
    let (len, map) = (u32_at(ram, at + 44), u64::from(u32_at(ram, at + 48)));
    let entries = u64::from(len) / 24;
    assert!((0..entries).all(|n| u32_at(ram, map + n * 24) == 20));
    assert_eq!(map_at(ram, map + 4, 24, entries), expected_map(ram));
}

#[test]
fn bzimage_goes_where_it_was_built_for() {
    let ram = ram(16);
    let bz = Bz { setup_data: 0xdead_0000, ..Bz::default() };
    let entry = boot(&ram, &bz.build());
    let expected =
        CpuState::Long64 { cr3: layout::PAGE_TABLES, rip: 0x20_0200, rsp: 0x8_8000, rdi: 0, rsi: layout::BOOT_INFO };
    assert_eq!(entry.bsp, expected);
    assert_eq!(entry.kernel, 0x20_0000..0x30_0000);
    assert_eq!(bytes(&ram, 0x20_0000, bz.payload.len()), bz.payload);
    check_zero_page(&ram, &entry);
    let setup = layout::BOOT_INFO + 0x1f1;
    assert_eq!(u64_at(&ram, layout::BOOT_INFO + 0x258), 0x20_0000, "the image's header is in the zero page");
    assert_eq!(bytes(&ram, setup + 0x7b, 1), [0], "and nothing of what follows it in the file");
}

#[test]
fn a_relocatable_bzimage_moves_down_when_memory_is_small() {
    let high = Bz { pref_address: 0x100_0000, ..Bz::default() };
    let entry = boot(&ram(16), &high.build());
    assert_eq!(entry.kernel.start, 0x20_0000);
    let fixed = Bz { relocatable: 0, ..high };
    let error = refused(&fixed.build());
    assert!(matches!(error, BootError::KernelOutsideMemory { start: 0x100_0000, .. }), "{error}");
    check_text(&error);
}

#[test]
fn a_short_setup_header_ends_where_it_says() {
    // Protocol 2.12 ends after handover_offset's predecessor; what follows is code and must read as 0.
    let bz = Bz { header_len: 0x62, version: 0x020c, ..Bz::default() };
    let mut image = bz.build();
    image[0x264..0x26c].fill(0xcc);
    let ram = ram(16);
    boot(&ram, &image);
    assert_eq!(u32_at(&ram, layout::BOOT_INFO + 0x264), 0);
}

#[test]
fn the_initrd_of_a_bzimage_stays_below_its_limit() {
    let bz = Bz { initrd_addr_max: 0xa0_0fff, ..Bz::default() };
    let (image, initrd) = (bz.build(), vec![1; 0x1800]);
    let ram = ram(16);
    let entry = load(&ram, &BootRequest { initrd: Some((&initrd).into()), ..request(&image) }).unwrap();
    assert_eq!(entry.initrd, Some(0x9f_f000..0xa0_0800));
    check_zero_page(&ram, &entry);
}

#[test]
fn the_initrd_goes_below_a_kernel_at_the_top_of_memory() {
    let kernel = Elf::new64(0xf0_0000, vec![Part::load(0xf0_0000, CODE).bss(MIB - CODE.len() as u64)]).build();
    let initrd = vec![1; MIB as usize];
    let entry = load(&ram(16), &BootRequest { initrd: Some((&initrd).into()), ..request(&kernel) }).unwrap();
    assert_eq!(entry.initrd, Some(0xe0_0000..0xf0_0000));
}

#[test]
fn kernels_may_use_memory_above_4_gib_but_not_the_hole() {
    let ram = GuestRam::new(3 * GIB + 16 * MIB).unwrap();
    let parts = |second| vec![Part::load(0x10_0000, CODE), Part::load(second, b"data")];
    boot(&ram, &Elf::new64(0x10_0000, parts(4 * GIB)).build());
    assert_eq!(bytes(&ram, 4 * GIB, 4), b"data");
    for outside in [3 * GIB, 4 * GIB - 2, 4 * GIB + 16 * MIB - 2, u64::MAX - 1] {
        let error = load(&ram, &request(&Elf::new64(0x10_0000, parts(outside)).build())).unwrap_err();
        assert!(matches!(error, BootError::KernelOutsideMemory { .. }), "{outside:#x}: {error}");
        check_text(&error);
    }
}

#[test]
fn tables_are_where_the_entry_state_says() {
    for (_, image) in every_format() {
        let ram = ram(16);
        boot(&ram, &image);
        for gib in 0..4u64 {
            // Walk the page tables for the first and the last large page of each GiB.
            for page in [0, 511] {
                let address = gib << 30 | page << 21;
                let pml4 = u64_at(&ram, layout::PAGE_TABLES);
                let pdpt = u64_at(&ram, (pml4 & !0xfff) + gib * 8);
                let pd = u64_at(&ram, (pdpt & !0xfff) + page * 8);
                assert_eq!(pd & !0xfff, address);
                assert_eq!((pml4 & 0x83, pdpt & 0x83, pd & 0x83), (3, 3, 0x83));
            }
        }
        assert_eq!(u64_at(&ram, layout::GDT), 0);
        assert_eq!(bytes(&ram, layout::ACPI_START, 8), b"RSD PTR ");
        assert_eq!(bytes(&ram, layout::FACS, 4), b"FACS");
        assert_eq!(u32_at(&ram, layout::AP_LOOP), 0, "no loop without a mailbox");
    }
}

#[test]
fn aps_that_wait_for_the_mailbox_know_their_ids_and_the_guest_its_place() {
    for (format, image) in every_format() {
        let ram = ram(16);
        load(&ram, &BootRequest { ap_start: ApStart::Mailbox, ..request(&image) }).unwrap();
        assert_ne!(u32_at(&ram, layout::AP_LOOP), 0);
        let mut expected = expected_map(&ram);
        let kvm = expected.pop().unwrap();
        expected.extend([(layout::AP_MAILBOX, PAGE_SIZE, 4), kvm]);
        let info = layout::BOOT_INFO;
        let map = match format {
            Format::BzImage | Format::Linux64 => map_at(&ram, info + 0x2d0, 20, bytes(&ram, info + 0x1e8, 1)[0].into()),
            Format::Multiboot => map_at(&ram, layout::MEMORY_MAP + 4, 24, u64::from(u32_at(&ram, info + 44)) / 24),
            _ => map_at(&ram, u64_at(&ram, info + 40), 24, u32_at(&ram, info + 48).into()),
        };
        assert_eq!(map, expected, "{format}");
    }
    assert_eq!(ap_state(ApStart::Sipi, 1), None);
    let Some(CpuState::Long64 { cr3, rip, rdi, rsi, .. }) = ap_state(ApStart::Mailbox, 3) else { panic!() };
    assert_eq!((cr3, rip), (layout::PAGE_TABLES, layout::AP_LOOP));
    assert_eq!((rdi, rsi), (3, layout::AP_MAILBOX));
}

// --- what is refused

#[test]
fn what_is_no_kernel_says_so() {
    for image in [&b""[..], b"x", b"#!/bin/sh\n", &[0; 100_000], b"\x7fEL", b"MZ"] {
        let error = refused(image);
        assert!(matches!(error, BootError::Unrecognised { .. }), "{error}");
        check_text(&error);
    }
}

/// The field that the error names.
fn field_of(error: BootError) -> (Format, &'static str) {
    check_text(&error);
    match error {
        BootError::Malformed { format, field, .. } => (format, field),
        other => panic!("{other}"),
    }
}

#[test]
fn elf_headers_that_do_not_fit_are_named() {
    let good = bare_metal();
    let with = |at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        field_of(refused(&image)).1
    };
    assert_eq!(with(4, &[3]), "e_ident[EI_CLASS]");
    assert_eq!(with(5, &[2]), "e_ident[EI_DATA]");
    assert_eq!(with(16, &[3]), "e_type");
    assert_eq!(with(16, &[1]), "e_type");
    assert_eq!(with(18, &[0xb7]), "e_machine");
    assert_eq!(with(24, &[0; 8]), "e_entry");
    assert_eq!(with(24, &[0xff; 8]), "e_entry");
    assert_eq!(with(32, &[0xff; 8]), "program headers (e_phoff, e_phnum)");
    assert_eq!(with(54, &[9]), "program headers (e_phoff, e_phnum)");
    assert_eq!(with(56, &[0, 4]), "program headers (e_phoff, e_phnum)");
    assert_eq!(with(64, &[0]), "program headers");
    assert_eq!(with(64 + 8, &[0xff; 8]), "p_offset + p_filesz");
    assert_eq!(with(64 + 32, &[0xff; 8]), "p_filesz");
    let no_content = Elf::new64(0x10_0000, vec![Part::load(0x10_0000, &[]).bss(64)]).build();
    assert_eq!(field_of(refused(&no_content)).1, "p_filesz");
    let many = Elf::new64(0x10_0000, vec![Part::load(0x10_0000, b""); 257]).build();
    assert_eq!(field_of(refused(&many)).1, "e_phnum");
}

#[test]
fn entry_points_that_lead_nowhere_are_named() {
    let higher_half = Elf::new64(0xffff_ffff_8010_0000, vec![Part::load(0x10_0000, CODE)]).build();
    assert_eq!(field_of(refused(&higher_half)), (Format::BareMetal, "e_entry"));
    let moved = Elf::new64(0x10_0000, vec![Part::load(0x10_0000, CODE).linked(0x20_0000)]).build();
    assert_eq!(field_of(refused(&moved)), (Format::BareMetal, "e_entry"));
    let elf32 = Elf::new32(0x10_0000, vec![Part::load(0x10_0000, CODE)]).build();
    assert_eq!(field_of(refused(&elf32)), (Format::BareMetal, "e_ident[EI_CLASS]"));
    let parts = vec![Part::load(0x20_0000, CODE), Part::pvh(0x10_0000)];
    assert_eq!(field_of(refused(&Elf::new64(0x20_0000, parts).build())), (Format::Pvh, "PVH note"));
    let linux = BootRequest { protocol: Some(Format::Linux64), ..request(&higher_half) };
    assert_eq!(field_of(load(&ram(16), &linux).unwrap_err()), (Format::Linux64, "e_entry"));
}

#[test]
fn a_pvh_note_that_is_too_short_is_named() {
    let short = note(b"Xen\0", 18, &[1, 2]);
    let mut image = pvh();
    let at = image.len() - note(b"Xen\0", 18, &[0; 4]).len();
    image[at..at + short.len()].copy_from_slice(&short);
    assert_eq!(field_of(refused(&image)), (Format::Elf, "PVH note"));
}

#[test]
fn parts_on_each_other_or_on_our_tables_are_refused() {
    let apart = [Part::load(0x10_0000, CODE), Part::load(0x7_0000, CODE)];
    boot(&ram(16), &Elf::new64(0x10_0000, apart.to_vec()).build());
    for other in [0x10_0008, 0x8_0000, 0x7_fff0, 0x9_8000, 0xf_fff0] {
        let parts = vec![Part::load(0x10_0000, CODE), Part::load(other, CODE)];
        let error = refused(&Elf::new64(0x10_0000, parts).build());
        assert!(matches!(error, BootError::Overlap { .. }), "{other:#x}: {error}");
        check_text(&error);
    }
}

#[test]
fn bzimage_headers_that_do_not_fit_are_named() {
    let field = |bz: Bz| {
        let (format, field) = field_of(refused(&bz.build()));
        assert_eq!(format, Format::BzImage);
        field
    };
    assert_eq!(field(Bz { version: 0x0208, ..Bz::default() }), "version");
    assert_eq!(field(Bz { loadflags: 0, ..Bz::default() }), "loadflags");
    assert_eq!(field(Bz { xloadflags: 0, ..Bz::default() }), "xloadflags");
    assert_eq!(field(Bz { alignment: 3, ..Bz::default() }), "kernel_alignment");
    assert_eq!(field(Bz { alignment: 0, ..Bz::default() }), "kernel_alignment");
    assert_eq!(field(Bz { payload: vec![0; 512], ..Bz::default() }), "setup_sects");
    assert_eq!(field(Bz { payload: vec![0; 0x600], ..Bz::default() }), "payload_offset + payload_length");
    let mut image = Bz::default().build();
    image[0x1f4] = 0xff;
    image[0x1f5] = 0xff;
    assert_eq!(field_of(refused(&image)).1, "syssize");
    image.truncate(0x250);
    assert_eq!(field_of(refused(&image)).1, "setup header");
}

#[test]
fn multiboot_headers_that_do_not_fit_are_named() {
    let code = |flags, addresses| {
        let mut image = multiboot_header(flags, addresses);
        image.extend([0x90; 64]);
        let (format, field) = field_of(refused(&image));
        assert_eq!(format, Format::Multiboot);
        field
    };
    let fields = |header, load, load_end, bss_end, entry| Some([header, load, load_end, bss_end, entry]);
    let start = 0x10_0000;
    assert_eq!(code(0x8, None), "flags", "an unknown requirement");
    assert_eq!(code(0, None), "flags", "neither ELF nor addresses");
    assert_eq!(code(0, fields(start, start + 1, 0, 0, start)), "load_addr");
    assert_eq!(code(0, fields(start + 4, start, 0, 0, start)), "header_addr");
    assert_eq!(code(0, fields(start, start, start - 1, 0, start)), "load_end_addr");
    assert_eq!(code(0, fields(start, start, start + 4096, 0, start)), "load_end_addr");
    assert_eq!(code(0, fields(start, start, 0, start + 1, start)), "bss_end_addr");
    assert_eq!(code(0, fields(start, start, 0, 0, start + 4096)), "entry_addr");
    let cut = multiboot_header(0, fields(start, start, 0, 0, start));
    assert_eq!(field_of(refused(&cut[..20])).1, "address fields");
    let lost = Elf::new64(1 << 40, vec![Part::load(0x10_0000, &multiboot_header(0, None))]).build();
    assert_eq!(field_of(refused(&lost)), (Format::Multiboot, "e_entry"));
}

#[test]
fn a_protocol_that_the_image_does_not_have_is_refused() {
    let formats = [Format::BzImage, Format::Pvh, Format::Multiboot];
    for wanted in formats {
        for (format, image) in every_format() {
            let request = BootRequest { protocol: Some(wanted), ..request(&image) };
            match load(&ram(16), &request) {
                Ok(entry) => assert_eq!((entry.format, format), (wanted, wanted)),
                Err(error) => {
                    assert!(matches!(error, BootError::WrongProtocol { .. }), "{error}");
                    assert_ne!(format, wanted);
                    check_text(&error);
                }
            }
        }
    }
    for wanted in [Format::Linux64, Format::BareMetal, Format::Pvh] {
        let image = Bz::default().build();
        let request = BootRequest { protocol: Some(wanted), ..request(&image) };
        assert!(matches!(load(&ram(16), &request).unwrap_err(), BootError::WrongProtocol { .. }));
    }
}

#[test]
fn initrds_that_do_not_fit_say_how_much_would() {
    let exact = |format: Format, image: &[u8], size: u64| {
        let initrd = vec![0x42; size as usize];
        let request = BootRequest { initrd: Some((&initrd).into()), ..request(image) };
        let result = load(&ram(16), &request);
        if let Err(error) = &result {
            check_text(error);
        }
        match result {
            Ok(_) => None,
            Err(BootError::InitrdTooLarge { size: said, room, .. }) => {
                assert_eq!(said, size);
                Some(room)
            }
            Err(other) => panic!("{format}: {other}"),
        }
    };
    for (format, image) in every_format() {
        let room = exact(format, &image, 17 * MIB).expect("larger than all memory");
        assert!(room > MIB && room < 15 * MIB, "{format}: {room:#x}");
        assert_eq!(exact(format, &image, room), None, "{format}: what is said to fit does fit");
        assert_eq!(exact(format, &image, room + 1), Some(room), "{format}: and not a byte more");
    }
    let request = BootRequest { initrd: Some(b""[..].into()), ..request(CODE) };
    let image = bare_metal();
    let empty = load(&ram(16), &BootRequest { kernel: (&image).into(), ..request }).unwrap_err();
    assert!(matches!(empty, BootError::InitrdEmpty));
    check_text(&empty);
}

#[test]
fn command_lines_are_checked() {
    for (format, image) in every_format() {
        let max = match format {
            Format::BzImage | Format::Linux64 => 2047,
            // The kernel's name and a blank are part of it.
            Format::Multiboot => 32767 - 10,
            _ => 32767,
        };
        let long = "x".repeat(max);
        let fits = BootRequest { cmdline: &long, ..request(&image) };
        load(&ram(16), &fits).unwrap();
        let long = "x".repeat(max + 1);
        let error = load(&ram(16), &BootRequest { cmdline: &long, ..fits }).unwrap_err();
        assert!(matches!(error, BootError::CmdlineTooLong { .. }), "{format}: {error}");
        check_text(&error);
        let error = load(&ram(16), &BootRequest { cmdline: "a\0b", ..fits }).unwrap_err();
        assert!(matches!(error, BootError::CmdlineNul { offset: 1 }));
        check_text(&error);
    }
}

#[test]
fn numbers_of_vcpus_out_of_range_are_refused() {
    let image = bare_metal();
    for cpus in [0, MAX_VCPUS + 1, 10_000] {
        let error = load(&ram(16), &BootRequest { cpus, ..request(&image) }).unwrap_err();
        assert!(matches!(error, BootError::Cpus { .. }));
        check_text(&error);
    }
    load(&ram(16), &BootRequest { cpus: MAX_VCPUS, ..request(&image) }).unwrap();
}

#[test]
fn what_the_host_cannot_read_is_an_error() {
    let directory = std::fs::File::open(std::env::temp_dir()).unwrap();
    let image = bare_metal();
    let kernel = BootRequest { kernel: (&directory).into(), ..request(&image) };
    let initrd = BootRequest { initrd: Some((&directory).into()), ..request(&image) };
    for request in [kernel, initrd] {
        let error = load(&ram(16), &request).unwrap_err();
        assert!(matches!(error, BootError::Read { .. } | BootError::Unrecognised { .. }), "{error}");
        check_text(&error);
    }
}

// --- hostile images

#[test]
fn an_image_cut_anywhere_is_refused_in_one_line() {
    for (format, image) in every_format() {
        // What follows the content (section names and headers) may be missing.
        let needed = if format == Format::Linux64 { 64 + 56 + 8 + CODE.len() } else { image.len() };
        let ram = ram(16);
        for len in 0..image.len() {
            match load(&ram, &request(&image[..len])) {
                Ok(_) => assert!(len >= needed || by_rest_of_file(&image), "{format} cut at {len:#x} boots"),
                Err(error) => check_text(&error),
            }
        }
    }
}

/// A Multiboot image with load_end_addr 0 is as long as the file is: every length beyond the header is right.
fn by_rest_of_file(image: &[u8]) -> bool {
    image == multiboot_addresses()
}

/// Whatever is loaded lies in RAM and not on our tables.
fn check_loaded(ram: &GuestRam, result: Result<Entry, BootError>) {
    match result {
        Ok(entry) => {
            assert!(!entry.kernel.is_empty());
            assert!(entry.kernel.end <= ram.low_end());
            let firmware = layout::BOOT_INFO..layout::HIGH_RAM_START;
            assert!(
                entry.kernel.end <= firmware.start
                    || entry.kernel.start < firmware.start
                    || entry.kernel.start >= firmware.end
            );
            assert_eq!(bytes(ram, layout::ACPI_START, 8), b"RSD PTR ");
            assert_eq!(u64_at(ram, layout::GDT + 8), 0x00cf_9b00_0000_ffff);
        }
        Err(error) => check_text(&error),
    }
}

fn mutations() -> impl Strategy<Value = Vec<(usize, u8)>> {
    // Headers are where decisions are made: 9 of 10 changes go there.
    let place = prop_oneof![9 => 0usize..0x300, 1 => 0usize..0x2000];
    let byte = prop_oneof![Just(0), Just(0xff), Just(0x80), any::<u8>()];
    proptest::collection::vec((place, byte), 1..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_changed_image_is_loaded_safely_or_refused_in_one_line(
        which in 0usize..7, changes in mutations(), cut in prop::option::of(0usize..0x2000), mailbox in any::<bool>()
    ) {
        let (_, mut image) = every_format().swap_remove(which);
        for (at, byte) in changes {
            if let Some(old) = image.get_mut(at) {
                *old = byte;
            }
        }
        image.truncate(cut.unwrap_or(usize::MAX));
        let ram = ram(4);
        let ap_start = if mailbox { ApStart::Mailbox } else { ApStart::Sipi };
        let initrd = Some(b"initrd"[..].into());
        check_loaded(&ram, load(&ram, &BootRequest { ap_start, initrd, ..request(&image) }));
    }

    #[test]
    fn a_changed_header_is_safe_under_every_protocol(
        which in 0usize..7, changes in mutations(), wanted in 0usize..5
    ) {
        let (_, mut image) = every_format().swap_remove(which);
        for (at, byte) in changes {
            if let Some(old) = image.get_mut(at) {
                *old = byte;
            }
        }
        let wanted =
            [Format::BzImage, Format::Pvh, Format::Linux64, Format::Multiboot, Format::BareMetal][wanted];
        let ram = ram(4);
        check_loaded(&ram, load(&ram, &BootRequest { protocol: Some(wanted), ..request(&image) }));
    }

    #[test]
    fn random_bytes_behind_each_magic_are_safe(
        magic in 0usize..4, mut body in proptest::collection::vec(any::<u8>(), 0..0x800)
    ) {
        let (at, bytes): (usize, &[u8]) = match magic {
            0 => (0, b"\x7fELF\x02\x01\x01"),
            1 => (0, b"\x7fELF\x01\x01\x01"),
            2 => (0x202, b"HdrS\x0f\x02"),
            _ => (0, b"\x02\xb0\xad\x1b\x00\x00\x01\x00\xfe\x4f\x51\xe4"),
        };
        if let Some(place) = body.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
        let ram = ram(4);
        check_loaded(&ram, load(&ram, &request(&body)));
    }
}
