//! The `trapline` command.

mod args;
mod console;
mod doctor;
mod initrd;
mod log;
mod open;
mod plan;
mod run;
mod stub;
mod terminal;

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use trapline_gdbstub_glue::AddressError;
use trapline_harness::run::RunError;
use trapline_vmm::VmError;
use trapline_vmm::probe::ProbeError;

use args::{Cli, Command};

/// Bad input: the command line, or a file it names.
const EX_USAGE: u8 = 64;
/// This host cannot do it.
const EX_UNAVAILABLE: u8 = 69;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors, and go to stdout.
            if !error.use_stderr() {
                let _ = error.print();
                return ExitCode::SUCCESS;
            }
            eprintln!("trapline: {}; see --help", one_line(&error.to_string()));
            return ExitCode::from(EX_USAGE);
        }
    };
    log::to_stderr();
    let result = match &cli.command {
        Command::Run(args) => run::run(args),
        Command::Plan(args) => plan::plan(args),
        Command::Open(args) => open::open(args),
        Command::Doctor(args) => doctor::doctor(args),
        Command::DemoGuest { output } => write_demo(output).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        for line in chain(&error).lines() {
            // A rule is shown with a caret under it.
            let prefix = if line.starts_with(' ') { "" } else { "trapline: " };
            eprintln!("{prefix}{line}");
        }
        ExitCode::from(severity(&error))
    })
}

/// What clap says over several lines, without the usage that --help gives.
fn one_line(text: &str) -> String {
    let is_advice = |line: &&str| !line.starts_with("Usage:") && !line.starts_with("For more information");
    let lines: Vec<&str> = text.lines().take_while(is_advice).map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join(" ").trim_start_matches("error: ").to_owned()
}

/// The error and its causes in one line, without those that it has said already.
fn chain(error: &anyhow::Error) -> String {
    error.chain().skip(1).fold(error.to_string(), |line, cause| {
        let cause = cause.to_string();
        if line.contains(&cause) { line } else { format!("{line}: {cause}") }
    })
}

/// Whose fault it is, decided here and once.
fn severity(error: &anyhow::Error) -> u8 {
    if error.is::<ProbeError>() || error.is::<doctor::NotUsable>() {
        return EX_UNAVAILABLE;
    }
    if error.downcast_ref::<VmError>().is_some_and(VmError::is_hosts) {
        return EX_UNAVAILABLE;
    }
    match error.downcast_ref::<RunError>() {
        Some(error) => error.exit_code(),
        None => match error.downcast_ref::<AddressError>() {
            Some(AddressError::PortInUse { .. } | AddressError::PathInUse { .. }) => EX_UNAVAILABLE,
            _ => EX_USAGE,
        },
    }
}

fn write_demo(output: &Path) -> anyhow::Result<()> {
    use anyhow::Context;
    fs::write(output, trapline_guests::demo())
        .with_context(|| format!("cannot write {}; choose a place that you can write to", output.display()))
}
