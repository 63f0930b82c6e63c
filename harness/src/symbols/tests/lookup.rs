//! Names, addresses and lines.

use trapline_guests::{demo, symbol, symbols};

use super::*;

const MAP: &str = "\
0000000000000000 D __per_cpu_start
0000000000001000 d runqueues
0000000000039000 D __per_cpu_end
ffffffff81000000 T _stext
ffffffff81000000 T _text
ffffffff81000100 t __pfx_foo
ffffffff81000110 t foo
ffffffff81000200 t foo
ffffffff81000280 t foo.cold
ffffffff81000300 t bar.isra.0
ffffffff81000400 t qux.part.0
ffffffff81000500 T sys_one
ffffffff81000500 T __x64_sys_one
ffffffff81000500 W __ia32_sys_one
ffffffff82000000 T _etext
ffffffff82000000 R linux_banner
ffffffff82100000 D counter
ffffffff82100008 d twice
ffffffff82100010 d twice
ffffffff82200000 T __init_begin
ffffffff82200000 T start_kernel
ffffffff82200100 d initcalls
ffffffff82300000 R __init_end
ffffffff82400000 B _end
";

fn map() -> Symbols {
    symbols_in(MAP.as_bytes()).unwrap()
}

fn names(found: Result<Vec<Symbol>, LookupError>) -> Vec<(String, u64)> {
    found.unwrap().into_iter().map(|symbol| (symbol.name, symbol.address)).collect()
}

#[test]
fn every_symbol_of_an_elf_file_is_found_by_name_and_by_address() {
    let symbols_of_demo = symbols_of(demo());
    for (name, address) in symbols(demo()) {
        assert!(symbols_of_demo.find(name).iter().any(|found| found.address == address), "{name}");
    }
    let count_up = symbol(demo(), "count_up").unwrap();
    let [found] = symbols_of_demo.functions("count_up").unwrap().try_into().unwrap();
    assert_eq!((found.address, found.class, found.matched), (count_up, Class::Text, Match::Exact));
    for offset in [0, 1, found.size - 1] {
        let location = symbols_of_demo.locate(count_up + offset).unwrap();
        if location.symbol != "count_up_here" {
            assert_eq!((location.symbol.as_str(), location.offset, location.size), ("count_up", offset, found.size));
        }
    }
    assert_eq!(symbols_of_demo.locate(0), None);
    assert_eq!(symbols_of_demo.locate(u64::MAX), None);
}

#[test]
fn lines_name_the_source() {
    let symbols = symbols_of(demo());
    let traced = symbols.address("count_up_traced_here").unwrap();
    let lines = symbols.lines(traced);
    let outermost = lines.last().unwrap();
    assert_eq!(outermost.function, "count_up_traced");
    assert!(outermost.file.as_deref().unwrap() == "demo/traced.c", "{outermost:?}");
    assert!(!outermost.inlined);
    let source = include_str!("../../../../guest-images/demo/traced.c");
    let line = outermost.line.unwrap() as usize;
    // The asm statement covers several lines; the compiler names one of them.
    assert!(
        (line.saturating_sub(4)..line + 4)
            .any(|line| source.lines().nth(line).is_some_and(|text| text.contains("incq")))
    );
    assert_eq!(symbols.lines(0x10), []);
}

#[test]
fn a_name_that_several_functions_have_gives_all_but_their_cold_halves() {
    assert_eq!(
        names(map().functions("foo")),
        [("foo".to_owned(), 0xffff_ffff_8100_0110), ("foo".to_owned(), 0xffff_ffff_8100_0200)]
    );
}

#[test]
fn the_compilers_suffixes_are_found_and_told() {
    let [bar] = map().functions("bar").unwrap().try_into().unwrap();
    assert_eq!((bar.name.as_str(), bar.matched), ("bar.isra.0", Match::Clone));
    let [qux] = map().functions("qux").unwrap().try_into().unwrap();
    assert_eq!((qux.name.as_str(), qux.matched), ("qux.part.0", Match::Part));
    let [exact] = map().functions("bar.isra.0").unwrap().try_into().unwrap();
    assert_eq!((exact.name.as_str(), exact.matched), ("bar.isra.0", Match::Exact));
}

#[test]
fn of_aliases_the_plainest_global_one_names_the_address() {
    let at = |address| map().locate(address).map(|location| (location.symbol, location.offset));
    assert_eq!(at(0xffff_ffff_8100_0504), Some(("sys_one".to_owned(), 4)));
    // Padding in front of a function is not a function.
    assert_eq!(at(0xffff_ffff_8100_0105), Some(("_stext".to_owned(), 0x105)));
    assert_eq!(at(0xffff_ffff_8100_0110), Some(("foo".to_owned(), 0)));
    assert_eq!(at(0x1000), None, "per-cpu variables are nowhere");
}

#[test]
fn sizes_go_to_the_next_symbol_where_there_are_none() {
    let [counter] = map().find("counter").try_into().unwrap();
    assert_eq!(counter.size, 8);
}

#[test]
fn each_refusal_has_its_own_words() {
    let error = |name| map().functions(name).unwrap_err().to_string();
    assert_eq!(error("conter"), "no symbol is called `conter`; similar: `counter`");
    assert_eq!(
        error("nothing_like_it"),
        "no symbol is called `nothing_like_it`; is it configured into this kernel? A module's is written MODULE:NAME"
    );
    assert_eq!(
        error("start_kernel"),
        "`start_kernel` is in .init.text, which the kernel discards after boot, and its memory is then used for other \
         things; trap something that lasts"
    );
    assert_eq!(error("counter"), "`counter` is not a function; to watch a variable use write: or access:");
    assert_eq!(
        Symbols::none().functions("panic").unwrap_err().to_string(),
        "there are no symbols; give the kernel's vmlinux or System.map with --symbols"
    );
}

#[test]
fn the_slide_is_in_every_address_but_those_of_per_cpu_variables() {
    let moved = map().with_slide(0x1e00_0000);
    assert_eq!(moved.address("counter"), Some(0xffff_ffff_a010_0000));
    assert_eq!(moved.functions("bar").unwrap()[0].address, 0xffff_ffff_9f00_0300);
    assert_eq!(moved.locate(0xffff_ffff_a010_0004).unwrap().symbol, "counter");
    assert_eq!(moved.locate(0xffff_ffff_8100_0504), None);
    assert_eq!(moved.find("runqueues")[0].address, 0x1000);
    assert_eq!(moved.kernel_range(), 0xffff_ffff_8100_0000..0xffff_ffff_8240_0000);
}

#[test]
fn files_that_are_no_symbols_are_refused() {
    let refused = |bytes: &[u8]| symbols_in(bytes).unwrap_err().to_string();
    assert!(refused(b"hello").ends_with(": neither ELF (vmlinux, its debug file, a module) nor System.map"));
    assert!(refused(b"").ends_with(": neither ELF (vmlinux, its debug file, a module) nor System.map"));
    let error = refused(b"ffffffff81000000 T _text\nrubbish\n");
    assert!(error.ends_with(": line 2: expected ADDRESS LETTER NAME as nm prints them, found `rubbish`"), "{error}");
    let error = refused(b"ffffffffffffffff B The real System.map is in the linux-image-<version>-dbg package\n");
    assert!(
        error.ends_with("`ffffffffffffffff B The real System.map is in the linux-image-<version>-dbg package`"),
        "{error}"
    );
    let error = refused(b"0000000000000000 T _text\n0000000000000000 T _stext\n");
    assert!(error.contains(": all addresses are 0: "), "{error}");
    assert!(refused(&demo()[..100]).contains(": not a sound ELF file: "));
    let missing = [PathBuf::from("/nowhere/vmlinux")];
    let error = Symbols::open(&Sources { symbols: &missing, ..Sources::default() }).unwrap_err();
    assert!(error.to_string().starts_with("/nowhere/vmlinux: No such file"), "{error}");
    let directory = [PathBuf::from("/")];
    let error = Symbols::open(&Sources { kernel: Some(&directory[0]), ..Sources::default() }).unwrap_err();
    assert_eq!(error.to_string(), "/: not a regular file");
}

#[test]
fn a_kernel_that_symbols_cannot_be_read_from_is_told_when_one_is_looked_up() {
    let error = |bytes: &[u8]| symbols_of(bytes).functions("panic").unwrap_err().to_string();
    assert!(
        error(b"something else").contains(" is neither ELF nor a bzImage); give the kernel's vmlinux or System.map")
    );
    assert!(error(&demo()[..100]).contains(": not a sound ELF file: "));
}

#[test]
fn symbols_are_shared_between_threads() {
    fn shared<T: Send + Sync + Clone + 'static>(_: &T) {}
    shared(&Symbols::none());
}
