//! Owns what a worker says about a packet that it shows. Never decides who sees it.

use std::net::SocketAddr;

use super::super::DropReason;
use super::record::{Direction, Verdict};

/// Which captures a record is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// All: it is one packet, or was never cut.
    Any,
    /// Those that want superpackets whole.
    Whole,
    /// Those that want segments.
    Segment,
}

/// What a worker says about one packet or superpacket.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// Where.
    pub direction: Direction,
    /// What became of it.
    pub verdict: Verdict,
    /// The other end's outer address.
    pub outer: Option<SocketAddr>,
    /// Our outer port.
    pub local_port: u16,
    /// Outer TOS byte.
    pub tos: u8,
    /// Inner packets it stands for.
    pub packets: u64,
}

impl Seen {
    /// Packets that ended before anything about their outer side was known.
    #[must_use]
    pub const fn dropped(direction: Direction, reason: DropReason, packets: u64) -> Self {
        Self {
            direction,
            verdict: Verdict::Dropped(reason),
            outer: None,
            local_port: 0,
            tos: 0,
            packets,
        }
    }
}

/// What is particular about bytes that are shown.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cut {
    /// Bytes of outer headers in front of the inner packet.
    pub inner_at: u8,
    /// Length of the inner packet, if there are not all of its bytes.
    pub len: Option<usize>,
}
