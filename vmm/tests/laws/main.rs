//! The laws of guest debugging, each shown on this host's KVM by small guests.
//!
//! A trial is named after the law that it shows (docs/laws.md has the table). What this KVM cannot
//! do is found out first ([`lane`]); a trial that needs it is ignored, and its kind names what is
//! missing, so that the closing line counts it.
//!
//! Two benches: [`rig`] puts the product's coordinator and vCPUs around a bare virtual machine,
//! with a spy at every vCPU; [`booted`] is the product as its users have it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod arming;
mod booted;
mod clock;
mod doctor;
mod fire;
mod guest;
mod inquest;
mod landing;
mod lane;
mod law;
mod lifecycle;
mod off;
mod once;
mod over;
mod patch;
mod rig;
mod saved;
mod seeds;
mod spy;
mod step;
mod stop_all;
mod truth;
mod update;
mod watch;

use std::process::ExitCode;

use libtest_mimic::{Arguments, ColorSetting};

use law::{Law, law};

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // What a lane's console says is read by a script.
    if !lane::lane().is_empty() {
        arguments.color.get_or_insert(ColorSetting::Never);
    }
    let trials = all().into_iter().map(Law::trial).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn all() -> Vec<Law> {
    [
        vec![law!(the_table_of_laws_has_a_row_for_every_test)],
        doctor::laws(),
        arming::laws(),
        update::laws(),
        once::laws(),
        fire::laws(),
        off::laws(),
        over::laws(),
        stop_all::laws(),
        guest::laws(),
        watch::laws(),
        step::laws(),
        landing::laws(),
        patch::laws(),
        lifecycle::laws(),
        seeds::laws(),
        truth::laws(),
        saved::laws(),
    ]
    .concat()
}

fn the_table_of_laws_has_a_row_for_every_test() {
    let table = include_str!("../../../docs/laws.md");
    let missing: Vec<_> = all().into_iter().filter(|law| !table.contains(&format!("| `{}` |", law.name()))).collect();
    let names: Vec<_> = missing.iter().map(Law::name).collect();
    assert!(names.is_empty(), "docs/laws.md does not know {names:?}");
}
