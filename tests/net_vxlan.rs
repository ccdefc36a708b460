//! The data plane's VXLAN against the kernel's: a device made by hand exactly as flannel makes it, in both
//! directions, over and within both address families. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod net;

use std::net::IpAddr;
use std::os::fd::AsFd;

use loden::bench::system::Path;
use loden::datapath::EngineKind;
use loden::lab::{Member, NetNs, Wire};
use loden::sys::socket::{IntOption, set};
use net::{
    Node, Noise, Shape, adds_up, kernel_vtep, lab, pings, recv, recv_from, tcp_transfer, tun_v4,
    tun_v6, udp_at,
};

const ENGINES: [EngineKind; 2] = [EngineKind::Mmsg, EngineKind::Portable];
/// 4 MiB: hundreds of bursts.
const CHUNKS: usize = 64;

/// Datagrams of every length up to the largest that fits, in both directions, compared byte by byte.
fn every_length(from: &NetNs, (there, to): (&NetNs, IpAddr), mtu: u32) {
    let sink = udp_at(there, (to, 0).into());
    let socket = udp_at(from, (to_any(to), 0).into());
    let headers = if to.is_ipv4() { 28 } else { 48 };
    let largest = usize::try_from(mtu).unwrap() - headers;
    let (mut sent, mut got) = (vec![0; largest], vec![0; 2000]);
    let mut noise = Noise::new(u64::from(mtu));
    let at = sink.local_addr().unwrap();
    for len in 0..=largest {
        noise.fill(&mut sent[..len]);
        socket.send_to(&sent[..len], at).unwrap();
        let (arrived, source) = recv_from(&sink, &mut got);
        assert!(got[..arrived] == sent[..len], "{len} bytes there");
        sink.send_to(&got[..arrived], source).unwrap();
        let back = recv(&socket, &mut got);
        assert!(got[..back] == sent[..len], "{len} bytes and back");
    }
}

/// A datagram socket's runs, which the kernel cuts late or never, arrive as the datagrams they are.
fn runs(from: &NetNs, (there, to): (&NetNs, IpAddr)) {
    const LEN: usize = 700;
    let sink = udp_at(there, (to, 0).into());
    let socket = udp_at(from, (to_any(to), 0).into());
    set(
        socket.as_fd(),
        IntOption::UDP_SEGMENT,
        i32::try_from(LEN).unwrap(),
    )
    .unwrap();
    let mut noise = Noise::new(7);
    let (mut sent, mut got) = (vec![0; 20 * LEN + 1], vec![0; 2000]);
    for _ in 0..20 {
        noise.fill(&mut sent);
        socket.send_to(&sent, sink.local_addr().unwrap()).unwrap();
        for datagram in sent.chunks(LEN) {
            let len = recv(&sink, &mut got);
            assert!(got[..len] == *datagram, "{len} bytes");
        }
    }
}

const fn to_any(to: IpAddr) -> IpAddr {
    match to {
        IpAddr::V4(_) => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
    }
}

fn speaks_with_the_kernel(shape: &Shape, wire: Wire) {
    let lab = lab(2, 0, wire);
    let there = kernel_vtep(&lab, shape, 2, &[1]);
    let node = Node::start(&lab, 1, shape, &[1, 2]);
    for (ours, theirs) in [
        (IpAddr::V4(tun_v4(1)), IpAddr::V4(tun_v4(2))),
        (IpAddr::V6(tun_v6(1)), IpAddr::V6(tun_v6(2))),
    ] {
        assert!(pings(&node.netns, theirs), "to {theirs}");
        assert!(pings(&there, ours), "from {theirs}");
        tcp_transfer(&node.netns, (&there, theirs), CHUNKS);
        tcp_transfer(&there, (&node.netns, ours), CHUNKS);
        every_length(&node.netns, (&there, theirs), shape.mtu);
        runs(&node.netns, (&there, theirs));
        runs(&there, (&node.netns, ours));
    }
    let status = node.status();
    adds_up(&status);
    let peer = &status.peers[0];
    // 4 MiB in packets of at most 1450 bytes, each way and in each family: superpackets count as what they hold.
    let least = ((2 * CHUNKS) << 16) as u64 / 1450;
    assert!(peer.sent > least && peer.received > least, "{peer:?}");
    assert_eq!(peer.dropped, 0, "{:?}", status.total.decap);
    assert_eq!(peer.gso_withdrawn, None);
}

#[test]
fn both_engines_speak_with_the_kernels_vxlan_over_ipv4() {
    for engine in ENGINES {
        speaks_with_the_kernel(&Shape::vxlan(engine, false), Wire::Packet);
    }
}

#[test]
fn both_engines_speak_with_the_kernels_vxlan_over_ipv6() {
    for engine in ENGINES {
        speaks_with_the_kernel(&Shape::vxlan(engine, true), Wire::Packet);
    }
}

#[test]
fn both_engines_speak_with_the_kernels_vxlan_over_a_wire_that_passes_superpackets() {
    for engine in ENGINES {
        speaks_with_the_kernel(&Shape::vxlan(engine, false), Wire::Superpacket);
    }
}

/// Pods behind both: what is forwarded takes other ways through the kernel's VXLAN than what is sent by the node.
#[test]
fn pods_reach_pods_behind_a_kernel_vtep() {
    for wire in [Wire::Superpacket, Wire::Packet] {
        let lab = lab(2, 1, wire);
        let shape = Shape::vxlan(EngineKind::Mmsg, false);
        let [here, there] = [1, 2].map(|n| {
            let pod = lab.netns(Member::Pod(n, 1));
            net::ip(&pod, &format!("link set eth0 mtu {}", shape.mtu));
            (pod, IpAddr::V4(lab.pod_addr(n, 1).unwrap()))
        });
        kernel_vtep(&lab, &shape, 2, &[1]);
        let node = Node::start(&lab, 1, &shape, &[1, 2]);
        for ((from, _), (to, addr)) in [(&here, &there), (&there, &here)] {
            assert!(pings(from, *addr));
            tcp_transfer(from, (to, *addr), CHUNKS);
            every_length(from, (to, *addr), shape.mtu);
            runs(from, (to, *addr));
        }
        for (from, to) in [(1, 2), (2, 1)] {
            let path = Path::of_pods(&lab, from, to).unwrap();
            let result = loden::bench::iperf::run(&lab, &path, 4, false, 1).unwrap();
            assert!(result.bytes > 0.0, "{result:?}");
        }
        let status = node.status();
        adds_up(&status);
        assert_eq!(status.peers[0].dropped, 0, "{:?}", status.total.decap);
        assert!(status.total.decap.sent_superpackets > 0);
    }
}
