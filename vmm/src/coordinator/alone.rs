//! Stepping over a patch, one vCPU at a time, with all others parked (law 58).
//!
//! A vCPU that must step over an INT3 parks itself and says so. Whoever parks all vCPUs next, be
//! it for this or to stop the world, lets each of those step first.

use std::collections::VecDeque;

use super::{Coordinator, CoordinatorError};
use crate::debug::VcpuId;
use crate::limits::ACK_DEADLINE;
use crate::vcpu::protocol::{Answer, Request};

/// Who waits to be alone, and who is.
#[derive(Default)]
pub(super) struct Alone {
    /// Parked, oldest first, no one twice.
    waiting: VecDeque<VcpuId>,
    /// The last one that was told to step, and by which number.
    last: Option<(VcpuId, u64)>,
    /// Its answer is there. Until then the patch may be out of memory, and nobody else may run.
    answered: bool,
    /// It has missed its deadline.
    late: bool,
}

impl Alone {
    pub(super) fn wants(&mut self, vcpu: VcpuId) {
        if !self.waiting.contains(&vcpu) {
            self.waiting.push_back(vcpu);
        }
    }

    pub(super) fn is_wanted(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Takes note of an answer, however late it comes.
    pub(super) fn hear(&mut self, answer: &Answer) {
        self.answered |= self.last == Some((answer.vcpu, answer.seq));
    }

    /// Who is stepping and has not answered.
    fn stepping(&self) -> Option<(VcpuId, u64)> {
        self.last.filter(|_| !self.answered)
    }

    /// Whether those that are parked must stay.
    pub(super) fn holds(&self) -> bool {
        self.stepping().is_some()
    }

    /// Whether a kick could only disturb this one: it waits at its inbox, and then it steps.
    pub(super) fn minds_kicks(&self, vcpu: VcpuId) -> bool {
        !self.late && self.stepping().is_some_and(|(stepping, _)| stepping == vcpu)
    }

    /// All vCPUs go on or are stopped for good: who still has to step will say so again.
    pub(super) fn forget(&mut self) {
        *self = Alone::default();
    }
}

impl Coordinator {
    /// Parks every vCPU, and lets those that wait for it step. On error they are not all parked,
    /// or one of them has not answered.
    pub(super) fn park_all(&mut self) -> Result<(), CoordinatorError> {
        self.ask_all(&Request::Park)?;
        self.ground.hold_devices(true);
        while let Some(vcpu) = self.alone.waiting.pop_front() {
            let seq = self.next_seq();
            let waiting = std::mem::take(&mut self.alone.waiting);
            self.alone = Alone { waiting, last: Some((vcpu, seq)), answered: false, late: false };
            self.send(vcpu.index(), seq, Request::StepOver);
            self.answer_of(vcpu, seq)?;
        }
        Ok(())
    }

    /// Lets those step that wait for it, and all go on.
    pub(super) fn step_those_that_wait(&mut self) -> Result<(), CoordinatorError> {
        let stepped = self.park_all();
        self.unpark();
        stepped
    }

    /// Waits for one that was late, for which all others are still parked.
    pub(super) fn await_late_step(&mut self) -> Result<(), CoordinatorError> {
        if let Some((vcpu, seq)) = self.alone.stepping() {
            self.answer_of(vcpu, seq)?;
        }
        if self.alone.last.is_some() {
            self.unpark();
        }
        Ok(())
    }

    fn answer_of(&mut self, vcpu: VcpuId, seq: u64) -> Result<(), CoordinatorError> {
        let answer = self.collect(seq, vcpu.index()..vcpu.index() + 1, ACK_DEADLINE).swap_remove(0);
        self.alone.late = matches!(answer, Err(CoordinatorError::NoAnswer { .. }));
        answer.map(|_| ())
    }
}
