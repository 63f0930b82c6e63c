//! The questions, each with the guest that answers it.

mod exits;
mod guest_own;
mod inject;
mod slots;
mod step;

use super::bench::{Bench, Exit, Ring};
use super::capabilities::Answer;
use super::{HostIdentity, Seen, Unclear};

/// Asks all of them; the remarks are about those that got an unexpected answer.
pub(super) fn ask_all(bench: &mut Bench, host: &HostIdentity) -> (Seen, Vec<String>) {
    let mut ask = Asker { bench, remarks: Vec::new() };
    let x_cpl0 = ask.put("x_cpl0", |bench| slots::exec(bench, Ring::Kernel));
    let w_data = ask.put("w_data", |bench| slots::write(bench, Ring::Kernel));
    let rf_honoured = ask.put("rf_honoured", |bench| slots::resume_flag(bench, x_cpl0));
    let int3_cpl0 = ask.put("int3_cpl0", |bench| exits::int3(bench, Ring::Kernel));
    let seen = Seen {
        x_cpl0,
        x_cpl3: ask.put("x_cpl3", |bench| slots::exec(bench, Ring::User)),
        w_data,
        w_data_cpl3: ask.put("w_data_cpl3", |bench| slots::write(bench, Ring::User)),
        rw_data: ask.put("rw_data", slots::access),
        multi_hit_x: ask.put("multi_hit_x", |bench| slots::several_exec(bench, x_cpl0)),
        multi_hit_data: ask.put("multi_hit_data", |bench| slots::several_data(bench, w_data)),
        rf_honoured,
        rf_over_exit: ask.put("rf_over_exit", |bench| slots::resume_flag_over_exit(bench, rf_honoured)),
        shadow_over_exit: ask.put("shadow_over_exit", |bench| slots::shadow_over_exit(bench, x_cpl0)),
        int3_cpl0,
        int3_cpl3: ask.put("int3_cpl3", |bench| exits::int3(bench, Ring::User)),
        ss_cpl0: ask.put("ss_cpl0", |bench| step::step(bench, Ring::Kernel, false)),
        ss_cpl3: ask.put("ss_cpl3", |bench| step::step(bench, Ring::User, false)),
        ss_cpl3_shadow: ask.put("ss_cpl3_shadow", |bench| step::step(bench, Ring::User, true)),
        ss_sticky: ask.put("ss_sticky", step::sticky),
        ss_over_exit: ask.put("ss_over_exit", step::over_exit),
        ss_pushf: ask.put("ss_pushf", step::pushed_flags),
        hlt_halts: ask.put("hlt_halts", step::halt),
        blockirq: ask.put("blockirq", step::block_irq),
        gd_exit: ask.put("gd_exit", guest_own::guarded_access),
        guest_x: ask.put("guest_x", guest_own::exec),
        guest_w: ask.put("guest_w", guest_own::write),
        guest_x_overlaid: ask.put("guest_x_overlaid", guest_own::exec_overlaid),
        guest_dr_values: ask.put("guest_dr_values", guest_own::values),
        guest_tf_overlaid: ask.put("guest_tf_overlaid", guest_own::trap_flag_overlaid),
        inject_bp_advances: ask.put("inject_bp_advances", inject::breakpoint),
        inject_bp_events: ask.put("inject_bp_events", inject::breakpoint_by_events),
        inject_db: ask.put("inject_db", inject::debug),
        int_n_cpl0: ask.put("int_n_cpl0", |bench| exits::int_n(bench, Ring::Kernel)),
        int_n_cpl3: ask.put("int_n_cpl3", |bench| exits::int_n(bench, Ring::User)),
        int1_cpl0: ask.put("int1_cpl0", exits::int1),
        guest_int3_cpl0: ask.put("guest_int3_cpl0", exits::guest_int3),
        out_rip_advanced: ask.put("out_rip_advanced", exits::out_rip),
        readonly_write: ask.put("readonly_write", |bench| exits::readonly_write(bench, Ring::Kernel)),
        readonly_write_cpl3: ask.put("readonly_write_cpl3", |bench| exits::readonly_write(bench, Ring::User)),
        kick: ask.put("kick", exits::kick),
        x_real_mode: slots::real_mode(host),
        // The last: the vCPU may not be what it was.
        triple_fault: ask.put("triple_fault", exits::triple_fault),
    };
    (seen, ask.remarks)
}

struct Asker<'a> {
    bench: &'a mut Bench,
    remarks: Vec<String>,
}

impl Asker<'_> {
    fn put<A: Answer>(&mut self, name: &str, question: impl FnOnce(&mut Bench) -> Result<A, Unclear>) -> A {
        question(self.bench).unwrap_or_else(|Unclear(what)| {
            self.remarks.push(format!("{name}: {what}"));
            A::UNEXPECTED
        })
    }
}

/// For whatever a question has no name for.
fn unclear<T>(exit: Exit, bench: &Bench) -> Result<T, Unclear> {
    let rip = bench.rip()?;
    let what = format!("{exit:x?} at {rip:#x}");
    Err(Unclear(match exit {
        Exit::Vector(_) => format!("{what}, from {:#x}", bench.frame_rip()?),
        _ => what,
    }))
}
