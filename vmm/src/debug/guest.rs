//! The lowest owner level: the guest's own debug registers (laws 30-33).
//!
//! While slots of ours are armed, KVM gives the processor our registers and keeps the guest's
//! aside: what the guest armed would silently not fire. So its breakpoints are copied into the
//! slots that the image leaves free, for each vCPU its own, and a hit on one is translated back
//! into the number under which the guest knows it.
//!
//! ```text
//!   image in force   DR0 ours   DR1  -     DR2  -     DR3 ours
//!   guest's own      DR0 x      DR1  -     DR2  y     DR3  x
//!   physical         DR0 ours   DR1 x:0,3  DR2 y:2    DR3 ours
//! ```

use super::{DebugImage, Dr7, SLOTS, SlotCondition, SlotLen};

/// The guest's own debug registers, as it reads them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GuestRegisters {
    /// DR0-DR3.
    pub db: [u64; SLOTS],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
}

/// What one of the guest's address registers asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GuestBreakpoint {
    /// First linear address, aligned to the length as the processor takes it.
    pub addr: u64,
    /// What triggers it.
    pub condition: SlotCondition,
    /// How many bytes it covers.
    pub len: SlotLen,
}

/// What each of the guest's address registers asks for, by the guest's own numbers.
pub type GuestBreakpoints = [Option<GuestBreakpoint>; SLOTS];

/// DR7.GD: the next access to a debug register faults.
pub const GENERAL_DETECT: u64 = 1 << 13;

impl GuestRegisters {
    /// What register `n` asks for; `None` if it is disabled, or asks for what never fires under
    /// KVM: I/O accesses (all of them are intercepted before they could match) and execution of
    /// more than one byte (undefined, SDM vol. 3, 18.2.4).
    pub fn breakpoint(&self, n: usize) -> Option<GuestBreakpoint> {
        if n >= SLOTS || self.dr7 >> (2 * n) & 0b11 == 0 {
            return None;
        }
        let len = match self.dr7 >> (18 + 4 * n) & 0b11 {
            0b00 => SlotLen::One,
            0b01 => SlotLen::Two,
            0b10 => SlotLen::Eight,
            _ => SlotLen::Four,
        };
        let condition = match (self.dr7 >> (16 + 4 * n) & 0b11, len) {
            (0b00, SlotLen::One) => SlotCondition::Execute,
            (0b01, _) => SlotCondition::Write,
            (0b11, _) => SlotCondition::ReadWrite,
            _ => return None,
        };
        Some(GuestBreakpoint { addr: self.db[n] & !(len.bytes() - 1), condition, len })
    }

    /// What all four ask for.
    pub fn breakpoints(&self) -> GuestBreakpoints {
        std::array::from_fn(|n| self.breakpoint(n))
    }

    /// Whether the guest wants the next access to a debug register to fault.
    pub const fn general_detect(&self) -> bool {
        self.dr7 & GENERAL_DETECT != 0
    }
}

/// What the debug registers of one vCPU hold for one entry: the slots of the image, less those
/// that it steps off, and in the others what the guest asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Overlay {
    addresses: [u64; SLOTS],
    dr7: Dr7,
    ours: u8,
    /// Slots that a step has for itself, one bit each.
    lent: u8,
    /// By physical slot: the guest's registers that it serves, one bit each.
    guest: [u8; SLOTS],
    /// What the guest's registers asked for when this was made.
    wanted: GuestBreakpoints,
    /// The guest's registers that found no slot.
    lost: u8,
}

impl Overlay {
    /// Nothing of ours is armed: KVM gives the processor the guest's own registers.
    pub const OFF: Overlay = Overlay {
        addresses: [0; SLOTS],
        dr7: Dr7::NONE,
        ours: 0,
        lent: 0,
        guest: [0; SLOTS],
        wanted: [None; SLOTS],
        lost: 0,
    };

    /// `image` without the slots of which a bit is set in `suspended`, and `guest` in what is left.
    ///
    /// The guest's registers are served in their order, each by a slot that has the same address,
    /// condition and length already, or by the first free one. With no slot of ours the overlay
    /// is off, and the guest's registers serve themselves.
    pub fn merge(image: &DebugImage, suspended: u8, guest: &GuestBreakpoints) -> Overlay {
        Overlay::for_step(image, suspended, guest).or_off()
    }

    /// As [`merge`](Self::merge), but on: a step is about to [lend](Self::lend) itself slots.
    pub fn for_step(image: &DebugImage, suspended: u8, guest: &GuestBreakpoints) -> Overlay {
        let mut overlay =
            Overlay { addresses: image.addresses(), dr7: image.dr7_without(suspended), wanted: *guest, ..Overlay::OFF };
        // A slot that is stepped off stays the image's: what a number means does not change
        // under hits that are on their way (law 6).
        let mut held: [Option<GuestBreakpoint>; SLOTS] = std::array::from_fn(|n| {
            let slot = image.slots()[n].as_ref()?;
            Some(GuestBreakpoint { addr: slot.addr, condition: slot.condition, len: slot.len })
        });
        overlay.ours = (0..SLOTS).filter(|&n| overlay.dr7.is_enabled(n)).fold(0, |bits, n| bits | 1 << n);
        for (index, wanted) in guest.iter().enumerate() {
            let Some(wanted) = wanted else { continue };
            let shared = held.iter().position(|held| held.as_ref() == Some(wanted));
            let Some(n) = shared.or_else(|| held.iter().position(Option::is_none)) else {
                overlay.lost |= 1 << index;
                continue;
            };
            // An execution slot longer than one byte is not among what the guest can ask for.
            let Some(dr7) = overlay.dr7.enable(n, wanted.condition, wanted.len) else { continue };
            overlay.dr7 = dr7;
            overlay.addresses[n] = wanted.addr;
            overlay.guest[n] |= 1 << index;
            held[n] = Some(*wanted);
        }
        overlay
    }

    /// Off, if there is nothing in it but what is the guest's.
    #[must_use]
    pub const fn or_off(self) -> Overlay {
        if self.is_on() { self } else { Overlay::OFF }
    }

    /// DR0-DR3.
    pub const fn addresses(&self) -> [u64; SLOTS] {
        self.addresses
    }

    /// DR7.
    pub const fn dr7(&self) -> Dr7 {
        self.dr7
    }

    /// Whether the guest's own registers are masked.
    pub const fn is_on(&self) -> bool {
        self.ours | self.lent != 0
    }

    /// Whether physical slot `n` is armed for an owner of ours.
    pub const fn is_ours(&self, n: usize) -> bool {
        n < SLOTS && self.ours & (1 << n) != 0
    }

    /// The guest's registers that physical slot `n` serves, one bit each. With the overlay off
    /// each serves itself, whether the guest enabled it or not.
    pub const fn guest(&self, n: usize) -> u8 {
        match n < SLOTS {
            true if self.is_on() => self.guest[n],
            true => 1 << n,
            false => 0,
        }
    }

    /// What the guest's register `index` was armed for here; `None` with the overlay off, and if
    /// it asked for nothing or found no slot.
    pub fn served(&self, index: usize) -> Option<GuestBreakpoint> {
        let wanted = self.wanted.get(index).copied().flatten()?;
        self.guest.iter().any(|served| served & (1 << index) != 0).then_some(wanted)
    }

    /// Whether physical slot `n` holds nothing.
    pub const fn is_free(&self, n: usize) -> bool {
        n < SLOTS && !self.dr7.is_enabled(n)
    }

    /// What physical slot `n` holds; `None` if nothing.
    pub fn holds(&self, n: usize) -> Option<GuestBreakpoint> {
        GuestRegisters { db: self.addresses, dr6: 0, dr7: self.dr7.bits() }.breakpoint(n)
    }

    /// Whether the vCPU would not get past the instruction at `pc`.
    pub fn stops_at(&self, pc: u64) -> bool {
        let here = |held: GuestBreakpoint| held.condition == SlotCondition::Execute && held.addr == pc;
        (0..SLOTS).any(|n| self.holds(n).is_some_and(here))
    }

    /// Puts an execution slot at `addr` in the place of what slot `n` holds, for this entry: it is
    /// neither ours nor the guest's. Whether there is such a slot.
    pub fn lend(&mut self, n: usize, addr: u64) -> bool {
        let Some(dr7) = self.dr7.disable(n).enable(n, SlotCondition::Execute, SlotLen::One) else { return false };
        (self.addresses[n], self.dr7, self.guest[n]) = (addr, dr7, 0);
        self.ours &= !(1 << n);
        self.lent |= 1 << n;
        true
    }

    /// The guest's registers that found no slot: its level is the lowest, and loses (law 27).
    pub const fn lost(&self) -> u8 {
        self.lost
    }
}

/// How often a copy may hit for nothing before it is dropped.
const IDLE_HITS: u8 = 16;

/// What a guest asked for at some time, where its writes to the debug registers are not reported.
///
/// A kernel disables a thread's breakpoints when it switches to another and enables them when it
/// comes back, and both go unseen. So a copy stays armed when the guest is found to have disabled
/// its original; a hit counts only if the guest has it enabled at that moment. One that keeps
/// hitting for nothing is dropped until the guest is seen to want it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Remembered {
    copies: [Option<(GuestBreakpoint, u8)>; SLOTS],
}

impl Remembered {
    /// The guest's registers were read.
    pub fn see(&mut self, now: &GuestBreakpoints) {
        for (copy, now) in self.copies.iter_mut().zip(now) {
            if let Some(now) = *now {
                let idle = copy.filter(|(known, _)| *known == now).map_or(0, |(_, idle)| idle);
                *copy = Some((now, idle));
            }
        }
    }

    /// Forgets what the guest does not ask for now.
    pub fn only(&mut self, now: &GuestBreakpoints) {
        *self = Remembered::default();
        self.see(now);
    }

    /// The copy of register `index` hit, and the guest wanted it or not.
    pub fn hit(&mut self, index: usize, wanted: bool) {
        let Some(copy) = self.copies.get_mut(index) else { return };
        *copy = match *copy {
            Some((known, _)) if wanted => Some((known, 0)),
            Some((known, idle)) if idle + 1 < IDLE_HITS => Some((known, idle + 1)),
            _ => None,
        };
    }

    /// What to arm.
    pub fn breakpoints(&self) -> GuestBreakpoints {
        self.copies.map(|copy| copy.map(|(known, _)| known))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::debug::{Breakpoint, Epoch, Owner, Slot, SlotOwner};
    use proptest::prelude::*;

    const CONDITIONS: [SlotCondition; 3] = [SlotCondition::Execute, SlotCondition::Write, SlotCondition::ReadWrite];
    const LENS: [SlotLen; 4] = [SlotLen::One, SlotLen::Two, SlotLen::Four, SlotLen::Eight];

    fn slot(wanted: GuestBreakpoint) -> Slot {
        let request = Breakpoint::exec(wanted.addr);
        let owners = vec![SlotOwner { owner: Owner::GDB, request, handler: None }];
        Slot { addr: wanted.addr, len: wanted.len, condition: wanted.condition, owners }
    }

    fn any_breakpoint() -> impl Strategy<Value = GuestBreakpoint> {
        // Few addresses, so that they are shared.
        (0u64..4, prop::sample::select(&CONDITIONS[..]), prop::sample::select(&LENS[..])).prop_map(
            |(addr, condition, len)| {
                let len = if condition == SlotCondition::Execute { SlotLen::One } else { len };
                GuestBreakpoint { addr: addr * 8, condition, len }
            },
        )
    }

    /// Reads DR0-3 and DR7 field by field, as the processor does.
    fn armed(addresses: [u64; SLOTS], dr7: u64) -> GuestBreakpoints {
        GuestRegisters { db: addresses, dr6: 0, dr7 }.breakpoints()
    }

    #[test]
    fn l30_every_dr7_of_a_guest_is_read_as_the_processor_reads_it() {
        // Each slot's six bits in every combination; the slots are independent.
        for n in 0..SLOTS {
            for bits in 0u64..64 {
                let (enable, rw, len) = (bits & 3, bits >> 2 & 3, bits >> 4);
                let dr7 = 0x400 | enable << (2 * n) | rw << (16 + 4 * n) | len << (18 + 4 * n);
                let mut db = [0; SLOTS];
                db[n] = 0x1007;
                let read = GuestRegisters { db, dr6: 0, dr7 }.breakpoint(n);
                let bytes = [1, 2, 8, 4][len as usize];
                let legal = enable != 0 && rw != 2 && (rw != 0 || len == 0);
                assert_eq!(read.is_some(), legal, "{dr7:#x}");
                if let Some(read) = read {
                    assert_eq!((read.addr, read.len.bytes()), (0x1007 / bytes * bytes, bytes));
                    assert_eq!(CONDITIONS.iter().position(|&c| c == read.condition), Some([0, 1, 9, 2][rw as usize]));
                }
            }
        }
        assert_eq!(GuestRegisters { dr7: u64::MAX, ..GuestRegisters::default() }.breakpoint(4), None);
    }

    proptest! {
        #[test]
        fn l32_the_merge_agrees_with_a_naive_one(
            ours in prop::array::uniform4(prop::option::of(any_breakpoint())),
            suspended in 0u8..16,
            guest in prop::array::uniform4(prop::option::of(any_breakpoint())),
        ) {
            let image = DebugImage::new(Epoch(1), ours.map(|ours| ours.map(slot)));
            let overlay = Overlay::merge(&image, suspended, &guest);
            let running: Vec<usize> =
                (0..SLOTS).filter(|&n| ours[n].is_some() && suspended & 1 << n == 0).collect();
            if running.is_empty() {
                prop_assert_eq!(overlay, Overlay::OFF);
                return Ok(());
            }
            let physical = armed(overlay.addresses(), overlay.dr7().bits());
            for n in 0..SLOTS {
                // Ours is where the image has it, or off.
                prop_assert_eq!(overlay.is_ours(n), running.contains(&n));
                if overlay.is_ours(n) {
                    prop_assert_eq!(physical[n], ours[n]);
                }
                // A slot serves exactly those registers that ask for what it holds.
                for (index, wish) in guest.iter().enumerate().filter(|(index, _)| overlay.guest(n) & 1 << index != 0) {
                    prop_assert!(physical[n].is_some());
                    prop_assert_eq!(physical[n], *wish);
                    prop_assert_eq!(overlay.served(index), *wish);
                }
                // Nothing is armed for nobody, and no slot of the image is given away.
                prop_assert_eq!(physical[n].is_some(), overlay.is_ours(n) || overlay.guest(n) != 0);
                if let (Some(theirs), Some(ours)) = (physical[n], ours[n]) {
                    prop_assert_eq!(theirs, ours);
                }
            }
            // The naive way: different wishes in the guest's order, as many as there are free slots.
            let mut free = ours.iter().filter(|ours| ours.is_none()).count();
            let mut had: Vec<GuestBreakpoint> = ours.iter().flatten().copied().collect();
            for (index, wish) in guest.into_iter().enumerate() {
                let places = (0..SLOTS).filter(|&n| overlay.guest(n) & 1 << index != 0).count();
                let Some(wish) = wish else { prop_assert_eq!(places, 0); continue };
                let served = had.contains(&wish) || free > 0;
                if !had.contains(&wish) && free > 0 {
                    free -= 1;
                    had.push(wish);
                }
                prop_assert_eq!(places, usize::from(served));
                prop_assert_eq!(overlay.lost() & 1 << index != 0, !served);
            }
        }

        #[test]
        fn l31_what_is_remembered_is_what_was_last_wanted(
            looks in prop::collection::vec((prop::array::uniform4(prop::option::of(any_breakpoint())), any::<bool>()), 1..8)
        ) {
            let mut remembered = Remembered::default();
            let mut shadow = [None; SLOTS];
            for (look, exactly) in looks {
                if exactly {
                    remembered.only(&look);
                    shadow = look;
                } else {
                    remembered.see(&look);
                    shadow = std::array::from_fn(|n| look[n].or(shadow[n]));
                }
                prop_assert_eq!(remembered.breakpoints(), shadow);
            }
        }
    }

    #[test]
    fn a_copy_that_only_hits_for_nothing_is_dropped() {
        let wanted = GuestBreakpoint { addr: 8, condition: SlotCondition::Execute, len: SlotLen::One };
        let mut remembered = Remembered::default();
        remembered.see(&[Some(wanted), None, None, None]);
        for _ in 0..100 {
            // A hit that counts now and then keeps it.
            (1..IDLE_HITS).for_each(|_| remembered.hit(0, false));
            remembered.hit(0, true);
        }
        assert_eq!(remembered.breakpoints()[0], Some(wanted));
        (0..IDLE_HITS).for_each(|_| remembered.hit(0, false));
        assert_eq!(remembered.breakpoints()[0], None);
        remembered.hit(0, true);
        remembered.hit(7, true);
        assert_eq!(remembered.breakpoints(), [None; SLOTS]);
    }
}
