//! One of the counters that KVM keeps of a vCPU (KVM API, 4.133 KVM_GET_STATS_FD; Linux 5.14).

use std::fs::File;
use std::os::unix::fs::FileExt;

/// `struct kvm_stats_header`: flags, name_size, num_desc, id_offset, desc_offset, data_offset.
const HEADER: usize = 24;
/// `struct kvm_stats_desc`, without the name that follows it: flags, exponent and size, offset, bucket_size.
const DESCRIPTION: usize = 16;
/// More descriptions, or bytes of a name, than any kernel has.
const MOST: u32 = 4096;

/// A counter, and where it is.
pub(super) struct Counter {
    file: File,
    at: u64,
}

impl Counter {
    /// The counter of that name in what KVM_GET_STATS_FD gave; `None` if it has none.
    pub(super) fn find(file: File, name: &str) -> Option<Self> {
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0).ok()?;
        let (name_size, descriptions) = (word(&header, 4)?, word(&header, 8)?);
        let (first, data) = (word(&header, 16)?, word(&header, 20)?);
        if name_size > MOST || descriptions > MOST {
            return None;
        }
        let mut description = vec![0; DESCRIPTION + name_size as usize];
        let size = description.len() as u64;
        for n in 0..u64::from(descriptions) {
            file.read_exact_at(&mut description, u64::from(first) + n * size).ok()?;
            let found = description[DESCRIPTION..].split(|byte| *byte == 0).next()?;
            if found == name.as_bytes() {
                return Some(Counter { at: u64::from(data) + u64::from(word(&description, 8)?), file });
            }
        }
        None
    }

    /// What it has counted.
    pub(super) fn value(&self) -> Option<u64> {
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, self.at).ok()?;
        Some(u64::from_ne_bytes(value))
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// Two counters with names of up to eight bytes.
    fn stats() -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [0_u32, 8, 2, 24, 24, 24 + 2 * 24] {
            bytes.extend(word.to_ne_bytes());
        }
        for (name, offset) in [(b"exits\0\0\0", 0_u32), (b"pf_guest", 8)] {
            for word in [0, 0, offset, 0] {
                bytes.extend(word.to_ne_bytes());
            }
            bytes.extend(name);
        }
        bytes.extend(7_u64.to_ne_bytes());
        bytes.extend(9_u64.to_ne_bytes());
        bytes
    }

    fn find(bytes: &[u8], name: &str) -> Option<u64> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Counter::find(file, name)?.value()
    }

    #[test]
    fn a_counter_is_found_by_its_name() {
        assert_eq!(find(&stats(), "exits"), Some(7));
        assert_eq!(find(&stats(), "pf_guest"), Some(9));
        assert_eq!(find(&stats(), "pf"), None);
    }

    #[test]
    fn what_is_cut_off_or_absurd_is_none() {
        for len in 0..stats().len() {
            assert_eq!(find(&stats()[..len], "pf_guest"), None, "{len} bytes");
        }
        let absurd = [&[0xff; 24][..], &stats()].concat();
        assert_eq!(find(&absurd, "exits"), None);
    }
}
