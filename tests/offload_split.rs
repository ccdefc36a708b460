//! Splitting against a slow splitter, against etherparse, and against the refusals it owes.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may panic, in its helpers too"
)]

#[path = "offload_support/packet.rs"]
mod packet;

use loden::offload::HeaderError;
use loden::offload::split::{
    ChecksumError, MAX_HEADER_LEN, MAX_SEGMENTS, Split, SplitError, finish_checksum,
};
use loden::offload::vnet_hdr::{Gso, VnetHdr};
use packet::{
    CWR, FIN, Fields, PSH, checksum_at, checksums_hold, is_udp, is_v6, l4_at, naive_sum,
    payload_at, pseudo_header, split_slowly,
};
use proptest::collection::vec;
use proptest::prelude::*;

#[test]
fn a_tcp_superpacket_makes_the_segments_the_slow_splitter_makes() {
    let fields = Fields {
        payload: (0..=255).cycle().take(4000).collect(),
        ..Fields::default()
    };
    assert_splits_like_the_oracle(&fields.build(), 1448);
}

#[test]
fn fin_and_psh_stay_on_the_last_segment_and_cwr_on_the_first() {
    let flags = Fields::default().flags | FIN | PSH | CWR;
    let packet = Fields {
        flags,
        payload: vec![1; 250],
        ..Fields::default()
    }
    .build();
    let segments = split(&vnet_for(&packet, 100), &packet).unwrap();
    let flags: Vec<u16> = segments
        .iter()
        .map(|segment| u16::from(segment[33]))
        .collect();
    assert_eq!(flags, [0x10 | CWR, 0x10, 0x10 | FIN | PSH]);
}

#[test]
fn sequence_number_and_identification_wrap() {
    let fields = Fields {
        seq: u32::MAX - 50,
        id: 0xffff,
        frag: 0,
        ..Fields::default()
    };
    let packet = Fields {
        payload: vec![9; 300],
        ..fields
    }
    .build();
    let segments = split(&vnet_for(&packet, 100), &packet).unwrap();
    let id = |i: usize| u16::from_be_bytes([segments[i][4], segments[i][5]]);
    assert_eq!([id(0), id(1), id(2)], [0xffff, 0, 1]);
    let seq: [u8; 4] = segments[1][24..28].try_into().unwrap();
    assert_eq!(u32::from_be_bytes(seq), 49);
    assert_splits_like_the_oracle(&packet, 100);
}

#[test]
fn the_largest_superpacket_splits() {
    let fields = Fields {
        payload: vec![0xff; 65535 - 40],
        ..Fields::default()
    };
    assert_splits_like_the_oracle(&fields.build(), 1448);
}

#[test]
fn a_udp_checksum_of_zero_is_sent_as_all_ones() {
    // The two payload bytes are chosen so that segment 0's sum is 0xffff, whose complement is zero.
    let mut fields = Fields {
        udp: true,
        payload: vec![0, 0, 1, 1],
        ..Fields::default()
    };
    let first = Fields {
        payload: vec![0, 0],
        ..fields.clone()
    }
    .build();
    fields.payload[..2].copy_from_slice(&first[26..28]);
    let packet = fields.build();
    let segments = split(&vnet_for(&packet, 2), &packet).unwrap();
    assert_eq!(segments[0][26..28], [0xff, 0xff]);
    assert!(checksums_hold(&segments[0]));
}

#[test]
fn a_plain_packet_is_its_own_only_segment() {
    for packet in [Fields::default().build(), vec![0x45, 1, 2], vec![]] {
        let split = Split::new(&VnetHdr::default(), &packet).unwrap();
        assert_eq!((split.count(), split.header_len()), (1, 0));
        assert_eq!(split.payload(0), 0..packet.len());
        assert_eq!(split.segment_len(0), packet.len());
        let mut out = [7; MAX_HEADER_LEN];
        assert_eq!(split.write_header(&packet, 0, naive_sum, &mut out), 0);
        assert_eq!(out, [7; MAX_HEADER_LEN]);
    }
}

#[test]
fn segments_can_be_described_in_any_order() {
    let packet = Fields {
        payload: vec![3; 1000],
        ..Fields::default()
    }
    .build();
    let vnet = vnet_for(&packet, 300);
    let made = Split::new(&vnet, &packet).unwrap();
    let mut forwards = split(&vnet, &packet).unwrap();
    let backwards: Vec<_> = (0..made.count())
        .rev()
        .map(|i| segment(&made, &packet, i))
        .collect();
    forwards.reverse();
    assert_eq!(forwards, backwards);
}

#[test]
fn a_segment_that_does_not_exist_has_no_header() {
    let packet = Fields {
        payload: vec![3; 200],
        ..Fields::default()
    }
    .build();
    let split = Split::new(&vnet_for(&packet, 100), &packet).unwrap();
    let mut out = [0; MAX_HEADER_LEN];
    for i in [2, 3, usize::MAX] {
        assert!(split.payload(i).is_empty());
        assert_eq!(split.write_header(&packet, i, naive_sum, &mut out), 0);
    }
    assert_eq!(split.write_header(&packet, 0, naive_sum, &mut out[..39]), 0);
    assert_eq!(split.write_header(&packet[..90], 0, naive_sum, &mut out), 0);
    assert_eq!(split.write_header(&packet[..30], 0, naive_sum, &mut out), 0);
}

#[test]
fn data_valid_stands_in_for_needs_csum() {
    let packet = Fields {
        payload: vec![3; 200],
        ..Fields::default()
    }
    .build();
    let vnet = VnetHdr {
        needs_csum: false,
        data_valid: true,
        csum_start: 0,
        csum_offset: 0,
        ..vnet_for(&packet, 100)
    };
    assert_eq!(split(&vnet, &packet).unwrap(), split_slowly(&packet, 100));
    let vouched_by_none = VnetHdr {
        data_valid: false,
        ..vnet
    };
    assert_eq!(
        Split::new(&vouched_by_none, &packet).unwrap_err(),
        SplitError::Unverified
    );
}

#[test]
fn each_malformed_superpacket_is_refused_by_name() {
    let tcp = Fields {
        payload: vec![3; 200],
        ..Fields::default()
    };
    let udp = Fields {
        udp: true,
        ..tcp.clone()
    };
    let v6 = Fields {
        v6: true,
        ..tcp.clone()
    };
    let refusal = |packet: &[u8], vnet: VnetHdr| Split::new(&vnet, packet).unwrap_err();
    let edited = |fields: &Fields, at: usize, value: u8| {
        let mut packet = fields.build();
        packet[at] = value;
        refusal(&packet, vnet_for(&fields.build(), 100))
    };
    let base = vnet_for(&tcp.build(), 100);

    assert_eq!(refusal(&[], base), HeaderError::NotIp.into());
    assert_eq!(edited(&tcp, 0, 0x15), HeaderError::NotIp.into());
    assert_eq!(edited(&tcp, 0, 0x44), HeaderError::Ipv4HeaderLength.into());
    assert_eq!(edited(&tcp, 6, 0x20), HeaderError::Fragment.into());
    assert_eq!(edited(&tcp, 7, 0x01), HeaderError::Fragment.into());
    assert_eq!(
        edited(&tcp, 9, 1),
        HeaderError::NotTcpOrUdp { protocol: 1 }.into()
    );
    assert_eq!(
        edited(&v6, 6, 58),
        HeaderError::NotTcpOrUdp { protocol: 58 }.into()
    );
    assert_eq!(
        edited(&v6, 6, 44),
        HeaderError::ExtensionHeader { next_header: 44 }.into()
    );
    assert_eq!(
        edited(&tcp, 32, 0x40),
        HeaderError::TcpDataOffset { offset: 16 }.into()
    );
    let udp_len = HeaderError::UdpLength {
        header: 209,
        actual: 208,
    };
    assert_eq!(edited(&udp, 25, 209), udp_len.into());
    let mut trailing = tcp.build();
    trailing.push(0);
    let mismatch = HeaderError::LengthMismatch {
        header: 240,
        actual: 241,
    };
    assert_eq!(refusal(&trailing, base), mismatch.into());
    assert_eq!(
        refusal(&tcp.build()[..19], base),
        HeaderError::Truncated.into()
    );

    let swapped = VnetHdr {
        gso: Gso::TcpV6 { ecn: false },
        ..base
    };
    let gso = swapped.gso;
    assert_eq!(
        refusal(&tcp.build(), swapped),
        SplitError::GsoMismatch { gso }
    );
    assert_eq!(
        refusal(&udp.build(), base),
        SplitError::GsoMismatch { gso: base.gso }
    );
    let shifted = VnetHdr {
        csum_start: 22,
        ..base
    };
    let field = SplitError::ChecksumField {
        csum_start: 22,
        csum_offset: 16,
    };
    assert_eq!(refusal(&tcp.build(), shifted), field);
    let empty = Fields {
        payload: vec![],
        ..tcp.clone()
    }
    .build();
    assert_eq!(refusal(&empty, base), SplitError::NoPayload);
    assert_eq!(
        refusal(
            &tcp.build(),
            VnetHdr {
                gso_size: 0,
                ..base
            }
        ),
        SplitError::NoSize
    );
    let count = MAX_SEGMENTS + 1;
    let many = Fields {
        payload: vec![0; count],
        ..tcp
    }
    .build();
    let refused = refusal(
        &many,
        VnetHdr {
            gso_size: 1,
            ..base
        },
    );
    assert_eq!(refused, SplitError::TooManySegments { count });
}

#[test]
fn a_partial_checksum_is_completed_and_others_are_left_alone() {
    for (udp, v6) in [(false, false), (false, true), (true, false), (true, true)] {
        let whole = Fields {
            udp,
            v6,
            payload: vec![0xab; 33],
            ..Fields::default()
        }
        .build();
        let mut packet = whole.clone();
        let at = checksum_at(&packet);
        let partial = naive_sum(&pseudo_header(&packet)).to_be_bytes();
        packet[at..at + 2].copy_from_slice(&partial);
        let needs = VnetHdr {
            gso: Gso::None,
            ..vnet_for(&packet, 0)
        };

        let mut untouched = packet.clone();
        finish_checksum(&VnetHdr::default(), &mut untouched, naive_sum).unwrap();
        assert_eq!(untouched, packet);
        finish_checksum(&needs, &mut packet, naive_sum).unwrap();
        assert_eq!(packet, whole);
    }
}

#[test]
fn a_completed_udp_checksum_is_never_zero() {
    let mut packet = Fields {
        udp: true,
        payload: vec![0, 0],
        ..Fields::default()
    }
    .build();
    let (at, needs) = (
        checksum_at(&packet),
        VnetHdr {
            gso: Gso::None,
            ..vnet_for(&packet, 0)
        },
    );
    let sum_left: [u8; 2] = packet[at..at + 2].try_into().unwrap();
    packet[28..30].copy_from_slice(&sum_left);
    let partial = naive_sum(&pseudo_header(&packet)).to_be_bytes();
    packet[at..at + 2].copy_from_slice(&partial);
    finish_checksum(&needs, &mut packet, naive_sum).unwrap();
    assert_eq!(packet[at..at + 2], [0xff, 0xff]);
}

#[test]
fn a_checksum_field_outside_the_packet_is_refused() {
    let mut packet = Fields::default().build();
    let len = packet.len();
    let plain = VnetHdr {
        gso: Gso::None,
        ..vnet_for(&packet, 0)
    };
    for (csum_start, csum_offset) in [(200, 16), (130, 9), (130, 10), (u16::MAX, u16::MAX)] {
        let vnet = VnetHdr {
            csum_start,
            csum_offset,
            ..plain
        };
        let before = packet.clone();
        let refused = finish_checksum(&vnet, &mut packet, naive_sum);
        assert_eq!(
            refused,
            Err(ChecksumError::FieldOutside {
                csum_start,
                csum_offset,
                len
            })
        );
        assert_eq!(packet, before);
    }
    let superpacket = vnet_for(&packet, 50);
    let refused = finish_checksum(&superpacket, &mut packet, naive_sum);
    assert_eq!(refused, Err(ChecksumError::Superpacket));
}

/// Of extension headers those are passed that a sender's kernel puts in front of TCP as options of a socket, up to 64
/// bytes of them.
#[test]
fn what_stands_behind_ipv6_extension_headers_is_split_or_refused_by_name() {
    let behind = |extensions: &[(u8, u8)]| Fields {
        v6: true,
        extensions: extensions.to_vec(),
        payload: vec![3; 200],
        ..Fields::default()
    };
    for extensions in [&[(60, 0)][..], &[(0, 0), (60, 1)], &[(0, 7)], &[(60, 0); 8]] {
        let packet = behind(extensions).build();
        assert_eq!(unfinished_split(&packet, 100), split_slowly(&packet, 100));
    }
    let refusal = |packet: &[u8]| Split::new(&vnet_for(packet, 100), packet).unwrap_err();
    for (extensions, next_header) in [
        (&[(0, 8)][..], 0),
        (&[(60, 0); 9], 60),
        (&[(0, 0), (60, 7)], 60),
        (&[(43, 0)], 43),
        (&[(60, 0), (44, 0)], 44),
    ] {
        let refused = HeaderError::ExtensionHeader { next_header };
        let packet = behind(extensions).build();
        assert_eq!(refusal(&packet), refused.into(), "{extensions:?}");
    }
    let mut icmp = behind(&[(60, 0)]).build();
    icmp[40] = 58;
    let vnet = vnet_for(&behind(&[(60, 0)]).build(), 100);
    let refused = HeaderError::NotTcpOrUdp { protocol: 58 };
    assert_eq!(Split::new(&vnet, &icmp).unwrap_err(), refused.into());
    let mut cut = behind(&[(60, 0)]).build();
    cut.truncate(47);
    cut[4..6].copy_from_slice(&[0, 7]);
    assert_eq!(
        Split::new(&vnet, &cut).unwrap_err(),
        HeaderError::Truncated.into()
    );
}

proptest! {
    #[test]
    fn random_superpackets_split_like_the_oracle(fields in superpacket(), gso_size in 8_u16..2000) {
        assert_splits_like_the_oracle(&fields.build(), gso_size);
    }

    #[test]
    fn no_bytes_make_splitting_panic(
        mut bytes in vec(any::<u8>(), 0..200),
        first in prop_oneof![Just(0x45_u8), Just(0x46), Just(0x60), any::<u8>()],
        protocol in prop_oneof![Just(6_u8), Just(17)],
        head: [u8; 10],
        honest_len: bool,
    ) {
        let len = u8::try_from(bytes.len()).unwrap();
        for (at, value) in [(0, first), (9, protocol), (6, protocol)] {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        if honest_len && bytes.len() >= 40 {
            bytes[2..4].copy_from_slice(&[0, len]);
        }
        if let Ok(vnet) = VnetHdr::parse(&head) {
            let mut checked = bytes.clone();
            let finished = finish_checksum(&vnet, &mut checked, naive_sum);
            prop_assert!(finished.is_ok() || checked == bytes);
            drop(split(&vnet, &bytes));
        }
        for gso in [Gso::TcpV4 { ecn: true }, Gso::TcpV6 { ecn: false }, Gso::UdpL4] {
            let vnet = VnetHdr { gso, gso_size: 3, data_valid: true, ..VnetHdr::default() };
            if let Ok(segments) = split(&vnet, &bytes) {
                prop_assert!(segments.iter().all(|segment| checksums_hold(segment)));
            }
        }
    }
}

fn superpacket() -> impl Strategy<Value = Fields> {
    let words = |most: usize| vec(any::<u8>(), 0..=most).prop_map(|words| words.repeat(4));
    let ip = (
        any::<bool>(),
        any::<u8>(),
        any::<u8>(),
        any::<u16>(),
        any::<bool>(),
        words(10),
    );
    let tcp = (
        any::<u32>(),
        any::<u32>(),
        any::<u8>(),
        any::<u16>(),
        any::<u16>(),
        words(10),
    );
    let payload = vec(any::<u8>(), 1..9000);
    // In the order of RFC 8200 section 4.1, which etherparse insists on.
    let extensions = [0, 60].map(|kind| vec((Just(kind), 0..=3_u8), 0..=1));
    let extensions = extensions.prop_map(|kinds| kinds.concat());
    let ends = (any::<[u8; 2]>(), extensions);
    (ip, any::<bool>(), tcp, payload, ends).prop_map(
        |((v6, tos, ttl, id, df, ip_options), udp, tcp, payload, ([src, dst], extensions))| {
            let (seq, ack, flags, window, urgent, tcp_options) = tcp;
            Fields {
                v6,
                udp,
                src,
                dst,
                ttl,
                tos,
                id,
                frag: if df { packet::DF } else { 0 },
                ip_options,
                extensions,
                seq,
                ack,
                flags: u16::from(flags),
                window,
                urgent,
                tcp_options,
                payload,
                ..Fields::default()
            }
        },
    )
}

/// The vnet header the kernel gives this superpacket, with the misleading `hdr_len` of the forward path.
fn vnet_for(packet: &[u8], gso_size: u16) -> VnetHdr {
    VnetHdr {
        needs_csum: true,
        data_valid: false,
        gso: match (is_udp(packet), is_v6(packet)) {
            (true, _) => Gso::UdpL4,
            (false, true) => Gso::TcpV6 { ecn: false },
            (false, false) => Gso::TcpV4 { ecn: false },
        },
        hdr_len: u16::try_from(packet.len()).unwrap_or(u16::MAX),
        gso_size,
        csum_start: u16::try_from(l4_at(packet)).unwrap(),
        csum_offset: u16::try_from(checksum_at(packet) - l4_at(packet)).unwrap(),
    }
}

fn segment(split: &Split, packet: &[u8], i: usize) -> Vec<u8> {
    let mut header = [0; MAX_HEADER_LEN];
    let len = split.write_header(packet, i, naive_sum, &mut header);
    assert_eq!(len, split.header_len());
    let segment = [&header[..len], &packet[split.payload(i)]].concat();
    assert_eq!(segment.len(), split.segment_len(i));
    segment
}

fn split(vnet: &VnetHdr, packet: &[u8]) -> Result<Vec<Vec<u8>>, SplitError> {
    let split = Split::new(vnet, packet)?;
    Ok((0..split.count())
        .map(|i| segment(&split, packet, i))
        .collect())
}

/// The segments of a superpacket with the partial checksum that the kernel leaves in the field, which must not find its
/// way into them.
fn unfinished_split(packet: &[u8], gso_size: u16) -> Vec<Vec<u8>> {
    let mut given = packet.to_vec();
    let at = checksum_at(packet);
    let partial = naive_sum(&pseudo_header(packet)).to_be_bytes();
    given[at..at + 2].copy_from_slice(&partial);
    split(&vnet_for(packet, gso_size), &given).unwrap()
}

fn assert_splits_like_the_oracle(packet: &[u8], gso_size: u16) {
    let segments = unfinished_split(packet, gso_size);
    assert_eq!(segments, split_slowly(packet, usize::from(gso_size)));
    for segment in &segments {
        assert_etherparse_agrees(segment);
    }
}

/// A second opinion on lengths and checksums, from a parser neither side wrote.
fn assert_etherparse_agrees(segment: &[u8]) {
    let parsed = etherparse::PacketHeaders::from_ip_slice(segment).unwrap();
    let ip = parsed.net.unwrap();
    let payload = &segment[payload_at(segment)..];
    assert_eq!(parsed.payload.slice(), payload);
    if let Some((v4, _)) = ip.ipv4_ref() {
        assert_eq!(v4.calc_header_checksum(), v4.header_checksum);
    }
    let ipv4 = ip.ipv4_ref().map(|(header, _)| header);
    let ipv6 = ip.ipv6_ref().map(|(header, _)| header);
    let (expected, found) = match (parsed.transport.unwrap(), ipv4, ipv6) {
        (etherparse::TransportHeader::Tcp(tcp), Some(v4), _) => {
            (tcp.calc_checksum_ipv4(v4, payload).unwrap(), tcp.checksum)
        }
        (etherparse::TransportHeader::Tcp(tcp), _, Some(v6)) => {
            (tcp.calc_checksum_ipv6(v6, payload).unwrap(), tcp.checksum)
        }
        (etherparse::TransportHeader::Udp(udp), Some(v4), _) => {
            (udp.calc_checksum_ipv4(v4, payload).unwrap(), udp.checksum)
        }
        (etherparse::TransportHeader::Udp(udp), _, Some(v6)) => {
            (udp.calc_checksum_ipv6(v6, payload).unwrap(), udp.checksum)
        }
        other => panic!("not a TCP or UDP packet: {other:?}"),
    };
    assert_eq!(found, expected);
}
