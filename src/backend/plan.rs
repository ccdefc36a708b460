//! Owns which backend a node runs and what that takes: the place where the backends differ for everybody else.
//! Pure. Reaches neither the kernel nor the data plane.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::data_plane::DataPlane;
use super::desired::{Desired, Peer, Refused, Retained};
use super::host_gw::{self, HostGw};
use super::udp::{self, MtuTooSmall, Underlay};
use super::vxlan::{self, Vxlan};
use crate::addr::Mtu;
use crate::config::{Backend, NetworkConfig, SourcePort, UdpBackend};
use crate::datapath::PeerRoute;
use crate::iface::{
    self, Candidate, Choice, Decision, Family, NoInterface, Selector, Snapshot, Stack, Wanted,
};
use crate::lease::{Lease, LeaseAttrs, Subnets};

/// This node's ends of the underlay: one address per family of the overlay, all of one interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ends {
    first: Choice,
    second: Option<Choice>,
}

impl Ends {
    /// One family.
    #[must_use]
    pub const fn one(choice: Choice) -> Self {
        Self {
            first: choice,
            second: None,
        }
    }

    /// Both families, IPv4 first.
    #[must_use]
    pub const fn both(v4: Choice, v6: Choice) -> Self {
        Self {
            first: v4,
            second: Some(v6),
        }
    }

    /// The one that stands for the node: IPv4, if there is one.
    #[must_use]
    pub const fn primary(&self) -> &Choice {
        &self.first
    }

    /// Both, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = &Choice> {
        std::iter::once(&self.first).chain(&self.second)
    }

    fn of(&self, family: Family) -> Option<&Choice> {
        self.iter().find(|choice| Family::of(choice.addr) == family)
    }

    /// What a lease says about the node, without data.
    pub(super) fn attrs(&self, backend_type: &str) -> LeaseAttrs {
        let mut attrs = LeaseAttrs {
            backend_type: backend_type.to_owned(),
            ..LeaseAttrs::default()
        };
        for choice in self.iter() {
            match choice.public {
                IpAddr::V4(ip) => attrs.public_ip = Some(ip),
                IpAddr::V6(ip) => attrs.public_ipv6 = Some(ip),
            }
        }
        attrs
    }

    /// A peer's subnet and address in one family; none if either side does not use the family.
    pub(super) fn reach(
        &self,
        lease: &Lease,
        family: Family,
    ) -> Result<Option<(IpNet, IpAddr)>, String> {
        let net = match family {
            Family::V4 => lease.subnets.v4().map(IpNet::V4),
            Family::V6 => lease.subnets.v6().map(IpNet::V6),
        };
        let (Some(net), Some(_)) = (net, self.of(family)) else {
            return Ok(None);
        };
        let public = match family {
            Family::V4 => lease.attrs.public_ip.map(IpAddr::V4),
            Family::V6 => lease.attrs.public_ipv6.map(IpAddr::V6),
        };
        let public = public.ok_or_else(|| format!("it publishes no {family} address"))?;
        Ok(Some((net, public)))
    }
}

/// Why the backend cannot be run on this node. Each text names the remedy.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The MTU leaves no room for packets.
    #[error(
        "an underlay MTU of {underlay} leaves less than {least} bytes after {overhead} bytes of encapsulation: raise it, or set Backend.MTU"
    )]
    MtuTooSmall {
        /// The MTU of the underlay.
        underlay: Mtu,
        /// What has to be left.
        least: Mtu,
        /// What the outer headers take.
        overhead: u16,
    },
    /// Likewise, for raw IP in UDP.
    #[error(transparent)]
    UdpMtu(#[from] MtuTooSmall),
    /// Peers could not route through this node.
    #[error(
        "host-gw needs the nodes on one link, and the public IP {public} is another than {addr} of {name}, as behind NAT: \
         drop --public-ip, or use the vxlan or udp backend"
    )]
    BehindNat {
        /// The interface's address.
        addr: IpAddr,
        /// What the operator gave.
        public: IpAddr,
        /// The interface.
        name: String,
    },
    /// Our own data plane carries the packets, and cannot do what is asked for.
    #[error(
        "Backend.{key} needs the kernel's VXLAN device, and packets are carried in user space ({why}): turn {key} off, \
         or run a kernel with VXLAN"
    )]
    NeedsKernel {
        /// The key.
        key: &'static str,
        /// Why the kernel does not carry them.
        why: String,
    },
    /// There is no external interface, or not with an address of every family.
    #[error(transparent)]
    Interface(#[from] NoInterface),
}

/// A backend with all that it is on this node.
#[derive(Debug, Clone)]
pub enum Plan {
    /// Raw IP in UDP, by our own data plane.
    Udp {
        /// Its options.
        backend: UdpBackend,
        /// Its end of the tunnel.
        underlay: Underlay,
    },
    /// The kernel's VXLAN, or ours in its place.
    Vxlan(Vxlan),
    /// Routes.
    HostGw(HostGw),
}

/// The external interface as a backend needs it.
#[derive(Debug)]
pub struct Search {
    /// The ends, or why there are none.
    pub ends: Result<Ends, NoInterface>,
    /// Selectors that found nothing, and why.
    pub failed: Vec<String>,
    /// Every link with the reason why it is or is not the one.
    pub candidates: Vec<Candidate>,
}

/// Looks for the external interface. Our own tunnel carries both families over either and needs one address;
/// everything else needs one of every family of the overlay.
#[must_use]
pub fn search(snapshot: &Snapshot, wanted: &Wanted, config: &NetworkConfig) -> Search {
    let single = |decision: Decision| Search {
        ends: decision.choice.map(Ends::one),
        failed: decision.failed,
        candidates: decision.candidates,
    };
    let stacks: &[Stack] = match (&config.backend, &config.ipv4, &config.ipv6) {
        (Backend::Udp(_), ..) => {
            return single(iface::choose(snapshot, wanted, udp::stack(config, wanted)));
        }
        (_, Some(_), Some(_)) => &[Stack::V4, Stack::V6],
        (_, Some(_), None) => return single(iface::choose(snapshot, wanted, Stack::V4)),
        (_, None, _) => return single(iface::choose(snapshot, wanted, Stack::V6)),
    };
    // An address of one family names the interface for both.
    let mut decisions: Vec<Decision> = stacks
        .iter()
        .map(|&stack| iface::choose(snapshot, wanted, stack))
        .collect();
    let found = decisions
        .iter()
        .position(|decision| decision.choice.is_ok());
    let mut search = single(decisions.swap_remove(found.unwrap_or(0)));
    let Ok(Ends { first, .. }) = &search.ends else {
        return search;
    };
    let other = match found {
        Some(0) => Stack::V6,
        _ => Stack::V4,
    };
    search.ends = beside(snapshot, wanted, other, first).map(|other| match first.addr {
        IpAddr::V4(_) => Ends::both(first.clone(), other),
        IpAddr::V6(_) => Ends::both(other, first.clone()),
    });
    search
}

/// The address of the other family on the interface that was chosen for the first.
fn beside(
    snapshot: &Snapshot,
    wanted: &Wanted,
    stack: Stack,
    first: &Choice,
) -> Result<Choice, NoInterface> {
    let links = snapshot
        .links
        .iter()
        .filter(|link| link.index == first.index);
    let narrowed = Snapshot {
        links: links.cloned().collect(),
        ..Snapshot::default()
    };
    let is_there = |ip: &IpAddr| {
        narrowed
            .links
            .iter()
            .any(|link| link.addrs.iter().any(|addr| addr.ip == *ip))
    };
    let family = stack.families().first().copied();
    let mut selectors: Vec<Selector> = wanted
        .selectors
        .iter()
        .filter(|selector| {
            matches!(selector, Selector::Address(ip) if Some(Family::of(*ip)) == family && is_there(ip))
        })
        .cloned()
        .collect();
    let public = family.and_then(|family| wanted.public(family));
    if wanted.selectors.is_empty() {
        selectors.extend(public.filter(is_there).map(Selector::Address));
    }
    selectors.push(Selector::Name(first.name.clone()));
    let wanted = Wanted {
        selectors,
        ..wanted.clone()
    };
    iface::choose(&narrowed, &wanted, stack).choice
}

impl Plan {
    /// Derives it from the configuration and the ends.
    ///
    /// # Errors
    ///
    /// The backend cannot be run here.
    pub fn new(config: &NetworkConfig, ends: Ends) -> Result<Self, PlanError> {
        Ok(match &config.backend {
            Backend::Udp(backend) => Self::Udp {
                underlay: Underlay::new(config, backend, ends.primary())?,
                backend: backend.clone(),
            },
            Backend::Vxlan(backend) => Self::Vxlan(Vxlan::new(backend, ends)?),
            Backend::HostGw => Self::HostGw(HostGw::new(ends)?),
        })
    }

    /// What pods may send.
    #[must_use]
    pub fn mtu(&self) -> Mtu {
        match self {
            Self::Udp { underlay, .. } => underlay.mtu,
            Self::Vxlan(vxlan) => vxlan.mtu(),
            Self::HostGw(host_gw) => host_gw.mtu(),
        }
    }

    /// What the lease says about us.
    #[must_use]
    pub fn attrs(&self) -> LeaseAttrs {
        match self {
            Self::Udp { underlay, .. } => underlay.attrs.clone(),
            Self::Vxlan(vxlan) => vxlan.attrs(),
            Self::HostGw(host_gw) => host_gw.attrs(),
        }
    }

    /// The UDP port that the host's firewall has to admit.
    #[must_use]
    pub const fn port(&self) -> Option<u16> {
        match self {
            Self::Udp { backend, .. } => Some(backend.port),
            Self::Vxlan(vxlan) => Some(vxlan.port()),
            Self::HostGw(_) => None,
        }
    }

    /// Where datagrams of peers arrive.
    #[must_use]
    pub const fn bind(&self) -> Option<SocketAddr> {
        match self {
            Self::Udp { underlay, .. } => Some(underlay.bind),
            Self::Vxlan(vxlan) => Some(SocketAddr::new(vxlan.addr(), vxlan.port())),
            Self::HostGw(_) => None,
        }
    }

    /// Where the datagrams for a peer go, for the backends that send any.
    #[must_use]
    pub fn endpoint_of(&self, attrs: &LeaseAttrs) -> Option<SocketAddr> {
        match self {
            Self::Udp { underlay, .. } => underlay.endpoint_of(attrs),
            Self::Vxlan(vxlan) => {
                let public = attrs.node()?;
                Some(SocketAddr::new(public, vxlan.port()))
            }
            Self::HostGw(_) => None,
        }
    }

    /// The backend's name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Udp { .. } => "udp",
            Self::Vxlan(_) => vxlan::TYPE,
            Self::HostGw(_) => host_gw::TYPE,
        }
    }

    /// Takes over what peers know of us from the plan before.
    pub fn keep(&mut self, before: &Self) {
        if let (Self::Vxlan(vxlan), Self::Vxlan(before)) = (self, before) {
            vxlan.keep_macs_of(before);
            vxlan.keep_place_of(before);
        }
    }

    /// Why our own data plane does what the backend has the kernel do elsewhere; `None` where it does not.
    #[must_use]
    pub fn in_user_space(&self) -> Option<&str> {
        match self {
            Self::Vxlan(vxlan) => vxlan.in_user_space(),
            Self::Udp { .. } | Self::HostGw(_) => None,
        }
    }

    /// Which ports datagrams are sent from, where that is ours to say.
    pub const fn source_port_mut(&mut self) -> Option<&mut SourcePort> {
        match self {
            Self::Udp { backend, .. } => Some(&mut backend.source_port),
            Self::Vxlan(vxlan) => vxlan.source_port_mut(),
            Self::HostGw(_) => None,
        }
    }

    /// What the backend asks of our own data plane; nothing, where the kernel carries the packets.
    #[must_use]
    pub fn data_planes(
        &self,
        config: &NetworkConfig,
        subnets: &Subnets,
        choice: &Choice,
    ) -> Vec<DataPlane> {
        match self {
            Self::Udp { backend, underlay } => {
                vec![udp::data_plane(config, backend, underlay, subnets, choice)]
            }
            Self::Vxlan(vxlan) => vxlan.data_planes(config, subnets),
            Self::HostGw(_) => Vec::new(),
        }
    }

    /// The forwarding table of our own data plane for these peers, and the leases that get no route and are not
    /// [refused](Self::desired) for it.
    pub fn routes<'a>(
        &self,
        leases: impl Iterator<Item = &'a Lease>,
    ) -> (Vec<PeerRoute>, Vec<Refused>) {
        match self {
            Self::Udp { underlay, .. } => {
                let (routes, unreachable) = underlay.routes(leases);
                let family = Family::of(underlay.bind.ip());
                let refused = unreachable.into_iter().map(|lease| Refused {
                    lease: lease.subnets,
                    why: format!("it publishes no {family} address: its packets have no route"),
                });
                (routes, refused.collect())
            }
            Self::Vxlan(vxlan) if vxlan.in_user_space().is_some() => {
                let ours = leases.filter(|lease| self.is_of_our_kind(lease));
                let both = |lease: &'a Lease| {
                    [Family::V4, Family::V6].into_iter().filter_map(|family| {
                        let peer = vxlan.peer(lease, family).ok().flatten()?;
                        vxlan.route(&peer, lease.extension.ecn)
                    })
                };
                (ours.flat_map(both).collect(), Vec::new())
            }
            Self::Vxlan(_) | Self::HostGw(_) => (Vec::new(), Vec::new()),
        }
    }

    /// What the kernel should hold for these peers, and which of them get nothing. The `udp` backend wants nothing
    /// per peer, but nothing stale either.
    pub fn desired<'a>(
        &self,
        config: &NetworkConfig,
        subnets: &Subnets,
        leases: impl Iterator<Item = &'a Lease>,
    ) -> (Desired, Vec<Refused>) {
        let mut desired = Desired {
            networks: udp::networks(config),
            own: udp::nets(subnets),
            devices: match self {
                Self::Vxlan(vxlan) if vxlan.in_user_space().is_none() => {
                    vxlan.devices(Some(subnets))
                }
                Self::Udp { .. } | Self::Vxlan(_) | Self::HostGw(_) => Vec::new(),
            },
            ..Desired::default()
        };
        let mut refused = Vec::new();
        for lease in leases {
            if !self.is_of_our_kind(lease) {
                desired.retained.extend(retained(lease));
                if !matches!(self, Self::Udp { .. }) {
                    let theirs = match lease.attrs.backend_type.as_str() {
                        "" => "udp",
                        other => other,
                    };
                    let ours = self.name();
                    refused.push(Refused {
                        lease: lease.subnets,
                        why: format!("it uses the {theirs} backend and this node {ours}: what is there for it stays"),
                    });
                }
                continue;
            }
            for family in [Family::V4, Family::V6] {
                match self.peer(lease, family) {
                    // The kernel knows nothing of the peers of our own data plane.
                    Ok(_) if self.in_user_space().is_some() => {}
                    Ok(peer) => desired.peers.extend(peer),
                    Err(why) => refused.push(Refused {
                        lease: lease.subnets,
                        why: format!("{why}: its {family} packets have no route"),
                    }),
                }
            }
        }
        (desired, refused)
    }

    fn peer(&self, lease: &Lease, family: Family) -> Result<Option<Peer>, String> {
        match self {
            Self::Udp { .. } => Ok(None),
            Self::Vxlan(vxlan) => vxlan.peer(lease, family),
            Self::HostGw(host_gw) => host_gw.peer(lease, family),
        }
    }

    /// Leases of the original's `udp` backend name none.
    fn is_of_our_kind(&self, lease: &Lease) -> bool {
        let theirs = lease.attrs.backend_type.as_str();
        match self {
            Self::Udp { .. } => theirs.is_empty() || theirs == "udp",
            Self::Vxlan(_) | Self::HostGw(_) => theirs == self.name(),
        }
    }
}

fn retained(lease: &Lease) -> impl Iterator<Item = Retained> {
    let attrs = &lease.attrs;
    let v4 = lease.subnets.v4().map(|net| Retained {
        net: IpNet::V4(net),
        public: attrs.public_ip.map(IpAddr::V4),
    });
    let v6 = lease.subnets.v6().map(|net| Retained {
        net: IpNet::V6(net),
        public: attrs.public_ipv6.map(IpAddr::V6),
    });
    v4.into_iter().chain(v6)
}
