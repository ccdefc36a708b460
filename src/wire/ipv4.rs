//! Owns the view of an IPv4 header (RFC 791). Never looks behind the header.

use std::net::Ipv4Addr;

use super::checksum;
use super::field::Field;
use super::ip::IpError;

const VERSION_IHL: Field<1> = Field::at(0);
const TOS: Field<1> = Field::at(1);
const TOTAL_LEN: Field<2> = Field::at(2);
const ID: Field<2> = Field::at(4);
const FLAGS_OFFSET: Field<2> = Field::at(6);
const TTL: Field<1> = Field::at(8);
const TTL_PROTOCOL: Field<2> = Field::at(8);
const PROTOCOL: Field<1> = Field::at(9);
const CHECKSUM: Field<2> = Field::at(10);
const SRC: Field<4> = Field::at(12);
const DST: Field<4> = Field::at(16);

const VERSION_TOS: Field<2> = Field::at(0);

/// Bytes of a header without options.
pub const MIN_HEADER_LEN: usize = 20;
/// Bytes of the longest header: the length field counts 32-bit words in four bits.
pub const MAX_HEADER_LEN: usize = 60;

const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;
const OFFSET_MASK: u16 = 0x1fff;

/// An IPv4 header over bytes that begin with it.
#[derive(Clone, Copy, Debug)]
pub struct Ipv4<T> {
    bytes: T,
}

impl<T: AsRef<[u8]>> Ipv4<T> {
    /// Checks the version and that the header is whole, options included. The total length is not
    /// compared with the bytes.
    ///
    /// # Errors
    /// [`IpError::TooShort`], [`IpError::BadVersion`], [`IpError::BadHeaderLen`].
    #[inline]
    pub fn new(bytes: T) -> Result<Self, IpError> {
        let have = bytes.as_ref().len();
        if have < MIN_HEADER_LEN {
            return Err(IpError::TooShort {
                need: MIN_HEADER_LEN,
                have,
            });
        }
        let header = Self { bytes };
        let version = VERSION_IHL.get(header.bytes.as_ref()) >> 4;
        if version != 4 {
            return Err(IpError::BadVersion { version });
        }
        let len = header.header_len();
        if len < MIN_HEADER_LEN || len > have {
            return Err(IpError::BadHeaderLen { len, have });
        }
        Ok(header)
    }

    /// Takes bytes that are about to be written.
    #[inline]
    pub const fn new_unchecked(bytes: T) -> Self {
        Self { bytes }
    }

    /// Bytes of the header with its options.
    #[inline]
    #[must_use]
    pub fn header_len(&self) -> usize {
        usize::from(VERSION_IHL.get(self.bytes.as_ref()) & 0x0f) * 4
    }

    /// The type of service byte: DSCP and ECN.
    #[inline]
    #[must_use]
    pub fn tos(&self) -> u8 {
        TOS.get(self.bytes.as_ref())
    }

    /// Bytes of the packet as its sender counted them.
    #[inline]
    #[must_use]
    pub fn total_len(&self) -> u16 {
        TOTAL_LEN.get(self.bytes.as_ref())
    }

    /// The identification, meaningful for fragments only (RFC 6864).
    #[inline]
    #[must_use]
    pub fn id(&self) -> u16 {
        ID.get(self.bytes.as_ref())
    }

    /// Whether routers must not fragment the packet.
    #[inline]
    #[must_use]
    pub fn dont_fragment(&self) -> bool {
        FLAGS_OFFSET.get(self.bytes.as_ref()) & DONT_FRAGMENT != 0
    }

    /// Whether further fragments of the datagram follow.
    #[inline]
    #[must_use]
    pub fn more_fragments(&self) -> bool {
        FLAGS_OFFSET.get(self.bytes.as_ref()) & MORE_FRAGMENTS != 0
    }

    /// Where the payload belongs in the datagram, in bytes: a multiple of eight up to 65 528.
    #[inline]
    #[must_use]
    pub fn fragment_off(&self) -> u16 {
        (FLAGS_OFFSET.get(self.bytes.as_ref()) & OFFSET_MASK) * 8
    }

    /// The time to live.
    #[inline]
    #[must_use]
    pub fn ttl(&self) -> u8 {
        TTL.get(self.bytes.as_ref())
    }

    /// The protocol behind the header.
    #[inline]
    #[must_use]
    pub fn protocol(&self) -> u8 {
        PROTOCOL.get(self.bytes.as_ref())
    }

    /// The header checksum field.
    #[inline]
    #[must_use]
    pub fn check(&self) -> u16 {
        CHECKSUM.get(self.bytes.as_ref())
    }

    /// The source address.
    #[inline]
    #[must_use]
    pub fn src(&self) -> Ipv4Addr {
        Ipv4Addr::from_octets(SRC.octets(self.bytes.as_ref()))
    }

    /// The destination address.
    #[inline]
    #[must_use]
    pub fn dst(&self) -> Ipv4Addr {
        Ipv4Addr::from_octets(DST.octets(self.bytes.as_ref()))
    }

    /// The options, padding included; empty for most packets.
    #[inline]
    #[must_use]
    pub fn options(&self) -> &[u8] {
        self.bytes
            .as_ref()
            .get(MIN_HEADER_LEN..self.header_len())
            .unwrap_or_default()
    }

    /// Whether the header checksum is right.
    #[inline]
    #[must_use]
    pub fn checksum_ok(&self) -> bool {
        checksum::verify(checksum::sum_scalar(self.header()))
    }

    fn header(&self) -> &[u8] {
        self.bytes
            .as_ref()
            .get(..self.header_len())
            .unwrap_or_default()
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Ipv4<T> {
    /// Sets the version to 4 and the header's length, rounded up to a multiple of four. At most
    /// [`MAX_HEADER_LEN`].
    #[inline]
    pub fn set_header_len(&mut self, len: usize) {
        let words = u8::try_from(len.div_ceil(4)).map_or(0x0f, |words| words.min(0x0f));
        VERSION_IHL.set(self.bytes.as_mut(), 0x40 | words);
    }

    /// Sets the type of service byte and leaves the checksum as it is.
    #[inline]
    pub fn set_tos(&mut self, tos: u8) {
        TOS.set(self.bytes.as_mut(), tos);
    }

    /// Sets the total length in bytes.
    #[inline]
    pub fn set_total_len(&mut self, len: u16) {
        TOTAL_LEN.set(self.bytes.as_mut(), len);
    }

    /// Sets the identification.
    #[inline]
    pub fn set_id(&mut self, id: u16) {
        ID.set(self.bytes.as_mut(), id);
    }

    /// Sets the flags and the fragment offset, which is in bytes and loses its three low bits.
    #[inline]
    pub fn set_fragment(&mut self, dont_fragment: bool, more_fragments: bool, off: u16) {
        let mut word = off / 8;
        if dont_fragment {
            word |= DONT_FRAGMENT;
        }
        if more_fragments {
            word |= MORE_FRAGMENTS;
        }
        FLAGS_OFFSET.set(self.bytes.as_mut(), word);
    }

    /// Sets the time to live and leaves the checksum as it is.
    #[inline]
    pub fn set_ttl(&mut self, ttl: u8) {
        TTL.set(self.bytes.as_mut(), ttl);
    }

    /// Sets the protocol behind the header.
    #[inline]
    pub fn set_protocol(&mut self, protocol: u8) {
        PROTOCOL.set(self.bytes.as_mut(), protocol);
    }

    /// Sets the source address.
    #[inline]
    pub fn set_src(&mut self, src: Ipv4Addr) {
        SRC.put(self.bytes.as_mut(), src.octets());
    }

    /// Sets the destination address.
    #[inline]
    pub fn set_dst(&mut self, dst: Ipv4Addr) {
        DST.put(self.bytes.as_mut(), dst.octets());
    }

    /// Computes the header checksum anew, as the last setter of a header written from scratch.
    #[inline]
    pub fn fill_checksum(&mut self) {
        CHECKSUM.set(self.bytes.as_mut(), 0);
        let check = checksum::finish(checksum::sum_scalar(self.header()));
        CHECKSUM.set(self.bytes.as_mut(), check);
    }

    /// Changes the time to live and the checksum with it (RFC 1624).
    #[inline]
    pub fn rewrite_ttl(&mut self, ttl: u8) {
        self.rewrite(TTL_PROTOCOL, |header| header.set_ttl(ttl));
    }

    /// Changes the type of service byte and the checksum with it (RFC 1624).
    #[inline]
    pub fn rewrite_tos(&mut self, tos: u8) {
        self.rewrite(VERSION_TOS, |header| header.set_tos(tos));
    }

    /// Applies `change` to the 16-bit word `word` and carries the difference over to the checksum,
    /// so that a wrong checksum stays wrong.
    #[inline]
    fn rewrite(&mut self, word: Field<2>, change: impl FnOnce(&mut Self)) {
        let old = word.get(self.bytes.as_ref());
        change(self);
        let new = word.get(self.bytes.as_ref());
        let check = checksum::update(self.check(), old, new);
        CHECKSUM.set(self.bytes.as_mut(), check);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every setter on bytes that hold 0xa5, so that an unwritten byte shows.
    fn written() -> [u8; 24] {
        let mut bytes = [0xa5; 24];
        let mut header = Ipv4::new_unchecked(&mut bytes[..20]);
        header.set_header_len(20);
        header.set_tos(0xb9);
        header.set_total_len(1400);
        header.set_id(0x1234);
        header.set_fragment(false, true, 1480);
        header.set_ttl(63);
        header.set_protocol(17);
        header.set_src(Ipv4Addr::new(198, 18, 0, 1));
        header.set_dst(Ipv4Addr::new(198, 19, 255, 254));
        header.fill_checksum();
        bytes
    }

    #[test]
    fn etherparse_reads_what_the_setters_wrote() {
        let bytes = written();
        let (header, rest) = etherparse::Ipv4Header::from_slice(&bytes).unwrap();
        assert_eq!(rest, [0xa5; 4]);
        assert_eq!((header.dscp.value(), header.ecn.value()), (0xb9 >> 2, 1));
        assert_eq!((header.total_len, header.identification), (1400, 0x1234));
        assert_eq!((header.dont_fragment, header.more_fragments), (false, true));
        assert_eq!(header.fragment_offset.value() * 8, 1480);
        assert_eq!((header.time_to_live, header.protocol.0), (63, 17));
        assert_eq!(
            (header.source, header.destination),
            ([198, 18, 0, 1], [198, 19, 255, 254])
        );
        assert_eq!(header.header_checksum, header.calc_header_checksum());
    }

    #[test]
    fn getters_read_what_the_setters_wrote() {
        let bytes = written();
        let header = Ipv4::new(&bytes).unwrap();
        assert_eq!(header.header_len(), 20);
        assert_eq!(header.tos(), 0xb9);
        assert_eq!(header.total_len(), 1400);
        assert_eq!(header.id(), 0x1234);
        assert_eq!(
            (header.dont_fragment(), header.more_fragments()),
            (false, true)
        );
        assert_eq!(header.fragment_off(), 1480);
        assert_eq!((header.ttl(), header.protocol()), (63, 17));
        assert_eq!(header.src(), Ipv4Addr::new(198, 18, 0, 1));
        assert_eq!(header.dst(), Ipv4Addr::new(198, 19, 255, 254));
        assert!(header.options().is_empty());
        assert!(header.checksum_ok());
    }

    #[test]
    fn a_rewrite_equals_filling_the_checksum_again() {
        for value in 0..=u8::MAX {
            let (mut rewritten, mut filled) = (written(), written());
            let mut header = Ipv4::new(&mut rewritten).unwrap();
            header.rewrite_ttl(value);
            header.rewrite_tos(value ^ 0x5a);
            let mut header = Ipv4::new(&mut filled).unwrap();
            header.set_ttl(value);
            header.set_tos(value ^ 0x5a);
            header.fill_checksum();
            assert_eq!(rewritten, filled);
        }
    }

    #[test]
    fn a_wrong_checksum_is_seen_and_stays_wrong_after_a_rewrite() {
        let mut bytes = written();
        bytes[10] ^= 1;
        let mut header = Ipv4::new(&mut bytes).unwrap();
        assert!(!header.checksum_ok());
        header.rewrite_ttl(1);
        assert!(!header.checksum_ok());
    }

    #[test]
    fn headers_that_are_not_whole_are_refused() {
        let bytes = written();
        assert_eq!(
            Ipv4::new(&bytes[..19]).unwrap_err(),
            IpError::TooShort { need: 20, have: 19 }
        );
        let with = |first| [&[first], &bytes[1..]].concat();
        assert_eq!(
            Ipv4::new(with(0x65)).unwrap_err(),
            IpError::BadVersion { version: 6 }
        );
        let bad_len = |len| IpError::BadHeaderLen { len, have: 24 };
        assert_eq!(Ipv4::new(with(0x44)).unwrap_err(), bad_len(16));
        assert_eq!(Ipv4::new(with(0x47)).unwrap_err(), bad_len(28));
        assert_eq!(Ipv4::new(with(0x46)).unwrap().options(), [0xa5; 4]);
    }
}
