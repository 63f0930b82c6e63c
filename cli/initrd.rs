//! The initial RAM disk that `--exec` and `--rootfs` ask for.

use std::path::Path;

use anyhow::bail;
use trapline_harness::initramfs::Initramfs;

use crate::args::{MadeInitrd, RunArgs};

/// Makes it, if one is to be made.
pub(crate) fn make(args: &RunArgs) -> anyhow::Result<Option<Initramfs>> {
    if !args.made.is_wanted() {
        return Ok(None);
    }
    if args.kernel().is_none() {
        bail!("--exec and --rootfs need a Linux kernel; name one before them: trapline run vmlinuz --exec PROGRAM");
    }
    let initramfs = collect(&args.made, args.cmdline())?;
    for note in initramfs.notes() {
        eprintln!("trapline: {note}");
    }
    Ok(Some(initramfs))
}

fn collect(made: &MadeInitrd, cmdline: &str) -> anyhow::Result<Initramfs> {
    let mut words = made.exec.iter().chain(&made.exec_args);
    let mut initramfs = match (words.next(), &made.rootfs) {
        (Some(program), None) => Initramfs::exec(Path::new(program), words)?,
        (Some(program), Some(dir)) => Initramfs::rootfs_exec(dir, program, words)?,
        (None, Some(dir)) => {
            let initramfs = Initramfs::rootfs(dir)?;
            let has_init = initramfs.contains("/init") || cmdline.split_whitespace().any(|w| w.starts_with("rdinit="));
            if !has_init {
                let dir = dir.display();
                bail!("{dir} has no /init; name what is to run with --exec PROGRAM, or give rdinit= in --cmdline");
            }
            initramfs
        }
        (None, None) => bail!("--exec needs a PROGRAM"),
    };
    for module in &made.module {
        initramfs.module(module)?;
    }
    Ok(initramfs)
}
