//! Backtraces beside those that gdb gives of the same stop, function by function. The machine, the stub that gdb is
//! attached to, and our unwinder are in this one process, so both look at the very same stopped vCPUs.
//!
//! The built-in guest runs on any KVM; Linux where KVM boots it, after guest-images/fetch-debian:
//!
//!     tests/lanes/svm -- target/debug/deps/backtraces-*
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod agree;
mod compare;
mod gdb;
mod guests;

use std::path::Path;
use std::process::ExitCode;

use libtest_mimic::{Arguments, ColorSetting, Trial};

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    let in_lane = std::env::var("TRAPLINE_LANE").unwrap_or_default();
    if !in_lane.is_empty() {
        // What a lane's console says is read by a script.
        arguments.color.get_or_insert(ColorSetting::Never);
    }
    arguments.test_threads = Some(1);
    let mut trials = Vec::new();
    let mut trial = |name: &str, missing: Option<&str>, run: fn()| {
        let trial = Trial::test(name, move || {
            run();
            Ok(())
        });
        trials.push(match missing {
            Some(what) => trial.with_kind(what).with_ignored_flag(true),
            None => trial,
        });
    };
    let no_kvm = (!Path::new("/dev/kvm").exists()).then_some("no /dev/kvm");
    let no_gdb = (!gdb::is_there()).then_some("no gdb with Python");
    let boots_linux = ["kvm_amd", "kvm_intel"].iter().any(|name| Path::new("/sys/module").join(name).exists());
    let no_linux = (!boots_linux).then_some("no KVM that boots Linux");
    // The lane that is meant for it has it.
    let there = guests::debian().join("vmlinux").exists() || in_lane == "svm";
    let no_guest = (!there).then_some("no guest: guest-images/fetch-debian");
    trial("the_demo_guests_backtraces_equal_gdbs", no_kvm.or(no_gdb), guests::demo);
    trial("linuxs_backtraces_equal_gdbs", no_kvm.or(no_gdb).or(no_linux).or(no_guest), guests::linux);
    trial("orc_and_call_frame_information_agree", no_guest, agree::all_over_the_kernel);
    libtest_mimic::run(&arguments, trials).exit_code()
}
