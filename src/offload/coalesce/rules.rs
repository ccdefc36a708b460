//! Owns the rules of merging: what a packet must be, and what two packets must share, so that splitting the
//! result gives the same packets back. Never looks anything up and never changes anything.

use thiserror::Error;

use super::super::header::{
    Family, HeaderError, Headers, IPV4_DF, IPV4_LEN, TCP_LEN, Transport, be16, be32, fold,
    pseudo_sum, sum_words,
};
use super::Item;
use crate::wire::checksum::SumFn;

pub(super) const TCP_PSH: u8 = 0x08;
const TCP_ACK: u8 = 0x10;

/// What may be merged, and how far. May shrink at run time as capabilities are withdrawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Merge TCP (the TUN takes `TcpV4` and `TcpV6` superpackets).
    pub tcp: bool,
    /// Merge UDP (the TUN takes `UdpL4` superpackets: Linux 6.2 or later).
    pub udp: bool,
    /// Segments in a TCP superpacket. Each is one `iovec`, after one for the head.
    pub tcp_segments: u16,
    /// Segments in a UDP superpacket.
    pub udp_segments: u16,
    /// Bytes of a superpacket with its headers.
    pub max_bytes: u16,
    /// Bytes of the longest packet that is merged. What is longer is known to be no single packet.
    pub max_packet_len: u16,
}

impl Default for Limits {
    /// Everything on: `UIO_MAXIOV` (1024) less the head; 64 UDP segments, the `UDP_MAX_SEGMENTS` of kernels
    /// before 6.9 (128 since); 65535 bytes, the most an IPv4 total length can say, also of one packet.
    fn default() -> Self {
        Self {
            tcp: true,
            udp: true,
            tcp_segments: 1023,
            udp_segments: 64,
            max_bytes: u16::MAX,
            max_packet_len: u16::MAX,
        }
    }
}

impl Limits {
    const fn segments(&self, transport: Transport) -> u16 {
        match transport {
            Transport::Tcp => self.tcp_segments,
            Transport::Udp => self.udp_segments,
        }
    }
}

/// Why a packet can merge with no other. It closes its flow's item and passes unchanged.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Unmergeable {
    /// Its headers do not delimit one TCP or UDP packet.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The TUN does not take superpackets of this transport, or was told not to.
    #[error("coalescing is off for this transport")]
    Off,
    /// It may be a superpacket already.
    #[error("packet is longer than single packets are")]
    TooLong,
    /// IPv4 options may mean something per packet (RFC 791 section 3.1).
    #[error("packet has IPv4 options")]
    Ipv4Options,
    /// The reserved flag would be lost on some path through the kernel.
    #[error("packet has the reserved IPv4 flag")]
    Ipv4Reserved,
    /// Pure acknowledgements and empty datagrams have nothing to append.
    #[error("packet has no payload")]
    NoPayload,
    /// A TCP flag other than ACK and PSH, or no ACK: each marks one segment, and must stay on it.
    #[error("TCP flags {flags:#05x} are not ACK with or without PSH")]
    TcpFlags {
        /// The 12 bits behind the data offset.
        flags: u16,
    },
    /// A zero UDP checksum says "none"; a superpacket's segments would all get one (RFC 768).
    #[error("UDP packet has no checksum")]
    NoChecksum,
    /// A wrong checksum would be replaced by a right one.
    #[error("a checksum of the packet is wrong")]
    Checksum,
}

/// Why a mergeable packet did not join the open item of its flow. It closes that one and heads the next.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Mismatch {
    /// TOS or TTL and DF (IPv4), traffic class, flow label or hop limit (IPv6).
    #[error("IP header fields differ")]
    IpHeader,
    /// The identification does not continue, and DF is clear so that it matters (RFC 6864 section 4).
    #[error("IPv4 identification does not continue")]
    Ipv4Id,
    /// Splitting numbers segments consecutively.
    #[error("TCP sequence number does not continue")]
    Sequence,
    /// Acknowledgement, window or urgent pointer: one header serves all segments.
    #[error("TCP acknowledgement, window or urgent pointer differs")]
    TcpHeader,
    /// Timestamps, for the most part.
    #[error("TCP options differ")]
    TcpOptions,
    /// Only the last segment may differ in size, and only be smaller.
    #[error("payload is larger than that of the segments before")]
    Larger,
    /// The superpacket would exceed the largest IP packet, or the limit set.
    #[error("superpacket would be too long")]
    Length,
    /// As many segments as the limit allows.
    #[error("superpacket would have too many segments")]
    Segments,
    /// The item's first packet turned out damaged when this one wanted to join it.
    #[error("a checksum of the item's first packet is wrong")]
    FirstChecksum,
}

/// A packet that may merge.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    /// Bytes behind the headers; never zero.
    pub(super) payload_len: u16,
    /// TCP PSH: nothing may follow.
    pub(super) push: bool,
}

impl Candidate {
    /// Applies the rules that concern the packet alone.
    #[inline]
    pub(super) fn new(
        bytes: &[u8],
        headers: Headers,
        limits: &Limits,
    ) -> Result<Self, Unmergeable> {
        if bytes.len() > usize::from(limits.max_packet_len) {
            return Err(Unmergeable::TooLong);
        }
        if headers.family == Family::V4 {
            let ip: &[u8; IPV4_LEN] = bytes.first_chunk().ok_or(HeaderError::Truncated)?;
            if usize::from(headers.l3_len) != IPV4_LEN {
                return Err(Unmergeable::Ipv4Options);
            }
            if be16(ip, 6) & !IPV4_DF != 0 {
                return Err(Unmergeable::Ipv4Reserved);
            }
        }
        // Together with the check for payload this bounds every length below by 65535: `Headers::parse` has
        // compared the slice with a 16-bit length, which for IPv6 does not count the fixed header.
        let payload_len = bytes.len().saturating_sub(headers.len());
        let payload_len = u16::try_from(payload_len).unwrap_or(u16::MAX);
        if payload_len == 0 {
            return Err(Unmergeable::NoPayload);
        }
        let l4 = bytes.get(usize::from(headers.l3_len)..).unwrap_or_default();
        match headers.transport {
            Transport::Tcp => {
                if !limits.tcp {
                    return Err(Unmergeable::Off);
                }
                let tcp: &[u8; TCP_LEN] = l4.first_chunk().ok_or(HeaderError::Truncated)?;
                let flags = be16(tcp, 12) & 0x0fff;
                if flags & !u16::from(TCP_PSH) != u16::from(TCP_ACK) {
                    return Err(Unmergeable::TcpFlags { flags });
                }
                Ok(Self {
                    payload_len,
                    push: tcp[13] & TCP_PSH != 0,
                })
            }
            Transport::Udp => {
                if !limits.udp {
                    return Err(Unmergeable::Off);
                }
                let udp: &[u8; 8] = l4.first_chunk().ok_or(HeaderError::Truncated)?;
                if be16(udp, 6) == 0 {
                    return Err(Unmergeable::NoChecksum);
                }
                Ok(Self {
                    payload_len,
                    push: false,
                })
            }
        }
    }
}

/// Whether two packets have the same addresses, ports and protocol.
#[inline]
pub(super) fn same_flow(a: (&[u8], Headers), b: (&[u8], Headers)) -> bool {
    let ((a, a_headers), (b, b_headers)) = (a, b);
    if (a_headers.family, a_headers.transport) != (b_headers.family, b_headers.transport) {
        return false;
    }
    let same_addresses = match a_headers.family {
        Family::V4 => same::<8>(a, 12, b, 12),
        Family::V6 => same::<32>(a, 8, b, 8),
    };
    let (a_ports, b_ports) = (usize::from(a_headers.l3_len), usize::from(b_headers.l3_len));
    same_addresses && same::<4>(a, a_ports, b, b_ports)
}

/// Whether `N` bytes at two places exist and are equal; a constant `N` makes it a few loads.
#[inline]
fn same<const N: usize>(a: &[u8], a_off: usize, b: &[u8], b_off: usize) -> bool {
    let a = a.get(a_off..).and_then(<[u8]>::first_chunk::<N>);
    let b = b.get(b_off..).and_then(<[u8]>::first_chunk::<N>);
    a.is_some() && a == b
}

/// Applies the rules that concern a packet and the item it wants to join, both of one flow. `first` is the
/// item's first packet.
#[inline]
pub(super) fn join(
    item: &Item,
    first: &[u8],
    bytes: &[u8],
    candidate: &Candidate,
    limits: &Limits,
) -> Result<(), Mismatch> {
    let headers = item.headers;
    match headers.family {
        Family::V4 => join_ipv4(item, first, bytes)?,
        Family::V6 => {
            // Version, traffic class, flow label; next header, hop limit.
            if !(same::<4>(first, 0, bytes, 0) && same::<2>(first, 6, bytes, 6)) {
                return Err(Mismatch::IpHeader);
            }
        }
    }
    if headers.transport == Transport::Tcp {
        join_tcp(item, first, bytes)?;
    }
    if candidate.payload_len > item.gso_size {
        return Err(Mismatch::Larger);
    }
    if item.count >= limits.segments(headers.transport) {
        return Err(Mismatch::Segments);
    }
    let len = headers.len() + item.payload_len as usize + usize::from(candidate.payload_len);
    if len > usize::from(limits.max_bytes) {
        return Err(Mismatch::Length);
    }
    Ok(())
}

#[inline]
const fn join_ipv4(item: &Item, first: &[u8], bytes: &[u8]) -> Result<(), Mismatch> {
    let (Some(a), Some(b)) = (
        first.first_chunk::<IPV4_LEN>(),
        bytes.first_chunk::<IPV4_LEN>(),
    ) else {
        return Err(Mismatch::IpHeader);
    };
    // Version, header length, TOS; flags, fragment offset, TTL, protocol.
    if be16(a, 0) != be16(b, 0) || be32(a, 6) != be32(b, 6) {
        return Err(Mismatch::IpHeader);
    }
    let is_atomic = be16(a, 6) == IPV4_DF;
    if !is_atomic && be16(b, 4) != be16(a, 4).wrapping_add(item.count) {
        return Err(Mismatch::Ipv4Id);
    }
    Ok(())
}

#[inline]
fn join_tcp(item: &Item, first: &[u8], bytes: &[u8]) -> Result<(), Mismatch> {
    let l4 = usize::from(item.headers.l3_len);
    let (Some(first), Some(bytes)) = (first.get(l4..), bytes.get(l4..)) else {
        return Err(Mismatch::TcpHeader);
    };
    let (Some(a), Some(b)) = (
        first.first_chunk::<TCP_LEN>(),
        bytes.first_chunk::<TCP_LEN>(),
    ) else {
        return Err(Mismatch::TcpHeader);
    };
    if be32(b, 4) != be32(a, 4).wrapping_add(item.payload_len) {
        return Err(Mismatch::Sequence);
    }
    // The data offset decides where the payload begins.
    if b[12] != a[12] || !same_options(first, bytes, usize::from(item.headers.l4_len)) {
        return Err(Mismatch::TcpOptions);
    }
    if be32(b, 8) != be32(a, 8) || be16(b, 14) != be16(a, 14) || be16(b, 18) != be16(a, 18) {
        return Err(Mismatch::TcpHeader);
    }
    Ok(())
}

/// Whether two TCP headers of `l4_len` bytes have the same options. They are 12 bytes (timestamps) or none:
/// a loop over words beats a call to compare memory.
#[inline]
fn same_options(a: &[u8], b: &[u8], l4_len: usize) -> bool {
    let (Some(a), Some(b)) = (a.get(TCP_LEN..l4_len), b.get(TCP_LEN..l4_len)) else {
        return false;
    };
    let (a, _) = a.as_chunks::<4>();
    let (b, _) = b.as_chunks::<4>();
    a.iter().zip(b).all(|(a, b)| a == b)
}

/// Folded pseudo-header sum without the length, the same for every packet of a flow.
#[inline]
pub(super) fn pseudo(bytes: &[u8], headers: Headers) -> u16 {
    fold(pseudo_sum(bytes, headers.family, headers.transport))
}

/// Whether the IPv4 header checksum and the transport checksum are right. A superpacket's are computed
/// afresh, so merging a damaged packet would hide the damage.
#[inline]
pub(super) fn checksums_hold(bytes: &[u8], headers: Headers, pseudo: u16, sum: SumFn) -> bool {
    if headers.family == Family::V4 {
        // No options here, so the sum has a length the compiler knows.
        let ip = bytes.first_chunk::<IPV4_LEN>();
        if ip.is_none_or(|ip| fold(sum_words(ip)) != 0xffff) {
            return false;
        }
    }
    let l4 = bytes.get(usize::from(headers.l3_len)..).unwrap_or_default();
    let l4_len = u16::try_from(l4.len()).unwrap_or(u16::MAX);
    fold(u32::from(pseudo) + u32::from(l4_len) + u32::from(sum(l4))) == 0xffff
}
