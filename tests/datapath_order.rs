//! Packets of one flow leave the engine in the order in which they entered it, in superpackets or one by one,
//! whatever the number of workers.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod memory;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use memory::{Node, UDP_PAYLOAD, VNET, pair, pod};

const FLOWS: u16 = 64;
/// Datagrams per flow.
const COUNT: u64 = 1500;
/// Payload of a datagram: its number and filling.
const LEN: u16 = 300;
/// Datagrams in one superpacket.
const RUN: u64 = 20;

fn payload(numbers: std::ops::Range<u64>) -> Vec<u8> {
    numbers
        .flat_map(|number| {
            let mut bytes = [0; LEN as usize];
            bytes[..8].copy_from_slice(&number.to_le_bytes());
            bytes
        })
        .collect()
}

/// Writes numbered datagrams of every flow, each flow into one queue, every other one as superpackets, until
/// the other side has seen the end of all.
fn generate(node: &Node, (from, to): (u8, u8), seen_all: &AtomicBool) {
    let put = |queue: usize, framed: &[u8]| {
        while !memory::write(&node.tun[queue], framed) && !seen_all.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
    };
    let mut next = 0;
    while !seen_all.load(Ordering::Relaxed) {
        for flow in 0..FLOWS {
            let queue = usize::from(flow) % node.tun.len();
            let (src, dst, ports) = (pod(from), pod(to), (1000 + flow, 9));
            let numbers = next..next + RUN;
            if flow % 2 == 0 {
                let bytes = payload(numbers);
                put(
                    queue,
                    &memory::udp_superpacket(src, dst, ports, LEN, &bytes),
                );
            } else {
                for number in numbers {
                    put(
                        queue,
                        &memory::udp(src, dst, ports, &payload(number..number + 1)),
                    );
                }
            }
        }
        next += RUN;
    }
}

/// Sets a flag when it goes.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Reads until every flow has got past [`COUNT`].
fn check(node: &Node, seen_all: &AtomicBool) {
    // Also when an assertion fails: the generator must end.
    let _ended = SetOnDrop(seen_all);
    let limit = Instant::now() + Duration::from_secs(240);
    let mut last = [None; FLOWS as usize];
    let mut buf = vec![0; 70_000];
    while !last.iter().all(|last| last.is_some_and(|n| n >= COUNT)) {
        assert!(Instant::now() < limit, "the flows do not end: {last:?}");
        for tun in &node.tun {
            let Some(framed) = memory::read(tun, &mut buf) else {
                std::thread::yield_now();
                continue;
            };
            let packet = &framed[VNET..];
            let port = u16::from_be_bytes([packet[20], packet[21]]);
            let last = &mut last[usize::from(port - 1000)];
            // A superpacket's header says how it is cut; a plain packet is one datagram.
            for datagram in packet[UDP_PAYLOAD..].chunks(usize::from(LEN)) {
                assert_eq!(datagram.len(), usize::from(LEN));
                let number = u64::from_le_bytes(datagram[..8].try_into().unwrap());
                assert!(
                    last.is_none_or(|last| last < number),
                    "flow {port}: {number} after {last:?}"
                );
                *last = Some(number);
            }
        }
    }
}

fn keeps_order(workers: usize, vxlan: bool) {
    let (a, b) = pair(workers, vxlan);
    let (there, back) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| generate(&a, (1, 2), &there));
        scope.spawn(|| check(&b, &there));
        scope.spawn(|| generate(&b, (2, 1), &back));
        scope.spawn(|| check(&a, &back));
    });
    for node in [&a, &b] {
        let total = node.datapath.status().total;
        assert!(total.encap.sent_superpackets > 0 && total.decap.sent_superpackets > 0);
        for side in [total.encap, total.decap] {
            let drops: u64 = side.drops.values().sum();
            assert_eq!(side.read, side.sent + side.answered + drops);
        }
    }
}

#[test]
fn flows_keep_their_order_through_one_worker() {
    keeps_order(1, false);
}

#[test]
fn flows_keep_their_order_through_two_workers() {
    keeps_order(2, false);
}

#[test]
fn flows_keep_their_order_through_four_workers() {
    keeps_order(4, false);
}

#[test]
fn flows_keep_their_order_in_vxlan() {
    keeps_order(1, true);
    keeps_order(2, true);
}
