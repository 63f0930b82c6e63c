//! Clients that mean no good: whatever they send, the VMM lives, its memory stays small, and
//! once they are gone the guest runs and nothing is left of them.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test")]

mod support;

use proptest::prelude::*;
use support::fake::Fake;
use support::raw::{Conversation, frame};
use trapline_gdbstub_glue::Outcome;

/// Pieces of packets, well-formed and not.
fn packet() -> impl Strategy<Value = Vec<u8>> {
    let number = || {
        prop_oneof![
            Just("0".to_owned()),
            Just("1".to_owned()),
            Just("1004".to_owned()),
            Just("3000".to_owned()),
            Just("7ff8".to_owned()),
            Just("ffffffffffffffff".to_owned()),
            Just("-1".to_owned()),
            Just(String::new()),
            "[0-9a-f]{1,18}",
        ]
    };
    let thread =
        || prop_oneof![number(), number().prop_map(|n| format!("p1.{n}")), number().prop_map(|n| format!("p{n}.1"))];
    let action = || {
        prop_oneof![
            Just("c".to_owned()),
            Just("s".to_owned()),
            Just("C05".to_owned()),
            Just("t".to_owned()),
            (number(), number()).prop_map(|(a, b)| format!("r{a},{b}")),
        ]
    };
    prop_oneof![
        4 => prop_oneof![
            Just("qSupported:multiprocess+;swbreak+;hwbreak+"), Just("qSupported"), Just("QStartNoAckMode"), Just("?"), Just("g"),
            Just("vCont?"), Just("vCont;c"), Just("qC"), Just("qfThreadInfo"), Just("qsThreadInfo"), Just("QEnableErrorStrings"),
            Just("qXfer:threads:read::0,1000"), Just("qXfer:features:read:target.xml:0,fff"), Just("qHostInfo"), Just("c"), Just("s"),
            Just("Qqemu.PhyMemMode:1"), Just("Qqemu.PhyMemMode:0"), Just("qRcmd,737461747573"), Just("qRcmd,73746f7073"),
            Just("qRcmd,73797372656773"), Just("D"), Just("D;1"),
        ].prop_map(|p| p.as_bytes().to_vec()),
        2 => (prop_oneof![Just("m"), Just("M"), Just("X")], number(), number(), "[0-9a-f}]{0,20}")
            .prop_map(|(letter, a, b, data)| match letter { "m" => format!("m{a},{b}"), l => format!("{l}{a},{b}:{data}") }.into_bytes()),
        2 => (prop_oneof![Just('Z'), Just('z')], 0..6u8, number(), number()).prop_map(|(z, t, a, l)| format!("{z}{t},{a},{l}").into_bytes()),
        2 => (prop_oneof![Just("Hg"), Just("Hc"), Just("T"), Just("qThreadExtraInfo,")], thread()).prop_map(|(p, t)| format!("{p}{t}").into_bytes()),
        2 => proptest::collection::vec((action(), proptest::option::of(thread())), 1..4).prop_map(|actions| {
            let actions: Vec<_> = actions.into_iter().map(|(a, t)| t.map_or(a.clone(), |t| format!("{a}:{t}"))).collect();
            format!("vCont;{}", actions.join(";")).into_bytes()
        }),
        2 => (prop_oneof![Just("p"), Just("P"), Just("G")], 0..100usize, "[0-9a-fx]{0,40}")
            .prop_map(|(p, n, v)| match p { "p" => format!("p{n:x}"), "P" => format!("P{n:x}={v}"), _ => format!("G{v}") }.into_bytes()),
        1 => proptest::collection::vec(any::<u8>(), 0..60),
    ]
}

#[derive(Debug, Clone)]
enum Input {
    Packet(Vec<u8>),
    Bytes(Vec<u8>),
    CtrlC,
    Run,
    /// The client reads nothing from here on.
    Deaf,
}

fn input() -> impl Strategy<Value = Input> {
    prop_oneof![
        8 => packet().prop_map(Input::Packet),
        2 => proptest::collection::vec(prop_oneof![any::<u8>(), Just(b'$'), Just(b'#'), Just(b'+'), Just(b'-'), Just(3)], 0..40).prop_map(Input::Bytes),
        1 => Just(Input::CtrlC),
        2 => Just(Input::Run),
        1 => Just(Input::Deaf),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_left_of_any_client(inputs in proptest::collection::vec(input(), 0..40), stopped in any::<bool>()) {
        let fake = if stopped { Fake::stopped(4) } else { Fake::new(4) };
        let mut talk = Conversation::with(fake);
        talk.connect();
        let mut deaf = false;
        for input in inputs {
            match input {
                Input::Packet(body) => talk.send(&frame(&body)),
                Input::Bytes(bytes) => talk.send(&bytes),
                Input::CtrlC => talk.send(b"\x03"),
                Input::Run => { talk.run_quietly(20); }
                Input::Deaf => deaf = true,
            }
            if !deaf {
                talk.bytes();
            }
            // While a client is attached and the guest stands, it is the client's doing.
            let seen = talk.seen();
            prop_assert!(talk.server.is_attached() || seen.armed.is_empty());
        }
        talk.vanish();
        let seen = talk.seen();
        prop_assert!(!talk.server.is_attached());
        prop_assert!(seen.armed.is_empty());
        // One that attaches and detaches in one breath is told as detached.
        let detached = talk.outcomes.iter().filter(|o| **o == Outcome::Detached).count();
        // A client may kill, with a `k` among its noise, and may write code that ends the guest.
        let over = seen.killed || seen.ended;
        prop_assert!(seen.running || over || (detached == 0 && stopped), "{}", talk.transcript);
        prop_assert!(seen.detached == detached || over, "{}", talk.transcript);
        if over {
            return Ok(());
        }
        // And the next client finds a working stub.
        talk.connect();
        let replies = talk.say("?");
        prop_assert_eq!(replies.first().map(String::as_str), Some("+"));
    }
}

impl Conversation {
    fn run_quietly(&mut self, rounds: usize) {
        if let Some(stop) = self.target.run(rounds) {
            if self.server.is_attached() {
                let _ = self.server.on_stop(stop, &mut self.target).unwrap();
            }
            self.settle();
        }
    }
}
