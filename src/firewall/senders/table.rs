//! Owns the nftables form of a source check: the table, its sets, and reading back what the sets
//! hold. Pure: runs nothing.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;

use super::{Scope, Senders, TableOf, Tunnel, TunnelKind};
use crate::addr::Origin;

/// How the table of a VXLAN network is called, before the VNI.
const PREFIX_VXLAN: &str = "loden-vxlan-";

/// How the table of IPIP is called.
const NAME_IPIP: &str = "loden-ipip";

/// Before everything else that looks at what is addressed to the node.
const INPUT: &str = "type filter hook input priority -300; policy accept;";

/// The counter of datagrams from unknown nodes; named like the data plane's reason for the same drop.
pub(super) const UNKNOWN_PEER: &str = "unknown_peer";

/// The counter of inner packets that their sender may not send; likewise.
pub(super) const SPOOFED_SOURCE: &str = "spoofed_source";

/// Elements of one command: short enough lines for every parser.
const CHUNK: usize = 1000;

/// Where packets are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// What VXLAN devices have unwrapped, as it leaves a device. No other packet costs anything, but the chain is bound
    /// to the devices that there are when it is made; needs Linux 5.10.
    Ingress,
    /// What VXLAN devices have unwrapped, with all packets of the node.
    Prerouting,
    /// What is addressed to this node, before any device unwraps it.
    Input,
}

/// Where it costs least.
pub(super) const fn best_place(kind: &TunnelKind) -> Place {
    match kind {
        TunnelKind::Vxlan { .. } => Place::Ingress,
        TunnelKind::Ipip => Place::Input,
    }
}

/// Where it can be done on every kernel.
pub(super) const fn least_place(kind: &TunnelKind) -> Place {
    match kind {
        TunnelKind::Vxlan { .. } => Place::Prerouting,
        TunnelKind::Ipip => Place::Input,
    }
}

/// The names of the sets.
pub(super) fn set_names(kind: &TunnelKind, scope: Scope) -> impl Iterator<Item = &'static str> {
    sets(kind, scope).map(|(name, _)| name)
}

/// The sets of a table, with the type of what they hold. A packet's own header is only bytes to whoever looks at what is
/// around it: the source stands 12 bytes behind its start (RFC 791 section 3.1).
fn sets(
    kind: &TunnelKind,
    scope: Scope,
) -> impl Iterator<Item = (&'static str, &'static str)> + use<> {
    let all: &[_] = match kind {
        TunnelKind::Vxlan { .. } => &[
            ("outer-v4", "type ipv4_addr;"),
            ("outer-v6", "type ipv6_addr;"),
            ("inner-v4", "type ether_addr . ipv4_addr; flags interval;"),
            ("inner-v6", "type ether_addr . ipv6_addr; flags interval;"),
        ],
        TunnelKind::Ipip => &[
            ("outer-v4", "type ipv4_addr;"),
            ("own-v4", "type ipv4_addr;"),
            ("others-v4", "type ipv4_addr;"),
            ("inner-v4", "typeof ip saddr . @th,96,32; flags interval;"),
        ],
    };
    let used = move |(name, _): &(&str, &str)| match *name {
        "outer-v4" | "outer-v6" => scope.outer,
        "inner-v4" | "inner-v6" => scope.inner,
        _ => true,
    };
    all.iter().copied().filter(used)
}

/// The table's name.
pub(super) fn name(kind: &TunnelKind) -> String {
    match kind {
        TunnelKind::Vxlan { vni, .. } => format!("{PREFIX_VXLAN}{vni}"),
        TunnelKind::Ipip => NAME_IPIP.to_owned(),
    }
}

/// Whose table is called so, if it is one of these.
fn named(name: &str) -> Option<TableOf> {
    if name == NAME_IPIP {
        return Some(TableOf::Ipip);
    }
    let vni = name.strip_prefix(PREFIX_VXLAN)?;
    let digits = vni.bytes().all(|b| b.is_ascii_digit());
    vni.parse().ok().filter(|_| digits).map(TableOf::Vxlan)
}

/// Whether a table of this name is one of these.
pub(in crate::firewall) fn is_ours(name: &str) -> bool {
    named(name).is_some()
}

/// The transaction that leaves a table for these senders, whatever was there.
pub(super) fn replace(tunnel: &Tunnel, scope: Scope, place: Place, senders: &Senders) -> String {
    let name = name(&tunnel.kind);
    let mut lines = vec![format!("table inet {name} {{")];
    for counter in [UNKNOWN_PEER, SPOOFED_SOURCE] {
        lines.push(format!("counter {counter} {{ }}"));
    }
    for (set, kind) in sets(&tunnel.kind, scope) {
        lines.push(format!("set {set} {{ {kind} }}"));
    }
    match &tunnel.kind {
        TunnelKind::Vxlan { vni, port, devices } => {
            if scope.outer {
                lines.extend(vxlan_outer(*port, senders.shared.then_some(*vni)));
            }
            if scope.inner {
                lines.extend(vxlan_inner(devices, place));
            }
        }
        TunnelKind::Ipip => lines.extend(ipip(scope)),
    }
    lines.push("}\n".to_owned());
    remove(&name) + &lines.join("\n") + &edit(tunnel, scope, &Senders::default(), senders)
}

/// Where the kernel's tunnel takes datagrams off, fragments are put together by then. Peers come first: each rule costs a
/// packet.
///
/// Where other networks share the port, bytes 12 to 14 behind the start of the UDP header are the VNI (RFC 7348 section
/// 5). That is asked only then: a `UDP_SEGMENT` send may come in as one superpacket, whose first datagram is all that is
/// seen here, and is taken apart behind.
fn vxlan_outer(port: u16, only: Option<u32>) -> [String; 6] {
    let network = only.map_or_else(String::new, |vni| format!("@th,96,24 {vni} "));
    [
        "chain outer {".to_owned(),
        INPUT.to_owned(),
        "ip saddr @outer-v4 accept".to_owned(),
        "ip6 saddr @outer-v6 accept".to_owned(),
        format!("udp dport {port} {network}counter name {UNKNOWN_PEER} drop"),
        "}".to_owned(),
    ]
}

/// The inner source is not looked at before the packet is unwrapped, for the same superpackets' sake.
fn vxlan_inner(devices: &[String], place: Place) -> Vec<String> {
    let devices: Vec<String> = devices.iter().map(|it| format!("\"{it}\"")).collect();
    let devices = devices.join(", ");
    let mut lines = vec!["chain inner {".to_owned()];
    let families = match place {
        Place::Ingress => {
            lines.push(format!(
                "type filter hook ingress devices = {{ {devices} }} priority -300; policy accept;"
            ));
            "meta protocol { ip, ip6 } "
        }
        Place::Prerouting | Place::Input => {
            lines.push("type filter hook prerouting priority -300; policy accept;".to_owned());
            lines.push(format!("iifname != {{ {devices} }} accept"));
            ""
        }
    };
    lines.extend([
        "ether saddr . ip saddr @inner-v4 accept".to_owned(),
        "ether saddr . ip6 saddr @inner-v6 accept".to_owned(),
        format!("{families}counter name {SPOOFED_SOURCE} drop"),
        "}".to_owned(),
    ]);
    lines
}

/// Both sources in one look, before anything is unwrapped: all that a superpacket of IP in IP holds has one inner source.
/// Peers come first. What comes to another address of the node, or is another tunnel's, is none of our device's.
fn ipip(scope: Scope) -> Vec<String> {
    let mut lines = vec!["chain outer {", INPUT];
    if scope.inner {
        lines.push("ip protocol 4 ip saddr . @th,96,32 @inner-v4 accept");
    }
    lines.push("ip protocol 4 ip saddr @others-v4 accept");
    let mut lines: Vec<String> = lines.into_iter().map(str::to_owned).collect();
    let to_us = "ip protocol 4 ip daddr @own-v4";
    if scope.outer {
        lines.push(format!(
            "{to_us} ip saddr != @outer-v4 counter name {UNKNOWN_PEER} drop"
        ));
    }
    if scope.inner {
        lines.push(format!("{to_us} counter name {SPOOFED_SOURCE} drop"));
    }
    lines.push("}".to_owned());
    lines
}

/// The transaction that removes a table, if it is there.
pub(super) fn remove(name: &str) -> String {
    // Adding first lets the deletion succeed when there is no table; `destroy` needs Linux 6.3.
    format!("add table inet {name}\ndelete table inet {name}\n")
}

/// The transaction from one set of senders to another.
pub(super) fn edit(tunnel: &Tunnel, scope: Scope, before: &Senders, after: &Senders) -> String {
    let name = name(&tunnel.kind);
    let mut script = String::new();
    for set in set_names(&tunnel.kind, scope) {
        let (before, after) = (elements(set, tunnel, before), elements(set, tunnel, after));
        for (verb, elements) in [
            ("delete", before.difference(&after)),
            ("add", after.difference(&before)),
        ] {
            let elements: Vec<&str> = elements.map(String::as_str).collect();
            for some in elements.chunks(CHUNK) {
                writeln!(
                    script,
                    "{verb} element inet {name} {set} {{ {} }}",
                    some.join(", ")
                )
                .expect("writing to a String cannot fail");
            }
        }
    }
    script
}

/// What a set should hold, in the words of a listing.
pub(super) fn elements(set: &str, tunnel: &Tunnel, senders: &Senders) -> BTreeSet<String> {
    let v4 = set.ends_with("v4");
    let addrs = match set {
        "own-v4" => &senders.own,
        "others-v4" => &senders.others,
        "inner-v4" | "inner-v6" => {
            let inner = senders
                .inner
                .iter()
                .filter(|(_, net)| matches!(net, IpNet::V4(_)) == v4);
            return inner
                .filter_map(|(origin, net)| pair(tunnel, origin, net))
                .collect();
        }
        _ => &senders.outer,
    };
    let of_family = addrs.iter().filter(|ip| ip.is_ipv4() == v4);
    of_family.map(IpAddr::to_string).collect()
}

/// An element of the sets that hold pairs; none for the origin of another kind of tunnel.
fn pair(tunnel: &Tunnel, origin: &Origin, net: &IpNet) -> Option<String> {
    match (&tunnel.kind, origin, net) {
        (TunnelKind::Vxlan { .. }, Origin::Frame(mac), net) => Some(format!("{mac} . {net}")),
        (TunnelKind::Ipip, Origin::Datagram(from), IpNet::V4(net)) => {
            let from = match tunnel.outer {
                true => from.to_string(),
                false => "0.0.0.0/0".to_owned(),
            };
            let [first, last] = [net.network(), net.broadcast()].map(u32::from);
            Some(match first == last {
                true => format!("{from} . {first:#x}"),
                false => format!("{from} . {first:#x}-{last:#x}"),
            })
        }
        (TunnelKind::Vxlan { .. }, Origin::Datagram(_), _)
        | (TunnelKind::Ipip, Origin::Frame(_), _)
        | (TunnelKind::Ipip, _, IpNet::V6(_)) => None,
    }
}

/// What a listing of a set says it holds.
pub(super) fn parse_elements(listing: &str) -> BTreeSet<String> {
    let Some((_, rest)) = listing.split_once("elements = {") else {
        return BTreeSet::new();
    };
    let inside = rest.split_once('}').map_or(rest, |(inside, _)| inside);
    let words = |element: &str| element.split_whitespace().collect::<Vec<_>>().join(" ");
    inside
        .split(',')
        .map(words)
        .filter(|text| !text.is_empty())
        .collect()
}

/// What a counter of a listing counts.
pub(super) fn parse_counter(listing: &str, counter: &str) -> Option<u64> {
    let (_, rest) = listing.split_once(&format!("counter {counter} {{"))?;
    let (_, rest) = rest.split_once("packets ")?;
    rest.split_ascii_whitespace().next()?.parse().ok()
}

/// The tables of this kind in `nft list tables`.
pub(super) fn parse_tables(listing: &str) -> Vec<(String, TableOf)> {
    let ours = |line: &str| {
        let name = line.trim().strip_prefix("table inet ")?;
        Some((name.to_owned(), named(name)?))
    };
    listing.lines().filter_map(ours).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Mac;

    fn tunnel() -> Tunnel {
        let kind = TunnelKind::Vxlan {
            vni: 7,
            port: 8472,
            devices: vec!["flannel.7".to_owned()],
        };
        Tunnel { kind, outer: true }
    }

    fn senders(count: u8) -> Senders {
        let mut senders = Senders::default();
        for n in 0..count {
            senders.outer.insert([192, 0, 2, n].into());
            let net = format!("198.18.{n}.0/24").parse().unwrap();
            senders
                .inner
                .insert((Origin::Frame(Mac::local(n.into())), net));
        }
        senders
    }

    #[test]
    fn an_edit_names_only_what_differs() {
        let scope = Scope {
            outer: true,
            inner: true,
        };
        let script = edit(&tunnel(), scope, &senders(3), &senders(2));
        let lines: Vec<&str> = script.lines().collect();
        assert_eq!(
            lines,
            [
                "delete element inet loden-vxlan-7 outer-v4 { 192.0.2.2 }",
                "delete element inet loden-vxlan-7 inner-v4 { 02:00:00:00:00:02 . 198.18.2.0/24 }",
            ]
        );
        assert_eq!(edit(&tunnel(), scope, &senders(3), &senders(3)), "");
    }

    #[test]
    fn a_listing_is_read_whatever_its_lines() {
        let listing = "table inet loden-vxlan-7 {\n\tset inner-v4 {\n\t\ttype ether_addr . ipv4_addr\n\t\tflags interval\n\
            \t\telements = { 02:00:00:00:00:00 . 198.18.0.0/24,\n\t\t\t     02:00:00:00:00:01 . 198.18.1.0/24 }\n\t}\n}\n";
        assert_eq!(
            parse_elements(listing),
            elements("inner-v4", &tunnel(), &senders(2))
        );
        assert!(parse_elements("table inet t {\n\tset s {\n\t}\n}").is_empty());
        let counters =
            "table inet t {\n\tcounter unknown_peer {\n\t\tpackets 12 bytes 720\n\t}\n}\n";
        assert_eq!(parse_counter(counters, UNKNOWN_PEER), Some(12));
        assert_eq!(parse_counter(counters, SPOOFED_SOURCE), None);
        let tables = "table ip nat\ntable inet loden-vxlan-12\ntable inet loden-vxlan-x\ntable inet loden-vxlan-\n\
            table ip loden-ipip\ntable inet loden-ipip\ntable inet loden-ipip2\n";
        assert_eq!(
            parse_tables(tables),
            [
                ("loden-vxlan-12".to_owned(), TableOf::Vxlan(12)),
                ("loden-ipip".to_owned(), TableOf::Ipip)
            ]
        );
    }
}
