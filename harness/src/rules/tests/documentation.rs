//! What docs/traps.md shows is so.

use super::super::*;

const PAGE: &str = include_str!("../../../../docs/traps.md");

/// What stands between the fences of this kind.
fn blocks(kind: &str) -> Vec<&'static str> {
    let fence = format!("```{kind}\n");
    PAGE.split(fence.as_str()).skip(1).filter_map(|block| block.split("```").next()).collect()
}

#[test]
fn its_rules_are_rules() {
    let mut seen = 0;
    for line in blocks("rules").into_iter().flat_map(str::lines) {
        let (text, _) = line.split_once("   ").unwrap_or((line, ""));
        if let Err(error) = parse(text) {
            panic!("{error}");
        }
        seen += 1;
    }
    assert!(seen > 20);
    for file in blocks("toml") {
        assert!(!from_toml(file, "traps.md").unwrap_or_else(|error| panic!("{error}")).is_empty());
    }
}

#[test]
fn its_errors_are_the_errors() {
    let error = parse("exec:do_exit if $raxx == 1").unwrap_err();
    assert!(PAGE.contains(&error.to_string()), "{error}");
    let error = from_toml("[[trap]]\nrule = \"exec:do_exit if $rax = 1\"\n", "traps.toml").unwrap_err();
    assert!(PAGE.contains(&error.to_string()), "{error}");
}

#[test]
fn its_table_of_aliases_is_whole() {
    for alias in Alias::ALL {
        let row = PAGE
            .lines()
            .find(|line| line.starts_with(&format!("| `{alias}` |")))
            .unwrap_or_else(|| panic!("{alias} has no row"));
        assert!(row.ends_with(&format!("| {} |", alias.exit_code())), "{row}");
        if let Some(option) = alias.option() {
            assert!(row.contains(option), "{row}");
        }
        for event in alias.events() {
            if let Seen::Function(names) = event.seen {
                let is_named = |name: &&str| row.contains(&format!("`{name}`"));
                assert!(names.iter().any(is_named), "{alias}: {names:?}");
            }
        }
    }
    for action in Action::ALL {
        assert!(PAGE.contains(&format!("| `={action}` |")), "{action}");
    }
}
