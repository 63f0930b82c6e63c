//! When traps are armed: as early as they can be, and not earlier than they mean something.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use trapline_vmm::Vm;
use trapline_vmm::coordinator::CoordinatorError;
use trapline_vmm::debug::{Breakpoint, BreakpointError, Handler, Mechanism, SLOTS, VcpuId};

use super::RunError;
use super::look::Seen;
use super::plan::{self, By, OWNER, Planned};
use super::supervisor::Supervisor;
use super::trap::{self, Point, PortPoint};
use crate::rules::{Condition, Name, Rule};

/// How far the arming has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Some or all traps wait for the kernel to be at its addresses.
    BeforeKernel,
    /// Watchpoints wait until this runs: a kernel clears its variables first, all of them, and that is news to nobody.
    BeforeStart(Breakpoint),
    /// Software breakpoints wait until this runs: the kernel patches its own code before, looks at what it patches, and
    /// would find them there.
    BeforePatches(Breakpoint),
    /// Everything is armed that can be.
    Armed,
}

impl Stage {
    /// Whether it is over when this is hit.
    pub(super) fn ends_at(self, at: Breakpoint) -> bool {
        matches!(self, Stage::BeforeStart(over_at) | Stage::BeforePatches(over_at) if over_at == at)
    }
}

/// The first function of a Linux kernel proper.
const START: [&str; 2] = ["start_kernel", "setup_arch"];
/// All of a Linux kernel's code is as it will be when one of these runs, and hardly anything has happened yet.
const CODE_IS_DONE: [&str; 2] = ["rest_init", "kernel_init"];

type Requests = Vec<(Breakpoint, Option<Handler>)>;

impl Supervisor {
    /// Arms what can be armed before the guest's first instruction.
    pub(super) fn begin(&mut self, vm: &mut Vm) -> Result<(), RunError> {
        let waits = !self.modules.is_empty();
        let has_names = |planned: &Planned| planned.rule.condition.as_ref().is_some_and(|c| !c.names().is_empty());
        let moves = self.may_move && (self.points().any(|(_, _, moves)| moves) || self.plan.iter().any(has_names));
        if !waits && !moves && self.points().next().is_none() {
            return Ok(());
        }
        if !moves && !waits {
            self.stage = self.stage_after(Stage::BeforeKernel);
            match self.arm_all(vm) {
                // They need guest memory that is not mapped yet.
                Err(RunError::Arm(BreakpointError::NotMapped { .. } | BreakpointError::NoSlot { .. })) => {}
                result => return result,
            }
        }
        self.stage = Stage::BeforeKernel;
        vm.tell_kernel_entry().map_err(|error| {
            RunError::Kaslr(format!(
                "this host's KVM cannot tell where the kernel is or when it is mapped ({error}): boot it with nokaslr, \
                 and with at most four traps"
            ))
        })
    }

    /// Every breakpoint of the plan: trap, request as linked, whether it moves.
    fn points(&self) -> impl Iterator<Item = (usize, Breakpoint, bool)> {
        self.plan.iter().enumerate().flat_map(|(trap, planned)| {
            planned.points.iter().filter_map(move |point| match point.by {
                By::Breakpoint { request, moves } => Some((trap, request, moves)),
                _ => None,
            })
        })
    }

    /// Every breakpoint that can be set now, with the handler that serves all rules that want it.
    fn requests(&self, vm: &mut Vm) -> Result<Vec<(Breakpoint, Option<Handler>)>, RunError> {
        let slide = self.symbols.slide();
        let mut by_request: BTreeMap<Breakpoint, Vec<Point>> = BTreeMap::new();
        let moved = |(trap, request, moves): (usize, Breakpoint, bool)| {
            let addr = request.addr.wrapping_add(if moves { slide } else { 0 });
            (trap, Breakpoint { addr, ..request })
        };
        let points: Vec<(usize, Breakpoint)> = self.points().map(moved).chain(self.modules.points()).collect();
        for (index, request) in points {
            let Some(trap) = self.traps.get(index) else { continue };
            if trap.rule.once && trap.counters.done.load(Ordering::Acquire) {
                continue;
            }
            let Some(condition) = self.condition(&trap.rule)? else { continue };
            let watched = (request.on.is_watch() && request.len <= 8).then(|| {
                let mut bytes = [0; 8];
                let len = request.len as usize;
                let got = vm.read_memory(VcpuId(0), request.addr, &mut bytes[..len]).unwrap_or(0);
                (request.addr, len, (got == len).then(|| u64::from_le_bytes(bytes)))
            });
            by_request.entry(request).or_default().push(Point::new(trap.clone(), condition, watched));
        }
        Ok(by_request.into_iter().map(|(request, points)| (request, Some(trap::handler(points)))).collect())
    }

    /// Ports need nothing of the processor's: they are trapped from the first instruction on.
    pub(super) fn trap_ports(&mut self, vm: &Vm) -> Result<(), RunError> {
        let mut by_port: BTreeMap<u16, Vec<Arc<PortPoint>>> = BTreeMap::new();
        for (planned, trap) in self.plan.iter().zip(&self.traps) {
            for point in &planned.points {
                let By::Port(port) = point.by else { continue };
                let point = Arc::new(PortPoint::new(trap.clone()));
                self.ports.push(point.clone());
                by_port.entry(port).or_default().push(point);
            }
        }
        self.bind_ports()?;
        if !by_port.is_empty() {
            let handlers = by_port.into_iter().map(|(port, points)| (port, trap::port_handler(points))).collect();
            // Once for each VM, and this is the only place.
            let _ = vm.trap_ports(handlers);
        }
        Ok(())
    }

    /// Looks up the names of their conditions, as far as it is known where those are.
    fn bind_ports(&self) -> Result<(), RunError> {
        for point in &self.ports {
            if let Some(condition) = self.condition(point.rule())? {
                point.bind(condition);
            }
        }
        Ok(())
    }

    /// A rule's condition with its names looked up, if it has one; `None` as long as it names what is not there yet: a kernel
    /// that may still move, a module that is not loaded.
    #[allow(clippy::option_option)]
    fn condition(&self, rule: &Rule) -> Result<Option<Option<Condition>>, RunError> {
        let Some(condition) = &rule.condition else { return Ok(Some(None)) };
        let is_there = |name: &&Name| match &name.module {
            Some(module) => self.loaded.iter().any(|loaded| loaded.name == *module),
            None => !self.may_move,
        };
        if !condition.names().iter().all(is_there) {
            return Ok(None);
        }
        Ok(Some(Some(condition.bind(&self.symbols).map_err(|error| RunError::Rules(vec![error]))?)))
    }

    /// The kernel runs at its own addresses: the rest can be armed, as far as it makes sense now.
    pub(super) fn kernel_is_there(&mut self, vm: &mut Vm, vcpu: VcpuId) -> Result<(), RunError> {
        if self.stage != Stage::BeforeKernel {
            return Ok(());
        }
        let pc = vm.registers(vcpu)?.pc();
        // Else it is not the kernel that these symbols are of, as it seems; that may come yet.
        if self.find_slide(vm, vcpu, pc)? {
            vm.kernel_entry_is_known()?;
            self.stage = self.stage_after(Stage::BeforeKernel);
            self.arm_all(vm)?;
        }
        Ok(())
    }

    /// Finds out by how much the kernel has moved, if it moves, from an address in its image; whether that is known now.
    pub(super) fn find_slide(&mut self, vm: &mut Vm, vcpu: VcpuId, inside: u64) -> Result<bool, CoordinatorError> {
        if self.may_move
            && let Some(slide) = self.symbols.find_slide(&Seen::by(vm, vcpu)?, inside)
        {
            self.symbols = self.symbols.with_slide(slide);
            self.unwinder = None;
            self.may_move = false;
        }
        Ok(!self.may_move)
    }

    /// What comes after a stage: the next one that something waits for.
    pub(super) fn stage_after(&self, stage: Stage) -> Stage {
        let watches = self.points().any(|(_, request, _)| request.on.is_watch());
        let start = self.hook(&START).filter(|_| watches && stage == Stage::BeforeKernel);
        let patches = self.records.iter().flatten().any(|record| record.mechanism == plan::words(Mechanism::Patch));
        let done = self.hook(&CODE_IS_DONE).filter(|_| patches && !matches!(stage, Stage::BeforePatches(_)));
        start.map(Stage::BeforeStart).or(done.map(Stage::BeforePatches)).unwrap_or(Stage::Armed)
    }

    /// The first of these functions that the kernel has and no rule traps.
    fn hook(&self, names: &[&str]) -> Option<Breakpoint> {
        let slide = self.symbols.slide();
        let is_trapped = |at: &Breakpoint| self.points().any(|(_, point, _)| point.addr.wrapping_add(slide) == at.addr);
        names.iter().filter_map(|name| self.symbols.address(name)).map(Breakpoint::exec).find(|at| !is_trapped(at))
    }

    /// Of a set what a stage allows, with the breakpoint that ends it.
    fn allowed(&self, requests: Requests) -> Requests {
        let over_at = match self.stage {
            Stage::BeforeKernel | Stage::Armed => return requests,
            Stage::BeforeStart(over_at) | Stage::BeforePatches(over_at) => over_at,
        };
        let (mut watches, execs): (Requests, Requests) =
            requests.into_iter().partition(|(request, _)| request.on.is_watch());
        if matches!(self.stage, Stage::BeforeStart(_)) {
            watches.clear();
        }
        let slots = |request: &Breakpoint| request.len.div_ceil(8).max(1);
        let taken: u64 = watches.iter().map(|(request, _)| slots(request)).sum::<u64>() + 1;
        let free = (SLOTS as u64).saturating_sub(taken) as usize;
        std::iter::once((over_at, None)).chain(watches).chain(execs.into_iter().take(free)).collect()
    }

    /// Arms everything that can be, in the place of what was armed.
    pub(super) fn arm_all(&mut self, vm: &mut Vm) -> Result<(), RunError> {
        self.bind_ports()?;
        let requests = self.requests(vm)?;
        let mut requests = self.allowed(requests);
        requests.extend(self.modules.hooks(&self.symbols).map_err(RunError::Usage)?);
        let wanted = requests.iter().map(|(request, _)| *request).collect();
        let gone: Vec<Breakpoint> = self.armed.difference(&wanted).copied().collect();
        vm.clear_traps(OWNER, &gone)?;
        self.armed.retain(|old| wanted.contains(old));
        vm.set_traps(OWNER, requests)?;
        self.armed = wanted;
        Ok(())
    }
}
