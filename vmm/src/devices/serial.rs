//! The console: a 16550 at COM1 (vm-superio), its output and its input.
//!
//! Input comes from whoever reads the user's ([`Serial::push_input`]) and waits in a queue of [`CONSOLE_INPUT_QUEUE`] bytes
//! until the guest listens and has room in the FIFO, so nothing is lost while the guest is slow. The reader asks
//! [`Serial::input_room`] before it reads on, and is told through an eventfd when there is room again.
//!
//! A guest listens when it has enabled the interrupt for received data, or when it looks at the line status again and
//! again. Before that nothing goes into the FIFO: drivers that set up the port read and throw away what is there (Linux
//! three bytes), and a script piped into the console would lose its beginning.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_superio::{Serial as Uart, SerialState as UartState, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use super::DeviceEvent;
use super::bus::Device;
use crate::limits::CONSOLE_INPUT_QUEUE;
use crate::state::BrokenState;

/// First I/O port of COM1.
pub const COM1: u16 = 0x3f8;
/// Number of I/O ports of a 16550.
pub const PORTS: u16 = 8;
/// Its interrupt: ISA IRQ 4, edge triggered.
pub const COM1_IRQ: u32 = 4;

/// Offsets of registers: data, interrupt enable, line control, line status.
const DATA: u8 = 0;
const IER: u8 = 1;
const LCR: u8 = 3;
const LSR: u8 = 5;

/// Interrupt enable: received data; all of them.
const IER_RECEIVED: u8 = 1;
const IER_ALL: u8 = 0x0f;
/// Line control: offsets 0 and 1 are the baud rate divisor.
const LCR_DIVISOR: u8 = 0x80;

/// How many looks at the line status, beyond those that go before a byte sent, make a guest one that polls for input.
/// Linux's set-up does three at most.
const POLLS: u32 = 8;

/// Where the guest's output goes. Clones write to the same place, one access after the other.
#[derive(Clone)]
pub struct Console(Arc<Mutex<Box<dyn Write + Send>>>);

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Console")
    }
}

impl Console {
    /// Output goes to `sink`. The guest waits while it blocks; what it refuses is lost.
    pub fn new(sink: impl Write + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(Box::new(sink))))
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut sink = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sink.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut sink = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sink.flush()
    }
}

/// The interrupt line: an eventfd that KVM turns into an edge (irqfd).
#[derive(Debug)]
struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The serial port could not be set up.
#[derive(Debug, Error)]
#[error("cannot make an eventfd for the console: {0}; raise the limit of open files (ulimit -n)")]
pub struct SerialError(#[from] io::Error);

/// A 16550 with a queue of input.
#[derive(Debug)]
pub struct Serial {
    uart: Uart<Irq, NoEvents, Console>,
    /// Bytes that the empty FIFO takes.
    fifo_size: usize,
    queue: VecDeque<u8>,
    /// The interrupt for received data is enabled...
    interrupts: bool,
    /// ... but perhaps only to see whether the bits stick (Linux's detection of the port does that with [`IER_ALL`]): it
    /// counts from the next access that is no second one to the same register.
    probing: bool,
    /// Looks at the line status since the last access to another register.
    polls: u32,
    room: EventFd,
    waiting: bool,
    console: Console,
}

/// A 16550 and the input that waits for it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[allow(missing_docs)] // the chip's names
pub struct SerialState {
    pub baud_divisor: [u8; 2],
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    /// Received and not read.
    pub fifo: Vec<u8>,
    /// Typed and not received.
    pub queue: Vec<u8>,
    /// The guest has enabled the interrupt for received data..
    pub listens: bool,
    /// .. but perhaps only to see whether it can.
    pub probes: bool,
    /// Looks at the line status in a row.
    pub polls: u32,
}

impl Serial {
    /// A port after reset that writes to `console`.
    pub fn new(console: Console) -> Result<Self, SerialError> {
        let irq = Irq(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let uart = Uart::new(irq, console.clone());
        Ok(Self {
            fifo_size: uart.fifo_capacity(),
            uart,
            queue: VecDeque::new(),
            interrupts: false,
            probing: false,
            polls: 0,
            room: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            waiting: false,
            console,
        })
    }

    /// The port's registers, and the input that the guest has not read.
    pub fn save(&self) -> SerialState {
        let uart = self.uart.state();
        SerialState {
            baud_divisor: [uart.baud_divisor_low, uart.baud_divisor_high],
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            fifo: uart.in_buffer,
            queue: self.queue.iter().copied().collect(),
            listens: self.interrupts,
            probes: self.probing,
            polls: self.polls,
        }
    }

    /// Takes registers and input as they were saved. An interrupt that is pending in them is raised again: its edge may
    /// have been on the way.
    ///
    /// # Errors
    /// If the input is more than there is room for, or the interrupt cannot be raised.
    pub fn restore(&mut self, state: &SerialState) -> Result<(), BrokenState> {
        let [baud_divisor_low, baud_divisor_high] = state.baud_divisor;
        let uart = UartState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.fifo.clone(),
        };
        let broken = BrokenState("console");
        let irq = Irq(self.uart.interrupt_evt().0.try_clone().map_err(|_| broken)?);
        if state.queue.len() > CONSOLE_INPUT_QUEUE {
            return Err(broken);
        }
        self.uart = Uart::from_state(&uart, irq, NoEvents, self.console.clone()).map_err(|_| broken)?;
        self.queue = state.queue.iter().copied().collect();
        (self.interrupts, self.probing, self.polls) = (state.listens, state.probes, state.polls);
        Ok(())
    }

    /// The interrupt line, to be given to KVM_IRQFD as GSI [`COM1_IRQ`].
    pub fn irq(&self) -> Result<EventFd, SerialError> {
        Ok(self.uart.interrupt_evt().0.try_clone()?)
    }

    /// An eventfd that is written when there is room again after [`Serial::input_room`] said 0.
    pub fn room_event(&self) -> Result<EventFd, SerialError> {
        Ok(self.room.try_clone()?)
    }

    /// Bytes that [`Serial::push_input`] would take now at least. 0: wait for the room event.
    pub fn input_room(&mut self) -> usize {
        let room = CONSOLE_INPUT_QUEUE - self.queue.len();
        self.waiting |= room == 0;
        room
    }

    /// Takes input for the guest. Returns how many of the bytes were taken; the rest is the caller's to keep until
    /// the room event.
    pub fn push_input(&mut self, bytes: &[u8]) -> usize {
        let mut rest = bytes;
        while !rest.is_empty() && self.input_room() > 0 {
            let (now, later) = rest.split_at(rest.len().min(self.input_room()));
            self.queue.extend(now);
            self.probing = false;
            self.fill();
            rest = later;
        }
        bytes.len() - rest.len()
    }

    /// An access to another register than the one that is perhaps only probed.
    fn end_probe(&mut self, offset: u8) {
        if offset != IER && self.probing {
            self.probing = false;
            self.fill();
        }
    }

    /// Moves input from the queue to the FIFO as far as there is room (there is none in loopback mode), if the guest
    /// listens.
    fn fill(&mut self) {
        let listens = self.interrupts && !self.probing || self.polls >= POLLS;
        while listens && !self.queue.is_empty() && self.uart.fifo_capacity() > 0 {
            let (front, _) = self.queue.as_slices();
            let most = front.len().min(self.uart.fifo_capacity());
            let taken = self.uart.enqueue_raw_bytes(&front[..most]).unwrap_or_else(|error| {
                // The bytes are in the FIFO; only the edge went nowhere, with the machine that it was for.
                tracing::warn!(%error, "console input");
                most
            });
            if taken == 0 {
                break;
            }
            self.queue.drain(..taken);
        }
        if self.waiting && self.queue.len() <= CONSOLE_INPUT_QUEUE / 2 {
            self.waiting = false;
            if let Err(error) = self.room.write(1) {
                tracing::warn!(%error, "console room event");
            }
        }
    }
}

impl Device for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (offset, byte) in (offset as u8..).zip(data) {
            self.polls = match offset {
                LSR => self.polls.saturating_add(1),
                _ => 0,
            };
            self.end_probe(offset);
            if offset == LSR {
                self.fill();
            }
            *byte = self.uart.read(offset);
            // Not for every byte that is read: each refill is an interrupt.
            if offset == DATA && self.uart.fifo_capacity() == self.fifo_size {
                self.fill();
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<DeviceEvent> {
        for (offset, byte) in (offset as u8..).zip(data) {
            self.end_probe(offset);
            if let Err(error) = self.uart.write(offset, *byte) {
                // The guest cannot be made to wait for a closed terminal; it goes on without.
                tracing::debug!(%error, "console output lost");
            }
            self.polls = match offset {
                // The look before it was for the transmitter.
                DATA => self.polls.saturating_sub(1),
                _ => 0,
            };
            if offset == IER && self.uart.read(LCR) & LCR_DIVISOR == 0 {
                let before = self.interrupts;
                self.interrupts = byte & IER_RECEIVED != 0;
                self.probing = !before && byte & IER_ALL == IER_ALL;
            }
            if offset != DATA {
                self.fill();
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::{Bus, Shared};

    const IER: u16 = COM1 + 1;
    const IIR: u16 = COM1 + 2;
    const LCR: u16 = COM1 + 3;
    const MCR: u16 = COM1 + 4;
    const LSR: u16 = COM1 + 5;
    const MSR: u16 = COM1 + 6;

    /// A sink that can be looked at.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn com1(sink: impl Write + Send + 'static) -> (Bus, Shared<Serial>) {
        let serial = Shared::new(Serial::new(Console::new(sink)).unwrap());
        let mut bus = Bus::new();
        bus.add_pio(COM1, PORTS, &serial).unwrap();
        (bus, serial)
    }

    fn inb(bus: &Bus, port: u16) -> u8 {
        let mut byte = [0];
        bus.pio_read(port, &mut byte);
        byte[0]
    }

    #[test]
    fn output_goes_to_the_sink_in_order() {
        let sink = Sink::default();
        let (bus, _) = com1(sink.clone());
        for byte in b"hello " {
            bus.pio_write(COM1, &[*byte]);
        }
        bus.pio_write_string(COM1, 1, b"world");
        assert_eq!(*sink.0.lock().unwrap(), b"hello world");
    }

    #[test]
    fn a_sink_that_refuses_loses_output_only() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        }
        let (bus, _) = com1(Closed);
        assert_eq!(bus.pio_write(COM1, b"x"), None);
        assert_eq!(inb(&bus, LSR) & 0x20, 0x20, "transmitter ready");
    }

    /// What the guest gets when it polls until nothing comes any more.
    fn poll(bus: &Bus) -> Vec<u8> {
        let mut got = Vec::new();
        while (0..=POLLS).any(|_| inb(bus, LSR) & 1 == 1) {
            got.push(inb(bus, COM1));
        }
        got
    }

    #[test]
    fn no_input_is_lost_however_slow_the_guest_is() {
        for interrupts in [false, true] {
            let (bus, serial) = com1(io::sink());
            bus.pio_write(IER, &[interrupts.into()]);
            let room = serial.lock().room_event().unwrap();
            let sent: Vec<u8> = (0..20_000u32).map(|n| (n % 251) as u8).collect();
            let (mut given, mut got) = (0, Vec::new());
            while got.len() < sent.len() {
                given += serial.lock().push_input(&sent[given..]);
                if serial.lock().input_room() > 0 {
                    assert_eq!(given, sent.len(), "took less although there was room");
                }
                got.extend(poll(&bus));
                if given < sent.len() {
                    room.read().expect("room event after a full queue");
                }
            }
            assert_eq!(got, sent);
        }
    }

    #[test]
    fn input_raises_the_interrupt_when_the_guest_wants_it() {
        let (bus, serial) = com1(io::sink());
        let irq = serial.lock().irq().unwrap();
        serial.lock().push_input(b"a");
        assert!(irq.read().is_err(), "interrupts are off after reset");
        bus.pio_write(IER, &[1]);
        assert_eq!(irq.read().unwrap(), 1);
        assert_eq!(inb(&bus, IIR) & 0xf, 4, "received data available");
        assert_eq!(inb(&bus, COM1), b'a');
        serial.lock().push_input(&[b'b'; 200]);
        for _ in 0..200 {
            assert_eq!(inb(&bus, COM1), b'b');
        }
        assert!(irq.read().unwrap() >= 1, "an edge for input that came later");
    }

    #[test]
    fn a_driver_that_sets_up_the_port_throws_nothing_away() {
        let (bus, serial) = com1(io::sink());
        serial.lock().push_input(b"first");
        // The registers that Linux reads to clear them, the test of the transmitter, the divisor, a message.
        for _ in 0..3 {
            for register in [LSR, COM1, IIR, MSR, LSR, LSR] {
                inb(&bus, register);
            }
            bus.pio_write(IER, &[2]);
            bus.pio_write(IER, &[0x0f]);
            inb(&bus, IER);
            bus.pio_write(IER, &[0]);
            bus.pio_write(LCR, &[0x83]);
            bus.pio_write(IER, &[1]);
            bus.pio_write(LCR, &[0x03]);
            for _ in 0..100 {
                assert_eq!(inb(&bus, LSR) & 1, 0, "nothing to see yet");
                bus.pio_write(COM1, b".");
            }
        }
        bus.pio_write(IER, &[5]);
        assert_eq!(poll(&bus), b"first");
    }

    #[test]
    fn a_guest_that_enables_all_interrupts_and_means_it_gets_input() {
        let (bus, serial) = com1(io::sink());
        let irq = serial.lock().irq().unwrap();
        serial.lock().push_input(b"a");
        bus.pio_write(IER, &[0x0f]);
        inb(&bus, IER);
        irq.read().expect("for the transmitter");
        inb(&bus, IIR);
        assert_eq!(irq.read().unwrap(), 1, "the first other access shows that it was meant");
        assert_eq!(inb(&bus, COM1), b'a');
        bus.pio_write(IER, &[0]);
        bus.pio_write(IER, &[0x0f]);
        serial.lock().push_input(b"b");
        assert_eq!(inb(&bus, COM1), b'b', "and so does time");
    }

    #[test]
    fn a_guest_that_polls_between_its_own_output_gets_input() {
        let (bus, serial) = com1(io::sink());
        serial.lock().push_input(b"x");
        // Once for input, once for the transmitter, then a byte sent.
        let sees = |_| {
            let input = inb(&bus, LSR) & 1 == 1;
            inb(&bus, LSR);
            bus.pio_write(COM1, b".");
            input
        };
        assert!((0..20).any(sees));
    }

    #[test]
    fn input_during_loopback_waits() {
        let (bus, serial) = com1(io::sink());
        bus.pio_write(IER, &[1]);
        bus.pio_write(MCR, &[0x10]);
        assert_eq!(serial.lock().push_input(b"abc"), 3);
        assert_eq!(inb(&bus, LSR) & 1, 0);
        bus.pio_write(MCR, &[0x08]);
        let got = [inb(&bus, COM1), inb(&bus, COM1), inb(&bus, COM1)];
        assert_eq!(&got, b"abc");
    }

    #[test]
    fn wide_accesses_are_register_by_register() {
        let (bus, _) = com1(io::sink());
        bus.pio_write(COM1 + 7, &[0x5a]);
        let mut data = [0; 4];
        bus.pio_read(COM1 + 5, &mut data);
        assert_eq!(data[2..], [0x5a, 0xff], "scratch register, then nobody");
    }
}
