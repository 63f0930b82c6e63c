//! The `trapline` command.

mod args;
mod console;
mod run;
mod terminal;

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use trapline_gdbstub_glue::AddressError;
use trapline_vmm::VmError;

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
            let code = if error.use_stderr() { EX_USAGE } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_env("TRAPLINE_LOG"))
        .with_writer(std::io::stderr)
        .without_time()
        .init();
    let result = match &cli.command {
        Command::Run(args) => run::run(args),
        Command::DemoGuest { output } => write_demo(output).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("trapline: {error:#}");
        ExitCode::from(severity(&error))
    })
}

/// Whose fault it is, decided here and once.
fn severity(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<VmError>() {
        Some(VmError::Host(_) | VmError::Resources(_)) => EX_UNAVAILABLE,
        Some(VmError::Boot(_) | VmError::Memory(_)) => EX_USAGE,
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
