//! What a new table of 10 000 routes costs the one who publishes it, and what it costs a reader that one is
//! being published: a load alone, and a load while tables change as fast as they can.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};

use criterion::{Criterion, criterion_group, criterion_main};
use loden::datapath::table::Table;
use loden::datapath::{Encapsulation, PeerRoute};
use loden::route::Publisher;

const ROUTES: u32 = 10_000;

fn routes() -> Vec<PeerRoute> {
    (0..ROUTES)
        .filter_map(|i| {
            let net = ipnet::Ipv4Net::new(std::net::Ipv4Addr::from(0x2000_0000 + (i << 8)), 24);
            Some(PeerRoute {
                net: net.ok()?.into(),
                addr: (std::net::Ipv4Addr::from(0xc633_6400 + i), 8285).into(),
                mac: None,
                ecn: false,
            })
        })
        .collect()
}

fn publish(criterion: &mut Criterion) {
    let routes = routes();
    let mut group = criterion.benchmark_group("publish");
    let mut publisher = Publisher::new(Table::default());
    let mut reader = publisher.reader();

    group.bench_function("build", |b| {
        b.iter(|| {
            Table::build(
                black_box(&routes),
                Encapsulation::Plain,
                &publisher.current(),
            )
        });
    });
    group.bench_function("load", |b| {
        b.iter(|| black_box(reader.load().fib.hops().len()));
    });

    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                black_box(reader.load().fib.hops().len());
            }
        });
        group.bench_function("build_and_publish_while_read", |b| {
            b.iter(|| {
                let table = Table::build(&routes, Encapsulation::Plain, &publisher.current());
                publisher.publish(table);
            });
        });
        stop.store(true, Ordering::Relaxed);
    });

    stop.store(false, Ordering::Relaxed);
    let mut reader = publisher.reader();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let table = Table::build(&routes, Encapsulation::Plain, &publisher.current());
                publisher.publish(table);
            }
        });
        group.bench_function("load_while_published", |b| {
            b.iter(|| black_box(reader.load().fib.hops().len()));
        });
        stop.store(true, Ordering::Relaxed);
    });
    group.finish();
}

criterion_group!(benches, publish);
criterion_main!(benches);
