//! Owns how far a watch has come: what has arrived from the store, what of it was handed on, and what of that is in
//! effect. Told by both ends of the watch; never reads a clock, never waits.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Events that are told apart while they wait to take effect. More are taken together, by the oldest of them.
const MARKS: usize = 256;

/// How far one watch has come, from its start on.
///
/// Revisions are those of the store, where it has such a thing; 0 where it has not.
#[derive(Debug, Default)]
pub struct Progress(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The newest revision that the store is known to have.
    newest: i64,
    /// Everything up to this revision has arrived.
    arrived: i64,
    /// When the oldest news arrived that waits to be handed on.
    waiting: Option<Instant>,
    /// How many events were handed on.
    handed_on: u64,
    /// Those of them that are not in effect.
    marks: VecDeque<Mark>,
    /// The revision that is in effect.
    in_effect: i64,
}

/// An event that was handed on.
#[derive(Debug)]
struct Mark {
    /// Its number, from 1.
    event: u64,
    /// When the oldest news in it arrived.
    heard: Instant,
    /// Everything up to this revision is in it, or was before it.
    revision: i64,
}

impl Progress {
    fn state<T>(&self, edit: impl FnOnce(&mut State) -> T) -> T {
        // A panic elsewhere leaves a whole value behind.
        edit(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The store is listed anew: it may have another history, in which revisions are smaller.
    pub fn restart(&self) {
        self.state(|state| state.newest = 0);
    }

    /// The store is at this revision, or beyond.
    pub fn store_is_at(&self, revision: i64) {
        self.state(|state| state.newest = state.newest.max(revision));
    }

    /// News has arrived at `now`, and everything up to `revision` with it.
    pub fn news(&self, revision: i64, now: Instant) {
        self.state(|state| {
            state.arrived = revision;
            state.newest = state.newest.max(revision);
            state.waiting.get_or_insert(now);
        });
    }

    /// Everything up to this revision has arrived, and none of it waits to be handed on.
    pub fn nothing_waits(&self, revision: i64) {
        self.state(|state| {
            state.arrived = revision;
            state.newest = state.newest.max(revision);
            state.waiting = None;
        });
    }

    /// There is no news up to this revision beside what has arrived.
    pub fn complete_to(&self, revision: i64) {
        self.state(|state| {
            state.arrived = state.arrived.max(revision);
            state.newest = state.newest.max(revision);
        });
    }

    /// One event, with everything that has arrived, is about to be handed on.
    pub fn hand_on(&self, now: Instant) {
        self.state(|state| {
            state.handed_on += 1;
            let heard = state.waiting.take().unwrap_or(now);
            let (event, revision) = (state.handed_on, state.arrived);
            let full = state.marks.len() >= MARKS;
            match state.marks.back_mut() {
                Some(last) if full => (last.event, last.revision) = (event, revision),
                _ => state.marks.push_back(Mark {
                    event,
                    heard,
                    revision,
                }),
            }
        });
    }

    /// The first `events` events of the watch are in effect at `now`; `lag` gets the time since the arrival of each
    /// that was not before.
    pub fn in_effect(&self, events: u64, now: Instant, mut lag: impl FnMut(Duration)) {
        self.state(|state| {
            while let Some(mark) = state.marks.pop_front_if(|mark| mark.event <= events) {
                state.in_effect = mark.revision;
                lag(now.saturating_duration_since(mark.heard));
            }
        });
    }

    /// How many revisions of the store are not in effect, as far as is known. In a store that others use too, an
    /// upper bound: their revisions count until the store says that they hold no news for us.
    #[must_use]
    pub fn revisions_behind(&self) -> u64 {
        self.state(|state| {
            let all_in_effect = state.waiting.is_none() && state.marks.is_empty();
            let at = if all_in_effect {
                state.arrived
            } else {
                state.in_effect
            };
            u64::try_from(state.newest - at).unwrap_or_default()
        })
    }

    /// How long the oldest news that is not in effect has been waiting at `now`; zero without any.
    #[must_use]
    pub fn oldest(&self, now: Instant) -> Duration {
        let heard = self.state(|state| {
            let marked = state.marks.front().map(|mark| mark.heard);
            marked.or(state.waiting)
        });
        heard.map_or(Duration::ZERO, |heard| now.saturating_duration_since(heard))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn lags(progress: &Progress, events: u64, now: Instant) -> Vec<Duration> {
        let mut lags = Vec::new();
        progress.in_effect(events, now, |lag| lags.push(lag));
        lags
    }

    #[test]
    fn event_lags_by_the_oldest_news_in_it_and_only_when_it_is_in_effect() {
        let (progress, start) = (Progress::default(), Instant::now());
        progress.news(7, start);
        progress.news(9, start + ms(5));
        assert_eq!(progress.revisions_behind(), 9);
        progress.hand_on(start + ms(6));
        progress.news(10, start + ms(8));
        progress.hand_on(start + ms(9));
        assert_eq!(progress.oldest(start + ms(10)), ms(10));
        assert_eq!(lags(&progress, 1, start + ms(20)), [ms(20)]);
        assert_eq!(progress.revisions_behind(), 1, "10 is not in effect");
        assert_eq!(progress.oldest(start + ms(20)), ms(12));
        assert_eq!(lags(&progress, 2, start + ms(30)), [ms(22)]);
        assert_eq!(progress.revisions_behind(), 0);
        assert_eq!(progress.oldest(start + ms(40)), Duration::ZERO);
        assert!(lags(&progress, 2, start + ms(40)).is_empty());
    }

    #[test]
    fn revisions_of_others_count_until_the_store_says_that_they_are_none_of_ours() {
        let (progress, start) = (Progress::default(), Instant::now());
        progress.news(3, start);
        progress.hand_on(start);
        lags(&progress, 1, start);
        progress.store_is_at(8);
        assert_eq!(progress.revisions_behind(), 5);
        progress.complete_to(8);
        assert_eq!(progress.revisions_behind(), 0);
    }

    #[test]
    fn news_that_came_to_nothing_leaves_no_lag() {
        let (progress, start) = (Progress::default(), Instant::now());
        progress.news(3, start);
        assert_eq!(progress.oldest(start + ms(5)), ms(5));
        progress.nothing_waits(4);
        assert_eq!(progress.oldest(start + ms(9)), Duration::ZERO);
        assert_eq!(progress.revisions_behind(), 0);
    }

    #[test]
    fn flood_that_nobody_takes_is_remembered_by_its_oldest_and_newest() {
        let (progress, start) = (Progress::default(), Instant::now());
        for n in 0..10_000 {
            progress.news(n + 1, start + ms(n.unsigned_abs()));
            progress.hand_on(start + ms(n.unsigned_abs()));
        }
        assert_eq!(progress.revisions_behind(), 10_000);
        assert_eq!(progress.oldest(start + ms(10_000)), ms(10_000));
        let lags = lags(&progress, 10_000, start + ms(10_000));
        assert_eq!((lags.len(), lags[0]), (MARKS, ms(10_000)));
        assert_eq!(progress.revisions_behind(), 0);
    }

    #[test]
    fn store_that_was_restored_to_an_older_revision_is_not_behind() {
        let (progress, start) = (Progress::default(), Instant::now());
        progress.news(100, start);
        progress.hand_on(start);
        lags(&progress, 1, start);
        // A new history: its listing says where it is.
        progress.restart();
        progress.news(4, start);
        progress.hand_on(start);
        lags(&progress, 2, start);
        assert_eq!(progress.revisions_behind(), 0);
    }
}
