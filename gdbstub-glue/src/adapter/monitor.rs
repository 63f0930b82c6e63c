//! `monitor`: what gdb has no command for.

use std::fmt::Write as _;

use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd};
use trapline_vmm::debug::VcpuId;
use trapline_vmm::vcpu::{Registers, Segment};

use super::{Adapter, Fatal};
use crate::arch::flags::{CR0, CR4, DR6, DR7, EFER, EFLAGS};
use crate::debuggee::Debuggee;
use crate::stop::summary;
use crate::threads;

const HELP: &str = "\
monitor status          why the guest is stopped, what each vCPU does, what is set
monitor stops           the last stops of this session
monitor sysregs [N]     control registers, MSRs, segments and descriptor tables of vCPU N
monitor physical on|off read and write guest-physical instead of linear memory
";

impl<D: Debuggee> MonitorCmd for Adapter<D> {
    fn handle_monitor_cmd(&mut self, command: &[u8], mut out: ConsoleOutput<'_>) -> Result<(), Fatal> {
        let command = String::from_utf8_lossy(command);
        let words: Vec<&str> = command.split_whitespace().collect();
        let answer = match words.as_slice() {
            [] | ["help"] => HELP.to_owned(),
            ["status"] => self.status(),
            ["stops"] => self.stops(),
            ["sysregs"] => self.sysregs(self.view.selected),
            ["sysregs", number] => match number.parse().ok().map(VcpuId).filter(|v| v.index() < self.vcpus()) {
                Some(vcpu) => self.sysregs(vcpu),
                None => format!("sysregs wants a vCPU from 0 to {}\n", self.vcpus().saturating_sub(1)),
            },
            ["physical", "on"] => self.address_physically(true),
            ["physical", "off"] => self.address_physically(false),
            [unknown, ..] => {
                let unknown: String = unknown.chars().take(40).flat_map(char::escape_debug).collect();
                format!("there is no 'monitor {unknown}', or not like this; 'monitor help' lists what there is\n")
            }
        };
        out.write_raw(answer.as_bytes());
        Ok(())
    }
}

impl<D: Debuggee> Adapter<D> {
    fn status(&mut self) -> String {
        let mut text = format!("stopped: {}\n", summary(&self.view.stop));
        for vcpu in self.vcpu_ids() {
            let state = threads::state(self, vcpu);
            let at = match self.registers(vcpu) {
                Ok(registers) => format!("at {:#x}", registers.rip),
                Err(error) => error.0,
            };
            let _ = writeln!(text, "{vcpu}: {state}, {at}");
        }
        let armed = self.armed();
        if armed.is_empty() {
            // gdb keeps its breakpoints to itself until the guest goes on.
            text.push_str("nothing was set when the guest last ran\n");
        }
        for request in armed {
            let _ = writeln!(text, "set: {request}");
        }
        if self.view.physical {
            text.push_str("memory is addressed physically\n");
        }
        text
    }

    fn stops(&self) -> String {
        let mut text = String::new();
        for (number, stop) in &self.view.history {
            let _ = writeln!(text, "{number:6}  {}", summary(stop));
        }
        text
    }

    /// The front layer knows nothing of this: gdb has to forget what it read.
    fn address_physically(&mut self, on: bool) -> String {
        self.view.physical = on;
        let what = if on { "guest-physical" } else { "linear" };
        format!(
            "memory is now read and written by {what} address; 'maint flush dcache' makes gdb forget what it has read\n"
        )
    }

    fn sysregs(&mut self, vcpu: VcpuId) -> String {
        match self.registers(vcpu) {
            Ok(registers) => format!("{vcpu}: {}, ring {}\n{}", mode(&registers), registers.cpl(), table(&registers)),
            Err(error) => format!("{vcpu}: {error}\n"),
        }
    }
}

/// How the processor reads instructions and addresses (SDM vol. 3, 2.2 and 5.5).
pub(crate) fn mode(registers: &Registers) -> &'static str {
    const CODE_LONG: u32 = 1 << 13;
    const CODE_BIG: u32 = 1 << 14;
    let long = registers.efer & (1 << 10) != 0;
    match (registers.cr0 & 1 != 0, long, registers.rflags & (1 << 17) != 0) {
        (false, _, _) => "real mode",
        (true, false, true) => "virtual-8086 mode",
        (true, true, _) if registers.cs.attributes & CODE_LONG != 0 => "64-bit mode",
        (true, true, _) => "compatibility mode",
        (true, false, _) if registers.cs.attributes & CODE_BIG != 0 => "32-bit protected mode",
        (true, false, _) => "16-bit protected mode",
    }
}

fn table(r: &Registers) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: u64, words: &str| {
        let _ = writeln!(text, "{}", format!("{name:<10} {value:#018x}  {words}").trim_end());
    };
    line("rflags", r.rflags, &EFLAGS.words(r.rflags));
    line("cr0", r.cr0, &CR0.words(r.cr0));
    line("cr2", r.cr2, "");
    line("cr3", r.cr3, "");
    line("cr4", r.cr4, &CR4.words(r.cr4));
    line("cr8", r.cr8, "");
    line("efer", r.efer, &EFER.words(r.efer));
    for (i, &dr) in r.dr.iter().enumerate() {
        line(&format!("dr{i}"), dr, "");
    }
    line("dr6", r.dr6, &DR6.words(r.dr6));
    line("dr7", r.dr7, &DR7.words(r.dr7));
    line("star", r.star, "");
    line("lstar", r.lstar, "");
    line("fmask", r.fmask, &EFLAGS.words(r.fmask));
    line("k_gs_base", r.kernel_gs_base, "");
    line("apic_base", r.apic_base, "");
    for (name, table) in [("gdtr", r.gdtr), ("idtr", r.idtr)] {
        line(name, table.base, &format!("limit {:#x}", table.limit));
    }
    for (name, segment) in [
        ("cs", &r.cs),
        ("ss", &r.ss),
        ("ds", &r.ds),
        ("es", &r.es),
        ("fs", &r.fs),
        ("gs", &r.gs),
        ("tr", &r.tr),
        ("ldtr", &r.ldtr),
    ] {
        line(name, segment.base, &describe(segment));
    }
    text
}

/// `0x0010 limit 0xffffffff type 0xb DPL 0 S P L G`.
fn describe(segment: &Segment) -> String {
    let attributes = segment.attributes;
    let mut text = format!("selector {:#06x} limit {:#x}", segment.selector, segment.limit);
    if attributes >> 16 & 1 != 0 {
        text.push_str(" unusable");
        return text;
    }
    let _ = write!(text, " type {:#x} DPL {}", attributes & 0xf, attributes >> 5 & 3);
    for (name, at) in [("S", 4), ("P", 7), ("AVL", 12), ("L", 13), ("D/B", 14), ("G", 15)] {
        if attributes >> at & 1 != 0 {
            text.push(' ');
            text.push_str(name);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel() -> Registers {
        Registers {
            rflags: 0x246,
            cr0: 0x8005_0033,
            cr3: 0x0010_0000,
            cr4: 0x6f0,
            efer: 0xd01,
            cs: Segment { selector: 0x10, base: 0, limit: u32::MAX, attributes: 0xa09b },
            ss: Segment { selector: 0x18, base: 0, limit: u32::MAX, attributes: 0xc093 },
            ldtr: Segment { attributes: 1 << 16, ..Segment::default() },
            lstar: 0xffff_ffff_81e0_0000,
            fmask: 0x47700,
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            ..Registers::default()
        }
    }

    #[test]
    fn sysregs_as_they_look() {
        insta::assert_snapshot!(table(&kernel()));
    }

    #[test]
    fn modes() {
        let mut r = kernel();
        assert_eq!(mode(&r), "64-bit mode");
        r.cs.attributes = 0xc09b;
        assert_eq!(mode(&r), "compatibility mode");
        r.efer = 0;
        assert_eq!(mode(&r), "32-bit protected mode");
        r.cs.attributes = 0x9b;
        assert_eq!(mode(&r), "16-bit protected mode");
        r.rflags |= 1 << 17;
        assert_eq!(mode(&r), "virtual-8086 mode");
        r.cr0 = 0x10;
        assert_eq!(mode(&r), "real mode");
    }
}
