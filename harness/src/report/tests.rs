//! Each form of fixed samples, and what a second run of the same input may change in it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

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

/// The tags of a page: name, whether it opens or closes, where it begins and ends.
fn tags(page: &str) -> Vec<(&str, bool, usize, usize)> {
    let body = page.find("</style>").unwrap();
    let tag = |(start, _): (usize, &str)| {
        let end = start + page[start..].find('>').unwrap() + 1;
        let inside = page[start + 1..end - 1].trim_end_matches('/');
        let (opens, name) = inside.strip_prefix('/').map_or((true, inside), |name| (false, name));
        (name.split([' ', '\n']).next().unwrap(), opens, start, end)
    };
    page[body..].match_indices('<').map(|(at, found)| tag((body + at, found))).collect()
}

/// Takes out every element with the attribute `data-timing`.
fn without_timed_elements(page: &str) -> String {
    let (mut kept, mut from, mut inside) = (String::new(), 0, None::<(&str, u32)>);
    for (name, opens, start, end) in tags(page) {
        match &mut inside {
            None if opens && page[start..end].contains(" data-timing") => {
                kept += &page[from..start];
                inside = Some((name, 1));
            }
            Some((timed, depth)) if *timed == name => {
                *depth = if opens { *depth + 1 } else { *depth - 1 };
                if *depth == 0 {
                    inside = None;
                    from = end;
                }
            }
            _ => {}
        }
    }
    kept + &page[from..]
}

#[test]
fn page() {
    let page = text(|out| samples::fired().write_page(out));
    insta::assert_snapshot!(page[page.find("<title>").unwrap()..]);
}

/// Whatever stands in a report, the page has the elements that we write, each closed where it belongs, and asks for
/// nothing from anywhere.
#[test]
fn a_page_holds_hostile_words_where_they_are() {
    let ours = "html head meta style title body header div span h1 h2 h3 p nav a main section dl dt dd code ol li svg line \
                table thead tbody tr th td details summary b pre ul br footer";
    let attributes = regex::Regex::new(concat!(
        r#"^<[a-z0-9]+( (class|id|href|role|tabindex|viewBox|preserveAspectRatio|vector-effect|[xy][12])="[^"<>]*""#,
        r"| data-timing| open)*/?>$"
    ))
    .unwrap();
    for (name, report) in samples::all() {
        let page = text(|out| report.write_page(out));
        let mut open = Vec::new();
        for (tag, opens, start, end) in tags(&page) {
            let at = &page[start..].chars().take(80).collect::<String>();
            assert!(ours.split_whitespace().any(|known| known == tag), "{name}: {at}");
            assert!(!opens || attributes.is_match(&page[start..end]), "{name}: {at}");
            match (opens, tag) {
                _ if page[..end].ends_with("/>") => {}
                (_, "br" | "meta") => {}
                (true, _) => open.push(tag),
                (false, "style" | "head" | "html") => {}
                (false, _) => assert_eq!(open.pop(), Some(tag), "{name}: {at}"),
            }
        }
        assert_eq!(open, [""; 0], "{name}");
        assert!(!page.contains("http") || page.matches("http").count() == page.matches("http-equiv").count(), "{name}");
        assert!(!page.contains("url(") && !page.contains("@import"), "{name}");
        assert!(page.chars().all(|char| char == '\n' || char == '\t' || !char.is_control()), "{name}");
    }
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
    let moment = regex::Regex::new(r#"(?s) (time|timestamp)="[^"]*"|<system-out>.*?</system-out>"#).unwrap();
    for (name, report) in samples::all().into_iter().filter(|(name, _)| *name != "hostile") {
        let again = samples::at_another_moment(report.clone());
        assert_ne!(json(&report), json(&again), "{name}");
        assert_eq!(without_timing(json(&report)), without_timing(json(&again)), "{name}");

        let junit = |report: &Report| moment.replace_all(&text(|out| report.write_junit(out)), "").into_owned();
        assert_eq!(junit(&report), junit(&again), "{name}");

        let page = |report: &Report| text(|out| report.write_page(out));
        assert_ne!(page(&report), page(&again), "{name}");
        assert_eq!(without_timed_elements(&page(&report)), without_timed_elements(&page(&again)), "{name}");
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
    for kind in [GuestFailed, Trap, Panic, Timeout, Died, MustHit, Killed, Aborted] {
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

#[test]
fn annotations() {
    let paths = SourcePaths::default().strip("/build/linux-6.12.57");
    insta::assert_snapshot!(text(|out| samples::fired().write_annotations(out, &paths)));
}

#[test]
fn annotations_keep_hostile_words_where_they_are() {
    for (name, report) in samples::all() {
        let commands = text(|out| report.write_annotations(out, &SourcePaths::default()));
        assert!(commands.lines().count() <= 10, "{name}");
        for command in commands.lines() {
            assert!(command.starts_with("::error ") && !command.chars().any(char::is_control), "{command}");
            let (properties, _) = command["::error ".len()..].split_once("::").unwrap();
            let keys: Vec<_> = properties.split(',').map(|pair| pair.split_once('=').unwrap().0).collect();
            assert!(keys == ["title"] || keys == ["file", "line", "title"], "{command}");
        }
    }
}

#[test]
fn summary() {
    insta::assert_snapshot!(samples::fired().summary(Style::Plain));
}

#[test]
fn summary_of_others() {
    let [pass, timeout] = [samples::pass(), samples::timeout()].map(|report| report.summary(Style::Plain));
    insta::assert_snapshot!(format!("{pass}\n{timeout}"));
}

#[test]
fn summary_in_colours() {
    let coloured = samples::fired().summary(Style::Coloured);
    assert!(coloured.contains("\u{1b}[1;31mFAIL\u{1b}[0m"));
    let escapes = regex::Regex::new("\u{1b}\\[[0-9;]*m").unwrap();
    let plain = samples::fired().summary(Style::Plain);
    let trimmed = |text: &str| text.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>();
    assert_eq!(trimmed(&escapes.replace_all(&coloured, "")), trimmed(&plain));
}

#[test]
fn a_terminal_sees_text_only() {
    for (name, report) in samples::all() {
        let summary = report.summary(Style::Plain);
        assert!(summary.chars().all(|char| char == '\n' || char == '\t' || !char.is_control()), "{name}");
        assert!(!summary.contains('\u{202e}') && summary.lines().count() < 80, "{name}: {summary}");
    }
}

/// What the events of a run like the sample's are.
fn events(report: &Report) -> Vec<(Duration, Event<'_>)> {
    let mut events =
        vec![(Duration::ZERO, Event::Start { schema: SCHEMA, trapline: &report.trapline, input: &report.input })];
    for (trap, record) in report.traps.iter().enumerate() {
        events.push((Duration::from_micros(5), Event::Armed { trap, rule: &record.rule, targets: &record.targets }));
    }
    events.push((Duration::from_millis(812), Event::Boot {}));
    events.extend(report.timing.recent.iter().map(|hit| (Duration::from_micros(hit.timing.at_us), Event::Log(hit))));
    events.extend(report.timing.recent.iter().take(1).map(|hit| (Duration::from_secs(1), Event::Hit(hit))));
    events.extend(report.tests.iter().map(|test| (Duration::from_millis(test.timing.at_ms), Event::Test(test))));
    events.push((Duration::from_secs(2), Event::Panic { text: "x" }));
    events.extend(report.stop.iter().map(|stop| (Duration::from_secs(2), Event::Stop(stop))));
    events.push((Duration::from_secs(2), Event::Verdict(&report.verdict)));
    events
}

#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn ndjson(report: &Report) -> String {
    let kept = Kept::default();
    let mut writer = Events::new(kept.clone()).unwrap();
    for (at, event) in events(report) {
        writer.emit(at, event);
    }
    assert_eq!(writer.finish(Duration::from_secs(60)), None);
    let text = kept.0.lock().unwrap().clone();
    String::from_utf8(text).unwrap()
}

#[test]
fn events_are_lines_of_json() {
    insta::assert_snapshot!(ndjson(&samples::fired()));
}

#[test]
fn events_of_two_runs_differ_in_timing_only() {
    // Those of the recent hits aside: a run may have had more of them.
    let lines = |report: &Report| -> Vec<Value> {
        let all = ndjson(report);
        let lines = all.lines().map(|line| without_timing(serde_json::from_str(line).unwrap()));
        lines.filter(|line| line["event"] != "log").collect()
    };
    let report = samples::fired();
    assert_eq!(lines(&report), lines(&samples::at_another_moment(report.clone())));
}

/// A reader that never reads, and one that has gone.
#[test]
fn events_do_not_wait_for_their_reader() {
    use std::os::unix::net::UnixStream;
    let report = samples::fired();
    let (stuck, _reader) = UnixStream::pair().unwrap();
    let mut writer = Events::new(stuck).unwrap();
    for _ in 0..20_000 {
        writer.emit(Duration::ZERO, Event::Hit(&report.timing.recent[0]));
    }
    assert!(writer.lost > 0);
    assert!(writer.finish(Duration::from_millis(50)).unwrap().contains("nobody reads them"));

    let (gone, reader) = UnixStream::pair().unwrap();
    drop(reader);
    let mut writer = Events::new(gone).unwrap();
    for _ in 0..20_000 {
        writer.emit(Duration::ZERO, Event::Boot {});
    }
    assert!(writer.finish(Duration::from_secs(60)).unwrap().contains("not complete: Broken pipe"));
}

/// Compares a schema with the one in docs/, or writes that.
fn in_step(name: &str, schema: &Value) {
    let path = format!("{}/../docs/{name}", env!("CARGO_MANIFEST_DIR"));
    let now = serde_json::to_string_pretty(schema).unwrap() + "\n";
    if std::env::var_os("TRAPLINE_WRITE_SCHEMA").is_some() {
        std::fs::write(path, now).unwrap();
    } else {
        let kept = std::fs::read_to_string(path).unwrap_or_default();
        assert!(kept == now, "docs/{name} is out of step: run this test with TRAPLINE_WRITE_SCHEMA=1");
    }
}

/// Checks values by a schema: each fits.
fn fit(schema: Value, values: impl IntoIterator<Item = Value>, spoiled: &[&dyn Fn(&mut Value)]) {
    let (mut schemas, mut compiler) = (boon::Schemas::new(), boon::Compiler::new());
    compiler.add_resource("schema.json", schema).unwrap();
    let schema = compiler.compile("schema.json", &mut schemas).unwrap();
    for value in values {
        schemas.validate(&value, schema).unwrap_or_else(|error| panic!("{error}"));
        for spoil in spoiled {
            let mut wrong = value.clone();
            spoil(&mut wrong);
            assert!(schemas.validate(&wrong, schema).is_err(), "{wrong}");
        }
    }
}

/// docs/report-schema.json is what the types say, and a validator finds that every sample fits.
#[test]
fn the_reports_schema_is_in_step() {
    let schema = serde_json::to_value(schemars::schema_for!(Report)).unwrap();
    in_step("report-schema.json", &schema);
    fit(
        schema,
        samples::all().iter().map(|(_, report)| json(report)),
        &[
            &|report| report["verdict"]["kind"] = "fine".into(),
            &|report| drop(report.as_object_mut().unwrap().remove("timing")),
            &|report| report["traps"] = Value::Null,
        ],
    );
}

#[test]
fn the_events_schema_is_in_step() {
    let schema = serde_json::to_value(schemars::schema_for!(events::Line<'_>)).unwrap();
    in_step("events-schema.json", &schema);
    let all = ndjson(&samples::fired());
    fit(
        schema,
        all.lines().map(|line| serde_json::from_str(line).unwrap()),
        &[
            &|line| line["event"] = "else".into(),
            &|line| drop(line.as_object_mut().unwrap().remove("timing")),
            &|line| line["data"] = 7.into(),
        ],
    );
}
