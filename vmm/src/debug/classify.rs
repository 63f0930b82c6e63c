//! Whose trap is it? One pass over every cause of one #DB or #BP exit.

use super::{DebugImage, Dr6, GuestBreakpoint, Overlay, SLOTS, SlotCondition, SlotOwner};

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Expectation {
    /// A single step was armed.
    pub stepping: bool,
    /// It has come to where the step ends by a slot of the step's own.
    pub arrived: bool,
}

/// What the guest's own registers say at the time of an exit. Asked only where a cause depends
/// on it: each question may cost an ioctl.
pub trait GuestView {
    /// What its address register `n` asks for now.
    fn breakpoint(&mut self, n: usize) -> Option<GuestBreakpoint>;

    /// Whether the instruction before RIP began with the guest's own TF set.
    fn single_steps(&mut self) -> bool;

    /// RFLAGS.RF: the guest goes on past an execution breakpoint at RIP.
    fn resumes(&mut self) -> bool;
}

/// Every cause of one exit, split among its owners.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Causes {
    /// The step that was asked for is done.
    pub step: bool,
    /// Requests that triggered, each once, with the data address of the slot that matched.
    pub hits: Vec<(SlotOwner, u64)>,
    /// DR6 causes, active-high and with the guest's own numbers, that no owner of ours explains:
    /// the guest's own #DB (law 33). `Some(0)` is a #DB without any cause bit, as INT1 raises.
    pub guest_db: Option<u64>,
    /// A #BP with no patch of ours behind it (law 34).
    pub guest_bp: bool,
    /// The instruction at RIP wants to access a debug register, and has not.
    pub access: bool,
    /// An execution slot that is the guest's alone matched at RIP, but is no event there: the
    /// guest has set RF, or does not want it any more. The instruction is to be stepped over.
    pub pass: bool,
    /// The guest's registers whose copies matched and are wanted, one bit each.
    pub wanted: u8,
    /// Those whose copies matched and are not wanted any more.
    pub idle: u8,
}

impl Causes {
    /// Nothing here is anybody's: the exit is swallowed and the vCPU goes on.
    pub fn is_spurious(&self) -> bool {
        *self == Causes::default()
    }
}

/// Splits `exit` among its owners, by what this vCPU had `armed` out of `image` (law 11).
///
/// What is left over (a slot that was removed meanwhile, a stale bit of a disabled slot, KVM's own
/// NMI-window step) is nobody's (laws 15, 21, 51).
///
/// Traps come before faults, whosever they are: an execution slot that matches beside a finished
/// step, a data slot or the guest's own trap has stopped nothing yet, and faults again when the
/// vCPU gets there (law 22). Among the faults at one instruction ours come first.
pub fn classify(
    exit: DebugExit,
    image: &DebugImage,
    armed: &Overlay,
    expect: Expectation,
    guest: &mut impl GuestView,
) -> Causes {
    if exit.exception == BP {
        return Causes { guest_bp: true, ..Causes::default() };
    }
    let dr6 = Dr6(exit.dr6);
    let mut causes = Causes {
        step: expect.stepping && dr6.single_step(),
        access: dr6.causes() & Dr6::BD != 0 && !dr6.single_step(),
        ..Causes::default()
    };
    let (mut accesses, mut crossings) = (Vec::new(), Vec::new());
    let mut traps = dr6.causes() & (Dr6::BT | Dr6::BLD | Dr6::RTM);
    let mut faults = 0;
    let mut pass = false;
    if dr6.single_step() && !expect.stepping && guest.single_steps() {
        traps |= Dr6::BS;
    }
    for n in (0..SLOTS).filter(|&n| dr6.hit(n)) {
        match image.slots()[n].as_ref().filter(|_| armed.is_ours(n)) {
            Some(slot) if slot.condition != SlotCondition::Execute => add_hits(&mut accesses, slot.addr, &slot.owners),
            // A pc elsewhere makes it a stale bit.
            Some(slot) if slot.addr == exit.pc => add_hits(&mut crossings, slot.addr, &slot.owners),
            _ => {}
        }
        for index in (0..SLOTS).filter(|index| armed.guest(n) & (1 << index) != 0) {
            let bit = 1 << index;
            let now = guest.breakpoint(index);
            // A copy fires for what it was armed for; without one the register fires for itself.
            let Some(fired) = armed.served(index).or(now.filter(|_| !armed.is_on())) else { continue };
            let wanted = now == Some(fired);
            match fired.condition {
                SlotCondition::Execute if fired.addr != exit.pc => continue,
                SlotCondition::Execute if !wanted || armed.is_on() && guest.resumes() => pass = true,
                SlotCondition::Execute => faults |= bit,
                _ if wanted => traps |= bit,
                _ => {}
            }
            match wanted {
                true => causes.wanted |= 1 << index,
                false => causes.idle |= 1 << index,
            }
        }
    }
    if traps != 0 {
        // Its handler runs first; what faults at RIP does so again behind it. The processor shows
        // the guest all bits that match.
        causes.guest_db = Some(traps | faults);
        causes.hits = accesses;
    } else if causes.step || !accesses.is_empty() {
        causes.hits = accesses;
    } else if !crossings.is_empty() {
        causes.hits = crossings;
    } else if expect.arrived {
        // Whoever stepped here is told; the guest's own faults again when it goes on.
    } else if faults != 0 {
        causes.guest_db = Some(faults);
    } else {
        causes.pass = pass;
        causes.guest_db = (dr6.causes() == 0).then_some(0);
    }
    causes
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
    use crate::debug::{Breakpoint, GuestRegisters, Owner, SlotTable, Trigger};
    use proptest::prelude::*;

    const FREE: Expectation = Expectation { stepping: false, arrived: false };

    /// Must not be asked: each question may cost an ioctl.
    struct Nobody;

    impl GuestView for Nobody {
        fn breakpoint(&mut self, _: usize) -> Option<GuestBreakpoint> {
            panic!("asked for a breakpoint")
        }

        fn single_steps(&mut self) -> bool {
            panic!("asked for TF")
        }

        fn resumes(&mut self) -> bool {
            panic!("asked for RF")
        }
    }

    /// A guest whose registers are as they say.
    #[derive(Debug, Clone, Copy, Default)]
    struct Guest {
        registers: GuestRegisters,
        tf: bool,
        rf: bool,
    }

    impl GuestView for Guest {
        fn breakpoint(&mut self, n: usize) -> Option<GuestBreakpoint> {
            self.registers.breakpoint(n)
        }

        fn single_steps(&mut self) -> bool {
            self.tf
        }

        fn resumes(&mut self) -> bool {
            self.rf
        }
    }

    /// A guest with these of its own.
    fn guest(db: [u64; 4], dr7: u64) -> Guest {
        Guest { registers: GuestRegisters { db, dr6: Dr6::RESET, dr7 }, ..Guest::default() }
    }

    /// What is armed for `image` and this guest, and what the exit means.
    fn split(exit: DebugExit, image: &DebugImage, stepping: bool, mut guest: Guest) -> Causes {
        let armed = Overlay::merge(image, 0, &guest.registers.breakpoints());
        classify(exit, image, &armed, Expectation { stepping, arrived: false }, &mut guest)
    }

    fn none() -> Guest {
        guest([0; 4], 0x400)
    }

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

    proptest! {
        /// KVM leaves in it what the last #DB put there.
        #[test]
        fn l26_what_an_exit_says_without_a_debug_exception_is_not_read(dr6: u64, stepping: bool, pc in 0x1000u64..0x1004) {
            let image = image(&[0, 1, 2, 3].map(|n| Breakpoint::exec(0x1000 + n)));
            let causes = |dr6| split(DebugExit { exception: BP, pc, dr6 }, &image, stepping, none());
            let (these, none) = (causes(dr6), causes(Dr6::RESET));
            prop_assert!(these.hits.is_empty() && these.guest_bp);
            prop_assert_eq!(these, none);
        }
    }

    #[test]
    fn l20_all_causes_in_one_pass() {
        // Measured on kvm_intel: a write and an access slot on one address, dr6 = ffff0ff5 style.
        let w = Breakpoint::watch(0x30000, 8, Trigger::Write);
        let rw = Breakpoint::watch(0x30000, 8, Trigger::Access);
        let causes = split(db(0x1008, 0xffff_0ff3), &image(&[w, rw]), false, none());
        assert_eq!(causes.hits.iter().map(|h| h.0.request).collect::<Vec<_>>(), [w, rw]);
        // A step over a watched store: both.
        let causes = split(db(0x1008, 0xffff_4ff1), &image(&[w]), true, none());
        assert!(causes.step && causes.hits.len() == 1);
    }

    #[test]
    fn l21_bits_of_disabled_slots_are_ignored() {
        // Measured on kvm_intel: slot 0 enabled, slots 1-3 disabled with the same address.
        let w = Breakpoint::watch(0x30000, 1, Trigger::Write);
        let causes = split(db(0x1008, 0xffff_0fff), &image(&[w]), false, none());
        assert_eq!(causes.hits.len(), 1);
        assert_eq!(causes.guest_db, None);
    }

    #[test]
    fn l22_a_step_onto_a_breakpoint_is_a_step() {
        let x = Breakpoint::exec(0x1000);
        let onto = split(db(0x1000, 0xffff_4ff1), &image(&[x]), true, none());
        assert!(onto.step && onto.hits.is_empty());
        let then = split(db(0x1000, 0xffff_0ff1), &image(&[x]), false, none());
        assert_eq!(then.hits.len(), 1);
    }

    #[test]
    fn l11_a_hit_on_a_removed_breakpoint_is_nobodys() {
        let gone = split(db(0x1000, 0xffff_0ff1), &DebugImage::default(), false, none());
        assert!(gone.is_spurious());
    }

    #[test]
    fn l33_what_nobody_owns_is_the_guests() {
        let far = image(&[Breakpoint::exec(0x50000)]);
        let own_tf = split(db(0x1001, 0xffff_4ff0), &far, false, Guest { tf: true, ..none() });
        assert_eq!((own_tf.guest_db, own_tf.step), (Some(Dr6::BS), false));
        // Ours is in slot 0, so that the guest's DR3 is served by slot 1.
        let mut own = guest([0, 0, 0, 0x1001], 0x480);
        let own_slot = split(db(0x1001, 0xffff_0ff2), &far, false, own);
        assert_eq!((own_slot.guest_db, own_slot.wanted), (Some(0b1000), 0b1000));
        // With RF the guest goes on past it.
        own.rf = true;
        let past = split(db(0x1001, 0xffff_0ff2), &far, false, own);
        assert_eq!((past.guest_db, past.pass), (None, true));
        let int1 = split(db(0x1001, 0xffff_0ff0), &far, false, none());
        assert_eq!(int1.guest_db, Some(0));
    }

    #[test]
    fn l51_a_step_that_nobody_armed_is_swallowed() {
        let causes = split(db(0x1001, 0xffff_4ff0), &image(&[Breakpoint::exec(1)]), false, none());
        assert!(causes.is_spurious());
    }

    #[test]
    fn l34_a_bp_exit_without_a_patch_is_the_guests() {
        let exit = DebugExit { exception: 3, pc: 0x1000, dr6: u64::MAX };
        assert!(split(exit, &DebugImage::default(), false, none()).guest_bp);
    }

    #[test]
    fn a_watch_over_two_slots_is_one_hit() {
        let wide = Breakpoint::watch(0x30003, 5, Trigger::Write);
        let causes = split(db(0x1008, 0xffff_0ff3), &image(&[wide]), false, none());
        assert_eq!(causes.hits.len(), 1);
    }

    #[test]
    fn l31_a_bit_of_a_slot_that_served_nobody_is_nobodys() {
        // The guest has enabled its DR1 since; while the overlay was armed, slot 1 was empty.
        let far = image(&[Breakpoint::exec(0x50000)]);
        let armed = Overlay::merge(&far, 0, &[None; 4]);
        let mut since = guest([0, 0x1001, 0, 0], 0x408);
        assert!(classify(db(0x1001, 0xffff_0ff2), &far, &armed, FREE, &mut since).is_spurious());
        // With the overlay off the guest's registers are the processor's.
        let causes = classify(db(0x1001, 0xffff_0ff2), &far, &Overlay::OFF, FREE, &mut since);
        assert_eq!(causes.guest_db, Some(0b10));
    }

    #[test]
    fn l32_a_copy_that_the_guest_no_longer_wants_hits_for_nothing() {
        let far = image(&[Breakpoint::exec(0x50000)]);
        let wanted = guest([0x1001, 0x30000, 0, 0], 0x0010_000a).registers.breakpoints();
        let armed = Overlay::merge(&far, 0, &wanted);
        let mut gone = guest([0x1001, 0x30000, 0, 0], 0x400);
        let fault = classify(db(0x1001, 0xffff_0ff2), &far, &armed, FREE, &mut gone);
        assert_eq!((fault.guest_db, fault.pass, fault.idle), (None, true, 0b01));
        let trap = classify(db(0x1001, 0xffff_0ff4), &far, &armed, FREE, &mut gone);
        assert_eq!((trap.guest_db, trap.pass, trap.idle), (None, false, 0b10));
        // It wants another address there now.
        let mut moved = guest([0x2000, 0x30008, 0, 0], 0x0010_000a);
        assert_eq!(classify(db(0x1001, 0xffff_0ff6), &far, &armed, FREE, &mut moved).guest_db, None);
    }

    #[test]
    fn l22_traps_come_before_faults_whosever_they_are() {
        let x = Breakpoint::exec(0x1008);
        let w = Breakpoint::watch(0x30000, 8, Trigger::Write);
        // Ours: slot 0 the write, slot 1 the instruction behind it.
        let both = split(db(0x1008, 0xffff_0ff3), &image(&[w, x]), false, none());
        assert_eq!(both.hits.iter().map(|hit| hit.0.request).collect::<Vec<_>>(), [w]);
        let then = split(db(0x1008, 0xffff_0ff2), &image(&[w, x]), false, none());
        assert_eq!(then.hits.iter().map(|hit| hit.0.request).collect::<Vec<_>>(), [x]);
        // The guest's write and our instruction behind it: the guest's handler first.
        let own = guest([0, 0x30000, 0, 0], 0x00d0_0008);
        let mixed = split(db(0x1008, 0xffff_0ff3), &image(&[x]), false, own);
        assert_eq!((mixed.hits.len(), mixed.guest_db), (0, Some(0b10)));
        // Our write and the guest's instruction behind it: that one faults again.
        let own = guest([0, 0x1008, 0, 0], 0x408);
        let mixed = split(db(0x1008, 0xffff_0ff3), &image(&[w]), false, own);
        assert_eq!((mixed.hits.len(), mixed.guest_db), (1, None));
        // Both at one instruction share its slot, and ours comes first.
        let shared = split(db(0x1008, 0xffff_0ff1), &image(&[x]), false, own);
        assert_eq!((shared.hits.len(), shared.guest_db), (1, None));
    }

    #[test]
    fn l20_what_three_flavours_reported() {
        // (dr6, pc, what was armed, stepping) as recorded on kvm_intel, kvm_amd and the PVM flavour.
        let w = Breakpoint::watch(0x30000, 8, Trigger::Write);
        let rw = Breakpoint::watch(0x30000, 8, Trigger::Access);
        let x = Breakpoint::exec(0x1000);
        let far = Breakpoint::exec(0x50000);
        // kvm_intel: slots 0 and 2 on one store, an empty slot's address does not matter.
        let causes = split(db(0x1007, 0xffff_0ff5), &image(&[w, far, rw]), false, none());
        assert_eq!(causes.hits.iter().map(|hit| hit.0.request).collect::<Vec<_>>(), [w, rw]);
        // kvm_amd: a step onto an armed breakpoint, then the breakpoint.
        assert!(split(db(0x1000, 0xffff_4ff1), &image(&[x]), true, none()).step);
        assert_eq!(split(db(0x1000, 0xffff_0ff1), &image(&[x]), false, none()).hits.len(), 1);
        // PVM: the same in two exits of one cause each.
        assert_eq!(split(db(0x1000, 0xffff_4ff0), &image(&[x]), true, none()).hits.len(), 0);
        // kvm_intel: an access to a debug register under general detect.
        assert!(split(db(0x1000, 0xffff_2ff0), &image(&[far]), false, none()).access);
        // kvm_intel: INT1 exits on the instruction, with no cause at all.
        assert_eq!(split(db(0x1000, 0xffff_0ff0), &image(&[far]), false, none()).guest_db, Some(0));
        // kvm_amd, from an earlier guest: a bit of an address where the vCPU is not.
        assert!(split(db(0x1002, 0xffff_0ff1), &image(&[x]), false, none()).is_spurious());
    }

    proptest! {
        #[test]
        fn the_guest_is_not_asked_where_only_ours_can_be_meant(
            slots in 1u8..4, pc in prop::sample::select(vec![0x1000u64, 0x1001]), stepping: bool, bs: bool,
            db in prop::array::uniform4(0xffe_u64..0x1004),
        ) {
            let image = image(&[Breakpoint::exec(0x1000), Breakpoint::watch(0x2000, 8, Trigger::Write)]);
            // The guest has breakpoints of its own, in slots that are not hit.
            let armed = Overlay::merge(&image, 0, &guest(db, 0xa0).registers.breakpoints());
            prop_assume!((0..2).all(|n| armed.guest(n) == 0));
            let dr6 = Dr6::RESET | u64::from(slots) | if stepping && bs { Dr6::BS } else { 0 };
            classify(DebugExit { exception: 1, pc, dr6 }, &image, &armed, Expectation { stepping, arrived: false }, &mut Nobody);
        }

        #[test]
        fn l15_any_dr6_is_digested(
            (dr6, pc) in (any::<u64>(), 0xffe_u64..0x1004),
            stepping: bool,
            suspended in 0u8..16,
            (tf, rf) in (any::<bool>(), any::<bool>()),
            db in prop::array::uniform4(0xffe_u64..0x1004),
            (armed_dr7, dr7) in (any::<u64>(), any::<u64>()),
        ) {
            let image = image(&[Breakpoint::exec(0x1000), Breakpoint::watch(0x2000, 8, Trigger::Write)]);
            let armed = Overlay::merge(&image, suspended, &guest(db, armed_dr7).registers.breakpoints());
            let mut now = Guest { tf, rf, ..guest(db, dr7) };
            let exit = DebugExit { exception: 1, pc, dr6 };
            let causes = classify(exit, &image, &armed, Expectation { stepping, arrived: false }, &mut now);
            prop_assert!(causes.hits.len() <= 2);
            prop_assert!(stepping || !causes.step);
            // The guest is told of nothing that it does not want at this moment.
            let bits = causes.guest_db.unwrap_or(0);
            for n in 0..SLOTS {
                prop_assert!(bits & (1 << n) == 0 || now.registers.breakpoint(n).is_some());
            }
            prop_assert!(bits & Dr6::BS == 0 || tf && !stepping);
            prop_assert_eq!(causes.wanted & causes.idle, 0);
        }
    }
}
