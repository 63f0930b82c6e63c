//! What is passed on, what is kept, and what is found.

use std::io::Read;

use proptest::prelude::*;

use super::*;
use crate::report::TestResult;

/// A sink that others can look into.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<u8>>>);

impl Write for Seen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A pipe whose reader has gone.
struct Closed;

impl Write for Closed {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn listening(patterns: &[&str]) -> (ConsoleLog, ConsoleHandle) {
    let patterns = patterns.iter().map(|pattern| Regex::new(pattern).unwrap()).collect();
    ConsoleLog::new(io::sink(), ConsoleOptions { tail: 3, patterns, log: None }).unwrap()
}

fn texts(handle: &ConsoleHandle) -> Vec<String> {
    handle.tail().lines.into_iter().map(|line| line.text).collect()
}

#[test]
fn the_last_lines_are_kept_and_the_others_counted() {
    let (mut log, handle) = listening(&[]);
    log.write_all(b"one\r\ntwo\r\n\r\n\x1b[31mfour\x1b[0m\r\nfi").unwrap();
    assert_eq!(texts(&handle), ["two", "", "four", "fi"]);
    assert_eq!((handle.tail().before, handle.line_count()), (1, 5));
    assert_eq!(handle.last_line().unwrap().text, "fi");
    log.write_all(b"ve\n\n \n").unwrap();
    assert_eq!(handle.last_line().unwrap().text, "five");
    assert_eq!(handle.tail().before, 4);
}

#[test]
fn lines_are_stamped_from_the_start_on() {
    let (mut log, handle) = listening(&[]);
    log.write_all(b"before\n").unwrap();
    handle.start(Instant::now().checked_sub(Duration::from_secs(5)).unwrap());
    log.write_all(b"after\n").unwrap();
    let at: Vec<_> = handle.tail().lines.iter().map(|line| line.at_ms).collect();
    assert!(at[0] == 0 && at[1] >= 5000, "{at:?}");
}

#[test]
fn patterns_match_each_line_once_and_wake_the_loop() {
    let (mut log, handle) = listening(&["^login: ", "(?-u:\\xff)", "panic|oops"]);
    assert!(handle.event().read().is_err());
    log.write_all(b"no\nlogin: root\nbytes \xff\n").unwrap();
    assert_eq!(handle.event().read().unwrap(), 2);
    let found: Vec<_> = handle
        .events()
        .into_iter()
        .map(|event| match event {
            ConsoleEvent::Matched { pattern, number, line } => (pattern, number, line.text),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(found, [(0, 2, "login: root".to_owned()), (1, 3, "bytes \u{fffd}".to_owned())]);
    assert_eq!(handle.events(), []);
    assert_eq!(handle.matched(), [1, 1, 0]);
}

#[test]
fn a_prompt_matches_while_the_guest_waits_and_not_again() {
    let (mut log, handle) = listening(&["login: ", "done$"]);
    log.write_all(b"login: ").unwrap();
    assert_eq!(handle.matched(), [0, 0]);
    handle.check_partial();
    handle.check_partial();
    assert_eq!(handle.matched(), [1, 0]);
    log.write_all(b"x\nlogin: \nall done").unwrap();
    assert_eq!(handle.matched(), [2, 0]);
    handle.finish();
    assert_eq!(handle.matched(), [2, 1]);
}

#[test]
fn matches_are_counted_beyond_the_queue() {
    let (mut log, handle) = listening(&["x"]);
    for _ in 0..MAX_EVENTS + 10 {
        log.write_all(b"x\n").unwrap();
    }
    assert_eq!(handle.events().len(), MAX_EVENTS);
    assert_eq!(handle.matched(), [MAX_EVENTS as u64 + 10]);
}

#[test]
fn a_flood_drowns_no_match_and_no_test() {
    let (mut log, handle) = listening(&["BUG", "^ok"]);
    for n in 1..=MAX_EVENTS as u64 + 10 {
        log.write_all(format!("ok {n} a\n").as_bytes()).unwrap();
    }
    log.write_all(b"BUG: here\nBUG: there\nKernel panic - not syncing: x\n").unwrap();
    let events = handle.events();
    let matches = |wanted| {
        events
            .iter()
            .filter(|event| matches!(event, ConsoleEvent::Matched { pattern, .. } if *pattern == wanted))
            .count()
    };
    assert_eq!(matches(0), 1);
    assert!(events.iter().any(|event| matches!(event, ConsoleEvent::Panic { .. })));
    let tests = events.iter().filter(|event| matches!(event, ConsoleEvent::Test(_))).count();
    assert_eq!(tests, MAX_EVENTS + 10);
    let lost = MAX_EVENTS + 10 - matches(1) + 1;
    assert_eq!(
        handle.problems(),
        [format!("{lost} lines that a console: trap matches were not counted, they came too fast")]
    );
    log.write_all(b"BUG: again\n").unwrap();
    assert_eq!(handle.events().len(), 1);
}

#[test]
fn the_kernels_own_words() {
    let (mut log, handle) = listening(&[]);
    log.write_all(
        b"[    0.500000] Run /init as init process\n\
          [    1.000000][    T1] Kernel panic - not syncing: sysrq triggered crash\n\
          [    1.100000] Kernel panic - not syncing: another\n\
          [    2.000000] reboot: System halted\n",
    )
    .unwrap();
    assert_eq!(handle.panic().as_deref(), Some("sysrq triggered crash"));
    assert_eq!(handle.booted(), Some(Duration::ZERO));
    assert_eq!(handle.kernel_end(), Some(KernelEnd::Halt));
    assert_eq!(
        handle.events(),
        [ConsoleEvent::Booted { at_ms: 0 }, ConsoleEvent::Panic { text: "sysrq triggered crash".to_owned() }]
    );
}

#[test]
fn the_status_that_init_printed() {
    let (mut log, handle) = listening(&[]);
    log.write_all(b"trapline-init: exit 3").unwrap();
    assert_eq!(handle.program_status(), None, "the line may go on");
    log.write_all(b"9\r\n[    9.123456] reboot: Power down\r\n").unwrap();
    assert_eq!((handle.program_status(), handle.kernel_end()), (Some(39), Some(KernelEnd::PowerOff)));
}

#[test]
fn tests_are_told_as_they_come() {
    let (mut log, handle) = listening(&[]);
    log.write_all(b"TAP version 13\r\n1..2\r\nok 1 a\r\n").unwrap();
    assert!(matches!(&handle.events()[..], [ConsoleEvent::Test(test)] if test.name == "a"));
    handle.finish();
    let results: Vec<_> = handle.tests().into_iter().map(|test| test.result).collect();
    assert_eq!(results, [TestResult::Ok, TestResult::Missing]);
}

#[test]
fn every_byte_is_passed_on_and_logged() {
    let seen = Seen::default();
    let (file, mut reader) = {
        let file = tempfile::NamedTempFile::new().unwrap();
        (file.reopen().unwrap(), file.reopen().unwrap())
    };
    let options = ConsoleOptions { tail: 10, patterns: Vec::new(), log: Some(file) };
    let (mut log, handle) = ConsoleLog::new(seen.clone(), options).unwrap();
    let bytes = b"a\0\x1b[31m\xff\r\n\rpartial";
    for byte in bytes {
        log.write_all(&[*byte]).unwrap();
    }
    let mut logged = Vec::new();
    reader.read_to_end(&mut logged).unwrap();
    assert_eq!(logged, b"a\0\x1b[31m\xff\r\n", "whole lines reach the file at once");
    handle.finish();
    reader.read_to_end(&mut logged).unwrap();
    assert_eq!((&*logged, &*seen.0.lock().unwrap()), (&bytes[..], &bytes.to_vec()));
    assert_eq!(handle.problems(), [""; 0]);
}

#[test]
fn a_sink_or_a_log_that_fails_leaves_the_rest_working() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let options = ConsoleOptions { tail: 10, patterns: Vec::new(), log: Some(full) };
    let (mut log, handle) = ConsoleLog::new(Closed, options).unwrap();
    assert_eq!(log.write(b"heard\n").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    assert_eq!(texts(&handle), ["heard"]);
    let problems = handle.problems();
    assert!(
        problems.len() == 1 && problems[0].starts_with("the console's log is not complete: No space"),
        "{problems:?}"
    );
}

proptest! {
    #[test]
    fn any_guest_is_taken_in_any_pieces(bytes in prop::collection::vec(prop_oneof![3 => any::<u8>(), 1 => Just(b'\n')], 0..400), piece in 1usize..50) {
        let seen = Seen::default();
        let patterns = vec![Regex::new("a.b").unwrap()];
        let (mut log, handle) = ConsoleLog::new(seen.clone(), ConsoleOptions { tail: 5, patterns: patterns.clone(), log: None }).unwrap();
        let (mut whole, other) = ConsoleLog::new(io::sink(), ConsoleOptions { tail: 5, patterns, log: None }).unwrap();
        for piece in bytes.chunks(piece) {
            log.write_all(piece).unwrap();
        }
        whole.write_all(&bytes).unwrap();
        prop_assert_eq!(&*seen.0.lock().unwrap(), &bytes);
        handle.finish();
        other.finish();
        prop_assert_eq!(handle.tail(), other.tail());
        prop_assert_eq!(handle.matched(), other.matched());
        prop_assert!(handle.tail().lines.len() <= 5);
    }
}
