//! Owns asking one other: rounds of probes, the search for the usable size. Never asks more often than it
//! is told to, and never decides what the answers mean.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::UdpSocket;
use tokio::time::sleep_until;

use super::directory::{Directory, Peer, Word};
use super::echo::{self, Echo};
use super::figures::{Figures, Reply, Said};
use super::socket;
use super::{Path, headers_len, random, wall_clock};
use crate::wire::probe::{Flags, HEADER_LEN, Kind, Probe, Via};

/// How probes follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// How many.
    pub count: u16,
    /// The time between two.
    pub every: Duration,
    /// How long to wait for answers after the last one.
    pub patience: Duration,
    /// Bytes of the IP packet; at least what a probe has.
    pub len: u16,
    /// Answers shall be as long.
    pub full: bool,
    /// They are part of a trace.
    pub trace: bool,
}

impl Default for Round {
    /// Ten short ones in two tenths of a second.
    fn default() -> Self {
        Self {
            count: 10,
            every: Duration::from_millis(20),
            patience: Duration::from_millis(500),
            len: 0,
            full: false,
            trace: false,
        }
    }
}

#[derive(Debug)]
pub(super) enum Carrier {
    Probes(UdpSocket),
    Echoes(Echo),
}

/// Asks one other, by one way.
#[derive(Debug)]
pub struct Prober {
    pub(super) carrier: Carrier,
    pub(super) directory: Arc<Directory>,
    peer: Option<Arc<Peer>>,
    to: IpAddr,
    overlay: bool,
    nonce: u64,
    echo_sequence: u16,
    buffer: Vec<u8>,
}

/// What was sent, and what came back.
#[derive(Debug, Default)]
pub(super) struct Exchange {
    sent: Vec<Duration>,
    pub(super) replies: Vec<Reply>,
    /// The last error, from sending or by ICMP.
    refused: Option<io::Error>,
    /// Packets were too long, and somebody said so.
    pub(super) told: bool,
    /// An answer was shorter than asked for, because of the other's own link.
    pub(super) cut: bool,
}

/// One request that is to be sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sending {
    pub(super) len: u16,
    pub(super) flags: Flags,
}

impl Prober {
    /// One that sends probes to `port` of `to`, which nodes without this program do not answer.
    ///
    /// # Errors
    ///
    /// The path cannot be taken: no such device, no such address of ours, no route.
    pub async fn probes(
        directory: &Arc<Directory>,
        path: &Path,
        to: SocketAddr,
    ) -> io::Result<Self> {
        let socket = socket::open(path, to.ip(), 0)?;
        socket.connect(to).await?;
        Ok(Self::new(directory, Carrier::Probes(socket), to.ip()))
    }

    /// One that sends ICMP echo requests, which all nodes answer.
    ///
    /// # Errors
    ///
    /// Likewise; or neither `CAP_NET_RAW` nor `net.ipv4.ping_group_range` allows it.
    pub fn echoes(directory: &Arc<Directory>, path: &Path, to: IpAddr) -> io::Result<Self> {
        let echo = Echo::open(path, to, random())?;
        Ok(Self::new(directory, Carrier::Echoes(echo), to))
    }

    fn new(directory: &Arc<Directory>, carrier: Carrier, to: IpAddr) -> Self {
        let peer = directory.peer_at(to);
        let overlay = peer
            .as_ref()
            .is_some_and(|peer| peer.overlay_addrs().any(|addr| addr == to));
        Self {
            carrier,
            directory: Arc::clone(directory),
            peer,
            to,
            overlay,
            nonce: random(),
            echo_sequence: 0,
            buffer: vec![0; 1 << 16],
        }
    }

    /// What its requests and the answers to them have, and no other's.
    #[must_use]
    pub const fn nonce(&self) -> u64 {
        self.nonce
    }

    /// Bytes of the shortest IP packet that this prober sends.
    #[must_use]
    pub const fn least_len(&self) -> u16 {
        let payload = match self.carrier {
            Carrier::Probes(_) => HEADER_LEN,
            // Where a probe has its UDP header, an echo has its own.
            Carrier::Echoes(_) => echo::MIN_LEN - 8,
        };
        #[expect(clippy::cast_possible_truncation, reason = "88 at most")]
        let payload = payload as u16;
        headers_len(self.to) + payload
    }

    /// Sends a round of probes and waits for the answers, no longer than it says.
    pub async fn round(&mut self, round: Round) -> Figures {
        let mut flags = Flags::default();
        if round.full {
            flags = flags.with(Flags::FULL);
        }
        if round.trace {
            flags = flags.with(Flags::TRACE);
        }
        let sending = Sending {
            len: round.len,
            flags,
        };
        let plan = vec![sending; round.count.into()];
        let exchange = self.exchange(&plan, round.every, round.patience).await;
        let mut figures = Figures::of(&exchange.sent, &exchange.replies);
        figures.errno = exchange.refused.as_ref().and_then(io::Error::raw_os_error);
        figures.refused = exchange.refused.map(|error| error.to_string());
        figures
    }

    pub(super) fn request(&self, kind: Kind, sequence: u32) -> Probe {
        let mut probe = Probe::request(kind, sequence, self.nonce, self.directory.identity());
        probe.heard = self.peer.as_ref().and_then(|peer| peer.last_heard());
        probe
    }

    /// Remembers what an answer says.
    pub(super) fn hear(&self, said: Probe, via: Via) {
        if let Some(peer) = &self.peer {
            peer.hear(Word {
                sequence: None,
                via,
                overlay: self.overlay,
                claimed: said.heard,
                sender: said.sender,
            });
        }
    }

    pub(super) async fn exchange(
        &mut self,
        plan: &[Sending],
        every: Duration,
        patience: Duration,
    ) -> Exchange {
        let begun = Instant::now();
        let mut exchange = Exchange::default();
        let mut numbers = HashMap::with_capacity(plan.len());
        let mut next_at = begun;
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut todo = plan.iter();
        loop {
            let left = todo.len();
            let done = left == 0
                && (exchange.answered() >= plan.len()
                    || exchange.replies.is_empty() && exchange.refused.is_some());
            if done {
                break;
            }
            let wake_at = if left == 0 {
                next_at - every + patience
            } else {
                next_at
            };
            tokio::select! {
                biased;
                received = self.receive(&mut buffer, &numbers) => match received {
                    Ok(Some(mut reply)) => {
                        reply.0.at = begun.elapsed();
                        exchange.cut |= reply.1;
                        exchange.replies.push(reply.0);
                    }
                    Ok(None) => {}
                    Err(error) => exchange.note(error),
                },
                () = sleep_until(wake_at.into()) => {
                    let Some(&sending) = todo.next() else { break };
                    exchange.sent.push(begun.elapsed());
                    let nth = exchange.sent.len() - 1;
                    if let Err(error) = self.send(sending, nth, &mut numbers, &mut buffer) {
                        exchange.note(error);
                    }
                    next_at += every;
                }
            }
        }
        self.buffer = buffer;
        exchange
    }

    fn send(
        &mut self,
        sending: Sending,
        nth: usize,
        numbers: &mut HashMap<u32, usize>,
        buffer: &mut [u8],
    ) -> io::Result<()> {
        let len = sending.len.max(self.least_len());
        // The UDP header is of no concern to the payload's length, and an echo's is part of its message.
        let payload = usize::from(len - headers_len(self.to));
        match &self.carrier {
            Carrier::Probes(socket) => {
                let sequence = self.directory.next_sequence();
                numbers.insert(sequence, nth);
                let bytes = buffer.get_mut(..payload).unwrap_or_default();
                bytes.fill(0);
                let mut probe = self.request(Kind::Request, sequence);
                probe.flags = sending.flags;
                probe.left = wall_clock();
                probe.write(bytes);
                socket.try_send(bytes).map(drop)
            }
            Carrier::Echoes(echo) => {
                self.echo_sequence = self.echo_sequence.wrapping_add(1);
                numbers.insert(self.echo_sequence.into(), nth);
                let bytes = buffer.get_mut(..payload + 8).unwrap_or_default();
                bytes.fill(0);
                echo.send(self.echo_sequence, bytes)
            }
        }
    }

    /// The next answer to one of these requests, and whether it was cut; none of a datagram that is none.
    async fn receive(
        &self,
        buffer: &mut [u8],
        numbers: &HashMap<u32, usize>,
    ) -> io::Result<Option<(Reply, bool)>> {
        match &self.carrier {
            Carrier::Probes(socket) => {
                let received = socket::receive(socket, buffer).await?;
                let bytes = buffer.get(..received.len).unwrap_or_default();
                let Ok(said) = Probe::parse(bytes) else {
                    return Ok(None);
                };
                let ours = said.kind == Kind::Answer && said.nonce == self.nonce;
                let Some(&nth) = numbers.get(&said.sequence).filter(|_| ours) else {
                    return Ok(None);
                };
                let via = self.directory.via(received.link);
                self.hear(said, via);
                let len = usize::from(headers_len(self.to)) + received.len;
                let reply = Reply {
                    nth,
                    at: Duration::ZERO,
                    len: u16::try_from(len).unwrap_or(u16::MAX),
                    ttl: received.ttl,
                    via,
                    said: Some(Said {
                        len: said.seen_len,
                        ttl: said.seen_ttl,
                        via: said.via,
                        left: said.left,
                        arrived: said.arrived,
                        answered: said.answered,
                        heard: said.heard,
                        sender: said.sender,
                    }),
                };
                Ok(Some((reply, said.flags.has(Flags::CUT))))
            }
            Carrier::Echoes(echo) => {
                let echoed = echo.receive(buffer).await?;
                let nth = numbers.get(&echoed.sequence.into());
                Ok(nth.map(|&nth| {
                    let reply = Reply {
                        nth,
                        at: Duration::ZERO,
                        len: echoed.len,
                        ttl: echoed.ttl,
                        via: Via::Unknown,
                        said: None,
                    };
                    (reply, false)
                }))
            }
        }
    }
}

impl Exchange {
    /// Requests that were answered, at least so many; duplicates are rare.
    const fn answered(&self) -> usize {
        self.replies.len()
    }

    fn note(&mut self, error: io::Error) {
        self.told |= error.raw_os_error() == Some(libc::EMSGSIZE);
        self.refused = Some(error);
    }
}
