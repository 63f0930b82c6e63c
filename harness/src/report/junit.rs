//! JUnit's XML, as CI systems read it.
//!
//! Suites: `boot` (did the guest come up and end as it should), `traps` (one test for each rule), and one for each suite of tests
//! that the guest reported. What depends on the moment is in the attributes `time` and `timestamp` and in `<system-out>` alone.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::Duration;

use chrono::DateTime;
use quick_junit::{NonSuccessKind, TestCase, TestCaseStatus, TestSuite};

use super::words;
use super::{Outcome, Report, TestRecord, TestResult, TrapRecord, VerdictKind};

impl Report {
    /// Writes junit.xml.
    pub fn write_junit(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut document = quick_junit::Report::new("trapline");
        if let Some(started) = i64::try_from(self.timing.started).ok().and_then(|at| DateTime::from_timestamp(at, 0)) {
            document.set_timestamp(started.fixed_offset());
        }
        document.set_time(Duration::from_millis(self.timing.duration_ms));
        document.add_test_suite(boot(self));
        if !self.traps.is_empty() {
            let mut suite = TestSuite::new("traps");
            suite.add_test_cases(self.traps.iter().enumerate().map(|(index, trap)| trap_case(self, index, trap)));
            document.add_test_suite(suite);
        }
        document.add_test_suites(guest_suites(&self.tests));
        // What a guest says may hold characters that no XML may have, not even as references.
        let text = document.to_string().map_err(io::Error::other)?;
        out.write_all(text.replace(|char| !is_xml(char), "").as_bytes())
    }
}

/// XML 1.0, production 2.
fn is_xml(char: char) -> bool {
    matches!(char, '\t' | '\n' | '\r' | '\u{20}'..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..)
}

/// What is not about one rule or one of the guest's tests.
fn boot(report: &Report) -> TestSuite {
    let mut suite = TestSuite::new("boot");
    let verdict = &report.verdict;
    suite.add_property(("kernel", report.input.kernel.as_str()));
    for (name, value) in [("release", &report.input.release), ("build-id", &report.input.build_id)] {
        if let Some(value) = value {
            suite.add_property((name, value.as_str()));
        }
    }
    suite.add_property(("exit-code", verdict.exit_code.to_string().as_str()));
    suite.set_time(Duration::from_millis(report.timing.duration_ms));

    // A run that did not pass is red in one place: where the reason is, else here.
    let elsewhere = verdict.guest_status.is_some_and(|status| status != 0)
        || report.traps.iter().any(|trap| trap.outcome != Outcome::Passed);
    let kind = match verdict.kind {
        _ if verdict.exit_code == 0 => None,
        VerdictKind::Timeout | VerdictKind::Died | VerdictKind::Killed | VerdictKind::Aborted => {
            Some(NonSuccessKind::Error)
        }
        _ if elsewhere => None,
        _ => Some(NonSuccessKind::Failure),
    };
    let mut case = match kind {
        Some(kind) => decisive_case("run", kind, report),
        None => TestCase::new("run", TestCaseStatus::success()),
    };
    case.set_classname("boot").set_time(Duration::from_millis(report.timing.duration_ms));
    suite.add_test_case(case);

    if let Some(status) = verdict.guest_status {
        let name = "guest status";
        let mut case = match status {
            0 => TestCase::new(name, TestCaseStatus::success()),
            _ => decisive_case(name, NonSuccessKind::Failure, report),
        };
        case.set_classname("boot");
        suite.add_test_case(case);
    }
    for problem in &report.problems {
        let mut case = TestCase::new("report", failure(NonSuccessKind::Error, problem, ""));
        case.set_classname("boot");
        suite.add_test_case(case);
    }
    suite
}

fn trap_case(report: &Report, index: usize, trap: &TrapRecord) -> TestCase {
    let decided = report.verdict.trap == Some(index);
    let name = trap.name.as_str();
    let mut case = match trap.outcome {
        Outcome::Passed => TestCase::new(name, TestCaseStatus::success()),
        Outcome::Fired if decided => decisive_case(name, NonSuccessKind::Failure, report),
        Outcome::Fired => TestCase::new(name, failure(NonSuccessKind::Failure, "it fired", "")),
        Outcome::Missed => {
            let why = "it was to be hit and never was";
            TestCase::new(name, failure(NonSuccessKind::Error, why, &words::targets(trap)))
        }
    };
    case.set_classname("traps");
    if trap.name != trap.rule {
        case.add_property(("rule", trap.rule.as_str()));
    }
    case
}

/// The test that has ended the run: what stopped there, and beside it what every vCPU was doing, which is another in each run.
fn decisive_case(name: &str, kind: NonSuccessKind, report: &Report) -> TestCase {
    let mut case = TestCase::new(name, failure(kind, &report.verdict.text, &words::stop(report)));
    let vcpus = words::vcpus(report);
    if !vcpus.is_empty() {
        case.set_system_out(vcpus);
    }
    case
}

fn failure(kind: NonSuccessKind, message: &str, text: &str) -> TestCaseStatus {
    let mut status = TestCaseStatus::non_success(kind);
    status.set_message(message);
    if !text.is_empty() {
        status.set_description(text);
    }
    status
}

/// One suite for each stretch of tests that are in the same one.
fn guest_suites(tests: &[TestRecord]) -> Vec<TestSuite> {
    let mut suites: Vec<(String, TestSuite)> = Vec::new();
    let mut places = std::collections::BTreeMap::new();
    for test in tests {
        let name = suite_name(test);
        let at = *places.entry(name.clone()).or_insert_with(|| {
            suites.push((name.clone(), TestSuite::new(name.as_str())));
            suites.len() - 1
        });
        let mut case = TestCase::new(words::test_name(test), guest_status(test));
        case.set_classname(name.as_str());
        suites[at].1.add_test_case(case);
    }
    suites.into_iter().map(|(_, suite)| suite).collect()
}

/// `guest`, the number of the stream if it is not the first, and the suites.
fn suite_name(test: &TestRecord) -> String {
    let mut name = "guest".to_owned();
    if test.stream > 1 {
        let _ = write!(name, " {}", test.stream);
    }
    for suite in &test.suite {
        name.push_str(" / ");
        name.push_str(suite);
    }
    name
}

fn guest_status(test: &TestRecord) -> TestCaseStatus {
    let message = test.message.as_deref().unwrap_or_default();
    let (first, _) = message.split_once('\n').unwrap_or((message, ""));
    match test.result {
        TestResult::Ok => TestCaseStatus::success(),
        TestResult::Failed => {
            failure(NonSuccessKind::Failure, if first.is_empty() { "not ok" } else { first }, message)
        }
        TestResult::Missing => failure(NonSuccessKind::Error, "the plan has it, and it never reported", message),
        TestResult::Skipped | TestResult::Todo => {
            let mut status = TestCaseStatus::skipped();
            if !message.is_empty() {
                status.set_message(message);
            }
            status
        }
    }
}
