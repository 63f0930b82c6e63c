//! Each way of packing, as the kernel's build calls the tools, and damaged images.

use proptest::prelude::*;

use super::*;

/// What is packed below: an ELF file's first bytes, then calls, which xz's filter for x86 changes.
fn contents() -> Vec<u8> {
    let calls = (0..24i32).flat_map(|n| {
        let mut call = vec![0xe8];
        call.extend((1000 - 5 * n).to_le_bytes());
        call.extend(b"kernel");
        call
    });
    b"\x7fELF".iter().copied().chain(calls).collect()
}

// `xz --check=crc32 --x86 --lzma2=dict=1MiB`, `lzma -9`, `zstd -22 --ultra` and `lz4 -l -9`, each with the unpacked
// size behind it, and `gzip -9`.
const XZ: &str = "\
    fd377a585a0000016922de3602010400210110008b216f49e0010b00455d003f914584706dc6a05ecffd78751445ced04e91\
    b0bf5613eb3a3fd5de1a31f77636bb58869608f2a94d83da2a54b3eb88022b07312a3d764da7b75c4f0f5bfae8c720a88e00\
    00000000f7fd755d00015d8c02000000ec5a5aad3e300d8b020000000001595a0c010000";
const LZMA: &str = "\
    5d00000004ffffffffffffffff003f914584707016e44d0cb43d1419f09e9f8dc873bfec16e5d53eff32fa4329a4a7efc5e7\
    1b08685f84a2e95ddb113f4fcb7a014d65f7c9284be8aefb4fa999d3f34423fff552c0000c010000";
const ZSTD: &str = "\
    28b52ffd0488c5010074027f454c46e8e80300006b65726e656ce8e3ded9d4cfcac5c0bbb6b1aca7a29d98938e89847f7a75\
    17a810f8fa6ff0d51056fcebee26652781d6a70c010000";
const LZ4: &str = "\
    02214c1874000000f6027f454c46e8e80300006b65726e656ce8e30b0016de0b0016d90b0016d40b0016cf0b0016ca0b0016\
    c50b0016c00b0016bb0b0016b60b0016b10b0016ac0b0016a70b0016a20b00169d0b0016980b0016930b00168e0b0016890b\
    0016840b00167f0b00167a0b00a0750300006b65726e656c0c010000";
const GZIP: &str = "\
    1f8b0800000000000203ab77f5717bf1829981213bb5282f35e7c56304f31e827913c1bc82609e47304f21984711cc0308e6\
    6e04731b82b911c15c83602e47301721987311cc1908e66404b30fc1ec44305b10cc7a04b30ac12c853301f7fd755d0c0100\
    00";

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().map(|digit| (digit as char).to_digit(16).unwrap() as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

const VERSION: &[u8] = b"6.12.1-test (me@host) #1 SMP Thu Jan 1 00:00:00 UTC 2026\0";

fn image(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 3 * 512];
    image[0x1f1] = 2;
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    image[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
    image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
    image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    image[0x300..0x300 + VERSION.len()].copy_from_slice(VERSION);
    image.extend([0xf4; 16]);
    image.extend(payload);
    image.extend([0xf4; 16]);
    image
}

fn unpacked(payload: &[u8]) -> Result<Vec<u8>, String> {
    BzImage::parse(&image(payload)).unwrap()?.unpack()
}

#[test]
fn each_way_of_packing_is_unpacked() {
    for (name, packed) in [("xz", XZ), ("lzma", LZMA), ("zstd", ZSTD), ("lz4", LZ4), ("gzip", GZIP)] {
        assert_eq!(unpacked(&bytes(packed)).as_ref(), Ok(&contents()), "{name}");
    }
    assert_eq!(unpacked(&contents()), Ok(contents()));
}

#[test]
fn what_cannot_be_unpacked_is_told() {
    let error = |payload: &[u8]| unpacked(payload).unwrap_err();
    assert_eq!(
        error(b"BZh9"),
        "the bzImage is packed with bzip2, which is not known here; give its vmlinux with --symbols"
    );
    assert_eq!(
        error(b"\x89LZO"),
        "the bzImage is packed with lzo, which is not known here; give its vmlinux with --symbols"
    );
    assert_eq!(
        error(b"????"),
        "the bzImage is packed with something, which is not known here; give its vmlinux with --symbols"
    );
    let xz = bytes(XZ);
    assert!(error(&xz[..40]).starts_with("cannot unpack the bzImage's xz contents: "));
    assert!(error(&bytes(ZSTD)[..10]).starts_with("cannot unpack the bzImage's zstd contents: "));
    let mut cut = image(&xz);
    cut.truncate(1600);
    assert_eq!(BzImage::parse(&cut).unwrap().unwrap_err(), "the bzImage is cut short");
    let mut old = image(&xz);
    old[0x206] = 7;
    assert!(BzImage::parse(&old).unwrap().is_err());
    assert!(BzImage::parse(b"MZ").is_none());
}

#[test]
fn the_banner_of_another_build_is_noticed() {
    let bytes = image(b"");
    let image = BzImage::parse(&bytes).unwrap().unwrap();
    assert_eq!(image.release(), Some("6.12.1-test"));
    assert!(
        image.is_of("Linux version 6.12.1-test (me@host) (gcc 12, GNU ld 2.40) #1 SMP Thu Jan 1 00:00:00 UTC 2026\n")
    );
    assert!(
        !image.is_of("Linux version 6.12.1-test (me@host) (gcc 12, GNU ld 2.40) #2 SMP Fri Jan 2 00:00:00 UTC 2026\n")
    );
    assert!(
        !image.is_of("Linux version 6.12.2-test (me@host) (gcc 12, GNU ld 2.40) #1 SMP Thu Jan 1 00:00:00 UTC 2026\n")
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn damage_never_panics(
        which in 0..5usize,
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in 0..4000usize,
    ) {
        let mut bytes = image(&bytes([XZ, LZMA, ZSTD, LZ4, GZIP][which]));
        for (at, value) in damage {
            // The payload's first bytes stay, or it would not be unpacked at all.
            let at = at.index(bytes.len());
            if !(1552..1556).contains(&at) {
                bytes[at] = value;
            }
        }
        bytes.truncate(cut.max(0x250));
        if let Some(Ok(image)) = BzImage::parse(&bytes) {
            let _ = image.unpack();
        }
    }
}
