//! Packets of one flow never overtake each other, whatever the number of workers; offloads engage; flows spread
//! over source ports. Between pods, at saturation. Needs root.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot prepare itself must fail"
)]

mod net;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use loden::datapath::EngineKind;
use loden::datapath::status::{Counters, Worker};
use loden::lab::{Lab, Member, NetNs, Wire};
use loden::sys::socket::{IntOption, set};
use net::{Node, Shape, adds_up, ip, lab, pair, pin_to, recv, recv_from, tcp_transfer, udp_at};

const FLOWS: usize = 64;
/// Payload of one datagram: a flow's number, a packet's number, and filling.
const LEN: usize = 400;
/// Datagrams in one send of a flow that uses `UDP_SEGMENT`.
const RUN: u64 = 16;
/// Datagrams per flow.
const COUNT: u64 = 2000;

/// Two nodes with a pod each whose MTU is the overlay's.
fn pods(wire: Wire, shape: &Shape) -> (Lab, Node, Node) {
    let lab = lab(2, 1, wire);
    for n in [1, 2] {
        let pod = lab.netns(Member::Pod(n, 1));
        ip(&pod, &format!("link set eth0 mtu {}", shape.mtu));
    }
    let (a, b) = pair(&lab, shape);
    (lab, a, b)
}

fn pod(lab: &Lab, n: u8) -> (NetNs, IpAddr) {
    let addr = lab.pod_addr(n, 1).unwrap().into();
    (lab.netns(Member::Pod(n, 1)), addr)
}

fn datagram(flow: usize, number: u64) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    bytes[..8].copy_from_slice(&(flow as u64).to_le_bytes());
    bytes[8..16].copy_from_slice(&number.to_le_bytes());
    bytes
}

/// Sends [`COUNT`] numbered datagrams of every flow as fast as it can, then more until the sink has seen the
/// end of each flow. Every other flow sends runs.
fn generate(sockets: &[UdpSocket], to: SocketAddr, seen_all: &AtomicBool) {
    for socket in sockets.iter().step_by(2) {
        set(
            socket.as_fd(),
            IntOption::UDP_SEGMENT,
            i32::try_from(LEN).unwrap(),
        )
        .unwrap();
    }
    let mut next = 0;
    while next < COUNT || !seen_all.load(Ordering::Relaxed) {
        for (flow, socket) in sockets.iter().enumerate() {
            let numbers = next..next + RUN;
            if flow % 2 == 0 {
                let run: Vec<u8> = numbers.flat_map(|number| datagram(flow, number)).collect();
                socket.send_to(&run, to).unwrap();
            } else {
                for number in numbers {
                    socket.send_to(&datagram(flow, number), to).unwrap();
                }
            }
        }
        next += RUN;
    }
}

/// Sets a flag when it goes.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Receives until every flow has got past [`COUNT`]; each number must exceed the one before of its flow.
/// Returns how many arrived.
fn check(socket: &UdpSocket, seen_all: &AtomicBool) -> u64 {
    // Also when an assertion fails: the generator must end.
    let _ended = SetOnDrop(seen_all);
    let (mut last, mut arrived) = ([None; FLOWS], 0);
    let mut buf = [0; LEN + 1];
    while !last
        .iter()
        .all(|last| last.is_some_and(|number| number >= COUNT))
    {
        assert_eq!(recv(socket, &mut buf), LEN);
        let word = |at: usize| u64::from_le_bytes(buf[at..at + 8].try_into().unwrap());
        let (flow, number) = (usize::try_from(word(0)).unwrap(), word(8));
        assert!(
            last[flow].is_none_or(|last| last < number),
            "flow {flow}: {number} after {:?}",
            last[flow]
        );
        last[flow] = Some(number);
        arrived += 1;
    }
    arrived
}

fn keeps_order(workers: usize, shape: Shape) {
    let shape = Shape {
        workers,
        pin: true,
        ..shape
    };
    let (lab, a, b) = pods(Wire::Packet, &shape);
    std::thread::scope(|scope| {
        for (from, to) in [(1_u8, 2_u8), (2, 1)] {
            let ((here, addr), (there, sink_addr)) = (pod(&lab, from), pod(&lab, to));
            let sink = udp_at(&there, (sink_addr, 0).into());
            let at = sink.local_addr().unwrap();
            let sockets: Vec<UdpSocket> = (0..FLOWS)
                .map(|_| udp_at(&here, (addr, 0).into()))
                .collect();
            let seen_all = std::sync::Arc::new(AtomicBool::new(false));
            let seen = std::sync::Arc::clone(&seen_all);
            scope.spawn(move || {
                // A sender that moves between processors overtakes itself in the kernel's own queues.
                pin_to(usize::from(from));
                generate(&sockets, at, &seen);
            });
            scope.spawn(move || {
                let arrived = check(&sink, &seen_all);
                assert!(arrived >= FLOWS as u64);
            });
        }
    });
    for node in [&a, &b] {
        let status = node.status();
        adds_up(&status);
        assert!(status.total.encap.sent_superpackets > 0, "runs took part");
        assert!(
            status.total.encap.read_superpackets > 0,
            "superpackets took part"
        );
        assert_eq!(status.workers.len(), workers);
        if workers > 1 {
            let busy = status.workers.iter().filter(|w| w.encap.read > 0).count();
            assert!(busy > 1, "one worker had all the flows");
        }
    }
}

#[test]
fn no_packet_overtakes_another_of_its_flow_with_one_worker() {
    keeps_order(1, Shape::default());
}

#[test]
fn no_packet_overtakes_another_of_its_flow_with_two_workers() {
    keeps_order(2, Shape::default());
}

#[test]
fn no_packet_overtakes_another_of_its_flow_with_four_workers() {
    keeps_order(4, Shape::default());
}

#[test]
fn no_packet_overtakes_another_of_its_flow_in_vxlan() {
    keeps_order(2, Shape::vxlan(EngineKind::Mmsg, false));
}

#[test]
fn eight_tcp_streams_arrive_whole_through_four_workers() {
    let shape = Shape {
        workers: 4,
        ..Shape::default()
    };
    let (lab, a, b) = pods(Wire::Packet, &shape);
    std::thread::scope(|scope| {
        for stream in 0..8_u8 {
            let (from, to) = if stream % 2 == 0 { (1, 2) } else { (2, 1) };
            let ((here, _), (there, addr)) = (pod(&lab, from), pod(&lab, to));
            scope.spawn(move || tcp_transfer(&here, (&there, addr), 64));
        }
    });
    adds_up(&a.status());
    adds_up(&b.status());
}

/// Packets per system call of one direction, its idle looks included.
const fn per_call(side: &Counters) -> u64 {
    side.read / (side.read_calls + side.send_calls)
}

#[test]
fn offloads_engage_and_a_system_call_carries_many_packets() {
    offloads_engage(&Shape::default());
}

#[test]
fn offloads_engage_in_vxlan_too() {
    offloads_engage(&Shape::vxlan(EngineKind::Mmsg, false));
}

fn offloads_engage(shape: &Shape) {
    let (lab, a, b) = pods(Wire::Packet, shape);
    let ((here, _), (there, addr)) = (pod(&lab, 1), pod(&lab, 2));
    tcp_transfer(&here, (&there, addr), 1024);
    let (sender, receiver): (Worker, Worker) = (a.status().total, b.status().total);
    let (encap, decap) = (&sender.encap, &receiver.decap);
    assert!(encap.read_superpackets > 0, "TSO: {encap:?}");
    assert!(encap.sent_superpackets > 0, "UDP_SEGMENT: {encap:?}");
    assert!(decap.read_superpackets > 0, "UDP_GRO: {decap:?}");
    assert!(decap.sent_superpackets > 0, "coalescing: {decap:?}");
    // A superpacket of forty segments costs a read, a look whether there is another, and one or two sends, however
    // fast the machine. One packet at a time would be two calls for each.
    assert!(
        per_call(encap) >= 4 && per_call(decap) >= 4,
        "{encap:?} {decap:?}"
    );
    for name in ["tun-tso", "tun-uso", "udp-gso", "udp-gro"] {
        let capabilities = a.status().capabilities;
        let used = capabilities.iter().any(|c| c.name == name && c.used);
        assert!(used, "{name}: {capabilities:?}");
    }
}

#[test]
fn a_flow_keeps_one_source_port_and_flows_use_many() {
    spreads(&Shape::default(), 0);
}

#[test]
fn flows_in_vxlan_use_many_source_ports_too() {
    spreads(&Shape::vxlan(EngineKind::Mmsg, false), 22);
}

/// `header_len`: what stands in front of the inner packet.
fn spreads(shape: &Shape, header_len: usize) {
    let lab = lab(2, 1, Wire::Packet);
    let shape = Shape {
        workers: 2,
        ..shape.clone()
    };
    let a = Node::start(&lab, 1, &shape, &[1, 2]);
    let (here, addr) = pod(&lab, 1);
    // A plain socket in the place of node 2 sees the outer ports and the inner packets.
    let witness = udp_at(&lab.netns(Member::Node(2)), shape.underlay(2));
    let to: SocketAddr = "198.18.2.2:9".parse().unwrap();
    let sockets: Vec<UdpSocket> = (0..FLOWS)
        .map(|_| udp_at(&here, (addr, 0).into()))
        .collect();
    let mut ports: BTreeMap<u16, BTreeSet<u16>> = BTreeMap::new();
    for _ in 0..20 {
        for socket in &sockets {
            socket.send_to(b"who", to).unwrap();
            let mut buf = [0; 100];
            let (len, outer) = recv_from(&witness, &mut buf);
            let sliced = etherparse::SlicedPacket::from_ip(&buf[header_len..len]).unwrap();
            let Some(etherparse::TransportSlice::Udp(udp)) = sliced.transport else {
                panic!("{sliced:?}")
            };
            ports
                .entry(udp.source_port())
                .or_default()
                .insert(outer.port());
        }
    }
    assert_eq!(ports.len(), FLOWS);
    assert!(ports.values().all(|outer| outer.len() == 1), "{ports:?}");
    let used: BTreeSet<u16> = ports.into_values().flatten().collect();
    assert!(used.len() >= 4, "{used:?}");
    adds_up(&a.status());
}
