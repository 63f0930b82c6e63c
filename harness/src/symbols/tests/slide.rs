//! Finding out where KASLR has moved the kernel to.

use super::*;

const MAP: &str = "\
ffffffff81000000 T _text
ffffffff82000000 R linux_banner
ffffffff82400000 B _end
";

const BANNER: u64 = 0xffff_ffff_8200_0000;

/// Memory in which each banner stands at its address.
struct Banners(Vec<(u64, &'static str)>);

impl Memory for Banners {
    fn read(&self, address: u64, into: &mut [u8]) -> usize {
        let Some((at, text)) = self.0.iter().find(|(at, _)| *at == address) else { return 0 };
        assert_eq!(*at, address);
        let len = text.len().min(into.len());
        into[..len].copy_from_slice(&text.as_bytes()[..len]);
        len
    }
}

fn found(banners: Vec<(u64, &'static str)>, pc: u64) -> Option<u64> {
    symbols_in(MAP.as_bytes()).unwrap().find_slide(&Banners(banners), pc)
}

#[test]
fn a_slide_is_believed_if_the_memory_bears_it_out() {
    let here = "Linux version 6.1.0";
    for slide in [0, 0x20_0000, 0x1000_0000, 0x3d00_0000] {
        for pc in [0, 0x1234, 0x13f_ffff] {
            let pc = 0xffff_ffff_8100_0000 + slide + pc;
            assert_eq!(found(vec![(BANNER + slide, here)], pc), Some(slide), "{slide:#x} {pc:#x}");
        }
    }
}

#[test]
fn nothing_is_guessed() {
    let pc = 0xffff_ffff_9100_0010;
    assert_eq!(found(vec![], pc), None);
    assert_eq!(found(vec![(BANNER + 0x1000_0000, "FreeBSD 15.0, not Linux")], pc), None);
    // Right in memory, but the program counter is elsewhere.
    assert_eq!(found(vec![(BANNER, "Linux version 6.1.0")], pc), None);
    assert_eq!(found(vec![(BANNER, "Linux version 6.1.0")], 0), None);
    assert_eq!(found(vec![(BANNER, "Linux version 6.1.0")], u64::MAX), None);
    assert_eq!(Symbols::none().find_slide(&Banners(vec![]), pc), None);
}
