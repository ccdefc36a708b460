//! Owns the `ipip` backend's decisions: from configuration, external interface and leases to the device and ways. Pure.
//! Flannel specification section 8.4; IPv4 in IPv4 is RFC 2003.

use std::net::IpAddr;

use ipnet::IpNet;

use super::desired::{Device, Direct, Peer, Way};
use super::device::NAME_IPIP;
use super::ends::Ends;
use super::kernel::{IpipLink, TunnelLink};
use super::plan::PlanError;
use crate::addr::Mtu;
use crate::config::{IpipBackend, SourceCheck};
use crate::iface::Family;
use crate::lease::{Lease, LeaseAttrs, Subnets};

/// What the lease calls it.
pub const TYPE: &str = "ipip";

/// Bytes of outer headers in front of the inner packet: another IPv4 header without options (RFC 2003 section 3.1).
const OVERHEAD: u16 = 20;

/// What the backend needs on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ipip {
    backend: IpipBackend,
    ends: Ends,
    mtu: Mtu,
}

impl Ipip {
    /// Derives it from the configuration, which is one of an IPv4 network, and the external interface.
    ///
    /// # Errors
    ///
    /// The MTU is too small.
    pub fn new(backend: IpipBackend, ends: Ends) -> Result<Self, PlanError> {
        let underlay = ends.primary().mtu;
        let mtu = underlay.less(OVERHEAD).ok_or(PlanError::MtuTooSmall {
            underlay,
            least: Mtu::MIN,
            overhead: OVERHEAD,
        })?;
        Ok(Self { backend, ends, mtu })
    }

    /// What pods may send.
    #[must_use]
    pub const fn mtu(&self) -> Mtu {
        self.mtu
    }

    /// What the lease says about us.
    #[must_use]
    pub fn attrs(&self) -> LeaseAttrs {
        self.ends.attrs(TYPE)
    }

    /// Peers on a link of this node get a plain route.
    #[must_use]
    pub const fn direct_routing(&self) -> bool {
        self.backend.direct_routing
    }

    /// Whether it is checked who sends, and what; `None`: not at all.
    #[must_use]
    pub const fn source_check(&self) -> Option<SourceCheck> {
        self.backend.source_check
    }

    /// The device, with the address of these subnets. It sends from the interface's address, also where the public one
    /// is another. Before a lease is there, its own address is unspecified.
    #[must_use]
    pub fn device(&self, subnets: Option<&Subnets>) -> Device {
        let net = subnets.and_then(Subnets::v4);
        let base = net.map_or(std::net::Ipv4Addr::UNSPECIFIED, |net| net.network());
        let local = match self.ends.primary().addr {
            IpAddr::V4(addr) => Some(addr),
            IpAddr::V6(_) => None,
        };
        Device {
            name: NAME_IPIP.to_owned(),
            mac: None,
            mtu: self.mtu,
            tunnel: TunnelLink::Ipip(IpipLink {
                local,
                remote: None,
                extras: false,
            }),
            addr: IpNet::from(IpAddr::V4(base)),
        }
    }

    /// The way to a peer in one family; none in IPv6.
    ///
    /// # Errors
    ///
    /// What the lease lacks.
    pub fn peer(&self, lease: &Lease, family: Family) -> Result<Option<Peer>, String> {
        let Some((net, public)) = self.ends.reach(lease, family)? else {
            return Ok(None);
        };
        let direct = match self.backend.direct_routing {
            true => Direct::OnLink,
            false => Direct::Never,
        };
        Ok(Some(Peer {
            lease: lease.subnets,
            net,
            public,
            way: Way::Ipip { device: 0, direct },
        }))
    }
}
