//! Owns the syntax of one line of a dotenv file. Never knows what a key means.

use std::collections::BTreeMap;

/// The longest value after expansion; keeps `A=$B$B`, `B=$C$C` and so on from growing without bound.
const MAX_VALUE_LEN: usize = 4096;

/// A line that is neither empty, nor a comment, nor an assignment.
pub(super) struct NotAnAssignment;

/// Splits a line into its key and its value, unquoted and expanded; `None` for an empty line or a comment.
pub(super) fn assignment<'a>(
    line: &'a str,
    values: &BTreeMap<&str, String>,
) -> Result<Option<(&'a str, String)>, NotAnAssignment> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let line = match line.strip_prefix("export") {
        Some(rest) if rest.starts_with([' ', '\t']) => rest.trim_start(),
        _ => line,
    };
    let (key, value) = line.split_once('=').ok_or(NotAnAssignment)?;
    let key = key.trim_end();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
    if key.is_empty() || !key.chars().all(is_name) {
        return Err(NotAnAssignment);
    }
    let value = value.trim_start();
    let value = match value.chars().next() {
        Some('\'') => quoted(value, '\'')?.to_owned(),
        Some('"') => expand(quoted(value, '"')?, true, values).ok_or(NotAnAssignment)?,
        _ => {
            // A comment starts at a `#` that follows white space.
            let end = value
                .char_indices()
                .zip(value.chars().skip(1))
                .find(|((_, c), next)| c.is_whitespace() && *next == '#')
                .map_or(value.len(), |((at, _), _)| at);
            let bare = if value.starts_with('#') {
                ""
            } else {
                &value[..end]
            };
            expand(bare.trim_end(), false, values).ok_or(NotAnAssignment)?
        }
    };
    Ok(Some((key, value)))
}

/// What stands between the quote at the start of `value` and the next one that is not escaped. Only a comment
/// may follow.
fn quoted(value: &str, quote: char) -> Result<&str, NotAnAssignment> {
    let inner = value.strip_prefix(quote).ok_or(NotAnAssignment)?;
    let mut escaped = false;
    for (at, c) in inner.char_indices() {
        if c == quote && !escaped {
            let (content, rest) = inner.split_at(at);
            let rest = rest.strip_prefix(quote).unwrap_or(rest).trim_start();
            let ends = rest.is_empty() || rest.starts_with('#');
            return if ends {
                Ok(content)
            } else {
                Err(NotAnAssignment)
            };
        }
        escaped = c == '\\' && !escaped;
    }
    Err(NotAnAssignment)
}

/// Replaces `$KEY` and `${KEY}` by earlier values, nothing for unknown ones, and, where `escapes` says so,
/// `\n`, `\r` and other escaped characters. `None` if the result is too long.
fn expand(text: &str, escapes: bool, values: &BTreeMap<&str, String>) -> Option<String> {
    let mut out = String::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        match c {
            '\\' if escapes || rest.starts_with('$') => {
                let next = rest.chars().next().unwrap_or('\\');
                rest = rest.get(next.len_utf8()..).unwrap_or("");
                out.push(match next {
                    'n' => '\n',
                    'r' => '\r',
                    other => other,
                });
            }
            '$' => {
                let (name, after) = variable(rest);
                match name {
                    Some(name) => out.push_str(values.get(name).map_or("", String::as_str)),
                    None => out.push('$'),
                }
                rest = after;
            }
            other => out.push(other),
        }
        if out.len() > MAX_VALUE_LEN {
            return None;
        }
    }
    Some(out)
}

/// Splits the name of a variable off the text behind a `$`.
fn variable(text: &str) -> (Option<&str>, &str) {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let (braced, body) = match text.strip_prefix('{') {
        Some(body) => (true, body),
        None => (false, text),
    };
    let end = body.find(|c| !is_name(c)).unwrap_or(body.len());
    let (name, after) = body.split_at(end);
    match (name.is_empty(), braced, after.strip_prefix('}')) {
        (false, true, Some(after)) => (Some(name), after),
        (false, false, _) => (Some(name), after),
        (true, _, _) | (false, true, None) => (None, text),
    }
}
