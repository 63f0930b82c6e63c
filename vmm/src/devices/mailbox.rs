//! The ACPI wakeup mailbox (ACPI 6.5, 5.2.12.19) and the place where APs wait for it.
//!
//! The mailbox is a page of registers rather than memory, so that the machine sees the guest's command. An AP that has
//! not been called yet reads its port ([`ApPark`]), and that read comes back when the AP is called. In memory the APs
//! would have to look for the command again and again, each keeping a host processor busy: with more vCPUs than
//! processors the boot vCPU would starve.
//!
//! ```text
//!     guest: APIC id, address, then the command  ->  Mailbox rings that AP's bell
//!     AP:    IN from its port returns            ->  sees id and command, clears the command, goes to the address
//! ```
//!
//! The wait also ends when a signal arrives, so a kicked vCPU leaves it at once, and after half a second in any case.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::DeviceEvent;
use super::bus::Device;
use crate::limits::PAGE_SIZE;
use crate::state::{Blob, BrokenState};

/// The port of the vCPU with APIC id 0; the others follow in the order of their ids.
pub const PARK_PORT: u16 = 0x5c0;

/// Offsets in the mailbox: command (2 bytes), APIC id (4 bytes). The address at 8 is between the guest and the AP.
const COMMAND: usize = 0;
const APIC_ID: usize = 4;

/// Command: wake up.
const WAKE_UP: u16 = 1;
/// An APIC id that no processor has.
const NOBODY: u32 = u32::MAX;

/// An AP whose kick came just before it began to wait notices it after this.
const LONGEST: Duration = Duration::from_millis(500);

/// Rung by the mailbox, waited for by one AP.
#[derive(Debug)]
struct Bell {
    rung: EventFd,
    /// Watches `rung`: unlike a read of it, this wait has an end.
    wait: Epoll,
}

impl Bell {
    fn new() -> io::Result<Self> {
        let rung = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let wait = Epoll::new()?;
        wait.ctl(ControlOperation::Add, std::os::fd::AsRawFd::as_raw_fd(&rung), EpollEvent::new(EventSet::IN, 0))?;
        Ok(Self { rung, wait })
    }

    fn ring(&self) {
        if let Err(error) = self.rung.write(1) {
            tracing::warn!(%error, "wakeup mailbox");
        }
    }

    /// Until it is rung, a signal arrives or the longest wait is over. The AP looks for itself which of them it was.
    fn wait(&self) {
        let _ = self.wait.wait(LONGEST.as_millis() as i32, &mut [EpollEvent::default()]);
        let _ = self.rung.read();
    }
}

/// The bells of all APs, from APIC id 1 up.
#[derive(Clone, Debug)]
pub struct Bells(Arc<[Bell]>);

impl Bells {
    /// For a machine with `cpus` vCPUs.
    pub fn new(cpus: u8) -> io::Result<Self> {
        (1..cpus).map(|_| Bell::new()).collect::<io::Result<_>>().map(Self)
    }

    fn of(&self, apic_id: u32) -> Option<&Bell> {
        self.0.get(usize::try_from(apic_id.checked_sub(1)?).ok()?)
    }
}

/// The mailbox page, at [`crate::boot::layout::AP_MAILBOX`].
#[derive(Debug)]
pub struct Mailbox {
    page: Vec<u8>,
    bells: Bells,
}

impl Mailbox {
    /// An empty mailbox that wakes the APs waiting for these bells.
    pub fn new(bells: Bells) -> Self {
        let mut page = vec![0; PAGE_SIZE as usize];
        page[APIC_ID..APIC_ID + 4].copy_from_slice(&NOBODY.to_le_bytes());
        Self { page, bells }
    }

    /// The page.
    pub fn save(&self) -> Blob {
        Blob::new(&self.page)
    }

    /// Takes the page as it was saved, and rings whom a command in it calls: that AP may wait.
    ///
    /// # Errors
    /// If it is larger than a page.
    pub fn restore(&mut self, page: &Blob) -> Result<(), BrokenState> {
        let page = page.padded::<{ PAGE_SIZE as usize }>().ok_or(BrokenState("wakeup mailbox"))?;
        self.write(0, &page);
        Ok(())
    }
}

impl Device for Mailbox {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let at = offset as usize;
        if let Some(bytes) = self.page.get(at..at.saturating_add(data.len())) {
            data.copy_from_slice(bytes);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<DeviceEvent> {
        let at = offset as usize;
        self.page.get_mut(at..at.saturating_add(data.len()))?.copy_from_slice(data);
        let command = u16::from_le_bytes(*self.page[COMMAND..].first_chunk()?);
        let apic_id = u32::from_le_bytes(*self.page[APIC_ID..].first_chunk()?);
        if at < COMMAND + 2 && command == WAKE_UP {
            self.bells.of(apic_id)?.ring();
        }
        None
    }
}

/// One AP's port, a device of its own, so that no AP waits for another's wait.
#[derive(Debug)]
pub struct ApPark {
    bells: Bells,
    apic_id: u32,
}

impl ApPark {
    /// The port of this AP.
    pub fn new(bells: Bells, apic_id: u8) -> Self {
        Self { bells, apic_id: apic_id.into() }
    }
}

impl Device for ApPark {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        if let Some(bell) = self.bells.of(self.apic_id) {
            bell.wait();
        }
        data.fill(0);
    }

    fn write(&mut self, _: u64, _: &[u8]) -> Option<DeviceEvent> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::layout;
    use crate::devices::{Console, Pc, pm};
    use crate::limits::{MAX_VCPUS, MIN_MEMORY};
    use crate::memory::GuestRam;
    use std::sync::mpsc;
    use std::thread;

    fn pc(cpus: u8) -> Pc {
        let ram = GuestRam::new(MIN_MEMORY).unwrap();
        Pc::new(&ram, cpus, Console::new(io::sink()), &Default::default()).unwrap()
    }

    #[test]
    fn there_is_a_port_for_every_vcpu() {
        assert!(u32::from(PARK_PORT) + MAX_VCPUS <= pm::EVENT_PORT.into());
        pc(MAX_VCPUS as u8);
    }

    #[test]
    fn only_the_ap_that_is_called_comes_back_at_once() {
        let bells = Bells::new(4).unwrap();
        let mut mailbox = Mailbox::new(bells.clone());
        mailbox.write(APIC_ID as u64, &2u32.to_le_bytes());
        mailbox.write(8, &0x1234u64.to_le_bytes());
        let ready = |id| bells.of(id).unwrap().rung.read().is_ok();
        assert!((1..4).all(|id| !ready(id)), "no command yet");
        mailbox.write(COMMAND as u64, &WAKE_UP.to_le_bytes());
        assert_eq!([1, 2, 3].map(ready), [false, true, false]);
    }

    /// What guest and AP do, on two threads: every call is answered, and the address is the one that goes with it.
    #[test]
    fn every_ap_is_woken_with_its_own_address() {
        const APS: u8 = 8;
        let bus = pc(APS + 1).bus;
        let word = move |bus: &crate::devices::Bus, at: u64| {
            let mut data = [0; 8];
            bus.mmio_read(layout::AP_MAILBOX + at, &mut data);
            u64::from_le_bytes(data)
        };
        let (sender, woken) = mpsc::channel();
        for id in 1..=APS {
            let (bus, sender) = (bus.clone(), sender.clone());
            thread::spawn(move || {
                loop {
                    bus.pio_read(PARK_PORT + u16::from(id), &mut [0]);
                    let first = word(&bus, 0);
                    if (first >> 32, first & 0xffff) == (id.into(), WAKE_UP.into()) {
                        break;
                    }
                }
                let address = word(&bus, 8);
                bus.mmio_write(layout::AP_MAILBOX, &[0, 0]);
                sender.send((id, address)).unwrap();
            });
        }
        for id in (1..=APS).rev() {
            bus.mmio_write(layout::AP_MAILBOX + 4, &u32::from(id).to_le_bytes());
            bus.mmio_write(layout::AP_MAILBOX + 8, &(u64::from(id) << 12).to_le_bytes());
            bus.mmio_write(layout::AP_MAILBOX, &WAKE_UP.to_le_bytes());
            let answer = woken.recv_timeout(Duration::from_secs(20)).expect("the AP comes back");
            assert_eq!(answer, (id, u64::from(id) << 12));
            assert_eq!(word(&bus, 0) & 0xffff, 0);
        }
    }

    #[test]
    fn nonsense_wakes_nobody() {
        let bus = pc(2).bus;
        for id in [0, 2, 1000, u32::MAX] {
            bus.mmio_write(layout::AP_MAILBOX + 4, &id.to_le_bytes());
            bus.mmio_write(layout::AP_MAILBOX, &[1, 0]);
        }
        bus.mmio_write(layout::AP_MAILBOX + PAGE_SIZE - 4, &[0xee; 8]);
        let mut data = [0; 8];
        bus.mmio_read(layout::AP_MAILBOX + PAGE_SIZE - 4, &mut data);
        assert_eq!(data, [0xee, 0xee, 0xee, 0xee, 0xff, 0xff, 0xff, 0xff]);
    }
}
