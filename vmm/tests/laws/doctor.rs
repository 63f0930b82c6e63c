//! The probe: what it says of the flavours of KVM that there is a lane for.

use trapline_vmm::probe::{self, BrokenClaim, Capabilities};

use crate::lane::{Flavour, Need::Record, capabilities, flavour, lane};
use crate::law::{Law, law};

pub(crate) fn laws() -> Vec<Law> {
    vec![
        law!(probe_answers_as_recorded, Record),
        law!(probe_tells_the_claims_that_do_not_hold, Record),
        law!(probe_answers_the_same_again),
    ]
}

/// What was recorded of this KVM, with `trapline doctor --json`. A machine of somebody's own has no record.
pub(crate) fn record() -> Option<Capabilities> {
    let text = match (lane(), flavour()) {
        ("svm", Some(Flavour::Amd)) => include_str!("../../../tests/doctor/svm.json"),
        ("vmx", Some(Flavour::Intel)) => include_str!("../../../tests/doctor/vmx.json"),
        ("", Some(Flavour::Pvm)) => include_str!("../../../tests/doctor/host.json"),
        _ => return None,
    };
    Some(serde_json::from_str(text).expect("a record has the present form"))
}

/// The fields of a plain structure, each with its value, so that a failure shows those that differ.
fn fields(of: impl serde::Serialize) -> Vec<(String, String)> {
    let value = serde_json::to_value(of).unwrap();
    value.as_object().unwrap().iter().map(|(name, value)| (name.clone(), value.to_string())).collect()
}

fn probe_answers_as_recorded() {
    let (recorded, here) = (record().unwrap(), probe::capabilities_afresh().unwrap());
    let differ = |recorded: Vec<(String, String)>, here: Vec<(String, String)>| -> Vec<_> {
        recorded.into_iter().zip(here).filter(|(recorded, here)| recorded != here).collect()
    };
    let seen = differ(fields(recorded.seen), fields(here.seen));
    assert!(seen.is_empty(), "recorded and seen: {seen:#?}\n{:#?}", here.remarks);
    assert_eq!(here.remarks, recorded.remarks);
    let claims = differ(fields(recorded.claims), fields(here.claims));
    assert!(claims.is_empty(), "recorded and claimed: {claims:#?}");
    assert_eq!(recorded.host.module, here.host.module);
}

fn probe_tells_the_claims_that_do_not_hold() {
    let broken: Vec<_> = capabilities().broken_claims().iter().map(|&BrokenClaim { seen, .. }| seen).collect();
    let expected: &[&str] = match flavour() {
        Some(Flavour::Pvm) => &["x_cpl3", "w_data", "w_data_cpl3", "rw_data", "int3_cpl0", "int3_cpl3", "ss_cpl3"],
        Some(Flavour::Amd) => &["int3_cpl0", "int3_cpl3", "inject_bp_advances"],
        _ => &[],
    };
    assert_eq!(broken, expected);
}

/// From memory, from the cache file, and by trying once more.
fn probe_answers_the_same_again() {
    let first = capabilities();
    assert_eq!(&probe::capabilities().unwrap(), first);
    assert_eq!(&probe::capabilities_afresh().unwrap(), first);
}
