//! Owns how headers look on the wire: views over `&[u8]`, checksums. Never does I/O, allocates or uses `unsafe`.
//!
//! # One shape for every header
//!
//! A view is a struct over any `T: AsRef<[u8]>`, and its file opens with the map of its fields.
//! `new` checks that the header is whole and makes every getter meaningful; `new_unchecked` is for
//! bytes about to be written. Setters exist where `T: AsMut<[u8]>`. A view covers a *header*: the
//! bytes may go on, and a length field that speaks of the payload is the caller's to compare
//! ([`ip::parse`] does so for IP).
//!
//! No view panics: a field beyond the end reads as zero and is not written, which `new` rules out.

pub mod checksum;
pub mod ecn;
mod field;
pub mod flow;
pub mod fragment;
pub mod icmp;
pub mod icmp_error;
pub mod ip;
pub mod ipv4;
pub mod ipv6;
pub mod probe;
pub mod tcp;
pub mod udp;
pub mod vxlan;

/// Why bytes are not the transport header they are taken for. The remedy is the same for all: drop
/// the packet, its sender or the path broke it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Fewer bytes than the fixed part of the header has.
    #[error("a {header} header has at least {need} bytes, the packet goes on for {have}")]
    TooShort {
        /// The protocol's name.
        header: &'static str,
        /// Bytes of the fixed part.
        need: usize,
        /// Bytes there are.
        have: usize,
    },
    /// The length the header gives for itself is less than its fixed part or more than there is.
    #[error("the {header} header calls itself {len} bytes long, the packet goes on for {have}")]
    BadHeaderLen {
        /// The protocol's name.
        header: &'static str,
        /// Bytes the header claims to have.
        len: usize,
        /// Bytes there are.
        have: usize,
    },
}

impl HeaderError {
    /// The number of bytes, if the fixed part of a header fits into them.
    #[inline]
    const fn if_cut(header: &'static str, bytes: &[u8], need: usize) -> Result<usize, Self> {
        let have = bytes.len();
        if have < need {
            return Err(Self::TooShort { header, need, have });
        }
        Ok(have)
    }
}
