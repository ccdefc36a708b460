//! Owns delivery: writing what decap accepted to the TUN, whole or in segments, and what every refusal of the kernel
//! means. Never decides whether a packet is accepted.
//!
//! What the kernel's errors mean here:
//! - `EINVAL` about a superpacket: it takes none of this kind. Its packets are written one by one, at once, so that no
//!   later packet of their flow overtakes them, and the capability is withdrawn.
//! - anything else is the packets' [`Shared::write_failed`].

use std::io;

use super::drop::DropReason;
use super::shared::Shared;
use super::stats::Counts;
use super::tap::{Direction, Form, Seen, Verdict};
use super::worker::Context;
use super::{Event, Settings};
use crate::offload::coalesce::{HEAD_LEN, Limits, PacketRef, Superpacket};
use crate::offload::split::{MAX_HEADER_LEN, Split};
use crate::offload::vnet_hdr::{Gso, VNET_HDR_LEN, VnetHdr};
use crate::sys::iov::Gather;
use crate::sys::mmsg::Received;

/// What may be merged, by what the device takes.
pub fn limits(shared: &Shared) -> Limits {
    let caps = shared.tun_caps;
    let Settings {
        encapsulation, mtu, ..
    } = shared.settings;
    Limits {
        tcp: caps.tso4() && caps.tso6() && shared.usable(&shared.tun_tcp, "tun-tso", None),
        udp: caps.uso() && shared.usable(&shared.tun_udp, "tun-uso", None),
        max_packet_len: encapsulation.max_single_len(mtu),
        ..Limits::default()
    }
}

/// How to cut a packet that is an unfinished superpacket, which `received` may tell more about.
#[inline]
pub fn unfinished(
    cx: &Context<'_>,
    packet: &[u8],
    received: &Received,
) -> Option<(VnetHdr, Split)> {
    let Settings {
        encapsulation, mtu, ..
    } = cx.shared.settings;
    if packet.len() <= usize::from(encapsulation.max_single_len(mtu)) {
        return None;
    }
    let segment_len = (received.stride < received.len)
        .then(|| u16::try_from(received.stride).ok())
        .flatten();
    encapsulation.superpacket(packet, mtu, segment_len)
}

/// Writes an unfinished superpacket: as one where the device takes it, else in segments.
#[cold]
pub fn write_unfinished(
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
                let reason = cx.shared.write_failed(&error);
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
pub fn write_packet(
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
            let reason = cx.shared.write_failed(&error);
            refuse(cx, counts, (reason, 1), received, [header, payload]);
        }
    }
}

/// Drops packets that are in one place, which may have two parts.
pub fn refuse(
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
pub fn write_superpacket<'b>(
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
            let reason = cx.shared.write_failed(&error);
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
