//! Owns the portable engine's way of one packet, in either direction. Never waits.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::Ordering;

use tun_tap::Iface;

use super::Opened;
use crate::datapath::answer::Answerer;
use crate::datapath::drop::DropReason;
use crate::datapath::encapsulation::{Encapsulation, MAX_HEADER_LEN};
use crate::datapath::forward::{DecapVerdict, EncapVerdict, Outer, Rules};
use crate::datapath::report::Reporter;
use crate::datapath::shared::Shared;
use crate::datapath::stats::Counts;
use crate::datapath::table::{Peer, Table};
use crate::datapath::tap::{Direction, Form, Seen, Tap, Verdict};
use crate::datapath::worker::{Progress, after_tun_read};
use crate::offload::split::Split;
use crate::wire::checksum::SumFn;
use crate::wire::{icmp_error, ip};

/// The largest packet, which the TUN's MTU never exceeds, and what the encapsulation puts in front of it.
const BUFFER_LEN: usize = MAX_HEADER_LEN + (1 << 16);

/// One thread's state.
pub(super) struct Path<'a> {
    opened: &'a Opened,
    shared: &'a Shared,
    rules: Rules,
    answerer: Answerer,
    reporter: Reporter,
    /// What shows packets to captures.
    pub(super) tap: Tap,
    encapsulation: Encapsulation,
    /// A datagram: a packet, with room for the encapsulation's header in front.
    buffer: Vec<u8>,
    /// What TUN to underlay has counted.
    pub(super) encap: Counts,
    /// What underlay to TUN has counted.
    pub(super) decap: Counts,
}

impl<'a> Path<'a> {
    /// Over this device and socket.
    pub(super) fn new(opened: &'a Opened, shared: &'a Shared) -> Self {
        Self {
            opened,
            shared,
            rules: Rules::new(&shared.settings, shared.clock),
            answerer: Answerer::new(),
            reporter: Reporter::new(),
            tap: Tap::new(&shared.taps, 0),
            encapsulation: shared.settings.encapsulation,
            buffer: vec![0; BUFFER_LEN],
            encap: Counts::default(),
            decap: Counts::default(),
        }
    }

    /// TUN to underlay: 1 read · 2 decide · 3 send, or answer, or drop.
    pub(super) fn encap_one(&mut self, table: &Table) -> Progress {
        let counts = &mut self.encap;
        counts.read_calls += 1;
        let header_len = self.encapsulation.header_len();
        let (header, packet) = self.buffer.split_at_mut(header_len);
        let len = match self.opened.iface.recv(packet) {
            Ok(len) => len,
            Err(error) => return after_tun_read(&error, counts),
        };
        self.tap.stamp();
        counts.read += 1;
        counts.read_bytes += len as u64;
        let packet = packet.get_mut(..len).unwrap_or_default();
        let Ok(meta) = ip::parse(packet) else {
            counts.drop(DropReason::Malformed, 1);
            let verdict = Verdict::Dropped(DropReason::Malformed);
            self.tap.note(Form::Any, || {
                (
                    seen(self.shared, Direction::Encap, None, verdict),
                    [&*packet],
                )
            });
            return Progress::More;
        };
        let (verdict, to) = match self.rules.encap(table, packet, &meta, packet.len()) {
            EncapVerdict::Send { peer, .. } | EncapVerdict::Fragment { peer, .. } => {
                self.encapsulation.write_header(peer.mac, packet, header);
                let datagram = self.buffer.get(..header_len + len).unwrap_or_default();
                let socket = (&self.opened.socket, self.shared);
                let verdict = send(socket, datagram, peer, (counts, len));
                (verdict, Some(peer.addr))
            }
            EncapVerdict::Answer(kind, reason) => {
                let built =
                    self.answerer
                        .build_local(self.shared, &self.rules, kind, packet, &meta);
                counts.send_calls += u64::from(built.is_some());
                let answered = built.is_some_and(|answer| self.opened.iface.send(answer).is_ok());
                (told(counts, answered, reason), None)
            }
            EncapVerdict::Drop(reason) => {
                counts.drop(reason, 1);
                (Verdict::Dropped(reason), None)
            }
        };
        self.tap.note(Form::Any, || {
            let packet = self.buffer.get(header_len..header_len + len);
            let seen = seen(self.shared, Direction::Encap, to, verdict);
            (seen, [packet.unwrap_or_default()])
        });
        Progress::More
    }

    /// Underlay to TUN: 1 receive · 2 decide · 3 write, or answer, or drop.
    pub(super) fn decap_one(&mut self, table: &Table) -> Progress {
        let counts = &mut self.decap;
        counts.read_calls += 1;
        let (len, source) = match self.opened.socket.recv_from(&mut self.buffer) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Progress::Drained,
            // An ICMP answer to something sent earlier: told once, nothing was received.
            Err(_) => return Progress::More,
        };
        self.tap.stamp();
        counts.read += 1;
        let (from, header_len) = (Some(source), self.encapsulation.header_len());
        let datagram = self.buffer.get_mut(..len).unwrap_or_default();
        counts.read_bytes += len.saturating_sub(header_len) as u64;
        let opened = self.encapsulation.open(datagram).and_then(|inner| {
            let unparsed = |_| DropReason::of_unparsed(inner.packet.len());
            let meta = ip::parse(inner.packet).map_err(unparsed)?;
            if inner.may_be(meta.version()) {
                Ok((inner, meta))
            } else {
                Err(DropReason::Malformed)
            }
        });
        let (inner, meta) = match opened {
            Ok(opened) => opened,
            Err(reason) => {
                counts.drop(reason, 1);
                self.reporter
                    .first_drop(self.shared, table, reason, source, None);
                let verdict = Verdict::Dropped(reason);
                self.tap.note(Form::Any, || {
                    let packet = self.buffer.get(header_len..len).unwrap_or_default();
                    (seen(self.shared, Direction::Decap, from, verdict), [packet])
                });
                return Progress::More;
            }
        };
        let outer = Outer {
            addr: source.ip(),
            tos: 0,
            mac: inner.sender,
        };
        let packet = inner.packet;
        let verdict = match self.rules.decap(table, packet, &meta, outer) {
            DecapVerdict::Deliver(peer) => {
                let packet = packet.get_mut(..meta.total_len()).unwrap_or_default();
                let mtu = self.shared.settings.mtu;
                self.encapsulation.finish(packet, mtu, self.shared.sum);
                match self.encapsulation.superpacket(packet, mtu, None) {
                    None => write((&self.opened.iface, self.shared), packet, peer, counts),
                    Some((_, split)) => {
                        // It was read as one packet.
                        counts.read += split.count() as u64 - 1;
                        for i in 0..split.count() {
                            let segment = segment(packet, &split, i, self.shared.sum);
                            let device = (&self.opened.iface, self.shared);
                            let verdict = write(device, &segment, peer, counts);
                            self.tap.note(Form::Any, || {
                                let seen = seen(self.shared, Direction::Decap, from, verdict);
                                (seen, [segment.as_slice()])
                            });
                        }
                        return Progress::More;
                    }
                }
            }
            DecapVerdict::Answer(peer, kind, reason) => {
                let built =
                    self.answerer
                        .build_remote(self.shared, &self.rules, kind, packet, &meta);
                counts.send_calls += u64::from(built.is_some());
                let answered = built.is_some_and(|answer| {
                    let mut datagram = [0; MAX_HEADER_LEN + icmp_error::MAX_LEN];
                    let mut len =
                        (self.encapsulation).write_header(peer.mac, answer, &mut datagram);
                    if let Some(room) = datagram.get_mut(len..len + answer.len()) {
                        room.copy_from_slice(answer);
                        len += answer.len();
                    }
                    let datagram = datagram.get(..len).unwrap_or_default();
                    self.opened.socket.send_to(datagram, peer.addr).is_ok()
                });
                told(counts, answered, reason)
            }
            DecapVerdict::Drop(reason) => {
                counts.drop(reason, 1);
                self.reporter
                    .first_drop(self.shared, table, reason, source, Some(meta.src()));
                Verdict::Dropped(reason)
            }
        };
        self.tap.note(Form::Any, || {
            (
                seen(self.shared, Direction::Decap, from, verdict),
                [&*packet],
            )
        });
        Progress::More
    }
}

/// What a capture learns of one packet.
fn seen(
    shared: &Shared,
    direction: Direction,
    outer: Option<SocketAddr>,
    verdict: Verdict,
) -> Seen {
    Seen {
        direction,
        verdict,
        outer,
        local_port: outer.map_or(0, |_| shared.bind().port()),
        tos: 0,
        packets: 1,
    }
}

/// Counts a packet whose sender was told, or could not be.
const fn told(counts: &mut Counts, answered: bool, reason: DropReason) -> Verdict {
    if answered {
        counts.answered += 1;
        Verdict::Answered(reason)
    } else {
        counts.drop(reason, 1);
        Verdict::Dropped(reason)
    }
}

/// Writes one packet of `peer` to the device.
fn write(
    (iface, shared): (&Iface, &Shared),
    packet: &[u8],
    peer: &Peer,
    counts: &mut Counts,
) -> Verdict {
    counts.send_calls += 1;
    match iface.send(packet) {
        Ok(_) => {
            counts.sent += 1;
            counts.sent_bytes += packet.len() as u64;
            peer.received.fetch_add(1, Ordering::Relaxed);
            Verdict::Delivered
        }
        Err(error) => {
            let reason = shared.write_failed(&error);
            counts.drop(reason, 1);
            Verdict::Dropped(reason)
        }
    }
}

/// One segment of a superpacket, in a piece.
fn segment(packet: &[u8], split: &Split, i: usize, sum: SumFn) -> Vec<u8> {
    let mut segment = vec![0; split.header_len()];
    split.write_header(packet, i, sum, &mut segment);
    segment.extend_from_slice(packet.get(split.payload(i)).unwrap_or_default());
    segment
}

/// Sends one packet of `len` bytes in its datagram; a pending error of an earlier datagram is told once instead, so
/// once more.
fn send(
    (socket, shared): (&UdpSocket, &Shared),
    datagram: &[u8],
    peer: &Peer,
    (counts, len): (&mut Counts, usize),
) -> Verdict {
    let mut failure = None;
    for _ in 0..2 {
        counts.send_calls += 1;
        match socket.send_to(datagram, peer.addr) {
            Ok(_) => {
                counts.sent += 1;
                counts.sent_bytes += len as u64;
                peer.sent.fetch_add(1, Ordering::Relaxed);
                return Verdict::Sent;
            }
            Err(error) => failure = Some(error),
        }
    }
    let reason = failure.map_or(DropReason::Rejected, |error| shared.send_failed(&error));
    counts.drop(reason, 1);
    Verdict::Dropped(reason)
}
