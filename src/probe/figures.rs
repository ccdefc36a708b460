//! Owns what a round of probes says: loss, round-trip times, reordering, sizes, the other's clock. Pure: times are
//! handed in.

use std::time::Duration;

use serde::Serialize;

use crate::wire::probe::{Heard, Identity, Via};

/// An answer, as it was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Position of the request among those that were sent.
    pub nth: usize,
    /// Since the round began.
    pub at: Duration,
    /// Bytes of its IP packet.
    pub len: u16,
    /// Its TTL as it arrived; 0 where that is not told.
    pub ttl: u8,
    /// What it came in by.
    pub via: Via,
    /// What the other says; none of an echo.
    pub said: Option<Said>,
}

/// What the other says in its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Said {
    /// Bytes of the request's IP packet as it arrived.
    pub len: u16,
    /// The request's TTL as it arrived.
    pub ttl: u8,
    /// What the request came in by.
    pub via: Via,
    /// When the request left, by our wall clock, in nanoseconds since 1970.
    pub left: u64,
    /// When it arrived, by the other's.
    pub arrived: u64,
    /// When the answer left, by the other's.
    pub answered: u64,
    /// What it had heard of us before.
    pub heard: Option<Heard>,
    /// Who it is.
    pub sender: Identity,
}

/// Least, middle and most of some durations, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Spread {
    /// The least.
    pub min: u64,
    /// The middle one.
    pub median: u64,
    /// The most.
    pub max: u64,
}

impl Spread {
    /// Of these; none of none.
    fn of(mut times: Vec<Duration>) -> Option<Self> {
        times.sort_unstable();
        let micros = |time: &Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Some(Self {
            min: times.first().map(micros)?,
            median: times.get(times.len() / 2).map(micros)?,
            max: times.last().map(micros)?,
        })
    }
}

/// What a round says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Figures {
    /// Requests sent.
    pub sent: u32,
    /// Requests that were answered.
    pub answered: u32,
    /// Answers that came after one to a later request.
    pub reordered: u32,
    /// Answers to what had been answered.
    pub duplicated: u32,
    /// Round-trip time without the time the other took, in microseconds.
    pub rtt_us: Option<Spread>,
    /// The other's clock less ours, in microseconds; from the fastest round trip, and wrong by half of that at
    /// most.
    pub clock_offset_us: Option<i64>,
    /// What the requests came in by at the other end.
    pub via_there: Option<&'static str>,
    /// What the answers came in by here.
    pub via_here: Option<&'static str>,
    /// TTL of the requests as they arrived there.
    pub ttl_there: Option<u8>,
    /// TTL of the answers as they arrived here.
    pub ttl_here: Option<u8>,
    /// Bytes of the last request's IP packet as it arrived there.
    #[serde(skip)]
    pub len_there: Option<u16>,
    /// How long the other took to answer, by its own clock, in microseconds.
    #[serde(skip)]
    pub stay_us: Option<Spread>,
    /// What the system said instead of sending, or an ICMP error that came back: the last of them.
    pub refused: Option<String>,
    /// Likewise as its number, to be told apart.
    #[serde(skip)]
    pub errno: Option<i32>,
    /// Who answered.
    #[serde(skip)]
    pub sender: Option<Identity>,
}

impl Figures {
    /// From when each request was sent since the round began, and the answers in the order of their arrival.
    #[must_use]
    pub fn of(sent: &[Duration], replies: &[Reply]) -> Self {
        let mut figures = Self {
            sent: count(sent.len()),
            ..Self::default()
        };
        let mut seen = vec![false; sent.len()];
        let mut latest = None;
        let mut times = Vec::with_capacity(replies.len());
        let mut stays = Vec::with_capacity(replies.len());
        let mut fastest: Option<(Duration, Said)> = None;
        for reply in replies {
            let (Some(&left), Some(seen)) = (sent.get(reply.nth), seen.get_mut(reply.nth)) else {
                continue;
            };
            if std::mem::replace(seen, true) {
                figures.duplicated += 1;
                continue;
            }
            figures.answered += 1;
            if latest > Some(reply.nth) {
                figures.reordered += 1;
            }
            latest = latest.max(Some(reply.nth));
            let mut time = reply.at.saturating_sub(left);
            if let Some(said) = reply.said {
                let stay = Duration::from_nanos(said.answered.saturating_sub(said.arrived));
                time = time.saturating_sub(stay);
                stays.push(stay);
                if fastest.is_none_or(|(fastest, _)| time < fastest) {
                    fastest = Some((time, said));
                }
                figures.via_there = Some(said.via.name());
                figures.ttl_there = Some(said.ttl).filter(|&ttl| ttl > 0);
                figures.len_there = Some(said.len);
                figures.sender = Some(said.sender);
            }
            figures.via_here = Some(reply.via.name());
            figures.ttl_here = Some(reply.ttl).filter(|&ttl| ttl > 0);
            times.push(time);
        }
        figures.rtt_us = Spread::of(times);
        figures.stay_us = Spread::of(stays);
        figures.clock_offset_us = fastest.map(|(time, said)| offset(time, said));
        figures
    }

    /// Requests that were not answered, in percent of those sent, rounded up: a loss is never none.
    #[must_use]
    pub fn loss_percent(&self) -> u8 {
        let lost = self.sent.saturating_sub(self.answered);
        let percent = (lost * 100).div_ceil(self.sent.max(1));
        u8::try_from(percent).unwrap_or(100)
    }
}

/// The other's clock less ours: its time at the middle of its stay less ours at the middle of the round trip.
fn offset(round_trip: Duration, said: Said) -> i64 {
    let arrived_at = i128::from(said.left) + i128::try_from(round_trip.as_nanos() / 2).unwrap_or(0);
    let micros = (i128::from(said.arrived) - arrived_at) / 1000;
    i64::try_from(micros).unwrap_or(i64::MAX)
}

/// Bytes of the longest IP packet that gets through whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Sizes {
    /// The longest that was tried.
    pub tried: u16,
    /// To the other; none if no size gets there.
    pub up: Option<u16>,
    /// From the other; none if no size gets here. No answer is longer than its request, so this is at least that
    /// much where it is as much as `up`.
    pub down: Option<u16>,
    /// A node on the way said that packets were too long, as it should, so senders learn of it.
    pub told: bool,
}

fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn reply(nth: usize, at: Duration) -> Reply {
        Reply {
            nth,
            at,
            len: 100,
            ttl: 63,
            via: Via::Tunnel,
            said: None,
        }
    }

    fn times(count: u32) -> Vec<Duration> {
        (0..count).map(|nth| nth * 10 * MS).collect()
    }

    #[test]
    fn loss_order_and_times_are_those_of_the_round() {
        // Five requests; the second is lost, the fourth overtakes the third, and the first is answered twice.
        let replies = [
            reply(0, 2 * MS),
            reply(3, 31 * MS),
            reply(2, 35 * MS),
            reply(0, 36 * MS),
            reply(4, 43 * MS),
        ];
        let figures = Figures::of(&times(5), &replies);
        assert_eq!((figures.sent, figures.answered), (5, 4));
        assert_eq!((figures.reordered, figures.duplicated), (1, 1));
        assert_eq!(figures.loss_percent(), 20);
        let rtt = figures.rtt_us.unwrap();
        assert_eq!((rtt.min, rtt.median, rtt.max), (1000, 3000, 15000));
        assert_eq!(figures.clock_offset_us, None);
        assert_eq!(figures.via_here, Some("tunnel"));
    }

    #[test]
    fn a_loss_of_less_than_a_percent_is_one() {
        let replies: Vec<Reply> = (0..999).map(|nth| reply(nth, MS)).collect();
        assert_eq!(Figures::of(&times(1000), &replies).loss_percent(), 1);
        assert_eq!(Figures::of(&[], &[]).loss_percent(), 0);
        assert_eq!(Figures::of(&times(3), &[]).loss_percent(), 100);
    }

    #[test]
    fn the_others_clock_is_told_by_the_fastest_round_trip_and_its_own_time_does_not_count() {
        let second = 1_000_000_000;
        // Its clock is an hour ahead, it takes 5 ms to answer, and the way takes 1 ms each.
        let said = |left: u64, way: u64| Said {
            len: 100,
            ttl: 63,
            via: Via::Tunnel,
            left,
            arrived: left + 3600 * second + way,
            answered: left + 3600 * second + way + 5_000_000,
            heard: None,
            sender: Identity::default(),
        };
        let quick = Reply {
            said: Some(said(9 * second, 1_000_000)),
            ..reply(1, 10 * MS + 7 * MS)
        };
        let slow = Reply {
            said: Some(said(8 * second, 40_000_000)),
            ..reply(0, 46 * MS)
        };
        let figures = Figures::of(&times(2), &[quick, slow]);
        assert_eq!(figures.clock_offset_us, Some(3_600_000_000));
        assert_eq!(figures.rtt_us.unwrap().min, 2000);
        let stay = figures.stay_us.unwrap();
        assert_eq!((stay.min, stay.max), (5000, 5000));
        assert_eq!(figures.len_there, Some(100));
        let behind = Said {
            arrived: 0,
            answered: 0,
            ..said(2 * second, 0)
        };
        let reply = Reply {
            said: Some(behind),
            ..reply(0, 2 * MS)
        };
        let figures = Figures::of(&times(1), &[reply]);
        assert_eq!(figures.clock_offset_us, Some(-2_001_000));
    }

    #[test]
    fn an_answer_to_nothing_counts_nothing() {
        let figures = Figures::of(&times(1), &[reply(7, MS)]);
        assert_eq!((figures.answered, figures.duplicated), (0, 0));
    }
}
