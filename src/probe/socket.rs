//! Owns UDP sockets for probes: how they are opened, and receiving a datagram with what stood around it. Never
//! looks into one.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _};

use nix::cmsg_space;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg,
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::Path;
use crate::sys::socket::{IntOption, set};

/// A datagram's surroundings.
#[derive(Clone, Copy, Debug)]
pub(super) struct Received {
    /// Bytes of its payload; the buffer may hold fewer.
    pub(super) len: usize,
    /// Whom it came from.
    pub(super) from: SocketAddr,
    /// The address of ours that it was sent to.
    pub(super) to: Option<IpAddr>,
    /// The link it came in by; 0 if the kernel does not say.
    pub(super) link: u32,
    pub(super) ttl: u8,
    pub(super) tos: u8,
}

/// A bound socket of a family, on a path, whose datagrams must not be fragmented.
pub(super) fn open(path: &Path, family: IpAddr, port: u16) -> io::Result<UdpSocket> {
    let (domain, any) = match family {
        IpAddr::V4(_) => (Domain::IPV4, IpAddr::from(Ipv4Addr::UNSPECIFIED)),
        IpAddr::V6(_) => (Domain::IPV6, IpAddr::from(Ipv6Addr::UNSPECIFIED)),
    };
    let socket = Socket::new(domain, Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    // PROBE sets the don't-fragment bit and does not heed what was learned of the path (ip(7)).
    let options: &[(IntOption, libc::c_int)] = match family {
        IpAddr::V4(_) => &[
            (IntOption::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE),
            (IntOption::IP_PKTINFO, 1),
            (IntOption::IP_RECVTTL, 1),
            (IntOption::IP_RECVTOS, 1),
        ],
        IpAddr::V6(_) => {
            socket.set_only_v6(true)?;
            &[
                (IntOption::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE),
                (IntOption::IPV6_RECVPKTINFO, 1),
                (IntOption::IPV6_RECVHOPLIMIT, 1),
                (IntOption::IPV6_RECVTCLASS, 1),
            ]
        }
    };
    for &(option, value) in options {
        set(socket.as_fd(), option, value)?;
    }
    apply(path, &socket)?;
    let local = SocketAddr::new(path.local.unwrap_or(any), port);
    socket.bind(&SockAddr::from(local))?;
    UdpSocket::from_std(socket.into())
}

/// Puts a socket on a path, except for its address.
pub(super) fn apply(path: &Path, socket: &Socket) -> io::Result<()> {
    if let Some(device) = &path.device {
        socket.bind_device(Some(device.as_bytes()))?;
    }
    if path.unchecked {
        set(socket.as_fd(), IntOption::SO_NO_CHECK, 1)?;
    }
    if let Some(mark) = path.mark {
        socket.set_mark(mark)?;
    }
    Ok(())
}

/// The next datagram, or an error that ICMP brought.
pub(super) async fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<Received> {
    let mut control = cmsg_space!(libc::in6_pktinfo, libc::in_pktinfo, [libc::c_int; 4]);
    socket
        .async_io(Interest::READABLE, || {
            let mut parts = [IoSliceMut::new(buffer)];
            let message = recvmsg::<SockaddrStorage>(
                socket.as_raw_fd(),
                &mut parts,
                Some(&mut control),
                // The length as it was, even where the buffer is shorter.
                MsgFlags::MSG_TRUNC,
            )?;
            let from = message.address.as_ref().and_then(socket_addr);
            let mut received = Received {
                len: message.bytes,
                from: from.ok_or(io::ErrorKind::InvalidData)?,
                to: None,
                link: 0,
                ttl: 0,
                tos: 0,
            };
            for told in message.cmsgs()? {
                take(&mut received, &told);
            }
            Ok(received)
        })
        .await
}

fn take(received: &mut Received, told: &ControlMessageOwned) {
    let byte = |value: i32| u8::try_from(value).unwrap_or_default();
    if let ControlMessageOwned::Ipv4PacketInfo(info) = told {
        received.to = Some(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr)).into());
        received.link = u32::try_from(info.ipi_ifindex).unwrap_or_default();
    } else if let ControlMessageOwned::Ipv6PacketInfo(info) = told {
        received.to = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
        received.link = info.ipi6_ifindex;
    } else if let ControlMessageOwned::Ipv4Ttl(ttl) | ControlMessageOwned::Ipv6HopLimit(ttl) = told
    {
        received.ttl = byte(*ttl);
    } else if let ControlMessageOwned::Ipv4Tos(tos) = told {
        received.tos = *tos;
    } else if let ControlMessageOwned::Ipv6TClass(class) = told {
        received.tos = byte(*class);
    }
}

fn socket_addr(addr: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = addr
        .as_sockaddr_in()
        .map(|addr| SocketAddr::V4((*addr).into()));
    v4.or_else(|| {
        addr.as_sockaddr_in6()
            .map(|addr| SocketAddr::V6((*addr).into()))
    })
}

/// Answers from the address that was asked, by whatever way the routing table has for it.
pub(super) fn answer(
    socket: &UdpSocket,
    bytes: &[u8],
    to: SocketAddr,
    from: IpAddr,
) -> io::Result<()> {
    let addr = SockaddrStorage::from(to);
    let (v4, v6);
    let source = match from {
        IpAddr::V4(from) => {
            v4 = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr {
                    s_addr: u32::from(from).to_be(),
                },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            ControlMessage::Ipv4PacketInfo(&v4)
        }
        IpAddr::V6(from) => {
            v6 = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr {
                    s6_addr: from.octets(),
                },
                ipi6_ifindex: 0,
            };
            ControlMessage::Ipv6PacketInfo(&v6)
        }
    };
    socket.try_io(Interest::WRITABLE, || {
        let parts = [IoSlice::new(bytes)];
        let sent = sendmsg(
            socket.as_raw_fd(),
            &parts,
            &[source],
            MsgFlags::MSG_DONTWAIT,
            Some(&addr),
        );
        sent.map(drop).map_err(io::Error::from)
    })
}
