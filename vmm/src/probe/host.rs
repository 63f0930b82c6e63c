//! Which host the answers are about.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// What KVM's behaviour depends on. Hosts of equal identity give equal answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostIdentity {
    /// The kernel's release and version, as `uname -rv` prints them.
    pub kernel: String,
    /// The KVM module that drives the processor: `kvm_intel`, `kvm_amd` or another; empty if it
    /// cannot be told.
    pub module: String,
    /// The parameters of that module and of `kvm`, as `module.parameter`, as far as they can be read.
    pub parameters: BTreeMap<String, String>,
    /// The processor's vendor, as /proc/cpuinfo has it.
    pub cpu_vendor: String,
    /// Its family, model and stepping, separated by slashes.
    pub cpu_model: String,
    /// Its name.
    pub cpu_name: String,
    /// Its microcode revision, if it has one.
    pub microcode: String,
}

impl HostIdentity {
    /// The identity of the host that this runs on. What cannot be read is empty.
    pub fn of_this_host() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name| cpuinfo_field(&cpuinfo, name).to_owned();
        let module = vendor_module();
        let mut parameters = parameters_of("kvm");
        parameters.extend(parameters_of(&module));
        Self {
            kernel: [read("/proc/sys/kernel/osrelease"), read("/proc/sys/kernel/version")].join(" ").trim().to_owned(),
            module,
            parameters,
            cpu_vendor: field("vendor_id"),
            cpu_model: [field("cpu family"), field("model"), field("stepping")].join("/"),
            cpu_name: field("model name"),
            microcode: field("microcode"),
        }
    }
}

/// The first processor's value of a field.
fn cpuinfo_field<'a>(cpuinfo: &'a str, name: &str) -> &'a str {
    let fields = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    fields.into_iter().find(|(key, _)| key.trim() == name).map_or("", |(_, value)| value.trim())
}

/// KVM's other module. Two may be loaded, of which one has found no processor for it: the one that is used by
/// somebody, or else by name.
fn vendor_module() -> String {
    let Ok(entries) = fs::read_dir("/sys/module") else { return String::new() };
    let mut modules: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm_") || name.starts_with("kvm-"))
        .collect();
    modules.sort();
    modules.into_iter().next().unwrap_or_default()
}

fn parameters_of(module: &str) -> BTreeMap<String, String> {
    if module.is_empty() {
        return BTreeMap::new();
    }
    let Ok(entries) = fs::read_dir(Path::new("/sys/module").join(module).join("parameters")) else {
        return BTreeMap::new();
    };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let name = entry.file_name().into_string().ok()?;
            let value = fs::read_to_string(entry.path()).ok()?;
            Some((format!("{module}.{name}"), value.trim().to_owned()))
        })
        .collect()
}
