//! Each form of fixed samples, and what a second run of the same input may change in it.

use serde_json::Value;

use crate::report;

#[path = "../../tests/samples/mod.rs"]
mod samples;

use super::*;

fn text(write: impl FnOnce(&mut dyn std::io::Write) -> std::io::Result<()>) -> String {
    let mut out = Vec::new();
    write(&mut out).unwrap();
    String::from_utf8(out).unwrap()
}

fn json(report: &Report) -> Value {
    serde_json::from_str(&text(|out| report.write_json(out))).unwrap()
}

/// Takes out every member named `timing`.
fn without_timing(mut value: Value) -> Value {
    match &mut value {
        Value::Object(members) => {
            members.remove("timing");
            members.values_mut().for_each(|member| *member = without_timing(member.take()));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| *item = without_timing(item.take())),
        _ => {}
    }
    value
}

#[test]
fn report_json() {
    insta::assert_snapshot!(text(|out| samples::fired().write_json(out)));
}

#[test]
fn report_json_is_read_back() {
    for (name, report) in samples::all() {
        assert_eq!(Report::read_json(&text(|out| report.write_json(out))).unwrap(), report, "{name}");
    }
    let newer = r#"{"schema": 1000, "verdict": 7}"#;
    assert!(Report::read_json(newer).unwrap_err().to_string().contains("use a newer one"));
    assert!(Report::read_json("[]").unwrap_err().to_string().contains("no report of trapline's"));
}

#[test]
fn two_runs_differ_in_timing_only() {
    let times = regex::Regex::new(r#" (time|timestamp)="[^"]*""#).unwrap();
    for (name, report) in samples::all().into_iter().filter(|(name, _)| *name != "hostile") {
        let again = samples::at_another_moment(report.clone());
        assert_ne!(json(&report), json(&again), "{name}");
        assert_eq!(without_timing(json(&report)), without_timing(json(&again)), "{name}");

        let junit = |report: &Report| times.replace_all(&text(|out| report.write_junit(out)), "").into_owned();
        assert_eq!(junit(&report), junit(&again), "{name}");
    }
}

#[test]
fn junit() {
    insta::assert_snapshot!(text(|out| samples::fired().write_junit(out)));
}

#[test]
fn junit_of_a_pass() {
    insta::assert_snapshot!(text(|out| samples::pass().write_junit(out)));
}

#[test]
fn junit_keeps_hostile_words_where_they_are() {
    let junit = text(|out| samples::hostile().write_junit(out));
    let allowed =
        |char: char| matches!(char, '\t' | '\n' | '\r' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..);
    assert!(junit.chars().all(allowed));
    assert!(!junit.contains("<script") && !junit.contains("<evil"));
    let document = quick_junit::Report::deserialize_from_str(&junit).unwrap();
    assert_eq!(document.test_suites[0].name.as_str(), "boot");
}

/// Whatever the reason, who looks at the JUnit alone sees that the run did not pass.
#[test]
fn junit_is_red_unless_the_run_passed() {
    use VerdictKind::*;
    for kind in [GuestFailed, Trap, Panic, Timeout, Died, MustHit, Killed] {
        let mut report = samples::empty();
        report.verdict.kind = kind;
        report.verdict.exit_code = 9;
        let red = |report: &Report| {
            let junit = quick_junit::Report::deserialize_from_str(&text(|out| report.write_junit(out))).unwrap();
            junit.failures + junit.errors
        };
        assert_eq!(red(&report), 1, "{kind:?}");
        report.verdict.exit_code = 0;
        assert_eq!(red(&report), 0, "{kind:?}");
    }
}

/// docs/report-schema.json is what the types say, and what a validator makes of it fits every sample.
#[test]
fn the_schema_is_in_step() {
    let schema = serde_json::to_value(schemars::schema_for!(Report)).unwrap();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/report-schema.json");
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    let now = serde_json::to_string_pretty(&schema).unwrap() + "\n";
    if std::env::var_os("TRAPLINE_WRITE_SCHEMA").is_some() {
        std::fs::write(path, &now).unwrap();
    } else {
        assert!(kept == now, "docs/report-schema.json is out of step: run this test with TRAPLINE_WRITE_SCHEMA=1");
    }

    let mut schemas = boon::Schemas::new();
    let mut compiler = boon::Compiler::new();
    compiler.add_resource("report-schema.json", schema).unwrap();
    let schema = compiler.compile("report-schema.json", &mut schemas).unwrap();
    for (name, report) in samples::all() {
        let report = json(&report);
        schemas.validate(&report, schema).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut wrong = report.clone();
        wrong["verdict"]["kind"] = "fine".into();
        assert!(schemas.validate(&wrong, schema).is_err());
        let mut wrong = report;
        wrong.as_object_mut().unwrap().remove("timing");
        assert!(schemas.validate(&wrong, schema).is_err());
    }
}
