//! Owns the list of reasons why a packet does not continue. Never counts; `stats` does.

use serde::{Serialize, Serializer};

macro_rules! drop_reasons {
    ($($(#[$meta:meta])* $variant:ident => $name:literal, $remedy:literal;)*) => {
        /// Why a packet did not continue. Each has one counter per worker and direction, counted in inner
        /// packets (segments).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum DropReason {
            $($(#[$meta])* $variant,)*
        }

        impl DropReason {
            /// Every reason, in the order of the counters.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];
            /// How many reasons there are.
            pub const COUNT: usize = Self::ALL.len();

            /// The stable name used in counters, status and documents.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// Where it is explained: a heading that keeps its name.
            #[must_use]
            pub const fn document(self) -> &'static str {
                match self { $(Self::$variant => concat!("docs/debugging.md#", $name),)* }
            }

            /// One line: what an operator does about it.
            #[must_use]
            pub const fn remedy(self) -> &'static str {
                match self { $(Self::$variant => $remedy,)* }
            }
        }
    };
}

drop_reasons! {
    /// Not a well-formed IPv4 or IPv6 packet.
    Malformed => "malformed", "find the sender of broken packets: capture on the device named in status";
    /// The virtio-net header of a TUN read contradicts its packet, or the kernel had none for it.
    BadVnetHeader => "bad_vnet_header", "report it: the kernel described a superpacket that cannot be segmented";
    /// No lease covers the destination and no answer was due.
    NoRoute => "no_route", "check that a lease exists for the destination (loden status, peers)";
    /// The destination is a multicast or broadcast group, which the overlay does not carry.
    Multicast => "multicast", "none: neighbour discovery and mDNS are normal; use unicast through the overlay";
    /// The TTL or hop limit ran out and no answer was due.
    TtlExpired => "ttl_expired", "look for a routing loop between the overlay and the underlay";
    /// Larger than the path to the peer carries, and no answer was due.
    TooBig => "too_big", "lower the overlay MTU or repair path MTU discovery on the underlay";
    /// The datagram did not fit the receive buffer (`MSG_TRUNC`).
    Truncated => "truncated", "a peer sends more than 65535 bytes: check who sends to the tunnel port";
    /// Shorter than an IP header: not a tunnelled packet.
    TooShort => "too_short", "something that is not an overlay peer sends to the tunnel port";
    /// The datagram carries no VXLAN header with a valid network number.
    NotVxlan => "not_vxlan", "something that speaks no VXLAN sends to the tunnel port: check the peer's backend type";
    /// The VXLAN network number is another one.
    WrongVni => "wrong_vni", "give all nodes the same Backend.VNI, or each VXLAN network a port of its own";
    /// The Ethernet frame carries no IP packet.
    NotIp => "not_ip", "the peer sends ARP or another protocol: its neighbour entry for this node is not permanent";
    /// The Ethernet frame is for another VTEP.
    WrongMac => "wrong_mac", "the peer knows an old MAC of this node: its entry for our lease is stale";
    /// The Ethernet frame's sender is not the VTEP of the peer whose address it uses.
    SpoofedMac => "spoofed_mac", "the sender's VTEP has another MAC than its lease says: restart its daemon, or a forged packet";
    /// The peer's VTEP MAC is not known.
    NoMac => "no_mac", "the peer's lease lacks a valid VtepMAC: check that its backend type is vxlan";
    /// The outer source is no known peer.
    UnknownPeer => "unknown_peer", "check that the sender has a lease with this public IP, or set SourceCheck to loose behind NAT";
    /// The inner source lies outside the lease of the peer that sent it.
    SpoofedSource => "spoofed_source", "the peer sends for addresses it holds no lease for: check its routes, or a forged packet";
    /// The inner destination is not on this node.
    NotLocal => "not_local", "the peer holds a stale lease for a subnet that is not ours";
    /// RFC 6040: congestion mark on a packet that is not ECN-capable.
    EcnInvalid => "ecn_invalid", "a router on the underlay marks packets that are not ECN-capable";
    /// The socket's send buffer was full.
    SocketFull => "socket_full", "raise net.core.wmem_max or slow the sender: the underlay cannot keep up";
    /// The underlay refused the datagram: no route, interface down, host unreachable.
    UnderlayDown => "underlay_down", "bring the external interface or its route back (ip route get PEER)";
    /// Local firewall or policy refused the datagram (`EPERM`, `EACCES`).
    Refused => "refused", "a local firewall rejects the tunnel port: allow it for output";
    /// The kernel had no memory for the packet (`ENOBUFS`, `ENOMEM`).
    NoMemory => "no_memory", "the kernel is short of packet memory: raise net.core.wmem_max or free memory";
    /// The TUN device is gone or down.
    DeviceDown => "device_down", "the daemon recreates the device; ip link shows whether somebody keeps setting it down";
    /// The kernel refused the packet for another reason.
    Rejected => "rejected", "see the log line that names the error number";
}

impl Serialize for DropReason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl DropReason {
    /// Why a datagram of this length is no IP packet: shorter than any, or broken.
    #[must_use]
    pub const fn of_unparsed(len: usize) -> Self {
        if len < 20 {
            Self::TooShort
        } else {
            Self::Malformed
        }
    }

    /// Why a send on the underlay failed.
    #[must_use]
    pub fn of_send(error: &std::io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EAGAIN) => Self::SocketFull,
            Some(libc::ENOBUFS | libc::ENOMEM) => Self::NoMemory,
            Some(libc::EMSGSIZE) => Self::TooBig,
            Some(libc::EPERM | libc::EACCES) => Self::Refused,
            Some(
                libc::ENETUNREACH
                | libc::EHOSTUNREACH
                | libc::ENETDOWN
                | libc::EHOSTDOWN
                | libc::EADDRNOTAVAIL
                | libc::ENODEV
                | libc::ENONET
                | libc::ECONNREFUSED,
            ) => Self::UnderlayDown,
            _ => Self::Rejected,
        }
    }

    /// Why a write to the TUN failed.
    #[must_use]
    pub fn of_tun_write(error: &std::io::Error) -> Self {
        match error.raw_os_error() {
            // EIO: the device is down; EBADFD: it is gone.
            Some(libc::EIO | libc::EBADFD | libc::ENODEV) => Self::DeviceDown,
            Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => Self::NoMemory,
            _ => Self::Rejected,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Error;

    #[test]
    fn every_errno_of_a_send_and_of_a_write_has_its_reason() {
        use DropReason::{
            DeviceDown, NoMemory, Refused, Rejected, SocketFull, TooBig, UnderlayDown,
        };
        for (errno, reason) in [
            (libc::EAGAIN, SocketFull),
            (libc::ENOBUFS, NoMemory),
            (libc::ENOMEM, NoMemory),
            (libc::EMSGSIZE, TooBig),
            (libc::EPERM, Refused),
            (libc::EACCES, Refused),
            (libc::ENETUNREACH, UnderlayDown),
            (libc::EHOSTUNREACH, UnderlayDown),
            (libc::ENETDOWN, UnderlayDown),
            (libc::EADDRNOTAVAIL, UnderlayDown),
            (libc::ECONNREFUSED, UnderlayDown),
            (libc::EINVAL, Rejected),
        ] {
            let error = Error::from_raw_os_error(errno);
            assert_eq!(DropReason::of_send(&error), reason, "send: {error}");
        }
        for (errno, reason) in [
            (libc::EIO, DeviceDown),
            (libc::EBADFD, DeviceDown),
            (libc::ENODEV, DeviceDown),
            (libc::EAGAIN, NoMemory),
            (libc::ENOBUFS, NoMemory),
            (libc::ENOMEM, NoMemory),
            (libc::EINVAL, Rejected),
            (libc::EMSGSIZE, Rejected),
        ] {
            let error = Error::from_raw_os_error(errno);
            assert_eq!(DropReason::of_tun_write(&error), reason, "write: {error}");
        }
    }
}
