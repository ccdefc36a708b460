//! Owns the view of a TCP header (RFC 9293 section 3.1). Never looks at the payload.

use super::HeaderError;
use super::field::Field;

const SRC_PORT: Field<2> = Field::at(0);
const DST_PORT: Field<2> = Field::at(2);
const SEQ: Field<4> = Field::at(4);
const ACK: Field<4> = Field::at(8);
const DATA_OFFSET: Field<1> = Field::at(12);
const FLAGS: Field<1> = Field::at(13);
const WINDOW: Field<2> = Field::at(14);
const CHECKSUM: Field<2> = Field::at(16);
const URGENT: Field<2> = Field::at(18);

/// Bytes of a header without options.
pub const MIN_HEADER_LEN: usize = 20;
/// Bytes of the longest header.
pub const MAX_HEADER_LEN: usize = 60;
/// Bytes from the start of the header to its checksum, as a vnet header's `csum_offset` counts
/// them.
pub const CHECKSUM_OFFSET: u16 = 16;

/// The sender is finished.
pub const FIN: u8 = 0x01;
/// Synchronise sequence numbers.
pub const SYN: u8 = 0x02;
/// Reset the connection.
pub const RST: u8 = 0x04;
/// Deliver what is buffered.
pub const PSH: u8 = 0x08;
/// The acknowledgment field counts.
pub const ACK_FLAG: u8 = 0x10;
/// The urgent pointer counts.
pub const URG: u8 = 0x20;
/// ECN echo (RFC 3168).
pub const ECE: u8 = 0x40;
/// Congestion window reduced (RFC 3168).
pub const CWR: u8 = 0x80;

/// A TCP header over bytes that begin with it.
#[derive(Clone, Copy, Debug)]
pub struct Tcp<T> {
    bytes: T,
}

impl<T: AsRef<[u8]>> Tcp<T> {
    /// Checks that the header is whole, options included.
    ///
    /// # Errors
    /// [`HeaderError`] for a cut header or a data offset below five words.
    #[inline]
    pub fn new(bytes: T) -> Result<Self, HeaderError> {
        let have = HeaderError::if_cut("TCP", bytes.as_ref(), MIN_HEADER_LEN)?;
        let header = Self { bytes };
        let len = header.header_len();
        if len < MIN_HEADER_LEN || len > have {
            return Err(HeaderError::BadHeaderLen {
                header: "TCP",
                len,
                have,
            });
        }
        Ok(header)
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

    /// The sequence number of the first payload byte.
    #[inline]
    #[must_use]
    pub fn seq(&self) -> u32 {
        SEQ.get(self.bytes.as_ref())
    }

    /// The acknowledgment number.
    #[inline]
    #[must_use]
    pub fn ack(&self) -> u32 {
        ACK.get(self.bytes.as_ref())
    }

    /// Bytes of the header with its options.
    #[inline]
    #[must_use]
    pub fn header_len(&self) -> usize {
        usize::from(DATA_OFFSET.get(self.bytes.as_ref()) >> 4) * 4
    }

    /// The low half of the data offset byte: reserved bits and Accurate ECN's AE (RFC 9768).
    #[inline]
    #[must_use]
    pub fn reserved(&self) -> u8 {
        DATA_OFFSET.get(self.bytes.as_ref()) & 0x0f
    }

    /// The flags from [`FIN`] to [`CWR`].
    #[inline]
    #[must_use]
    pub fn flags(&self) -> u8 {
        FLAGS.get(self.bytes.as_ref())
    }

    /// The window, unscaled.
    #[inline]
    #[must_use]
    pub fn window(&self) -> u16 {
        WINDOW.get(self.bytes.as_ref())
    }

    /// The checksum field.
    #[inline]
    #[must_use]
    pub fn check(&self) -> u16 {
        CHECKSUM.get(self.bytes.as_ref())
    }

    /// The urgent pointer.
    #[inline]
    #[must_use]
    pub fn urgent(&self) -> u16 {
        URGENT.get(self.bytes.as_ref())
    }

    /// The options, padding included.
    #[inline]
    #[must_use]
    pub fn options(&self) -> &[u8] {
        self.bytes
            .as_ref()
            .get(MIN_HEADER_LEN..self.header_len())
            .unwrap_or_default()
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Tcp<T> {
    /// Sets the sequence number.
    #[inline]
    pub fn set_seq(&mut self, seq: u32) {
        SEQ.set(self.bytes.as_mut(), seq);
    }

    /// Sets the flags.
    #[inline]
    pub fn set_flags(&mut self, flags: u8) {
        FLAGS.set(self.bytes.as_mut(), flags);
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

    fn header() -> etherparse::TcpHeader {
        let mut header = etherparse::TcpHeader::new(0x1234, 443, 0xdead_beef, 0x7fff);
        header.acknowledgment_number = 0x0102_0304;
        (header.psh, header.ack, header.ece) = (true, true, true);
        (header.checksum, header.urgent_pointer) = (0xabcd, 0x55aa);
        header
            .set_options_raw(&[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2])
            .unwrap();
        header
    }

    #[test]
    fn getters_read_what_etherparse_wrote() {
        let bytes = [&header().to_bytes()[..], b"payload"].concat();
        let tcp = Tcp::new(&bytes).unwrap();
        assert_eq!((tcp.src_port(), tcp.dst_port()), (0x1234, 443));
        assert_eq!((tcp.seq(), tcp.ack()), (0xdead_beef, 0x0102_0304));
        assert_eq!((tcp.header_len(), tcp.reserved()), (32, 0));
        assert_eq!(tcp.flags(), PSH | ACK_FLAG | ECE);
        assert_eq!(
            (tcp.window(), tcp.check(), tcp.urgent()),
            (0x7fff, 0xabcd, 0x55aa)
        );
        assert_eq!(tcp.options(), [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
    }

    #[test]
    fn etherparse_reads_what_the_setters_wrote() {
        let mut bytes = header().to_bytes();
        let mut tcp = Tcp::new(&mut bytes[..]).unwrap();
        tcp.set_seq(7);
        tcp.set_flags(FIN | SYN | RST | URG | CWR);
        tcp.set_check(0x1111);
        let mut expected = header();
        (expected.sequence_number, expected.checksum) = (7, 0x1111);
        (expected.psh, expected.ack, expected.ece) = (false, false, false);
        (expected.fin, expected.syn, expected.rst) = (true, true, true);
        (expected.urg, expected.cwr) = (true, true);
        assert_eq!(
            etherparse::TcpHeader::from_slice(&bytes).unwrap().0,
            expected
        );
    }

    #[test]
    fn headers_that_are_not_whole_are_refused() {
        let bytes = header().to_bytes();
        let too_short = HeaderError::TooShort {
            header: "TCP",
            need: 20,
            have: 19,
        };
        assert_eq!(Tcp::new(&bytes[..19]).unwrap_err(), too_short);
        let cut = HeaderError::BadHeaderLen {
            header: "TCP",
            len: 32,
            have: 31,
        };
        assert_eq!(Tcp::new(&bytes[..31]).unwrap_err(), cut);
        let mut low = bytes;
        low[12] = 0x40;
        let low_len = HeaderError::BadHeaderLen {
            header: "TCP",
            len: 16,
            have: 32,
        };
        assert_eq!(Tcp::new(&low[..]).unwrap_err(), low_len);
    }
}
