//! Owns the decision whether a way may be used, from what became of probes on it: proven before it is used, proven again
//! and again while it is, given up soon after it fails, and tried again ever more rarely. Pure: times are handed in.

use std::time::{Duration, Instant};

/// Probes in a row that have to arrive before the way is used.
pub const ARRIVALS: u32 = 3;

/// Probes in a row that have to be lost before it is given up.
pub const LOSSES: u32 = 3;

/// An answer takes no longer: the way is a link.
pub const PATIENCE: Duration = Duration::from_millis(500);

/// Between two probes of a way in use. With [`LOSSES`] times [`PATIENCE`], a way that fails is given up within two and
/// a half seconds.
pub const EVERY: Duration = Duration::from_secs(1);

/// Between two probes of a way that is not in use yet.
const PROVE_EVERY: Duration = Duration::from_millis(100);

/// How long a way that failed is left alone, at first: a node whose lease is new may not answer yet. Each time it is
/// twice as long.
const REST: Duration = Duration::from_secs(1);

/// Likewise a way that was in use, at least, and any way at most.
const REST_AFTER_USE: Duration = Duration::from_secs(5);
const LONGEST_REST: Duration = Duration::from_secs(60);

/// A way that held for so long fails like one that never failed.
const GOOD_REPUTATION: Duration = Duration::from_secs(300);

/// How long it takes from the failure of a way in use until it is given up, at most.
pub const GIVEN_UP_WITHIN: Duration = EVERY.saturating_add(PATIENCE.saturating_mul(LOSSES));

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Not in use; so many in a row arrived.
    Proving { arrived: u32 },
    /// In use.
    Proven { since: Instant },
    /// Not in use, and left alone.
    Resting,
}

/// What is known of one way.
#[derive(Debug, Clone)]
pub struct Proof {
    state: State,
    lost: u32,
    /// When to send the next probe, or to give up waiting for the one that is on its way.
    at: Instant,
    waiting: bool,
    rest: Duration,
    why: Option<String>,
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Wait,
    /// Send a probe.
    Send,
}

impl Proof {
    /// Of a way that nothing is known of.
    #[must_use]
    pub const fn new(now: Instant) -> Self {
        Self {
            state: State::Proving { arrived: 0 },
            lost: 0,
            at: now,
            waiting: false,
            rest: REST,
            why: None,
        }
    }

    /// Whether the way may be used.
    #[must_use]
    pub const fn holds(&self) -> bool {
        matches!(self.state, State::Proven { .. })
    }

    /// Why it may not; none before anything is known.
    #[must_use]
    pub fn why_not(&self) -> Option<&str> {
        self.why.as_deref().filter(|_| !self.holds())
    }

    /// When to call [`step`](Self::step) next.
    #[must_use]
    pub const fn at(&self) -> Instant {
        self.at
    }

    /// What to do now. A probe that was sent before and has no answer is lost.
    pub fn step(&mut self, now: Instant) -> Step {
        if now < self.at {
            return Step::Wait;
        }
        if self.waiting {
            self.lost(now, "no answer");
            if now < self.at {
                return Step::Wait;
            }
        }
        if self.state == State::Resting {
            self.state = State::Proving { arrived: 0 };
            self.lost = 0;
        }
        self.waiting = true;
        self.at = now + PATIENCE;
        Step::Send
    }

    /// The probe on its way has arrived, as it should.
    pub fn arrived(&mut self, now: Instant) {
        if !self.waiting {
            return;
        }
        self.waiting = false;
        self.lost = 0;
        self.state = match self.state {
            State::Proving { arrived } if arrived + 1 >= ARRIVALS => State::Proven { since: now },
            State::Proving { arrived } => State::Proving {
                arrived: arrived + 1,
            },
            other @ (State::Proven { .. } | State::Resting) => other,
        };
        self.at = now
            + match self.state {
                State::Proving { .. } => PROVE_EVERY,
                State::Proven { .. } | State::Resting => EVERY,
            };
    }

    /// The probe on its way could not be sent, or arrived by another way, or is overdue.
    pub fn lost(&mut self, now: Instant, why: &str) {
        if !self.waiting {
            return;
        }
        self.waiting = false;
        self.lost += 1;
        // At once: a failure is to be noticed soon, and a lost packet soon forgotten.
        self.at = now;
        if let State::Proving { arrived } = &mut self.state {
            *arrived = 0;
            self.at = now + PROVE_EVERY;
        }
        if self.lost < LOSSES {
            return;
        }
        if let State::Proven { since } = self.state {
            if now.saturating_duration_since(since) >= GOOD_REPUTATION {
                self.rest = REST;
            }
            self.rest = self.rest.max(REST_AFTER_USE);
        }
        self.why = Some(why.to_owned());
        self.state = State::Resting;
        self.at = now + self.rest;
        self.rest = (self.rest * 2).min(LONGEST_REST);
    }

    /// Something about the way has changed: what was left alone is tried again at once, and what is in use proven
    /// again.
    pub fn hurry(&mut self, now: Instant) {
        if !self.waiting {
            self.at = self.at.min(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A way that works at the times that `works` says, in steps of a millisecond; calls `look` after each.
    fn play(
        proof: &mut Proof,
        begun: Instant,
        millis: u64,
        works: impl Fn(u64) -> bool,
        mut look: impl FnMut(u64, &Proof, bool),
    ) {
        // An answer comes a millisecond after its probe.
        let mut answer_at = None;
        for ms in 0..millis {
            let now = begun + Duration::from_millis(ms);
            if answer_at == Some(ms) {
                proof.arrived(now);
            }
            let sent = proof.step(now) == Step::Send;
            if sent {
                answer_at = works(ms).then_some(ms + 1);
            }
            look(ms, proof, sent);
        }
    }

    #[test]
    fn way_that_works_is_used_after_three_probes_and_goes_on_being_probed() {
        let begun = Instant::now();
        let mut proof = Proof::new(begun);
        let (mut sent, mut used_at) = (0, None);
        play(
            &mut proof,
            begun,
            10_000,
            |_| true,
            |ms, proof, probe| {
                sent += u32::from(probe);
                if proof.holds() && used_at.is_none() {
                    used_at = Some((ms, sent));
                }
            },
        );
        assert_eq!(used_at, Some((203, ARRIVALS)));
        assert_eq!(proof.why_not(), None);
        assert!((12..=13).contains(&sent), "{sent}");
    }

    #[test]
    fn way_that_never_works_is_never_used_and_tried_ever_more_rarely() {
        let begun = Instant::now();
        let mut proof = Proof::new(begun);
        let mut sent = Vec::new();
        play(
            &mut proof,
            begun,
            600_000,
            |_| false,
            |ms, proof, probe| {
                assert!(!proof.holds());
                if probe {
                    sent.push(ms);
                }
            },
        );
        assert_eq!(proof.why_not(), Some("no answer"));
        let tries = sent.len() / 3;
        assert!((10..=16).contains(&tries), "{tries} tries in ten minutes");
    }

    proptest! {
        #[test]
        fn way_in_use_is_given_up_in_time_and_one_lost_probe_gives_nothing_up(
            fails_at in 1_000_u64..9_000,
            lost in proptest::collection::vec(any::<bool>(), 20),
        ) {
            let begun = Instant::now();
            let mut proof = Proof::new(begun);
            let mut given_up = None;
            play(&mut proof, begun, 15_000, |ms| ms < fails_at, |ms, proof, _| {
                if ms > 300 && !proof.holds() && given_up.is_none() {
                    given_up = Some(ms);
                }
            });
            let took = given_up.unwrap() - fails_at;
            prop_assert!(u128::from(took) <= GIVEN_UP_WITHIN.as_millis() + 1, "{}", took);
            prop_assert!(GIVEN_UP_WITHIN < Duration::from_secs(3));

            // Single losses, never more than two in a row, change nothing.
            let mut proof = Proof::new(begun);
            let mut now = begun;
            let mut in_a_row = 0;
            let mut was_used = false;
            for lose in lost.iter().cycle().take(200) {
                while proof.step(now) == Step::Wait {
                    now += Duration::from_millis(10);
                }
                if *lose && in_a_row < LOSSES - 1 && was_used {
                    in_a_row += 1;
                    proof.lost(now, "lost");
                } else {
                    in_a_row = 0;
                    proof.arrived(now);
                }
                was_used |= proof.holds();
                prop_assert!(!was_used || proof.holds());
            }
            prop_assert!(was_used);
        }

        #[test]
        fn way_that_comes_and_goes_is_used_less_and_less(period in 1_000_u64..8_000) {
            let begun = Instant::now();
            let mut proof = Proof::new(begun);
            let (mut changes, mut used) = (0, false);
            play(&mut proof, begun, 600_000, |ms| ms / period % 2 == 0, |_, proof, _| {
                changes += u32::from(proof.holds() != used);
                used = proof.holds();
            });
            // Without rests it would change every period.
            prop_assert!(changes <= 30, "{} changes", changes);
        }
    }

    #[test]
    fn change_of_the_way_has_it_tried_at_once() {
        let begun = Instant::now();
        let mut proof = Proof::new(begun);
        play(&mut proof, begun, 2_000, |_| false, |_, _, _| {});
        let now = begun + Duration::from_secs(2);
        assert!(proof.at() > now && !proof.holds());
        proof.hurry(now);
        assert_eq!(proof.step(now), Step::Send);
    }
}
