//! HTML that is put together from parts, each of which is either ours or escaped.

use std::fmt::{self, Display, Write};

/// A page, or a part of one.
#[derive(Debug, Default)]
pub(super) struct Html {
    text: String,
}

impl Html {
    /// Markup of ours, as it is: never what comes from a guest or a file.
    pub(super) fn raw(&mut self, markup: &'static str) -> &mut Self {
        self.text.push_str(markup);
        self
    }

    /// Anything else, as text. Fits between tags and in a quoted attribute's value.
    pub(super) fn text(&mut self, text: impl Display) -> &mut Self {
        // Writing to memory does not fail.
        let _ = write!(Escape(&mut self.text), "{text}");
        self
    }

    /// An element with text in it. `open` has the element's name and attributes.
    pub(super) fn element(&mut self, open: &'static str, text: impl Display) -> &mut Self {
        let name = open.split(' ').next().unwrap_or(open);
        let _ = write!(self.text, "<{open}>");
        self.text(text);
        let _ = write!(self.text, "</{name}>");
        self
    }

    pub(super) fn into_text(self) -> String {
        self.text
    }
}

struct Escape<'a>(&'a mut String);

impl Write for Escape<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for char in text.chars() {
            match char {
                '&' => self.0.push_str("&amp;"),
                '<' => self.0.push_str("&lt;"),
                '>' => self.0.push_str("&gt;"),
                '"' => self.0.push_str("&quot;"),
                '\'' => self.0.push_str("&#39;"),
                // No parser of HTML takes these as they are.
                char if char.is_control() && !matches!(char, '\n' | '\t') => {}
                char => self.0.push(char),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_gets_out_of_its_place() {
        let mut html = Html::default();
        html.element("a title=\"x\"", "</a>\"'&\0\u{1b}\r\n").raw("<br>");
        assert_eq!(html.into_text(), "<a title=\"x\">&lt;/a&gt;&quot;&#39;&amp;\n</a><br>");
    }
}
