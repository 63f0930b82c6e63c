//! x87 and SSE state in the area of KVM_GET_XSAVE (SDM vol. 1, 13.4; KVM API 4.42).
//!
//! KVM_GET_FPU will not do: it leaves MXCSR out, and it shows stale bytes of a component that the
//! processor did not save because it was in its initial state.

use super::Fpu;

/// The area as KVM hands it over.
pub(super) type Area = [u32; 1024];

// Offsets in bytes.
const FCW: usize = 0;
const FSW: usize = 2;
const FTW: usize = 4;
const FOP: usize = 6;
const FIP: usize = 8;
const FDP: usize = 16;
const MXCSR: usize = 24;
const ST: usize = 32;
const XMM: usize = 160;
const XSTATE_BV: usize = 512;

/// XSTATE_BV: x87 and SSE state are there.
const X87_AND_SSE: u8 = 0b11;

/// Bytes between two of ST0-ST7 and of XMM0-XMM15.
const STRIDE: usize = 16;

/// What the area says of x87 and SSE.
pub(super) fn to_fpu(area: &Area) -> Fpu {
    let bytes: Vec<u8> = area.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut fpu = Fpu {
        fcw: u16::from_le_bytes(array(&bytes, FCW)),
        fsw: u16::from_le_bytes(array(&bytes, FSW)),
        ftwx: bytes[FTW],
        fop: u16::from_le_bytes(array(&bytes, FOP)),
        fip: u64::from_le_bytes(array(&bytes, FIP)),
        fdp: u64::from_le_bytes(array(&bytes, FDP)),
        mxcsr: u32::from_le_bytes(array(&bytes, MXCSR)),
        ..Fpu::default()
    };
    for (n, st) in fpu.st.iter_mut().enumerate() {
        *st = array(&bytes, ST + n * STRIDE);
    }
    for (n, xmm) in fpu.xmm.iter_mut().enumerate() {
        *xmm = u128::from_le_bytes(array(&bytes, XMM + n * STRIDE));
    }
    fpu
}

/// Puts x87 and SSE into the area; all else in it stays.
pub(super) fn put_fpu(area: &mut Area, fpu: &Fpu) {
    let mut bytes: Vec<u8> = area.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(FCW, &fpu.fcw.to_le_bytes());
    put(FSW, &fpu.fsw.to_le_bytes());
    put(FTW, &[fpu.ftwx]);
    put(FOP, &fpu.fop.to_le_bytes());
    put(FIP, &fpu.fip.to_le_bytes());
    put(FDP, &fpu.fdp.to_le_bytes());
    put(MXCSR, &fpu.mxcsr.to_le_bytes());
    for (n, st) in fpu.st.iter().enumerate() {
        put(ST + n * STRIDE, st);
    }
    for (n, xmm) in fpu.xmm.iter().enumerate() {
        put(XMM + n * STRIDE, &xmm.to_le_bytes());
    }
    bytes[XSTATE_BV] |= X87_AND_SSE;
    for (word, bytes) in area.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes(array(bytes, 0));
    }
}

/// `N` bytes from `at` on; every caller stays inside the area.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|n| bytes[at + n])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_fpu_survives_the_round_trip(st: [[u8; 10]; 8], xmm: [u128; 16], fcw: u16, ftwx: u8, mxcsr: u32) {
            let fpu = Fpu { st, xmm, fcw, ftwx, mxcsr, fsw: !fcw, fop: fcw ^ 1, fip: 7, fdp: 9 };
            let mut area = [0; 1024];
            area[300] = 0x1234_5678;
            put_fpu(&mut area, &fpu);
            prop_assert_eq!(to_fpu(&area), fpu);
            prop_assert_eq!(area[300], 0x1234_5678);
            prop_assert_eq!(area[XSTATE_BV / 4], 3);
        }
    }
}
