//! Debian's kernel under the library: what a guest that debugs itself sees of us, and what
//! stepping leaves behind in it. Runs where KVM boots Linux, after guest-images/fetch-debian:
//!
//!     tests/lanes/svm -- target/debug/deps/linux-*
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod debuggers;
mod guest;
mod step;
mod stepping;
mod symbols;

use std::process::ExitCode;

use libtest_mimic::{Arguments, ColorSetting, Trial};

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    let in_lane = std::env::var("TRAPLINE_LANE").is_ok_and(|lane| !lane.is_empty());
    if in_lane {
        // What a lane's console says is read by a script.
        arguments.color.get_or_insert(ColorSetting::Never);
    }
    // One machine at a time: a second one would only make the first one's steps slower.
    arguments.test_threads = Some(1);
    let missing = guest::missing();
    let mut trials = Vec::new();
    let mut trial = |name: &str, run: fn()| {
        let trial = Trial::test(name, move || {
            run();
            Ok(())
        });
        trials.push(match missing {
            Some(what) => trial.with_kind(what).with_ignored_flag(true),
            None => trial,
        });
    };
    trial("l31_the_guests_own_debuggers_work_beside_two_slots_of_ours", debuggers::beside_two_slots);
    trial("l46_the_guests_own_debuggers_work_while_we_step", debuggers::while_we_step);
    trial("l45_ten_thousand_steps_leave_nothing_behind", stepping::alone);
    trial("l45_ten_thousand_steps_beside_a_running_vcpu_leave_nothing_behind", stepping::beside_a_running_vcpu);
    libtest_mimic::run(&arguments, trials).exit_code()
}
