//! Owns the view of an ICMP header of either family (RFC 792, RFC 4443). Never builds a message.

use super::HeaderError;
use super::field::Field;
use super::ip::Version;

const TYPE: Field<1> = Field::at(0);
const CODE: Field<1> = Field::at(1);
const CHECKSUM: Field<2> = Field::at(2);
const REST: Field<4> = Field::at(4);

/// Bytes of the header.
pub const HEADER_LEN: usize = 8;

/// ICMP for IPv4: destination unreachable (RFC 792).
pub const V4_UNREACHABLE: u8 = 3;
/// ICMP for IPv4: time exceeded (RFC 792).
pub const V4_TIME_EXCEEDED: u8 = 11;
/// ICMP for IPv6: destination unreachable (RFC 4443 section 3.1).
pub const V6_UNREACHABLE: u8 = 1;
/// ICMP for IPv6: packet too big (RFC 4443 section 3.2).
pub const V6_PACKET_TOO_BIG: u8 = 2;
/// ICMP for IPv6: time exceeded (RFC 4443 section 3.3).
pub const V6_TIME_EXCEEDED: u8 = 3;
/// ICMP for IPv6: redirect (RFC 4861), numbered among the informational ones but treated as an
/// error.
pub const V6_REDIRECT: u8 = 137;

/// An ICMP header over bytes that begin with it.
#[derive(Clone, Copy, Debug)]
pub struct Icmp<T> {
    bytes: T,
}

impl<T: AsRef<[u8]>> Icmp<T> {
    /// Checks that the header is whole.
    ///
    /// # Errors
    /// [`HeaderError::TooShort`].
    #[inline]
    pub fn new(bytes: T) -> Result<Self, HeaderError> {
        HeaderError::if_cut("ICMP", bytes.as_ref(), HEADER_LEN)?;
        Ok(Self { bytes })
    }

    /// Takes bytes that are about to be written.
    #[inline]
    pub const fn new_unchecked(bytes: T) -> Self {
        Self { bytes }
    }

    /// The message type.
    #[inline]
    #[must_use]
    pub fn kind(&self) -> u8 {
        TYPE.get(self.bytes.as_ref())
    }

    /// The code within the type.
    #[inline]
    #[must_use]
    pub fn code(&self) -> u8 {
        CODE.get(self.bytes.as_ref())
    }

    /// The checksum field.
    #[inline]
    #[must_use]
    pub fn check(&self) -> u16 {
        CHECKSUM.get(self.bytes.as_ref())
    }

    /// The second word, whose meaning depends on the type.
    #[inline]
    #[must_use]
    pub fn rest(&self) -> u32 {
        REST.get(self.bytes.as_ref())
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Icmp<T> {
    /// Sets the message type and its code.
    #[inline]
    pub fn set_kind(&mut self, kind: u8, code: u8) {
        TYPE.set(self.bytes.as_mut(), kind);
        CODE.set(self.bytes.as_mut(), code);
    }

    /// Sets the checksum field.
    #[inline]
    pub fn set_check(&mut self, check: u16) {
        CHECKSUM.set(self.bytes.as_mut(), check);
    }

    /// Sets the second word.
    #[inline]
    pub fn set_rest(&mut self, rest: u32) {
        REST.set(self.bytes.as_mut(), rest);
    }
}

/// Whether a message may be answered with an ICMP error: only one known to be no error itself.
///
/// Types nobody has assigned count as errors, so that a future error message is not answered
/// either.
#[inline]
#[must_use]
pub const fn is_informational(version: Version, kind: u8) -> bool {
    match version {
        // Echo, router discovery, timestamp, information, address mask, extended echo.
        Version::V4 => matches!(kind, 0 | 8 | 9 | 10 | 13..=18 | 42 | 43),
        // RFC 4443 section 2.1 sets the high bit in them; section 2.4 (e.2) names redirects as
        // well.
        Version::V6 => kind >= 128 && kind != V6_REDIRECT,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etherparse_and_the_getters_read_what_the_setters_wrote() {
        let mut bytes = [0xa5; 9];
        let mut icmp = Icmp::new(&mut bytes[..]).unwrap();
        icmp.set_kind(V4_UNREACHABLE, 4);
        icmp.set_check(0xabcd);
        icmp.set_rest(1400);
        let read = etherparse::Icmpv4Slice::from_slice(&bytes).unwrap();
        let expected = etherparse::Icmpv4Type::DestinationUnreachable(
            etherparse::icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1400 },
        );
        assert_eq!((read.icmp_type(), read.checksum()), (expected, 0xabcd));
        assert_eq!(read.payload(), [0xa5]);
        let icmp = Icmp::new(&bytes).unwrap();
        assert_eq!(
            (icmp.kind(), icmp.code(), icmp.check(), icmp.rest()),
            (3, 4, 0xabcd, 1400)
        );
    }

    #[test]
    fn errors_of_both_families_are_told_from_queries() {
        for kind in [3, 4, 5, 11, 12] {
            assert!(!is_informational(Version::V4, kind), "IPv4 type {kind}");
        }
        for kind in [0, 8, 13, 14] {
            assert!(is_informational(Version::V4, kind), "IPv4 type {kind}");
        }
        for kind in [1, 2, 3, 4, 100, 127, 137] {
            assert!(!is_informational(Version::V6, kind), "IPv6 type {kind}");
        }
        for kind in [128, 129, 133, 135, 136, 143] {
            assert!(is_informational(Version::V6, kind), "IPv6 type {kind}");
        }
    }

    #[test]
    fn a_cut_header_is_refused() {
        let too_short = HeaderError::TooShort {
            header: "ICMP",
            need: 8,
            have: 7,
        };
        assert_eq!(Icmp::new([0; 7]).unwrap_err(), too_short);
    }
}
