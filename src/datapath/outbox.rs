//! Owns what goes out on the underlay: collects described segments, groups them into runs, sends the runs, and
//! decides what every refusal of the kernel means. Never decides where a packet goes.
//!
//! A segment's payload stays where the TUN read put it; in the outbox is what precedes it: the encapsulation's
//! header, and the inner one if it was cut from a superpacket. Both are handed to the kernel as scatter/gather.
//!
//! What the kernel's errors mean here:
//! - `EAGAIN`: the socket's buffer is full; what is left for it is dropped as `socket_full`.
//! - any other error is first retried once, because an ICMP answer to an earlier datagram is told instead of
//!   sending; the error queue is drained before.
//! - anything else about a run: it is replayed once as single datagrams, at once, so that no later packet of
//!   its flow overtakes it. If those go, and the error can be about runs, `UDP_SEGMENT` is withdrawn for that
//!   next hop.
//! - `EMSGSIZE` about a single datagram: the path MTU is smaller than we knew; it is answered or fragmented.

use std::io;

use super::drop::DropReason;
use super::pending::{Destination, MAX_SEGMENTS, Pending, Segment, Slots};
use super::slow_path::{SlowPath, note, sent};
use super::stats::Counts;
use super::table::Peer;
use super::tap::run::Piece;
use super::tap::{Direction, Form, Seen, Verdict};
use super::worker::Context;
use crate::offload::gso::Run;
use crate::offload::split::Split;
use crate::sys::mmsg::{Entry, SendBatch};
use crate::underlay::{UdpCaps, UnderlaySocket};

/// Entries of one `sendmmsg`.
const MAX_ENTRIES: usize = 64;
/// Slices of one `sendmmsg`: a header and a payload for every segment.
const MAX_SLICES: usize = 2 * MAX_SEGMENTS;

/// One worker's outgoing segments. Memory is fixed at construction.
pub struct Outbox {
    pending: Pending,
    batch: SendBatch,
    /// Packets that cannot take the fast path.
    pub slow: SlowPath,
}

impl Outbox {
    /// Allocates everything.
    #[must_use]
    pub fn new(caps: &UdpCaps) -> Self {
        Self {
            pending: Pending::new(caps),
            batch: SendBatch::new(MAX_ENTRIES, MAX_SLICES),
            slow: SlowPath::new(),
        }
    }

    /// Collects the segments of a superpacket, flushing as often as needed.
    pub fn push_split(
        &mut self,
        cx: &Context<'_>,
        slots: &impl Slots,
        counts: &mut Counts,
        to: Destination<'_>,
        (slot, split): (usize, &Split),
    ) {
        let packet = slots.slot(slot);
        for i in 0..split.count() {
            if self.pending.is_full() {
                self.flush(cx, slots, counts);
            }
            let payload = split.payload(i);
            let header = self.pending.next_header();
            let mut header_len = cx.encapsulation().write_header(to.peer.mac, packet, header);
            let inner = header.get_mut(header_len..).unwrap_or_default();
            header_len += split.write_header(packet, i, cx.shared.sum, inner);
            let segment = Segment {
                header_len,
                slot,
                at: payload.start,
                len: payload.len(),
            };
            if !self.pending.push(to, segment) {
                counts.drop(DropReason::NoMemory, 1);
                let payload = slots.slot(slot).get(payload).unwrap_or_default();
                cx.tap.note(Form::Any, || {
                    let no_memory = Seen::dropped(Direction::Encap, DropReason::NoMemory, 1);
                    (no_memory, [payload])
                });
            }
        }
    }

    /// Collects a whole packet of `len` bytes.
    pub fn push_whole(
        &mut self,
        cx: &Context<'_>,
        slots: &impl Slots,
        counts: &mut Counts,
        to: Destination<'_>,
        (slot, len): (usize, usize),
    ) {
        if self.pending.is_full() {
            self.flush(cx, slots, counts);
        }
        let header = self.pending.next_header();
        let header_len = cx
            .encapsulation()
            .write_header(to.peer.mac, slots.slot(slot), header);
        if !self.pending.push(
            to,
            Segment {
                header_len,
                slot,
                at: 0,
                len,
            },
        ) {
            counts.drop(DropReason::NoMemory, 1);
            let packet = slots.slot(slot).get(..len).unwrap_or_default();
            cx.tap.note(Form::Any, || {
                let no_memory = Seen::dropped(Direction::Encap, DropReason::NoMemory, 1);
                (no_memory, [packet])
            });
        }
    }

    /// Sends everything collected. Afterwards each segment was sent, answered or dropped, and counted.
    pub fn flush(&mut self, cx: &Context<'_>, slots: &impl Slots, counts: &mut Counts) {
        if self.pending.is_empty() {
            return;
        }
        let Self {
            pending,
            batch,
            slow,
        } = self;
        for source in pending.planner.sources() {
            send_runs(pending, batch, slow, cx, slots, counts, source);
        }
        self.pending.clear();
    }
}

/// Sends the runs of one source socket.
fn send_runs(
    pending: &Pending,
    batch: &mut SendBatch,
    slow: &mut SlowPath,
    cx: &Context<'_>,
    slots: &impl Slots,
    counts: &mut Counts,
    source: u16,
) {
    let fd = cx.shared.socket(source, cx.socket);
    let mut mine = pending.planner.runs_of(source).peekable();
    while mine.peek().is_some() {
        let mut sending = batch.start();
        let mut entries: [Option<(&Run, &Peer)>; MAX_ENTRIES] = [None; MAX_ENTRIES];
        while let (Some(run), Some(entry)) = (mine.peek(), entries.get_mut(sending.len())) {
            let Some(peer) = cx.table.fib.hop(run.key().next_hop) else {
                // Not reached: the table that gave this hop is held for the whole burst.
                counts.drop(DropReason::NoRoute, run.count() as u64);
                mine.next();
                continue;
            };
            let segments = pending.planner.segments(run);
            let slices = segments
                .flat_map(|idx| pending.parts(slots, usize::from(idx)))
                .filter(|slice| !slice.is_empty());
            let how = Entry {
                to: &peer.name,
                segment_len: segment_len(run),
                tos: run.key().tos,
            };
            if !sending.push(how, slices) {
                break;
            }
            *entry = Some((run, peer));
            mine.next();
        }
        let mut retried = false;
        let mut from = 0;
        while let Some(&Some((run, peer))) = entries.get(from) {
            counts.send_calls += 1;
            match sending.send(fd.fd(), from) {
                Ok(count) => {
                    for (run, peer) in entries.iter().skip(from).take(count).flatten() {
                        let headers = run.count() * cx.encapsulation().header_len();
                        let bytes = run.bytes() as usize - headers;
                        sent(peer, run.count() as u64, bytes, counts);
                        counts.sent_superpackets += u64::from(run.count() > 1);
                        note_run(pending, cx, slots, (run, peer, fd), Verdict::Sent);
                    }
                    from += count;
                    retried = false;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let full = DropReason::SocketFull;
                    for (run, peer) in entries.iter().skip(from).flatten() {
                        counts.drop(full, run.count() as u64);
                        note_run(pending, cx, slots, (run, peer, fd), Verdict::Dropped(full));
                    }
                    break;
                }
                Err(_) if !retried => {
                    cx.drain_errors(fd);
                    retried = true;
                }
                Err(error) => {
                    settle(slow, pending, cx, slots, counts, (run, peer), &error);
                    from += 1;
                    retried = false;
                }
            }
        }
    }
}

/// Shows a run to captures: segment by segment, and as what the segments were cut from.
#[inline]
fn note_run(
    pending: &Pending,
    cx: &Context<'_>,
    slots: &impl Slots,
    (run, peer, socket): (&Run, &Peer, &UnderlaySocket),
    verdict: Verdict,
) {
    if !cx.tap.is_on() {
        return;
    }
    let seen = |packets| Seen {
        direction: Direction::Encap,
        verdict,
        outer: Some(peer.addr),
        local_port: socket.addr().port(),
        tos: run.key().tos,
        packets,
    };
    let segments = pending.planner.segments(run);
    let header_len = cx.encapsulation().header_len();
    let pieces = segments.filter_map(|idx| {
        let [header, payload] = pending.parts(slots, usize::from(idx));
        let header = header.get(header_len..).unwrap_or_default();
        let Segment { slot, at, .. } = *pending.segments.get(usize::from(idx))?;
        Some(Piece {
            slot,
            at,
            header,
            payload,
        })
    });
    cx.tap.note_run(seen, pieces);
}

/// Finds a final outcome for each packet of a run the kernel refused.
fn settle(
    slow: &mut SlowPath,
    pending: &Pending,
    cx: &Context<'_>,
    slots: &impl Slots,
    counts: &mut Counts,
    (run, peer): (&Run, &Peer),
    refusal: &io::Error,
) {
    let gso = run.count() > 1;
    counts.replays += u64::from(gso);
    let to = Destination {
        peer,
        hop: run.key().next_hop,
        gso: false,
        tos: run.key().tos,
        socket: run.key().source,
    };
    let (mut went, mut too_big) = (false, false);
    let header_len = cx.encapsulation().header_len();
    for idx in pending.planner.segments(run) {
        let parts = pending.parts(slots, usize::from(idx));
        let packet = [parts[0].get(header_len..).unwrap_or_default(), parts[1]];
        // A single datagram was refused twice already; only a run is worth another try.
        let outcome = if gso {
            slow.send(cx, counts, to, parts)
        } else {
            Err(copy(refusal))
        };
        match outcome {
            Ok(()) => {
                sent(peer, 1, packet[0].len() + packet[1].len(), counts);
                note(cx, to, Verdict::Sent, packet);
                went = true;
            }
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                slow.oversize(cx, counts, to, packet);
                too_big = true;
            }
            Err(error) => {
                let reason = cx.shared.send_failed(&error);
                counts.drop(reason, 1);
                note(cx, to, Verdict::Dropped(reason), packet);
            }
        }
    }
    // Singles that went where the run did not: the run was the problem, not its size.
    if gso && went && !too_big && is_about_runs(refusal) {
        cx.shared.withdraw_gso(peer, refusal);
    }
}

/// Whether the kernel's refusal can mean that it takes no run (`udp_send_skb`, net/ipv4/udp.c). A full queue
/// (`ENOBUFS`) or a firewall that lets some packets pass says nothing of the kind.
fn is_about_runs(refusal: &io::Error) -> bool {
    matches!(
        refusal.raw_os_error(),
        Some(libc::EIO | libc::EINVAL | libc::EOPNOTSUPP | libc::EMSGSIZE)
    )
}

/// The value for `UDP_SEGMENT`; a run of one needs none.
fn segment_len(run: &Run) -> Option<u16> {
    if run.count() > 1 {
        u16::try_from(run.size()).ok()
    } else {
        None
    }
}

fn copy(error: &io::Error) -> io::Error {
    io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EIO))
}
