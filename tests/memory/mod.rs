//! Owns data planes whose TUN queues are sequenced-packet socket pairs and whose underlay is loopback: what the
//! tests and benchmarks share that look at the engine without a device. Never decides what is right.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]
#![allow(dead_code, reason = "every file uses the part that it needs")]

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use etherparse::PacketBuilder;
use loden::addr::{Mac, Mtu, Vni};
use loden::datapath::{
    Datapath, Encapsulation, EngineKind, Local, PeerRoute, Settings, SourceCheck, SourcePort,
};
use loden::sys::tun::{OFFLOAD_CSUM, OFFLOAD_TSO4, OFFLOAD_TSO6, OFFLOAD_USO4, OFFLOAD_USO6};
use loden::tun::{TunCaps, TunDevice, TunQueue};
use loden::underlay::Underlay;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};

/// Length of the virtio-net header.
pub(crate) const VNET: usize = 10;
/// Where the payload of a UDP packet without IP options begins.
pub(crate) const UDP_PAYLOAD: usize = 28;
/// The same for TCP without options.
pub(crate) const TCP_PAYLOAD: usize = 40;

/// One data plane, and the kernel's side of its TUN queues.
pub(crate) struct Node {
    pub(crate) datapath: Datapath,
    pub(crate) tun: Vec<File>,
    pub(crate) addr: SocketAddr,
}

fn subnet(n: u8) -> ipnet::IpNet {
    format!("198.18.{n}.0/24").parse().unwrap()
}

/// The pod of node `n`.
pub(crate) const fn pod(n: u8) -> [u8; 4] {
    [198, 18, n, 2]
}

/// An address of the loopback that no other node has, in this process or, likely, another, and a port that nobody has
/// there. Between finding the port and using it, another node could not have been given it.
pub(crate) fn own_addr() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = std::process::id().wrapping_mul(251) ^ NEXT.fetch_add(1, Ordering::Relaxed);
    // In 127.128.0.0/10, where nobody else looks.
    let ip = Ipv4Addr::from_bits(0x7f80_0000 | number & 0x003f_ffff);
    let free = UdpSocket::bind((ip, 0)).unwrap();
    free.local_addr().unwrap()
}

fn node(n: u8, workers: usize, vxlan: bool) -> Node {
    let addr = own_addr();
    let ip = addr.ip();
    // The port is kept for all workers.
    let underlay = Underlay::open(addr, workers, true).unwrap();
    let (mut queues, mut tun) = (Vec::new(), Vec::new());
    for _ in 0..workers {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        )
        .unwrap();
        for end in [&ours, &theirs] {
            setsockopt(end, sockopt::SndBuf, &(4 << 20)).unwrap();
        }
        queues.push(TunQueue::new(File::from(ours), None));
        tun.push(File::from(theirs));
    }
    let settings = Settings {
        engine: EngineKind::Mmsg,
        workers,
        pin: false,
        device: "memory".to_owned(),
        encapsulation: if vxlan {
            Encapsulation::Vxlan {
                vni: Vni::new(1).unwrap(),
                mac: vtep_mac(n),
            }
        } else {
            Encapsulation::Plain
        },
        bind: addr,
        mtu: Mtu::new(1472).unwrap(),
        source_check: SourceCheck::Strict,
        source_port: SourcePort::Spread,
        local: Local {
            nets: vec![subnet(n)],
            addrs: vec![ip],
            icmp_v4: Some(Ipv4Addr::new(198, 18, n, 0)),
            icmp_v6: None,
        },
        on_event: Arc::new(drop),
    };
    let device = TunDevice {
        name: "memory".to_owned(),
        caps: TunCaps {
            vnet_hdr: true,
            multi_queue: true,
            detached_writes: false,
            offloads: OFFLOAD_CSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6 | OFFLOAD_USO4 | OFFLOAD_USO6,
        },
        queues,
    };
    let datapath = Datapath::from_parts(settings, device, underlay).unwrap();
    Node {
        datapath,
        tun,
        addr,
    }
}

const fn vtep_mac(n: u8) -> Mac {
    Mac::local(n as u64)
}

/// Nodes 1 and 2, running, known to each other.
pub(crate) fn pair(workers: usize, vxlan: bool) -> (Node, Node) {
    let (mut a, mut b) = (node(1, workers, vxlan), node(2, workers, vxlan));
    let route = |n, node: &Node| PeerRoute {
        net: subnet(n),
        addr: node.addr,
        mac: vxlan.then(|| vtep_mac(n)),
        ecn: false,
    };
    a.datapath.publish(&[route(2, &b)]);
    b.datapath.publish(&[route(1, &a)]);
    a.datapath.start().unwrap();
    b.datapath.start().unwrap();
    (a, b)
}

/// Writes one framed packet; `false` when the device is full.
pub(crate) fn write(mut tun: &File, framed: &[u8]) -> bool {
    match tun.write(framed) {
        Ok(len) => {
            assert_eq!(len, framed.len());
            true
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
            false
        }
    }
}

/// Reads one framed packet into `buf`, if there is one.
pub(crate) fn read<'b>(mut tun: &File, buf: &'b mut [u8]) -> Option<&'b [u8]> {
    match tun.read(buf) {
        Ok(len) => Some(&buf[..len]),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
            None
        }
    }
}

/// A UDP packet with a plain virtio-net header.
pub(crate) fn udp(from: [u8; 4], to: [u8; 4], ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut framed = vec![0; VNET];
    PacketBuilder::ipv4(from, to, 64)
        .udp(ports.0, ports.1)
        .write(&mut framed, payload)
        .unwrap();
    framed
}

/// A UDP superpacket of datagrams with `gso_size` bytes each.
pub(crate) fn udp_superpacket(
    from: [u8; 4],
    to: [u8; 4],
    ports: (u16, u16),
    gso_size: u16,
    payload: &[u8],
) -> Vec<u8> {
    const GSO_UDP_L4: u8 = 5;
    let mut framed = udp(from, to, ports, payload);
    offload(&mut framed, GSO_UDP_L4, gso_size, 8, (17, 6));
    framed
}

/// A TCP superpacket of segments with `gso_size` bytes each.
pub(crate) fn tcp_superpacket(
    from: [u8; 4],
    to: [u8; 4],
    sequence: u32,
    gso_size: u16,
    payload: &[u8],
) -> Vec<u8> {
    const GSO_TCPV4: u8 = 1;
    let mut framed = vec![0; VNET];
    PacketBuilder::ipv4(from, to, 64)
        .tcp(40_000, 5201, sequence, 65_535)
        .ack(1)
        .write(&mut framed, payload)
        .unwrap();
    offload(&mut framed, GSO_TCPV4, gso_size, 20, (6, 16));
    framed
}

/// Fills the virtio-net header, and replaces the checksum by the sum over the pseudo-header, as the kernel does.
fn offload(
    framed: &mut [u8],
    gso_type: u8,
    gso_size: u16,
    l4_len: u16,
    (protocol, csum_offset): (u8, u16),
) {
    const NEEDS_CSUM: u8 = 1;
    let (header, packet) = framed.split_at_mut(VNET);
    header[0] = NEEDS_CSUM;
    header[1] = gso_type;
    for (at, value) in [(2, 20 + l4_len), (4, gso_size), (6, 20), (8, csum_offset)] {
        header[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    let l4 = u32::try_from(packet.len() - 20).unwrap();
    let words = packet[12..20].chunks_exact(2);
    let mut sum: u32 = words
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    sum += u32::from(protocol) + l4;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let at = 20 + usize::from(csum_offset);
    packet[at..at + 2].copy_from_slice(&u16::try_from(sum).unwrap().to_be_bytes());
}
