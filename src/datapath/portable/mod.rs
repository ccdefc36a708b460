//! Owns the portable engine: one thread, one TUN descriptor, one socket, one packet per system call, no
//! offload. What runs on the oldest kernel, and the oracle: it shares the decisions with the batched engine,
//! and no I/O code.
//!
//! As the original does, it leaves the path MTU to the kernel, which fragments outer datagrams that exceed it.

mod path;

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use tun_tap::{Iface, Mode};

use super::shared::Shared;
use super::table::Table;
use super::worker::Progress;
use super::{Event, OpenError};
use crate::route::Reader;
use crate::sys::fd;
use path::Path;

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
        let mut path = Path::new(&opened, &shared);
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
            path.tap.end();
            published.encap.publish(&path.encap);
            published.decap.publish(&path.decap);
        }
    }
}
