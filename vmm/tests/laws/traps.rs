//! Laws 60 and 61: which accesses are told, and where.

use trapline_guests::fixture;
use trapline_vmm::debug::{Breakpoint, RunMode, StopReason, Trigger};

use crate::lane::Need::DataWatch;
use crate::law::{Law, law};
use crate::rig::{Rig, at, name};

pub(crate) fn laws() -> Vec<Law> {
    vec![
        law!(l60_every_kind_of_access_is_told_behind_it, DataWatch),
        law!(l61_a_store_of_the_same_value_is_told, DataWatch),
    ]
}

/// Which accesses of the property `watch` touch a range, in order; each is told with the pc behind it.
fn told(offset: u64, len: u64, on: Trigger, accesses: &[&str]) {
    let mut rig = Rig::one("watch");
    let watch = Breakpoint::watch(fixture::WATCH + offset, len, on);
    rig.set(watch).unwrap();
    for access in accesses {
        let reason = rig.run_first(RunMode::Continue);
        assert!(
            matches!(reason, StopReason::Watchpoint { request, .. } if request == watch),
            "{reason:?} for {access}"
        );
        assert_eq!(name(rig.pc(0)), name(at(&format!("w_{access}_next"))), "{watch}");
    }
    assert_eq!(rig.run_first(RunMode::Continue), StopReason::GuestExit(0), "{watch}");
    rig.assert_guest_undisturbed();
}

fn l60_every_kind_of_access_is_told_behind_it() {
    use Trigger::{Access, Write};
    told(0, 1, Write, &["store1"]);
    told(0, 1, Access, &["store1", "read1"]);
    told(2, 2, Write, &["store2"]);
    told(0x10, 8, Write, &["lock_inc"]);
    told(0x18, 8, Write, &["xchg"]);
    told(0x20, 8, Write, &["cmpxchg8b"]);
    told(0x28, 1, Write, &["or"]);
    told(0x28, 1, Access, &["or", "test"]);
    told(0x30, 8, Write, &["movnti"]);
    told(0x40, 8, Write, &["push"]);
    told(0x40, 8, Access, &["push", "pop"]);
    told(0x104, 4, Write, &["wide_low"]);
    told(0xffc, 4, Write, &["page_cross"]);
    told(0x1000, 4, Write, &["page_cross"]);
    told(0x1004, 4, Write, &["next_page"]);
    told(0x1fff, 1, Write, &["last_byte"]);
}

fn l61_a_store_of_the_same_value_is_told() {
    told(8, 8, Trigger::Write, &["store8", "same", "unaligned"]);
    told(8, 8, Trigger::Access, &["store8", "read8", "same", "unaligned"]);
}
