//! Lines of programs that the kernel's log has cut in two.
//!
//! A program's output waits in the serial driver's buffer while the kernel prints straight to the port:
//!
//! ```text
//!     ok 3 fo[    4.100000] random: crng init done
//!     rk and exec
//! ```
//!
//! Only what begins like a result is put together again; other lines may well quote a log.

use super::syntax::{self, Syntax};
use super::text;

/// Most lines of the log between the two halves.
const MAX_BETWEEN: u32 = 16;

/// Holds the first half until the second comes.
#[derive(Debug, Default)]
pub(super) struct Mender {
    half: Option<String>,
    between: u32,
}

impl Mender {
    /// Takes a line as it was printed; gives those that it makes.
    pub(super) fn mend(&mut self, line: &str) -> Vec<String> {
        if let Some((head, cut)) = self.cut(line) {
            let mut made: Vec<_> = self.finish();
            made.push(cut.to_owned());
            (self.half, self.between) = (Some(head.to_owned()), 0);
            return made;
        }
        let of_the_log = text::log_prefix(line) > 0;
        match self.half.take() {
            None => vec![line.to_owned()],
            Some(half) if of_the_log && self.between < MAX_BETWEEN => {
                self.between += 1;
                self.half = Some(half);
                vec![line.to_owned()]
            }
            Some(half) if of_the_log || is_whole(line) => vec![half, line.to_owned()],
            Some(half) => vec![half + line],
        }
    }

    /// The half whose other half never came.
    pub(super) fn finish(&mut self) -> Vec<String> {
        self.half.take().into_iter().collect()
    }

    /// The two parts of a line that the log has cut into.
    fn cut<'a>(&self, line: &'a str) -> Option<(&'a str, &'a str)> {
        let at = text::cut_in(line).filter(|_| text::log_prefix(line) == 0)?;
        let (head, cut) = line.split_at(at);
        let start = head.trim_start_matches(['#', ' ']);
        let begins = |word: &str| word.starts_with(start) || start.starts_with(word);
        (!start.is_empty() && (begins("ok ") || begins("not ok "))).then_some((head, cut))
    }
}

/// A line that is something by itself.
fn is_whole(line: &str) -> bool {
    !matches!(syntax::parse(line.trim_start()), Syntax::Other)
}
