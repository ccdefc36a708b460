//! Owns the UDP sockets on the underlay and what they can do. Never interprets packets.
//!
//! Each worker receives on its own socket on the tunnel port (`SO_REUSEPORT`), so the kernel spreads peers
//! over workers by the outer 4-tuple. Sending uses a small fixed set of sockets on ports of their own, one
//! chosen by the inner flow's hash alone, whichever worker sends: one inner flow is always one outer flow,
//! and so always one receiving worker. Nothing listens on those ports but their error queues. With
//! [`SourcePort::Fixed`](crate::datapath::SourcePort) sending uses the receiving sockets instead.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::offload::gso::RunLimits;
use crate::sys::mmsg::{Entry, SendBatch};
use crate::sys::socket::{self, IntOption};

/// Outer source ports of a node. More spread better over receivers; each costs one system call per burst that
/// touches it.
pub const SOURCE_PORTS: usize = 8;

/// What a receive socket must hold while its worker is away: 10 Gb/s for 10 ms.
const RECEIVE_BUFFER: usize = 10_000_000_000 / 8 / 100;
/// What a send socket may have in flight below it: the same.
const SEND_BUFFER: usize = RECEIVE_BUFFER;
/// `IP_PMTUDISC_DO` and `IPV6_PMTUDISC_DO`: always set DF, keep to the path MTU, report what exceeds it.
const PMTUDISC_DO: libc::c_int = libc::IP_PMTUDISC_DO;

/// The most datagrams one `UDP_SEGMENT` message may be cut into (`UDP_MAX_SEGMENTS`): this since Linux 6.9.
const MAX_SEGMENTS: u16 = 128;
/// The same before.
const OLD_MAX_SEGMENTS: u16 = 64;

/// What the sockets can do, as probed when they were opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpCaps {
    /// `UDP_SEGMENT` works.
    pub gso: bool,
    /// `UDP_GRO` works.
    pub gro: bool,
    /// `SO_REUSEPORT` works.
    pub reuse_port: bool,
    /// Most datagrams in one GSO run.
    pub max_segments: u16,
    /// Most bytes in one GSO run: the largest UDP payload of the family.
    pub max_run_len: u32,
    /// Receive buffer granted, in bytes, as the kernel counts (twice what was asked).
    pub receive_buffer: usize,
    /// Send buffer granted.
    pub send_buffer: usize,
    /// Receive buffer wanted, in the kernel's count.
    pub wanted_buffer: usize,
}

impl UdpCaps {
    /// A socket that can do nothing beyond sending and receiving.
    pub const NONE: Self = Self {
        gso: false,
        gro: false,
        reuse_port: false,
        max_segments: 1,
        max_run_len: RunLimits::MAX_BYTES_V4,
        receive_buffer: 0,
        send_buffer: 0,
        wanted_buffer: 0,
    };
}

/// One UDP socket.
pub struct UnderlaySocket {
    socket: Socket,
    addr: SocketAddr,
}

impl UnderlaySocket {
    /// The descriptor for batches.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The descriptor to wait on.
    #[must_use]
    pub fn raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Where it is bound.
    #[must_use]
    pub const fn addr(&self) -> SocketAddr {
        self.addr
    }
}

/// All sockets of a node.
pub struct Underlay {
    /// One per worker, on the tunnel port.
    pub receive: Vec<UnderlaySocket>,
    /// Send-only sockets; empty when sending uses the receiving ones.
    pub send: Vec<UnderlaySocket>,
    /// What they can do.
    pub caps: UdpCaps,
}

impl Underlay {
    /// Opens `workers` receive sockets on `bind` and, when `spread`, the send sockets.
    ///
    /// # Errors
    /// The kernel's: `EADDRINUSE` when somebody holds the port without `SO_REUSEPORT`, `EADDRNOTAVAIL` when
    /// the address is not on this host.
    pub fn open(bind: SocketAddr, workers: usize, spread: bool) -> io::Result<Self> {
        let mut caps = UdpCaps {
            gso: false,
            gro: true,
            reuse_port: true,
            max_segments: OLD_MAX_SEGMENTS,
            max_run_len: if bind.is_ipv4() {
                RunLimits::MAX_BYTES_V4
            } else {
                RunLimits::MAX_BYTES_V6
            },
            receive_buffer: usize::MAX,
            send_buffer: usize::MAX,
            wanted_buffer: 2 * RECEIVE_BUFFER,
        };
        let mut receive = Vec::with_capacity(workers);
        for _ in 0..workers {
            let socket = open(bind.ip(), &mut caps)?;
            caps.reuse_port &= socket.set_reuse_port(true).is_ok();
            if !caps.reuse_port && !receive.is_empty() {
                break;
            }
            caps.gro &= socket::set(socket.as_fd(), IntOption::UDP_GRO, 1).is_ok();
            receive.push(bound(socket, bind)?);
        }
        let mut send = Vec::new();
        if spread {
            for _ in 0..SOURCE_PORTS {
                let socket = open(bind.ip(), &mut caps)?;
                socket::refuse_all(socket.as_fd())?;
                send.push(bound(socket, SocketAddr::new(bind.ip(), 0))?);
            }
        }
        if let Some(max) = probe_gso(bind.ip()) {
            caps.gso = true;
            caps.max_segments = max;
        }
        Ok(Self {
            receive,
            send,
            caps,
        })
    }
}

/// A socket with everything set that both kinds share.
fn open(ip: IpAddr, caps: &mut UdpCaps) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address((ip, 0).into()),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    socket.set_nonblocking(true)?;
    let fd = socket.as_fd();
    let (discover, errors, class) = match ip {
        IpAddr::V4(_) => (
            IntOption::IP_MTU_DISCOVER,
            IntOption::IP_RECVERR,
            IntOption::IP_RECVTOS,
        ),
        IpAddr::V6(_) => {
            socket.set_only_v6(true)?;
            (
                IntOption::IPV6_MTU_DISCOVER,
                IntOption::IPV6_RECVERR,
                IntOption::IPV6_RECVTCLASS,
            )
        }
    };
    socket::set(fd, discover, PMTUDISC_DO)?;
    socket::set(fd, errors, 1)?;
    socket::set(fd, class, 1)?;
    // Beyond rmem_max where we may; else as much as the limit gives, which status reports.
    let want = |bytes: usize| libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    if socket::set(fd, IntOption::SO_RCVBUFFORCE, want(RECEIVE_BUFFER)).is_err() {
        socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    }
    if socket::set(fd, IntOption::SO_SNDBUFFORCE, want(SEND_BUFFER)).is_err() {
        socket.set_send_buffer_size(SEND_BUFFER)?;
    }
    caps.receive_buffer = caps.receive_buffer.min(socket.recv_buffer_size()?);
    caps.send_buffer = caps.send_buffer.min(socket.send_buffer_size()?);
    Ok(socket)
}

fn bound(socket: Socket, bind: SocketAddr) -> io::Result<UnderlaySocket> {
    socket.bind(&SockAddr::from(bind))?;
    let addr = socket.local_addr()?.as_socket().unwrap_or(bind);
    Ok(UnderlaySocket { socket, addr })
}

/// Asks the kernel for the longest run it takes: one-byte datagrams from a throw-away socket to itself. `None`
/// when it does not know `UDP_SEGMENT`. The datagrams go nowhere else: the destination is the socket itself, and
/// they go with it when it is closed.
fn probe_gso(ip: IpAddr) -> Option<u16> {
    let domain = Domain::for_address((ip, 0).into());
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)).ok()?;
    socket::set(socket.as_fd(), IntOption::UDP_SEGMENT, 0).ok()?;
    socket::refuse_all(socket.as_fd()).ok()?;
    socket.bind(&SockAddr::from(SocketAddr::new(ip, 0))).ok()?;
    let to = socket.local_addr().ok()?;
    let payload = [0; MAX_SEGMENTS as usize];
    let mut batch = SendBatch::new(1, 1);
    let mut sending = batch.start();
    let entry = Entry {
        to: &to,
        segment_len: Some(1),
        tos: 0,
    };
    sending.push(entry, std::iter::once(payload.as_slice()));
    // Only "too many segments" is EINVAL here; a host without its loopback up cannot tell, and gets the old
    // limit, which every kernel with UDP_SEGMENT takes.
    Some(if sending.send(socket.as_fd(), 0).is_ok() {
        MAX_SEGMENTS
    } else {
        OLD_MAX_SEGMENTS
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mmsg::RecvBatch;

    #[test]
    fn workers_share_the_port_and_send_sockets_have_their_own() {
        let one = Underlay::open("127.0.0.1:0".parse().unwrap(), 1, false).unwrap();
        let bind = one.receive[0].addr();
        assert!(one.send.is_empty());
        let two = Underlay::open(bind, 2, true).unwrap();
        assert!(two.receive.iter().all(|socket| socket.addr() == bind));
        let mut ports: Vec<_> = two.send.iter().map(|socket| socket.addr().port()).collect();
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), SOURCE_PORTS);
        assert!(!ports.contains(&bind.port()));
    }

    #[test]
    fn the_probed_run_length_is_what_the_kernel_takes() {
        let underlay = Underlay::open("127.0.0.1:0".parse().unwrap(), 1, true).unwrap();
        assert!(
            underlay.caps.gso && underlay.caps.gro,
            "the reference kernel has both"
        );
        let to = SockAddr::from(underlay.receive[0].addr());
        let segments = usize::from(underlay.caps.max_segments);
        let send = |len: usize| {
            let payload = vec![7; len];
            let mut batch = SendBatch::new(1, 1);
            let mut sending = batch.start();
            let entry = Entry {
                to: &to,
                segment_len: Some(1),
                tos: 0,
            };
            sending.push(entry, std::iter::once(payload.as_slice()));
            sending.send(underlay.send[0].fd(), 0)
        };
        assert_eq!(send(segments).unwrap(), 1);
        assert_eq!(
            send(segments + 1).unwrap_err().raw_os_error(),
            Some(libc::EINVAL)
        );
        let mut batch = RecvBatch::new(4);
        let mut datagrams = 0;
        while batch.receive(underlay.receive[0].fd()).is_ok() {
            datagrams += batch
                .entries()
                .map(|(r, _)| r.len.div_ceil(r.stride))
                .sum::<usize>();
        }
        assert_eq!(datagrams, segments);
    }
}
