//! Owns the order between packets whose flow is known and packets whose flow cannot be told: fragments, and what has
//! IPv6 extension headers. Never looks at an item.

use super::super::header::{Family, HeaderError, addresses};
use super::super::table::finish;
use super::{NIL, address_hash};

/// Address pairs are told apart by this many fences; a collision closes an item too early, no more.
const FENCES: usize = 64;

/// For each address pair, the items that later packets may not join.
#[derive(Debug)]
pub(super) struct Fences {
    /// Items below this index.
    closed: [u16; FENCES],
    raised: bool,
}

impl Fences {
    pub(super) const fn new() -> Self {
        Self {
            closed: [0; FENCES],
            raised: false,
        }
    }

    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.raised) {
            self.closed = [0; FENCES];
        }
    }

    /// The first item that a packet may join.
    #[inline]
    pub(super) fn before(&self, bytes: &[u8], family: Family) -> u16 {
        if !self.raised {
            return 0;
        }
        let closed = self.closed.get(fence_of(bytes, family));
        closed.copied().unwrap_or(NIL)
    }

    /// Keeps later packets from overtaking one that is no whole TCP or UDP packet, as `error` says. It comes behind
    /// `items` items.
    #[cold]
    pub(super) fn raise(&mut self, bytes: &[u8], error: HeaderError, items: usize) {
        let is_v6 = bytes.first().is_some_and(|byte| byte >> 4 == 6);
        let family = if is_v6 { Family::V6 } else { Family::V4 };
        let is_no_flow = matches!(error, HeaderError::NotIp | HeaderError::NotTcpOrUdp { .. });
        if is_no_flow || addresses(bytes, family).is_empty() {
            return;
        }
        if let Some(closed) = self.closed.get_mut(fence_of(bytes, family)) {
            *closed = u16::try_from(items).unwrap_or(NIL);
            self.raised = true;
        }
    }
}

/// Which fence a packet's address pair is behind.
fn fence_of(bytes: &[u8], family: Family) -> usize {
    finish(address_hash(0, addresses(bytes, family))) as usize % FENCES
}
