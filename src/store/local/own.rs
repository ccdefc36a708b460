//! Owns what this node holds, and how that stands against what others claim. Pure: never reads a file or a clock.

use std::net::IpAddr;
use std::time::SystemTime;

use super::scan::{Entry, Listing};
use super::sidecar::{Sidecar, nanoseconds, whole_seconds};
use crate::lease::{Lease, LeaseAttrs, LeaseExtension, Subnets};
use crate::store::LEASE_TTL;

/// What this node holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Own {
    pub(super) subnets: Subnets,
    pub(super) node: IpAddr,
    pub(super) attrs: LeaseAttrs,
    pub(super) extension: LeaseExtension,
    /// When, in nanoseconds of Unix time.
    pub(super) claimed: u64,
    pub(super) expires: Option<SystemTime>,
}

impl Own {
    pub(super) fn lease(&self) -> Lease {
        Lease {
            subnets: self.subnets,
            attrs: self.attrs.clone(),
            expires: self.expires,
            extension: self.extension,
        }
    }

    pub(super) const fn sidecar(&self) -> Sidecar {
        Sidecar {
            expires: self.expires,
            claimed: self.claimed,
            owner: self.node,
            extension: self.extension,
        }
    }

    fn has_expired(&self, now: SystemTime) -> bool {
        self.expires.is_some_and(|at| at <= now)
    }

    /// As [`claim`](super::scan::Record::claim) of a record. A lease that ran out comes after every other: for whoever
    /// took it meanwhile there was no rival.
    fn claim(&self, now: SystemTime) -> (u64, IpAddr) {
        let claimed = match self.expires {
            None => 0,
            Some(_) if self.has_expired(now) => u64::MAX,
            Some(_) => self.claimed,
        };
        (claimed, self.node)
    }

    /// Another term from `now` on. A lease that ran out is claimed anew.
    pub(super) fn extended(&self, now: SystemTime) -> Self {
        let claimed = if self.has_expired(now) {
            nanoseconds(now)
        } else {
            self.claimed
        };
        let expires = self.expires.map(|_| whole_seconds(now + LEASE_TTL));
        Self {
            claimed,
            expires,
            ..self.clone()
        }
    }
}

/// How our lease stands in what the directory says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// It is there, and ours.
    Held,
    /// It is damaged, or a later claim has overwritten it: to be restored.
    Overwritten,
    /// Somebody else's lease is in its place, but the file with the time of the claim is not.
    Unsettled(IpAddr),
    /// It is gone.
    Missing,
    /// Another node claimed it, or a part of it, before us.
    Lost(IpAddr),
}

/// Decides between our claim and all others. Each node decides alike from the same files: the earlier claim
/// wins, then the lower public IP. A reservation that merely overlaps takes nothing away until its node takes
/// it up: until then it is a file that anybody may have dropped. A claim larger than ours is one that every node
/// refuses.
pub(super) fn standing(own: &Own, listing: &Listing, now: SystemTime) -> Standing {
    let ours = own.claim(now);
    let stronger = listing
        .iter()
        .filter(|(key, entry)| {
            let hinders = !entry.is_untaken() && !key.is_larger_than(&own.subnets);
            **key == own.subnets || (key.overlaps(&own.subnets) && hinders)
        })
        .filter_map(|(_, entry)| entry.claim(now))
        .filter(|claim| claim.1 != own.node && *claim < ours)
        .min();
    if let Some((_, node)) = stronger {
        return Standing::Lost(node);
    }
    match listing.get(&own.subnets) {
        None => Standing::Missing,
        Some(Entry::Lease(record)) if record.node == own.node => Standing::Held,
        // Taken over after ours ran out, and run out itself: still not ours any more.
        Some(Entry::Lease(record)) if own.has_expired(now) => Standing::Lost(record.node),
        Some(Entry::Lease(_) | Entry::Damaged { .. }) => Standing::Overwritten,
        Some(Entry::Half { lease, .. }) if lease.node == own.node => Standing::Overwritten,
        Some(Entry::Half { lease, .. }) => Standing::Unsettled(lease.node),
    }
}
