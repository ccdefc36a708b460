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
use std::time::Duration;

use asked::{await_trace, count, counted, loden};
use cluster::{Cluster, V4};
use loden::lab::{Interrupt, Member, wait};
use serde_json::Value;

/// Packets of a kind, so that the kernel's own now and then do not hide them.
const SOME: u64 = 50;

/// How often packets are sent that may have taken another way: one that is proven is given up for a while where a node stands
/// still for seconds.
const ATTEMPTS: u32 = 6;

/// How long packets are waited for before that.
const MOMENT: Duration = Duration::from_secs(10);

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

fn found<'a>(said: &'a Value, what: &str) -> &'a str {
    match what {
        "verdict" => said["verdict"].as_str().unwrap_or_default(),
        what => step(said, what),
    }
}

fn has(said: &Value, what: &str, words: &str) {
    let is_there = found(said, what).contains(words);
    assert!(is_there, "{what}: {words}: {said:#}");
}

/// Waits until node `n` says this.
fn says(cluster: &Cluster, n: u8, (from, to): (u8, u8), what: &str, words: &str) -> Value {
    let mut said = Value::Null;
    cluster.wait_until(&format!("{words} under {what}"), || {
        said = explain(cluster, n, from, to, &[]);
        found(&said, what).contains(words)
    });
    said
}

/// Waits until a trace says all of this.
fn traces(cluster: &Cluster, n: u8, (from, to): (u8, u8), is_right: impl Fn(&Value, &str) -> bool) {
    let mut said = Value::Null;
    let traced = wait::until("a trace", cluster::LIMIT, &Interrupt::default(), || {
        said = explain(cluster, n, from, to, &["--trace"]);
        let trace = said["trace"].to_string();
        Ok(is_right(&said, &trace).then_some(()))
    });
    assert!(traced.is_ok(), "{said:#}");
}

/// Waits until a node's doctor says what it should.
fn diagnoses(cluster: &Cluster, n: u8, args: &[&str], is_right: impl Fn(&Value) -> bool) {
    let mut last = Value::Null;
    let said = wait::until("a diagnosis", cluster::LIMIT, &Interrupt::default(), || {
        last = loden(cluster, n, &[&["doctor"], args].concat());
        Ok(is_right(&last).then_some(()))
    });
    assert!(said.is_ok(), "{args:?}: {last:#}");
}

/// Nothing is named, and if nodes see losses, then in the last background probes, some of which were late.
fn is_late_at_most(diagnosis: &Value) -> bool {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let is_well = |cell: &Value| cell["reach"] == "answers" || cell["reach"] == "loses";
    let peers = list(&diagnosis["peers"]);
    let rows = list(&diagnosis["mesh"]);
    diagnosis["node"].as_array().is_some_and(Vec::is_empty)
        && peers.iter().all(|peer| list(&peer["findings"]).is_empty())
        && rows.iter().all(|row| row["silent"].is_null())
        && rows
            .iter()
            .flat_map(|row| list(&row["cells"]))
            .all(|cell| is_well(&cell))
}

/// A counter that an explanation names: of the status, or of a link.
fn counter(cluster: &Cluster, n: u8, name: &str) -> u64 {
    if let Some((direction, rest)) = name.split_once("_packets of ") {
        let link = rest.split(' ').next().unwrap();
        return link_counter(cluster, n, direction, link);
    }
    let pointer = format!("/{}", name.replace('.', "/"));
    let mut value = None;
    cluster.wait_until(name, || {
        let status = loden(cluster, n, &["status"]);
        value = status.pointer(&pointer).and_then(Value::as_u64);
        value.is_some()
    });
    value.unwrap()
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
fn comes_true(cluster: &Cluster, n: u8, way: (u8, u8), said: &Value, arrive: bool) {
    comes_true_by(cluster, n, way, said, arrive, None);
}

/// Likewise, and all of them are seen by a rule of some member's.
fn comes_true_by(
    cluster: &Cluster,
    n: u8,
    (from, to): (u8, u8),
    said: &Value,
    arrive: bool,
    by: Option<(Member, &str)>,
) {
    let names = said["counters"].as_array().unwrap().iter();
    let names: Vec<&str> = names.map(|name| name.as_str().unwrap()).collect();
    assert!(!names.is_empty(), "{said:#}");
    let values = || names.iter().map(|name| counter(cluster, n, name));
    let pod = Member::Pod(to, 1);
    let mut seen = (Vec::new(), 0);
    let true_at_last = (0..ATTEMPTS).any(|_| {
        let before: Vec<u64> = values().collect();
        count(cluster, pod, "prerouting", "udp dport 9");
        if let Some((member, rule)) = by {
            count(cluster, member, "prerouting", rule);
        }
        send(cluster, from, to);
        let moved = wait::until("counters", MOMENT, &Interrupt::default(), || {
            seen = (
                values().zip(&before).map(|(now, was)| now - was).collect(),
                counted(cluster, pod),
            );
            let moved = seen.0.iter().all(|&count| count >= SOME);
            let by = by.is_none_or(|(member, _)| counted(cluster, member) == SOME);
            Ok((moved && by && (!arrive || seen.1 == SOME)).then_some(()))
        });
        assert!(arrive || counted(cluster, pod) == 0, "{said:#}");
        moved.is_ok()
    });
    assert!(true_at_last, "{seen:?} by {said:#}");
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
        let by = (Member::Node(peer), bare.as_str());
        comes_true_by(&cluster, n, (n, peer), &said, true, Some(by));
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
        diagnoses(&cluster, n, &["--mesh"], is_late_at_most);
    }
    let parts = [
        "this node: reading packet sockets on eth0: ",
        "this node: 3 on eth0: handed to the kernel, to 192.0.2.1 over route, ",
        "192.0.2.1: 3 on eth0: arrived by the kernel, from 192.0.2.3 over route, ",
        "saw 3 of them come in by underlay",
        "back from 192.0.2.1: 3 on eth0: handed to the kernel, to 192.0.2.3 over route, ",
        "back here: 3 on eth0: arrived by the kernel, from 192.0.2.1 over route, ",
    ];
    traces(&cluster, 3, (3, 1), |_, trace| {
        parts.iter().all(|part| trace.contains(part))
    });

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
    let by = "by flannel.1, as loden told it (vxlan)";
    let kernel = says(&cluster, 2, (2, 1), "verdict", by);
    has(&kernel, "peer", "198.18.1.0 is at ");
    has(&kernel, "peer", "at node 192.0.2.1");
    let parts = [
        "this node: 3 sent, to 192.0.2.1:8472",
        "192.0.2.1: 3 on flannel.1: arrived by the kernel, from 192.0.2.3:8472",
    ];
    traces(&cluster, 3, (3, 1), |said, trace| {
        said["outcome"] == "sent"
            && step(said, "mtu").contains("50 of headers between them")
            && parts.iter().all(|part| trace.contains(part))
            && !trace.contains("sight ends")
    });
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
    // A remark, and no finding.
    diagnoses(&cluster, 1, &["--peer", "192.0.2.2"], |found| {
        let peer = &found["peers"][0];
        let remarks = peer["notes"].to_string();
        peer["findings"].as_array().is_some_and(Vec::is_empty)
            && remarks.contains("each end takes the best way")
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
        diagnoses(&cluster, n, &["--peer", peer], |found| {
            let findings = found["peers"][0]["findings"].as_array();
            findings.is_some_and(|findings| {
                findings.len() == 1
                    && findings[0]["cause"] == "asymmetric_path"
                    && findings[0]["detail"].to_string().contains(words)
            })
        });
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
    diagnoses(&cluster, 1, &[], |found| found["healthy"] == true);
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
    let no_mac = "no MAC address for 198.18.2.0";
    let said = says(&cluster, 1, (1, 2), "verdict", no_mac);
    has(&said, "transport", "not taken: somebody routes it here");
    cluster.ip(Member::Node(1), &format!("route del {around}"), 1);
    cluster.ip(Member::Node(1), "route add 198.18.2.2/32 dev cni0", 1);
    let by = "does not reach the tunnel: the kernel routes it by cni0";
    says(&cluster, 1, (1, 2), "verdict", by);
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
    let mut back = Value::Null;
    cluster.wait_until("what is delivered", || {
        back = explain(&cluster, 1, 2, 1, &[]);
        back["outcome"] == "delivered"
    });
    comes_true(&cluster, 1, (2, 1), &back, true);
    // A pod's packets are not forwarded any more: what comes in ends there.
    let node = cluster.lab.netns(Member::Node(1));
    node.set_sysctls(&[("ipv4/ip_forward", "0")]).unwrap();
    let not = "does not forward packets to its pods";
    let back = says(&cluster, 1, (2, 1), "verdict", not);
    comes_true(&cluster, 1, (2, 1), &back, false);
}
