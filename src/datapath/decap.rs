//! Owns decap: from the underlay to the TUN. Never blocks, allocates or logs.
//!
//! One burst of one worker:
//! 1. *Receive* a burst of datagrams, each possibly a GRO buffer of many inner packets.
//! 2. *Validate* what the encapsulation puts in front of each inner packet, and the packet's IP header.
//! 3. *Decide* (`forward`): outer source is a known peer, inner source lies in its lease, destination is ours,
//!    TTL, ECN; or an answer; or a drop.
//!    What a kernel on this machine left unfinished is finished (`encapsulation`).
//! 4. *Coalesce* neighbours of one flow over the whole burst (`offload::coalesce`).
//! 5. *Write* each superpacket or packet to the TUN, as scatter/gather over the receive buffers (`delivery`).
//!
//! Everything belongs to one worker; the table is read-only for the burst.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::delivery::{
    limits, refuse, unfinished, write_packet, write_superpacket, write_unfinished,
};
use super::drop::DropReason;
use super::forward::{DecapVerdict, Outer};
use super::outbox::Outbox;
use super::report::Reporter;
use super::shared::Shared;
use super::stats::Counts;
use super::table::Peer;
use super::worker::{Context, Progress};
use crate::offload::coalesce::{Coalescer, PacketRef, Write};
use crate::sys::iov::Gather;
use crate::sys::mmsg::{Received, RecvBatch};
use crate::wire::ip;

/// Entries in one burst. With GRO each may hold 64 KiB; without, this many packets are coalesced at most.
const BURST: usize = 64;
/// Inner packets held in one burst. A GRO buffer holds at most 64 datagrams from a wire
/// (`UDP_GRO_CNT_MAX`, net/ipv4/udp_offload.c), but as many as one run when the peer is on this host.
const MAX_PACKETS: u16 = 8192;
const _: () = assert!(MAX_PACKETS as usize == BURST * 128);

/// One worker's decap. Memory is fixed at construction.
pub struct Decap {
    receive: RecvBatch,
    accepted: Vec<PacketRef>,
    coalescer: Coalescer,
    gather: Gather,
    reporter: Reporter,
}

impl Decap {
    /// Allocates the buffers; pages become resident when first filled.
    #[must_use]
    pub fn new(shared: &Shared) -> Self {
        Self {
            receive: RecvBatch::new(BURST),
            accepted: Vec::with_capacity(usize::from(MAX_PACKETS)),
            coalescer: Coalescer::new(limits(shared), MAX_PACKETS, shared.sum),
            gather: Gather::new(),
            reporter: Reporter::new(),
        }
    }

    /// Runs one burst to completion.
    pub fn burst(
        &mut self,
        cx: &Context<'_>,
        outbox: &mut Outbox,
        counts: &mut Counts,
    ) -> Progress {
        counts.read_calls += 1;
        let drained = match self.receive.receive(cx.socket.fd()) {
            Ok((_, drained)) => {
                cx.tap.stamp();
                drained
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Progress::Drained,
            // An ICMP answer to something sent earlier, or a signal: nothing was received.
            Err(_) => {
                cx.drain_errors(cx.socket);
                return Progress::More;
            }
        };
        self.accept(cx, outbox, counts);
        let Self {
            receive,
            accepted,
            coalescer,
            gather,
            ..
        } = self;
        let bytes_of = |packet: PacketRef| receive.slice(packet.buf, packet.off, packet.len);
        coalescer.clear();
        coalescer.set_limits(limits(cx.shared));
        for &packet in accepted.iter() {
            // As many fit as were accepted: both have the same capacity.
            if coalescer.push(packet, bytes_of).is_err() {
                let received = receive.entry(packet.buf);
                refuse(
                    cx,
                    counts,
                    (DropReason::NoMemory, 1),
                    received,
                    [bytes_of(packet), &[]],
                );
            }
        }
        for write in coalescer.writes() {
            match write {
                Write::Packet(packet) => {
                    let bytes = bytes_of(packet);
                    let received = receive.entry(packet.buf);
                    match received.and_then(|received| unfinished(cx, bytes, received)) {
                        None => write_packet(gather, cx, received, [bytes, &[]], counts),
                        Some(what) => write_unfinished(gather, cx, received, bytes, &what, counts),
                    }
                }
                Write::Superpacket(superpacket) => {
                    let first = superpacket.packets().next();
                    let received = first.and_then(|packet| receive.entry(packet.buf));
                    write_superpacket(gather, cx, received, superpacket, bytes_of, counts);
                }
            }
        }
        if drained {
            Progress::Drained
        } else {
            Progress::More
        }
    }

    /// Steps 2 and 3 for every packet of the burst.
    fn accept(&mut self, cx: &Context<'_>, outbox: &mut Outbox, counts: &mut Counts) {
        self.accepted.clear();
        let header_len = cx.encapsulation().header_len();
        for (buf, (received, bytes)) in (0_u16..).zip(self.receive.entries()) {
            if received.truncated {
                counts.read += 1;
                refuse(
                    cx,
                    counts,
                    (DropReason::Truncated, 1),
                    Some(&received),
                    [inner_of(cx, bytes), &[]],
                );
                continue;
            }
            counts.read_superpackets += u64::from(received.stride < received.len);
            if bytes.is_empty() {
                counts.read += 1;
                refuse(
                    cx,
                    counts,
                    (DropReason::TooShort, 1),
                    Some(&received),
                    [bytes, &[]],
                );
            }
            let stride = if cx.encapsulation().is_one(bytes, received.stride) {
                bytes.len()
            } else {
                received.stride.max(1)
            };
            let headers = header_len * bytes.len().div_ceil(stride);
            counts.read_bytes += bytes.len().saturating_sub(headers) as u64;
            let (mut accepted, mut from) = (0, None);
            for (i, datagram) in bytes.chunks_mut(stride).enumerate() {
                counts.read += 1;
                let verdict = decide(cx, outbox, counts, &mut self.reporter, &received, datagram);
                let Some((peer, len, packets)) = verdict else {
                    continue;
                };
                if self.accepted.len() == self.accepted.capacity() {
                    let packet = datagram.get(header_len..).unwrap_or_default();
                    refuse(
                        cx,
                        counts,
                        (DropReason::NoMemory, packets),
                        Some(&received),
                        [packet, &[]],
                    );
                    continue;
                }
                accepted += packets;
                from = Some(peer);
                let fit = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
                self.accepted.push(PacketRef {
                    buf,
                    off: fit(i * stride + header_len),
                    len: fit(len),
                });
            }
            if let Some(peer) = from {
                peer.received.fetch_add(accepted, Ordering::Relaxed);
            }
        }
    }
}

/// Steps 2 and 3 for one datagram: the peer it came from, its packet's length, and how many packets that is, if
/// it goes on.
#[inline]
fn decide<'t>(
    cx: &Context<'t>,
    outbox: &mut Outbox,
    counts: &mut Counts,
    reporter: &mut Reporter,
    received: &Received,
    datagram: &mut [u8],
) -> Option<(&'t Arc<Peer>, usize, u64)> {
    let source = received.source;
    let mut unreadable = |reason, packet: &[u8]| {
        refuse(cx, counts, (reason, 1), Some(received), [packet, &[]]);
        reporter.first_drop(cx.shared, cx.table, reason, source, None);
        None
    };
    let inner = match cx.encapsulation().open(datagram) {
        Ok(inner) => inner,
        Err(reason) => return unreadable(reason, inner_of(cx, datagram)),
    };
    let Ok(meta) = ip::parse(inner.packet) else {
        return unreadable(DropReason::of_unparsed(inner.packet.len()), inner.packet);
    };
    if !inner.may_be(meta.version()) {
        return unreadable(DropReason::Malformed, inner.packet);
    }
    let outer = Outer {
        addr: source.ip(),
        tos: received.tos,
        mac: inner.sender,
    };
    let packet = inner.packet;
    match cx.rules.decap(cx.table, packet, &meta, outer) {
        DecapVerdict::Deliver(peer) => {
            let len = meta.total_len();
            let packet = packet.get_mut(..len).unwrap_or_default();
            let settings = &cx.shared.settings;
            settings
                .encapsulation
                .finish(packet, settings.mtu, cx.shared.sum);
            let packets =
                unfinished(cx, packet, received).map_or(1, |(_, split)| split.count() as u64);
            counts.read += packets - 1;
            Some((peer, len, packets))
        }
        DecapVerdict::Answer(peer, kind, reason) => {
            outbox.slow.answer_remotely(
                cx,
                counts,
                (kind, reason),
                packet,
                &meta,
                (peer, received.tos),
            );
            None
        }
        DecapVerdict::Drop(reason) => {
            refuse(cx, counts, (reason, 1), Some(received), [packet, &[]]);
            reporter.first_drop(cx.shared, cx.table, reason, source, Some(meta.src()));
            None
        }
    }
}

/// What a datagram that cannot be opened has in a packet's place.
fn inner_of<'b>(cx: &Context<'_>, datagram: &'b [u8]) -> &'b [u8] {
    let header_len = cx.encapsulation().header_len();
    datagram.get(header_len..).unwrap_or_default()
}
