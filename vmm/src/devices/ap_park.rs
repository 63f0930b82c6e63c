//! Where APs that wait for the wakeup mailbox spend their time: a port that answers late.
//!
//! The loop of such an AP ([`crate::boot::layout::AP_LOOP`]) reads its port before each look at the mailbox. Without
//! that, each AP would keep a host processor busy until the guest wakes it, and with more vCPUs than processors the boot
//! vCPU would starve.
//!
//! The wait ends early when a signal arrives, so a kicked vCPU leaves it at once.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::DeviceEvent;
use super::bus::Device;

/// The port of the vCPU with APIC id 0; the others follow in the order of their ids, each with a device of its own, so
/// that no AP waits for another's wait.
pub const PORT: u16 = 0x5c0;

/// The longest wait: how late an AP may notice that it is called.
const LONGEST: Duration = Duration::from_millis(50);

/// One AP's port.
#[derive(Clone, Debug)]
pub struct ApPark {
    /// Watches nothing: waiting for it is a sleep that signals end.
    never: Arc<Epoll>,
    wait: Duration,
}

impl ApPark {
    /// For a machine with `cpus` vCPUs: the more of them wait, the longer each may.
    pub fn new(cpus: u8) -> io::Result<Self> {
        let wait = Duration::from_millis(cpus.into()).min(LONGEST);
        Ok(Self { never: Arc::new(Epoll::new()?), wait })
    }
}

impl Device for ApPark {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        // Interrupted or not: the AP looks at the mailbox and comes back.
        let _ = self.never.wait(self.wait.as_millis() as i32, &mut [EpollEvent::default()]);
        data.fill(0);
    }

    fn write(&mut self, _: u64, _: &[u8]) -> Option<DeviceEvent> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::pm;
    use crate::limits::MAX_VCPUS;

    #[test]
    fn there_is_a_port_for_every_vcpu() {
        assert!(u32::from(PORT) + MAX_VCPUS <= pm::EVENT_PORT.into());
    }

    #[test]
    fn a_read_comes_back() {
        for cpus in [0, 1, 2, 64, 255] {
            let mut device = ApPark::new(cpus).unwrap();
            assert!(device.wait <= LONGEST);
            let mut data = [0xff; 4];
            device.read(0, &mut data);
            assert_eq!(data, [0; 4]);
        }
    }
}
