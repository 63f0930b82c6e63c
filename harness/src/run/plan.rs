//! What the rules of a run become, before the guest runs: every name is looked up, and for every address it is known
//! what will serve it on this host.

use trapline_vmm::debug::{
    Breakpoint, BreakpointError, Change, Mechanism, Offer, Owner, Piece, Place as Located, SlotTable, Trigger,
};
use trapline_vmm::limits::PAGE_SIZE;

use super::returns;
use crate::report::TargetRecord;
use crate::rules::{Alias, Name, Pattern, Place, Rule, RuleError, Seen, Target, What};
use crate::symbols::{LookupError, Symbols};

/// Who holds the breakpoints of the rules.
pub(crate) const OWNER: Owner = Owner::harness(0);

/// The rules of a run, resolved.
#[derive(Debug)]
pub struct Plan {
    /// One for each rule, in their order.
    pub traps: Vec<Planned>,
}

/// One rule, resolved.
#[derive(Debug)]
pub struct Planned {
    /// The rule.
    pub rule: Rule,
    /// What it watches: more than one address for functions of one name, and for an alias.
    pub points: Vec<PlannedPoint>,
}

/// One source of hits.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedPoint {
    /// In words.
    pub what: String,
    /// How it comes to be known.
    pub by: By,
}

/// How a hit comes to be known.
#[derive(Debug, Clone, PartialEq)]
pub enum By {
    /// By a breakpoint.
    Breakpoint {
        /// As linked.
        request: Breakpoint,
        /// KASLR moves it.
        moves: bool,
    },
    /// By a breakpoint, once this module is there.
    Module {
        /// The module.
        module: String,
    },
    /// By an exit of this port.
    Port(u16),
    /// By the console.
    Console(Pattern),
    /// By looking at the vCPUs; for how long none is to get on.
    Hang(std::time::Duration),
    /// By the guest's end.
    TripleFault,
}

impl Plan {
    /// Resolves the rules.
    ///
    /// # Errors
    /// Each rule that cannot be: all of them, not only the first.
    pub fn new(rules: Vec<Rule>, symbols: &Symbols) -> Result<Self, Vec<RuleError>> {
        let mut errors = Vec::new();
        let mut traps = Vec::new();
        for rule in rules {
            match points(&rule, symbols) {
                Ok(points) => traps.push(Planned { rule, points }),
                Err(error) => errors.push(error),
            }
        }
        if errors.is_empty() { Ok(Self { traps }) } else { Err(errors) }
    }

    /// What serves each point of each rule on a host that offers this; an error says why nothing does.
    pub fn mechanisms(&self, offer: Offer) -> Vec<Vec<Result<Mechanism, BreakpointError>>> {
        // All of them are one set: what is left for one depends on the others.
        let mut table = SlotTable::new(offer);
        let mut set = |request: Breakpoint| -> Result<(), BreakpointError> {
            if request.on.is_watch() && !offer.data_slots && !(offer.pages && request.on == Trigger::Write) {
                return Err(BreakpointError::Unsupported {
                    request,
                    why: "this host's KVM never triggers it; `trapline doctor` tells what it can do".to_owned(),
                });
            }
            let change = Change::Set { owner: OWNER, request, handler: None, place: Some(some_place(request)) };
            if let Some(prepared) = table.prepare(&[change])? {
                table.commit(prepared);
            }
            Ok(())
        };
        let refused: Vec<Vec<Option<BreakpointError>>> = self
            .traps
            .iter()
            .map(|trap| trap.points.iter().map(|point| set(point.request()?).err()).collect())
            .collect();
        let of = |point: &PlannedPoint, error: Option<BreakpointError>| match (error, point.request()) {
            (Some(error), _) => Err(error),
            // Who was served by a slot may have been moved since.
            (None, Some(request)) => {
                table.mechanism(OWNER, request).ok_or(BreakpointError::NoSlot { request, needed: 1, free: 0 })
            }
            (None, None) => Ok(Mechanism::Slots),
        };
        let each = self.traps.iter().zip(refused);
        each.map(|(trap, errors)| trap.points.iter().zip(errors).map(|(point, error)| of(point, error)).collect())
            .collect()
    }

    /// The plan as a report has it.
    pub fn records(&self, offer: Offer) -> Vec<Vec<TargetRecord>> {
        let mechanisms = self.mechanisms(offer);
        let each = self.traps.iter().zip(mechanisms);
        each.map(|(trap, served)| trap.points.iter().zip(served).map(|(point, by)| point.record(by)).collect())
            .collect()
    }
}

impl PlannedPoint {
    /// The breakpoint as linked, if it is one.
    pub fn request(&self) -> Option<Breakpoint> {
        match &self.by {
            By::Breakpoint { request, .. } => Some(*request),
            _ => None,
        }
    }

    fn record(&self, by: Result<Mechanism, BreakpointError>) -> TargetRecord {
        let mechanism = match (&self.by, by) {
            (By::Breakpoint { .. }, Ok(mechanism)) => words(mechanism).to_owned(),
            (By::Breakpoint { .. }, Err(error)) => format!("refused: {error}"),
            (By::Module { module }, _) => format!("waits for {module}"),
            _ => "vmm".to_owned(),
        };
        let request = self.request();
        TargetRecord {
            what: self.what.clone(),
            address: request.map(|request| request.addr),
            len: request.filter(|request| request.on.is_watch()).map(|request| request.len),
            mechanism,
        }
    }
}

/// As a report names it.
pub(crate) fn words(mechanism: Mechanism) -> &'static str {
    match mechanism {
        Mechanism::Slots => "slot",
        Mechanism::Patch => "software breakpoint",
        Mechanism::Pages => "protected page",
    }
}

/// A place in guest memory such as the request will have, to find out what would serve it.
fn some_place(request: Breakpoint) -> Located {
    let mut pieces = Vec::new();
    let mut done = 0;
    while done < request.len {
        let at = request.addr.wrapping_add(done);
        let len = (PAGE_SIZE - at % PAGE_SIZE).min(request.len - done);
        // Different addresses have different places.
        pieces.push(Piece { gpa: at & (u64::MAX >> 1), len });
        done += len;
    }
    Located { pieces, original: 0, user: request.addr >> 63 == 0 }
}

fn points(rule: &Rule, symbols: &Symbols) -> Result<Vec<PlannedPoint>, RuleError> {
    let refuse = |error: String| rule.refuse(error);
    let vmm = |what: String, by| Ok(vec![PlannedPoint { what, by }]);
    if let Some(condition) = &rule.condition
        && let Err(error) = condition.bind(symbols)
    {
        // Names of a module that is not there yet are looked up when it is, and are in its file now.
        let is_not_there_yet = |name: &&Name| {
            name.module.is_some() && matches!(symbols.variable(&name.to_string()), Err(LookupError::NotLoaded { .. }))
        };
        if !condition.names().iter().any(is_not_there_yet) {
            return Err(error);
        }
    }
    match &rule.what {
        What::Exec(place) => exec(place, symbols).map_err(refuse),
        What::Return(name) => return_sites(name, symbols).map_err(refuse),
        What::Write(target) => watch(target, Trigger::Write, symbols).map_err(refuse),
        What::Access(target) => watch(target, Trigger::Access, symbols).map_err(refuse),
        What::Alias(alias) => {
            let points = events(*alias, symbols).map_err(refuse)?;
            let is_line = points.iter().any(|point| matches!(point.by, By::Console(_)));
            // It would not be looked at.
            if is_line && (rule.condition.is_some() || rule.cpu.is_some()) {
                return Err(rule.refuse(format!(
                    "`{alias}` is a line of the console, which no vCPU's state belongs to; leave `if` and cpu= out"
                )));
            }
            Ok(points)
        }
        What::TripleFault => vmm("triple fault".to_owned(), By::TripleFault),
        What::Hang(time) => vmm(format!("a vCPU without progress for {time:?}"), By::Hang(*time)),
        What::Console(pattern) => vmm("console".to_owned(), By::Console(pattern.clone())),
        What::Io(port) => match in_kernel_port(*port) {
            Some(device) => Err(rule.refuse(format!(
                "port {port:#x} belongs to {device}, which KVM emulates itself: no access to it can be seen; trap the kernel's driver instead"
            ))),
            None => vmm(format!("port {port:#x}"), By::Port(*port)),
        },
    }
}

/// Ports that KVM's own devices answer.
fn in_kernel_port(port: u16) -> Option<&'static str> {
    match port {
        0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => Some("the interrupt controllers (PIC)"),
        0x40..=0x43 | 0x61 => Some("the timer (PIT)"),
        _ => None,
    }
}

/// A name that will be found once its module is there: the module's file has it.
fn later(name: &Name, error: &LookupError) -> Option<Vec<PlannedPoint>> {
    let module = name.module.clone()?;
    matches!(error, LookupError::NotLoaded { .. })
        .then(|| vec![PlannedPoint { what: name.to_string(), by: By::Module { module } }])
}

/// What an alias is in this kernel.
fn events(alias: Alias, symbols: &Symbols) -> Result<Vec<PlannedPoint>, String> {
    let mut points: Vec<PlannedPoint> = Vec::new();
    let mut looked_for: Vec<&str> = Vec::new();
    for event in alias.events() {
        match event.seen {
            Seen::Console(regex) => {
                let pattern = Pattern::new(regex)?;
                points.push(PlannedPoint { what: format!("console: {}", event.what), by: By::Console(pattern) });
            }
            Seen::Function(names) => match names.iter().find_map(|name| symbols.functions(name).ok()) {
                Some(found) => {
                    let new = found.iter().map(|at| {
                        breakpoint(format!("{}: {}", at.name, event.what), Breakpoint::exec(at.address), true)
                    });
                    let new: Vec<_> = new.filter(|new| points.iter().all(|had| had.by != new.by)).collect();
                    points.extend(new);
                }
                None => {
                    for name in names {
                        if !looked_for.contains(name) {
                            looked_for.push(name);
                        }
                    }
                }
            },
        }
    }
    if points.is_empty() {
        if symbols.is_empty() {
            return symbols.functions("panic").map(|_| points).map_err(|error| error.to_string());
        }
        let option = alias.option().map(|option| format!("; was it built with {option}?")).unwrap_or_default();
        return Err(format!("this kernel has none of {}{option}", looked_for.join(", ")));
    }
    Ok(points)
}

fn breakpoint(what: String, request: Breakpoint, moves: bool) -> PlannedPoint {
    PlannedPoint { what, by: By::Breakpoint { request, moves } }
}

pub(crate) fn exec(place: &Place, symbols: &Symbols) -> Result<Vec<PlannedPoint>, String> {
    let (name, offset) = match place {
        Place::Address(addr) => {
            return Ok(vec![breakpoint(format!("{addr:#x}"), Breakpoint::exec(*addr), false)]);
        }
        Place::Symbol { name, offset } => (name, *offset),
    };
    let found = match symbols.functions(&name.to_string()) {
        Ok(found) => found,
        Err(error) => return later(name, &error).ok_or_else(|| error.to_string()),
    };
    found
        .iter()
        .map(|symbol| {
            let size = symbol.size;
            if offset > 0 && offset >= size && size > 0 {
                return Err(format!("`{name}` has {size} bytes, so +{offset:#x} is not in it"));
            }
            let addr =
                symbol.address.checked_add(offset).ok_or_else(|| format!("`{place}` is past the last address"))?;
            let what = if offset == 0 { symbol.name.to_string() } else { format!("{}+{offset:#x}", symbol.name) };
            Ok(breakpoint(what, Breakpoint::exec(addr), true))
        })
        .collect()
}

pub(crate) fn return_sites(name: &Name, symbols: &Symbols) -> Result<Vec<PlannedPoint>, String> {
    let found = match symbols.functions(&name.to_string()) {
        Ok(found) => found,
        Err(error) => return later(name, &error).ok_or_else(|| error.to_string()),
    };
    let mut points = Vec::new();
    for symbol in &found {
        for site in returns::sites(symbols, symbol)? {
            let what = format!("{}+{:#x}", symbol.name, site - symbol.address);
            points.push(breakpoint(what, Breakpoint::exec(site), true));
        }
    }
    Ok(points)
}

pub(crate) fn watch(target: &Target, on: Trigger, symbols: &Symbols) -> Result<Vec<PlannedPoint>, String> {
    let (address, size, moves) = match &target.place {
        Place::Address(_) => (0, 0, false),
        Place::Symbol { name, .. } => match symbols.variable(&name.to_string()) {
            Ok(variable) => (variable.address, variable.size, true),
            Err(error) => return later(name, &error).ok_or_else(|| error.to_string()),
        },
    };
    let (addr, len) = target.range(address, size)?;
    let what = target.to_string();
    Ok(vec![breakpoint(what, Breakpoint::watch(addr, len, on), moves)])
}
