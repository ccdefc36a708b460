//! Who may send to the kernel's VXLAN device: forged datagrams are made by hand, byte by byte, and either arrive or are
//! counted under the reason they were dropped for. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/cluster.rs"]
mod cluster;
mod common;

use std::net::{Ipv4Addr, UdpSocket};
use std::process::{Command, Stdio};
use std::time::Duration;

use cluster::{Cluster, DUAL, V4, VXLAN};
use common::LODEN;
use etherparse::PacketBuilder;
use loden::datapath::lock::NameLock;
use loden::lab::Member;
use nix::sys::signal::Signal;
use nix::sys::socket::{setsockopt, sockopt};

/// An address of node 2 that no lease names.
const STRANGER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 77);
const NODE_2: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

fn bytes(mac: &str) -> [u8; 6] {
    let bytes: Vec<u8> = mac
        .split(':')
        .map(|it| u8::from_str_radix(it, 16).unwrap())
        .collect();
    bytes.try_into().unwrap()
}

/// Sends forged datagrams from node 2 to node 1.
struct Forger<'a> {
    cluster: &'a Cluster,
    /// Where what arrives at node 1 is read.
    sink: UdpSocket,
    /// Where it is sent to: node 1's device.
    to: [u8; 6],
}

impl<'a> Forger<'a> {
    fn new(cluster: &'a Cluster) -> Self {
        let node = cluster.lab.netns(Member::Node(1));
        let sink = node.run(|| UdpSocket::bind((Ipv4Addr::new(198, 18, 1, 0), 0)));
        let sink = sink.unwrap().unwrap();
        sink.set_read_timeout(Some(Duration::from_millis(1)))
            .unwrap();
        Self {
            cluster,
            sink,
            to: bytes(&cluster.mac(1, "flannel.1")),
        }
    }

    /// One datagram; `tag` is what it carries innermost.
    fn send(&self, outer: Ipv4Addr, vni: u8, mac: [u8; 6], inner: [u8; 4], tag: &[u8]) {
        let datagram = self.datagram(vni, mac, inner, tag);
        let sent = self.socket(outer).send_to(&datagram, "192.0.2.1:8472");
        assert_eq!(sent.unwrap(), datagram.len());
    }

    fn socket(&self, outer: Ipv4Addr) -> UdpSocket {
        let node = self.cluster.lab.netns(Member::Node(2));
        node.run(|| UdpSocket::bind((outer, 0))).unwrap().unwrap()
    }

    fn datagram(&self, vni: u8, mac: [u8; 6], inner: [u8; 4], tag: &[u8]) -> Vec<u8> {
        let port = self.sink.local_addr().unwrap().port();
        let frame = PacketBuilder::ethernet2(mac, self.to)
            .ipv4(inner, [198, 18, 1, 0], 64)
            .udp(7, port);
        let mut datagram = vec![8, 0, 0, 0, 0, 0, vni, 0];
        frame.write(&mut datagram, tag).unwrap();
        datagram
    }

    /// Datagrams of one length as a superpacket, which crosses the wire whole.
    fn send_as_one(&self, outer: Ipv4Addr, datagrams: [Vec<u8>; 2]) {
        let socket = self.socket(outer);
        let len = i32::try_from(datagrams[0].len()).unwrap();
        setsockopt(&socket, sockopt::UdpGsoSegment, &len).unwrap();
        let together = datagrams.concat();
        let sent = socket.send_to(&together, "192.0.2.1:8472");
        assert_eq!(sent.unwrap(), together.len());
    }

    /// What arrived, until `last` has.
    fn arrived(&self, last: &[u8]) -> Vec<Vec<u8>> {
        let mut all: Vec<Vec<u8>> = Vec::new();
        let mut buffer = [0; 100];
        self.cluster.wait_until("the last datagram", || {
            while let Ok(len) = self.sink.recv(&mut buffer) {
                all.push(buffer[..len].to_vec());
            }
            all.last().is_some_and(|it| it == last)
        });
        all
    }
}

/// Drops of node 1: unknown peers, spoofed sources.
fn drops(cluster: &Cluster) -> [u64; 2] {
    let drops = cluster.status(1)["datapath"]["total"]["decap"]["drops"].clone();
    ["unknown_peer", "spoofed_source"].map(|name| drops[name].as_u64().unwrap_or(0))
}

/// How many more there are than before.
fn more_drops(cluster: &Cluster, before: [u64; 2]) -> [u64; 2] {
    let now = drops(cluster);
    [now[0] - before[0], now[1] - before[1]]
}

/// Waits until there are exactly so many more than before. What is forged comes by every processor, and is not counted in the
/// order it was sent in.
fn await_drops(cluster: &Cluster, before: [u64; 2], more: [u64; 2]) {
    cluster.wait_until(&format!("drops of {more:?}"), || {
        more_drops(cluster, before) == more
    });
}

fn await_check(cluster: &Cluster) {
    cluster.wait_until("the source check", || {
        let sets = cluster.shown(1, "nft", "list set inet loden-vxlan-1 inner-v4");
        sets.join(" ").contains(". 198.18.2.0/24")
    });
}

#[test]
fn what_no_peer_may_send_is_dropped_before_or_after_it_is_unwrapped_and_counted() {
    let mut cluster = Cluster::new(3, DUAL, VXLAN);
    cluster.ip(Member::Node(2), "addr add 192.0.2.77/24 dev eth0", 2);
    await_check(&cluster);
    let macs = [2, 3].map(|n| bytes(&cluster.mac(n, "flannel.1")));
    let forger = Forger::new(&cluster);
    let attack = |last: &[u8]| {
        forger.send(STRANGER, 1, macs[0], [198, 18, 2, 2], b"a stranger");
        // Nobody here has a device for it.
        forger.send(STRANGER, 9, macs[0], [198, 18, 2, 2], b"another network");
        forger.send(NODE_2, 1, macs[0], [198, 18, 3, 2], b"another's subnet");
        forger.send(NODE_2, 1, macs[1], [198, 18, 2, 2], b"another's MAC");
        forger.send(
            NODE_2,
            1,
            macs[0],
            [192, 0, 2, 9],
            b"outside of the overlay",
        );
        forger.send(NODE_2, 1, macs[0], [198, 18, 1, 2], b"our own subnet");
        forger.send(NODE_2, 1, macs[0], [198, 18, 2, 2], last);
    };
    let await_all = || {
        for (from, to) in [(1, 2), (2, 1), (3, 1)] {
            cluster.await_ping(from, &format!("198.18.{to}.2"));
            cluster.await_ping(from, &format!("fd00:18:0:{to}::2"));
        }
    };
    // A peer may have probed this node before that knew of its lease.
    await_all();
    let before = drops(&cluster);
    attack(b"honest");
    assert_eq!(forger.arrived(b"honest"), [b"honest"]);
    await_drops(&cluster, before, [2, 4]);
    await_all();
    assert_eq!(more_drops(&cluster, before), [2, 4]);
    let metrics = cluster.status(1)["source_check"].clone();
    assert_eq!(
        (&metrics["outer"], &metrics["inner"]),
        (&true.into(), &true.into())
    );

    // Somebody flushes the ruleset: what was counted stays counted, and the check comes back.
    cluster.run(Member::Node(1), "nft", "flush ruleset");
    await_check(&cluster);
    attack(b"honest again");
    assert_eq!(forger.arrived(b"honest again"), [b"honest again"]);
    await_drops(&cluster, before, [4, 8]);
    // Likewise a single element, which would lock a peer out.
    cluster.run(
        Member::Node(1),
        "nft",
        "delete element inet loden-vxlan-1 outer-v4 { 192.0.2.3 }",
    );
    cluster.await_ping(3, "198.18.1.2");

    // A device that is made anew is checked as the one before.
    cluster.ip(Member::Node(1), "link del flannel.1", 1);
    cluster.wait_until("the check of the new device", || {
        let [_, before] = drops(&cluster);
        forger.send(NODE_2, 1, macs[1], [198, 18, 2, 2], b"to the new device");
        drops(&cluster)[1] > before
    });
    forger.send(NODE_2, 1, macs[0], [198, 18, 2, 2], b"before");
    let _until_then = forger.arrived(b"before");
    let before = drops(&cluster);
    attack(b"honest still");
    assert_eq!(forger.arrived(b"honest still"), [b"honest still"]);
    await_drops(&cluster, before, [2, 4]);
    // Where the kernel can, other packets of the node do not come by.
    let chain = cluster.shown(1, "nft", "list chain inet loden-vxlan-1 inner");
    assert!(chain.join(" ").contains("hook ingress"), "{chain:#?}");
    cluster.await_ping(3, "198.18.1.2");
    let before = drops(&cluster);

    // A peer that goes may send no longer; one that comes may.
    let key = "198.18.9.0-24&fd00:18:0:9::-64";
    let lease = r#"{"PublicIP":"192.0.2.77","PublicIPv6":"2001:db8::77","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:77"},"BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:06:77"}}"#;
    cluster.put(key, lease);
    let known = || {
        let set = cluster.shown(1, "nft", "list set inet loden-vxlan-1 inner-v4");
        set.join(" ").contains("02:00:00:00:00:77 . 198.18.9.0/24")
    };
    cluster.wait_until("the new sender", known);
    forger.send(
        STRANGER,
        1,
        [2, 0, 0, 0, 0, 0x77],
        [198, 18, 9, 2],
        b"newcomer",
    );
    assert_eq!(forger.arrived(b"newcomer"), [b"newcomer"]);
    cluster.delete(key);
    cluster.wait_until("no new sender", || !known());
    forger.send(STRANGER, 1, [2, 0, 0, 0, 0, 0x77], [198, 18, 9, 2], b"gone");
    forger.send(NODE_2, 1, macs[0], [198, 18, 2, 2], b"the end");
    assert_eq!(forger.arrived(b"the end"), [b"the end"]);
    await_drops(&cluster, before, [1, 0]);

    // The check goes with the daemon, for nobody would keep it with the peers; a killed one's is swept.
    drop(forger);
    cluster.end(1, Signal::SIGTERM);
    let tables = |cluster: &Cluster| cluster.shown(1, "nft", "list tables").join(" ");
    assert!(
        !tables(&cluster).contains("loden-vxlan"),
        "{}",
        tables(&cluster)
    );
    cluster.start(1);
    await_check(&cluster);
    cluster.end(1, Signal::SIGKILL);
    assert!(tables(&cluster).contains("loden-vxlan-1"));
    cluster.start_with(1, &["--vxlan=user"]);
    cluster.wait_until("no table", || !tables(&cluster).contains("loden-vxlan"));
    cluster.await_ping(2, "198.18.1.2");
}

#[test]
fn stranger_gets_nothing_past_the_check_behind_a_datagram_of_another_network() {
    let cluster = Cluster::new(2, V4, VXLAN);
    cluster.ip(Member::Node(2), "addr add 192.0.2.77/24 dev eth0", 2);
    await_check(&cluster);
    cluster.await_ping(1, "198.18.2.2");
    let mac = bytes(&cluster.mac(2, "flannel.1"));
    let forger = Forger::new(&cluster);
    let of = |vni, tag| forger.datagram(vni, mac, [198, 18, 2, 2], tag);
    // Such a superpacket of a peer's is taken apart, and all of it arrives.
    forger.send_as_one(NODE_2, [of(1, b"first"), of(1, b"other")]);
    assert_eq!(forger.arrived(b"other"), [b"first", b"other"]);
    let before = drops(&cluster);
    forger.send_as_one(STRANGER, [of(9, b"cover"), of(1, b"smugg")]);
    forger.send(NODE_2, 1, mac, [198, 18, 2, 2], b"the end");
    assert_eq!(forger.arrived(b"the end"), [b"the end"]);
    await_drops(&cluster, before, [1, 0]);

    // Another network's device on the same port gets what is its own.
    let other = "link add other type vxlan id 9 dstport 8472 local 192.0.2.N nolearning";
    cluster.ip(Member::Node(1), other, 1);
    cluster.ip(Member::Node(1), "addr add 203.0.113.1/24 dev other", 1);
    cluster.ip(Member::Node(1), "link set other up", 1);
    let received = || {
        let stats = cluster
            .shown(1, "ip", "-s -o link show dev other")
            .join(" ");
        let (_, numbers) = stats.split_once("errors dropped").unwrap();
        numbers
            .split_whitespace()
            .nth(4)
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    let none = received();
    cluster.wait_until("what is another network's", || {
        forger.send(STRANGER, 9, mac, [203, 0, 113, 2], b"another's");
        received() > none
    });
    let before = drops(&cluster);
    forger.send(STRANGER, 1, mac, [198, 18, 2, 2], b"a stranger");
    forger.send(NODE_2, 1, mac, [198, 18, 2, 2], b"the end");
    assert_eq!(forger.arrived(b"the end"), [b"the end"]);
    await_drops(&cluster, before, [1, 0]);
    cluster.ip(Member::Node(1), "link del other", 1);
    cluster.wait_until("nothing of other networks", || {
        let chain = cluster.shown(1, "nft", "list chain inet loden-vxlan-1 outer");
        !chain.join(" ").contains("@th")
    });
}

#[test]
fn check_of_another_daemon_is_not_swept_whichever_family_it_has() {
    let mut cluster = Cluster::idle(2, V4, VXLAN);
    let node = cluster.lab.netns(Member::Node(1));
    // As daemons hold them, of networks with one family.
    let hold = |device: &str| node.run(|| NameLock::take(&format!("device/{device}")).unwrap());
    let _held = ["flannel.76", "flannel-v6.77", "flannel.ipip"].map(|name| hold(name).unwrap());
    let kept = ["loden-vxlan-76", "loden-vxlan-77", "loden-ipip"];
    for table in kept.iter().chain(&["loden-vxlan-78"]) {
        let add = format!("add table inet {table}");
        cluster.run(Member::Node(1), "nft", &add);
    }
    cluster.start(1);
    let tables = || cluster.shown(1, "nft", "list tables");
    cluster.wait_until("what nobody holds to be swept", || {
        let is_gone = !tables().join(" ").contains("loden-vxlan-78");
        cluster.status(1)["ready"] == true && is_gone
    });
    let tables = tables();
    for table in kept {
        assert!(tables.contains(&format!("table inet {table}")), "{table}");
    }
}

#[test]
fn check_that_is_off_or_cannot_be_made_is_told_and_costs_no_packet() {
    let mut cluster = Cluster::new(2, V4, r#"{"Type":"vxlan","SourceCheck":"off"}"#);
    cluster.await_ping(1, "198.18.2.2");
    assert!(cluster.status(1)["source_check"].is_null());
    let mac = bytes(&cluster.mac(2, "flannel.1"));
    let forged = [2, 0, 0, 0, 0, 9];
    {
        let forger = Forger::new(&cluster);
        forger.send(NODE_2, 1, forged, [198, 18, 2, 2], b"spoofed");
        assert_eq!(forger.arrived(b"spoofed"), [b"spoofed"]);
    }
    // "loose": wherever it comes from, what is in it must be a peer's.
    cluster.configure(r#"{"Type":"vxlan","SourceCheck":"loose"}"#);
    cluster.end(1, Signal::SIGTERM);
    cluster.start(1);
    await_check(&cluster);
    cluster.ip(Member::Node(2), "addr add 192.0.2.77/24 dev eth0", 2);
    cluster.await_ping(2, "198.18.1.2");
    let before = drops(&cluster);
    {
        let forger = Forger::new(&cluster);
        forger.send(STRANGER, 1, forged, [198, 18, 2, 2], b"spoofed");
        forger.send(STRANGER, 1, mac, [198, 18, 2, 2], b"from elsewhere");
        assert_eq!(forger.arrived(b"from elsewhere"), [b"from elsewhere"]);
    }
    await_drops(&cluster, before, [0, 1]);
    // A node without nft.
    cluster.configure(VXLAN);
    cluster.end(1, Signal::SIGTERM);
    let mut command = Command::new(LODEN);
    command
        .args([
            "daemon",
            "--iface",
            "eth0",
            "--iptables-forward-rules=false",
        ])
        .arg("--local-store")
        .arg(cluster.lab.dir().join("store"))
        .arg("--subnet-file")
        .arg(cluster.file(1, "subnet.env"))
        .env("PATH", "/nowhere")
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    let child = cluster
        .lab
        .netns(Member::Node(1))
        .spawn(&mut command)
        .unwrap();
    cluster.daemons[0] = Some(cluster::Daemon(child));
    cluster.wait_until("a status that says why there is no check", || {
        let status = cluster.status(1);
        let check = &status["source_check"];
        let why = check["why_not"].as_str().unwrap_or_default();
        let is_idle = check["outer"] == false && check["inner"] == false;
        status["ready"] == true && is_idle && why.contains("nft is not installed")
    });
    cluster.await_ping(2, "198.18.1.2");
}
