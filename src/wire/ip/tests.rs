use std::net::{Ipv4Addr, Ipv6Addr};

use etherparse::{
    IpDscp, IpEcn, IpFragOffset, IpNumber, IpSlice, Ipv4Header, Ipv6Extensions, Ipv6FlowLabel,
    Ipv6FragmentHeader, Ipv6Header, Ipv6RawExtHeader,
};
use proptest::prelude::*;

use super::*;

const PAYLOAD: [u8; 24] = [0x5a; 24];

fn v4_header(options: &[u8]) -> Ipv4Header {
    let mut header =
        Ipv4Header::new(24, 64, IpNumber::UDP, [198, 18, 0, 1], [198, 19, 0, 2]).unwrap();
    header.options = options.try_into().unwrap();
    header.total_len += u16::try_from(options.len()).unwrap();
    header.header_checksum = header.calc_header_checksum();
    header
}

fn v4(header: &Ipv4Header) -> Vec<u8> {
    [&header.to_bytes()[..], &PAYLOAD].concat()
}

fn v6_header(next_header: IpNumber, payload_len: usize) -> Ipv6Header {
    Ipv6Header {
        traffic_class: 0xb9,
        flow_label: Ipv6FlowLabel::try_new(0xa_bcde).unwrap(),
        payload_length: u16::try_from(payload_len).unwrap(),
        next_header,
        hop_limit: 64,
        source: [0xfd; 16],
        destination: Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 2).octets(),
    }
}

/// An IPv6 packet with every extension header etherparse can write, in the order of RFC 8200.
fn v6_chain(fragment: Ipv6FragmentHeader) -> Vec<u8> {
    let raw = |len| Ipv6RawExtHeader::new_raw(IpNumber(0), &vec![0; len]).unwrap();
    let mut extensions = Ipv6Extensions {
        hop_by_hop_options: Some(raw(6)),
        destination_options: Some(raw(14)),
        routing: Some(etherparse::Ipv6RoutingExtensions {
            routing: raw(22),
            final_destination_options: None,
        }),
        fragment: Some(fragment),
        auth: Some(etherparse::IpAuthHeader::new(IpNumber(0), 1, 2, &[0; 12]).unwrap()),
    };
    let next_header = extensions.set_next_headers(IpNumber::UDP);
    let len = extensions.header_len() + PAYLOAD.len();
    let mut packet = v6_header(next_header, len).to_bytes().to_vec();
    extensions.write(&mut packet, next_header).unwrap();
    packet.extend(PAYLOAD);
    packet
}

fn fragment_header(off: u16, more: bool) -> Ipv6FragmentHeader {
    let off = IpFragOffset::try_new(off / 8).unwrap();
    Ipv6FragmentHeader::new(IpNumber(0), off, more, 0xdead_beef)
}

/// A whole packet of either family with a right checksum.
fn whole_packets() -> [Vec<u8>; 3] {
    [
        v4(&v4_header(&[])),
        v4(&v4_header(&[1, 1, 1, 0])),
        [&v6_header(IpNumber::UDP, 24).to_bytes()[..], &PAYLOAD].concat(),
    ]
}

#[test]
fn an_ipv4_packet_is_read_in_full() {
    let mut header = v4_header(&[7, 7, 4, 0, 0, 0, 0, 0]);
    header.dscp = IpDscp::try_new(0x2e).unwrap();
    header.ecn = IpEcn::ONE;
    header.identification = 0xbeef;
    (header.dont_fragment, header.more_fragments) = (false, true);
    header.fragment_offset = IpFragOffset::try_new(185).unwrap();
    let meta = parse(&v4(&header)).unwrap();

    assert_eq!(meta.version(), Version::V4);
    assert_eq!(meta.src(), IpAddr::V4(Ipv4Addr::new(198, 18, 0, 1)));
    assert_eq!(meta.dst(), IpAddr::V4(Ipv4Addr::new(198, 19, 0, 2)));
    assert_eq!((meta.header_len(), meta.total_len()), (28, 52));
    assert_eq!(
        (meta.protocol(), meta.ttl(), meta.tos()),
        (protocol::UDP, 64, 0xb9)
    );
    assert_eq!(meta.ecn(), Ecn::Ect1);
    assert_eq!((meta.id(), meta.fragment_off()), (0xbeef, 1480));
    assert!(meta.more_fragments() && meta.is_fragment() && !meta.dont_fragment());
    header.dont_fragment = true;
    assert!(parse(&v4(&header)).unwrap().dont_fragment());
}

#[test]
fn an_ipv6_packet_is_read_in_full() {
    let packet = [&v6_header(IpNumber::TCP, 24).to_bytes()[..], &PAYLOAD].concat();
    let meta = parse(&packet).unwrap();

    assert_eq!(meta.version(), Version::V6);
    assert_eq!(meta.src(), IpAddr::V6(Ipv6Addr::from([0xfd; 16])));
    assert_eq!(
        meta.dst(),
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 2))
    );
    assert_eq!((meta.header_len(), meta.total_len()), (40, 64));
    assert_eq!(
        (meta.protocol(), meta.ttl(), meta.tos()),
        (protocol::TCP, 64, 0xb9)
    );
    assert!(meta.dont_fragment() && !meta.is_fragment());
    assert_eq!(meta.transport(&packet), PAYLOAD);
}

#[test]
fn a_full_extension_chain_leads_to_the_transport_header() {
    let packet = v6_chain(fragment_header(0, true));
    let meta = parse(&packet).unwrap();
    assert_eq!(meta.protocol(), protocol::UDP);
    assert_eq!(meta.transport(&packet), PAYLOAD);
    assert!(meta.is_fragment() && meta.more_fragments());
    assert_eq!(meta.id(), 0xdead_beef);
}

#[test]
fn a_later_ipv6_fragment_ends_the_walk() {
    let packet = v6_chain(fragment_header(1448, false));
    let meta = parse(&packet).unwrap();
    assert_eq!(meta.protocol(), protocol::AUTHENTICATION);
    assert_eq!((meta.fragment_off(), meta.more_fragments()), (1448, false));
    assert!(meta.is_fragment());
}

#[test]
fn an_atomic_ipv6_fragment_is_a_whole_datagram() {
    assert!(
        !parse(&v6_chain(fragment_header(0, false)))
            .unwrap()
            .is_fragment()
    );
}

#[test]
fn a_whole_fragment_inside_a_fragment_does_not_hide_it() {
    let mut packet = v6_header(IpNumber::IPV6_FRAGMENTATION_HEADER, 16 + 24)
        .to_bytes()
        .to_vec();
    packet.extend([protocol::FRAGMENT, 0, 0, 1, 0, 0, 0, 7]);
    packet.extend([protocol::UDP, 0, 0, 0, 0, 0, 0, 8]);
    packet.extend(PAYLOAD);
    let meta = parse(&packet).unwrap();
    assert!(meta.is_fragment());
    assert_eq!((meta.id(), meta.protocol()), (7, protocol::UDP));
}

#[test]
fn a_chain_is_followed_up_to_the_bound_and_no_further() {
    let chain = |count: usize| {
        let mut packet = v6_header(IpNumber(60), count * 8 + 24).to_bytes().to_vec();
        for i in 1..=count {
            let next = if i == count {
                protocol::UDP
            } else {
                protocol::DESTINATION
            };
            packet.extend([next, 0, 1, 4, 0, 0, 0, 0]);
        }
        packet.extend(PAYLOAD);
        packet
    };
    let longest = chain(ipv6::MAX_EXTENSIONS);
    assert_eq!(parse(&longest).unwrap().transport(&longest), PAYLOAD);
    assert_eq!(
        parse(&chain(ipv6::MAX_EXTENSIONS + 1)),
        Err(IpError::TooManyExtensions)
    );
}

#[test]
fn each_rejection_has_its_name() {
    let [v4, options, v6] = whole_packets();
    let with = |packet: &[u8], at: usize, value: u8| {
        let mut packet = packet.to_vec();
        packet[at] = value;
        packet
    };
    assert_eq!(parse(&[]), Err(IpError::TooShort { need: 20, have: 0 }));
    assert_eq!(
        parse(&v4[..19]),
        Err(IpError::TooShort { need: 20, have: 19 })
    );
    assert_eq!(
        parse(&v6[..39]),
        Err(IpError::TooShort { need: 40, have: 39 })
    );
    assert_eq!(
        parse(&with(&v4, 0, 0x55)),
        Err(IpError::BadVersion { version: 5 })
    );
    assert_eq!(
        parse(&with(&v4, 0, 0x44)),
        Err(IpError::BadHeaderLen { len: 16, have: 44 })
    );
    assert_eq!(
        parse(&with(&v4, 0, 0x4c)),
        Err(IpError::BadHeaderLen { len: 48, have: 44 })
    );
    assert_eq!(
        parse(&with(&v4, 3, 45)),
        Err(IpError::BadTotalLen {
            total: 45,
            have: 44
        })
    );
    assert_eq!(
        parse(&with(&options, 3, 23)),
        Err(IpError::BadTotalLen {
            total: 23,
            have: 48
        })
    );
    assert_eq!(
        parse(&with(&v6, 5, 25)),
        Err(IpError::BadTotalLen {
            total: 65,
            have: 64
        })
    );
    assert_eq!(parse(&with(&v6, 5, 0)), Err(IpError::Jumbogram));
    // The payload read as an extension header is 8 + 0x5a * 8 bytes long.
    let truncated = IpError::TruncatedExtension {
        kind: protocol::DESTINATION,
    };
    assert_eq!(parse(&with(&v6, 6, protocol::DESTINATION)), Err(truncated));
    let mut cut = with(&v6, 6, protocol::DESTINATION);
    cut[5] = 7;
    assert_eq!(parse(&cut), Err(truncated));
}

#[test]
fn bytes_behind_the_total_length_are_left_out() {
    for packet in whole_packets() {
        let padded = [&packet[..], &[0xee; 9]].concat();
        let meta = parse(&padded).unwrap();
        assert_eq!(meta.total_len(), packet.len());
        assert_eq!(meta.transport(&padded), PAYLOAD);
        assert_eq!(parse(&packet), Ok(meta));
    }
}

#[test]
fn a_ttl_of_two_is_decremented_and_lower_ones_are_left_alone() {
    for (packet, at) in whole_packets().into_iter().zip([8, 8, 7]) {
        for (ttl, by, expected) in [
            (2, 1, Ok(1)),
            (1, 1, Err(())),
            (0, 1, Err(())),
            (2, 2, Err(())),
            (255, 2, Ok(253)),
        ] {
            let mut packet = packet.clone();
            packet[at] = ttl;
            let before = packet.clone();
            match expected {
                Ok(left) => {
                    assert_eq!(decrement_ttl(&mut packet, by), Ok(()));
                    assert_eq!(packet[at], left);
                }
                Err(()) => {
                    assert_eq!(decrement_ttl(&mut packet, by), Err(TtlError::Expired));
                    assert_eq!(packet, before);
                }
            }
        }
    }
}

#[test]
fn the_checksum_stays_right_whatever_the_hop_changes() {
    for packet in &whole_packets()[..2] {
        for ttl in 0..=u8::MAX {
            let mut header = Ipv4Header::from_slice(packet).unwrap().0;
            header.time_to_live = ttl;
            header.header_checksum = header.calc_header_checksum();
            let mut packet = v4(&header);
            for ecn in [Ecn::Ce, Ecn::Ect0, Ecn::NotEct, Ecn::Ect1] {
                set_ecn(&mut packet, ecn).unwrap();
                assert!(ipv4_header_checksum_ok(&packet));
                assert_eq!(parse(&packet).unwrap().ecn(), ecn);
            }
            let expired = decrement_ttl(&mut packet, 1).is_err();
            assert_eq!(expired, ttl < 2);
            let read = Ipv4Header::from_slice(&packet).unwrap().0;
            assert_eq!(read.header_checksum, read.calc_header_checksum());
        }
    }
}

#[test]
fn setting_ecn_changes_nothing_else() {
    for packet in whole_packets() {
        let mut changed = packet.clone();
        set_ecn(&mut changed, Ecn::Ce).unwrap();
        let meta = parse(&changed).unwrap();
        assert_eq!(meta.tos(), parse(&packet).unwrap().tos() | 3);
        set_ecn(&mut changed, parse(&packet).unwrap().ecn()).unwrap();
        assert_eq!(changed, packet);
    }
}

#[test]
fn rewrites_refuse_what_is_no_ip_packet() {
    let mut ethernet = [0xff; 64];
    let bad_version = IpError::BadVersion { version: 15 };
    assert_eq!(
        decrement_ttl(&mut ethernet, 1),
        Err(TtlError::NotIp(bad_version))
    );
    assert_eq!(set_ecn(&mut ethernet, Ecn::Ce), Err(bad_version));
    assert_eq!(ethernet, [0xff; 64]);
    assert!(!ipv4_header_checksum_ok(&ethernet));
}

#[test]
fn a_fragment_behind_a_fragment_header_that_cuts_nothing_is_one() {
    for (off, more) in [(0, true), (64, false)] {
        let mut packet = v6_chain(fragment_header(off, more));
        // The hop-by-hop header in front is taken for a fragment header: offset 0, no more.
        packet[6] = 44;
        let meta = parse(&packet).unwrap();
        assert!(meta.is_fragment(), "{meta:?}");
        assert_eq!((meta.fragment_off(), meta.id()), (off, 0xdead_beef));
        let read = IpSlice::from_slice(&packet).unwrap();
        assert!(read.is_fragmenting_payload());
    }
}

proptest! {
    /// Whole packets with a few bytes overwritten: often valid, always near the edge.
    #[test]
    fn whatever_both_accept_is_read_as_etherparse_reads_it(
        which in 0usize..5,
        edits in proptest::collection::vec((0usize..48, any::<u8>()), 0..4),
        cut in 0usize..80,
    ) {
        let [v4, options, v6] = whole_packets();
        let chain = |off, more| v6_chain(fragment_header(off, more));
        let mut packet = [v4, options, v6, chain(0, true), chain(64, false)][which].clone();
        for (at, value) in edits {
            if let Some(byte) = packet.get_mut(at) {
                *byte = value;
            }
        }
        packet.truncate(packet.len().saturating_sub(cut.saturating_sub(60)));

        let Ok(meta) = parse(&packet) else { return Ok(()) };
        prop_assert!(meta.header_len() <= meta.total_len() && meta.total_len() <= packet.len());
        let Ok(read) = IpSlice::from_slice(&packet) else { return Ok(()) };
        prop_assert_eq!(meta.src(), read.source_addr());
        prop_assert_eq!(meta.dst(), read.destination_addr());
        // etherparse steps over the authentication header of IPv4, and not over mobility, HIP and
        // shim6.
        let opaque = [51, 135, 139, 140];
        if !opaque.contains(&meta.protocol()) && !opaque.contains(&read.payload_ip_number().0) {
            prop_assert_eq!(meta.is_fragment(), read.is_fragmenting_payload());
            prop_assert_eq!(meta.protocol(), read.payload_ip_number().0);
            prop_assert_eq!(meta.transport(&packet), read.payload().payload);
        }
    }

    #[test]
    fn bytes_that_parse_can_be_rewritten_and_no_others_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..120), first in 0u8..8,
    ) {
        if let Some(byte) = bytes.first_mut() {
            *byte = *byte & 0x0f | [0x40, 0x60][usize::from(first % 2)];
        }
        let parsed = parse(&bytes);
        if let Ok(meta) = parsed {
            prop_assert_eq!(meta.transport(&bytes).len() + meta.header_len(), meta.total_len());
        }
        let hop = decrement_ttl(&mut bytes, first);
        let marked = set_ecn(&mut bytes, Ecn::Ce);
        if parsed.is_ok() {
            prop_assert!(matches!(hop, Ok(()) | Err(TtlError::Expired)));
            prop_assert_eq!(marked, Ok(()));
        }
    }
}
