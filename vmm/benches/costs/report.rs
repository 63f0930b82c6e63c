//! The table.

/// What a cost is to be, in bare exits.
pub(crate) enum Goal {
    None,
    AtMost(f64),
}

/// One line: seconds, and bare exits.
pub(crate) fn row(what: &str, seconds: f64, exits: Option<f64>, goal: Goal) {
    let exits_told = exits.map_or(String::new(), |exits| format!("{exits:.2}"));
    let goal = match (goal, exits) {
        (Goal::AtMost(most), Some(exits)) => format!("at most {most}: {}", verdict(exits <= most)),
        _ => String::new(),
    };
    println!("{what:<50} {:>12} {exits_told:>14}   {goal}", time(seconds));
}

/// One line about a slowdown.
pub(crate) fn percent(what: &str, slower: f64, most: f64) {
    let told = format!("{slower:+.2} %");
    println!("{what:<50} {told:>12} {:>14}   at most {most} %: {}", "", verdict(slower <= most));
}

fn verdict(holds: bool) -> &'static str {
    if holds { "holds" } else { "missed" }
}

fn time(seconds: f64) -> String {
    if seconds < 1e-3 { format!("{:.2} us", seconds * 1e6) } else { format!("{:.2} ms", seconds * 1e3) }
}

/// The one in the middle.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
