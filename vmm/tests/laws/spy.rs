//! A vCPU with somebody looking over its shoulder: every call of the [`Cpu`] interface passes
//! through here on its way to KVM, can be counted, made to fail, and held up.

use std::io;
use std::sync::Arc;
use std::thread::ThreadId;

use trapline_vmm::debug::{DebugImage, Dr6, General, GuestRegisters};
use trapline_vmm::memory::DeviceStore;
use trapline_vmm::paging::Access;
use trapline_vmm::vcpu::{Activity, Arming, Cpu, Exit, KvmCpu, Raised, Registers, Ring3, Standing};

use crate::clock::{Monitor, PATIENCE};

/// What the spy has seen and is to do.
#[derive(Default)]
pub(crate) struct Notes {
    /// The thread that called first, and how to signal it.
    pub(crate) thread: Option<(ThreadId, libc::pthread_t)>,
    /// Calls from any other thread (law 1).
    pub(crate) strangers: u64,
    /// What KVM was told to arm, and took, in order (law 4).
    pub(crate) armed: Vec<Arming>,
    /// Entries into the guest, and how they ended.
    pub(crate) entries: u64,
    pub(crate) kicked: u64,
    pub(crate) served: u64,
    pub(crate) stored: u64,
    pub(crate) trapped: u64,
    /// Of those that trapped: a step was done.
    pub(crate) stepped: u64,
    /// Times the vCPU was told that time had been stolen.
    pub(crate) resumed: u64,
    /// HLTs that were carried out for it.
    pub(crate) halted: u64,
    /// Instructions carried out in place.
    pub(crate) advanced: u64,
    /// It kicks itself now and then, as last told.
    pub(crate) kicks_itself: bool,
    /// Exceptions given to the guest.
    pub(crate) reflected: u64,
    /// The next so many calls of `arm` fail.
    refuse: u32,
    hold: Option<Hold>,
    held: bool,
}

#[derive(Clone, Copy)]
struct Hold {
    on: fn(&Exit) -> bool,
    /// So many such exits pass before.
    skip: u32,
    /// Until the next command, and not for good.
    until_kicked: bool,
    /// The test knows that the thread is held: the next kick is the one.
    known: bool,
}

/// The test's side of one vCPU.
#[derive(Clone)]
pub(crate) struct Spy(Arc<Monitor<Notes>>);

impl Spy {
    pub(crate) fn new() -> Self {
        Spy(Monitor::new(Notes::default()))
    }

    pub(crate) fn look<R>(&self, look: impl FnOnce(&Notes) -> R) -> R {
        look(&self.0.lock())
    }

    /// What KVM was last told.
    pub(crate) fn armed(&self) -> Arming {
        self.look(|notes| notes.armed.last().copied().unwrap_or(Arming::OFF))
    }

    /// Lets the next `times` attempts to arm this vCPU fail.
    pub(crate) fn refuse(&self, times: u32) {
        self.0.change(|notes| notes.refuse = times);
    }

    /// The vCPU thread that next comes out of the guest with such an exit stays between KVM_RUN
    /// and its handling until [`let_go`](Self::let_go).
    pub(crate) fn hold(&self, on: fn(&Exit) -> bool) {
        self.0.change(|notes| notes.hold = Some(Hold { on, skip: 0, until_kicked: false, known: false }));
    }

    /// As [`hold`](Self::hold), until the next command to this vCPU: it is in the inbox before the
    /// kick that lets the thread go.
    pub(crate) fn hold_until_kicked(&self, on: fn(&Exit) -> bool) {
        self.hold_nth_until_kicked(0, on);
    }

    /// As [`hold_until_kicked`](Self::hold_until_kicked), after `skip` such exits.
    pub(crate) fn hold_nth_until_kicked(&self, skip: u32, on: fn(&Exit) -> bool) {
        self.0.change(|notes| notes.hold = Some(Hold { on, skip, until_kicked: true, known: false }));
    }

    /// Waits until it is held.
    pub(crate) fn wait_held(&self) {
        let held = self.0.wait(PATIENCE, |notes| {
            if let Some(hold) = notes.hold.as_mut().filter(|_| notes.held) {
                hold.known = true;
            }
            notes.held
        });
        assert!(held, "no such exit came");
    }

    pub(crate) fn let_go(&self) {
        self.0.change(|notes| (notes.hold, notes.held) = (None, false));
    }

    /// Called with every kick.
    pub(crate) fn kicked(&self) {
        self.0.change(|notes| {
            if notes.held && notes.hold.is_some_and(|hold| hold.until_kicked && hold.known) {
                (notes.hold, notes.held) = (None, false);
            }
        });
    }

    /// Entries into the guest so far.
    pub(crate) fn entries(&self) -> u64 {
        self.look(|notes| notes.entries)
    }

    fn note(&self, exit: &Exit) {
        self.0.change(|notes| match exit {
            Exit::Kicked => notes.kicked += 1,
            Exit::Served(_) => notes.served += 1,
            Exit::Store { .. } => notes.stored += 1,
            Exit::Debug(exit) => {
                notes.trapped += 1;
                notes.stepped += u64::from(Dr6(exit.dr6).single_step());
            }
            Exit::Again | Exit::Crash(_) => {}
        });
        let holds = self.0.change(|notes| {
            if let Some(hold) = notes.hold.as_mut().filter(|hold| (hold.on)(exit)) {
                notes.held = hold.skip == 0;
                hold.skip = hold.skip.saturating_sub(1);
            }
            notes.held
        });
        if holds {
            // Without a deadline a failed test would leave the thread, and so the machine, behind for good.
            self.0.wait(PATIENCE, |notes| !notes.held);
            self.let_go();
        }
    }

    fn visit(&self) {
        let me = std::thread::current().id();
        self.0.change(|notes| {
            // SAFETY: always succeeds, and has no precondition.
            let (id, _) = *notes.thread.get_or_insert_with(|| (me, unsafe { libc::pthread_self() }));
            if id != me {
                notes.strangers += 1;
            }
        });
    }
}

/// The vCPU's side.
pub(crate) struct Spied {
    pub(crate) cpu: KvmCpu,
    pub(crate) spy: Spy,
}

impl Cpu for Spied {
    fn begin(&mut self) {
        self.spy.visit();
        self.cpu.begin();
    }

    fn clear_kick(&mut self) {
        self.cpu.clear_kick();
    }

    fn run(&mut self) -> Exit {
        self.spy.visit();
        self.spy.0.change(|notes| notes.entries += 1);
        let exit = self.cpu.run();
        self.spy.note(&exit);
        exit
    }

    fn complete(&mut self) -> Exit {
        self.spy.visit();
        self.cpu.complete()
    }

    fn arm(&mut self, arming: &Arming) -> io::Result<()> {
        self.spy.visit();
        let refused = self.spy.0.change(|notes| {
            let refused = notes.refuse > 0;
            notes.refuse = notes.refuse.saturating_sub(1);
            refused
        });
        if refused {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.cpu.arm(arming)?;
        self.spy.0.change(|notes| notes.armed.push(*arming));
        Ok(())
    }

    fn pc(&mut self) -> io::Result<u64> {
        self.spy.visit();
        self.cpu.pc()
    }

    fn registers(&mut self) -> io::Result<Registers> {
        self.spy.visit();
        self.cpu.registers()
    }

    fn set_registers(&mut self, registers: &Registers) -> io::Result<()> {
        self.spy.visit();
        self.cpu.set_registers(registers)
    }

    fn state(&mut self) -> io::Result<Registers> {
        self.spy.visit();
        self.cpu.state()
    }

    fn set_general(&mut self, registers: &Registers) -> io::Result<()> {
        self.spy.visit();
        self.cpu.set_general(registers)
    }

    fn activity(&mut self) -> io::Result<Activity> {
        self.spy.visit();
        self.cpu.activity()
    }

    fn halt(&mut self) -> io::Result<()> {
        self.spy.visit();
        self.spy.0.change(|notes| notes.halted += 1);
        self.cpu.halt()
    }

    fn translate(&mut self, addr: u64) -> Option<u64> {
        self.spy.visit();
        self.cpu.translate(addr)
    }

    fn may_access(&mut self, addr: u64, len: usize, access: Access) -> bool {
        self.spy.visit();
        self.cpu.may_access(addr, len, access)
    }

    fn read_physical(&mut self, gpa: u64, into: &mut [u8]) -> usize {
        self.spy.visit();
        self.cpu.read_physical(gpa, into)
    }

    fn write_physical(&mut self, gpa: u64, bytes: &[u8]) -> bool {
        self.spy.visit();
        self.cpu.write_physical(gpa, bytes)
    }

    fn hide(&mut self, patches_of: &DebugImage) {
        self.spy.visit();
        self.cpu.hide(patches_of);
    }

    fn read(&mut self, addr: u64, into: &mut [u8]) -> usize {
        self.spy.visit();
        self.cpu.read(addr, into)
    }

    fn write(&mut self, addr: u64, bytes: &[u8]) -> bool {
        self.spy.visit();
        self.cpu.write(addr, bytes)
    }

    fn device_stores(&mut self) -> Vec<DeviceStore> {
        self.spy.visit();
        self.cpu.device_stores()
    }

    fn exchange(&mut self, gpa: u64, new: &[u8], old: &mut [u8]) -> usize {
        self.spy.visit();
        self.cpu.exchange(gpa, new, old)
    }

    fn reflect_db(&mut self, causes: u64) -> io::Result<()> {
        self.spy.visit();
        self.spy.0.change(|notes| notes.reflected += 1);
        self.cpu.reflect_db(causes)
    }

    fn reflect_bp(&mut self) -> io::Result<()> {
        self.spy.visit();
        self.spy.0.change(|notes| notes.reflected += 1);
        self.cpu.reflect_bp()
    }

    fn guest_registers(&mut self) -> io::Result<GuestRegisters> {
        self.spy.visit();
        self.cpu.guest_registers()
    }

    fn set_guest_registers(&mut self, registers: &GuestRegisters) -> io::Result<()> {
        self.spy.visit();
        self.cpu.set_guest_registers(registers)
    }

    fn raise(&mut self, event: Raised, len: u64) -> io::Result<()> {
        self.spy.visit();
        self.spy.0.change(|notes| notes.reflected += 1);
        self.cpu.raise(event, len)
    }

    fn end_shadow(&mut self) -> io::Result<()> {
        self.spy.visit();
        self.cpu.end_shadow()
    }

    fn kick_itself(&mut self, often: bool) -> io::Result<()> {
        self.spy.visit();
        self.spy.0.change(|notes| notes.kicks_itself = often);
        self.cpu.kick_itself(often)
    }

    fn tables(&mut self, addr: u64) -> Vec<u64> {
        self.spy.visit();
        self.cpu.tables(addr)
    }

    fn emulated_faults(&mut self) -> Option<u64> {
        self.spy.visit();
        self.cpu.emulated_faults()
    }

    fn kick_at_dr_writes(&mut self, on: bool) -> io::Result<bool> {
        self.spy.visit();
        self.cpu.kick_at_dr_writes(on)
    }

    fn wrote_debug_registers(&mut self) -> bool {
        self.spy.visit();
        self.cpu.wrote_debug_registers()
    }

    fn standing(&mut self) -> io::Result<Option<Standing>> {
        self.spy.visit();
        self.cpu.standing()
    }

    fn advance(&mut self, to: &General) -> io::Result<()> {
        self.spy.visit();
        self.spy.0.change(|notes| notes.advanced += 1);
        self.cpu.advance(to)
    }

    fn ring_3(&mut self) -> Ring3 {
        self.spy.visit();
        self.cpu.ring_3()
    }

    fn cast_shadow(&mut self) -> io::Result<()> {
        self.spy.visit();
        self.cpu.cast_shadow()
    }

    fn unmask_nmi(&mut self) -> io::Result<()> {
        self.spy.visit();
        self.cpu.unmask_nmi()
    }

    fn has_interrupt_on_its_way(&mut self) -> io::Result<bool> {
        self.spy.visit();
        self.cpu.has_interrupt_on_its_way()
    }

    fn resumed(&mut self) {
        self.spy.0.change(|notes| notes.resumed += 1);
        self.cpu.resumed();
    }
}
