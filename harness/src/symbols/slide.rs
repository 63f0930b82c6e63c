//! By how much KASLR has moved the kernel.
//!
//! The kernel's image is moved as a whole, by a multiple of 2 MiB that differs from boot to boot. Any address in it
//! that is seen at run time leaves a few dozen candidates; the guest's memory decides. What is compared must be the
//! same from the first instruction in the kernel's half of the address space on: text is not (alternatives, static calls and ftrace
//! patch it), pointers are not (they are relocated), but the banner and tables of strings and offsets are.

use super::Memory;
use super::elf::Elf;

/// x86 aligns the kernel's image to this (CONFIG_PHYSICAL_ALIGN is never less).
pub(super) const ALIGN: u64 = 2 << 20;

/// Where the kernel's image may be: the last 2 GiB of the address space.
pub(super) const LOWEST: u64 = 0xffff_ffff_8000_0000;

/// What `linux_banner` begins with in every version.
const BANNER: &[u8] = b"Linux version ";

/// Sections of bytes that neither relocation nor patching changes.
const CONSTANT: [&str; 4] = [".notes", "__ksymtab_strings", ".BTF", ".orc_header"];

/// Of each such section so much is compared, from its start and from its middle.
const SAMPLE: usize = 128;

/// Pieces of the kernel's memory that are the same in every boot, with their addresses as linked.
#[derive(Debug, Default)]
pub(super) struct Fingerprint {
    pieces: Vec<(u64, Vec<u8>)>,
}

impl Fingerprint {
    /// From what is known: `banner` is the address of `linux_banner`; `image` holds the contents.
    pub(super) fn new(banner: Option<u64>, image: Option<&Elf>) -> Self {
        let mut pieces = Vec::new();
        if let Some(banner) = banner {
            let linked = image.and_then(|image| image.linked(banner));
            let text = linked.and_then(|bytes| bytes.split(|&byte| byte == 0).next());
            let text = text.filter(|text| text.starts_with(BANNER) && text.len() <= 4096).unwrap_or(BANNER);
            pieces.push((banner, text.to_vec()));
        }
        for section in image.into_iter().flat_map(Elf::sections).filter(|section| section.alloc) {
            if section.address < LOWEST || !CONSTANT.contains(&section.name.as_str()) {
                continue;
            }
            for offset in [0, section.size / 2] {
                let address = section.address.saturating_add(offset);
                let bytes = image.and_then(|image| image.linked(address)).unwrap_or_default();
                let bytes = bytes.get(..SAMPLE.min(bytes.len())).unwrap_or_default();
                if bytes.iter().any(|&byte| byte != 0) {
                    pieces.push((address, bytes.to_vec()));
                }
            }
        }
        Fingerprint { pieces }
    }

    /// Whether all pieces are in `memory`, moved by `slide`.
    fn matches(&self, memory: &dyn Memory, slide: u64) -> bool {
        let mut found = Vec::new();
        !self.pieces.is_empty()
            && self.pieces.iter().all(|(address, bytes)| {
                found.clear();
                found.resize(bytes.len(), 0);
                memory.read(address.wrapping_add(slide), &mut found) == bytes.len() && found == *bytes
            })
    }

    /// The slide at which `pc` is in the image and the memory has every piece.
    pub(super) fn find(&self, range: &std::ops::Range<u64>, memory: &dyn Memory, pc: u64) -> Option<u64> {
        // Not moved at all is the commonest.
        if range.contains(&pc) && self.matches(memory, 0) {
            return Some(0);
        }
        if range.start < LOWEST {
            return None;
        }
        let least = pc.saturating_sub(range.end.checked_sub(1)?);
        let most = pc.checked_sub(range.start)?;
        let first = least.checked_next_multiple_of(ALIGN)?;
        (first..=most)
            .step_by(ALIGN as usize)
            .filter(|slide| range.end.checked_add(*slide).is_some_and(|end| end > LOWEST))
            .find(|&slide| slide != 0 && self.matches(memory, slide))
    }
}
