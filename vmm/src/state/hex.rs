//! Numbers and bytes as hexadecimal text: what a person compares with a manual, and exact in every JSON reader.

use std::fmt;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// A register's value; in JSON `"0xfee00900"`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Word(pub u64);

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl<T: Into<u64>> From<T> for Word {
    fn from(value: T) -> Self {
        Word(value.into())
    }
}

impl Serialize for Word {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{:#x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Word {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Word;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of at most 64 bits such as \"0x1f80\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Word, E> {
                let digits = text.strip_prefix("0x").filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
                let value = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
                value.map(Word).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        from.deserialize_str(Text)
    }
}

/// Bytes in the layout of a manual or of KVM's API; in JSON two digits each, without the zeros at the end.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Blob(Vec<u8>);

impl Blob {
    /// These bytes.
    pub fn new(bytes: &[u8]) -> Self {
        let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        Blob(bytes[..end].to_vec())
    }

    /// The bytes, with zeros behind them. `None`: they are more than that.
    pub fn padded<const N: usize>(&self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        bytes.get_mut(..self.0.len())?.copy_from_slice(&self.0);
        Some(bytes)
    }

    /// How many there are without the zeros at the end.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether all are zero.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blob({} bytes)", self.0.len())
    }
}

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble & 0xf)]);
        let text: String = self.0.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect();
        to.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Blob;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes of two hexadecimal digits each")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Blob, E> {
                let nibble = |digit: u8| char::from(digit).to_digit(16).map(|value| value as u8);
                let byte = |pair: &[u8]| match pair {
                    [high, low] => Some(nibble(*high)? << 4 | nibble(*low)?),
                    _ => None,
                };
                let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(byte).collect();
                let bytes = bytes.ok_or_else(|| E::custom("bytes that are not two hexadecimal digits each"))?;
                Ok(Blob::new(&bytes))
            }
        }
        from.deserialize_str(Text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn words_and_blobs_survive_json(value: u64, bytes: Vec<u8>) {
            let (word, blob) = (Word(value), Blob::new(&bytes));
            let text = serde_json::to_string(&(word, &blob)).unwrap();
            let (read, back): (Word, Blob) = serde_json::from_str(&text).unwrap();
            prop_assert_eq!((read, &back), (word, &blob));
            if bytes.len() <= 64 {
                let mut padded = bytes.clone();
                padded.resize(64, 0);
                prop_assert_eq!(back.padded::<64>().map(|bytes| bytes.to_vec()), Some(padded));
            }
        }

        #[test]
        fn other_text_is_refused_and_never_panics(text: String) {
            let json = serde_json::to_string(&text).unwrap();
            let is_number = text.starts_with("0x") && u64::from_str_radix(&text[2..], 16).is_ok();
            prop_assert_eq!(serde_json::from_str::<Word>(&json).is_ok(), is_number && !text.contains('+'));
            let is_hex = text.len() % 2 == 0 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            prop_assert_eq!(serde_json::from_str::<Blob>(&json).is_ok(), is_hex);
        }
    }

    #[test]
    fn what_is_too_long_is_refused() {
        assert_eq!(Blob::new(&[1, 2, 0]).padded::<2>(), Some([1, 2]));
        assert_eq!(Blob::new(&[1, 2, 3]).padded::<2>(), None);
        for bad in ["\"0x\"", "\"0x10000000000000000\"", "\"12\"", "\"0x+1\"", "12"] {
            assert!(serde_json::from_str::<Word>(bad).is_err(), "{bad}");
        }
        for bad in ["\"0\"", "\"zz\"", "\"+1\""] {
            assert!(serde_json::from_str::<Blob>(bad).is_err(), "{bad}");
        }
    }
}
