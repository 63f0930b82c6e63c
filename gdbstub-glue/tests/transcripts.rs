//! The protocol, packet by packet, over a machine made of memory.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test")]

mod support;

use insta::assert_snapshot;
use support::fake::{COUNTER, EXIT, Fake, HLT, INCREMENT, KERNEL, UD2};
use support::raw::{Conversation, console, frame};
use trapline_gdbstub_glue::Outcome;
use trapline_vmm::debug::{Breakpoint, Crash, RunMode, StopReason, Trigger, VcpuId};
use trapline_vmm::vcpu::Activity;

/// What gdb 13 says when it attaches, byte by byte.
#[test]
fn gdb_attaches() {
    let mut talk = Conversation::with(Fake::stopped(2));
    talk.connect();
    for packet in [
        "qSupported:multiprocess+;swbreak+;hwbreak+;qRelocInsn+;fork-events+;vfork-events+;exec-events+;vContSupported+;QThreadEvents+;no-resumed+;memory-tagging+",
        "vMustReplyEmpty",
        "QStartNoAckMode",
    ] {
        talk.say(packet);
        talk.raw(b"+");
    }
    for packet in [
        "Hgp0.0",
        "qTStatus",
        "?",
        "qXfer:threads:read::0,1000",
        "qAttached:1",
        "Hc-1",
        "qOffsets",
        "vCont?",
        "m1000,40",
        "qSymbol::",
    ] {
        talk.say(packet);
    }
    assert_snapshot!(talk.transcript);
}

#[test]
fn the_bytes_of_an_exchange() {
    let mut talk = Conversation::with(Fake::stopped(1));
    talk.connect();
    talk.send(b"$qSupported:multiprocess+#c6");
    assert_eq!(
        talk.bytes().escape_ascii().to_string(),
        "+$PacketSize=4000;vContSupported+;multiprocess+;QStartNoAckMode+;swbreak+;hwbreak+;qXfer:features:read+;\
         qXfer:threads:read+#b1"
    );
    talk.send(b"+$p6#a6");
    assert_eq!(talk.bytes(), b"+$0070*)#1a", "runs are shortened");
}

#[test]
fn target_xml_in_pieces_and_its_annexes() {
    let mut talk = Conversation::attached();
    let mut xml = String::new();
    loop {
        let piece = talk.ask(&format!("qXfer:features:read:target.xml:{:x},333", xml.len()));
        if piece == "l" {
            break;
        }
        let text = piece.strip_prefix('m').unwrap().replace("\\n", "\n").replace("\\\"", "\"");
        xml.push_str(&text);
    }
    assert!(xml.starts_with("<?xml") && xml.ends_with("</target>\n"));
    assert_eq!(talk.ask("qXfer:features:read:other.xml:0,100"), "E00");
    assert_eq!(talk.ask("qXfer:features:read:target.xml:ffffffffffffffff,ffffffffffffffff"), "l");
}

#[test]
fn two_vcpus_hit_one_breakpoint_and_both_are_told() {
    let mut talk = Conversation::attached();
    talk.say("Z1,1004,1");
    talk.say("vCont;c");
    talk.run(10);
    // gdb takes it away at the stop, steps over it with the others parked, and puts it back.
    talk.say("z1,1004,1");
    talk.say("vCont;s:p1.1");
    talk.run(1);
    talk.say("Z1,1004,1");
    talk.say("vCont;c");
    talk.run(1);
    talk.say("?");
    assert_snapshot!(talk.transcript);
}

#[test]
fn a_hit_that_waits_outlives_a_removal_that_is_taken_back() {
    let mut talk = Conversation::attached();
    talk.say(&format!("Z2,{COUNTER:x},8"));
    talk.say("vCont;c");
    let first = talk.run(10);
    assert!(first[0].starts_with("T05thread:p1.1;core:0;watch:3000;"), "{first:?}");
    talk.say(&format!("z2,{COUNTER:x},8"));
    talk.say(&format!("Z2,{COUNTER:x},8"));
    let second = talk.ask("vCont;c");
    assert!(second.starts_with("T05thread:p1.2;core:1;watch:3000;"), "{second}");
    // Taken away for good, it is gone with all its hits.
    talk.say(&format!("z2,{COUNTER:x},8"));
    assert_eq!(talk.say("vCont;c"), [""; 0]);
    assert_eq!(talk.seen().armed, []);
    assert_eq!(talk.run(100), [""; 0]);
}

#[test]
fn a_step_leaves_the_others_parked_or_running() {
    let mut talk = Conversation::attached();
    talk.say("vCont;s:p1.2");
    talk.run(5);
    assert_eq!(talk.seen().steps, [0, 1, 0, 0]);
    talk.say("vCont;s:p1.3;c:p1.-1");
    talk.run(5);
    assert_eq!(talk.seen().steps, [1, 2, 1, 1]);
    talk.say("vCont;r1000,1008:p1.1");
    talk.run(50);
    assert_eq!(talk.seen().steps, [8, 2, 1, 1]);
    assert_snapshot!(talk.transcript);
}

/// The plan that a packet leads to, or the refusal.
fn plan(packet: &str) -> String {
    let mut talk = Conversation::attached();
    let replies = talk.say(packet);
    match talk.seen().plans.pop() {
        None => replies.join(" "),
        Some(plan) => {
            let mode = |n| match plan.mode(VcpuId(n)) {
                RunMode::Continue => "c".to_owned(),
                RunMode::Step => "s".to_owned(),
                RunMode::StepRange { start, end } => format!("r{start:x}-{end:x}"),
                RunMode::Parked => "-".to_owned(),
            };
            (0..4).map(mode).collect::<Vec<_>>().join(" ")
        }
    }
}

#[test]
fn every_resumption_has_its_plan() {
    for (packet, expected) in [
        ("vCont;c", "c c c c"),
        ("vCont;c:p1.-1", "c c c c"),
        ("vCont;c:-1", "c c c c"),
        ("vCont;c:p1", "c c c c"),
        ("vCont;c:0", "c c c c"),
        ("vCont;C05", "c c c c"),
        ("vCont;C05:p1.2;c:p1.-1", "c c c c"),
        ("vCont;s:p1.2", "- s - -"),
        ("vCont;s:2;c", "c s c c"),
        ("vCont;S05:2;c:3", "- s c -"),
        ("vCont;s", "s s s s"),
        ("vCont;s:1;c:2", "s c - -"),
        ("vCont;c;s:2", "c c c c"),
        ("vCont;s:2;c:2", "- s - -"),
        ("vCont;r1000,1010:p1.4;c:p1.-1", "c c c r1000-1010"),
        ("vCont;r1000,1000:4", "- - - s"),
        ("vCont;r2000,1000:4", "- - - s"),
        ("vCont;s:5", "E01"),
        ("vCont;c:p2.1", "E01"),
        ("vCont;t:1", "E01"),
        ("vCont;c;", "E01"),
        ("c", "c c c c"),
        ("s", "s c c c"),
        ("C05", "c c c c"),
        ("S05;1004", "s c c c"),
    ] {
        assert_eq!(plan(packet), expected, "{packet}");
    }
}

#[test]
fn old_packets_obey_hc() {
    let mut talk = Conversation::attached();
    assert_eq!(talk.ask("Hc3"), "OK");
    talk.say("s");
    talk.run(3);
    assert_eq!(talk.seen().steps, [0, 0, 1, 0], "Hc names the thread, and it alone goes on");
    assert_eq!(talk.ask("Hc-1"), "OK");
    assert_eq!(talk.ask("Hg2"), "OK");
    talk.say("s1002");
    talk.run(3);
    assert_eq!(talk.seen().steps, [1, 1, 2, 1]);
    assert!(talk.ask("Hg2") == "OK" && talk.ask("p10") == "0310000000000000");
    assert_eq!(talk.ask("Hc9"), "E01");
    assert_eq!(talk.ask("s8000000000000000"), "E.trapline.rip cannot be 0x8000000000000000: not a canonical address");
}

#[test]
fn ctrl_c_stops_the_guest() {
    let mut talk = Conversation::attached();
    talk.say("vCont;c");
    talk.run(10);
    talk.raw(b"\x03");
    assert!(!talk.seen().running);
    talk.say("vCont;s:2");
    talk.raw(b"\x03");
    assert_snapshot!(talk.transcript);
}

#[test]
fn ctrl_c_between_two_resumptions_is_not_lost() {
    let mut talk = Conversation::attached();
    talk.raw(b"\x03\x03");
    let reply = talk.ask("vCont;c");
    assert!(reply.starts_with("T02thread:p1.1;"), "{reply}");
    assert_eq!(talk.seen().steps, [0; 4]);
    assert_eq!(talk.say("vCont;c"), [""; 0]);
}

#[test]
fn an_event_that_wins_against_ctrl_c_is_told_first() {
    let mut talk = Conversation::attached();
    talk.say("vCont;c");
    talk.target.happens(2, StopReason::GuestPanic);
    let replies = talk.raw(b"\x03");
    assert!(console(&replies[0]).contains("vCPU 2"));
    assert!(replies[1].starts_with("T06thread:p1.3;"), "{replies:?}");
    assert!(talk.ask("vCont;c").starts_with("T02"), "the interrupt is still due");
    assert_eq!(talk.say("vCont;c"), [""; 0]);
}

#[test]
fn detach_and_attach_again() {
    let mut talk = Conversation::attached();
    talk.say("Z1,1004,1");
    talk.say("D;1");
    assert!(talk.seen().running && talk.seen().armed.is_empty() && talk.is_closed());
    talk.run(100);
    talk.connect();
    talk.say("qSupported:multiprocess+");
    talk.raw(b"+");
    talk.say("?");
    assert_eq!(talk.outcomes, [Outcome::Attached, Outcome::Detached, Outcome::Attached]);
    assert_snapshot!(talk.transcript);
}

#[test]
fn kill_ends_the_guest() {
    for (packet, reply) in [("vKill;1", vec!["OK"]), ("k", vec![])] {
        let mut talk = Conversation::attached();
        assert_eq!(talk.say(packet), reply);
        assert!(talk.seen().killed && talk.is_closed());
        assert_eq!(talk.seen().detached, 0);
        assert_eq!(talk.outcomes, [Outcome::Attached, Outcome::Killed]);

        let mut talk = Conversation::attached();
        talk.say("vCont;c");
        assert_eq!(talk.say(packet), reply, "while it runs");
        assert!(talk.seen().killed);
    }
}

#[test]
fn a_client_that_vanishes_leaves_nothing_behind() {
    for running in [false, true] {
        let mut talk = Conversation::attached();
        talk.say("Z1,1004,1");
        talk.say("Z2,3000,8");
        if running {
            talk.say("vCont;s:1;c");
        }
        talk.vanish();
        let seen = talk.seen();
        assert!(seen.running && seen.armed.is_empty() && !seen.killed, "running: {running}");
        assert_eq!(seen.detached, 1);
        assert_eq!(talk.outcomes, [Outcome::Attached, Outcome::Detached]);
        assert!(!talk.server.is_attached());
    }
}

/// A client that vanishes in the middle of a packet, at every place.
#[test]
fn half_packets() {
    let wire = [frame(b"qSupported:multiprocess+"), b"+".to_vec(), frame(b"Z1,1004,1"), frame(b"vCont;c")].concat();
    for cut in 0..=wire.len() {
        let mut talk = Conversation::new(2);
        talk.connect();
        talk.send(&wire[..cut]);
        talk.vanish();
        let seen = talk.seen();
        assert!(seen.running && seen.armed.is_empty(), "cut at {cut}");
        // And the next client is served.
        talk.connect();
        assert!(talk.ask_acked("?").starts_with("T05"), "cut at {cut}");
    }
}

impl Conversation {
    /// The reply to a packet where packets are still acknowledged.
    fn ask_acked(&mut self, body: &str) -> String {
        let mut replies = self.say(body);
        assert_eq!(replies.remove(0), "+");
        assert_eq!(replies.len(), 1, "{replies:?}");
        replies.remove(0)
    }
}

/// Everything that ends a session of bare gdbstub 0.7.10, and some more.
#[test]
fn packets_that_make_no_sense() {
    let mut talk = Conversation::attached();
    for packet in [
        "qSupported",
        "m",
        "m1000",
        "mzz,4",
        "m10000000000000000,4",
        "M1000,4:00",
        "M1000,1:0",
        "X1000,2:a",
        "Z1",
        "Z1,zz,1",
        "Z9,0,1",
        "Z0,1000,1;X3,220027",
        "vCont;x",
        "vCont;s:p1.9",
        "vCont;t:1",
        "Hg-1",
        "Hgp1.99",
        "Hgp2.1",
        "Hz1",
        "T9",
        "Tzz",
        "vKill",
        "vKill;7",
        "qThreadExtraInfo",
        "qThreadExtraInfo,zz",
        "qThreadExtraInfo,9",
        "G00",
        "Gzz",
        "p999",
        "pzz",
        "P0=00",
        "P999=00",
        "P0",
        "D;7",
        "qXfer:features:read:x.xml:0,10",
        "qXfer:features:write:target.xml:0:00",
        "qXfer:threads:read:x:0,10",
        "qXfer:threads:read::0",
        "qRcmd,6",
        "QNonStop:1",
        "bs",
        "bc",
        "R00",
        "!",
        "vRun;",
        "vAttach;1",
        "qC;",
        "?x",
        "gx",
        "kx",
    ] {
        talk.say(packet);
        assert!(talk.server.is_attached(), "{packet}");
    }
    // It is none the worse for it.
    assert!(talk.ask("?").starts_with("T05thread:p1.1;"));
    assert!(!talk.seen().running && talk.seen().armed.is_empty() && talk.seen().written.is_empty());
    assert_snapshot!(talk.transcript);
}

#[test]
fn checksums_and_acknowledgements() {
    let mut talk = Conversation::with(Fake::stopped(1));
    talk.connect();
    talk.raw(b"$?#00"); // a wrong checksum: say it again
    talk.raw(b"$?#3f"); // the right one
    talk.raw(b"-"); // we say it again
    talk.raw(b"+noise\x00\xff$?#3f+"); // noise is skipped
    talk.say("QStartNoAckMode");
    talk.raw(b"+");
    talk.raw(b"-"); // means nothing any more
    talk.raw(b"$?#00"); // cannot be asked for again
    talk.raw(b"$?#3f");
    assert_snapshot!(talk.transcript);
}

#[test]
fn a_packet_that_is_too_long() {
    let mut talk = Conversation::attached();
    let long = format!("M1000,3000:{}", "00".repeat(0x3000));
    assert_eq!(talk.ask(&long), "E01");
    assert!(talk.seen().written.is_empty());
    // The longest that is allowed: `$`, `#` and checksum make it 0x4000.
    let bytes = (0x4000 - 4 - "M1000,1ff7:".len()) / 2;
    assert_eq!(talk.ask(&format!("M1000,{bytes:x}:{}", "90".repeat(bytes))), "OK");
}

#[test]
fn breakpoints_of_all_kinds() {
    let mut talk = Conversation::attached();
    assert_eq!(talk.ask("Z0,1004,1"), "OK");
    assert_eq!(talk.ask("Z1,1004,1"), "OK");
    assert_eq!(talk.ask("Z1,1004,1"), "OK");
    assert_eq!(talk.seen().armed, [Breakpoint::exec(0x1004)], "one slot for both");
    assert_eq!(talk.ask("z1,1004,1"), "OK");
    assert_eq!(talk.ask("z1,1004,1"), "OK");
    assert_eq!(talk.ask("Z2,3000,4"), "OK");
    assert_eq!(talk.ask("Z3,3008,8"), "", "gdb does better with an access watchpoint");
    assert_eq!(talk.ask("Z4,3010,8"), "OK");
    talk.say("vCont;s:1");
    assert_eq!(
        talk.seen().armed,
        [
            Breakpoint::exec(0x1004),
            Breakpoint::watch(0x3000, 4, Trigger::Write),
            Breakpoint::watch(0x3010, 8, Trigger::Access)
        ]
    );
    talk.run(1);
    assert_eq!(talk.ask("z0,1004,1"), "OK");
    talk.say("vCont;s:1");
    assert_eq!(talk.seen().armed.len(), 2, "now it is gone");
    assert!(talk.seen().written.is_empty(), "nothing is ever patched");
}

#[test]
fn how_a_hit_is_told() {
    for (packet, expected) in [
        ("Z0,1004,1", "swbreak:;"),
        ("Z1,1004,1", "hwbreak:;"),
        ("Z2,3000,8", "watch:3000;"),
        ("Z4,2ffc,c", "awatch:3000;"),
    ] {
        let mut talk = Conversation::attached();
        assert_eq!(talk.ask(packet), "OK");
        talk.say("vCont;c:1");
        let reply = talk.run(20).remove(0);
        assert!(reply.starts_with(&format!("T05thread:p1.1;core:0;{expected}06:")), "{packet}: {reply}");
    }
}

#[test]
fn the_fifth_breakpoint_is_refused_in_words() {
    let mut talk = Conversation::attached();
    for addr in 0x1000..0x1004 {
        assert_eq!(talk.ask(&format!("Z1,{addr:x},1")), "OK");
    }
    for packet in ["Z1,1004,1", "Z0,1005,1", "Z2,3000,8"] {
        let reply = talk.ask(packet);
        assert!(reply.starts_with("E.trapline.") && reply.contains("free 0 of 4"), "{reply}");
    }
    assert!(talk.ask("Z2,3000,40").contains("longer than four slots"));
    assert!(talk.ask("Z2,3000,0").contains("no such bytes"));
    assert!(talk.ask("Z2,ffffffffffffffff,2").contains("no such bytes"));
    assert_eq!(talk.seen().armed.len(), 4);
    // One that is on its way out makes room at once.
    talk.say("z1,1002,1");
    assert_eq!(talk.ask("Z1,1004,1"), "OK");
    assert!(!talk.seen().armed.contains(&Breakpoint::exec(0x1002)));
    // What a vCPU could not apply is told in words too.
    talk.say("z1,1004,1");
    talk.target.failing_set = Some("vCPU 2 did not answer within 5 s".into());
    assert!(talk.ask("Z1,1006,1").contains("vCPU 2 did not answer"));
}

/// Every register that is told apart: distinct values go in by `P`, come out by `p` and `g`,
/// and go in again by `G`, on one vCPU and no other.
#[test]
fn registers_go_in_and_come_out() {
    let mut talk = Conversation::attached();
    talk.say("Hg2");
    let others = [1, 3, 4].map(|id| {
        talk.say(&format!("Hg{id}"));
        talk.ask("g")
    });
    talk.say("Hg2");
    let mut number = 0;
    let mut written = Vec::new();
    let mut refused = Vec::new();
    loop {
        let old = talk.ask(&format!("p{number:x}"));
        if old == "E01" {
            break;
        }
        // Addresses stay canonical, flags within what exists.
        let new = match old.len() {
            16 => format!("{number:02x}22330000000000"),
            8 => format!("{:02x}000000", number & 0x45),
            20 => format!("{number:02x}11223344556688ff3f"),
            _ => format!("{number:02x}112233445566778899aabbccddeeff"),
        };
        match talk.ask(&format!("P{number:x}={new}")).as_str() {
            "OK" => written.push((number, new)),
            error => {
                assert!(error.starts_with("E.trapline."), "{number}: {error}");
                refused.push(error.split(' ').next().unwrap().to_owned());
            }
        }
        number += 1;
    }
    for (number, value) in &written {
        let read = talk.ask(&format!("p{number:x}"));
        // EFLAGS has a bit that is always set; the tag word is computed.
        assert!(*read == *value || *number == 17 || *number == 34, "{number}: wrote {value}, read {read}");
    }
    let frame = talk.ask("g");
    assert_eq!(talk.ask(&format!("G{frame}")), "OK");
    assert_eq!(talk.ask("g"), frame);
    for (id, before) in [1, 3, 4].into_iter().zip(&others) {
        talk.say(&format!("Hg{id}"));
        assert_eq!(&talk.ask("g"), before, "thread {id} was not written");
    }
    assert_snapshot!(refused.join("\n"));
}

#[test]
fn a_frame_with_one_bad_register_writes_none() {
    let mut talk = Conversation::attached();
    let frame = talk.ask("g");
    let bad = format!("ff{}", &frame[2..]).replacen("1000000000000000", "1000000000000000", 1);
    let rip = 16 * 16;
    let bad = format!("{}00000000000080ff{}", &bad[..rip], &bad[rip + 16..]);
    assert!(talk.ask(&format!("G{bad}")).contains("not a canonical address"));
    assert_eq!(talk.ask("g"), frame);
    assert_eq!(talk.ask(&format!("G{}", &frame[2..])), "E01");
    // What the registers could hold and KVM does not take.
    let cr4 = support_register(&mut talk, "0000000000000080");
    assert_eq!(cr4, "E.trapline.KVM refuses these registers: EINVAL");
}

/// Writes CR4, by its number in target.xml.
fn support_register(talk: &mut Conversation, value: &str) -> String {
    talk.ask(&format!("P3f={value}"))
}

#[test]
fn memory_short_and_long() {
    let mut talk = Conversation::attached();
    assert_eq!(talk.ask("m1000,4"), "90909090");
    assert_eq!(talk.ask("m8000,4"), "E0e", "gdb 13 takes a text for data here");
    assert_eq!(talk.ask("m7ffe,8"), "0000", "a short read up to the hole");
    assert_eq!(talk.ask("m0,10"), "E0e");
    assert_eq!(talk.ask("mffffffffffffffff,10"), "E0e");
    assert_eq!(talk.ask("m1000,0"), "");
    assert_eq!(talk.ask(&format!("m{:x},4", KERNEL + 0x1000)), "90909090");
    assert_eq!(talk.ask("m1000,ffffffffffffffff").len(), 2 * 0x1ffe, "as much as a packet holds");
    assert_eq!(talk.ask("M3000,4:01020304"), "OK");
    assert_eq!(talk.ask("m3000,4"), "01020304");
    assert_eq!(talk.say_bytes(b"X3000,3:a}\x03b"), ["OK"]);
    assert_eq!(talk.ask("m3000,3"), "612362");
    assert_eq!(talk.ask("M7ffe,4:00000000"), "E.trapline.0x7ffe is not mapped");
    assert_eq!(talk.ask("Mffffffffffffffff,2:0000"), "E.trapline.there is no memory at 0xffffffffffffffff");
}

#[test]
fn physical_memory() {
    let mut talk = Conversation::attached();
    assert_eq!(talk.ask("qqemu.PhyMemMode"), "0");
    assert_eq!(talk.ask("Qqemu.PhyMemMode:1"), "OK");
    assert_eq!(talk.ask("qqemu.PhyMemMode"), "1");
    assert_eq!(talk.ask("M8000,2:cafe"), "OK");
    assert_eq!(talk.ask("m8000,2"), "cafe");
    assert_eq!(talk.ask("mfffe,8"), "0000");
    assert_eq!(talk.ask("m10000,1"), "E0e");
    assert_eq!(talk.ask("Qqemu.PhyMemMode:0"), "OK");
    assert_eq!(talk.ask("m8000,2"), "E0e");
    assert_eq!(talk.ask(&format!("m{:x},2", KERNEL + 0x8000)), "cafe");
}

#[test]
fn threads() {
    let mut fake = Fake::stopped(12);
    fake.set_activity(1, Activity::Halted);
    fake.set_activity(2, Activity::WaitForSipi);
    fake.set_activity(3, Activity::Other(9));
    fake.register_file(4).ss.attributes |= 3 << 5;
    let mut talk = Conversation::with(fake);
    talk.connect();
    talk.say("qSupported:multiprocess+");
    talk.say("QStartNoAckMode");
    talk.raw(b"+");
    talk.transcript.clear();
    for packet in [
        "qfThreadInfo",
        "qsThreadInfo",
        "Tp1.c",
        "Tp1.d",
        "qC",
        "Hgp1.c",
        "qC",
        "qThreadExtraInfo,p1.2",
        "qXfer:threads:read::0,4000",
        "qXfer:threads:read::4000,4000",
    ] {
        talk.say(packet);
    }
    // In pieces it is the same.
    let whole = talk.ask("qXfer:threads:read::0,4000");
    let (mut pieces, mut at) = (String::new(), 0);
    loop {
        let piece = talk.ask(&format!("qXfer:threads:read::{at:x},20"));
        pieces.push_str(&piece[1..]);
        at += 0x20;
        if piece.starts_with('l') {
            break;
        }
    }
    assert_eq!(pieces, whole[1..]);
    talk.transcript.truncate(talk.transcript.find("-> qXfer:threads:read::0,20").unwrap());
    assert_snapshot!(talk.transcript);
}

#[test]
fn without_multiprocess_threads_are_plain_numbers() {
    let mut talk = Conversation::with(Fake::stopped(2));
    talk.connect();
    talk.say("QStartNoAckMode");
    talk.raw(b"+");
    assert_eq!(talk.ask("qfThreadInfo"), "m01,02");
    assert!(talk.ask("?").starts_with("T05thread:1;core:0;"));
    assert!(talk.ask("qXfer:threads:read::0,1000").contains("id=\\\"2\\\""));
}

/// The guest's own ends: each can be looked at, then the run ends.
#[test]
fn how_a_guest_ends() {
    let mut transcript = String::new();
    for (what, to, status) in [("an exit status", EXIT, 7), ("a triple fault", UD2, 0)] {
        let mut talk = Conversation::attached();
        talk.say(&format!("P10={}", hex(to)));
        talk.say(&format!("P0={}", hex(status)));
        talk.transcript.clear();
        talk.say("vCont;c");
        for reply in talk.run(5) {
            if reply.starts_with('O') {
                talk.transcript.push_str(&format!("   {}", console(&reply)));
            }
        }
        assert!(!talk.seen().running);
        talk.say("p10");
        talk.say("?");
        for reply in talk.say("vCont;C0f:p1.1;c:p1.-1") {
            if reply.starts_with('O') {
                talk.transcript.push_str(&format!("   {}", console(&reply)));
            }
        }
        assert!(talk.is_closed());
        assert_eq!(talk.outcomes.last(), Some(&Outcome::Ended));
        assert_eq!(talk.seen().detached, 0);
        transcript.push_str(&format!("== {what}\n{}", talk.transcript));
    }
    assert_snapshot!(transcript);
}

fn hex(value: u64) -> String {
    value.to_le_bytes().map(|b| format!("{b:02x}")).concat()
}

#[test]
fn what_happens_is_said_in_words() {
    let mut said = String::new();
    for reason in [
        StopReason::GuestPanic,
        StopReason::GuestExit(3),
        StopReason::GuestShutdown { reset: false },
        StopReason::GuestShutdown { reset: true },
        StopReason::Crash(Crash::TripleFault { state_lost: true }),
        StopReason::Crash(Crash::EmulationFailure { bytes: vec![0x0f, 0xae, 0xe8] }),
        StopReason::Crash(Crash::FailEntry { reason: 0x8000_0021 }),
        StopReason::Crash(Crash::Internal { suberror: 4 }),
        StopReason::Crash(Crash::UnknownExit { reason: 99 }),
        StopReason::Crash(Crash::RunFailed { errno: 14 }),
    ] {
        let mut talk = Conversation::attached();
        talk.say("vCont;c");
        let replies = talk.happens(1, reason);
        assert_eq!(replies.len(), 2, "{replies:?}");
        said.push_str(&format!("{} {}", &replies[1][..3], console(&replies[0])));
    }
    assert_snapshot!(said);
}

/// A stop that comes while the client thinks that the guest stands is told at the next resumption.
#[test]
fn a_stop_out_of_turn_waits() {
    let mut talk = Conversation::attached();
    let stop = trapline_vmm::debug::Stop::new(VcpuId(3), StopReason::GuestPanic);
    let outcome = talk.server.on_stop(stop, &mut talk.target).unwrap();
    assert_eq!(outcome, Outcome::Continue);
    assert_eq!(talk.replies(), [""; 0]);
    assert!(talk.ask("?").starts_with("T05thread:p1.1;"));
    assert!(talk.say("vCont;c")[1].starts_with("T06thread:p1.4;"));
    assert!(!talk.seen().running);
}

#[test]
fn a_resumption_that_fails_is_told() {
    let mut talk = Conversation::attached();
    talk.target.failing_resume = Some("vCPU 2 did not answer within 5 s".into());
    assert_eq!(talk.ask("Hg3"), "OK");
    assert_eq!(talk.ask("p0"), "a000000002000000");
    assert_eq!(talk.ask("vCont;c"), "E.trapline.vCPU 2 did not answer within 5 s");
    // The client can go on where it was.
    assert_eq!(talk.ask("p0"), "a000000002000000");
    assert!(talk.ask("?").starts_with("T05"));
    assert_eq!(talk.say("vCont;c"), [""; 0]);
    assert!(talk.seen().running);
}

#[test]
fn a_guest_that_cannot_be_stopped_or_let_go() {
    let why = || Some("vCPU 1 did not answer within 5 s".to_owned());
    let mut talk = Conversation::new(2);
    talk.target.failing_stop = why();
    talk.connect();
    assert_eq!(
        talk.ask_acked("qSupported:multiprocess+"),
        "E.trapline.the guest cannot be stopped: vCPU 1 did not answer within 5 s"
    );
    assert!(talk.is_closed() && talk.seen().running && !talk.server.is_attached());

    // Ctrl-C: the debugger goes, and with it what it has set.
    let mut talk = Conversation::attached();
    talk.say("Z1,1234,1");
    talk.say("vCont;c");
    talk.target.failing_stop = why();
    assert_eq!(talk.raw(b"\x03"), [""; 0]);
    assert!(talk.is_closed() && talk.seen().running && talk.seen().armed.is_empty());

    // A detach that fails leaves the debugger where it is.
    let mut talk = Conversation::attached();
    talk.target.failing_detach = why();
    assert_eq!(talk.ask("D"), "E.trapline.vCPU 1 did not answer within 5 s");
    assert!(talk.server.is_attached());
    // One that is gone cannot be told: the owner of the guest is.
    talk.target.failing_detach = why();
    let error = talk.server.disconnect(&mut talk.target).unwrap_err();
    assert_eq!(error.to_string(), "vCPU 1 did not answer within 5 s");
}

#[test]
fn while_the_guest_runs_only_leaving_makes_sense() {
    let mut talk = Conversation::attached();
    talk.say("vCont;c");
    for packet in ["g", "m1000,4", "vCont;c", "Z1,1000,1", "?", "qfThreadInfo", "Qqemu.PhyMemMode:1", "P0=00"] {
        assert_eq!(talk.ask(packet), "E01", "{packet}");
    }
    assert_eq!(talk.ask("vMustReplyEmpty"), "");
    assert!(talk.seen().running);
    assert_eq!(talk.ask("D"), "OK");
    assert!(talk.seen().running && talk.seen().detached == 1);
}

#[test]
fn monitor() {
    let mut fake = Fake::stopped(2);
    fake.set_activity(1, Activity::Halted);
    let mut talk = Conversation::with(fake);
    talk.connect();
    talk.say("QStartNoAckMode");
    talk.raw(b"+");
    talk.say("Z1,1004,1");
    talk.say("Z2,3000,8");
    talk.say("vCont;c");
    talk.run(10);
    let mut said = String::new();
    for command in [
        "",
        "help",
        "status",
        "stops",
        "sysregs",
        "sysregs 1",
        "sysregs 2",
        "sysregs x",
        "physical on",
        "physical off",
        "reboot",
        "a\u{1b}[31mb",
    ] {
        let hex: String = command.bytes().map(|b| format!("{b:02x}")).collect();
        let replies = talk.say(&format!("qRcmd,{hex}"));
        assert_eq!(replies.len(), 2, "{command}: {replies:?}");
        assert_eq!(replies[1], "OK");
        said.push_str(&format!("(gdb) monitor {}\n{}", command.escape_debug(), console(&replies[0])));
    }
    assert_snapshot!(said);
}

#[test]
fn a_halted_vcpu_can_be_stopped_and_seen() {
    let mut talk = Conversation::attached();
    talk.say("Hg2");
    talk.say(&format!("P10={}", hex(HLT)));
    talk.say("vCont;c");
    talk.run(50);
    let reply = talk.raw(b"\x03");
    assert!(reply[0].starts_with("T02thread:p1.1;"), "{reply:?}");
    assert!(talk.ask("qXfer:threads:read::0,1000").contains("vCPU 1\\\">halted, 64-bit mode, ring 0<"));
}

#[test]
fn lldb_gets_its_errors_in_its_own_way() {
    let mut talk = Conversation::attached();
    assert_eq!(talk.ask("QEnableErrorStrings"), "OK");
    let reply = talk.ask("P12=33000000");
    let text: String = reply.strip_prefix("E16;").unwrap().to_owned();
    assert!(console(&format!("O{text}")).starts_with("cs is read-only"));
    // It has no way round a read watchpoint that is not there.
    let mut talk = Conversation::with(Fake::stopped(2));
    talk.connect();
    talk.say("qSupported:xmlRegisters=i386,arm,mips,arc;multiprocess+;fork-events+;vfork-events+");
    talk.say("QStartNoAckMode");
    talk.raw(b"+");
    assert_eq!(talk.ask("Z3,3000,8"), "OK");
    assert_eq!(talk.seen().armed, [Breakpoint::watch(0x3000, 8, Trigger::Read)]);
    talk.say("vCont;c:1");
    assert!(talk.run(20)[0].starts_with("T05thread:p1.1;core:0;rwatch:3000;06:"));
    assert_eq!(talk.ask("qHostInfo"), "triple:7838365f36342d756e6b6e6f776e2d6e6f6e65;endian:little;ptrsize:8;");
}

#[test]
fn newer_gdbs_get_words_everywhere() {
    let mut talk = Conversation::with(Fake::stopped(1));
    talk.connect();
    talk.say("qSupported:error-message+");
    talk.say("QStartNoAckMode");
    talk.raw(b"+");
    assert_eq!(talk.ask("m8000,4"), "E.there is no memory at 0x8000");
    assert_eq!(talk.ask("m"), "E.m needs an address and a length");
}

#[test]
fn a_second_debugger_is_refused_in_words() {
    use std::io::Read;
    let mut talk = Conversation::attached();
    let mut second = talk.another();
    talk.settle();
    std::io::Write::write_all(&mut second, &frame(b"qSupported")).unwrap();
    talk.settle();
    let mut said = String::new();
    second.read_to_string(&mut said).unwrap();
    assert_eq!(said, "+$E.trapline.another debugger is attached; detach it first#b9");
    // The first has noticed nothing.
    assert!(talk.ask("?").starts_with("T05"));
    assert_eq!(talk.outcomes, [Outcome::Attached]);
}

/// A debugger whose end nobody has read yet does not keep out the one that comes after it; and
/// what it said last counts.
#[test]
fn one_goes_as_another_comes() {
    for (last_words, outcome) in [(&b""[..], Outcome::Detached), (b"$k#6b", Outcome::Killed)] {
        let mut talk = Conversation::attached();
        talk.say("Z1,1004,1");
        let listener = talk.server.interests().next().unwrap().fd;
        let second = talk.hand_over(last_words);
        assert_eq!(talk.server.on_ready(listener, &mut talk.target).unwrap(), outcome);
        assert!(!talk.server.is_attached() && talk.seen().armed.is_empty() == (outcome == Outcome::Detached));
        drop(second);
    }
}

/// A port scanner does not stop the guest, and does not keep a debugger out.
#[test]
fn who_says_nothing_is_no_debugger() {
    let mut talk = Conversation::new(2);
    let scanner = talk.another();
    talk.settle();
    let mut web = talk.another();
    talk.settle();
    std::io::Write::write_all(&mut web, b"GET / HTTP/1.1\r\nHost: guest\r\n\r\n\x03").unwrap();
    talk.settle();
    assert!(talk.seen().running && !talk.server.is_attached());
    talk.connect();
    assert!(talk.ask_acked("?").starts_with("T05"));
    assert!(!talk.seen().running);
    drop((scanner, web));
    talk.settle();
    assert!(talk.server.is_attached());
}

/// A request for 8 KiB that no run-length encoding shortens, among so much noise that few of
/// them fill the socket.
fn greedy() -> Vec<u8> {
    [frame(b"m4000,1fff"), b"noise".repeat(200)].concat()
}

impl Conversation {
    fn with_random_memory() -> Self {
        let mut talk = Conversation::attached();
        let bytes: String =
            (0..0x1000u32).map(|i| format!("{:02x}", (i.wrapping_mul(2_654_435_761) >> 24) as u8)).collect();
        assert_eq!(talk.ask(&format!("M4000,1000:{bytes}")), "OK");
        assert_eq!(talk.ask(&format!("M5000,1000:{bytes}")), "OK");
        talk
    }
}

/// A client that asks and does not read is not listened to, holds nobody up, and costs little.
#[test]
fn a_client_that_does_not_read() {
    let mut talk = Conversation::with_random_memory();
    let flood = greedy().repeat(1000);
    let taken = talk.stuff(&flood);
    assert!(taken < flood.len(), "the server took {taken} bytes of requests and nobody read a reply");
    assert!(talk.server.has_output());
    assert!(talk.server.interests().all(|i| i.id == 0 || (!i.readable && i.writable)));
    // When it reads, everything is there, in order.
    let replies = talk.replies();
    assert_eq!(replies.len(), taken.div_ceil(greedy().len()));
    assert!(replies.iter().all(|r| r == &replies[0] && r.len() == 2 * 0x1ffe), "all alike");
    // If it goes instead, that is noticed.
    talk.send(b"$"); // whatever was cut
    assert!(talk.stuff(&flood) < flood.len());
    talk.vanish();
    assert_eq!(talk.outcomes, [Outcome::Attached, Outcome::Detached]);
    assert!(talk.seen().running);
}

/// The stop of a guest whose client does not read waits behind what the client asked for.
#[test]
fn a_stop_for_a_client_that_does_not_read() {
    let mut talk = Conversation::with_random_memory();
    let mut wire = frame(b"m4000,1fff").repeat(4);
    wire.extend(frame(b"Z1,1004,1"));
    wire.extend(frame(b"vCont;c"));
    assert_eq!(talk.stuff(&wire), wire.len());
    assert!(talk.seen().running);
    let stop = talk.target.run(10).unwrap();
    assert_eq!(talk.server.on_stop(stop, &mut talk.target).unwrap(), Outcome::Continue);
    let replies = talk.replies();
    assert_eq!(replies.len(), 6);
    assert!(replies[5].starts_with("T05thread:p1.1;core:0;hwbreak:;"), "{replies:?}");
}

#[test]
fn sent_away_by_the_vmm() {
    let mut talk = Conversation::attached();
    talk.say("Z1,1004,1");
    let outcome = talk.server.disconnect(&mut talk.target).unwrap();
    assert_eq!(outcome, Outcome::Detached);
    assert!(talk.seen().running && talk.seen().armed.is_empty() && talk.is_closed());
    let outcome = talk.server.disconnect(&mut talk.target).unwrap();
    assert_eq!(outcome, Outcome::Continue);
}

#[test]
fn the_increment_is_where_the_tests_think() {
    let mut talk = Conversation::attached();
    talk.say(&format!("Z1,{INCREMENT:x},1"));
    talk.say("vCont;c:1");
    assert!(talk.run(20)[0].contains("10:0810000000000000;"));
    assert_eq!(talk.target.counter(), 0);
}
