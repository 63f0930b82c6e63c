//! Tables as scripts/kallsyms.c writes them, in each layout and each way to keep addresses, and damaged ones.

use proptest::prelude::*;

use super::*;

const LINKED: u64 = 0xffff_ffff_8200_0000;
const TEXT: u64 = 0xffff_ffff_8100_0000;
const IMAGE: Range<u64> = TEXT..0xffff_ffff_8300_0000;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Order {
    Until63,
    Of62,
    Since64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kept {
    Percpu,
    Relative,
    Place,
    Absolute,
}

const ORDERS: [Order; 3] = [Order::Until63, Order::Of62, Order::Since64];

/// Symbols of a kernel: some per-cpu ones, if they are linked at 0, then functions.
fn symbols(percpu: bool) -> Vec<Line> {
    let mut symbols: Vec<Line> = Vec::new();
    if percpu {
        symbols.extend((0..40).map(|n| (n * 0x40, b'D', format!("per_cpu_{n}"))));
    }
    let functions = (0..1500).map(|n| (TEXT + n * 0x35, if n % 3 == 0 { b't' } else { b'T' }, format!("function_{n}")));
    symbols.extend(functions);
    // Packed, too, longer than one byte can say, as names of Rust are: no token of more than a letter fits into it.
    symbols.push((TEXT + 0x100_0000, b't', format!("_R{}", "y".repeat(300))));
    symbols
}

/// Every byte that occurs is a token of its own, and some tokens are longer.
fn tokens() -> Vec<Vec<u8>> {
    let longer = ["function_", "per_cpu_", "xxxx"];
    (0..=255u8)
        .map(|byte| match byte {
            0..=2 => longer[usize::from(byte)].as_bytes().to_vec(),
            33..=126 => vec![byte],
            _ => format!("?{byte}").into_bytes(),
        })
        .collect()
}

fn pack(letter: u8, name: &str) -> Vec<u8> {
    let mut packed = vec![letter];
    let mut rest = name;
    while let Some(c) = rest.bytes().next() {
        let longer = ["function_", "per_cpu_", "xxxx"].iter().position(|token| rest.starts_with(token));
        let (byte, len) = match longer {
            Some(token) => (token as u8, ["function_", "per_cpu_", "xxxx"][token].len()),
            None => (c, 1),
        };
        packed.push(byte);
        rest = &rest[len..];
    }
    let mut bytes = match packed.len() {
        len @ 0..=0x7f => vec![len as u8],
        len => vec![len as u8 & 0x7f | 0x80, (len >> 7) as u8],
    };
    bytes.extend(packed);
    bytes
}

/// A section with the tables somewhere in it.
struct Section {
    bytes: Vec<u8>,
}

impl Section {
    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
    }

    fn put(&mut self, bytes: &[u8]) {
        self.align();
        self.bytes.extend_from_slice(bytes);
    }

    fn addresses(&mut self, symbols: &[Line], kept: Kept) {
        self.align();
        for (address, ..) in symbols {
            let place = LINKED + self.bytes.len() as u64;
            match kept {
                Kept::Percpu if *address < TEXT => self.bytes.extend((*address as i32).to_le_bytes()),
                Kept::Percpu => self.bytes.extend(((TEXT as i64 - 1 - *address as i64) as i32).to_le_bytes()),
                Kept::Relative => self.bytes.extend(((address - TEXT) as u32).to_le_bytes()),
                Kept::Place => self.bytes.extend((address.wrapping_sub(place) as i32).to_le_bytes()),
                Kept::Absolute => self.bytes.extend(address.to_le_bytes()),
            }
        }
        match kept {
            Kept::Percpu | Kept::Relative => self.put(&TEXT.to_le_bytes()),
            Kept::Place | Kept::Absolute => {}
        }
    }

    fn names(&mut self, symbols: &[Line], seqs: bool) {
        self.put(&(symbols.len() as u32).to_le_bytes());
        let mut packed = Vec::new();
        let mut markers = Vec::new();
        for (number, (_, letter, name)) in symbols.iter().enumerate() {
            if number % 256 == 0 {
                markers.extend((packed.len() as u32).to_le_bytes());
            }
            packed.extend(pack(*letter, name));
        }
        self.put(&packed);
        self.put(&markers);
        if seqs {
            self.put(&vec![7; symbols.len() * 3]);
        }
    }

    fn tokens(&mut self) {
        let mut table = Vec::new();
        let mut index = Vec::new();
        for token in tokens() {
            index.extend((table.len() as u16).to_le_bytes());
            table.extend(token);
            table.push(0);
        }
        self.put(&table);
        self.put(&index);
    }
}

fn section(symbols: &[Line], order: Order, kept: Kept) -> Vec<u8> {
    // Something else comes before, and it is not all alike.
    let mut section =
        Section { bytes: (0..5000u32).flat_map(|n| (n.wrapping_mul(0x9e37_79b9) >> 7).to_le_bytes()).collect() };
    match order {
        Order::Until63 | Order::Of62 => {
            section.addresses(symbols, kept);
            section.names(symbols, order == Order::Of62);
            section.tokens();
        }
        Order::Since64 => {
            section.names(symbols, false);
            section.tokens();
            section.addresses(symbols, kept);
            section.put(&vec![7; symbols.len() * 3]);
        }
    }
    section.put(&[0xee; 4096]);
    section.bytes
}

#[test]
fn each_layout_is_read() {
    for order in ORDERS {
        for kept in [Kept::Percpu, Kept::Relative, Kept::Place, Kept::Absolute] {
            if (order, kept) == (Order::Until63, Kept::Place) || (order, kept) == (Order::Of62, Kept::Place) {
                continue; // There are none.
            }
            let symbols = symbols(kept == Kept::Percpu);
            let found = find(&section(&symbols, order, kept), LINKED, &IMAGE);
            assert!(found.as_ref() == Some(&symbols), "{order:?} {kept:?}: {:?}", found.map(|found| found.len()));
        }
    }
}

#[test]
fn tables_that_contradict_each_other_are_not_believed() {
    let symbols = symbols(true);
    let good = section(&symbols, Order::Since64, Kept::Percpu);
    assert!(find(&good, LINKED, &IMAGE).is_some());
    // One marker is off by one.
    let names = Names::find(&good, Tokens::find(&good, 0).unwrap().table).unwrap();
    let mut bad = good.clone();
    bad[names.markers + 4] ^= 1;
    assert!(find(&bad, LINKED, &IMAGE).is_none());
    // One address is out of order.
    let index = Tokens::find(&good, 0).unwrap().index;
    let mut bad = good.clone();
    bad[index + 512 + 4 * 100 + 1] ^= 0x40;
    assert!(find(&bad, LINKED, &IMAGE).is_none());
    // The image is elsewhere.
    assert!(find(&good, LINKED, &(0x1000..0x2000)).is_none());
    // It ends within the names.
    assert!(find(&good[..names.markers - 10], LINKED, &IMAGE).is_none());
    assert!(find(&[], LINKED, &IMAGE).is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_bytes_are_no_tables(bytes in proptest::collection::vec(any::<u8>(), 0..20_000)) {
        prop_assert!(find(&bytes, LINKED, &IMAGE).is_none());
    }

    #[test]
    fn damage_never_panics(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40),
        cut in any::<prop::sample::Index>(),
        order in 0..3usize,
    ) {
        let symbols = symbols(true);
        let mut bytes = section(&symbols, ORDERS[order], Kept::Percpu);
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let cut = cut.index(2 * bytes.len());
        bytes.truncate(cut.max(1000));
        if let Some(found) = find(&bytes, LINKED, &IMAGE) {
            prop_assert_eq!(found.len(), symbols.len());
        }
    }
}
