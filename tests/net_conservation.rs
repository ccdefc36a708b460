//! No packet is lost silently: with a loss forced at every stage, what was read is what was sent, answered and
//! dropped, reason by reason, and the kernel's own counters say the same. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod net;

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use etherparse::PacketBuilder;
use loden::datapath::{Datapath, EngineKind, Status};
use loden::lab::{Lab, Member, Wire, wait};
use loden::tun::TunDevice;
use loden::underlay::Underlay;
use net::{
    LIMIT, Node, Shape, adds_up, device_packets, ip, lab, pair, pings, pings_now, recv, run,
    tun_v4, udp_at, vtep_mac,
};
use nix::sys::socket::{setsockopt, sockopt};

/// What a node's counters must show, by `direction.counter`.
struct Ledger<'a> {
    node: &'a Node,
    expected: BTreeMap<String, u64>,
}

impl<'a> Ledger<'a> {
    fn new(node: &'a Node) -> Self {
        let expected = totals(&node.status());
        Self { node, expected }
    }

    /// Adds to what is expected and waits until the counters show that, and nothing else.
    fn expect(&mut self, stage: &str, changes: &[(&str, u64)]) {
        for &(name, by) in changes {
            *self.expected.entry(name.to_owned()).or_default() += by;
        }
        let limit = Instant::now() + LIMIT;
        loop {
            let status = self.node.status();
            adds_up(&status);
            let totals = totals(&status);
            if totals == self.expected {
                return;
            }
            assert!(
                Instant::now() < limit,
                "{stage}: {totals:#?} is not {:#?}",
                self.expected
            );
            wait::pause(std::time::Duration::from_millis(1));
        }
    }
}

fn totals(status: &Status) -> BTreeMap<String, u64> {
    let mut all = BTreeMap::new();
    for (name, side) in [
        ("encap", &status.total.encap),
        ("decap", &status.total.decap),
    ] {
        let mut put = |counter: &str, value| {
            if value > 0 {
                all.insert(format!("{name}.{counter}"), value);
            }
        };
        put("read", side.read);
        put("sent", side.sent);
        put("answered", side.answered);
        for (reason, &value) in &side.drops {
            put(reason, value);
        }
    }
    all
}

/// Fewer than the burst of the limit on ICMP errors, twice.
const SOME: u64 = 20;

fn send(socket: &UdpSocket, to: SocketAddr, count: u64, payload: &[u8]) {
    for _ in 0..count {
        assert_eq!(socket.send_to(payload, to).unwrap(), payload.len());
    }
}

fn inner(from: [u8; 4], to: [u8; 4], ttl: u8) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(from, to, ttl)
        .udp(7, 9)
        .write(&mut packet, b"inner")
        .unwrap();
    packet
}

/// What nft's only counter in table `seen` counted.
fn seen(node: &Node) -> u64 {
    let table = run(&node.netns, "nft", "list table inet seen");
    let (_, rest) = table.split_once("packets ").unwrap();
    let (count, _) = rest.split_once(' ').unwrap();
    count.parse().unwrap()
}

fn nft(node: &Node, hook: &str, rule: &str, table: &str) {
    run(&node.netns, "nft", &format!("add table inet {table}"));
    run(
        &node.netns,
        "nft",
        &format!("add chain inet {table} c {{ type filter hook {hook} priority 0 ; }}"),
    );
    run(
        &node.netns,
        "nft",
        &format!("add rule inet {table} c {rule}"),
    );
}

fn everything_adds_up(shape: &Shape) {
    // Without merging on receipt, so that nft counts datagrams.
    let lab = lab(2, 0, Wire::PacketNoGro);
    let (a, b) = pair(&lab, shape);
    let port = b.addr.port();
    let (device_a, device_b) = (a.device().to_owned(), b.device().to_owned());
    nft(&b, "input", &format!("udp dport {port} counter"), "seen");
    ip(&a.netns, &format!("route add 224.0.0.0/4 dev {device_a}"));
    ip(&a.netns, "addr add 192.0.2.77/24 dev eth0");
    let (mut at_a, mut at_b) = (Ledger::new(&a), Ledger::new(&b));
    let socket = a.udp();
    let sink = b.udp();
    let sink_at = sink.local_addr().unwrap();

    // Of different flows, so that they are not merged on the way to the device.
    for _ in 0..SOME {
        send(&a.udp(), sink_at, 1, b"good");
    }
    at_a.expect("good", &[("encap.read", SOME), ("encap.sent", SOME)]);
    at_b.expect("good", &[("decap.read", SOME), ("decap.sent", SOME)]);
    let mut buf = [0; 16];
    for _ in 0..SOME {
        assert_eq!(recv(&sink, &mut buf), 4);
    }

    send(&socket, "198.18.9.1:9".parse().unwrap(), SOME, b"nowhere");
    at_a.expect(
        "no route",
        &[("encap.read", SOME), ("encap.answered", SOME)],
    );

    socket.set_ttl(1).unwrap();
    send(&socket, sink_at, SOME, b"near");
    at_a.expect("TTL 1", &[("encap.read", SOME), ("encap.answered", SOME)]);
    socket.set_ttl(2).unwrap();
    send(&socket, sink_at, SOME, b"not quite");
    at_b.expect("TTL 2", &[("decap.read", SOME), ("decap.answered", SOME)]);
    // The answers cross the tunnel back.
    at_a.expect(
        "TTL 2",
        &[
            ("encap.read", SOME),
            ("encap.sent", SOME),
            ("decap.read", SOME),
            ("decap.sent", SOME),
        ],
    );
    socket.set_ttl(64).unwrap();

    send(&socket, "224.0.0.251:5353".parse().unwrap(), SOME, b"group");
    at_a.expect(
        "multicast",
        &[("encap.read", SOME), ("encap.multicast", SOME)],
    );

    nft(&a, "output", &format!("udp dport {port} drop"), "wall");
    send(&socket, sink_at, SOME, b"forbidden");
    at_a.expect("firewall", &[("encap.read", SOME), ("encap.refused", SOME)]);
    run(&a.netns, "nft", "delete table inet wall");

    ip(&a.netns, "link set eth0 down");
    send(&socket, sink_at, SOME, b"cut off");
    at_a.expect(
        "link down",
        &[("encap.read", SOME), ("encap.underlay_down", SOME)],
    );
    ip(&a.netns, "link set eth0 up");

    forged(&a, &b, shape.vxlan, &mut at_b);

    ip(&b.netns, &format!("link set {device_b} down"));
    send(&socket, sink_at, SOME, b"nobody home");
    at_a.expect("device down", &[("encap.read", SOME), ("encap.sent", SOME)]);
    at_b.expect(
        "device down",
        &[("decap.read", SOME), ("decap.device_down", SOME)],
    );

    for (node, device) in [(&a, &device_a), (&b, &device_b)] {
        let total = node.status().total;
        let (received, transmitted) = device_packets(&node.netns, device);
        assert_eq!(transmitted, total.encap.read, "read from {device}");
        assert_eq!(
            received,
            total.decap.sent + total.encap.answered,
            "written to {device}"
        );
    }
    assert_eq!(seen(&b), b.status().total.decap.read, "what nft counted");
}

/// Datagrams that no right peer sends, straight onto the underlay.
fn forged(a: &Node, b: &Node, vxlan: bool, at_b: &mut Ledger<'_>) {
    let peer = udp_at(&a.netns, SocketAddr::new(a.addr.ip(), 0));
    let stranger = udp_at(&a.netns, "192.0.2.77:0".parse().unwrap());
    let (ours, theirs) = (tun_v4(1).octets(), tun_v4(2).octets());
    let cases: [(&UdpSocket, Vec<u8>, &str); 8] = [
        (&stranger, inner(ours, theirs, 64), "decap.unknown_peer"),
        (
            &peer,
            inner([198, 18, 3, 1], theirs, 64),
            "decap.spoofed_source",
        ),
        (&peer, inner(theirs, theirs, 64), "decap.spoofed_source"),
        (&peer, inner(ours, [198, 18, 3, 1], 64), "decap.not_local"),
        (&peer, inner(ours, [224, 0, 0, 1], 64), "decap.multicast"),
        (&peer, Vec::new(), "decap.too_short"),
        (&peer, vec![0x45; 19], "decap.too_short"),
        (&peer, vec![0x75; 1400], "decap.malformed"),
    ];
    for (socket, bytes, reason) in cases {
        let bytes = if vxlan { framed(&bytes) } else { bytes };
        send(socket, b.addr, SOME, &bytes);
        at_b.expect(reason, &[("decap.read", SOME), (reason, SOME)]);
    }
    if vxlan {
        forged_frames(&peer, b, &framed(&inner(ours, theirs, 64)), at_b);
    }
}

/// The packet in a frame from node 1 to node 2 as RFC 7348 draws it.
fn framed(packet: &[u8]) -> Vec<u8> {
    let mut datagram = vec![8, 0, 0, 0, 0, 0, 1, 0];
    datagram.extend(vtep_mac(2).bytes());
    datagram.extend(vtep_mac(1).bytes());
    datagram.extend([8, 0]);
    datagram.extend(packet);
    datagram
}

/// A good datagram, wrong in one field after the other.
fn forged_frames(peer: &UdpSocket, b: &Node, good: &[u8], at_b: &mut Ledger<'_>) {
    let cases: [(usize, u8, &str); 10] = [
        (0, 0x00, "decap.not_vxlan"),
        (0, 0xf7, "decap.not_vxlan"),
        (4, 0x01, "decap.wrong_vni"),
        (6, 0x02, "decap.wrong_vni"),
        (8 + 5, 9, "decap.wrong_mac"),
        (8, 0xff, "decap.wrong_mac"),
        (14 + 5, 9, "decap.spoofed_mac"),
        (14, 0xff, "decap.spoofed_mac"),
        // ARP.
        (21, 0x06, "decap.not_ip"),
        (20, 0x86, "decap.not_ip"),
    ];
    for (at, byte, reason) in cases {
        let mut wrong = good.to_vec();
        wrong[at] = byte;
        send(peer, b.addr, SOME, &wrong);
        at_b.expect(reason, &[("decap.read", SOME), (reason, SOME)]);
    }
    // IPv6 by its EtherType, IPv4 by its version.
    let mut wrong = good.to_vec();
    wrong[20..22].copy_from_slice(&[0x86, 0xdd]);
    send(peer, b.addr, SOME, &wrong);
    at_b.expect(
        "version",
        &[("decap.read", SOME), ("decap.malformed", SOME)],
    );
    // Cut anywhere before the end of the inner IP header, then within the packet.
    let reason = |len: usize| {
        if len < 22 + 20 {
            "decap.too_short"
        } else {
            "decap.malformed"
        }
    };
    for len in 0..good.len() {
        send(peer, b.addr, 1, &good[..len]);
        at_b.expect("cut", &[("decap.read", 1), (reason(len), 1)]);
    }
    // Reserved bits mean nothing: the packet is looked at.
    let mut odd = framed(&inner(tun_v4(1).octets(), [224, 0, 0, 1], 64));
    odd[0] = 0xff;
    odd[7] = 0xff;
    send(peer, b.addr, 1, &odd);
    at_b.expect(
        "reserved bits",
        &[("decap.read", 1), ("decap.multicast", 1)],
    );
}

#[test]
fn the_batched_engine_accounts_for_every_packet() {
    everything_adds_up(&Shape::of(EngineKind::Mmsg));
}

#[test]
fn the_batched_engine_accounts_for_every_packet_in_vxlan() {
    everything_adds_up(&Shape::vxlan(EngineKind::Mmsg, false));
}

#[test]
fn the_portable_engine_accounts_for_every_packet_in_vxlan() {
    everything_adds_up(&Shape::vxlan(EngineKind::Portable, false));
}

#[test]
fn what_goes_to_a_node_whose_mac_is_unknown_is_counted() {
    for engine in [EngineKind::Mmsg, EngineKind::Portable] {
        let lab = lab(2, 0, Wire::Packet);
        let shape = Shape::vxlan(engine, false);
        let (a, b) = pair(&lab, &shape);
        let mut routes = shape.routes(1, &[1, 2]);
        for route in &mut routes {
            route.mac = None;
        }
        let mut at_a = Ledger::new(&a);
        a.datapath.publish(&routes);
        let sink = b.udp();
        send(&a.udp(), sink.local_addr().unwrap(), SOME, b"to whom?");
        at_a.expect("no MAC", &[("encap.read", SOME), ("encap.no_mac", SOME)]);
        // What comes from it is accepted, for lack of anything to compare it with.
        let sink = a.udp();
        send(&b.udp(), sink.local_addr().unwrap(), 1, b"hello");
        at_a.expect("unknown sender", &[("decap.read", 1), ("decap.sent", 1)]);
        // And told nothing, for lack of an address to tell it at.
        let socket = b.udp();
        socket.set_ttl(2).unwrap();
        send(&socket, sink.local_addr().unwrap(), SOME, b"not quite");
        at_a.expect(
            "TTL 2",
            &[("decap.read", SOME), ("decap.ttl_expired", SOME)],
        );
        assert_eq!(b.status().total.decap.read, 0);
    }
}

#[test]
fn the_portable_engine_accounts_for_every_packet() {
    everything_adds_up(&Shape::of(EngineKind::Portable));
}

/// Opens as [`Datapath::open`] does, and hands out the sockets.
fn open_with_sockets(lab: &Lab, sockets: &mut Vec<OwnedFd>) -> Node {
    let shape = Shape::default();
    Node::start_with(lab, 1, &shape, &[1, 2], |settings| {
        let underlay = Underlay::open(settings.bind, 1, true).unwrap();
        for socket in underlay.send.iter().chain(&underlay.receive) {
            sockets.push(socket.fd().try_clone_to_owned().unwrap());
        }
        let device = TunDevice::open(&settings.device, 1).unwrap();
        Datapath::from_parts(settings, device, underlay)
    })
}

/// What a node's data plane has read from its device, once that is all of what was sent through it: a packet arrives
/// before it is counted.
fn read_of(node: &Node, sent: u64) -> u64 {
    let status = node.wait_status("what was sent", |status| status.total.encap.read >= sent);
    assert_eq!(status.total.encap.read, sent);
    sent
}

/// A wire that carries next to nothing, after a burst of some packets.
fn choke(lab: &Lab, limit: u32) {
    let netns = lab.netns(Member::Node(1));
    let tbf = format!("qdisc replace dev eth0 root tbf rate 8kbit burst 4000 limit {limit}");
    run(&netns, "tc", &tbf);
}

#[test]
fn a_full_socket_drops_with_its_name_and_nothing_else_is_lost() {
    let lab = lab(2, 0, Wire::Packet);
    let mut sockets = Vec::new();
    let a = open_with_sockets(&lab, &mut sockets);
    for socket in &sockets {
        setsockopt(&socket.as_fd(), sockopt::SndBuf, &8192).unwrap();
    }
    assert!(!pings_now(&a.netns, tun_v4(2)), "there is no node 2");
    let before = read_of(&a, 1);
    choke(&lab, 1 << 20);
    let socket = a.udp();
    let to = SocketAddr::new(tun_v4(2).into(), 9);
    send(&socket, to, 100, &[7; 1000]);
    let status = a.wait_status("every packet", |status| {
        status.total.encap.read >= before + 100
    });
    adds_up(&status);
    let encap = &status.total.encap;
    assert_eq!(encap.read, before + 100);
    let full = encap.drops["socket_full"];
    assert!((1..100).contains(&full), "{encap:?}");
    assert_eq!(encap.sent, encap.read - full, "{encap:?}");
    run(&a.netns, "tc", "qdisc del dev eth0 root");
}

#[test]
fn a_full_queue_of_the_underlay_device_is_counted_and_withdraws_nothing() {
    let lab = lab(2, 0, Wire::Packet);
    let (a, _b) = pair(&lab, &Shape::default());
    assert!(pings(&a.netns, tun_v4(2)));
    let before = read_of(&a, 1);
    choke(&lab, 20_000);
    let socket = a.udp();
    let to = SocketAddr::new(tun_v4(2).into(), 9);
    // In runs, so that runs are refused, of a size that leaves room for single packets afterwards.
    loden::sys::socket::set(
        socket.as_fd(),
        loden::sys::socket::IntOption::UDP_SEGMENT,
        500,
    )
    .unwrap();
    let mut count = 0;
    for _ in 0..20 {
        send(&socket, to, 1, &[7; 3000]);
        count += 6;
        a.wait_status("every packet", |status| {
            status.total.encap.read >= before + count
        });
    }
    let status = a.status();
    adds_up(&status);
    let encap = &status.total.encap;
    assert_eq!(encap.read, before + count);
    assert!(encap.drops["no_memory"] > 0, "{encap:?}");
    assert_eq!(encap.sent + encap.drops["no_memory"], encap.read);
    let gso = &status.peers[0].gso_withdrawn;
    assert_eq!(*gso, None, "a full queue says nothing about runs");
    run(&a.netns, "tc", "qdisc del dev eth0 root");
}
