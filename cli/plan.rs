//! `trapline plan`: what the traps of a run would become.

use std::fmt::Write;
use std::process::ExitCode;

use trapline_harness::report::TargetRecord;
use trapline_harness::run::Plan;

use crate::EX_UNAVAILABLE;
use crate::args::PlanArgs;
use crate::run::describe;

/// Prints the plan. The exit code says whether all of it would be served.
pub(crate) fn plan(args: &PlanArgs) -> anyhow::Result<ExitCode> {
    let (plan, records) = describe(&args.run)?.plan()?;
    if args.json {
        println!("{}", json(&plan, &records)?);
    } else {
        print!("{}", table(&plan, &records));
    }
    let refused = records.iter().flatten().any(|record| record.mechanism.starts_with("refused"));
    Ok(ExitCode::from(if refused { EX_UNAVAILABLE } else { 0 }))
}

fn json(plan: &Plan, records: &[Vec<TargetRecord>]) -> serde_json::Result<String> {
    let traps: Vec<_> = plan
        .traps
        .iter()
        .zip(records)
        .map(|(trap, targets)| {
            serde_json::json!({
                "rule": trap.rule.text,
                "name": trap.rule.title(),
                "action": trap.rule.action.word(),
                "targets": targets,
            })
        })
        .collect();
    serde_json::to_string_pretty(&serde_json::json!({ "schema": 1, "traps": traps }))
}

fn table(plan: &Plan, records: &[Vec<TargetRecord>]) -> String {
    if plan.traps.is_empty() {
        return "no traps; give --trap RULE or --traps FILE\n".to_owned();
    }
    let width = records.iter().flatten().map(|record| record.what.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for (trap, targets) in plan.traps.iter().zip(records) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{}", trap.rule);
        for target in targets {
            let address = target.address.map_or_else(String::new, |address| format!("{address:#018x}"));
            let len = target.len.map_or_else(String::new, |len| format!("{len} bytes"));
            let _ = writeln!(text, "  {:width$}  {address:18}  {len:>9}  {}", target.what, target.mechanism);
        }
    }
    text
}
