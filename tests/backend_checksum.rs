//! A NIC that spoils the checksums of encapsulated packets: a wire that copies frames as the sender's kernel has left
//! them, with the inner checksum for the NIC to compute, and makes the outer one right. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/cluster.rs"]
mod cluster;
mod common;
#[path = "common/ns.rs"]
mod ns;

use std::net::{IpAddr, UdpSocket};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cluster::{Cluster, DUAL, Daemon, LIMIT, V4, V6, VXLAN};
use common::LODEN;
use loden::lab::{Interrupt, Member, wait};
use ns::Ns;
use serde_json::Value;

/// What the daemon's eight tries of a device take at most, since this wire needs the processor: a try that it is too slow
/// for finds nothing, and the next one is made.
const ALL_TRIES: Duration = Duration::from_secs(120);

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

/// The outer checksum of a VXLAN datagram (RFC 768; RFC 8200 section 8.1), over whatever is inside of it.
fn finish_outer(frame: &mut [u8]) {
    let (addrs, udp) = match frame.get(12..14) {
        Some([0x08, 0x00]) => (26..34, 34),
        Some([0x86, 0xdd]) => (22..54, 54),
        _ => return,
    };
    let protocol = if udp == 34 { 23 } else { 20 };
    if frame.get(protocol) != Some(&17)
        || frame.get(udp + 2..udp + 4) != Some(&8472_u16.to_be_bytes())
    {
        return;
    }
    let len = usize::from(u16::from_be_bytes([frame[udp + 4], frame[udp + 5]]));
    frame[udp + 6..udp + 8].fill(0);
    let mut words = frame[addrs].to_vec();
    words.extend(frame[udp..udp + len].iter());
    let sum = words.chunks(2).fold(17 + len, |sum, pair| {
        sum + usize::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]))
    });
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    let checksum = !u16::try_from(folded).unwrap();
    frame[udp + 6..udp + 8].copy_from_slice(&checksum.max(1).to_be_bytes());
}

/// Carries frames between two ends, until there is none.
fn nic(from: &UnixDatagram, by: &UnixDatagram, to: &Path) {
    let mut frame = vec![0; 1 << 16];
    while let Ok(len @ 1..) = from.recv(&mut frame) {
        finish_outer(&mut frame[..len]);
        // An end that is not there yet, or not any more, is a cable that is out.
        let _lost = by.send_to(&frame[..len], to);
    }
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

/// A daemon that starts, or is busy, is asked again; null if none answers.
fn status(dir: &Path, n: u8) -> Value {
    let answer = wait::until("a status", LIMIT, &Interrupt::default(), || {
        let mut command = Command::new(LODEN);
        command.args(["status", "--json", "--subnet-file"]);
        let output = command.arg(dir.join(format!("node{n}.env"))).output();
        Ok(serde_json::from_slice(&output.unwrap().stdout).ok())
    });
    answer.unwrap_or_default()
}

#[test]
fn device_whose_checksums_arrive_spoiled_is_relieved_of_them_and_that_is_told() {
    spoiled(V4, "flannel.1", "192.0.2.N/24 dev eth0");
}

#[test]
fn device_for_ipv6_whose_checksums_arrive_spoiled_is_relieved_of_them_too() {
    spoiled(V6, "flannel-v6.1", "2001:db8::N/64 dev eth0 nodad");
}

fn spoiled(network: &str, device: &str, addr: &str) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::create_dir_all(dir.join("store/subnets")).unwrap();
    let config = format!(r#"{{{network},"Backend":{{"Type":"vxlan"}}}}"#);
    std::fs::write(dir.join("store/config"), config).unwrap();
    let mut nodes = [(); 2].map(|()| {
        let ns = Ns::new();
        ns.ip("addr flush dev eth0");
        // Nothing is to be sent before both ends of the wire are there.
        ns.ip("link set eth0 down");
        Node { ns, daemon: None }
    });
    // An end's own place, and that of the NIC which it is plugged into.
    let ends = ["a", "b"].map(|name| dir.join(name));
    let ports = ["port-a", "port-b"].map(|name| dir.join(name));
    let nics = ports
        .each_ref()
        .map(|port| UnixDatagram::bind(port).unwrap());
    for (from, to) in [(0, 1), (1, 0)] {
        let (near, far) = (
            nics[from].try_clone().unwrap(),
            nics[to].try_clone().unwrap(),
        );
        let end = ends[to].clone();
        std::thread::spawn(move || nic(&near, &far, &end));
    }
    let _wires = [0, 1].map(|n| wire(&nodes[n].ns, &ends[n], &ports[n]));
    let until = |what: &str, condition: &mut dyn FnMut() -> bool| {
        let waited = wait::until(what, ALL_TRIES, &Interrupt::default(), || {
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
        let addr = addr.replace('N', &n.to_string());
        node.ns.ip(&format!("addr add {addr}"));
        node.daemon = Some(Daemon(daemon(&node.ns, dir, n)));
    }
    for n in [1, 2] {
        until("a spoiled checksum", &mut || {
            status(dir, n)["checksums"][0]["finding"] == "spoiled"
        });
    }
    for node in &nodes {
        let output = Command::new("ip")
            .args(["netns", "exec", node.ns.name(), "ethtool", "-k", device])
            .output()
            .unwrap();
        let features = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!computes(&features), "{features}");
    }
    // What was not possible before.
    let base = |n: u8| {
        let subnet = status(dir, n)["lease"]["subnets"][0].clone();
        let (base, _) = subnet.as_str().unwrap().split_once('/').unwrap();
        base.parse::<IpAddr>().unwrap()
    };
    let [here, there] = [1, 2].map(base);
    let sink = nodes[1].ns.run(|| UdpSocket::bind((there, 0)).unwrap());
    let source = nodes[0].ns.run(|| UdpSocket::bind((here, 0)).unwrap());
    sink.set_nonblocking(true).unwrap();
    let mut bytes = [0; 9];
    until("a datagram that arrives whole", &mut || {
        let sent = source.send_to(b"whole", sink.local_addr().unwrap());
        assert_eq!(sent.unwrap(), 5);
        sink.recv(&mut bytes).is_ok()
    });
    assert_eq!(&bytes[..5], b"whole");
    for nic in nics {
        nic.shutdown(std::net::Shutdown::Both).unwrap();
    }
}
