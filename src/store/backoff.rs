//! Owns how long to wait before the next attempt. Never waits itself, never reads a clock.

use std::time::Duration;

use super::random::random_below;

/// Pauses that double from a first one up to a cap, each shortened by chance to between a half and the whole
/// of it, so that nodes that lost the same server do not return to it together.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    cap: Duration,
    next: Duration,
}

impl Backoff {
    /// Starts at `first`; no pause is longer than `cap`.
    #[must_use]
    pub fn new(first: Duration, cap: Duration) -> Self {
        let first = first.min(cap);
        Self {
            first,
            cap,
            next: first,
        }
    }

    /// The pause before the next attempt.
    pub fn pause(&mut self) -> Duration {
        self.pause_drawn(random_below)
    }

    /// `below` draws an index below a count.
    fn pause_drawn(&mut self, below: impl FnOnce(usize) -> usize) -> Duration {
        /// How finely chance shortens a pause.
        const STEPS: u32 = 1 << 10;
        let whole = self.next;
        self.next = whole.saturating_mul(2).min(self.cap);
        let drawn = u32::try_from(below(STEPS as usize + 1)).unwrap_or(0);
        whole - whole / 2 * drawn.min(STEPS) / STEPS
    }

    /// The next pause is the first one again: for after a success that lasted.
    pub const fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backoff() -> Backoff {
        Backoff::new(Duration::from_millis(50), Duration::from_secs(1))
    }

    #[test]
    fn pauses_double_up_to_the_cap_and_start_again_after_a_reset() {
        let mut backoff = backoff();
        let whole: Vec<u128> = (0..7)
            .map(|_| backoff.pause_drawn(|_| 0).as_millis())
            .collect();
        assert_eq!(whole, [50, 100, 200, 400, 800, 1000, 1000]);
        backoff.reset();
        assert_eq!(backoff.pause_drawn(|_| 0), Duration::from_millis(50));
    }

    #[test]
    fn chance_takes_at_most_half_of_a_pause() {
        let mut backoff = backoff();
        assert_eq!(backoff.pause_drawn(|n| n - 1), Duration::from_millis(25));
        for _ in 0..1000 {
            let pause = backoff.pause();
            assert!(pause >= Duration::from_millis(50) && pause <= Duration::from_secs(1));
        }
    }

    #[test]
    fn pauses_differ() {
        let mut backoff = backoff();
        let first = backoff.pause();
        backoff.reset();
        assert!((0..100).any(|_| {
            let again = backoff.pause();
            backoff.reset();
            again != first
        }));
    }

    #[test]
    fn a_first_pause_above_the_cap_is_the_cap() {
        let mut backoff = Backoff::new(Duration::MAX, Duration::from_secs(1));
        assert_eq!(backoff.pause_drawn(|_| 0), Duration::from_secs(1));
    }
}
