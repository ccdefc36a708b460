//! Owns the limit on ICMP errors that we originate (RFC 1812 section 4.3.2.8, RFC 4443 section 2.4 f). Never
//! reads a clock.

/// Errors a second and worker; the kernel's own default for a host is 1000 (`icmp_msgs_per_sec`).
const RATE_PER_MS: u64 = 1;
/// Errors at once after a quiet time; the kernel's default (`icmp_msgs_burst`).
const BURST: u64 = 50;

/// A token bucket.
#[derive(Debug)]
pub struct Limiter {
    tokens: u64,
    last_ms: u64,
}

impl Limiter {
    /// A full bucket.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            tokens: BURST,
            last_ms: 0,
        }
    }

    /// Whether one more error may be sent at `now_ms`.
    pub fn allow(&mut self, now_ms: u64) -> bool {
        let earned = now_ms
            .saturating_sub(self.last_ms)
            .saturating_mul(RATE_PER_MS);
        self.last_ms = self.last_ms.max(now_ms);
        self.tokens = self.tokens.saturating_add(earned).min(BURST);
        match self.tokens.checked_sub(1) {
            Some(left) => {
                self.tokens = left;
                true
            }
            None => false,
        }
    }
}

impl Default for Limiter {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_then_the_rate_holds() {
        let mut limiter = Limiter::new();
        assert_eq!((0..200).filter(|_| limiter.allow(5_000)).count(), 50);
        assert_eq!(
            (1..=100).filter(|ms| limiter.allow(5_000 + ms)).count(),
            100
        );
        assert_eq!((0..200).filter(|_| limiter.allow(5_100)).count(), 0);
    }

    #[test]
    fn a_clock_that_stands_still_or_jumps_earns_at_most_a_burst() {
        let mut limiter = Limiter::new();
        while limiter.allow(0) {}
        assert_eq!((0..1000).filter(|_| limiter.allow(u64::MAX)).count(), 50);
    }
}
