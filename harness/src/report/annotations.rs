//! Workflow commands of GitHub Actions: errors that appear beside the source lines of a change.

use std::io::{self, Write};
use std::sync::LazyLock;

use regex::Regex;

use super::words;
use super::{Outcome, Report, Source, TestRecord, TestResult, TrapRecord};

/// GitHub shows no more of one step.
const MAX_ERRORS: usize = 10;

/// How the compiler's paths become those of a repository.
#[derive(Debug, Clone, Default)]
pub struct SourcePaths {
    prefixes: Vec<String>,
}

impl SourcePaths {
    /// Those of the job that this process is part of, if GitHub Actions runs it: paths in its checkout.
    pub fn of_github() -> Option<Self> {
        let in_a_job = std::env::var("GITHUB_ACTIONS").is_ok_and(|value| value == "true");
        in_a_job.then(|| {
            std::env::var("GITHUB_WORKSPACE").map_or_else(|_| Self::default(), |path| Self::default().strip(&path))
        })
    }

    /// Paths below the directory `prefix` (where the kernel was built, or the checkout: `GITHUB_WORKSPACE`) become relative to
    /// it. Several may be named; the longest that fits counts.
    pub fn strip(mut self, prefix: &str) -> Self {
        let prefix = prefix.trim_end_matches('/');
        if !prefix.is_empty() {
            self.prefixes.push(prefix.to_owned());
        }
        self
    }

    /// The path in the repository; `None` if it is outside of it. A path that is relative already stays.
    pub fn relative(&self, file: &str) -> Option<String> {
        let below = |prefix: &String| file.strip_prefix(prefix.as_str()).and_then(|rest| rest.strip_prefix('/'));
        let inside = self.prefixes.iter().filter_map(below).min_by_key(|rest| rest.len()).unwrap_or(file);
        let mut parts: Vec<&str> = Vec::new();
        for part in inside.split('/') {
            match part {
                "." => {}
                // An empty part at the start is an absolute path.
                "" if parts.is_empty() => return None,
                "" => {}
                ".." => drop(parts.pop()?),
                part => parts.push(part),
            }
        }
        (!parts.is_empty()).then(|| parts.join("/"))
    }
}

impl Report {
    /// Writes a command for what ended the run, for each trap that was to be hit and was not, and for each failed test,
    /// to the job's log (stdout or stderr).
    pub fn write_annotations(&self, out: &mut dyn Write, paths: &SourcePaths) -> io::Result<()> {
        let errors = errors(self);
        let shown = if errors.len() > MAX_ERRORS { MAX_ERRORS - 1 } else { errors.len() };
        for error in &errors[..shown] {
            error.write(out, paths)?;
        }
        if shown < errors.len() {
            let message = format!("and {} more, in the report", errors.len() - shown);
            Annotation { title: "Trapline".to_owned(), message, source: None }.write(out, paths)?;
        }
        Ok(())
    }
}

/// The most important first.
fn errors(report: &Report) -> Vec<Annotation> {
    let mut errors = Vec::new();
    if report.verdict.exit_code != 0 {
        let decided = report.verdict.trap.and_then(|trap| report.traps.get(trap));
        let title = decided.map_or_else(|| words::kind(report.verdict.kind).to_owned(), |trap| trap.name.clone());
        let source = report.stop.as_ref().and_then(|stop| stop.source.clone());
        let stop = words::stop(report);
        let message =
            if stop.is_empty() { report.verdict.text.clone() } else { format!("{}\n{stop}", report.verdict.text) };
        errors.push(Annotation { title, message, source });
    }
    let told = |at: usize| report.verdict.exit_code != 0 && report.verdict.trap == Some(at);
    let others = report.traps.iter().enumerate().filter(|(at, trap)| trap.outcome == Outcome::Missed && !told(*at));
    errors.extend(others.map(|(_, trap)| missed(trap)));
    let failed = |test: &&TestRecord| matches!(test.result, TestResult::Failed | TestResult::Missing);
    errors.extend(report.tests.iter().filter(failed).map(failed_test));
    errors
}

fn missed(trap: &TrapRecord) -> Annotation {
    let message = format!("it was to be hit and never was\n{}", words::targets(trap));
    Annotation { title: trap.name.clone(), message, source: None }
}

fn failed_test(test: &TestRecord) -> Annotation {
    let message = match (&test.message, test.result) {
        (Some(message), _) => message.clone(),
        (None, TestResult::Missing) => "the plan has it, and it never reported".to_owned(),
        (None, _) => "not ok".to_owned(),
    };
    Annotation { title: words::test_path(test), source: named_source(&message), message }
}

/// The source line that a test names when it fails: KUnit's `at FILE:LINE`, kselftest's `FILE:LINE:`.
fn named_source(message: &str) -> Option<Source> {
    static PLACE: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"(?m)(?:\bat |^)([\w./+-]+\.(?:c|h|S|rs|cc|cpp)):([1-9]\d{0,8})\b").ok());
    let found = PLACE.as_ref()?.captures(message)?;
    Some(Source { file: found[1].to_owned(), line: found[2].parse().ok()? })
}

struct Annotation {
    title: String,
    message: String,
    source: Option<Source>,
}

impl Annotation {
    fn write(&self, out: &mut dyn Write, paths: &SourcePaths) -> io::Result<()> {
        let place = self.source.as_ref().and_then(|source| Some((paths.relative(&source.file)?, source.line)));
        let place = place.map(|(file, line)| format!("file={},line={line},", property(&file))).unwrap_or_default();
        writeln!(out, "::error {place}title={}::{}", property(&self.title), data(self.message.trim_end()))
    }
}

/// What stands after the second `::`.
fn data(text: &str) -> String {
    words::plain_lines(text).replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A")
}

/// A property's value.
fn property(text: &str) -> String {
    data(&words::plain(text)).replace(':', "%3A").replace(',', "%2C")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_those_of_the_repository() {
        let paths = SourcePaths::default().strip("/build/linux").strip("/build/linux/out/").strip("");
        for (file, is) in [
            ("/build/linux/kernel/fork.c", Some("kernel/fork.c")),
            ("/build/linux/out/../kernel/fork.c", None),
            ("/build/linux/out/./x//y.c", Some("x/y.c")),
            ("/build/linux-6/kernel/fork.c", None),
            ("./kernel/fork.c", Some("kernel/fork.c")),
            ("kernel/../../../etc/passwd", None),
            ("/etc/passwd", None),
            ("", None),
        ] {
            assert_eq!(paths.relative(file).as_deref(), is, "{file}");
        }
    }

    #[test]
    fn places_that_tests_name() {
        let place = |text| named_source(text).map(|source| words::source(&source));
        assert_eq!(place("x: EXPECTATION FAILED at lib/list-test.c:40\nmore").as_deref(), Some("lib/list-test.c:40"));
        assert_eq!(place("exit=1\nudp.c:12:send:Expected").as_deref(), Some("udp.c:12"));
        assert_eq!(place("took 3.c:0 and look at it"), None);
    }
}
