//! Owns turning a superpacket into segments: which bytes are segment `i`'s payload, and what its headers are.
//! Never copies payload and never looks at the MTU.
//!
//! The rules are the kernel's own (`tcp_gso_segment`, `__udp_gso_segment`, `inet_gso_segment`), so that a
//! receiver cannot tell who split. What all segments share is summed once in [`Split::new`]; a segment costs
//! one header copy, a few patches and one sum over its payload.

use std::ops::Range;

use thiserror::Error;

use super::header::{
    Family, HeaderError, Headers, IPV4_LEN, IPV6_LEN, MAX_EXTENSIONS_LEN, TCP_LEN, Transport,
    UDP_LEN, be16, be32, fold, pseudo_sum, put16, put32, sum_words,
};
use super::vnet_hdr::{Gso, VnetHdr};
use crate::wire::checksum::SumFn;

/// The longest header of a segment: IPv6 with as many extension headers as are passed, and TCP with all options, which
/// has 60 bytes. (IPv4 with all options has 60, too.)
pub const MAX_HEADER_LEN: usize = IPV6_LEN + MAX_EXTENSIONS_LEN + 60;

/// The most segments one superpacket may hold. Linux sends no TCP payload below 8 bytes
/// (`TCP_MIN_SND_MSS` 48 less 40 of options), and 65535 / 8 rounds up to this. A header slab may be smaller:
/// segments are described in any order, so a caller can send what it has and resume.
pub const MAX_SEGMENTS: usize = 8192;

const _: () = assert!(MAX_SEGMENTS == 65535_usize.div_ceil(8));
const _: () = assert!(MAX_HEADER_LEN >= 60 + 60);

const TCP_FIN: u16 = 0x01;
const TCP_PSH: u16 = 0x08;
const TCP_CWR: u16 = 0x80;

/// Why a packet read from the TUN cannot be segmented.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum SplitError {
    /// The headers do not delimit one TCP or UDP packet that fills the slice.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The vnet header's GSO type is for another family or transport.
    #[error("gso type {gso:?} does not fit the packet's headers")]
    GsoMismatch {
        /// The type announced.
        gso: Gso,
    },
    /// Nothing vouches for the payload: a checksum computed now would hide damage.
    #[error("superpacket has neither NEEDS_CSUM nor DATA_VALID")]
    Unverified,
    /// `csum_start` and `csum_offset` do not point at the transport checksum.
    #[error("vnet header's checksum field {csum_start}+{csum_offset} is not the transport's")]
    ChecksumField {
        /// Offset announced.
        csum_start: u16,
        /// Offset announced.
        csum_offset: u16,
    },
    /// A superpacket without payload.
    #[error("superpacket has no payload")]
    NoPayload,
    /// `gso_size` zero.
    #[error("superpacket has gso_size 0")]
    NoSize,
    /// More than [`MAX_SEGMENTS`].
    #[error("superpacket of {count} segments exceeds {MAX_SEGMENTS}")]
    TooManySegments {
        /// Segments it would make.
        count: usize,
    },
}

/// Why a plain packet's checksum cannot be completed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ChecksumError {
    /// A superpacket's checksums are written per segment.
    #[error("packet is a superpacket: split it instead")]
    Superpacket,
    /// `csum_start + csum_offset` does not lie in the packet.
    #[error("checksum field {csum_start}+{csum_offset} is outside a packet of {len} bytes")]
    FieldOutside {
        /// Offset announced.
        csum_start: u16,
        /// Offset announced.
        csum_offset: u16,
        /// Bytes given.
        len: usize,
    },
}

/// The segments of one packet read from the TUN.
///
/// Valid for the bytes it was made from: change the header (the TTL) before [`Split::new`], not after.
#[derive(Clone, Copy, Debug)]
pub struct Split {
    len: usize,
    gso_size: usize,
    count: usize,
    /// Absent for a plain packet, which is its own only segment.
    template: Option<Template>,
}

/// What every segment's header has in common.
#[derive(Clone, Copy, Debug)]
struct Template {
    headers: Headers,
    /// IPv4 header without total length, identification and checksum; zero for IPv6.
    ip_sum: u32,
    /// IPv4 identification of the first segment.
    id: u16,
    /// Pseudo header and transport header without what differs between segments: lengths and checksum, for
    /// TCP also sequence number, data offset and flags.
    l4_sum: u32,
    /// TCP sequence number of the first segment.
    seq: u32,
    /// TCP data offset and flags of the superpacket.
    flags: u16,
}

impl Split {
    /// Validates a packet together with its vnet header.
    ///
    /// A plain packet ([`Gso::None`]) is taken as it is: one segment, no header to write, all of it payload.
    /// If it `needs_csum`, [`finish_checksum`] comes first.
    ///
    /// # Errors
    /// [`SplitError`] names what is wrong with a superpacket; plain packets are not validated.
    pub fn new(vnet: &VnetHdr, packet: &[u8]) -> Result<Self, SplitError> {
        let len = packet.len();
        if !vnet.is_superpacket() {
            return Ok(Self {
                len,
                gso_size: len,
                count: 1,
                template: None,
            });
        }
        let headers = Headers::parse_extended(packet)?;
        match (vnet.gso, headers.family, headers.transport) {
            (Gso::TcpV4 { .. }, Family::V4, Transport::Tcp)
            | (Gso::TcpV6 { .. }, Family::V6, Transport::Tcp)
            | (Gso::UdpL4, _, Transport::Udp) => {}
            (gso, _, _) => return Err(SplitError::GsoMismatch { gso }),
        }
        // `netif_needs_gso` lets a superpacket through to the device only as CHECKSUM_PARTIAL or
        // CHECKSUM_UNNECESSARY, which arrive here as these two flags.
        if !vnet.needs_csum && !vnet.data_valid {
            return Err(SplitError::Unverified);
        }
        let (csum_start, csum_offset) = (vnet.csum_start, vnet.csum_offset);
        let expected = (u16::from(headers.l3_len), headers.transport.csum_offset());
        if vnet.needs_csum && (csum_start, csum_offset) != expected {
            return Err(SplitError::ChecksumField {
                csum_start,
                csum_offset,
            });
        }
        let payload_len = len - headers.len();
        if payload_len == 0 {
            return Err(SplitError::NoPayload);
        }
        let gso_size = usize::from(vnet.gso_size);
        if gso_size == 0 {
            return Err(SplitError::NoSize);
        }
        let count = payload_len.div_ceil(gso_size);
        if count > MAX_SEGMENTS {
            return Err(SplitError::TooManySegments { count });
        }
        let template = Some(Template::new(packet, headers).ok_or(HeaderError::Truncated)?);
        Ok(Self {
            len,
            gso_size,
            count,
            template,
        })
    }

    /// How many segments there are: at least 1, at most [`MAX_SEGMENTS`].
    #[must_use]
    pub const fn count(&self) -> usize {
        self.count
    }

    /// Bytes [`Split::write_header`] writes for each segment; 0 for a plain packet.
    #[must_use]
    pub const fn header_len(&self) -> usize {
        match &self.template {
            Some(template) => template.headers.len(),
            None => 0,
        }
    }

    /// Payload bytes of every segment but the last.
    #[must_use]
    pub const fn gso_size(&self) -> usize {
        self.gso_size
    }

    /// Bytes of segment `i` with its headers; of its headers alone if there is no such segment.
    #[must_use]
    pub fn segment_len(&self, i: usize) -> usize {
        self.header_len() + self.payload(i).len()
    }

    /// Where in the packet segment `i`'s payload lies; empty if there is no such segment.
    #[must_use]
    pub fn payload(&self, i: usize) -> Range<usize> {
        let start = i
            .saturating_mul(self.gso_size)
            .saturating_add(self.header_len());
        let end = start.saturating_add(self.gso_size);
        start.min(self.len)..end.min(self.len)
    }

    /// Writes segment `i`'s headers, complete with every length and checksum, and returns their length.
    ///
    /// `packet` must be the slice this was made from. Writes nothing and returns 0 for a plain packet, for
    /// an `i` that is not below [`Split::count`], and for an `out` shorter than [`Split::header_len`].
    #[inline]
    pub fn write_header(&self, packet: &[u8], i: usize, sum: SumFn, out: &mut [u8]) -> usize {
        let Some(template) = &self.template else {
            return 0;
        };
        let header_len = template.headers.len();
        let (Some(header), Some(payload), Some(out)) = (
            packet.get(..header_len),
            packet.get(self.payload(i)),
            out.get_mut(..header_len),
        ) else {
            return 0;
        };
        if i >= self.count {
            return 0;
        }
        out.copy_from_slice(header);
        let position = Position {
            index: i,
            offset: i * self.gso_size,
            is_last: i + 1 == self.count,
            payload_len: payload.len(),
            payload_sum: sum(payload),
        };
        template.patch(&position, out);
        header_len
    }
}

/// What sets one segment apart from its siblings.
struct Position {
    index: usize,
    /// Payload bytes in front of this segment.
    offset: usize,
    is_last: bool,
    payload_len: usize,
    payload_sum: u16,
}

impl Template {
    fn new(packet: &[u8], headers: Headers) -> Option<Self> {
        let l3_len = usize::from(headers.l3_len);
        let (ip_sum, id) = match headers.family {
            Family::V4 => {
                let ip: &[u8; IPV4_LEN] = packet.first_chunk()?;
                let varying = sum_words(&ip[2..6]) + u32::from(be16(ip, 10));
                (sum_words(packet.get(..l3_len)?) - varying, be16(ip, 4))
            }
            Family::V6 => (0, 0),
        };
        let l4 = packet.get(l3_len..headers.len())?;
        let (varying, seq, flags) = match headers.transport {
            Transport::Tcp => {
                let tcp: &[u8; TCP_LEN] = l4.first_chunk()?;
                let varying = sum_words(&tcp[4..8]) + u32::from(be16(tcp, 12));
                (
                    varying + u32::from(be16(tcp, 16)),
                    be32(tcp, 4),
                    be16(tcp, 12),
                )
            }
            Transport::Udp => (sum_words(l4.get(4..UDP_LEN)?), 0, 0),
        };
        let pseudo = pseudo_sum(packet, headers.family, headers.transport);
        Some(Self {
            headers,
            ip_sum,
            id,
            l4_sum: pseudo + sum_words(l4) - varying,
            seq,
            flags,
        })
    }

    /// Patches a copy of the superpacket's header into that of one segment.
    #[inline]
    fn patch(&self, at: &Position, header: &mut [u8]) {
        let Some((ip, l4)) = header.split_at_mut_checked(usize::from(self.headers.l3_len)) else {
            return;
        };
        let l4_len = low16(usize::from(self.headers.l4_len) + at.payload_len);
        match self.headers.family {
            Family::V4 => {
                let Some(ip) = ip.first_chunk_mut::<IPV4_LEN>() else {
                    return;
                };
                let total_len = u16::from(self.headers.l3_len).wrapping_add(l4_len);
                let id = self.id.wrapping_add(low16(at.index));
                put16(ip, 2, total_len);
                put16(ip, 4, id);
                put16(
                    ip,
                    10,
                    !fold(self.ip_sum + u32::from(total_len) + u32::from(id)),
                );
            }
            Family::V6 => {
                let Some(ip) = ip.first_chunk_mut::<IPV6_LEN>() else {
                    return;
                };
                let extensions_len = u16::from(self.headers.l3_len) - low16(IPV6_LEN);
                put16(ip, 4, extensions_len + l4_len);
            }
        }
        let sum = self.l4_sum + u32::from(l4_len) + u32::from(at.payload_sum);
        match self.headers.transport {
            Transport::Tcp => {
                let Some(tcp) = l4.first_chunk_mut::<TCP_LEN>() else {
                    return;
                };
                let seq = self
                    .seq
                    .wrapping_add(u32::try_from(at.offset).unwrap_or(u32::MAX));
                let not_last = if at.is_last { 0 } else { TCP_FIN | TCP_PSH };
                let not_first = if at.index == 0 { 0 } else { TCP_CWR };
                let flags = self.flags & !(not_last | not_first);
                put32(tcp, 4, seq);
                put16(tcp, 12, flags);
                let seq_sum = (seq >> 16) + (seq & 0xffff);
                put16(tcp, 16, !fold(sum + seq_sum + u32::from(flags)));
            }
            Transport::Udp => {
                let Some(udp) = l4.first_chunk_mut::<UDP_LEN>() else {
                    return;
                };
                put16(udp, 4, l4_len);
                put16(udp, 6, never_zero(!fold(sum + u32::from(l4_len))));
            }
        }
    }
}

/// Completes a plain packet's checksum where the kernel left the folded pseudo-header sum (`NEEDS_CSUM`);
/// a packet that does not need it is left alone.
///
/// # Errors
/// [`ChecksumError`] when the field lies outside the packet, or the packet is a superpacket. Nothing is
/// written then.
pub fn finish_checksum(vnet: &VnetHdr, packet: &mut [u8], sum: SumFn) -> Result<(), ChecksumError> {
    if !vnet.needs_csum {
        return Ok(());
    }
    if vnet.is_superpacket() {
        return Err(ChecksumError::Superpacket);
    }
    let (csum_start, csum_offset, len) = (vnet.csum_start, vnet.csum_offset, packet.len());
    let outside = ChecksumError::FieldOutside {
        csum_start,
        csum_offset,
        len,
    };
    let covered = packet.get_mut(usize::from(csum_start)..).ok_or(outside)?;
    let complete = !sum(covered);
    let field = covered
        .get_mut(usize::from(csum_offset)..)
        .and_then(<[u8]>::first_chunk_mut::<2>)
        .ok_or(outside)?;
    let is_udp = csum_offset == Transport::Udp.csum_offset();
    *field = if is_udp {
        never_zero(complete)
    } else {
        complete
    }
    .to_be_bytes();
    Ok(())
}

/// A UDP checksum of zero would mean "no checksum"; its one's-complement twin says the same sum (RFC 768).
const fn never_zero(checksum: u16) -> u16 {
    if checksum == 0 { 0xffff } else { checksum }
}

/// The low 16 bits of a value that validation keeps below 65536.
#[inline]
const fn low16(value: usize) -> u16 {
    let [.., high, low] = value.to_be_bytes();
    u16::from_be_bytes([high, low])
}
