//! Lines, types and inlined functions, in every form of DWARF that kernels are built with.

use super::built::Built;
use super::*;

const SOURCE: &str = "\
typedef unsigned int u32;
struct list_head { struct list_head *next, *prev; };
struct inner { u32 a; union { u32 b; char bytes[4]; }; struct { u32 c; } d; };
struct outer {
    struct list_head list;
    const struct inner many[3];
    u32 grid[2][5];
    u32 narrow : 3, wide : 13;
    int (*call)(int);
    enum { ONE, TWO } kind;
    volatile u32 *pointer;
    struct inner *last;
};
struct outer thing = { .kind = TWO };
static u32 counted;
u32 table[4] = { 1, 2, 3, 4 };

static inline __attribute__((always_inline)) u32 innermost(u32 x)
{
    return *(volatile u32 *)&counted + x;
}

static inline __attribute__((always_inline)) u32 middle(u32 x)
{
    return innermost(x) * 3;
}

__attribute__((noinline)) u32 outermost(u32 x)
{
    static u32 calls = 1;
    calls += x;
    return middle(x) + calls + table[x];
}

u32 another(u32 x)
{
    return middle(x) + (u32)(unsigned long)&thing;
}
";

/// The line in [`SOURCE`] with this text, from 1 on.
fn line_of(text: &str) -> u32 {
    let line = SOURCE.lines().position(|line| line.contains(text)).unwrap();
    line as u32 + 1
}

const FORMS: [&[&str]; 4] =
    [&["-gdwarf-5"], &["-gdwarf-4"], &["-gdwarf-5", "-gz=zlib"], &["-gdwarf-4", "-gz=zlib-gnu"]];

/// The same source in each form.
fn each(with: impl Fn(&Symbols)) {
    let built = Built::new();
    for form in FORMS {
        let kernel = built.kernel("kernel", SOURCE, form);
        with(&Symbols::open(&Sources { kernel: Some(&kernel), ..Sources::default() }).unwrap());
    }
}

#[test]
fn inlined_functions_have_lines_of_their_own() {
    each(|symbols| {
        let [outermost] = symbols.functions("outermost").unwrap().try_into().unwrap();
        let chains = (0..outermost.size).map(|offset| symbols.lines(outermost.address + offset));
        let deepest = chains.max_by_key(Vec::len).unwrap();
        let of = |line: &SourceLine| (line.function.clone(), line.line, line.inlined);
        let expected = [
            ("innermost".to_owned(), Some(line_of("return *(volatile")), true),
            ("middle".to_owned(), Some(line_of("return innermost(x) * 3")), true),
            ("outermost".to_owned(), Some(line_of("return middle(x) + calls")), false),
        ];
        assert_eq!(deepest.iter().map(of).collect::<Vec<_>>(), expected);
        assert_eq!(deepest[0].file.as_deref(), Some("kernel.c"));
    });
}

#[test]
fn a_function_that_is_only_inlined_names_those_that_contain_it() {
    each(|symbols| {
        let Err(LookupError::Inlined { name, mut into }) = symbols.functions("innermost") else { panic!() };
        into.sort();
        assert_eq!((name.as_str(), into), ("innermost", vec!["another".to_owned(), "outermost".to_owned()]));
        assert!(matches!(symbols.functions("innermos"), Err(LookupError::Missing { .. })));
    });
}

#[test]
fn members_are_found_through_types() {
    each(|symbols| {
        let thing = symbols.address("thing").unwrap();
        let at = |path: &str| {
            let variable = symbols.variable(path).unwrap_or_else(|error| panic!("{path}: {error}"));
            (variable.address - thing, variable.size, variable.type_name.unwrap())
        };
        assert_eq!(at("thing").2, "struct outer");
        assert_eq!(at("thing.list.prev"), (8, 8, "struct list_head *".to_owned()));
        assert_eq!(at("thing.many[2].b"), (16 + 2 * 12 + 4, 4, "u32".to_owned()));
        assert_eq!(at("thing.many[0].bytes[3]"), (16 + 7, 1, "char".to_owned()));
        assert_eq!(at("thing.many[1].d.c"), (16 + 12 + 8, 4, "u32".to_owned()));
        assert_eq!(at("thing.many"), (16, 36, "const struct inner [3]".to_owned()));
        assert_eq!(at("thing.grid"), (52, 40, "u32 [2][5]".to_owned()));
        assert_eq!(at("thing.grid[1]"), (72, 20, "u32 [5]".to_owned()));
        assert_eq!(at("thing.grid[1][4]"), (88, 4, "u32".to_owned()));
        assert_eq!(at("thing.call").2, "int (*)()");
        assert_eq!(at("thing.kind").2, "enum {...}");
        assert_eq!(at("thing.pointer").2, "volatile u32 *");
    });
}

#[test]
fn variables_that_are_static_or_within_a_function_have_types() {
    each(|symbols| {
        for (name, size) in [("counted", 4), ("calls", 4), ("table", 16), ("table[3]", 4)] {
            let variable = symbols.variable(name).unwrap();
            assert_eq!(variable.size, size, "{name}");
            assert!(variable.type_name.is_some(), "{name}");
        }
    });
}

#[test]
fn a_path_that_leads_nowhere_says_where_it_ends() {
    each(|symbols| {
        let error = |path: &str| symbols.variable(path).unwrap_err().to_string();
        assert_eq!(error("thing.lost"), "`struct outer` has no member `lost`; similar: `last`, `list`");
        assert_eq!(error("thing.many[3]"), "`thing.many` has 3 elements, there is no [3]");
        assert_eq!(error("thing.grid[1][5]"), "`thing.grid[1]` has 5 elements, there is no [5]");
        assert!(error("thing.wide").starts_with("`thing.wide` is a bit-field of 13 bits, "));
        assert_eq!(
            error("thing.last.a"),
            "`thing.last` is of type `struct inner *`, which has no `.a`; pointers are not followed, where they point \
             to is not known before the run"
        );
        assert_eq!(error("thing.kind[0]"), "`thing.kind` is of type `enum {...}`, which has no `[0]`");
        assert!(error("thing->list").contains("pointers are not followed"));
        assert!(error("thing.").contains("a member's name is missing"));
        assert!(error("thing[x]").contains("an index is a number"));
        assert!(error("thing[1").contains("`]` is missing"));
        assert!(error("").contains("the variable's name is missing"));
        assert_eq!(error("outermost"), "`outermost` is a function, not a variable; to trap it use exec:");
    });
}

#[test]
fn structures_are_known_by_their_name() {
    each(|symbols| {
        let field = symbols.field("outer", "many[1].bytes").unwrap();
        assert_eq!((field.offset, field.size, field.elements), (16 + 12 + 4, 4, Some(4)));
        assert_eq!(symbols.field("inner", "").unwrap().size, 12);
        assert_eq!(symbols.field("u32", "").unwrap().size, 4);
        assert_eq!(symbols.field("inner", "nothing"), None);
        assert_eq!(symbols.field("inne", ""), None);
    });
}

#[test]
fn the_debug_file_is_found_where_gdb_finds_it() {
    let built = Built::new();
    let kernel = built.kernel("kernel", SOURCE, &[]);
    let whole = Symbols::open(&Sources { kernel: Some(&kernel), ..Sources::default() }).unwrap();
    let outermost = whole.address("outermost").unwrap();
    let id: String = whole.build_id().unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
    built.objcopy(&["--only-keep-debug", "kernel", "kernel.dbg"]);
    built.objcopy(&["--strip-all", "--add-gnu-debuglink=kernel.dbg", "kernel", "stripped"]);
    let nowhere = [built.path("nowhere")];
    let open = |symbols: &[PathBuf], debug_dirs: &[PathBuf]| {
        let stripped = built.path("stripped");
        Symbols::open(&Sources { kernel: Some(&stripped), symbols, debug_dirs })
    };
    let is_whole = |symbols: Symbols| {
        assert_eq!(symbols.address("outermost"), Some(outermost));
        assert_eq!(symbols.lines(outermost), whole.lines(outermost));
        assert_eq!(symbols.variable("thing.grid"), whole.variable("thing.grid"));
        assert!(symbols.section(".text").is_some_and(|(_, bytes)| !bytes.is_empty()));
    };
    // By the name that the stripped file has.
    is_whole(open(&[], &nowhere).unwrap());
    // Given.
    is_whole(open(&[built.path("kernel.dbg")], &nowhere).unwrap());
    // By build-id.
    let by_id = built.path("debug").join(".build-id").join(&id[..2]);
    std::fs::create_dir_all(&by_id).unwrap();
    std::fs::rename(built.path("kernel.dbg"), by_id.join(format!("{}.debug", &id[2..]))).unwrap();
    is_whole(open(&[], &[built.path("debug")]).unwrap());
    // Nowhere.
    let none = open(&[], &nowhere).unwrap();
    let error = none.functions("outermost").unwrap_err().to_string();
    assert!(error.contains("stripped, and no kallsyms were found in it"), "{error}");
    // That of another build is neither taken nor accepted.
    built.kernel("kernel.dbg", &SOURCE.replace("* 3", "* 5"), &[]);
    assert!(open(&[], &nowhere).unwrap().is_empty());
    let error = open(&[built.path("kernel.dbg")], &nowhere).unwrap_err().to_string();
    assert!(error.contains("kernel.dbg: made with another kernel: build-id "), "{error}");
    assert!(error.contains(&format!("stripped has build-id {id}; give the file of the same build")), "{error}");
}
