//! Owns what the last visits of the background prober say about one peer. Pure: times are handed in.

use std::time::{Duration, Instant};

use crate::wire::probe::Reach;

/// Visits that are remembered.
const VISITS: u32 = 8;

/// Visits in a row without an answer, after which a peer is silent.
const SILENT: u32 = 3;

/// Lost visits among those remembered, from which on a peer loses: one may be chance.
const LOSES: u32 = 2;

/// Full-size probes in a row that were lost while short ones were answered, after which only short packets pass.
const NARROW: u8 = 3;

/// What one visit found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visit {
    /// The short probe's round-trip time; none if it was lost.
    pub rtt: Option<Duration>,
    /// It was an echo, because the peer answers no probes.
    pub echo: bool,
    /// Whether a full-size packet got there and back; none if none was sent.
    pub wide: Option<bool>,
    /// The peer's clock less ours, in microseconds.
    pub clock_offset_us: Option<i64>,
}

/// The last visits.
#[derive(Clone, Copy, Debug, Default)]
pub struct History {
    /// One bit for each, the last one lowest; set if it was lost.
    lost: u32,
    count: u32,
    last: Option<(Instant, Visit)>,
    rtt: Option<Duration>,
    clock_offset_us: Option<i64>,
    wide_lost: u8,
    /// The peer has answered a probe of ours at least once.
    has_answered: bool,
    /// Since when the state has been what it is.
    since: Option<Instant>,
}

/// How a peer is reached, in two words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Whether.
    pub reach: Reach,
    /// Short packets pass and long ones do not.
    pub narrow: bool,
}

impl State {
    /// Something is wrong.
    #[must_use]
    pub const fn is_degraded(self) -> bool {
        self.narrow || matches!(self.reach, Reach::Loses | Reach::Silent)
    }
}

impl History {
    /// Takes a visit in; whether the state changed, and from what.
    pub fn note(&mut self, visit: Visit, now: Instant) -> Option<State> {
        let before = self.state();
        self.lost = (self.lost << 1 | u32::from(visit.rtt.is_none())) & ((1 << VISITS) - 1);
        self.count = (self.count + 1).min(VISITS);
        self.last = Some((now, visit));
        self.rtt = visit.rtt.or(self.rtt);
        self.clock_offset_us = visit.clock_offset_us.or(self.clock_offset_us);
        self.has_answered |= visit.rtt.is_some() && !visit.echo;
        match (visit.rtt, visit.wide) {
            (Some(_), Some(false)) => self.wide_lost = self.wide_lost.saturating_add(1),
            (_, Some(true)) => self.wide_lost = 0,
            // A lost short probe says nothing about long ones.
            (None, Some(false)) | (_, None) => {}
        }
        let changed = self.state() != before;
        if changed || self.since.is_none() {
            self.since = Some(now);
        }
        changed.then_some(before)
    }

    /// What the visits say.
    #[must_use]
    pub fn state(&self) -> State {
        let narrow = self.wide_lost >= NARROW;
        let reach = match self.last {
            None => Reach::Unknown,
            // A peer that never said anything is silent sooner: there is no better state to leave.
            Some(_) if self.lost.trailing_ones() >= SILENT.min(self.count) => {
                if self.lost.trailing_ones() >= SILENT {
                    Reach::Silent
                } else {
                    Reach::Unknown
                }
            }
            Some(_) if self.lost.count_ones() >= LOSES => Reach::Loses,
            Some((_, visit)) if visit.echo => Reach::Echoes,
            Some(_) => Reach::Answers,
        };
        State { reach, narrow }
    }

    /// Something may be wrong, and the next visits should tell soon.
    #[must_use]
    pub const fn is_suspect(&self) -> bool {
        self.lost != 0 || self.wide_lost > 0
    }

    /// Lost visits among those remembered, in percent.
    #[must_use]
    pub fn loss_percent(&self) -> u8 {
        let percent = self.lost.count_ones() * 100 / self.count.max(1);
        u8::try_from(percent).unwrap_or(100)
    }

    /// When the last visit was.
    #[must_use]
    pub fn visited(&self) -> Option<Instant> {
        self.last.map(|(at, _)| at)
    }

    /// Since when the state is what it is.
    #[must_use]
    pub const fn since(&self) -> Option<Instant> {
        self.since
    }

    /// Of the last visit that was answered.
    #[must_use]
    pub const fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    /// The peer's clock less ours, in microseconds, as it was last told.
    #[must_use]
    pub const fn clock_offset_us(&self) -> Option<i64> {
        self.clock_offset_us
    }

    /// The peer has answered probes.
    #[must_use]
    pub const fn has_answered(&self) -> bool {
        self.has_answered
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWERED: Visit = Visit {
        rtt: Some(Duration::from_millis(1)),
        echo: false,
        wide: None,
        clock_offset_us: None,
    };
    const LOST: Visit = Visit {
        rtt: None,
        ..ANSWERED
    };

    fn after(visits: &[Visit]) -> History {
        let mut history = History::default();
        let now = Instant::now();
        for (nth, &visit) in (0..).zip(visits) {
            history.note(visit, now + nth * Duration::from_secs(1));
        }
        history
    }

    fn reach(visits: &[Visit]) -> Reach {
        after(visits).state().reach
    }

    #[test]
    fn one_loss_is_chance_two_are_a_loss_and_three_in_a_row_are_silence() {
        assert_eq!(reach(&[]), Reach::Unknown);
        assert_eq!(reach(&[LOST, LOST]), Reach::Unknown);
        assert_eq!(reach(&[LOST; 3]), Reach::Silent);
        assert_eq!(reach(&[ANSWERED]), Reach::Answers);
        assert_eq!(reach(&[ANSWERED, ANSWERED, LOST]), Reach::Answers);
        assert_eq!(reach(&[ANSWERED, LOST, LOST]), Reach::Loses);
        assert_eq!(reach(&[ANSWERED, LOST, ANSWERED, LOST]), Reach::Loses);
        assert_eq!(reach(&[ANSWERED, LOST, LOST, LOST]), Reach::Silent);
        let mut back = vec![LOST; 8];
        back.extend([ANSWERED; 6]);
        assert_eq!(reach(&back), Reach::Loses);
        back.push(ANSWERED);
        assert_eq!(reach(&back), Reach::Answers, "one loss of eight is left");
        assert_eq!(after(&back).loss_percent(), 12);
        assert!(after(&back).is_suspect());
        back.push(ANSWERED);
        assert!(!after(&back).is_suspect());
    }

    #[test]
    fn a_path_is_narrow_when_long_probes_are_lost_and_short_ones_are_not() {
        let wide = |wide| Visit {
            wide: Some(wide),
            ..ANSWERED
        };
        let all_lost = Visit {
            wide: Some(false),
            ..LOST
        };
        assert!(!after(&[wide(false), wide(false)]).state().narrow);
        assert!(
            after(&[wide(false), ANSWERED, wide(false), wide(false)])
                .state()
                .narrow
        );
        assert!(!after(&[all_lost; 5]).state().narrow);
        assert!(
            !after(&[wide(false), wide(false), wide(true), wide(false)])
                .state()
                .narrow
        );
        assert!(after(&[wide(false); 3]).state().is_degraded());
    }

    #[test]
    fn a_change_is_told_once_with_what_was_before_and_its_time() {
        let mut history = after(&[ANSWERED]);
        let now = Instant::now() + Duration::from_secs(10);
        assert_eq!(history.note(ANSWERED, now), None);
        assert_eq!(history.note(LOST, now), None);
        let before = history.note(LOST, now).unwrap();
        assert_eq!(before.reach, Reach::Answers);
        assert_eq!(history.since(), Some(now));
        let later = now + Duration::from_secs(1);
        assert_eq!(history.note(ANSWERED, later), None, "still losing");
        assert_eq!(history.since(), Some(now));
    }

    #[test]
    fn who_only_echoes_is_not_taken_for_one_who_answers() {
        let echo = Visit {
            echo: true,
            ..ANSWERED
        };
        assert_eq!(reach(&[echo, echo]), Reach::Echoes);
        assert!(!after(&[echo]).has_answered());
        assert!(after(&[ANSWERED, echo]).has_answered());
    }
}
