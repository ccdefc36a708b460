//! Owns the fragmentation of an IPv4 packet on its way (RFC 791 section 3.2). Never reassembles,
//! and never copies payload: a piece is a header and a range of the packet.

use std::ops::Range;

use super::ip::{self, IpError};
use super::ipv4::{self, Ipv4};
use crate::addr::Mtu;

/// One past the last byte a datagram can have behind its header: offsets are 13 bits of eight
/// bytes, and the receiver's total length is 16 bits.
const DATAGRAM_END: usize = u16::MAX as usize;

/// Every header leaves room for eight bytes of payload in every MTU (RFC 791 section 3.2), so each
/// piece advances.
const _: () = assert!(Mtu::MIN.get() as usize == ipv4::MAX_HEADER_LEN + 8);

/// Options that end the list and that fill it up: one byte each (RFC 791 section 3.1).
const END_OF_OPTIONS: u8 = 0;
const NO_OPERATION: u8 = 1;
/// The bit of an option's kind that says "copy into all fragments".
const COPIED: u8 = 0x80;

/// Why a packet cannot be fragmented.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FragmentError {
    /// The bytes are not an IP packet.
    #[error(transparent)]
    NotIp(#[from] IpError),
    /// IPv6 packets are fragmented by their senders only: answer packet too big.
    #[error("IPv6 packets are not fragmented on their way")]
    NotIpv4,
    /// The sender forbids it: answer fragmentation needed.
    #[error("the packet has the don't-fragment flag")]
    DontFragment,
    /// An option is longer than the options, or shorter than its own kind and length: drop the
    /// packet.
    #[error("the IPv4 option at byte {at} of the header is malformed")]
    BadOption {
        /// Bytes from the start of the header.
        at: usize,
    },
    /// A fragment that would end beyond the longest datagram ("ping of death"): drop the packet.
    #[error("the packet is a fragment that ends beyond the longest datagram, at byte {end}")]
    BeyondDatagram {
        /// One past its last byte in the datagram.
        end: usize,
    },
}

/// How a packet is cut into pieces that fit an MTU. A packet that fits is one piece.
#[derive(Clone, Copy, Debug)]
pub struct Fragments<'a> {
    packet: &'a [u8],
    header_len: usize,
    total_len: usize,
    /// Where the packet's payload belongs in its datagram; not zero when it is a fragment already.
    off: usize,
    more: bool,
    /// The options of every piece but the first, padded; `later_options_len` bytes of it.
    later_options: [u8; ipv4::MAX_HEADER_LEN - ipv4::MIN_HEADER_LEN],
    later_options_len: usize,
    /// Payload bytes of the first piece when it is not the only one, and of the others but the
    /// last.
    first_len: usize,
    later_len: usize,
    count: usize,
}

/// One piece: the header written, and the payload that follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Bytes of the header.
    pub header_len: usize,
    /// The payload, as a range of the packet's bytes.
    pub payload: Range<usize>,
}

impl<'a> Fragments<'a> {
    /// Plans the pieces of `packet`, whose bytes beyond its total length are ignored.
    ///
    /// # Errors
    /// [`FragmentError`] when the packet must not or cannot be cut.
    pub fn plan(packet: &'a [u8], mtu: Mtu) -> Result<Self, FragmentError> {
        let meta = ip::parse(packet)?;
        if meta.version() == ip::Version::V6 {
            return Err(FragmentError::NotIpv4);
        }
        let header = Ipv4::new(packet)?;
        let (header_len, total_len) = (meta.header_len(), meta.total_len());
        let payload_len = total_len - header_len;
        let (off, mtu_len) = (usize::from(meta.fragment_off()), usize::from(mtu.get()));

        let mut plan = Self {
            packet,
            header_len,
            total_len,
            off,
            more: meta.more_fragments(),
            later_options: [0; _],
            later_options_len: 0,
            first_len: payload_len,
            later_len: 0,
            count: 1,
        };
        if total_len <= mtu_len {
            return Ok(plan);
        }
        if meta.dont_fragment() {
            return Err(FragmentError::DontFragment);
        }
        let end = off + payload_len;
        if end > DATAGRAM_END {
            return Err(FragmentError::BeyondDatagram { end });
        }
        let room = |header_len: usize| mtu_len.saturating_sub(header_len);
        plan.first_len = room(header_len) & !7;
        plan.later_options_len = copied_options(header.options(), &mut plan.later_options)?;
        let last_max = room(ipv4::MIN_HEADER_LEN + plan.later_options_len);
        plan.later_len = last_max & !7;
        // The packet does not fit, so at least one piece follows the first.
        let later = payload_len - plan.first_len;
        plan.count = 2 + later.saturating_sub(last_max).div_ceil(plan.later_len);
        Ok(plan)
    }

    /// How many pieces there are; at least one.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.count
    }

    /// Writes the header of piece `index` to the front of `out`; `None` when there is no such
    /// piece.
    pub fn piece(&self, index: usize, out: &mut [u8; ipv4::MAX_HEADER_LEN]) -> Option<Piece> {
        if index >= self.count {
            return None;
        }
        let is_last = index + 1 == self.count;
        let begin = match index {
            0 => 0,
            _ => self.first_len + (index - 1) * self.later_len,
        };
        let end = match (is_last, index) {
            (true, _) => self.total_len - self.header_len,
            (false, 0) => self.first_len,
            (false, _) => begin + self.later_len,
        };
        let header_len = self.copy_header(index, out);
        let mut header = Ipv4::new_unchecked(&mut out[..]);
        let dont_fragment = header.dont_fragment();
        header.set_header_len(header_len);
        header.set_total_len(u16::try_from(header_len + end - begin).ok()?);
        let off = u16::try_from(self.off + begin).ok()?;
        header.set_fragment(dont_fragment, self.more || !is_last, off);
        header.fill_checksum();
        Some(Piece {
            header_len,
            payload: self.header_len + begin..self.header_len + end,
        })
    }

    /// Copies the packet's header with the options due to piece `index`, and gives its length.
    fn copy_header(&self, index: usize, out: &mut [u8; ipv4::MAX_HEADER_LEN]) -> usize {
        let (fixed, options) = out.split_at_mut(ipv4::MIN_HEADER_LEN);
        let header = self.packet.get(..self.header_len).unwrap_or_default();
        let (from_fixed, from_options) = header.split_at_checked(fixed.len()).unwrap_or_default();
        let from_options = match index {
            0 => from_options,
            _ => self
                .later_options
                .get(..self.later_options_len)
                .unwrap_or_default(),
        };
        copy_front(from_fixed, fixed);
        copy_front(from_options, options);
        ipv4::MIN_HEADER_LEN + from_options.len()
    }
}

/// Copies the options that go into every fragment, padded to a multiple of four bytes, and gives
/// their length.
fn copied_options(options: &[u8], out: &mut [u8]) -> Result<usize, FragmentError> {
    let (mut at, mut len) = (0, 0);
    while let Some(&kind) = options.get(at) {
        let option_len = match kind {
            END_OF_OPTIONS => break,
            NO_OPERATION => 1,
            _ => options.get(at + 1).map_or(0, |&len| usize::from(len)),
        };
        let shortest = if kind == NO_OPERATION { 1 } else { 2 };
        let option = options
            .get(at..at + option_len)
            .filter(|_| option_len >= shortest);
        let option = option.ok_or(FragmentError::BadOption {
            at: ipv4::MIN_HEADER_LEN + at,
        })?;
        if kind & COPIED != 0 {
            copy_front(option, out.get_mut(len..).unwrap_or_default());
            len += option_len;
        }
        at += option_len;
    }
    // The buffer began as zeros, which is END_OF_OPTIONS: the padding is there.
    Ok(len.next_multiple_of(4))
}

/// Copies as much of `from` as `to` takes.
fn copy_front(from: &[u8], to: &mut [u8]) {
    let len = from.len().min(to.len());
    to[..len].copy_from_slice(&from[..len]);
}

#[cfg(test)]
mod tests;
