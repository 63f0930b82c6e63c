//! Law 13 under fire: four vCPUs run through places that count themselves, while the library adds,
//! removes, moves, evicts and fails to add what stops or counts there, at random.
//!
//! What makes an exact comparison possible although the guest never waits: at a hit the guest's
//! own count of that place on that vCPU *is the number of the crossing*. So the hits between an
//! arming and the next removal must have numbers without gap or repetition; and the counts read
//! before and behind each change of the set say at which crossing they had to begin and to end.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use trapline_guests::demo;
use trapline_guests::fixture::cpu_field;
use trapline_vmm::debug::{
    Breakpoint, BreakpointError, Disposition, Handler, Level, Owner, RunMode, Stop, StopReason, Trigger, VcpuId,
};

use crate::booted::Booted;
use crate::clock::{PATIENCE, wait_for};
use crate::lane::Need::{self, Kick};
use crate::law::{Law, law};
use crate::rig::{Rig, at};

pub(crate) fn laws() -> Vec<Law> {
    vec![
        law!(l13_exactly_once_under_fire, Kick),
        law!(l13_a_crossing_that_a_handler_heard_of_is_not_told_to_it_again, Kick),
    ]
}

const CPUS: u32 = 4;
/// Hits in all, unless `TRAPLINE_FIRE_HITS` asks for more, and hits for each change of the set.
const HITS: u64 = 10_000;
const HITS_A_CHANGE: u64 = 50;
/// Most hits between two changes of the set, and most time.
const HITS_PER_CHANGE: u64 = 60;
const TIME_PER_CHANGE: Duration = Duration::from_millis(30);
/// Two of four slots: one that stays and is never evicted, and one for those that come and go.
const MOST_PLAIN: usize = 2;
const MOST_HELD: usize = 6;
/// Hits that a failure shows.
const RECENT: usize = 32;

/// Lengths of `incq (%rdi)`, `incq 8(%rdi)` and `endbr64`.
const INC_COUNT: u64 = 3;
const INC_TRACED: u64 = 4;
const ENDBR: u64 = 4;

const SLOTS: usize = 4;
const HARNESS: Owner = Owner::harness(0);

/// A place in the guest that every vCPU comes by and counts.
struct Place {
    n: usize,
    name: String,
    request: Breakpoint,
    /// Where each vCPU counts this.
    counters: Vec<u64>,
    /// The vCPU whose count is watched: nobody else stores there.
    only: Option<u32>,
    counted: Counted,
    spans: Mutex<Vec<Span>>,
}

/// When the guest counts a crossing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Counted {
    /// By the very instruction.
    Here,
    /// Some instructions before it.
    Before,
    /// Some instructions behind it.
    Behind,
    /// By the store that is watched, and is told when it is done.
    Watched,
}

impl Counted {
    /// The number of the crossing that is told when the guest has counted so many.
    fn number(self, count: u64) -> Option<u64> {
        match self {
            Counted::Here | Counted::Behind => Some(count),
            Counted::Before | Counted::Watched => count.checked_sub(1),
        }
    }

    /// Which crossing may be the first that is told after an arming between these two counts.
    fn first(self, (before, after): (u64, u64)) -> (u64, u64) {
        match self {
            Counted::Here | Counted::Watched => (before, after),
            // It is counted, and perhaps not yet there.
            Counted::Before => (before.saturating_sub(1), after),
            // It was there, and is perhaps not yet counted.
            Counted::Behind => (before, after + 1),
        }
    }

    /// Which may be the first that is not told after a removal between these two.
    fn end(self, (before, after): (u64, u64)) -> (u64, u64) {
        match self {
            Counted::Here | Counted::Behind => (before, after + 1),
            Counted::Before => (before.saturating_sub(1), after),
            Counted::Watched => (before, after),
        }
    }
}

/// What one vCPU did at one place: crossings are numbered from 0, by the guest.
#[derive(Debug, Clone, Copy, Default)]
struct Span {
    /// It is armed, or just being armed or removed.
    open: bool,
    /// The guest's count before and after it was armed.
    armed: (u64, u64),
    /// The first and the last crossing that was told since then.
    told: Option<(u64, u64)>,
    /// The last one that was told before.
    before: Option<u64>,
    hits: u64,
}

impl Span {
    fn tell(&mut self, crossing: u64) -> Result<(), String> {
        if !self.open {
            return Err(format!("crossing {crossing} was told, and nothing was armed"));
        }
        self.told = match self.told {
            Some((first, last)) if crossing == last + 1 => Some((first, crossing)),
            Some((_, last)) => return Err(format!("crossing {crossing} was told after {last}")),
            None if self.before.is_some_and(|before| crossing <= before) => {
                return Err(format!("crossing {crossing} was told again"));
            }
            None => Some((crossing, crossing)),
        };
        self.hits += 1;
        Ok(())
    }

    /// It was removed, between these two counts. What `stops` all may have happened without anybody
    /// having been told yet, and then nobody is.
    fn close(&mut self, removed: (u64, u64), counted: Counted, stops: bool) -> Result<(), String> {
        let next = self.before.map_or(0, |before| before + 1);
        let (earliest, latest) = counted.first(self.armed);
        let (earliest, latest) = (earliest.max(next), latest.max(next));
        let (end, most) = counted.end(removed);
        let end = end.saturating_sub(u64::from(stops && counted == Counted::Watched));
        let right = match self.told {
            // All that were over before the removal began were told, and none that began after it.
            Some((first, last)) => (earliest..=latest).contains(&first) && (end..=most).contains(&(last + 1)),
            None => end <= latest,
        };
        let result = if right { Ok(()) } else { Err(format!("{self:?}, removed {removed:?}")) };
        self.before = self.told.map(|(_, last)| last).or(self.before);
        (self.open, self.told) = (false, None);
        result
    }
}

impl Place {
    fn new(name: &str, request: Breakpoint, counters: &[u64], counted: Counted) -> Self {
        let spans = Mutex::new(vec![Span::default(); CPUS as usize]);
        Self { n: 0, name: name.to_owned(), request, counters: counters.to_vec(), only: None, counted, spans }
    }

    fn spans(&self) -> MutexGuard<'_, Vec<Span>> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counts(&self, demo: &Booted) -> Vec<u64> {
        self.counters.iter().map(|addr| demo.word(*addr)).collect()
    }
}

/// What all places have in common.
#[derive(Default)]
struct Tally {
    hits: AtomicU64,
    wrong: Mutex<Vec<String>>,
    /// The last hits of all vCPUs: who, where, and how often it had counted.
    recent: Mutex<VecDeque<(u32, usize, Option<u64>)>>,
}

impl Tally {
    /// One hit, whoever heard of it, when the vCPU's own count was `count`.
    fn hit(&self, place: &Place, vcpu: VcpuId, count: Option<u64>) {
        let crossing = count.and_then(|count| place.counted.number(count));
        let told = match crossing {
            None => Err("the guest's count is not to be had".to_owned()),
            Some(_) if place.only.is_some_and(|cpu| cpu != vcpu.0) => Err("it does not store there".to_owned()),
            Some(crossing) => place.spans()[vcpu.index()].tell(crossing),
        };
        self.hits.fetch_add(1, SeqCst);
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.truncate(RECENT - 1);
        recent.push_front((vcpu.0, place.n, count));
        if let Err(what) = told {
            let of_this: Vec<_> = recent.iter().filter(|hit| hit.0 == vcpu.0).map(|hit| (hit.1, hit.2)).collect();
            drop(recent);
            self.must(place, vcpu.0, Err(format!("{what}; before (place, count): {of_this:?}")));
        }
    }

    fn must(&self, place: &Place, cpu: u32, result: Result<(), String>) {
        if let Err(what) = result {
            let mut wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
            wrong.push(format!("{} on vCPU {cpu}: {what}", place.name));
        }
    }
}

/// Who holds a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    /// A handler that counts and lets it go on.
    Counting,
    /// Everything stops.
    Stopping,
}

impl Held {
    fn owner(self) -> Owner {
        match self {
            Held::Counting => HARNESS,
            Held::Stopping => Owner::GDB,
        }
    }
}

struct Fire {
    demo: Booted,
    places: Vec<Arc<Place>>,
    /// What is held, by place, and whether it is served: one may wait for a slot.
    held: Vec<Option<Held>>,
    served: Vec<bool>,
    tally: Arc<Tally>,
    /// The vCPU whose next arming fails, counted from 1.
    failing: Arc<AtomicU32>,
    random: Random,
    changes: [u64; 5],
    stops: u64,
}

impl Fire {
    fn new(seed: u64) -> Self {
        let failing = Arc::new(AtomicU32::new(0));
        let fails = failing.clone();
        let hook = Arc::new(move |vcpu: VcpuId| match fails.compare_exchange(vcpu.0 + 1, 0, SeqCst, SeqCst) {
            Ok(_) => Err(io::Error::other("refused by the test")),
            Err(_) => Ok(()),
        });
        let demo = Booted::counting_demo(CPUS, Some(hook));
        let places = places(&demo);
        let (held, served) = (vec![None; places.len()], vec![false; places.len()]);
        let (tally, random) = (Arc::default(), Random(seed | 1));
        Self { demo, places, held, served, tally, failing, random, changes: [0; 5], stops: 0 }
    }

    /// One call that changes the set. It may arm what waited, and evict what was armed.
    fn change<T>(&mut self, adds: Option<usize>, call: impl FnOnce(&mut Booted) -> T) -> T {
        let before: Vec<_> = self.places.iter().map(|place| place.counts(&self.demo)).collect();
        for (n, place) in self.places.iter().enumerate() {
            if !self.served[n] && (self.held[n].is_some() || adds == Some(n)) {
                place.spans().iter_mut().for_each(|span| span.open = true);
            }
        }
        let result = call(&mut self.demo);
        let served: HashSet<_> = self.demo.vm.breakpoints().into_iter().map(|(_, request)| request).collect();
        for (n, place) in self.places.iter().enumerate() {
            let after = place.counts(&self.demo);
            let is_served = served.contains(&place.request);
            for cpu in 0..CPUS {
                let span = &mut place.spans()[cpu as usize];
                let counts = (before[n][cpu as usize], after[cpu as usize]);
                let result = match (self.served[n], is_served) {
                    (false, true) => {
                        span.armed = counts;
                        Ok(())
                    }
                    (true, false) if place.only.is_some_and(|only| only != cpu) => {
                        span.open = false;
                        Ok(()) // Nothing was to be told, and nothing was.
                    }
                    (true, false) => span.close(counts, place.counted, self.held[n] == Some(Held::Stopping)),
                    (false, false) if span.told.is_some() => Err("told, although it was never armed".to_owned()),
                    (false, false) => {
                        span.open = false;
                        Ok(())
                    }
                    (true, true) => Ok(()),
                };
                self.tally.must(place, cpu, result);
            }
            self.served[n] = is_served;
        }
        result
    }

    fn arm(&mut self, n: usize, held: Held) -> Result<(), BreakpointError> {
        let (place, tally) = (self.places[n].clone(), self.tally.clone());
        let request = place.request;
        let handler = Handler::new(move |hit| {
            let mut count = [0; 8];
            let read = hit.read(place.counters[hit.vcpu.index()], &mut count) == count.len();
            let watched = place.counted == Counted::Watched;
            let misplaced = hit.request != place.request || !watched && hit.pc != place.request.addr;
            tally.hit(&place, hit.vcpu, (read && !misplaced).then(|| u64::from_le_bytes(count)));
            Disposition::Continue
        });
        let armed = self.change(Some(n), |demo| match held {
            Held::Counting => demo.vm.set_trap(HARNESS, request, handler),
            Held::Stopping => demo.vm.set_breakpoint(Owner::GDB, request),
        });
        if armed.is_ok() {
            self.held[n] = Some(held);
        }
        armed
    }

    /// Whether it may be tried. Watchpoints stay within the slots: one that is served by read-only
    /// pages takes the stores to its page away from those that are served by slots.
    fn may_hold(&self, n: usize) -> bool {
        let others: Vec<usize> = (0..self.places.len()).filter(|&other| self.held[other].is_some()).collect();
        let is_watched = |&place: &usize| self.places[place].counted == Counted::Watched;
        others.len() < SLOTS || !others.iter().chain([&n]).any(is_watched)
    }

    /// Arms it, if the slots are not all taken by its betters.
    fn add(&mut self, n: usize, held: Held) {
        if !self.may_hold(n) {
            return;
        }
        match self.arm(n, held) {
            Ok(()) => assert!(self.served[n], "{} was accepted and waits", self.places[n].name),
            Err(BreakpointError::NoSlot { .. }) => {}
            Err(other) => panic!("{}: {other}", self.places[n].name),
        }
    }

    fn remove(&mut self, n: usize) {
        let held = self.held[n].expect("it is held");
        let request = self.places[n].request;
        let cleared = self.change(None, |demo| demo.vm.clear_breakpoint(held.owner(), request));
        self.demo.must(cleared);
        self.held[n] = None;
        assert!(!self.served[n], "{} was removed and is served", self.places[n].name);
    }

    /// One vCPU cannot follow: nobody gets it.
    fn add_in_vain(&mut self, n: usize) {
        self.stop();
        self.failing.store(1 + self.random.below(u64::from(CPUS)) as u32, SeqCst);
        match self.arm(n, Held::Counting) {
            // Nothing changes if there is no slot for it.
            Err(BreakpointError::NoSlot { .. }) => self.failing.store(0, SeqCst),
            Err(BreakpointError::Apply(_)) => assert_eq!(self.failing.load(SeqCst), 0),
            other => panic!("one vCPU refused, and it gives {other:?}"),
        }
        assert!(!self.served[n]);
        self.go();
    }

    /// A random change of the set.
    fn disturb(&mut self) {
        let free: Vec<usize> = (1..self.places.len()).filter(|&n| self.held[n].is_none()).collect();
        let taken: Vec<usize> = (1..self.places.len()).filter(|&n| self.held[n].is_some()).collect();
        let plain = self.held.iter().filter(|held| **held == Some(Held::Stopping)).count();
        let (add, drop) = (self.random.of(&free), self.random.of(&taken));
        let what = self.random.below(10);
        let (kind, done) = match (what, add, drop) {
            (0..=2, Some(n), _) if taken.len() < MOST_HELD => (0, self.add(n, Held::Counting)),
            (3, Some(n), _) if plain < MOST_PLAIN => (1, self.add(n, Held::Stopping)),
            (4..=6, Some(to), Some(from)) => {
                let held = self.held[from].expect("it is held");
                (2, (self.remove(from), self.add(to, held)).0)
            }
            (7, Some(n), _) if self.may_hold(n) => (3, self.add_in_vain(n)),
            (_, _, Some(n)) => (4, self.remove(n)),
            _ => return,
        };
        let () = done;
        self.changes[kind] += 1;
    }

    fn go(&mut self) {
        let plan = self.demo.plan(RunMode::Continue);
        loop {
            let resumed = self.demo.vm.resume(&plan);
            match self.demo.must(resumed) {
                Some(stop) => self.told(&stop),
                None => return,
            }
        }
    }

    fn stop(&mut self) {
        let stop = self.demo.vm.stop();
        let stop = self.demo.must(stop);
        self.told(&stop);
    }

    /// The world has stopped.
    fn told(&mut self, stop: &Stop) {
        let request = match stop.reason {
            StopReason::Interrupted => return,
            StopReason::Breakpoint(request) | StopReason::Watchpoint { request, .. } => request,
            _ => panic!("the guest stopped: {stop:x?}"),
        };
        let known = self.places.iter().position(|place| place.request == request).expect("one of ours");
        assert_eq!(self.held[known], Some(Held::Stopping), "{} stopped all: {stop:x?}", self.places[known].name);
        let place = &self.places[known];
        let count = self.demo.word(place.counters[stop.vcpu.index()]);
        self.tally.hit(place, stop.vcpu, Some(count));
        self.stops += 1;
    }

    /// Lets the guest run into what is armed.
    fn burn(&mut self) {
        let (started, before) = (Instant::now(), self.hits());
        let most = 1 + self.random.below(HITS_PER_CHANGE);
        while self.hits() < before + most && started.elapsed() < TIME_PER_CHANGE {
            let stop = self.demo.vm.poll();
            match self.demo.must(stop) {
                Some(stop) => {
                    self.told(&stop);
                    if self.random.below(4) == 0 {
                        return;
                    }
                    self.go();
                }
                None => std::thread::sleep(Duration::from_micros(100)),
            }
        }
    }

    fn hits(&self) -> u64 {
        self.tally.hits.load(SeqCst)
    }

    fn check(&mut self) {
        let wrong = std::mem::take(&mut *self.tally.wrong.lock().unwrap());
        if !wrong.is_empty() {
            let held: Vec<_> =
                self.places.iter().filter_map(|p| Some((p.n, &p.name, self.held[p.n]?, self.served[p.n]))).collect();
            panic!(
                "after {} hits and {:?} changes, held {held:?}: {:#?}",
                self.hits(),
                self.changes,
                &wrong[..wrong.len().min(4)]
            );
        }
    }
}

/// What all vCPUs come by. The first one is armed from beginning to end.
fn places(demo: &Booted) -> Vec<Arc<Place>> {
    let counters = |of: fn(u32) -> Option<u64>| -> Vec<u64> { (0..CPUS).map(|cpu| of(cpu).unwrap()).collect() };
    let (counts, traced) = (counters(demo::count_address), counters(demo::traced_count_address));
    let rounds = counters(demo::rounds_address);
    let exec = |name: &str, behind: u64, counters: &[u64], counted| {
        let request = Breakpoint::exec(demo.at(name) + behind);
        Place::new(&format!("{name}+{behind}"), request, counters, counted)
    };
    let mut places = vec![
        exec("count_up_traced_here", 0, &traced, Counted::Here),
        exec("count_up_here", 0, &counts, Counted::Here),
        exec("count_up_here", INC_COUNT, &counts, Counted::Before),
        exec("count_up_traced", 0, &traced, Counted::Behind),
        exec("count_up_traced", ENDBR, &traced, Counted::Behind),
        exec("count_up_traced_here", INC_TRACED, &traced, Counted::Before),
        exec("count_a_round", 0, &rounds, Counted::Behind),
    ];
    // The lengths above are right: a RET, a POP, and a NOP of five bytes stand there.
    let opcodes = [2, 5, 4].map(|n: usize| demo.word(places[n].request.addr).to_le_bytes()[0]);
    assert_eq!(opcodes, [0xc3, 0x5d, 0x0f]);
    if Need::DataWatch.missing().is_none() {
        for cpu in 0..CPUS {
            for (name, counters) in [("count", &counts), ("traced_count", &traced)] {
                let watch = Breakpoint::watch(counters[cpu as usize], 8, Trigger::Write);
                let place = Place::new(&format!("cpus[{cpu}].{name}"), watch, counters, Counted::Watched);
                places.push(Place { only: Some(cpu), ..place });
            }
        }
    }
    places.into_iter().enumerate().map(|(n, place)| Arc::new(Place { n, ..place })).collect()
}

fn l13_exactly_once_under_fire() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let target = number("TRAPLINE_FIRE_HITS").unwrap_or(HITS);
    let clock = || std::time::UNIX_EPOCH.elapsed().map_or(1, |since| since.as_nanos() as u64);
    let seed = number("TRAPLINE_FIRE_SEED").unwrap_or_else(clock);
    println!("TRAPLINE_FIRE_SEED={seed}, {target} hits");
    let mut fire = Fire::new(seed);
    // The guest stands: the first and the last crossing of the one that stays are known exactly.
    let stays = fire.places[0].clone();
    let begun = stays.counts(&fire.demo);
    fire.add(0, Held::Counting);
    fire.go();
    let mut moved = (Instant::now(), 0);
    while fire.hits() < target || fire.changes.iter().sum::<u64>() < target / HITS_A_CHANGE {
        fire.burn();
        fire.disturb();
        if !fire.demo.vm.is_running() {
            fire.go();
        }
        fire.check();
        if fire.hits() > moved.1 {
            moved = (Instant::now(), fire.hits());
        } else if moved.0.elapsed() > PATIENCE {
            fire.demo.must(Err::<(), _>(format!("no hit in {PATIENCE:?}, after {}", fire.hits())));
        }
    }
    fire.stop();
    let ended = stays.counts(&fire.demo);
    for cpu in 0..CPUS {
        let n = cpu as usize;
        let Span { hits, .. } = stays.spans()[n];
        // One that was told of and has not run is in front of its count.
        let ahead = hits.wrapping_sub(ended[n] - begun[n]);
        assert!(ahead <= 1, "vCPU {cpu} counted {} and {hits} were told", ended[n] - begun[n]);
        assert!(ahead == 0 || fire.demo.registers(cpu).pc() == stays.request.addr);
        assert!(hits > 0, "vCPU {cpu} never came by {}", stays.name);
    }
    for n in (0..fire.places.len()).filter(|&n| fire.held[n].is_some()).rev().collect::<Vec<_>>() {
        fire.remove(n);
    }
    fire.check();
    assert_eq!(fire.demo.guest_debug_exceptions(), 0);
    assert!(fire.demo.vm.breakpoints().iter().all(|(owner, _)| owner.level == Level::Guest));
    for place in &fire.places {
        let hits: Vec<u64> = place.spans().iter().map(|span| span.hits).collect();
        println!("  {}: {hits:?}", place.name);
    }
    let [added, plain, moved, failed, removed] = fire.changes;
    println!(
        "  {} hits, {} stops; {added} added, {plain} that stop, {moved} moved, {failed} in vain, {removed} removed",
        fire.hits(),
        fire.stops
    );
}

/// Two hold one place, and one of them goes before it was told: what it was to be told is dropped,
/// and that is no news for the other.
fn l13_a_crossing_that_a_handler_heard_of_is_not_told_to_it_again() {
    let mut rig = Rig::all(2, "hotmem");
    let bp = Breakpoint::exec(at("hotmem_bp"));
    let told = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let counts = told.clone();
    let handler = Handler::new(move |hit| {
        counts[hit.vcpu.index()].fetch_add(1, SeqCst);
        Disposition::Continue
    });
    rig.coordinator.set_trap(HARNESS, bp, Some(handler)).unwrap();
    for round in 0..20 {
        rig.set(bp).unwrap();
        let before: Vec<u64> = told.iter().map(|count| count.load(SeqCst)).collect();
        assert_eq!(rig.go(), None);
        wait_for("both to hit", || (0..2).all(|n| told[n].load(SeqCst) > before[n]).then_some(()));
        rig.clear(bp).unwrap();
        let after: Vec<u64> = told.iter().map(|count| count.load(SeqCst)).collect();
        assert_eq!(rig.coordinator.poll().unwrap(), None);
        wait_for("both to go on", || (0..2).all(|n| told[n].load(SeqCst) > after[n] + 2).then_some(()));
        rig.interrupt();
        for cpu in 0..2 {
            let ahead = u64::from(rig.pc(cpu) == bp.addr);
            let (told, counted) = (told[cpu as usize].load(SeqCst), rig.field(cpu, cpu_field::HITS));
            // Where it stands, it may have been told of already.
            assert!(told == counted || told == counted + ahead, "round {round}: told {told}, counted {counted}");
        }
    }
    rig.assert_guest_undisturbed();
}

/// xorshift64: the same seed, the same changes (if not at the same moments).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 8) % end
    }

    fn of(&mut self, among: &[usize]) -> Option<usize> {
        let n = self.below(among.len().max(1) as u64) as usize;
        among.get(n).copied()
    }
}
