//! The outermost layer of the remote protocol: bytes to whole packets and back.
//!
//! Nothing here does I/O or knows what a packet means. gdbstub ends the session on a bad
//! checksum, on `-` and on any stray byte; so it never sees those: this layer asks for
//! retransmission, retransmits, and skips noise.
//!
//! ```text
//!            '$'            '#'           hex            hex
//!  Outside ───────► Body ────────► Check1 ────► Check2 ────► Outside  (+ Packet)
//!     ▲              │ '$' starts over, in every state: a lost '#' loses one packet
//!     └── 0x03 is an interrupt here and here only; every other byte is noise
//! ```

use crate::limits::PACKET_BODY;

/// What a byte completed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// A whole packet with the right checksum: what stood between `$` and `#`, still escaped.
    Packet(Vec<u8>),
    /// Ctrl-C: a lone 0x03 between packets.
    Interrupt,
    /// The other side has seen our last packet.
    Ack,
    /// The other side wants our last packet again.
    Nack,
    /// A packet whose checksum is wrong or no hex number.
    BadChecksum,
    /// A packet longer than [`PACKET_BODY`], with the right checksum. Its bytes are gone.
    Oversized,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Outside,
    Body,
    Check1,
    Check2(u8),
}

/// Takes bytes as they come and says what they complete.
///
/// Holds at most [`PACKET_BODY`] bytes.
#[derive(Debug)]
pub(crate) struct Receiver {
    state: State,
    body: Vec<u8>,
    oversized: bool,
    sum: u8,
}

impl Default for Receiver {
    fn default() -> Self {
        Self::new()
    }
}

impl Receiver {
    /// A receiver between packets.
    pub(crate) const fn new() -> Self {
        Self { state: State::Outside, body: Vec::new(), oversized: false, sum: 0 }
    }

    /// Bytes held for a packet that is not complete yet.
    #[cfg(test)]
    pub(crate) fn held(&self) -> usize {
        self.body.len()
    }

    /// Takes the next byte.
    pub(crate) fn push(&mut self, byte: u8) -> Option<Event> {
        if byte == b'$' {
            self.state = State::Body;
            self.body.clear();
            self.oversized = false;
            self.sum = 0;
            return None;
        }
        match self.state {
            State::Outside => match byte {
                0x03 => Some(Event::Interrupt),
                b'+' => Some(Event::Ack),
                b'-' => Some(Event::Nack),
                _ => None,
            },
            State::Body if byte == b'#' => {
                self.state = State::Check1;
                None
            }
            State::Body => {
                self.sum = self.sum.wrapping_add(byte);
                if self.body.len() < PACKET_BODY {
                    self.body.push(byte);
                } else {
                    self.oversized = true;
                }
                None
            }
            State::Check1 => {
                self.state = State::Check2(byte);
                None
            }
            State::Check2(first) => {
                self.state = State::Outside;
                let body = std::mem::take(&mut self.body);
                let stated = match (nibble(first), nibble(byte)) {
                    (Some(high), Some(low)) => Some(high << 4 | low),
                    _ => None,
                };
                Some(match stated {
                    Some(sum) if sum == self.sum && self.oversized => Event::Oversized,
                    Some(sum) if sum == self.sum => Event::Packet(body),
                    _ => Event::BadChecksum,
                })
            }
        }
    }
}

/// The value of a hexadecimal digit.
pub(crate) const fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

/// Appends `$body#checksum` to `out`, with runs of equal characters shortened.
///
/// `body` must be escaped already where it carries binary data: neither `$` nor `#` may
/// stand in it, nor a `*` that is not meant as data (see [`escape`]).
pub(crate) fn encode(body: &[u8], out: &mut Vec<u8>) {
    out.reserve(body.len() + 4);
    out.push(b'$');
    let start = out.len();
    let mut rest = body;
    while let Some(&first) = rest.first() {
        let run = rest.iter().take(MAX_RUN).take_while(|&&b| b == first).count();
        rest = &rest[shorten(first, run, out)..];
    }
    let sum = out[start..].iter().fold(0u8, |sum, &b| sum.wrapping_add(b));
    out.push(b'#');
    out.extend_from_slice(&hex_byte(sum));
}

/// Longest run in one piece: the character and a repeat count that is still printable (`~`).
const MAX_RUN: usize = 1 + (126 - 29);

/// Writes one run of `first`, or the part of it that one count can express; returns its length.
fn shorten(first: u8, run: usize, out: &mut Vec<u8>) -> usize {
    out.push(first);
    // A count below 3 is not printable, and `#` and `$` (6 and 7) would end or start a packet:
    // those runs are cut to five and the rest goes out by itself.
    let repeats = match run - 1 {
        0..=2 => {
            out.extend(std::iter::repeat_n(first, run - 1));
            return run;
        }
        6 | 7 => 5,
        n => n,
    };
    out.push(b'*');
    out.push(29 + repeats as u8);
    repeats + 1
}

/// Escapes binary data for a reply (RSP, "Overview", binary data).
pub(crate) fn escape(data: &[u8], out: &mut Vec<u8>) {
    for &byte in data {
        if matches!(byte, b'#' | b'$' | b'}' | b'*') {
            out.extend_from_slice(&[b'}', byte ^ 0x20]);
        } else {
            out.push(byte);
        }
    }
}

/// Undoes [`escape`] in a request; `None` if the data ends inside an escape.
pub(crate) fn unescape(data: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(data.len());
    let mut bytes = data.iter();
    while let Some(&byte) = bytes.next() {
        out.push(if byte == b'}' { *bytes.next()? ^ 0x20 } else { byte });
    }
    Some(out)
}

/// The two digits of `byte`.
pub(crate) fn hex_byte(byte: u8) -> [u8; 2] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]
}

/// Appends `data` as hex digits.
pub(crate) fn hex(data: &[u8], out: &mut Vec<u8>) {
    data.iter().for_each(|&b| out.extend_from_slice(&hex_byte(b)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn receive(receiver: &mut Receiver, bytes: &[u8]) -> Vec<Event> {
        bytes.iter().filter_map(|&b| receiver.push(b)).collect()
    }

    fn packet(body: &[u8]) -> Vec<u8> {
        let sum = body.iter().fold(0u8, |s, &b| s.wrapping_add(b));
        let mut out = vec![b'$'];
        out.extend_from_slice(body);
        out.push(b'#');
        out.extend_from_slice(&hex_byte(sum));
        out
    }

    /// What gdb does with a reply (RSP, "Overview", run-length encoding).
    fn expand(encoded: &[u8]) -> Vec<u8> {
        let mut out: Vec<u8> = Vec::new();
        let mut bytes = encoded.iter();
        while let Some(&b) = bytes.next() {
            if b == b'*' {
                let count = usize::from(*bytes.next().unwrap()) - 29;
                let last = *out.last().unwrap();
                out.extend(std::iter::repeat_n(last, count));
            } else {
                out.push(b);
            }
        }
        out
    }

    #[test]
    fn a_packet_is_found_at_every_split() {
        let wire = packet(b"qSupported:multiprocess+");
        for cut in 0..=wire.len() {
            let mut receiver = Receiver::new();
            let mut events = receive(&mut receiver, &wire[..cut]);
            events.extend(receive(&mut receiver, &wire[cut..]));
            assert_eq!(events, [Event::Packet(b"qSupported:multiprocess+".to_vec())], "cut at {cut}");
        }
    }

    #[test]
    fn ctrl_c_counts_between_packets_only() {
        let mut receiver = Receiver::new();
        assert_eq!(receive(&mut receiver, b"\x03"), [Event::Interrupt]);
        assert_eq!(receive(&mut receiver, &packet(b"X10,1:\x03")), [Event::Packet(b"X10,1:\x03".to_vec())]);
        assert_eq!(receive(&mut receiver, b"$m0,\x03"), []);
    }

    #[test]
    fn acknowledgements_and_noise() {
        let mut receiver = Receiver::new();
        assert_eq!(receive(&mut receiver, b"+-hello\0\r\n"), [Event::Ack, Event::Nack]);
    }

    #[test]
    fn a_wrong_checksum_is_told() {
        for wire in [&b"$g#00"[..], b"$g#6x", b"$g#zz", b"$g#  "] {
            assert_eq!(receive(&mut Receiver::new(), wire), [Event::BadChecksum]);
        }
        assert_eq!(receive(&mut Receiver::new(), b"$#00"), [Event::Packet(vec![])]);
    }

    #[test]
    fn a_lost_hash_costs_one_packet() {
        assert_eq!(receive(&mut Receiver::new(), b"$m0,4$g#67"), [Event::Packet(b"g".to_vec())]);
        assert_eq!(receive(&mut Receiver::new(), b"$m0,4#$g#67"), [Event::Packet(b"g".to_vec())]);
        assert_eq!(receive(&mut Receiver::new(), b"$m0,4#a$g#67"), [Event::Packet(b"g".to_vec())]);
    }

    #[test]
    fn the_longest_packet_fits_and_one_byte_more_is_oversized() {
        let mut receiver = Receiver::new();
        assert_eq!(receive(&mut receiver, &packet(&[b'a'; PACKET_BODY])), [Event::Packet(vec![b'a'; PACKET_BODY])]);
        assert_eq!(receive(&mut receiver, &packet(&[b'a'; PACKET_BODY + 1])), [Event::Oversized]);
        assert_eq!(receive(&mut receiver, b"$g#67"), [Event::Packet(b"g".to_vec())]);
    }

    #[test]
    fn runs_of_every_length_survive() {
        for length in 1..400 {
            let body = vec![b'0'; length];
            let mut out = Vec::new();
            encode(&body, &mut out);
            assert_eq!(expand(&out[1..out.len() - 3]), body, "length {length}");
            assert!(length < 12 || out.len() < length, "length {length} was not shortened");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_hold_more_than_one_packet(bytes in proptest::collection::vec(any::<u8>(), 0..3 * PACKET_BODY)) {
            let mut receiver = Receiver::new();
            for &b in &bytes {
                receiver.push(b);
                prop_assert!(receiver.held() <= PACKET_BODY);
            }
        }

        #[test]
        fn no_noise_loses_the_next_packet(noise in proptest::collection::vec(prop_oneof![any::<u8>(), Just(b'$'), Just(b'#'), Just(b'}')], 0..64),
                                          body in proptest::collection::vec(any::<u8>().prop_filter("framing", |b| !b"$#".contains(b)), 0..64)) {
            let mut receiver = Receiver::new();
            receive(&mut receiver, &noise);
            let events = receive(&mut receiver, &packet(&body));
            prop_assert_eq!(events.last(), Some(&Event::Packet(body)));
        }

        #[test]
        fn what_is_encoded_is_received(data in proptest::collection::vec(prop_oneof![any::<u8>(), Just(b'0'), Just(b'}')], 0..600)) {
            let mut body = Vec::new();
            escape(&data, &mut body);
            let mut wire = Vec::new();
            encode(&body, &mut wire);
            let events = receive(&mut Receiver::new(), &wire);
            let [Event::Packet(received)] = events.as_slice() else { panic!("{events:?}") };
            let expanded = expand(received);
            prop_assert_eq!(&expanded, &body);
            prop_assert_eq!(unescape(&expanded), Some(data));
        }
    }
}
