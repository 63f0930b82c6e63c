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
