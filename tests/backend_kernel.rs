//! The backends that have the kernel carry the packets, on nodes with pods: that pods reach each other, that a
//! node set up by hand as flannel does it is understood, and that whatever is done to a node's network is put
//! right again. Looks through iproute2, which shares no code with the program. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/cluster.rs"]
mod cluster;
mod common;
#[path = "common/seeded.rs"]
mod seeded;

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cluster::{Cluster, DUAL, HOST_GW, Pings, REPAIR_LIMIT, V4, V6, VXLAN, transfers};
use common::LODEN;
use loden::lab::Member;
use nix::sys::signal::Signal;
use serde_json::Value;

#[test]
fn nodes_that_carry_vxlan_in_user_space_and_those_whose_kernel_does_reach_each_other() {
    let mut cluster = Cluster::idle(3, DUAL, VXLAN);
    cluster.start_with(1, &["--vxlan=user"]);
    cluster.start(2);
    cluster.start_with(3, &["--vxlan=user", "--engine=portable"]);
    let nodes = [1, 2, 3];
    for (from, to) in nodes
        .into_iter()
        .flat_map(|from| nodes.map(|to| (from, to)))
    {
        if from != to {
            cluster.await_ping(from, &format!("198.18.{to}.2"));
            cluster.await_ping(from, &format!("fd00:18:0:{to}::2"));
        }
    }
    transfers(&cluster, "198.18.2.2");
    transfers(&cluster, "fd00:18:0:2::2");
    let transports = |n| {
        let peers = cluster.status(n)["peers"].as_array().cloned().unwrap();
        let mut transports: Vec<Value> = peers.iter().map(|it| it["transport"].clone()).collect();
        transports.dedup();
        transports
    };
    assert_eq!(transports(1), ["vxlan in user space"]);
    assert_eq!(transports(2), ["vxlan"]);
    // What the lease says is what the kernel's peers need, whoever carries the packets.
    for n in nodes {
        assert!(cluster.lease(n).contains("VtepMAC"), "{}", cluster.lease(n));
    }
    let datapath = cluster.status(1)["datapath"].clone();
    assert_eq!(datapath["device"], "flannel0, flannel1");
    assert!(
        datapath["total"]["decap"]["sent"].as_u64().unwrap() > 100,
        "{datapath:#}"
    );
    // The kernel's device that a run before has left is taken away, and comes back with the next.
    cluster.end(2, Signal::SIGTERM);
    cluster.start_with(2, &["--vxlan=user"]);
    cluster.wait_until("no device of the kernel's", || {
        cluster.shown(2, "ip", "-o link show flannel.1").is_empty()
    });
    cluster.await_ping(1, "198.18.2.2");
    cluster.end(2, Signal::SIGTERM);
    cluster.start(2);
    cluster.await_ping(3, "fd00:18:0:2::2");
    cluster.wait_until("the kernel's device", || {
        cluster.shown(2, "ip", "-o link show flannel.1").len() == 1
    });
}

#[test]
fn pods_of_dual_stack_nodes_reach_each_other_over_vxlan_at_full_size() {
    let cluster = Cluster::new(3, DUAL, VXLAN);
    for (from, to) in [(1, 2), (2, 1), (1, 3), (3, 2)] {
        cluster.await_ping(from, &format!("198.18.{to}.2"));
        cluster.await_ping(from, &format!("fd00:18:0:{to}::2"));
    }
    let env = fs::read_to_string(cluster.file(1, "subnet.env")).unwrap();
    assert!(env.contains("FLANNEL_MTU=1430\n"), "{env}");
    // What fits exactly, and must not be fragmented: 1450 and 1430 less the headers of IP and ICMP.
    let ping = |to: &str, size: &str| {
        let args = ["-n", "-q", "-c1", "-W5", "-M", "do", "-s", size, to];
        cluster.wait_until("an answer to what fits exactly", || {
            cluster.lab.run(Member::Node(1), "ping", &args).is_ok()
        });
    };
    ping("198.18.2.2", "1422");
    ping("fd00:18:0:2::2", "1382");
    transfers(&cluster, "198.18.2.2");
    transfers(&cluster, "fd00:18:0:2::2");
    let (macs, lease) = (
        [1, 2].map(|n| cluster.mac(n, "flannel.1")),
        cluster.lease(2),
    );
    let v6 = cluster.mac(2, "flannel-v6.1");
    let golden = format!(
        r#""BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{}"}},"BackendV6Data":{{"VNI":1,"VtepMAC":"{v6}"}}}}"#,
        macs[1]
    );
    assert!(lease.ends_with(&golden), "{lease}");
    let state = cluster.state(1);
    for line in [
        "198.18.2.0/24 via 198.18.2.0 dev flannel.1 onlink".to_owned(),
        format!(
            "flannel.1 neighbour 198.18.2.0 lladdr {} PERMANENT",
            macs[1]
        ),
        format!(
            "flannel.1 forwards {} dst 192.0.2.2 self permanent",
            macs[1]
        ),
        "flannel.1 has 198.18.1.0/32".to_owned(),
        format!(
            "flannel.1 [\"1450\", \"{}\", \"1\", \"192.0.2.1\", \"8472\"] true",
            macs[0]
        ),
    ] {
        assert!(state.contains(&line), "{line} is missing in {state:#?}");
    }
}

#[test]
fn pods_of_dual_stack_nodes_reach_each_other_over_routes() {
    let cluster = Cluster::new(3, DUAL, HOST_GW);
    for (from, to) in [(1, 2), (2, 1), (1, 3), (3, 2)] {
        cluster.await_ping(from, &format!("198.18.{to}.2"));
        cluster.await_ping(from, &format!("fd00:18:0:{to}::2"));
    }
    transfers(&cluster, "198.18.2.2");
    transfers(&cluster, "fd00:18:0:2::2");
    let state = cluster.state(1);
    let route = "198.18.2.0/24 via 192.0.2.2 dev eth0".to_owned();
    assert!(state.contains(&route), "{state:#?}");
    assert_eq!(cluster.status(1)["peers"][0]["transport"], "route");
    let env = fs::read_to_string(cluster.file(1, "subnet.env")).unwrap();
    assert!(env.contains("FLANNEL_MTU=1500\n"), "{env}");
    assert!(
        cluster.lease(1).contains(r#""BackendType":"host-gw"}"#),
        "{}",
        cluster.lease(1)
    );
}

#[test]
fn network_of_ipv6_alone_works_over_both() {
    for backend in [VXLAN, HOST_GW] {
        let cluster = Cluster::new(2, V6, backend);
        cluster.await_ping(1, "fd00:18:0:2::2");
        cluster.await_ping(2, "fd00:18:0:1::2");
        transfers(&cluster, "fd00:18:0:2::2");
        assert!(!cluster.state(1).iter().any(|line| line.contains("198.18.")));
    }
}

#[test]
fn node_set_up_by_hand_as_flannel_does_it_is_reached_and_reaches_us() {
    let mut cluster = Cluster::idle(2, DUAL, VXLAN);
    cluster.start(1);
    cluster.wait_until("node 1", || cluster.status(1)["ready"] == true);
    let data = |mac: &str| format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#);
    let (v4, v6) = ("be:ef:00:00:00:04", "be:ef:00:00:00:06");
    let underlay = |n| loden::lab::plan::underlay_v6(n);
    cluster.put(
        "198.18.2.0-24&fd00:18:0:2::-64",
        &format!(
            r#"{{"PublicIP":"192.0.2.2","PublicIPv6":"{}","BackendType":"vxlan","BackendData":{},"BackendV6Data":{}}}"#,
            underlay(2),
            data(v4),
            data(v6)
        ),
    );
    for (device, mac, local, remote, net, family) in [
        (
            "flannel.1",
            v4,
            "192.0.2.2".to_owned(),
            "192.0.2.1".to_owned(),
            ["198.18.1.0", "/24", "198.18.2.0/32"],
            "-4",
        ),
        (
            "flannel-v6.1",
            v6,
            underlay(2).to_string(),
            underlay(1).to_string(),
            ["fd00:18:0:1::", "/64", "fd00:18:0:2::/128"],
            "-6",
        ),
    ] {
        let ours = cluster.mac(1, device);
        let [base, len, own] = net;
        for line in [
            format!(
                "link add {device} address {mac} mtu 1430 type vxlan id 1 dev eth0 local {local} dstport 8472 nolearning"
            ),
            format!("addr add {own} dev {device}"),
            format!("link set {device} up"),
            format!("neigh replace {base} lladdr {ours} dev {device} nud permanent"),
            format!("{family} route replace {base}{len} via {base} dev {device} onlink"),
        ] {
            cluster.ip(Member::Node(2), &line, 2);
        }
        let forward = format!("fdb append {ours} dev {device} dst {remote} self permanent");
        cluster.run(Member::Node(2), "bridge", &forward);
    }
    for to in ["198.18.2.2", "fd00:18:0:2::2"] {
        cluster.await_ping(1, to);
        transfers(&cluster, to);
    }
    cluster.await_ping(2, "198.18.1.2");
    cluster.await_ping(2, "fd00:18:0:1::2");
}

/// What somebody does to node 1's network, by `ip` or `bridge`.
const DEEDS: &[&str] = &[
    "ip link set flannel.1 down",
    "ip link set flannel-v6.1 down",
    "ip link set eth0 down; ip link set eth0 up; ip -6 addr add UNDERLAY6/64 dev eth0 nodad",
    "ip link set flannel.1 down; ip link set flannel.1 name elsewhere",
    "ip link del flannel.1; ip link del flannel-v6.1",
    "ip link del flannel.1; ip link add flannel.1 type vxlan id 1 dev eth0 local 192.0.2.1 dstport 8472",
    "ip link del flannel.1; ip link add flannel.1 type vxlan id 7 dev eth0 dstport 4789",
    "ip link set flannel.1 address 02:00:00:00:00:99",
    "ip link set flannel.1 mtu 1400",
    "ip addr flush dev flannel.1",
    "ip addr add 198.18.77.1/24 dev flannel.1",
    "ip route flush proto 108",
    "ip -6 route flush proto 108",
    "ip route replace 198.18.2.0/24 via 192.0.2.3 dev eth0 proto 108",
    "ip -6 route replace fd00:18:0:2::/64 via 2001:db8::3 dev eth0 proto 108",
    "ip neigh flush dev flannel.1 nud permanent",
    "bridge fdb flush dev flannel.1",
    "ip route add 198.18.99.0/24 via 192.0.2.3 dev eth0 proto 108",
    "bridge fdb append 02:00:00:00:00:98 dev flannel.1 dst 192.0.2.9 self permanent",
];

/// Does it, and waits until the node's state is as before. Done again if that takes as long as the periodic look would: a
/// process may have waited for a processor, but not each time.
fn is_put_right(cluster: &Cluster, deeds: &str, before: &[String]) {
    let mut took = Vec::new();
    while took.last().is_none_or(|&took| took > REPAIR_LIMIT) {
        assert!(took.len() < 5, "{deeds}: {took:?}");
        let begun = Instant::now();
        do_to_node_1(cluster, deeds);
        cluster.wait_until(&format!("state as before: {deeds}"), || {
            cluster.state(1) == before
        });
        took.push(begun.elapsed());
    }
}

fn do_to_node_1(cluster: &Cluster, deeds: &str) {
    let underlay = loden::lab::plan::underlay_v6(1).to_string();
    for deed in deeds.split("; ") {
        let deed = deed.replace("UNDERLAY6", &underlay);
        let (program, args) = deed.split_once(' ').unwrap();
        // The daemon may have been faster with the same.
        let args: Vec<&str> = args.split(' ').collect();
        let _done = cluster.lab.run(Member::Node(1), program, &args);
    }
}

#[test]
fn whatever_is_done_to_a_vxlan_nodes_network_is_put_right() {
    let cluster = Cluster::new(3, DUAL, VXLAN);
    cluster.await_entries(1);
    let before = cluster.state(1);
    for deed in DEEDS {
        is_put_right(&cluster, deed, &before);
        assert!(cluster.daemons[0].is_some());
    }
    cluster.await_ping(1, "198.18.2.2");
    cluster.await_ping(3, "fd00:18:0:1::2");
}

#[test]
fn whatever_is_done_to_a_host_gw_nodes_network_is_put_right() {
    let cluster = Cluster::new(3, DUAL, HOST_GW);
    cluster.await_entries(1);
    let before = cluster.state(1);
    for deed in [
        "ip link set eth0 down; ip link set eth0 up; ip -6 addr add UNDERLAY6/64 dev eth0 nodad",
        "ip route flush proto 108",
        "ip route del 198.18.2.0/24",
        "ip -6 route flush proto 108",
        "ip route replace 198.18.2.0/24 via 192.0.2.3 dev eth0 proto 108",
        "ip route add 198.18.99.0/24 via 192.0.2.3 dev eth0 proto 108",
    ] {
        is_put_right(&cluster, deed, &before);
    }
    cluster.await_ping(1, "198.18.2.2");
}

#[test]
fn address_that_moves_takes_the_device_and_the_peers_along() {
    let cluster = Cluster::new(2, V4, VXLAN);
    cluster.await_ping(1, "198.18.2.2");
    let mac = cluster.mac(1, "flannel.1");
    // Of another length, since a second address of one length goes with the first.
    cluster.ip(Member::Node(1), "addr add 192.0.2.77/25 dev eth0", 1);
    cluster.ip(Member::Node(1), "addr del 192.0.2.1/24 dev eth0", 1);
    let forward = format!("flannel.1 forwards {mac} dst 192.0.2.77 self permanent");
    cluster.wait_until("the device and the peer's entry at the new address", || {
        cluster
            .state(1)
            .iter()
            .any(|line| line.contains("\"192.0.2.77\""))
            && cluster.state(2).contains(&forward)
    });
    assert_eq!(cluster.mac(1, "flannel.1"), mac);
    cluster.await_ping(1, "198.18.2.2");
    cluster.await_ping(2, "198.18.1.2");
}

#[test]
fn underlay_that_changes_its_mtu_changes_the_devices_and_what_pods_are_told() {
    let cluster = Cluster::new(2, V4, VXLAN);
    cluster.ip(Member::Node(1), "link set eth0 mtu 1400", 1);
    cluster.wait_until("an MTU of 1350", || {
        cluster
            .state(1)
            .iter()
            .any(|line| line.starts_with("flannel.1 [\"1350\""))
    });
    cluster.wait_until("the same for pods", || {
        let env = fs::read_to_string(cluster.file(1, "subnet.env")).unwrap();
        env.contains("FLANNEL_MTU=1350\n")
    });
    cluster.await_ping(1, "198.18.2.2");
}

/// All that a node has for the overlay, whoever carries its packets; its own devices' MAC addresses, which are kept for
/// as long as the devices are there, by name.
fn picture(cluster: &Cluster, n: u8) -> Vec<String> {
    let mut lines = cluster.state(n);
    for device in ["flannel.1", "flannel-v6.1"] {
        if !cluster
            .shown(n, "ip", &format!("-o link show {device}"))
            .is_empty()
        {
            let mac = cluster.mac(n, device);
            lines = lines
                .iter()
                .map(|line| line.replace(&mac, device))
                .collect();
        }
    }
    for device in ["flannel0", "flannel1"] {
        let addrs = cluster.shown(n, "ip", &format!("-o addr show dev {device}"));
        let words = addrs.iter().map(|line| line.split_whitespace().skip(1));
        lines.extend(words.map(|it| it.take(3).collect::<Vec<_>>().join(" ")));
        for family in ["-4", "-6"] {
            lines.extend(cluster.shown(n, "ip", &format!("{family} route show dev {device}")));
        }
        let link = cluster
            .shown(n, "ip", &format!("-o link show {device}"))
            .join(" ");
        lines.extend(
            link.split_once("mtu ")
                .map(|(_, rest)| format!("{device} {}", &rest[..4])),
        );
    }
    let status = cluster.status(n);
    for peer in status["peers"].as_array().cloned().unwrap_or_default() {
        let facts = ["subnets", "public", "endpoint", "transport"].map(|key| peer[key].to_string());
        lines.push(facts.join(" "));
    }
    lines
}

/// Whether a node's picture has, for each family, what the last changes of the test below are to bring: peers, addresses,
/// MTU, and nothing of who they were before.
fn has_last_changes(picture: &[String], backend: &str, flags: &[&str]) -> bool {
    let is_in_user_space = flags.contains(&"--vxlan=user");
    let has = |line: &str| picture.iter().any(|it| it.starts_with(line));
    let route = |net: &str, base: &str, gateway: &str, device: &str| match backend {
        HOST_GW => has(&format!("{net} via {gateway} dev eth0")),
        _ => has(&format!("{net} via {base} dev {device}")),
    };
    let entries = |base: &str, mac: &str, place: &str, device: &str| {
        has(&format!("{device} neighbour {base} lladdr {mac} "))
            && has(&format!("{device} forwards {mac} dst {place} "))
    };
    let peers = [(8_u8, 80_u8, "0c"), (9, 92, "0d")];
    let in_kernel = peers.iter().all(|(n, place, mac)| {
        let (v4, v6) = (format!("198.18.{n}.0"), format!("fd00:18:0:{n}::"));
        let (at4, at6) = (
            format!("192.0.2.{place}"),
            loden::lab::plan::underlay_v6(*place).to_string(),
        );
        let macs = [4, 6].map(|family| format!("02:00:00:00:0{family}:{mac}"));
        route(&format!("{v4}/24"), &v4, &at4, "flannel.1")
            && route(&format!("{v6}/64"), &v6, &at6, "flannel-v6.1")
            && (backend == HOST_GW
                || entries(&v4, &macs[0], &at4, "flannel.1")
                    && entries(&v6, &macs[1], &at6, "flannel-v6.1"))
    });
    let devices = match (backend, is_in_user_space) {
        (HOST_GW, _) => true,
        (_, true) => has("flannel0 1350") && has("flannel1 1330"),
        _ => {
            let moved = |line: &String| {
                line.starts_with("flannel.1 [\"1350\"") && line.contains("192.0.2.77")
            };
            picture.iter().any(moved) && has("flannel-v6.1 [\"1330\"")
        }
    };
    // Node 2 beside them, and nobody else.
    let count = |of: fn(&str) -> bool| picture.iter().filter(|line| of(line)).count();
    let entries = count(|line| line.contains(" forwards ") || line.contains(" neighbour "));
    let exactly = count(|line| line.starts_with("198.18.") || line.starts_with("fd00:18:0:")) == 6
        && entries == if backend == HOST_GW { 0 } else { 12 };
    devices && (is_in_user_space || in_kernel && exactly)
}

#[test]
fn what_is_there_after_many_events_is_what_a_fresh_start_makes() {
    for (backend, flags) in [(VXLAN, &[][..]), (HOST_GW, &[]), (VXLAN, &["--vxlan=user"])] {
        let mut cluster = Cluster::idle(2, DUAL, backend);
        for n in [1, 2] {
            cluster.start_with(n, flags);
        }
        let underlay = |n: u8| loden::lab::plan::underlay_v6(n);
        let key = |n: u8| format!("198.18.{n}.0-24&fd00:18:0:{n}::-64");
        // Node `n` with a device of its own, somewhere.
        let put = |cluster: &Cluster, n: u8, place: u8, mac: u8| {
            let data =
                |family: u8| format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:0{family}:{mac:02x}"}}"#);
            let (kind, data) = match backend == HOST_GW {
                true => ("host-gw", String::new()),
                false => {
                    let both = (data(4), data(6));
                    (
                        "vxlan",
                        format!(r#","BackendData":{},"BackendV6Data":{}"#, both.0, both.1),
                    )
                }
            };
            let lease = format!(
                r#"{{"PublicIP":"192.0.2.{place}","PublicIPv6":"{}","BackendType":"{kind}"{data}}}"#,
                underlay(place)
            );
            cluster.put(&key(n), &lease);
        };
        let await_peers = |cluster: &Cluster, wanted: &[(u8, u8)]| {
            let mut all: Vec<String> = vec!["192.0.2.2".to_owned()];
            all.extend(wanted.iter().map(|(_, place)| format!("192.0.2.{place}")));
            let nets: Vec<String> = wanted
                .iter()
                .map(|(n, _)| format!("198.18.{n}.0/24"))
                .collect();
            cluster.wait_until("exactly these peers", || {
                let peers = cluster.status(1)["peers"]
                    .as_array()
                    .cloned()
                    .unwrap_or_default();
                let mut places: Vec<String> = peers
                    .iter()
                    .map(|it| it["public"].as_str().unwrap_or_default().to_owned())
                    .collect();
                places.sort();
                all.sort();
                let carried = |net: &String| {
                    flags.contains(&"--vxlan=user")
                        || cluster.state(1).iter().any(|it| it.starts_with(net))
                };
                places == all && nets.iter().all(carried)
            });
        };
        cluster.await_ping(1, "198.18.2.2");
        cluster.await_ping(2, "fd00:18:0:1::2");
        for (n, place) in [(7, 70), (8, 80), (9, 90)] {
            put(&cluster, n, place, n);
        }
        await_peers(&cluster, &[(7, 70), (8, 80), (9, 90)]);

        // Killed while peers change: one goes, one comes, one is another node with the same subnet.
        cluster.end(1, Signal::SIGKILL);
        cluster.delete(&key(7));
        put(&cluster, 10, 100, 10);
        put(&cluster, 9, 91, 11);
        cluster.start_with(1, flags);
        await_peers(&cluster, &[(8, 80), (9, 91), (10, 100)]);

        // While it runs.
        put(&cluster, 8, 80, 12);
        put(&cluster, 9, 92, 13);
        cluster.delete(&key(10));
        cluster.ip(Member::Node(1), "link set eth0 mtu 1400", 1);
        do_to_node_1(
            &cluster,
            "ip link set eth0 down; ip link set eth0 up; ip -6 addr add UNDERLAY6/64 dev eth0 nodad",
        );
        // Of another length, since a second address of one length goes with the first.
        cluster.ip(Member::Node(1), "addr add 192.0.2.77/25 dev eth0", 1);
        cluster.ip(Member::Node(1), "addr del 192.0.2.1/24 dev eth0", 1);
        do_to_node_1(
            &cluster,
            "ip route flush proto 108; ip -6 route flush proto 108",
        );
        do_to_node_1(
            &cluster,
            "bridge fdb flush dev flannel.1; ip link del flannel-v6.1",
        );
        await_peers(&cluster, &[(8, 80), (9, 92)]);
        cluster.wait_until("the lease at the new address", || {
            cluster.lease(1).contains("192.0.2.77")
        });
        let mtu = ["1400", "1350", "1330"];
        cluster.wait_until("the new MTU", || {
            let env = fs::read_to_string(cluster.file(1, "subnet.env")).unwrap_or_default();
            mtu.iter()
                .any(|mtu| env.contains(&format!("FLANNEL_MTU={mtu}\n")))
        });
        cluster.await_ping(1, "198.18.2.2");
        cluster.await_ping(2, "fd00:18:0:1::2");
        cluster.await_ping(1, "fd00:18:0:2::2");

        // The same from nothing.
        cluster.wait_until("all of the last changes", || {
            has_last_changes(&picture(&cluster, 1), backend, flags)
        });
        let before = picture(&cluster, 1);
        cluster.end(1, Signal::SIGTERM);
        cluster
            .lab
            .run(Member::Node(1), LODEN, &["cleanup"])
            .unwrap();
        assert!(
            !cluster
                .state(1)
                .iter()
                .any(|line| line.contains("198.18.8.0"))
        );
        cluster.start_with(1, flags);
        let what = format!("state of a fresh start that is {before:#?}");
        cluster.wait_until(&what, || picture(&cluster, 1) == before);
    }
}

#[test]
fn peers_that_change_leave_no_trace_of_what_they_were() {
    let mut cluster = Cluster::idle(1, V4, VXLAN);
    cluster.start(1);
    cluster.wait_until("node 1", || cluster.status(1)["ready"] == true);
    let peer = |ip: &str, mac: &str| {
        format!(
            r#"{{"PublicIP":"{ip}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
        )
    };
    let entries = |cluster: &Cluster| {
        let state = cluster.state(1).into_iter();
        state
            .filter(|line| line.contains("198.18.2.0") || line.contains("forwards"))
            .collect::<Vec<_>>()
    };
    let expect = |cluster: &Cluster, what: &str, ip: &str, mac: &str| {
        let expected = [
            "198.18.2.0/24 via 198.18.2.0 dev flannel.1 onlink".to_owned(),
            format!("flannel.1 forwards {mac} dst {ip} self permanent"),
            format!("flannel.1 neighbour 198.18.2.0 lladdr {mac} PERMANENT"),
        ];
        cluster.wait_until(what, || entries(cluster) == expected);
    };
    let (a, b) = ("02:00:00:00:00:0a", "02:00:00:00:00:0b");
    cluster.put("198.18.2.0-24", &peer("192.0.2.2", a));
    expect(&cluster, "the peer", "192.0.2.2", a);
    cluster.put("198.18.2.0-24", &peer("192.0.2.2", b));
    expect(&cluster, "its other MAC address", "192.0.2.2", b);
    cluster.put("198.18.2.0-24", &peer("192.0.2.3", b));
    expect(&cluster, "its other address", "192.0.2.3", b);
    cluster.delete("198.18.2.0-24");
    cluster.put("198.18.2.0-24", &peer("192.0.2.4", a));
    expect(&cluster, "another node with its subnet", "192.0.2.4", a);
    // While nobody looks.
    cluster.put("198.18.3.0-24", &peer("192.0.2.5", "02:00:00:00:00:0c"));
    cluster.wait_until("another peer", || {
        cluster
            .state(1)
            .iter()
            .any(|line| line.starts_with("198.18.3.0/24"))
    });
    for (signal, gone, new) in [
        (Signal::SIGKILL, "198.18.3.0-24", b),
        (Signal::SIGTERM, "198.18.9.0-24", a),
    ] {
        let mac = cluster.mac(1, "flannel.1");
        cluster.end(1, signal);
        assert!(
            cluster
                .state(1)
                .iter()
                .any(|line| line.starts_with("198.18.2.0/24"))
        );
        cluster.put("198.18.9.0-24", &peer("192.0.2.9", "02:00:00:00:00:0d"));
        cluster.delete(gone);
        cluster.put("198.18.2.0-24", &peer("192.0.2.6", new));
        cluster.start(1);
        let key = gone.split('-').next().unwrap().to_owned();
        cluster.wait_until("the peers as they are now", || {
            let state = cluster.state(1);
            let forward = format!("flannel.1 forwards {new} dst 192.0.2.6 self permanent");
            state.contains(&forward) && !state.iter().any(|line| line.contains(&key))
        });
        assert_eq!(cluster.mac(1, "flannel.1"), mac);
    }
}

#[test]
fn peer_that_is_not_on_the_link_is_named_and_the_others_are_served() {
    let cluster = Cluster::new(2, V4, HOST_GW);
    let lease = r#"{"PublicIP":"203.0.113.9","PublicIPv6":null,"BackendType":"host-gw"}"#;
    cluster.put("198.18.9.0-24", lease);
    cluster.wait_until("the refusal", || {
        cluster.log(1).contains("203.0.113.9 is not on the link")
    });
    let status = cluster.status(1);
    let refused = status["refused"].as_array().unwrap();
    assert_eq!(refused[0]["what"], "lease 198.18.9.0-24", "{status}");
    cluster.await_ping(1, "198.18.2.2");
    assert!(
        !cluster
            .state(1)
            .iter()
            .any(|line| line.starts_with("198.18.9.0"))
    );
}

/// Changes of all nodes from one backend to the next: `LODEN_ROUNDS` of them, or 2. Between any of these all pairs
/// stay connected; `udp` is another format on another port, which none of the others listens to.
#[test]
fn network_that_changes_its_backend_node_by_node_stays_connected() {
    const DIRECT: &str = r#"{"Type":"vxlan","DirectRouting":true}"#;
    const AUTO: &str = r#"{"Type":"auto"}"#;
    /// Per node that changes.
    const GAP: Duration = Duration::from_secs(2);
    let rounds = seeded::seeds(2).count();
    let mut cluster = Cluster::new(3, V4, VXLAN);
    let pairs = [(1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2)];
    for (from, to) in pairs {
        cluster.await_ping(from, &format!("198.18.{to}.2"));
    }
    let backends = [HOST_GW, VXLAN, AUTO, HOST_GW, DIRECT, VXLAN];
    for backend in backends.into_iter().cycle().take(rounds) {
        cluster.configure(backend);
        let name = if backend == HOST_GW {
            "host-gw"
        } else {
            "vxlan"
        };
        for n in 1..=3 {
            let start =
                |(from, to): (u8, u8)| Pings::start(&cluster, from, &format!("198.18.{to}.2"));
            let pings = pairs.map(start);
            for (from, to) in pairs {
                cluster.await_ping(from, &format!("198.18.{to}.2"));
            }
            cluster.end(n, Signal::SIGTERM);
            cluster.start(n);
            cluster.wait_until("the node with its new backend", || {
                cluster.status(n)["backend"] == name && cluster.status(n)["ready"] == true
            });
            for pings in &pings {
                pings.go_on(&cluster);
                pings.assert_gap(GAP, &format!("while node {n} changes to {backend}"));
            }
        }
        if backend == HOST_GW {
            for n in 1..=3 {
                cluster.wait_until("no device of the old backend", || {
                    cluster.shown(n, "ip", "link show flannel.1").is_empty()
                });
            }
        }
    }
    for (from, to) in pairs {
        cluster.await_ping(from, &format!("198.18.{to}.2"));
    }
}

#[test]
fn interface_that_is_removed_and_comes_back_brings_devices_and_routes_back() {
    for (backend, flags) in [(VXLAN, &[][..]), (HOST_GW, &[]), (VXLAN, &["--vxlan=user"])] {
        let mut cluster = Cluster::idle(3, V4, backend);
        for n in 1..=3 {
            cluster.start_with(n, flags);
        }
        for n in [2, 3] {
            cluster.await_ping(1, &format!("198.18.{n}.2"));
        }
        let before = picture(&cluster, 1);
        // Node 1's end of the wire; the other end is in the bridge's namespace and goes with it.
        let (bridge, node) = (Member::Underlay, cluster.lab.netns(Member::Node(1)));
        cluster.ip(Member::Node(1), "link set eth0 down", 1);
        cluster.ip(Member::Node(1), "link set eth0 name gone0", 1);
        cluster.wait_until("word of it", || {
            !cluster.status(1)["conflicts"]
                .as_array()
                .unwrap()
                .is_empty()
        });
        cluster.ip(Member::Node(1), "link del gone0", 1);
        let made = format!("link add n1 type veth peer name eth0 netns {}", node.name());
        cluster.ip(bridge, &made, 1);
        let has_bridge = cluster.run(bridge, "ip", "-o link show type bridge");
        let name = has_bridge.split(": ").nth(1).unwrap().to_owned();
        cluster.ip(bridge, &format!("link set n1 master {name} up"), 1);
        for line in ["addr add 192.0.2.1/24 dev eth0", "link set eth0 up"] {
            cluster.ip(Member::Node(1), line, 1);
        }
        cluster.wait_until("state as before", || picture(&cluster, 1) == before);
        cluster.await_ping(1, "198.18.2.2");
        cluster.await_ping(3, "198.18.1.2");
    }
}

#[test]
fn what_flannel_has_left_is_taken_over_and_what_others_have_stays() {
    let mut cluster = Cluster::idle(1, V4, VXLAN);
    let node = Member::Node(1);
    for line in [
        "link add flannel.1 address be:ef:00:00:00:01 mtu 1450 type vxlan id 1 dev eth0 local 192.0.2.1 dstport 8472 nolearning",
        "addr add 198.18.1.0/32 dev flannel.1",
        "link set flannel.1 up",
        "neigh replace 198.18.9.0 lladdr be:ef:00:00:00:09 dev flannel.1 nud permanent",
        "route add 198.18.9.0/24 via 198.18.9.0 dev flannel.1 onlink",
        "route add 198.18.50.0/24 via 192.0.2.9 dev eth0 proto static",
        "route add 198.18.51.0/24 via 192.0.2.9 dev eth0",
    ] {
        cluster.ip(node, line, 1);
    }
    cluster.run(
        node,
        "bridge",
        "fdb append be:ef:00:00:00:09 dev flannel.1 dst 192.0.2.9 self permanent",
    );
    cluster.put(
        "198.18.2.0-24",
        r#"{"PublicIP":"192.0.2.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:02"}}"#,
    );
    let number = cluster.shown(1, "ip", "-o link show flannel.1")[0]
        .split(':')
        .next()
        .unwrap()
        .to_owned();
    cluster.start(1);
    cluster.wait_until("the peer, and nothing of the vanished one", || {
        let state = cluster.state(1);
        let gone = ["be:ef:00:00:00:09", "198.18.9.0"];
        state.iter().any(|line| line.starts_with("198.18.2.0/24"))
            && !state
                .iter()
                .any(|line| gone.iter().any(|gone| line.contains(gone)))
            && cluster
                .shown(1, "ip", "-4 route show 198.18.9.0/24")
                .is_empty()
    });
    let routes = cluster.shown(1, "ip", "-4 route show");
    for foreign in ["198.18.50.0/24", "198.18.51.0/24"] {
        assert!(
            routes.iter().any(|route| route.starts_with(foreign)),
            "{routes:#?}"
        );
    }
    assert!(
        !routes.iter().any(|route| route.starts_with("198.18.9.0")),
        "{routes:#?}"
    );
    assert_eq!(cluster.mac(1, "flannel.1"), "be:ef:00:00:00:01");
    let link = cluster.shown(1, "ip", "-o link show flannel.1");
    assert!(link[0].starts_with(&format!("{number}:")), "{link:?}");
    assert!(
        cluster
            .lease(1)
            .contains(r#""VtepMAC":"be:ef:00:00:00:01""#)
    );
}

#[test]
fn network_that_gains_a_family_keeps_its_subnets_and_the_traffic_of_the_other() {
    let mut cluster = Cluster::new(2, V4, VXLAN);
    cluster.await_ping(1, "198.18.2.2");
    let pings = Pings::start(&cluster, 1, "198.18.2.2");
    pings.go_on(&cluster);
    cluster.network = DUAL;
    cluster.configure(VXLAN);
    for n in [1, 2] {
        cluster.end(n, Signal::SIGTERM);
        cluster.start(n);
        cluster.wait_until("subnets of both families", || {
            let subnets = cluster.status(n)["lease"]["subnets"].clone();
            subnets.as_array().map(Vec::len) == Some(2)
        });
        pings.go_on(&cluster);
        let subnets = cluster.status(n)["lease"]["subnets"].clone();
        assert_eq!(subnets[0], format!("198.18.{n}.0/24"), "{subnets}");
    }
    // Where the other family is, the lease says.
    let device = cluster.status(2)["lease"]["subnets"][1].clone();
    let (base, _) = device.as_str().unwrap().split_once('/').unwrap();
    cluster.wait_until("an answer over IPv6", || {
        let ping = ["-n", "-q", "-c1", "-W1", base];
        cluster.lab.run(Member::Node(1), "ping", &ping).is_ok()
    });
    pings.assert_gap(Duration::from_secs(2), "while nodes gain a family");
}

#[test]
fn second_daemon_on_the_same_vxlan_device_is_refused_by_name_and_the_first_unharmed() {
    let cluster = Cluster::new(2, V4, VXLAN);
    cluster.await_entries(1);
    let before = cluster.state(1);
    for place in ["auto", "user"] {
        let env = cluster.lab.dir().join("other.env");
        let mut command = Command::new(LODEN);
        command
            .args([
                "daemon",
                "--iface",
                "eth0",
                "--iptables-forward-rules=false",
            ])
            .arg(format!("--vxlan={place}"))
            .arg("--local-store")
            .arg(cluster.lab.dir().join("store"))
            .arg("--subnet-file")
            .arg(&env)
            .stdin(Stdio::null())
            .stderr(Stdio::piped());
        let child = cluster
            .lab
            .netns(Member::Node(1))
            .spawn(&mut command)
            .unwrap();
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        let first = cluster.daemons[0].as_ref().unwrap().0.id();
        let named = format!("another daemon (pid {first}) has the device flannel.1");
        assert!(said.contains(&named), "{said}");
        assert!(!env.exists());
    }
    assert_eq!(cluster.state(1), before);
    cluster.await_ping(1, "198.18.2.2");
}
