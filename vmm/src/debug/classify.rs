//! Whose trap is it? One pass over every cause of one #DB or #BP exit.

use super::{DebugImage, Dr6, SLOTS, SlotCondition, SlotOwner};

/// Vector of #BP.
pub const BP: u32 = 3;

/// KVM_EXIT_DEBUG as the kernel reports it, without `dr7`: that field is stale or garbage on
/// some flavours (law 26).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DebugExit {
    /// 1 for #DB, 3 for #BP.
    pub exception: u32,
    /// Linear address of RIP.
    pub pc: u64,
    /// Meaningful for #DB only.
    pub dr6: u64,
}

/// What this vCPU was doing when it trapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expectation {
    /// A single step was armed.
    pub stepping: bool,
    /// The slots that were disabled to step off a breakpoint, one bit each.
    pub suspended: u8,
}

/// Every cause of one exit, split among its owners.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Causes {
    /// The step that was asked for is done.
    pub step: bool,
    /// Requests that triggered, each once, with the data address of the slot that matched.
    pub hits: Vec<(SlotOwner, u64)>,
    /// DR6 causes, active-high, that no owner of ours explains: the guest's own #DB (law 33).
    /// `Some(0)` is a #DB without any cause bit, as INT1 raises.
    pub guest_db: Option<u64>,
    /// A #BP with no patch of ours behind it (law 34).
    pub guest_bp: bool,
}

impl Causes {
    /// Nothing here is anybody's: the exit is swallowed and the vCPU goes on.
    pub fn is_spurious(&self) -> bool {
        *self == Causes::default()
    }
}

/// Splits `exit` among its owners, by the image that this vCPU had installed (law 11).
///
/// `guest_tf` and `guest_dr7` are the guest's own: a BS with no step armed is the guest's if it
/// single-steps itself, and Bn bits of slots that are not ours are the guest's if it enabled
/// them. What is left over (a slot that was removed meanwhile, a stale bit of a disabled slot,
/// KVM's own NMI-window step) is nobody's (laws 15, 21, 51).
pub fn classify(exit: DebugExit, image: &DebugImage, expect: Expectation, guest_tf: bool, guest_dr7: u64) -> Causes {
    if exit.exception == BP {
        return Causes { guest_bp: true, ..Causes::default() };
    }
    let dr6 = Dr6(exit.dr6);
    let mut causes = Causes { step: expect.stepping && dr6.single_step(), ..Causes::default() };
    let mut guest = 0;
    if dr6.single_step() && !expect.stepping && guest_tf {
        guest |= Dr6::BS;
    }
    guest |= dr6.causes() & (Dr6::BD | Dr6::BT | 1 << 11 | 1 << 16);
    for n in (0..SLOTS).filter(|&n| dr6.hit(n)) {
        let ours = image.slots()[n].as_ref().filter(|_| expect.suspended & (1 << n) == 0);
        match ours {
            Some(slot) => {
                // An execution slot with BS set has not stopped anything yet: it faults again
                // when the vCPU goes on (law 22). A pc elsewhere makes it a stale bit.
                let holds = slot.condition != SlotCondition::Execute || (slot.addr == exit.pc && !dr6.single_step());
                if holds {
                    add_hits(&mut causes.hits, slot.addr, &slot.owners);
                }
            }
            None if guest_dr7 & (0b11 << (2 * n)) != 0 => guest |= 1 << n,
            None => {}
        }
    }
    if guest != 0 || (dr6.causes() == 0) {
        causes.guest_db = Some(guest);
    }
    causes
}

/// Whether the causes of `exit` can only be ours, so that [`classify`] comes to the same result
/// whatever the guest's own TF and DR7 are.
pub fn is_ours_alone(exit: DebugExit, image: &DebugImage, expect: Expectation) -> bool {
    let dr6 = Dr6(exit.dr6);
    let armed = |n: usize| image.slots()[n].is_some() && expect.suspended & (1 << n) == 0;
    (expect.stepping || !dr6.single_step()) && (0..SLOTS).all(|n| armed(n) || !dr6.hit(n))
}

/// One request is one hit, however many of its slots matched (law 62).
fn add_hits(hits: &mut Vec<(SlotOwner, u64)>, addr: u64, owners: &[SlotOwner]) {
    for behind in owners {
        if !hits.iter().any(|(known, _)| (known.owner, known.request) == (behind.owner, behind.request)) {
            hits.push((behind.clone(), addr));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::debug::{Breakpoint, Owner, SlotTable, Trigger};
    use proptest::prelude::*;

    const IDLE: Expectation = Expectation { stepping: false, suspended: 0 };
    const STEPPING: Expectation = Expectation { stepping: true, suspended: 0 };

    fn image(requests: &[Breakpoint]) -> DebugImage {
        let mut table = SlotTable::default();
        let mut last = DebugImage::default();
        for &request in requests {
            if let Some(prepared) = table.prepare_set(Owner::GDB, request, None).unwrap() {
                last = prepared.images().last().unwrap().clone();
                table.commit(prepared);
            }
        }
        last
    }

    fn db(pc: u64, dr6: u64) -> DebugExit {
        DebugExit { exception: 1, pc, dr6 }
    }

    #[test]
    fn l20_all_causes_in_one_pass() {
        // Measured on kvm_intel: a write and an access slot on one address, dr6 = ffff0ff5 style.
        let w = Breakpoint::watch(0x30000, 8, Trigger::Write);
        let rw = Breakpoint::watch(0x30000, 8, Trigger::Access);
        let causes = classify(db(0x1008, 0xffff_0ff3), &image(&[w, rw]), IDLE, false, 0x400);
        assert_eq!(causes.hits.iter().map(|h| h.0.request).collect::<Vec<_>>(), [w, rw]);
        // A step over a watched store: both.
        let causes = classify(db(0x1008, 0xffff_4ff1), &image(&[w]), STEPPING, false, 0x400);
        assert!(causes.step && causes.hits.len() == 1);
    }

    #[test]
    fn l21_bits_of_disabled_slots_are_ignored() {
        // Measured on kvm_intel: slot 0 enabled, slots 1-3 disabled with the same address.
        let w = Breakpoint::watch(0x30000, 1, Trigger::Write);
        let causes = classify(db(0x1008, 0xffff_0fff), &image(&[w]), IDLE, false, 0x400);
        assert_eq!(causes.hits.len(), 1);
        assert_eq!(causes.guest_db, None);
    }

    #[test]
    fn l22_a_step_onto_a_breakpoint_is_a_step() {
        let x = Breakpoint::exec(0x1000);
        let onto = classify(db(0x1000, 0xffff_4ff1), &image(&[x]), STEPPING, false, 0x400);
        assert!(onto.step && onto.hits.is_empty());
        let then = classify(db(0x1000, 0xffff_0ff1), &image(&[x]), IDLE, false, 0x400);
        assert_eq!(then.hits.len(), 1);
    }

    #[test]
    fn l11_a_hit_on_a_removed_breakpoint_is_nobodys() {
        let gone = classify(db(0x1000, 0xffff_0ff1), &DebugImage::default(), IDLE, false, 0x400);
        assert!(gone.is_spurious());
    }

    #[test]
    fn l33_what_nobody_owns_is_the_guests() {
        let far = image(&[Breakpoint::exec(0x50000)]);
        let own_tf = classify(db(0x1001, 0xffff_4ff0), &far, IDLE, true, 0x400);
        assert_eq!(own_tf.guest_db, Some(Dr6::BS));
        let own_slot = classify(db(0x1001, 0xffff_0ff2), &far, IDLE, false, 0x408);
        assert_eq!(own_slot.guest_db, Some(0b10));
        let int1 = classify(db(0x1001, 0xffff_0ff0), &far, IDLE, false, 0x400);
        assert_eq!(int1.guest_db, Some(0));
    }

    #[test]
    fn l51_a_step_that_nobody_armed_is_swallowed() {
        let causes = classify(db(0x1001, 0xffff_4ff0), &image(&[Breakpoint::exec(1)]), IDLE, false, 0x400);
        assert!(causes.is_spurious());
    }

    #[test]
    fn l34_a_bp_exit_without_a_patch_is_the_guests() {
        let exit = DebugExit { exception: 3, pc: 0x1000, dr6: u64::MAX };
        assert!(classify(exit, &DebugImage::default(), IDLE, false, 0x400).guest_bp);
    }

    #[test]
    fn a_watch_over_two_slots_is_one_hit() {
        let wide = Breakpoint::watch(0x30003, 5, Trigger::Write);
        let causes = classify(db(0x1008, 0xffff_0ff3), &image(&[wide]), IDLE, false, 0x400);
        assert_eq!(causes.hits.len(), 1);
    }

    proptest! {
        #[test]
        fn what_is_ours_alone_is_so_whatever_the_guest_has_set(
            dr6: u64, pc in prop::sample::select(vec![0x1000u64, 0x1001]), stepping: bool, suspended in 0u8..16, dr7: u64,
        ) {
            let image = image(&[Breakpoint::exec(0x1000), Breakpoint::watch(0x2000, 8, Trigger::Write)]);
            let (exit, expect) = (db(pc, dr6), Expectation { stepping, suspended });
            if is_ours_alone(exit, &image, expect) {
                let quiet = classify(exit, &image, expect, false, 0);
                prop_assert_eq!(classify(exit, &image, expect, true, dr7), quiet);
            }
        }

        #[test]
        fn l15_any_dr6_is_digested(dr6: u64, pc: u64, stepping: bool, suspended in 0u8..16, tf: bool, dr7: u64) {
            let image = image(&[Breakpoint::exec(0x1000), Breakpoint::watch(0x2000, 8, Trigger::Write)]);
            let causes = classify(db(pc, dr6), &image, Expectation { stepping, suspended }, tf, dr7);
            prop_assert!(causes.hits.len() <= 2);
            prop_assert!(stepping || !causes.step);
        }
    }
}
