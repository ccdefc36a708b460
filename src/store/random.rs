//! Owns chance: enough of it to keep nodes that start together apart. Never good for secrets.

use std::hash::{BuildHasher, RandomState};
use std::time::SystemTime;

/// A random index below `count`, from the seed that the standard library draws for every hasher. Nobody is
/// harmed by guessing it.
pub(super) fn random_below(count: usize) -> usize {
    let random = RandomState::new().hash_one(SystemTime::now());
    let count = u64::try_from(count).unwrap_or(u64::MAX).max(1);
    usize::try_from(random % count).unwrap_or_default()
}
