//! A machine into a state and out of it.

use std::io;

use super::{VcpuHook, Vm, VmError, hook_for, start_virtio};
use crate::coordinator::CoordinatorError;
use crate::debug::VcpuId;
use crate::devices::Console;
use crate::devices::virtio::{self, DiskConfig};
use crate::machine::{Machine, chips};
use crate::memory::GuestRam;
use crate::paging::{read_physical, write_all_physical};
use crate::state::{DiskState, Host, MachineState, MemorySource, RestoreError, SCHEMA, SaveError, StopState, Word};

/// How much memory is read at once.
const CHUNK: usize = 1 << 20;

/// The MSR that names where KVM writes the time of the guest's boot, when it is written; and how many bytes.
const KVM_WALL_CLOCK: Word = Word(0x4b56_4d00);
const WALL_CLOCK_SIZE: usize = 12;

/// What to make a machine from that was saved.
pub struct RestoreConfig<'a> {
    /// The machine.
    pub state: &'a MachineState,
    /// Its memory.
    pub memory: &'a dyn MemorySource,
    /// Where the console's output goes.
    pub console: Console,
    /// Its disks, in their order: those that [`MachineState::disks`] names, or copies of them. What is on them is not in
    /// the state.
    pub disks: Vec<DiskConfig>,
    /// For tests, as in [`VmConfig`](super::VmConfig).
    pub arm_hook: Option<VcpuHook>,
}

impl Vm {
    /// Everything that the machine is but for its memory, which whoever wants it reads as long as it stands
    /// ([`read_physical`](Self::read_physical)). It can go on afterwards.
    ///
    /// # Errors
    /// If the guest is running, is over, or uses what cannot be saved (nested virtualisation).
    pub fn save(&mut self) -> Result<MachineState, SaveError> {
        let vcpus = self.coordinator.save()?;
        let chips = chips::save(&self.vm).map_err(|(step, error)| SaveError::Kvm { step, error })?;
        Ok(MachineState {
            schema: SCHEMA,
            host: Host::this().clone(),
            memory: self.ram.size(),
            entry: self.entry.clone(),
            cpuid: self.cpuid.clone(),
            vcpus,
            chips,
            devices: self.pc.save(),
            virtio: self.virtio.save().into_iter().collect(),
            disks: self.disks.iter().map(DiskState::from).collect(),
            vcpu: self.coordinator.last_stopped().0,
            stops: self.coordinator.stops().filter_map(StopState::of).collect(),
        })
    }

    /// Makes a machine that was saved, parked where it was, with no breakpoints. No guest code has run when this returns.
    pub fn restore(config: RestoreConfig<'_>) -> Result<Self, VmError> {
        let RestoreConfig { state, memory, console, disks, arm_hook } = config;
        let ram = GuestRam::new(state.memory)?;
        let rng = state.virtio.contains_key(&virtio::ENTROPY_SLOT);
        let virtio = start_virtio(&ram, &disks, rng)?;
        let machine = Machine::for_state(&ram, state, console, &virtio, hook_for(arm_hook))?;
        fill(&ram, memory)?;
        let mut vm = Self::around(machine, ram, virtio, disks)?;
        vm.take(state)?;
        Ok(vm)
    }

    /// Becomes what was saved. Memory is there already.
    fn take(&mut self, state: &MachineState) -> Result<(), RestoreError> {
        let refused = |error: CoordinatorError| RestoreError::Refused(error.to_string());
        let clocks = self.wall_clocks(state);
        let stops = state.stops.iter().map(StopState::stop).collect();
        self.coordinator.restore(state.vcpus.clone(), stops, VcpuId(state.vcpu)).map_err(refused)?;
        for (at, bytes) in clocks {
            write_all_physical(self.ram.mem(), at, &bytes);
        }
        chips::restore(&self.vm, &state.chips)
            .map_err(|(step, error)| RestoreError::Refused(format!("KVM refused to {step}: {error}")))?;
        let virtio: Vec<_> = state.virtio.iter().map(|(slot, state)| (*slot, *state)).collect();
        self.virtio.restore(&virtio).map_err(|error| RestoreError::Refused(error.to_string()))?;
        self.pc.restore(&state.devices).map_err(|error| RestoreError::Broken(error.to_string()))
    }

    /// Where KVM will write to memory when it is told where the guest has its clock, and what is there.
    fn wall_clocks(&self, state: &MachineState) -> Vec<(u64, [u8; WALL_CLOCK_SIZE])> {
        let at = state.vcpus.iter().filter_map(|vcpu| vcpu.msrs.get(&KVM_WALL_CLOCK)).map(|at| at.0);
        at.filter_map(|at| {
            let mut bytes = [0; WALL_CLOCK_SIZE];
            (read_physical(self.ram.mem(), at, &mut bytes) == bytes.len()).then_some((at, bytes))
        })
        .collect()
    }
}

/// Fills fresh memory.
fn fill(ram: &GuestRam, memory: &dyn MemorySource) -> Result<(), RestoreError> {
    let mut chunk = vec![0; CHUNK];
    for (start, len) in memory.ranges() {
        let end = start.checked_add(len);
        let inside = |(first, size): &(u64, u64)| start >= *first && end.is_some_and(|end| end <= first + size);
        if !ram.ranges().iter().any(inside) {
            let text = format!("it has {len:#x} bytes at {start:#x}, where the machine has no memory");
            return Err(RestoreError::Memory(text));
        }
        let mut at = 0;
        while at < len {
            let piece = &mut chunk[..(len - at).min(CHUNK as u64) as usize];
            let gpa = start + at;
            memory
                .read(gpa, piece)
                .map_err(|error: io::Error| RestoreError::Memory(format!("at {gpa:#x}: {error}")))?;
            // Untouched pages cost the host nothing.
            if piece.iter().any(|byte| *byte != 0) && !write_all_physical(ram.mem(), gpa, piece) {
                return Err(RestoreError::Memory(format!("nothing can be written at {gpa:#x}")));
            }
            at += piece.len() as u64;
        }
    }
    Ok(())
}
