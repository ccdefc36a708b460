//! Owns the writing of our types into rtnetlink messages. Pure; never sends anything.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use netlink_packet_route::link::{
    InfoData, InfoIpTunnel, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage,
};
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteProtocol};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, IpProtocol};
use rtnetlink::{IpVersion, LinkUnspec, LinkVxlan, RouteMessageBuilder};

use crate::backend::kernel::{
    Forward, IpipLink, KernelError, LinkChange, Neighbour, NewTunnel, PROBE_MARK, PROBE_PRIORITY,
    PROBE_TABLE, PROTOCOL_LODEN, Route, TunnelLink, VxlanLink,
};

/// A tunnel device as flannel asks for it (specification sections 8.2 and 8.4).
pub(super) fn tunnel(device: &NewTunnel) -> LinkMessage {
    match &device.tunnel {
        TunnelLink::Vxlan(vxlan) => self::vxlan(device, vxlan),
        TunnelLink::Ipip(ipip) => self::ipip(device, ipip),
    }
}

/// What is not named here is as the kernel has it by default, which is off.
fn vxlan(device: &NewTunnel, vxlan: &VxlanLink) -> LinkMessage {
    let mut builder = LinkVxlan::new(&device.name, vxlan.vni)
        .port(vxlan.port)
        .learning(vxlan.learning)
        .mtu(u32::from(device.mtu.get()))
        .txqueuelen(0);
    if let Some(mac) = device.mac {
        builder = builder.address(mac.bytes().to_vec());
    }
    if vxlan.link != 0 {
        builder = builder.dev(vxlan.link);
    }
    builder = match vxlan.local {
        Some(IpAddr::V4(local)) => builder.local(local),
        Some(IpAddr::V6(local)) => builder.local6(local),
        None => builder,
    };
    if vxlan.gbp {
        builder = builder.gbp();
    }
    builder.build()
}

/// The TTL and "don't fragment" of the outer header are the inner packet's, so that no path is shorter or narrower than
/// pods are told. A TOS of 0 leaves congestion marks to RFC 6040, as the kernel has it
/// (`INET_ECN_encapsulate` in include/net/inet_ecn.h).
fn ipip(device: &NewTunnel, ipip: &IpipLink) -> LinkMessage {
    let local = IpAddr::V4(ipip.local.unwrap_or(Ipv4Addr::UNSPECIFIED));
    let attributes = vec![
        InfoIpTunnel::Local(local),
        InfoIpTunnel::Ttl(0),
        InfoIpTunnel::Tos(0),
        InfoIpTunnel::PMtuDisc(false),
        InfoIpTunnel::Protocol(IpProtocol::Ipip),
    ];
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(device.name.clone()),
        LinkAttribute::Mtu(u32::from(device.mtu.get())),
        LinkAttribute::TxQueueLen(0),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::IpIp),
            LinkInfo::Data(InfoData::IpTunnel(attributes)),
        ]),
    ];
    message
}

/// What is changed about a link whatever its kind, and the words for it.
pub(super) fn change(index: u32, change: LinkChange) -> (LinkMessage, String) {
    let mut message = LinkUnspec::new_with_index(index);
    let mut what = Vec::new();
    if let Some(mtu) = change.mtu {
        message = message.mtu(u32::from(mtu.get()));
        what.push(format!("mtu {mtu}"));
    }
    if let Some(len) = change.tx_queue_len {
        message = message.append_extra_attribute(LinkAttribute::TxQueueLen(len));
        what.push(format!("txqueuelen {len}"));
    }
    if let Some(mac) = change.mac {
        message = message.address(mac.bytes().to_vec());
        what.push(format!("address {mac}"));
    }
    if change.up {
        message = message.up();
        what.push("up".to_owned());
    }
    (message.build(), what.join(" "))
}

/// Whether a VXLAN device learns.
pub(super) fn learning(index: u32, learning: bool) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Vxlan),
        LinkInfo::Data(InfoData::Vxlan(vec![InfoVxlan::Learning(learning)])),
    ]));
    message
}

/// A neighbour, to be removed.
pub(super) fn neighbour(neighbour: &Neighbour) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = match neighbour.ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.ifindex = neighbour.link;
    let to = NeighbourAddress::from(neighbour.ip);
    message.attributes.push(NeighbourAttribute::Destination(to));
    message
}

/// A forwarding entry, to be removed.
pub(super) fn forward(forward: &Forward) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = forward.link;
    message.header.flags = NeighbourFlags::Own;
    let mac = forward.mac.bytes().to_vec();
    message
        .attributes
        .push(NeighbourAttribute::LinkLayerAddress(mac));
    let to = NeighbourAddress::from(forward.to);
    message.attributes.push(NeighbourAttribute::Destination(to));
    message
}

/// A route.
pub(super) fn route(route: &Route) -> Result<RouteMessage, KernelError> {
    let invalid = |error: String| KernelError {
        operation: format!("describe route {route}"),
        source: io::Error::new(io::ErrorKind::InvalidInput, error),
    };
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(route.net.network(), route.net.prefix_len())
        .map_err(|e| invalid(e.to_string()))?
        .output_interface(route.link)
        .protocol(RouteProtocol::from(route.protocol));
    if let Some(gateway) = route.gateway {
        builder = builder
            .gateway(gateway)
            .map_err(|e| invalid(e.to_string()))?;
    }
    if route.onlink {
        builder = builder.onlink();
    }
    if let Some(metric) = route.metric {
        builder = builder.priority(metric);
    }
    Ok(builder.build())
}

/// The same route in another table than the main one.
pub(super) fn in_table(mut message: RouteMessage, table: u32) -> RouteMessage {
    message.header.table = RouteHeader::RT_TABLE_UNSPEC;
    message.attributes.push(RouteAttribute::Table(table));
    message
}

/// The rule that leads marked probes to their table.
pub(super) fn probe_rule(version: IpVersion) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = match version {
        IpVersion::V4 => AddressFamily::Inet,
        IpVersion::V6 => AddressFamily::Inet6,
    };
    message.header.table = RouteHeader::RT_TABLE_UNSPEC;
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(PROBE_PRIORITY),
        RuleAttribute::FwMark(PROBE_MARK),
        RuleAttribute::FwMask(u32::MAX),
        RuleAttribute::Table(PROBE_TABLE),
        RuleAttribute::Protocol(RouteProtocol::from(PROTOCOL_LODEN)),
    ];
    message
}

/// Whether a rule is that one, or was made to be: it leads to our table and is marked as ours.
pub(super) fn is_probe_rule(message: &RuleMessage) -> bool {
    let has = |wanted: &RuleAttribute| message.attributes.contains(wanted);
    has(&RuleAttribute::Table(PROBE_TABLE))
        && has(&RuleAttribute::Protocol(RouteProtocol::from(
            PROTOCOL_LODEN,
        )))
}
