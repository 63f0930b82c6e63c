//! The whole set of devices at their places.

use std::sync::Arc;

use thiserror::Error;

use super::bus::{Bus, Shared, Taken};
use super::cmos::{self, Cmos};
use super::debug_ports::{DEBUGCON_PORT, DebugCon, POST_PORT, PostCode};
use super::exit::{self, ExitPort};
use super::fw_cfg::{self, FwCfg};
use super::i8042::{self, I8042};
use super::mailbox::{ApPark, Bells, Mailbox, PARK_PORT};
use super::pm::{self, PowerManagement};
use super::pvpanic::{self, PvPanic};
use super::reset::{PCI_CONFIG_PORT, PCI_CONFIG_PORTS, PORT_A, PortA, ResetControl};
use super::serial::{self, COM1, Console, Serial, SerialError};
use super::virtio;
use crate::boot::layout;
use crate::limits::PAGE_SIZE;
use crate::memory::GuestRam;
use crate::state::{BrokenState, DeviceState};

/// The devices could not be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The console's eventfds.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// The file descriptors that waiting APs wait on.
    #[error("cannot make the APs' eventfds: {0}; raise the limit of open files (ulimit -n)")]
    Bells(#[from] std::io::Error),
    /// Two devices at one place.
    #[error(transparent)]
    Taken(#[from] Taken),
}

/// The machine's devices.
#[derive(Clone, Debug)]
pub struct Pc {
    /// For the vCPU threads.
    pub bus: Arc<Bus>,
    /// For the event loop, which feeds it with input.
    pub com1: Shared<Serial>,
    /// The last code that the guest wrote to port 0x80.
    pub post: Shared<PostCode>,
    cmos: Shared<Cmos>,
    keyboard: Shared<I8042>,
    power: Shared<PowerManagement>,
    config: Shared<FwCfg>,
    mailbox: Shared<Mailbox>,
    port_a: Shared<PortA>,
    reset: Shared<ResetControl>,
}

impl Pc {
    /// All devices, after reset, and `virtio`'s. The guest's output goes to `console`.
    ///
    /// Not here, because KVM has them in the kernel: PICs, I/O APIC, local APICs, PIT and port 0x61
    /// (KVM_CREATE_PIT2 with KVM_PIT_SPEAKER_DUMMY).
    pub fn new(ram: &GuestRam, cpus: u8, console: Console, virtio: &virtio::Devices) -> Result<Self, DeviceError> {
        let com1 = Shared::new(Serial::new(console.clone())?);
        let post = Shared::new(PostCode::default());
        let keyboard = Shared::new(I8042::default());
        let cmos = Shared::new(Cmos::new(ram.low_end(), ram.high_size(), cpus));
        let config = Shared::new(FwCfg::new(ram.size(), cpus.into()));
        let port_a = Shared::new(PortA::default());

        let mut bus = Bus::new();
        bus.add_pio(COM1, serial::PORTS, &com1)?;
        bus.add_pio(POST_PORT, 1, &post)?;
        bus.add_pio_part(i8042::DATA_PORT, 1, i8042::DATA, &keyboard)?;
        bus.add_pio_part(i8042::COMMAND_PORT, 1, i8042::COMMAND, &keyboard)?;
        bus.add_pio(cmos::PORT, cmos::PORTS, &cmos)?;
        bus.add_pio(PORT_A, 1, &port_a)?;
        bus.add_pio(DEBUGCON_PORT, 1, &Shared::new(DebugCon(console)))?;
        let exit = Shared::new(ExitPort);
        bus.add_pio(exit::PORT, exit::PORTS, &exit)?;
        bus.add_mmio(layout::EXIT_PAGE..layout::EXIT_PAGE + PAGE_SIZE, &exit)?;
        bus.add_pio(pvpanic::PORT, 1, &Shared::new(PvPanic))?;
        bus.add_pio(fw_cfg::PORT, fw_cfg::PORTS, &config)?;
        let power = Shared::new(PowerManagement::default());
        bus.add_pio(pm::EVENT_PORT, pm::PORTS, &power)?;
        let reset = Shared::new(ResetControl::default());
        bus.add_pio(PCI_CONFIG_PORT, PCI_CONFIG_PORTS, &reset)?;
        let bells = Bells::new(cpus)?;
        for id in 1..cpus {
            let park = ApPark::new(bells.clone(), id);
            bus.add_pio(PARK_PORT + u16::from(id), 1, &Shared::new(park))?;
        }
        let page = layout::AP_MAILBOX..layout::AP_MAILBOX + PAGE_SIZE;
        let mailbox = Shared::new(Mailbox::new(bells));
        bus.add_mmio(page, &mailbox)?;
        for device in virtio.iter() {
            let page = device.place.address..device.place.address + PAGE_SIZE;
            bus.add_mmio(page, &Shared::new(device.registers()))?;
        }
        let bus = Arc::new(bus);
        Ok(Self { bus, com1, post, cmos, keyboard, power, config, mailbox, port_a, reset })
    }

    /// What the devices hold. No access may be under way: every vCPU is parked.
    pub fn save(&self) -> DeviceState {
        DeviceState {
            serial: self.com1.lock().save(),
            cmos: self.cmos.lock().save(),
            i8042: *self.keyboard.lock(),
            power: *self.power.lock(),
            fw_cfg: self.config.lock().save(),
            mailbox: self.mailbox.lock().save(),
            port_a: *self.port_a.lock(),
            reset: *self.reset.lock(),
            post: *self.post.lock(),
        }
    }

    /// Puts the devices into a state that was saved. The interrupt controllers must have theirs: what is pending in a
    /// device is raised.
    ///
    /// # Errors
    /// If the state holds what no device of ours could.
    pub fn restore(&self, state: &DeviceState) -> Result<(), BrokenState> {
        self.cmos.lock().restore(&state.cmos)?;
        *self.keyboard.lock() = state.i8042;
        *self.power.lock() = state.power;
        self.config.lock().restore(&state.fw_cfg);
        *self.port_a.lock() = state.port_a;
        *self.reset.lock() = state.reset;
        *self.post.lock() = state.post;
        self.mailbox.lock().restore(&state.mailbox)?;
        self.com1.lock().restore(&state.serial)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::DeviceEvent;
    use crate::limits::MIN_MEMORY;
    use proptest::prelude::*;

    fn pc() -> Pc {
        let ram = GuestRam::new(MIN_MEMORY).unwrap();
        // One vCPU: the ports of waiting APs would only make the test wait.
        Pc::new(&ram, 1, Console::new(std::io::sink()), &virtio::Devices::default()).unwrap()
    }

    #[test]
    fn vcpu_threads_can_share_it() {
        fn shareable<T: Send + Sync>(_: &T) {}
        shareable(&pc());
    }

    #[test]
    fn every_way_out_is_where_guests_look_for_it() {
        let bus = pc().bus;
        let cases: [(u16, &[u8], DeviceEvent); 7] = [
            (0xf4, &[3], DeviceEvent::Exit(3)),
            (0x64, &[0xfe], DeviceEvent::Reset),
            (0xcf9, &[6], DeviceEvent::Reset),
            (0x92, &[1], DeviceEvent::Reset),
            (0x604, &[0, 0x34], DeviceEvent::PowerOff),
            (0x505, &[1], DeviceEvent::Panicked),
            (0x505, &[2], DeviceEvent::CrashLoaded),
        ];
        for (port, data, event) in cases {
            assert_eq!(bus.pio_write(port, data), Some(event), "{port:#x}");
        }
        assert_eq!(bus.mmio_write(layout::EXIT_PAGE, &[7, 0, 0, 0]), Some(DeviceEvent::Exit(7)));
    }

    proptest! {
        /// A guest may do anything to any port in any size and order.
        #[test]
        fn no_access_sequence_panics(
            accesses in proptest::collection::vec(
                (any::<bool>(), 0u16..0x1000, proptest::collection::vec(any::<u8>(), 0..9)), 0..200
            )
        ) {
            let pc = pc();
            for (write, port, mut data) in accesses {
                if write {
                    pc.bus.pio_write(port, &data);
                    pc.bus.mmio_write(port.into(), &data);
                } else {
                    pc.bus.pio_read(port, &mut data);
                    pc.bus.mmio_read(port.into(), &mut data);
                }
                pc.com1.lock().push_input(&data);
            }
        }
    }
}
