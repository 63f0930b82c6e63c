//! DR6 and DR7 as types in which a wrong bit pattern cannot be written (SDM vol. 3, 18.2).

/// Number of address registers, DR0-DR3.
pub const SLOTS: usize = 4;

/// What a slot triggers on: DR7's R/W field.
///
/// The pattern 10b (I/O) is left out on purpose: no owner can ask for it, and debuggers have
/// encoded "read watchpoint" that way by mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SlotCondition {
    /// 00b: instruction execution. A fault, before the instruction.
    Execute,
    /// 01b: data writes. A trap, after the instruction.
    Write,
    /// 11b: data reads and writes, but not instruction fetches. A trap.
    ReadWrite,
}

/// How many bytes a slot covers: DR7's LEN field. The address is aligned to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SlotLen {
    /// 00b, the only one allowed for [`SlotCondition::Execute`].
    One,
    /// 01b.
    Two,
    /// 11b.
    Four,
    /// 10b.
    Eight,
}

impl SlotLen {
    /// The length in bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            SlotLen::One => 1,
            SlotLen::Two => 2,
            SlotLen::Four => 4,
            SlotLen::Eight => 8,
        }
    }

    /// The longest length, up to `most`, to which `addr` is aligned.
    pub const fn longest_at(addr: u64, most: u64) -> Self {
        if addr.is_multiple_of(8) && most >= 8 {
            SlotLen::Eight
        } else if addr.is_multiple_of(4) && most >= 4 {
            SlotLen::Four
        } else if addr.is_multiple_of(2) && most >= 2 {
            SlotLen::Two
        } else {
            SlotLen::One
        }
    }

    const fn field(self) -> u64 {
        match self {
            SlotLen::One => 0b00,
            SlotLen::Two => 0b01,
            SlotLen::Eight => 0b10,
            SlotLen::Four => 0b11,
        }
    }
}

/// A DR7 value that the processor accepts: bit 10 set, bits 11, 12, 14, 15 and 63:32 clear (law 3).
///
/// KVM passes `debugreg[7]` on unchecked; a bad one fails the VM entry on VT-x.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dr7(u64);

impl Dr7 {
    /// No slot enabled.
    pub const NONE: Dr7 = Dr7(1 << 10);

    /// This value with slot `n` (0-3) enabled; the global-enable bit is used, since the local
    /// one is cleared by a hardware task switch.
    ///
    /// `None` if the combination does not exist: an execution slot is one byte long, and there
    /// are four slots.
    pub const fn enable(self, n: usize, condition: SlotCondition, len: SlotLen) -> Option<Dr7> {
        let rw = match (condition, len) {
            (SlotCondition::Execute, SlotLen::One) => 0b00,
            (SlotCondition::Execute, _) => return None,
            (SlotCondition::Write, _) => 0b01,
            (SlotCondition::ReadWrite, _) => 0b11,
        };
        if n >= SLOTS {
            return None;
        }
        let cleared = self.disable(n).0;
        Some(Dr7(cleared | 0b10 << (2 * n) | rw << (16 + 4 * n) | len.field() << (18 + 4 * n)))
    }

    /// This value with slot `n` disabled and its condition cleared.
    pub const fn disable(self, n: usize) -> Dr7 {
        if n >= SLOTS {
            return self;
        }
        Dr7(self.0 & !(0b11 << (2 * n)) & !(0b1111 << (16 + 4 * n)))
    }

    /// Whether slot `n` is enabled, locally or globally.
    pub const fn is_enabled(self, n: usize) -> bool {
        n < SLOTS && self.0 & (0b11 << (2 * n)) != 0
    }

    /// The register value.
    pub const fn bits(self) -> u64 {
        self.0
    }
}

impl Default for Dr7 {
    fn default() -> Self {
        Dr7::NONE
    }
}

/// A DR6 value as an exit or the guest has it. Bits 11 (BLD) and 16 (RTM) are active-low.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dr6(pub u64);

impl Dr6 {
    /// The reset value, and the polarity mask: XOR with it turns a DR6 value into one whose set
    /// bits are all causes (law 25).
    pub const RESET: u64 = 0xffff_0ff0;
    /// Bus lock detected; active-low.
    pub const BLD: u64 = 1 << 11;
    /// Debug-register access detected.
    pub const BD: u64 = 1 << 13;
    /// Single step.
    pub const BS: u64 = 1 << 14;
    /// Task switch.
    pub const BT: u64 = 1 << 15;
    /// A debug exception inside a transaction; active-low.
    pub const RTM: u64 = 1 << 16;

    /// The causes, active-high: B0-B3, BLD (11), BD, BS, BT, RTM (16). Everything else is zero.
    pub const fn causes(self) -> u64 {
        const CAUSES: u64 = 0b1111 | Dr6::BLD | Dr6::BD | Dr6::BS | Dr6::BT | Dr6::RTM;
        (self.0 ^ Dr6::RESET) & CAUSES
    }

    /// Whether Bn is set.
    pub const fn hit(self, n: usize) -> bool {
        n < SLOTS && self.0 & (1 << n) != 0
    }

    /// Whether BS is set.
    pub const fn single_step(self) -> bool {
        self.0 & Dr6::BS != 0
    }

    /// This value with `causes` (active-high, as [`causes`](Self::causes) gives them) added, as
    /// the processor accumulates them (law 24).
    #[must_use]
    pub const fn accumulate(self, causes: u64) -> Dr6 {
        Dr6(((self.0 ^ Dr6::RESET) | causes) ^ Dr6::RESET)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONDITIONS: [SlotCondition; 3] = [SlotCondition::Execute, SlotCondition::Write, SlotCondition::ReadWrite];
    const LENS: [SlotLen; 4] = [SlotLen::One, SlotLen::Two, SlotLen::Four, SlotLen::Eight];

    /// Reads a DR7 the slow way, field by field, straight from the SDM's table.
    fn decode(dr7: u64, n: usize) -> Option<(u64, u64)> {
        (dr7 >> (2 * n) & 3 != 0).then_some(((dr7 >> (16 + 4 * n)) & 3, (dr7 >> (18 + 4 * n)) & 3))
    }

    #[test]
    fn l3_every_dr7_that_can_be_built_is_accepted_by_the_processor() {
        // All (absent | condition x length) choices for all four slots: 13^4 values.
        let choices: Vec<Option<(SlotCondition, SlotLen)>> = std::iter::once(None)
            .chain(CONDITIONS.into_iter().flat_map(|c| LENS.into_iter().map(move |l| Some((c, l)))))
            .collect();
        let mut seen = 0;
        for a in &choices {
            for b in &choices {
                for c in &choices {
                    for d in &choices {
                        let wanted = [a, b, c, d];
                        let built = wanted.iter().enumerate().try_fold(Dr7::NONE, |dr7, (n, w)| match w {
                            None => Some(dr7),
                            Some((condition, len)) => dr7.enable(n, *condition, *len),
                        });
                        let legal = wanted
                            .iter()
                            .all(|w| !matches!(w, Some((SlotCondition::Execute, len)) if *len != SlotLen::One));
                        assert_eq!(built.is_some(), legal);
                        let Some(dr7) = built else { continue };
                        seen += 1;
                        let bits = dr7.bits();
                        assert_eq!(bits & 0xffff_ffff_0000_d800, 0, "reserved bits in {bits:#x}");
                        assert_ne!(bits & 1 << 10, 0);
                        for (n, w) in wanted.iter().enumerate() {
                            let expected = w.map(|(condition, len)| {
                                let rw = match condition {
                                    SlotCondition::Execute => 0,
                                    SlotCondition::Write => 1,
                                    SlotCondition::ReadWrite => 3,
                                };
                                let len = match len.bytes() {
                                    1 => 0,
                                    2 => 1,
                                    8 => 2,
                                    _ => 3,
                                };
                                (rw, len)
                            });
                            assert_eq!(decode(bits, n), expected);
                            assert_eq!(dr7.is_enabled(n), w.is_some());
                            assert_ne!(decode(bits, n).map(|d| d.0), Some(2), "I/O condition");
                        }
                    }
                }
            }
        }
        assert_eq!(seen, 10usize.pow(4));
    }

    #[test]
    fn dr7_slot_out_of_range_changes_nothing() {
        assert_eq!(Dr7::NONE.enable(4, SlotCondition::Write, SlotLen::One), None);
        assert_eq!(Dr7::NONE.disable(4), Dr7::NONE);
        assert!(!Dr7::NONE.is_enabled(64));
    }

    #[test]
    fn disabling_a_slot_restores_the_value_before_it() {
        for n in 0..SLOTS {
            for condition in CONDITIONS {
                for len in LENS {
                    let Some(dr7) = Dr7::NONE.enable(n, condition, len) else { continue };
                    assert_eq!(dr7.disable(n), Dr7::NONE);
                }
            }
        }
    }

    #[test]
    fn l25_dr6_causes_are_active_high_for_every_combination() {
        // The nine cause bits, all 512 combinations, against a reading bit by bit.
        let positions = [0u32, 1, 2, 3, 11, 13, 14, 15, 16];
        for combination in 0u64..512 {
            let mut raw = Dr6::RESET;
            let mut causes = 0;
            for (i, &bit) in positions.iter().enumerate() {
                if combination >> i & 1 == 1 {
                    raw ^= 1 << bit;
                    causes |= 1 << bit;
                }
            }
            assert_eq!(Dr6(raw).causes(), causes);
            assert_eq!(Dr6(Dr6::RESET).accumulate(causes), Dr6(raw));
            for n in 0..SLOTS {
                assert_eq!(Dr6(raw).hit(n), causes >> n & 1 == 1);
            }
            assert_eq!(Dr6(raw).single_step(), causes & Dr6::BS != 0);
        }
    }

    #[test]
    fn l24_accumulation_never_loses_a_cause() {
        let both = Dr6(Dr6::RESET).accumulate(0b01).accumulate(0b10);
        assert_eq!(both, Dr6(0xffff_0ff3));
        assert_eq!(both.accumulate(Dr6::BS), Dr6(0xffff_4ff3));
    }
}
