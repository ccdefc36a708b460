//! Owns how long to wait before something that failed is tried again. Never waits, never reads a clock.

use std::time::{Duration, Instant};

/// The first wait after the immediate retry.
const FIRST: Duration = Duration::from_millis(100);

/// No wait is longer.
const LONGEST: Duration = Duration::from_secs(5);

/// What held for this long was no failure: the next retry is immediate again.
const HELD: Duration = Duration::from_secs(10);

/// The retries of one thing: the first at once, then after 100 ms, doubling up to 5 s.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    wait: Duration,
    succeeded: Option<Instant>,
}

impl Backoff {
    /// It worked, at `now`.
    pub(super) const fn succeeded(&mut self, now: Instant) {
        self.succeeded = Some(now);
    }

    /// It failed or ended, at `now`: when to try again.
    pub(super) fn failed(&mut self, now: Instant) -> Instant {
        let held = self
            .succeeded
            .take()
            .is_some_and(|since| now.saturating_duration_since(since) >= HELD);
        if held {
            self.wait = Duration::ZERO;
        }
        let at = now + self.wait;
        self.wait = (self.wait * 2).clamp(FIRST, LONGEST);
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_retry_is_immediate_and_later_ones_double_to_the_cap() {
        let now = Instant::now();
        let mut backoff = Backoff::default();
        let waits: Vec<u128> = (0..9)
            .map(|_| (backoff.failed(now) - now).as_millis())
            .collect();
        assert_eq!(waits, [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
    }

    #[test]
    fn only_what_held_for_a_while_earns_another_immediate_retry() {
        let start = Instant::now();
        let mut backoff = Backoff::default();
        assert_eq!(backoff.failed(start), start);
        backoff.succeeded(start);
        let soon = start + HELD / 2;
        assert_eq!(backoff.failed(soon), soon + FIRST);
        backoff.succeeded(soon);
        let late = soon + HELD;
        assert_eq!(backoff.failed(late), late);
    }
}
