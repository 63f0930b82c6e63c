//! vCPUs as `info threads` shows them.

use trapline_vmm::debug::VcpuId;
use trapline_vmm::vcpu::Activity;

use crate::adapter::{Adapter, mode, tid};
use crate::debuggee::Debuggee;
use crate::packet::Offer;

/// What a vCPU does, in a few words. Where it stands is not among them: clients show that beside it.
pub(crate) fn state<D: Debuggee>(target: &mut Adapter<D>, vcpu: VcpuId) -> String {
    let activity = match target.activity(vcpu) {
        Ok(Activity::Runnable) => "",
        Ok(Activity::Halted) => "halted, ",
        Ok(Activity::WaitForSipi) => return "not started, waits for SIPI".to_owned(),
        Ok(Activity::Other(state)) => return format!("KVM_MP_STATE {state}"),
        Err(error) => return error.0,
    };
    match target.registers(vcpu) {
        Ok(registers) => format!("{activity}{}, ring {}", mode(&registers), registers.cpl()),
        Err(error) => error.0,
    }
}

/// The reply to `qXfer:threads:read` as a whole (gdb manual, "Thread List Format").
pub(crate) fn list<D: Debuggee>(target: &mut Adapter<D>, offer: Offer) -> String {
    let process = if offer.multiprocess { "p1." } else { "" };
    let mut xml = String::from("<?xml version=\"1.0\"?>\n<threads>\n");
    for vcpu in target.vcpu_ids() {
        let state = text(&state(target, vcpu));
        let (id, core) = (tid(vcpu), vcpu.0);
        xml.push_str(&format!("<thread id=\"{process}{id:x}\" core=\"{core}\" name=\"{vcpu}\">{state}</thread>\n"));
    }
    xml.push_str("</threads>\n");
    xml
}

/// Character data: nothing that XML would read as its own, nothing unprintable.
fn text(words: &str) -> String {
    words.chars().map(|c| if c.is_control() || "<>&\"'".contains(c) { ' ' } else { c }).collect()
}
