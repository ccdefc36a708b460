//! Feeds arbitrary text to the parser of lease keys and checks that a key has one text only.

use loden::lease::Subnets;

/// Parses `data` as a key.
///
/// # Panics
///
/// If an accepted text is not the text of its value.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(subnets) = text.parse::<Subnets>() else {
        return;
    };
    assert_eq!(subnets.to_string(), text);
    assert_eq!(Subnets::new(subnets.v4(), subnets.v6()), Some(subnets));
    assert!(subnets.overlaps(&subnets));
}
