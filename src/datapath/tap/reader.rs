//! Owns the reading end of a capture: fetching records, and up to when all have come. Never waits for a worker.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use rtrb::Consumer;

use super::now_ns;
use super::record::{self, HEADER_LEN};

/// What did not fit a ring.
#[derive(Debug, Default)]
pub(super) struct LostCounts {
    pub(super) records: AtomicU64,
    pub(super) packets: AtomicU64,
}

/// What a reader was too slow for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Records.
    pub records: u64,
    /// The inner packets they stood for.
    pub packets: u64,
}

/// The reading end of a capture. Dropping it ends the capture.
#[derive(Debug)]
pub struct Capture {
    pub(super) rings: Vec<Consumer<u8>>,
    /// The capture is over when these many of them, the first, are abandoned.
    pub(super) lasting: usize,
    pub(super) floors: Vec<Arc<[AtomicU64]>>,
    pub(super) lost: Vec<Arc<LostCounts>>,
    pub(super) running: Vec<Arc<AtomicUsize>>,
}

impl Capture {
    /// Takes another data plane's in: one reader for both, until both are closed.
    pub fn join(&mut self, other: Self) {
        self.join_beside(other);
        self.lasting = self.rings.len();
    }

    /// Takes another in that goes on only as long as this one.
    pub fn join_beside(&mut self, mut other: Self) {
        self.rings.append(&mut other.rings);
        self.floors.append(&mut other.floors);
        self.lost.append(&mut other.lost);
        self.running.append(&mut other.running);
    }

    /// Up to when, in nanoseconds since 1970, everything is in the rings by now: once they were all found empty
    /// after this, what comes is newer.
    ///
    /// A worker stores its floor before it reads the clock for a record; here the clock is read before the floors.
    /// So a worker that is seen at rest reads the clock after us, and one that is not has told its floor. All of them
    /// are sequentially consistent, which the order of a store and a later load needs.
    #[must_use]
    pub fn settled(&self) -> u64 {
        let now = now_ns();
        let floors = self.floors.iter().flat_map(|floors| floors.iter());
        let floors = floors.map(|floor| floor.load(Ordering::SeqCst));
        floors.min().map_or(now, |floor| floor.min(now))
    }

    /// Appends whole records to `out`, about `limit` bytes at most, of every worker its share. Whether all rings were
    /// emptied.
    pub fn take(&mut self, out: &mut Vec<u8>, limit: usize) -> bool {
        let share = limit / self.rings.len().max(1);
        let mut emptied = true;
        for ring in &mut self.rings {
            let end = out.len() + share;
            loop {
                if out.len() >= end {
                    emptied = false;
                    break;
                }
                let mut header = [0; HEADER_LEN];
                if ring.pop_entire_slice(&mut header).is_err() {
                    break;
                }
                // A record is published as a whole, so all of it is there.
                let at = out.len();
                out.extend_from_slice(&header);
                out.resize(at + record::total_len(&header), 0);
                let rest = out.get_mut(at + HEADER_LEN..).unwrap_or_default();
                if ring.pop_entire_slice(rest).is_err() {
                    out.truncate(at);
                    break;
                }
            }
        }
        emptied
    }

    /// What was lost since the beginning.
    #[must_use]
    pub fn lost(&self) -> Lost {
        let sum = |count: fn(&LostCounts) -> &AtomicU64| {
            let counts = self
                .lost
                .iter()
                .map(|lost| count(lost).load(Ordering::Relaxed));
            counts.sum()
        };
        Lost {
            records: sum(|lost| &lost.records),
            packets: sum(|lost| &lost.packets),
        }
    }

    /// The data plane was closed: after what is left in the rings there will be nothing more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        let mut lasting = self.rings.iter().take(self.lasting);
        lasting.all(Consumer::is_abandoned)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        for running in &self.running {
            running.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
