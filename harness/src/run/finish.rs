//! The end of a run: its verdict, its report, and every file of it.

use std::collections::BTreeMap;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use trapline_vmm::Vm;
use trapline_vmm::debug::{Crash, VcpuId};

use super::arming::Stage;
use super::error::EX_UNAVAILABLE;
use super::supervisor::{Next, Supervisor};
use crate::Verdict;
use crate::console::ConsoleHandle;
use crate::report::{
    Event, Outcome as TrapOutcome, Report, ReportTiming, SCHEMA, StopRecord, TestRecord, TestResult, TrapRecord,
    TrapTiming, VerdictRecord,
};

/// The privilege level of a guest's programs.
const USER: u8 = 3;

/// What a run came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// How it ended.
    pub verdict: Verdict,
    /// Everything about it.
    pub report: Report,
}

impl Outcome {
    /// The exit code of `trapline run`: that of the verdict, or 69 for a run that passed and whose report could not be
    /// written.
    pub fn exit_code(&self) -> u8 {
        match self.verdict.exit_code() {
            0 if !self.report.problems.is_empty() => EX_UNAVAILABLE,
            code => code,
        }
    }
}

impl Supervisor {
    /// Ends the run with this verdict, if nothing speaks against it, and writes what was asked for. The guest stands,
    /// or has ended; it is not needed any more afterwards.
    ///
    /// `stop`: the stop that a trap has ended the run with, if it was one.
    pub fn finish(mut self, vm: &mut Vm, verdict: Verdict, stop: Option<StopRecord>) -> Outcome {
        let at = Instant::now();
        self.take_logged();
        self.console.finish();
        let (verdict, stop) = self.hear_the_last(vm, verdict, stop);
        let tests = self.console.tests();
        let verdict = self.judge(verdict, &tests);
        let is_aborted = matches!(verdict, Verdict::Aborted { .. });
        let mut problems = std::mem::take(&mut self.problems);
        problems.extend(self.console.problems());
        if !is_aborted {
            problems.extend(self.never_armed());
        }
        let stop = stop.or_else(|| self.last_look(vm, &verdict));
        let mut report = self.make_report(&verdict, stop, tests, at);
        if verdict != Verdict::Pass && verdict != Verdict::Killed && !is_aborted {
            problems.extend(self.write_core(vm, &mut report));
        }
        for problem in &self.lost() {
            problems.push(problem.clone());
        }
        for mut stream in std::mem::take(&mut self.streams) {
            let at = at.saturating_duration_since(self.began());
            if let Some(stop) = &report.stop {
                stream.emit(at, Event::Stop(stop));
            }
            stream.emit(at, Event::Verdict(&report.verdict));
            problems.extend(stream.finish());
        }
        report.problems = problems;
        self.write_files(&mut report);
        Outcome { verdict, report }
    }

    /// What the console said right before the end may not have been heard yet, and is what ended the run then.
    fn hear_the_last(
        &mut self,
        vm: &mut Vm,
        verdict: Verdict,
        stop: Option<StopRecord>,
    ) -> (Verdict, Option<StopRecord>) {
        match self.hear(vm) {
            Ok(Next::End(ended))
                if !matches!(verdict, Verdict::Trapped { .. } | Verdict::Killed | Verdict::Aborted { .. }) =>
            {
                (self.verdict_of(&ended), ended.stop.map(|stop| *stop))
            }
            Ok(_) => (verdict, stop),
            Err(error) => {
                self.problems.push(format!("what the console said last is not judged: {error}"));
                (verdict, stop)
            }
        }
    }

    /// A run whose traps could not be hit has not passed them.
    fn never_armed(&self) -> Option<String> {
        let what = match self.stage {
            Stage::Armed => return None,
            Stage::BeforeKernel => "the traps were",
            Stage::BeforeStart(_) => "watchpoints were",
            Stage::BeforePatches(_) => "traps that are software breakpoints were",
        };
        Some(format!(
            "{what} never armed: the guest ended before the kernel that the symbols are of was seen to run that far; give \
             the symbols of what is booted"
        ))
    }

    /// What a verdict is, once all is known about the run.
    fn judge(&self, verdict: Verdict, tests: &[TestRecord]) -> Verdict {
        if verdict != Verdict::Pass {
            return verdict;
        }
        // With panic=-1 a kernel resets after its panic, as it does after a reboot that is wanted.
        if self.console.panic().is_some() {
            return Verdict::Panicked;
        }
        if self.tells_status && self.guest_status.is_none() {
            // Where the init that we pack has no exit port, it prints the status and switches off.
            match self.console.program_status() {
                Some(0) => {}
                Some(status) => return Verdict::GuestFailed(status.into()),
                None => return Verdict::NoStatus,
            }
        }
        let failed =
            |test: &&TestRecord| test.subtests == 0 && matches!(test.result, TestResult::Failed | TestResult::Missing);
        match tests.iter().filter(failed).count() {
            0 => {}
            count => return Verdict::TestsFailed(count),
        }
        let missed = self.traps.iter().filter(|trap| trap.rule.must_hit && trap.counters.total() == 0);
        let missed: Vec<String> = missed.map(|trap| trap.rule.title().to_owned()).collect();
        if missed.is_empty() { Verdict::Pass } else { Verdict::Missed(missed) }
    }

    /// Where all vCPUs are at the end of a run that did not pass.
    fn last_look(&mut self, vm: &mut Vm, verdict: &Verdict) -> Option<StopRecord> {
        let is_the_guests =
            !matches!(verdict, Verdict::Pass | Verdict::Killed | Verdict::Missed(_) | Verdict::Aborted { .. });
        if !is_the_guests || vm.ended().is_some() {
            return None;
        }
        if vm.pause().is_err() {
            return None;
        }
        // No place in the program that gave the status, or in the guest's way out, says more than the verdict.
        let is_in_a_program = |vcpu| vm.glance(vcpu).is_ok_and(|glance| glance.cpl == USER);
        match verdict {
            Verdict::TestsFailed(_) => return None,
            Verdict::GuestFailed(_) if self.ended_on.is_some_and(is_in_a_program) => return None,
            _ => {}
        }
        let vcpu = self.ended_on.or(match verdict {
            Verdict::TimedOut(_) => None,
            _ => Some(VcpuId(0)),
        });
        let found = self.look_around(vm, verdict.to_string(), vcpu);
        let mut stop =
            found.inspect_err(|error| tracing::warn!("what the vCPUs were doing is not known: {error}")).ok()?;
        if let Verdict::Died(Crash::TripleFault { state_lost: true }) = verdict {
            forget_place(&mut stop);
        }
        Some(stop)
    }

    fn make_report(&self, verdict: &Verdict, stop: Option<StopRecord>, tests: Vec<TestRecord>, at: Instant) -> Report {
        let decided = match verdict {
            Verdict::Trapped { trap, .. } => Some(*trap),
            Verdict::Died(Crash::TripleFault { .. }) => self.triple_fault_trap(),
            _ => None,
        };
        let tail = self.console.tail();
        let started = SystemTime::now() - at.saturating_duration_since(self.began());
        Report {
            schema: SCHEMA,
            trapline: env!("CARGO_PKG_VERSION").to_owned(),
            verdict: VerdictRecord {
                kind: verdict.kind(),
                exit_code: verdict.exit_code(),
                text: verdict.to_string(),
                guest_status: match verdict {
                    Verdict::GuestFailed(status) => Some(*status),
                    _ => self.guest_status,
                },
                trap: decided,
            },
            input: self.input.clone(),
            traps: (0..self.traps.len()).map(|n| self.trap_record(n, decided)).collect(),
            stop,
            tests,
            files: BTreeMap::new(),
            problems: Vec::new(),
            timing: ReportTiming {
                started: started.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
                duration_ms: millis(at.saturating_duration_since(self.began())),
                boot_ms: self.console.booted().map(millis),
                kernel_slide: self.symbols.slide(),
                recent: self.recent().cloned().collect(),
                console: tail.lines,
                console_lines_before: tail.before,
                console_line: self.console_line.or_else(|| last_line(&self.console)),
            },
        }
    }

    fn trap_record(&self, index: usize, decided: Option<usize>) -> TrapRecord {
        let trap = &self.traps[index];
        let (rule, counters) = (&trap.rule, &trap.counters);
        TrapRecord {
            rule: rule.text.clone(),
            name: rule.title().to_owned(),
            action: rule.action.word().to_owned(),
            targets: self.records.get(index).cloned().unwrap_or_default(),
            outcome: match decided {
                Some(fired) if fired == index => TrapOutcome::Fired,
                _ if rule.must_hit && counters.total() == 0 => TrapOutcome::Missed,
                _ => TrapOutcome::Passed,
            },
            timing: TrapTiming { hits: counters.by_vcpu(), unmet: counters.unmet() },
        }
    }

    /// What the report does not have, in words.
    fn lost(&self) -> Vec<String> {
        let lost = |trap: &std::sync::Arc<super::trap::Trap>| {
            let count = trap.counters.lost.load(std::sync::atomic::Ordering::Relaxed);
            (count > 0).then(|| {
                format!("{}: {count} hits were counted and not logged, there were too many", trap.rule.title())
            })
        };
        self.traps.iter().filter_map(lost).collect()
    }
}

/// KVM has reset the vCPU that the stop is about: where that is now is not where it was.
fn forget_place(stop: &mut StopRecord) {
    stop.at = None;
    stop.source = None;
    stop.backtrace.clear();
    let its = stop.timing.vcpus.iter_mut().find(|vcpu| stop.vcpu == Some(vcpu.vcpu));
    if let Some(vcpu) = its {
        vcpu.backtrace.clear();
        vcpu.backtrace_ends = Some("this KVM has reset its registers".to_owned());
    }
}

fn last_line(console: &ConsoleHandle) -> Option<u64> {
    Some(console.line_count()).filter(|count| *count > 0)
}

fn millis(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
