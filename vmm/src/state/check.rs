//! Whether a state can be a machine's at all, and this host's.

use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use super::features::{Missing, missing};
use super::{CpuidLeaf, MachineState, SCHEMA, Word};
use crate::limits::{CONSOLE_INPUT_QUEUE, MAX_VCPUS};
use crate::probe::HostIdentity;

/// Most CPUID entries of a vCPU (KVM_MAX_CPUID_ENTRIES), and most MSRs and extended control registers: more than any
/// KVM has, and few enough to be no burden.
const MAX_CPUID: usize = 256;
const MAX_MSRS: usize = 4096;
const MAX_XCRS: usize = 16;

/// How much the frequency of the TSC may differ without a word, as KVM's own tolerance has it (tsc_tolerance_ppm).
const TSC_TOLERANCE_PPM: u64 = 250;

/// A host, as far as it matters for a machine that comes from there.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Host {
    /// The KVM module: `kvm_amd`, `kvm_intel`, `kvm_pvm`; empty if it cannot be told.
    pub kvm: String,
    /// The processor's vendor, as CPUID has it.
    pub vendor: String,
    /// The processor's name.
    pub cpu: String,
    /// Release and version of the kernel.
    pub kernel: String,
}

impl Host {
    /// The host that this runs on; found out once.
    pub fn this() -> &'static Host {
        static THIS: OnceLock<Host> = OnceLock::new();
        THIS.get_or_init(|| {
            let host = HostIdentity::of_this_host();
            Host { kvm: host.module, vendor: host.cpu_vendor, cpu: host.cpu_name, kernel: host.kernel }
        })
    }
}

/// Why a machine cannot be restored from a state. One line each.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// It is no JSON, or not of a machine.
    #[error("the machine state cannot be read: {0}; it is damaged, or no machine state")]
    Unreadable(String),
    /// It is of another version.
    #[error(
        "the machine state is of version {schema}, and this Trapline reads version {SCHEMA}; use the Trapline that made it"
    )]
    Schema {
        /// Its version.
        schema: u64,
    },
    /// It holds what no machine has.
    #[error("the machine state is damaged: {0}")]
    Broken(String),
    /// The memory does not fit.
    #[error("the guest memory that goes with the machine state does not fit: {0}; it is another machine's, or damaged")]
    Memory(String),
    /// Another processor.
    #[error(
        "the machine was saved on a processor by {saved}, and this host's is by {here}; open it on a host of that vendor"
    )]
    Vendor {
        /// Where it was saved.
        saved: String,
        /// Here.
        here: String,
    },
    /// Another KVM.
    #[error("the machine was saved under {saved}, and this host has {here}; open it on a host with {saved}")]
    Kvm {
        /// Where it was saved.
        saved: String,
        /// Here.
        here: String,
    },
    /// The guest may use what this processor does not have.
    #[error("this host's processor or KVM lacks {0}, which the guest was told it has; open it on a host that has it")]
    Features(String),
    /// KVM did not take a part of it.
    #[error("this host's KVM does not take the machine: {0}")]
    Refused(String),
}

impl RestoreError {
    /// Whether another host could have it.
    pub const fn is_of_this_host(&self) -> bool {
        matches!(self, Self::Vendor { .. } | Self::Kvm { .. } | Self::Features(_) | Self::Refused(_))
    }
}

impl MachineState {
    /// Whether all is there and of a size that a machine has; what the values are is KVM's to judge.
    pub(super) fn check(&self) -> Result<(), RestoreError> {
        let broken = |what: String| Err(RestoreError::Broken(what));
        let vcpus = self.vcpus.len();
        if vcpus == 0 || vcpus > MAX_VCPUS as usize {
            return broken(format!("it has {vcpus} vCPUs"));
        }
        if self.cpuid.len() != vcpus {
            return broken(format!("it has {vcpus} vCPUs and CPUID for {}", self.cpuid.len()));
        }
        for (n, (vcpu, cpuid)) in self.vcpus.iter().zip(&self.cpuid).enumerate() {
            let counts = [
                ("CPUID leaves", cpuid.len(), MAX_CPUID),
                ("MSRs", vcpu.msrs.len(), MAX_MSRS),
                ("extended control registers", vcpu.xcrs.len(), MAX_XCRS),
            ];
            if let Some((what, count, _)) = counts.into_iter().find(|(_, count, most)| count > most) {
                return broken(format!("vCPU {n} has {count} {what}"));
            }
            if cpuid.iter().flat_map(leaf_words).any(|word| word.0 > u64::from(u32::MAX)) {
                return broken(format!("a CPUID leaf of vCPU {n} has more than 32 bits"));
            }
        }
        let stopped = self.stops.iter().map(|stop| stop.vcpu).chain([self.vcpu]);
        if let Some(vcpu) = stopped.into_iter().find(|vcpu| *vcpu as usize >= vcpus) {
            return broken(format!("a stop is of vCPU {vcpu}"));
        }
        if self.devices.serial.queue.len() > CONSOLE_INPUT_QUEUE {
            return broken("it has more console input than there is room for".to_owned());
        }
        Ok(())
    }

    /// What the first vCPU's CPUID answers; the others differ in their numbers only.
    fn told(&self) -> &[CpuidLeaf] {
        self.cpuid.first().map_or(&[], Vec::as_slice)
    }

    /// Whether this host can be the machine's: what it supports is in `supported`.
    pub(crate) fn check_host(&self, supported: &[CpuidLeaf]) -> Result<(), RestoreError> {
        let here = Host::this();
        let (saved, vendor) = (vendor(self.told()), vendor(supported));
        if saved != vendor {
            return Err(RestoreError::Vendor { saved, here: vendor });
        }
        if self.host.kvm != here.kvm && !self.host.kvm.is_empty() && !here.kvm.is_empty() {
            return Err(RestoreError::Kvm { saved: self.host.kvm.clone(), here: here.kvm.clone() });
        }
        let lacks: Vec<Missing> = missing(self.told(), supported);
        if !lacks.is_empty() {
            let names: Vec<String> = lacks.iter().map(Missing::to_string).collect();
            return Err(RestoreError::Features(names.join(", ")));
        }
        Ok(())
    }
}

fn leaf_words(leaf: &CpuidLeaf) -> [Word; 6] {
    [leaf.function, leaf.index, leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
}

/// The vendor in leaf 0; what is no text there is replaced.
fn vendor(cpuid: &[CpuidLeaf]) -> String {
    let Some(leaf) = cpuid.iter().find(|leaf| leaf.function == Word(0)) else { return "nobody".to_owned() };
    let name = [leaf.ebx, leaf.edx, leaf.ecx].map(|word| (word.0 as u32).to_le_bytes()).concat();
    String::from_utf8_lossy(&name).escape_default().to_string()
}

/// Whether two frequencies of the TSC are the same for a guest that has measured it.
pub(crate) fn is_same_tsc(saved_khz: u32, here_khz: u32) -> bool {
    let (saved, here) = (u64::from(saved_khz), u64::from(here_khz));
    saved == 0 || here == 0 || saved.abs_diff(here) * 1_000_000 <= saved * TSC_TOLERANCE_PPM
}
