//! Owns the decision whether a repeated event gets another log line. Never logs, never reads a clock.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// How many keys are remembered. Beyond it the ones whose interval is over are forgotten, and if there are
/// none, new keys share the silence: a flood of keys is no reason for a flood of lines.
const MAX_KEYS: usize = 1024;

/// Lets one event per key and interval through and counts the others.
#[derive(Debug)]
pub struct RateLimit<K> {
    interval: Duration,
    keys: HashMap<K, Window>,
}

#[derive(Debug)]
struct Window {
    since: Instant,
    suppressed: u64,
}

impl<K: Eq + Hash> RateLimit<K> {
    /// One event per key in `interval`.
    #[must_use]
    pub fn new(interval: Duration) -> Self {
        Self {
            interval,
            keys: HashMap::new(),
        }
    }

    /// `Some(n)` if the event at `now` deserves a line, which then speaks for the `n` suppressed before it.
    pub fn allow(&mut self, key: K, now: Instant) -> Option<u64> {
        if let Some(window) = self.keys.get_mut(&key) {
            if now.saturating_duration_since(window.since) < self.interval {
                window.suppressed = window.suppressed.saturating_add(1);
                return None;
            }
            window.since = now;
            return Some(std::mem::take(&mut window.suppressed));
        }
        if self.keys.len() >= MAX_KEYS {
            let interval = self.interval;
            self.keys
                .retain(|_, window| now.saturating_duration_since(window.since) < interval);
            if self.keys.len() >= MAX_KEYS {
                return None;
            }
        }
        let window = Window {
            since: now,
            suppressed: 0,
        };
        self.keys.insert(key, window);
        Some(0)
    }
}

/// Lets a number of events through in an interval, whatever they are about.
#[derive(Debug)]
pub struct Allowance {
    interval: Duration,
    most: u32,
    since: Option<Instant>,
    used: u32,
}

impl Allowance {
    /// At most `most` events in each `interval`, which begins with its first event.
    #[must_use]
    pub const fn new(most: u32, interval: Duration) -> Self {
        Self {
            interval,
            most,
            since: None,
            used: 0,
        }
    }

    /// Whether the event at `now` deserves a line.
    pub fn allow(&mut self, now: Instant) -> bool {
        let begun = self
            .since
            .is_some_and(|since| now.saturating_duration_since(since) < self.interval);
        if !begun {
            self.since = Some(now);
            self.used = 0;
        }
        let allowed = self.used < self.most;
        self.used += u32::from(allowed);
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(10);

    #[test]
    fn first_event_of_each_key_passes_and_the_next_says_how_many_were_suppressed() {
        let start = Instant::now();
        let mut limit = RateLimit::new(INTERVAL);
        assert_eq!(limit.allow("a", start), Some(0));
        assert_eq!(limit.allow("a", start + INTERVAL / 2), None);
        assert_eq!(limit.allow("b", start + INTERVAL / 2), Some(0));
        assert_eq!(limit.allow("a", start + INTERVAL / 2), None);
        assert_eq!(limit.allow("a", start + INTERVAL), Some(2));
        assert_eq!(limit.allow("a", start + INTERVAL), None);
        assert_eq!(limit.allow("a", start + 2 * INTERVAL), Some(1));
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_lets_nothing_more_through() {
        let start = Instant::now() + INTERVAL;
        let mut limit = RateLimit::new(INTERVAL);
        assert_eq!(limit.allow((), start), Some(0));
        assert_eq!(limit.allow((), start), None);
        assert_eq!(limit.allow((), start - INTERVAL), None);
    }

    #[test]
    fn allowance_is_used_up_and_comes_back_with_the_next_interval() {
        let start = Instant::now();
        let mut allowance = Allowance::new(3, INTERVAL);
        let allowed =
            |allowance: &mut Allowance, at| (0..1000).filter(|_| allowance.allow(at)).count();
        assert_eq!(allowed(&mut allowance, start), 3);
        assert_eq!(allowed(&mut allowance, start + INTERVAL / 2), 0);
        assert_eq!(allowed(&mut allowance, start + INTERVAL), 3);
    }

    #[test]
    fn a_flood_of_keys_is_bounded_in_memory_and_lines_and_recovers() {
        let start = Instant::now();
        let mut limit = RateLimit::new(INTERVAL);
        let passed = (0..10 * MAX_KEYS)
            .filter(|&key| limit.allow(key, start).is_some())
            .count();
        assert_eq!(passed, MAX_KEYS);
        assert_eq!(limit.allow(usize::MAX, start + INTERVAL), Some(0));
        assert_eq!(limit.keys.len(), 1);
    }
}
