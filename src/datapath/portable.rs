//! Owns the portable engine: one thread, one TUN descriptor, one socket, one packet per system call, no
//! offload. What runs on the oldest kernel, and the oracle: it shares the decisions with the batched engine,
//! and no I/O code.
//!
//! As the original does, it leaves the path MTU to the kernel, which fragments outer datagrams that exceed it.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use tun_tap::{Iface, Mode};

use super::answer::Answerer;
use super::drop::DropReason;
use super::encapsulation::{Encapsulation, Inner, MAX_HEADER_LEN};
use super::forward::{DecapVerdict, EncapVerdict, Outer, Rules};
use super::report::Reporter;
use super::shared::Shared;
use super::stats::Counts;
use super::table::{Peer, Table};
use super::tap::{Direction, Form, Seen, Tap, Verdict};
use super::worker::Progress;
use super::{Event, OpenError};
use crate::offload::split::Split;
use crate::route::Reader;
use crate::sys::fd;
use crate::wire::checksum::SumFn;
use crate::wire::{icmp_error, ip};

/// The largest packet, which the TUN's MTU never exceeds, and what the encapsulation puts in front of it.
const BUFFER_LEN: usize = MAX_HEADER_LEN + (1 << 16);
/// Rounds between looks at the stop flag and the published table, each one packet in each direction.
const ROUNDS: usize = 64;

const TUN: Token = Token(0);
const SOCKET: Token = Token(1);
const WAKE: Token = Token(2);

/// The device and the socket, opened.
pub struct Opened {
    iface: Iface,
    socket: UdpSocket,
}

impl Opened {
    /// Creates the device and binds the socket, without `SO_REUSEPORT`.
    ///
    /// # Errors
    /// [`OpenError`]; nothing is left behind.
    pub fn open(template: &str, bind: SocketAddr) -> Result<Self, OpenError> {
        let socket = UdpSocket::bind(bind).map_err(|source| OpenError::Bind { bind, source })?;
        let device = |source| OpenError::device(template, source);
        let iface = Iface::without_packet_info(template, Mode::Tun).map_err(device)?;
        fd::set_nonblocking(&iface).map_err(device)?;
        socket.set_nonblocking(true).map_err(device)?;
        Ok(Self { iface, socket })
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        self.iface.name()
    }
}

/// The engine, before it runs.
pub struct Portable {
    opened: Opened,
    shared: Arc<Shared>,
    reader: Reader<Table>,
    poll: Poll,
}

impl Portable {
    /// Registers what the thread waits for. Returns how to wake it, too.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(
        opened: Opened,
        shared: Arc<Shared>,
        reader: Reader<Table>,
    ) -> io::Result<(Self, Waker)> {
        let poll = Poll::new()?;
        for (fd, token) in [
            (opened.iface.as_raw_fd(), TUN),
            (opened.socket.as_raw_fd(), SOCKET),
        ] {
            poll.registry()
                .register(&mut SourceFd(&fd), token, Interest::READABLE)?;
        }
        let waker = Waker::new(poll.registry(), WAKE)?;
        Ok((
            Self {
                opened,
                shared,
                reader,
                poll,
            },
            waker,
        ))
    }

    /// Runs until the data plane stops, with the original's loop: one packet from each side in turn, until
    /// neither side has any.
    pub fn run(self) {
        let Self {
            opened,
            shared,
            mut reader,
            mut poll,
        } = self;
        let mut path = Path {
            opened: &opened,
            shared: &shared,
            rules: Rules::new(&shared.settings, shared.clock),
            answerer: Answerer::new(),
            reporter: Reporter::new(),
            tap: Tap::new(&shared.taps, 0),
            encapsulation: shared.settings.encapsulation,
            buffer: vec![0; BUFFER_LEN],
            encap: Counts::default(),
            decap: Counts::default(),
        };
        let Some(published) = shared.counts.first() else {
            return;
        };
        let mut events = Events::with_capacity(4);
        let (mut drained, mut gone) = (true, false);
        while !shared.stop.load(Ordering::Acquire) {
            if drained {
                match poll.poll(&mut events, None) {
                    Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                        let error = format!("cannot wait for packets: {error}");
                        shared.event(Event::WorkerDied { worker: 0, error });
                        return;
                    }
                    _ => {}
                }
                path.encap.wakeups += 1;
                path.decap.wakeups += 1;
            }
            let table = shared.table(&mut reader);
            path.tap.begin();
            for _ in 0..ROUNDS {
                let tun = if gone {
                    Progress::Drained
                } else {
                    path.encap_one(table)
                };
                let socket = path.decap_one(table);
                if tun == Progress::Gone {
                    gone = true;
                    let fd = opened.iface.as_raw_fd();
                    if poll.registry().deregister(&mut SourceFd(&fd)).is_ok() {
                        shared.device_gone();
                    }
                }
                drained = tun != Progress::More && socket != Progress::More;
                if drained {
                    break;
                }
            }
            published.encap.publish(&path.encap);
            published.decap.publish(&path.decap);
        }
    }
}

/// One thread's state.
struct Path<'a> {
    opened: &'a Opened,
    shared: &'a Shared,
    rules: Rules,
    answerer: Answerer,
    reporter: Reporter,
    tap: Tap,
    encapsulation: Encapsulation,
    /// A datagram: a packet, with room for the encapsulation's header in front.
    buffer: Vec<u8>,
    encap: Counts,
    decap: Counts,
}

impl Path<'_> {
    /// TUN to underlay: 1 read · 2 decide · 3 send, or answer, or drop.
    fn encap_one(&mut self, table: &Table) -> Progress {
        let counts = &mut self.encap;
        counts.read_calls += 1;
        let header_len = self.encapsulation.header_len();
        let (header, packet) = self.buffer.split_at_mut(header_len);
        let len = match self.opened.iface.recv(packet) {
            Ok(len) => len,
            Err(error) => return after_tun_read(&error),
        };
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
                let verdict = send(&self.opened.socket, datagram, peer, (counts, len));
                (verdict, Some(peer.addr))
            }
            EncapVerdict::Answer(kind, reason) => {
                let built =
                    self.answerer
                        .build_local(self.shared, &self.rules, kind, packet, &meta);
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
    fn decap_one(&mut self, table: &Table) -> Progress {
        let counts = &mut self.decap;
        counts.read_calls += 1;
        let (len, source) = match self.opened.socket.recv_from(&mut self.buffer) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Progress::Drained,
            // An ICMP answer to something sent earlier: told once, nothing was received.
            Err(_) => return Progress::More,
        };
        counts.read += 1;
        let (from, header_len) = (Some(source), self.encapsulation.header_len());
        let datagram = self.buffer.get_mut(..len).unwrap_or_default();
        counts.read_bytes += len.saturating_sub(header_len) as u64;
        let Inner {
            packet,
            meta,
            sender,
        } = match self.encapsulation.open(datagram) {
            Ok(inner) => inner,
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
            mac: sender,
        };
        let verdict = match self.rules.decap(table, packet, &meta, outer) {
            DecapVerdict::Deliver(peer) => {
                let packet = packet.get_mut(..meta.total_len()).unwrap_or_default();
                let mtu = self.shared.settings.mtu;
                self.encapsulation.finish(packet, mtu, self.shared.sum);
                match self.encapsulation.superpacket(packet, mtu, None) {
                    None => write(&self.opened.iface, packet, peer, counts),
                    Some((_, split)) => {
                        // It was read as one packet.
                        counts.read += split.count() as u64 - 1;
                        for i in 0..split.count() {
                            let segment = segment(packet, &split, i, self.shared.sum);
                            let verdict = write(&self.opened.iface, &segment, peer, counts);
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
fn write(iface: &Iface, packet: &[u8], peer: &Peer, counts: &mut Counts) -> Verdict {
    counts.send_calls += 1;
    match iface.send(packet) {
        Ok(_) => {
            counts.sent += 1;
            counts.sent_bytes += packet.len() as u64;
            peer.received.fetch_add(1, Ordering::Relaxed);
            Verdict::Delivered
        }
        Err(error) => {
            let reason = DropReason::of_tun_write(&error);
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

/// What a failed TUN read means.
pub(super) fn after_tun_read(error: &io::Error) -> Progress {
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Progress::Drained,
        Some(libc::EINTR) => Progress::More,
        // EBADFD: detached because the device was deleted; anything else on a character device that worked
        // until now means the same, and reading on would spin.
        _ => Progress::Gone,
    }
}

/// Sends one packet of `len` bytes in its datagram; a pending error of an earlier datagram is told once instead, so
/// once more.
fn send(
    socket: &UdpSocket,
    datagram: &[u8],
    peer: &Peer,
    (counts, len): (&mut Counts, usize),
) -> Verdict {
    let mut reason = DropReason::Rejected;
    for _ in 0..2 {
        counts.send_calls += 1;
        match socket.send_to(datagram, peer.addr) {
            Ok(_) => {
                counts.sent += 1;
                counts.sent_bytes += len as u64;
                peer.sent.fetch_add(1, Ordering::Relaxed);
                return Verdict::Sent;
            }
            Err(error) => reason = DropReason::of_send(&error),
        }
    }
    counts.drop(reason, 1);
    Verdict::Dropped(reason)
}
