//! Owns the tap in the packet path: what workers copy for whoever captures. Never delays or changes a packet;
//! what a reader does not fetch in time is lost and counted.
//!
//! Off, a tap costs a worker one relaxed load per burst and a look at its own memory per packet. On, the
//! worker reads the clock after each read, looks at the packet's headers for the filter, and copies what matches into a ring of
//! its own ([`rtrb`], single producer, single consumer, wait-free).
//!
//! Rings are independent, so a reader sees records in no order of time. It can put them in order: a worker says when
//! a burst begins that all it will note is newer than now, and after it that it notes nothing at present. So a reader
//! that emptied all rings knows up to when it has seen everything ([`Capture::settled`]).
//!
//! A capture begins by putting its rings into the workers' boxes and raising the generation; each worker takes
//! its ring out at its next burst. It ends when its reader is dropped, which the workers notice at their next
//! burst.

pub mod filter;
mod reader;
pub mod record;
pub mod run;
mod seen;

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rtrb::{Producer, RingBuffer};

use filter::{Facts, Filter};
use reader::LostCounts;
pub use reader::{Capture, Lost};
use record::HEADER_LEN;
pub use record::{Direction, Record, RecordError, Transport, Verdict};
pub use seen::{Cut, Form, Seen};

/// Bytes a ring holds; resident only as far as used. At 1 Gb/s, whole packets, that is 30 ms.
pub const RING_LEN: usize = 4 << 20;
/// Captures at a time: what bounds the memory, and the work per packet.
pub const MAX_CAPTURES: usize = 4;
/// The most that is copied of one packet: all of it.
pub const MAX_SNAP_LEN: usize = 1 << 16;
/// Copied in any case while the filter looks: the longest headers, IPv6 with extensions and TCP's ports.
pub(crate) const LOOK_LEN: usize = 256;

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

/// What a worker that notes nothing at present says instead of a time.
const AT_REST: u64 = u64::MAX;

/// The time, in nanoseconds since 1970.
pub(crate) fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

/// A worker's end of one capture.
#[derive(Debug)]
struct Source {
    ring: Producer<u8>,
    wanted: Arc<Wanted>,
    lost: Arc<LostCounts>,
}

impl Source {
    fn lose(&self, records: u64, packets: u64) {
        self.lost.records.fetch_add(records, Ordering::Relaxed);
        self.lost.packets.fetch_add(packets, Ordering::Relaxed);
    }
}

/// The place where captures reach the workers of one data plane.
#[derive(Debug)]
pub struct Taps {
    /// Raised when a box has something new.
    generation: AtomicU64,
    /// One per worker.
    boxes: Vec<Mutex<Vec<Source>>>,
    /// What each worker carries.
    transports: Vec<Transport>,
    /// One per worker: what it notes from now on is not older than this.
    floors: Arc<[AtomicU64]>,
    running: Arc<AtomicUsize>,
}

impl Taps {
    /// For so many workers, which all carry packets in one way.
    #[must_use]
    pub fn new(workers: usize, transport: Transport) -> Self {
        Self::beside(vec![transport; workers], Arc::default())
    }

    /// For one worker each that carries packets in these ways. `running` counts captures, also those of others.
    #[must_use]
    pub fn beside(transports: Vec<Transport>, running: Arc<AtomicUsize>) -> Self {
        let floors = transports.iter().map(|_| AtomicU64::new(AT_REST));
        Self {
            generation: AtomicU64::new(0),
            boxes: transports.iter().map(|_| Mutex::default()).collect(),
            floors: floors.collect(),
            transports,
            running,
        }
    }

    /// Begins a capture; each worker takes part from its next burst on.
    ///
    /// # Errors
    /// [`TooMany`].
    pub fn capture(&self, wanted: Wanted) -> Result<Capture, TooMany> {
        self.capture_beside(wanted, &self.running)
    }

    /// Likewise, but it counts among those of `running` instead: whoever begins it bounds how many of these there are.
    ///
    /// # Errors
    /// [`TooMany`].
    pub fn capture_beside(
        &self,
        wanted: Wanted,
        running: &Arc<AtomicUsize>,
    ) -> Result<Capture, TooMany> {
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
            lasting: rings.len(),
            rings,
            floors: vec![Arc::clone(&self.floors)],
            lost: vec![lost],
            running: vec![Arc::clone(running)],
        })
    }
}

/// One worker's tap.
#[derive(Debug)]
pub struct Tap {
    taps: Arc<Taps>,
    worker: usize,
    transport: Transport,
    generation: Cell<u64>,
    on: Cell<bool>,
    /// What is noted has this time.
    time_ns: Cell<u64>,
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
            transport: taps
                .transports
                .get(worker)
                .copied()
                .unwrap_or(Transport::Udp),
            generation: Cell::new(0),
            on: Cell::new(false),
            time_ns: Cell::new(0),
            sources: RefCell::default(),
            scratch: RefCell::default(),
        }
    }

    /// Called once per burst: captures begin and end here.
    #[inline]
    pub fn begin(&self) {
        let generation = self.taps.generation.load(Ordering::Relaxed);
        if self.on.get() || generation != self.generation.get() {
            self.refresh(generation, now_ns);
        }
    }

    /// The same, for whoever is told of packets later: none that it notes is older than this.
    pub fn begin_at(&self, floor_ns: u64) {
        let generation = self.taps.generation.load(Ordering::Relaxed);
        self.refresh(generation, || floor_ns);
    }

    /// What is noted from now on has this time.
    pub fn set_time(&self, time_ns: u64) {
        self.time_ns.set(time_ns);
    }

    /// Counts packets that never came here.
    pub fn lose(&self, count: u64) {
        for source in self.sources.borrow().iter() {
            source.lose(count, count);
        }
    }

    /// Called after a packet was read and before anything becomes of it: what is noted from now on has this time, so
    /// that no answer is older than what it answers.
    #[inline]
    pub fn stamp(&self) {
        if self.on.get() {
            self.time_ns.set(now_ns());
        }
    }

    /// Called after a burst, before the worker may sleep.
    #[inline]
    pub fn end(&self) {
        if self.on.get() {
            self.floor(AT_REST);
        }
    }

    /// What is noted from now on is not older than this.
    fn floor(&self, time_ns: u64) {
        if let Some(floor) = self.taps.floors.get(self.worker) {
            floor.store(time_ns, Ordering::SeqCst);
        }
    }

    #[cold]
    fn refresh(&self, generation: u64, floor_ns: impl FnOnce() -> u64) {
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
            self.floor(AT_REST);
        } else {
            self.floor(floor_ns());
            self.stamp();
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
        self.note_cut(form, Cut::default(), what);
    }

    /// Notes one packet of which more, or less, is given than itself.
    #[inline]
    pub fn note_cut<'b, I>(&self, form: Form, cut: Cut, what: impl FnOnce() -> (Seen, I))
    where
        I: IntoIterator<Item = &'b [u8]>,
    {
        if self.on.get() {
            let (seen, parts) = what();
            self.record(form, cut, &seen, parts.into_iter());
        }
    }

    #[cold]
    fn record<'b>(&self, form: Form, cut: Cut, seen: &Seen, parts: impl Iterator<Item = &'b [u8]>) {
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
        let inner_at = usize::from(cut.inner_at);
        let snap_len = snap_len + inner_at;
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
        let record = Record {
            time_ns: self.time_ns.get(),
            direction: seen.direction,
            verdict: seen.verdict,
            outer: seen.outer,
            local_port: seen.local_port,
            tos: seen.tos,
            worker: u8::try_from(self.worker).unwrap_or(u8::MAX),
            transport: self.transport,
            inner_at: cut.inner_at,
            packets: fit(seen.packets),
            len: fit(cut.len.unwrap_or(len) as u64),
        };
        let facts = Facts::of(&record, bytes.get(HEADER_LEN..).unwrap_or_default());
        for source in sources.iter_mut().filter(|source| takes(source)) {
            if !source.wanted.filter.matches(&facts) {
                continue;
            }
            let copied = (bytes.len() - HEADER_LEN).min(source.wanted.snap_len + inner_at);
            if let Some(header) = bytes.get_mut(..HEADER_LEN) {
                header.copy_from_slice(&record.encode(copied));
            }
            let whole = bytes.get(..HEADER_LEN + copied).unwrap_or_default();
            if source.ring.push_entire_slice(whole).is_err() {
                source.lose(1, seen.packets);
            }
        }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.floor(AT_REST);
    }
}

#[cfg(test)]
mod tests;
