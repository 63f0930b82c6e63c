//! Rules that are right: what they mean, and their canonical form.

use std::time::Duration;

use super::super::*;

/// What was written, and its canonical form.
const RULES: &[(&str, &str)] = &[
    ("panic", "panic"),
    ("  panic=log ", "panic =log"),
    ("rcu-stall =bt count=2", "rcu-stall count=2 =bt"),
    ("exec:do_exit", "exec:do_exit"),
    ("exec:do_exit+8", "exec:do_exit+0x8"),
    ("exec:do_exit+0x10=ignore", "exec:do_exit+0x10 =ignore"),
    ("exec:0xffffffff81000000", "exec:0xffffffff81000000"),
    ("exec:0xffffffff81000000+0x10", "exec:0xffffffff81000010"),
    ("exec:4096", "exec:0x1000"),
    ("exec:ext4:ext4_sync_fs", "exec:ext4:ext4_sync_fs"),
    ("exec:foo.part.0+4", "exec:foo.part.0+0x4"),
    ("exec:_ZN4core9panicking5panic17h0E$LT$Z", "exec:_ZN4core9panicking5panic17h0E$LT$Z"),
    ("ret:vfs_read", "ret:vfs_read"),
    ("ret:ext4:ext4_sync_fs if (i32)$ret < 0", "ret:ext4:ext4_sync_fs if (i32)$ret < 0"),
    ("write:jiffies:8", "write:jiffies:8"),
    ("write:jiffies", "write:jiffies"),
    ("write:ext4:counter:8", "write:ext4:counter:8"),
    ("write:ext4:counter.x[0x3].b+4:0x10", "write:ext4:counter.x[3].b+0x4:16"),
    ("write:init_task.flags if new & 0x40", "write:init_task.flags if new & 0x40"),
    ("write:warned.3", "write:warned.3"),
    ("write:0x1000:8", "write:0x1000:8"),
    ("access:a[3].b", "access:a[3].b"),
    ("access:0xfffffffffffffff8:8", "access:0xfffffffffffffff8:8"),
    ("triple-fault=ignore", "triple-fault =ignore"),
    ("hang:10s", "hang:10s"),
    ("hang:10", "hang:10s"),
    ("hang:1500ms", "hang:1500ms"),
    ("hang:120s", "hang:2m"),
    ("hang:1h", "hang:60m"),
    ("console:/Kernel panic/", "console:/Kernel panic/"),
    (r"console:/a\/b\\/=log", r"console:/a\/b\\/ =log"),
    (r"console:/[x\/]\d+ =x if/ must-hit", r"console:/[x\/]\d+ =x if/ must-hit"),
    ("io:0xf4", "io:0xf4"),
    ("io:244 if $al == 1", "io:0xf4 if $al == 1"),
    ("exec:f if $rdi == 1 count=3 once cpu=1 must-hit =gdb", "exec:f if $rdi == 1 count=3 once cpu=1 must-hit =gdb"),
    ("exec:f =gdb must-hit cpu=1 once count=3 if $rdi==1", "exec:f if $rdi == 1 count=3 once cpu=1 must-hit =gdb"),
    ("exec:f=gdb must-hit cpu = 0x1 once count= 3 if($rdi==1)", "exec:f if $rdi == 1 count=3 once cpu=1 must-hit =gdb"),
    ("exec:f if $rdi==1=log", "exec:f if $rdi == 1 =log"),
    ("exec:f if a must-hit", "exec:f if a must-hit"),
    ("exec:f if once once", "exec:f if once once"),
    // C's precedence, kept and printed with the parentheses that are needed.
    ("exec:f if 1+2*3", "exec:f if 1 + 2 * 3"),
    ("exec:f if (1+2)*3", "exec:f if (1 + 2) * 3"),
    ("exec:f if (1*2)+3", "exec:f if 1 * 2 + 3"),
    ("exec:f if 1-(2-3)", "exec:f if 1 - (2 - 3)"),
    ("exec:f if 1-2-3", "exec:f if 1 - 2 - 3"),
    ("exec:f if a&1==0", "exec:f if a & 1 == 0"),
    ("exec:f if (a&1)==0", "exec:f if (a & 1) == 0"),
    ("exec:f if a||b&&c|d^e&g==h<i<<j+k*-l", "exec:f if a || b && c | d ^ e & g == h < i << j + k * -l"),
    ("exec:f if - - !~a", "exec:f if --!~a"),
    ("exec:f if a & &b && & c", "exec:f if a & &b && &c"),
    ("exec:f if *($rsp+8) == 1", "exec:f if *(u64*)($rsp + 8) == 1"),
    ("exec:f if * ( u32 * ) ($rdi + 0x10) > 5", "exec:f if *(u32*)($rdi + 0x10) > 5"),
    ("exec:f if *(u8*)*(u64*)$rdi == 'x'", "exec:f if *(u8*)*(u64*)$rdi == 'x'"),
    ("exec:f if *(i16*)&a[2].b", "exec:f if *(i16*)&a[2].b"),
    ("exec:f if (u8)$rax == 0xff", "exec:f if (u8)$rax == 0xff"),
    ("exec:f if ( i64 ) $rax + 1", "exec:f if (i64)$rax + 1"),
    (r"exec:f if '\n' + '\'' + '\\' + '\0' + ' '", r"exec:f if '\n' + '\'' + '\\' + '\0' + ' '"),
    ("exec:f if 0b101 + 0x0a + 12", "exec:f if 5 + 0xa + 12"),
    ("exec:f if $arg1 - &g < sizeof ( g )", "exec:f if $arg1 - &g < sizeof(g)"),
    ("exec:f if ext4:stats.count > 1", "exec:f if ext4:stats.count > 1"),
    ("exec:f if u32 == 1", "exec:f if u32 == 1"),
    ("exec:f if (u32x)", "exec:f if u32x"),
    ("access:f if old != new && $cpu == 1 && $cpl", "access:f if old != new && $cpu == 1 && $cpl"),
];

#[test]
fn rules_parse_and_print() {
    for (text, canonical) in RULES {
        let rule = parse(text).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(rule.to_string(), *canonical, "{text}");
        assert_eq!(rule.text, text.trim());
        let again = parse(canonical).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(again, rule, "{text}");
        assert_eq!(again.to_string(), *canonical);
    }
}

#[test]
fn what_is_written_is_what_is_meant() {
    let name = |module: Option<&str>, path: &str| Name { module: module.map(str::to_string), path: path.to_string() };
    let what = |text| parse(text).unwrap().what;
    assert_eq!(what("exec:a:b+2"), What::Exec(Place::Symbol { name: name(Some("a"), "b"), offset: 2 }));
    assert_eq!(what("ret:b"), What::Return(name(None, "b")));
    let place = Place::Symbol { name: name(Some("m"), "a[3].b"), offset: 4 };
    assert_eq!(what("write:m:a[3].b+4:2"), What::Write(Target { place, len: Some(2) }));
    assert_eq!(what("access:0x10+0x10:2"), What::Access(Target { place: Place::Address(32), len: Some(2) }));
    assert_eq!(what("hang:2m"), What::Hang(Duration::from_secs(120)));
    assert_eq!(what("io:65535"), What::Io(0xffff));
    assert_eq!(what("triple-fault"), What::TripleFault);
    for alias in Alias::ALL {
        assert_eq!(what(alias.word()), What::Alias(alias));
    }
    let rule = parse("exec:f count=2 once cpu=3 must-hit =snapshot").unwrap();
    assert_eq!(
        (rule.count, rule.once, rule.cpu, rule.must_hit, rule.action),
        (Some(2), true, Some(3), true, Action::Snapshot)
    );
    let plain = parse("exec:f").unwrap();
    assert_eq!(
        (plain.count, plain.once, plain.cpu, plain.must_hit, plain.action),
        (None, false, None, false, Action::Fail)
    );
    assert!(plain != rule && plain.condition.is_none());
}

#[test]
fn a_regex_is_on_bytes_and_keeps_its_slashes() {
    let What::Console(pattern) = parse(r"console:/^a\/b \xe9(?-u:\xff)$/").unwrap().what else { panic!() };
    assert!(pattern.regex().is_match(b"a/b \xc3\xa9\xff"));
    assert!(!pattern.regex().is_match(b"a/b \xc3\xa9"));
}

#[test]
fn a_range_is_the_rest_of_the_variable_or_what_was_said() {
    let range = |text, address, size| match parse(text).unwrap().what {
        What::Write(target) => target.range(address, size),
        _ => panic!(),
    };
    assert_eq!(range("write:a", 0x100, 16), Ok((0x100, 16)));
    assert_eq!(range("write:a+4", 0x100, 16), Ok((0x104, 12)));
    assert_eq!(range("write:a+4:2", 0x100, 16), Ok((0x104, 2)));
    assert_eq!(range("write:a+16:2", 0x100, 16), Ok((0x110, 2)));
    assert_eq!(range("write:0x1000:8", 0, 0), Ok((0x1000, 8)));
    assert_eq!(range("write:a:1", u64::MAX, 1), Ok((u64::MAX, 1)));
    let refused = [
        range("write:a+16", 0x100, 16),
        range("write:a", 0x100, 0),
        range("write:a+1:2", u64::MAX - 1, 1),
        range("write:a+0xffffffffffffffff", 2, 1),
    ];
    insta::assert_snapshot!(refused.map(|range| range.unwrap_err()).join("\n"));
}

#[test]
fn exit_codes_are_of_the_alias() {
    let code = |text| parse(text).unwrap().exit_code();
    assert_eq!(["panic", "oops", "warn", "exec:panic", "refcount"].map(code), [4, 4, 3, 3, 3]);
}
