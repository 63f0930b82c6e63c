//! CMOS memory and real-time clock (MC146818): the host's time in UTC, and the memory sizes that old kernels look up.
//!
//! The clock cannot be set and raises no interrupts.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::DeviceEvent;
use super::bus::Device;
use crate::boot::layout;
use crate::limits::{KIB, MIB};
use crate::state::{Blob, BrokenState};

/// Index port; the data port follows it.
pub const PORT: u16 = 0x70;
/// Ports of both.
pub const PORTS: u16 = 2;

/// Register of the century, which the FADT names.
pub const CENTURY: u8 = 0x32;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;

/// Status A: update in progress.
const UPDATING: u8 = 0x80;
/// Status A: 32 kHz time base, 1024 Hz rate.
const DIVIDER: u8 = 0x26;
/// Status B: binary instead of BCD; 24 hours instead of 12.
const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;
/// Status D: the battery is good.
const VALID: u8 = 0x80;
/// Bit of the hour in 12-hour mode.
const PM: u8 = 0x80;

/// For how long before each full second an update is announced: 244 us and the 1984 us of the update itself.
const UPDATE: Duration = Duration::from_micros(2228);

/// Ports 0x70 and 0x71.
pub struct Cmos {
    index: u8,
    memory: [u8; 128],
    now: Box<dyn Fn() -> Duration + Send>,
}

/// The memory, without the clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CmosState {
    /// The register that is selected.
    pub index: u8,
    /// All registers; those of the clock are not used.
    pub memory: Blob,
}

impl std::fmt::Debug for Cmos {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cmos").field("index", &self.index).finish()
    }
}

impl Cmos {
    /// A clock that shows the host's time; `low` and `high` bytes of RAM below and above 4 GiB, `cpus` vCPUs.
    pub fn new(low: u64, high: u64, cpus: u8) -> Self {
        Self::with_clock(low, high, cpus, || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
    }

    /// As [`Cmos::new`], with the time since the epoch of 1970 from `now`.
    pub fn with_clock(low: u64, high: u64, cpus: u8, now: impl Fn() -> Duration + Send + 'static) -> Self {
        let mut cmos = Self { index: 0, memory: [0; 128], now: Box::new(now) };
        cmos.memory[usize::from(STATUS_B)] = HOURS_24;
        // The conventional places (Ralf Brown's CMOS list; SeaBIOS and OVMF read the same): KiB of base memory, KiB
        // above 1 MiB, 64 KiB units above 16 MiB and above 4 GiB, and the number of other vCPUs.
        cmos.set(0x15, 2, layout::VGA_START.min(layout::NVS_START) / KIB);
        let extended = (low.saturating_sub(MIB) / KIB).min(0xffff);
        cmos.set(0x17, 2, extended);
        cmos.set(0x30, 2, extended);
        let chunks = low.saturating_sub(16 * MIB) / (64 * KIB);
        cmos.set(0x34, 2, chunks.min(0xffff));
        cmos.set(0x5b, 3, (high / (64 * KIB)).min(0xff_ffff));
        cmos.set(0x5f, 1, u64::from(cpus.saturating_sub(1)));
        cmos
    }

    /// What is in memory.
    pub fn save(&self) -> CmosState {
        CmosState { index: self.index, memory: Blob::new(&self.memory) }
    }

    /// Takes memory as it was saved.
    ///
    /// # Errors
    /// If it is larger than there is room.
    pub fn restore(&mut self, state: &CmosState) -> Result<(), BrokenState> {
        self.memory = state.memory.padded().ok_or(BrokenState("CMOS memory"))?;
        self.index = state.index & 0x7f;
        Ok(())
    }

    fn set(&mut self, at: usize, len: usize, value: u64) {
        self.memory[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
    }

    /// The value of a register now.
    fn register(&self, index: u8) -> u8 {
        let now = (self.now)();
        let second_of_day = now.as_secs() % 86_400;
        let day_number = now.as_secs() / 86_400;
        let (year, month, day) = civil(day_number);
        let number = match index {
            SECONDS => second_of_day % 60,
            MINUTES => second_of_day / 60 % 60,
            HOURS => return self.hour((second_of_day / 3600) as u8),
            // 1970-01-01 was a Thursday; Sunday is 1.
            WEEKDAY => (day_number + 4) % 7 + 1,
            DAY => day,
            MONTH => month,
            YEAR => year % 100,
            CENTURY => year / 100,
            STATUS_A => {
                let left = Duration::from_secs(1) - Duration::from_nanos(now.subsec_nanos().into());
                return DIVIDER | if left <= UPDATE { UPDATING } else { 0 };
            }
            STATUS_C => return 0,
            STATUS_D => return VALID,
            _ => return self.memory[usize::from(index & 0x7f)],
        };
        self.encode(number as u8)
    }

    /// A number below 100 in the format that status B asks for.
    fn encode(&self, number: u8) -> u8 {
        match self.memory[usize::from(STATUS_B)] & BINARY {
            0 => ((number / 10) << 4) | (number % 10),
            _ => number,
        }
    }

    fn hour(&self, hour: u8) -> u8 {
        if self.memory[usize::from(STATUS_B)] & HOURS_24 != 0 {
            return self.encode(hour);
        }
        let twelve = match hour % 12 {
            0 => 12,
            n => n,
        };
        self.encode(twelve) | if hour >= 12 { PM } else { 0 }
    }
}

/// Year, month and day of a day number since 1970-01-01 in the Gregorian calendar: whole 400-year eras of 146,097 days,
/// then years that begin in March, so that leap days come last.
fn civil(day_number: u64) -> (u64, u64, u64) {
    let days = day_number + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

impl Device for Cmos {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // The index port reads as all ones, as on a PC.
        if let (1, Some(byte)) = (offset, data.first_mut()) {
            *byte = self.register(self.index);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<DeviceEvent> {
        // An OUT of 2 bytes sets index and data.
        for (at, byte) in (offset..).zip(data) {
            match at {
                // Bit 7 masks NMIs, of which there are none.
                0 => self.index = byte & 0x7f,
                _ => match self.index {
                    STATUS_B => self.memory[usize::from(STATUS_B)] = *byte,
                    // Beyond the clock's registers it is memory.
                    index if index > STATUS_D && index != CENTURY => {
                        self.memory[usize::from(index)] = *byte;
                    }
                    _ => {}
                },
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::GIB;

    fn at(nanos: u64) -> Cmos {
        Cmos::with_clock(64 * MIB, 0, 1, move || Duration::from_nanos(nanos))
    }

    fn get(cmos: &mut Cmos, index: u8) -> u8 {
        cmos.write(0, &[index]);
        let mut byte = [0];
        cmos.read(1, &mut byte);
        byte[0]
    }

    fn date_and_time(cmos: &mut Cmos) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|r| get(cmos, r))
    }

    #[test]
    fn known_dates() {
        for (seconds, expected) in [
            (0, [0x19, 0x70, 1, 1, 5, 0, 0, 0]),
            (951_782_399, [0x20, 0x00, 2, 0x28, 2, 0x23, 0x59, 0x59]),
            (951_782_400, [0x20, 0x00, 2, 0x29, 3, 0, 0, 0]),
            (1_709_251_199, [0x20, 0x24, 2, 0x29, 5, 0x23, 0x59, 0x59]),
            (4_107_542_400, [0x21, 0x00, 3, 1, 2, 0, 0, 0]),
        ] {
            let got = date_and_time(&mut at(seconds * 1_000_000_000));
            assert_eq!(got, expected, "{seconds}");
        }
    }

    #[test]
    fn days_follow_each_other_for_400_years() {
        let mut last = civil(0);
        assert_eq!(last, (1970, 1, 1));
        for number in 1..146_097 {
            let (year, month, day) = civil(number);
            let next = (year, month, day) == (last.0, last.1, last.2 + 1);
            let new_month = day == 1 && (year, month) == (last.0, last.1 + 1);
            let new_year = (year, month, day) == (last.0 + 1, 1, 1) && last.1 == 12;
            assert!(next || new_month || new_year, "{last:?} -> {year}-{month}-{day}");
            assert!((28..=31).contains(&last.2) || next);
            last = (year, month, day);
        }
        assert_eq!(last, (2369, 12, 31));
    }

    #[test]
    fn formats_follow_status_b() {
        let noon_13 = 13 * 3600 * 1_000_000_000;
        let mut cmos = at(noon_13 + 45 * 60_000_000_000);
        for (status, hour, minute) in
            [(HOURS_24, 0x13, 0x45), (HOURS_24 | BINARY, 13, 45), (0, 0x81, 0x45), (BINARY, 0x81, 45)]
        {
            cmos.write(0, &[STATUS_B, status]);
            assert_eq!((get(&mut cmos, HOURS), get(&mut cmos, MINUTES)), (hour, minute));
        }
    }

    #[test]
    fn an_update_is_announced_once_a_second_and_passes() {
        assert_eq!(get(&mut at(0), STATUS_A) & UPDATING, 0);
        assert_eq!(get(&mut at(500_000_000), STATUS_A) & UPDATING, 0);
        assert_eq!(get(&mut at(999_900_000), STATUS_A) & UPDATING, UPDATING);
    }

    #[test]
    fn memory_sizes_are_where_kernels_look() {
        let mut cmos = Cmos::new(3 * GIB, 2 * GIB, 4);
        let mut word = |low: u8| u16::from_le_bytes([get(&mut cmos, low), get(&mut cmos, low + 1)]);
        assert_eq!(word(0x17), 0xffff);
        assert_eq!(word(0x30), 0xffff);
        assert_eq!(u64::from(word(0x34)) * 64 * KIB, 3 * GIB - 16 * MIB);
        assert_eq!(u64::from(word(0x5b)) * 64 * KIB, 2 * GIB);
        assert_eq!(get(&mut cmos, 0x5f), 3);
        assert_eq!(get(&mut cmos, STATUS_D), VALID);
    }

    #[test]
    fn the_clock_cannot_be_set_but_memory_can() {
        let mut cmos = at(0);
        cmos.write(0, &[YEAR, 0x99]);
        assert_eq!(get(&mut cmos, YEAR), 0x70);
        cmos.write(0, &[0x8f, 0x5a]);
        assert_eq!(get(&mut cmos, 0x0f), 0x5a, "shutdown status, NMI bit ignored");
    }
}
