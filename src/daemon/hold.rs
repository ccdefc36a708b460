//! Owns how long the routes of a deleted lease live on: long enough for its node to register again, unless
//! somebody claims its subnets. Pure: times are handed in.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::lease::{Lease, LeaseDelta, Subnets};

/// A node whose lease was deleted registers again within this time, if it still runs.
pub(super) const HELD_FOR: Duration = Duration::from_secs(5);

/// Leases that were deleted, and until when they are treated as if they were not.
#[derive(Debug, Default)]
pub(super) struct Hold {
    until: BTreeMap<Subnets, Instant>,
}

impl Hold {
    /// What to do now about `deltas`: all of it, except for deletions, which wait.
    pub(super) fn filter(&mut self, deltas: Vec<LeaseDelta>, now: Instant) -> Vec<LeaseDelta> {
        let mut out = Vec::new();
        for delta in deltas {
            match delta {
                LeaseDelta::Delete(key) => {
                    self.until.entry(key).or_insert(now + HELD_FOR);
                }
                LeaseDelta::Put(lease) => {
                    self.until.remove(&lease.subnets);
                    let claimed: Vec<Subnets> = self
                        .until
                        .keys()
                        .filter(|held| held.overlaps(&lease.subnets))
                        .copied()
                        .collect();
                    for held in claimed {
                        self.until.remove(&held);
                        out.push(LeaseDelta::Delete(held));
                    }
                    out.push(LeaseDelta::Put(lease));
                }
            }
        }
        out
    }

    /// Likewise for a complete listing, given the keys that are known.
    pub(super) fn filter_listing(
        &mut self,
        listing: Vec<Lease>,
        known: impl Iterator<Item = Subnets>,
        now: Instant,
    ) -> Vec<LeaseDelta> {
        let listed: BTreeSet<Subnets> = listing.iter().map(|lease| lease.subnets).collect();
        let gone = known.filter(|key| !listed.contains(key));
        let deletes = gone.map(LeaseDelta::Delete);
        let deltas = deletes.chain(listing.into_iter().map(LeaseDelta::Put));
        self.filter(deltas.collect(), now)
    }

    /// How many leases are held.
    pub(super) fn len(&self) -> usize {
        self.until.len()
    }

    /// When the next hold ends.
    pub(super) fn next(&self) -> Option<Instant> {
        self.until.values().min().copied()
    }

    /// The deletions whose time has come.
    pub(super) fn over(&mut self, now: Instant) -> Vec<LeaseDelta> {
        let over: Vec<Subnets> = self
            .until
            .iter()
            .filter(|(_, until)| **until <= now)
            .map(|(key, _)| *key)
            .collect();
        for key in &over {
            self.until.remove(key);
        }
        over.into_iter().map(LeaseDelta::Delete).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{LeaseAttrs, LeaseExtension};

    fn lease(subnets: &str, node: u8) -> Lease {
        Lease {
            subnets: subnets.parse().unwrap(),
            attrs: LeaseAttrs {
                public_ip: Some(std::net::Ipv4Addr::new(192, 0, 2, node)),
                ..LeaseAttrs::default()
            },
            expires: None,
            extension: LeaseExtension::default(),
        }
    }

    fn delete(subnets: &str) -> LeaseDelta {
        LeaseDelta::Delete(subnets.parse().unwrap())
    }

    #[test]
    fn deletion_takes_effect_after_the_hold_and_not_before() {
        let (mut hold, now) = (Hold::default(), Instant::now());
        assert_eq!(hold.filter(vec![delete("198.18.1.0-24")], now), []);
        assert_eq!(hold.next(), Some(now + HELD_FOR));
        // Said again, it does not start anew.
        hold.filter(vec![delete("198.18.1.0-24")], now + HELD_FOR / 2);
        assert_eq!(hold.over(now + HELD_FOR / 2), []);
        assert_eq!(hold.over(now + HELD_FOR), [delete("198.18.1.0-24")]);
        assert_eq!(hold.next(), None);
    }

    #[test]
    fn node_that_registers_again_was_never_gone() {
        let (mut hold, now) = (Hold::default(), Instant::now());
        let back = LeaseDelta::Put(lease("198.18.1.0-24", 1));
        let deltas = vec![delete("198.18.1.0-24"), back.clone()];
        assert_eq!(hold.filter(deltas, now), [back]);
        assert_eq!(hold.next(), None);
    }

    #[test]
    fn claim_by_another_ends_the_hold_at_once_and_before_the_claim() {
        let (mut hold, now) = (Hold::default(), Instant::now());
        hold.filter(vec![delete("198.18.1.0-24"), delete("198.18.2.0-24")], now);
        let other = LeaseDelta::Put(lease("198.18.1.0-24&fd00:1:0:1::-64", 2));
        let expected = [delete("198.18.1.0-24"), other.clone()];
        assert_eq!(hold.filter(vec![other], now), expected);
        assert_eq!(hold.over(now + HELD_FOR), [delete("198.18.2.0-24")]);
    }

    #[test]
    fn listing_that_lacks_a_known_lease_deletes_it_likewise() {
        let (mut hold, now) = (Hold::default(), Instant::now());
        let known = ["198.18.1.0-24", "198.18.2.0-24"].map(|key| key.parse().unwrap());
        let two = lease("198.18.2.0-24", 2);
        let deltas = hold.filter_listing(vec![two.clone()], known.into_iter(), now);
        assert_eq!(deltas, [LeaseDelta::Put(two)]);
        assert_eq!(hold.over(now + HELD_FOR), [delete("198.18.1.0-24")]);
    }
}
