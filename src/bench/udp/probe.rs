//! Owns the bytes of a numbered datagram. Pure.
//!
//! ```text
//! 0        4                12                20                          N
//! │ magic  │ number         │ time stamp, ns  │ zeros                     │
//! ```
//!
//! All integers are big-endian. The number [`END`] marks the end of a run.

/// What every datagram holds; the rest of it is zeros.
pub(super) const HEAD_LEN: usize = 20;
/// Tells our datagrams from strays.
const MAGIC: [u8; 4] = *b"ldnB";
/// The number that no datagram has: the sender is done.
const END: u64 = u64::MAX;

/// A datagram, as the sink reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Probe {
    /// Number, counted from 0, and the sender's monotonic clock in nanoseconds.
    Packet { number: u64, stamp_ns: u64 },
    /// The sender is done.
    End,
}

impl Probe {
    /// Writes the datagram over the first bytes of `payload`; the rest stays. One that is too short stays as it is,
    /// and is then not one of ours.
    pub(super) fn write(self, payload: &mut [u8]) {
        let Some((payload, _)) = payload.split_first_chunk_mut::<HEAD_LEN>() else {
            return;
        };
        let (number, stamp) = match self {
            Self::Packet { number, stamp_ns } => (number, stamp_ns),
            Self::End => (END, 0),
        };
        payload[..4].copy_from_slice(&MAGIC);
        payload[4..12].copy_from_slice(&number.to_be_bytes());
        payload[12..20].copy_from_slice(&stamp.to_be_bytes());
    }

    /// Reads a datagram; `None` if it is not one of ours.
    pub(super) fn parse(payload: &[u8]) -> Option<Self> {
        let rest = payload.strip_prefix(&MAGIC)?;
        let (number, rest) = rest.split_first_chunk()?;
        let (stamp, _) = rest.split_first_chunk()?;
        Some(match u64::from_be_bytes(*number) {
            END => Self::End,
            number => Self::Packet {
                number,
                stamp_ns: u64::from_be_bytes(*stamp),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sink_reads_what_the_sender_wrote() {
        for probe in [
            Probe::Packet {
                number: 7,
                stamp_ns: 1 << 40,
            },
            Probe::End,
        ] {
            let mut payload = [0xa5; 64];
            probe.write(&mut payload);
            assert_eq!(Probe::parse(&payload), Some(probe));
        }
    }

    #[test]
    fn strays_and_fragments_are_not_ours() {
        let mut payload = [0; 64];
        assert_eq!(Probe::parse(&payload), None);
        Probe::End.write(&mut payload);
        assert_eq!(Probe::parse(&payload[..19]), None);
        assert_eq!(Probe::parse(&[]), None);
    }
}
