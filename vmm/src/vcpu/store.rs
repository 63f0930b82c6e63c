//! A store into a page with watchpoints on it: KVM hands it over, and it is carried out here (law 66).
