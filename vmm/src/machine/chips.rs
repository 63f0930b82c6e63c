//! What KVM keeps for all vCPUs, as data: interrupt controllers, PIT, clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_ioapic_state, kvm_irqchip,
    kvm_pic_state, kvm_pit_channel_state, kvm_pit_state2,
};
use kvm_ioctls::VmFd;

use crate::state::{ChipState, IoApicState, PicState, PitAccess, PitChannel, PitState, Word};

/// The step that failed, and what KVM said.
type Failed = (&'static str, std::io::Error);

fn step<T>(what: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, Failed> {
    result.map_err(|error| (what, error.into()))
}

/// Reads them; no vCPU runs.
pub(crate) fn save(vm: &VmFd) -> Result<ChipState, Failed> {
    let pit = step("tell the PIT", vm.get_pit2())?;
    Ok(ChipState {
        pics: [pic(vm, KVM_IRQCHIP_PIC_MASTER)?, pic(vm, KVM_IRQCHIP_PIC_SLAVE)?],
        ioapic: ioapic(vm)?,
        pit: PitState { channels: pit.channels.map(|channel| channel_state(&channel)), flags: pit.flags },
        clock_ns: step("tell the clock", vm.get_clock())?.clock,
    })
}

/// Writes them. The vCPUs' local APICs have their state: what is pending goes there.
pub(crate) fn restore(vm: &VmFd, state: &ChipState) -> Result<(), Failed> {
    for (id, pic) in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE].into_iter().zip(&state.pics) {
        let mut chip = kvm_irqchip { chip_id: id, ..Default::default() };
        chip.chip.pic = kvm_pic(pic);
        step("set a PIC", vm.set_irqchip(&chip))?;
    }
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    chip.chip.ioapic = kvm_ioapic(&state.ioapic);
    step("set the I/O APIC", vm.set_irqchip(&chip))?;
    let channels = state.pit.channels.map(|channel| kvm_channel(&channel));
    step("set the PIT", vm.set_pit2(&kvm_pit_state2 { channels, flags: state.pit.flags, ..Default::default() }))?;
    step("set the clock", vm.set_clock(&kvm_clock_data { clock: state.clock_ns, ..Default::default() }))
}

fn chip(vm: &VmFd, id: u32, what: &'static str) -> Result<kvm_irqchip, Failed> {
    let mut chip = kvm_irqchip { chip_id: id, ..Default::default() };
    step(what, vm.get_irqchip(&mut chip))?;
    Ok(chip)
}

/// Copies fields of the same name.
macro_rules! fields {
    ($to:ident, $from:expr; $($field:ident)*) => { $to { $($field: $from.$field),* } };
    (.. $to:ident, $from:expr; $($field:ident)*) => { $to { $($field: $from.$field,)* ..Default::default() } };
}

fn pic(vm: &VmFd, id: u32) -> Result<PicState, Failed> {
    let chip = chip(vm, id, "tell a PIC")?;
    // SAFETY: plain bytes, valid whatever they are; for these ids KVM fills `pic`.
    let pic: kvm_pic_state = unsafe { chip.chip.pic };
    Ok(fields!(PicState, pic; last_irr irr imr isr priority_add irq_base read_reg_select poll special_mask init_state
        auto_eoi rotate_on_auto_eoi special_fully_nested_mode init4 elcr elcr_mask))
}

fn kvm_pic(pic: &PicState) -> kvm_pic_state {
    fields!(kvm_pic_state, pic; last_irr irr imr isr priority_add irq_base read_reg_select poll special_mask init_state
        auto_eoi rotate_on_auto_eoi special_fully_nested_mode init4 elcr elcr_mask)
}

fn ioapic(vm: &VmFd) -> Result<IoApicState, Failed> {
    let chip = chip(vm, KVM_IRQCHIP_IOAPIC, "tell the I/O APIC")?;
    // SAFETY: plain integers, valid whatever they are; for this id KVM fills `ioapic`.
    let ioapic: kvm_ioapic_state = unsafe { chip.chip.ioapic };
    Ok(IoApicState {
        base: Word(ioapic.base_address),
        select: ioapic.ioregsel.into(),
        id: ioapic.id.into(),
        irr: ioapic.irr.into(),
        // SAFETY: `bits` is the whole of the union.
        redirections: ioapic.redirtbl.map(|entry| Word(unsafe { entry.bits })),
    })
}

/// Of each register the bits that it has.
fn kvm_ioapic(state: &IoApicState) -> kvm_ioapic_state {
    let mut ioapic = kvm_ioapic_state {
        base_address: state.base.0,
        ioregsel: state.select.0 as u32,
        id: state.id.0 as u32,
        irr: state.irr.0 as u32,
        ..Default::default()
    };
    for (entry, saved) in ioapic.redirtbl.iter_mut().zip(&state.redirections) {
        entry.bits = saved.0;
    }
    ioapic
}

fn channel_state(channel: &kvm_pit_channel_state) -> PitChannel {
    let access = fields!(PitAccess, channel; count_latched status_latched status read_state write_state write_latch
        rw_mode mode bcd gate);
    PitChannel { count: channel.count, latched_count: channel.latched_count, access }
}

fn kvm_channel(state: &PitChannel) -> kvm_pit_channel_state {
    let access = state.access;
    let channel = fields!(.. kvm_pit_channel_state, access; count_latched status_latched status read_state write_state
        write_latch rw_mode mode bcd gate);
    kvm_pit_channel_state { count: state.count, latched_count: state.latched_count, ..channel }
}
