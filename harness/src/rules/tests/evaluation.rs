//! Conditions at a hit.

use super::super::*;
use super::Guest;

fn guest() -> Guest {
    let mut guest = Guest::default()
        .variable("flags", 0x100, 4, false)
        .variable("level", 0x104, 4, true)
        .variable("ext4:count", 0x108, 8, false)
        .variable("f", 0xffff_ffff_8100_0000, 0x40, false)
        .bytes(0x100, &[0x40, 0, 0, 0x80, 0xfe, 0xff, 0xff, 0xff, 7, 0, 0, 0, 0, 0, 0, 0])
        .bytes(0x200, b"list_add")
        .register(Register::Rax, 0xffff_ffff_ffff_fff2)
        .register(Register::Rdi, 0x200)
        .register(Register::Rsi, 3)
        .register(Register::Cpl, 3);
    guest.cpu = 1;
    guest.old = Some(0x10);
    guest.new = Some(0x50);
    guest
}

fn condition(text: &str) -> Condition {
    let rule = parse(&format!("write:w if {text}")).unwrap_or_else(|error| panic!("{error}"));
    rule.condition.unwrap().bind(&guest()).unwrap_or_else(|error| panic!("{error}"))
}

fn value(text: &str) -> Result<u64, EvalError> {
    condition(text).value(&mut guest())
}

#[test]
fn values() {
    let minus = |value: i64| value as u64;
    let cases: &[(&str, u64)] = &[
        ("2 + 3 * 4 - 1", 13),
        ("7 / 2 * 2 + 7 % 2", 7),
        ("1 << 4 | 3", 19),
        ("6 & 3 ^ 1", 3),
        ("10 - 3 - 2", 5),
        ("!0 + !5", 1),
        ("~0", u64::MAX),
        ("-1", u64::MAX),
        ("0 - 1", u64::MAX),
        ("'a'", 97),
        // unsigned, unless a signed operand is involved
        ("-1 < 1", 0),
        ("(i64)-1 < 1", 1),
        ("1 > (i64)-1", 1),
        ("(i8)0xff", u64::MAX),
        ("(u8)-1", 0xff),
        ("(u64)(i8)0xff > 1", 1),
        ("(i64)-7 / 2", minus(-3)),
        ("(i64)-7 % 3", minus(-1)),
        ("-7 / 2", (-7i64 as u64) / 2),
        ("(i64)-8 >> 1", minus(-4)),
        ("-8 >> 1", minus(-8) >> 1),
        ("8 >> (i64)1", 4),
        ("(i64)-8 >> 64", u64::MAX),
        ("-8 >> 64", 0),
        ("1 << 64", 0),
        ("1 << -1", 0),
        ("(i64)0x8000000000000000 / -1", 0x8000_0000_0000_0000),
        ("(i64)0x8000000000000000 % -1", 0),
        ("!(i64)-1 < 1", 1),
        ("((i64)-1 < 1) - 2 > 1", 1),
        // symbols
        ("flags", 0x8000_0040),
        ("level", minus(-2)),
        ("level < 0", 1),
        ("level == -2", 1),
        ("ext4:count", 7),
        ("&level", 0x104),
        ("*(u32*)&level", 0xffff_fffe),
        ("*(i32*)(&flags + 4)", minus(-2)),
        ("sizeof(f)", 0x40),
        ("0xffffffff8100003f - &f < sizeof(f)", 1),
        ("0xffffffff81000040 - &f < sizeof(f)", 0),
        // memory
        ("*(u8*)$arg1 == 'l'", 1),
        ("*($rdi) == 0x6464615f7473696c", 1),
        ("*(u16*)($rdi + 1) == 0x7369", 1),
        // registers
        ("$rax", 0xffff_ffff_ffff_fff2),
        ("$eax", 0xffff_fff2),
        ("$al", 0xf2),
        ("$ah", 0xff),
        ("(i32)$eax == -14", 1),
        ("$arg2", 3),
        ("$cpu", 1),
        ("$cpl", 3),
        // the watch
        ("old", 0x10),
        ("new & 0x40 && !(old & 0x40)", 1),
    ];
    for (text, expected) in cases {
        assert_eq!(value(text), Ok(*expected), "{text}");
    }
}

#[test]
fn what_has_no_value_is_an_error() {
    assert_eq!(value("1 / (new - 0x50)"), Err(EvalError::DivisionByZero));
    assert_eq!(value("1 % 0"), Err(EvalError::DivisionByZero));
    assert_eq!(value("(i64)1 / 0"), Err(EvalError::DivisionByZero));
    assert_eq!(value("(i64)1 % 0"), Err(EvalError::DivisionByZero));
    assert_eq!(value("*(u32*)0xdead"), Err(EvalError::Unreadable { address: 0xdead, len: 4 }));
    // half of it can be read
    assert_eq!(value("*(u64*)0x204"), Err(EvalError::Unreadable { address: 0x204, len: 8 }));
    assert_eq!(value("$r15"), Err(EvalError::NoRegister(Register::R15)));
    assert_eq!(condition("old").value(&mut Guest::default()), Err(EvalError::NoValue));
    assert_eq!(condition("new").holds(&mut Guest::default()), Err(EvalError::NoValue));
}

#[test]
fn what_does_not_matter_is_not_looked_at() {
    for (text, expected) in
        [("0 && *(u32*)0xdead", 0), ("1 || 1 / 0", 1), ("2 && 3", 1), ("0 || 5", 1), ("0 || 0", 0), ("1 && 0 || 1", 1)]
    {
        assert_eq!(value(text), Ok(expected), "{text}");
    }
    let mut guest = guest();
    assert_eq!(condition("new == 1 && $rax").holds(&mut guest), Ok(false));
    assert!(guest.asked.is_empty());
    assert_eq!(condition("new == 0x50 && $rax").holds(&mut guest), Ok(true));
    assert_eq!(guest.asked, [Register::Rax]);
}

#[test]
fn needs_are_known_before() {
    let needs = |text| {
        let needs = condition(text).needs();
        (needs.registers, needs.memory, needs.old, needs.new)
    };
    assert_eq!(needs("1 + $cpu + &f + sizeof(f)"), (false, false, false, false));
    assert_eq!(needs("-(u8)$cpl"), (true, false, false, false));
    assert_eq!(needs("flags"), (false, true, false, false));
    assert_eq!(needs("*(u8*)(old + $rax)"), (true, true, true, false));
    assert_eq!(needs("0 && new"), (false, false, false, true));
    assert!(condition("$rsp").needs_registers() && !condition("old").needs_registers());
}

#[test]
fn binding_again_follows_what_has_moved() {
    let expr = parse("exec:f if counter == 5").unwrap().condition.unwrap();
    let mut guest = Guest::default().bytes(0x10_1000, &[5]);
    for (address, holds) in [(0x1000, Err(EvalError::Unreadable { address: 0x1000, len: 1 })), (0x10_1000, Ok(true))] {
        let moved = Guest::default().variable("counter", address, 1, false);
        assert_eq!(expr.bind(&moved).unwrap().holds(&mut guest), holds);
    }
}

#[test]
fn names_are_listed() {
    let expr = parse("exec:f if a.b + &c * *(u8*)sizeof(m:d) + !(u8)a").unwrap().condition.unwrap();
    let names: Vec<_> = expr.names().into_iter().map(Name::to_string).collect();
    assert_eq!(names, ["a.b", "c", "m:d", "a"]);
}
