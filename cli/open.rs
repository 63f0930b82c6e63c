//! `trapline open`: a machine that a run has left in its report, under a debugger.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use trapline_harness::bundle::{Bundle, SymbolFile, one_line};
use trapline_vmm::devices::Console;
use trapline_vmm::devices::virtio::DiskConfig;
use trapline_vmm::state::MachineState;

use crate::args::{ConsoleTarget, OpenArgs};
use crate::run::{Session, Symbols, Unbuffered, attend};
use crate::stub::Stub;

/// Puts a debugger where the machine stood when its report was written.
pub(crate) fn open(args: &OpenArgs) -> anyhow::Result<ExitCode> {
    let bundle = Bundle::open(&args.bundle)?;
    let disks = disks(&args.disks, &bundle.state)?;
    let console = match &args.console {
        ConsoleTarget::Stdio => Console::new(Unbuffered(io::stdout())),
        ConsoleTarget::None => Console::new(io::sink()),
        ConsoleTarget::File(path) => Console::new(
            File::create(path)
                .with_context(|| format!("cannot write the console to {}; choose another file", path.display()))?,
        ),
    };
    let stub = Stub::listen(&args.gdb, args.gdb_expose)?;
    let vm = bundle.restore(console, disks)?;
    eprintln!("trapline: {}", bundle.summary());
    let symbols = match bundle.symbols() {
        SymbolFile::Demo => Symbols::demo()?,
        SymbolFile::File(path) => Symbols::at(&path),
        SymbolFile::None => Symbols::at(Path::new("vmlinux")),
        SymbolFile::Changed(why) => {
            eprintln!("trapline: {}; give gdb the file that fits", one_line(&why));
            Symbols::at(Path::new("vmlinux"))
        }
    };
    let slide = bundle.report.as_ref().map_or(0, |report| report.timing.kernel_slide);
    let symbols = symbols.moved(slide);
    let session = Session::new(vm, Some(stub), args.timeout)?;
    Ok(attend(session, &args.console, &symbols, Some("where it stood"))?.told())
}

/// The disks as they were named, or those that the guest had if it could not write to them.
fn disks(named: &[DiskConfig], state: &MachineState) -> anyhow::Result<Vec<DiskConfig>> {
    let had: Vec<String> = state.disks.iter().map(|disk| one_line(&disk.path)).collect();
    match named.len() {
        0 if state.disks.iter().all(|disk| disk.read_only) => {
            Ok(state.disks.iter().map(|disk| DiskConfig { path: PathBuf::from(&disk.path), read_only: true }).collect())
        }
        n if n == had.len() => Ok(named.to_vec()),
        _ => bail!(
            "the guest had {} disks ({}) and may write to them when it goes on; name each, or a copy of it as it was \
             then, with --disk",
            had.len(),
            had.join(", ")
        ),
    }
}
