//! Owns the segments that wait for the outbox's flush: where their bytes are, and the runs they are planned into.
//! Never sends.

use super::encapsulation;
use super::table::Peer;
use crate::offload::gso::{Planner, RunKey, RunLimits};
use crate::offload::split::MAX_HEADER_LEN;
use crate::underlay::{SOURCE_PORTS, UdpCaps};

/// Segments held before a flush: four 64 KiB superpackets of 1400-byte segments, five times over.
pub(super) const MAX_SEGMENTS: usize = 1024;
/// As the planner counts them.
const PLANNED_SEGMENTS: u16 = 1024;
const PLANNED_PORTS: u16 = 8;
const _: () = assert!(PLANNED_SEGMENTS as usize == MAX_SEGMENTS);
const _: () = assert!(PLANNED_PORTS as usize == SOURCE_PORTS);
/// Room for one header; whole cache lines.
const HEADER_STRIDE: usize = (encapsulation::MAX_HEADER_LEN + MAX_HEADER_LEN).next_multiple_of(64);

/// One inner packet that goes out.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Bytes of it in the outbox; 0 when the payload is the whole packet and nothing precedes that.
    pub header_len: usize,
    /// The slot its payload is in.
    pub slot: usize,
    /// Where in the slot.
    pub at: usize,
    /// Payload bytes.
    pub len: usize,
}

/// Where segments' payloads are: the reader's buffers.
pub trait Slots {
    /// The packet bytes of one slot.
    fn slot(&self, slot: usize) -> &[u8];
}

/// Where a packet goes: what `forward` and the flow hash decided.
#[derive(Clone, Copy)]
pub struct Destination<'t> {
    /// The peer.
    pub peer: &'t Peer,
    /// The peer's index in the table of this burst.
    pub hop: u32,
    /// Whether runs may be used towards it.
    pub gso: bool,
    /// Outer TOS byte.
    pub tos: u8,
    /// The source socket, chosen by the inner flow's hash.
    pub socket: u16,
}

/// Segments waiting for the flush.
pub struct Pending {
    headers: Vec<u8>,
    /// The segments, in order.
    pub segments: Vec<Segment>,
    /// Which of them go together.
    pub planner: Planner,
    limits: RunLimits,
}

impl Pending {
    /// Allocates everything.
    pub fn new(caps: &UdpCaps) -> Self {
        Self {
            headers: vec![0; MAX_SEGMENTS * HEADER_STRIDE],
            segments: Vec::with_capacity(MAX_SEGMENTS),
            planner: Planner::new(PLANNED_SEGMENTS, PLANNED_PORTS),
            limits: RunLimits {
                gso: caps.gso,
                max_segments: caps.max_segments,
                max_bytes: caps.max_run_len,
            },
        }
    }

    /// Header and payload of one segment.
    pub fn parts<'b>(&'b self, slots: &'b impl Slots, idx: usize) -> [&'b [u8]; 2] {
        let Some(segment) = self.segments.get(idx) else {
            return [&[], &[]];
        };
        let header_at = idx * HEADER_STRIDE;
        let header = self.headers.get(header_at..header_at + segment.header_len);
        let slot = slots.slot(segment.slot);
        let payload = slot.get(segment.at..segment.at + segment.len);
        [header.unwrap_or_default(), payload.unwrap_or_default()]
    }

    /// `false` when the planner refuses, which it does for an unknown source socket or beyond its capacity.
    pub fn push(&mut self, to: Destination<'_>, segment: Segment) -> bool {
        let key = RunKey {
            source: to.socket,
            next_hop: to.hop,
            tos: to.tos,
        };
        let limits = RunLimits {
            gso: to.gso,
            ..self.limits
        };
        let len = u32::try_from(segment.header_len + segment.len).unwrap_or(u32::MAX);
        let planned = self.planner.push(key, len, &limits).is_ok();
        if planned {
            self.segments.push(segment);
        }
        planned
    }

    /// Room for what precedes the payload of the segment that is pushed next.
    pub fn next_header(&mut self) -> &mut [u8] {
        let at = self.segments.len() * HEADER_STRIDE;
        self.headers
            .get_mut(at..at + HEADER_STRIDE)
            .unwrap_or_default()
    }

    /// Whether nothing waits.
    pub const fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Whether a flush is due.
    pub const fn is_full(&self) -> bool {
        self.segments.len() == MAX_SEGMENTS
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.segments.clear();
        self.planner.clear();
    }
}
