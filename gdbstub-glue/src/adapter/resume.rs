//! Continue, step, range step, and who stays parked.

use gdbstub::common::{Signal, Tid};
use gdbstub::target::ext::base::multithread::{
    MultiThreadRangeStepping, MultiThreadRangeSteppingOps, MultiThreadResume, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use trapline_vmm::debug::{ResumePlan, RunMode, VcpuId};

use super::{Adapter, Fatal};
use crate::debuggee::{Debuggee, DebuggeeError};

/// What gdbstub has said so far about the next resumption. vCPUs without an action run, unless
/// the scheduler is locked; then they stay parked.
#[derive(Default)]
pub(super) struct Actions {
    chosen: Vec<(VcpuId, RunMode)>,
    locked: bool,
}

impl Actions {
    /// The first action for a vCPU is the one that counts (RSP, `vCont`).
    fn choose(&mut self, vcpu: VcpuId, mode: RunMode) {
        if !self.chosen.iter().any(|&(v, _)| v == vcpu) {
            self.chosen.push((vcpu, mode));
        }
    }

    /// The plan for all vCPUs.
    fn plan(&self, vcpus: usize) -> ResumePlan {
        let others = if self.locked { RunMode::Parked } else { RunMode::Continue };
        self.chosen.iter().fold(ResumePlan::all(vcpus, others), |plan, &(vcpu, mode)| plan.with(vcpu, mode))
    }
}

impl<D: Debuggee> Adapter<D> {
    fn choose(&mut self, tid: Tid, mode: RunMode) {
        if let Some(vcpu) = self.vcpu(tid.get() as u64) {
            self.view.actions.choose(vcpu, mode);
        }
    }
}

// A guest has no signals: what gdb passes on is what we told it at the stop.
impl<D: Debuggee> MultiThreadResume for Adapter<D> {
    fn clear_resume_actions(&mut self) -> Result<(), Fatal> {
        self.view.actions = Actions::default();
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Fatal> {
        self.choose(tid, RunMode::Continue);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Fatal> {
        let plan = self.view.actions.plan(self.debuggee.vcpus());
        tracing::trace!(?plan, "resume");
        self.view.resumed = Some(match self.remove_leaving() {
            Ok(()) => self.debuggee.resume(&plan),
            Err(error) => Err(DebuggeeError(error.to_string())),
        });
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_range_step(&mut self) -> Option<MultiThreadRangeSteppingOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl<D: Debuggee> MultiThreadSingleStep for Adapter<D> {
    fn set_resume_action_step(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Fatal> {
        self.choose(tid, RunMode::Step);
        Ok(())
    }
}

impl<D: Debuggee> MultiThreadRangeStepping for Adapter<D> {
    fn set_resume_action_range_step(&mut self, tid: Tid, start: u64, end: u64) -> Result<(), Fatal> {
        // An empty range is a single step (RSP, `vCont;r`).
        self.choose(tid, if start < end { RunMode::StepRange { start, end } } else { RunMode::Step });
        Ok(())
    }
}

impl<D: Debuggee> MultiThreadSchedulerLocking for Adapter<D> {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Fatal> {
        self.view.actions.locked = true;
        Ok(())
    }
}
