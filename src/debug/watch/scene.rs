//! Owns what there is to watch where the kernel carries the packets: the links, and who is behind which subnet. Plain
//! values; the daemon says what they are.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use socket2::SockFilter;

use super::program;
use crate::datapath::tap::Transport;

/// A tunnel of the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tunnel {
    /// Ethernet in VXLAN.
    Vxlan {
        /// The destination port of its datagrams.
        port: u16,
        /// The network they are of.
        vni: u32,
    },
    /// IPv4 in IPv4.
    Ipip,
}

impl Tunnel {
    /// The port at which peers receive; 0 without ports.
    pub(super) const fn port(self) -> u16 {
        match self {
            Self::Vxlan { port, .. } => port,
            Self::Ipip => 0,
        }
    }
}

/// What passes a link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Inner packets, which the kernel wraps or has unwrapped: the link is the tunnel's device.
    Inner(Tunnel),
    /// Packets that carry them: the link is one of the underlay.
    Outer(Tunnel),
    /// Packets of these networks that go past every tunnel: the link is one of the underlay.
    Past {
        /// The overlay.
        networks: Vec<IpNet>,
    },
}

/// One link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Its name.
    pub device: String,
    /// Its number, which changes when it is made anew.
    pub index: u32,
    /// What passes it.
    pub kind: Kind,
}

impl Place {
    /// How what passes it reaches peers.
    #[must_use]
    pub const fn transport(&self) -> Transport {
        match self.kind {
            Kind::Inner(Tunnel::Vxlan { .. }) | Kind::Outer(Tunnel::Vxlan { .. }) => {
                Transport::KernelVxlan
            }
            Kind::Inner(Tunnel::Ipip) | Kind::Outer(Tunnel::Ipip) => Transport::Ipip,
            Kind::Past { .. } => Transport::Route,
        }
    }

    /// Whether it is the same but for its number.
    pub(super) fn is_called_as(&self, other: &Self) -> bool {
        (&self.device, &self.kind) == (&other.device, &other.kind)
    }

    /// Which frames the kernel copies, and how much of them.
    pub(super) fn program(&self, keep: u32) -> Vec<SockFilter> {
        match &self.kind {
            Kind::Inner(_) => program::all(keep),
            Kind::Outer(Tunnel::Vxlan { port, .. }) => program::to_port(*port, keep),
            Kind::Outer(Tunnel::Ipip) => program::ipip(keep),
            Kind::Past { networks } => program::of_networks(networks, keep),
        }
    }
}

/// The names of links, each once.
#[must_use]
pub fn names(places: &[Place]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for Place { device, .. } in places {
        if !names.contains(&device.as_str()) {
            names.push(device);
        }
    }
    names.join(", ")
}

/// That packets are seen by packet sockets, and what that means; none without links.
#[must_use]
pub fn reading(places: &[Place]) -> Option<String> {
    (!places.is_empty()).then(|| {
        format!(
            "reading packet sockets on {}: the kernel carries packets there, and does not say what it drops",
            names(places)
        )
    })
}

/// All there is to watch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scene {
    /// The links.
    pub places: Vec<Place>,
    /// Who is behind them.
    pub peers: Arc<Peers>,
}

/// The peers by their subnets, which do not overlap.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Peers {
    /// By the first address of the subnet: where it ends, and whose it is.
    nets: BTreeMap<IpAddr, (IpNet, IpAddr)>,
    publics: HashSet<IpAddr>,
}

impl Peers {
    /// Of subnets and public addresses.
    pub fn new(peers: impl Iterator<Item = (IpNet, IpAddr)>) -> Self {
        let mut all = Self::default();
        for (net, public) in peers {
            all.nets.insert(net.network(), (net, public));
            all.publics.insert(public);
        }
        all
    }

    /// The public address of the peer whose subnet `addr` is in, or whose own address it is.
    pub(super) fn of(&self, addr: IpAddr) -> Option<IpAddr> {
        let last = self.nets.range(..=addr).next_back();
        match last.filter(|(_, (net, _))| net.contains(&addr)) {
            Some((_, (_, public))) => Some(*public),
            None => self.publics.get(&addr).copied(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_found_by_pod_and_by_node_and_nobody_else_is() {
        let peers = [
            ("198.18.2.0/24", "192.0.2.2"),
            ("198.18.3.0/25", "192.0.2.3"),
            ("fd00:2::/64", "2001:db8::2"),
        ];
        let parse = |(net, public): (&str, &str)| (net.parse().unwrap(), public.parse().unwrap());
        let peers = Peers::new(peers.into_iter().map(parse));
        for (addr, expected) in [
            ("198.18.2.0", Some("192.0.2.2")),
            ("198.18.2.255", Some("192.0.2.2")),
            ("198.18.3.127", Some("192.0.2.3")),
            ("198.18.3.128", None),
            ("198.18.1.255", None),
            ("192.0.2.3", Some("192.0.2.3")),
            ("192.0.2.1", None),
            ("fd00:2::1", Some("2001:db8::2")),
            ("fd00:2:0:1::", None),
            ("2001:db8::2", Some("2001:db8::2")),
        ] {
            let expected = expected.map(|public| public.parse().unwrap());
            assert_eq!(peers.of(addr.parse().unwrap()), expected, "{addr}");
        }
    }
}
