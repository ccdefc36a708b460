//! Owns histograms of durations that one thread or many record and anybody reads. Never reads a clock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;

/// How often something took how long. Recording is two or three relaxed atomic additions: cheap, but not meant for
/// every packet.
#[derive(Debug)]
pub struct Histogram {
    /// Upper bounds, included, ascending.
    bounds: &'static [Duration],
    /// One per bound, and one for what is longer than all.
    counts: Box<[AtomicU64]>,
    sum_nanos: AtomicU64,
    longest_nanos: AtomicU64,
}

/// A histogram at one moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Distribution {
    /// How many durations were recorded.
    pub count: u64,
    /// Their sum, in seconds.
    pub sum_seconds: f64,
    /// The longest, in seconds.
    pub longest_seconds: f64,
    /// How many lie in each bucket, and not in one before it.
    pub buckets: Vec<Bucket>,
}

/// A part of a distribution.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bucket {
    /// The longest duration that belongs to it, in seconds; none for the last bucket, which takes the rest.
    pub up_to_seconds: Option<f64>,
    /// How many.
    pub count: u64,
}

impl Histogram {
    /// An empty one with these upper bounds, which ascend.
    #[must_use]
    pub fn new(bounds: &'static [Duration]) -> Self {
        Self {
            bounds,
            counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(),
            sum_nanos: AtomicU64::new(0),
            longest_nanos: AtomicU64::new(0),
        }
    }

    /// Adds one duration.
    pub fn record(&self, took: Duration) {
        let bucket = self.bounds.partition_point(|bound| *bound < took);
        if let Some(count) = self.counts.get(bucket) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.sum_nanos.fetch_add(nanos, Ordering::Relaxed);
        self.longest_nanos.fetch_max(nanos, Ordering::Relaxed);
    }

    /// What was recorded so far. Of a duration that is being recorded, the sum may lack what its bucket has.
    #[must_use]
    pub fn read(&self) -> Distribution {
        let bounds = self.bounds.iter().map(|bound| Some(bound.as_secs_f64()));
        let buckets: Vec<Bucket> = bounds
            .chain([None])
            .zip(&self.counts)
            .map(|(up_to_seconds, count)| Bucket {
                up_to_seconds,
                count: count.load(Ordering::Relaxed),
            })
            .collect();
        let seconds = |nanos: &AtomicU64| {
            let nanos = nanos.load(Ordering::Relaxed);
            Duration::from_nanos(nanos).as_secs_f64()
        };
        Distribution {
            count: buckets.iter().map(|bucket| bucket.count).sum(),
            sum_seconds: seconds(&self.sum_nanos),
            longest_seconds: seconds(&self.longest_nanos),
            buckets,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: &[Duration] = &[Duration::from_micros(1), Duration::from_millis(1)];

    #[test]
    fn duration_lies_in_the_first_bucket_whose_bound_it_does_not_exceed() {
        let histogram = Histogram::new(BOUNDS);
        for nanos in [0, 999, 1_000, 1_001, 1_000_000, 1_000_001, u64::MAX / 2] {
            histogram.record(Duration::from_nanos(nanos));
        }
        let read = histogram.read();
        let bucket = |up_to_seconds, count| Bucket {
            up_to_seconds,
            count,
        };
        let expected = [
            bucket(Some(0.000_001), 3),
            bucket(Some(0.001), 2),
            bucket(None, 2),
        ];
        assert_eq!(read.buckets, expected);
        assert_eq!(read.count, 7);
    }

    #[test]
    fn nothing_that_many_threads_record_is_lost() {
        let histogram = Histogram::new(BOUNDS);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for micros in 1..=1_000 {
                        histogram.record(Duration::from_micros(micros));
                    }
                });
            }
        });
        let read = histogram.read();
        assert_eq!((read.count, read.buckets[2].count), (4_000, 0));
        // Gauss, in seconds.
        assert!((read.sum_seconds - 4.0 * 500_500e-6).abs() < 1e-9);
        assert!((read.longest_seconds - 1e-3).abs() < 1e-12);
    }
}
