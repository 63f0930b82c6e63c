//! Reports to try the outputs on. Whoever includes this has `report` beside it.

// Each includer uses what it needs.
#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;

use super::report::*;

fn at(file: &str, line: u32) -> Option<Source> {
    Some(Source { file: format!("/build/linux-6.12.57/{file}"), line })
}

fn frame(function: &str, offset: u64, source: Option<Source>) -> FrameRecord {
    let (inlined, kind) = (false, FrameKind::Call);
    FrameRecord { function: function.to_owned(), offset, module: None, inlined, source, kind }
}

fn inlined(function: &str, source: Option<Source>) -> FrameRecord {
    FrameRecord { inlined: true, ..frame(function, 0, source) }
}

fn trap(rule: &str, action: &str, target: TargetRecord, outcome: Outcome, hits: &[u64]) -> TrapRecord {
    TrapRecord {
        rule: rule.to_owned(),
        name: rule.to_owned(),
        action: action.to_owned(),
        targets: vec![target],
        outcome,
        timing: TrapTiming { hits: hits.to_vec(), unmet: 3 },
    }
}

fn target(what: &str, address: Option<u64>, len: Option<u64>, mechanism: &str) -> TargetRecord {
    TargetRecord { what: what.to_owned(), address, len, mechanism: mechanism.to_owned() }
}

fn test(stream: u32, suite: &[&str], number: u64, name: &str, result: TestResult, message: Option<&str>) -> TestRecord {
    TestRecord {
        suite: suite.iter().map(|&name| name.to_owned()).collect(),
        number,
        name: name.to_owned(),
        result,
        message: message.map(str::to_owned),
        stream,
        subtests: 0,
        timing: TestTiming { at_ms: 900 + number },
    }
}

fn console(lines: &[&str]) -> Vec<ConsoleLine> {
    let stamped =
        |(number, text): (usize, &&str)| ConsoleLine { at_ms: 400 + 11 * number as u64, text: (*text).to_owned() };
    lines.iter().enumerate().map(stamped).collect()
}

fn registers(rip: u64) -> BTreeMap<String, u64> {
    let names = [
        "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
        "rflags", "cr0", "cr2", "cr3", "cr4", "fs_base", "gs_base",
    ];
    let mut all: BTreeMap<_, _> = names
        .iter()
        .enumerate()
        .map(|(at, name)| ((*name).to_owned(), 0xffff_8880_0000_0000 | (at as u64) << 12))
        .collect();
    all.insert("rip".to_owned(), rip);
    all
}

/// A run that says nothing but that it passed.
pub fn empty() -> Report {
    Report {
        schema: SCHEMA,
        trapline: "0.1.0".to_owned(),
        verdict: VerdictRecord {
            kind: VerdictKind::Pass,
            exit_code: 0,
            text: "the guest ended".to_owned(),
            guest_status: None,
            trap: None,
        },
        input: Input {
            kernel: "bzImage".to_owned(),
            cpus: 1,
            memory: 256 << 20,
            kvm: "kvm_intel".to_owned(),
            ..Input::default()
        },
        traps: Vec::new(),
        stop: None,
        tests: Vec::new(),
        files: BTreeMap::new(),
        problems: Vec::new(),
        timing: ReportTiming::default(),
    }
}

/// A clean pass, with tests.
pub fn pass() -> Report {
    let mut report = empty();
    report.verdict.guest_status = Some(0);
    report.verdict.text = "the guest ended with status 0".to_owned();
    report.traps = vec![
        trap("panic", "fail", target("panic", Some(0xffff_ffff_8108_f1c0), None, "slot"), Outcome::Passed, &[0]),
        trap(
            "exec:do_sys_openat2=log",
            "log",
            target("do_sys_openat2", Some(0xffff_ffff_8134_aa00), None, "slot"),
            Outcome::Passed,
            &[112],
        ),
    ];
    let mut suite = test(1, &[], 1, "list", TestResult::Ok, None);
    suite.subtests = 2;
    report.tests = vec![
        test(1, &["list"], 1, "list_init", TestResult::Ok, None),
        test(1, &["list"], 2, "list_add", TestResult::Skipped, Some("not built")),
        suite,
    ];
    report.timing =
        ReportTiming { started: 1_763_660_000, duration_ms: 2345, boot_ms: Some(812), ..ReportTiming::default() };
    report.timing.console =
        console(&["[    0.000000] Linux version 6.12.57", "[    0.812000] Run /init as init process"]);
    report
}

/// A watchpoint that fired on a machine with two vCPUs, with everything that a report can have.
pub fn fired() -> Report {
    let mut report = pass();
    report.verdict = VerdictRecord {
        kind: VerdictKind::Trap,
        exit_code: 3,
        text: "write:init_task.flags fired: copy_process+0x2f1 wrote 0x200002 over 0x200000".to_owned(),
        guest_status: None,
        trap: Some(1),
    };
    report.input = Input {
        kernel: "vmlinux".to_owned(),
        release: Some("6.12.57+deb12-cloud-amd64".to_owned()),
        build_id: Some("6d1f0e8c2b9a4f7788aa55c0ffee00112233".to_owned()),
        initrd: Some("--exec ./test".to_owned()),
        cmdline: "console=ttyS0 panic=-1 nokaslr".to_owned(),
        cpus: 2,
        memory: 512 << 20,
        timeout_ms: Some(60_000),
        symbols: vec!["vmlinux.debug".to_owned()],
        kvm: "kvm_amd".to_owned(),
    };
    report.traps = vec![
        trap("panic", "fail", target("panic", Some(0xffff_ffff_8108_f1c0), None, "slot"), Outcome::Passed, &[0, 0]),
        trap(
            "write:init_task.flags if $new & 2",
            "fail",
            target("init_task+0x2c", Some(0xffff_ffff_8240_a92c), Some(4), "protected page"),
            Outcome::Fired,
            &[0, 1],
        ),
        trap(
            "exec:vfs_read=bt",
            "bt",
            target("vfs_read", Some(0xffff_ffff_8133_0000), None, "software breakpoint"),
            Outcome::Passed,
            &[4, 9],
        ),
        trap(
            "exec:ext4_fill_super must-hit",
            "fail",
            target("ext4:ext4_fill_super", None, None, "waits for ext4"),
            Outcome::Missed,
            &[0, 0],
        ),
        trap("console:/BUG:/", "fail", target("console", None, None, "vmm"), Outcome::Passed, &[0, 0]),
    ];
    report.traps[2].name = "reads".to_owned();
    let backtrace = vec![
        inlined("set_flag", at("include/linux/sched.h", 1_988)),
        frame("copy_process", 0x2f1, at("kernel/fork.c", 2_188)),
        frame("kernel_clone", 0x9d, at("kernel/fork.c", 2_804)),
        FrameRecord { kind: FrameKind::Interrupt, ..frame("__do_sys_clone", 0x66, at("kernel/fork.c", 2_932)) },
        FrameRecord { module: Some("overlay".to_owned()), ..frame("ovl_open", 0x12, None) },
        FrameRecord { kind: FrameKind::User, ..frame("0x7f12a4c0", 0, None) },
    ];
    report.stop = Some(StopRecord {
        reason: "write:init_task.flags: 4 bytes were written".to_owned(),
        vcpu: Some(1),
        at: Some("copy_process+0x2f1".to_owned()),
        source: at("kernel/fork.c", 2_188),
        change: Some(Change { old: 0x20_0000, new: 0x20_0002 }),
        backtrace: backtrace.clone(),
        timing: StopTiming {
            at_us: 1_200_345,
            vcpus: vec![
                VcpuRecord {
                    vcpu: 0,
                    activity: "halted".to_owned(),
                    ring: 0,
                    interrupts: true,
                    at: "pv_native_safe_halt+0xf".to_owned(),
                    registers: registers(0xffff_ffff_81a0_110f),
                    backtrace: vec![
                        frame("pv_native_safe_halt", 0xf, at("arch/x86/kernel/paravirt.c", 102)),
                        frame("do_idle", 0xa1, at("kernel/sched/idle.c", 326)),
                    ],
                    backtrace_ends: Some("no unwind data for 0xffffffffc0001000".to_owned()),
                    ran_on_us: 41,
                },
                VcpuRecord {
                    vcpu: 1,
                    activity: "running".to_owned(),
                    ring: 0,
                    interrupts: false,
                    at: "copy_process+0x2f1".to_owned(),
                    registers: registers(0xffff_ffff_8108_42f1),
                    backtrace,
                    backtrace_ends: None,
                    ran_on_us: 0,
                },
            ],
        },
    });
    let mut suite = test(1, &[], 1, "list", TestResult::Failed, None);
    suite.subtests = 3;
    report.tests = vec![
        test(1, &["list"], 1, "list_init", TestResult::Ok, None),
        test(
            1,
            &["list"],
            2,
            "list_add",
            TestResult::Failed,
            Some("list_add: EXPECTATION FAILED at lib/list-test.c:40\nExpected a == b, but\n    a == 1 (0x1)"),
        ),
        test(1, &["list"], 3, "list_each", TestResult::Todo, Some("XFAIL known")),
        suite,
        test(1, &[], 2, "", TestResult::Missing, None),
        test(2, &[], 1, "selftests: net: udp", TestResult::Skipped, Some("no network")),
    ];
    report.files = [("vmcore", "vmcore"), ("console", "console.log"), ("junit", "junit.xml")]
        .map(|(what, file)| (what.to_owned(), file.to_owned()))
        .into();
    report.problems = vec!["the console's log is not complete: No space left on device (os error 28)".to_owned()];
    let hit = |trap, vcpu, at_us, place: &str| HitRecord {
        trap,
        vcpu,
        at: place.to_owned(),
        source: at("fs/read_write.c", 541),
        change: None,
        backtrace: vec![
            frame("vfs_read", 0, at("fs/read_write.c", 541)),
            frame("ksys_read", 0x6f, at("fs/read_write.c", 708)),
        ],
        timing: HitTiming { at_us, pc: 0xffff_ffff_8133_0000, hits_before: 2 },
    };
    report.timing.recent = vec![hit(2, 0, 610_000, "vfs_read"), hit(2, 1, 1_100_200, "vfs_read")];
    report.timing.duration_ms = 1_201;
    report.timing.console_lines_before = 40;
    report.timing.console_line = Some(44);
    report.timing.console = console(&[
        "[    0.390000] Freeing unused kernel image (initmem) memory: 2048K",
        "[    0.812000] Run /init as init process",
        "KTAP version 1",
        "    ok 1 list_init",
        "[    1.100000] a line with some spaces     and a\ttab",
    ]);
    report
}

/// A timeout: every vCPU somewhere, none to blame.
pub fn timeout() -> Report {
    let mut report = fired();
    report.verdict = VerdictRecord {
        kind: VerdictKind::Timeout,
        exit_code: 5,
        text: "the guest was still running after 60s".to_owned(),
        guest_status: None,
        trap: None,
    };
    for trap in &mut report.traps {
        trap.outcome = Outcome::Passed;
    }
    if let Some(stop) = &mut report.stop {
        *stop = StopRecord {
            reason: "timeout".to_owned(),
            vcpu: None,
            at: None,
            source: None,
            change: None,
            backtrace: Vec::new(),
            timing: stop.timing.clone(),
        };
    }
    report
}

/// What a big machine and a long test run leave behind.
pub fn large() -> Report {
    let mut report = fired();
    let vcpus = (0..64u32).map(|vcpu| VcpuRecord {
        vcpu,
        activity: if vcpu % 3 == 0 { "running" } else { "halted" }.to_owned(),
        ring: 0,
        interrupts: vcpu % 2 == 0,
        at: format!("a_function_with_a_rather_long_name_as_kernels_have_them_{vcpu}+0x{vcpu:x}"),
        registers: registers(0xffff_ffff_8100_0000 + u64::from(vcpu)),
        backtrace: (0..40)
            .map(|depth| {
                frame(
                    &format!("deep_function_number_{depth}"),
                    depth,
                    at("drivers/very/deep/directory/of/a/driver/with_a_long_name.c", 100),
                )
            })
            .collect(),
        backtrace_ends: None,
        ran_on_us: u64::from(vcpu),
    });
    if let Some(stop) = &mut report.stop {
        stop.timing.vcpus = vcpus.collect();
    }
    report.tests = (1..=1500)
        .map(|number| {
            let result = [TestResult::Ok, TestResult::Ok, TestResult::Ok, TestResult::Skipped, TestResult::Failed]
                [number as usize % 5];
            test(
                1,
                &["suite of many", "inner"],
                number,
                &format!("case_{number}"),
                result,
                (number % 5 == 4).then_some("it did not"),
            )
        })
        .collect();
    let lines: Vec<String> = (0..2000)
        .map(|line| format!("[   {line:4}.000000] some_driver 0000:00:1f.2: message number {line} of a chatty driver"))
        .collect();
    report.timing.console = console(&lines.iter().map(String::as_str).collect::<Vec<_>>());
    report.timing.console_line = Some(2035);
    let recent = report.timing.recent.clone();
    report.timing.recent = (0..200u64)
        .map(|number| {
            let mut hit = recent[number as usize % 2].clone();
            hit.timing.at_us = 1_000 * number;
            hit
        })
        .collect();
    report
}

/// Words that want out of where they stand.
pub const HOSTILE: [&str; 8] = [
    "<script>document.title='pwned'</script>",
    "\"><img src=x onerror=\"document.title='pwned'\">",
    "</pre></details></main><h1>out</h1>",
    "]]><evil/>&lt;&amp;&#0;",
    "a\0b\u{1b}[31mred\u{1b}[0m\u{7}\u{8}\u{c}\u{fffe}\u{9b}31m",
    "::error file=x::injected\r\n::set-output name=x::y",
    "\u{202e}reversed, \u{2066}isolated",
    "' onmouseover='document.title=1' %0A::warning::x",
];

/// A guest, and symbols, that want to break whatever shows them.
pub fn hostile() -> Report {
    let mut report = fired();
    let long = "x".repeat(3000);
    let word = |at: usize| HOSTILE[at % HOSTILE.len()].to_owned();
    report.verdict.text = format!("{} {}", word(0), word(5));
    report.input.kernel = word(1);
    report.input.cmdline = format!("{} {long}", word(2));
    report.input.release = Some(word(4));
    for (at, trap) in report.traps.iter_mut().enumerate() {
        trap.rule = word(at);
        trap.name = word(at + 1);
        trap.targets[0].what = word(at + 2);
        trap.targets[0].mechanism = word(at + 3);
    }
    if let Some(stop) = &mut report.stop {
        stop.reason = word(0);
        stop.at = Some(long.clone());
        stop.source = Some(Source { file: format!("{}:,%\n", word(5)), line: u32::MAX });
        for (at, frame) in stop.backtrace.iter_mut().enumerate() {
            frame.function = if at == 1 { long.clone() } else { word(at) };
            frame.module = Some(word(at + 1));
        }
        for vcpu in &mut stop.timing.vcpus {
            vcpu.at = word(3);
            vcpu.activity = word(1);
            vcpu.backtrace = stop.backtrace.clone();
            vcpu.backtrace_ends = Some(word(2));
            vcpu.registers.insert(word(0), u64::MAX);
        }
        stop.timing.at_us = u64::MAX;
    }
    for (at, test) in report.tests.iter_mut().enumerate() {
        test.name = if at == 2 { long.clone() } else { word(at) };
        test.suite = vec![word(at + 1); 3];
        test.message = Some(format!("{}\n{}", word(at + 2), word(at + 3)));
        test.number = u64::MAX;
    }
    for hit in &mut report.timing.recent {
        hit.at = word(0);
        hit.timing.at_us = u64::MAX;
        hit.timing.hits_before = u64::MAX;
    }
    report.files.insert(word(0), word(1));
    report.problems = HOSTILE.iter().map(|&word| word.to_owned()).collect();
    let mut lines = HOSTILE.to_vec();
    lines.push(&long);
    report.timing.console = console(&lines);
    report.timing.console_line = Some(u64::MAX);
    report.timing.console_lines_before = u64::MAX;
    report.timing.started = u64::MAX;
    report.timing.duration_ms = u64::MAX;
    report
}

/// All of them, by name.
pub fn all() -> Vec<(&'static str, Report)> {
    vec![
        ("empty", empty()),
        ("pass", pass()),
        ("fired", fired()),
        ("timeout", timeout()),
        ("large", large()),
        ("hostile", hostile()),
    ]
}

/// The same input, run once more: everything that depends on the moment is different.
pub fn at_another_moment(mut report: Report) -> Report {
    report.timing.started += 86_400;
    report.timing.duration_ms = report.timing.duration_ms * 2 + 17;
    report.timing.boot_ms = Some(report.timing.boot_ms.unwrap_or_default() + 1);
    report.timing.recent.truncate(1);
    for hit in &mut report.timing.recent {
        hit.timing = HitTiming { at_us: hit.timing.at_us + 1, pc: 1, hits_before: 99 };
    }
    for line in &mut report.timing.console {
        line.at_ms += 3;
        line.text = line.text.replace("[    ", "[    9");
    }
    report.timing.console.push(ConsoleLine { at_ms: 9999, text: "one line more".to_owned() });
    report.timing.console_lines_before += 2;
    report.timing.console_line = report.timing.console_line.map(|line| line + 2);
    for trap in &mut report.traps {
        trap.timing.unmet += 5;
        trap.timing.hits.iter_mut().for_each(|hits| *hits += 1);
    }
    for test in &mut report.tests {
        test.timing.at_ms += 13;
    }
    if let Some(stop) = &mut report.stop {
        stop.timing.at_us += 77;
        stop.timing.vcpus.reverse();
        for vcpu in &mut stop.timing.vcpus {
            vcpu.at = "elsewhere+0x1".to_owned();
            vcpu.ran_on_us += 1;
            vcpu.backtrace.truncate(1);
            vcpu.registers.insert("rax".to_owned(), 0xdead);
        }
    }
    report
}
