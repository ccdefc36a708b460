//! Owns the nftables form of a VXLAN device's source check: the table, its sets, and reading back what the sets
//! hold. Pure: runs nothing.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;

use super::{Scope, Senders, Tunnel};
use crate::addr::Mac;

/// How every such table is called, before the VNI.
pub(in crate::firewall) const PREFIX: &str = "loden-vxlan-";

/// The counter of datagrams from unknown nodes; named like the data plane's reason for the same drop.
pub(super) const UNKNOWN_PEER: &str = "unknown_peer";

/// The counter of inner packets that their sender may not send; likewise.
pub(super) const SPOOFED_SOURCE: &str = "spoofed_source";

/// Elements of one command: short enough lines for every parser.
const CHUNK: usize = 1000;

/// The sets of a table, with the type of what they hold.
const SETS: [(&str, &str); 4] = [
    ("outer-v4", "type ipv4_addr;"),
    ("outer-v6", "type ipv6_addr;"),
    ("inner-v4", "type ether_addr . ipv4_addr; flags interval;"),
    ("inner-v6", "type ether_addr . ipv6_addr; flags interval;"),
];

/// Where packets are looked at that the devices have unwrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// As they leave a device. No other packet costs anything, but the chain is bound to the devices that there are
    /// when it is made; needs Linux 5.10.
    Ingress,
    /// With all packets of the node.
    Prerouting,
}

/// The names of the sets.
pub(super) fn set_names(scope: Scope) -> impl Iterator<Item = &'static str> {
    sets(scope).map(|(name, _)| name)
}

fn sets(scope: Scope) -> impl Iterator<Item = (&'static str, &'static str)> {
    let used = move |(name, _): &(&str, &str)| match name.starts_with("outer") {
        true => scope.outer,
        false => scope.inner,
    };
    SETS.into_iter().filter(used)
}

/// The table's name.
pub(super) fn name(tunnel: &Tunnel) -> String {
    format!("{PREFIX}{}", tunnel.vni)
}

/// The transaction that leaves a table for these senders, whatever was there.
pub(super) fn replace(tunnel: &Tunnel, scope: Scope, place: Place, senders: &Senders) -> String {
    let name = name(tunnel);
    let mut script = remove(&name);
    let mut line = |text: &str| {
        script.push_str(text);
        script.push('\n');
    };
    line(&format!("table inet {name} {{"));
    for counter in [UNKNOWN_PEER, SPOOFED_SOURCE] {
        line(&format!("counter {counter} {{ }}"));
    }
    for (set, kind) in sets(scope) {
        line(&format!("set {set} {{ {kind} }}"));
    }
    if scope.outer {
        // Where the kernel's tunnel takes datagrams off, fragments are put together by then. Bytes 12 to 14 behind
        // the start of the UDP header are the VNI (RFC 7348 section 5); other networks may share the port. Peers
        // come first: each rule costs a packet.
        line("chain outer {");
        line("type filter hook input priority -300; policy accept;");
        line("ip saddr @outer-v4 accept");
        line("ip6 saddr @outer-v6 accept");
        line(&format!(
            "udp dport {} @th,96,24 {} counter name {UNKNOWN_PEER} drop",
            tunnel.port, tunnel.vni
        ));
        line("}");
    }
    if scope.inner {
        let devices: Vec<String> = tunnel
            .devices
            .iter()
            .map(|it| format!("\"{it}\""))
            .collect();
        let devices = devices.join(", ");
        let (hook, others, families) = match place {
            Place::Ingress => (
                format!("ingress devices = {{ {devices} }}"),
                None,
                "meta protocol { ip, ip6 } ",
            ),
            Place::Prerouting => (
                "prerouting".to_owned(),
                Some(format!("iifname != {{ {devices} }} accept")),
                "",
            ),
        };
        line("chain inner {");
        line(&format!(
            "type filter hook {hook} priority -300; policy accept;"
        ));
        if let Some(others) = others {
            line(&others);
        }
        line("ether saddr . ip saddr @inner-v4 accept");
        line("ether saddr . ip6 saddr @inner-v6 accept");
        line(&format!("{families}counter name {SPOOFED_SOURCE} drop"));
        line("}");
    }
    line("}");
    script.push_str(&edit(tunnel, scope, &Senders::default(), senders));
    script
}

/// The transaction that removes a table, if it is there.
pub(super) fn remove(name: &str) -> String {
    // Adding first lets the deletion succeed when there is no table; `destroy` needs Linux 6.3.
    format!("add table inet {name}\ndelete table inet {name}\n")
}

/// The transaction from one set of senders to another.
pub(super) fn edit(tunnel: &Tunnel, scope: Scope, before: &Senders, after: &Senders) -> String {
    let name = name(tunnel);
    let mut script = String::new();
    for set in set_names(scope) {
        let (before, after) = (elements(set, before), elements(set, after));
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
pub(super) fn elements(set: &str, senders: &Senders) -> BTreeSet<String> {
    let v4 = set.ends_with("v4");
    if set.starts_with("outer") {
        let of_family = |ip: &&IpAddr| ip.is_ipv4() == v4;
        senders
            .outer
            .iter()
            .filter(of_family)
            .map(IpAddr::to_string)
            .collect()
    } else {
        let of_family = |(_, net): &&(Mac, IpNet)| matches!(net, IpNet::V4(_)) == v4;
        let text = |(mac, net): &(Mac, IpNet)| format!("{mac} . {net}");
        senders.inner.iter().filter(of_family).map(text).collect()
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
pub(super) fn parse_tables(listing: &str) -> Vec<String> {
    let ours = |line: &str| {
        let name = line.trim().strip_prefix("table inet ")?;
        let vni = name.strip_prefix(PREFIX)?;
        vni.bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| name.to_owned())
    };
    listing.lines().filter_map(ours).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tunnel() -> Tunnel {
        Tunnel {
            vni: 7,
            port: 8472,
            devices: vec!["flannel.7".to_owned()],
            outer: true,
        }
    }

    fn senders(count: u8) -> Senders {
        let mut senders = Senders::default();
        for n in 0..count {
            senders.outer.insert([192, 0, 2, n].into());
            let net = format!("198.18.{n}.0/24").parse().unwrap();
            senders.inner.insert((Mac::local(n.into()), net));
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
        assert_eq!(parse_elements(listing), elements("inner-v4", &senders(2)));
        assert!(parse_elements("table inet t {\n\tset s {\n\t}\n}").is_empty());
        let counters =
            "table inet t {\n\tcounter unknown_peer {\n\t\tpackets 12 bytes 720\n\t}\n}\n";
        assert_eq!(parse_counter(counters, UNKNOWN_PEER), Some(12));
        assert_eq!(parse_counter(counters, SPOOFED_SOURCE), None);
        let tables = "table ip nat\ntable inet loden-vxlan-12\ntable inet loden-vxlan-x\n";
        assert_eq!(parse_tables(tables), ["loden-vxlan-12"]);
    }
}
