//! Owns decap: from the underlay to the TUN. Never blocks, allocates or logs.
//!
//! One burst of one worker:
//! 1. *Receive* a burst of datagrams, each possibly a GRO buffer of many inner packets.
//! 2. *Validate* what the encapsulation puts in front of each inner packet, and the packet's IP header.
//! 3. *Decide* (`forward`): outer source is a known peer, inner source lies in its lease, destination is ours,
//!    TTL, ECN; or an answer; or a drop.
//!    What a kernel on this machine left unfinished is finished (`encapsulation`).
//! 4. *Coalesce* neighbours of one flow over the whole burst (`offload::coalesce`).
//! 5. *Write* each superpacket or packet to the TUN, as scatter/gather over the receive buffers.
//!
//! Everything belongs to one worker; the table is read-only for the burst.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::drop::DropReason;
use super::encapsulation::Inner;
use super::forward::{DecapVerdict, Outer};
use super::outbox::Outbox;
use super::report::Reporter;
use super::shared::Shared;
use super::stats::Counts;
use super::table::Peer;
use super::tap::{Direction, Form, Seen, Verdict};
use super::worker::{Context, Progress};
use super::{Event, Settings};
use crate::offload::coalesce::{Coalescer, HEAD_LEN, Limits, PacketRef, Superpacket, Write};
use crate::offload::split::{MAX_HEADER_LEN, Split};
use crate::offload::vnet_hdr::{Gso, VNET_HDR_LEN, VnetHdr};
use crate::sys::iov::Gather;
use crate::sys::mmsg::{Received, RecvBatch};

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
            Ok((_, drained)) => drained,
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
    let Inner {
        packet,
        meta,
        sender,
    } = match cx.encapsulation().open(datagram) {
        Ok(inner) => inner,
        Err(reason) => {
            refuse(
                cx,
                counts,
                (reason, 1),
                Some(received),
                [inner_of(cx, datagram), &[]],
            );
            reporter.first_drop(cx.shared, cx.table, reason, source, None);
            return None;
        }
    };
    let outer = Outer {
        addr: source.ip(),
        tos: received.tos,
        mac: sender,
    };
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

/// What may be merged, by what the device takes.
fn limits(shared: &Shared) -> Limits {
    let caps = shared.tun_caps;
    Limits {
        tcp: caps.tso4() && caps.tso6() && shared.usable(&shared.tun_tcp, "tun-tso", None),
        udp: caps.uso() && shared.usable(&shared.tun_udp, "tun-uso", None),
        ..Limits::default()
    }
}

/// How to cut a packet that is an unfinished superpacket, which `received` may tell more about.
#[inline]
fn unfinished(cx: &Context<'_>, packet: &[u8], received: &Received) -> Option<(VnetHdr, Split)> {
    let Settings {
        encapsulation, mtu, ..
    } = cx.shared.settings;
    if packet.len() <= usize::from(mtu.get()) {
        return None;
    }
    let segment_len = (received.stride < received.len)
        .then(|| u16::try_from(received.stride).ok())
        .flatten();
    encapsulation.superpacket(packet, mtu, segment_len)
}

/// Writes an unfinished superpacket: as one where the device takes it, else in segments.
#[cold]
fn write_unfinished(
    gather: &mut Gather,
    cx: &Context<'_>,
    received: Option<&Received>,
    packet: &[u8],
    (vnet, split): &(VnetHdr, Split),
    counts: &mut Counts,
) {
    let packets = split.count() as u64;
    let note = |verdict| {
        cx.tap.note(Form::Any, || {
            (seen(cx, received, verdict, packets), [packet])
        });
    };
    let takes = limits(cx.shared);
    let whole = match vnet.gso {
        Gso::TcpV4 { .. } | Gso::TcpV6 { .. } => takes.tcp,
        Gso::UdpL4 => takes.udp,
        Gso::None => false,
    };
    if whole {
        let head = vnet.encode();
        let mut gathered = gather.start();
        gathered.push(&head);
        gathered.push(packet);
        counts.send_calls += 1;
        match cx.queue.write(gathered) {
            Ok(_) => {
                counts.sent += packets;
                counts.sent_bytes += packet.len() as u64;
                counts.sent_superpackets += 1;
                return note(Verdict::Delivered);
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                withdraw(cx.shared, vnet.gso, &error);
                counts.replays += 1;
            }
            Err(error) => {
                let reason = DropReason::of_tun_write(&error);
                return refuse(cx, counts, (reason, packets), received, [packet, &[]]);
            }
        }
    }
    for i in 0..split.count() {
        let mut header = [0; MAX_HEADER_LEN];
        let header_len = split.write_header(packet, i, cx.shared.sum, &mut header);
        let header = header.get(..header_len).unwrap_or_default();
        let payload = packet.get(split.payload(i)).unwrap_or_default();
        write_packet(gather, cx, received, [header, payload], counts);
    }
}

/// Writes one packet, which may be in two parts.
fn write_packet(
    gather: &mut Gather,
    cx: &Context<'_>,
    received: Option<&Received>,
    [header, payload]: [&[u8]; 2],
    counts: &mut Counts,
) {
    let mut gathered = gather.start();
    if cx.shared.tun_caps.vnet_hdr {
        gathered.push(&[0; VNET_HDR_LEN]);
    }
    gathered.push(header);
    if !payload.is_empty() {
        gathered.push(payload);
    }
    counts.send_calls += 1;
    match cx.queue.write(gathered) {
        Ok(_) => {
            counts.sent += 1;
            counts.sent_bytes += (header.len() + payload.len()) as u64;
            cx.tap.note(Form::Any, || {
                (seen(cx, received, Verdict::Delivered, 1), [header, payload])
            });
        }
        Err(error) => {
            let reason = DropReason::of_tun_write(&error);
            refuse(cx, counts, (reason, 1), received, [header, payload]);
        }
    }
}

/// Drops packets that are in one place, which may have two parts.
fn refuse(
    cx: &Context<'_>,
    counts: &mut Counts,
    (reason, packets): (DropReason, u64),
    received: Option<&Received>,
    parts: [&[u8]; 2],
) {
    counts.drop(reason, packets);
    cx.tap.note(Form::Any, || {
        let verdict = Verdict::Dropped(reason);
        (seen(cx, received, verdict, packets), parts)
    });
}

/// What a datagram that cannot be opened has in a packet's place.
fn inner_of<'b>(cx: &Context<'_>, datagram: &'b [u8]) -> &'b [u8] {
    let header_len = cx.encapsulation().header_len();
    datagram.get(header_len..).unwrap_or_default()
}

/// What a capture learns of packets that came with `received`.
fn seen(cx: &Context<'_>, received: Option<&Received>, verdict: Verdict, packets: u64) -> Seen {
    Seen {
        direction: Direction::Decap,
        verdict,
        outer: received.map(|received| received.source),
        local_port: cx.shared.bind().port(),
        tos: received.map_or(0, |received| received.tos),
        packets,
    }
}

/// Writes a superpacket; if the kernel refuses it as such, its packets one by one.
fn write_superpacket<'b>(
    gather: &mut Gather,
    cx: &Context<'_>,
    received: Option<&Received>,
    superpacket: Superpacket<'_>,
    bytes_of: impl Fn(PacketRef) -> &'b [u8],
    counts: &mut Counts,
) {
    let packets = superpacket.count() as u64;
    let first = superpacket.packets().next().map_or(&[][..], &bytes_of);
    let mut head = [0; HEAD_LEN];
    let head_len = superpacket.write_head(first, &mut head);
    let mut gathered = gather.start();
    gathered.push(head.get(..head_len).unwrap_or_default());
    for payload in superpacket.payloads() {
        gathered.push(bytes_of(payload));
    }
    counts.send_calls += 1;
    let tap = |verdict| {
        let seen = |packets| seen(cx, received, verdict, packets);
        cx.tap.note(Form::Whole, || {
            let head = head.get(VNET_HDR_LEN..head_len).unwrap_or_default();
            let payloads = superpacket
                .payloads()
                .map(|payload| -> &[u8] { bytes_of(payload) });
            (seen(packets), std::iter::once(head).chain(payloads))
        });
        for packet in superpacket.packets() {
            cx.tap.note(Form::Segment, || (seen(1), [bytes_of(packet)]));
        }
    };
    match cx.queue.write(gathered) {
        Ok(_) => {
            counts.sent += packets;
            counts.sent_bytes += superpacket.packet_len() as u64;
            counts.sent_superpackets += 1;
            if cx.tap.is_on() {
                tap(Verdict::Delivered);
            }
        }
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            withdraw(cx.shared, superpacket.vnet_hdr().gso, &error);
            counts.replays += 1;
            for packet in superpacket.packets() {
                write_packet(gather, cx, received, [bytes_of(packet), &[]], counts);
            }
        }
        Err(error) => {
            let reason = DropReason::of_tun_write(&error);
            counts.drop(reason, packets);
            if cx.tap.is_on() {
                tap(Verdict::Dropped(reason));
            }
        }
    }
}

/// The kernel refused a superpacket: no more of its kind.
fn withdraw(shared: &Shared, gso: Gso, error: &io::Error) {
    let (state, capability) = match gso {
        Gso::UdpL4 => (&shared.tun_udp, "tun-uso"),
        Gso::TcpV4 { .. } | Gso::TcpV6 { .. } | Gso::None => (&shared.tun_tcp, "tun-tso"),
    };
    if state.withdraw(shared.clock.now_ms()) {
        let reason = format!("the kernel refused a superpacket: {error}");
        shared.event(Event::CapabilityWithdrawn {
            capability,
            next_hop: None,
            reason,
        });
    }
}
