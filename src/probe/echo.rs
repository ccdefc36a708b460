//! Owns ICMP echo: what every node answers, whatever it runs. Never says more than that it was answered.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::net::UdpSocket;

use super::{Path, socket};
use crate::sys::socket::{IntOption, set};
use crate::wire::checksum;
use crate::wire::icmp;
use crate::wire::ipv4::Ipv4;

/// Echo request and reply (RFC 792, RFC 4443 section 4).
const V4: (u8, u8) = (8, 0);
const V6: (u8, u8) = (128, 129);

/// Bytes of an echo's header and of the number behind it that tells our replies from others'.
pub(super) const MIN_LEN: usize = icmp::HEADER_LEN + 8;

/// A socket for echoes with one other.
#[derive(Debug)]
pub(super) struct Echo {
    /// Reading, writing and waiting are the same for a socket of any kind.
    socket: UdpSocket,
    /// The kernel hands out the IP header, too, and keeps its hands off ours.
    raw: bool,
    is_ipv4: bool,
    nonce: u64,
}

/// A reply.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reply {
    pub(super) sequence: u16,
    /// Bytes of its IP packet.
    pub(super) len: u16,
    /// 0 where the kernel does not say.
    pub(super) ttl: u8,
}

impl Echo {
    /// A socket connected to `to`: a raw one, or where that takes a capability we lack, one of those that any
    /// process of some groups may have (`net.ipv4.ping_group_range`, icmp(7)).
    pub(super) fn open(path: &Path, to: IpAddr, nonce: u64) -> io::Result<Self> {
        let (domain, protocol) = match to {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let open = |kind: Type| Socket::new(domain, kind.nonblocking(), Some(protocol));
        let (socket, raw) = match open(Type::RAW) {
            Ok(socket) => (socket, true),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                (open(Type::DGRAM)?, false)
            }
            Err(error) => return Err(error),
        };
        let (option, value) = match to {
            IpAddr::V4(_) => (IntOption::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE),
            IpAddr::V6(_) => (IntOption::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE),
        };
        set(socket.as_fd(), option, value)?;
        socket::apply(path, &socket)?;
        if let Some(local) = path.local {
            socket.bind(&SockAddr::from(SocketAddr::new(local, 0)))?;
        }
        socket.connect(&SockAddr::from(SocketAddr::new(to, 0)))?;
        Ok(Self {
            socket: UdpSocket::from_std(socket.into())?,
            raw,
            is_ipv4: to.is_ipv4(),
            nonce,
        })
    }

    /// Sends a request whose ICMP message is as long as `message`, which it overwrites.
    pub(super) fn send(&self, sequence: u16, message: &mut [u8]) -> io::Result<()> {
        let (request, _) = if self.is_ipv4 { V4 } else { V6 };
        // Half of the nonce tells our replies from those to others with the same peer.
        let [id_high, id_low, ..] = self.nonce.to_be_bytes();
        let [sequence_high, sequence_low] = sequence.to_be_bytes();
        let header = [
            request,
            0,
            0,
            0,
            id_high,
            id_low,
            sequence_high,
            sequence_low,
        ];
        if let Some((front, rest)) = message.split_first_chunk_mut::<{ icmp::HEADER_LEN }>() {
            *front = header;
            if let Some(front) = rest.first_chunk_mut() {
                *front = self.nonce.to_be_bytes();
            }
        }
        // The kernel computes that of ICMPv6, and of its own sockets, by itself.
        let sum = checksum::finish(checksum::sum_scalar(message));
        if let (true, Some(place)) = (self.is_ipv4, message.get_mut(2..4)) {
            place.copy_from_slice(&sum.to_be_bytes());
        }
        self.socket.try_send(message).map(drop)
    }

    /// The next reply to one of our requests, or an error that ICMP brought.
    pub(super) async fn receive(&self, buffer: &mut [u8]) -> io::Result<Reply> {
        loop {
            let read = self.socket.recv(buffer).await?;
            let packet = buffer.get(..read).unwrap_or_default();
            if let Some(reply) = self.reply(packet) {
                return Ok(reply);
            }
        }
    }

    fn reply(&self, packet: &[u8]) -> Option<Reply> {
        let (mut message, mut ttl, mut len) = (packet, 0, packet.len());
        if self.raw && self.is_ipv4 {
            let header = Ipv4::new(packet).ok()?;
            message = packet.get(header.header_len()..)?;
            ttl = header.ttl();
        } else {
            len += if self.is_ipv4 { 20 } else { 40 };
        }
        let (_, expected) = if self.is_ipv4 { V4 } else { V6 };
        let &[kind, _, _, _, _, _, high, low] = message.first_chunk::<{ icmp::HEADER_LEN }>()?;
        let nonce = message.get(icmp::HEADER_LEN..)?.first_chunk::<8>()?;
        (kind == expected && u64::from_be_bytes(*nonce) == self.nonce).then(|| Reply {
            sequence: u16::from_be_bytes([high, low]),
            len: u16::try_from(len).unwrap_or(u16::MAX),
            ttl,
        })
    }
}
