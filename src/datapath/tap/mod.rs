//! Owns the tap in the packet path: what workers copy for whoever captures. Never delays or changes a packet;
//! what a reader does not fetch in time is lost and counted.
//!
//! Off, a tap costs a worker one relaxed load per burst and a look at its own memory per packet. On, the
//! worker reads the clock, looks at the packet's headers for the filter, and copies what matches into a ring of
//! its own ([`rtrb`], single producer, single consumer, wait-free).
//!
//! A capture begins by putting its rings into the workers' boxes and raising the generation; each worker takes
//! its ring out at its next burst. It ends when its reader is dropped, which the workers notice at their next
//! burst.

pub mod filter;
pub mod record;
pub mod run;

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rtrb::{Consumer, Producer, RingBuffer};

use super::DropReason;
use filter::{Facts, Filter};
use record::HEADER_LEN;
pub use record::{Direction, Record, RecordError, Verdict};

/// Bytes a ring holds; resident only as far as used. At 1 Gb/s, whole packets, that is 30 ms.
pub const RING_LEN: usize = 4 << 20;
/// Captures at a time: what bounds the memory, and the work per packet.
pub const MAX_CAPTURES: usize = 4;
/// The most that is copied of one packet: all of it.
pub const MAX_SNAP_LEN: usize = 1 << 16;
/// Copied in any case while the filter looks: the longest headers, IPv6 with extensions and TCP's ports.
const LOOK_LEN: usize = 256;

/// What a capture wants.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Which packets.
    pub filter: Filter,
    /// Bytes copied of each packet, at most [`MAX_SNAP_LEN`].
    pub snap_len: usize,
    /// Superpackets as the segments on the wire instead of whole.
    pub segments: bool,
}

/// As many captures run as may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_CAPTURES} captures run already: end one of them first")]
pub struct TooMany;

/// What did not fit a ring.
#[derive(Debug, Default)]
struct LostCounts {
    records: AtomicU64,
    packets: AtomicU64,
}

/// What a reader was too slow for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Records.
    pub records: u64,
    /// The inner packets they stood for.
    pub packets: u64,
}

/// A worker's end of one capture.
#[derive(Debug)]
struct Source {
    ring: Producer<u8>,
    wanted: Arc<Wanted>,
    lost: Arc<LostCounts>,
}

/// The place where captures reach the workers of one data plane.
#[derive(Debug)]
pub struct Taps {
    /// Raised when a box has something new.
    generation: AtomicU64,
    /// One per worker.
    boxes: Vec<Mutex<Vec<Source>>>,
    running: Arc<AtomicUsize>,
}

impl Taps {
    /// For so many workers.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        Self {
            generation: AtomicU64::new(0),
            boxes: (0..workers).map(|_| Mutex::default()).collect(),
            running: Arc::default(),
        }
    }

    /// Begins a capture; each worker takes part from its next burst on.
    ///
    /// # Errors
    /// [`TooMany`].
    pub fn capture(&self, wanted: Wanted) -> Result<Capture, TooMany> {
        let running = &self.running;
        let admitted = running.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |running| {
            (running < MAX_CAPTURES).then_some(running + 1)
        });
        if admitted.is_err() {
            return Err(TooMany);
        }
        let wanted = Arc::new(wanted);
        let lost = Arc::new(LostCounts::default());
        let mut rings = Vec::with_capacity(self.boxes.len());
        for one in &self.boxes {
            let (ring, consumer) = RingBuffer::new(RING_LEN);
            let mut sources = one.lock().unwrap_or_else(PoisonError::into_inner);
            // An idle worker may not have taken what has ended since.
            sources.retain(|source| !source.ring.is_abandoned());
            sources.push(Source {
                ring,
                wanted: Arc::clone(&wanted),
                lost: Arc::clone(&lost),
            });
            rings.push(consumer);
        }
        self.generation.fetch_add(1, Ordering::Release);
        Ok(Capture {
            rings,
            lost: vec![lost],
            running: vec![Arc::clone(running)],
        })
    }
}

/// The reading end of a capture. Dropping it ends the capture.
#[derive(Debug)]
pub struct Capture {
    rings: Vec<Consumer<u8>>,
    lost: Vec<Arc<LostCounts>>,
    running: Vec<Arc<AtomicUsize>>,
}

impl Capture {
    /// Takes another data plane's in: one reader for both.
    pub fn join(&mut self, mut other: Self) {
        self.rings.append(&mut other.rings);
        self.lost.append(&mut other.lost);
        self.running.append(&mut other.running);
    }

    /// Appends whole records to `out`, about `limit` bytes at most, of every worker its share.
    pub fn take(&mut self, out: &mut Vec<u8>, limit: usize) {
        let share = limit / self.rings.len().max(1);
        for ring in &mut self.rings {
            let end = out.len() + share;
            while out.len() < end {
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
        self.rings.iter().all(Consumer::is_abandoned)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        for running in &self.running {
            running.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

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

/// One worker's tap.
#[derive(Debug)]
pub struct Tap {
    taps: Arc<Taps>,
    worker: usize,
    generation: Cell<u64>,
    on: Cell<bool>,
    sources: RefCell<Vec<Source>>,
    scratch: RefCell<Vec<u8>>,
}

impl Tap {
    /// Worker `worker`'s.
    #[must_use]
    pub fn new(taps: &Arc<Taps>, worker: usize) -> Self {
        Self {
            taps: Arc::clone(taps),
            worker,
            generation: Cell::new(0),
            on: Cell::new(false),
            sources: RefCell::default(),
            scratch: RefCell::default(),
        }
    }

    /// Called once per burst: captures begin and end here.
    #[inline]
    pub fn begin(&self) {
        let generation = self.taps.generation.load(Ordering::Relaxed);
        if self.on.get() || generation != self.generation.get() {
            self.refresh(generation);
        }
    }

    #[cold]
    fn refresh(&self, generation: u64) {
        let mut sources = self.sources.borrow_mut();
        sources.retain(|source| !source.ring.is_abandoned());
        // Never waits for whoever begins a capture: the next burst will do.
        if generation != self.generation.get()
            && let Some(Ok(mut new)) = self.taps.boxes.get(self.worker).map(Mutex::try_lock)
        {
            sources.append(&mut new);
            self.generation.set(generation);
        }
        self.on.set(!sources.is_empty());
        if sources.is_empty() {
            self.scratch.take();
        }
    }

    /// Whether anybody captures.
    #[inline]
    #[must_use]
    pub const fn is_on(&self) -> bool {
        self.on.get()
    }

    /// Notes one packet, given as its pieces in order.
    #[inline]
    pub fn note<'b, I>(&self, form: Form, what: impl FnOnce() -> (Seen, I))
    where
        I: IntoIterator<Item = &'b [u8]>,
    {
        if self.on.get() {
            let (seen, parts) = what();
            self.record(form, &seen, parts.into_iter());
        }
    }

    #[cold]
    fn record<'b>(&self, form: Form, seen: &Seen, parts: impl Iterator<Item = &'b [u8]>) {
        let mut sources = self.sources.borrow_mut();
        let takes = |source: &Source| match form {
            Form::Any => true,
            Form::Whole => !source.wanted.segments,
            Form::Segment => source.wanted.segments,
        };
        let snap_len = sources
            .iter()
            .filter(|source| takes(source))
            .map(|source| source.wanted.snap_len.max(LOOK_LEN))
            .max();
        let Some(snap_len) = snap_len else { return };
        let mut bytes = self.scratch.borrow_mut();
        bytes.clear();
        bytes.resize(HEADER_LEN, 0);
        let mut len = 0;
        for part in parts {
            let room = (HEADER_LEN + snap_len).saturating_sub(bytes.len());
            bytes.extend_from_slice(part.get(..room).unwrap_or(part));
            len += part.len();
        }
        let fit = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let record = Record {
            time_ns: since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)),
            direction: seen.direction,
            verdict: seen.verdict,
            outer: seen.outer,
            local_port: seen.local_port,
            tos: seen.tos,
            worker: u8::try_from(self.worker).unwrap_or(u8::MAX),
            packets: fit(seen.packets),
            len: fit(len as u64),
        };
        let facts = Facts::of(&record, bytes.get(HEADER_LEN..).unwrap_or_default());
        for source in sources.iter_mut().filter(|source| takes(source)) {
            if !source.wanted.filter.matches(&facts) {
                continue;
            }
            let copied = (bytes.len() - HEADER_LEN).min(source.wanted.snap_len);
            if let Some(header) = bytes.get_mut(..HEADER_LEN) {
                header.copy_from_slice(&record.encode(copied));
            }
            let whole = bytes.get(..HEADER_LEN + copied).unwrap_or_default();
            if source.ring.push_entire_slice(whole).is_err() {
                source.lost.records.fetch_add(1, Ordering::Relaxed);
                source
                    .lost
                    .packets
                    .fetch_add(seen.packets, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests;
