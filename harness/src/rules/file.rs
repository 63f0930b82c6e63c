//! Rules from a TOML file.
//!
//! ```toml
//! [[trap]]
//! rule = "write:init_task.flags if new & 0x40"
//! name = "init is exiting"
//! action = "log"
//! ```
//!
//! The keys beside `rule` are the clauses of the grammar, for whoever likes them apart. Both are put together to the text
//! of one rule, and each byte of it knows where in the file it stands.

use std::sync::Arc;

use serde::Deserialize;
use toml::Spanned;

use super::error::{InFile, RuleError, Source, Span};
use super::{Rule, grammar};

/// The largest file of rules, in bytes.
pub const MAX_FILE: usize = 16 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rules {
    #[serde(default)]
    trap: Vec<Spanned<Table>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Table {
    rule: Spanned<String>,
    name: Option<Spanned<String>>,
    r#if: Option<Spanned<String>>,
    count: Option<Spanned<u64>>,
    #[serde(default)]
    once: bool,
    cpu: Option<Spanned<u32>>,
    #[serde(default)]
    must_hit: bool,
    action: Option<Spanned<String>>,
}

/// Reads the rules of a TOML file; `file` is its name, for messages.
///
/// # Errors
///
/// The first thing that is wrong, with its line and a caret.
pub fn from_toml(contents: &str, file: &str) -> Result<Vec<Rule>, RuleError> {
    let (file, contents): (Arc<str>, Arc<str>) = (file.into(), contents.into());
    let wrong = |span: std::ops::Range<usize>, message: String| {
        RuleError::in_file(&file, &contents, Span::new(span.start, span.end), message)
    };
    if contents.len() > MAX_FILE {
        return Err(wrong(0..0, format!("the file is too long (the most is {} MiB); split it", MAX_FILE >> 20)));
    }
    let rules: Rules = toml::from_str(&contents).map_err(|error| {
        // The parser's own excerpt is left out; ours is like that of all rules.
        wrong(error.span().unwrap_or(0..0), error.message().trim_end().replace('\n', ", "))
    })?;
    rules.trap.iter().map(|table| rule(table.get_ref(), &file, &contents, &wrong)).collect()
}

fn rule(
    table: &Table,
    file: &Arc<str>,
    contents: &Arc<str>,
    wrong: &dyn Fn(std::ops::Range<usize>, String) -> RuleError,
) -> Result<Rule, RuleError> {
    if let Some(name) = &table.name
        && (name.get_ref().trim().is_empty() || name.get_ref().chars().any(char::is_control))
    {
        return Err(wrong(name.span(), "a name is one line that is not empty".to_owned()));
    }
    let mut text = Text { text: String::new(), bytes: Vec::new(), contents };
    text.says(&table.rule);
    if let Some(condition) = &table.r#if {
        text.adds(" if ", condition.span().start);
        text.says(condition);
    }
    if let Some(count) = &table.count {
        text.adds(&format!(" count={}", count.get_ref()), count.span().start);
    }
    if let Some(cpu) = &table.cpu {
        text.adds(&format!(" cpu={}", cpu.get_ref()), cpu.span().start);
    }
    let at = table.rule.span().start;
    for (wanted, word) in [(table.once, " once"), (table.must_hit, " must-hit")] {
        if wanted {
            text.adds(word, at);
        }
    }
    if let Some(action) = &table.action {
        text.adds(" =", action.span().start);
        text.says(action);
    }
    let Text { text, mut bytes, .. } = text;
    bytes.push(bytes.last().map_or(at as u32, |last| last + 1));
    let place = InFile { file: file.clone(), contents: contents.clone(), bytes };
    let start = wrong(table.rule.span(), String::new());
    let mut rule = grammar::rule(Source::in_file(&text, start.origin().clone(), place))?;
    rule.name = table.name.as_ref().map(|name| name.get_ref().clone());
    Ok(rule)
}

/// The text of a rule that is put together from a file's values.
struct Text<'a> {
    text: String,
    bytes: Vec<u32>,
    contents: &'a str,
}

impl Text<'_> {
    /// What stands in the file as a string.
    fn says(&mut self, value: &Spanned<String>) {
        let (span, said) = (value.span(), value.get_ref());
        // Without escapes it stands there as it is, behind its quotes.
        let raw = self.contents.get(span.clone()).unwrap_or_default();
        let start = raw.find(said.as_str()).filter(|_| !said.is_empty());
        for n in 0..said.len() {
            self.bytes.push(start.map_or(span.start, |start| span.start + start + n) as u32);
        }
        self.text.push_str(said);
    }

    /// What the file says in another form, at this byte.
    fn adds(&mut self, words: &str, at: usize) {
        self.bytes.extend(std::iter::repeat_n(at as u32, words.len()));
        self.text.push_str(words);
    }
}

#[cfg(test)]
mod tests {
    use super::super::Action;
    use super::*;

    #[test]
    fn keys_and_clauses_mean_the_same() {
        let apart = r#"
            [[trap]]
            rule = "write:init_task.flags"
            if = "new & 0x40"
            count = 2
            cpu = 1
            must-hit = true
            once = true
            action = "log"
            name = "init is exiting"

            [[trap]]
            rule = 'panic'
        "#;
        let rules = from_toml(apart, "traps.toml").unwrap();
        let together = "write:init_task.flags if new & 0x40 count=2 cpu=1 must-hit once =log";
        assert_eq!(rules[0], super::super::parse(together).unwrap());
        assert_eq!((rules[0].title(), rules[0].action), ("init is exiting", Action::Log));
        assert_eq!((rules.len(), rules[1].title()), (2, "panic"));
        assert_eq!(from_toml("", "empty").unwrap(), []);
    }

    #[test]
    fn what_is_wrong_is_shown_where_it_stands() {
        let shown = |text: &str| from_toml(text, "t.toml").unwrap_err().to_string();
        let cases = [
            "[[trap]]\nrule = \"exec:a\"\nif = \"$raxx == 1\"\n",
            "[[trap]]\nrule = \"exec:do_exit if $raxx == 1\"\n",
            "[[trap]]\nrule = \"exec:a\"\naction = \"explode\"\n",
            "[[trap]]\nrule = \"exec:a =log\"\naction = \"fail\"\n",
            "[[trap]]\nrule = \"exec:a\"\ncolour = \"red\"\n",
            "[[trap]]\nname = \"a\"\n",
            "[[trap]]\nrule = 7\n",
            "[[trap]\nrule = \"exec:a\"\n",
            "[[trap]]\nrule = \"exec:a\\tif $raxx\"\n",
            "[[trap]]\nrule = \"exec:a\"\nname = \"\"\n",
            "[[trap]]\nrule = \"exec:a\"\ncount = 0\n",
        ];
        insta::assert_snapshot!(cases.map(shown).join("\n\n"));
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_refused_or_read(text in "(\\[\\[trap\\]\\]\n)?(rule|if|name|count|action)? ?=? ?[\"']?.{0,40}[\"']?\n?.{0,40}") {
            if let Err(error) = from_toml(&text, "x") {
                assert!(error.to_string().lines().count() == 3, "{error}");
            }
        }
    }
}
