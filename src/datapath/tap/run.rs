//! Owns how a run is shown to captures: as its segments, and put together again to what they were cut from.

use super::{Form, Seen, Tap};
use crate::offload::split::MAX_HEADER_LEN;
use crate::wire::ip::protocol;
use crate::wire::ipv6;

/// One segment of a run.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'b> {
    /// The read that its payload is in.
    pub slot: usize,
    /// Where in that read.
    pub at: usize,
    /// Its header; empty when the payload is a whole packet, which was cut from nothing.
    pub header: &'b [u8],
    /// Its payload.
    pub payload: &'b [u8],
}

impl Piece<'_> {
    const fn is_followed_by(&self, next: &Self) -> bool {
        !next.header.is_empty() && self.slot == next.slot && self.at + self.payload.len() == next.at
    }
}

impl Tap {
    /// Notes every packet of a run.
    pub fn note_run<'b>(
        &self,
        seen: impl Fn(u64) -> Seen,
        pieces: impl Iterator<Item = Piece<'b>> + Clone,
    ) {
        for piece in pieces.clone() {
            self.note(Form::Segment, || (seen(1), [piece.header, piece.payload]));
        }
        let mut rest = pieces;
        while let Some(first) = rest.next() {
            let others = rest.clone();
            let (mut count, mut last) = (0, first);
            let mut ahead = rest.clone();
            while let Some(next) = ahead.next().filter(|next| last.is_followed_by(next)) {
                (count, last) = (count + 1, next);
                rest = ahead.clone();
            }
            let mut header = [0; MAX_HEADER_LEN];
            let header = header.get_mut(..first.header.len()).unwrap_or_default();
            header.copy_from_slice(first.header);
            add_tcp_flags(header, last.header);
            let others = others.take(count).map(|piece| piece.payload);
            self.note(Form::Whole, || {
                let parts = [&*header, first.payload];
                (seen(1 + count as u64), parts.into_iter().chain(others))
            });
        }
    }
}

/// Adds to the headers of a superpacket's first segment the TCP flags of its last, which alone has FIN and PSH.
fn add_tcp_flags(first: &mut [u8], last: &[u8]) {
    let tcp_at = match &*first {
        [version, rest @ ..] if version >> 4 == 4 && rest.get(8) == Some(&protocol::TCP) => {
            usize::from(*version & 0xf) * 4
        }
        [version, rest @ ..] if version >> 4 == 6 && rest.get(5) == Some(&protocol::TCP) => {
            ipv6::HEADER_LEN
        }
        _ => return,
    };
    if let (Some(flags), Some(more)) = (first.get_mut(tcp_at + 13), last.get(tcp_at + 13)) {
        *flags |= more;
    }
}
