//! What do splitting, coalescing and planning cost per packet, with and without the checksum?
//!
//! Names ending in `/pretend` run with a checksum function that answers without reading: what is left is
//! the cost of the offload itself. Names ending in `/word` run with a plain 64-bit sum.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a benchmark may panic, and its packets are small"
)]

#[expect(dead_code, reason = "only its packet builder is needed here")]
#[path = "../tests/offload_support/packet.rs"]
mod packet;

use std::hint::black_box;
use std::sync::atomic::{AtomicU16, Ordering};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use loden::offload::coalesce::{Coalescer, HEAD_LEN, Limits, PacketRef, Pushed, Write};
use loden::offload::gso::{Planner, RunKey, RunLimits};
use loden::offload::split::{MAX_HEADER_LEN, Split};
use loden::offload::vnet_hdr::{Gso, VnetHdr};
use packet::{Fields, naive_sum, pseudo_header};

/// The answer of [`pretend_sum`]: what makes packets of one size between two addresses verify.
static PRETENDED: AtomicU16 = AtomicU16::new(0);

fn pretend_sum(_: &[u8]) -> u16 {
    PRETENDED.load(Ordering::Relaxed)
}

/// One's-complement addition is the same in either byte order (RFC 1071 section 2B).
fn word_sum(bytes: &[u8]) -> u16 {
    let (words, tail) = bytes.as_chunks::<4>();
    let mut sum: u64 = words
        .iter()
        .map(|&word| u64::from(u32::from_ne_bytes(word)))
        .sum();
    let mut last = [0; 4];
    last[..tail.len()].copy_from_slice(tail);
    sum += u64::from(u32::from_ne_bytes(last));
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::from_be(sum as u16)
}

fn split(c: &mut Criterion) {
    let payload = vec![0x5a; 65535 - 52];
    let fields = Fields {
        tcp_options: vec![1; 12],
        payload,
        ..Fields::default()
    };
    let packet = fields.build();
    let vnet = VnetHdr {
        needs_csum: true,
        gso: Gso::TcpV4 { ecn: false },
        gso_size: 1448,
        csum_start: 20,
        csum_offset: 16,
        ..VnetHdr::default()
    };
    let mut group = c.benchmark_group("split/tcp_v4_64k_46_segments");
    group.throughput(Throughput::Bytes(packet.len() as u64));
    for (name, sum) in [
        ("pretend", pretend_sum as fn(&[u8]) -> u16),
        ("word", word_sum),
    ] {
        let mut slab = vec![[0; MAX_HEADER_LEN]; 64];
        group.bench_function(name, |b| {
            b.iter(|| {
                let split = Split::new(black_box(&vnet), black_box(&packet)).unwrap();
                for (i, header) in slab.iter_mut().enumerate().take(split.count()) {
                    black_box(split.write_header(&packet, i, sum, header));
                }
                split.count()
            });
        });
    }
    group.finish();
}

/// Packets of `flows` flows, interleaved, of one size.
fn burst(flows: u16, count: u32, whole: &Fields) -> Vec<Vec<u8>> {
    (0..count)
        .map(|i| {
            let (round, flow) = (i / u32::from(flows), i % u32::from(flows));
            let seq = 1000 + round * whole.payload.len() as u32;
            let src_port = 4000 + flow as u16;
            Fields {
                seq,
                src_port,
                id: round as u16,
                ..whole.clone()
            }
            .build()
        })
        .collect()
}

fn coalesce(c: &mut Criterion) {
    let tcp = Fields {
        tcp_options: vec![1; 12],
        payload: vec![0x5a; 1448],
        ..Fields::default()
    };
    let tcp_v6 = Fields {
        v6: true,
        ..tcp.clone()
    };
    let udp = Fields {
        udp: true,
        payload: vec![0x5a; 64],
        ..Fields::default()
    };
    let bursts = [
        ("tcp_v4_1448x44_1_flow", burst(1, 44, &tcp)),
        ("tcp_v4_1448x44_8_flows", burst(8, 44, &tcp)),
        ("tcp_v6_1448x44_8_flows", burst(8, 44, &tcp_v6)),
        ("udp_v4_64x64_1_flow", burst(1, 64, &udp)),
        ("udp_v4_64x64_64_flows_alone", burst(64, 64, &udp)),
    ];
    let mut group = c.benchmark_group("coalesce");
    for (name, packets) in &bursts {
        let refs: Vec<PacketRef> = packets
            .iter()
            .enumerate()
            .map(|(i, packet)| PacketRef {
                buf: i as u16,
                off: 0,
                len: packet.len() as u32,
            })
            .collect();
        PRETENDED.store(sum_that_verifies(&packets[0]), Ordering::Relaxed);
        group.throughput(Throughput::Elements(packets.len() as u64));
        for (kind, sum) in [
            ("pretend", pretend_sum as fn(&[u8]) -> u16),
            ("word", word_sum),
        ] {
            let mut coalescer = Coalescer::new(Limits::default(), 8192, sum);
            let mut head = [0; HEAD_LEN];
            group.bench_function(BenchmarkId::new(*name, kind), |b| {
                b.iter(|| {
                    coalescer.clear();
                    let bytes_of = |at: PacketRef| packets[usize::from(at.buf)].as_slice();
                    let mut merged = 0;
                    for &packet in black_box(&refs) {
                        let pushed = coalescer.push(packet, bytes_of).unwrap();
                        merged += u32::from(pushed == Pushed::Merged);
                    }
                    for write in coalescer.writes() {
                        match write {
                            Write::Packet(packet) => {
                                black_box(packet);
                            }
                            Write::Superpacket(superpacket) => {
                                for payload in superpacket.payloads() {
                                    black_box(payload);
                                }
                                let first = superpacket.packets().next().map(bytes_of).unwrap();
                                black_box(superpacket.write_head(first, &mut head));
                            }
                        }
                    }
                    merged
                });
            });
            let expected = if name.ends_with("alone") {
                64
            } else {
                packets.len().min(8)
            };
            assert!(
                coalescer.writes().len() <= expected,
                "{name} does not merge"
            );
        }
    }
    group.finish();
}

/// What the transport bytes of `packet` and all its like must sum to.
fn sum_that_verifies(packet: &[u8]) -> u16 {
    !naive_sum(&pseudo_header(packet))
}

fn plan(c: &mut Criterion) {
    let limits = RunLimits {
        gso: true,
        max_segments: 64,
        max_bytes: RunLimits::MAX_BYTES_V4,
    };
    let mut group = c.benchmark_group("plan");
    for (name, hops, len) in [("1448x45_1_hop", 1, 1476), ("1448x360_8_hops", 8, 1476)] {
        let count = 45 * hops;
        let keys: Vec<RunKey> = (0..count)
            .map(|i| RunKey {
                source: (i % hops) as u16,
                next_hop: i % hops,
                tos: 0,
            })
            .collect();
        group.throughput(Throughput::Elements(u64::from(count)));
        let mut planner = Planner::new(1024, 16);
        group.bench_function(name, |b| {
            b.iter(|| {
                planner.clear();
                for &key in black_box(&keys) {
                    planner.push(key, len, &limits).unwrap();
                }
                for source in planner.sources() {
                    for run in planner.runs_of(source) {
                        planner.segments(run).for_each(|segment| {
                            black_box(segment);
                        });
                    }
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, split, coalesce, plan);
criterion_main!(benches);
