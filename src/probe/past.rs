//! Owns proving to which peers there is a way past the tunnel: marked probes as long as any packet of the overlay may
//! be, from address to address of the overlay, again and again. Never decides who is to be proven, and never changes
//! a route.
//!
//! The answer says by which link a probe came in there, so it may itself come back by any way, and is asked to come by
//! both: each end proves the way that it sends by, and neither depends on the other's.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep_until;

use super::rounds::{Answer, Due, Rounds, TICK};
use super::socket::{self, Received};
use super::{Directory, Path, random, wall_clock};
use crate::wire::probe::{Flags, Kind, Probe};

/// A socket that could not be had is tried again after this long.
const AGAIN: Duration = Duration::from_secs(1);

/// What is found is told no more often, since it is told as a whole.
const TELL_EVERY: Duration = Duration::from_millis(20);

/// A peer to be proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Its subnet, by whose first address it is probed.
    pub net: IpNet,
    /// The port it answers on.
    pub port: u16,
    /// Where its node is: another place is another way.
    pub public: IpAddr,
    /// The link that leads there.
    pub link: u32,
}

/// What is to be proven, and from where.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wanted {
    /// The peers.
    pub targets: Vec<Target>,
    /// Our own addresses in the overlay, of each family.
    pub local: Vec<IpAddr>,
    /// Bytes of the longest IP packet of the overlay.
    pub len: u16,
    /// Rises when something about the links has changed.
    pub change: u64,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Found {
    /// Bytes of the longest packet, with which it was proven.
    pub len: u16,
    /// The subnets that the way past the tunnel is proven to.
    pub proven: HashSet<IpNet>,
    /// Why it is not to others.
    pub why_not: HashMap<IpNet, String>,
}

/// Somebody who proves. Dropping it ends that.
#[derive(Debug)]
pub struct Past {
    wanted: watch::Sender<Wanted>,
    found: watch::Receiver<Arc<Found>>,
    task: JoinHandle<()>,
}

impl Past {
    /// Starts, in a task of the current runtime. Probes carry `mark`.
    #[must_use]
    pub fn start(directory: &Arc<Directory>, mark: u32) -> Self {
        let (wanted, receiver) = watch::channel(Wanted::default());
        let (sender, found) = watch::channel(Arc::default());
        let proving = Proving {
            directory: Arc::clone(directory),
            mark,
            nonce: random(),
            wanted: Wanted::default(),
            rounds: Rounds::default(),
            found: sender,
        };
        Self {
            wanted,
            found,
            task: tokio::spawn(proving.run(receiver)),
        }
    }

    /// Says who is to be proven from now on.
    pub fn want(&self, wanted: Wanted) {
        self.wanted.send_if_modified(|before| {
            let differs = *before != wanted;
            *before = wanted;
            differs
        });
    }

    /// What is found until now.
    #[must_use]
    pub fn found(&self) -> Arc<Found> {
        Arc::clone(&self.found.borrow())
    }

    /// Waits until something else is found.
    pub async fn changed(&mut self) {
        if self.found.changed().await.is_err() {
            // The task has ended with the runtime.
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Past {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Proving {
    directory: Arc<Directory>,
    mark: u32,
    nonce: u64,
    wanted: Wanted,
    rounds: Rounds,
    found: watch::Sender<Arc<Found>>,
}

/// A socket of one family, bound to our address in the overlay.
struct End {
    local: IpAddr,
    socket: Result<UdpSocket, (io::Error, Instant)>,
}

impl End {
    fn open(local: IpAddr, mark: u32) -> Self {
        let path = Path {
            local: Some(local),
            device: None,
            mark: Some(mark),
            unchecked: false,
        };
        let opened = socket::open(&path, local, 0);
        Self {
            local,
            socket: opened.map_err(|error| (error, Instant::now() + AGAIN)),
        }
    }
}

impl Proving {
    async fn run(mut self, mut wanted: watch::Receiver<Wanted>) {
        let mut ends: Vec<End> = Vec::new();
        let mut buffers = [vec![0; 1 << 11], vec![0; 1 << 11]];
        let (mut next_tick, mut next_tale) = (Instant::now(), Instant::now());
        loop {
            let due = self.rounds.at().map(|at| at.max(next_tick));
            let tale = self.rounds.is_stale().then_some(next_tale);
            let [first, second] = &mut buffers;
            let (one, other) = (socket_of(&ends, 0), socket_of(&ends, 1));
            tokio::select! {
                changed = wanted.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now_wanted = wanted.borrow_and_update().clone();
                    self.take(now_wanted, Instant::now());
                }
                received = receive(one, first) => self.hear(received, first),
                received = receive(other, second) => self.hear(received, second),
                () = at(due) => {
                    next_tick = Instant::now() + TICK;
                    self.open(&mut ends);
                    self.tick(&ends);
                }
                () = at(tale) => {
                    next_tale = Instant::now() + TELL_EVERY;
                    self.tell();
                }
            }
        }
    }

    /// Takes over who is to be proven.
    fn take(&mut self, wanted: Wanted, now: Instant) {
        let hurry = wanted.change != self.wanted.change;
        let anew = wanted.local != self.wanted.local || wanted.len != self.wanted.len;
        let rounds = &mut self.rounds;
        rounds.take(&wanted.targets, wanted.len, anew, hurry, now);
        self.wanted = wanted;
    }

    /// Has a socket at each of our addresses.
    fn open(&self, ends: &mut Vec<End>) {
        let local = self.wanted.local.iter();
        if !ends.iter().map(|end| &end.local).eq(local.clone()) {
            *ends = local.map(|&local| End::open(local, self.mark)).collect();
        }
        for end in ends {
            if matches!(&end.socket, Err((_, again)) if *again <= Instant::now()) {
                *end = End::open(end.local, self.mark);
            }
        }
    }

    /// Sends what is due.
    fn tick(&mut self, ends: &[End]) {
        for due in self.rounds.due(Instant::now()) {
            match self.send(&due, ends) {
                Ok(sequence) => self.rounds.sent(&due, sequence),
                Err(why) => self.rounds.unsent(&due, &why, Instant::now()),
            }
        }
    }

    fn send(&self, due: &Due, ends: &[End]) -> Result<u32, String> {
        let to = SocketAddr::new(due.target.net.network(), due.target.port);
        let mut of_family = ends
            .iter()
            .filter(|end| end.local.is_ipv4() == to.is_ipv4());
        let end = of_family
            .next()
            .ok_or("this node has no address of that family")?;
        let socket = match &end.socket {
            Ok(socket) => socket,
            Err((error, _)) => return Err(format!("no socket at {}: {error}", end.local)),
        };
        let sequence = self.directory.next_sequence();
        let mut probe = Probe::request(
            Kind::Request,
            sequence,
            self.nonce,
            self.directory.identity(),
        );
        probe.flags = if due.past {
            Flags::PROVING.with(Flags::PAST)
        } else {
            Flags::PROVING
        };
        probe.left = wall_clock();
        let mut bytes = vec![0; due.payload];
        probe.write(&mut bytes);
        match socket.try_send_to(&bytes, to) {
            Ok(_) => Ok(sequence),
            // A queue that is full for the moment: a lost probe, which says nothing about the way yet.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(sequence),
            Err(error) => Err(format!("it cannot be sent: {error}")),
        }
    }

    /// Takes an answer.
    fn hear(&mut self, received: io::Result<Received>, buffer: &[u8]) {
        let Ok(received) = received else { return };
        let bytes = buffer.get(..received.len).unwrap_or_default();
        let Ok(said) = Probe::parse(bytes) else {
            return;
        };
        if said.kind != Kind::Answer || said.nonce != self.nonce {
            return;
        }
        let answer = Answer {
            sequence: said.sequence,
            from: received.from.ip(),
            via: said.via,
            seen_len: said.seen_len,
            past: said.flags.has(Flags::PAST),
        };
        self.rounds.answered(&answer, Instant::now());
    }

    /// Says what is found, if it differs from what was.
    fn tell(&mut self) {
        let Some(found) = self.rounds.news() else {
            return;
        };
        self.found.send_if_modified(|before| {
            let differs = **before != found;
            if differs {
                *before = Arc::new(found);
            }
            differs
        });
    }
}

fn socket_of(ends: &[End], nth: usize) -> Option<&UdpSocket> {
    ends.get(nth).and_then(|end| end.socket.as_ref().ok())
}

async fn receive(socket: Option<&UdpSocket>, buffer: &mut [u8]) -> io::Result<Received> {
    match socket {
        Some(socket) => socket::receive(socket, buffer).await,
        None => std::future::pending().await,
    }
}

async fn at(due: Option<Instant>) {
    match due {
        Some(at) => sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
