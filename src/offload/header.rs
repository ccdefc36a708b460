//! Owns where the fields that the offloads read and write lie in IPv4, IPv6, TCP and UDP headers, and the
//! few sums over them. Never decides whether packets may be split or merged.
//!
//! Narrower than `wire` on purpose: split and coalesce touch a handful of fields per packet, and both need
//! one answer to "which family, which transport, where does the payload begin".

use thiserror::Error;

/// IPv4 header without options.
pub(super) const IPV4_LEN: usize = 20;
/// IPv6 header without extension headers.
pub(super) const IPV6_LEN: usize = 40;
/// The most of IPv6 extension headers that is passed: options of a socket are a few bytes.
pub(super) const MAX_EXTENSIONS_LEN: usize = 64;
/// TCP header without options.
pub(super) const TCP_LEN: usize = 20;
/// UDP header.
pub(super) const UDP_LEN: usize = 8;

/// IPv4 "don't fragment" in the flags and fragment offset word.
pub(super) const IPV4_DF: u16 = 0x4000;
/// IPv4 "more fragments" and the fragment offset: non-zero in every fragment.
const IPV4_FRAGMENT: u16 = 0x3fff;

const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
const PROTOCOL_ICMPV6: u8 = 58;

/// Address family of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

/// Transport protocol of a packet that offloads apply to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    Tcp,
    Udp,
}

impl Transport {
    /// The number in the IP header and the pseudo header.
    pub(super) const fn protocol(self) -> u8 {
        match self {
            Self::Tcp => PROTOCOL_TCP,
            Self::Udp => PROTOCOL_UDP,
        }
    }

    /// Byte offset of the checksum field in the transport header (the vnet header's `csum_offset`).
    pub(super) const fn csum_offset(self) -> u16 {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }
}

/// What a packet's headers are: enough to split it or to merge it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Headers {
    pub(super) family: Family,
    pub(super) transport: Transport,
    /// IP header with IPv4 options or IPv6 extension headers; the offset of the transport header.
    pub(super) l3_len: u8,
    /// Transport header with TCP options.
    pub(super) l4_len: u8,
}

/// Why a packet's headers do not delimit one whole TCP segment or UDP datagram.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum HeaderError {
    /// The first nibble is neither 4 nor 6.
    #[error("packet is neither IPv4 nor IPv6")]
    NotIp,
    /// The slice ends inside a header.
    #[error("packet ends inside its headers")]
    Truncated,
    /// IPv4 IHL below 5 (RFC 791 section 3.1).
    #[error("IPv4 header length is below 20 bytes")]
    Ipv4HeaderLength,
    /// The IP header's length and the slice's length differ: trailing bytes, or missing ones.
    #[error("IP header says {header} bytes, the packet has {actual}")]
    LengthMismatch {
        /// Bytes according to the IP header.
        header: usize,
        /// Bytes given.
        actual: usize,
    },
    /// A fragment: it lacks either its transport header or the end of its payload.
    #[error("packet is an IPv4 fragment")]
    Fragment,
    /// An IPv6 extension header that is not passed, or another protocol.
    #[error("IPv6 next header {next_header} is an extension header that is not passed, or unknown")]
    ExtensionHeader {
        /// The number found.
        next_header: u8,
    },
    /// Another transport protocol.
    #[error("protocol {protocol} is neither TCP nor UDP")]
    NotTcpOrUdp {
        /// The number found.
        protocol: u8,
    },
    /// TCP data offset below 5, or beyond the packet (RFC 9293 section 3.1).
    #[error("TCP data offset of {offset} bytes is outside the packet")]
    TcpDataOffset {
        /// Bytes according to the TCP header.
        offset: usize,
    },
    /// The UDP length is not what the IP header leaves (RFC 768).
    #[error("UDP length says {header} bytes, the IP header leaves {actual}")]
    UdpLength {
        /// Bytes according to the UDP header.
        header: usize,
        /// Bytes behind the IP header.
        actual: usize,
    },
}

impl Headers {
    /// Reads the headers of one packet that fills the slice.
    #[inline]
    pub(super) fn parse(packet: &[u8]) -> Result<Self, HeaderError> {
        match packet.first().map(|byte| byte >> 4) {
            Some(4) => Self::parse_v4(packet),
            Some(6) => Self::parse_v6(packet),
            _ => Err(HeaderError::NotIp),
        }
    }

    #[inline]
    fn parse_v4(packet: &[u8]) -> Result<Self, HeaderError> {
        let ip: &[u8; IPV4_LEN] = packet.first_chunk().ok_or(HeaderError::Truncated)?;
        let transport = match ip[9] {
            PROTOCOL_TCP => Transport::Tcp,
            PROTOCOL_UDP => Transport::Udp,
            protocol => return Err(HeaderError::NotTcpOrUdp { protocol }),
        };
        let l3_len = (ip[0] & 0x0f) * 4;
        if usize::from(l3_len) < IPV4_LEN {
            return Err(HeaderError::Ipv4HeaderLength);
        }
        if be16(ip, 6) & IPV4_FRAGMENT != 0 {
            return Err(HeaderError::Fragment);
        }
        let header = usize::from(be16(ip, 2));
        Self::behind_ip(packet, header, Family::V4, transport, l3_len)
    }

    #[inline]
    fn parse_v6(packet: &[u8]) -> Result<Self, HeaderError> {
        let ip: &[u8; IPV6_LEN] = packet.first_chunk().ok_or(HeaderError::Truncated)?;
        let transport = match ip[6] {
            PROTOCOL_TCP => Transport::Tcp,
            PROTOCOL_UDP => Transport::Udp,
            PROTOCOL_ICMPV6 => {
                return Err(HeaderError::NotTcpOrUdp {
                    protocol: PROTOCOL_ICMPV6,
                });
            }
            next_header => return Err(HeaderError::ExtensionHeader { next_header }),
        };
        let header = usize::from(be16(ip, 4)) + IPV6_LEN;
        Self::behind_ip(packet, header, Family::V6, transport, 40)
    }

    /// Likewise, also where IPv6 extension headers precede the transport header that are options of a socket (ipv6(7)),
    /// up to [`MAX_EXTENSIONS_LEN`]. A routing header is not passed: the pseudo header is of another destination.
    #[inline]
    pub(super) fn parse_extended(packet: &[u8]) -> Result<Self, HeaderError> {
        match Self::parse(packet) {
            Err(HeaderError::ExtensionHeader { next_header }) => {
                Self::behind_extensions(packet, next_header)
            }
            parsed => parsed,
        }
    }

    #[cold]
    fn behind_extensions(packet: &[u8], mut next_header: u8) -> Result<Self, HeaderError> {
        const HOP_BY_HOP: u8 = 0;
        const DESTINATION: u8 = 60;
        let ip: &[u8; IPV6_LEN] = packet.first_chunk().ok_or(HeaderError::Truncated)?;
        let mut l3_len = IPV6_LEN;
        let transport = loop {
            match next_header {
                HOP_BY_HOP | DESTINATION => {}
                PROTOCOL_TCP => break Transport::Tcp,
                PROTOCOL_UDP => break Transport::Udp,
                PROTOCOL_ICMPV6 => {
                    return Err(HeaderError::NotTcpOrUdp {
                        protocol: next_header,
                    });
                }
                _ => return Err(HeaderError::ExtensionHeader { next_header }),
            }
            let extension = packet.get(l3_len..).and_then(<[u8]>::first_chunk::<8>);
            let &[next, units, ..] = extension.ok_or(HeaderError::Truncated)?;
            l3_len += 8 + 8 * usize::from(units);
            if l3_len > IPV6_LEN + MAX_EXTENSIONS_LEN {
                return Err(HeaderError::ExtensionHeader { next_header });
            }
            next_header = next;
        };
        let header = usize::from(be16(ip, 4)) + IPV6_LEN;
        // At most 104.
        let l3_len = u8::try_from(l3_len).unwrap_or(u8::MAX);
        Self::behind_ip(packet, header, Family::V6, transport, l3_len)
    }

    #[inline]
    fn behind_ip(
        packet: &[u8],
        header: usize,
        family: Family,
        transport: Transport,
        l3_len: u8,
    ) -> Result<Self, HeaderError> {
        if header != packet.len() {
            return Err(HeaderError::LengthMismatch {
                header,
                actual: packet.len(),
            });
        }
        let l4 = packet
            .get(usize::from(l3_len)..)
            .ok_or(HeaderError::Truncated)?;
        let l4_len = match transport {
            Transport::Tcp => {
                let tcp: &[u8; TCP_LEN] = l4.first_chunk().ok_or(HeaderError::Truncated)?;
                let l4_len = (tcp[12] >> 4) * 4;
                let offset = usize::from(l4_len);
                if offset < TCP_LEN || offset > l4.len() {
                    return Err(HeaderError::TcpDataOffset { offset });
                }
                l4_len
            }
            Transport::Udp => {
                let udp: &[u8; UDP_LEN] = l4.first_chunk().ok_or(HeaderError::Truncated)?;
                let header = usize::from(be16(udp, 4));
                if header != l4.len() {
                    return Err(HeaderError::UdpLength {
                        header,
                        actual: l4.len(),
                    });
                }
                8
            }
        };
        Ok(Self {
            family,
            transport,
            l3_len,
            l4_len,
        })
    }

    /// Bytes in front of the payload.
    #[inline]
    pub(super) const fn len(self) -> usize {
        self.l3_len as usize + self.l4_len as usize
    }
}

/// Source and destination address as they lie in the packet; empty when it is too short to have them.
#[inline]
pub(super) fn addresses(packet: &[u8], family: Family) -> &[u8] {
    match family {
        Family::V4 => packet.get(12..20),
        Family::V6 => packet.get(8..40),
    }
    .unwrap_or_default()
}

/// Sum of the pseudo header (RFC 9293 section 3.1, RFC 8200 section 8.1) without the transport length.
#[inline]
pub(super) fn pseudo_sum(packet: &[u8], family: Family, transport: Transport) -> u32 {
    sum_words(addresses(packet, family)) + u32::from(transport.protocol())
}

/// Unfolded sum of a header's 16-bit words. For headers only: at most 64 KiB fit in the result, and an odd
/// last byte is not counted.
#[inline]
pub(super) fn sum_words(bytes: &[u8]) -> u32 {
    let (words, _) = bytes.as_chunks::<2>();
    words
        .iter()
        .map(|&word| u32::from(u16::from_be_bytes(word)))
        .sum()
}

/// Folds a sum of 16-bit words to 16 bits, adding the carries back in (RFC 1071 section 1).
#[inline]
pub(super) const fn fold(sum: u32) -> u16 {
    let [a, b, c, d] = sum.to_be_bytes();
    let (sum, carry) = u16::from_be_bytes([a, b]).overflowing_add(u16::from_be_bytes([c, d]));
    sum + carry as u16
}

/// A big-endian 16-bit field; a constant offset makes the bounds check vanish.
#[inline]
pub(super) const fn be16<const N: usize>(bytes: &[u8; N], off: usize) -> u16 {
    u16::from_be_bytes([bytes[off], bytes[off + 1]])
}

/// A big-endian 32-bit field.
#[inline]
pub(super) const fn be32<const N: usize>(bytes: &[u8; N], off: usize) -> u32 {
    u32::from_be_bytes([bytes[off], bytes[off + 1], bytes[off + 2], bytes[off + 3]])
}

/// Writes a big-endian 16-bit field.
#[inline]
pub(super) const fn put16<const N: usize>(bytes: &mut [u8; N], off: usize, value: u16) {
    [bytes[off], bytes[off + 1]] = value.to_be_bytes();
}

/// Writes a big-endian 32-bit field.
#[inline]
pub(super) const fn put32<const N: usize>(bytes: &mut [u8; N], off: usize, value: u32) {
    [bytes[off], bytes[off + 1], bytes[off + 2], bytes[off + 3]] = value.to_be_bytes();
}
