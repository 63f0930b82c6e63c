//! One line of TAP.

use crate::report::TestResult;

/// What a line is, its indentation taken off.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Syntax<'a> {
    /// `TAP version 13`, `KTAP version 1`
    Version,
    /// `1..N`, with the reason of `# SKIP`.
    Plan { last: u64, skip: Option<&'a str> },
    /// `ok`, `not ok`
    Result(ResultLine<'a>),
    /// `Bail out!` and why.
    Bail(&'a str),
    /// `# Subtest: NAME`
    Subtest(&'a str),
    /// `# ...`
    Comment(&'a str),
    /// `---`
    YamlStart,
    /// Anything else.
    Other,
}

/// `not ok 3 - name # TODO reason`
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ResultLine<'a> {
    pub(super) result: TestResult,
    pub(super) number: Option<u64>,
    /// As it stands there, with its escapes.
    pub(super) name: &'a str,
    pub(super) message: Option<&'a str>,
    /// It has a number or a dash. Without them it may as well be prose.
    pub(super) sure: bool,
}

pub(super) fn parse(line: &str) -> Syntax<'_> {
    if let Some(comment) = line.strip_prefix('#') {
        let text = comment.strip_prefix(' ').unwrap_or(comment);
        return match text.strip_prefix("Subtest: ").map(str::trim) {
            Some(name) if !name.is_empty() => Syntax::Subtest(name),
            _ => Syntax::Comment(text),
        };
    }
    if let Some(version) = line.strip_prefix("TAP version ").or(line.strip_prefix("KTAP version "))
        && !version.is_empty()
        && version.bytes().all(|byte| byte.is_ascii_digit())
    {
        return Syntax::Version;
    }
    if let Some(reason) = line.strip_prefix("Bail out!") {
        return Syntax::Bail(reason.trim());
    }
    if line == "---" || line.starts_with("--- ") {
        return Syntax::YamlStart;
    }
    plan(line).or_else(|| result(line)).unwrap_or(Syntax::Other)
}

/// `NAME: ` in `NAME: KTAP version 1`.
pub(super) fn module_of_version(line: &str) -> Option<&str> {
    let (name, version) = line.split_once(": ")?;
    let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
    (is_name && parse(version) == Syntax::Version).then(|| &line[..line.len() - version.len()])
}

fn plan(line: &str) -> Option<Syntax<'_>> {
    let (last, rest) = number(line.strip_prefix("1..")?);
    let (last, rest) = (last?, rest.trim_start());
    if rest.is_empty() {
        return Some(Syntax::Plan { last, skip: None });
    }
    let reason = rest.strip_prefix('#')?.trim_start();
    let skip = after_word(reason, "SKIP");
    Some(Syntax::Plan { last, skip })
}

fn result(line: &str) -> Option<Syntax<'_>> {
    let (passed, rest) = match line.strip_prefix("not ok") {
        Some(rest) => (false, rest),
        None => (true, line.strip_prefix("ok")?),
    };
    if !(rest.is_empty() || rest.starts_with(' ')) {
        return None;
    }
    let (number, after) = number(rest.trim_start());
    let (number, rest) = match number {
        // "ok 3rd" has no number.
        Some(number) if after.is_empty() || after.starts_with([' ', ':']) => (Some(number), after),
        _ => (None, rest),
    };
    let rest = rest.trim();
    let (dash, rest) = match rest.strip_prefix('-') {
        Some(rest) if rest.is_empty() || rest.starts_with(' ') => (true, rest.trim_start()),
        _ => (false, rest),
    };
    let plain = if passed { TestResult::Ok } else { TestResult::Failed };
    let (name, result, message) = match directive(rest) {
        Some((name, result, message)) => (name, result.unwrap_or(plain), Some(message)),
        None => (rest, plain, None),
    };
    // Expected to fail, and did not.
    let result = if passed && result == TestResult::Todo && !message.is_some_and(is_xfail) { plain } else { result };
    let sure = number.is_some() || dash;
    Some(Syntax::Result(ResultLine { result, number, name, message: message.filter(|text| !text.is_empty()), sure }))
}

/// kselftest prints `ok` before `# XFAIL`.
fn is_xfail(message: &str) -> bool {
    message.len() >= 5 && message.as_bytes()[..5].eq_ignore_ascii_case(b"XFAIL")
}

/// The text before a directive, the result if it decides one, and its words: the reason of a SKIP or TODO, all of the others'.
fn directive(text: &str) -> Option<(&str, Option<TestResult>, &str)> {
    for (at, _) in text.match_indices('#') {
        if at > 0 && !text[..at].ends_with([' ', '\t']) {
            continue;
        }
        let (name, words) = (text[..at].trim_end(), text[at + 1..].trim());
        if let Some(reason) = after_word(words, "SKIP") {
            return Some((name, Some(TestResult::Skipped), reason));
        }
        if let Some(reason) = after_word(words, "TODO") {
            return Some((name, Some(TestResult::Todo), reason));
        }
        if after_word(words, "XFAIL").is_some() {
            return Some((name, Some(TestResult::Todo), words));
        }
        let says = |word| after_word(words, word).is_some();
        if says("TIMEOUT") || says("ERROR") || says("XPASS") || words.starts_with("exit=") {
            return Some((name, None, words));
        }
    }
    None
}

/// What follows a word in whatever case, with what is glued to it (`SKIPPED`, `SKIP:`).
fn after_word<'a>(text: &'a str, word: &str) -> Option<&'a str> {
    let head = text.get(..word.len())?;
    if !head.eq_ignore_ascii_case(word) {
        return None;
    }
    let rest = &text[word.len()..];
    let glued = rest.find([' ', '\t', ':']).unwrap_or(rest.len());
    rest[..glued].bytes().all(|byte| byte.is_ascii_alphabetic()).then(|| rest[glued..].trim_start_matches(':').trim())
}

/// The number that the text begins with, and what follows.
fn number(text: &str) -> (Option<u64>, &str) {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    (text[..digits].parse().ok(), &text[digits..])
}

/// A name without TAP 14's escapes.
pub(super) fn unescaped(name: &str) -> String {
    let mut plain = String::with_capacity(name.len());
    let mut chars = name.chars().peekable();
    while let Some(char) = chars.next() {
        match (char, chars.peek()) {
            ('\\', Some(&next @ ('#' | '\\'))) => {
                plain.push(next);
                chars.next();
            }
            (char, _) => plain.push(char),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use TestResult::*;

    fn result_of(line: &str) -> (TestResult, Option<u64>, &str, Option<&str>) {
        match parse(line) {
            Syntax::Result(found) => (found.result, found.number, found.name, found.message),
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn result_lines() {
        for (line, is) in [
            ("ok", (Ok, None, "", None)),
            ("ok 1", (Ok, Some(1), "", None)),
            ("not ok 2 - second one", (Failed, Some(2), "second one", None)),
            ("ok 3 third", (Ok, Some(3), "third", None)),
            ("ok - unnumbered", (Ok, None, "unnumbered", None)),
            ("ok 4 a # SKIP no hardware", (Skipped, Some(4), "a", Some("no hardware"))),
            ("not ok 5 b # SKIP", (Skipped, Some(5), "b", None)),
            ("ok 6 # skip", (Skipped, Some(6), "", None)),
            ("ok 7 c # Skipped: why", (Skipped, Some(7), "c", Some("why"))),
            ("not ok 8 - d # TODO later", (Todo, Some(8), "d", Some("later"))),
            ("ok 9 - d # TODO later", (Ok, Some(9), "d", Some("later"))),
            ("ok 10 e # XFAIL known", (Todo, Some(10), "e", Some("XFAIL known"))),
            (
                "not ok 11 selftests: x: y # TIMEOUT 45 seconds",
                (Failed, Some(11), "selftests: x: y", Some("TIMEOUT 45 seconds")),
            ),
            ("not ok 12 selftests: x: z # exit=1", (Failed, Some(12), "selftests: x: z", Some("exit=1"))),
            ("ok 13 issue # 5 and #6", (Ok, Some(13), "issue # 5 and #6", None)),
            (r"ok 14 no \# SKIP here", (Ok, Some(14), r"no \# SKIP here", None)),
            ("ok 3rd", (Ok, None, "3rd", None)),
            ("ok 99999999999999999999 x", (Ok, None, "99999999999999999999 x", None)),
        ] {
            assert_eq!(result_of(line), is, "{line}");
        }
    }

    #[test]
    fn other_lines() {
        assert_eq!(parse("TAP version 14"), Syntax::Version);
        assert_eq!(parse("KTAP version 1"), Syntax::Version);
        assert_eq!(parse("TAP version"), Syntax::Other);
        assert_eq!(module_of_version("a_module: KTAP version 1"), Some("a_module: "));
        assert_eq!(module_of_version("a module: KTAP version 1"), None);
        assert_eq!(module_of_version("a_module: KTAP version"), None);
        assert_eq!(parse("1..12"), Syntax::Plan { last: 12, skip: None });
        assert_eq!(parse("1..0 # SKIP no such bus"), Syntax::Plan { last: 0, skip: Some("no such bus") });
        assert_eq!(parse("1..x"), Syntax::Other);
        assert_eq!(parse("1..3 more"), Syntax::Other);
        assert_eq!(parse("Bail out! no memory"), Syntax::Bail("no memory"));
        assert_eq!(parse("# Subtest: a b"), Syntax::Subtest("a b"));
        assert_eq!(parse("#"), Syntax::Comment(""));
        assert_eq!(parse("okay"), Syntax::Other);
        assert_eq!(parse("notok 1"), Syntax::Other);
        assert_eq!(unescaped(r"a \# b \\ c \x"), r"a # b \ c \x");
    }
}
