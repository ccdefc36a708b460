//! Reads JSON objects by the rules of Go's `encoding/json`, which wrote and reads every document we share with
//! flannel: keys match case-insensitively, a repeated key is decoded each time and the last one wins, `null`
//! leaves a plain value as it was. Never interprets a value beyond its type.

use std::fmt;

use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// The value of one key has the wrong type or text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: expected {expected}, found {found}")]
pub struct FieldError {
    /// The key in its canonical spelling, with the enclosing object's name: `Backend.Port`.
    pub key: String,
    /// What the key takes.
    pub expected: &'static str,
    /// The start of the offending JSON text.
    pub found: String,
}

/// One JSON object: its members in document order, repeats included, values undecoded.
#[derive(Debug)]
pub(crate) struct Object {
    /// What to put before a key in messages: empty, or `Backend.`.
    path: &'static str,
    members: Vec<(String, Box<RawValue>)>,
}

impl Object {
    /// Parses a whole document. The caller bounds the size of `text`.
    pub(crate) fn parse(text: &[u8], path: &'static str) -> Result<Self, serde_json::Error> {
        let mut json = serde_json::Deserializer::from_slice(text);
        let members = json.deserialize_map(Members)?;
        json.end()?;
        Ok(Self { path, members })
    }

    /// Every value given for `key`, in document order.
    pub(crate) fn values(&self, key: &str) -> impl Iterator<Item = &RawValue> {
        self.members
            .iter()
            .filter(move |(k, _)| folds_to(k, key))
            .map(|(_, value)| &**value)
    }

    /// Decodes `key` as a plain Go value: the last one that is not `null`, if any. Every occurrence must
    /// decode.
    pub(crate) fn plain<T: DeserializeOwned>(
        &self,
        key: &str,
        expected: &'static str,
    ) -> Result<Option<T>, FieldError> {
        self.read(key, expected, Null::Skipped, |text| {
            serde_json::from_str(text).ok()
        })
    }

    /// Decodes `key` from a JSON string; `null` does what `null` says.
    pub(crate) fn text<T>(
        &self,
        key: &str,
        expected: &'static str,
        null: Null,
        mut decode: impl FnMut(&str) -> Option<T>,
    ) -> Result<Option<T>, FieldError> {
        self.read(key, expected, null, |text| {
            decode(&serde_json::from_str::<String>(text).ok()?)
        })
    }

    fn read<T>(
        &self,
        key: &str,
        expected: &'static str,
        null: Null,
        mut decode: impl FnMut(&str) -> Option<T>,
    ) -> Result<Option<T>, FieldError> {
        let mut last = None;
        for raw in self.values(key) {
            match (raw.get(), null) {
                ("null", Null::Skipped) => {}
                ("null", Null::Unset) => last = None,
                (text, _) => match decode(text) {
                    Some(value) => last = Some(value),
                    None => return Err(self.refuse(key, expected, text)),
                },
            }
        }
        Ok(last)
    }

    /// The error for a value that is well-formed but not acceptable.
    pub(crate) fn refuse(&self, key: &str, expected: &'static str, found: &str) -> FieldError {
        FieldError {
            key: format!("{}{key}", self.path),
            expected,
            found: excerpt(found),
        }
    }

    /// The keys that match none of `known`, as written, each once.
    pub(crate) fn unknown(&self, known: &[&str]) -> Vec<String> {
        let mut unknown: Vec<String> = Vec::new();
        for (key, _) in &self.members {
            if !known.iter().any(|name| folds_to(key, name)) {
                unknown.push(format!("{}{}", self.path, excerpt(key)));
            }
        }
        unknown.sort_unstable();
        unknown.dedup();
        unknown
    }
}

/// What an explicit `null` means for a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Null {
    /// The type parses itself and does not know `null`.
    Refused,
    /// A pointer: `null` takes an earlier value back.
    Unset,
    /// A plain value: `null` changes nothing.
    Skipped,
}

/// Go's key folding: ASCII case, plus the two non-ASCII letters whose simple case folding is ASCII.
fn folds_to(key: &str, name: &str) -> bool {
    let fold = |c: char| match c {
        '\u{212a}' => 'k',
        '\u{17f}' => 's',
        other => other.to_ascii_lowercase(),
    };
    key.chars().map(fold).eq(name.chars().map(fold))
}

/// At most the first 48 characters, for a message; control characters are escaped so that it stays one line.
fn excerpt(text: &str) -> String {
    const SHOWN: usize = 48;
    let mut shown = String::new();
    for c in text.chars().take(SHOWN) {
        if c.is_control() {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    if text.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

struct Members;

impl<'de> Visitor<'de> for Members {
    type Value = Vec<(String, Box<RawValue>)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = map.next_entry()? {
            members.push(member);
        }
        Ok(members)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_match_whatever_their_case_and_the_last_one_wins() {
        let object = Object::parse(br#"{"a":1,"A":2,"b":3}"#, "").unwrap();
        assert_eq!(object.plain::<u8>("A", "a number"), Ok(Some(2)));
        assert_eq!(object.unknown(&["A"]), ["b"]);
    }

    #[test]
    fn the_kelvin_sign_and_the_long_s_fold_like_in_go() {
        let object = Object::parse("{\"\u{212a}ey\":1,\"Po\u{17f}\":2}".as_bytes(), "").unwrap();
        assert_eq!(object.plain::<u8>("Key", "a number"), Ok(Some(1)));
        assert_eq!(object.plain::<u8>("POS", "a number"), Ok(Some(2)));
    }

    #[test]
    fn an_overwritten_value_must_still_decode() {
        let object = Object::parse(br#"{"a":"x","a":2}"#, "B.").unwrap();
        let error = object.plain::<u8>("a", "a number").unwrap_err();
        assert_eq!(error.to_string(), "B.a: expected a number, found \"x\"");
    }

    #[test]
    fn null_skips_unsets_or_is_refused() {
        let object = Object::parse(br#"{"a":"1","a":null}"#, "").unwrap();
        let read = |null| object.text("a", "a digit", null, |t| t.parse::<u8>().ok());
        assert_eq!(read(Null::Skipped), Ok(Some(1)));
        assert_eq!(read(Null::Unset), Ok(None));
        assert!(read(Null::Refused).is_err());
    }

    #[test]
    fn only_one_whole_object_is_a_document() {
        for bad in [
            "",
            "null",
            "[]",
            "1",
            "{",
            "{}{}",
            "{\"a\":1,}",
            "\u{feff}{}",
        ] {
            assert!(Object::parse(bad.as_bytes(), "").is_err(), "{bad}");
        }
    }
}
