//! Cores of a guest made of plain memory, read back by a second, simpler reader.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use proptest::prelude::*;
use trapline_vmm::memory::GuestRam;
use trapline_vmm::paging::Paging;
use trapline_vmm::vcpu::{DescriptorTable, Registers, Segment};
use vm_memory::{Bytes, GuestAddress};

use super::*;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const DIRECT_MAP: u64 = 0xffff_9a40_0000_0000;
const STACKS: u64 = 0xffff_b700_0000_0000;
const IMAGE: u64 = 0xffff_ffff_9000_0000;

/// A guest with page tables of its own making.
struct Guest {
    ram: GuestRam,
    vcpus: Vec<Registers>,
    /// Tables are taken from here up.
    free: u64,
}

impl Guest {
    fn new(size: u64) -> Self {
        let ram = GuestRam::new(size).unwrap();
        let code = Segment { selector: 0x10, attributes: 0xa09b, ..Segment::default() };
        let vcpu = Registers {
            rip: IMAGE + 0x123,
            cs: code,
            cr0: 0x8000_0001,
            cr3: PAGE,
            cr4: 0x20,
            efer: 0x500,
            ..Registers::default()
        };
        Self { ram, vcpus: vec![vcpu; 2], free: 2 * PAGE }
    }

    /// Maps one page, of 4 KiB or 2 MiB, in the tables of vCPU 0.
    fn map(&mut self, gva: u64, gpa: u64, large: bool) {
        let mut table = self.vcpus[0].cr3;
        for level in (if large { 2 } else { 1 }..4).rev() {
            let at = table + (gva >> (12 + 9 * level) & 511) * 8;
            let entry: u64 = self.ram.mem().read_obj(GuestAddress(at)).unwrap();
            table = if entry == 0 {
                self.free += PAGE;
                self.put(at, &((self.free - PAGE) | 3).to_le_bytes());
                self.free - PAGE
            } else {
                entry & !0xfff
            };
        }
        let (shift, flags) = if large { (21, 0x83) } else { (12, 3) };
        self.put(table + (gva >> shift & 511) * 8, &(gpa | flags).to_le_bytes());
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        self.ram.mem().write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    fn core<'a>(&'a self, vmcoreinfo: &str, hide: &'a dyn Fn(u64, &mut [u8])) -> Core<'a> {
        Core { ram: &self.ram, vcpus: &self.vcpus, vmcoreinfo: vmcoreinfo.into(), hide }
    }

    fn byte(&self, gpa: u64) -> u8 {
        self.ram.mem().read_obj(GuestAddress(gpa)).unwrap()
    }
}

fn nothing(_: u64, _: &mut [u8]) {}

/// An ELF core as a reader sees it that knows nothing of how it was made.
struct Elf {
    bytes: Vec<u8>,
    /// Type, offset, linear and physical address, length.
    segments: Vec<[u64; 5]>,
}

impl Elf {
    fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!(bytes[..20], *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0\x3e\0");
        assert_eq!((word(32), bytes[54], bytes[52]), (64, 56, 64), "program headers follow the header");
        let count = usize::from(u16::from_le_bytes([bytes[56], bytes[57]]));
        let segments: Vec<[u64; 5]> = (0..count)
            .map(|n| {
                let at = 64 + 56 * n;
                assert_eq!(word(at + 32), word(at + 40), "filesz and memsz");
                [word(at) & 0xffff_ffff, word(at + 8), word(at + 16), word(at + 24), word(at + 32)]
            })
            .collect();
        let ends = segments.iter().map(|[_, offset, _, _, len]| offset + len);
        assert_eq!(ends.max(), Some(bytes.len() as u64));
        Self { bytes, segments }
    }

    /// The byte at an address, by the first segment that has it, and all others agree.
    fn byte(&self, address: u64, field: usize) -> Option<u8> {
        let mut found = self.segments.iter().filter(|segment| segment[0] == 1).filter_map(|segment| {
            let into = address.checked_sub(segment[field]).filter(|into| *into < segment[4])?;
            Some(self.bytes[usize::try_from(segment[1] + into).unwrap()])
        });
        let first = found.next()?;
        assert!(found.all(|other| other == first), "{address:#x}: segments disagree");
        Some(first)
    }

    fn at_linear(&self, gva: u64) -> Option<u8> {
        self.byte(gva, 2)
    }

    fn at_physical(&self, gpa: u64) -> Option<u8> {
        self.byte(gpa, 3)
    }

    /// Name, type and contents of each note.
    fn notes(&self) -> Vec<(String, u32, Vec<u8>)> {
        let [_, offset, _, _, len] = self.segments[0];
        assert_eq!(self.segments[0][0], 4, "the notes come first");
        let mut rest = &self.bytes[offset as usize..(offset + len) as usize];
        let mut notes = Vec::new();
        while !rest.is_empty() {
            let word = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
            let (name, contents) = (word(0) as usize, word(4) as usize);
            let from = 12 + name.next_multiple_of(4);
            let text = String::from_utf8(rest[12..12 + name - 1].to_vec()).unwrap();
            notes.push((text, word(8), rest[from..from + contents].to_vec()));
            rest = &rest[from + contents.next_multiple_of(4)..];
        }
        notes
    }
}

/// A compressed core, read by descriptors from the headers on.
struct Kdump {
    bytes: Vec<u8>,
    frames: u64,
    bitmap: usize,
    descriptors: usize,
}

impl Kdump {
    fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        assert_eq!(&bytes[..8], b"KDUMP   ");
        let mut kdump = Self { bytes, frames: 0, bitmap: 0, descriptors: 0 };
        let half = |at| kdump.number(at, 4);
        assert_eq!((half(8), half(424), half(428)), (6, 4, PAGE), "version, snappy, page size");
        assert_eq!(kdump.text(12 + 4 * 65), "x86_64");
        let (sub_header, bitmaps) = (half(432), half(436));
        kdump.frames = kdump.number(4096 + 96, 8);
        kdump.bitmap = ((1 + sub_header) * PAGE) as usize;
        kdump.descriptors = ((1 + sub_header + bitmaps) * PAGE) as usize;
        let second = kdump.bitmap + (bitmaps / 2 * PAGE) as usize;
        let len = kdump.frames.div_ceil(8) as usize;
        assert!(kdump.bitmap + len <= second && second + len <= kdump.descriptors);
        assert_eq!(kdump.bytes[kdump.bitmap..][..len], kdump.bytes[second..][..len], "all that there is, is in it");
        kdump
    }

    fn number(&self, at: usize, len: usize) -> u64 {
        self.bytes[at..at + len].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    fn text(&self, at: usize) -> String {
        self.bytes[at..].iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte)).collect()
    }

    fn has(&self, frame: u64) -> bool {
        frame < self.frames && self.bytes[self.bitmap + (frame / 8) as usize] >> (frame % 8) & 1 == 1
    }

    fn page(&self, gpa: u64) -> Option<Vec<u8>> {
        let frame = gpa / PAGE;
        let before = (0..frame).filter(|other| self.has(*other)).count();
        let at = self.descriptors + 24 * before;
        let (offset, len) = (self.number(at, 8) as usize, self.number(at + 8, 4) as usize);
        let bytes = &self.bytes[offset..offset + len];
        self.has(frame).then(|| match self.number(at + 12, 4) {
            0 => bytes.to_vec(),
            4 => snap::raw::Decoder::new().decompress_vec(bytes).unwrap(),
            flags => panic!("flags {flags}"),
        })
    }
}

#[test]
fn an_elf_core_has_ram_once_and_all_that_is_mapped() {
    let mut guest = Guest::new(8 * MIB);
    for at in (0..8 * MIB).step_by(2 * MIB as usize) {
        guest.map(DIRECT_MAP + at, at, true);
    }
    guest.map(IMAGE, 4 * MIB, true);
    // A stack whose pages lie anywhere, with a guard page before it, and a page of a device.
    for (n, gpa) in [0x60_3000, 0x60_1000, 0x60_2000, 0x60_4000].into_iter().enumerate() {
        guest.map(STACKS + PAGE + n as u64 * PAGE, gpa, false);
        guest.put(gpa + 8, &[n as u8 + 1; 16]);
    }
    guest.map(0xffff_ffff_ff5f_b000, 0xfee0_0000, false);
    // What a program has mapped does not count.
    guest.map(0x40_0000, 0x60_1000, false);
    guest.put(4 * MIB + 0x123, b"code");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vmcore");
    let len = write(&guest.core("", &nothing), &path, Form::Elf).unwrap();
    let elf = Elf::read(&path);
    assert_eq!(len, elf.bytes.len() as u64);

    assert_eq!(elf.segments[1][2..], [DIRECT_MAP, 0, 8 * MIB], "RAM as a whole stands first, at the direct map");
    let stack = |n: u64| elf.at_linear(STACKS + PAGE + n * PAGE + 9);
    assert_eq!([0, 1, 2, 3].map(stack), [Some(1), Some(2), Some(3), Some(4)]);
    assert_eq!(elf.at_linear(STACKS + 9), None, "the guard page");
    assert_eq!(elf.at_linear(0xffff_ffff_ff5f_b000), None, "a device");
    assert_eq!(elf.at_linear(0x40_0008), None, "a program");
    assert_eq!((0..4).map(|n| elf.at_linear(IMAGE + 0x123 + n).unwrap()).collect::<Vec<_>>(), b"code");
    assert!(elf.segments.contains(&[1, elf.segments[1][1] + 4 * MIB, IMAGE, 4 * MIB, 2 * MIB]), "the image's place");
    let counted = elf.segments.iter().filter(|segment| segment[0] == 1 && segment[3] != u64::MAX);
    assert_eq!(counted.count(), 2, "nothing else counts as RAM");
    // Sparse: the tables and what was written, not 8 MiB.
    let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&path).unwrap());
    assert!(blocks * 512 < MIB, "{blocks} blocks");
}

#[test]
fn the_kernels_own_tables_are_found_by_vmcoreinfo() {
    let mut guest = Guest::new(8 * MIB);
    for at in (0..8 * MIB).step_by(2 * MIB as usize) {
        guest.map(DIRECT_MAP + at, at, true);
    }
    guest.map(STACKS, 0x60_1000, false);
    guest.put(0x60_1000, &[9]);
    // Both vCPUs are in user space and have tables that lack the kernel's.
    let tables = guest.vcpus[0].cr3;
    for vcpu in &mut guest.vcpus {
        vcpu.cr3 = 7 * MIB;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vmcore");
    write(&guest.core("", &nothing), &path, Form::Elf).unwrap();
    assert_eq!(Elf::read(&path).at_linear(STACKS), None);
    // Linked 2 MiB above the map's start, and loaded below that.
    let (symbol, phys_base) = (0xffff_ffff_8020_0000_u64, tables as i64 - 0x20_0000);
    let text = format!("OSRELEASE=6.1\nSYMBOL(swapper_pg_dir)={symbol:x}\nNUMBER(phys_base)={phys_base}\n");
    write(&guest.core(&text, &nothing), &path, Form::Elf).unwrap();
    let elf = Elf::read(&path);
    assert_eq!(elf.at_linear(STACKS), Some(9));
    assert_eq!(elf.segments[1][2], DIRECT_MAP);
    for nonsense in ["", "0", "-1", "ffffffffffffffff", "zz"] {
        let text = format!("SYMBOL(swapper_pg_dir)={nonsense}\nNUMBER(phys_base)=-9223372036854775808\n");
        write(&guest.core(&text, &nothing), &path, Form::Elf).unwrap();
        assert_eq!(Elf::read(&path).at_physical(0x60_1000), Some(9));
    }
}

#[test]
fn breakpoints_are_taken_out() {
    let guest = Guest::new(4 * MIB);
    guest.put(0x20_0010, &[0xcc]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vmcore");
    let hide = |gpa: u64, bytes: &mut [u8]| {
        if (gpa..gpa + bytes.len() as u64).contains(&0x20_0010) {
            bytes[(0x20_0010 - gpa) as usize] = 0x55;
        }
    };
    write(&guest.core("", &hide), &path, Form::Elf).unwrap();
    assert_eq!(Elf::read(&path).at_physical(0x20_0010), Some(0x55));
}

#[test]
fn notes_have_the_layouts_of_linux_and_qemu() {
    let mut guest = Guest::new(4 * MIB);
    let segment =
        |n: u16| Segment { selector: n, base: u64::from(n) << 32, limit: u32::from(n) << 8, attributes: 0x1_a09b };
    guest.vcpus[1] = Registers {
        rax: 1,
        rbx: 2,
        rcx: 3,
        rdx: 4,
        rsi: 5,
        rdi: 6,
        rbp: 7,
        rsp: 8,
        r8: 9,
        r9: 10,
        r10: 11,
        r11: 12,
        r12: 13,
        r13: 14,
        r14: 15,
        r15: 16,
        rip: 17,
        rflags: 18,
        cs: segment(0x10),
        ss: segment(0x18),
        ds: segment(0x20),
        es: segment(0x28),
        fs: segment(0x30),
        gs: segment(0x38),
        tr: segment(0x40),
        ldtr: segment(0x48),
        gdtr: DescriptorTable { base: 0x50, limit: 0x51 },
        idtr: DescriptorTable { base: 0x52, limit: 0x53 },
        cr0: 20,
        cr2: 22,
        cr3: 23,
        cr4: 24,
        kernel_gs_base: 25,
        ..Registers::default()
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vmcore");
    write(&guest.core("OSRELEASE=x\n", &nothing), &path, Form::Elf).unwrap();
    let notes = Elf::read(&path).notes();
    let kinds: Vec<(&str, u32, usize)> = notes.iter().map(|(name, kind, c)| (name.as_str(), *kind, c.len())).collect();
    let expected = [("CORE", 1, 336), ("CORE", 1, 336), ("QEMU", 0, 440), ("QEMU", 0, 440), ("VMCOREINFO", 0, 12)];
    assert_eq!(kinds, expected);
    assert_eq!(notes[4].2, b"OSRELEASE=x\n");

    let words = |note: usize, from: usize, count: usize| -> Vec<u64> {
        let bytes = &notes[note].2[from..from + 8 * count];
        bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect()
    };
    // pr_pid, by which drgn finds CPU 1; then pr_reg in the order of struct user_regs_struct.
    assert_eq!((notes[0].2[32], notes[1].2[32]), (1, 2));
    let general = [16, 15, 14, 13, 7, 2, 12, 11, 10, 9, 1, 3, 4, 5, 6, u64::MAX, 17, 0x10, 18, 8, 0x18];
    assert_eq!(words(1, 112, 21), general);
    assert_eq!(words(1, 112 + 21 * 8, 7), [0x30 << 32, 0x38 << 32, 0x20, 0x28, 0x30, 0x38, 0]);
    // Version and size, the general registers, ten segments, the control registers.
    assert_eq!(words(3, 0, 1), [1 | 440 << 32]);
    assert_eq!(words(3, 8, 18), [1, 2, 3, 4, 5, 6, 8, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]);
    let segment = |n: u64| [n | n << 40, 0xa0_9b00, n << 32];
    let segments = [0x10, 0x20, 0x28, 0x30, 0x38, 0x18, 0x48, 0x40].map(segment).concat();
    assert_eq!(words(3, 152, 24), segments);
    assert_eq!(words(3, 152 + 24 * 8, 6), [0x51 << 32, 0, 0x50, 0x53 << 32, 0, 0x52]);
    assert_eq!(words(3, 392, 6), [20, 0, 22, 23, 24, 25]);
}

#[test]
fn a_core_that_cannot_be_written_leaves_what_was_there() {
    let guest = Guest::new(4 * MIB);
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("not/there/vmcore");
    let text = write(&guest.core("", &nothing), &missing, Form::Elf).unwrap_err().to_string();
    assert!(text.contains("not/there") && text.contains("make it first") && !text.contains('\n'), "{text}");
    // A directory has its name.
    let path = folder.path().join("vmcore");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("kept"), "").unwrap();
    let text = write(&guest.core("", &nothing), &path, Form::Elf).unwrap_err().to_string();
    assert!(text.contains("vmcore: that is a directory"), "{text}");
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["vmcore"], "nothing half-written");
    assert!(path.join("kept").exists());
}

#[test]
fn a_compressed_core_is_read_back() {
    let guest = Guest::new(8 * MIB);
    guest.put(0x3000, &[7; 5000]);
    let mut noise = 1_u32;
    let noise: Vec<u8> = (0..PAGE)
        .map(|_| {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (noise >> 24) as u8
        })
        .collect();
    guest.put(0x50_0000, &noise);
    guest.put(8 * MIB - 1, &[9]);
    let hide = |gpa: u64, bytes: &mut [u8]| {
        if (gpa..gpa + bytes.len() as u64).contains(&0x3001) {
            bytes[(0x3001 - gpa) as usize] = 8;
        }
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vmcore");
    let info = "OSRELEASE=6.1.2-x\nNUMBER(phys_base)=-4096\n";
    let len = write(&guest.core(info, &hide), &path, Form::Kdump).unwrap();
    let kdump = Kdump::read(&path);
    assert_eq!(len, kdump.bytes.len() as u64);
    assert!(len < 128 << 10, "{len} bytes for four pages and 2048 descriptors");
    for gpa in (0..8 * MIB).step_by(4096) {
        let mut page = vec![0; 4096];
        guest.ram.mem().read_slice(&mut page, GuestAddress(gpa)).unwrap();
        hide(gpa, &mut page);
        assert_eq!(kdump.page(gpa).unwrap(), page, "{gpa:#x}");
    }
    assert_eq!(kdump.page(8 * MIB), None);
    assert_eq!(kdump.text(12 + 2 * 65), "6.1.2-x");
    assert_eq!(kdump.number(460, 4), 2, "vCPUs");
    let sub = |n: usize| kdump.number(4096 + 8 * n, 8);
    assert_eq!(sub(0) as i64, -4096, "phys_base");
    assert_eq!(sub(1), 0, "no page is left out, and it is one file");
    let from = |at: u64, len: u64| &kdump.bytes[at as usize..(at + len) as usize];
    assert_eq!(from(sub(4), sub(5)), info.as_bytes());
    assert_eq!(from(sub(6), sub(7)), notes::notes(&guest.vcpus, info.as_bytes()));
    assert!(4096 + 8 * 13 <= sub(6) && (sub(6) + sub(7)) as usize <= kdump.bitmap);
    // Without Linux there is nothing to say.
    write(&guest.core("", &hide), &path, Form::Kdump).unwrap();
    let kdump = Kdump::read(&path);
    assert_eq!((kdump.number(4096 + 32, 8), kdump.number(4096 + 40, 8)), (0, 0));
}

/// ELF counts its program headers in 16 bits.
#[test]
fn a_guest_that_maps_pages_all_over_still_has_a_core() {
    let mut guest = Guest::new(4 * MIB);
    for n in 0..70_000 {
        // No two of them are neighbours in RAM.
        guest.map(STACKS + n * PAGE, 3 * MIB + n % 2 * 2 * PAGE, false);
    }
    guest.put(3 * MIB, &[5]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vmcore");
    write(&guest.core("", &nothing), &path, Form::Elf).unwrap();
    let elf = Elf::read(&path);
    assert!(elf.segments.len() > 50_000, "{}", elf.segments.len());
    assert_eq!((elf.at_physical(3 * MIB), elf.at_linear(STACKS)), (Some(5), Some(5)));
    // Tables that lead to themselves.
    for index in 0..512 {
        guest.put(guest.vcpus[0].cr3 + index * 8, &(guest.vcpus[0].cr3 | 3).to_le_bytes());
    }
    write(&guest.core("", &nothing), &path, Form::Elf).unwrap();
    assert_eq!(Elf::read(&path).at_physical(3 * MIB), Some(5));
}

/// RAM from 4 GiB on comes right behind that below the PCI hole, in both forms.
#[test]
fn the_pci_hole_is_no_part_of_a_core() {
    let guest = Guest::new(3072 * MIB + 4 * PAGE);
    let high = (4 << 30) + 2 * PAGE;
    guest.put(high + 5, &[5; 100]);
    guest.put(3072 * MIB - 8, &[6; 8]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vmcore");
    write(&guest.core("", &nothing), &path, Form::Elf).unwrap();
    let mut head = vec![0; 4096];
    let file = fs::File::open(&path).unwrap();
    let read = |at, into: &mut [u8]| std::os::unix::fs::FileExt::read_exact_at(&file, into, at).unwrap();
    read(0, &mut head);
    let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().unwrap());
    let load = |n: usize, field: usize| word(64 + 56 * n + 8 * field);
    assert_eq!([load(1, 3), load(1, 4), load(2, 3), load(2, 4)], [0, 3072 * MIB, 4 << 30, 4 * PAGE]);
    let mut bytes = [0; 8];
    read(load(2, 1) + 2 * PAGE, &mut bytes);
    assert_eq!(bytes, [0, 0, 0, 0, 0, 5, 5, 5]);
    read(load(2, 1) - 8, &mut bytes);
    assert_eq!(bytes, [6; 8]);

    write(&guest.core("", &nothing), &path, Form::Kdump).unwrap();
    let kdump = Kdump::read(&path);
    assert_eq!(kdump.frames, (4 << 30) / PAGE + 4);
    assert_eq!(kdump.page(high).unwrap()[..8], [0, 0, 0, 0, 0, 5, 5, 5]);
    assert_eq!(kdump.page(3072 * MIB - PAGE).unwrap()[4088..], [6; 8]);
    assert_eq!((kdump.page(3072 * MIB), kdump.page(high - 4 * PAGE)), (None, None));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Every byte that the tables map in the kernel's half is read back by its linear address, and all RAM by its
    /// physical one, whatever is mapped where and how often.
    #[test]
    fn every_byte_is_found_by_both_addresses(
        mapped in prop::collection::vec((0u64..4, 0u64..600, 0u64..1024), 0..120),
        contents in prop::collection::vec((256u64..1024, any::<u8>()), 0..40),
        direct: bool,
    ) {
        let mut guest = Guest::new(4 * MIB);
        if direct {
            for at in [0, 2 * MIB] {
                guest.map(DIRECT_MAP + at, at, true);
            }
        }
        let mut pages = BTreeMap::new();
        for (area, page, frame) in mapped {
            // The second area goes on where the direct map ends, or takes its place with pages in any order.
            let second = if direct { DIRECT_MAP + 4 * MIB } else { DIRECT_MAP };
            let base = [STACKS, second, IMAGE, 0xffff_ffff_ffc0_0000][area as usize];
            let Some(gva) = base.checked_add(page * PAGE) else { continue };
            guest.map(gva, frame * PAGE, false);
            pages.insert(gva, frame * PAGE);
        }
        // No two frames are alike where they are probed.
        for page in 256..1024_u64 {
            guest.put(page * PAGE + 200, &[(page % 251) as u8]);
        }
        for (page, byte) in contents {
            guest.put(page * PAGE + u64::from(byte), &[byte | 1]);
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmcore");
        write(&guest.core("", &nothing), &path, Form::Elf).unwrap();
        let elf = Elf::read(&path);
        let probes = [0, 1, 17, 200, 4095];
        for gpa in (0..4 * MIB).step_by(4096).flat_map(|page| probes.map(|at| page + at)) {
            prop_assert_eq!(elf.at_physical(gpa), Some(guest.byte(gpa)));
        }
        let paging = Paging::from(&guest.vcpus[0]);
        let direct = (0..1024).filter(|_| direct).map(|page| DIRECT_MAP + page * PAGE);
        for gva in pages.into_keys().chain(direct).flat_map(|page| probes.map(|at| page + at)) {
            let gpa = paging.translate(guest.ram.mem(), gva).unwrap().gpa;
            prop_assert_eq!(elf.at_linear(gva), Some(guest.byte(gpa)), "{:#x}", gva);
        }
        prop_assert_eq!(elf.at_linear(0x1000), None);
    }
}
