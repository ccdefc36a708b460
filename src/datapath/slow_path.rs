//! Owns the packets that cannot take the fast path: answers, fragments, single sends after a refusal. Copies
//! where that is simpler; never allocates.

use std::io;
use std::sync::atomic::Ordering;

use super::answer::Answerer;
use super::drop::DropReason;
use super::encapsulation::MAX_HEADER_LEN;
use super::pending::Destination;
use super::stats::Counts;
use super::table::Peer;
use super::tap::{Direction, Form, Seen, Verdict};
use super::worker::Context;
use crate::addr::Mtu;
use crate::offload::vnet_hdr::VNET_HDR_LEN;
use crate::sys::iov::Gather;
use crate::sys::mmsg::{Entry, SendBatch};
use crate::underlay::UnderlaySocket;
use crate::wire::fragment::Fragments;
use crate::wire::icmp_error::IcmpError;
use crate::wire::ip::{self, IpMeta, Version};
use crate::wire::ipv4;

/// A plain packet's virtio-net header.
const PLAIN: [u8; VNET_HDR_LEN] = [0; VNET_HDR_LEN];

/// One worker's slow path. Memory is fixed at construction.
pub struct SlowPath {
    single: SendBatch,
    answerer: Answerer,
    gather: Gather,
    scratch: Vec<u8>,
}

impl SlowPath {
    /// Room for one packet of any size.
    #[must_use]
    pub fn new() -> Self {
        Self {
            single: SendBatch::new(1, 2),
            answerer: Answerer::new(),
            gather: Gather::new(),
            scratch: vec![0; 1 << 16],
        }
    }

    /// Tells the local sender of `packet`, through the TUN, why it does not go on. Of a superpacket of
    /// `packets` segments one is answered and the rest dropped: their sender learns enough from one.
    pub fn answer_locally(
        &mut self,
        cx: &Context<'_>,
        counts: &mut Counts,
        (kind, reason): (IcmpError, DropReason),
        packet: &[u8],
        meta: &IpMeta,
        packets: u64,
    ) {
        let answer = self
            .answerer
            .build_local(cx.shared, cx.rules, kind, packet, meta);
        let answered = answer.is_some_and(|answer| {
            let mut gathered = self.gather.start();
            if cx.shared.tun_caps.vnet_hdr {
                gathered.push(&PLAIN);
            }
            gathered.push(answer);
            counts.send_calls += 1;
            cx.queue.write(gathered).is_ok()
        });
        let verdict = if answered {
            Verdict::Answered(reason)
        } else {
            Verdict::Dropped(reason)
        };
        let answered = u64::from(answered);
        counts.answered += answered;
        counts.drop(reason, packets - answered);
        cx.tap.note(Form::Any, || {
            let seen = Seen::dropped(Direction::Encap, reason, packets);
            (Seen { verdict, ..seen }, [packet])
        });
    }

    /// Tells the remote sender of `packet`, through `peer`, why it does not go on.
    pub fn answer_remotely(
        &mut self,
        cx: &Context<'_>,
        counts: &mut Counts,
        (kind, reason): (IcmpError, DropReason),
        packet: &[u8],
        meta: &IpMeta,
        (peer, tos): (&Peer, u8),
    ) {
        let note = |verdict| {
            cx.tap.note(Form::Any, || {
                let seen = Seen {
                    direction: Direction::Decap,
                    verdict,
                    outer: Some(peer.addr),
                    local_port: cx.shared.bind().port(),
                    tos,
                    packets: 1,
                };
                (seen, [packet])
            });
        };
        let Some(answer) = self
            .answerer
            .build_remote(cx.shared, cx.rules, kind, packet, meta)
        else {
            note(Verdict::Dropped(reason));
            return counts.drop(reason, 1);
        };
        let mut header = [0; MAX_HEADER_LEN];
        let header_len = cx
            .encapsulation()
            .write_header(peer.mac, answer, &mut header);
        let parts = [header.get(..header_len).unwrap_or_default(), answer];
        let socket = cx.shared.socket(0, cx.socket);
        match send(&mut self.single, cx, socket, (peer, 0), parts, counts) {
            Ok(()) => {
                counts.answered += 1;
                note(Verdict::Answered(reason));
            }
            Err(_) => {
                counts.drop(reason, 1);
                note(Verdict::Dropped(reason));
            }
        }
    }

    /// Sends one datagram made of what precedes a payload and the payload.
    ///
    /// # Errors
    /// The kernel's, after one retry.
    pub fn send(
        &mut self,
        cx: &Context<'_>,
        counts: &mut Counts,
        to: Destination<'_>,
        parts: [&[u8]; 2],
    ) -> io::Result<()> {
        let socket = cx.shared.socket(to.socket, cx.socket);
        send(
            &mut self.single,
            cx,
            socket,
            (to.peer, to.tos),
            parts,
            counts,
        )
    }

    /// Finds an outcome for a packet that proved too big for the path: an answer, fragments, or a drop.
    pub fn oversize(
        &mut self,
        cx: &Context<'_>,
        counts: &mut Counts,
        to: Destination<'_>,
        [header, payload]: [&[u8]; 2],
    ) {
        let (Some(mtu), Some(packet)) = (
            to.peer.max_inner(cx.shared.clock),
            self.scratch.get_mut(..header.len() + payload.len()),
        ) else {
            // The kernel said "too big" and not for what size: nothing can be told.
            counts.drop(DropReason::TooBig, 1);
            let verdict = Verdict::Dropped(DropReason::TooBig);
            return note(cx, to, verdict, [header, payload]);
        };
        let (front, back) = packet.split_at_mut(header.len());
        front.copy_from_slice(header);
        back.copy_from_slice(payload);
        let scratch = std::mem::take(&mut self.scratch);
        let packet = scratch
            .get(..header.len() + payload.len())
            .unwrap_or_default();
        match ip::parse(packet) {
            Ok(meta) if meta.version() == Version::V4 && !meta.dont_fragment() => {
                self.fragment(cx, counts, to, packet, mtu);
            }
            Ok(meta) => {
                let kind = IcmpError::PacketTooBig { mtu };
                self.answer_locally(cx, counts, (kind, DropReason::TooBig), packet, &meta, 1);
            }
            Err(_) => {
                counts.drop(DropReason::Malformed, 1);
                let verdict = Verdict::Dropped(DropReason::Malformed);
                note(cx, to, verdict, [header, payload]);
            }
        }
        self.scratch = scratch;
    }

    /// Sends an IPv4 packet as fragments of at most `max_len` bytes. It counts as sent when all of them were.
    pub fn fragment(
        &mut self,
        cx: &Context<'_>,
        counts: &mut Counts,
        to: Destination<'_>,
        packet: &[u8],
        max_len: Mtu,
    ) {
        let Ok(fragments) = Fragments::plan(packet, max_len) else {
            counts.drop(DropReason::TooBig, 1);
            let verdict = Verdict::Dropped(DropReason::TooBig);
            return note(cx, to, verdict, [packet, &[]]);
        };
        let mut head = [0; MAX_HEADER_LEN + ipv4::MAX_HEADER_LEN];
        let header_len = cx
            .encapsulation()
            .write_header(to.peer.mac, packet, &mut head);
        let mut header = [0; ipv4::MAX_HEADER_LEN];
        for i in 0..fragments.count() {
            let Some(piece) = fragments.piece(i, &mut header) else {
                break;
            };
            let head_len = header_len + piece.header_len;
            if let Some(inner) = head.get_mut(header_len..head_len) {
                inner.copy_from_slice(header.get(..piece.header_len).unwrap_or_default());
            }
            let head = head.get(..head_len).unwrap_or_default();
            let body = packet.get(piece.payload).unwrap_or_default();
            if let Err(error) = self.send(cx, counts, to, [head, body]) {
                let reason = cx.shared.send_failed(&error);
                counts.drop(reason, 1);
                return note(cx, to, Verdict::Dropped(reason), [packet, &[]]);
            }
            counts.fragments += 1;
        }
        sent(to.peer, 1, packet.len(), counts);
        note(cx, to, Verdict::Fragmented, [packet, &[]]);
    }
}

impl Default for SlowPath {
    fn default() -> Self {
        Self::new()
    }
}

/// Shows one packet on its way to captures.
pub fn note(cx: &Context<'_>, to: Destination<'_>, verdict: Verdict, parts: [&[u8]; 2]) {
    cx.tap.note(Form::Any, || {
        let seen = Seen {
            direction: Direction::Encap,
            verdict,
            outer: Some(to.peer.addr),
            local_port: cx.shared.socket(to.socket, cx.socket).addr().port(),
            tos: to.tos,
            packets: 1,
        };
        (seen, parts)
    });
}

/// Counts packets of `bytes` inner bytes that went to `peer`.
pub fn sent(peer: &Peer, packets: u64, bytes: usize, counts: &mut Counts) {
    counts.sent += packets;
    counts.sent_bytes += bytes as u64;
    peer.sent.fetch_add(packets, Ordering::Relaxed);
}

/// One datagram, retried once: an ICMP answer to an earlier one is told instead of sending.
fn send(
    single: &mut SendBatch,
    cx: &Context<'_>,
    socket: &UnderlaySocket,
    (peer, tos): (&Peer, u8),
    parts: [&[u8]; 2],
    counts: &mut Counts,
) -> io::Result<()> {
    let mut sending = single.start();
    let entry = Entry {
        to: &peer.name,
        segment_len: None,
        tos,
    };
    sending.push(entry, parts.into_iter().filter(|part| !part.is_empty()));
    let mut retried = false;
    loop {
        counts.send_calls += 1;
        match sending.send(socket.fd(), 0) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if retried || error.kind() == io::ErrorKind::WouldBlock => {
                return Err(error);
            }
            Err(_) => {
                cx.drain_errors(socket);
                retried = true;
            }
        }
    }
}
