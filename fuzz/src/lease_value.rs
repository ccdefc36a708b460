//! Feeds arbitrary bytes to the parser of lease values and checks that what it accepts survives its own text.

use loden::lease::LeaseAttrs;

/// Parses `data`; writes and parses again what is accepted.
///
/// # Panics
///
/// If the second reading differs from the first, or its text is not what was written.
pub fn run(data: &[u8]) {
    let Ok(attrs) = LeaseAttrs::parse(data) else {
        return;
    };
    assert!(attrs.node().is_some());
    let json = attrs.to_json();
    match LeaseAttrs::parse(json.as_bytes()) {
        Ok(again) => {
            assert_eq!(again, attrs);
            assert_eq!(again.to_json(), json);
        }
        // Escaping may make a value near the limit longer than it.
        Err(e) => assert!(json.len() > loden::lease::MAX_ATTRS_LEN, "{json}: {e}"),
    }
}
