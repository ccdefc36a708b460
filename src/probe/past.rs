//! Owns proving to which peers there is a way past the tunnel: marked probes as long as any packet of the overlay may
//! be, from address to address of the overlay, again and again. Never decides who is to be proven, and never changes
//! a route.
//!
//! The answer says by which link a probe came in there, so it may itself come back by any way: each end proves the way
//! that it sends by.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep_until;

use super::proof::{Proof, Step};
use super::socket::{self, Received};
use super::{Directory, Path, headers_len, random, wall_clock};
use crate::wire::probe::{Flags, HEADER_LEN, Kind, Probe, Via};

/// The due probes are sent at most this often, and at most so many at a time: 800 a second, however many peers there
/// are. Where that is too little for [`EVERY`](super::proof::EVERY), a failed way is noticed later.
const TICK: Duration = Duration::from_millis(10);
const AT_A_TIME: usize = 8;

/// A socket that could not be had is tried again after this long.
const AGAIN: Duration = Duration::from_secs(1);

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
            ways: BTreeMap::new(),
            on_the_way: HashMap::new(),
            found: sender,
            stale: false,
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
    ways: BTreeMap<IpNet, (Target, Proof)>,
    /// By the probe's number.
    on_the_way: HashMap<u32, IpNet>,
    found: watch::Sender<Arc<Found>>,
    /// Something else may be found now.
    stale: bool,
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
        loop {
            let due = self.ways.values().map(|(_, proof)| proof.at()).min();
            let due = due.map(|at| at.max(Instant::now() + TICK));
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
                () = at(due) => {}
            }
            let same = ends
                .iter()
                .map(|end| end.local)
                .eq(self.wanted.local.iter().copied());
            if !same {
                let local = self.wanted.local.iter();
                ends = local.map(|&local| End::open(local, self.mark)).collect();
            }
            for end in &mut ends {
                if matches!(&end.socket, Err((_, again)) if *again <= Instant::now()) {
                    *end = End::open(end.local, self.mark);
                }
            }
            self.tick(&ends);
            self.tell();
        }
    }

    /// Takes over who is to be proven.
    fn take(&mut self, wanted: Wanted, now: Instant) {
        let hurry = wanted.change != self.wanted.change;
        let anew = wanted.local != self.wanted.local || wanted.len != self.wanted.len;
        let mut ways = BTreeMap::new();
        for target in &wanted.targets {
            let known = self.ways.remove(&target.net);
            let mut proof = match known {
                Some((before, proof)) if before == *target && !anew => proof,
                Some(_) | None => Proof::new(now),
            };
            if hurry {
                proof.hurry(now);
            }
            ways.insert(target.net, (*target, proof));
        }
        self.ways = ways;
        self.wanted = wanted;
        self.stale = true;
        self.on_the_way.retain(|_, net| self.ways.contains_key(net));
    }

    /// Sends what is due.
    fn tick(&mut self, ends: &[End]) {
        let now = Instant::now();
        let mut sent = 0;
        let nets: Vec<IpNet> = self
            .ways
            .iter()
            .filter(|(_, (_, proof))| proof.at() <= now)
            .map(|(net, _)| *net)
            .collect();
        for net in nets {
            if sent >= AT_A_TIME {
                break;
            }
            let mut step = Step::Wait;
            let Some(target) = self.touch(&net, |proof| step = proof.step(now)) else {
                continue;
            };
            // What was on the way before is lost.
            self.on_the_way.retain(|_, other| *other != net);
            if step == Step::Wait {
                continue;
            }
            sent += 1;
            match self.send(&target, ends) {
                Ok(sequence) => {
                    self.on_the_way.insert(sequence, net);
                }
                Err(why) => self.lose(&net, &why),
            }
        }
    }

    fn send(&self, target: &Target, ends: &[End]) -> Result<u32, String> {
        let to = SocketAddr::new(target.net.network(), target.port);
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
        probe.left = wall_clock();
        probe.flags = Flags::PROVING;
        let payload = self.wanted.len.saturating_sub(headers_len(to.ip()));
        let mut bytes = vec![0; usize::from(payload).max(HEADER_LEN)];
        probe.write(&mut bytes);
        match socket.try_send_to(&bytes, to) {
            Ok(_) => Ok(sequence),
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
        let Some(net) = self.on_the_way.get(&said.sequence).copied() else {
            return;
        };
        if received.from.ip() != net.network() {
            return;
        }
        self.on_the_way.remove(&said.sequence);
        let now = Instant::now();
        let tunnelled = match said.via {
            Via::Tunnel | Via::KernelVxlan => Some("through the tunnel"),
            Via::Unknown => Some("by a link that it does not tell"),
            Via::Underlay | Via::Other => None,
        };
        match tunnelled {
            Some(how) => self.lose(&net, &format!("the probe arrived {how}")),
            None if said.seen_len < self.wanted.len => {
                let (seen, sent) = (said.seen_len, self.wanted.len);
                self.lose(&net, &format!("of {sent} bytes, {seen} arrived"));
            }
            None => {
                self.touch(&net, |proof| proof.arrived(now));
            }
        }
    }

    fn lose(&mut self, net: &IpNet, why: &str) {
        self.touch(net, |proof| proof.lost(Instant::now(), why));
    }

    /// Changes what is known of a way, and notes whether something else is found thereby.
    fn touch(&mut self, net: &IpNet, change: impl FnOnce(&mut Proof)) -> Option<Target> {
        let (target, proof) = self.ways.get_mut(net)?;
        let before = (proof.holds(), proof.why_not().map(str::to_owned));
        change(proof);
        self.stale |= before.0 != proof.holds() || before.1.as_deref() != proof.why_not();
        Some(*target)
    }

    /// Says what is found, if it differs from what was.
    fn tell(&mut self) {
        if !std::mem::take(&mut self.stale) {
            return;
        }
        let mut found = Found::default();
        for (net, (_, proof)) in &self.ways {
            if proof.holds() {
                found.proven.insert(*net);
            } else if let Some(why) = proof.why_not() {
                let len = self.wanted.len;
                let why = match why {
                    "no answer" => format!("probes of {len} bytes past the tunnel have no answer"),
                    other => other.to_owned(),
                };
                found.why_not.insert(*net, why);
            }
        }
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
