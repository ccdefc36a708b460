//! Owns answering probes. Answers peers only, never with more than it was asked with, and never more often than
//! [`PER_SECOND`] says; what it does not answer it drops without a word.
//!
//! An answer says by which link its request came in, so what it proves is the way of the request, whichever way it
//! takes itself. Where the asker wants it ([`Flags::PAST`]) it takes both: the routing table's, which may be the tunnel,
//! and that of marked probes past it. Neither a filtered tunnel nor a wall around our own packets then keeps the
//! asker's way from being proven.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use socket2::SockRef;
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::directory::{Directory, Peer, Word};
use super::socket::{self, Received};
use super::{Path, headers_len, wall_clock};
use crate::lease::Subnets;
use crate::wire::probe::{
    Flags, HEADER_LEN, Kind, Order, Probe, Report, Sights, Standing, asked_from,
};

/// Answers in a second, of a family: of 5000 nodes on one link each may prove its way to us once a second, with two
/// answers while it has to, and eight others ask at random.
pub const PER_SECOND: u32 = 12_000;

/// Answers to one peer in a second: a search for the usable size takes 4 sweeps of 64.
pub const PER_PEER_AND_SECOND: u32 = 400;

/// Reports, and orders of traces, in a second, all peers taken together: each asks the daemon's own loop.
pub const REPORTS_PER_SECOND: u32 = 50;

/// The longest request that is read: what an IP packet can be.
const MAX_LEN: usize = 1 << 16;

/// How long the daemon's loop may take. The asker waits no longer.
const PATIENCE: Duration = Duration::from_secs(1);

/// What only the daemon's loop can tell.
#[derive(Debug)]
pub struct Asked {
    /// Who asks.
    pub peer: Arc<Peer>,
    /// For what.
    pub wish: Wish,
    /// Where the answer goes.
    pub answer: oneshot::Sender<Told>,
}

/// What the daemon's loop is asked for.
#[derive(Clone, Copy, Debug)]
pub enum Wish {
    /// A report.
    Report {
        /// Number of the first peer to report on.
        first: u32,
        /// How many there is room for.
        room: usize,
    },
    /// To look out for the probes of a trace, or to tell of them.
    Watch {
        /// The nonce that they have.
        nonce: u64,
        /// Which of the two.
        order: Order,
    },
}

impl Wish {
    /// What a request asks for, if it has room for the answer.
    fn of(request: &Probe, bytes: &[u8]) -> Option<Self> {
        match request.kind {
            Kind::Ask if bytes.len() >= Report::MIN_LEN => Some(Self::Report {
                first: asked_from(bytes),
                room: Report::room(bytes.len()),
            }),
            Kind::Watch if bytes.len() >= Sights::MIN_LEN => Some(Self::Watch {
                nonce: request.nonce,
                order: Order::of(bytes)?,
            }),
            Kind::Request
            | Kind::Answer
            | Kind::Ask
            | Kind::Report
            | Kind::Watch
            | Kind::Sights => None,
        }
    }
}

/// What the daemon's loop answers.
#[derive(Debug)]
pub enum Told {
    /// On the node and its peers.
    Report(Report),
    /// Of a trace.
    Sights(Sights),
}

impl Told {
    fn write(&self, bytes: &mut [u8]) -> usize {
        match self {
            Self::Report(report) => report.write(bytes),
            Self::Sights(sights) => sights.write(bytes),
        }
    }
}

impl From<Standing> for Told {
    fn from(standing: Standing) -> Self {
        Self::Sights(Sights::of(standing))
    }
}

/// Sockets that are answered. Dropping it closes them.
#[derive(Debug)]
pub struct Responder {
    serving: Vec<JoinHandle<()>>,
}

impl Responder {
    /// Answers probes at `port` on all addresses of the node, in tasks of the current runtime, past the tunnel with
    /// `mark`. A node without IPv6 is answered for in IPv4 alone.
    ///
    /// # Errors
    ///
    /// The port is taken, or the system has no sockets left.
    pub fn start(
        port: u16,
        directory: &Arc<Directory>,
        reports: &mpsc::Sender<Asked>,
        mark: u32,
    ) -> io::Result<Self> {
        let v4 = socket::open(&Path::default(), Ipv4Addr::UNSPECIFIED.into(), port)?;
        let mut sockets = vec![v4];
        match socket::open(&Path::default(), Ipv6Addr::UNSPECIFIED.into(), port) {
            Ok(v6) => sockets.push(v6),
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {}
            Err(error) => return Err(error),
        }
        let serve = |socket| {
            let responding = Responding {
                end: Arc::new(End {
                    socket,
                    mark,
                    sending: Mutex::default(),
                }),
                directory: Arc::clone(directory),
                reports: reports.clone(),
                limit: Limit::new(Instant::now()),
            };
            tokio::spawn(responding.run())
        };
        Ok(Self {
            serving: sockets.into_iter().map(serve).collect(),
        })
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        for task in &self.serving {
            task.abort();
        }
    }
}

struct Responding {
    end: Arc<End>,
    directory: Arc<Directory>,
    reports: mpsc::Sender<Asked>,
    limit: Limit,
}

impl Responding {
    async fn run(mut self) {
        let mut buffer = vec![0; MAX_LEN];
        loop {
            match socket::receive(&self.end.socket, &mut buffer).await {
                Ok(received) => {
                    let bytes = buffer.get_mut(..received.len).unwrap_or_default();
                    self.take(&received, bytes);
                }
                // What ICMP says of an earlier answer, and a shortage of memory: the next datagram is another.
                Err(error) => {
                    tracing::trace!(%error, "probe responder");
                    tokio::task::yield_now().await;
                }
            }
        }
    }

    /// Looks at one datagram and answers it, if it is to be answered.
    fn take(&mut self, received: &Received, bytes: &mut [u8]) {
        let arrived = wall_clock();
        let Some(peer) = self.directory.peer_at(received.from.ip()) else {
            return;
        };
        let Ok(request) = Probe::parse(bytes) else {
            return;
        };
        let (Some(kind), Some(local)) = (request.kind.answer(), received.to) else {
            return;
        };
        if !self.limit.allow(&peer.subnets, kind, Instant::now()) {
            return;
        }
        let via = self.directory.via(received.link);
        let identity = self.directory.identity();
        let heard = peer.last_heard();
        let word = Word {
            sequence: Some(request.sequence),
            via,
            overlay: identity.holds(local) && !request.flags.has(Flags::PROVING),
            claimed: request.heard,
            sender: request.sender,
        };
        peer.hear(word);
        let total = usize::from(headers_len(local)) + bytes.len();
        let answer = Probe {
            kind,
            heard,
            seen_len: u16::try_from(total).unwrap_or(u16::MAX),
            seen_ttl: received.ttl,
            seen_tos: received.tos,
            via,
            arrived,
            sender: identity,
            ..request
        };
        if kind != Kind::Answer {
            if let Some(wish) = Wish::of(&request, bytes) {
                self.ask_daemon(peer, wish, (received, local), answer, bytes.len());
            }
            return;
        }
        let is_traced = request.flags.has(Flags::TRACE);
        if is_traced {
            peer.trace(request.nonce);
        }
        let len = if request.flags.has(Flags::FULL) {
            bytes.len()
        } else {
            HEADER_LEN
        };
        let bytes = bytes.get_mut(..len).unwrap_or_default();
        let sent = self.end.send(answer, bytes, received, local);
        if let (Err(error), true) = (sent, is_traced) {
            peer.trace_refused(request.nonce, &error);
        }
        let headers = usize::from(headers_len(local));
        let both = headers + len + headers + HEADER_LEN;
        if request.flags.has(Flags::PAST)
            && both <= total
            && self.limit.allow(&peer.subnets, kind, Instant::now())
        {
            self.end.send_past(answer, bytes, received, local);
        }
    }

    /// Has the daemon's loop answer, and sends what it says, in no more bytes than it was asked with.
    fn ask_daemon(
        &self,
        peer: Arc<Peer>,
        wish: Wish,
        (received, local): (&Received, IpAddr),
        answer: Probe,
        len: usize,
    ) {
        if matches!(wish, Wish::Report { .. }) {
            peer.want_visit();
        }
        let (sender, told) = oneshot::channel();
        let asked = Asked {
            peer,
            wish,
            answer: sender,
        };
        // A daemon that is busy with earlier ones leaves the asker to ask again.
        if self.reports.try_send(asked).is_err() {
            return;
        }
        let (end, received) = (Arc::clone(&self.end), *received);
        let mut bytes = vec![0; len];
        tokio::spawn(async move {
            if let Ok(Ok(told)) = tokio::time::timeout(PATIENCE, told).await {
                let len = told.write(&mut bytes);
                let bytes = bytes.get_mut(..len).unwrap_or_default();
                // The asker asks again.
                let _lost = end.send(answer, bytes, &received, local);
            }
        });
    }
}

/// Where answers leave.
struct End {
    socket: UdpSocket,
    mark: u32,
    /// The mark is the socket's, not the datagram's: older kernels pass over one that is said with a datagram.
    sending: Mutex<()>,
}

impl End {
    /// Sends an answer with the time it leaves; a shorter one if our own link is too small for it.
    fn send(
        &self,
        mut answer: Probe,
        bytes: &mut [u8],
        received: &Received,
        local: IpAddr,
    ) -> io::Result<()> {
        let _unmarked = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        answer.flags = answer.flags.without(Flags::PAST);
        answer.answered = wall_clock();
        answer.write(bytes);
        let mut result = socket::answer(&self.socket, bytes, received.from, local);
        let too_long = |error: &io::Error| error.raw_os_error() == Some(libc::EMSGSIZE);
        if answer.kind == Kind::Answer && result.as_ref().is_err_and(too_long) {
            answer.flags = answer.flags.with(Flags::CUT);
            answer.write(bytes);
            let short = bytes.get(..HEADER_LEN).unwrap_or_default();
            result = socket::answer(&self.socket, short, received.from, local);
        }
        if let Err(error) = &result {
            tracing::trace!(%error, to = %received.from, via = answer.via.name(), "probe answer");
        }
        result
    }

    /// Sends a short answer by the way that marked probes take.
    fn send_past(&self, mut answer: Probe, bytes: &mut [u8], received: &Received, local: IpAddr) {
        answer.flags = answer.flags.with(Flags::PAST);
        answer.answered = wall_clock();
        answer.write(bytes);
        let short = bytes.get(..HEADER_LEN).unwrap_or_default();
        let _marked = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        let socket = SockRef::from(&self.socket);
        let sent = socket
            .set_mark(self.mark)
            .and_then(|()| socket::answer(&self.socket, short, received.from, local));
        let cleared = socket.set_mark(0);
        if let Err(error) = sent.and(cleared) {
            tracing::trace!(%error, to = %received.from, "probe answer past the tunnel");
        }
    }
}

/// How many answers are left in this second. Counts of single peers are as few as answers in a second.
#[derive(Debug)]
struct Limit {
    begun: Instant,
    answers: u32,
    reports: u32,
    by_peer: HashMap<Subnets, u32>,
}

impl Limit {
    fn new(now: Instant) -> Self {
        Self {
            begun: now,
            answers: 0,
            reports: 0,
            by_peer: HashMap::new(),
        }
    }

    fn allow(&mut self, peer: &Subnets, kind: Kind, now: Instant) -> bool {
        if now.saturating_duration_since(self.begun) >= Duration::from_secs(1) {
            *self = Self::new(now);
        }
        if self.answers >= PER_SECOND {
            return false;
        }
        if kind != Kind::Answer {
            if self.reports >= REPORTS_PER_SECOND {
                return false;
            }
            self.reports += 1;
        }
        let of_peer = self.by_peer.entry(*peer).or_default();
        if *of_peer >= PER_PEER_AND_SECOND {
            return false;
        }
        *of_peer += 1;
        self.answers += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_peer_cannot_use_up_what_others_are_due() {
        let now = Instant::now();
        let mut limit = Limit::new(now);
        let subnets = |nth: u32| -> Subnets {
            let (high, low) = (nth / 256, nth % 256);
            format!("198.{}.{low}.0-24", 18 + high).parse().unwrap()
        };
        let asks = |limit: &mut Limit, peer: u32, count: u32, now| {
            let allowed = (0..count).filter(|_| limit.allow(&subnets(peer), Kind::Answer, now));
            u32::try_from(allowed.count()).unwrap()
        };
        assert_eq!(asks(&mut limit, 0, 1000, now), PER_PEER_AND_SECOND);
        assert_eq!(asks(&mut limit, 1, 10, now), 10);
        let all: u32 = (2..100).map(|peer| asks(&mut limit, peer, 400, now)).sum();
        assert_eq!(all, PER_SECOND - PER_PEER_AND_SECOND - 10);
        assert!(limit.by_peer.len() <= usize::try_from(PER_SECOND).unwrap());
        assert_eq!(asks(&mut limit, 0, 1, now + Duration::from_secs(1)), 1);
    }

    #[test]
    fn reports_are_rarer_than_answers() {
        let now = Instant::now();
        let mut limit = Limit::new(now);
        let peer = "198.18.2.0-24".parse().unwrap();
        let allowed = (0..200).filter(|_| limit.allow(&peer, Kind::Report, now));
        assert_eq!(
            allowed.count(),
            usize::try_from(REPORTS_PER_SECOND).unwrap()
        );
        assert!(limit.allow(&peer, Kind::Answer, now));
    }
}
