//! The batched engine over in-memory devices: a sequenced-packet socket pair stands for the TUN, loopback for
//! the underlay. Everything else is the program's own code and the kernel's UDP stack.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod memory;

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use etherparse::PacketBuilder;
use loden::addr::{Mac, Mtu};
use loden::datapath::{
    Datapath, Encapsulation, EngineKind, Event, Local, PeerRoute, Settings, SourceCheck,
    SourcePort, Status,
};
use loden::sys::socket::{IntOption, set};
use loden::sys::tun::{OFFLOAD_CSUM, OFFLOAD_TSO4, OFFLOAD_TSO6, OFFLOAD_USO4, OFFLOAD_USO6};
use loden::tun::{TunCaps, TunDevice, TunQueue};
use loden::underlay::Underlay;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};

const VNET: usize = 10;

/// One node: a data plane, and the kernel's side of its TUN queues.
struct Node {
    datapath: Datapath,
    tun: Vec<File>,
    addr: SocketAddr,
    events: Arc<Mutex<Vec<Event>>>,
}

/// How a test's nodes differ from the usual.
#[derive(Clone, Copy)]
struct Shape {
    workers: usize,
    check: SourceCheck,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            workers: 1,
            check: SourceCheck::Strict,
        }
    }
}

/// Node `n` owns 198.18.n.0/24.
fn subnet(n: u8) -> ipnet::IpNet {
    format!("198.18.{n}.0/24").parse().unwrap()
}

const fn pod(n: u8) -> [u8; 4] {
    [198, 18, n, 2]
}

fn node(n: u8, shape: Shape) -> Node {
    let addr = memory::own_addr();
    let underlay = Underlay::open(addr, shape.workers, true).unwrap();
    let (mut queues, mut tun) = (Vec::new(), Vec::new());
    for _ in 0..shape.workers {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        )
        .unwrap();
        for end in [&ours, &theirs] {
            setsockopt(end, sockopt::SndBuf, &(4 << 20)).unwrap();
        }
        queues.push(TunQueue::new(File::from(ours), None));
        tun.push(File::from(theirs));
    }
    let caps = TunCaps {
        vnet_hdr: true,
        multi_queue: true,
        detached_writes: false,
        offloads: OFFLOAD_CSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6 | OFFLOAD_USO4 | OFFLOAD_USO6,
    };
    let events = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&events);
    let settings = Settings {
        engine: EngineKind::Mmsg,
        workers: shape.workers,
        pin: false,
        device: "memory".to_owned(),
        encapsulation: Encapsulation::Plain,
        bind: addr,
        mtu: Mtu::new(1472).unwrap(),
        source_check: shape.check,
        source_port: SourcePort::Spread,
        local: Local {
            nets: vec![subnet(n)],
            addrs: vec![addr.ip()],
            icmp_v4: Some(Ipv4Addr::new(198, 18, n, 0)),
            icmp_v6: None,
        },
        on_event: Arc::new(move |event| sink.lock().unwrap().push(event)),
    };
    let device = TunDevice {
        name: "memory".to_owned(),
        caps,
        queues,
    };
    let datapath = Datapath::from_parts(settings, device, underlay).unwrap();
    Node {
        datapath,
        tun,
        addr,
        events,
    }
}

fn route(n: u8, node: &Node) -> PeerRoute {
    PeerRoute {
        net: subnet(n),
        addr: node.addr,
        mac: None,
        ecn: false,
    }
}

/// A socket at a node's address, of another port.
fn beside(node: SocketAddr) -> UdpSocket {
    UdpSocket::bind((node.ip(), 0)).unwrap()
}

/// Two nodes that know each other, running.
fn pair(shape: Shape) -> (Node, Node) {
    let (mut a, mut b) = (node(1, shape), node(2, shape));
    a.datapath.publish(&[route(2, &b)]);
    b.datapath.publish(&[route(1, &a)]);
    a.datapath.start().unwrap();
    b.datapath.start().unwrap();
    (a, b)
}

/// Waits until `done` says so, or fails with what was waited for.
fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::yield_now();
    }
}

/// A packet as the TUN hands it over: with a plain virtio-net header.
fn plain(packet: &[u8]) -> Vec<u8> {
    let mut framed = vec![0; VNET];
    framed.extend_from_slice(packet);
    framed
}

fn udp(from: [u8; 4], to: [u8; 4], ports: (u16, u16), ttl: u8, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ipv4(from, to, ttl).udp(ports.0, ports.1);
    let mut packet = Vec::new();
    builder.write(&mut packet, payload).unwrap();
    packet
}

/// Reads one packet if there is one: its virtio-net header and its bytes.
fn read(tun: &File) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut buf = vec![0; 70_000];
    let len = { tun }.read(&mut buf).ok()?;
    Some((buf[..VNET].to_vec(), buf[VNET..len].to_vec()))
}

fn write(tun: &File, framed: &[u8]) {
    wait_for("room in the device", || match { tun }.write(framed) {
        Ok(len) => {
            assert_eq!(len, framed.len());
            true
        }
        Err(_) => false,
    });
}

fn next(tun: &File) -> (Vec<u8>, Vec<u8>) {
    let mut got = None;
    wait_for("a packet", || {
        got = read(tun);
        got.is_some()
    });
    got.unwrap()
}

fn adds_up(status: &Status) {
    for (name, side) in [
        ("encap", &status.total.encap),
        ("decap", &status.total.decap),
    ] {
        let drops: u64 = side.drops.values().sum();
        assert_eq!(
            side.read,
            side.sent + side.answered + drops + side.queued,
            "{name}: {side:?}"
        );
        assert_eq!(side.queued, 0, "{name} at a burst boundary");
    }
}

fn idle(node: &Node, read_encap: u64, read_decap: u64) -> Status {
    let mut last = None;
    wait_for("the counters", || {
        let status = node.datapath.status();
        let total = &status.total;
        let done = total.encap.read >= read_encap && total.decap.read >= read_decap;
        last = Some(status);
        done
    });
    let status = last.unwrap();
    assert_eq!(
        (status.total.encap.read, status.total.decap.read),
        (read_encap, read_decap)
    );
    adds_up(&status);
    status
}

#[test]
fn a_packet_crosses_unchanged_but_for_two_hops_of_ttl() {
    let (a, b) = pair(Shape::default());
    let packet = udp(pod(1), pod(2), (1000, 2000), 64, b"across");
    write(&a.tun[0], &plain(&packet));
    let (vnet, got) = next(&b.tun[0]);
    assert_eq!(vnet, [0; VNET]);
    assert_eq!(got, udp(pod(1), pod(2), (1000, 2000), 62, b"across"));
    idle(&a, 1, 0);
    let status = idle(&b, 0, 1);
    assert_eq!(status.peers[0].received, 1);
}

#[test]
fn an_expiring_packet_is_answered_with_time_exceeded() {
    let (a, b) = pair(Shape::default());
    write(
        &a.tun[0],
        &plain(&udp(pod(1), pod(2), (1000, 2000), 1, b"too far")),
    );
    let (_, answer) = next(&a.tun[0]);
    let headers = etherparse::SlicedPacket::from_ip(&answer).unwrap();
    let Some(etherparse::TransportSlice::Icmpv4(icmp)) = headers.transport else {
        panic!()
    };
    assert!(matches!(
        icmp.icmp_type(),
        etherparse::Icmpv4Type::TimeExceeded(_)
    ));
    // On the other side the answer crosses the tunnel.
    write(
        &a.tun[0],
        &plain(&udp(pod(1), pod(2), (1000, 2000), 2, b"nearly there")),
    );
    let (_, answer) = next(&a.tun[0]);
    let headers = etherparse::SlicedPacket::from_ip(&answer).unwrap();
    let Some(etherparse::NetSlice::Ipv4(ip)) = headers.net else {
        panic!()
    };
    assert_eq!(ip.header().source(), [198, 18, 2, 0]);
    assert_eq!(ip.header().destination(), pod(1));
    let status = idle(&a, 2, 1);
    assert_eq!(status.total.encap.answered, 1);
    assert_eq!(status.total.encap.send_calls, 2, "an answer and a packet");
    let status = idle(&b, 0, 1);
    assert_eq!(status.total.decap.answered, 1);
    assert_eq!(status.total.decap.send_calls, 1, "an answer");
}

#[test]
fn no_route_is_answered_and_multicast_is_not() {
    let (a, _b) = pair(Shape::default());
    write(
        &a.tun[0],
        &plain(&udp(pod(1), pod(9), (1000, 2000), 64, b"nowhere")),
    );
    let (_, answer) = next(&a.tun[0]);
    let headers = etherparse::SlicedPacket::from_ip(&answer).unwrap();
    let Some(etherparse::TransportSlice::Icmpv4(icmp)) = headers.transport else {
        panic!()
    };
    assert!(matches!(
        icmp.icmp_type(),
        etherparse::Icmpv4Type::DestinationUnreachable(_)
    ));
    write(
        &a.tun[0],
        &plain(&udp(pod(1), [224, 0, 0, 251], (5353, 5353), 64, b"mdns")),
    );
    let status = idle(&a, 2, 0);
    assert_eq!(status.total.encap.drops["multicast"], 1);
    assert_eq!(status.total.encap.answered, 1);
    assert!(read(&a.tun[0]).is_none());
}

#[test]
fn forged_and_garbage_datagrams_are_counted_by_reason_and_never_delivered() {
    let (a, b) = pair(Shape::default());
    let stranger = UdpSocket::bind("127.0.9.1:0").unwrap();
    let neighbour = beside(a.addr);
    let good = udp(pod(1), pod(2), (1, 2), 64, b"x");
    let cases: [(&UdpSocket, Vec<u8>, &str); 8] = [
        (&stranger, good, "unknown_peer"),
        (
            &neighbour,
            udp(pod(3), pod(2), (1, 2), 64, b"x"),
            "spoofed_source",
        ),
        (
            &neighbour,
            udp(pod(2), pod(2), (1, 2), 64, b"x"),
            "spoofed_source",
        ),
        (
            &neighbour,
            udp([127, 0, 0, 1], pod(2), (1, 2), 64, b"x"),
            "spoofed_source",
        ),
        (
            &neighbour,
            udp(pod(1), pod(3), (1, 2), 64, b"x"),
            "not_local",
        ),
        (
            &neighbour,
            udp(pod(1), [224, 0, 0, 1], (1, 2), 64, b"x"),
            "multicast",
        ),
        (&neighbour, vec![0x45; 19], "too_short"),
        (&neighbour, vec![0x75; 40], "malformed"),
    ];
    let mut expected: HashMap<&str, u64> = HashMap::new();
    for (sent, (socket, bytes, reason)) in (1..).zip(&cases) {
        socket.send_to(bytes, b.addr).unwrap();
        *expected.entry(reason).or_default() += 1;
        let status = idle(&b, 0, sent);
        assert_eq!(
            status.total.decap.drops[reason], expected[reason],
            "{reason}"
        );
    }
    assert!(read(&b.tun[0]).is_none());
    let first: Vec<_> = b.events.lock().unwrap().clone();
    let reasons = first
        .iter()
        .filter(|event| matches!(event, Event::FirstDrop { .. }))
        .count();
    assert!(
        reasons >= 4,
        "the first drop per source and reason is told: {first:?}"
    );
    idle(&a, 0, 0);
}

#[test]
fn garbage_of_every_length_leaves_the_engine_alive_and_its_counters_exact() {
    let (a, b) = pair(Shape::default());
    let neighbour = beside(a.addr);
    let lengths: Vec<usize> = (0..300)
        .chain((300..65_508).step_by(997))
        .chain([65_506, 65_507])
        .collect();
    let mut noise = 0x1234_5678_9abc_def1_u64;
    for (sent, &len) in (1..).zip(&lengths) {
        let bytes: Vec<u8> = std::iter::repeat_with(|| {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            noise.to_ne_bytes()[0]
        })
        .take(len)
        .collect();
        neighbour.send_to(&bytes, b.addr).unwrap();
        idle(&b, 0, sent);
    }
    let (before, decap) = (
        u64::try_from(lengths.len()).unwrap(),
        udp(pod(1), pod(2), (1, 2), 64, b"x"),
    );
    write(&a.tun[0], &plain(&decap));
    assert_eq!(next(&b.tun[0]).1.len(), decap.len());
    idle(&b, 0, before + 1);
}

#[test]
fn wrong_virtio_headers_are_counted_and_survived() {
    let (a, b) = pair(Shape::default());
    let packet = udp(pod(1), pod(2), (1000, 2000), 64, &[7; 200]);
    let mut sent = 0;
    for byte in 0..VNET {
        for value in [1, 3, 5, 0x80, 0xff] {
            let mut framed = plain(&packet);
            framed[byte] = value;
            write(&a.tun[0], &framed);
            sent += 1;
        }
    }
    for len in 1..30 {
        write(&a.tun[0], &plain(&packet)[..len]);
        sent += 1;
    }
    wait_for("every read", || {
        let status = a.datapath.status();
        adds_up(&status);
        status.total.encap.read >= sent
    });
    // Another flow, so that it is not merged with what is still on its way.
    let good = udp(pod(1), pod(2), (7, 8), 64, b"good");
    write(&a.tun[0], &plain(&good));
    wait_for("the good one", || {
        read(&b.tun[0]).is_some_and(|(_, got)| got.ends_with(b"good"))
    });
}

/// A packet that is described as a superpacket and is no longer than one of its segments may be: what a virtual
/// machine or a tunnel in a pod may make of its last bytes.
#[test]
fn a_superpacket_of_one_segment_is_a_packet() {
    let (a, b) = pair(Shape::default());
    let payload = [7; 500];
    for (sent, gso_size) in (1..).zip([500, 501, 1400]) {
        let superpacket = memory::udp_superpacket(pod(1), pod(2), (1, 2), gso_size, &payload);
        write(&a.tun[0], &superpacket);
        let status = idle(&a, sent, 0);
        assert_eq!(status.total.encap.sent, sent, "{:?}", status.total.encap);
        let (vnet, got) = next(&b.tun[0]);
        assert_eq!(vnet, [0; VNET]);
        assert_eq!(got, udp(pod(1), pod(2), (1, 2), 62, &payload));
    }
    let segment = memory::tcp_superpacket(pod(1), pod(2), 1, 1400, &payload);
    write(&a.tun[0], &segment);
    let (_, got) = next(&b.tun[0]);
    let headers = etherparse::PacketHeaders::from_ip_slice(&got).unwrap();
    let (Some(etherparse::NetHeaders::Ipv4(ip, _)), Some(transport)) =
        (headers.net, headers.transport)
    else {
        panic!("{got:?}")
    };
    let mut complete = transport.clone();
    complete.update_checksum_ipv4(&ip, &payload).unwrap();
    assert_eq!(transport, complete, "the checksum was completed");
    idle(&a, 4, 0);
}

#[test]
fn a_new_table_is_used_while_traffic_runs() {
    let (a, b) = pair(Shape::default());
    let packet = plain(&udp(pod(1), pod(2), (1, 2), 64, b"x"));
    for round in 0..50 {
        let routed = round % 2 == 0;
        let routes = if routed { vec![route(2, &b)] } else { vec![] };
        a.datapath.publish(&routes);
        // A burst that began before may still take some by the table it began with; every packet has one
        // outcome all the same.
        wait_for("an outcome by the new table", || {
            write(&a.tun[0], &packet);
            let mut delivered = false;
            wait_for("an outcome", || {
                delivered = read(&b.tun[0]).is_some();
                delivered || read(&a.tun[0]).is_some()
            });
            delivered == routed
        });
    }
    assert!(read(&a.tun[0]).is_none() && read(&b.tun[0]).is_none());
    adds_up(&a.datapath.status());
}

#[test]
fn a_device_that_ends_is_reported_once_and_costs_nothing() {
    let (mut a, _b) = pair(Shape::default());
    a.tun.clear();
    wait_for("the report", || {
        a.events
            .lock()
            .unwrap()
            .iter()
            .any(|event| matches!(event, Event::DeviceGone { .. }))
    });
    let wakeups = a.datapath.status().total.encap.wakeups;
    a.datapath.publish(&[]);
    assert!(
        a.datapath.status().total.encap.wakeups <= wakeups + 1,
        "it does not spin"
    );
    assert_eq!(a.events.lock().unwrap().len(), 1);
}

#[test]
fn an_error_without_a_reason_of_its_own_is_told_once() {
    let (a, mut b) = pair(Shape::default());
    // What is written to a socket whose other end is closed is EPIPE, which no device says.
    b.tun.clear();
    for sent in 1..=3 {
        let packet = udp(pod(1), pod(2), (1, 2), 64, b"in vain");
        write(&a.tun[0], &plain(&packet));
        let status = idle(&b, 0, sent);
        assert_eq!(status.total.decap.drops["rejected"], sent);
    }
    let events = b.events.lock().unwrap();
    let rejected = events
        .iter()
        .filter(|event| matches!(event, Event::Rejected { .. }));
    let told: Vec<String> = rejected.map(|event| format!("{event:?}")).collect();
    assert!(
        told.len() == 1 && told[0].contains("Broken pipe"),
        "{told:?}"
    );
}

#[test]
fn a_loose_check_takes_any_outer_source_but_still_only_leased_inner_ones() {
    let (_a, b) = pair(Shape {
        check: SourceCheck::Loose,
        ..Shape::default()
    });
    let stranger = UdpSocket::bind("127.0.9.1:0").unwrap();
    let behind_nat = udp(pod(1), pod(2), (1, 2), 64, b"behind NAT");
    stranger.send_to(&behind_nat, b.addr).unwrap();
    assert!(next(&b.tun[0]).1.ends_with(b"behind NAT"));
    let unleased = udp(pod(9), pod(2), (1, 2), 64, b"no lease");
    stranger.send_to(&unleased, b.addr).unwrap();
    let status = idle(&b, 0, 2);
    assert_eq!(status.total.decap.drops["unknown_peer"], 1);
    assert!(read(&b.tun[0]).is_none());
}

/// A TCP packet of 3000 bytes whose checksum is right, and at the same time what a kernel leaves in an unfinished
/// superpacket: the sum of the pseudo-header.
fn right_and_unfinished(sequence: u32) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(pod(1), pod(2), 64)
        .tcp(1, 2, sequence, 1000)
        .ack(1)
        .write(&mut packet, &[0; 3000])
        .unwrap();
    let sum = |bytes: &[u8]| {
        let words = bytes
            .chunks(2)
            .map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
        words.fold(0, |sum, word| (sum + word) % 0xffff)
    };
    let pseudo = (sum(&packet[12..20]) + 6 + 3020) % 0xffff;
    packet[36..38].copy_from_slice(&u16::try_from(pseudo).unwrap().to_be_bytes());
    let missing = 0xffff - (pseudo + sum(&packet[20..])) % 0xffff;
    packet[40..42].copy_from_slice(&u16::try_from(missing).unwrap().to_be_bytes());
    packet
}

#[test]
fn unfinished_superpackets_are_not_merged_whatever_their_checksums() {
    let (a, b) = memory::pair(1, true);
    let mut run = Vec::new();
    for sequence in [1, 3001] {
        run.extend([8, 0, 0, 0, 0, 0, 1, 0]);
        run.extend(Mac::local(2).bytes());
        run.extend(Mac::local(1).bytes());
        run.extend([8, 0]);
        run.extend(right_and_unfinished(sequence));
    }
    // As one run, so that both come in one burst.
    let socket = beside(a.addr);
    let datagram = i32::try_from(run.len() / 2).unwrap();
    set(socket.as_fd(), IntOption::UDP_SEGMENT, datagram).unwrap();
    socket.send_to(&run, b.addr).unwrap();
    let mut counters = None;
    wait_for("both", || {
        let status = b.datapath.status();
        let enough = status.total.decap.read >= 2;
        counters = Some(status);
        enough
    });
    let status = counters.unwrap();
    adds_up(&status);
    // Of 1472 bytes at most.
    assert_eq!(status.total.decap.sent, 6, "{:?}", status.total.decap);
    for _ in 0..2 {
        let (vnet, packet) = next(&b.tun[0]);
        assert_eq!((vnet[1], packet.len()), (1, 3040), "a TCP superpacket");
    }
}
