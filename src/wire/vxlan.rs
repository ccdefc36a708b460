//! Owns the view of a VXLAN header (RFC 7348 section 5) and the Ethernet header behind it: what stands in front of
//! an IP packet in a VXLAN datagram. Never looks at the packet.

use super::HeaderError;
use super::field::Field;
use super::ip::Version;
use crate::addr::{Mac, Vni};

const FLAGS: Field<1> = Field::at(0);
/// The same and the reserved bytes behind it.
const FLAGS_AND_RESERVED: Field<4> = Field::at(0);
/// The VNI in the upper 24 bits, then a reserved byte.
const VNI: Field<4> = Field::at(4);
const DESTINATION: Field<6> = Field::at(8);
const SOURCE: Field<6> = Field::at(14);
const ETHERTYPE: Field<2> = Field::at(20);

/// The I flag: the VNI is valid.
const HAS_VNI: u8 = 0x08;

/// Bytes of both headers.
pub const HEADER_LEN: usize = 8 + 14;

/// EtherType of a family (IEEE 802 numbers).
const fn ethertype_of(version: Version) -> u16 {
    match version {
        Version::V4 => 0x0800,
        Version::V6 => 0x86dd,
    }
}

/// Both headers over bytes that begin with them.
#[derive(Clone, Copy, Debug)]
pub struct Vxlan<T> {
    bytes: T,
}

impl<T: AsRef<[u8]>> Vxlan<T> {
    /// Checks that both headers are whole.
    ///
    /// # Errors
    /// [`HeaderError::TooShort`].
    #[inline]
    pub fn new(bytes: T) -> Result<Self, HeaderError> {
        HeaderError::if_cut("VXLAN", bytes.as_ref(), HEADER_LEN)?;
        Ok(Self { bytes })
    }

    /// Takes bytes that are about to be written.
    #[inline]
    pub const fn new_unchecked(bytes: T) -> Self {
        Self { bytes }
    }

    /// The VNI, if the I flag says that there is one. All other flags are reserved and ignored on receipt
    /// (RFC 7348 section 5).
    #[inline]
    #[must_use]
    pub fn vni(&self) -> Option<Vni> {
        let bytes = self.bytes.as_ref();
        (FLAGS.get(bytes) & HAS_VNI != 0)
            .then(|| Vni::new(VNI.get(bytes) >> 8))
            .flatten()
    }

    /// Whom the frame is for; `None` for a group.
    #[inline]
    #[must_use]
    pub fn destination(&self) -> Option<Mac> {
        Mac::new(DESTINATION.octets(self.bytes.as_ref()))
    }

    /// Who sent the frame; `None` for what nobody is called.
    #[inline]
    #[must_use]
    pub fn source(&self) -> Option<Mac> {
        Mac::new(SOURCE.octets(self.bytes.as_ref()))
    }

    /// The family of the packet; `None` for anything but IP.
    #[inline]
    #[must_use]
    pub fn version(&self) -> Option<Version> {
        let ethertype = ETHERTYPE.get(self.bytes.as_ref());
        [Version::V4, Version::V6]
            .into_iter()
            .find(|&version| ethertype_of(version) == ethertype)
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Vxlan<T> {
    /// Writes both headers in full.
    #[inline]
    pub fn write(&mut self, vni: Vni, destination: Mac, source: Mac, version: Version) {
        let bytes = self.bytes.as_mut();
        FLAGS_AND_RESERVED.set(bytes, u32::from(HAS_VNI) << 24);
        VNI.set(bytes, vni.get() << 8);
        DESTINATION.put(bytes, destination.bytes());
        SOURCE.put(bytes, source.bytes());
        ETHERTYPE.set(bytes, ethertype_of(version));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{EtherType, Ethernet2Header};

    #[test]
    fn headers_are_written_as_rfc_7348_draws_them_and_etherparse_reads_them() {
        let (a, b) = (Mac::local(0xa), Mac::local(0xb));
        for (version, ethertype) in [
            (Version::V4, EtherType::IPV4),
            (Version::V6, EtherType::IPV6),
        ] {
            let mut bytes = [0xa5; HEADER_LEN + 1];
            Vxlan::new_unchecked(&mut bytes[..]).write(Vni::new(0x12_3456).unwrap(), a, b, version);
            assert_eq!(bytes[..8], [8, 0, 0, 0, 0x12, 0x34, 0x56, 0]);
            let (ethernet, rest) = Ethernet2Header::from_slice(&bytes[8..]).unwrap();
            assert_eq!(ethernet.destination, a.bytes());
            assert_eq!(ethernet.source, b.bytes());
            assert_eq!(ethernet.ether_type, ethertype);
            assert_eq!(rest, [0xa5], "what follows is left alone");
            let read = Vxlan::new(&bytes[..]).unwrap();
            assert_eq!(read.vni(), Vni::new(0x12_3456));
            assert_eq!((read.destination(), read.source()), (Some(a), Some(b)));
            assert_eq!(read.version(), Some(version));
        }
    }

    #[test]
    fn a_vni_counts_only_with_its_flag_and_reserved_bits_do_not() {
        let mut bytes = [0xff; HEADER_LEN];
        assert_eq!(Vxlan::new(bytes).unwrap().vni(), Vni::new(0xff_ffff));
        assert_eq!(Vxlan::new(bytes).unwrap().destination(), None);
        bytes[0] = 0xf7;
        assert_eq!(Vxlan::new(bytes).unwrap().vni(), None);
        assert_eq!(Vxlan::new(bytes).unwrap().version(), None);
    }

    #[test]
    fn a_cut_header_is_told() {
        let error = Vxlan::new([8; HEADER_LEN - 1]).unwrap_err();
        assert!(error.to_string().contains("22 bytes"), "{error}");
    }
}
