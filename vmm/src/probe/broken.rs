//! What KVM claims and does not deliver.

use serde::Serialize;

use super::{BlockIrq, Capabilities, Inject, InjectBp, Int3, ReadonlyWrite, Slot, Step};

/// A capability that KVM claims, and a tiny guest saw otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BrokenClaim {
    /// The capability in the KVM API's words.
    pub claim: &'static str,
    /// The field of [`Seen`](super::Seen) that shows it.
    pub seen: &'static str,
    /// What happens.
    pub what: &'static str,
}

impl Capabilities {
    /// The claims of this host's KVM that do not hold.
    pub fn broken_claims(&self) -> Vec<BrokenClaim> {
        let seen = &self.seen;
        let claims = &self.claims;
        let mut broken = Vec::new();
        let mut check = |claimed: bool, claim, seen, what: Option<&'static str>| {
            if let Some(what) = what.filter(|_| claimed) {
                broken.push(BrokenClaim { claim, seen, what });
            }
        };
        const HW_BP: &str = "KVM_GUESTDBG_USE_HW_BP";
        let hw = claims.hardware_breakpoints;
        check(hw, HW_BP, "x_cpl0", slot(seen.x_cpl0, "execution slots never fire in kernel code"));
        check(hw, HW_BP, "x_cpl3", slot(seen.x_cpl3, "execution slots never fire in user code"));
        check(hw, HW_BP, "w_data", slot(seen.w_data, "write slots never fire in kernel code"));
        check(hw, HW_BP, "w_data_cpl3", slot(seen.w_data_cpl3, "write slots never fire in user code"));
        check(hw, HW_BP, "rw_data", slot(seen.rw_data, "access slots never fire in kernel code"));
        const SW_BP: &str = "KVM_GUESTDBG_USE_SW_BP";
        let sw = claims.software_breakpoints;
        check(
            sw,
            SW_BP,
            "int3_cpl0",
            match seen.int3_cpl0 {
                Int3::InternalError => Some("INT3 in kernel code is an emulation failure"),
                Int3::ToGuest => Some("INT3 in kernel code goes to the guest"),
                Int3::DebugExit | Int3::NotAsked | Int3::Unexpected => None,
            },
        );
        check(
            sw,
            SW_BP,
            "int3_cpl3",
            match seen.int3_cpl3 {
                Int3::InternalError => Some("INT3 in user code is an emulation failure"),
                Int3::ToGuest => Some("INT3 in user code goes to the guest"),
                Int3::DebugExit | Int3::NotAsked | Int3::Unexpected => None,
            },
        );
        const STEP: &str = "KVM_GUESTDBG_SINGLESTEP";
        let lost = |step, what| matches!(step, Step::ToGuest | Step::Never).then_some(what);
        check(claims.single_step, STEP, "ss_cpl0", lost(seen.ss_cpl0, "steps of kernel code do not come to us"));
        check(claims.single_step, STEP, "ss_cpl3", lost(seen.ss_cpl3, "steps of user code do not come to us"));
        let ignored = (seen.blockirq == BlockIrq::Ignored).then_some("interrupts are delivered in a step");
        check(claims.block_irq, "KVM_GUESTDBG_BLOCKIRQ", "blockirq", ignored);
        let injected = match seen.inject_bp_advances {
            InjectBp::Lost => Some("the #BP is lost"),
            InjectBp::Elsewhere => Some("the #BP returns to the address of an earlier exit"),
            _ => None,
        };
        check(sw, "KVM_GUESTDBG_INJECT_BP", "inject_bp_advances", injected);
        let injected = (seen.inject_db == Inject::Lost).then_some("the #DB is lost");
        check(hw, "KVM_GUESTDBG_INJECT_DB", "inject_db", injected);
        let readonly = |write| matches!(write, ReadonlyWrite::Never | ReadonlyWrite::EmulationFailure);
        const READONLY: &str = "KVM_CAP_READONLY_MEM";
        let kernel = readonly(seen.readonly_write).then_some("kernel stores to read-only memory do not exit");
        check(claims.readonly_memory, READONLY, "readonly_write", kernel);
        let user = readonly(seen.readonly_write_cpl3).then_some("user stores to read-only memory do not exit");
        check(claims.readonly_memory, READONLY, "readonly_write_cpl3", user);
        broken
    }
}

fn slot(slot: Slot, what: &'static str) -> Option<&'static str> {
    matches!(slot, Slot::Never | Slot::ToGuest).then_some(what)
}
