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
use super::forward::{DecapVerdict, EncapVerdict, Rules};
use super::report::Reporter;
use super::shared::Shared;
use super::stats::Counts;
use super::table::{Peer, Table};
use super::tap::{Direction, Form, Seen, Tap, Verdict};
use super::worker::Progress;
use super::{Event, OpenError};
use crate::route::Reader;
use crate::sys::fd;
use crate::wire::ip;

/// The largest packet: the TUN's MTU never exceeds it.
const BUFFER_LEN: usize = 1 << 16;
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
            rules: Rules::new(
                shared.settings.local.clone(),
                shared.settings.source_check,
                shared.clock,
            ),
            answerer: Answerer::new(),
            reporter: Reporter::new(),
            tap: Tap::new(&shared.taps, 0),
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
    buffer: Vec<u8>,
    encap: Counts,
    decap: Counts,
}

impl Path<'_> {
    /// TUN to underlay: 1 read · 2 decide · 3 send, or answer, or drop.
    fn encap_one(&mut self, table: &Table) -> Progress {
        let counts = &mut self.encap;
        counts.read_calls += 1;
        let len = match self.opened.iface.recv(&mut self.buffer) {
            Ok(len) => len,
            Err(error) => return after_tun_read(&error),
        };
        counts.read += 1;
        counts.read_bytes += len as u64;
        let packet = self.buffer.get_mut(..len).unwrap_or_default();
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
                let verdict = send(&self.opened.socket, packet, peer, counts);
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
            (seen(self.shared, Direction::Encap, to, verdict), [&*packet])
        });
        Progress::More
    }

    /// Underlay to TUN: 1 receive · 2 decide · 3 write, or answer, or drop.
    fn decap_one(&mut self, table: &Table) -> Progress {
        let counts = &mut self.decap;
        counts.read_calls += 1;
        let (len, outer) = match self.opened.socket.recv_from(&mut self.buffer) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Progress::Drained,
            // An ICMP answer to something sent earlier: told once, nothing was received.
            Err(_) => return Progress::More,
        };
        counts.read += 1;
        counts.read_bytes += len as u64;
        let packet = self.buffer.get_mut(..len).unwrap_or_default();
        let from = Some(outer);
        let Ok(meta) = ip::parse(packet) else {
            let reason = DropReason::of_unparsed(len);
            counts.drop(reason, 1);
            let verdict = Verdict::Dropped(reason);
            self.tap.note(Form::Any, || {
                (
                    seen(self.shared, Direction::Decap, from, verdict),
                    [&*packet],
                )
            });
            return Progress::More;
        };
        let verdict = match self.rules.decap(table, packet, &meta, outer.ip(), 0) {
            DecapVerdict::Deliver(peer) => {
                counts.send_calls += 1;
                match self.opened.iface.send(packet) {
                    Ok(_) => {
                        counts.sent += 1;
                        counts.sent_bytes += len as u64;
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
            DecapVerdict::Answer(peer, kind, reason) => {
                let built =
                    self.answerer
                        .build_remote(self.shared, &self.rules, kind, packet, &meta);
                let answered = built
                    .is_some_and(|answer| self.opened.socket.send_to(answer, peer.addr).is_ok());
                told(counts, answered, reason)
            }
            DecapVerdict::Drop(reason) => {
                counts.drop(reason, 1);
                self.reporter
                    .first_drop(self.shared, table, reason, outer, Some(meta.src()));
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

/// Sends one packet; a pending error of an earlier datagram is told once instead, so once more.
fn send(socket: &UdpSocket, packet: &[u8], peer: &Peer, counts: &mut Counts) -> Verdict {
    let mut reason = DropReason::Rejected;
    for _ in 0..2 {
        counts.send_calls += 1;
        match socket.send_to(packet, peer.addr) {
            Ok(_) => {
                counts.sent += 1;
                counts.sent_bytes += packet.len() as u64;
                peer.sent.fetch_add(1, Ordering::Relaxed);
                return Verdict::Sent;
            }
            Err(error) => reason = DropReason::of_send(&error),
        }
    }
    counts.drop(reason, 1);
    Verdict::Dropped(reason)
}
