use etherparse::{Icmpv4Slice, Icmpv6Slice, IpNumber, IpSlice, PacketBuilder, icmpv4, icmpv6};

use super::*;
use crate::wire::checksum::sum_scalar;
use crate::wire::ip;

const V4_FROM: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 18, 0, 254));
const V6_FROM: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 0xfe));
const V4_SRC: [u8; 4] = [198, 18, 0, 1];
const V4_DST: [u8; 4] = [198, 19, 0, 2];
const V6_SRC: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 1);
const V6_DST: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 2, 0, 0, 0, 2);

fn mtu(bytes: u32) -> Mtu {
    Mtu::new(bytes).unwrap()
}

fn all_errors() -> [IcmpError; 3] {
    [
        IcmpError::TimeExceeded,
        IcmpError::NetUnreachable,
        IcmpError::PacketTooBig { mtu: mtu(1372) },
    ]
}

fn v4_udp(src: [u8; 4], dst: [u8; 4], payload: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = PacketBuilder::ipv4(src, dst, 1).udp(1000, 2000);
    builder.write(&mut packet, &vec![0x5a; payload]).unwrap();
    packet
}

fn v6_udp(src: Ipv6Addr, dst: Ipv6Addr, payload: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = PacketBuilder::ipv6(src.octets(), dst.octets(), 1).udp(1000, 2000);
    builder.write(&mut packet, &vec![0x5a; payload]).unwrap();
    packet
}

fn answer_from(from: IpAddr, error: IcmpError, packet: &[u8]) -> Result<Vec<u8>, NoAnswer> {
    // Not zeros: an unwritten byte must show.
    let mut out = [0xa5; MAX_LEN];
    let meta = ip::parse(packet).unwrap();
    let len = build(error, &meta, packet, from, sum_scalar, &mut out)?;
    Ok(out[..len].to_vec())
}

fn answer(error: IcmpError, packet: &[u8]) -> Result<Vec<u8>, NoAnswer> {
    let from = if packet[0] >> 4 == 4 {
        V4_FROM
    } else {
        V6_FROM
    };
    answer_from(from, error, packet)
}

#[test]
fn an_ipv4_answer_reads_as_etherparse_expects_it() {
    use icmpv4::DestUnreachableHeader::{FragmentationNeeded, Network};
    let expected = [
        etherparse::Icmpv4Type::TimeExceeded(icmpv4::TimeExceededCode::TtlExceededInTransit),
        etherparse::Icmpv4Type::DestinationUnreachable(Network),
        etherparse::Icmpv4Type::DestinationUnreachable(FragmentationNeeded { next_hop_mtu: 1372 }),
    ];
    let mut offender = v4_udp(V4_SRC, V4_DST, 30);
    offender[1] = 0b1010_1011;
    for (error, icmp_type) in all_errors().into_iter().zip(expected) {
        let packet = answer(error, &offender).unwrap();
        let IpSlice::Ipv4(slice) = IpSlice::from_slice(&packet).unwrap() else {
            panic!("IPv4")
        };
        let header = slice.header().to_header();
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        assert_eq!(usize::from(header.total_len), packet.len());
        assert_eq!((header.time_to_live, header.protocol), (64, IpNumber::ICMP));
        assert_eq!(
            (header.source, header.destination),
            ([198, 18, 0, 254], V4_SRC)
        );
        // Precedence 6, the offender's TOS bits, no ECN.
        assert_eq!(packet[1], 0b1100_1000);
        assert!(header.dont_fragment && header.identification == 0);

        let icmp = Icmpv4Slice::from_slice(slice.payload().payload).unwrap();
        assert_eq!(icmp.icmp_type(), icmp_type);
        assert_eq!(
            icmp.checksum(),
            icmp.icmp_type().calc_checksum(icmp.payload())
        );
        assert_eq!(icmp.payload(), offender);
    }
}

#[test]
fn an_ipv6_answer_reads_as_etherparse_expects_it() {
    let expected = [
        etherparse::Icmpv6Type::TimeExceeded(icmpv6::TimeExceededCode::HopLimitExceeded),
        etherparse::Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::NoRoute),
        etherparse::Icmpv6Type::PacketTooBig { mtu: 1372 },
    ];
    let offender = v6_udp(V6_SRC, V6_DST, 30);
    for (error, icmp_type) in all_errors().into_iter().zip(expected) {
        let packet = answer(error, &offender).unwrap();
        let IpSlice::Ipv6(slice) = IpSlice::from_slice(&packet).unwrap() else {
            panic!("IPv6")
        };
        let header = slice.header().to_header();
        assert_eq!(usize::from(header.payload_length) + 40, packet.len());
        assert_eq!(
            (header.hop_limit, header.next_header),
            (64, IpNumber::IPV6_ICMP)
        );
        assert_eq!((header.traffic_class, header.flow_label.value()), (0xc0, 0));
        assert_eq!(IpAddr::from(header.source_addr()), V6_FROM);
        assert_eq!(header.destination_addr(), V6_SRC);

        let icmp = Icmpv6Slice::from_slice(slice.payload().payload).unwrap();
        assert_eq!(icmp.icmp_type(), icmp_type);
        assert!(icmp.is_checksum_valid(header.source, header.destination));
        assert_eq!(icmp.payload(), offender);
    }
}

#[test]
fn the_quote_is_as_long_as_the_family_allows() {
    let offender = v4_udp(V4_SRC, V4_DST, 1400);
    let packet = answer(IcmpError::TimeExceeded, &offender).unwrap();
    assert_eq!(packet.len(), 576);
    assert_eq!(packet[28..], offender[..548]);

    let offender = v6_udp(V6_SRC, V6_DST, 1400);
    let packet = answer(IcmpError::TimeExceeded, &offender).unwrap();
    assert_eq!(packet.len(), 1280);
    assert_eq!(packet[48..], offender[..1232]);
}

#[test]
fn padding_behind_the_packet_is_not_quoted() {
    let offender = v4_udp(V4_SRC, V4_DST, 8);
    let padded = [&offender[..], &[0xee; 10]].concat();
    assert_eq!(
        answer(IcmpError::TimeExceeded, &padded),
        answer(IcmpError::TimeExceeded, &offender)
    );
}

#[test]
fn an_icmp_error_is_not_answered_and_a_query_is() {
    let v4 = |icmp_type| {
        let mut packet = Vec::new();
        let builder = PacketBuilder::ipv4(V4_SRC, V4_DST, 1).icmpv4(icmp_type);
        builder.write(&mut packet, &[0; 28]).unwrap();
        packet
    };
    let v6 = |icmp_type| {
        let mut packet = Vec::new();
        let builder = PacketBuilder::ipv6(V6_SRC.octets(), V6_DST.octets(), 1).icmpv6(icmp_type);
        builder.write(&mut packet, &[0; 48]).unwrap();
        packet
    };
    let echo = etherparse::IcmpEchoHeader { id: 1, seq: 2 };
    for error in all_errors() {
        let queries = [
            v4(etherparse::Icmpv4Type::EchoRequest(echo)),
            v4(etherparse::Icmpv4Type::EchoReply(echo)),
            v6(etherparse::Icmpv6Type::EchoRequest(echo)),
            v6(etherparse::Icmpv6Type::EchoReply(echo)),
        ];
        for query in queries {
            assert!(answer(error, &query).is_ok());
        }
        let ttl = icmpv4::TimeExceededCode::TtlExceededInTransit;
        let host = icmpv4::DestUnreachableHeader::Host;
        let errors = [
            v4(etherparse::Icmpv4Type::TimeExceeded(ttl)),
            v4(etherparse::Icmpv4Type::DestinationUnreachable(host)),
            v6(etherparse::Icmpv6Type::PacketTooBig { mtu: 1280 }),
        ];
        for offender in errors {
            assert_eq!(answer(error, &offender), Err(NoAnswer::AboutIcmpError));
        }
    }
    // Without a type byte it cannot be seen to be no error.
    let mut bare = v4(etherparse::Icmpv4Type::EchoRequest(echo));
    bare[3] = 20;
    assert_eq!(
        answer(IcmpError::TimeExceeded, &bare),
        Err(NoAnswer::AboutIcmpError)
    );
}

#[test]
fn our_own_answers_are_not_answered() {
    for offender in [v4_udp(V4_SRC, V4_DST, 8), v6_udp(V6_SRC, V6_DST, 8)] {
        for error in all_errors() {
            let packet = answer(error, &offender).unwrap();
            assert_eq!(answer(error, &packet), Err(NoAnswer::AboutIcmpError));
        }
    }
}

#[test]
fn only_the_first_fragment_is_answered() {
    let mut offender = v4_udp(V4_SRC, V4_DST, 64);
    offender[6] = 0x20;
    assert!(answer(IcmpError::TimeExceeded, &offender).is_ok());
    offender[7] = 1;
    assert_eq!(
        answer(IcmpError::TimeExceeded, &offender),
        Err(NoAnswer::NonFirstFragment)
    );
}

#[test]
fn groups_are_not_answered_except_for_ipv6_path_mtu_discovery() {
    let group = v4_udp(V4_SRC, [224, 0, 0, 251], 8);
    let broadcast = v4_udp(V4_SRC, [255; 4], 8);
    let group_v6 = v6_udp(V6_SRC, Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1), 8);
    for error in all_errors() {
        assert_eq!(answer(error, &group), Err(NoAnswer::MulticastDestination));
        assert_eq!(
            answer(error, &broadcast),
            Err(NoAnswer::BroadcastDestination)
        );
        match error {
            IcmpError::PacketTooBig { .. } => assert!(answer(error, &group_v6).is_ok()),
            IcmpError::TimeExceeded | IcmpError::NetUnreachable => {
                assert_eq!(
                    answer(error, &group_v6),
                    Err(NoAnswer::MulticastDestination)
                );
            }
        }
    }
}

#[test]
fn a_source_that_is_not_one_host_is_not_answered() {
    let v4_cases = [
        ([0, 0, 0, 0], NoAnswer::UnspecifiedSource),
        ([0, 1, 2, 3], NoAnswer::UnspecifiedSource),
        ([127, 0, 0, 1], NoAnswer::LoopbackSource),
        ([224, 0, 0, 1], NoAnswer::MulticastSource),
        ([239, 255, 255, 255], NoAnswer::MulticastSource),
        ([240, 0, 0, 1], NoAnswer::ReservedSource),
        ([255, 255, 255, 255], NoAnswer::BroadcastSource),
    ];
    for (src, reason) in v4_cases {
        assert_eq!(
            answer(IcmpError::TimeExceeded, &v4_udp(src, V4_DST, 8)),
            Err(reason)
        );
    }
    let v6_cases = [
        (Ipv6Addr::UNSPECIFIED, NoAnswer::UnspecifiedSource),
        (Ipv6Addr::LOCALHOST, NoAnswer::LoopbackSource),
        (
            Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1),
            NoAnswer::MulticastSource,
        ),
    ];
    for (src, reason) in v6_cases {
        assert_eq!(
            answer(IcmpError::TimeExceeded, &v6_udp(src, V6_DST, 8)),
            Err(reason)
        );
    }
}

#[test]
fn an_address_of_the_other_family_and_a_short_buffer_are_named() {
    let offender = v4_udp(V4_SRC, V4_DST, 8);
    let error = IcmpError::TimeExceeded;
    assert_eq!(
        answer_from(V6_FROM, error, &offender),
        Err(NoAnswer::NoSourceAddress)
    );
    let meta = ip::parse(&offender).unwrap();
    let mut short = [0; 20 + 8 + 35];
    let built = build(error, &meta, &offender, V4_FROM, sum_scalar, &mut short);
    assert_eq!(built, Err(NoAnswer::BufferTooSmall));
}
