//! Owns what is known of all nodes, and what of it the daemon has not been told yet: keyed by node, so that however
//! much changes meanwhile, only the last state of each is kept. Pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::jiff::Timestamp;

use super::node::{Known, NodeFault, Standing};
use crate::lease::{Lease, LeaseDelta, Subnets};
use crate::store::{Cause, Problem, StoreEvent};

/// Who of several nodes keeps a subnet: ourselves, else the oldest.
type Rank = (bool, Option<Timestamp>, String);

/// All nodes.
#[derive(Debug, Default)]
pub(super) struct View {
    own: String,
    nodes: BTreeMap<String, Known>,
    /// The listing that is under way.
    incoming: Option<BTreeMap<String, Known>>,
    /// Who claims each subnet.
    claims: BTreeMap<Subnets, BTreeSet<Rank>>,
    /// What is wrong, by subject.
    wrong: BTreeMap<String, Cause>,
    /// What the daemon has not been told.
    changed: BTreeSet<Subnets>,
    news: BTreeMap<String, Cause>,
    listed: bool,
    told: bool,
}

impl View {
    pub(super) fn new(own: &str) -> Self {
        Self {
            own: own.to_owned(),
            ..Self::default()
        }
    }

    /// All nodes are about to be listed anew.
    pub(super) fn begin(&mut self) {
        self.incoming = Some(BTreeMap::new());
    }

    /// One of them.
    pub(super) fn list(&mut self, name: String, known: Known) {
        self.incoming.get_or_insert_default().insert(name, known);
    }

    /// Those were all: the others are gone.
    pub(super) fn done(&mut self) {
        let incoming = self.incoming.take().unwrap_or_default();
        let gone = self
            .nodes
            .keys()
            .filter(|name| !incoming.contains_key(*name));
        let gone: Vec<String> = gone.cloned().collect();
        for name in gone {
            self.remove(&name);
        }
        for (name, known) in incoming {
            self.put(name, known);
        }
        self.listed = true;
    }

    /// A node is this now.
    pub(super) fn put(&mut self, name: String, known: Known) {
        let before = self.nodes.get(&name);
        if before == Some(&known) {
            return;
        }
        let subnets = known.lease().map(|lease| lease.subnets);
        let place = (subnets, known.created);
        if before.map(|before| (before.lease().map(|lease| lease.subnets), before.created))
            != Some(place)
        {
            self.withdraw(&name);
        }
        let rank = self.rank(&name, &known);
        self.nodes.insert(name.clone(), known);
        match subnets {
            Some(subnets) => {
                let before = self.owner(&subnets);
                self.claims.entry(subnets).or_default().insert(rank);
                self.judge(&subnets, before.as_deref(), Some(&name));
            }
            None => self.judge_node(&name),
        }
    }

    /// A node is gone.
    pub(super) fn remove(&mut self, name: &str) {
        self.withdraw(name);
        self.nodes.remove(name);
        self.judge_node(name);
    }

    fn rank(&self, name: &str, known: &Known) -> Rank {
        (name != self.own, known.created, name.to_owned())
    }

    fn owner(&self, subnets: &Subnets) -> Option<String> {
        let first = self.claims.get(subnets)?.first();
        first.map(|(_, _, name)| name.clone())
    }

    /// Takes a node's claim away.
    fn withdraw(&mut self, name: &str) {
        let Some(known) = self.nodes.get(name) else {
            return;
        };
        let Some(subnets) = known.lease().map(|lease| lease.subnets) else {
            return;
        };
        let rank = self.rank(name, known);
        let before = self.owner(&subnets);
        if let Some(claims) = self.claims.get_mut(&subnets) {
            claims.remove(&rank);
            if claims.is_empty() {
                self.claims.remove(&subnets);
            }
        }
        self.judge(&subnets, before.as_deref(), None);
    }

    /// A claim on these subnets came, went or changed.
    fn judge(&mut self, subnets: &Subnets, owner_before: Option<&str>, node: Option<&str>) {
        let owner = self.owner(subnets);
        if owner.as_deref() != owner_before || node == owner.as_deref() {
            self.changed.insert(*subnets);
        }
        if owner.as_deref() == owner_before {
            node.into_iter().for_each(|node| self.judge_node(node));
            return;
        }
        let claimants = self.claims.get(subnets).into_iter().flatten();
        let names: Vec<String> = claimants.map(|(_, _, name)| name.clone()).collect();
        for name in names {
            self.judge_node(&name);
        }
    }

    /// Says what is wrong with a node now.
    fn judge_node(&mut self, name: &str) {
        let fault = match self.nodes.get(name).map(|known| &known.standing) {
            None | Some(Standing::None) => None,
            Some(Standing::Refused(fault)) => Some(fault.clone()),
            Some(Standing::Member(lease)) => match self.owner(&lease.subnets) {
                Some(owner) if owner != name => Some(NodeFault::Claimed {
                    subnets: lease.subnets,
                    owner,
                }),
                _ => None,
            },
        };
        self.say(format!("node {name}"), fault.map(Cause::Node));
    }

    /// Something is wrong, or no longer.
    pub(super) fn say(&mut self, subject: String, cause: Option<Cause>) {
        match cause {
            Some(cause) if self.wrong.get(&subject) == Some(&cause) => {}
            Some(cause) => {
                self.wrong.insert(subject.clone(), cause.clone());
                self.news.insert(subject, cause);
            }
            None => {
                if self.wrong.remove(&subject).is_some() {
                    self.news.insert(subject, Cause::Solved);
                }
            }
        }
    }

    /// Something happened that is over already.
    pub(super) fn mention(&mut self, subject: String, cause: Cause) {
        self.news.insert(subject, cause);
    }

    /// Whether all nodes have been listed once.
    pub(super) const fn is_listed(&self) -> bool {
        self.listed
    }

    /// Whether there is something that the daemon has not been told.
    pub(super) fn has_news(&self) -> bool {
        self.listed && (!self.told || !self.changed.is_empty() || !self.news.is_empty())
    }

    fn lease(&self, subnets: &Subnets) -> Option<&Lease> {
        self.nodes.get(&self.owner(subnets)?)?.lease()
    }

    /// What the daemon has not been told.
    pub(super) fn tell(&mut self) -> StoreEvent {
        let changed = std::mem::take(&mut self.changed);
        let news = std::mem::take(&mut self.news);
        if !std::mem::replace(&mut self.told, true) {
            let leases = self.claims.keys().filter_map(|subnets| self.lease(subnets));
            return StoreEvent::Snapshot {
                leases: leases.cloned().collect(),
                problems: problems(self.wrong.clone()),
            };
        }
        // What moved is taken away before it is put elsewhere.
        let (put, gone): (Vec<Subnets>, Vec<Subnets>) = changed
            .into_iter()
            .partition(|subnets| self.claims.contains_key(subnets));
        let gone = gone.into_iter().map(LeaseDelta::Delete);
        let put = put
            .iter()
            .filter_map(|subnets| self.lease(subnets).cloned());
        StoreEvent::Delta {
            deltas: gone.chain(put.map(LeaseDelta::Put)).collect(),
            problems: problems(news),
        }
    }
}

fn problems(by_subject: BTreeMap<String, Cause>) -> Vec<Problem> {
    by_subject
        .into_iter()
        .map(|(subject, cause)| Problem { subject, cause })
        .collect()
}

#[cfg(test)]
mod tests;
