//! Owns the view of an IPv6 header and the walk over its extension headers (RFC 8200). Never looks
//! into the transport header.

use std::net::Ipv6Addr;

use super::field::Field;
use super::ip::{IpError, protocol};

const VERSION_CLASS_FLOW: Field<4> = Field::at(0);
const PAYLOAD_LEN: Field<2> = Field::at(4);
const NEXT_HEADER: Field<1> = Field::at(6);
const HOP_LIMIT: Field<1> = Field::at(7);
const SRC: Field<16> = Field::at(8);
const DST: Field<16> = Field::at(24);

/// The first two bytes of every extension header: what follows, and its own length.
const EXTENSION_NEXT: Field<1> = Field::at(0);
const EXTENSION_LEN: Field<1> = Field::at(1);
const FRAGMENT_OFFSET_FLAGS: Field<2> = Field::at(2);
const FRAGMENT_ID: Field<4> = Field::at(4);

/// Bytes of the fixed header.
pub const HEADER_LEN: usize = 40;

/// Extension headers walked before giving up. RFC 8200 section 4.1 lists seven for a full chain, so
/// no packet that keeps to it is refused, and a hostile one costs eight steps.
pub const MAX_EXTENSIONS: usize = 8;

/// An IPv6 header over bytes that begin with it.
#[derive(Clone, Copy, Debug)]
pub struct Ipv6<T> {
    bytes: T,
}

impl<T: AsRef<[u8]>> Ipv6<T> {
    /// Checks the version and that the fixed header is whole. The payload length is not compared
    /// with the bytes.
    ///
    /// # Errors
    /// [`IpError::TooShort`], [`IpError::BadVersion`].
    #[inline]
    pub fn new(bytes: T) -> Result<Self, IpError> {
        let have = bytes.as_ref().len();
        if have < HEADER_LEN {
            return Err(IpError::TooShort {
                need: HEADER_LEN,
                have,
            });
        }
        let header = Self { bytes };
        match header.first_word() >> 28 {
            6 => Ok(header),
            version => Err(IpError::BadVersion {
                version: version.to_be_bytes()[3],
            }),
        }
    }

    /// Takes bytes that are about to be written.
    #[inline]
    pub const fn new_unchecked(bytes: T) -> Self {
        Self { bytes }
    }

    /// The traffic class: DSCP and ECN.
    #[inline]
    #[must_use]
    pub fn traffic_class(&self) -> u8 {
        (self.first_word() >> 20).to_be_bytes()[3]
    }

    /// Bytes behind the fixed header, extension headers included.
    #[inline]
    #[must_use]
    pub fn payload_len(&self) -> u16 {
        PAYLOAD_LEN.get(self.bytes.as_ref())
    }

    /// The protocol or extension behind the fixed header.
    #[inline]
    #[must_use]
    pub fn next_header(&self) -> u8 {
        NEXT_HEADER.get(self.bytes.as_ref())
    }

    /// The hop limit.
    #[inline]
    #[must_use]
    pub fn hop_limit(&self) -> u8 {
        HOP_LIMIT.get(self.bytes.as_ref())
    }

    /// The source address.
    #[inline]
    #[must_use]
    pub fn src(&self) -> Ipv6Addr {
        Ipv6Addr::from_octets(SRC.octets(self.bytes.as_ref()))
    }

    /// The destination address.
    #[inline]
    #[must_use]
    pub fn dst(&self) -> Ipv6Addr {
        Ipv6Addr::from_octets(DST.octets(self.bytes.as_ref()))
    }

    /// Walks the extension headers inside the first `total_len` bytes up to the transport header.
    ///
    /// A fragment that is not the first has no further headers, so the walk ends behind its
    /// fragment header. ESP and unknown protocols end it as a transport does.
    ///
    /// # Errors
    /// [`IpError::TruncatedExtension`], [`IpError::TooManyExtensions`].
    #[inline]
    pub fn chain(&self, total_len: usize) -> Result<Chain, IpError> {
        let mut chain = Chain {
            protocol: self.next_header(),
            transport_off: HEADER_LEN,
            fragment: None,
        };
        if !is_extension(chain.protocol) {
            return Ok(chain);
        }
        let bytes = self.bytes.as_ref();
        let bytes = bytes.get(..total_len).unwrap_or(bytes);
        for _ in 0..MAX_EXTENSIONS {
            chain.step(bytes)?;
            if chain.ends() {
                return Ok(chain);
            }
        }
        Err(IpError::TooManyExtensions)
    }

    #[inline]
    fn first_word(&self) -> u32 {
        VERSION_CLASS_FLOW.get(self.bytes.as_ref())
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Ipv6<T> {
    /// Sets the version to 6, the traffic class, and the flow label to zero.
    #[inline]
    pub fn set_version_class(&mut self, traffic_class: u8) {
        let word = 0x6000_0000 | u32::from(traffic_class) << 20;
        VERSION_CLASS_FLOW.set(self.bytes.as_mut(), word);
    }

    /// Sets the traffic class and keeps the flow label.
    #[inline]
    pub fn set_traffic_class(&mut self, traffic_class: u8) {
        let word = self.first_word() & 0xf00f_ffff | u32::from(traffic_class) << 20;
        VERSION_CLASS_FLOW.set(self.bytes.as_mut(), word);
    }

    /// Sets the bytes behind the fixed header.
    #[inline]
    pub fn set_payload_len(&mut self, len: u16) {
        PAYLOAD_LEN.set(self.bytes.as_mut(), len);
    }

    /// Sets the protocol or extension behind the fixed header.
    #[inline]
    pub fn set_next_header(&mut self, protocol: u8) {
        NEXT_HEADER.set(self.bytes.as_mut(), protocol);
    }

    /// Sets the hop limit.
    #[inline]
    pub fn set_hop_limit(&mut self, hop_limit: u8) {
        HOP_LIMIT.set(self.bytes.as_mut(), hop_limit);
    }

    /// Sets the source address.
    #[inline]
    pub fn set_src(&mut self, src: Ipv6Addr) {
        SRC.put(self.bytes.as_mut(), src.octets());
    }

    /// Sets the destination address.
    #[inline]
    pub fn set_dst(&mut self, dst: Ipv6Addr) {
        DST.put(self.bytes.as_mut(), dst.octets());
    }
}

/// Where the extension headers lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain {
    /// What stands at `transport_off`.
    pub protocol: u8,
    /// Bytes of the fixed header and all extension headers.
    pub transport_off: usize,
    /// The fragment header, if there is one.
    pub fragment: Option<Fragment>,
}

/// What a fragment header says (RFC 8200 section 4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Where the payload belongs, in bytes: a multiple of eight.
    pub off: u16,
    /// Whether further fragments follow.
    pub more: bool,
    /// The datagram's identification.
    pub id: u32,
}

impl Fragment {
    const fn cuts(&self) -> bool {
        self.more || self.off != 0
    }
}

impl Chain {
    /// Passes the extension header at the current offset.
    fn step(&mut self, bytes: &[u8]) -> Result<(), IpError> {
        let kind = self.protocol;
        let truncated = IpError::TruncatedExtension { kind };
        // Every extension header has at least eight bytes.
        let rest = bytes.get(self.transport_off..).unwrap_or_default();
        if rest.len() < 8 {
            return Err(truncated);
        }
        let units = usize::from(EXTENSION_LEN.get(rest));
        let len = match kind {
            protocol::FRAGMENT => 8,
            protocol::AUTHENTICATION => 8 + units * 4,
            _ => 8 + units * 8,
        };
        if rest.len() < len {
            return Err(truncated);
        }
        if kind == protocol::FRAGMENT {
            let word = FRAGMENT_OFFSET_FLAGS.get(rest);
            let found = Fragment {
                off: word & !7,
                more: word & 1 != 0,
                id: FRAGMENT_ID.get(rest),
            };
            // The outermost that cuts counts: a whole datagram inside a fragment is still cut, and so is a fragment
            // behind a header that cuts nothing (RFC 6946).
            match self.fragment {
                Some(kept) if kept.cuts() || !found.cuts() => {}
                _ => self.fragment = Some(found),
            }
        }
        self.protocol = EXTENSION_NEXT.get(rest);
        self.transport_off += len;
        Ok(())
    }

    fn ends(&self) -> bool {
        !is_extension(self.protocol) || self.fragment.is_some_and(|fragment| fragment.off != 0)
    }
}

#[inline]
const fn is_extension(protocol: u8) -> bool {
    matches!(
        protocol,
        protocol::HOP_BY_HOP
            | protocol::ROUTING
            | protocol::FRAGMENT
            | protocol::AUTHENTICATION
            | protocol::DESTINATION
            | protocol::MOBILITY
            | protocol::HIP
            | protocol::SHIM6
    )
}
