//! Owns socket options that no safe library covers. Never opens a socket.

#![expect(
    unsafe_code,
    reason = "setsockopt and getsockopt with options that no library types"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// An option that takes one `int`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntOption {
    level: libc::c_int,
    name: libc::c_int,
}

macro_rules! int_options {
    ($($(#[$meta:meta])* $ident:ident = $level:expr, $name:expr;)*) => {
        impl IntOption {
            $($(#[$meta])* pub const $ident: Self = Self { level: $level, name: $name };)*
        }
    };
}

int_options! {
    /// Receive several datagrams of one size as one buffer (udp(7), Linux 5.0).
    UDP_GRO = libc::SOL_UDP, libc::UDP_GRO;
    /// Send one buffer as several datagrams of this size (udp(7), Linux 4.18).
    UDP_SEGMENT = libc::SOL_UDP, libc::UDP_SEGMENT;
    /// How the don't-fragment bit is set (ip(7)).
    IP_MTU_DISCOVER = libc::IPPROTO_IP, libc::IP_MTU_DISCOVER;
    /// The same for IPv6.
    IPV6_MTU_DISCOVER = libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER;
    /// Keep ICMP errors on the error queue (ip(7)).
    IP_RECVERR = libc::IPPROTO_IP, libc::IP_RECVERR;
    /// The same for IPv6.
    IPV6_RECVERR = libc::IPPROTO_IPV6, libc::IPV6_RECVERR;
    /// Deliver the TOS byte of each datagram.
    IP_RECVTOS = libc::IPPROTO_IP, libc::IP_RECVTOS;
    /// Deliver the traffic class of each datagram.
    IPV6_RECVTCLASS = libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS;
    /// Deliver the TTL of each datagram.
    IP_RECVTTL = libc::IPPROTO_IP, libc::IP_RECVTTL;
    /// Deliver the hop limit of each datagram.
    IPV6_RECVHOPLIMIT = libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT;
    /// Deliver the destination address and the link of each datagram.
    IP_PKTINFO = libc::IPPROTO_IP, libc::IP_PKTINFO;
    /// The same for IPv6.
    IPV6_RECVPKTINFO = libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO;
    /// Send UDP over IPv4 without a checksum (socket(7)).
    SO_NO_CHECK = libc::SOL_SOCKET, libc::SO_NO_CHECK;
    /// Say how long a frame was and where its headers begin (packet(7)).
    PACKET_AUXDATA = libc::SOL_PACKET, libc::PACKET_AUXDATA;
    /// Put a vnet header in front of each frame (include/uapi/linux/if_packet.h).
    PACKET_VNET_HDR = libc::SOL_PACKET, libc::PACKET_VNET_HDR;
    /// Say when each packet passed (socket(7)).
    SO_TIMESTAMPNS = libc::SOL_SOCKET, libc::SO_TIMESTAMPNS;
    /// Receive buffer beyond `rmem_max` (needs `CAP_NET_ADMIN`).
    SO_RCVBUFFORCE = libc::SOL_SOCKET, libc::SO_RCVBUFFORCE;
    /// Send buffer beyond `wmem_max` (needs `CAP_NET_ADMIN`).
    SO_SNDBUFFORCE = libc::SOL_SOCKET, libc::SO_SNDBUFFORCE;
}

/// Sets an option.
///
/// # Errors
/// The kernel's; `ENOPROTOOPT` when it does not know the option.
pub fn set(socket: BorrowedFd<'_>, option: IntOption, value: libc::c_int) -> io::Result<()> {
    #[expect(clippy::cast_possible_truncation, reason = "four bytes")]
    const LEN: libc::socklen_t = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads LEN bytes from `value`, an int of that size that outlives the call; the
    // descriptor is open by its type.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            option.level,
            option.name,
            (&raw const value).cast(),
            LEN,
        )
    };
    Errno::result(result)?;
    Ok(())
}

/// Makes the socket receive nothing: a one-instruction filter that accepts zero bytes. What remains is its
/// error queue, which the filter does not see.
///
/// # Errors
/// The kernel's.
pub fn refuse_all(socket: BorrowedFd<'_>) -> io::Result<()> {
    const RETURN_ZERO: u16 = 0x06; // BPF_RET | BPF_K, include/uapi/linux/bpf_common.h
    let mut program = [libc::sock_filter {
        code: RETURN_ZERO,
        jt: 0,
        jf: 0,
        k: 0,
    }];
    let filter = libc::sock_fprog {
        len: 1,
        filter: program.as_mut_ptr(),
    };
    #[expect(clippy::cast_possible_truncation, reason = "sixteen bytes")]
    let len = size_of::<libc::sock_fprog>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes from `filter`, and `filter.len` instructions from the array it
    // points to; both outlive the call; the descriptor is open by its type.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            len,
        )
    };
    Errno::result(result)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    #[test]
    fn a_socket_that_refuses_all_receives_nothing() {
        let quiet = UdpSocket::bind("127.0.0.1:0").unwrap();
        refuse_all(quiet.as_fd()).unwrap();
        let loud = UdpSocket::bind("127.0.0.1:0").unwrap();
        loud.send_to(b"hello", quiet.local_addr().unwrap()).unwrap();
        loud.send_to(b"hello", loud.local_addr().unwrap()).unwrap();
        // Loopback delivers in order: once ours is there, the other one was decided.
        let mut buf = [0; 8];
        assert_eq!(loud.recv(&mut buf).unwrap(), 5);
        quiet.set_nonblocking(true).unwrap();
        assert_eq!(
            quiet.recv(&mut buf).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
    }

    #[test]
    fn an_unknown_option_is_an_error() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let unknown = IntOption {
            level: libc::SOL_UDP,
            name: 0x7fff,
        };
        let error = set(socket.as_fd(), unknown, 1).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOPROTOOPT));
    }
}
