//! Owns what the watch has found and its receiver has not heard: merges it while the receiver is busy, and keeps an
//! outage from filling the log. Never waits.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::failure::Failures;
use super::view::View;
use crate::lease::{LeaseDelta, Subnets};
use crate::store::{Cause, LostTo, Problem, StoreEvent};

/// How often an outage is reported at most, and then only if its cause has changed.
const REPORT_AGAIN: Duration = Duration::from_secs(60);

/// Changes that may wait beyond one per lease; then a snapshot says the same.
const WAITING: usize = 1000;

/// What is not yet handed on.
pub(super) struct News {
    /// The store, for messages.
    location: String,
    snapshot: bool,
    deltas: Vec<LeaseDelta>,
    problems: BTreeMap<String, Cause>,
    /// The subjects of what the receiver has heard to be wrong, and not to be solved.
    heard: BTreeSet<String>,
    lost: Option<StoreEvent>,
    outage: Outage,
}

#[derive(Default)]
struct Outage {
    since: Option<Instant>,
    /// When one was reported last, and what was said.
    reported: Option<(Instant, String)>,
    /// This one was reported.
    said: bool,
}

impl News {
    pub(super) fn new(location: String) -> Self {
        Self {
            location,
            snapshot: false,
            deltas: Vec::new(),
            problems: BTreeMap::new(),
            heard: BTreeSet::new(),
            lost: None,
            outage: Outage::default(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        !self.snapshot && self.deltas.is_empty() && self.problems.is_empty() && self.lost.is_none()
    }

    /// Everything was listed anew.
    pub(super) fn replaced(&mut self) {
        self.snapshot = true;
        self.deltas.clear();
    }

    /// These changes came, and now there are `leases`.
    pub(super) fn changed(&mut self, deltas: Vec<LeaseDelta>, leases: usize) {
        if self.snapshot {
            return;
        }
        self.deltas.extend(deltas);
        if self.deltas.len() > leases + WAITING {
            self.replaced();
        }
    }

    /// These are newly wrong, or solved.
    pub(super) fn found(&mut self, problems: BTreeMap<String, Cause>) {
        for (subject, cause) in problems {
            if cause == Cause::Solved {
                self.solved(subject);
            } else {
                self.problems.insert(subject, cause);
            }
        }
    }

    /// What nobody has heard of need not be taken back.
    fn solved(&mut self, subject: String) {
        if self.heard.contains(&subject) {
            self.problems.insert(subject, Cause::Solved);
        } else {
            self.problems.remove(&subject);
        }
    }

    /// Somebody else wrote our own key in our name.
    pub(super) fn twin(&mut self, key: &str, node: IpAddr) {
        self.problems.insert(ours(key), Cause::Twin(node));
    }

    /// What stands under our own key is nobody's lease, or no longer so.
    pub(super) fn own_is_damaged(&mut self, key: &str, damaged: bool) {
        if damaged {
            self.problems.insert(ours(key), Cause::Overwritten);
        } else {
            self.solved(ours(key));
        }
    }

    /// Our lease is lost.
    pub(super) fn lost(&mut self, key: &str, subnets: Subnets, to: LostTo) {
        self.solved(ours(key));
        self.lost = Some(StoreEvent::OwnLost { subnets, to });
    }

    pub(super) const fn is_away(&self) -> bool {
        self.outage.since.is_some()
    }

    /// The store is away: said once, and again only after a while and for another cause.
    pub(super) fn away(&mut self, failures: &Failures, now: Instant) {
        let outage = &mut self.outage;
        outage.since.get_or_insert(now);
        let text = failures.to_string();
        let quiet = outage.reported.as_ref().is_some_and(|(at, before)| {
            now.duration_since(*at) < REPORT_AGAIN || (outage.said && *before == text)
        });
        if !quiet {
            outage.said = true;
            outage.reported = Some((now, text.clone()));
            self.problems
                .insert(self.location.clone(), Cause::Away(text));
        }
    }

    /// The store is back.
    pub(super) fn back(&mut self, endpoint: &str) {
        let since = self.outage.since.take();
        if std::mem::take(&mut self.outage.said) {
            self.solved(self.location.clone());
            let seconds = since.map_or(0, |since| since.elapsed().as_secs());
            tracing::info!(endpoint, seconds, "the store is back");
        }
    }

    /// Hands on one event. A loss comes after the state that goes with it.
    pub(super) fn hand_on(&mut self, permit: mpsc::Permit<'_, StoreEvent>, view: &View) {
        let found = std::mem::take(&mut self.problems);
        for (subject, cause) in &found {
            if *cause == Cause::Solved {
                self.heard.remove(subject);
            } else {
                self.heard.insert(subject.clone());
            }
        }
        let problems: Vec<Problem> = found
            .into_iter()
            .map(|(subject, cause)| Problem { subject, cause })
            .collect();
        let deltas = std::mem::take(&mut self.deltas);
        if std::mem::take(&mut self.snapshot) {
            let leases = view.leases();
            permit.send(StoreEvent::Snapshot { leases, problems });
        } else if !deltas.is_empty() || !problems.is_empty() {
            permit.send(StoreEvent::Delta { deltas, problems });
        } else if let Some(lost) = self.lost.take() {
            permit.send(lost);
        }
    }
}

/// Our own key, told from what a key says of itself.
fn ours(key: &str) -> String {
    format!("{key} (ours)")
}

#[cfg(test)]
mod tests {
    use super::super::failure::{Failure, FailureCause};
    use super::super::keys::Keys;
    use super::*;

    /// The causes of one event.
    fn hand_on(news: &mut News) -> Vec<Cause> {
        let (sender, mut receiver) = mpsc::channel(1);
        news.hand_on(sender.try_reserve().unwrap(), &View::new(Keys::new("/n")));
        match receiver.try_recv() {
            Ok(StoreEvent::Delta { problems, .. }) => {
                problems.into_iter().map(|problem| problem.cause).collect()
            }
            Ok(other) => unreachable!("{other:?}"),
            Err(_nothing) => Vec::new(),
        }
    }

    fn failures(cause: FailureCause) -> Failures {
        let endpoint = "http://192.0.2.1:2379".to_owned();
        Failure { endpoint, cause }.into()
    }

    #[test]
    fn an_outage_is_said_once_a_minute_at_most_and_only_if_its_cause_changes() {
        let mut news = News::new("etcd".to_owned());
        let start = Instant::now();
        let mut said = Vec::new();
        for second in 0..300 {
            let cause = if second % 2 == 0 || second < 200 {
                FailureCause::Refused
            } else {
                FailureCause::NoLeader
            };
            news.away(&failures(cause), start + Duration::from_secs(second));
            if !std::mem::take(&mut news.problems).is_empty() {
                said.push(second);
            }
        }
        assert_eq!(said, [0, 201, 262]);
        news.back("e");
        assert!(!news.is_away());
    }

    #[test]
    fn a_store_that_comes_and_goes_does_not_fill_the_log_either() {
        let mut news = News::new("etcd".to_owned());
        let start = Instant::now();
        let mut said = Vec::new();
        for second in 0..120 {
            let now = start + Duration::from_secs(second);
            news.away(&failures(FailureCause::Refused), now);
            said.extend(hand_on(&mut news));
            news.back("e");
            said.extend(hand_on(&mut news));
        }
        let away = || {
            Cause::Away(
                "http://192.0.2.1:2379: connection refused: is etcd running there?".to_owned(),
            )
        };
        assert_eq!(said, [away(), Cause::Solved, away(), Cause::Solved]);
    }

    #[test]
    fn what_nobody_has_heard_of_is_not_taken_back() {
        let mut news = News::new("etcd".to_owned());
        news.away(&failures(FailureCause::Refused), Instant::now());
        news.found(BTreeMap::from([("key".to_owned(), Cause::NotRegular)]));
        news.back("e");
        news.found(BTreeMap::from([("key".to_owned(), Cause::Solved)]));
        assert!(news.is_empty());
    }

    #[test]
    fn too_many_changes_become_one_snapshot() {
        let mut news = News::new("etcd".to_owned());
        let view = View::new(Keys::new("/n"));
        let delta = || LeaseDelta::Delete("198.18.1.0-24".parse().unwrap());
        for _ in 0..=WAITING {
            assert!(!news.snapshot);
            news.changed(vec![delta()], 0);
        }
        let (sender, mut receiver) = mpsc::channel(1);
        news.hand_on(sender.try_reserve().unwrap(), &view);
        let empty = StoreEvent::Snapshot {
            leases: Vec::new(),
            problems: Vec::new(),
        };
        assert_eq!(receiver.try_recv().unwrap(), empty);
        assert!(news.is_empty());
    }
}
