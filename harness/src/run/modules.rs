//! Traps in modules: armed when a module is there, taken away before its memory is somebody else's.
//!
//! Two functions of the kernel's are trapped for that, and only while a rule waits for a module or has one:
//! `do_init_module`, which runs when everything of a module is in place and nothing of it has run, and
//! `free_module`, which gives its memory back.

use std::collections::BTreeSet;

use trapline_vmm::debug::{Breakpoint, Handler, Trigger};

use super::plan::{self, By, Planned};
use crate::rules::{Rule, What};
use crate::symbols::{LoadedModule, Symbols};

const COMES: &str = "do_init_module";
const GOES: &str = "free_module";

/// The modules that rules name.
#[derive(Debug, Default)]
pub(crate) struct Modules {
    wanted: BTreeSet<String>,
    /// What is armed in modules: trap and breakpoint.
    points: Vec<(usize, Breakpoint)>,
    hooks: Vec<Breakpoint>,
}

impl Modules {
    pub(crate) fn wanted(traps: &[Planned]) -> Self {
        let places = traps.iter().flat_map(|trap| &trap.points).filter_map(|point| match &point.by {
            By::Module { module } => Some(module.clone()),
            _ => None,
        });
        let conditions = traps.iter().filter_map(|trap| trap.rule.condition.as_ref());
        let named = conditions.flat_map(|condition| condition.names()).filter_map(|name| name.module.clone());
        Self { wanted: places.chain(named).collect(), ..Self::default() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.wanted.is_empty()
    }

    pub(crate) fn points(&self) -> impl Iterator<Item = (usize, Breakpoint)> {
        self.points.iter().copied()
    }

    pub(crate) fn is_hook(&self, request: Breakpoint) -> bool {
        self.hooks.contains(&request)
    }

    /// The breakpoints by which it is known that modules come and go.
    ///
    /// # Errors
    /// One line, if the kernel has no such functions.
    pub(crate) fn hooks(&mut self, symbols: &Symbols) -> Result<Vec<(Breakpoint, Option<Handler>)>, String> {
        self.hooks.clear();
        if !self.wanted.is_empty() {
            let address = |name: &str| {
                symbols.address(name).ok_or_else(|| {
                    format!("this kernel has no symbol `{name}`: when a module is loaded cannot be known; trap the kernel proper instead")
                })
            };
            self.hooks = vec![Breakpoint::exec(address(COMES)?), Breakpoint::exec(address(GOES)?)];
        }
        Ok(self.hooks.iter().map(|hook| (*hook, None)).collect())
    }

    /// A hook was hit, with this pointer to the module. What is in modules is looked up anew, but in the one that goes.
    ///
    /// # Errors
    /// One line, if a rule's symbol is not in its module.
    pub(crate) fn changed(
        &mut self,
        plan: &[Planned],
        symbols: &Symbols,
        loaded: &[LoadedModule],
        hook: Breakpoint,
        module: u64,
    ) -> Result<(), String> {
        let goes = self.hooks.get(1) == Some(&hook);
        let leaving = loaded.iter().find(|loaded| goes && loaded.address == module).map(|loaded| loaded.name.clone());
        self.points.clear();
        for (index, planned) in plan.iter().enumerate() {
            let names = planned.points.iter().filter_map(|point| match &point.by {
                By::Module { module } => Some(module),
                _ => None,
            });
            let is_there = |name: &String| loaded.iter().any(|loaded| loaded.name == *name);
            if names.clone().any(|name| is_there(name) && leaving.as_deref() != Some(name)) {
                let found = points(&planned.rule, symbols).map_err(|why| planned.rule.refuse(why).to_string())?;
                self.points.extend(found.into_iter().map(|request| (index, request)));
            }
        }
        Ok(())
    }
}

fn points(rule: &Rule, symbols: &Symbols) -> Result<Vec<Breakpoint>, String> {
    let found = match &rule.what {
        What::Exec(place) => plan::exec(place, symbols)?,
        What::Return(name) => plan::return_sites(name, symbols)?,
        What::Write(target) => plan::watch(target, Trigger::Write, symbols)?,
        What::Access(target) => plan::watch(target, Trigger::Access, symbols)?,
        _ => Vec::new(),
    };
    Ok(found.iter().filter_map(|point| point.request()).collect())
}
