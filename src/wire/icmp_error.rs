//! Owns the ICMP errors this node originates: when one is due, and its bytes. Never sends, and
//! never limits the rate.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::checksum::{self, SumFn};
use super::icmp::{self, Icmp};
use super::ip::{IpMeta, Version, protocol};
use super::ipv4::{self, Ipv4};
use super::ipv6::{self, Ipv6};
use crate::addr::Mtu;

/// Bytes of the longest answer of either family: a buffer of this size is always enough.
pub const MAX_LEN: usize = MAX_LEN_V6;

/// An IPv4 answer quotes as much as fits in 576 bytes (RFC 1812 section 4.3.2.3).
const MAX_LEN_V4: usize = 576;
/// An IPv6 answer quotes as much as fits in the minimum MTU (RFC 4443 section 2.4 (c)).
const MAX_LEN_V6: usize = 1280;

/// The TTL of what this node originates (RFC 1700's recommended default).
const TTL: u8 = 64;

/// Precedence 6, internetwork control, for errors (RFC 1812 section 4.3.2.5).
const INTERNETWORK_CONTROL: u8 = 0xc0;
/// The bits of the offender's TOS byte that an error repeats (same section): neither precedence nor
/// ECN.
const TOS_BITS: u8 = 0x1c;

/// What went wrong with the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IcmpError {
    /// Its TTL or hop limit was used up on the way.
    TimeExceeded,
    /// No route leads to its destination.
    NetUnreachable,
    /// It is longer than the next hop takes and must not be fragmented.
    PacketTooBig {
        /// What the next hop takes, in bytes of IP packet.
        mtu: Mtu,
    },
}

/// Why a packet is not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NoAnswer {
    /// It is an ICMP error, or cannot be seen to be none.
    #[error("an ICMP error is never answered with another")]
    AboutIcmpError,
    /// Its first fragment earns the answer.
    #[error("only the first fragment of a datagram is answered")]
    NonFirstFragment,
    /// Everybody in the group would answer.
    #[error("the destination is a multicast group")]
    MulticastDestination,
    /// Everybody on the link would answer.
    #[error("the destination is the broadcast address")]
    BroadcastDestination,
    /// Nobody to answer: `::`, or anything in 0.0.0.0/8.
    #[error("the source address is unspecified")]
    UnspecifiedSource,
    /// A loopback address is never seen on a wire.
    #[error("the source address is a loopback address")]
    LoopbackSource,
    /// The answer would reach a whole group.
    #[error("the source address is a multicast group")]
    MulticastSource,
    /// The answer would reach a whole link.
    #[error("the source address is the broadcast address")]
    BroadcastSource,
    /// Class E, 240.0.0.0/4.
    #[error("the source address is reserved")]
    ReservedSource,
    /// The address to answer from is of the other family.
    #[error("no address of the packet's family to answer from")]
    NoSourceAddress,
    /// The buffer is shorter than the answer; [`MAX_LEN`] bytes always do.
    #[error("the answer does not fit its buffer")]
    BufferTooSmall,
}

/// Writes the ICMP error that `error` calls for, from `from` to the source of `packet`, into `out`,
/// and gives its length.
///
/// `meta` is what [`super::ip::parse`] said of `packet`. The quoted transport checksum is quoted as it stands. In
/// a packet read from a TUN it may be partial (`NEEDS_CSUM`), which harms nobody: receivers find their socket by
/// the quoted addresses and ports and do not verify a quote that is cut anyway.
///
/// # Errors [`NoAnswer`] when none is due by RFC 1122 section 3.2.2, RFC 1812 section 4.3.2.7 or
/// RFC 4443 section 2.4 (e), or when it cannot be written. A directed broadcast cannot be told from
/// unicast here; it is for routing to know.
pub fn build(
    error: IcmpError,
    meta: &IpMeta,
    packet: &[u8],
    from: IpAddr,
    sum: SumFn,
    out: &mut [u8],
) -> Result<usize, NoAnswer> {
    answerable(error, meta, packet)?;
    let packet = packet.get(..meta.total_len()).unwrap_or(packet);
    let (header_len, max_len) = match meta.version() {
        Version::V4 => (ipv4::MIN_HEADER_LEN, MAX_LEN_V4),
        Version::V6 => (ipv6::HEADER_LEN, MAX_LEN_V6),
    };
    let quote_max = max_len - header_len - icmp::HEADER_LEN;
    let quote = packet.get(..quote_max).unwrap_or(packet);

    let message_len = icmp::HEADER_LEN + quote.len();
    let out = out
        .get_mut(..header_len + message_len)
        .ok_or(NoAnswer::BufferTooSmall)?;
    let len = out.len();
    let (header, message) = out.split_at_mut(header_len);
    let pseudo = match (from, meta.src()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => write_v4(header, message.len(), meta.tos(), from, to),
        (IpAddr::V6(from), IpAddr::V6(to)) => write_v6(header, message.len(), from, to),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
            return Err(NoAnswer::NoSourceAddress);
        }
    };
    write_message(error, meta.version(), message, quote);
    let check = checksum::finish(checksum::combine(pseudo, sum(message)));
    Icmp::new_unchecked(message).set_check(check);
    Ok(len)
}

/// Writes the IPv4 header of an answer; ICMP for IPv4 has no pseudo header, so its sum is zero.
fn write_v4(
    header: &mut [u8],
    message_len: usize,
    offender_tos: u8,
    from: Ipv4Addr,
    to: Ipv4Addr,
) -> u16 {
    let mut header = Ipv4::new_unchecked(header);
    header.set_header_len(ipv4::MIN_HEADER_LEN);
    header.set_tos(INTERNETWORK_CONTROL | offender_tos & TOS_BITS);
    header.set_total_len(saturating_u16(ipv4::MIN_HEADER_LEN + message_len));
    // An atomic datagram, whose identification means nothing (RFC 6864 section 4.1).
    header.set_id(0);
    header.set_fragment(true, false, 0);
    header.set_ttl(TTL);
    header.set_protocol(protocol::ICMP);
    header.set_src(from);
    header.set_dst(to);
    header.fill_checksum();
    0
}

/// Writes the IPv6 header of an answer and gives the sum of the pseudo header.
fn write_v6(header: &mut [u8], message_len: usize, from: Ipv6Addr, to: Ipv6Addr) -> u16 {
    let len = saturating_u16(message_len);
    let mut header = Ipv6::new_unchecked(header);
    header.set_version_class(INTERNETWORK_CONTROL);
    header.set_payload_len(len);
    header.set_next_header(protocol::ICMPV6);
    header.set_hop_limit(TTL);
    header.set_src(from);
    header.set_dst(to);
    checksum::pseudo_header(
        &from.octets(),
        &to.octets(),
        protocol::ICMPV6,
        u32::from(len),
    )
}

/// Writes the ICMP header, its checksum still zero, and the quote.
fn write_message(error: IcmpError, version: Version, message: &mut [u8], quote: &[u8]) {
    let (kind, code, rest) = match (version, error) {
        (Version::V4, IcmpError::TimeExceeded) => (icmp::V4_TIME_EXCEEDED, 0, 0),
        (Version::V4, IcmpError::NetUnreachable) => (icmp::V4_UNREACHABLE, 0, 0),
        // RFC 1191 section 4: the MTU is the low half of the second word.
        (Version::V4, IcmpError::PacketTooBig { mtu }) => (icmp::V4_UNREACHABLE, 4, mtu.get()),
        (Version::V6, IcmpError::TimeExceeded) => (icmp::V6_TIME_EXCEEDED, 0, 0),
        (Version::V6, IcmpError::NetUnreachable) => (icmp::V6_UNREACHABLE, 0, 0),
        (Version::V6, IcmpError::PacketTooBig { mtu }) => (icmp::V6_PACKET_TOO_BIG, 0, mtu.get()),
    };
    let mut header = Icmp::new_unchecked(&mut *message);
    header.set_kind(kind, code);
    header.set_check(0);
    header.set_rest(u32::from(rest));
    // The caller made the message exactly this long.
    if let Some(body) = message.get_mut(icmp::HEADER_LEN..icmp::HEADER_LEN + quote.len()) {
        body.copy_from_slice(quote);
    }
}

/// Lengths here are at most [`MAX_LEN`], which the type system does not know.
fn saturating_u16(len: usize) -> u16 {
    u16::try_from(len).unwrap_or(u16::MAX)
}

/// The rules on when not to answer, cheapest first.
fn answerable(error: IcmpError, meta: &IpMeta, packet: &[u8]) -> Result<(), NoAnswer> {
    if meta.fragment_off() != 0 {
        return Err(NoAnswer::NonFirstFragment);
    }
    destination_answerable(error, meta.dst())?;
    match meta.src() {
        IpAddr::V4(src) => v4_source_answerable(src)?,
        IpAddr::V6(src) => v6_source_answerable(src)?,
    }
    let icmp = match meta.version() {
        Version::V4 => protocol::ICMP,
        Version::V6 => protocol::ICMPV6,
    };
    let informational = meta.protocol() != icmp
        || meta
            .transport(packet)
            .first()
            .is_some_and(|&kind| icmp::is_informational(meta.version(), kind));
    if informational {
        Ok(())
    } else {
        Err(NoAnswer::AboutIcmpError)
    }
}

const fn destination_answerable(error: IcmpError, dst: IpAddr) -> Result<(), NoAnswer> {
    match (dst, error) {
        (IpAddr::V4(dst), _) if dst.is_broadcast() => Err(NoAnswer::BroadcastDestination),
        // RFC 4443 section 2.4 (e.3): path MTU discovery has to work for IPv6 multicast.
        (IpAddr::V6(_), IcmpError::PacketTooBig { .. }) => Ok(()),
        (dst, _) if dst.is_multicast() => Err(NoAnswer::MulticastDestination),
        _ => Ok(()),
    }
}

const fn v4_source_answerable(src: Ipv4Addr) -> Result<(), NoAnswer> {
    match src.octets() {
        [0, ..] => Err(NoAnswer::UnspecifiedSource),
        [127, ..] => Err(NoAnswer::LoopbackSource),
        [224..=239, ..] => Err(NoAnswer::MulticastSource),
        [255, 255, 255, 255] => Err(NoAnswer::BroadcastSource),
        [240..=255, ..] => Err(NoAnswer::ReservedSource),
        _ => Ok(()),
    }
}

const fn v6_source_answerable(src: Ipv6Addr) -> Result<(), NoAnswer> {
    if src.is_unspecified() {
        Err(NoAnswer::UnspecifiedSource)
    } else if src.is_loopback() {
        Err(NoAnswer::LoopbackSource)
    } else if src.is_multicast() {
        Err(NoAnswer::MulticastSource)
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
