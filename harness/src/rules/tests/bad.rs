//! Rules that are wrong: the exact words, with the caret.

use super::super::*;
use super::Guest;

fn table(texts: &[&str]) -> String {
    texts
        .iter()
        .map(|text| match parse(text) {
            Ok(rule) => panic!("`{text}` is a rule: {rule}"),
            Err(error) => format!("{error}\n"),
        })
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn what_is_trapped() {
    insta::assert_snapshot!(table(&[
        "",
        "   ",
        ":",
        "=log",
        "exec",
        "write",
        "io",
        "hang",
        "console",
        "exe:panic",
        "Panic",
        "panic:foo",
        "triple-fault:1",
        "exec:",
        "exec: foo",
        "exec:foo:8",
        "exec:1foo",
        "exec:foo+",
        "exec:foo+bar",
        "exec:foo-8",
        "exec:foo->bar",
        "exec:a:b:c",
        "exec:snd-hda:foo",
        "exec:foo bar",
        "exec:foo,bar",
        "exec:0x10000000000000000",
        "exec:0xffffffffffffffff+1",
        "exec:0x",
        "exec:010",
        "exec:16UL",
        "ret:0x1000",
        "ret:foo+4",
        "ret:",
        "write:foo:",
        "write:foo:0",
        "write:foo:bar:",
        "write:foo.",
        "write:foo.bar[",
        "write:foo[i]",
        "write:foo[1",
        "write:foo->bar",
        "write:0x1000",
        "write:0x1000:x",
        "write:0x1000+8",
        "write:0xfffffffffffffff8:9",
        "access:",
        "hang:",
        "hang:0s",
        "hang:10parsecs",
        "hang:2d",
        "hang:25h",
        "hang:1.5s",
        "hang:99999999999999999999s",
        "io:",
        "io:0x10000",
        "io:com1",
        "console:foo",
        "console:/foo",
        "console://",
        "console:/a(b/",
        "console:/(/ =log",
        "console:/(?:a{1000}){1000}/",
        "console:/foo/i",
        "naïve:x",
        "\u{1b}[31mred",
    ]));
}

#[test]
fn what_follows() {
    insta::assert_snapshot!(table(&[
        "panic log",
        "panic fail",
        "panic =",
        "panic =lgo",
        "panic=log=log",
        "panic =log =bt",
        "panic count",
        "panic count=",
        "panic count=0",
        "panic count=-1",
        "panic count=x",
        "panic count=1 count=2",
        "panic once once",
        "panic cpu=4294967296",
        "panic must_hit",
        "panic must-hit must-hit",
        "panic if",
        "panic if 1 if 2",
        "panic unless 1",
        "panic ;",
        "panic, oops",
        "hang:10s if $rax",
        "hang:10s cpu=1",
        "console:/x/ cpu=1",
        "console:/x/ if 1",
        "triple-fault if $rax",
        "triple-fault cpu=1",
        "exec:f if $rax == 1 and $rbx == 2",
        "exec:f if a count=3 b",
    ]));
}

#[test]
fn conditions() {
    insta::assert_snapshot!(table(&[
        "exec:f if $rax = 5",
        "exec:f if $raxx == 5",
        "exec:f if $ == 5",
        "exec:f if $RAX == 5",
        "exec:f if $ret == 5",
        "exec:f if old == 5",
        "exec:f if new == 5",
        "exec:f if 1 +",
        "exec:f if 1 + =log",
        "exec:f if (1 + 2",
        "exec:f if (1 2)",
        "exec:f if 1)",
        "exec:f if ()",
        "exec:f if a b",
        "exec:f if a->b",
        "exec:f if a.",
        "exec:f if a[$rax]",
        "exec:f if &5",
        "exec:f if &$rax",
        "exec:f if (u32*)$rax",
        "exec:f if *(int*)$rax",
        "exec:f if *(struct foo*)$rax",
        "exec:f if (u32",
        "exec:f if *(u32*",
        "exec:f if *(u32*)",
        "exec:f if sizeof f",
        "exec:f if sizeof(f",
        "exec:f if 'ab'",
        "exec:f if ''",
        "exec:f if '",
        "exec:f if 'é'",
        "exec:f if \"x\"",
        "exec:f if 0xg",
        "exec:f if 18446744073709551616",
        "exec:f if a ? b : c",
        "exec:f if f(1)",
        "exec:f if count=3",
        "exec:f\tif\t$nope",
        "exec:f if é",
    ]));
}

#[test]
fn hostile_sizes() {
    let deep = |text: &str, times: usize| format!("exec:f if {}1", text.repeat(times));
    for text in ["(", "-", "!", "~", "*", "*(u32*)", "(u8)", "(-", "1+(", "1||", "1*", "1<<(u8)"] {
        let error = parse(&deep(text, 500)).unwrap_err();
        assert!(error.message().contains("nests too deep") || error.message().contains("in a row"), "{error}");
    }
    insta::assert_snapshot!(table(&[
        &deep("(", 100),
        &deep("1||", 300),
        &format!("exec:f if {}", "1 ".repeat(5000)),
        &format!("exec:{} $", "f".repeat(3000)),
    ]));
}

#[test]
fn names_that_lead_nowhere() {
    let guest = Guest::default().variable("big", 0x1000, 24, false);
    let unbound = |text: &str| match parse(text).unwrap().condition.unwrap().bind(&guest) {
        Ok(_) => panic!("`{text}` binds"),
        Err(error) => format!("{error}\n"),
    };
    let texts = [
        "exec:f if 1 + missing == 2",
        "exec:f if &missing.member",
        "exec:f if sizeof(ext4:gone)",
        "exec:f if big > 1 =log",
    ];
    insta::assert_snapshot!(texts.map(unbound).join("\n"));
}

#[test]
fn what_a_rule_watches_can_be_refused() {
    let refuse = |text| parse(text).unwrap().refuse("there is no such symbol; look at `nm vmlinux`").to_string();
    insta::assert_snapshot!(
        [
            refuse("  exec:foo+4 if $rdi =log"),
            refuse("write:init_task.flagz:4 if new & 0x40"),
            parse_from("exec:nope nope", Origin::Program).unwrap_err().to_string(),
        ]
        .join("\n\n")
    );
}
