//! Owns the view of a UDP header (RFC 768). Never looks at the payload.

use super::HeaderError;
use super::field::Field;

const SRC_PORT: Field<2> = Field::at(0);
const DST_PORT: Field<2> = Field::at(2);
const LEN: Field<2> = Field::at(4);
const CHECKSUM: Field<2> = Field::at(6);

/// Bytes of the header.
pub const HEADER_LEN: usize = 8;
/// Bytes from the start of the header to its checksum, as a vnet header's `csum_offset` counts
/// them.
pub const CHECKSUM_OFFSET: u16 = 6;

/// A UDP header over bytes that begin with it.
#[derive(Clone, Copy, Debug)]
pub struct Udp<T> {
    bytes: T,
}

impl<T: AsRef<[u8]>> Udp<T> {
    /// Checks that the header is whole. The length field is not compared with the bytes.
    ///
    /// # Errors
    /// [`HeaderError::TooShort`].
    #[inline]
    pub fn new(bytes: T) -> Result<Self, HeaderError> {
        HeaderError::if_cut("UDP", bytes.as_ref(), HEADER_LEN)?;
        Ok(Self { bytes })
    }

    /// Takes bytes that are about to be written.
    #[inline]
    pub const fn new_unchecked(bytes: T) -> Self {
        Self { bytes }
    }

    /// The source port.
    #[inline]
    #[must_use]
    pub fn src_port(&self) -> u16 {
        SRC_PORT.get(self.bytes.as_ref())
    }

    /// The destination port.
    #[inline]
    #[must_use]
    pub fn dst_port(&self) -> u16 {
        DST_PORT.get(self.bytes.as_ref())
    }

    /// Bytes of the header and payload as the sender counted them.
    #[inline]
    #[must_use]
    pub fn datagram_len(&self) -> u16 {
        LEN.get(self.bytes.as_ref())
    }

    /// The checksum field; zero means that the sender computed none.
    #[inline]
    #[must_use]
    pub fn check(&self) -> u16 {
        CHECKSUM.get(self.bytes.as_ref())
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Udp<T> {
    /// Sets both ports.
    #[inline]
    pub fn set_ports(&mut self, src: u16, dst: u16) {
        SRC_PORT.set(self.bytes.as_mut(), src);
        DST_PORT.set(self.bytes.as_mut(), dst);
    }

    /// Sets the length of header and payload in bytes.
    #[inline]
    pub fn set_datagram_len(&mut self, len: u16) {
        LEN.set(self.bytes.as_mut(), len);
    }

    /// Sets the checksum field.
    #[inline]
    pub fn set_check(&mut self, check: u16) {
        CHECKSUM.set(self.bytes.as_mut(), check);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etherparse_and_the_getters_read_what_the_setters_wrote() {
        let mut bytes = [0xa5; 9];
        let mut udp = Udp::new(&mut bytes[..]).unwrap();
        udp.set_ports(0x1234, 8285);
        udp.set_datagram_len(0x0102);
        udp.set_check(0xabcd);
        let (read, rest) = etherparse::UdpHeader::from_slice(&bytes).unwrap();
        let expected = etherparse::UdpHeader {
            source_port: 0x1234,
            destination_port: 8285,
            length: 0x0102,
            checksum: 0xabcd,
        };
        assert_eq!((read, rest), (expected, &[0xa5][..]));
        let udp = Udp::new(&bytes).unwrap();
        assert_eq!((udp.src_port(), udp.dst_port()), (0x1234, 8285));
        assert_eq!((udp.datagram_len(), udp.check()), (0x0102, 0xabcd));
    }

    #[test]
    fn a_cut_header_is_refused() {
        let too_short = HeaderError::TooShort {
            header: "UDP",
            need: 8,
            have: 7,
        };
        assert_eq!(Udp::new([0; 7]).unwrap_err(), too_short);
    }
}
