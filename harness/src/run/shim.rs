#![allow(missing_docs)]
use crate::symbols::*;
use crate::unwind;
use crate::report::FrameRecord;
pub(crate) struct Loaded { pub name: String, pub address: u64 }
impl Symbols {
    pub(crate) fn variable(&self, path: &str) -> Result<Variable, LookupError> {
        let s = self.find(path).into_iter().next().ok_or(LookupError::Missing { name: path.into(), similar: vec![] })?;
        Ok(Variable { path: path.into(), module: None, address: s.address, size: s.size, type_name: None, class: s.class })
    }
    pub(crate) fn modules(&self) -> Vec<Loaded> { vec![] }
    pub(crate) fn guest_modules(&self, _: &dyn Memory) -> Result<Vec<Loaded>, String> { Err("no".into()) }
    pub(crate) fn with_modules(&self, _: &[Loaded]) -> Symbols { self.clone() }
    pub(crate) fn unwind(&self, r: &trapline_vmm::vcpu::Registers, _: &dyn Memory) -> unwind::Backtrace {
        unwind::Backtrace { frames: vec![unwind::Frame { pc: r.rip, sp: r.rsp, kind: unwind::FrameKind::Exact }], end: unwind::End::Lost("shim") }
    }
}
pub(crate) fn records(s: &Symbols, b: &unwind::Backtrace) -> Vec<FrameRecord> {
    b.frames.iter().map(|f| FrameRecord { function: super::look::place(s, f.pc), offset: 0, module: None, inlined: false, source: super::look::source(s, f.pc), kind: crate::report::FrameKind::Call }).collect()
}
