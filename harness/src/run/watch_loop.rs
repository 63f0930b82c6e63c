//! The event loop of a run that has nobody else: no debugger, no terminal, no signals.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use trapline_vmm::Vm;
use trapline_vmm::debug::{ResumePlan, RunMode, Stop};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::{Next, Outcome, RunError, Supervisor};
use crate::Verdict;
use crate::report::StopRecord;

/// How a run ended.
type End = (Verdict, Option<StopRecord>);

/// Runs the guest to its end, or as far as the run can go.
pub(crate) fn run(mut vm: Vm, mut supervisor: Supervisor) -> Result<Outcome, RunError> {
    let epoll = Epoll::new()?;
    let mut timer = TimerFd::new().map_err(io::Error::from)?;
    let timeout = supervisor.timeout();
    if let Some(time) = timeout {
        timer.reset(time, None).map_err(io::Error::from)?;
    }
    let fds = [vm.events().as_raw_fd(), timer.as_raw_fd()].into_iter().chain(supervisor.fds());
    for fd in fds {
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, fd as u64))?;
    }
    supervisor.begins();
    let mut end = or_aborted(go(&mut vm, &mut supervisor));
    while end.is_none() {
        let mut events = [EpollEvent::default(); 4];
        let count = match epoll.wait(-1, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            count => count?,
        };
        for event in &events[..count] {
            let fd = event.fd();
            end = if fd == vm.events().as_raw_fd() {
                match vm.poll() {
                    Ok(Some(stop)) => or_aborted(stopped(&mut vm, &mut supervisor, stop)),
                    Ok(None) => None,
                    // A vCPU that is late does not cost the run: the stop is still there to be told.
                    Err(error) => {
                        tracing::warn!("{error}; trying again");
                        let _ = vm.events().write(1);
                        None
                    }
                }
            } else if fd == timer.as_raw_fd() {
                Some((Verdict::TimedOut(timeout.unwrap_or(Duration::ZERO)), None))
            } else {
                let next = supervisor.ready(&mut vm, fd);
                or_aborted(next.and_then(|next| follow(&mut vm, &mut supervisor, next)))
            };
            if end.is_some() {
                break;
            }
        }
    }
    let (verdict, stop) = end.unwrap_or((Verdict::Killed, None));
    let outcome = supervisor.finish(&mut vm, verdict, stop);
    vm.kill();
    Ok(outcome)
}

/// What keeps a run from going on is how it ends: there is something to tell of it by now.
fn or_aborted(came: Result<Option<End>, RunError>) -> Option<End> {
    came.unwrap_or_else(|error| Some((error.verdict(), None)))
}

/// The world stands, for this stop.
fn stopped(vm: &mut Vm, supervisor: &mut Supervisor, stop: Stop) -> Result<Option<End>, RunError> {
    match supervisor.stopped(vm, &stop)? {
        Next::Nothing => match Verdict::of_stop(&stop.reason) {
            Some(verdict) => Ok(Some((verdict, None))),
            None => go(vm, supervisor),
        },
        next => follow(vm, supervisor, next),
    }
}

fn follow(vm: &mut Vm, supervisor: &mut Supervisor, next: Next) -> Result<Option<End>, RunError> {
    match next {
        Next::Nothing => Ok(None),
        // Nobody can come to look; rules that want that have been refused.
        Next::Go | Next::Hold(_) => go(vm, supervisor),
        Next::End(ended) => {
            let verdict = supervisor.verdict_of(&ended);
            Ok(Some((verdict, ended.stop.map(|stop| *stop))))
        }
    }
}

/// Lets the guest go on; what stopped it at once is heard of, too.
fn go(vm: &mut Vm, supervisor: &mut Supervisor) -> Result<Option<End>, RunError> {
    let plan = ResumePlan::all(vm.vcpus(), RunMode::Continue);
    match vm.resume(&plan)? {
        Some(stop) => stopped(vm, supervisor, stop),
        None => Ok(None),
    }
}
