//! Owns the `host-gw` backend's decisions: from the external interface and leases to routes. Pure. Flannel
//! specification section 8.3.

use std::net::IpAddr;

use super::desired::{Peer, Way};
use super::ends::Ends;
use super::plan::PlanError;
use crate::addr::Mtu;
use crate::iface::{Choice, Family};
use crate::lease::{Lease, LeaseAttrs};

/// What the lease calls it.
pub const TYPE: &str = "host-gw";

/// What the backend needs on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostGw {
    ends: Ends,
}

impl HostGw {
    /// Derives it from the external interface.
    ///
    /// # Errors
    ///
    /// The public address is another than the interface's, so that peers could not route through it.
    pub fn new(ends: Ends) -> Result<Self, PlanError> {
        for choice in ends.iter() {
            let Choice {
                addr, public, name, ..
            } = choice;
            if addr != public {
                let (addr, public, name) = (*addr, *public, name.clone());
                return Err(PlanError::BehindNat { addr, public, name });
            }
        }
        Ok(Self { ends })
    }

    /// What pods may send: nothing is put around it.
    #[must_use]
    pub const fn mtu(&self) -> Mtu {
        self.ends.primary().mtu
    }

    /// What the lease says about us.
    #[must_use]
    pub fn attrs(&self) -> LeaseAttrs {
        self.ends.attrs(TYPE)
    }

    /// The way to a peer in one family.
    ///
    /// # Errors
    ///
    /// What the lease lacks.
    pub fn peer(&self, lease: &Lease, family: Family) -> Result<Option<Peer>, String> {
        let Some((net, public)) = self.ends.reach(lease, family)? else {
            return Ok(None);
        };
        let link = self.ends.primary().index;
        Ok(Some(Peer {
            lease: lease.subnets,
            net,
            public,
            way: Way::Gateway { link },
        }))
    }

    /// The address of this node that the status shows.
    #[must_use]
    pub const fn addr(&self) -> IpAddr {
        self.ends.primary().addr
    }
}
