//! Owns which backend a node runs and what that takes: the place where the backends differ for everybody else.
//! Pure. Reaches neither the kernel nor the data plane.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::data_plane::DataPlane;
use super::desired::{Desired, Peer, Refused, Retained};
use super::ends::Ends;
use super::host_gw::{self, HostGw};
use super::ipip::{self, Ipip};
use super::outside::Outside;
use super::udp::{self, MtuTooSmall, Underlay};
use super::vxlan::{self, Vxlan};
use crate::addr::Mtu;
use crate::config::{Backend, NetworkConfig, SourcePort, UdpBackend};
use crate::datapath::PeerRoute;
use crate::iface::{Choice, Family, NoInterface};
use crate::lease::{Lease, LeaseAttrs, Subnets};

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
    /// The kernel's IP in IP.
    Ipip(Ipip),
    /// Somebody else's.
    Outside(Outside),
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
            Backend::Ipip(backend) => Self::Ipip(Ipip::new(*backend, ends)?),
            Backend::Alloc => Self::Outside(Outside::alloc(ends)),
            Backend::Extension(commands) => {
                Self::Outside(Outside::extension(ends, commands.clone()))
            }
        })
    }

    /// What pods may send.
    #[must_use]
    pub fn mtu(&self) -> Mtu {
        match self {
            Self::Udp { underlay, .. } => underlay.mtu,
            Self::Vxlan(vxlan) => vxlan.mtu(),
            Self::HostGw(host_gw) => host_gw.mtu(),
            Self::Ipip(ipip) => ipip.mtu(),
            Self::Outside(outside) => outside.mtu(),
        }
    }

    /// What the lease says about us.
    #[must_use]
    pub fn attrs(&self) -> LeaseAttrs {
        match self {
            Self::Udp { underlay, .. } => underlay.attrs.clone(),
            Self::Vxlan(vxlan) => vxlan.attrs(),
            Self::HostGw(host_gw) => host_gw.attrs(),
            Self::Ipip(ipip) => ipip.attrs(),
            Self::Outside(outside) => outside.attrs(),
        }
    }

    /// The UDP port that the host's firewall has to admit.
    #[must_use]
    pub const fn port(&self) -> Option<u16> {
        match self {
            Self::Udp { backend, .. } => Some(backend.port),
            Self::Vxlan(vxlan) => Some(vxlan.port()),
            Self::HostGw(_) | Self::Ipip(_) | Self::Outside(_) => None,
        }
    }

    /// Where datagrams of peers arrive.
    #[must_use]
    pub const fn bind(&self) -> Option<SocketAddr> {
        match self {
            Self::Udp { underlay, .. } => Some(underlay.bind),
            Self::Vxlan(vxlan) => Some(SocketAddr::new(vxlan.addr(), vxlan.port())),
            Self::HostGw(_) | Self::Ipip(_) | Self::Outside(_) => None,
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
            Self::HostGw(_) | Self::Ipip(_) | Self::Outside(_) => None,
        }
    }

    /// The backend's name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Udp { .. } => udp::TYPE,
            Self::Vxlan(_) => vxlan::TYPE,
            Self::HostGw(_) => host_gw::TYPE,
            Self::Ipip(_) => ipip::TYPE,
            Self::Outside(outside) => outside.name(),
        }
    }

    /// Takes over what peers know of us from the plan before.
    pub fn keep(&mut self, before: &Self) {
        if let (Self::Vxlan(vxlan), Self::Vxlan(before)) = (&mut *self, before) {
            vxlan.keep_macs_of(before);
            vxlan.keep_place_of(before);
        }
        if let (Self::Outside(outside), Self::Outside(before)) = (self, before) {
            outside.keep_data_of(before);
        }
    }

    /// Whether there may be peers that are reached by a route through them, past any tunnel.
    #[must_use]
    pub const fn goes_past(&self) -> bool {
        match self {
            Self::HostGw(_) => true,
            Self::Vxlan(vxlan) => vxlan.goes_past(),
            Self::Ipip(ipip) => ipip.direct_routing(),
            Self::Udp { .. } | Self::Outside(_) => false,
        }
    }

    /// The backends that leave the packets to others.
    #[must_use]
    pub const fn outside(&self) -> Option<&Outside> {
        match self {
            Self::Outside(outside) => Some(outside),
            Self::Udp { .. } | Self::Vxlan(_) | Self::HostGw(_) | Self::Ipip(_) => None,
        }
    }

    /// Why our own data plane does what the backend has the kernel do elsewhere; `None` where it does not.
    #[must_use]
    pub fn in_user_space(&self) -> Option<&str> {
        match self {
            Self::Vxlan(vxlan) => vxlan.in_user_space(),
            Self::Udp { .. } | Self::HostGw(_) | Self::Ipip(_) | Self::Outside(_) => None,
        }
    }

    /// Which ports datagrams are sent from, where that is ours to say.
    pub const fn source_port_mut(&mut self) -> Option<&mut SourcePort> {
        match self {
            Self::Udp { backend, .. } => Some(&mut backend.source_port),
            Self::Vxlan(vxlan) => vxlan.source_port_mut(),
            Self::HostGw(_) | Self::Ipip(_) | Self::Outside(_) => None,
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
            Self::HostGw(_) | Self::Ipip(_) | Self::Outside(_) => Vec::new(),
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
                let ours = leases.filter(|lease| self.is_of_our_kind(lease));
                let (routes, unreachable) = underlay.routes(ours);
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
                        vxlan.route(&peer)
                    })
                };
                (ours.flat_map(both).collect(), Vec::new())
            }
            Self::Vxlan(_) | Self::HostGw(_) | Self::Ipip(_) | Self::Outside(_) => {
                (Vec::new(), Vec::new())
            }
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
                Self::Ipip(ipip) => vec![ipip.device(Some(subnets))],
                Self::Udp { .. } | Self::Vxlan(_) | Self::HostGw(_) | Self::Outside(_) => {
                    Vec::new()
                }
            },
            probing: matches!(self, Self::Vxlan(vxlan) if vxlan.is_auto()),
            ..Desired::default()
        };
        let mut refused = Vec::new();
        for lease in leases {
            if !self.is_of_our_kind(lease) {
                desired.retained.extend(retained(lease));
                refused.extend(self.other_backend(lease));
                continue;
            }
            for family in [Family::V4, Family::V6] {
                match self.peer(lease, family) {
                    // The kernel knows nothing of the peers of our own data plane, but for ways past it.
                    Ok(peer) if self.in_user_space().is_some() => {
                        desired.peers.extend(peer.and_then(Peer::past_our_tunnel));
                    }
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

    /// What to tell of a lease that names another backend than ours; nothing where others carry the packets.
    fn other_backend(&self, lease: &Lease) -> Option<Refused> {
        let theirs = match lease.attrs.backend_type.as_str() {
            "" => udp::TYPE,
            other => other,
        };
        let by_kernel = match self {
            Self::Udp { .. } => false,
            Self::Vxlan(vxlan) => vxlan.in_user_space().is_none(),
            Self::HostGw(_) | Self::Ipip(_) => true,
            Self::Outside(outside) => {
                outside.commands()?;
                false
            }
        };
        let follows = match by_kernel && [vxlan::TYPE, host_gw::TYPE, ipip::TYPE].contains(&theirs)
        {
            true => "what the kernel has for it stays",
            false => "there is no way to it",
        };
        let ours = self.name();
        Some(Refused {
            lease: lease.subnets,
            why: format!(
                "it uses the {theirs} backend and this node {ours}: {follows} until both use one (a daemon reads \
                 Backend.Type when it starts)"
            ),
        })
    }

    fn peer(&self, lease: &Lease, family: Family) -> Result<Option<Peer>, String> {
        match self {
            Self::Udp { .. } | Self::Outside(_) => Ok(None),
            Self::Vxlan(vxlan) => vxlan.peer(lease, family),
            Self::HostGw(host_gw) => host_gw.peer(lease, family),
            Self::Ipip(ipip) => ipip.peer(lease, family),
        }
    }

    /// Leases of the original's `udp` backend name none.
    fn is_of_our_kind(&self, lease: &Lease) -> bool {
        let theirs = lease.attrs.backend_type.as_str();
        match self {
            Self::Udp { .. } => theirs.is_empty() || theirs == udp::TYPE,
            Self::Vxlan(_) | Self::HostGw(_) | Self::Ipip(_) => theirs == self.name(),
            // Whoever names none is of the same kind, or the original's `udp`.
            Self::Outside(outside) => theirs == outside.attrs().backend_type,
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

#[cfg(test)]
mod tests;
