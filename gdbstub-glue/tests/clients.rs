//! Real debuggers over the fake machine. One that is not installed has its tests skipped, by
//! name.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test")]

mod support;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use support::fake::{CALL, COUNTER, EXIT, FUNCTION, Fake, INCREMENT, UD2};
use support::machine::{Machine, finish};
use trapline_gdbstub_glue::{Address, Outcome};

type Test = (&'static str, fn());

const GDB: &[Test] = &[
    ("gdb::shows_the_vcpus", gdb_shows_the_vcpus),
    ("gdb::breaks_on_every_vcpu", gdb_breaks_on_every_vcpu),
    ("gdb::stepi_stays_on_its_vcpu", gdb_stepi_stays_on_its_vcpu),
    ("gdb::nexti_goes_over_a_call", gdb_nexti_goes_over_a_call),
    ("gdb::holds_the_others_with_scheduler_locking", gdb_holds_the_others_with_scheduler_locking),
    ("gdb::reads_and_writes_registers", gdb_reads_and_writes_registers),
    ("gdb::watches", gdb_watches),
    ("gdb::reads_and_writes_memory", gdb_reads_and_writes_memory),
    ("gdb::breaks_without_patching", gdb_breaks_without_patching),
    ("gdb::is_refused_a_fifth_breakpoint", gdb_is_refused_a_fifth_breakpoint),
    ("gdb::evaluates_conditions", gdb_evaluates_conditions),
    ("gdb::interrupts", gdb_interrupts),
    ("gdb::comes_back", gdb_comes_back),
    ("gdb::survives_its_user", gdb_survives_its_user),
    ("gdb::sees_the_guest_end", gdb_sees_the_guest_end),
    ("gdb::sees_a_triple_fault", gdb_sees_a_triple_fault),
    ("gdb::kills", gdb_kills),
    ("gdb::is_killed", gdb_is_killed),
    ("gdb::comes_second", gdb_comes_second),
    ("gdb::takes_a_unix_socket", gdb_takes_a_unix_socket),
];

const LLDB: &[Test] = &[
    ("lldb::shows_the_vcpus", lldb_shows_the_vcpus),
    ("lldb::breaks_and_steps", lldb_breaks_and_steps),
    ("lldb::reads_and_writes_registers", lldb_reads_and_writes_registers),
    ("lldb::watches", lldb_watches),
    ("lldb::reads_memory", lldb_reads_memory),
];

/// Prints what libtest prints, and what libtest cannot: that a test was skipped, and why.
fn main() -> ExitCode {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let begun = Instant::now();
    let (mut passed, mut failed, mut ignored, mut filtered) = (0, 0, 0, 0);
    let lldb = lldb();
    let suites = [
        (GDB, installed("gdb"), "needs gdb, which tests/lanes/setup installs"),
        (LLDB, lldb.is_some(), "needs lldb 19, which tests/lanes/setup installs where the release has it"),
    ];
    for (tests, able, needs) in suites {
        for (name, test) in tests {
            if !name.contains(&filter) {
                filtered += 1;
            } else if !able {
                ignored += 1;
                println!("test {name} ... ignored, {needs}");
            } else if catch_unwind(AssertUnwindSafe(test)).is_ok() {
                passed += 1;
                println!("test {name} ... ok");
            } else {
                failed += 1;
                println!("test {name} ... FAILED");
            }
        }
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    let seconds = begun.elapsed().as_secs_f32();
    println!(
        "\ntest result: {word}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; {filtered} filtered out; finished in {seconds:.2}s"
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn installed(program: &str) -> bool {
    let status = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|s| s.success())
}

fn lldb() -> Option<&'static str> {
    ["lldb-19", "lldb"].into_iter().find(|p| installed(p))
}

/// These texts stand in the output, in this order.
fn expect(output: &str, texts: &[&str]) {
    let mut rest = output;
    for text in texts {
        match rest.find(text) {
            Some(at) => rest = &rest[at + text.len()..],
            None => panic!("'{text}' is missing, or not where it should be, in:\n{output}"),
        }
    }
}

fn stopped() -> Machine {
    Machine::start(Fake::stopped(4))
}

fn gdb_shows_the_vcpus() {
    let machine = stopped();
    let output = machine.gdb(&["info threads", "thread 3", "p $_gthread", "maint print reggroups", "monitor status"]);
    expect(
        &output,
        &[
            "0x0000000000001000 in ?? ()",
            "* 1    Thread 1.1 \"vCPU 0\" (64-bit mode, ring 0) 0x0000000000001000 in ?? ()",
            "  4    Thread 1.4 \"vCPU 3\" (64-bit mode, ring 0) 0x0000000000001000 in ?? ()",
            "[Switching to thread 3 (Thread 1.3)]",
            "$1 = 3",
            "stopped: vCPU 0: interrupted",
            "vCPU 3: 64-bit mode, ring 0, at 0x1000",
        ],
    );
    assert!(!output.to_lowercase().contains("warning: rem"), "{output}");
    assert_eq!(machine.finish(), [Outcome::Attached, Outcome::Detached]);
}

fn gdb_breaks_on_every_vcpu() {
    let machine = stopped();
    let output = machine.gdb(&["hbreak *0x1100", "c", "c", "c", "c", "c", "info breakpoints"]);
    expect(
        &output,
        &[
            "Thread 1 \"vCPU 0\" hit Breakpoint 1, 0x0000000000001100 in ?? ()",
            "Thread 2 \"vCPU 1\" hit Breakpoint 1, 0x0000000000001100 in ?? ()",
            "Thread 3 \"vCPU 2\" hit Breakpoint 1, 0x0000000000001100 in ?? ()",
            "Thread 4 \"vCPU 3\" hit Breakpoint 1, 0x0000000000001100 in ?? ()",
            "Thread 1 \"vCPU 0\" hit Breakpoint 1, 0x0000000000001100 in ?? ()",
            "breakpoint already hit 5 times",
        ],
    );
    machine.wait("the guest goes on without the breakpoint", |s| s.running && s.armed.is_empty());
}

fn gdb_stepi_stays_on_its_vcpu() {
    let machine = stopped();
    let output = machine.gdb(&[
        "thread 2",
        "stepi",
        "stepi 3",
        "p $_thread",
        "set scheduler-locking on",
        "stepi",
        "info threads",
    ]);
    expect(
        &output,
        &[
            "0x0000000000001001 in ?? ()",
            "0x0000000000001004 in ?? ()",
            "$1 = 2",
            "0x0000000000001005 in ?? ()",
            "* 2    Thread 1.2 \"vCPU 1\" (64-bit mode, ring 0) 0x0000000000001005 in ?? ()",
        ],
    );
    assert!(!output.contains("Switching to Thread"), "{output}");
}

fn gdb_nexti_goes_over_a_call() {
    let machine = stopped();
    let call = format!("tbreak *{CALL:#x} thread 2");
    let output = machine.gdb(&[&call, "c", "nexti", "p $_thread", "p $rsp"]);
    expect(
        &output,
        &[
            "Thread 2 \"vCPU 1\" hit Temporary breakpoint 1",
            "0x000000000000101b in ?? ()",
            "$1 = 2",
            "$2 = (void *) 0x6100",
        ],
    );
    assert!(machine.seen().written.is_empty());
}

fn gdb_holds_the_others_with_scheduler_locking() {
    let machine = stopped();
    machine.gdb(&["set scheduler-locking on", "thread 3", "hbreak *0x1100", "c", "c", "kill"]);
    let steps = machine.seen().steps;
    assert!(steps[2] > 20 && steps[0] + steps[1] + steps[3] == 0, "{steps:?}");
}

fn gdb_reads_and_writes_registers() {
    let machine = stopped();
    let output = machine.gdb(&[
        "thread 2",
        "info registers",
        "p $cr3",
        "p/x $efer",
        "p $efer",
        "p $cr0",
        "set $cr0 = 0x80050031",
        "p/x $cr0",
        "set $cr4 = $cr4 | 0x100000",
        "p/x $cr4",
        "set $gs_base = 0xffff888000000000",
        "p/x $gs_base",
        "p/x $k_gs_base",
        "set $dr7 = 0x401",
        "p $dr7",
        "p $lstar",
        "set $rip = 0x1001",
        "x/i $rip",
        "set $eflags = 0x42",
        "p $eflags",
        "p $xmm3.v2_int64",
        "set $xmm3.v2_int64[0] = 77",
        "p $xmm3.v2_int64",
        "p $st0 = 1.5",
        "p $st0",
        "set $cs = 0x33",
        "set $rip = 0x8000000000000000",
        "set $tr = 1",
        "p/x $cs",
        "thread 1",
        "p/x $cr0",
    ]);
    expect(
        &output,
        &[
            "rbx            0x1000000b0",
            "rip            0x1000",
            "eflags         0x246               [ PF ZF IF ]",
            "fs_base        0xf50001",
            "gs_base        0x650001",
            "cr0            0x80050033          [ PE MP ET NE WP AM PG ]",
            "dr6            0xffff0ff0          [ ]",
            "$1 = 1052672",
            "$2 = 0xd01",
            "$3 = [ SCE LME LMA NXE ]",
            "$4 = [ PE MP ET NE WP AM PG ]",
            "$5 = 0x80050031",
            "$6 = 0x1006f0",
            "$7 = 0xffff888000000000",
            "$8 = 0xffff888000000001",
            "$9 = [ L0 ]",
            "$10 = (void (*)()) 0xffffffff81e00000",
            "=> 0x1001:\tnop",
            "$11 = [ ZF ]",
            "$12 = {4, 4}",
            "$13 = {77, 4}",
            "$14 = 1.5",
            "$15 = 1.5",
            "cs is read-only: in protected mode a selector means nothing without its descriptor",
            "rip cannot be 0x8000000000000000: not a canonical address",
            "tr is read-only",
            "$16 = 0x10",
            "$17 = 0x80050033",
        ],
    );
}

fn gdb_watches() {
    for (command, hit) in
        [("watch", "Hardware watchpoint"), ("rwatch", "Hardware read watchpoint"), ("awatch", "Hardware access")]
    {
        let machine = stopped();
        let watch = format!("{command} *(long*){COUNTER:#x}");
        // One vCPU alone: a read of what another has changed meanwhile is no read for gdb.
        let output = machine.gdb(&["set scheduler-locking on", &watch, "c", "c", "info breakpoints"]);
        expect(&output, &["hit", hit, "hit", hit]);
        match command {
            "watch" => expect(&output, &["Old value = 0", "New value = 1", "Old value = 1", "New value = 2"]),
            "rwatch" => expect(&output, &["Value = 1", "Value = 2"]),
            _ => expect(&output, &["Old value = 0", "New value = 1", "Value = 1"]),
        }
        // A trap: the instruction behind the store.
        if command == "watch" {
            expect(&output, &[&format!("{:#018x} in ?? ()", INCREMENT + 7)]);
        }
    }
}

fn gdb_reads_and_writes_memory() {
    let machine = stopped();
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    let image: Vec<u8> = (0..0x4000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 23) as u8).collect();
    std::fs::write(&from, &image).unwrap();
    let output = machine.gdb(&[
        "x/4gx 0x3000",
        "set var *(long*)0x3000 = 0x1122334455667788",
        "x/gx 0x3000",
        "x/4gx 0x7ff0",
        "x/gx 0x0",
        "set var *(long*)0x8000 = 1",
        "maint packet Qqemu.PhyMemMode:1",
        "maint flush dcache",
        "set var *(long*)0x8000 = 99",
        "maint packet Qqemu.PhyMemMode:0",
        "maint flush dcache",
        "x/gd 0xffff800000008000",
        &format!("restore {} binary 0x9000", from.display()),
        &format!("dump binary memory {} 0x9000 0xd000", to.display()),
        "kill",
    ]);
    expect(
        &output,
        &[
            "0x3000:\t0x0000000000000000",
            "0x3000:\t0x1122334455667788",
            "0x7ff0:\t0x0000000000000000\t0x0000000000000000",
            "0x8000:\tCannot access memory at address 0x8000",
            "Cannot access memory at address 0x0",
            "Cannot access memory at address 0x8000",
            "0xffff800000008000:\t99",
        ],
    );
    assert_eq!(std::fs::read(&to).unwrap(), image, "16 KiB through X and m packets");
}

fn gdb_breaks_without_patching() {
    let machine = stopped();
    let output = machine.gdb(&[
        "break *0x1100",
        "break *0x1101",
        "hbreak *0x1100",
        "c",
        "c",
        "c",
        "delete",
        "tbreak *0x1002",
        "c",
    ]);
    expect(&output, &["hit Breakpoint 1", "hit Breakpoint", "hit Temporary breakpoint 4"]);
    let written = machine.seen().written;
    assert!(written.iter().all(|(_, bytes)| bytes.is_empty()), "gdb wrote {written:02x?}");
}

fn gdb_is_refused_a_fifth_breakpoint() {
    let machine = stopped();
    let output = machine.gdb(&[
        "hbreak *0x1100",
        "hbreak *0x1002",
        "hbreak *0x1003",
        "hbreak *0x1004",
        "hbreak *0x1001",
        "c",
        "delete 5",
        "c",
        "info registers rip",
        "watch *(long*)0x3000",
        "c",
        "c",
        "c",
        "delete",
        "break *0x1100",
        "c",
    ]);
    expect(
        &output,
        &[
            "Cannot insert hardware breakpoint",
            "free 0 of 4; delete a breakpoint or watchpoint first",
            "Command aborted.",
            "hit Breakpoint 2, 0x0000000000001002",
            "free 0 of 4; delete a breakpoint or watchpoint first",
            "hit Breakpoint 7, 0x0000000000001100",
        ],
    );
}

fn gdb_evaluates_conditions() {
    let machine = stopped();
    let output = machine.gdb(&[
        "hbreak *0x1100 if $rbx == 0x2000000b0 && *(long*)0x3000 > 20",
        "c",
        "p $_thread",
        "p *(long*)0x3000 > 20",
    ]);
    expect(&output, &["Thread 3 \"vCPU 2\" hit Breakpoint 1", "$1 = 3", "$2 = 1"]);
}

const INTERRUPT: &str = "python import os, signal, threading; \
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()";

fn gdb_interrupts() {
    let machine = Machine::start(Fake::new(4));
    let output = machine.gdb(&[INTERRUPT, "c", "p 6*7", INTERRUPT, "c", "p 7*7"]);
    expect(
        &output,
        &[
            "Thread 1 \"vCPU 0\" received signal SIGINT, Interrupt.",
            "$1 = 42",
            "received signal SIGINT, Interrupt.",
            "$2 = 49",
        ],
    );
    // A condition that is never true: gdb resumes and stops all the time, and Ctrl-C is not lost.
    let output = machine.gdb(&["hbreak *0x1100 if 0", INTERRUPT, "c", "p 8*7"]);
    expect(&output, &["received signal SIGINT, Interrupt.", "$1 = 56"]);
    machine.wait("it runs", |s| s.running);
}

fn gdb_comes_back() {
    let machine = Machine::start(Fake::new(2));
    let remote = format!("target remote {}", machine.remote);
    let output = machine.gdb(&[
        "hbreak *0x1100",
        "c",
        "detach",
        &remote,
        "c",
        "disconnect",
        &remote,
        "info threads",
        "delete",
        "detach",
    ]);
    expect(&output, &["hit Breakpoint 1", "detached]", "hit Breakpoint 1", "Thread 1.2 \"vCPU 1\""]);
    let output = machine.gdb(&["info threads"]);
    expect(&output, &["Thread 1.2 \"vCPU 1\""]);
    machine.wait("it runs", |s| s.running && s.armed.is_empty() && s.detached == 4);
}

fn gdb_survives_its_user() {
    let machine = stopped();
    let output = machine.gdb(&[
        "maint packet qSupported",
        "maint packet m",
        "maint packet Hg-1",
        "maint packet vCont;s",
        "maint packet vKill",
        "maint packet Z1",
        "maint packet T0",
        "monitor",
        "monitor nonsense",
        "info threads",
        "stepi",
    ]);
    expect(
        &output,
        &[
            "received: \"PacketSize=4000;vContSupported+;multiprocess+",
            "received: \"E01\"",
            "received: \"E01\"",
            "monitor sysregs",
            "there is no 'monitor nonsense'",
            "Thread 1.4 \"vCPU 3\"",
        ],
    );
    assert!(!output.contains("Remote connection closed"), "{output}");
}

fn gdb_sees_the_guest_end() {
    let machine = stopped();
    let jump = format!("set $rip = {EXIT:#x}");
    let output = machine.gdb(&["set $rax = 7", &jump, "c", "p $_siginfo", "p/x $rip", "c", "info threads"]);
    expect(
        &output,
        &[
            "trapline: the guest ends itself on vCPU 0 with status 7 (port 0xf4); registers and memory can be read; continue ends the run",
            "Thread 1 \"vCPU 0\" received signal SIGTERM, Terminated.",
            "0x1210",
            "trapline: the run is over: the guest ended with status 7",
            "[Inferior 1 (process 1) exited with code 07]",
            "No threads.",
        ],
    );
    assert_eq!(machine.finish(), [Outcome::Attached, Outcome::Ended]);
}

fn gdb_sees_a_triple_fault() {
    let machine = stopped();
    let jump = format!("set $rip = {UD2:#x}");
    let output = machine.gdb(&["thread 2", &jump, "c", "x/i $rip", "p $_thread", "c"]);
    expect(
        &output,
        &[
            "trapline: vCPU 1: triple fault; registers and memory can be read; continue ends the run",
            "received signal SIGSEGV, Segmentation fault.",
            "ud2",
            "$1 = 2",
            "trapline: the run is over: triple fault",
            "Program terminated with signal SIGSEGV, Segmentation fault.",
        ],
    );
    assert_eq!(machine.finish(), [Outcome::Attached, Outcome::Ended]);
}

fn gdb_kills() {
    let machine = stopped();
    let output = machine.gdb(&["kill"]);
    expect(&output, &["[Inferior 1 (process 1) killed]"]);
    assert!(machine.seen().killed);
    assert_eq!(machine.finish(), [Outcome::Attached, Outcome::Killed]);
}

/// kill -9 of gdb, while the guest stands and while it runs.
fn gdb_is_killed() {
    for last in ["shell sleep 60", "c"] {
        let machine = stopped();
        let mut gdb = machine.gdb_command(&["hbreak *0x1234", "stepi", last]);
        let mut gdb = gdb.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        machine.wait("gdb is where it should be", |s| match last {
            "c" => s.running && s.armed.len() == 1,
            _ => !s.running && s.steps[0] == 1,
        });
        gdb.kill().unwrap();
        gdb.wait().unwrap();
        machine.wait("the guest goes on by itself", |s| s.running && s.armed.is_empty() && s.detached == 1);
        assert_eq!(machine.finish(), [Outcome::Attached, Outcome::Detached]);
    }
}

fn gdb_comes_second() {
    let machine = stopped();
    let second = format!("shell gdb -nx -q -batch -ex 'target remote {}' 2>&1", machine.remote);
    let output = machine.gdb(&[&second, "p 6*7", "stepi"]);
    expect(&output, &["another debugger is attached; detach it first", "$1 = 42", "0x0000000000001001 in ?? ()"]);
}

fn gdb_takes_a_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let address = Address::Unix(dir.path().join("guest.sock"));
    let machine = Machine::start_at(Fake::stopped(2), &address);
    let output = machine.gdb(&["stepi", "info threads"]);
    expect(&output, &["0x0000000000001001 in ?? ()", "Thread 1.2 \"vCPU 1\""]);
    // And the line that is printed can be pasted.
    let line = format!("gdb -ex 'target remote {}' -nx -q -batch -ex 'p 6*7'", machine.remote);
    let output = finish(Command::new("sh").args(["-c", &line]));
    expect(&output, &["$1 = 42"]);
}

fn with_lldb(machine: &Machine, commands: &[&str]) -> String {
    machine.lldb(lldb().unwrap(), commands)
}

fn lldb_shows_the_vcpus() {
    let machine = stopped();
    let output = with_lldb(&machine, &["thread list", "process plugin packet monitor status", "detach"]);
    expect(
        &output,
        &[
            "stop reason = signal SIGTRAP",
            "thread #4: tid = 0x0004, 0x0000000000001000",
            "vCPU 3: 64-bit mode, ring 0",
            "detached",
        ],
    );
    assert_eq!(machine.finish(), [Outcome::Attached, Outcome::Detached]);
}

fn lldb_breaks_and_steps() {
    let machine = stopped();
    let function = format!("breakpoint set -H -a {FUNCTION:#x}");
    let output = with_lldb(
        &machine,
        &[
            &function,
            "breakpoint set -a 0x1004",
            "c",
            "breakpoint delete 2",
            "c",
            "thread select 2",
            "si",
            "thread info 2",
            "breakpoint delete -f",
            "detach",
        ],
    );
    expect(
        &output,
        &[
            "stop reason = breakpoint 2.1",
            "stop reason = breakpoint 1.1",
            "stop reason = instruction step into",
            "detached",
        ],
    );
    assert!(machine.seen().written.iter().all(|(_, bytes)| !bytes.contains(&0xcc)), "nothing is patched");
    machine.wait("it runs", |s| s.running && s.armed.is_empty());
}

fn lldb_reads_and_writes_registers() {
    let machine = stopped();
    let output = with_lldb(
        &machine,
        &[
            "register read rbx cr3 efer gs_base k_gs_base",
            "register write r12 0x1234",
            "register read r12",
            "thread select 2",
            "register read rbx",
            "detach",
        ],
    );
    expect(
        &output,
        &[
            "rbx = 0x00000000000000b0",
            "cr3 = 0x0000000000100000",
            "efer = 0x00000d01",
            "gs_base = 0x0000000000650000",
            "k_gs_base = 0xffff888000000000",
            "r12 = 0x0000000000001234",
            "rbx = 0x00000001000000b0",
        ],
    );
}

fn lldb_watches() {
    let machine = stopped();
    let watch = format!("watchpoint set expression -w write -s 8 -- {COUNTER:#x}");
    let output = with_lldb(&machine, &[&watch, "c", "c", "watchpoint delete -f", "detach"]);
    expect(
        &output,
        &["Watchpoint created: Watchpoint 1", "stop reason = watchpoint 1", "stop reason = watchpoint 1", "detached"],
    );
}

fn lldb_reads_memory() {
    let machine = stopped();
    let output = with_lldb(
        &machine,
        &[
            "memory read -fx -s8 -c2 0x1000",
            "memory write -s 8 0x3000 0x42",
            "memory read -fx -s8 -c1 0x3000",
            "memory read 0x8000",
        ],
    );
    expect(
        &output,
        &["0x00001000: 0x9090909090909090", "0x00003000: 0x0000000000000042", "memory read failed for 0x8000"],
    );
}
