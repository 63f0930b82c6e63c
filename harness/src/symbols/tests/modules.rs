//! Modules: the guest's list in memory, of both shapes, hostile lists, and modules' files.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::built::Built;
use super::*;

/// What a kernel has, as far as modules go. The order of members is not that of any kernel.
const COMMON: &str = "\
typedef unsigned long u64;
typedef unsigned int u32;
struct list_head { struct list_head *next, *prev; };
struct elf64_sym { u32 st_name; unsigned char st_info, st_other; unsigned short st_shndx; u64 st_value, st_size; };
enum module_state { LIVE, COMING, GOING, UNFORMED };
struct list_head modules = { &modules, &modules };
";

const SINCE_6_4: &str = "\
struct mod_kallsyms { struct elf64_sym *symtab; u32 num_symtab; char *strtab; char *typetab; };
struct module_memory { void *base; void *rw; u32 size; };
struct module {
    enum module_state state;
    struct list_head list;
    char name[56];
    unsigned char build_id[20];
    struct module_memory mem[7];
    struct mod_kallsyms *kallsyms;
};
struct module example;
";

const BEFORE_5_2: &str = "\
struct mod_kallsyms { struct elf64_sym *symtab; u32 num_symtab; char *strtab; };
struct module_layout { void *base; u32 size; u32 text_size; u32 ro_size; };
struct module {
    enum module_state state;
    struct list_head list;
    char name[56];
    struct module_layout core_layout;
    struct module_layout init_layout;
    struct mod_kallsyms *kallsyms;
};
struct module example;
";

fn kernel(shape: &str) -> Symbols {
    let built = Built::new();
    let path = built.kernel("kernel", &format!("{COMMON}{shape}"), &[]);
    Symbols::open(&Sources { kernel: Some(&path), ..Sources::default() }).unwrap()
}

/// Guest memory of 4 KiB pages.
#[derive(Default)]
struct Guest {
    pages: BTreeMap<u64, Vec<u8>>,
    next: u64,
}

impl Guest {
    fn write(&mut self, address: u64, bytes: &[u8]) {
        for (at, byte) in (address..).zip(bytes) {
            self.pages.entry(at >> 12).or_insert_with(|| vec![0; 4096])[(at & 0xfff) as usize] = *byte;
        }
    }

    fn pointer(&mut self, address: u64, value: u64) {
        self.write(address, &value.to_le_bytes());
    }

    /// Memory that is not used yet.
    fn place(&mut self, size: u64) -> u64 {
        let at = 0xffff_ffff_c000_0000 + self.next;
        self.next += size.next_multiple_of(64);
        at
    }
}

impl Memory for Guest {
    fn read(&self, address: u64, into: &mut [u8]) -> usize {
        for (done, byte) in into.iter_mut().enumerate() {
            let Some(at) = address.checked_add(done as u64) else { return done };
            let Some(page) = self.pages.get(&(at >> 12)) else { return done };
            *byte = page[(at & 0xfff) as usize];
        }
        into.len()
    }
}

/// A module in the guest's memory.
struct Loaded<'a> {
    name: &'a str,
    state: u32,
    text: Range<u64>,
    data: Range<u64>,
    symbols: &'a [(&'a str, u8, u64)],
    build_id: Vec<u8>,
}

fn load(guest: &mut Guest, symbols: &Symbols, module: &Loaded<'_>) -> u64 {
    let field = |name: &str, member: &str| symbols.field(name, member).unwrap().offset;
    let this = guest.place(symbols.field("module", "").unwrap().size);
    let at = |member: &str| this + field("module", member);
    guest.write(at("state"), &module.state.to_le_bytes());
    guest.write(at("name"), module.name.as_bytes());
    let size = |range: &Range<u64>| ((range.end - range.start) as u32).to_le_bytes();
    if symbols.field("module", "mem").is_some() {
        guest.write(at("build_id"), &module.build_id);
        for (kind, range) in [(0, &module.text), (1, &module.data)] {
            guest.pointer(at(&format!("mem[{kind}].base")), range.start);
            guest.write(at(&format!("mem[{kind}].size")), &size(range));
        }
    } else {
        assert_eq!(module.text.end, module.data.start);
        guest.pointer(at("core_layout.base"), module.text.start);
        guest.write(at("core_layout.size"), &size(&(module.text.start..module.data.end)));
        guest.write(at("core_layout.text_size"), &size(&module.text));
    }
    let letters_apart = symbols.field("mod_kallsyms", "typetab").is_some();
    let (mut table, mut strings, mut letters) = (vec![0; 24], vec![0], vec![b'U']);
    for (name, letter, address) in module.symbols {
        table.extend((strings.len() as u32).to_le_bytes());
        table.extend([if letters_apart { 0x12 } else { *letter }, 0, 1, 0]);
        table.extend(address.to_le_bytes());
        table.extend(16u64.to_le_bytes());
        strings.extend(name.bytes().chain([0]));
        letters.push(*letter);
    }
    let kallsyms = guest.place(64);
    guest.pointer(at("kallsyms"), kallsyms);
    guest.write(kallsyms + field("mod_kallsyms", "num_symtab"), &(table.len() as u32 / 24).to_le_bytes());
    for (member, bytes) in [("symtab", table), ("strtab", strings), ("typetab", letters)] {
        if let Some(field) = symbols.field("mod_kallsyms", member) {
            let place = guest.place(bytes.len() as u64);
            guest.write(place, &bytes);
            guest.pointer(kallsyms + field.offset, place);
        }
    }
    this
}

/// Makes the guest's list of these modules.
fn list(guest: &mut Guest, symbols: &Symbols, modules: &[u64]) {
    let link = symbols.field("module", "list").unwrap().offset;
    let head = symbols.address("modules").unwrap();
    let mut at = head;
    for module in modules {
        guest.pointer(at, module + link);
        at = module + link;
    }
    guest.pointer(at, head);
}

const TEXT: Range<u64> = 0xffff_ffff_c100_0000..0xffff_ffff_c100_1000;
const DATA: Range<u64> = 0xffff_ffff_c100_1000..0xffff_ffff_c100_2000;

fn first(symbols: &[(&'static str, u8, u64)]) -> Loaded<'static> {
    Loaded {
        name: "first_one",
        state: 0,
        text: TEXT,
        data: DATA,
        symbols: Box::leak(symbols.into()),
        build_id: vec![0; 20],
    }
}

#[test]
fn the_list_is_walked_in_both_shapes() {
    for shape in [SINCE_6_4, BEFORE_5_2] {
        let symbols = kernel(shape).with_slide(0x20_0000);
        let mut guest = Guest::default();
        let one = first(&[("enter", b't', TEXT.start + 0x10), ("state", b'd', DATA.start + 8), ("a_number", b'a', 5)]);
        let one = load(&mut guest, &symbols, &one);
        let apart = 0xffff_ffff_c200_0000;
        let two = load(
            &mut guest,
            &symbols,
            &Loaded {
                name: "second",
                state: 1,
                text: apart..apart + 0x1000,
                data: apart + 0x1000..apart + 0x1800,
                symbols: &[("enter", b'T', apart + 0x40)],
                build_id: vec![7; 20],
            },
        );
        list(&mut guest, &symbols, &[two, one]);
        let [second, first] = symbols.guest_modules(&guest).unwrap().try_into().unwrap();
        assert_eq!((second.name.as_str(), second.state, second.address), ("second", ModuleState::Coming, two));
        assert_eq!((first.name.as_str(), first.state), ("first_one", ModuleState::Live));
        assert_eq!(first.text, [TEXT]);
        let all = first.memory.iter().map(|range| range.end - range.start).sum::<u64>();
        assert_eq!(all, 0x2000);

        assert!(matches!(symbols.functions("first-one:enter"), Err(LookupError::NoSuchModule { .. })));
        let loaded = symbols.with_modules(&[second, first]);
        let [enter] = loaded.functions("first-one:enter").unwrap().try_into().unwrap();
        assert_eq!((enter.address, enter.module.as_deref(), enter.size), (TEXT.start + 0x10, Some("first_one"), 16));
        // Without a module's name: wherever it is.
        assert_eq!(loaded.functions("enter").unwrap().len(), 2);
        assert_eq!(loaded.variable("first_one:state").unwrap().address, DATA.start + 8);
        assert_eq!(loaded.address("first_one:state"), Some(DATA.start + 8));
        assert_eq!(loaded.address("second:state"), None);
        let location = loaded.locate(TEXT.start + 0x14).unwrap();
        assert_eq!(
            (location.module.as_deref(), location.symbol.as_str(), location.offset),
            (Some("first_one"), "enter", 4)
        );
        assert_eq!(loaded.locate(5), None);
        assert_eq!(loaded.modules().collect::<Vec<_>>(), ["second", "first_one"]);
        let error = loaded.functions("third:enter").unwrap_err().to_string();
        assert_eq!(error, "no module `third` is loaded or given; there are `second`, `first_one`");
        let error = loaded.functions("second:entr").unwrap_err().to_string();
        assert_eq!(error, "no symbol is called `second:entr`; similar: `enter`");
    }
}

#[test]
fn a_damaged_list_ends_and_keeps_what_came_before() {
    let symbols = kernel(SINCE_6_4);
    let mut guest = Guest::default();
    let one = load(&mut guest, &symbols, &first(&[]));
    let link = symbols.field("module", "list").unwrap().offset;
    let damaged = |guest: &Guest| match symbols.guest_modules(guest) {
        Err(ModulesError::Damaged { found, .. }) => found.len(),
        other => panic!("{other:?}"),
    };
    // Nothing is mapped at all.
    assert_eq!(damaged(&Guest::default()), 0);
    // In circles.
    list(&mut guest, &symbols, &[one]);
    assert_eq!(symbols.guest_modules(&guest).unwrap().len(), 1);
    guest.pointer(one + link, one + link);
    assert_eq!(damaged(&guest), 1);
    // Into nothing.
    guest.pointer(one + link, 0x1234);
    assert_eq!(damaged(&guest), 1);
    guest.pointer(one + link, u64::MAX - 3);
    assert_eq!(damaged(&guest), 1);
    // A name that is none.
    list(&mut guest, &symbols, &[one]);
    guest.write(one + symbols.field("module", "name").unwrap().offset, b"../etc\xff");
    assert_eq!(damaged(&guest), 0);
    assert!(matches!(Symbols::none().guest_modules(&guest), Err(ModulesError::NoList)));
    let plain = kernel("");
    assert!(matches!(plain.guest_modules(&guest), Err(ModulesError::NoTypes("module"))));
}

const MODULE: &str = "\
static int hidden = 3;
int shown[4] = { 1, 2, 3, 4 };

static inline __attribute__((always_inline)) int helper(int x)
{
    return x * *(volatile int *)&hidden;
}

__attribute__((section(\".init.text\"))) int start(void)
{
    return 1;
}

__attribute__((noinline)) int work(int x)
{
    return helper(x) + shown[x];
}

int more(int x)
{
    hidden = x;
    return work(x) + 1;
}
";

/// The module's symbols as the guest has them, with `.text` and `.data` where they were loaded.
fn symbols_in_guest(file: &[u8]) -> Vec<(&'static str, u8, u64)> {
    use object::{Object, ObjectSection, ObjectSymbol};
    let file = object::File::parse(file).unwrap();
    let in_section = |symbol: &object::Symbol<'_, '_>| {
        let section = file.section_by_index(symbol.section_index()?).unwrap();
        match section.name().unwrap() {
            ".text" => Some((TEXT.start + 0x100, b't')),
            ".data" => Some((DATA.start + 0x20, b'd')),
            _ => None,
        }
    };
    file.symbols()
        .filter(|symbol| !symbol.name().unwrap().is_empty() && symbol.kind() != object::SymbolKind::File)
        .filter_map(|symbol| {
            let (base, letter) = in_section(&symbol)?;
            let name: &'static str = Box::leak(symbol.name().unwrap().to_owned().into_boxed_str());
            Some((name, letter, base + symbol.address()))
        })
        .collect()
}

/// A guest with the module `first_one`, built from [`MODULE`].
fn with_file(built: &Built, flags: &[&str], files: &dyn Fn(&Built, &PathBuf) -> Vec<PathBuf>) -> Symbols {
    let path = built.kernel("kernel", &format!("{COMMON}{SINCE_6_4}"), &[]);
    let module = built.module("first-one.ko", MODULE, flags);
    let in_guest = symbols_in_guest(&std::fs::read(&module).unwrap());
    let debug_dirs = [built.path("debug")];
    let given = files(built, &module);
    let sources = Sources { kernel: Some(&path), symbols: &given, debug_dirs: &debug_dirs };
    let symbols = Symbols::open(&sources).unwrap();
    let mut guest = Guest::default();
    let one = load(&mut guest, &symbols, &first(&in_guest));
    list(&mut guest, &symbols, &[one]);
    let loaded = symbols.guest_modules(&guest).unwrap();
    symbols.with_modules(&loaded)
}

fn lines_of_work(symbols: &Symbols) -> Vec<Vec<(String, Option<u32>)>> {
    let [work] = symbols.functions("first_one:work").unwrap().try_into().unwrap();
    assert!(TEXT.contains(&work.address));
    let lines = |offset| symbols.lines(work.address + offset).into_iter().map(|line| (line.function, line.line));
    (0..work.size).map(|offset| lines(offset).collect()).collect()
}

#[test]
fn a_modules_file_gives_lines_and_types() {
    let line_of = |text: &str| MODULE.lines().position(|line| line.contains(text)).map(|line| line as u32 + 1);
    for flags in [&["-gdwarf-5"], &["-gdwarf-4"], &["-gz=zlib"]] {
        let built = Built::new();
        let symbols = with_file(&built, flags, &|_, module| vec![module.clone()]);
        let expected = vec![
            ("helper".to_owned(), line_of("return x * *(volatile")),
            ("work".to_owned(), line_of("return helper(x)")),
        ];
        assert!(lines_of_work(&symbols).contains(&expected), "{flags:?}: {:?}", lines_of_work(&symbols));
        let hidden = symbols.variable("first_one:hidden").unwrap();
        assert_eq!((hidden.size, hidden.type_name.as_deref()), (4, Some("int")));
        assert_eq!(hidden.class, Class::Data);
        let shown = symbols.variable("first_one:shown").unwrap();
        assert_eq!(symbols.variable("first_one:shown[2]").unwrap().address, shown.address + 8);
        // The section that it was in is not in the guest any more.
        assert!(symbols.functions("first_one:start").is_err());
    }
}

#[test]
fn a_modules_file_is_found_below_a_directory() {
    let built = Built::new();
    let symbols = with_file(&built, &[], &|built, module| {
        let directory = built.path("kernel-tree/drivers/one");
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::rename(module, directory.join("first-one.ko")).unwrap();
        vec![built.path("kernel-tree")]
    });
    assert!(lines_of_work(&symbols).iter().any(|lines| lines.len() == 2));
}

#[test]
fn a_file_that_does_not_fit_the_guest_is_left_out() {
    let built = Built::new();
    let symbols = with_file(&built, &[], &|built, _| {
        // Everything is elsewhere, each at another distance.
        let other = "int pad[9] = { 7 }; int gap(int x) { return x * 7 + pad[x & 3]; }\n";
        let turned =
            "int more(int x) { return x; } int gap2(int x) { return x << x; } int work(int x) { return x - 9; }\n";
        vec![built.module("first_one.ko", &format!("{other}{turned}int shown[9] = {{ 2 }};\n"), &["-O1"])]
    });
    assert!(lines_of_work(&symbols).iter().all(Vec::is_empty));
}

#[test]
fn a_name_of_a_module_that_is_not_loaded_is_looked_up_in_its_file() {
    let built = Built::new();
    let module = built.module("first-one.ko", MODULE, &[]);
    let files = [module];
    let symbols = Symbols::open(&Sources { symbols: &files, ..Sources::default() }).unwrap();
    let error = symbols.functions("first_one:work").unwrap_err();
    assert_eq!(
        error.to_string(),
        "`work` is in the module `first_one`, which is not loaded; load it before this is looked up"
    );
    let error = symbols.functions("first_one:wrk").unwrap_err();
    assert_eq!(error.to_string(), "no symbol is called `first_one:wrk`; similar: `work`");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_the_guest_writes_is_survived(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u64>()), 1..60),
    ) {
        thread_local!(static KERNEL: Symbols = kernel(SINCE_6_4));
        KERNEL.with(|symbols| {
            let mut guest = Guest::default();
            let names = [("enter", b't', TEXT.start), ("leave", b't', TEXT.start + 0x20)];
            let one = load(&mut guest, symbols, &first(&names));
            let two = load(&mut guest, symbols, &first(&names));
            list(&mut guest, symbols, &[one, two]);
            let size = guest.next / 4;
            for (at, value) in damage {
                let at = one + 4 * at.index(size as usize) as u64;
                guest.write(at, &value.to_le_bytes());
            }
            let found = match symbols.guest_modules(&guest) {
                Ok(found) | Err(ModulesError::Damaged { found, .. }) => found,
                Err(error) => panic!("{error}"),
            };
            let loaded = symbols.with_modules(&found);
            let _ = (loaded.functions("enter"), loaded.locate(TEXT.start + 8), loaded.lines(TEXT.start));
        });
    }
}
