//! The best way that is proven to every peer: nodes on one link, a node behind a router, one that carries VXLAN in user
//! space, one that says nothing of itself, and a firewall that comes and goes. Looks through iproute2. Needs root.

#[path = "common/cluster.rs"]
mod cluster;
mod common;

use std::time::Duration;

use cluster::{Cluster, DUAL, Pings, V4, VXLAN};
use loden::lab::Member;
use nix::sys::signal::Signal;

const AUTO: &str = r#"{"Type":"vxlan","Auto":true}"#;

/// How node `n` reaches a peer, and why not by something better.
fn way(cluster: &Cluster, n: u8, peer: &str) -> (String, String) {
    let status = cluster.status(n);
    let peers = status["peers"].as_array().cloned().unwrap_or_default();
    let of_peer = |it: &&serde_json::Value| it["subnets"][0] == peer;
    let peer = peers.iter().find(of_peer).cloned().unwrap_or_default();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    (text(&peer["transport"]), text(&peer["rejected"][0]["why"]))
}

fn await_way(cluster: &Cluster, n: u8, peer: &str, wanted: &str) {
    let what = format!("{wanted} from node {n} to {peer}");
    cluster.wait_until(&what, || way(cluster, n, peer).0 == wanted);
}

/// Waits until that is the way, and the better one is rejected for that reason.
fn await_reason(cluster: &Cluster, n: u8, peer: &str, transport: &str, named: &str) {
    let what = format!("{transport} from node {n} to {peer}, because {named}");
    cluster.wait_until(&what, || {
        let (by, why) = way(cluster, n, peer);
        by == transport && why.contains(named)
    });
}

/// A lease as an unmodified flannel writes it.
const UNMODIFIED: &str = r#"{"PublicIP":"192.0.2.99","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}}"#;

#[test]
fn every_peer_is_reached_by_the_best_way_that_is_proven_and_no_longer() {
    let mut cluster = Cluster::idle(4, V4, AUTO);
    cluster.route_node_3();
    for n in [1, 2, 3] {
        cluster.start(n);
    }
    cluster.start_with(4, &["--vxlan=user"]);
    cluster.put("198.18.99.0-24", UNMODIFIED);
    for (n, peer) in [(1, 2), (2, 1), (1, 4), (4, 1), (2, 4), (4, 2)] {
        await_way(&cluster, n, &format!("198.18.{peer}.0/24"), "route");
    }
    // What is proven is what the kernel does.
    for line in [
        "198.18.2.0/24 via 192.0.2.2 dev eth0",
        "198.18.4.0/24 via 192.0.2.4 dev eth0",
        "198.18.3.0/24 via 198.18.3.0 dev flannel.1 onlink",
        "198.18.99.0/24 via 198.18.99.0 dev flannel.1 onlink",
    ] {
        cluster.wait_until(line, || {
            let routes = cluster.shown(1, "ip", "-4 route show proto 108");
            routes.iter().any(|route| route == line)
        });
    }
    for (n, peer, transport, named) in [
        (1, 3, "vxlan", "on no link"),
        (3, 1, "vxlan", "on no link"),
        (4, 3, "vxlan in user space", "on no link"),
        (1, 99, "vxlan", "does not say that it takes any"),
        (
            4,
            99,
            "vxlan in user space",
            "does not say that it takes any",
        ),
    ] {
        await_reason(
            &cluster,
            n,
            &format!("198.18.{peer}.0/24"),
            transport,
            named,
        );
    }
    let nodes = [1, 2, 3, 4];
    for (from, to) in nodes
        .into_iter()
        .flat_map(|from| nodes.map(|to| (from, to)))
    {
        if from != to {
            cluster.await_ping(from, &format!("198.18.{to}.2"));
        }
    }
    // One MTU for all.
    for n in nodes {
        let env = std::fs::read_to_string(cluster.file(n, "subnet.env")).unwrap();
        assert!(env.contains("FLANNEL_MTU=1450\n"), "{env}");
    }
    // The lease is one that flannel reads, and says what its node can do behind that.
    let lease = cluster.lease(4);
    let says =
        r#","Loden":{"Transports":["route","vxlan"],"By":"user","Port":8472,"ProbePort":18285}}"#;
    assert!(lease.contains(says), "{lease}");

    // A firewall that knows nothing of the overlay: packets past the tunnel do not arrive any more.
    let pings = Pings::start(&cluster, 1, "198.18.2.2");
    pings.go_on(&cluster);
    for rule in [
        "add table ip wall",
        "add chain ip wall c { type filter hook prerouting priority -500 ; }",
        "add rule ip wall c iifname eth0 ip saddr 198.18.1.0/24 drop",
    ] {
        cluster.run(Member::Node(2), "nft", rule);
    }
    let why = "probes of 1450 bytes past the tunnel have no answer";
    await_reason(&cluster, 1, "198.18.2.0/24", "vxlan", why);
    pings.go_on(&cluster);
    pings.assert_gap(Duration::from_millis(3500), "until the tunnel has it");
    // The others do not mind.
    await_way(&cluster, 1, "198.18.4.0/24", "route");
    cluster.run(Member::Node(2), "nft", "delete table ip wall");
    await_way(&cluster, 1, "198.18.2.0/24", "route");
    await_way(&cluster, 2, "198.18.1.0/24", "route");
    pings.go_on(&cluster);
    drop(pings);

    // Behind a smaller link not every packet fits.
    cluster.ip(Member::Node(4), "link set eth0 mtu 1400", 4);
    cluster.end(4, Signal::SIGTERM);

    // Without it, nothing of it is left.
    cluster.configure(VXLAN);
    cluster.end(1, Signal::SIGTERM);
    cluster.start(1);
    await_way(&cluster, 1, "198.18.2.0/24", "vxlan");
    cluster.wait_until("no rule and no table", || {
        let rules = cluster.shown(1, "ip", "rule show").join(" ");
        !rules.contains("27756") && cluster.shown(1, "ip", "route show table 27756").is_empty()
    });
    assert!(!cluster.lease(1).contains("Loden"));
    // Then node 2 does not take it past the tunnel, either.
    await_way(&cluster, 2, "198.18.1.0/24", "vxlan");
    cluster.await_ping(1, "198.18.2.2");
}

#[test]
fn both_families_are_proven_and_a_node_that_filters_strictly_is_left_in_the_tunnel_by_name() {
    let mut cluster = Cluster::new(3, DUAL, r#"{"Type":"auto"}"#);
    for (n, peer) in [(1, 2), (2, 1), (1, 3), (3, 1)] {
        await_way(&cluster, n, &format!("198.18.{peer}.0/24"), "route");
        cluster.await_ping(n, &format!("fd00:18:0:{peer}::2"));
    }
    let direct = "fd00:18:0:2::/64 via 2001:db8::2 dev eth0";
    cluster.wait_until(direct, || {
        let routes = cluster.shown(1, "ip", "-6 route show proto 108");
        routes.iter().any(|route| route.starts_with(direct))
    });
    // The lease says vxlan, whatever the configuration calls it.
    assert!(cluster.lease(1).contains(r#""BackendType":"vxlan""#));

    let node = cluster.lab.netns(Member::Node(3));
    for link in ["all", "default", "eth0", "flannel.1"] {
        let setting = format!("ipv4/conf/{link}/rp_filter");
        node.set_sysctls(&[(setting.as_str(), "1")]).unwrap();
    }
    cluster.end(3, Signal::SIGTERM);
    cluster.start(3);
    let why = "its lease says that it takes none";
    await_reason(&cluster, 1, "198.18.3.0/24", "vxlan", why);
    let why = "reverse path filtering is strict on eth0";
    await_reason(&cluster, 3, "198.18.1.0/24", "vxlan", why);
    cluster.await_ping(3, "198.18.1.2");
    cluster.await_ping(1, "198.18.3.2");

    // Killed, and started without what it did: nothing of it stays behind.
    cluster.end(2, Signal::SIGKILL);
    assert!(
        cluster
            .shown(2, "ip", "rule show")
            .join(" ")
            .contains("27756")
    );
    let cleanup = [common::LODEN, "cleanup"];
    cluster
        .lab
        .run(Member::Node(2), cleanup[0], &cleanup[1..])
        .unwrap();
    for args in ["rule show", "-6 rule show"] {
        let rules = cluster.shown(2, "ip", args).join(" ");
        assert!(!rules.contains("27756"), "{rules}");
    }
    assert!(cluster.shown(2, "ip", "route show table 27756").is_empty());
    assert!(
        cluster
            .shown(2, "ip", "-6 route show table 27756")
            .is_empty()
    );
}

/// Why node `n` reaches a peer past the tunnel.
fn proof(cluster: &Cluster, n: u8, peer: &str) -> String {
    let status = cluster.status(n);
    let peers = status["peers"].as_array().cloned().unwrap_or_default();
    let peer = peers.iter().find(|it| it["subnets"][0] == peer);
    let why = peer.and_then(|peer| peer["proven"][0]["why"].as_str());
    why.unwrap_or_default().to_owned()
}

#[test]
fn ways_past_and_through_the_tunnel_and_both_directions_of_each_are_independent() {
    let mut cluster = Cluster::idle(2, DUAL, AUTO);
    let (one, two) = ("198.18.1.0/24", "198.18.2.0/24");
    // Nobody lets VXLAN pass, in or out.
    for n in [1, 2] {
        for rule in [
            "add table inet port",
            "add chain inet port in { type filter hook input priority -500 ; }",
            "add chain inet port out { type filter hook output priority -500 ; }",
            "add rule inet port in udp dport 8472 drop",
            "add rule inet port out udp dport 8472 drop",
        ] {
            cluster.run(Member::Node(n), "nft", rule);
        }
        cluster.start(n);
    }
    for (from, to, peer) in [(1, 2, two), (2, 1, one)] {
        await_way(&cluster, from, peer, "route");
        cluster.await_ping(from, &format!("198.18.{to}.2"));
        cluster.await_ping(from, &format!("fd00:18:0:{to}::2"));
        cluster.wait_until("a proof", || {
            proof(&cluster, from, peer).contains("bytes arrive past the tunnel")
        });
    }

    // The other way round: VXLAN passes, and plain packets do in one direction only.
    for n in [1, 2] {
        cluster.run(Member::Node(n), "nft", "delete table inet port");
    }
    for rule in [
        "add table inet wall",
        "add chain inet wall c { type filter hook prerouting priority -500 ; }",
        "add rule inet wall c iifname eth0 ip saddr 198.18.2.0/24 drop",
        "add rule inet wall c iifname eth0 ip6 saddr fd00:18:0:2::/64 drop",
    ] {
        cluster.run(Member::Node(1), "nft", rule);
    }
    await_reason(&cluster, 2, one, "vxlan", "past the tunnel have no answer");
    // Each is proven for itself: once the answers to node 1 come through the tunnel, its own way is proven again.
    for to in ["198.18.2.2", "fd00:18:0:2::2"] {
        cluster.await_ping(1, to);
    }
    await_way(&cluster, 1, two, "route");
    assert_eq!(proof(&cluster, 2, one), "");
}
