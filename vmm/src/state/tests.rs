use super::*;
use crate::boot::{CpuState, Format};
use crate::debug::Crash;
use crate::devices::Console;
use crate::devices::pc::Pc;
use crate::devices::virtio::{Devices, QueueState};
use crate::limits::MIN_MEMORY;
use crate::memory::GuestRam;
use proptest::prelude::*;

/// A machine with these values in it, in whatever order; it need not be one that could run.
fn machine(vcpus: usize, values: &[u64]) -> MachineState {
    let ram = GuestRam::new(MIN_MEMORY).unwrap();
    let devices = Pc::new(&ram, vcpus as u8, Console::new(std::io::sink()), &Devices::default()).unwrap().save();
    let mut values = values.iter().copied().cycle();
    let mut next = move || values.next().unwrap_or(0);
    let vcpu = |next: &mut dyn FnMut() -> u64| {
        let mut vcpu = VcpuState { tsc_khz: next() as u32, ..VcpuState::default() };
        vcpu.general.rip = Word(next());
        vcpu.system.cr3 = Word(next());
        vcpu.debug.dr = [next(), next(), next(), next()].map(Word);
        vcpu.xsave = Blob::new(&next().to_le_bytes());
        vcpu.xcrs.insert(next() as u32, Word(next()));
        (0..3).for_each(|_| _ = vcpu.msrs.insert(Word(next()), Word(next())));
        vcpu.events.exception = Some(ExceptionState {
            vector: next() as u8,
            error_code: Some(next() as u32),
            injected: next().is_multiple_of(2),
            payload: Some(Word(next())),
        });
        vcpu.owed.db = Some(Word(next()));
        vcpu
    };
    let queue =
        QueueState { size: 8, descriptors: next(), driver: next(), device: next(), at: Some((1, next() as u16)) };
    let disk = VirtioState {
        device_id: 2,
        status: next() as u32,
        interrupt: 0,
        features_select: 0,
        driver_features_select: 1,
        driver_features: next(),
        queue_select: 0,
        queue,
    };
    let words = |next: &mut dyn FnMut() -> u64| Word(next());
    MachineState {
        schema: SCHEMA,
        host: Host::default(),
        memory: MIN_MEMORY,
        entry: Entry {
            format: Format::Pvh,
            bsp: CpuState::Protected32 { eip: 1, esp: 2, eax: 3, ebx: next() as u32 },
            kernel: next()..u64::MAX,
            initrd: None,
        },
        cpuid: vec![Vec::new(); vcpus],
        vcpus: (0..vcpus).map(|_| vcpu(&mut next)).collect(),
        chips: ChipState {
            pics: [PicState { imr: next() as u8, ..PicState::default() }; 2],
            ioapic: IoApicState {
                base: words(&mut next),
                select: words(&mut next),
                id: words(&mut next),
                irr: words(&mut next),
                redirections: std::array::from_fn(|_| words(&mut next)),
            },
            pit: PitState { channels: [PitChannel { count: next() as u32, ..PitChannel::default() }; 3], flags: 1 },
            clock_ns: next(),
        },
        devices,
        virtio: BTreeMap::from([(1, disk)]),
        disks: vec![DiskState { path: "/some where/a \"b\".img".to_owned(), read_only: true }],
        vcpu: vcpus as u32 - 1,
        stops: vec![
            StopState { vcpu: 0, reason: ReasonState::Exit(next() as u32) },
            StopState { vcpu: 0, reason: ReasonState::Crash(Crash::EmulationFailure { bytes: vec![next() as u8] }) },
        ],
    }
}

#[test]
fn the_crash_of_a_watched_page_is_what_lies_behind_it() {
    use crate::debug::{Breakpoint, Stop, StopReason, Trigger, VcpuId};
    let request = Breakpoint::watch(0x1000, 8, Trigger::Write);
    let stop = |crash| {
        let crash = Crash::WatchedPage { crash: Box::new(crash), request };
        StopState::of(&Stop::new(VcpuId(0), StopReason::Crash(crash))).map(|stop| stop.reason)
    };
    // Without the watchpoint it has never happened.
    assert_eq!(stop(Crash::NoProgress), None);
    let shutdown = Crash::TripleFault { state_lost: false };
    assert_eq!(stop(shutdown.clone()), Some(ReasonState::Crash(shutdown)));
}

proptest! {
    #[test]
    fn json_is_the_machine(vcpus in 1usize..5, values in proptest::collection::vec(any::<u64>(), 1..80)) {
        let state = machine(vcpus, &values);
        let json = state.to_json();
        prop_assert!(!json.is_empty());
        prop_assert!(MachineState::from_json(json.as_bytes()).unwrap() == state);
    }

    #[test]
    fn damaged_json_is_read_or_refused(
        at: prop::sample::Index, bytes in proptest::collection::vec(any::<u8>(), 0..6), cut: bool
    ) {
        let mut json = machine(2, &[1, u64::MAX, 0x1234_5678]).to_json().into_bytes();
        let at = at.index(json.len());
        match cut {
            true => json.truncate(at),
            false => drop(json.splice(at..(at + bytes.len()).min(json.len()), bytes)),
        }
        if let Err(error) = MachineState::from_json(&json) {
            prop_assert!(!error.to_string().contains('\n'), "{error}");
        }
    }
}

#[test]
fn what_no_machine_has_is_refused() {
    let refused = |change: &dyn Fn(&mut MachineState), says: &str| {
        let mut state = machine(2, &[7]);
        change(&mut state);
        let error = MachineState::from_json(state.to_json().as_bytes()).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    refused(&|state| state.vcpus.clear(), "it has 0 vCPUs");
    refused(&|state| state.vcpus = vec![VcpuState::default(); 65], "it has 65 vCPUs");
    refused(&|state| drop(state.cpuid.pop()), "2 vCPUs and CPUID for 1");
    refused(&|state| state.vcpus[1].msrs = (0u64..5000).map(|n| (Word(n), Word(0))).collect(), "vCPU 1 has 5000 MSRs");
    refused(&|state| state.vcpus[0].xcrs = (0u32..17).map(|n| (n, Word(0))).collect(), "17 extended control registers");
    refused(&|state| state.vcpu = 2, "a stop is of vCPU 2");
    refused(&|state| state.stops[1].vcpu = u32::MAX, "a stop is of vCPU 4294967295");
    refused(&|state| state.devices.serial.queue = vec![0; 1 << 16], "more console input");
}
