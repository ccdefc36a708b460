//! A capture takes nothing from the traffic: under overload and with a reader that does not read, every packet
//! is still accounted for, by the data plane and by the capture. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod net;

use loden::datapath::tap::{Capture, Direction, MAX_SNAP_LEN, RING_LEN, Record, Wanted};
use loden::datapath::{EngineKind, Status};
use loden::lab::Wire;
use net::{Node, Shape, adds_up, lab, pair};

fn wanted(segments: bool) -> Wanted {
    Wanted {
        filter: "udp port 9".parse().unwrap(),
        snap_len: MAX_SNAP_LEN,
        segments,
    }
}

fn records(capture: &mut Capture) -> Vec<Record> {
    let mut bytes = Vec::new();
    loop {
        let before = bytes.len();
        capture.take(&mut bytes, 1 << 20);
        if bytes.len() == before {
            break;
        }
    }
    let (mut records, mut rest) = (Vec::new(), &bytes[..]);
    while !rest.is_empty() {
        let (record, _, after) = Record::decode(rest).unwrap();
        records.push(record);
        rest = after;
    }
    records
}

const fn encap_read(status: &Status) -> u64 {
    status.total.encap.read
}

/// Sends datagrams of 1400 bytes from one node until its data plane has read `count` more.
fn flood(a: &Node, b: &Node, count: u64) {
    let before = encap_read(&a.status());
    let socket = a.udp();
    let to = (net::tun_v4(b.n), 9);
    while encap_read(&a.status()) < before + count {
        for _ in 0..64 {
            // A full queue of the device is part of an overload.
            let _full = socket.send_to(&[7; 1400], to);
        }
    }
}

fn nobody_reads(engine: EngineKind) {
    let lab = lab(2, 0, Wire::Packet);
    let shape = Shape {
        workers: 2,
        ..Shape::of(engine)
    };
    let (a, b) = pair(&lab, &shape);
    // Where datagrams are refused the kernel answers, and answers are no datagrams to port 9.
    let _sink = net::udp_at(&b.netns, (net::tun_v4(b.n), 9).into());
    let before = [a.status(), b.status()];
    let mut whole = a.datapath.taps().capture(wanted(false)).unwrap();
    let mut segments = a.datapath.taps().capture(wanted(true)).unwrap();
    let mut received = b.datapath.taps().capture(wanted(false)).unwrap();
    // Four times what a ring holds, even if all of it went through one.
    flood(&a, &b, 4 * RING_LEN as u64 / 1400);
    // What was on its way when the flood ended is read now: what has come to each capture, and what it lost, is what
    // passed, and stays so.
    let mut captures = [
        (&mut whole, Direction::Encap, 0),
        (&mut segments, Direction::Encap, 0),
        (&mut received, Direction::Decap, 0),
    ];
    let mut last = None;
    net::wait_for("an account of every packet that passed", || {
        let now = [&a, &b].map(Node::status);
        now.iter().for_each(adds_up);
        let encap = encap_read(&now[0]) - encap_read(&before[0]);
        let decap = now[1].total.decap.read - before[1].total.decap.read;
        let accounted = captures.iter_mut().all(|(capture, direction, seen)| {
            for record in records(capture) {
                assert_eq!(record.direction, *direction);
                *seen += u64::from(record.packets);
            }
            let passed = match direction {
                Direction::Encap => encap,
                Direction::Decap => decap,
            };
            *seen + capture.lost().packets == passed
        });
        let stood = last.replace((encap, decap)) == Some((encap, decap));
        loden::lab::wait::pause(std::time::Duration::from_millis(50));
        accounted && stood
    });
    for (capture, direction, _) in captures {
        let lost = capture.lost();
        assert!(
            lost.records > 0,
            "{direction:?}: the reader was not slow enough"
        );
    }
}

#[test]
fn nobody_reads_and_the_fast_engine_loses_no_packet_to_it() {
    nobody_reads(EngineKind::Mmsg);
}

#[test]
fn nobody_reads_and_the_portable_engine_loses_no_packet_to_it() {
    nobody_reads(EngineKind::Portable);
}

#[test]
fn capture_ends_with_the_data_plane_and_a_new_one_begins_with_the_next() {
    let lab = lab(2, 0, Wire::Packet);
    let (a, b) = pair(&lab, &Shape::default());
    let _sink = net::udp_at(&b.netns, (net::tun_v4(b.n), 9).into());
    let mut capture = a.datapath.taps().capture(wanted(false)).unwrap();
    flood(&a, &b, 10);
    assert!(!capture.is_over());
    let Node { datapath, .. } = a;
    datapath.stop();
    assert!(capture.is_over());
    assert!(!records(&mut capture).is_empty(), "what was seen is kept");
}
