//! How long one lookup takes among 100 000 routes: subnets of one size, which the table indexes directly, and
//! of mixed sizes, which it keeps in a trie.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ipnet::{IpNet, Ipv4Net};
use loden::route::Fib;

const ROUTES: u32 = 100_000;
/// 32.0.0.0, so that 100 000 subnets of 256 addresses fit behind it.
const BASE: u32 = 0x2000_0000;
/// Looked up in one iteration.
const LOOKUPS: u32 = 1024;

fn net(base: u32, len: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from(base), len).trunc())
}

fn fib(criterion: &mut Criterion) {
    let equal = (0..ROUTES).map(|i| net(BASE + (i << 8), 24));
    // Every fourth subnet is twice as large, or half as large.
    let mixed = (0..ROUTES).map(|i| {
        let len = match i % 4 {
            0 => 23,
            1 => 25,
            _ => 24,
        };
        net(BASE + (i << 8), len)
    });
    let build = |nets: &mut dyn Iterator<Item = IpNet>| {
        let hops: Vec<u32> = (0..ROUTES).collect();
        Fib::build(nets.zip(0..), hops)
    };
    let tables = [
        ("equal", build(&mut equal.into_iter())),
        ("mixed", build(&mut mixed.into_iter())),
    ];
    // Destinations spread over the whole table, so that neighbours do not share cache lines.
    let addrs: Vec<IpAddr> = (0..LOOKUPS)
        .map(|i| {
            let spread = i.wrapping_mul(0x9e37_79b9) % (ROUTES << 8);
            IpAddr::V4(Ipv4Addr::from(BASE + spread))
        })
        .collect();
    let mut group = criterion.benchmark_group("fib");
    group.throughput(Throughput::Elements(u64::from(LOOKUPS)));
    for (name, table) in &tables {
        group.bench_function(*name, |b| {
            b.iter(|| {
                addrs
                    .iter()
                    .filter_map(|&addr| table.lookup(black_box(addr)))
                    .fold(0_u32, |sum, (hop, _)| sum.wrapping_add(hop))
            });
        });
    }
    group.finish();
}

criterion_group!(benches, fib);
criterion_main!(benches);
