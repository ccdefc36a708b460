//! How many bytes per second the checksum covers, for each implementation this CPU can run.
//!
//! The sizes are an IPv4 header, a small packet, a packet of an overlay MTU and a superpacket.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use loden::sys::simd;
use loden::wire::checksum::{self, SumFn};

const SIZES: [u32; 4] = [20, 64, 1400, 65_000];

fn checksum(criterion: &mut Criterion) {
    let bytes: Vec<u8> = (0..65_000u32)
        .map(|i| i.wrapping_mul(0x9e37_79b9).to_be_bytes()[0])
        .collect();
    let implementations: [(&str, SumFn); 2] =
        [("scalar", checksum::sum_scalar), ("detected", simd::sum())];

    let mut group = criterion.benchmark_group("checksum");
    for size in SIZES {
        group.throughput(Throughput::Bytes(u64::from(size)));
        for (name, sum) in implementations {
            group.bench_with_input(
                BenchmarkId::new(name, size),
                &bytes[..size as usize],
                |b, bytes| {
                    b.iter(|| sum(black_box(bytes)));
                },
            );
        }
    }
    group.finish();
}

criterion_group!(benches, checksum);
criterion_main!(benches);
