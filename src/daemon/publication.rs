//! Owns when the workers get the next forwarding table: at once after a quiet time, and while changes pour in only so
//! often that making tables leaves the processor to the packets. Counts what that costs and how far it lags. Never
//! makes a table; times are handed in.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::store::Progress;
use crate::telemetry::histogram::{Distribution, Histogram};

/// After a table that took a time to make, none is made for this many times as long: tables take no more than a
/// tenth of one processor, however many leases change.
const REST: u32 = 9;

/// The shortest rest: changes that arrive together go into one table.
const LEAST_REST: Duration = Duration::from_millis(2);

/// The longest, far below the second in which a change has to be in effect: also where a table took long only
/// because the processor was taken away.
const MOST_REST: Duration = Duration::from_millis(100);

/// Buckets for the lag and for the making of a table.
const BOUNDS: &[Duration] = &[
    Duration::from_micros(100),
    Duration::from_micros(500),
    Duration::from_millis(1),
    Duration::from_millis(5),
    Duration::from_millis(10),
    Duration::from_millis(25),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(5),
];

/// The publications of one session.
pub(super) struct Publication {
    /// Something changed that the workers do not know.
    wanted: bool,
    not_before: Instant,
    progress: Arc<Progress>,
    /// The store does not say when its news arrives, so the moment when it is taken from the watch counts.
    unaware: bool,
    /// Events taken from the watch.
    taken: u64,
    lag: Histogram,
    cost: Histogram,
}

impl Publication {
    /// Nothing published yet; `progress` is the store's.
    pub(super) fn new(progress: Option<Arc<Progress>>, now: Instant) -> Self {
        Self {
            wanted: false,
            not_before: now,
            unaware: progress.is_none(),
            progress: progress.unwrap_or_default(),
            taken: 0,
            lag: Histogram::new(BOUNDS),
            cost: Histogram::new(BOUNDS),
        }
    }

    /// One event was taken from the watch. What it means is said next: [`Self::want`] or [`Self::unaffected`].
    pub(super) fn taken(&mut self, now: Instant) {
        self.taken += 1;
        if self.unaware {
            self.progress.news(0, now);
            self.progress.hand_on(now);
        }
    }

    /// The workers need another table.
    pub(super) const fn want(&mut self) {
        self.wanted = true;
    }

    /// The event that was taken last needs no other table than is wanted anyway.
    pub(super) fn unaffected(&self, now: Instant) {
        if !self.wanted {
            self.settle(now);
        }
    }

    /// When to publish; `None` if there is no need.
    pub(super) const fn due(&self) -> Option<Instant> {
        if self.wanted {
            Some(self.not_before)
        } else {
            None
        }
    }

    /// Whether the workers have everything, and nothing new has come for this long.
    pub(super) fn is_quiet(&self, rest: Duration, now: Instant) -> bool {
        !self.wanted && now.saturating_duration_since(self.not_before) >= rest
    }

    /// The workers have a table of everything so far, which was begun and handed over at these times.
    pub(super) fn published(&mut self, begun: Instant, ended: Instant) {
        let cost = ended.saturating_duration_since(begun);
        self.not_before = ended + (cost * REST).clamp(LEAST_REST, MOST_REST);
        self.cost.record(cost);
        self.started(ended);
    }

    /// The workers were started with a table of everything so far.
    pub(super) fn started(&mut self, now: Instant) {
        self.wanted = false;
        self.settle(now);
    }

    /// There are no workers; they will be started with everything.
    pub(super) const fn put_off(&mut self) {
        self.wanted = false;
    }

    fn settle(&self, now: Instant) {
        self.progress
            .in_effect(self.taken, now, |lag| self.lag.record(lag));
    }

    /// How long news took from its arrival until it was in effect.
    pub(super) fn lag(&self) -> Distribution {
        self.lag.read()
    }

    /// What tables cost, from the leases to the workers.
    pub(super) fn cost(&self) -> Distribution {
        self.cost.read()
    }

    /// How far the watch has come.
    pub(super) fn progress(&self) -> &Progress {
        &self.progress
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn new(now: Instant) -> Publication {
        Publication::new(None, now)
    }

    #[test]
    fn change_after_a_quiet_time_is_published_at_once() {
        let start = Instant::now();
        let mut publication = new(start);
        assert_eq!(publication.due(), None);
        publication.taken(start + 5 * MS);
        publication.want();
        assert!(publication.due().unwrap() <= start + 5 * MS);
    }

    #[test]
    fn it_is_quiet_a_while_after_the_last_table_and_not_while_another_is_wanted() {
        let start = Instant::now();
        let mut publication = new(start);
        publication.want();
        assert!(!publication.is_quiet(10 * MS, start + 100 * MS));
        publication.published(start + 100 * MS, start + 101 * MS);
        assert!(!publication.is_quiet(10 * MS, start + 110 * MS));
        // After the rest that the table's making is followed by.
        assert!(publication.is_quiet(10 * MS, start + 120 * MS));
    }

    #[test]
    fn flood_of_changes_leaves_nine_tenths_of_the_time_and_loses_none() {
        let start = Instant::now();
        let mut publication = new(start);
        let cost = 4 * MS;
        let (mut now, mut making) = (start, Duration::ZERO);
        let mut changes = 0;
        while now < start + 10_000 * MS {
            publication.taken(now);
            publication.want();
            changes += 1;
            if publication.due().unwrap() <= now {
                publication.published(now, now + cost);
                (now, making) = (now + cost, making + cost);
            }
            now += MS;
        }
        assert!(making < Duration::from_millis(1000 + 4), "{making:?}");
        assert!(making > Duration::from_millis(900), "{making:?}");
        let due = publication.due().unwrap();
        publication.published(due, due + cost);
        let lag = publication.lag();
        assert_eq!(lag.count, changes, "every event is in effect in the end");
        assert!(lag.longest_seconds <= 0.045, "{lag:?}");
        assert_eq!(publication.progress().oldest(due + cost), Duration::ZERO);
    }

    #[test]
    fn event_that_changes_nothing_is_in_effect_at_once_unless_something_waits() {
        let start = Instant::now();
        let mut publication = new(start);
        publication.taken(start);
        publication.unaffected(start);
        assert_eq!(publication.lag().count, 1);
        publication.taken(start);
        publication.want();
        publication.taken(start + MS);
        publication.unaffected(start + MS);
        assert_eq!(publication.lag().count, 1);
        publication.published(start + 2 * MS, start + 2 * MS);
        assert_eq!(publication.lag().count, 3);
    }

    #[test]
    fn without_workers_nothing_is_due_and_the_lag_goes_on_until_they_start() {
        let start = Instant::now();
        let mut publication = new(start);
        publication.taken(start);
        publication.want();
        publication.put_off();
        assert_eq!(publication.due(), None);
        assert_eq!(publication.progress().oldest(start + 7 * MS), 7 * MS);
        publication.started(start + 9 * MS);
        assert!((publication.lag().sum_seconds - 0.009).abs() < 1e-9);
    }
}
