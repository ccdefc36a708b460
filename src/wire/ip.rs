//! Owns what the data path asks of an IP packet of either family: one parse to [`IpMeta`], and the
//! two rewrites a hop makes. Never looks into the transport header.

use std::net::IpAddr;

use super::ecn::Ecn;
use super::ipv4::{self, Ipv4};
use super::ipv6::{self, Ipv6};

/// Protocol numbers that the data path tells apart (IANA "Assigned Internet Protocol Numbers").
pub mod protocol {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// Authentication header.
    pub const AUTHENTICATION: u8 = 51;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// IPv6 destination options.
    pub const DESTINATION: u8 = 60;
    /// IPv6 mobility header.
    pub const MOBILITY: u8 = 135;
    /// Host identity protocol.
    pub const HIP: u8 = 139;
    /// Shim6 multihoming.
    pub const SHIM6: u8 = 140;
}

/// The version field of an IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// RFC 791.
    V4,
    /// RFC 8200.
    V6,
}

/// Why bytes are not an IP packet. The remedy is to drop them and count the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IpError {
    /// Fewer bytes than the fixed header has.
    #[error("an IP header has at least {need} bytes, the packet has {have}")]
    TooShort {
        /// Bytes of the fixed header.
        need: usize,
        /// Bytes there are.
        have: usize,
    },
    /// Neither 4 nor 6.
    #[error("IP version {version} is neither 4 nor 6")]
    BadVersion {
        /// What the version field says.
        version: u8,
    },
    /// An IPv4 header length below 20 bytes or beyond the packet.
    #[error("the IPv4 header calls itself {len} bytes long, the packet has {have}")]
    BadHeaderLen {
        /// Bytes the header claims to have.
        len: usize,
        /// Bytes there are.
        have: usize,
    },
    /// A total length below the header's or beyond the bytes received: the packet was cut.
    #[error("the packet calls itself {total} bytes long and {have} arrived")]
    BadTotalLen {
        /// Bytes the header claims for the packet.
        total: usize,
        /// Bytes there are.
        have: usize,
    },
    /// An IPv6 payload length of zero: a jumbogram (RFC 2675), which no overlay can carry.
    #[error("IPv6 jumbograms are not carried; limit the sender's packets to 65575 bytes")]
    Jumbogram,
    /// An IPv6 extension header that ends beyond the packet.
    #[error("IPv6 extension header {kind} is cut short")]
    TruncatedExtension {
        /// Its protocol number.
        kind: u8,
    },
    /// More than [`ipv6::MAX_EXTENSIONS`] IPv6 extension headers.
    #[error("more than {} IPv6 extension headers", ipv6::MAX_EXTENSIONS)]
    TooManyExtensions,
}

/// What the data path knows of a packet after one look at its IP headers.
///
/// Made by [`parse`] only, so for the bytes parsed: `header_len <= total_len <= bytes.len()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpMeta {
    src: IpAddr,
    dst: IpAddr,
    header_len: usize,
    total_len: usize,
    id: u32,
    fragment_off: u16,
    more_fragments: bool,
    dont_fragment: bool,
    protocol: u8,
    ttl: u8,
    tos: u8,
}

impl IpMeta {
    /// The family.
    #[inline]
    #[must_use]
    pub const fn version(&self) -> Version {
        match self.dst {
            IpAddr::V4(_) => Version::V4,
            IpAddr::V6(_) => Version::V6,
        }
    }

    /// The source address.
    #[inline]
    #[must_use]
    pub const fn src(&self) -> IpAddr {
        self.src
    }

    /// The destination address.
    #[inline]
    #[must_use]
    pub const fn dst(&self) -> IpAddr {
        self.dst
    }

    /// Bytes in front of the transport header, which is where it begins: the IPv4 header with its
    /// options, or the IPv6 header with its extension headers.
    #[inline]
    #[must_use]
    pub const fn header_len(&self) -> usize {
        self.header_len
    }

    /// Bytes of the packet as its header counts them. Bytes received beyond it are padding.
    #[inline]
    #[must_use]
    pub const fn total_len(&self) -> usize {
        self.total_len
    }

    /// The protocol of the transport header. In a fragment of IPv6 that is not the first, the
    /// protocol or extension that its first fragment begins with.
    #[inline]
    #[must_use]
    pub const fn protocol(&self) -> u8 {
        self.protocol
    }

    /// The time to live or hop limit.
    #[inline]
    #[must_use]
    pub const fn ttl(&self) -> u8 {
        self.ttl
    }

    /// The type of service byte or traffic class.
    #[inline]
    #[must_use]
    pub const fn tos(&self) -> u8 {
        self.tos
    }

    /// The ECN field.
    #[inline]
    #[must_use]
    pub const fn ecn(&self) -> Ecn {
        Ecn::of(self.tos)
    }

    /// Whether a hop must not fragment the packet; always so for IPv6 (RFC 8200 section 5).
    #[inline]
    #[must_use]
    pub const fn dont_fragment(&self) -> bool {
        self.dont_fragment
    }

    /// Whether this is a fragment that others follow.
    #[inline]
    #[must_use]
    pub const fn more_fragments(&self) -> bool {
        self.more_fragments
    }

    /// Where the payload belongs in its datagram, in bytes; zero for a first fragment and a whole
    /// datagram.
    #[inline]
    #[must_use]
    pub const fn fragment_off(&self) -> u16 {
        self.fragment_off
    }

    /// Whether the packet is only a part of a datagram. An IPv6 "atomic" fragment (RFC 6946) is a
    /// whole one.
    #[inline]
    #[must_use]
    pub const fn is_fragment(&self) -> bool {
        self.more_fragments || self.fragment_off != 0
    }

    /// The identification: 16 bits in IPv4, 32 in an IPv6 fragment header, else zero.
    #[inline]
    #[must_use]
    pub const fn id(&self) -> u32 {
        self.id
    }

    /// The transport header and payload of the packet this was parsed from, without padding.
    #[inline]
    #[must_use]
    pub fn transport<'a>(&self, packet: &'a [u8]) -> &'a [u8] {
        packet
            .get(self.header_len..self.total_len)
            .unwrap_or_default()
    }
}

/// Reads the IP headers of a packet of either family. Bytes behind its total length are ignored.
///
/// The IPv4 header checksum is not verified; [`ipv4_header_checksum_ok`] does that where it pays.
///
/// # Errors
/// The first thing wrong with the headers.
#[inline]
pub fn parse(packet: &[u8]) -> Result<IpMeta, IpError> {
    match version(packet)? {
        Version::V4 => parse_v4(packet),
        Version::V6 => parse_v6(packet),
    }
}

/// The version of a packet, by its first four bits.
///
/// # Errors
/// [`IpError::TooShort`] without a byte, [`IpError::BadVersion`] for other versions.
#[inline]
pub const fn version(packet: &[u8]) -> Result<Version, IpError> {
    match packet.first() {
        Some(0x40..=0x4f) => Ok(Version::V4),
        Some(0x60..=0x6f) => Ok(Version::V6),
        Some(first) => Err(IpError::BadVersion {
            version: *first >> 4,
        }),
        None => Err(IpError::TooShort {
            need: ipv4::MIN_HEADER_LEN,
            have: 0,
        }),
    }
}

#[inline]
fn parse_v4(packet: &[u8]) -> Result<IpMeta, IpError> {
    let header = Ipv4::new(packet)?;
    let (header_len, total_len) = (header.header_len(), usize::from(header.total_len()));
    if total_len < header_len || total_len > packet.len() {
        return Err(IpError::BadTotalLen {
            total: total_len,
            have: packet.len(),
        });
    }
    Ok(IpMeta {
        src: IpAddr::V4(header.src()),
        dst: IpAddr::V4(header.dst()),
        header_len,
        total_len,
        id: u32::from(header.id()),
        fragment_off: header.fragment_off(),
        more_fragments: header.more_fragments(),
        dont_fragment: header.dont_fragment(),
        protocol: header.protocol(),
        ttl: header.ttl(),
        tos: header.tos(),
    })
}

#[inline]
fn parse_v6(packet: &[u8]) -> Result<IpMeta, IpError> {
    let header = Ipv6::new(packet)?;
    let payload_len = usize::from(header.payload_len());
    if payload_len == 0 {
        return Err(IpError::Jumbogram);
    }
    let total_len = ipv6::HEADER_LEN + payload_len;
    if total_len > packet.len() {
        return Err(IpError::BadTotalLen {
            total: total_len,
            have: packet.len(),
        });
    }
    let chain = header.chain(total_len)?;
    let fragment = chain.fragment.unwrap_or(ipv6::Fragment {
        off: 0,
        more: false,
        id: 0,
    });
    Ok(IpMeta {
        src: IpAddr::V6(header.src()),
        dst: IpAddr::V6(header.dst()),
        header_len: chain.transport_off,
        total_len,
        id: fragment.id,
        fragment_off: fragment.off,
        more_fragments: fragment.more,
        dont_fragment: true,
        protocol: chain.protocol,
        ttl: header.hop_limit(),
        tos: header.traffic_class(),
    })
}

/// Whether a packet is IPv4 with a whole header and its checksum right.
#[inline]
#[must_use]
pub fn ipv4_header_checksum_ok(packet: &[u8]) -> bool {
    Ipv4::new(packet).is_ok_and(|header| header.checksum_ok())
}

/// Why [`decrement_ttl`] left a packet as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TtlError {
    /// The packet may not travel further; its sender is owed an ICMP time exceeded.
    #[error("the time to live is used up")]
    Expired,
    /// The bytes are not an IP packet.
    #[error(transparent)]
    NotIp(#[from] IpError),
}

/// Takes `by` hops off the TTL or hop limit, and brings the IPv4 header checksum up to date (RFC
/// 1624).
///
/// A packet that would be left with none is not touched: a router must not forward it (RFC 1812
/// section 5.3.1), and a TTL of zero does not wrap around.
///
/// # Errors
/// [`TtlError::Expired`] for a TTL of at most `by`.
#[inline]
pub fn decrement_ttl(packet: &mut [u8], by: u8) -> Result<(), TtlError> {
    let left = |ttl: u8| {
        ttl.checked_sub(by)
            .filter(|&left| left != 0)
            .ok_or(TtlError::Expired)
    };
    match version(packet)? {
        Version::V4 => {
            let mut header = Ipv4::new(packet)?;
            header.rewrite_ttl(left(header.ttl())?);
        }
        Version::V6 => {
            let mut header = Ipv6::new(packet)?;
            header.set_hop_limit(left(header.hop_limit())?);
        }
    }
    Ok(())
}

/// Sets the ECN field, and brings the IPv4 header checksum up to date (RFC 1624).
///
/// # Errors
/// If the bytes do not begin with a whole IP header.
#[inline]
pub fn set_ecn(packet: &mut [u8], ecn: Ecn) -> Result<(), IpError> {
    match version(packet)? {
        Version::V4 => {
            let mut header = Ipv4::new(packet)?;
            header.rewrite_tos(ecn.in_tos(header.tos()));
        }
        Version::V6 => {
            let mut header = Ipv6::new(packet)?;
            header.set_traffic_class(ecn.in_tos(header.traffic_class()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
