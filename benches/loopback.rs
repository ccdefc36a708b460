//! How fast two data planes of one worker each carry packets from one to the other, without a device: socket
//! pairs stand for the TUN, loopback for the underlay. TCP superpackets of 60 KB count in bytes, UDP packets of
//! 64 bytes one at a time count in packets. The benchmark's own thread writes and reads, so this is a figure to
//! compare with itself. Once for each encapsulation.

#[path = "../tests/memory/mod.rs"]
mod memory;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use memory::{Node, TCP_PAYLOAD, UDP_PAYLOAD, VNET, pair, pod, read, write};

/// Writes `framed` `count` times to one side and reads until `payload` bytes, all of it, came out of the other.
fn carry(from: &Node, to: &Node, framed: &[u8], (count, payload, header): (usize, usize, usize)) {
    let mut buf = [0; 70_000];
    let (mut unsent, mut left) = (count, payload * count);
    while left > 0 {
        // A bounded number in flight: nothing is dropped that the loop would wait for.
        while unsent > 0 && left < (unsent + WINDOW) * payload {
            if !write(&from.tun[0], framed) {
                break;
            }
            unsent -= 1;
        }
        match read(&to.tun[0], &mut buf) {
            Some(framed) => left -= framed.len() - VNET - header,
            None => std::thread::yield_now(),
        }
    }
}

/// Packets or superpackets in flight.
const WINDOW: usize = 32;

fn loopback(criterion: &mut Criterion) {
    for (name, vxlan) in [("loopback", false), ("loopback_vxlan", true)] {
        measure(criterion, name, vxlan);
    }
}

fn measure(criterion: &mut Criterion, name: &str, vxlan: bool) {
    let (a, b) = pair(1, vxlan);
    let payload = vec![0x5a; 60_000];
    let mut group = criterion.benchmark_group(name);

    let tcp = memory::tcp_superpacket(pod(1), pod(2), 1, 1400, &payload);
    group.throughput(Throughput::Bytes(60_000 * 64));
    group.bench_function("tcp_60000", |bencher| {
        bencher.iter(|| carry(&a, &b, &tcp, (64, 60_000, TCP_PAYLOAD)));
    });

    let udp = memory::udp(pod(1), pod(2), (7, 9), &payload[..64]);
    group.throughput(Throughput::Elements(1024));
    group.bench_function("udp_64", |bencher| {
        bencher.iter(|| carry(&a, &b, &udp, (1024, 64, UDP_PAYLOAD)));
    });
    group.finish();
}

criterion_group!(benches, loopback);
criterion_main!(benches);
