//! Owns what a seed means: the same value of a strategy, always. Tests that play whole programs use it where
//! shrinking would take too long, and name the seed when they fail.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]
#![allow(dead_code, reason = "every test file uses the part that it needs")]

use std::ops::Range;

use proptest::strategy::{Strategy, ValueTree as _};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// The value of a seed.
pub(crate) fn value<S: Strategy>(strategy: &S, seed: u64) -> S::Value {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    strategy.new_tree(&mut runner).unwrap().current()
}

/// The seeds to play: `LODEN_ROUNDS`, or `default`, from `LODEN_SEED` on.
pub(crate) fn seeds(default: u64) -> Range<u64> {
    let number = |name: &str, default: u64| {
        let text = std::env::var_os(name);
        text.map_or(default, |n| n.to_str().unwrap().parse().unwrap())
    };
    let first = number("LODEN_SEED", 0);
    first..first + number("LODEN_ROUNDS", default)
}
