//! Kernel images for tests, built field by field.

use object::elf::{PF_R, PF_W, PF_X, PT_LOAD, PT_NOTE};

/// One program header and its content.
#[derive(Clone)]
pub(super) struct Part {
    kind: u32,
    vaddr: u64,
    paddr: u64,
    content: Vec<u8>,
    mem_size: u64,
}

impl Part {
    /// A PT_LOAD segment linked and loaded at `at`.
    pub(super) fn load(at: u64, content: &[u8]) -> Self {
        let mem_size = content.len() as u64;
        Self { kind: PT_LOAD.0, vaddr: at, paddr: at, content: content.to_vec(), mem_size }
    }

    /// The same with zeros after it in memory.
    pub(super) fn bss(mut self, bytes: u64) -> Self {
        self.mem_size += bytes;
        self
    }

    /// The same, linked for another address.
    pub(super) fn linked(mut self, vaddr: u64) -> Self {
        self.vaddr = vaddr;
        self
    }

    /// A PT_NOTE segment with a foreign note and then the PVH note.
    pub(super) fn pvh(entry: u32) -> Self {
        let mut content = note(b"GNU\0", 3, &[0xaa; 20]);
        content.extend(note(b"Xen\0", 18, &entry.to_le_bytes()));
        Self { kind: PT_NOTE.0, content, ..Self::load(0, &[]) }
    }
}

pub(super) fn note(name: &[u8], kind: u32, descriptor: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [name.len() as u32, descriptor.len() as u32, kind] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(name);
    bytes.extend(descriptor);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// An ELF executable for x86.
#[derive(Clone)]
pub(super) struct Elf {
    pub(super) is_64: bool,
    pub(super) entry: u64,
    pub(super) parts: Vec<Part>,
    pub(super) sections: Vec<&'static str>,
}

impl Elf {
    pub(super) fn new64(entry: u64, parts: Vec<Part>) -> Self {
        Self { is_64: true, entry, parts, sections: Vec::new() }
    }

    pub(super) fn new32(entry: u64, parts: Vec<Part>) -> Self {
        Self { is_64: false, ..Self::new64(entry, parts) }
    }

    /// File header, program headers, contents, section names, section headers.
    pub(super) fn build(&self) -> Vec<u8> {
        let (file_header, program_header, section_header) = if self.is_64 { (64, 56, 64) } else { (52, 32, 40) };
        let headers = file_header + program_header * self.parts.len();
        let mut contents: Vec<u8> = Vec::new();
        let mut offsets = Vec::new();
        for part in &self.parts {
            contents.resize(contents.len().next_multiple_of(16), 0);
            offsets.push(headers + contents.len());
            contents.extend(&part.content);
        }
        let names_at = headers + contents.len();
        let mut names = vec![0];
        let mut name_offsets = Vec::new();
        for name in self.sections.iter().chain(&[".shstrtab"]) {
            name_offsets.push(names.len());
            names.extend(name.as_bytes());
            names.push(0);
        }
        let has_sections = !self.sections.is_empty();
        let section_count = if has_sections { self.sections.len() + 2 } else { 0 };
        let sections_at = if has_sections { (names_at + names.len()).next_multiple_of(8) } else { 0 };

        let mut image = b"\x7fELF".to_vec();
        image.extend([if self.is_64 { 2 } else { 1 }, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let mut word = |values: &[(u64, usize)]| {
            for (value, size) in values {
                image.extend(&value.to_le_bytes()[..*size]);
            }
        };
        let address = if self.is_64 { 8 } else { 4 };
        let machine = if self.is_64 { 62 } else { 3 };
        word(&[(2, 2), (machine, 2), (1, 4), (self.entry, address)]);
        word(&[(file_header as u64, address), (sections_at as u64, address), (0, 4)]);
        word(&[(file_header as u64, 2), (program_header as u64, 2), (self.parts.len() as u64, 2)]);
        word(&[(section_header as u64, 2), (section_count as u64, 2), (section_count.saturating_sub(1) as u64, 2)]);
        let flags = u64::from((PF_R | PF_W | PF_X).0);
        for (part, offset) in self.parts.iter().zip(offsets) {
            let size = part.content.len() as u64;
            word(&[(part.kind.into(), 4)]);
            if self.is_64 {
                word(&[(flags, 4)]);
            }
            word(&[(offset as u64, address), (part.vaddr, address), (part.paddr, address)]);
            word(&[(size, address), (part.mem_size, address)]);
            if !self.is_64 {
                word(&[(flags, 4)]);
            }
            word(&[(4, address)]);
        }
        image.extend(contents);
        if has_sections {
            image.extend(&names);
            image.resize(sections_at, 0);
            image.resize(sections_at + section_header, 0);
            for (n, name) in name_offsets.iter().enumerate() {
                let is_names = n == self.sections.len();
                let mut header = Vec::new();
                let mut word = |value: u64, size: usize| header.extend(&value.to_le_bytes()[..size]);
                word(*name as u64, 4);
                word(if is_names { 3 } else { 1 }, 4);
                word(0, address);
                word(0, address);
                word(if is_names { names_at as u64 } else { 0 }, address);
                word(if is_names { names.len() as u64 } else { 0 }, address);
                header.resize(section_header, 0);
                image.extend(header);
            }
        }
        image
    }
}

/// A Multiboot 1 header; `addresses` is header, load, load end, bss end, entry.
pub(super) fn multiboot_header(flags: u32, addresses: Option<[u32; 5]>) -> Vec<u8> {
    let magic = 0x1BAD_B002u32;
    let flags = flags | if addresses.is_some() { 1 << 16 } else { 0 };
    let words = [magic, flags, 0u32.wrapping_sub(magic.wrapping_add(flags))];
    words.iter().chain(addresses.iter().flatten()).flat_map(|word| word.to_le_bytes()).collect()
}

/// A bzImage. The fields are those of the setup header, the defaults those of a small relocatable 64-bit kernel.
#[derive(Clone)]
pub(super) struct Bz {
    pub(super) setup_sects: u8,
    pub(super) header_len: u8,
    pub(super) version: u16,
    pub(super) loadflags: u8,
    pub(super) xloadflags: u16,
    pub(super) relocatable: u8,
    pub(super) alignment: u32,
    pub(super) pref_address: u64,
    pub(super) init_size: u32,
    pub(super) initrd_addr_max: u32,
    pub(super) cmdline_size: u32,
    pub(super) setup_data: u64,
    pub(super) payload: Vec<u8>,
}

impl Default for Bz {
    fn default() -> Self {
        Self {
            setup_sects: 1,
            header_len: 0x6a,
            version: 0x020f,
            loadflags: 1,
            xloadflags: 1,
            relocatable: 1,
            alignment: 0x20_0000,
            pref_address: 0x20_0000,
            init_size: 0x10_0000,
            initrd_addr_max: 0x7fff_ffff,
            cmdline_size: 2047,
            setup_data: 0,
            payload: (0..4096).map(|n| n as u8).collect(),
        }
    }
}

impl Bz {
    pub(super) fn build(&self) -> Vec<u8> {
        let sectors = if self.setup_sects == 0 { 4 } else { usize::from(self.setup_sects) };
        // What is not header must not be taken for it.
        let mut image = vec![0xcc; (sectors + 1) * 512];
        let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        set(0, b"MZ");
        set(0x1f1, &[0; 0x7b]);
        set(0x1f1, &[self.setup_sects]);
        set(0x1f4, &(self.payload.len() as u32 / 16).to_le_bytes());
        set(0x1fe, &[0x55, 0xaa, 0xeb, self.header_len]);
        set(0x202, b"HdrS");
        set(0x206, &self.version.to_le_bytes());
        set(0x211, &[self.loadflags]);
        set(0x22c, &self.initrd_addr_max.to_le_bytes());
        set(0x230, &self.alignment.to_le_bytes());
        set(0x234, &[self.relocatable]);
        set(0x236, &self.xloadflags.to_le_bytes());
        set(0x238, &self.cmdline_size.to_le_bytes());
        set(0x248, &0x300u32.to_le_bytes());
        set(0x24c, &0x400u32.to_le_bytes());
        set(0x250, &self.setup_data.to_le_bytes());
        set(0x258, &self.pref_address.to_le_bytes());
        set(0x260, &self.init_size.to_le_bytes());
        image.extend(&self.payload);
        image
    }
}
