//! Owns the reading of rtnetlink messages into our types. Pure; what a message lacks makes it uninteresting,
//! never an error.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoIpTunnel, InfoKind, InfoVxlan,
    LinkAttribute, LinkFlags, LinkInfo, LinkMessage, TunnelEncapType,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteNextHopFlags, RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, IpProtocol};

use crate::addr::Mac;
use crate::backend::kernel::{
    Forward, IpipLink, Known, Link, Neighbour, Route, TunnelLink, VxlanLink,
};
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
        mac: None,
        tunnel: None,
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
        } else if let LinkAttribute::Address(bytes) = attribute {
            link.mac = mac(bytes);
        } else if let LinkAttribute::LinkInfo(infos) = attribute {
            link.tunnel = tunnel(infos);
        }
    }
    (!link.name.is_empty()).then_some(link)
}

fn mac(bytes: &[u8]) -> Option<Mac> {
    Mac::new(bytes.try_into().ok()?)
}

/// What a link is as a tunnel. Other kinds than IPIP have its attributes, too.
fn tunnel(infos: &[LinkInfo]) -> Option<TunnelLink> {
    let is_ipip = infos.contains(&LinkInfo::Kind(InfoKind::IpIp));
    infos.iter().find_map(|info| {
        if let LinkInfo::Data(InfoData::Vxlan(attributes)) = info {
            Some(TunnelLink::Vxlan(vxlan(attributes)))
        } else if let LinkInfo::Data(InfoData::IpTunnel(attributes)) = info {
            is_ipip.then(|| TunnelLink::Ipip(ipip(attributes)))
        } else {
            None
        }
    })
}

fn ipip(attributes: &[InfoIpTunnel]) -> IpipLink {
    let mut ipip = IpipLink {
        local: None,
        remote: None,
        extras: false,
    };
    let given = |addr: &Ipv4Addr| Some(*addr).filter(|addr| !addr.is_unspecified());
    for attribute in attributes {
        #[expect(clippy::wildcard_enum_match_arm, reason = "decides nothing")]
        match attribute {
            InfoIpTunnel::Local(IpAddr::V4(local)) => ipip.local = given(local),
            InfoIpTunnel::Remote(IpAddr::V4(remote)) => ipip.remote = given(remote),
            InfoIpTunnel::Ttl(value) | InfoIpTunnel::Tos(value) => ipip.extras |= *value != 0,
            InfoIpTunnel::Link(value) | InfoIpTunnel::FwMark(value) => ipip.extras |= *value != 0,
            InfoIpTunnel::PMtuDisc(on) => ipip.extras |= *on,
            // The original's takes whatever is inside, which is IPv4 all the same.
            InfoIpTunnel::Protocol(protocol) => {
                ipip.extras |= ![u8::from(IpProtocol::Ipip), 0].contains(&u8::from(*protocol));
            }
            InfoIpTunnel::EncapType(kind) => ipip.extras |= *kind != TunnelEncapType::None,
            InfoIpTunnel::CollectMetadata => ipip.extras = true,
            _ => {}
        }
    }
    ipip
}

fn vxlan(attributes: &[InfoVxlan]) -> VxlanLink {
    let mut vxlan = VxlanLink {
        vni: 0,
        port: 0,
        link: 0,
        local: None,
        learning: false,
        gbp: false,
        extras: false,
    };
    for attribute in attributes {
        #[expect(clippy::wildcard_enum_match_arm, reason = "decides nothing")]
        match attribute {
            InfoVxlan::Id(vni) => vxlan.vni = *vni,
            InfoVxlan::Port(port) => vxlan.port = *port,
            InfoVxlan::Link(link) => vxlan.link = *link,
            InfoVxlan::Local(ip) => vxlan.local = Some((*ip).into()),
            InfoVxlan::Local6(ip) => vxlan.local = Some((*ip).into()),
            InfoVxlan::Learning(learning) => vxlan.learning = *learning,
            InfoVxlan::Gbp => vxlan.gbp = true,
            InfoVxlan::Group(_) | InfoVxlan::Group6(_) | InfoVxlan::Gpe => vxlan.extras = true,
            InfoVxlan::Proxy(on)
            | InfoVxlan::Rsc(on)
            | InfoVxlan::L2Miss(on)
            | InfoVxlan::L3Miss(on)
            | InfoVxlan::CollectMetadata(on)
            | InfoVxlan::Vnifilter(on) => vxlan.extras |= *on,
            _ => {}
        }
    }
    vxlan
}

/// What is known of the neighbour with this address, if the message is about it.
pub(super) fn known(message: &NeighbourMessage, wanted: IpAddr) -> Option<Known> {
    let (ip, mac) = station(message);
    let silent = u16::from(NeighbourState::Incomplete) | u16::from(NeighbourState::Failed);
    (ip == Some(wanted)).then(|| Known {
        mac,
        is_silent: u16::from(message.header.state) & silent != 0,
    })
}

/// A permanent neighbour or forwarding entry; `None` for others, and for what is no single station.
fn permanent(message: &NeighbourMessage) -> Option<(u32, IpAddr, Mac)> {
    let header = &message.header;
    let state = u16::from(header.state);
    if state & u16::from(NeighbourState::Permanent) == 0
        || header.flags.contains(NeighbourFlags::ExtLearned)
    {
        return None;
    }
    let (ip, mac) = station(message);
    Some((header.ifindex, ip?, mac?))
}

/// Whom a message is about.
fn station(message: &NeighbourMessage) -> (Option<IpAddr>, Option<Mac>) {
    let (mut ip, mut mac) = (None, None);
    for attribute in &message.attributes {
        if let NeighbourAttribute::Destination(to) = attribute {
            ip = match to {
                NeighbourAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
                NeighbourAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
                NeighbourAddress::Other(bytes) => plain_ip(bytes),
                _ => None,
            };
        } else if let NeighbourAttribute::LinkLayerAddress(bytes) = attribute {
            mac = self::mac(bytes);
        }
    }
    (ip, mac)
}

/// An address by the number of its bytes: of a forwarding entry the message does not say the family.
fn plain_ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
        .ok()
}

/// A permanent neighbour of an address.
pub(super) fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    let (link, ip, mac) = permanent(message)?;
    Some(Neighbour { link, ip, mac })
}

/// A permanent entry of a VXLAN device's own forwarding table.
pub(super) fn forward(message: &NeighbourMessage) -> Option<Forward> {
    let own = message.header.flags.contains(NeighbourFlags::Own);
    let (link, to, mac) = permanent(message).filter(|_| own)?;
    Some(Forward { link, mac, to })
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
    routes_of(message, u32::from(RouteHeader::RT_TABLE_MAIN))
}

/// Likewise, of another table.
pub(super) fn routes_of(message: &RouteMessage, wanted: u32) -> Vec<Route> {
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
        } else if let RouteAttribute::Via(RouteVia::Inet6(via)) = attribute {
            gateway = Some(IpAddr::V6(*via));
        } else if let RouteAttribute::Priority(value) = attribute {
            metric = Some(*value);
        } else if let RouteAttribute::Destination(to) = attribute {
            let Some(to) = ip(to) else { return Vec::new() };
            destination = to;
        } else if let RouteAttribute::MultiPath(next_hops) = attribute {
            hops.extend(next_hops.iter().map(|hop| {
                let mut attributes = hop.attributes.iter();
                let via = attributes.find_map(|attribute| {
                    if let RouteAttribute::Gateway(via) = attribute {
                        ip(via)
                    } else if let RouteAttribute::Via(RouteVia::Inet6(via)) = attribute {
                        Some(IpAddr::V6(*via))
                    } else {
                        None
                    }
                });
                let onlink = hop.flags.contains(RouteNextHopFlags::Onlink);
                (hop.interface_index, via, onlink)
            }));
        }
    }
    let ours = table == wanted
        && header.kind == RouteType::Unicast
        && !header.flags.contains(RouteFlags::Cloned);
    let net = IpNet::new(destination, header.destination_prefix_length);
    let (true, Ok(net)) = (ours, net) else {
        return Vec::new();
    };
    if hops.is_empty() {
        let onlink = header.flags.contains(RouteFlags::Onlink);
        hops.push((link, gateway, onlink));
    }
    let route = |(link, gateway, onlink)| Route {
        net,
        link,
        gateway,
        onlink,
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
    let (mut link, mut from, mut via, mut mtu) = (None, None, None, None);
    for attribute in &message.attributes {
        if let RouteAttribute::Oif(index) = attribute {
            link = Some(*index);
        } else if let RouteAttribute::PrefSource(source) = attribute {
            from = ip(source);
        } else if let RouteAttribute::Gateway(router) = attribute {
            via = ip(router);
        } else if let RouteAttribute::Via(RouteVia::Inet6(router)) = attribute {
            via = Some(IpAddr::V6(*router));
        } else if let RouteAttribute::Metrics(metrics) = attribute {
            for metric in metrics {
                if let RouteMetric::Mtu(least) = metric {
                    mtu = Some(*least);
                }
            }
        }
    }
    Some(Reach {
        to,
        link: link?,
        from,
        via,
        is_local: message.header.kind == RouteType::Local,
        mtu,
    })
}
