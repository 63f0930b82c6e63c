//! Writes index.html of each sample report into a directory, for a browser to look at (`tests/headless/page`).

use std::path::PathBuf;
use std::process::ExitCode;

use trapline_harness::files::write_atomically;
use trapline_harness::report;

#[path = "../tests/samples/mod.rs"]
mod samples;

fn main() -> ExitCode {
    let Some(directory) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: pages DIRECTORY");
        return ExitCode::from(64);
    };
    for (name, report) in samples::all() {
        for (file, write) in [
            (format!("{name}.html"), report::Report::write_page as fn(&report::Report, &mut dyn std::io::Write) -> _),
            (format!("{name}.json"), report::Report::write_json),
        ] {
            if let Err(error) = write_atomically(&directory.join(file), |out| write(&report, out)) {
                eprintln!("pages: {error}");
                return ExitCode::from(69);
            }
        }
    }
    ExitCode::SUCCESS
}
