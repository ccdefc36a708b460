//! What lies between two nodes: a smaller MTU, kernels that refuse GSO runs, routers that mark congestion. Needs
//! root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod net;

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;

use loden::datapath::{Datapath, EngineKind, Event};
use loden::lab::{Lab, Member, Wire, command, plan};
use loden::sys::socket::{IntOption, set};
use loden::tun::TunDevice;
use loden::underlay::Underlay;
use net::{
    Node, Shape, adds_up, ip, lab, pair, pings, pings_now, recv, run, tcp_transfer, tun_v4, tun_v6,
    wait_for,
};

/// Makes a socket send UDP over IPv4 without checksums, or with them again. Without, the kernel refuses runs
/// (`udp_send_skb`, net/ipv4/udp.c). Done by another program, because no library types the option.
fn without_checksums(socket: &OwnedFd, without: bool) {
    let (level, option, value) = (libc::SOL_SOCKET, libc::SO_NO_CHECK, i32::from(without));
    let line = format!("setsockopt(STDIN, {level}, {option}, pack('i', {value})) or die $!");
    let status = Command::new("perl")
        .args(["-e", &line])
        .stdin(socket.try_clone().unwrap())
        .status()
        .unwrap();
    assert!(status.success(), "perl: {status}");
}

/// Three nodes of which the third becomes a router in front of the second, on a wire of 1400 bytes.
fn behind_a_router() -> Lab {
    let lab = lab(3, 0, Wire::Packet);
    let [first, second, router] = [1, 2, 3].map(|n| lab.netns(Member::Node(n)));
    let (v4, v6) = (plan::underlay_v4(2), plan::underlay_v6(2));
    router
        .set_sysctls(&[("ipv6/conf/all/forwarding", "1")])
        .unwrap();
    ip(
        &router,
        &format!(
            "link add r2 mtu 1400 type veth peer name eth1 mtu 1400 netns {}",
            second.name()
        ),
    );
    let batch = |netns, lines: &[String]| command::batch(Some(netns), "ip", lines).unwrap();
    batch(
        &second,
        &[
            "link set eth0 down".to_owned(),
            "addr flush dev eth0".to_owned(),
            "link set eth1 up".to_owned(),
            format!("addr add {v4}/32 dev eth1"),
            format!("addr add {v6}/128 dev eth1 nodad"),
            format!("route add {} dev eth1", plan::underlay_v4(3)),
            // A node does not answer for another link's address, as it does for IPv4.
            "addr add 2001:db8:0:1::2/64 dev eth1 nodad".to_owned(),
            format!("route add 192.0.2.0/24 via {}", plan::underlay_v4(3)),
            format!("route add 2001:db8::/64 via 2001:db8:0:1::3 src {v6}"),
        ],
    );
    batch(
        &router,
        &[
            "link set r2 up".to_owned(),
            format!("route add {v4} dev r2"),
            "addr add 2001:db8:0:1::3/64 dev r2 nodad".to_owned(),
            format!("route add {v6} via 2001:db8:0:1::2"),
        ],
    );
    batch(
        &first,
        &[
            format!("route add {v4} via {}", plan::underlay_v4(3)),
            format!("route add {v6} via {}", plan::underlay_v6(3)),
        ],
    );
    wait_for("IPv4 through the router", || pings_now(&first, v4));
    wait_for("IPv6 through the router", || pings_now(&first, v6));
    lab
}

/// Bytes that differ from one 256 to the next.
fn pattern(len: u32) -> Vec<u8> {
    let byte = |i: u32| i.to_le_bytes()[0] ^ i.to_le_bytes()[1];
    (0..len).map(byte).collect()
}

/// A sender whose packets may not be fragmented is told the path MTU: its kernel refuses by itself then.
fn learns(from: &Node, to: &Node, inner_mtu: u16, mtu: u32) {
    let (socket, sink) = (from.udp(), to.udp());
    let sink_at = sink.local_addr().unwrap();
    let whole = pattern(mtu - 28);
    let discover = IntOption::IP_MTU_DISCOVER;
    set(socket.as_fd(), discover, libc::IP_PMTUDISC_DO).unwrap();
    wait_for("frag needed", || {
        socket
            .send_to(&whole, sink_at)
            .is_err_and(|error| error.raw_os_error() == Some(libc::EMSGSIZE))
    });
    let event = from.wait_event("the path MTU", |event| {
        matches!(event, Event::PathMtu { .. })
    });
    let Event::PathMtu { next_hop, mtu } = event else {
        unreachable!("matched above")
    };
    assert_eq!((next_hop, mtu.get()), (to.addr, 1400));
    let told = ip(&from.netns, &format!("route get {}", tun_v4(to.n)));
    assert!(told.contains(&format!("mtu {inner_mtu} ")), "{told}");
    let status = from.wait_status("the answer's count", |status| {
        status.total.encap.answered > 0
    });
    assert_eq!(status.peers[0].path_mtu, Some(1400));
    let fits = &whole[..usize::from(inner_mtu) - 28];
    socket.send_to(fits, sink_at).unwrap();
    let mut got = vec![0; 2000];
    let len = recv(&sink, &mut got);
    assert!(got[..len] == *fits, "the largest that fits");
}

/// Packets that may be fragmented arrive whole, whatever their sender believes about the path.
fn fragments(from: &Node, to: &Node, mtu: u32) {
    let (socket, sink) = (from.udp(), to.udp());
    let (whole, mut got) = (pattern(mtu - 28), vec![0; 2000]);
    let discover = IntOption::IP_MTU_DISCOVER;
    set(socket.as_fd(), discover, libc::IP_PMTUDISC_INTERFACE).unwrap();
    let before = from.status().total.encap.fragments;
    for _ in 0..10 {
        socket.send_to(&whole, sink.local_addr().unwrap()).unwrap();
        let len = recv(&sink, &mut got);
        assert!(got[..len] == whole, "fragments put together differ");
    }
    from.wait_status("two fragments each", |status| {
        status.total.encap.fragments == before + 20
    });
}

fn path_mtu(shape: &Shape, overhead: u16) {
    let lab = behind_a_router();
    let (a, b) = pair(&lab, shape);
    assert!(pings(&a.netns, tun_v4(2)));
    let inner_mtu = 1400 - overhead;
    for (from, to) in [(&a, &b), (&b, &a)] {
        learns(from, to, inner_mtu, shape.mtu);
        fragments(from, to, shape.mtu);
    }

    for (from, to) in [(&a, &b), (&b, &a)] {
        for addr in [IpAddr::V4(tun_v4(to.n)), IpAddr::V6(tun_v6(to.n))] {
            tcp_transfer(&from.netns, (&to.netns, addr), 16);
        }
    }
    let told = ip(&a.netns, &format!("route get {}", tun_v6(2)));
    assert!(told.contains(&format!("mtu {inner_mtu} ")), "{told}");
    for node in [&a, &b] {
        adds_up(&node.status());
        let news = node
            .events()
            .into_iter()
            .filter(|event| matches!(event, Event::PathMtu { .. }));
        assert_eq!(news.count(), 1, "{:?}", node.events());
        assert_eq!(node.status().peers[0].gso_withdrawn, None);
    }
}

#[test]
fn a_smaller_mtu_on_the_way_is_learned_and_told() {
    path_mtu(&Shape::default(), 28);
}

#[test]
fn a_smaller_mtu_on_an_ipv6_underlay_is_learned_and_told() {
    path_mtu(
        &Shape {
            underlay_v6: true,
            mtu: 1452,
            ..Shape::default()
        },
        48,
    );
}

#[test]
fn a_smaller_mtu_on_the_way_is_learned_and_told_in_vxlan() {
    path_mtu(&Shape::vxlan(EngineKind::Mmsg, false), 50);
}

#[test]
fn a_smaller_mtu_on_an_ipv6_underlay_is_learned_and_told_in_vxlan() {
    path_mtu(&Shape::vxlan(EngineKind::Mmsg, true), 70);
}

#[test]
fn the_portable_engine_crosses_a_smaller_mtu_with_the_kernels_help() {
    let lab = behind_a_router();
    let (a, b) = pair(&lab, &Shape::of(EngineKind::Portable));
    for (from, to) in [(&a, &b), (&b, &a)] {
        tcp_transfer(&from.netns, (&to.netns, tun_v4(to.n).into()), 16);
    }
    adds_up(&a.status());
    adds_up(&b.status());
}

/// Sends ten runs of four datagrams and waits until they were read; how many runs left the node then?
fn send_runs(node: &Node, to: u8) -> u64 {
    let before = node.status().total.encap;
    let socket = node.udp();
    set(socket.as_fd(), IntOption::UDP_SEGMENT, 300).unwrap();
    for _ in 0..10 {
        let to = SocketAddr::new(tun_v4(to).into(), 9);
        socket.send_to(&[7; 1200], to).unwrap();
    }
    let status = node.wait_status("every packet", |status| {
        status.total.encap.read >= before.read + 40
    });
    adds_up(&status);
    assert_eq!(status.total.encap.sent, before.sent + 40);
    status.total.encap.sent_superpackets - before.sent_superpackets
}

#[test]
fn refused_runs_are_replayed_and_given_up_for_that_next_hop_only() {
    let lab = lab(3, 0, Wire::Packet);
    let shape = Shape::default();
    let mut sockets: Vec<OwnedFd> = Vec::new();
    let a = Node::start_with(&lab, 1, &shape, &[1, 2, 3], |settings| {
        let underlay = Underlay::open(settings.bind, 1, true).unwrap();
        for socket in &underlay.send {
            sockets.push(socket.fd().try_clone_to_owned().unwrap());
        }
        let device = TunDevice::open(&settings.device, 1).unwrap();
        Datapath::from_parts(settings, device, underlay)
    });
    let b = Node::start(&lab, 2, &shape, &[1, 2, 3]);
    let c = Node::start(&lab, 3, &shape, &[1, 2, 3]);
    let refuse = |on| {
        for socket in &sockets {
            without_checksums(socket, on);
        }
    };
    assert!(pings(&a.netns, tun_v4(2)) && pings(&a.netns, tun_v4(3)));

    refuse(true);
    let sink = b.udp();
    let socket = a.udp();
    set(socket.as_fd(), IntOption::UDP_SEGMENT, 300).unwrap();
    let mut got = [0; 400];
    for number in 0..10_u8 {
        let payload: Vec<u8> = (0..4).flat_map(|i| [number * 4 + i; 300]).collect();
        socket
            .send_to(&payload, sink.local_addr().unwrap())
            .unwrap();
        for i in 0..4 {
            assert_eq!(recv(&sink, &mut got), 300, "nothing is lost");
            assert_eq!(got[0], number * 4 + i, "nor out of order");
        }
    }
    // What arrived is counted a moment later: two pings and ten runs.
    let status = a.wait_status("every packet", |status| status.total.encap.read >= 42);
    adds_up(&status);
    assert_eq!(
        status.total.encap.replays,
        1,
        "one run paid for all: {status:#?} {:?}",
        a.events()
    );
    let withdrawn: Vec<Event> = a
        .events()
        .into_iter()
        .filter(|event| matches!(event, Event::CapabilityWithdrawn { .. }))
        .collect();
    assert!(
        matches!(withdrawn.as_slice(), [Event::CapabilityWithdrawn {
            capability: "udp-gso",
            next_hop: Some(hop),
            reason,
        }] if *hop == b.addr && reason.contains("Invalid argument")),
        "{withdrawn:?}"
    );

    // The kernel takes runs again: they go to the node that never had trouble, and not to the other.
    refuse(false);
    assert!(send_runs(&a, 3) > 0);
    assert_eq!(send_runs(&a, 2), 0);
    let peers = a.status().peers;
    let of = |node: &Node| peers.iter().find(|peer| peer.addr == node.addr).unwrap();
    assert!(of(&b).gso_withdrawn.is_some() && of(&c).gso_withdrawn.is_none());
}

#[test]
fn an_underlay_without_checksum_offload_loses_nothing() {
    let lab = lab(2, 0, Wire::Packet);
    let (a, b) = pair(&lab, &Shape::default());
    for node in [&a, &b] {
        run(&node.netns, "ethtool", "-K eth0 tx off");
    }
    for (from, to) in [(&a, &b), (&b, &a)] {
        tcp_transfer(&from.netns, (&to.netns, tun_v4(to.n).into()), 32);
    }
    for node in [&a, &b] {
        let status = node.status();
        adds_up(&status);
        assert_eq!(status.total.encap.sent, status.total.encap.read);
    }
}
