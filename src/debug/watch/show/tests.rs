use std::sync::Arc;

use etherparse::PacketBuilder;
use proptest::prelude::*;

use super::*;
use crate::datapath::tap::{Capture, MAX_SNAP_LEN, Record, Taps, Transport};
use crate::debug::watch::scene::Peers;

const VXLAN: Tunnel = Tunnel::Vxlan { port: 8472, vni: 1 };
const TIME: u64 = 1_700_000_000_123_456_789;

fn place(kind: Kind) -> Place {
    Place {
        device: "link".to_owned(),
        index: 1,
        kind,
    }
}

fn past() -> Kind {
    Kind::Past {
        networks: vec!["198.18.0.0/16".parse().unwrap()],
    }
}

/// What a capture of everything is shown of one frame: behind an empty vnet header, a link's header of `network_at` bytes
/// and the packet.
fn shown(kind: Kind, way: Way, network_at: usize, packet: &[u8]) -> Vec<(Record, Vec<u8>)> {
    let mut bytes = vec![0; VNET_HDR_LEN + network_at];
    bytes.extend_from_slice(packet);
    let frame = Frame {
        time_ns: TIME,
        way,
        len: network_at + packet.len(),
        network_at,
    };
    show(&place(kind), &frame, &mut bytes, false)
}

fn show(place: &Place, frame: &Frame, bytes: &mut [u8], segments: bool) -> Vec<(Record, Vec<u8>)> {
    let taps = Arc::new(Taps::beside(vec![place.transport()], Arc::default()));
    let wanted = Wanted {
        filter: "".parse().unwrap(),
        snap_len: MAX_SNAP_LEN,
        segments,
    };
    let mut capture = taps.capture(wanted).unwrap();
    let tap = Tap::new(&taps, 0);
    tap.begin_at(0);
    let peers = [("198.18.2.0/24", "192.0.2.2")];
    let parse = |(net, public): (&str, &str)| (net.parse().unwrap(), public.parse().unwrap());
    let scene = Scene {
        places: vec![place.clone()],
        peers: Arc::new(Peers::new(peers.into_iter().map(parse))),
    };
    Shower::new(scene, segments).show(&tap, place, frame, bytes);
    drain(&mut capture)
}

fn drain(capture: &mut Capture) -> Vec<(Record, Vec<u8>)> {
    let mut bytes = Vec::new();
    capture.take(&mut bytes, 1 << 20);
    let (mut all, mut rest) = (Vec::new(), bytes.as_slice());
    while !rest.is_empty() {
        let (record, copied, after) = Record::decode(rest).unwrap();
        all.push((record, copied.to_vec()));
        rest = after;
    }
    all
}

fn packet(from: [u8; 4], to: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(from, to, 63)
        .udp(5, 6)
        .write(&mut packet, payload)
        .unwrap();
    packet
}

const OURS: [u8; 4] = [198, 18, 1, 2];
const THEIRS: [u8; 4] = [198, 18, 2, 2];

#[test]
fn direction_and_peer_follow_from_where_a_packet_goes() {
    for kind in [Kind::Inner(VXLAN), Kind::Inner(Tunnel::Ipip), past()] {
        let transport = place(kind.clone()).transport();
        let addr = match transport {
            Transport::KernelVxlan => "192.0.2.2:8472",
            Transport::Udp | Transport::Vxlan | Transport::Ipip | Transport::Route => "192.0.2.2:0",
        };
        for (way, from, to, direction, verdict) in [
            (Way::Leaves, OURS, THEIRS, Direction::Encap, Verdict::Handed),
            (
                Way::Arrives,
                THEIRS,
                OURS,
                Direction::Decap,
                Verdict::Arrived,
            ),
        ] {
            let packet = packet(from, to, b"payload");
            let records = shown(kind.clone(), way, 14, &packet);
            let [(record, bytes)] = records.as_slice() else {
                unreachable!("{kind:?} {way:?}: {records:?}")
            };
            assert_eq!(
                (record.direction, record.verdict, record.transport),
                (direction, verdict, transport)
            );
            assert_eq!(record.outer, Some(addr.parse().unwrap()));
            assert_eq!((record.time_ns, record.packets), (TIME, 1));
            assert_eq!((record.len as usize, bytes), (packet.len(), &packet));
        }
    }
    // Nobody's pod has nobody's address.
    let stranger = shown(
        past(),
        Way::Leaves,
        14,
        &packet(OURS, [203, 0, 113, 1], b""),
    );
    assert_eq!(stranger[0].0.outer, None);
}

#[test]
fn strays_are_dropped_by_the_kernel_and_loops_are_no_packets_of_the_link() {
    let packet = packet(THEIRS, OURS, b"payload");
    let stray = shown(Kind::Inner(VXLAN), Way::Strays, 14, &packet);
    assert_eq!(stray[0].0.verdict, Verdict::Dropped(DropReason::WrongMac));
    assert!(shown(past(), Way::Strays, 14, &packet).is_empty());
    assert!(shown(Kind::Inner(VXLAN), Way::Loops, 14, &packet).is_empty());
}

#[test]
fn padding_of_a_short_frame_is_no_part_of_its_packet() {
    let packet = packet(THEIRS, OURS, b"x");
    let padded = [&packet[..], &[0; 17]].concat();
    let records = shown(past(), Way::Arrives, 14, &padded);
    assert_eq!(records[0].0.len as usize, packet.len());
    assert_eq!(records[0].1, packet);
}

#[test]
fn packets_around_others_are_shown_whole_if_they_are_of_the_tunnel() {
    let inner = packet(OURS, THEIRS, b"payload");
    let around = |to: [u8; 4]| {
        let mut outer = Vec::new();
        PacketBuilder::ipv4([192, 0, 2, 1], to, 64)
            .write(&mut outer, etherparse::IpNumber::IPV4, &inner)
            .unwrap();
        outer
    };
    let outer = around([192, 0, 2, 2]);
    let records = shown(Kind::Outer(Tunnel::Ipip), Way::Leaves, 14, &outer);
    let (record, bytes) = &records[0];
    assert_eq!((record.inner_at, record.len as usize), (20, inner.len()));
    assert_eq!(record.outer, Some("192.0.2.2:0".parse().unwrap()));
    assert_eq!(*bytes, outer);
    let others = around([192, 0, 2, 99]);
    assert!(shown(Kind::Outer(Tunnel::Ipip), Way::Leaves, 14, &others).is_empty());

    let datagram = |flags: u8, vni: u8| {
        let mut frame = vec![flags, 0, 0, 0, 0, 0, vni, 0];
        frame.extend([0x02, 0, 0, 0, 0, 2, 0x02, 0, 0, 0, 0, 1, 8, 0]);
        frame.extend_from_slice(&inner);
        let mut outer = Vec::new();
        PacketBuilder::ipv4([192, 0, 2, 2], [192, 0, 2, 1], 64)
            .udp(40_000, 8472)
            .write(&mut outer, &frame)
            .unwrap();
        outer
    };
    let outer = datagram(8, 1);
    let records = shown(Kind::Outer(VXLAN), Way::Arrives, 14, &outer);
    let (record, bytes) = &records[0];
    assert_eq!((record.inner_at, record.len as usize), (50, inner.len()));
    assert_eq!(record.outer, Some("192.0.2.2:40000".parse().unwrap()));
    assert_eq!((record.local_port, bytes), (8472, &outer));
    for other in [datagram(8, 2), datagram(0, 1)] {
        assert!(shown(Kind::Outer(VXLAN), Way::Arrives, 14, &other).is_empty());
    }
}

#[test]
fn superpacket_is_one_with_many_packets_or_each_of_them() {
    let payload: Vec<u8> = (0..2500_u32).map(|i| i.to_le_bytes()[0]).collect();
    let mut packet = Vec::new();
    PacketBuilder::ipv4(OURS, THEIRS, 63)
        .tcp(5, 6, 1000, 100)
        .ack(1)
        .write(&mut packet, &payload)
        .unwrap();
    // TCP over IPv4, unfinished: segments of 1000 bytes, checksum at 34 + 16 from the link's header on.
    let mut vnet = vec![1, 1];
    for field in [54_u16, 1000, 34, 16] {
        vnet.extend(field.to_ne_bytes());
    }
    let bytes = [&vnet[..], &[0; 14], &packet].concat();
    let frame = Frame {
        time_ns: TIME,
        way: Way::Leaves,
        len: 14 + packet.len(),
        network_at: 14,
    };
    let inner = place(Kind::Inner(VXLAN));
    let whole = show(&inner, &frame, &mut bytes.clone(), false);
    assert_eq!(whole.len(), 1);
    assert_eq!((whole[0].0.packets, &whole[0].1), (3, &packet));
    // Cut off behind its headers it still has as many.
    let cut = show(&inner, &frame, &mut bytes[..10 + 14 + 60].to_vec(), false);
    assert_eq!(
        (cut[0].0.packets, cut[0].0.len as usize, cut[0].1.len()),
        (3, packet.len(), 60)
    );
    let mut bytes = bytes;
    let segments = show(&inner, &frame, &mut bytes, true);
    let lens: Vec<u32> = segments.iter().map(|(record, _)| record.len).collect();
    assert_eq!(lens, [1040, 1040, 540]);
    let mut joined = Vec::new();
    for (record, segment) in &segments {
        assert_eq!(record.packets, 1);
        let (ip, tcp) = etherparse::Ipv4Header::from_slice(segment).unwrap();
        let (header, data) = etherparse::TcpHeader::from_slice(tcp).unwrap();
        assert_eq!(header.sequence_number as usize, 1000 + joined.len());
        assert_eq!(
            header.checksum,
            header.calc_checksum_ipv4(&ip, data).unwrap()
        );
        joined.extend_from_slice(data);
    }
    assert_eq!(joined, payload);
}

proptest! {
    #[test]
    fn no_frame_makes_a_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        len in 0_usize..70_000,
        network_at in 0_usize..100,
        which in 0_usize..5,
        leaves in any::<bool>(),
        segments in any::<bool>(),
        version in 0_u8..2,
    ) {
        let kinds = [
            Kind::Inner(VXLAN),
            Kind::Inner(Tunnel::Ipip),
            Kind::Outer(VXLAN),
            Kind::Outer(Tunnel::Ipip),
            past(),
        ];
        let frame = Frame {
            time_ns: TIME,
            way: if leaves { Way::Leaves } else { Way::Arrives },
            len,
            network_at,
        };
        let mut bytes = bytes;
        // Most of them get past the first look.
        if let Some(first) = bytes.get_mut(VNET_HDR_LEN + network_at) {
            *first = [0x45, 0x60][usize::from(version)];
        }
        for (record, copied) in show(&place(kinds[which].clone()), &frame, &mut bytes, segments) {
            prop_assert!(copied.len() <= usize::from(record.inner_at) + record.len as usize);
        }
    }
}
