//! Whether every vCPU gets on.
//!
//! A vCPU that takes interrupts, or waits for one, gets on: what it does then is the kernel's to judge, which has watchdogs of its
//! own. One that is found with interrupts off, look after look, for as long as `hang:` says, does not.
//!
//! A Linux kernel unpacks itself and sets itself up with interrupts off, and takes the time that it takes: there a vCPU is watched
//! from when it has been seen with interrupts on.

use std::time::{Duration, Instant};

use trapline_vmm::boot::layout::AP_LOOP;
use trapline_vmm::debug::VcpuId;
use trapline_vmm::limits::PAGE_SIZE;
use trapline_vmm::vcpu::{Activity, Glance};

/// Looks in the time that a hang takes to be one. A vCPU that gets on is seen with interrupts off in all
/// of them only by accident.
const LOOKS: u32 = 24;
/// Longest and shortest time between two looks.
const SELDOM: Duration = Duration::from_secs(1);
const OFTEN: Duration = Duration::from_millis(5);

/// The looks at all vCPUs.
#[derive(Debug)]
pub(crate) struct Watchdog {
    /// Whether each vCPU is watched yet.
    watched: Vec<bool>,
    /// Since when each vCPU has been found with interrupts off, and how often.
    stuck: Vec<Option<(Instant, u32)>>,
}

impl Watchdog {
    /// `from_the_start`: a guest that is no Linux kernel is watched from its first instruction on.
    pub(crate) fn new(vcpus: usize, from_the_start: bool) -> Self {
        Self { watched: vec![from_the_start; vcpus], stuck: vec![None; vcpus] }
    }

    /// How long to wait between two looks, if a hang is one after `shortest`.
    pub(crate) fn interval(shortest: Duration) -> Duration {
        (shortest / LOOKS).clamp(OFTEN, SELDOM)
    }

    /// A vCPU as it was just seen; how long it has been stuck by now, and enough looks to say so.
    pub(crate) fn seen(&mut self, vcpu: VcpuId, glance: &Glance, now: Instant) -> Option<Duration> {
        let (stuck, watched) = (self.stuck.get_mut(vcpu.index())?, self.watched.get_mut(vcpu.index())?);
        *watched |= glance.interrupts;
        // A debugger holds it, or it has not been started, by SIPI or through the mailbox.
        let waits = matches!(glance.activity, Activity::WaitForSipi | Activity::Other(_))
            || (AP_LOOP..AP_LOOP + PAGE_SIZE).contains(&glance.pc);
        let is_exempt = !*watched || waits || glance.parked.is_some();
        if glance.interrupts || is_exempt {
            *stuck = None;
            return None;
        }
        let (since, looks) = stuck.map_or((now, 1), |(since, looks)| (since, looks.saturating_add(1)));
        *stuck = Some((since, looks));
        // However rarely it could be looked at.
        (looks >= LOOKS.min(4)).then(|| now.saturating_duration_since(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(100);

    fn glance(interrupts: bool) -> Glance {
        Glance { pc: 0, interrupts, cpl: 0, activity: Activity::Runnable, parked: None }
    }

    #[test]
    fn only_who_is_found_with_interrupts_off_each_time_is_stuck() {
        let mut watchdog = Watchdog::new(2, true);
        let start = Instant::now();
        for n in 0..50 {
            let now = start + STEP * n;
            let stuck = watchdog.seen(VcpuId(0), &glance(false), now);
            assert_eq!(stuck, (n >= 3).then_some(STEP * n));
            assert_eq!(watchdog.seen(VcpuId(1), &glance(n % 3 == 2), now), None);
        }
        assert_eq!(watchdog.seen(VcpuId(0), &glance(true), start + STEP * 50), None);
        assert_eq!(watchdog.seen(VcpuId(0), &glance(false), start + STEP * 51), None, "it begins anew");
    }

    #[test]
    fn who_is_held_or_was_not_started_is_not_stuck() {
        let mut watchdog = Watchdog::new(1, true);
        let start = Instant::now();
        for n in 0..50 {
            let parked = Glance { parked: Some(start), ..glance(false) };
            let waits = Glance { activity: Activity::WaitForSipi, ..glance(false) };
            let polls = Glance { pc: AP_LOOP + 7, ..glance(false) };
            let seen = [parked, waits, polls][n as usize % 3];
            assert_eq!(watchdog.seen(VcpuId(0), &seen, start + STEP * n), None);
        }
    }

    #[test]
    fn a_linux_kernel_is_watched_once_it_takes_interrupts() {
        let mut watchdog = Watchdog::new(1, false);
        let start = Instant::now();
        let look = |watchdog: &mut Watchdog, n: u32, interrupts| {
            watchdog.seen(VcpuId(0), &glance(interrupts), start + STEP * n)
        };
        assert!((0..50).all(|n| look(&mut watchdog, n, false).is_none()));
        assert_eq!(look(&mut watchdog, 50, true), None);
        assert_eq!((51..60).map(|n| look(&mut watchdog, n, false)).last(), Some(Some(STEP * 8)));
    }

    #[test]
    fn a_halted_vcpu_that_no_interrupt_can_wake_is_stuck() {
        let mut watchdog = Watchdog::new(1, true);
        let start = Instant::now();
        let halted = Glance { activity: Activity::Halted, ..glance(false) };
        let last = (0..10).map(|n| watchdog.seen(VcpuId(0), &halted, start + STEP * n)).last();
        assert_eq!(last, Some(Some(STEP * 9)));
    }

    #[test]
    fn looks_are_neither_rare_nor_without_pause() {
        assert_eq!(Watchdog::interval(Duration::from_secs(10)), Duration::from_secs(10) / LOOKS);
        assert_eq!(Watchdog::interval(Duration::from_secs(1000)), SELDOM);
        assert_eq!(Watchdog::interval(Duration::from_millis(10)), OFTEN);
    }
}
