//! What of a line is meant for a reader: not the escapes of a terminal, not the kernel log's own columns.

const ESC: u8 = 0x1b;
const BEL: u8 = 0x07;

/// The line without escape sequences (ECMA-48) and control characters. TAB stays.
pub(super) fn strip(line: &[u8]) -> Vec<u8> {
    let mut kept = Vec::with_capacity(line.len());
    let mut rest = line;
    while let Some((&byte, after)) = rest.split_first() {
        rest = match byte {
            ESC => after_escape(after),
            b'\t' => {
                kept.push(byte);
                after
            }
            byte if byte.is_ascii_control() => after,
            byte => {
                kept.push(byte);
                after
            }
        };
    }
    kept
}

/// What comes after the escape sequence whose ESC has been read. One that is cut off is at most its introducer, so that
/// nothing can hide behind it.
fn after_escape(bytes: &[u8]) -> &[u8] {
    let Some((&kind, after)) = bytes.split_first() else { return bytes };
    match kind {
        // CSI: parameters, intermediates, one final byte.
        b'[' => {
            let body = after.iter().position(|byte| !(0x20..=0x3f).contains(byte));
            match body {
                Some(end) if (0x40..=0x7e).contains(&after[end]) => &after[end + 1..],
                Some(end) => &after[end..],
                None => after,
            }
        }
        // OSC, DCS, SOS, PM, APC: a string up to ST, or BEL as xterm has it.
        b']' | b'P' | b'X' | b'^' | b'_' => {
            let end = after.iter().position(|&byte| byte == BEL || byte == ESC);
            match end {
                Some(end) if after[end] == BEL => &after[end + 1..],
                Some(end) if after.get(end + 1) == Some(&b'\\') => &after[end + 2..],
                _ => after,
            }
        }
        // Two characters, with intermediates between.
        0x20..=0x7e => {
            let end = bytes.iter().position(|byte| !(0x20..=0x2f).contains(byte));
            match end {
                Some(end) if (0x30..=0x7e).contains(&bytes[end]) => &bytes[end + 1..],
                _ => after,
            }
        }
        _ => bytes,
    }
}

/// A stripped line as text: what is not UTF-8 is replaced, and control characters above ASCII go, too.
pub(super) fn lossy(stripped: &[u8]) -> String {
    String::from_utf8_lossy(stripped).chars().filter(|&char| char == '\t' || !char.is_control()).collect()
}

/// The length of what the kernel's log puts before a line: `<6>`, `[    1.234567]`, `[T1]`, one space. 0: nothing.
pub(super) fn log_prefix(line: &str) -> usize {
    let bytes = line.as_bytes();
    let mut at = level(bytes);
    let time = time(&bytes[at..]);
    if time > 0 {
        at += time;
        at += caller(&bytes[at..]);
        at += usize::from(bytes.get(at) == Some(&b' '));
    }
    at
}

/// Where inside of the line a kernel log's line begins, one that has cut in.
pub(super) fn cut_in(line: &str) -> Option<usize> {
    line.match_indices('[').map(|(at, _)| at).find(|&at| at > 0 && time(&line.as_bytes()[at..]) > 0)
}

fn digits(bytes: &[u8]) -> usize {
    bytes.iter().take_while(|byte| byte.is_ascii_digit()).count()
}

/// `<6>`
fn level(bytes: &[u8]) -> usize {
    match bytes.strip_prefix(b"<").map(|rest| (digits(rest), rest)) {
        Some((count @ 1..=3, rest)) if rest.get(count) == Some(&b'>') => count + 2,
        _ => 0,
    }
}

/// `[    1.234567]`
fn time(bytes: &[u8]) -> usize {
    let Some(rest) = bytes.strip_prefix(b"[") else { return 0 };
    let spaces = rest.iter().take_while(|&&byte| byte == b' ').count();
    let seconds = digits(&rest[spaces..]);
    let point = spaces + seconds;
    if seconds == 0 || rest.get(point) != Some(&b'.') || digits(&rest[point + 1..]) != 6 {
        return 0;
    }
    if rest.get(point + 7) == Some(&b']') { point + 9 } else { 0 }
}

/// `[    T1]`: a task or a CPU.
fn caller(bytes: &[u8]) -> usize {
    let Some(rest) = bytes.strip_prefix(b"[") else { return 0 };
    let spaces = rest.iter().take_while(|&&byte| byte == b' ').count();
    if !matches!(rest.get(spaces), Some(b'T' | b'C')) {
        return 0;
    }
    let count = digits(&rest[spaces + 1..]);
    if count > 0 && rest.get(spaces + 1 + count) == Some(&b']') { spaces + count + 3 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(line: &[u8]) -> String {
        lossy(&strip(line))
    }

    #[test]
    fn escapes_and_controls_go() {
        assert_eq!(text(b"\x1b[1;31mred\x1b[0m \x1b]0;title\x07plain\x1b]8;;u\x1b\\link"), "red plainlink");
        assert_eq!(text(b"a\0b\x08c\x7f\td"), "abc\td");
        assert_eq!(text(b"\x1b(Bascii\x1b7\x1bM\x1b[?25h!"), "ascii!");
        assert_eq!(text(b"caf\xc3\xa9 \xff \xc2\x9b31m"), "caf\u{e9} \u{fffd} 31m");
    }

    #[test]
    fn nothing_hides_behind_half_an_escape() {
        assert_eq!(text(b"a\x1b]no end"), "ano end");
        assert_eq!(text(b"a\x1b[12\x01x"), "ax");
        assert_eq!(text(b"a\x1b[12"), "a12");
        assert_eq!(text(b"a\x1bPq\x1b[31mb"), "aqb");
        assert_eq!(text(b"a\x1b"), "a");
    }

    #[test]
    fn prefixes_of_the_kernel_log() {
        for (line, rest) in [
            ("[    0.000000] Linux", "Linux"),
            ("[12345.678901][    T1]     ok 1 x", "    ok 1 x"),
            ("<6>[    1.234567][   C0] y", "y"),
            ("<6>bare", "bare"),
            ("[    1.234567]", ""),
            ("[    1.23456] five digits", "[    1.23456] five digits"),
            ("[ ok ] done", "[ ok ] done"),
            ("<6", "<6"),
            ("", ""),
        ] {
            assert_eq!(&line[log_prefix(line)..], rest, "{line}");
        }
        assert_eq!(cut_in("ok 1 f[    3.200000] random: crng"), Some(6));
        assert_eq!(cut_in("[    3.200000] random: crng"), None);
        assert_eq!(cut_in("a[0] = [b]"), None);
    }

    proptest! {
        #[test]
        fn any_line_is_taken(line in prop::collection::vec(prop_oneof![Just(0x1b), Just(b'['), Just(b']'), any::<u8>()], 0..100)) {
            let text = text(&line);
            prop_assert!(text.chars().all(|char| char == '\t' || !char.is_control()));
            prop_assert!(text.is_char_boundary(log_prefix(&text)));
            prop_assert!(cut_in(&text).is_none_or(|at| text.is_char_boundary(at)));
        }
    }
}
