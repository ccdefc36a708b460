use etherparse::{EtherType, Ethernet2Header, IpHeaders, PacketBuilder, UdpHeader};
use pcap_file::pcapng::{Block, PcapNgReader};

use super::*;
use crate::datapath::tap::Transport;

const VNI: u32 = 0x0012_3456;

fn packet() -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4([198, 18, 1, 2], [198, 18, 2, 2], 63)
        .udp(5, 6)
        .write(&mut packet, b"inner")
        .unwrap();
    packet
}

fn record(direction: Direction, outer: &str) -> Record {
    Record {
        time_ns: 1,
        direction,
        verdict: Verdict::Sent,
        outer: Some(outer.parse().unwrap()),
        local_port: 40_000,
        tos: 0,
        worker: 0,
        transport: Transport::Udp,
        inner_at: 0,
        packets: 1,
        len: u32::try_from(packet().len()).unwrap(),
    }
}

/// The one packet of a file with the datagrams that carry packets.
fn written(record: &Record, origin: &Origin) -> Vec<u8> {
    let mut file = File::begin(Vec::new(), origin, true).unwrap();
    file.packet(record, &packet()).unwrap();
    let bytes = file.end(Lost::default()).unwrap();
    let mut reader = PcapNgReader::new(bytes.as_slice()).unwrap();
    while let Some(block) = reader.next_block() {
        if let Block::EnhancedPacket(packet) = block.unwrap() {
            return packet.data.into_owned();
        }
    }
    unreachable!("no packet in the file")
}

#[test]
fn vxlan_datagrams_are_whole_and_of_the_family_that_the_peer_has() {
    let (own, peer) = (Mac::local(1), Mac::local(2));
    let vxlan = Encapsulation::Vxlan {
        vni: Vni::new(VNI).unwrap(),
        mac: own,
    };
    let bind = |text: &str| text.parse().unwrap();
    let peers = ["192.0.2.2:8472", "[2001:db8::2]:8472"];
    let origin = Origin {
        ends: vec![
            End::of("flannel0", bind("192.0.2.1:8472"), vxlan),
            End::of("flannel1", bind("[2001:db8::1]:8472"), vxlan),
        ],
        macs: peers
            .iter()
            .map(|addr| (addr.parse::<SocketAddr>().unwrap().ip(), peer))
            .collect(),
        filter: String::new(),
        watched: Vec::new(),
    };
    for outer in peers {
        for (direction, to, from) in [(Direction::Encap, peer, own), (Direction::Decap, own, peer)]
        {
            let bytes = written(&record(direction, outer), &origin);
            let (_, rest) = IpHeaders::from_slice(&bytes).unwrap();
            let (udp, rest) = UdpHeader::from_slice(rest.payload).unwrap();
            assert_eq!(
                usize::from(udp.length),
                8 + rest.len(),
                "{outer} {direction:?}"
            );
            let port = match direction {
                Direction::Encap => udp.destination_port,
                Direction::Decap => udp.source_port,
            };
            assert_eq!(port, 8472);
            assert_eq!(rest[..8], [8, 0, 0, 0, 0x12, 0x34, 0x56, 0]);
            let (ethernet, inner) = Ethernet2Header::from_slice(&rest[8..]).unwrap();
            assert_eq!(
                (ethernet.destination, ethernet.source),
                (to.bytes(), from.bytes())
            );
            assert_eq!(ethernet.ether_type, EtherType::IPV4);
            assert_eq!(inner, packet());
        }
    }
    // Who is not known has no address.
    let stranger = written(&record(Direction::Decap, "192.0.2.9:8472"), &origin);
    assert_eq!(stranger[20 + 8 + 8 + 6..][..6], [0; 6]);
}

#[test]
fn plain_datagrams_hold_the_packet_alone() {
    let origin = Origin {
        ends: vec![End::of(
            "flannel0",
            "192.0.2.1:8285".parse().unwrap(),
            Encapsulation::Plain,
        )],
        ..Origin::default()
    };
    let bytes = written(&record(Direction::Encap, "192.0.2.2:8285"), &origin);
    assert_eq!(bytes[28..], packet());
}

#[test]
fn interfaces_of_packet_sockets_come_after_those_of_workers_if_there_are_any() {
    let place = Place {
        device: "eth0".to_owned(),
        index: 7,
        kind: Kind::Past {
            networks: Vec::new(),
        },
    };
    let bind = "192.0.2.1:8285".parse().unwrap();
    let end = End::of("flannel0", bind, Encapsulation::Plain);
    for (ends, names) in [
        (vec![], &["encap eth0", "decap eth0"][..]),
        (vec![end], &["encap", "decap", "encap eth0", "decap eth0"]),
    ] {
        let origin = Origin {
            ends,
            watched: vec![place.clone()],
            ..Origin::default()
        };
        let mut file = File::begin(Vec::new(), &origin, true).unwrap();
        let routed = Record {
            transport: Transport::Route,
            verdict: Verdict::Arrived,
            ..record(Direction::Decap, "192.0.2.2:0")
        };
        let unknown = Record {
            worker: 9,
            ..routed
        };
        for record in [routed, unknown] {
            file.packet(&record, &packet()).unwrap();
        }
        let bytes = file.end(Lost::default()).unwrap();
        let mut reader = PcapNgReader::new(bytes.as_slice()).unwrap();
        let mut packets = Vec::new();
        while let Some(block) = reader.next_block() {
            if let Block::EnhancedPacket(block) = block.unwrap() {
                packets.push((block.interface_id, block.data.into_owned()));
            }
        }
        let found: Vec<String> = reader
            .interfaces()
            .iter()
            .flat_map(|interface| &interface.options)
            .filter_map(|option| {
                if let InterfaceDescriptionOption::IfName(name) = option {
                    return Some(name.to_string());
                }
                None
            })
            .collect();
        assert_eq!(found, names);
        // What went past the tunnel has no outer headers.
        let last = u32::try_from(names.len() - 1).unwrap();
        assert_eq!(packets, [(last, packet()), (1, packet())]);
    }
}
