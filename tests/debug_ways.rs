//! `loden explain` and `loden doctor` where packets have several ways: past the tunnel, through the kernel's, through ours.
//! What is said is what then happens to the packet, by what the kernel counts. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/asked.rs"]
mod asked;
#[path = "common/cluster.rs"]
mod cluster;
mod common;

use std::net::UdpSocket;

use asked::{await_trace, count, counted, loden};
use cluster::{Cluster, V4};
use loden::lab::Member;
use serde_json::Value;

/// Packets of a kind, so that the kernel's own now and then do not hide them.
const SOME: u64 = 50;

/// What node `n` says of a packet between two pods.
fn explain(cluster: &Cluster, n: u8, from: u8, to: u8, args: &[&str]) -> Value {
    let (from, to) = (format!("198.18.{from}.2"), format!("198.18.{to}.2"));
    loden(cluster, n, &[&["explain", &from, &to], args].concat())
}

fn step<'a>(said: &'a Value, what: &str) -> &'a str {
    let mut steps = said["steps"].as_array().into_iter().flatten();
    let step = steps.find(|step| step["what"] == what);
    step.map_or("", |step| step["found"].as_str().unwrap())
}

fn has(said: &Value, what: &str, words: &str) {
    let found = match what {
        "verdict" => said["verdict"].as_str().unwrap(),
        what => step(said, what),
    };
    assert!(found.contains(words), "{what}: {words}: {said:#}");
}

/// Waits until node `n` says this.
fn says(cluster: &Cluster, n: u8, (from, to): (u8, u8), what: &str, words: &str) -> Value {
    let mut said = Value::Null;
    cluster.wait_until(&format!("{words} under {what}"), || {
        said = explain(cluster, n, from, to, &[]);
        step(&said, what).contains(words)
    });
    said
}

/// A counter that an explanation names: of the status, or of a link.
fn counter(cluster: &Cluster, n: u8, name: &str) -> u64 {
    if let Some((direction, rest)) = name.split_once("_packets of ") {
        let link = rest.split(' ').next().unwrap();
        return link_counter(cluster, n, direction, link);
    }
    let status = loden(cluster, n, &["status"]);
    let pointer = format!("/{}", name.replace('.', "/"));
    status.pointer(&pointer).and_then(Value::as_u64).unwrap()
}

fn link_counter(cluster: &Cluster, n: u8, direction: &str, link: &str) -> u64 {
    let shown = cluster.run(
        Member::Node(n),
        "ip",
        &format!("-s -j link show dev {link}"),
    );
    let shown: Value = serde_json::from_str(&shown).unwrap();
    shown[0]["stats64"][direction]["packets"].as_u64().unwrap()
}

/// Datagrams from pod to pod.
fn send(cluster: &Cluster, from: u8, to: u8) {
    let pod = cluster.lab.netns(Member::Pod(from, 1));
    let socket = pod.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    for _ in 0..SOME {
        let _refused = socket.send_to(b"explained", format!("198.18.{to}.2:9"));
    }
}

/// Sends, and sees the counters go up that an explanation named, and the packets arrive, or not one of them.
fn comes_true(cluster: &Cluster, n: u8, (from, to): (u8, u8), said: &Value, arrive: bool) {
    let names = said["counters"].as_array().unwrap().iter();
    let names: Vec<&str> = names.map(|name| name.as_str().unwrap()).collect();
    assert!(!names.is_empty(), "{said:#}");
    let values = || names.iter().map(|name| counter(cluster, n, name));
    let before: Vec<u64> = values().collect();
    let pod = Member::Pod(to, 1);
    count(cluster, pod, "prerouting", "udp dport 9");
    send(cluster, from, to);
    cluster.wait_until(&format!("the counters of {said:#}"), || {
        let moved = values().zip(&before).all(|(now, was)| now >= was + SOME);
        moved && (!arrive || counted(cluster, pod) == SOME)
    });
    if !arrive {
        assert_eq!(counted(cluster, pod), 0, "{said:#}");
    }
}

#[test]
fn way_that_is_proven_is_explained_and_so_is_the_tunnel_where_it_is_not() {
    let mut cluster = Cluster::idle(3, V4, r#"{"Type":"vxlan","Auto":true}"#);
    cluster.start(1);
    cluster.start(2);
    cluster.start_with(3, &["--vxlan=user"]);
    for (n, peer) in [(1, 2), (2, 1), (1, 3), (3, 1)] {
        let said = says(&cluster, n, (n, peer), "transport", "have proven that way");
        has(
            &said,
            "verdict",
            "by eth0, as loden told it (route), past the tunnel",
        );
        has(&said, "route", &format!("eth0 through 192.0.2.{peer}"));
        has(&said, "neighbour", &format!("192.0.2.{peer} is at "));
        has(&said, "mtu", "1450 for pods, 1500 on eth0");
        // Bare, and not by the tunnel.
        let bare = format!("iifname eth0 ip saddr 198.18.{n}.2 udp dport 9");
        count(&cluster, Member::Node(peer), "prerouting", &bare);
        comes_true(&cluster, n, (n, peer), &said, true);
        assert_eq!(counted(&cluster, Member::Node(peer)), SOME, "{said:#}");
        let there = says(
            &cluster,
            peer,
            (n, peer),
            "transport",
            "as its last probe did",
        );
        has(
            &there,
            "verdict",
            "takes it in by eth0, and the kernel forwards it by cni0",
        );
        comes_true(&cluster, peer, (n, peer), &there, true);
    }
    for n in [1, 2, 3] {
        let healthy = loden(&cluster, n, &["doctor", "--mesh"]);
        assert_eq!(healthy["healthy"], true, "{healthy:#}");
    }
    let traced = explain(&cluster, 3, 3, 1, &["--trace"]);
    let trace = traced["trace"].to_string();
    for part in [
        "this node: reading packet sockets on eth0: ",
        "this node: 3 on eth0: handed to the kernel, to 192.0.2.1 over route, ",
        "192.0.2.1: 3 on eth0: arrived by the kernel, from 192.0.2.3 over route, ",
        "saw 3 of them come in by underlay",
        "back from 192.0.2.1: 3 on eth0: handed to the kernel, to 192.0.2.3 over route, ",
        "back here: 3 on eth0: arrived by the kernel, from 192.0.2.1 over route, ",
    ] {
        assert!(trace.contains(part), "{part}: {trace}");
    }

    // What travels bare is dropped on node 1, so that its peers go back to their tunnels.
    let wall = "table ip wall { chain c { type filter hook prerouting priority -500; iifname eth0 ip saddr 198.18.0.0/16 drop; }; }";
    cluster.lab.run(Member::Node(1), "nft", &[wall]).unwrap();
    for (n, transport) in [
        (2, "vxlan: past it is no way: "),
        (3, "(--vxlan user): past it is no way: "),
    ] {
        let said = says(&cluster, n, (n, 1), "transport", transport);
        has(
            &said,
            "transport",
            "probes of 1450 bytes past the tunnel have no answer",
        );
        comes_true(&cluster, n, (n, 1), &said, true);
    }
    let kernel = explain(&cluster, 2, 2, 1, &[]);
    has(&kernel, "peer", "198.18.1.0 is at ");
    has(&kernel, "peer", "at node 192.0.2.1");
    has(&kernel, "verdict", "by flannel.1, as loden told it (vxlan)");
    let ours = explain(&cluster, 3, 3, 1, &["--trace"]);
    assert_eq!(ours["outcome"], "sent", "{ours:#}");
    has(&ours, "mtu", "50 of headers between them");
    let trace = ours["trace"].to_string();
    assert!(
        trace.contains("this node: 3 sent, to 192.0.2.1:8472"),
        "{trace}"
    );
    assert!(!trace.contains("sight ends"), "{trace}");
    assert!(
        trace.contains("192.0.2.1: 3 on flannel.1: arrived by the kernel, from 192.0.2.3:8472"),
        "{trace}"
    );
    // Node 1 itself still sends past it. Each end has chosen, so that is no fault, and is told.
    says(&cluster, 1, (1, 2), "transport", "have proven that way");
    let there = says(
        &cluster,
        1,
        (2, 1),
        "transport",
        "through the kernel's flannel.1",
    );
    comes_true(&cluster, 1, (2, 1), &there, true);
    cluster.wait_until("a remark on both ways", || {
        let found = loden(&cluster, 1, &["doctor", "--peer", "192.0.2.2"]);
        let peer = &found["peers"][0];
        peer["findings"].as_array().unwrap().is_empty()
            && peer["notes"]
                .to_string()
                .contains("each end takes the best way")
    });

    // Somebody else's route is not what node 3 has chosen; from the other end, it is the answers that stray.
    says(&cluster, 3, (3, 2), "transport", "have proven that way");
    says(&cluster, 2, (2, 3), "transport", "have proven that way");
    cluster.ip(
        Member::Node(3),
        "route add 198.18.2.0/32 dev flannel0 proto static",
        3,
    );
    for (n, peer, words) in [
        (
            3,
            "192.0.2.2",
            "ours are sent by underlay, and come in there by kernel-tunnel",
        ),
        (
            2,
            "192.0.2.3",
            "its answers are sent by underlay, and come in here by kernel-tunnel",
        ),
    ] {
        let found = loden(&cluster, n, &["doctor", "--peer", peer]);
        let findings = found["peers"][0]["findings"].as_array().unwrap();
        assert_eq!(findings.len(), 1, "{found:#}");
        assert_eq!(findings[0]["cause"], "asymmetric_path", "{found:#}");
        let detail = findings[0]["detail"].as_str().unwrap();
        assert!(detail.contains(words), "{detail}");
    }
}

#[test]
fn direct_routes_and_what_overrides_or_filters_them_are_explained() {
    let direct = r#"{"Type":"vxlan","DirectRouting":true,"SourceCheck":"strict"}"#;
    let cluster = Cluster::new(2, V4, direct);
    let said = says(&cluster, 1, (1, 2), "transport", "DirectRouting is on");
    comes_true(&cluster, 1, (1, 2), &said, true);
    let there = says(&cluster, 2, (1, 2), "transport", "as its last probe did");
    has(&there, "source check", "none of loden's on this way");
    let healthy = loden(&cluster, 1, &["doctor"]);
    assert_eq!(healthy["healthy"], true, "{healthy:#}");
    await_trace(
        &cluster,
        &[
            "this node: reading packet sockets on flannel.1, eth0: ",
            "this node: 3 on eth0: handed to the kernel, to 192.0.2.2 over route, ",
            "192.0.2.2: reading packet sockets on flannel.1, eth0: ",
            "192.0.2.2: 3 on eth0: arrived by the kernel, from 192.0.2.1 over route, ",
            "192.0.2.2: its daemon saw 3 of them come in by underlay, ",
            "back from 192.0.2.2: 3 on eth0: handed to the kernel, to 192.0.2.1 over route, ",
            "back here: 3 on eth0: arrived by the kernel, from 192.0.2.2 over route, ",
        ],
        None,
    );

    // Somebody's own route to that one pod.
    let around = "198.18.2.2/32 via 198.18.2.0 dev flannel.1 onlink proto static";
    cluster.ip(Member::Node(1), &format!("route add {around}"), 1);
    let said = explain(&cluster, 1, 1, 2, &[]);
    has(&said, "transport", "not taken: somebody routes it here");
    has(&said, "verdict", "no MAC address for 198.18.2.0");
    cluster.ip(Member::Node(1), &format!("route del {around}"), 1);
    cluster.ip(Member::Node(1), "route add 198.18.2.2/32 dev cni0", 1);
    let said = explain(&cluster, 1, 1, 2, &[]);
    has(
        &said,
        "verdict",
        "does not reach the tunnel: the kernel routes it by cni0",
    );
    // What comes from there has no other way back, and the kernel of node 1 is told to mind.
    for link in ["all", "eth0"] {
        let setting = format!("ipv4/conf/{link}/rp_filter");
        let node = cluster.lab.netns(Member::Node(1));
        node.set_sysctls(&[(setting.as_str(), "1")]).unwrap();
    }
    let back = says(&cluster, 1, (2, 1), "reverse path", "goes back by cni0");
    has(
        &back,
        "verdict",
        "the kernel drops it: reverse path filtering is strict on eth0",
    );
    comes_true(&cluster, 1, (2, 1), &back, false);
    cluster.ip(Member::Node(1), "route del 198.18.2.2/32 dev cni0", 1);
    let back = explain(&cluster, 1, 2, 1, &[]);
    assert_eq!(back["outcome"], "delivered", "{back:#}");
    comes_true(&cluster, 1, (2, 1), &back, true);
    // A pod's packets are not forwarded any more: what comes in ends there.
    let node = cluster.lab.netns(Member::Node(1));
    node.set_sysctls(&[("ipv4/ip_forward", "0")]).unwrap();
    let back = explain(&cluster, 1, 2, 1, &[]);
    has(&back, "verdict", "does not forward packets to its pods");
    comes_true(&cluster, 1, (2, 1), &back, false);
}
