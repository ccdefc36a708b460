//! The data plane against a peer that is not ours, and between all combinations of address families: pings and
//! whole TCP transfers. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod net;

use std::net::{IpAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::process::Command;

use loden::datapath::EngineKind;
use loden::lab::{Lab, Member, Wire};
use net::{Node, Shape, adds_up, ip, lab, pair, pings, tcp_transfer, tun_v4, tun_v6, wait_for};

/// 4 MiB: hundreds of bursts.
const CHUNKS: usize = 64;

/// `socat` as node 2: a TUN device and a UDP socket that exchange what they read, in the raw format.
fn socat(lab: &Lab, shape: &Shape) -> loden::lab::process::Tracked {
    let (here, there) = (shape.underlay(2), shape.underlay(1));
    let mut command = Command::new("socat");
    command.args([
        format!("TUN:{}/16,tun-name=raw0,iff-no-pi,up", tun_v4(2)),
        format!("UDP-DATAGRAM:{there},bind={here}"),
    ]);
    let netns = lab.netns(Member::Node(2));
    // Without a link-local address the kernel sends nothing of its own through the device.
    netns
        .set_sysctls(&[("ipv6/conf/default/addr_gen_mode", "1")])
        .unwrap();
    let socat = lab.spawn(Member::Node(2), "socat", &mut command).unwrap();
    wait_for("socat's device", || {
        loden::lab::command::run(Some(&netns), "ip", &["route", "get", "198.18.1.0"])
            .is_ok_and(|route| route.contains("raw0"))
    });
    ip(&netns, &format!("link set raw0 mtu {}", shape.mtu));
    socat
}

fn speaks_with_socat(engine: EngineKind) {
    let lab = lab(2, 0, Wire::Superpacket);
    let shape = Shape::of(engine);
    let mut socat = socat(&lab, &shape);
    let node = Node::start(&lab, 1, &shape, &[1, 2]);
    let there = lab.netns(Member::Node(2));
    assert!(pings(&node.netns, tun_v4(2)));
    assert!(pings(&there, tun_v4(1)));
    tcp_transfer(&node.netns, (&there, tun_v4(2).into()), CHUNKS);
    tcp_transfer(&there, (&node.netns, tun_v4(1).into()), CHUNKS);
    socat.check_running().unwrap();
    // 4 MiB in packets of at most 1472 bytes, each way. What arrived is counted a moment later.
    let least = (CHUNKS << 16) as u64 / 1472;
    let status = node.wait_status("every packet's count", |status| {
        let peer = &status.peers[0];
        peer.sent > least && peer.received > least
    });
    adds_up(&status);
    assert_eq!(status.peers[0].dropped, 0, "{:?}", status.total.decap.drops);
}

#[test]
fn the_batched_engine_speaks_with_socat() {
    speaks_with_socat(EngineKind::Mmsg);
}

#[test]
fn the_portable_engine_speaks_with_socat() {
    speaks_with_socat(EngineKind::Portable);
}

/// Pings and transfers both ways, of each of the inner families given.
fn carries(shape: &Shape, inner: &[fn(u8) -> IpAddr]) {
    let lab = lab(2, 0, Wire::Packet);
    let (a, b) = pair(&lab, shape);
    for addr in inner {
        for (from, to) in [(&a, &b), (&b, &a)] {
            assert!(pings(&from.netns, addr(to.n)), "{} to {}", from.n, to.n);
            tcp_transfer(&from.netns, (&to.netns, addr(to.n)), CHUNKS / 2);
        }
    }
    adds_up(&a.status());
    adds_up(&b.status());
}

fn v4(n: u8) -> IpAddr {
    tun_v4(n).into()
}

fn v6(n: u8) -> IpAddr {
    tun_v6(n).into()
}

#[test]
fn both_families_cross_an_ipv4_underlay() {
    carries(&Shape::default(), &[v4, v6]);
}

#[test]
fn both_families_cross_an_ipv6_underlay() {
    carries(
        &Shape {
            underlay_v6: true,
            mtu: 1452,
            ..Shape::default()
        },
        &[v4, v6],
    );
}

#[test]
fn the_portable_engine_carries_both_families_over_both() {
    for (underlay_v6, mtu) in [(false, 1472), (true, 1452)] {
        carries(
            &Shape {
                engine: EngineKind::Portable,
                underlay_v6,
                mtu,
                ..Shape::default()
            },
            &[v4, v6],
        );
    }
}

/// Puts destination options with nothing but padding into every packet of a socket (ipv6(7)). Done by another program,
/// because no library types the option.
fn with_destination_options(socket: &TcpStream) {
    let (level, option) = (libc::IPPROTO_IPV6, libc::IPV6_DSTOPTS);
    let line = format!("setsockopt(STDIN, {level}, {option}, pack('C8', 0, 0, 1, 4)) or die $!");
    let stdin = socket.as_fd().try_clone_to_owned().unwrap();
    let status = Command::new("perl")
        .args(["-e", &line])
        .stdin(stdin)
        .status();
    assert!(status.unwrap().success(), "perl");
}

#[test]
fn superpackets_with_ipv6_extension_headers_arrive_as_the_packets_they_are() {
    let lab = lab(2, 0, Wire::Packet);
    let (a, b) = pair(&lab, &Shape::default());
    let to = (&b.netns, v6(2));
    net::tcp_transfer_with(&a.netns, to, CHUNKS, with_destination_options);
    let status = a.status();
    adds_up(&status);
    let encap = &status.total.encap;
    assert!(encap.read_superpackets > 0, "{encap:?}");
    assert_eq!(encap.drops["bad_vnet_header"], 0, "{encap:?}");
}

#[test]
fn the_engines_speak_with_each_other() {
    let lab = lab(2, 0, Wire::Superpacket);
    let a = Node::start(&lab, 1, &Shape::of(EngineKind::Mmsg), &[1, 2]);
    let b = Node::start(&lab, 2, &Shape::of(EngineKind::Portable), &[1, 2]);
    for (from, to) in [(&a, &b), (&b, &a)] {
        tcp_transfer(&from.netns, (&to.netns, v4(to.n)), CHUNKS);
    }
    adds_up(&a.status());
    adds_up(&b.status());
}
