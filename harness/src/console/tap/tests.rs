//! Streams as programs and kernels print them.

use proptest::prelude::*;

use super::*;

fn parsed(output: &str) -> Vec<TestRecord> {
    let mut tap = Tap::default();
    for line in output.lines() {
        tap.line(line, 7);
    }
    tap.finish(9);
    tap.records().to_vec()
}

/// A record in a line: `stream suite/suite/number name: result (message)`.
fn told(output: &str) -> Vec<String> {
    let line = |test: TestRecord| {
        let suite: String = test.suite.iter().map(|name| format!("{name}/")).collect();
        let result = format!("{:?}", test.result).to_lowercase();
        let subtests = if test.subtests > 0 { format!(" [{}]", test.subtests) } else { String::new() };
        let message = test.message.map(|text| format!(" ({})", text.replace('\n', "|"))).unwrap_or_default();
        format!("{} {suite}{} {}: {result}{subtests}{message}", test.stream, test.number, test.name)
    };
    parsed(output).into_iter().map(line).collect()
}

#[test]
fn a_plain_stream() {
    let output = "\
TAP version 13
1..5
ok 1 - opened
not ok 2 - first line valid
  ---
  message: 'wrong'
    got: x
  ...
ok 3 - rest # SKIP no rest
not ok 4 - sum # TODO not written
ok 5
noise
";
    assert_eq!(
        told(output),
        [
            "1 1 opened: ok",
            "1 2 first line valid: failed (message: 'wrong'|  got: x)",
            "1 3 rest: skipped (no rest)",
            "1 4 sum: todo (not written)",
            "1 5 : ok",
        ]
    );
}

#[test]
fn a_module_puts_its_name_before_all_that_it_says() {
    let output = "\
[    1.000001] a_module: KTAP version 1
[    1.000002] a_module: 1..3
[    1.000003] a_module: ok 1 opens
[    1.000004] other: ok 7 is none of it
[    1.000005] a_module: # expected 1, got 2
[    1.000006] a_module: not ok 2 reads
[    1.000007] a_module: ok 3 writes # SKIP not today
";
    let is = ["1 1 opens: ok", "1 2 reads: failed (expected 1, got 2)", "1 3 writes: skipped (not today)"];
    assert_eq!(told(output), is);
}

#[test]
fn a_suites_name_may_come_behind_the_tests_of_a_suite_in_it() {
    let output = "\
TAP version 13
# TAP version 13
    ok
  1..3
  # Subtest: late
";
    let told = told(output);
    assert!(!told.is_empty() && told.iter().all(|test| test.contains("late")), "{told:#?}");
}

#[test]
fn tap_12_has_no_version_and_may_plan_late() {
    assert_eq!(told("ok 1\nnot ok 2 x\n1..3\n"), ["1 1 : ok", "1 2 x: failed", "1 3 : missing"]);
    assert_eq!(told("1..2\nok 1\nok 2\n"), ["1 1 : ok", "1 2 : ok"]);
    assert_eq!(told("1..0 # SKIP no bus\n"), ["1 0 (all): skipped (no bus)"]);
}

#[test]
fn prose_is_no_test() {
    assert_eq!(told("ok then\nokay\n  1..3 of them\nnot ok\nok\n# Subtest: no\nBail out! no\n"), [""; 0]);
    assert_eq!(told("TAP version 13\nok 1 a\nok then we go on\nok 2 b\n"), ["1 1 a: ok", "1 2 b: ok"]);
    assert_eq!(told("TAP version 13\nok alpha\nnot ok\n"), ["1 1 alpha: ok", "1 2 : failed"]);
}

#[test]
fn perl_explains_after_the_fact() {
    let output =
        "1..2\nnot ok 1 - adds\n#   Failed test 'adds'\n#   at t/a.t line 3.\n#          got: '1'\nok 2\n# done\n";
    assert_eq!(told(output), ["1 1 adds: failed (Failed test 'adds'|at t/a.t line 3.|got: '1')", "1 2 : ok"]);
}

const KUNIT: &str = "\
[    0.101010] KTAP version 1
[    0.101011] 1..2
[    0.101012]     KTAP version 1
[    0.101013]     # Subtest: list
[    0.101014]     # module: list_test
[    0.101015]     1..3
[    0.102000]     ok 1 list_init
[    0.102001] random: crng init done
[    0.102002]     # list_add: EXPECTATION FAILED at lib/list-test.c:40
[    0.102003]     Expected a == b, but
[    0.102004]         a == 1 (0x1)
[    0.103000]     not ok 2 list_add
[    0.103001]         KTAP version 1
[    0.103002]         # Subtest: list_each
[    0.103003]         ok 1 forward
[    0.103004]         ok 2 backward # SKIP not built
[    0.103005]     ok 3 list_each
[    0.103006] # list: pass:2 fail:1 skip:0 total:3
[    0.103007] not ok 1 list
[    0.104000]     KTAP version 1
[    0.104001]     # Subtest: sort
[    0.104002]     1..1
[    0.104003]     ok 1 sort_ints
[    0.104004] ok 2 sort
";

#[test]
fn kunit() {
    let is = [
        "1 list/1 list_init: ok",
        "1 list/2 list_add: failed (list_add: EXPECTATION FAILED at lib/list-test.c:40|Expected a == b, but|    a == 1 (0x1))",
        "1 list/list_each/1 forward: ok",
        "1 list/list_each/2 backward: skipped (not built)",
        "1 list/3 list_each: ok [2]",
        "1 1 list: failed [3] (list: pass:2 fail:1 skip:0 total:3)",
        "1 sort/1 sort_ints: ok",
        "1 2 sort: ok [1]",
    ];
    assert_eq!(told(KUNIT), is);
    // The same without the log's columns, and with the caller's.
    let bare: String = KUNIT.lines().map(|line| format!("{}\n", &line[text::log_prefix(line)..])).collect();
    assert_eq!(told(&bare), is);
    let callers = KUNIT.replace("] ", "][  T123] ");
    assert_eq!(told(&callers.replace("[    0", "<6>[    0")), is);
}

#[test]
fn a_crash_leaves_tests_missing() {
    let cut: String = KUNIT.lines().take(11).map(|line| format!("{line}\n")).collect::<String>()
        + "[    0.200000] Kernel panic - not syncing: Fatal exception\n";
    assert_eq!(
        told(&cut),
        ["1 list/1 list_init: ok", "1 list/2 : missing", "1 list/3 : missing", "1 1 list: missing", "1 2 : missing",]
    );
}

#[test]
fn old_kunit_has_no_inner_versions() {
    let output = "TAP version 14\n1..1\n    # Subtest: a\n    1..2\n    ok 1 - x\n    ok 2 - y\nok 1 - a\n";
    assert_eq!(told(output), ["1 a/1 x: ok", "1 a/2 y: ok", "1 1 a: ok [2]"]);
}

#[test]
fn tap_14_names_a_subtest_before_it_or_not_at_all() {
    let output =
        "TAP version 14\n# Subtest: foo\n    ok 1 - in\n    1..1\nok 1 - foo\n    ok 1 - late\nok 2 - bar\n1..2\n";
    assert_eq!(told(output), ["1 foo/1 in: ok", "1 1 foo: ok [1]", "1 bar/1 late: ok", "1 2 bar: ok [1]"]);
}

#[test]
fn kselftest() {
    let output = "\
TAP version 13
1..4
# timeout set to 45
# selftests: net: udp
# TAP version 13
# 1..2
# ok 1 bind
[   12.000000] udp: something else
# # udp.c:12:send:Expected 1 (1) == 2 (2)
# not ok 2 send
# # Totals: pass:1 fail:1 xfail:0 xpass:0 skip:0 error:0
not ok 1 selftests: net: udp # exit=1
# selftests: net: script.sh
# all is well
# ok so far
ok 2 selftests: net: script.sh
# selftests: net: slow
#
not ok 3 selftests: net: slow # TIMEOUT 45 seconds
# selftests: net: none
ok 4 selftests: net: none # SKIP
";
    assert_eq!(
        told(output),
        [
            "1 selftests: net: udp/1 bind: ok",
            "1 selftests: net: udp/2 send: failed (udp.c:12:send:Expected 1 (1) == 2 (2))",
            "1 1 selftests: net: udp: failed [2] (exit=1|Totals: pass:1 fail:1 xfail:0 xpass:0 skip:0 error:0)",
            "1 2 selftests: net: script.sh: ok",
            "1 3 selftests: net: slow: failed (TIMEOUT 45 seconds)",
            "1 4 selftests: net: none: skipped",
        ]
    );
}

#[test]
fn the_kernel_cuts_in() {
    let output = "TAP version 13\n1..4\nok 1 fo[    4.100000] random: crng\n[    4.200000] y\nrk\nn[    5.000000] z\not ok 2 exec\n\
                  ok 3 whole[    5.100000] a\nok 4 next\n# log: [    5.100000] quoted\n";
    assert_eq!(told(output)[..2], ["1 1 fork: ok", "1 2 exec: failed"]);
    assert_eq!(told(output)[2..], ["1 3 whole: ok", "1 4 next: ok"]);
}

#[test]
fn streams_follow_each_other() {
    let output =
        "TAP version 13\n1..1\nok 1 a\nTAP version 13\n1..2\nok 1 b\nKTAP version 1\nok 1 c\n1..1\n1..1\nok 1 d\n";
    assert_eq!(told(output), ["1 1 a: ok", "2 1 b: ok", "2 2 : missing", "3 1 c: ok", "4 1 d: ok"]);
}

#[test]
fn bailing_out() {
    let output = "TAP version 13\n1..3\nok 1 a\nBail out! no memory\nok 2 b\n";
    assert_eq!(
        told(output),
        ["1 1 a: ok", "1 2 Bail out!: failed (no memory)", "1 2 : missing", "1 3 : missing", "2 2 b: ok"]
    );
}

#[test]
fn a_hostile_plan_is_bounded() {
    let records = parsed("TAP version 13\n1..18446744073709551615\nok 18446744073709551615 x\nok 2 y\n");
    assert_eq!(records.len(), 2 + MAX_MISSING);
    let words = format!("and {} more that the plan has", u64::MAX - 2 - MAX_MISSING as u64);
    assert_eq!(records.last().unwrap().message.as_deref(), Some(&*words));
}

#[test]
fn hostile_nesting_is_bounded() {
    let mut tap = Tap::default();
    tap.line("TAP version 13", 0);
    for depth in 1..100 {
        tap.line(&format!("{:depth$}KTAP version 1", "", depth = 4 * depth), 0);
        tap.line(&format!("{:depth$}ok 1 x", "", depth = 4 * depth), 0);
        assert!(tap.levels.len() <= MAX_LEVELS);
    }
    tap.finish(0);
    assert!(tap.records().len() > MAX_LEVELS && tap.records().iter().all(|test| test.suite.len() < MAX_LEVELS));
}

#[test]
fn a_hostile_flood_is_bounded_and_told() {
    let mut tap = Tap::default();
    tap.line("TAP version 13", 0);
    for number in 0..2 * MAX_RECORDS {
        tap.line(&format!("ok {number} {}", "x".repeat(600)), 0);
        tap.line(&format!("# {}", "y".repeat(600)), 0);
    }
    tap.finish(0);
    assert!(tap.records().len() <= MAX_RECORDS && tap.bytes <= MAX_BYTES);
    assert!(tap.problem().is_some());
    let mut told = 0;
    while tap.next_told().is_some() {
        told += 1;
    }
    assert_eq!(told, tap.records().len());
}

fn any_line() -> impl Strategy<Value = String> {
    let indent = prop::sample::select(vec![
        "",
        "",
        "  ",
        "    ",
        "        ",
        "# ",
        "# # ",
        "[    1.234567] ",
        "<4>[    1.234567][T1]     ",
    ]);
    let word = prop::sample::select(vec![
        "TAP version 13",
        "KTAP version 1",
        "1..3",
        "1..99999999999",
        "1..0 # SKIP",
        "ok",
        "ok 1",
        "ok 2 - a # SKIP b",
        "not ok 3 c",
        "not ok 1 - d # TODO",
        "# Subtest: s",
        "# selftests: a: b",
        "# comment",
        "#   Failed test",
        "Bail out! x",
        "---",
        "...",
        "ok 1 x[    1.234567] y",
        "words",
        "",
        "#",
    ]);
    prop_oneof![9 => (indent, word).prop_map(|(indent, word)| format!("{indent}{word}")), 1 => "\\PC{0,40}"]
}

proptest! {
    #[test]
    fn any_output_is_taken(lines in prop::collection::vec(any_line(), 0..60)) {
        let mut tap = Tap::default();
        for line in &lines {
            tap.line(line, 0);
            prop_assert!(tap.levels.len() <= MAX_LEVELS);
        }
        tap.finish(0);
        prop_assert!(tap.levels.is_empty());
        let mut told = Vec::new();
        while let Some(test) = tap.next_told() {
            told.push(test);
        }
        // All of them, and each has its place.
        prop_assert_eq!(told.len(), tap.records().len());
        for test in &told {
            prop_assert!(test.stream >= 1 && test.suite.iter().all(|name| !name.is_empty()));
        }
    }

    /// Whatever stands between, the results of a stream are those that it has.
    #[test]
    fn noise_of_the_log_changes_nothing(noise in prop::collection::vec("[a-zA-Z0-9 :=,.]{0,30}", 20)) {
        let mut noisy = String::new();
        for (line, noise) in KUNIT.lines().zip(noise.iter().cycle()) {
            noisy += &format!("{line}\n[    0.200000] dev: {noise}\n");
        }
        prop_assert_eq!(told(&noisy), told(KUNIT));
    }
}
