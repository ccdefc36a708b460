//! Owns how a daemon's answer is laid out for people, words, sections and tables, and printing it. Never asks for one.

use std::fmt::Write as _;
use std::io::{self, Write as _};

use serde_json::Value;

use crate::debug::socket::clean;

/// Columns of the output, where the longest word allows.
pub(super) const WIDTH: usize = 100;

/// Column at which a section's text begins.
const INDENT: usize = 12;

/// Prints text, of which whoever reads may have seen enough.
///
/// # Errors
/// The system's, which says what was written to.
pub(super) fn print(text: &str) -> io::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(|error| unwritten("standard output", &error)),
    }
}

/// That something was not written, of the same kind.
pub(super) fn unwritten(what: &str, error: &io::Error) -> io::Error {
    let is_full = matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    );
    let room = if is_full {
        ": make room, or write elsewhere"
    } else {
        ""
    };
    io::Error::new(error.kind(), format!("cannot write {what}: {error}{room}"))
}

/// Text that is laid out line by line.
#[derive(Default)]
pub(super) struct Page {
    pub(super) text: String,
}

impl Page {
    /// A title and its text, wrapped at [`WIDTH`] behind the title.
    pub(super) fn section(&mut self, title: &str, text: &str) {
        let mut line = format!("{title:INDENT$}");
        let mut empty = true;
        for word in text.split_whitespace() {
            if !empty && line.chars().count() + 1 + word.chars().count() > WIDTH {
                self.line(&line);
                line = " ".repeat(INDENT);
                empty = true;
            }
            if !empty {
                line.push(' ');
            }
            line.push_str(word);
            empty = false;
        }
        self.line(&line);
    }

    /// A row of the tables: two wide columns and four of numbers.
    pub(super) fn row(&mut self, cells: [&str; 6]) {
        let [name, second, numbers @ ..] = cells;
        let mut line = format!("{name:20} {second:>23}");
        for number in numbers {
            // Writing to a string cannot fail.
            let _infallible = write!(line, " {number:>13}");
        }
        self.line(&line);
    }

    pub(super) fn line(&mut self, line: &str) {
        self.text.push_str(line.trim_end());
        self.text.push('\n');
    }

    pub(super) fn blank(&mut self) {
        self.text.push('\n');
    }
}

/// The items of a list; none of anything else.
pub(super) fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// A value as words: texts without quotes, lists with commas, nothing for null.
pub(super) fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => clean(text),
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(plain).collect();
            items.join(", ")
        }
        other @ (Value::Bool(_) | Value::Number(_) | Value::Object(_)) => other.to_string(),
    }
}
