//! Owns the reading of rtnetlink messages into our types. Pure; what a message lacks makes it uninteresting,
//! never an error.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteType,
};

use crate::backend::kernel::{Link, Route};
use crate::iface::{self, DefaultRoute, Family, Reach, Snapshot};

/// A link; `None` without a name.
pub(super) fn link(message: &LinkMessage) -> Option<Link> {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mtu: 0,
        tx_queue_len: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        makes_ipv6_addresses: false,
        tx_dropped: 0,
    };
    for attribute in &message.attributes {
        if let LinkAttribute::IfName(name) = attribute {
            link.name.clone_from(name);
        } else if let LinkAttribute::Mtu(mtu) = attribute {
            link.mtu = *mtu;
        } else if let LinkAttribute::TxQueueLen(len) = attribute {
            link.tx_queue_len = *len;
        } else if let LinkAttribute::Stats64(stats) = attribute {
            link.tx_dropped = stats.tx_dropped;
        } else if let LinkAttribute::AfSpecUnspec(families) = attribute {
            link.makes_ipv6_addresses = families.iter().any(makes_ipv6_addresses);
        }
    }
    (!link.name.is_empty()).then_some(link)
}

fn makes_ipv6_addresses(family: &AfSpecUnspec) -> bool {
    let AfSpecUnspec::Inet6(attributes) = family else {
        return false;
    };
    attributes.iter().any(|attribute| {
        matches!(attribute, AfSpecInet6::AddrGenMode(mode) if *mode != In6AddrGenMode::None)
    })
}

/// Our address of a link (not the far end's of a point-to-point link), and its flags.
fn address(message: &AddressMessage) -> Option<(IpAddr, AddressFlags)> {
    let mut local = None;
    let mut any = None;
    // The header has the lower eight bits only, and is all there is before Linux 3.14.
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        if let AddressAttribute::Local(ip) = attribute {
            local = Some(*ip);
        } else if let AddressAttribute::Address(ip) = attribute {
            any = Some(*ip);
        } else if let AddressAttribute::Flags(all) = attribute {
            flags = *all;
        }
    }
    Some((local.or(any)?, flags))
}

/// Our address of a link with its prefix length.
pub(super) fn prefix(message: &AddressMessage) -> Option<IpNet> {
    let (ip, _) = address(message)?;
    IpNet::new(ip, message.header.prefix_len).ok()
}

/// The unicast route of the main table that a message tells of: one entry per next hop, none for others.
pub(super) fn routes(message: &RouteMessage) -> Vec<Route> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let mut link = 0;
    let mut gateway = None;
    let mut metric = None;
    let mut destination = if header.address_family == AddressFamily::Inet {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    } else if header.address_family == AddressFamily::Inet6 {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    } else {
        return Vec::new();
    };
    let mut hops = Vec::new();
    for attribute in &message.attributes {
        if let RouteAttribute::Table(id) = attribute {
            table = *id;
        } else if let RouteAttribute::Oif(index) = attribute {
            link = *index;
        } else if let RouteAttribute::Gateway(via) = attribute {
            gateway = ip(via);
        } else if let RouteAttribute::Priority(value) = attribute {
            metric = Some(*value);
        } else if let RouteAttribute::Destination(to) = attribute {
            let Some(to) = ip(to) else { return Vec::new() };
            destination = to;
        } else if let RouteAttribute::MultiPath(next_hops) = attribute {
            hops.extend(next_hops.iter().map(|hop| {
                let mut attributes = hop.attributes.iter();
                let via = attributes.find_map(|attribute| {
                    let RouteAttribute::Gateway(via) = attribute else {
                        return None;
                    };
                    ip(via)
                });
                (hop.interface_index, via)
            }));
        }
    }
    let ours = table == u32::from(RouteHeader::RT_TABLE_MAIN)
        && header.kind == RouteType::Unicast
        && !header.flags.contains(RouteFlags::Cloned);
    let net = IpNet::new(destination, header.destination_prefix_length);
    let (true, Ok(net)) = (ours, net) else {
        return Vec::new();
    };
    if hops.is_empty() {
        hops.push((link, gateway));
    }
    let route = |(link, gateway)| Route {
        net,
        link,
        gateway,
        metric,
        protocol: header.protocol.into(),
    };
    hops.into_iter().map(route).collect()
}

const fn ip(address: &RouteAddress) -> Option<IpAddr> {
    if let RouteAddress::Inet(v4) = address {
        Some(IpAddr::V4(*v4))
    } else if let RouteAddress::Inet6(v6) = address {
        Some(IpAddr::V6(*v6))
    } else {
        None
    }
}

/// Puts together what the choice of the external interface is made from.
pub(super) fn snapshot(
    links: &[LinkMessage],
    addrs: &[AddressMessage],
    routes: &[RouteMessage],
) -> Snapshot {
    let mut links: Vec<iface::Link> = links
        .iter()
        .filter_map(link)
        .map(|link| iface::Link {
            index: link.index,
            name: link.name,
            mtu: link.mtu,
            addrs: Vec::new(),
        })
        .collect();
    links.sort_by_key(|link| link.index);
    for message in addrs {
        let Some((ip, flags)) = address(message) else {
            continue;
        };
        let at = links.binary_search_by_key(&message.header.index, |link| link.index);
        // A link that appeared between the two listings is not there yet.
        let Some(link) = at.ok().and_then(|at| links.get_mut(at)) else {
            continue;
        };
        link.addrs.push(iface::Address {
            ip,
            permanent: flags.contains(AddressFlags::Permanent),
            // The kernel has one bit for both: IFA_F_SECONDARY for IPv4 is IFA_F_TEMPORARY for IPv6.
            temporary: ip.is_ipv6() && flags.contains(AddressFlags::Secondary),
            deprecated: flags.contains(AddressFlags::Deprecated),
            unverified: flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed)
                && !flags.contains(AddressFlags::Optimistic),
        });
    }
    let mut defaults: Vec<Route> = routes
        .iter()
        .flat_map(self::routes)
        .filter(|route| route.net.prefix_len() == 0)
        .collect();
    // Stable: routes of one metric stay in the kernel's order.
    defaults.sort_by_key(|route| route.metric.unwrap_or(0));
    let default_route = |route: &Route| DefaultRoute {
        family: Family::of(route.net.addr()),
        link: (route.link != 0).then_some(route.link),
    };
    Snapshot {
        links,
        default_routes: defaults.iter().map(default_route).collect(),
        reach: Vec::new(),
    }
}

/// The answer to the question for the route to one address.
pub(super) fn reach(to: IpAddr, message: &RouteMessage) -> Option<Reach> {
    let mut link = None;
    let mut from = None;
    for attribute in &message.attributes {
        if let RouteAttribute::Oif(index) = attribute {
            link = Some(*index);
        } else if let RouteAttribute::PrefSource(source) = attribute {
            from = ip(source);
        }
    }
    link.map(|link| Reach { to, link, from })
}
