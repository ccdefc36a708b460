//! Owns the look at the node before anything is changed: what it has that would compete with the overlay.
//! Never changes anything.

use std::net::IpAddr;

use ipnet::IpNet;

use super::kernel::{Kernel, Route};
use crate::config::NetworkConfig;
use crate::iface::Snapshot;

/// Something on the node that competes with the overlay network. Its text names it, the consequence and the
/// remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// A route takes addresses of the overlay elsewhere.
    #[error(
        "route {net} on {device} takes part of the overlay network {network} elsewhere: stop the daemon it belongs to, or remove a leftover (ip route del {net} dev {device})"
    )]
    Route {
        /// Its destination.
        net: IpNet,
        /// The device it leaves by.
        device: String,
        /// The overlay network.
        network: IpNet,
        /// It is where the route to the whole network belongs.
        blocks: bool,
    },
    /// The node itself has an address in the overlay, outside of what it leases.
    #[error(
        "{device} has the address {addr} inside the overlay network {network}, outside this node's {own}: choose a Network that the nodes do not use"
    )]
    Address {
        /// The device.
        device: String,
        /// The address.
        addr: IpAddr,
        /// The overlay network.
        network: IpNet,
        /// This node's subnet.
        own: IpNet,
    },
    /// The node does not pass on packets of a family.
    #[error(
        "{setting} is 0: pods of this node reach no other node over {family} until it is 1 (sysctl -w {setting}=1)"
    )]
    Forwarding {
        /// The setting, as `sysctl` names it.
        setting: &'static str,
        /// The family.
        family: &'static str,
    },
    /// IPv6 is switched off.
    #[error(
        "EnableIPv6 is true and IPv6 is off on this node ({setting} is 1): switch it on (sysctl -w {setting}=0), or set EnableIPv6 to false"
    )]
    NoIpv6 {
        /// The setting, as `sysctl` names it.
        setting: &'static str,
    },
    /// The address other nodes send to lies in the overlay, so packets to it would enter the tunnel again.
    #[error(
        "the public IP {addr} lies inside the overlay network {network}: choose a Network apart from the nodes' own addresses"
    )]
    PublicIp {
        /// The address.
        addr: IpAddr,
        /// The overlay network.
        network: IpNet,
    },
}

impl Conflict {
    /// Whether nothing can work.
    #[must_use]
    pub const fn is_fatal(&self) -> bool {
        match self {
            Self::PublicIp { .. } | Self::NoIpv6 { .. } => true,
            Self::Route { blocks, .. } => *blocks,
            Self::Address { .. } | Self::Forwarding { .. } => false,
        }
    }
}

/// Looks at the kernel's settings that the overlay depends on. One that cannot be read counts as right.
pub fn settings(kernel: &impl Kernel, config: &NetworkConfig) -> Vec<Conflict> {
    let is = |path, value| kernel.setting(path).is_some_and(|found| found == value);
    let mut found = Vec::new();
    if config.ipv6.is_some() && is("ipv6/conf/all/disable_ipv6", "1") {
        let setting = "net.ipv6.conf.all.disable_ipv6";
        found.push(Conflict::NoIpv6 { setting });
    }
    if config.ipv4.is_some() && is("ipv4/ip_forward", "0") {
        let (setting, family) = ("net.ipv4.ip_forward", "IPv4");
        found.push(Conflict::Forwarding { setting, family });
    }
    if config.ipv6.is_some() && is("ipv6/conf/all/forwarding", "0") {
        let (setting, family) = ("net.ipv6.conf.all.forwarding", "IPv6");
        found.push(Conflict::Forwarding { setting, family });
    }
    found
}

/// The networks that one of the addresses lies in that other nodes send to.
#[must_use]
pub fn swallowed(networks: &[IpNet], public: impl Iterator<Item = IpAddr>) -> Vec<Conflict> {
    let inside = |addr: IpAddr| {
        let around = networks.iter().filter(move |net| net.contains(&addr));
        around.map(move |&network| Conflict::PublicIp { addr, network })
    };
    public.flat_map(inside).collect()
}

/// Looks for what competes with `networks`, of which `own` are this node's subnets. The tunnel device does not
/// exist yet.
#[must_use]
pub fn conflicts(
    snapshot: &Snapshot,
    routes: &[Route],
    networks: &[IpNet],
    own: &[IpNet],
) -> Vec<Conflict> {
    let mut found = Vec::new();
    for &network in networks {
        let competing = routes.iter().filter(|route| {
            network.contains(&route.net) && !own.iter().any(|own| own.contains(&route.net))
        });
        found.extend(competing.map(|route| {
            let mut links = snapshot.links.iter();
            let device = links.find(|link| link.index == route.link);
            Conflict::Route {
                net: route.net,
                device: device.map_or_else(|| route.link.to_string(), |link| link.name.clone()),
                network,
                blocks: route.net == network && route.has_default_metric(),
            }
        }));
        let Some(&own) = own.iter().find(|own| network.contains(*own)) else {
            continue;
        };
        for link in &snapshot.links {
            let inside = |addr: &IpAddr| network.contains(addr) && !own.contains(addr);
            let inside = link.addrs.iter().map(|addr| addr.ip).filter(inside);
            found.extend(inside.map(|addr| Conflict::Address {
                device: link.name.clone(),
                addr,
                network,
                own,
            }));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::kernel::PROTOCOL_BOOT;
    use crate::iface::{Address, Link};

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn networks() -> [IpNet; 2] {
        [net("198.18.0.0/16"), net("fd00:1::/48")]
    }

    fn found(routes: &[(&str, u32)], addrs: &[(&str, &str)]) -> Vec<String> {
        let link = |(index, &(name, ip)): (u32, &(&str, &str))| Link {
            index,
            name: name.to_owned(),
            mtu: 1500,
            addrs: vec![Address {
                ip: ip.parse().unwrap(),
                permanent: true,
                temporary: false,
                deprecated: false,
                unverified: false,
            }],
        };
        let snapshot = Snapshot {
            reach: Vec::new(),
            links: (1..).zip(addrs).map(link).collect(),
            default_routes: Vec::new(),
        };
        let route = |&(dst, link): &(&str, u32)| Route {
            net: net(dst),
            link,
            gateway: None,
            onlink: false,
            metric: None,
            protocol: PROTOCOL_BOOT,
        };
        let routes: Vec<Route> = routes.iter().map(route).collect();
        let own = [net("198.18.3.0/24"), net("fd00:1:0:3::/64")];
        let conflicts = conflicts(&snapshot, &routes, &networks(), &own);
        conflicts.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn clean_node_with_its_own_pods_has_no_conflict() {
        let routes = [
            ("0.0.0.0/0", 1),
            ("192.0.2.0/24", 1),
            ("198.18.3.0/24", 2),
            ("198.18.3.7/32", 2),
            ("198.16.0.0/12", 1),
            ("fd00:1:0:3::/64", 2),
        ];
        let addrs = [("eth0", "192.0.2.1"), ("cni0", "198.18.3.1")];
        assert_eq!(found(&routes, &addrs), Vec::<String>::new());
    }

    #[test]
    fn leftover_route_is_named_with_the_command_that_removes_it() {
        let addrs = [("eth0", "192.0.2.1"), ("flannel.1", "192.0.2.9")];
        for dst in ["198.18.4.0/24", "198.18.0.0/16", "fd00:1:0:4::/64"] {
            let conflicts = found(&[(dst, 2)], &addrs);
            assert_eq!(conflicts.len(), 1, "{dst}");
            let command = format!("ip route del {dst} dev flannel.1");
            assert!(conflicts[0].contains(&command), "{conflicts:?}");
        }
    }

    #[test]
    fn address_of_the_node_inside_the_overlay_is_named() {
        let conflicts = found(&[], &[("docker0", "198.18.77.1")]);
        assert_eq!(conflicts.len(), 1);
        assert!(conflicts[0].contains("docker0 has the address 198.18.77.1"));
    }

    #[test]
    fn public_ips_inside_the_overlay_and_routes_in_its_place_are_fatal() {
        let inside = |addrs: &[&str]| {
            let addrs = addrs.iter().map(|addr| addr.parse().unwrap());
            swallowed(&networks(), addrs)
        };
        assert_eq!(inside(&["192.0.2.1", "2001:db8::1"]), []);
        for (addrs, named) in [
            (&["198.18.3.1"][..], "the public IP 198.18.3.1"),
            (&["192.0.2.1", "fd00:1::7"], "the public IP fd00:1::7"),
        ] {
            let conflicts = inside(addrs);
            assert!(conflicts.len() == 1 && conflicts[0].is_fatal());
            assert!(conflicts[0].to_string().contains(named));
        }
        let network = net("198.18.0.0/16");
        let route = |blocks| Conflict::Route {
            net: network,
            device: "eth0".to_owned(),
            network,
            blocks,
        };
        assert!(route(true).is_fatal() && !route(false).is_fatal());
    }
}
