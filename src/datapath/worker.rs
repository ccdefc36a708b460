//! Owns the loop of one worker of the batched engine: waits for its TUN queue and its socket, runs each
//! direction's burst to completion. Never looks into a packet.
//!
//! Readiness is edge-triggered: a descriptor that was not drained stays on the worker's own ready list and is
//! served again after the other one, so neither direction starves and every wake-up's work is bounded.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};

use super::decap::Decap;
use super::drop::DropReason;
use super::encap::Encap;
use super::outbox::Outbox;
use super::shared::Shared;
use super::stats::Counts;
use super::table::Table;
use super::tap::Tap;
use super::{Encapsulation, Event, forward::Rules};
use crate::route::Reader;
use crate::sys::mmsg;
use crate::tun::TunQueue;
use crate::underlay::UnderlaySocket;

const TUN: Token = Token(0);
const SOCKET: Token = Token(1);
const WAKE: Token = Token(2);
/// Send sockets follow.
const FIRST_SEND: usize = 3;

/// Whether a descriptor may have more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It was drained; the kernel will tell when there is more.
    Drained,
    /// The burst ended first.
    More,
    /// The device is gone.
    Gone,
}

/// What a failed TUN read means. A packet that went with it is counted.
pub fn after_tun_read(error: &io::Error, counts: &mut Counts) -> Progress {
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Progress::Drained,
        Some(libc::EINTR) => Progress::More,
        // The kernel found no virtio-net header for a packet, and freed it (`tun_put_user`, drivers/net/tun.c).
        Some(libc::EINVAL) => {
            counts.read += 1;
            counts.drop(DropReason::BadVnetHeader, 1);
            Progress::More
        }
        // EBADFD: detached because the device was deleted; anything else on a character device that worked
        // until now means the same, and reading on would spin.
        _ => Progress::Gone,
    }
}

/// What a burst works with; none of it changes during the burst.
pub struct Context<'a> {
    /// This worker's TUN queue.
    pub queue: &'a TunQueue,
    /// This worker's receive socket.
    pub socket: &'a UnderlaySocket,
    /// The forwarding table.
    pub table: &'a Table,
    /// What goes where.
    pub rules: &'a Rules,
    /// What all workers share.
    pub shared: &'a Shared,
    /// Where captures see what becomes of the packets.
    pub tap: &'a Tap,
}

impl Context<'_> {
    /// How packets stand in datagrams.
    #[inline]
    pub const fn encapsulation(&self) -> Encapsulation {
        self.shared.settings.encapsulation
    }

    /// Most errors taken off one queue at a time; the rest raise another event.
    const MAX_ERRORS: usize = 64;

    /// Learns from a socket's error queue. Nothing is counted: the datagrams concerned were sent.
    pub fn drain_errors(&self, socket: &UnderlaySocket) {
        for _ in 0..Self::MAX_ERRORS {
            let Ok(Some(error)) = mmsg::take_error(socket.fd()) else {
                return;
            };
            for peer in self.table.peers_by_ip(error.destination.ip()) {
                self.shared.on_queued_error(&error, peer);
            }
        }
    }
}

/// One worker, before it runs.
pub struct Worker {
    idx: usize,
    queue: TunQueue,
    socket: UnderlaySocket,
    shared: Arc<Shared>,
    reader: Reader<Table>,
    poll: Poll,
}

impl Worker {
    /// Registers everything the worker waits for. Returns how to wake it, too.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(
        idx: usize,
        queue: TunQueue,
        socket: UnderlaySocket,
        shared: Arc<Shared>,
        reader: Reader<Table>,
    ) -> io::Result<(Self, Waker)> {
        let poll = Poll::new()?;
        let register = |fd: RawFd, token| {
            poll.registry()
                .register(&mut SourceFd(&fd), token, Interest::READABLE)
        };
        register(queue.raw_fd(), TUN)?;
        register(socket.raw_fd(), SOCKET)?;
        // Each send socket's error queue is watched by one worker.
        let workers = shared.counts.len();
        for (i, send) in shared
            .send
            .iter()
            .enumerate()
            .filter(|(i, _)| i % workers == idx)
        {
            register(send.raw_fd(), Token(FIRST_SEND + i))?;
        }
        let waker = Waker::new(poll.registry(), WAKE)?;
        Ok((
            Self {
                idx,
                queue,
                socket,
                shared,
                reader,
                poll,
            },
            waker,
        ))
    }

    /// Runs until the data plane stops.
    pub fn run(self) {
        let Self {
            idx,
            queue,
            socket,
            shared,
            mut reader,
            mut poll,
        } = self;
        let rules = Rules::new(&shared.settings, shared.clock);
        let mut outbox = Outbox::new(&shared.udp_caps);
        let mut encap = Encap::new(&shared);
        let mut decap = Decap::new(&shared);
        let tap = Tap::new(&shared.taps, idx);
        let (mut encap_counts, mut decap_counts) = (Counts::default(), Counts::default());
        let mut events = Events::with_capacity(16);
        let (mut tun_ready, mut socket_ready) = (true, true);
        let Some(published) = shared.counts.get(idx) else {
            return;
        };
        while !shared.stop.load(Ordering::Acquire) {
            // With work in hand only a look; else sleep until there is some.
            let timeout = (tun_ready || socket_ready).then_some(Duration::ZERO);
            match poll.poll(&mut events, timeout) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    let error = format!("cannot wait for packets: {error}");
                    shared.event(Event::WorkerDied { worker: idx, error });
                    return;
                }
                _ => {}
            }
            let table = shared.table(&mut reader);
            tap.begin();
            let context = Context {
                queue: &queue,
                socket: &socket,
                table,
                rules: &rules,
                shared: &shared,
                tap: &tap,
            };
            for event in &events {
                match event.token() {
                    TUN => tun_ready = true,
                    SOCKET => {
                        socket_ready = true;
                        if event.is_error() {
                            context.drain_errors(&socket);
                        }
                    }
                    WAKE => {}
                    Token(token) => {
                        if let Some(send) = shared.send.get(token - FIRST_SEND) {
                            context.drain_errors(send);
                        }
                    }
                }
            }
            if tun_ready {
                encap_counts.wakeups += 1;
                let progress = encap.burst(&context, &mut outbox, &mut encap_counts);
                tun_ready = progress == Progress::More;
                published.encap.publish(&encap_counts);
                if progress == Progress::Gone {
                    // Left registered it would wake us for ever: a gone device is always "in error".
                    let fd = queue.raw_fd();
                    if poll.registry().deregister(&mut SourceFd(&fd)).is_ok() {
                        shared.device_gone();
                    }
                }
            }
            if socket_ready {
                decap_counts.wakeups += 1;
                let progress = decap.burst(&context, &mut outbox, &mut decap_counts);
                socket_ready = progress == Progress::More;
                published.decap.publish(&decap_counts);
            }
            tap.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_that_cost_a_packet_is_told_from_an_empty_and_from_a_vanished_device() {
        for (errno, progress, lost) in [
            (libc::EAGAIN, Progress::Drained, 0),
            (libc::EINTR, Progress::More, 0),
            (libc::EINVAL, Progress::More, 1),
            (libc::EBADFD, Progress::Gone, 0),
            (libc::EFAULT, Progress::Gone, 0),
            (libc::EIO, Progress::Gone, 0),
        ] {
            let mut counts = Counts::default();
            let error = io::Error::from_raw_os_error(errno);
            assert_eq!(after_tun_read(&error, &mut counts), progress, "{error}");
            assert_eq!(counts.drops[DropReason::BadVnetHeader as usize], lost);
            assert_eq!((counts.read, counts.queued()), (lost, 0), "{error}");
        }
    }
}
