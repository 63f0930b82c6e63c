//! The interrupt controllers, the timer and the clock that KVM has in the kernel.

use serde::{Deserialize, Serialize};

use super::Word;

/// Redirection entries of the I/O APIC.
pub const IOAPIC_PINS: usize = 24;

/// What KVM keeps beside the vCPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChipState {
    /// The two 8259s, master and slave.
    pub pics: [PicState; 2],
    /// The I/O APIC.
    pub ioapic: IoApicState,
    /// The 8254.
    pub pit: PitState,
    /// Nanoseconds of kvmclock since boot. It stands still while the machine is a file.
    pub clock_ns: u64,
}

macro_rules! bytes {
    ($(#[$doc:meta])* $name:ident: $($field:ident)*) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
        #[allow(missing_docs)] // KVM's names (struct kvm_pic_state, kvm_pit_channel_state)
        pub struct $name { $(pub $field: u8),* }
    };
}

bytes! {
    /// One 8259.
    PicState: last_irr irr imr isr priority_add irq_base read_reg_select poll special_mask init_state auto_eoi
        rotate_on_auto_eoi special_fully_nested_mode init4 elcr elcr_mask
}

/// The I/O APIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    /// Where it is in guest-physical memory.
    pub base: Word,
    /// The register that is selected.
    pub select: Word,
    /// Its id.
    pub id: Word,
    /// Interrupt requests, one bit a pin.
    pub irr: Word,
    /// Redirection entries.
    pub redirections: [Word; IOAPIC_PINS],
}

/// The 8254.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    /// Its counters. They begin anew with their counts: what was left of one is not kept by KVM.
    pub channels: [PitChannel; 3],
    /// KVM_PIT_FLAGS_HPET_LEGACY and KVM_PIT_FLAGS_SPEAKER_DATA_ON.
    pub flags: u32,
}

/// A counter of the 8254.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PitChannel {
    /// What it counts down from, up to 65536.
    pub count: u32,
    /// A count that was latched.
    pub latched_count: u16,
    /// Everything else.
    #[serde(flatten)]
    pub access: PitAccess,
}

bytes! {
    /// How a counter is read and written.
    PitAccess: count_latched status_latched status read_state write_state write_latch rw_mode mode bcd gate
}
