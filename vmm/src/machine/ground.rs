//! Guest memory under KVM, as the coordinator changes it.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use kvm_ioctls::{Cap, VmFd};

use super::set_memory_region;
use crate::devices::virtio::DmaBus;
use crate::ground::{Ground, RamGround};
use crate::memory::GuestRam;
use crate::memslots::MemorySlots;

/// What KVM_CAP_NR_MEMSLOTS stands for where it is not there (KVM API 4.35).
const FEW_SLOTS: usize = 32;

/// The memory of one KVM machine.
pub struct KvmGround {
    vm: Arc<VmFd>,
    ram: RamGround,
    slots: MemorySlots,
    bus: DmaBus,
}

impl KvmGround {
    /// For a machine that has `ram` in the slots that [`GuestRam::slots`] names.
    pub fn new(vm: Arc<VmFd>, ram: GuestRam) -> Self {
        let most = usize::try_from(vm.check_extension_int(Cap::NrMemslots)).ok().filter(|most| *most > 0);
        let slots = MemorySlots::new(ram.slots(), most.unwrap_or(FEW_SLOTS));
        Self { vm, ram: RamGround(ram), slots, bus: DmaBus::default() }
    }

    /// The machine has devices that reach guest memory by this bus.
    pub fn with_devices(self, bus: DmaBus) -> Self {
        Self { bus, ..self }
    }
}

impl Ground for KvmGround {
    fn read(&self, gpa: u64, into: &mut [u8]) -> usize {
        self.ram.read(gpa, into)
    }

    fn replace(&mut self, gpa: u64, from: u8, to: u8) -> io::Result<bool> {
        self.ram.replace(gpa, from, to)
    }

    fn protect(&mut self, pages: &BTreeSet<u64>) -> io::Result<()> {
        let Self { vm, ram, slots, .. } = self;
        slots.protect(pages, |change| set_memory_region(vm, &ram.0, change))?;
        ram.0.watch(pages);
        Ok(())
    }

    fn hold_devices(&mut self, hold: bool) {
        self.bus.hold(hold);
    }

    fn has_device_stores(&self) -> bool {
        self.ram.has_device_stores()
    }
}
