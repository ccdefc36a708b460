//! The data plane survives what happens to a node: links that go and come, peers that are not there, addresses
//! that vanish, garbage. Traffic resumes by itself. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod net;

use std::net::SocketAddr;
use std::os::fd::AsFd;

use loden::datapath::{EngineKind, Event, Status};
use loden::lab::{Member, Wire, plan};
use loden::sys::socket::{IntOption, set};
use net::{
    Node, Noise, Shape, adds_up, ip, lab, nothing_left, pair, pings, pings_now, recv, tcp_transfer,
    tun_v4, udp_at, wait_for,
};

const ENGINES: [EngineKind; 2] = [EngineKind::Mmsg, EngineKind::Portable];

/// Sends until `enough` of the status. Some at a time, so that a hundred do not take a hundred looks.
fn send_until(node: &Node, to: u8, what: &str, enough: impl Fn(&Status) -> bool) -> Status {
    let socket = node.udp();
    wait_for(what, || {
        for _ in 0..10 {
            let to = SocketAddr::new(tun_v4(to).into(), 9);
            socket.send_to(b"probe", to).unwrap();
        }
        enough(&node.status())
    });
    let status = node.status();
    adds_up(&status);
    status
}

fn down(status: &Status) -> u64 {
    status.total.encap.drops["underlay_down"]
}

#[test]
fn traffic_stops_and_resumes_with_the_underlay_link() {
    for engine in ENGINES {
        let lab = lab(2, 0, Wire::Superpacket);
        let (a, b) = pair(&lab, &Shape::of(engine));
        assert!(pings(&a.netns, tun_v4(2)));
        for _ in 0..3 {
            let before = down(&a.status());
            ip(&a.netns, "link set eth0 down");
            send_until(&a, 2, "the drops", |status| down(status) >= before + 20);
            ip(&a.netns, "link set eth0 up");
            wait_for("traffic", || pings_now(&a.netns, tun_v4(2)));
        }
        tcp_transfer(&a.netns, (&b.netns, tun_v4(2).into()), 16);
        adds_up(&a.status());
        adds_up(&b.status());
        assert!(a.events().is_empty(), "{:?}", a.events());
    }
}

#[test]
fn traffic_stops_and_resumes_with_the_underlay_address() {
    for engine in ENGINES {
        let lab = lab(2, 0, Wire::Superpacket);
        let (a, b) = pair(&lab, &Shape::of(engine));
        assert!(pings(&a.netns, tun_v4(2)));
        let addr = format!("{}/24", plan::underlay_v4(1));
        ip(&a.netns, &format!("addr del {addr} dev eth0"));
        send_until(&a, 2, "the drops", |status| down(status) >= 20);
        ip(&a.netns, &format!("addr add {addr} dev eth0"));
        wait_for("traffic", || pings_now(&a.netns, tun_v4(2)));
        tcp_transfer(&b.netns, (&a.netns, tun_v4(1).into()), 16);
        assert_eq!(a.status().peers[0].gso_withdrawn, None);
        assert!(a.events().is_empty(), "{:?}", a.events());
    }
}

#[test]
fn a_peer_without_a_daemon_is_reported_once_and_what_was_sent_counts_as_sent() {
    let lab = lab(2, 0, Wire::Superpacket);
    let shape = Shape::default();
    let a = Node::start(&lab, 1, &shape, &[1, 2]);
    let peer = shape.underlay(2);
    send_until(&a, 2, "a hundred packets", |status| {
        status.total.encap.read >= 100
    });
    let event = a.wait_event("the refusal", |_| true);
    assert_eq!(event, Event::PeerRefused { next_hop: peer });
    // The kernel tells of an earlier refusal instead of sending: nothing is lost by that.
    let status = send_until(&a, 2, "more packets", |status| {
        status.total.encap.read >= 200
    });
    assert_eq!(status.total.encap.sent, status.total.encap.read);
    assert_eq!(a.events().len(), 1, "{:?}", a.events());
    let _b = Node::start(&lab, 2, &shape, &[1, 2]);
    wait_for("traffic", || pings_now(&a.netns, tun_v4(2)));
}

#[test]
fn a_peer_that_does_not_exist_disturbs_no_other() {
    for engine in ENGINES {
        let lab = lab(2, 0, Wire::Superpacket);
        let shape = Shape::of(engine);
        let (a, b) = (
            Node::start(&lab, 1, &shape, &[1, 2, 77]),
            Node::start(&lab, 2, &shape, &[1, 2]),
        );
        let (ghost, sink) = (a.udp(), b.udp());
        let (mut got, at) = ([0; 8], sink.local_addr().unwrap());
        let to_ghost = SocketAddr::new(tun_v4(77).into(), 9);
        // Until the kernel has given up on the neighbour and said so to everyone who sent there.
        let witness = udp_at(&a.netns, SocketAddr::new(a.addr.ip(), 0));
        witness.connect(shape.underlay(77)).unwrap();
        set(witness.as_fd(), IntOption::IP_RECVERR, 1).unwrap();
        let mut number = 0_u64;
        wait_for("the neighbour's failure", || {
            ghost.send_to(b"boo", to_ghost).unwrap();
            ghost.send_to(&number.to_le_bytes(), at).unwrap();
            assert_eq!(recv(&sink, &mut got), 8);
            assert_eq!(u64::from_le_bytes(got), number, "lost because of another");
            number += 1;
            let told = witness.send(b"anybody?").err();
            told.is_some_and(|error| error.raw_os_error() == Some(libc::EHOSTUNREACH))
        });
        let status = a.wait_status("every packet", |status| {
            status.total.encap.read == 2 * number
        });
        adds_up(&status);
    }
}

#[test]
fn garbage_of_every_length_over_the_wire_leaves_the_data_plane_alive() {
    for engine in ENGINES {
        let lab = lab(2, 0, Wire::Packet);
        let (a, b) = pair(&lab, &Shape::of(engine));
        let peer = udp_at(&a.netns, SocketAddr::new(a.addr.ip(), 0));
        let mut noise = Noise::new(7);
        let mut sent = 0;
        for len in (0..1500_usize).chain([2000, 9000, 40_000, 65_507]) {
            let mut bytes = vec![0; len];
            noise.fill(&mut bytes);
            // Every other one starts as an IPv4 or IPv6 packet does.
            if let (Some(first), 1) = (bytes.first_mut(), len % 2) {
                *first = if len % 4 == 1 { 0x45 } else { 0x60 };
            }
            peer.send_to(&bytes, b.addr).unwrap();
            sent += 1;
            if sent % 50 == 0 {
                b.wait_status("garbage", |status| status.total.decap.read == sent);
            }
        }
        let status = b.wait_status("garbage", |status| status.total.decap.read == sent);
        adds_up(&status);
        assert_eq!(status.total.decap.sent, 0, "{:?}", status.total.decap);
        assert!(pings(&a.netns, tun_v4(2)));
    }
}

#[test]
fn a_device_that_is_set_down_and_up_again_carries_on() {
    for engine in ENGINES {
        let lab = lab(2, 0, Wire::Superpacket);
        let (a, b) = pair(&lab, &Shape::of(engine));
        let device = b.device().to_owned();
        ip(&b.netns, &format!("link set {device} down"));
        let dropped = |status: &Status| status.total.decap.drops["device_down"];
        send_until(&a, 2, "drops", |_| dropped(&b.status()) >= 10);
        ip(&b.netns, &format!("link set {device} up"));
        ip(
            &b.netns,
            &format!("route replace {} dev {device}", plan::NETWORK),
        );
        wait_for("traffic", || pings_now(&a.netns, tun_v4(2)));
        tcp_transfer(&a.netns, (&b.netns, tun_v4(2).into()), 16);
        adds_up(&b.status());
        assert!(
            !b.events()
                .iter()
                .any(|event| matches!(event, Event::DeviceGone { .. })),
            "{:?}",
            b.events()
        );
    }
}

#[test]
fn stopping_takes_the_device_along_and_frees_the_port() {
    for engine in ENGINES {
        let lab = lab(1, 0, Wire::Superpacket);
        let shape = Shape::of(engine);
        for _ in 0..3 {
            let node = Node::start(&lab, 1, &shape, &[1]);
            assert_eq!(node.device(), "flannel0");
            node.datapath.stop();
            nothing_left(&lab.netns(Member::Node(1)));
        }
    }
}
