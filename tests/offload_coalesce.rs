//! Coalescing against a slow coalescer, and against splitting, which must give every packet back.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test may panic, in its helpers too"
)]

#[path = "offload_support/packet.rs"]
mod packet;
#[path = "offload_support/slow_coalesce.rs"]
mod slow_coalesce;

use loden::offload::HeaderError;
use loden::offload::coalesce::{
    Coalescer, Full, HEAD_LEN, Limits, Mismatch, PacketRef, Pushed, Unmergeable, Write,
};
use loden::offload::split::{MAX_HEADER_LEN, Split};
use loden::offload::vnet_hdr::{VNET_HDR_LEN, VnetHdr};
use packet::{
    ACK, CWR, DF, FIN, Fields, PSH, checksum_at, fix_checksums, is_v6, l4_at, naive_sum,
    pseudo_header,
};
use proptest::collection::vec;
use proptest::prelude::*;
use slow_coalesce::{SlowLimits, coalesce_slowly, merge_slowly, without_atomic_id};

const SYN: u16 = 0x02;
const RST: u16 = 0x04;
const URG: u16 = 0x20;
const ECE: u16 = 0x40;

#[test]
fn four_segments_of_a_stream_become_one_superpacket() {
    let packets = stream(&Fields::default(), &[1448, 1448, 1448, 200]);
    let burst = Burst::push(Limits::default(), packets.clone());
    let merged = Ok(Pushed::Merged);
    assert_eq!(burst.outcomes, [Ok(Pushed::Opened), merged, merged, merged]);
    let [superpacket] = burst.assembled().try_into().unwrap();
    let refs: Vec<&[u8]> = packets.iter().map(Vec::as_slice).collect();
    assert_eq!(superpacket.with_whole_checksum(), merge_slowly(&refs));
    let vnet = superpacket.vnet;
    assert_eq!(
        (
            vnet.gso_size,
            vnet.hdr_len,
            vnet.csum_start,
            vnet.csum_offset
        ),
        (1448, 40, 20, 16)
    );
}

#[test]
fn a_packet_alone_passes_unchanged_and_unverified() {
    let mut packet = Fields::default().build();
    packet[10..12].fill(0xee);
    packet[36..38].fill(0xee);
    let burst = Burst::push_summing(Limits::default(), vec![packet.clone()], |_| {
        panic!("a packet alone must not cost a sum")
    });
    let [written] = burst.assembled().try_into().unwrap();
    assert_eq!(written.vnet, VnetHdr::default());
    assert_eq!(written.packet, packet);
}

#[test]
fn a_short_segment_closes() {
    let outcomes = outcomes(stream(&Fields::default(), &[100, 60, 100, 100]));
    let expected = [
        Ok(Pushed::Opened),
        Ok(Pushed::Merged),
        Ok(Pushed::Opened),
        Ok(Pushed::Merged),
    ];
    assert_eq!(outcomes, expected);
}

#[test]
fn psh_is_merged_and_closes() {
    let mut packets = stream(&Fields::default(), &[100, 100, 100]);
    packets[1][33] |= 0x08;
    fix_checksums(&mut packets[1]);
    let burst = Burst::push(Limits::default(), packets);
    let expected = [Ok(Pushed::Opened), Ok(Pushed::Merged), Ok(Pushed::Opened)];
    assert_eq!(burst.outcomes, expected);
    assert_eq!(burst.assembled()[0].packet[33], 0x18);
}

#[test]
fn each_packet_that_can_never_merge_is_named_and_closes_its_flow() {
    let tcp = Fields::default();
    let udp = Fields {
        udp: true,
        ..Fields::default()
    };
    let flagged = |flags| {
        (
            Fields {
                flags,
                ..tcp.clone()
            }
            .build(),
            Unmergeable::TcpFlags { flags },
        )
    };
    let mut no_checksum = udp.build();
    no_checksum[26..28].fill(0);
    let mut trailing = tcp.build();
    trailing.push(0);
    let length = HeaderError::LengthMismatch {
        header: 140,
        actual: 141,
    };
    let mut cases = vec![
        (
            Fields {
                payload: vec![],
                ..tcp.clone()
            }
            .build(),
            Unmergeable::NoPayload,
        ),
        (
            Fields {
                payload: vec![],
                ..udp.clone()
            }
            .build(),
            Unmergeable::NoPayload,
        ),
        (
            Fields {
                ip_options: vec![1; 4],
                ..tcp.clone()
            }
            .build(),
            Unmergeable::Ipv4Options,
        ),
        (
            Fields {
                frag: 0x8000 | DF,
                ..tcp.clone()
            }
            .build(),
            Unmergeable::Ipv4Reserved,
        ),
        (no_checksum, Unmergeable::NoChecksum),
        (trailing, Unmergeable::Header(length)),
        (
            Fields {
                frag: 0x2000,
                ..tcp.clone()
            }
            .build(),
            HeaderError::Fragment.into(),
        ),
        (
            Fields {
                frag: 3,
                ..udp.clone()
            }
            .build(),
            HeaderError::Fragment.into(),
        ),
        flagged(0),
        flagged(ACK | 0x100),
    ];
    cases.extend([FIN, SYN, RST, URG, ECE, CWR].map(|flag| flagged(ACK | flag)));
    for (packet, reason) in cases {
        let whole = if packet::is_udp(&packet) { &udp } else { &tcp };
        let around = stream(whole, &[100, 100, 100]);
        let packets = vec![
            around[0].clone(),
            packet,
            around[1].clone(),
            around[2].clone(),
        ];
        let expected = [
            Ok(Pushed::Opened),
            Ok(Pushed::Passed(reason)),
            Ok(Pushed::Opened),
            Ok(Pushed::Merged),
        ];
        let burst = Burst::push(Limits::default(), packets);
        assert_eq!(burst.outcomes, expected, "{reason}");
        assert_eq!(burst.indices(), [vec![0], vec![1], vec![2, 3]], "{reason}");
    }
}

#[test]
fn each_difference_that_forbids_merging_is_named() {
    let tcp = Fields {
        id: 500,
        payload: vec![1; 100],
        ..Fields::default()
    };
    let next = Fields {
        id: 501,
        seq: tcp.seq + 100,
        ..tcp.clone()
    };
    let v6 = Fields {
        v6: true,
        ..tcp.clone()
    };
    let v6_next = Fields {
        v6: true,
        ..next.clone()
    };
    let timestamps = |value: u8| vec![1, 1, 8, 10, 0, 0, 0, value, 0, 0, 0, 9];
    let cases = [
        (
            &tcp,
            Fields {
                tos: 2,
                ..next.clone()
            },
            Mismatch::IpHeader,
        ),
        (
            &tcp,
            Fields {
                ttl: 62,
                ..next.clone()
            },
            Mismatch::IpHeader,
        ),
        (
            &tcp,
            Fields {
                frag: 0,
                ..next.clone()
            },
            Mismatch::IpHeader,
        ),
        (
            &v6,
            Fields {
                flow_label: 1,
                ..v6_next.clone()
            },
            Mismatch::IpHeader,
        ),
        (
            &v6,
            Fields {
                tos: 1,
                ..v6_next.clone()
            },
            Mismatch::IpHeader,
        ),
        (&v6, Fields { ttl: 1, ..v6_next }, Mismatch::IpHeader),
        (
            &tcp,
            Fields {
                seq: next.seq + 1,
                ..next.clone()
            },
            Mismatch::Sequence,
        ),
        (
            &tcp,
            Fields {
                seq: next.seq - 1,
                ..next.clone()
            },
            Mismatch::Sequence,
        ),
        (
            &tcp,
            Fields {
                ack: 78,
                ..next.clone()
            },
            Mismatch::TcpHeader,
        ),
        (
            &tcp,
            Fields {
                window: 502,
                ..next.clone()
            },
            Mismatch::TcpHeader,
        ),
        (
            &tcp,
            Fields {
                urgent: 1,
                ..next.clone()
            },
            Mismatch::TcpHeader,
        ),
        (
            &tcp,
            Fields {
                tcp_options: timestamps(1),
                ..next.clone()
            },
            Mismatch::TcpOptions,
        ),
        (
            &tcp,
            Fields {
                payload: vec![1; 101],
                ..next.clone()
            },
            Mismatch::Larger,
        ),
    ];
    for (first, second, mismatch) in cases {
        assert_eq!(
            outcomes(vec![first.build(), second.build()]),
            [Ok(Pushed::Opened), Ok(Pushed::Reopened(mismatch))],
            "{mismatch}: {second:?}"
        );
    }
    let stamped = Fields {
        tcp_options: timestamps(1),
        ..tcp
    };
    let later = Fields {
        tcp_options: timestamps(2),
        ..next
    };
    let expected = [
        Ok(Pushed::Opened),
        Ok(Pushed::Reopened(Mismatch::TcpOptions)),
    ];
    assert_eq!(outcomes(vec![stamped.build(), later.build()]), expected);
}

#[test]
fn identification_matters_only_without_df() {
    let ids = |frag: u16, ids: [u16; 3]| {
        let udp = Fields {
            udp: true,
            frag,
            ..Fields::default()
        };
        outcomes(ids.map(|id| Fields { id, ..udp.clone() }.build()).to_vec())
    };
    let merged = Ok(Pushed::Merged);
    let broken = Ok(Pushed::Reopened(Mismatch::Ipv4Id));
    assert_eq!(ids(0, [0xffff, 0, 1]), [Ok(Pushed::Opened), merged, merged]);
    assert_eq!(ids(0, [5, 5, 5]), [Ok(Pushed::Opened), broken, broken]);
    assert_eq!(ids(0, [5, 6, 8]), [Ok(Pushed::Opened), merged, broken]);
    assert_eq!(ids(DF, [0, 0, 0]), [Ok(Pushed::Opened), merged, merged]);
    assert_eq!(ids(DF, [9, 3, 500]), [Ok(Pushed::Opened), merged, merged]);
}

#[test]
fn damage_is_never_merged_away() {
    let good = stream(&Fields::default(), &[100, 100, 100, 100]);
    let damaged = |at: usize, byte: usize| {
        let mut packets = good.clone();
        packets[at][byte] ^= 0x40;
        packets
    };
    let (opened, merged) = (Ok(Pushed::Opened), Ok(Pushed::Merged));
    let passed = Ok(Pushed::Passed(Unmergeable::Checksum));
    let first_bad = Ok(Pushed::Reopened(Mismatch::FirstChecksum));
    // Payload, TCP checksum, IPv4 header checksum.
    for byte in [60, 36, 10] {
        assert_eq!(outcomes(damaged(2, byte)), [opened, merged, passed, opened]);
        assert_eq!(
            outcomes(damaged(0, byte)),
            [opened, first_bad, merged, merged]
        );
    }
}

#[test]
fn the_limits_hold() {
    let udp = Fields {
        udp: true,
        ..Fields::default()
    };
    let sizes = |limits: Limits, fields: &Fields, payloads: &[usize]| -> Vec<usize> {
        Burst::push(limits, stream(fields, payloads))
            .indices()
            .iter()
            .map(Vec::len)
            .collect()
    };
    let default = Limits::default();
    assert_eq!(sizes(default, &udp, &[100; 130]), [64, 64, 2]);
    assert_eq!(
        sizes(
            Limits {
                udp_segments: 3,
                ..default
            },
            &udp,
            &[100; 7]
        ),
        [3, 3, 1]
    );
    assert_eq!(
        sizes(
            Limits {
                tcp_segments: 3,
                ..default
            },
            &Fields::default(),
            &[100; 4]
        ),
        [3, 1]
    );
    // 45 x 1448 + 40 = 65200; the 46th would exceed 65535.
    assert_eq!(sizes(default, &Fields::default(), &[1448; 47]), [45, 2]);
    let exact = Limits {
        max_bytes: 240,
        ..default
    };
    assert_eq!(sizes(exact, &Fields::default(), &[100; 4]), [2, 2]);
    assert_eq!(
        sizes(
            Limits {
                max_bytes: 239,
                ..default
            },
            &Fields::default(),
            &[100; 2]
        ),
        [1, 1]
    );
    let off = Limits {
        tcp: false,
        ..default
    };
    assert_eq!(sizes(off, &Fields::default(), &[100; 2]), [1, 1]);
    assert_eq!(sizes(off, &udp, &[100; 2]), [2]);
    assert_eq!(
        sizes(
            Limits {
                udp: false,
                ..default
            },
            &udp,
            &[100; 2]
        ),
        [1, 1]
    );
}

#[test]
fn interleaved_flows_merge_each_by_itself() {
    let flows: Vec<_> = (0..8)
        .map(|port| {
            stream(
                &Fields {
                    src_port: port,
                    ..Fields::default()
                },
                &[500; 10],
            )
        })
        .collect();
    let packets: Vec<_> = (0..10)
        .flat_map(|i| flows.iter().map(move |flow| flow[i].clone()))
        .collect();
    let indices = Burst::push(Limits::default(), packets).indices();
    let expected: Vec<Vec<usize>> = (0..8)
        .map(|f| (0..10).map(|i| i * 8 + f).collect())
        .collect();
    assert_eq!(indices, expected);
}

#[test]
fn more_flows_than_the_table_holds_lose_merging_but_neither_packets_nor_order() {
    let ports = 0..6000_u16;
    let packets: Vec<_> = (0..2_u16)
        .flat_map(|round| {
            ports.clone().map(move |src_port| {
                let seq = 1000 + u32::from(round) * 10;
                Fields {
                    src_port,
                    seq,
                    payload: vec![1; 10],
                    ..Fields::default()
                }
                .build()
            })
        })
        .collect();
    let burst = Burst::push(Limits::default(), packets);
    let indices = burst.indices();
    let mut seen: Vec<usize> = indices.iter().flatten().copied().collect();
    seen.sort_unstable();
    assert!(seen.into_iter().eq(0..12000));
    assert!(indices.iter().all(|write| match write.as_slice() {
        [_] => true,
        [a, b] => b - a == 6000,
        _ => false,
    }));
}

#[test]
fn a_full_coalescer_takes_no_more_until_cleared() {
    let packets = stream(&Fields::default(), &[100; 3]);
    let (coalescer, outcomes) = push_all(Limits::default(), 2, &packets, naive_sum);
    assert_eq!(
        outcomes,
        [Ok(Pushed::Opened), Ok(Pushed::Merged), Err(Full)]
    );
    assert_eq!((coalescer.len(), coalescer.writes().len()), (2, 1));
    let mut coalescer = coalescer;
    coalescer.clear();
    assert!(coalescer.is_empty());
    assert_eq!(coalescer.writes().len(), 0);
    assert_eq!(
        coalescer.push(handle(2), |at| &packets[usize::from(at.buf)]),
        Ok(Pushed::Opened)
    );
}

#[test]
fn nothing_of_a_burst_is_left_in_the_next() {
    let packets = stream(&Fields::default(), &[100; 4]);
    let bytes_of = |at: PacketRef| packets[usize::from(at.buf)].as_slice();
    let mut coalescer = Coalescer::new(Limits::default(), 8, naive_sum);
    // Past the wrap of the table's 16-bit epoch.
    for _ in 0..70_000 {
        coalescer.clear();
        assert_eq!(coalescer.push(handle(0), bytes_of), Ok(Pushed::Opened));
    }
    assert_eq!(coalescer.push(handle(1), bytes_of), Ok(Pushed::Merged));
    let fragment = |dst| {
        Fields {
            dst,
            frag: 0x2000,
            ..Fields::default()
        }
        .build()
    };
    let (here, there) = (fragment(2), fragment(99));
    let passed = Ok(Pushed::Passed(HeaderError::Fragment.into()));
    assert_eq!(coalescer.push(handle(0), |_| &here), passed);
    assert_eq!(coalescer.push(handle(0), |_| &here), passed);
    coalescer.clear();
    // Were the fence of two packets still up, the flow behind it could not merge.
    assert_eq!(coalescer.push(handle(0), |_| &there), passed);
    assert_eq!(coalescer.push(handle(2), bytes_of), Ok(Pushed::Opened));
    assert_eq!(coalescer.push(handle(3), bytes_of), Ok(Pushed::Merged));
}

#[test]
fn a_fragment_closes_only_the_flows_between_its_addresses() {
    let here = stream(&Fields::default(), &[100, 100]);
    let there = stream(
        &Fields {
            dst: 99,
            ..Fields::default()
        },
        &[100, 100],
    );
    let fragment = Fields {
        udp: true,
        frag: 0x2000,
        ..Fields::default()
    }
    .build();
    let [h0, h1] = here.try_into().unwrap();
    let [t0, t1] = there.try_into().unwrap();
    let indices = Burst::push(Limits::default(), vec![h0, t0, fragment, h1, t1]).indices();
    assert_eq!(indices, [vec![0], vec![1, 4], vec![2], vec![3]]);
}

#[test]
fn an_icmp_packet_closes_nothing() {
    let [a, b] = stream(&Fields::default(), &[100, 100]).try_into().unwrap();
    let mut icmp = Fields::default().build();
    icmp[9] = 1;
    assert_eq!(
        Burst::push(Limits::default(), vec![a, icmp, b]).indices(),
        [vec![0, 2], vec![1]]
    );
}

/// One step of one flow in a random burst.
#[derive(Clone, Debug)]
enum Step {
    Data(u16),
    Short,
    Push,
    PureAck,
    Flag(u16),
    NewAck,
    NewWindow,
    NewOptions(bool),
    NewTtl,
    NewTos,
    Gap,
    SkipId,
    Damage(u16),
    DamageIp,
    NoUdpChecksum,
    Options,
    Fragment,
    Trailing,
    Icmp,
}

fn step() -> impl Strategy<Value = Step> {
    let flag = prop_oneof![
        Just(FIN),
        Just(SYN),
        Just(RST),
        Just(URG),
        Just(ECE),
        Just(CWR)
    ];
    prop_oneof![
        40 => Just(Step::Data(0)),
        4 => (1_u16..300).prop_map(Step::Data),
        3 => Just(Step::Short),
        3 => Just(Step::Push),
        2 => Just(Step::PureAck),
        1 => flag.prop_map(Step::Flag),
        1 => Just(Step::NewAck),
        1 => Just(Step::NewWindow),
        1 => any::<bool>().prop_map(Step::NewOptions),
        1 => Just(Step::NewTtl),
        1 => Just(Step::NewTos),
        1 => Just(Step::Gap),
        2 => Just(Step::SkipId),
        2 => any::<u16>().prop_map(Step::Damage),
        1 => Just(Step::DamageIp),
        1 => Just(Step::NoUdpChecksum),
        1 => Just(Step::Options),
        1 => Just(Step::Fragment),
        1 => Just(Step::Trailing),
        1 => Just(Step::Icmp),
    ]
}

/// Applies one step to a flow and returns the packet it sends.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "most steps leave the built bytes alone"
)]
fn take(flow: &mut Fields, mss: usize, step: &Step, random: u8) -> Vec<u8> {
    let mut fields = flow.clone();
    let mut payload_len = mss;
    match *step {
        Step::Data(0) => {}
        Step::Data(len) => payload_len = usize::from(len),
        Step::Short => payload_len = mss / 2 + 1,
        Step::Push => fields.flags |= PSH,
        Step::PureAck => payload_len = 0,
        Step::Flag(flag) => fields.flags |= flag,
        Step::NewAck => flow.ack += 1000,
        Step::NewWindow => flow.window += 1,
        Step::NewOptions(longer) => {
            flow.tcp_options = vec![random; if longer { 12 } else { 8 }];
        }
        Step::NewTtl => fields.ttl -= 1,
        Step::NewTos => fields.tos ^= 3,
        Step::Gap => fields.seq = fields.seq.wrapping_add(1),
        Step::SkipId => fields.id = fields.id.wrapping_add(1),
        Step::Options => fields.ip_options = vec![1; 4],
        Step::Fragment => fields.frag |= 0x2000,
        Step::Damage(_) | Step::DamageIp | Step::NoUdpChecksum | Step::Trailing | Step::Icmp => {}
    }
    (fields.ack, fields.window) = (flow.ack, flow.window);
    fields.tcp_options.clone_from(&flow.tcp_options);
    fields.payload = (0..payload_len).map(|i| (i % 251) as u8 ^ random).collect();
    flow.seq = fields.seq.wrapping_add(u32::try_from(payload_len).unwrap());
    flow.id = fields.id.wrapping_add(1);
    let mut packet = fields.build();
    match *step {
        Step::Damage(at) => {
            let l4 = l4_at(&packet);
            let at = l4 + 4 + usize::from(at) % (packet.len() - l4 - 4);
            packet[at] ^= 0x10;
        }
        Step::DamageIp if !is_v6(&packet) => packet[11] ^= 1,
        Step::NoUdpChecksum if fields.udp => {
            let at = checksum_at(&packet);
            packet[at..at + 2].fill(0);
        }
        Step::Trailing => packet.push(0),
        Step::Icmp if is_v6(&packet) => packet[6] = 58,
        Step::Icmp => packet[9] = 1,
        _ => {}
    }
    packet
}

fn burst() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let steps = vec((0..6_usize, step(), any::<u8>(), 1..20_usize), 1..40);
    (steps, vec(1..200_usize, 6), any::<u32>(), any::<bool>()).prop_map(|(steps, mss, seq, df)| {
        let mut flows: Vec<Fields> = (0..6_u8)
            .map(|i| Fields {
                v6: i % 2 == 1,
                udp: i >= 3,
                // Flows 0, 2 and 4 share addresses; the two TCP ones differ in a port.
                src_port: 4000 + u16::from(i / 2),
                frag: if df { DF } else { 0 },
                seq,
                id: 0xfff8,
                ..Fields::default()
            })
            .collect();
        let mut packets = Vec::new();
        for (flow, step, random, repeat) in steps {
            let times = if matches!(step, Step::Data(_)) {
                repeat
            } else {
                1
            };
            for _ in 0..times {
                packets.push(take(&mut flows[flow], mss[flow], &step, random));
            }
        }
        packets
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn random_bursts_coalesce_like_the_oracle(
        packets in burst(),
        segments in 1..20_u16,
        max_bytes in prop_oneof![Just(u16::MAX), 100..2000_u16],
    ) {
        let limits = Limits { tcp_segments: segments, udp_segments: segments, max_bytes, ..Limits::default() };
        let slow = SlowLimits {
            tcp_segments: usize::from(segments),
            udp_segments: usize::from(segments),
            max_bytes: usize::from(max_bytes),
        };
        let burst = Burst::push(limits, packets);
        prop_assert_eq!(burst.indices(), coalesce_slowly(&burst.packets, slow));
        burst.assert_merged_outcomes_add_up();
    }

    #[test]
    fn splitting_gives_every_packet_of_a_random_burst_back(packets in burst()) {
        let burst = Burst::push(Limits::default(), packets);
        for (superpacket, indices) in burst.assembled().iter().zip(burst.indices()) {
            let given: Vec<_> = indices.iter().map(|&i| burst.packets[i].clone()).collect();
            if let [packet] = given.as_slice() {
                prop_assert_eq!(&superpacket.packet, packet);
                prop_assert_eq!(superpacket.vnet, VnetHdr::default());
                continue;
            }
            superpacket.assert_partial_checksum();
            let back = superpacket.split();
            prop_assert_eq!(back.len(), given.len());
            for (back, given) in back.iter().zip(&given) {
                prop_assert_eq!(without_atomic_id(back), without_atomic_id(given));
            }
        }
    }

    #[test]
    fn coalescing_the_segments_of_a_superpacket_gives_it_back(
        v6: bool, udp: bool, push: bool, mss in 10..1500_usize, count in 2..40_usize, tail in 1..10_usize,
    ) {
        let flags = if push && !udp { ACK | PSH } else { ACK };
        let payload = vec![0x5a; mss * (count - 1) + tail];
        let whole = Fields { v6, udp, flags, payload, frag: 0, ..Fields::default() }.build();
        let segments = packet::split_slowly(&whole, mss);
        let [superpacket] = Burst::push(Limits::default(), segments).assembled().try_into().unwrap();
        prop_assert_eq!(superpacket.with_whole_checksum(), whole);
    }

    #[test]
    fn no_bytes_make_coalescing_panic(packets in vec(vec(any::<u8>(), 0..80), 0..20), tidy: bool) {
        let tidied = packets.into_iter().map(|mut packet| {
            if tidy && packet.len() >= 20 {
                let len = u8::try_from(packet.len()).unwrap();
                packet[..4].copy_from_slice(&[0x45, 0, 0, len]);
                packet[6..8].copy_from_slice(&[0x40, 0]);
                packet[9] = if packet[9] & 1 == 0 { 6 } else { 17 };
                packet[12..20].fill(1);
            }
            packet
        });
        let burst = Burst::push_summing(Limits::default(), tidied.collect(), |_| 0);
        let indices: usize = burst.indices().iter().map(Vec::len).sum();
        prop_assert_eq!(indices, burst.packets.len());
        burst.assembled();
    }
}

/// The packets of one flow with these payload sizes.
fn stream(fields: &Fields, payloads: &[usize]) -> Vec<Vec<u8>> {
    let mut fields = fields.clone();
    payloads
        .iter()
        .map(|&len| {
            fields.payload = (0..len).map(|i| (i % 253) as u8).collect();
            let packet = fields.build();
            fields.seq = fields.seq.wrapping_add(u32::try_from(len).unwrap());
            fields.id = fields.id.wrapping_add(1);
            packet
        })
        .collect()
}

fn handle(index: usize) -> PacketRef {
    PacketRef {
        buf: u16::try_from(index).unwrap(),
        off: 0,
        len: 0,
    }
}

fn push_all(
    limits: Limits,
    capacity: u16,
    packets: &[Vec<u8>],
    sum: fn(&[u8]) -> u16,
) -> (Coalescer, Vec<Result<Pushed, Full>>) {
    let mut coalescer = Coalescer::new(limits, capacity, sum);
    let outcomes = (0..packets.len())
        .map(|i| {
            let len = u32::try_from(packets[i].len()).unwrap();
            let packet = PacketRef { len, ..handle(i) };
            coalescer.push(packet, |at| packets[usize::from(at.buf)].as_slice())
        })
        .collect();
    (coalescer, outcomes)
}

fn outcomes(packets: Vec<Vec<u8>>) -> Vec<Result<Pushed, Full>> {
    Burst::push(Limits::default(), packets).outcomes
}

/// A pushed burst, one packet per buffer.
struct Burst {
    packets: Vec<Vec<u8>>,
    coalescer: Coalescer,
    outcomes: Vec<Result<Pushed, Full>>,
}

impl Burst {
    fn push(limits: Limits, packets: Vec<Vec<u8>>) -> Self {
        Self::push_summing(limits, packets, naive_sum)
    }

    fn push_summing(limits: Limits, packets: Vec<Vec<u8>>, sum: fn(&[u8]) -> u16) -> Self {
        let capacity = u16::try_from(packets.len()).unwrap();
        let (coalescer, outcomes) = push_all(limits, capacity, &packets, sum);
        Self {
            packets,
            coalescer,
            outcomes,
        }
    }

    /// Which packets each write holds.
    fn indices(&self) -> Vec<Vec<usize>> {
        let index = |packet: PacketRef| usize::from(packet.buf);
        self.coalescer
            .writes()
            .map(|write| match write {
                Write::Packet(packet) => vec![index(packet)],
                Write::Superpacket(superpacket) => {
                    let packets: Vec<usize> = superpacket.packets().map(index).collect();
                    assert_eq!(packets.len(), superpacket.count());
                    packets
                }
            })
            .collect()
    }

    /// What the TUN would be given, write by write.
    fn assembled(&self) -> Vec<Written> {
        let bytes_of = |at: PacketRef| {
            let packet = &self.packets[usize::from(at.buf)];
            &packet[at.off as usize..(at.off + at.len) as usize]
        };
        let assemble = |write: Write<'_>| match write {
            Write::Packet(packet) => Written {
                vnet: VnetHdr::default(),
                packet: bytes_of(packet).to_vec(),
            },
            Write::Superpacket(superpacket) => {
                let mut head = [0; HEAD_LEN];
                let first = superpacket.packets().next().unwrap();
                let len = superpacket.write_head(bytes_of(first), &mut head);
                let vnet = VnetHdr::parse(&head).unwrap();
                assert_eq!(vnet, superpacket.vnet_hdr());
                let mut packet = head[VNET_HDR_LEN..len].to_vec();
                for payload in superpacket.payloads() {
                    packet.extend(bytes_of(payload));
                }
                assert_eq!(packet.len(), superpacket.packet_len());
                Written { vnet, packet }
            }
        };
        self.coalescer.writes().map(assemble).collect()
    }

    /// The outcome of each push says whether the packet heads a write.
    fn assert_merged_outcomes_add_up(&self) {
        let heads: Vec<usize> = self.indices().iter().map(|write| write[0]).collect();
        for (i, outcome) in self.outcomes.iter().enumerate() {
            assert_eq!(
                *outcome == Ok(Pushed::Merged),
                !heads.contains(&i),
                "packet {i}: {outcome:?}"
            );
        }
    }
}

/// One write as the kernel would see it.
#[derive(Debug)]
struct Written {
    vnet: VnetHdr,
    packet: Vec<u8>,
}

impl Written {
    fn split(&self) -> Vec<Vec<u8>> {
        let split = Split::new(&self.vnet, &self.packet).unwrap();
        (0..split.count())
            .map(|i| {
                let mut header = [0; MAX_HEADER_LEN];
                let len = split.write_header(&self.packet, i, naive_sum, &mut header);
                [&header[..len], &self.packet[split.payload(i)]].concat()
            })
            .collect()
    }

    /// `NEEDS_CSUM`: the field holds the folded pseudo-header sum, and nothing else.
    fn assert_partial_checksum(&self) {
        let at = checksum_at(&self.packet);
        let expected = naive_sum(&pseudo_header(&self.packet)).to_be_bytes();
        assert_eq!(self.packet[at..at + 2], expected);
        if !is_v6(&self.packet) {
            assert_eq!(naive_sum(&self.packet[..20]), 0xffff);
        }
    }

    fn with_whole_checksum(&self) -> Vec<u8> {
        self.assert_partial_checksum();
        let mut packet = self.packet.clone();
        fix_checksums(&mut packet);
        packet
    }
}
