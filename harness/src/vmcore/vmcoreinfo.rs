//! VMCOREINFO: where readers of a core find their way into the kernel's memory (Linux,
//! admin-guide/kdump/vmcoreinfo).

use std::fmt::Write;

use crate::symbols::{Memory, Symbols};

/// Longest text that is taken from a guest. Linux reserves one page for it.
const MOST: u64 = 1 << 16;
/// How each of them begins.
const START: &[u8] = b"OSRELEASE=";

/// What the running kernel says of itself, once it has written that down (which it does while it initialises its
/// subsystems); before that, the least that drgn and crash need, from `symbols`, which must know the slide.
/// Empty if there is no Linux in `memory`, which is that of any vCPU that has the kernel mapped.
pub fn vmcoreinfo(symbols: &Symbols, memory: &dyn Memory) -> Vec<u8> {
    let guest = Guest { symbols, memory };
    guest.own().or_else(|| guest.least()).unwrap_or_default()
}

struct Guest<'a> {
    symbols: &'a Symbols,
    memory: &'a dyn Memory,
}

impl Guest<'_> {
    /// The kernel's own text.
    fn own(&self) -> Option<Vec<u8>> {
        let len = self.word("vmcoreinfo_size").filter(|len| *len <= MOST)?;
        // An array until Linux 4.12, a pointer since.
        let array = self.symbols.address("vmcoreinfo_data")?;
        let places = [Some(array), self.word("vmcoreinfo_data")];
        places.into_iter().flatten().find_map(|place| {
            let mut text = vec![0; usize::try_from(len).ok()?];
            let is_text = |byte: &u8| *byte == b'\n' || matches!(byte, b' '..=b'~');
            let is_whole = self.memory.read(place, &mut text) == text.len();
            (is_whole && text.starts_with(START) && text.iter().all(is_text)).then_some(text)
        })
    }

    /// What can be said from outside.
    fn least(&self) -> Option<Vec<u8>> {
        let release = self.release()?;
        let symbol = |name: &str| self.symbols.address(name);
        // x86 calls them so; the kernel's own text has the name of other architectures.
        let tables =
            symbol("init_top_pgt").or_else(|| symbol("init_level4_pgt")).or_else(|| symbol("swapper_pg_dir"))?;
        let phys_base = self.word("phys_base")? as i64;
        let wide = self.read::<4>("__pgtable_l5_enabled").is_some_and(|word| word != [0; 4]);
        let mut text = format!("OSRELEASE={release}\n");
        // A String takes whatever is written to it.
        let mut line = |key: &str, value: String| _ = writeln!(text, "{key}={value}");
        if let Some(id) = self.symbols.build_id() {
            line("BUILD-ID", id.iter().map(|byte| format!("{byte:02x}")).collect());
        }
        line("PAGESIZE", "4096".to_owned());
        for name in ["init_uts_ns", "node_online_map", "_stext"] {
            if let Some(address) = symbol(name) {
                line(&format!("SYMBOL({name})"), format!("{address:x}"));
            }
        }
        line("SYMBOL(swapper_pg_dir)", format!("{tables:x}"));
        line("NUMBER(phys_base)", phys_base.to_string());
        line("NUMBER(pgtable_l5_enabled)", u8::from(wide).to_string());
        line("KERNELOFFSET", format!("{:x}", self.symbols.slide()));
        Some(text.into_bytes())
    }

    /// The release, if this kernel is in memory.
    fn release(&self) -> Option<String> {
        let banner: [u8; 192] = self.read("linux_banner")?;
        let text = String::from_utf8_lossy(&banner);
        let release = text.strip_prefix("Linux version ")?.split([' ', '\0']).next()?;
        release.bytes().all(|byte| byte.is_ascii_graphic()).then(|| release.to_owned())
    }

    fn word(&self, name: &str) -> Option<u64> {
        self.read(name).map(u64::from_le_bytes)
    }

    fn read<const N: usize>(&self, name: &str) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        (self.memory.read(self.symbols.address(name)?, &mut bytes) == N).then_some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::symbols::Sources;

    const SYSTEM_MAP: &str = "\
ffffffff81000000 T _text
ffffffff81000000 T _stext
ffffffff81800000 R linux_banner
ffffffff82000000 D init_top_pgt
ffffffff82001000 D phys_base
ffffffff82001008 D __pgtable_l5_enabled
ffffffff82002000 D init_uts_ns
ffffffff82003000 B vmcoreinfo_data
ffffffff82004000 B vmcoreinfo_size
ffffffff82005000 B _end
";
    const SLIDE: u64 = 0x1200_0000;
    const TEXT: &[u8] = b"OSRELEASE=6.12.1\nPAGESIZE=4096\n";

    /// Linear memory, in pieces; later ones lie over those before.
    struct Pieces(Vec<(u64, Vec<u8>)>);

    impl Memory for Pieces {
        fn read(&self, address: u64, into: &mut [u8]) -> usize {
            let found = self.0.iter().rev().find_map(|(start, bytes)| {
                bytes.get(usize::try_from(address.checked_sub(*start)?).ok()?..).filter(|rest| !rest.is_empty())
            });
            let rest = found.unwrap_or_default();
            let len = rest.len().min(into.len());
            into[..len].copy_from_slice(&rest[..len]);
            len
        }
    }

    fn symbols() -> Symbols {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("System.map");
        fs::write(&path, SYSTEM_MAP).unwrap();
        Symbols::open(&Sources { symbols: &[path], ..Sources::default() }).unwrap().with_slide(SLIDE)
    }

    /// A kernel that has just begun.
    fn young() -> Pieces {
        let mut banner = b"Linux version 6.12.1-test (someone@somewhere) #1 SMP\n".to_vec();
        banner.resize(256, 0);
        let data = [(-0x20_0000_i64).to_le_bytes(), [1, 0, 0, 0, 0, 0, 0, 0]].concat();
        let bss = vec![0; 0x2000];
        let pieces = [(0xffff_ffff_8180_0000, banner), (0xffff_ffff_8200_1000, data), (0xffff_ffff_8200_3000, bss)];
        Pieces(pieces.map(|(address, bytes)| (address + SLIDE, bytes)).to_vec())
    }

    /// One that has written down what it is.
    fn grown(text: &[u8], len: u64) -> Pieces {
        let mut memory = young();
        memory.0.push((0xff11_0000_0000_1000, text.to_vec()));
        memory.0.push((0xffff_ffff_8200_3000 + SLIDE, 0xff11_0000_0000_1000_u64.to_le_bytes().to_vec()));
        memory.0.push((0xffff_ffff_8200_4000 + SLIDE, len.to_le_bytes().to_vec()));
        memory
    }

    const LEAST: &str = "\
OSRELEASE=6.12.1-test
PAGESIZE=4096
SYMBOL(init_uts_ns)=ffffffff94002000
SYMBOL(_stext)=ffffffff93000000
SYMBOL(swapper_pg_dir)=ffffffff94000000
NUMBER(phys_base)=-2097152
NUMBER(pgtable_l5_enabled)=1
KERNELOFFSET=12000000
";

    fn said(memory: &Pieces) -> String {
        String::from_utf8(vmcoreinfo(&symbols(), memory)).unwrap()
    }

    #[test]
    fn before_the_kernel_has_it_the_least_is_made_from_symbols() {
        assert_eq!(said(&young()), LEAST);
    }

    #[test]
    fn the_kernels_own_is_taken_from_where_it_points_to() {
        let memory = grown(TEXT, TEXT.len() as u64);
        assert_eq!(said(&memory).as_bytes(), TEXT);
        // An array: no pointer in between.
        let mut memory = young();
        memory.0.push((0xffff_ffff_8200_3000 + SLIDE, TEXT.to_vec()));
        memory.0.push((0xffff_ffff_8200_4000 + SLIDE, (TEXT.len() as u64).to_le_bytes().to_vec()));
        assert_eq!(said(&memory).as_bytes(), TEXT);
    }

    #[test]
    fn what_cannot_be_the_kernels_own_is_not_taken() {
        for len in [0, 3, TEXT.len() as u64 + 1, MOST, MOST + 1, u64::MAX] {
            assert_eq!(said(&grown(TEXT, len)), LEAST, "{len}");
        }
        for text in [&b"OSRELEASE=\x1b[0m"[..], b"osrelease=6.12.1", b"OSRELEASE=\0\0"] {
            assert_eq!(said(&grown(text, text.len() as u64)), LEAST, "{text:?}");
        }
    }

    #[test]
    fn without_linux_there_is_none() {
        assert_eq!(said(&Pieces(Vec::new())), "");
        let mut other = young();
        other.0[0].1 = b"Minix".repeat(100);
        assert_eq!(said(&other), "");
        other.0[0].1 = b"Linux version \xff\n\n (".repeat(100);
        assert_eq!(said(&other), "");
        assert_eq!(vmcoreinfo(&Symbols::none(), &grown(TEXT, TEXT.len() as u64)), b"");
        // The slide is not known yet.
        assert_eq!(vmcoreinfo(&symbols().with_slide(0), &grown(TEXT, TEXT.len() as u64)), b"");
    }
}
