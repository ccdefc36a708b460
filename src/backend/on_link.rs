//! Owns the question whether an address is on a link of this node, answered from the routes that are there. Pure.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

use super::kernel::Route;

/// Routes by prefix length, for longest-prefix matches.
pub(super) struct OnLink {
    v4: Table,
    v6: Table,
}

/// By length, the longest last; per prefix the preferred metric and where its next hops lead.
type Table = BTreeMap<u8, HashMap<IpNet, (u32, Hop)>>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Hop {
    /// A destination on the link of this number.
    Link(u32),
    /// Through a router, or over several links.
    Elsewhere,
}

impl OnLink {
    /// Takes the routes that decide how peers are reached: not those that we add because of it.
    pub(super) fn new<'a>(routes: impl Iterator<Item = &'a Route>) -> Self {
        let mut all = Self {
            v4: Table::new(),
            v6: Table::new(),
        };
        for route in routes {
            let hop = match (route.gateway, route.link) {
                (None, link) if link != 0 => Hop::Link(link),
                _ => Hop::Elsewhere,
            };
            let metric = route.metric.unwrap_or(0);
            let table = match route.net {
                IpNet::V4(_) => &mut all.v4,
                IpNet::V6(_) => &mut all.v6,
            };
            let nets = table.entry(route.net.prefix_len()).or_default();
            let entry = nets.entry(route.net).or_insert((metric, hop));
            if metric < entry.0 {
                *entry = (metric, hop);
            } else if metric == entry.0 && hop != entry.1 {
                // The next hops of a multipath route.
                entry.1 = Hop::Elsewhere;
            }
        }
        all
    }

    /// The link that `addr` is on.
    pub(super) fn link_of(&self, addr: IpAddr) -> Option<u32> {
        let table = match addr {
            IpAddr::V4(_) => &self.v4,
            IpAddr::V6(_) => &self.v6,
        };
        let found = table.iter().rev().find_map(|(&len, nets)| {
            let net = IpNet::new(addr, len).ok()?.trunc();
            nets.get(&net)
        });
        match found {
            Some((_, Hop::Link(link))) => Some(*link),
            Some((_, Hop::Elsewhere)) | None => None,
        }
    }

    /// Whether `addr` is on this link. A link-local address is on whichever link is meant.
    pub(super) fn is_on(&self, addr: IpAddr, link: u32) -> bool {
        let link_local = matches!(addr, IpAddr::V6(v6) if v6.is_unicast_link_local());
        link_local || self.link_of(addr) == Some(link)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::kernel::PROTOCOL_BOOT;

    fn route(net: &str, link: u32, gateway: Option<&str>, metric: u32) -> Route {
        Route {
            net: net.parse().unwrap(),
            link,
            gateway: gateway.map(|ip| ip.parse().unwrap()),
            onlink: false,
            metric: Some(metric),
            protocol: PROTOCOL_BOOT,
        }
    }

    #[test]
    fn longest_prefix_then_smallest_metric_decides_and_a_router_means_elsewhere() {
        let routes = [
            route("0.0.0.0/0", 2, Some("192.0.2.254"), 0),
            route("192.0.2.0/24", 2, None, 100),
            route("192.0.2.0/24", 3, None, 50),
            route("192.0.2.128/25", 4, Some("192.0.2.1"), 0),
            route("192.0.2.77/32", 5, None, 0),
            route("2001:db8::/64", 2, None, 256),
            route("198.51.100.0/24", 2, None, 0),
            route("198.51.100.0/24", 3, None, 0),
        ];
        let table = OnLink::new(routes.iter());
        let link_of = |text: &str| table.link_of(text.parse().unwrap());
        assert_eq!(link_of("192.0.2.9"), Some(3));
        assert_eq!(link_of("192.0.2.77"), Some(5));
        assert_eq!(link_of("192.0.2.200"), None);
        assert_eq!(link_of("203.0.113.1"), None);
        assert_eq!(link_of("198.51.100.1"), None);
        assert_eq!(link_of("2001:db8::9"), Some(2));
        assert_eq!(link_of("2001:db8:1::9"), None);
        let local = "fe80::9".parse().unwrap();
        assert!(table.is_on(local, 7) && table.link_of(local).is_none());
    }
}
