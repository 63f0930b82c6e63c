//! What clients can make the VMM allocate. A process of its own, because it is measured.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test")]

mod support;

use support::fake::Fake;
use support::raw::{Conversation, frame};

/// Resident memory of this process, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

/// Megabytes of everything, and the VMM's memory does not follow.
#[test]
fn memory_stays_small() {
    const BOUND: usize = 8 << 20;
    let mut talk = Conversation::attached();
    let before = resident();
    let grown = |what: &str| {
        let grown = resident().saturating_sub(before);
        assert!(grown < BOUND, "{what}: {} KiB more", grown >> 10);
        println!("{what}: {} KiB more", grown >> 10);
    };

    talk.send(b"$M1000,");
    for _ in 0..1024 {
        talk.send(&[b'0'; 1 << 15]);
    }
    grown("a packet without end");

    talk.send(b"#00");
    talk.bytes();
    assert!(talk.ask("?").starts_with("T05"), "it is still served");
    for addr in 0..20_000u64 {
        talk.send(&frame(format!("Z1,{addr:x},1").as_bytes()));
        talk.bytes();
    }
    grown("breakpoints");

    for n in 0..20_000 {
        talk.send(&frame(b"vCont;s:1"));
        talk.run_quietly(1);
        talk.bytes();
        if n % 100 == 0 {
            talk.transcript.clear();
        }
    }
    grown("stops");

    // Asked for much, and nothing read.
    let flood = frame(b"qXfer:features:read:target.xml:0,fff").repeat(20_000);
    talk.stuff(&flood);
    grown("replies that nobody reads");

    let idle: Vec<_> = (0..200)
        .map(|_| {
            let stream = talk.another();
            talk.settle();
            stream
        })
        .collect();
    grown("connections");
    drop(idle);
    assert!(talk.server.is_attached());
    talk.vanish();
    assert!(talk.seen().running);
}

/// A client may ask for the last packet again, and again.
#[test]
fn retransmissions_are_not_multiplied() {
    let mut talk = Conversation::with(Fake::stopped(1));
    talk.connect();
    talk.send(&frame(b"g"));
    let reply = talk.bytes().len();
    talk.send(&b"-".repeat(1000));
    let again = talk.bytes().len();
    assert!((1..=1000 * reply).contains(&again) && again < 10 * reply, "{again} bytes for 1000 bytes");
}

impl Conversation {
    fn run_quietly(&mut self, rounds: usize) {
        if let Some(stop) = self.target.run(rounds) {
            let _ = self.server.on_stop(stop, &mut self.target).unwrap();
            self.settle();
        }
    }
}
