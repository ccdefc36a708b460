//! A NIC that spoils the checksums of encapsulated packets: a wire that copies frames as the sender's kernel has left
//! them, with the inner checksum for the NIC to compute. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/cluster.rs"]
mod cluster;
mod common;
#[path = "common/ns.rs"]
mod ns;

use std::net::UdpSocket;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cluster::{Cluster, DUAL, Daemon, LIMIT, VXLAN};
use common::LODEN;
use loden::lab::{Interrupt, Member, wait};
use ns::Ns;
use serde_json::Value;

const FEATURE: &str = "tx-checksum-ip-generic";

/// Whether a device computes checksums, as ethtool says it.
fn computes(features: &str) -> bool {
    let line = features
        .lines()
        .find(|line| line.trim().starts_with(FEATURE));
    line.unwrap().contains(": on")
}

#[test]
fn checksums_that_arrive_whole_are_left_to_the_device() {
    let cluster = Cluster::new(2, DUAL, VXLAN);
    cluster.wait_until("findings", || {
        let found = cluster.status(1)["checksums"].clone();
        found
            .as_array()
            .is_some_and(|all| all.len() == 2 && all.iter().all(|one| one["finding"] == "right"))
    });
    for device in ["flannel.1", "flannel-v6.1"] {
        let features = cluster.run(Member::Node(1), "ethtool", &format!("-k {device}"));
        assert!(computes(&features), "{features}");
    }
}

/// Copies frames between `far` and a pair of Unix sockets, as they are.
fn wire(ns: &Ns, from: &Path, to: &Path) -> Daemon {
    let mut command = Command::new("ip");
    command
        .args([
            "netns",
            "exec",
            ns.name(),
            "socat",
            "-b",
            "65536",
            "INTERFACE:far",
        ])
        .arg(format!(
            "UNIX-SENDTO:{},bind={}",
            to.display(),
            from.display()
        ))
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    Daemon(command.spawn().unwrap())
}

struct Node {
    ns: Ns,
    daemon: Option<Daemon>,
}

fn daemon(ns: &Ns, dir: &Path, n: u8) -> Child {
    let log = std::fs::File::create(dir.join(format!("log{n}"))).unwrap();
    Command::new("ip")
        .args(["netns", "exec", ns.name(), LODEN, "daemon", "--iface=eth0"])
        .arg("--iptables-forward-rules=false")
        .arg("--local-store")
        .arg(dir.join("store"))
        .arg("--subnet-file")
        .arg(dir.join(format!("node{n}.env")))
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

fn status(dir: &Path, n: u8) -> Value {
    let output = Command::new(LODEN)
        .args(["status", "--json", "--subnet-file"])
        .arg(dir.join(format!("node{n}.env")))
        .output()
        .unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

#[test]
fn device_whose_checksums_arrive_spoiled_is_relieved_of_them_and_that_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::create_dir_all(dir.join("store/subnets")).unwrap();
    let config = r#"{"Network":"198.18.0.0/16","Backend":{"Type":"vxlan"}}"#;
    std::fs::write(dir.join("store/config"), config).unwrap();
    let mut nodes = [1, 2].map(|n: u8| {
        let ns = Ns::new();
        ns.ip("addr flush dev eth0");
        ns.ip(&format!("addr add 192.0.2.{n}/24 dev eth0"));
        // It does the outer checksum, which pings need, and only that: 0 is none (RFC 768).
        for line in [
            "add table ip nic",
            "add chain ip nic c { type filter hook postrouting priority 0 ; }",
            "add rule ip nic c udp dport 8472 udp checksum set 0",
        ] {
            ns.run(|| {
                let nft = Command::new("nft").args(line.split(' ')).status();
                assert!(nft.unwrap().success(), "{line}");
            });
        }
        // Nothing is to be sent before both ends of the wire are there.
        ns.ip("link set eth0 down");
        Node { ns, daemon: None }
    });
    let ends = [dir.join("a"), dir.join("b")];
    let _wires = [
        wire(&nodes[0].ns, &ends[0], &ends[1]),
        wire(&nodes[1].ns, &ends[1], &ends[0]),
    ];
    let until = |what: &str, condition: &mut dyn FnMut() -> bool| {
        let waited = wait::until(what, LIMIT, &Interrupt::default(), || {
            Ok(condition().then_some(()))
        });
        let log = |n: u8| std::fs::read_to_string(dir.join(format!("log{n}"))).unwrap_or_default();
        let (one, two) = (log(1), log(2));
        assert!(
            waited.is_ok(),
            "no {what}: {:#}\n{one}\n{two}",
            status(dir, 1)["checksums"]
        );
    };
    until("a wire", &mut || ends.iter().all(|end| end.exists()));
    for (n, node) in (1..).zip(&mut nodes) {
        node.ns.ip("link set eth0 up");
        node.daemon = Some(Daemon(daemon(&node.ns, dir, n)));
    }
    for n in [1, 2] {
        until("a spoiled checksum", &mut || {
            status(dir, n)["checksums"][0]["finding"] == "spoiled"
        });
    }
    for node in &nodes {
        let output = Command::new("ip")
            .args([
                "netns",
                "exec",
                node.ns.name(),
                "ethtool",
                "-k",
                "flannel.1",
            ])
            .output()
            .unwrap();
        let features = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!computes(&features), "{features}");
    }
    // What was not possible before.
    let base = |n: u8| {
        let subnet = status(dir, n)["lease"]["subnets"][0].clone();
        let (base, _) = subnet.as_str().unwrap().split_once('/').unwrap();
        base.parse::<std::net::Ipv4Addr>().unwrap()
    };
    let [here, there] = [1, 2].map(base);
    let sink = nodes[1].ns.run(|| UdpSocket::bind((there, 0)).unwrap());
    let source = nodes[0].ns.run(|| UdpSocket::bind((here, 0)).unwrap());
    sink.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    source
        .send_to(b"whole", sink.local_addr().unwrap())
        .unwrap();
    let mut bytes = [0; 9];
    assert_eq!(sink.recv(&mut bytes).unwrap(), 5);
}
