//! A trap while the guest runs: what happens at each hit, on the thread of the vCPU that hit it.
//!
//! Most hits end here. One whose condition is false, that is only counted or logged, costs no message and stops
//! nobody; what is logged goes into a bounded channel that the event loop empties when it gets to it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Instant;

use trapline_vmm::debug::{Disposition, Handler, Hit, PortHandler, PortHit, Stored, VcpuId};
use trapline_vmm::vcpu::Registers;

use crate::report::Change;
use crate::rules::{Action, Condition, Context, Register, Rule, RuleError};
use crate::symbols::Symbols;

/// Most logged hits that wait for the event loop. What comes on top of them is counted and not logged.
pub(crate) const LOG_ROOM: usize = 1 << 16;

/// What the caller of the library does at a hit, instead of a rule's action.
pub type Callback = Arc<dyn Fn(&mut TrapHit<'_, '_>) -> Disposition + Send + Sync>;

/// How often a trap was hit. It lives as long as the run, however often the trap is armed anew.
#[derive(Debug)]
pub(crate) struct Counters {
    /// With the condition true, by vCPU.
    hits: Box<[AtomicU64]>,
    /// Their sum, which gives each hit its number.
    total: AtomicU64,
    unmet: AtomicU64,
    /// The action of a trap that is taken once has been taken.
    pub(crate) done: AtomicBool,
    /// What was not logged for want of room.
    pub(crate) lost: AtomicU64,
}

impl Counters {
    pub(crate) fn new(vcpus: usize) -> Self {
        Self {
            hits: (0..vcpus).map(|_| AtomicU64::new(0)).collect(),
            total: AtomicU64::new(0),
            unmet: AtomicU64::new(0),
            done: AtomicBool::new(false),
            lost: AtomicU64::new(0),
        }
    }

    /// One more on this vCPU; how many there were on all of them before.
    pub(crate) fn count(&self, vcpu: VcpuId) -> u64 {
        self.count_for(vcpu);
        self.total.fetch_add(1, Ordering::Relaxed)
    }

    fn count_for(&self, vcpu: VcpuId) {
        if let Some(hits) = self.hits.get(vcpu.index()) {
            hits.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The same, unless there are so many already: then it is none more.
    pub(crate) fn count_up_to(&self, most: u64, vcpu: VcpuId) -> Option<u64> {
        let one_more = |total: u64| (total < most).then_some(total + 1);
        let before = self.total.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
        self.count_for(vcpu);
        Some(before)
    }

    pub(crate) fn by_vcpu(&self) -> Vec<u64> {
        self.hits.iter().map(|hits| hits.load(Ordering::Relaxed)).collect()
    }

    pub(crate) fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    pub(crate) fn unmet(&self) -> u64 {
        self.unmet.load(Ordering::Relaxed)
    }
}

/// One hit that counted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Counted {
    /// Index of the trap.
    pub(crate) trap: usize,
    pub(crate) vcpu: VcpuId,
    pub(crate) at: Instant,
    pub(crate) pc: u64,
    pub(crate) change: Option<Change>,
    pub(crate) hits_before: u64,
}

/// Hits that stop the world, until the event loop asks for them.
#[derive(Debug, Default)]
pub(crate) struct Fired(Mutex<VecDeque<Counted>>);

impl Fired {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Counted>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, hit: Counted) {
        self.lock().push_back(hit);
    }

    /// What this vCPU has stopped for, oldest first.
    pub(crate) fn take(&self, vcpu: VcpuId) -> Vec<Counted> {
        let mut all = self.lock();
        let (its, others): (Vec<_>, Vec<_>) = all.drain(..).partition(|hit| hit.vcpu == vcpu);
        *all = others.into();
        its
    }
}

/// One rule, as the vCPU threads see it.
pub(crate) struct Trap {
    pub(crate) index: usize,
    pub(crate) rule: Rule,
    pub(crate) counters: Arc<Counters>,
    pub(crate) callback: Option<Callback>,
    pub(crate) log: SyncSender<Counted>,
    pub(crate) fired: Arc<Fired>,
}

impl Trap {
    /// One hit more, and how many there were before. `once` is up to the hit that the action is taken for: what other
    /// vCPUs hit until the trap is disarmed is none. A callback may let any hit go, so it has to see each.
    pub(crate) fn count(&self, vcpu: VcpuId) -> Option<u64> {
        if self.rule.once && self.callback.is_none() {
            return self.counters.count_up_to(self.rule.count.unwrap_or(1), vcpu);
        }
        Some(self.counters.count(vcpu))
    }

    /// Whether a hit that so many came before is one of those that the action is taken for. Asked once for each.
    pub(crate) fn is_due(&self, hits_before: u64) -> bool {
        let is_counted = hits_before + 1 >= self.rule.count.unwrap_or(1);
        is_counted && !(self.rule.once && self.counters.done.swap(true, Ordering::AcqRel))
    }

    /// What comes of a hit whose condition holds.
    fn act(&self, hit: Counted) -> Disposition {
        let rule = &self.rule;
        if !self.is_due(hit.hits_before) {
            return Disposition::Continue;
        }
        match rule.action {
            // Who disarms a trap that is done is the event loop.
            Action::Log | Action::Ignore if rule.once => self.stop(hit),
            Action::Ignore => Disposition::Continue,
            Action::Log => {
                if let Err(TrySendError::Full(_)) = self.log.try_send(hit) {
                    self.counters.lost.fetch_add(1, Ordering::Relaxed);
                }
                Disposition::Continue
            }
            Action::Fail | Action::Backtrace | Action::Snapshot | Action::Gdb => self.stop(hit),
        }
    }

    fn stop(&self, hit: Counted) -> Disposition {
        self.fired.push(hit);
        Disposition::Stop
    }

    /// Not on another vCPU than the rule says, nor between the one time that the action was taken and the disarming.
    fn is_wanted(&self, vcpu: VcpuId) -> bool {
        self.rule.cpu.is_none_or(|cpu| cpu == vcpu.0) && !(self.rule.once && self.counters.done.load(Ordering::Acquire))
    }

    fn holds(&self, condition: Option<&Condition>, moment: &mut Moment<'_, '_>) -> bool {
        condition.is_none_or(|condition| condition.holds(moment).unwrap_or(false)) || self.is_unmet()
    }

    /// One hit more whose condition is false, which this is.
    fn is_unmet(&self) -> bool {
        self.counters.unmet.fetch_add(1, Ordering::Relaxed);
        false
    }
}

/// One address of a trap, armed.
pub(crate) struct Point {
    trap: Arc<Trap>,
    condition: Option<Condition>,
    watched: Option<Watched>,
}

/// A watched variable that is small enough to have a value.
struct Watched {
    addr: u64,
    len: usize,
    /// What it was when it was last seen. Slots tell that a store was made, not what it replaced.
    last: AtomicU64,
    is_known: AtomicBool,
}

impl Point {
    /// `watched`: address, length and present value of a variable of at most eight bytes.
    pub(crate) fn new(
        trap: Arc<Trap>,
        condition: Option<Condition>,
        watched: Option<(u64, usize, Option<u64>)>,
    ) -> Self {
        let watched = watched.filter(|(_, len, _)| (1..=8).contains(len)).map(|(addr, len, value)| Watched {
            addr,
            len,
            last: AtomicU64::new(value.unwrap_or(0)),
            is_known: AtomicBool::new(value.is_some()),
        });
        Self { trap, condition, watched }
    }

    fn hit(&self, hit: &mut Hit<'_>) -> Disposition {
        let trap = &*self.trap;
        if !trap.is_wanted(hit.vcpu) {
            return Disposition::Continue;
        }
        let change = self.watched.as_ref().and_then(|watched| watched.change(hit));
        let mut moment = Moment { change, vcpu: hit.vcpu, state: None, guest: Guest::Hit(hit) };
        if !trap.holds(self.condition.as_ref(), &mut moment) {
            return Disposition::Continue;
        }
        let (vcpu, pc) = (hit.vcpu, hit.pc);
        let Some(hits_before) = trap.count(vcpu) else { return Disposition::Continue };
        if let Some(callback) = &trap.callback {
            let mut seen = TrapHit { hit, change, hits_before };
            if callback(&mut seen) == Disposition::Continue {
                return Disposition::Continue;
            }
        }
        trap.act(Counted { trap: trap.index, vcpu, at: Instant::now(), pc, change, hits_before })
    }
}

impl Watched {
    fn change(&self, hit: &mut Hit<'_>) -> Option<Change> {
        let mut bytes = [0; 8];
        if hit.read(self.addr, &mut bytes[..self.len]) != self.len {
            return None;
        }
        let new = u64::from_le_bytes(bytes);
        let before = hit.stored.map(|stored| self.before(bytes, stored));
        let last = self.last.swap(new, Ordering::Relaxed);
        let was_known = self.is_known.swap(true, Ordering::Relaxed);
        Some(Change { old: before.or(was_known.then_some(last))?, new })
    }

    /// The value before a store of which the bytes are known.
    fn before(&self, mut bytes: [u8; 8], stored: &Stored) -> u64 {
        for (at, old) in (stored.addr..).zip(&stored.old) {
            let inside = at.checked_sub(self.addr).and_then(|n| usize::try_from(n).ok());
            if let Some(byte) = inside.filter(|n| *n < self.len).and_then(|n| bytes.get_mut(n)) {
                *byte = *old;
            }
        }
        u64::from_le_bytes(bytes)
    }
}

/// One handler for all traps that have the same address, length and trigger.
pub(crate) fn handler(points: Vec<Point>) -> Handler {
    Handler::new(move |hit| {
        // All of them have their say, whatever the first of them wants.
        points.iter().fold(Disposition::Continue, |all, point| match point.hit(hit) {
            Disposition::Stop => Disposition::Stop,
            Disposition::Continue => all,
        })
    })
}

/// What takes the hits of one rule out of its log.
#[derive(Debug)]
pub struct Hits(Receiver<Counted>);

impl Hits {
    /// How many hits were logged since the last call.
    pub fn take(&self) -> usize {
        self.0.try_iter().count()
    }
}

/// The handler that a run gives a breakpoint for this rule, and its log: for a VM that is driven by hand. The condition
/// may hold no names, and an action that stops is followed by a stop of the world.
///
/// # Errors
/// A name in the condition.
pub fn rule_handler(rule: &Rule, vcpus: usize) -> Result<(Handler, Hits), RuleError> {
    let (log, logged) = sync_channel(LOG_ROOM);
    let condition = rule.condition.as_ref().map(|condition| condition.bind(&Symbols::none())).transpose()?;
    let (counters, fired) = (Arc::new(Counters::new(vcpus)), Arc::default());
    let trap = Trap { index: 0, rule: rule.clone(), counters, callback: None, log, fired };
    Ok((handler(vec![Point::new(Arc::new(trap), condition, None)]), Hits(logged)))
}

/// A trap on a port. Its handler lasts as long as the VM; what is known of the condition's names changes.
pub(crate) struct PortPoint {
    trap: Arc<Trap>,
    /// `None` as long as its names lead nowhere yet: it has no value then, and is not met.
    condition: RwLock<Option<Option<Condition>>>,
}

impl PortPoint {
    pub(crate) fn new(trap: Arc<Trap>) -> Self {
        Self { trap, condition: RwLock::new(None) }
    }

    pub(crate) fn rule(&self) -> &Rule {
        &self.trap.rule
    }

    pub(crate) fn bind(&self, condition: Option<Condition>) {
        *self.condition.write().unwrap_or_else(PoisonError::into_inner) = Some(condition);
    }

    fn hit(&self, hit: &mut PortHit<'_>) -> Disposition {
        let trap = &*self.trap;
        if !trap.is_wanted(hit.vcpu) {
            return Disposition::Continue;
        }
        // What goes through a port has no value before.
        let change = Some(Change { old: 0, new: u64::from(hit.access.value) });
        let (vcpu, pc) = (hit.vcpu, hit.state().map_or(0, |state| state.pc()));
        let mut moment = Moment { change, vcpu, state: None, guest: Guest::Port(hit) };
        let holds = match &*self.condition.read().unwrap_or_else(PoisonError::into_inner) {
            Some(condition) => trap.holds(condition.as_ref(), &mut moment),
            None => trap.is_unmet(),
        };
        if !holds {
            return Disposition::Continue;
        }
        let Some(hits_before) = trap.count(vcpu) else { return Disposition::Continue };
        trap.act(Counted { trap: trap.index, vcpu, at: Instant::now(), pc, change, hits_before })
    }
}

/// The same for a port.
pub(crate) fn port_handler(points: Vec<Arc<PortPoint>>) -> PortHandler {
    PortHandler::new(move |hit| {
        points.iter().fold(Disposition::Continue, |all, point| match point.hit(hit) {
            Disposition::Stop => Disposition::Stop,
            Disposition::Continue => all,
        })
    })
}

/// One hit, as a [`Callback`] sees it.
pub struct TrapHit<'a, 'b> {
    hit: &'a mut Hit<'b>,
    /// What a watched variable of at most eight bytes was and is.
    pub change: Option<Change>,
    /// How often this trap was hit before.
    pub hits_before: u64,
}

impl TrapHit<'_, '_> {
    /// The vCPU that hit it.
    pub fn vcpu(&self) -> VcpuId {
        self.hit.vcpu
    }

    /// The next instruction: that of the trap, or the one behind the access.
    pub fn pc(&self) -> u64 {
        self.hit.pc
    }

    /// The general, segment and control registers.
    ///
    /// # Errors
    /// What KVM said.
    pub fn registers(&mut self) -> std::io::Result<Registers> {
        self.hit.state()
    }

    /// Reads linear memory as the vCPU sees it; how many bytes could be read.
    pub fn read(&mut self, addr: u64, into: &mut [u8]) -> usize {
        self.hit.read(addr, into)
    }
}

/// The vCPU behind a hit.
enum Guest<'a, 'b> {
    Hit(&'a mut Hit<'b>),
    Port(&'a mut PortHit<'b>),
}

/// What a condition reads. Registers are fetched once, and only for a condition that asks for them.
struct Moment<'a, 'b> {
    change: Option<Change>,
    vcpu: VcpuId,
    state: Option<Option<Registers>>,
    guest: Guest<'a, 'b>,
}

impl Context for Moment<'_, '_> {
    fn register(&mut self, register: Register) -> Option<u64> {
        let guest = &mut self.guest;
        let state = self.state.get_or_insert_with(|| match guest {
            Guest::Hit(hit) => hit.state().ok(),
            Guest::Port(hit) => hit.state().ok(),
        });
        state.as_ref().map(|registers| register.of(registers))
    }

    fn read(&mut self, address: u64, into: &mut [u8]) -> usize {
        match &mut self.guest {
            Guest::Hit(hit) => hit.read(address, into),
            Guest::Port(hit) => hit.read(address, into),
        }
    }

    fn cpu(&self) -> u32 {
        self.vcpu.0
    }

    fn old(&self) -> Option<u64> {
        self.change.map(|change| change.old)
    }

    fn new_value(&self) -> Option<u64> {
        self.change.map(|change| change.new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trap(rule: &str) -> Trap {
        let rule = crate::rules::parse(rule).unwrap();
        let (log, _) = sync_channel(1);
        Trap { index: 0, rule, counters: Arc::new(Counters::new(2)), callback: None, log, fired: Arc::default() }
    }

    /// Both vCPUs hit it at once: nobody has been told yet that it is done.
    #[test]
    fn a_trap_that_acts_once_counts_up_to_that_hit() {
        let once = trap("exec:f count=3 once =log");
        let counted: Vec<_> = (0..6).map(|n| once.count(VcpuId(n % 2))).collect();
        assert_eq!(counted, [Some(0), Some(1), Some(2), None, None, None]);
        assert_eq!((once.counters.by_vcpu(), once.counters.total()), (vec![2, 1], 3));
        assert_eq!((0..3).map(|before| once.is_due(before)).collect::<Vec<_>>(), [false, false, true]);

        let always = trap("exec:f count=3 =log");
        assert_eq!((0..6).filter_map(|n| always.count(VcpuId(n % 2))).filter(|n| always.is_due(*n)).count(), 4);
    }
}
