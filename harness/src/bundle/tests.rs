use super::*;
use crate::vmcore::{self, Core, Form};
use proptest::prelude::*;
use trapline_vmm::memory::GuestRam;
use trapline_vmm::state::MemorySource;
use trapline_vmm::vcpu::Registers;
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;

/// A core of `size` bytes of memory with some of them written.
fn core(dir: &Path, size: u64, written: &[(u64, &[u8])]) -> PathBuf {
    let ram = GuestRam::new(size).unwrap();
    for (gpa, bytes) in written {
        ram.mem().write_slice(bytes, GuestAddress(*gpa)).unwrap();
    }
    let path = dir.join(CORE);
    let vcpus = [Registers::default(), Registers::default()];
    let core = Core { ram: &ram, vcpus: &vcpus, vmcoreinfo: Vec::new(), hide: &|_, _| () };
    vmcore::write(&core, &path, Form::Elf).unwrap();
    path
}

/// Memory as a machine would get it.
fn filled(memory: &CoreMemory, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    for (gpa, len) in memory.ranges() {
        memory.read(gpa, &mut bytes[gpa as usize..(gpa + len) as usize]).unwrap();
    }
    bytes
}

#[test]
fn memory_comes_out_of_a_core_as_it_went_in() {
    let dir = tempfile::tempdir().unwrap();
    let size = 16 * MIB;
    let written: [(u64, &[u8]); 4] =
        [(0, b"first"), (5 * MIB - 2, b"across"), (9 * MIB, &[7; 0x5000]), (size - 4, b"last")];
    let path = core(dir.path(), size, &written);
    let memory = CoreMemory::read(File::open(&path).unwrap(), size).unwrap();
    let bytes = filled(&memory, size as usize);
    let mut expected = vec![0; size as usize];
    for (gpa, bytes) in written {
        expected[gpa as usize..][..bytes.len()].copy_from_slice(bytes);
    }
    assert!(bytes == expected);
    let there: u64 = memory.ranges().iter().map(|(_, len)| len).sum();
    assert!(there < MIB, "holes are left out, but {there} bytes are there");
    assert!(memory.read(2 * MIB, &mut [0]).is_err(), "in a hole");
    assert!(memory.read(size - 4, &mut [0; 5]).is_err(), "beyond its end");
}

#[test]
fn a_core_of_another_machine_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = core(dir.path(), 4 * MIB, &[(0, b"x")]);
    let error = CoreMemory::read(File::open(&path).unwrap(), 8 * MIB).unwrap_err();
    assert!(error.contains("lacks the memory at 0x400000"), "{error}");
}

#[test]
fn a_core_that_is_cut_off_or_none_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = core(dir.path(), 4 * MIB, &[(0, b"x"), (4 * MIB - 1, b"y")]);
    let whole = std::fs::read(&path).unwrap();
    for len in [0, 3, 63, 64, 200, 4096, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..len]).unwrap();
        let error = CoreMemory::read(File::open(&path).unwrap(), 4 * MIB).unwrap_err();
        assert!(!error.contains('\n'), "{error}");
    }
    for (magic, says) in
        [(b"KDUMP   ", "compressed"), (b"makedump", "compressed"), (b"\x7fELF\x02\x02\x01\0", "damaged")]
    {
        std::fs::write(&path, magic).unwrap();
        let error = CoreMemory::read(File::open(&path).unwrap(), 4 * MIB).unwrap_err();
        assert!(error.contains(says), "{error}");
    }
    let error = CoreMemory::read(File::open(dir.path()).unwrap(), 4 * MIB).unwrap_err();
    assert!(error.contains("no file"), "{error}");
}

#[test]
fn what_is_no_bundle_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let says = |path: &Path, words: &str| {
        let error = Bundle::open(path).unwrap_err().to_string();
        assert!(error.contains(words) && !error.contains('\n'), "{error}");
    };
    says(&dir.path().join("nowhere"), "No such file");
    says(dir.path(), "it has no state.json");
    let state = dir.path().join(STATE);
    for (json, words) in [
        ("", "EOF while parsing"),
        ("[]", "damaged, or no machine state"),
        ("{\"schema\": 1}", "missing field"),
        ("{\"schema\": 99}", "version 99"),
        ("{\"schema\": -1}", "damaged, or no machine state"),
    ] {
        std::fs::write(&state, json).unwrap();
        says(dir.path(), words);
    }
    says(&state, "it is no directory");
    std::fs::remove_file(&state).unwrap();
    std::fs::create_dir(&state).unwrap();
    says(dir.path(), "it is no file");
}

#[test]
fn what_is_shown_moves_no_cursor() {
    assert_eq!(one_line("a\u{1b}[2Jb\nc\u{9b}d"), "a [2Jb c d");
}

proptest! {
    /// A few bytes of a core changed, whatever they are: read or refused.
    #[test]
    fn a_damaged_core_never_panics(at in 0usize..0x2000, bytes in proptest::collection::vec(any::<u8>(), 1..16)) {
        let dir = tempfile::tempdir().unwrap();
        let path = core(dir.path(), 4 * MIB, &[(0, b"x")]);
        let mut damaged = std::fs::read(&path).unwrap();
        damaged[at..at + bytes.len()].copy_from_slice(&bytes);
        std::fs::write(&path, damaged).unwrap();
        if let Ok(memory) = CoreMemory::read(File::open(&path).unwrap(), 4 * MIB) {
            for (gpa, len) in memory.ranges() {
                prop_assert!(gpa + len <= 4 * MIB);
                prop_assert!(memory.read(gpa, &mut vec![0; len as usize]).is_ok());
            }
        }
    }
}
