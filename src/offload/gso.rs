//! Owns the planning of `UDP_SEGMENT` runs: which datagrams of a burst leave in one message. Never touches
//! a socket and never sees a byte.
//!
//! Order: *a segment may only join the most recent run of its route*, the pair of source socket and next hop.
//! One inner flow has one route but may change its TOS (ECN marks, retransmissions), so the TOS is not part
//! of the route: a different one closes the run, as a different size does. Flows to different routes
//! interleave freely and still build long runs.

use thiserror::Error;

use super::table::{Table, finish, mix};

/// The end of a chain.
const NIL: u16 = u16::MAX;

/// What all segments of a run share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RunKey {
    /// Which source socket sends.
    pub source: u16,
    /// Which next hop receives, as the FIB numbers them.
    pub next_hop: u32,
    /// TOS or traffic class of the outer header.
    pub tos: u8,
}

/// How far a run may grow. Given with each segment, since families and withdrawn capabilities differ by
/// source socket and next hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunLimits {
    /// `UDP_SEGMENT` may be used; runs of one otherwise.
    pub gso: bool,
    /// Segments in a run: what the kernel was found to accept, 64 or 128 (`UDP_MAX_SEGMENTS`).
    pub max_segments: u16,
    /// UDP payload bytes in a run: [`RunLimits::MAX_BYTES_V4`] or [`RunLimits::MAX_BYTES_V6`].
    pub max_bytes: u32,
}

impl RunLimits {
    /// The largest IPv4 packet less its header and UDP's.
    pub const MAX_BYTES_V4: u32 = 65535 - 20 - 8;
    /// The same with the IPv6 header, so that a run with all its headers never exceeds 64 KiB.
    pub const MAX_BYTES_V6: u32 = 65535 - 40 - 8;
}

/// Why a segment was not taken.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum PlanError {
    /// The burst holds its capacity: send it, [`Planner::clear`], push again.
    #[error("planner holds as many segments as it was made for: send the burst and clear it")]
    Full,
    /// The planner was made for fewer source sockets.
    #[error("source socket {source_idx} is beyond the {count} the planner was made for")]
    UnknownSource {
        /// The index given.
        source_idx: u16,
        /// The number given to [`Planner::new`].
        count: usize,
    },
}

/// Datagrams that leave in one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    key: RunKey,
    size: u32,
    bytes: u32,
    count: u16,
    first: u16,
    last: u16,
    /// The next run of the same source socket.
    next: u16,
    open: bool,
}

impl Run {
    /// What its segments share.
    #[must_use]
    pub const fn key(&self) -> RunKey {
        self.key
    }

    /// Bytes of every segment but the last: the value for `UDP_SEGMENT`.
    #[must_use]
    pub const fn size(&self) -> u32 {
        self.size
    }

    /// Bytes of all segments.
    #[must_use]
    pub const fn bytes(&self) -> u32 {
        self.bytes
    }

    /// Number of segments, at least 1; `UDP_SEGMENT` is for more than 1.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.count as usize
    }
}

/// The runs of one source socket, and the next source socket touched.
#[derive(Clone, Copy, Debug)]
struct Source {
    first: u16,
    last: u16,
    next: u16,
}

const UNTOUCHED: Source = Source {
    first: NIL,
    last: NIL,
    next: NIL,
};

/// Plans one burst after another, in memory fixed at construction.
#[derive(Debug)]
pub struct Planner {
    /// Segments per burst: neither vector ever grows beyond.
    capacity: usize,
    /// For each segment, in order of arrival, the next of its run.
    next: Vec<u16>,
    runs: Vec<Run>,
    table: Table,
    sources: Box<[Source]>,
    first_source: u16,
    last_source: u16,
    /// The run last used: a superpacket's segments follow one another.
    latest: u16,
}

impl Planner {
    /// A planner for bursts of up to `capacity` segments from `sources` source sockets.
    #[must_use]
    pub fn new(capacity: u16, sources: u16) -> Self {
        let capacity = usize::from(capacity.min(NIL - 1));
        Self {
            capacity,
            next: Vec::with_capacity(capacity),
            runs: Vec::with_capacity(capacity),
            table: Table::new(capacity),
            sources: vec![UNTOUCHED; usize::from(sources.min(NIL - 1))].into_boxed_slice(),
            first_source: NIL,
            last_source: NIL,
            latest: NIL,
        }
    }

    /// Segments pushed since the last [`Planner::clear`].
    #[must_use]
    pub const fn len(&self) -> usize {
        self.next.len()
    }

    /// Whether nothing was pushed since the last [`Planner::clear`].
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.next.is_empty()
    }

    /// Forgets the burst.
    pub fn clear(&mut self) {
        let mut at = self.first_source;
        while let Some(source) = self.sources.get_mut(usize::from(at)) {
            at = std::mem::replace(source, UNTOUCHED).next;
        }
        (self.first_source, self.last_source, self.latest) = (NIL, NIL, NIL);
        self.next.clear();
        self.runs.clear();
        self.table.clear();
    }

    /// Adds a datagram of `len` bytes behind all pushed before and returns its index: 0, 1, 2, ...
    ///
    /// # Errors
    /// [`PlanError`]; the segment is not taken then.
    #[inline]
    pub fn push(&mut self, key: RunKey, len: u32, limits: &RunLimits) -> Result<u16, PlanError> {
        if self.next.len() == self.capacity {
            return Err(PlanError::Full);
        }
        let index = u16::try_from(self.next.len()).unwrap_or(NIL);
        let route = (key.source, key.next_hop);
        let open_run = |at: u16| {
            let run = self.runs.get(usize::from(at)).filter(|run| run.open)?;
            ((run.key.source, run.key.next_hop) == route).then_some(at)
        };
        let latest = open_run(self.latest);
        let (hash, found) = if latest.is_some() {
            (None, latest)
        } else {
            let hash = route_hash(&key);
            (Some(hash), self.table.find(hash, open_run))
        };
        if let Some(at) = found
            && let Some(run) = self.runs.get_mut(usize::from(at))
        {
            if run.takes(&key, len, limits) {
                run.count += 1;
                run.bytes += len;
                // Nothing can follow a short segment.
                run.open = len == run.size;
                let last = std::mem::replace(&mut run.last, index);
                if let Some(next) = self.next.get_mut(usize::from(last)) {
                    *next = index;
                }
                self.next.push(NIL);
                self.latest = at;
                return Ok(index);
            }
            run.open = false;
        }
        self.open(key, len, index, hash.unwrap_or_else(|| route_hash(&key)))?;
        Ok(index)
    }

    /// Every run, in the order their first segments came.
    #[must_use]
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The source sockets touched, in the order they first were: one `sendmmsg` each.
    pub fn sources(&self) -> impl Iterator<Item = u16> + Clone {
        let step = |at: u16| (at != NIL).then_some(at);
        std::iter::successors(step(self.first_source), move |&at| {
            self.sources
                .get(usize::from(at))
                .and_then(|source| step(source.next))
        })
    }

    /// The runs of one source socket, in order.
    pub fn runs_of(&self, source: u16) -> impl Iterator<Item = &Run> + Clone {
        let first = self
            .sources
            .get(usize::from(source))
            .map_or(NIL, |source| source.first);
        std::iter::successors(self.runs.get(usize::from(first)), |run| {
            self.runs.get(usize::from(run.next))
        })
    }

    /// The indices of a run's segments, in order.
    pub fn segments(&self, run: &Run) -> impl Iterator<Item = u16> + Clone {
        std::iter::successors(Some(run.first), |&at| {
            self.next
                .get(usize::from(at))
                .copied()
                .filter(|&next| next != NIL)
        })
    }

    /// Starts a run and chains it to its source socket.
    #[inline]
    fn open(&mut self, key: RunKey, len: u32, index: u16, hash: u32) -> Result<(), PlanError> {
        let count = self.sources.len();
        let Some(source) = self.sources.get_mut(usize::from(key.source)) else {
            return Err(PlanError::UnknownSource {
                source_idx: key.source,
                count,
            });
        };
        let at = u16::try_from(self.runs.len()).unwrap_or(NIL);
        let previous = std::mem::replace(&mut source.last, at);
        if let Some(run) = self.runs.get_mut(usize::from(previous)) {
            run.next = at;
        } else {
            source.first = at;
            let previous = std::mem::replace(&mut self.last_source, key.source);
            match self.sources.get_mut(usize::from(previous)) {
                Some(source) => source.next = key.source,
                None => self.first_source = key.source,
            }
        }
        self.next.push(NIL);
        self.runs.push(Run {
            key,
            size: len,
            bytes: len,
            count: 1,
            first: index,
            last: index,
            next: NIL,
            open: true,
        });
        let Self { table, runs, .. } = self;
        let is_closed = |at: u16| runs.get(usize::from(at)).is_none_or(|run| !run.open);
        if let Some(evicted) = table.insert(hash, at, is_closed)
            && let Some(run) = self.runs.get_mut(usize::from(evicted))
        {
            run.open = false;
        }
        self.latest = at;
        Ok(())
    }
}

impl Run {
    /// Whether a segment of the same route may be appended.
    #[inline]
    const fn takes(&self, key: &RunKey, len: u32, limits: &RunLimits) -> bool {
        let is_allowed = limits.gso && self.count < limits.max_segments;
        let fits_message = self.bytes.saturating_add(len) <= limits.max_bytes;
        // The kernel cuts every `size` bytes: only the last segment may differ, and only be shorter. An
        // empty datagram would vanish.
        let fits_cut = len != 0 && len <= self.size;
        is_allowed && fits_message && fits_cut && self.key.tos == key.tos
    }
}

#[inline]
const fn route_hash(key: &RunKey) -> u32 {
    finish(mix(key.source as u64, key.next_hop as u64))
}
