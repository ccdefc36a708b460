//! Owns the set of peers' leases: turns what a store says, snapshot or delta, into an ordered list of changes,
//! and refuses leases that would take addresses from somebody else. Never reads a clock: expiry is the store's.

use std::collections::{BTreeMap, BTreeSet};

use super::{Lease, Subnets};
use crate::addr::OverlayPrefix;
use crate::config::{NetworkConfig, SubnetPool};

/// What the store says about one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseDelta {
    /// The lease exists and looks like this.
    Put(Lease),
    /// The lease is gone.
    Delete(Subnets),
}

/// What has to be done about one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseChange {
    /// A peer to program.
    Added(Lease),
    /// A peer to program anew: something other than the expiry differs.
    Updated {
        /// As programmed now.
        old: Lease,
        /// As it should be.
        new: Lease,
    },
    /// A peer to withdraw, as programmed now.
    Removed(Lease),
}

/// What a batch led to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Applied {
    /// Removals, then updates, then additions, each in the order of their keys: a subnet that changes hands is
    /// free before it is taken.
    pub changes: Vec<LeaseChange>,
    /// Leases refused that were not offered before, looked otherwise, or were refused for another reason.
    pub refused: Vec<Refused>,
}

/// A lease that is not admitted, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("lease {} of {} is refused: {reason}", lease.subnets, node_text(lease))]
pub struct Refused {
    /// The lease.
    pub lease: Lease,
    /// Why.
    pub reason: Refusal,
}

/// Why a lease is not admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It has a subnet in no family of the network.
    #[error("it has no subnet in a family that the network enables")]
    NoEnabledFamily,
    /// A subnet lies outside the network.
    #[error("{subnet} lies outside the network {network}")]
    OutsideNetwork {
        /// The subnet.
        subnet: String,
        /// The network.
        network: String,
    },
    /// A subnet is larger than a node may have.
    #[error("{subnet} is larger than a node's share, /{subnet_len}")]
    TooLarge {
        /// The subnet.
        subnet: String,
        /// `SubnetLen` or `IPv6SubnetLen`.
        subnet_len: u8,
    },
    /// It overlaps the subnets of this node.
    #[error("it overlaps our own {own}")]
    OverlapsOwn {
        /// This node's subnets.
        own: Subnets,
    },
    /// It overlaps a lease admitted before.
    #[error("it overlaps the live lease {with}")]
    OverlapsPeer {
        /// That lease.
        with: Subnets,
    },
}

fn node_text(lease: &Lease) -> String {
    lease
        .attrs
        .node()
        .map_or_else(|| "an unknown node".to_owned(), |node| node.to_string())
}

/// The leases of the peers of one node.
///
/// A lease is admitted if its subnets lie in the network, are no larger than a node's share, and overlap neither
/// our own nor an admitted lease. What is admitted stays so until the store withdraws it, whatever else is
/// offered; what is refused is admitted, in the order of keys, once nothing stands against it.
#[derive(Debug, Clone)]
pub struct LeaseSet {
    own: Subnets,
    v4: Option<Share>,
    v6: Option<Share>,
    admitted: BTreeMap<Subnets, Lease>,
    refused: BTreeMap<Subnets, Refused>,
    /// What the admitted leases occupy, per family.
    taken_v4: Occupied,
    taken_v6: Occupied,
}

impl LeaseSet {
    /// An empty set for the node that leases `own`, in the network of `config`.
    #[must_use]
    pub fn new(own: Subnets, config: &NetworkConfig) -> Self {
        Self {
            own,
            v4: config.ipv4.as_ref().map(Share::of),
            v6: config.ipv6.as_ref().map(Share::of),
            admitted: BTreeMap::new(),
            refused: BTreeMap::new(),
            taken_v4: Occupied::default(),
            taken_v6: Occupied::default(),
        }
    }

    /// The subnets of this node.
    #[must_use]
    pub const fn own(&self) -> Subnets {
        self.own
    }

    /// The admitted leases, in the order of their keys.
    pub fn leases(&self) -> impl ExactSizeIterator<Item = &Lease> {
        self.admitted.values()
    }

    /// The leases that are refused now, in the order of their keys.
    pub fn refused(&self) -> impl ExactSizeIterator<Item = &Refused> {
        self.refused.values()
    }

    /// Makes the set what a complete listing says. Our own key in it is ignored; of a repeated key the last
    /// lease counts.
    pub fn apply_snapshot(&mut self, listing: Vec<Lease>) -> Applied {
        let listed: BTreeSet<Subnets> = listing.iter().map(|lease| lease.subnets).collect();
        let gone = self.admitted.keys().chain(self.refused.keys());
        let gone: Vec<Subnets> = gone.filter(|key| !listed.contains(key)).copied().collect();
        let deletes = gone.into_iter().map(LeaseDelta::Delete);
        self.apply_delta(deletes.chain(listing.into_iter().map(LeaseDelta::Put)))
    }

    /// Applies changes in the order in which they happened. A key that appears twice ends as its last change
    /// says and is reported at most once.
    pub fn apply_delta(&mut self, deltas: impl IntoIterator<Item = LeaseDelta>) -> Applied {
        let mut offered: BTreeMap<Subnets, Option<Lease>> = BTreeMap::new();
        for delta in deltas {
            let (key, lease) = match delta {
                LeaseDelta::Put(lease) => (lease.subnets, Some(lease)),
                LeaseDelta::Delete(key) => (key, None),
            };
            offered.insert(key, lease);
        }
        offered.remove(&self.own);

        let mut removed = Vec::new();
        let mut freed = BTreeSet::new();
        let mut updated = Vec::new();
        let mut candidates = BTreeMap::new();
        for (key, lease) in offered {
            match lease {
                Some(new) => match self.admitted.get_mut(&key) {
                    Some(held) => {
                        let old = std::mem::replace(held, new.clone());
                        if old.differs(&new) {
                            updated.push(LeaseChange::Updated { old, new });
                        }
                    }
                    None => {
                        candidates.insert(key, new);
                    }
                },
                None => {
                    self.refused.remove(&key);
                    if let Some(lease) = self.withdraw(&key) {
                        freed.insert(key);
                        removed.push(LeaseChange::Removed(lease));
                    }
                }
            }
        }
        if !freed.is_empty() {
            // Whoever was refused for one of them may have a chance now. There may be thousands of others.
            for (key, waiting) in &self.refused {
                if matches!(waiting.reason, Refusal::OverlapsPeer { with } if freed.contains(&with))
                {
                    candidates
                        .entry(*key)
                        .or_insert_with(|| waiting.lease.clone());
                }
            }
        }

        let (added, refused) = self.admit(candidates);
        let mut changes = removed;
        changes.append(&mut updated);
        changes.extend(added.into_iter().map(LeaseChange::Added));
        Applied { changes, refused }
    }

    /// Moves the node to other subnets, or into another network: what no longer fits is removed, what fits now
    /// is added. For the moment after our own lease was lost.
    pub fn rebase(&mut self, own: Subnets, config: &NetworkConfig) -> Applied {
        let before = std::mem::replace(self, Self::new(own, config));
        let mut applied = Applied::default();
        for (key, lease) in before.admitted {
            if key == own {
                applied.changes.push(LeaseChange::Removed(lease));
            } else if let Err(reason) = self.judge(&lease) {
                applied.changes.push(LeaseChange::Removed(lease.clone()));
                let refused = Refused { lease, reason };
                applied.refused.push(refused.clone());
                self.refused.insert(key, refused);
            } else {
                self.hold(lease);
            }
        }
        let mut candidates = BTreeMap::new();
        for (key, waiting) in before.refused {
            if key != own {
                candidates.insert(key, waiting.lease.clone());
                self.refused.insert(key, waiting);
            }
        }
        let (added, refused) = self.admit(candidates);
        applied
            .changes
            .extend(added.into_iter().map(LeaseChange::Added));
        applied.refused.extend(refused);
        applied
    }

    /// Admits what can be admitted, in the order of keys; returns that, and what is newly refused.
    fn admit(&mut self, candidates: BTreeMap<Subnets, Lease>) -> (Vec<Lease>, Vec<Refused>) {
        let (mut added, mut newly_refused) = (Vec::new(), Vec::new());
        for (key, lease) in candidates {
            match self.judge(&lease) {
                Ok(()) => {
                    self.refused.remove(&key);
                    self.hold(lease.clone());
                    added.push(lease);
                }
                Err(reason) => {
                    let refused = Refused { lease, reason };
                    let before = self.refused.insert(key, refused.clone());
                    let known = before.is_some_and(|before| {
                        before.reason == refused.reason && !before.lease.differs(&refused.lease)
                    });
                    if !known {
                        newly_refused.push(refused);
                    }
                }
            }
        }
        (added, newly_refused)
    }

    fn judge(&self, lease: &Lease) -> Result<(), Refusal> {
        let v4 = family(self.v4.as_ref(), lease.subnets.v4(), &self.taken_v4)?;
        let v6 = family(self.v6.as_ref(), lease.subnets.v6(), &self.taken_v6)?;
        if self.own.overlaps(&lease.subnets) {
            return Err(Refusal::OverlapsOwn { own: self.own });
        }
        match (v4, v6) {
            (Verdict::Taken(with), _) | (_, Verdict::Taken(with)) => {
                Err(Refusal::OverlapsPeer { with })
            }
            (Verdict::Absent, Verdict::Absent) => Err(Refusal::NoEnabledFamily),
            (Verdict::Free | Verdict::Absent, Verdict::Free | Verdict::Absent) => Ok(()),
        }
    }

    fn hold(&mut self, lease: Lease) {
        let key = lease.subnets;
        self.taken_v4.insert(key.v4(), key);
        self.taken_v6.insert(key.v6(), key);
        self.admitted.insert(key, lease);
    }

    fn withdraw(&mut self, key: &Subnets) -> Option<Lease> {
        let lease = self.admitted.remove(key)?;
        self.taken_v4.remove(key.v4());
        self.taken_v6.remove(key.v6());
        Some(lease)
    }
}

/// What a peer may have of one family.
#[derive(Debug, Clone)]
struct Share {
    first: u128,
    last: u128,
    subnet_len: u8,
    network: String,
}

impl Share {
    fn of<N: OverlayPrefix>(pool: &SubnetPool<N>) -> Self {
        let network = pool.network();
        Self {
            first: network.first_bits(),
            last: network.last_bits(),
            subnet_len: pool.subnet_len(),
            network: network.to_string(),
        }
    }
}

/// How one family of a lease looks.
enum Verdict {
    /// The lease has no subnet there, or the network has no such family: a node that was restarted with the
    /// second family enabled stays reachable in the first for those that were not.
    Absent,
    Free,
    Taken(Subnets),
}

fn family<N: OverlayPrefix>(
    share: Option<&Share>,
    subnet: Option<N>,
    taken: &Occupied,
) -> Result<Verdict, Refusal> {
    let (Some(share), Some(subnet)) = (share, subnet) else {
        return Ok(Verdict::Absent);
    };
    if subnet.first_bits() < share.first || share.last < subnet.last_bits() {
        let (subnet, network) = (subnet.to_string(), share.network.clone());
        return Err(Refusal::OutsideNetwork { subnet, network });
    }
    if subnet.len_bits() < share.subnet_len {
        let (subnet, subnet_len) = (subnet.to_string(), share.subnet_len);
        return Err(Refusal::TooLarge { subnet, subnet_len });
    }
    Ok(taken
        .overlapping(subnet)
        .map_or(Verdict::Free, Verdict::Taken))
}

/// Disjoint address ranges of one family by their first address, each with its last and its owner.
#[derive(Debug, Clone, Default)]
struct Occupied(BTreeMap<u128, (u128, Subnets)>);

impl Occupied {
    /// Some range that shares an address with `net`. Since ranges are disjoint, the one that starts last among
    /// those that start in or before `net` also ends last.
    fn overlapping<N: OverlayPrefix>(&self, net: N) -> Option<Subnets> {
        let (_, &(last, owner)) = self.0.range(..=net.last_bits()).next_back()?;
        (net.first_bits() <= last).then_some(owner)
    }

    fn insert<N: OverlayPrefix>(&mut self, net: Option<N>, owner: Subnets) {
        if let Some(net) = net {
            self.0.insert(net.first_bits(), (net.last_bits(), owner));
        }
    }

    fn remove<N: OverlayPrefix>(&mut self, net: Option<N>) {
        if let Some(net) = net {
            self.0.remove(&net.first_bits());
        }
    }
}

#[cfg(test)]
mod tests;
