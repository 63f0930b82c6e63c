//! From bytes to lines.

/// Longest line, in bytes. What is longer becomes several.
pub(super) const MAX_LINE: usize = 4096;

/// Splits a stream of bytes into lines.
///
/// A line ends with LF, CR LF, any number of CR before LF (two terminal drivers in a row), or with CR alone (a
/// progress bar writes its line anew). A CR at the start of a line is none.
#[derive(Debug, Default)]
pub(super) struct Lines {
    partial: Vec<u8>,
    /// The line is over unless LF follows, which belongs to the same end.
    ended: bool,
}

impl Lines {
    /// Takes a byte; gives the lines that are complete with it to `each`, without their ends.
    pub(super) fn push(&mut self, byte: u8, mut each: impl FnMut(&[u8])) {
        match byte {
            b'\r' => self.ended |= !self.partial.is_empty(),
            b'\n' => self.end(each),
            byte => {
                if self.ended || self.partial.len() == MAX_LINE {
                    self.end(&mut each);
                }
                self.partial.push(byte);
            }
        }
    }

    /// The line that is not over yet.
    pub(super) fn partial(&self) -> &[u8] {
        &self.partial
    }

    /// Ends the line that is not over yet, if there is one.
    pub(super) fn finish(&mut self, each: impl FnMut(&[u8])) {
        if !self.partial.is_empty() {
            self.end(each);
        }
    }

    fn end(&mut self, mut each: impl FnMut(&[u8])) {
        self.ended = false;
        each(&self.partial);
        self.partial.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(bytes: &[u8]) -> Vec<String> {
        let (mut lines, mut found) = (Lines::default(), Vec::new());
        for &byte in bytes {
            lines.push(byte, |line| found.push(String::from_utf8_lossy(line).into_owned()));
        }
        lines.finish(|line| found.push(String::from_utf8_lossy(line).into_owned()));
        found
    }

    #[test]
    fn ends_of_lines() {
        assert_eq!(split(b"a\nb\r\nc\r\r\nd\n\re"), ["a", "b", "c", "d", "e"]);
        assert_eq!(split(b"10%\r20%\r\n\r\n\n!"), ["10%", "20%", "", "", "!"]);
        assert_eq!(split(b"\r\n"), [""]);
        assert_eq!(split(b""), [""; 0]);
    }

    #[test]
    fn an_overlong_line_becomes_several() {
        let found = split(&[b'x'; 2 * MAX_LINE + 1]);
        assert_eq!(found.iter().map(String::len).collect::<Vec<_>>(), [MAX_LINE, MAX_LINE, 1]);
    }

    proptest! {
        #[test]
        fn nothing_is_lost(bytes in prop::collection::vec(prop_oneof![Just(b'\r'), Just(b'\n'), any::<u8>()], 0..300)) {
            let (mut lines, mut found) = (Lines::default(), Vec::new());
            for &byte in &bytes {
                lines.push(byte, |line| found.extend_from_slice(line));
                prop_assert!(lines.partial().len() <= MAX_LINE);
            }
            lines.finish(|line| found.extend_from_slice(line));
            let kept: Vec<u8> = bytes.into_iter().filter(|byte| !b"\r\n".contains(byte)).collect();
            prop_assert_eq!(found, kept);
        }
    }
}
