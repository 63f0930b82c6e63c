//! gdbstub's state machine, fed with whole packets.
//!
//! Bytes go in as gdbstub's own framing wants them, and its replies are taken out of their frames
//! again: acknowledgements, run-length encoding and output buffering belong to [`crate::framing`]
//! and [`crate::session`].

use std::convert::Infallible;

use gdbstub::common::{Signal, Tid};
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{GdbStub, MultiThreadStopReason};
use trapline_vmm::debug::VcpuId;

use crate::adapter::{Adapter, tid};
use crate::debuggee::Debuggee;
use crate::framing::hex_byte;
use crate::limits::PACKET_SIZE;

type Machine<D> = GdbStubStateMachine<'static, Adapter<D>, Replies>;

/// gdbstub, for one client.
pub(crate) struct Engine<D: Debuggee> {
    /// Gone once gdbstub has given up.
    machine: Option<Machine<D>>,
    /// The vCPU that gdbstub reads registers and memory of.
    selected: Option<VcpuId>,
}

/// gdbstub met something that it cannot live with. The client is lost, the guest is not.
#[derive(Debug, thiserror::Error)]
#[error("the gdb protocol engine failed: {0}")]
pub(crate) struct EngineError(String);

fn failed(error: impl ToString) -> EngineError {
    EngineError(error.to_string())
}

impl<D: Debuggee> Engine<D> {
    /// A new one, without a history: gdbstub keeps what one client negotiated.
    pub(crate) fn new(target: &mut Adapter<D>) -> Result<Self, EngineError> {
        let stub = GdbStub::builder(Replies::default()).packet_buffer_size(PACKET_SIZE).build().map_err(failed)?;
        let machine = stub.run_state_machine(target).map_err(|e| failed(format!("{e:?}")))?;
        Ok(Self { machine: Some(machine), selected: None })
    }

    /// Serves a packet. Returns the replies, without their frames; none if the packet resumes.
    pub(crate) fn serve(&mut self, packet: &[u8], target: &mut Adapter<D>) -> Result<Vec<Vec<u8>>, EngineError> {
        let selected = target.view.selected;
        if self.selected != Some(selected) {
            self.feed(format!("Hg{:x}", tid(selected)).as_bytes(), target)?;
            self.selected = Some(selected);
        }
        self.feed(packet, target)
    }

    /// After a resumption: gdbstub waits for packets again.
    pub(crate) fn stopped(&mut self, target: &mut Adapter<D>) -> Result<(), EngineError> {
        // It changes its selection to the thread that it reports.
        self.selected = None;
        let tid = Tid::new(tid(target.view.stop.vcpu) as usize).ok_or_else(|| failed("no thread has number 0"))?;
        let reason = MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGTRAP };
        let mut machine = match self.take()? {
            GdbStubStateMachine::Running(running) => running.report_stop(target, reason).map_err(failed)?,
            other => other,
        };
        replies(&mut machine)?.take();
        self.machine = Some(machine);
        Ok(())
    }

    fn feed(&mut self, packet: &[u8], target: &mut Adapter<D>) -> Result<Vec<Vec<u8>>, EngineError> {
        let sum = packet.iter().fold(0u8, |sum, &b| sum.wrapping_add(b));
        let frame = [b"$", packet, b"#", &hex_byte(sum)].concat();
        let mut machine = self.take()?;
        for byte in frame {
            machine = match machine {
                GdbStubStateMachine::Idle(idle) => idle.incoming_data(target, byte).map_err(failed)?,
                GdbStubStateMachine::Running(running) => running.incoming_data(target, byte).map_err(failed)?,
                GdbStubStateMachine::CtrlCInterrupt(_) | GdbStubStateMachine::Disconnected(_) => {
                    return Err(failed("it left the conversation"));
                }
            };
        }
        let answers = replies(&mut machine)?.take();
        self.machine = Some(machine);
        Ok(answers)
    }

    fn take(&mut self) -> Result<Machine<D>, EngineError> {
        self.machine.take().ok_or_else(|| failed("it has failed before"))
    }
}

fn replies<D: Debuggee>(machine: &mut Machine<D>) -> Result<&mut Replies, EngineError> {
    match machine {
        GdbStubStateMachine::Idle(idle) => Ok(idle.borrow_conn()),
        GdbStubStateMachine::Running(running) => Ok(running.borrow_conn()),
        _ => Err(failed("it left the conversation")),
    }
}

/// Takes the replies out of their frames.
#[derive(Debug, Default)]
struct Replies {
    done: Vec<Vec<u8>>,
    open: Option<Vec<u8>>,
}

impl Replies {
    fn take(&mut self) -> Vec<Vec<u8>> {
        self.open = None;
        std::mem::take(&mut self.done)
    }
}

impl Connection for Replies {
    type Error = Infallible;

    fn write(&mut self, byte: u8) -> Result<(), Infallible> {
        // A reply has neither `$` nor `#` inside (RSP); between replies there are
        // acknowledgements and checksums.
        match (byte, &mut self.open) {
            (b'$', _) => self.open = Some(Vec::new()),
            (b'#', open) => self.done.extend(open.take()),
            (byte, Some(open)) => open.push(byte),
            (_, None) => {}
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}
