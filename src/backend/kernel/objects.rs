//! Owns what the kernel's network configuration consists of, as far as backends use it. Plain values.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

use crate::addr::{Mac, Mtu};

/// `RTPROT_BOOT`: how the original marks what it adds (specification section 8.0), and therefore how the route
/// to the whole network is marked.
pub const PROTOCOL_BOOT: u8 = 3;

/// How the routes to single peers are marked, so that those of a run before are known from other people's.
/// Neither the kernel nor a routing daemon listed in iproute2's `rt_protos` uses it; it is the letter l.
pub const PROTOCOL_LODEN: u8 = 108;

/// The private routing table with the ways past the tunnel, which nobody takes but marked probes. A number that neither
/// iproute2's `rt_tables` nor a tool we know of has: the letters l and l.
pub const PROBE_TABLE: u32 = 27756;

/// The mark of those probes, compared as a whole: the letters l, o, P and r.
pub const PROBE_MARK: u32 = 0x6c6f_5072;

/// Where the rule stands that leads marked probes to that table: before the main table's, at 32766.
pub const PROBE_PRIORITY: u32 = 27756;

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The kernel's number for it.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its transmit queue length in packets.
    pub tx_queue_len: u32,
    /// Administratively up.
    pub up: bool,
    /// The kernel gives it IPv6 addresses by itself (`IFLA_INET6_ADDR_GEN_MODE` is not `none`).
    pub makes_ipv6_addresses: bool,
    /// Packets the kernel dropped on the way out, for a TUN those its reader was too slow for.
    pub tx_dropped: u64,
    /// Its MAC address, if it has one.
    pub mac: Option<Mac>,
    /// What it is as a tunnel, if it is one that backends use.
    pub tunnel: Option<TunnelLink>,
}

impl Link {
    /// What it is as a VXLAN device, if it is one.
    #[must_use]
    pub const fn vxlan(&self) -> Option<&VxlanLink> {
        match &self.tunnel {
            Some(TunnelLink::Vxlan(vxlan)) => Some(vxlan),
            Some(TunnelLink::Ipip(_)) | None => None,
        }
    }
}

/// The attributes of a tunnel device that decide what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TunnelLink {
    /// Ethernet in VXLAN.
    Vxlan(VxlanLink),
    /// IPv4 in IPv4.
    Ipip(IpipLink),
}

/// The attributes of a VXLAN device that decide what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VxlanLink {
    /// The network identifier.
    pub vni: u32,
    /// The UDP port it receives on and sends to.
    pub port: u16,
    /// The link it sends by; 0 for any.
    pub link: u32,
    /// The address it sends from.
    pub local: Option<IpAddr>,
    /// It learns where MAC addresses are from what it receives.
    pub learning: bool,
    /// Group Based Policy.
    pub gbp: bool,
    /// It has something that is never asked for: a group, a default remote, metadata from elsewhere, or upcalls.
    pub extras: bool,
}

/// The attributes of an IPIP device that decide what it does. It sends to the next router of each route, and receives
/// from everybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpipLink {
    /// The address it sends from and receives on.
    pub local: Option<Ipv4Addr>,
    /// The only address it receives from, ahead of a device that receives from any; never asked for.
    pub remote: Option<Ipv4Addr>,
    /// It has something else that is never asked for: a link of its own, a TTL, TOS or mark that is not the inner
    /// packet's, a "don't fragment" of its own, another protocol inside, metadata from elsewhere, or UDP around it.
    pub extras: bool,
}

/// A tunnel device to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewTunnel {
    /// Its name.
    pub name: String,
    /// Its MAC address, for a device that has one.
    pub mac: Option<Mac>,
    /// Its MTU.
    pub mtu: Mtu,
    /// Everything else. `extras` is false.
    pub tunnel: TunnelLink,
}

/// What to change about a link; `None` leaves it as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkChange {
    /// The MTU.
    pub mtu: Option<Mtu>,
    /// The transmit queue length in packets.
    pub tx_queue_len: Option<u32>,
    /// The MAC address.
    pub mac: Option<Mac>,
    /// Whether a VXLAN device learns.
    pub learning: Option<bool>,
    /// Bring it up.
    pub up: bool,
}

/// A unicast route of the main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Route {
    /// Where to.
    pub net: IpNet,
    /// The link it leaves by; 0 if it names none.
    pub link: u32,
    /// The next router; `None` for a destination on the link.
    pub gateway: Option<IpAddr>,
    /// The next router is taken to be on the link (`RTNH_F_ONLINK`).
    pub onlink: bool,
    /// `RTA_PRIORITY`; `None` lets the kernel choose, which makes it 0 for IPv4 and 1024 for IPv6.
    pub metric: Option<u32>,
    /// Who put it there (`rtm_protocol`).
    pub protocol: u8,
}

impl Route {
    /// Whether it and another with the same destination and without a metric of its own exclude each other.
    #[must_use]
    pub const fn has_default_metric(&self) -> bool {
        match (self.net, self.metric) {
            (IpNet::V4(_), None | Some(0)) | (IpNet::V6(_), None | Some(1024)) => true,
            (IpNet::V4(_) | IpNet::V6(_), Some(_)) => false,
        }
    }

    /// Whether packets take the same way by both.
    #[must_use]
    pub fn same_way(&self, other: &Self) -> bool {
        (self.net, self.link, self.gateway, self.onlink)
            == (other.net, other.link, other.gateway, other.onlink)
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.net.fmt(f)?;
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        write!(f, " on link number {}", self.link)?;
        f.write_str(if self.onlink { " onlink" } else { "" })
    }
}

/// A permanent neighbour: an address that is reached at a MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Neighbour {
    /// The link.
    pub link: u32,
    /// The address.
    pub ip: IpAddr,
    /// Where it is.
    pub mac: Mac,
}

/// What the kernel knows of a neighbour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// Where it is.
    pub mac: Option<Mac>,
    /// It was asked for, and does not answer: packets for it wait, and are lost.
    pub is_silent: bool,
}

/// A permanent forwarding entry of a VXLAN device: frames for a MAC address go to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Forward {
    /// The device.
    pub link: u32,
    /// The MAC address.
    pub mac: Mac,
    /// The node's address on the underlay.
    pub to: IpAddr,
}

/// One change among many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edit {
    /// Adds a route where none with the same destination and metric is.
    AddRoute(Route),
    /// Puts a route in the place of the one with the same destination and metric.
    ReplaceRoute(Route),
    /// Removes a route.
    DeleteRoute(Route),
    /// Adds a route to [`PROBE_TABLE`].
    AddProbeRoute(Route),
    /// Removes one from there.
    DeleteProbeRoute(Route),
    /// Adds a neighbour, in the place of the one with the same address.
    SetNeighbour(Neighbour),
    /// Removes a neighbour.
    DeleteNeighbour(Neighbour),
    /// Adds a forwarding entry, in the place of one with the same MAC address.
    SetForward(Forward),
    /// Removes a forwarding entry.
    DeleteForward(Forward),
}

impl fmt::Display for Edit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddRoute(route) => write!(f, "add route {route}"),
            Self::ReplaceRoute(route) => write!(f, "replace route {route}"),
            Self::DeleteRoute(route) => write!(f, "delete route {route}"),
            Self::AddProbeRoute(route) => write!(f, "add route {route} for probes"),
            Self::DeleteProbeRoute(route) => write!(f, "delete route {route} for probes"),
            Self::SetNeighbour(it) => write!(f, "set neighbour {} to {}", it.ip, it.mac),
            Self::DeleteNeighbour(it) => write!(f, "delete neighbour {}", it.ip),
            Self::SetForward(it) => write!(f, "forward {} to {}", it.mac, it.to),
            Self::DeleteForward(it) => write!(f, "stop to forward {} to {}", it.mac, it.to),
        }
    }
}
