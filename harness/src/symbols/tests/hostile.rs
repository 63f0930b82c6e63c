//! Damaged files: whatever is wrong with them, nothing panics and nothing hangs.

use std::sync::OnceLock;

use proptest::prelude::*;
use trapline_guests::demo;

use super::built::Built;
use super::*;

/// A program with DWARF in its usual form, compressed, or BTF alone.
fn program(which: usize) -> &'static [u8] {
    const SOURCE: &str = "\
struct inner { int a; union { int b; char c[4]; }; int narrow : 3; };
struct outer { struct inner many[3]; struct outer *next; int (*call)(int); } thing = { { { 1 } } };
static inline __attribute__((always_inline)) int twice(int x) { return x * thing.many[1].b; }
int work(int x) { return twice(x) + twice(x + 1); }
";
    static PROGRAMS: OnceLock<[Vec<u8>; 3]> = OnceLock::new();
    let programs = PROGRAMS.get_or_init(|| {
        let built = Built::new();
        [&["-gdwarf-5"][..], &["-gdwarf-4", "-gz=zlib"], &["-g0", "-gbtf"]]
            .map(|flags| std::fs::read(built.kernel("program", SOURCE, flags)).unwrap())
    });
    programs.get(which).map_or(demo(), Vec::as_slice)
}

/// Asks everything that there is to ask.
fn ask(symbols: &Symbols) {
    let _ = symbols.variable("thing.many[2].c[1]");
    let _ = symbols.variable("cpus[3].count");
    let _ = symbols.functions("twice");
    let _ = symbols.functions("work");
    let _ = symbols.field("outer", "many[1].b");
    let _ = symbols.section(".text");
    let range = symbols.kernel_range();
    let step = ((range.end - range.start) / 50).max(1);
    for number in 0..50 {
        let address = range.start.wrapping_add(number * step);
        let _ = (symbols.locate(address), symbols.lines(address), symbols.linked_bytes(address));
    }
    for name in ["work", "_start", "thing"] {
        if let Some(address) = symbols.address(name) {
            let _ = symbols.lines(address);
        }
    }
}

fn open(bytes: &[u8]) {
    let file = file(bytes);
    let files = [file.path().to_owned()];
    let nowhere = [PathBuf::from("/nonexistent")];
    if let Ok(symbols) = Symbols::open(&Sources { symbols: &files, kernel: None, debug_dirs: &nowhere }) {
        ask(&symbols);
    }
    if let Ok(symbols) = Symbols::open(&Sources { symbols: &[], kernel: Some(&files[0]), debug_dirs: &nowhere }) {
        ask(&symbols);
    }
}

#[test]
fn btf_alone_gives_members_of_structures() {
    let symbols = symbols_of(program(2));
    let field = symbols.field("outer", "many[1].b").unwrap();
    assert_eq!((field.offset, field.size, field.type_name.as_str()), (12 + 4, 4, "int"));
    let next = symbols.field("outer", "next").unwrap();
    assert_eq!((next.offset, next.type_name.as_str()), (40, "struct outer *"));
    assert_eq!(symbols.field("inner", "c").unwrap().elements, Some(4));
    assert_eq!(symbols.field("inner", "narrow"), None, "a bit-field");
    assert_eq!(symbols.field("outer", "nothing"), None);
    // And variables, where the compiler has put them in.
    assert_eq!(symbols.variable("thing.many[2].a").unwrap().address, symbols.address("thing").unwrap() + 24);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn damaged_files_never_panic(
        which in 0..4usize,
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..30),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = program(which).to_vec();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        open(&bytes);
    }

    #[test]
    fn damaged_headers_never_panic(
        which in 0..4usize,
        damage in proptest::collection::vec((0..64usize, any::<u8>()), 1..6),
        table in proptest::collection::vec((any::<prop::sample::Index>(), any::<u64>()), 0..4),
    ) {
        let mut bytes = program(which).to_vec();
        // The section headers are at the end.
        let headers = u64::from_le_bytes(bytes[40..48].try_into().unwrap()) as usize;
        for (at, value) in damage.into_iter().filter(|(at, _)| *at >= 4) {
            bytes[at] = value;
        }
        for (at, value) in table {
            let at = headers + at.index((bytes.len() - headers) / 8 - 1) * 8;
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        open(&bytes);
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let mut elf = b"\x7fELF\x02\x01\x01\0".to_vec();
        elf.extend(&bytes);
        open(&elf);
        open(&bytes);
    }
}
