//! Owns who the peers are, as far as probes are concerned: which addresses are whose, and what was heard of whom.
//! Never sends anything.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use arc_swap::{ArcSwap, ArcSwapOption};
use ipnet::IpNet;

use super::Path;
use super::history::{History, State, Visit};
use crate::lease::{Lease, LeaseExtension, Subnets};
use crate::wire::probe::{Heard, Identity, Via};

/// What a node's links are to the overlay, by the kernel's numbers for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ways {
    /// Devices of our own data plane.
    pub tunnel: Vec<u32>,
    /// Tunnel devices of the kernel's.
    pub kernel_tunnel: Vec<u32>,
    /// External interfaces.
    pub underlay: Vec<u32>,
    /// Subnets of peers that packets are sent to past the tunnel.
    pub past: HashSet<IpNet>,
}

impl Ways {
    /// What a datagram that came in by a link came in by.
    #[must_use]
    pub fn via(&self, link: u32) -> Via {
        let links = [
            (&self.tunnel, Via::Tunnel),
            (&self.kernel_tunnel, Via::KernelTunnel),
            (&self.underlay, Via::Underlay),
        ];
        let way = links.iter().find(|(links, _)| links.contains(&link));
        match way {
            Some(&(_, via)) => via,
            None if link == 0 => Via::Unknown,
            None => Via::Other,
        }
    }
}

/// A peer, from its lease.
#[derive(Debug)]
pub struct Peer {
    /// What it has leased.
    pub subnets: Subnets,
    /// Its addresses on the underlay.
    pub public: Vec<IpAddr>,
    /// When its lease was first seen.
    appeared: Instant,
    /// Its lease has what only this program publishes.
    published: bool,
    memory: Mutex<Memory>,
    visits: Mutex<(History, u64)>,
    /// It is to be visited before its turn.
    wanted: AtomicBool,
}

/// What was heard of a peer.
#[derive(Debug, Clone, Copy, Default)]
pub struct Memory {
    /// When it was last heard through the overlay, and what that came in by.
    pub heard: Option<(Instant, Via)>,
    /// The number of its last request that was.
    pub sequence: u32,
    /// What it last said to have heard of us, and when it said so.
    pub claimed: Option<(Option<Heard>, Instant)>,
    /// Who answered or asked last under its address.
    pub sender: Option<Identity>,
    /// Its last trace.
    pub traced: Option<Traced>,
}

/// What came of a trace of a peer's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traced {
    /// What its probes have in common.
    pub nonce: u64,
    /// How many came.
    pub taken: u16,
    /// Why the last answer that could not be sent was not (errno).
    pub refused: Option<i32>,
}

/// What one datagram of a peer says.
#[derive(Clone, Copy, Debug)]
pub struct Word {
    /// Its number, if it is a request.
    pub sequence: Option<u32>,
    /// What it came in by.
    pub via: Via,
    /// It was sent to an address of the overlay, or from one, by the way of all other packets.
    pub overlay: bool,
    /// What the peer last heard of us.
    pub claimed: Option<Heard>,
    /// Who it says to be.
    pub sender: Identity,
}

impl Peer {
    fn of(lease: &Lease) -> Self {
        let v4 = lease.attrs.public_ip.map(IpAddr::V4);
        let v6 = lease.attrs.public_ipv6.map(IpAddr::V6);
        Self {
            subnets: lease.subnets,
            public: v4.into_iter().chain(v6).collect(),
            appeared: Instant::now(),
            published: lease.extension != LeaseExtension::default(),
            memory: Mutex::default(),
            visits: Mutex::default(),
            wanted: AtomicBool::new(false),
        }
    }

    /// What was heard of it until now.
    #[must_use]
    pub fn memory(&self) -> Memory {
        *self.lock()
    }

    /// Remembers what a datagram of its says.
    pub fn hear(&self, word: Word) {
        let now = Instant::now();
        let mut memory = self.lock();
        // What comes past the overlay says nothing about it, but may well tell what was heard through it.
        if word.overlay {
            memory.heard = Some((now, word.via));
            memory.sequence = word.sequence.unwrap_or(memory.sequence);
        }
        memory.claimed = Some((word.claimed, now));
        memory.sender = Some(word.sender);
    }

    /// Counts a probe of a trace.
    pub(super) fn trace(&self, nonce: u64) {
        let mut memory = self.lock();
        let before = memory.traced.filter(|traced| traced.nonce == nonce);
        memory.traced = Some(Traced {
            nonce,
            taken: before.map_or(0, |before| before.taken).saturating_add(1),
            refused: before.and_then(|before| before.refused),
        });
    }

    /// Remembers why a probe of a trace is not answered.
    pub(super) fn trace_refused(&self, nonce: u64, error: &io::Error) {
        let mut memory = self.lock();
        if let Some(traced) = memory
            .traced
            .as_mut()
            .filter(|traced| traced.nonce == nonce)
        {
            traced.refused = error.raw_os_error();
        }
    }

    /// What came of a trace of its.
    #[must_use]
    pub fn traced(&self, nonce: u64) -> Option<Traced> {
        let traced = self.memory().traced;
        traced.filter(|traced| traced.nonce == nonce)
    }

    /// When it was last heard through the overlay, as a probe says it.
    #[must_use]
    pub fn last_heard(&self) -> Option<Heard> {
        let memory = self.memory();
        memory.heard.map(|(at, _)| Heard {
            sequence: memory.sequence,
            age: at.elapsed(),
        })
    }

    /// It has shown to run this program, at some time.
    #[must_use]
    pub fn runs_it(&self) -> bool {
        self.published || self.memory().sender.is_some()
    }

    /// What the visits of the background prober say.
    #[must_use]
    pub fn history(&self) -> History {
        self.visits().0
    }

    /// Has the background prober visit it soon: somebody examines the path, and wants to know whether we are heard.
    pub(super) fn want_visit(&self) {
        self.wanted.store(true, Ordering::Relaxed);
    }

    /// Whether it is to be visited before its turn.
    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    /// What the visits say, and the number of the one that is about to begin, from 1 on.
    pub(super) fn next_visit(&self) -> (History, u64) {
        self.wanted.store(false, Ordering::Relaxed);
        let mut visits = self.visits();
        visits.1 += 1;
        *visits
    }

    /// Takes a visit in: the state before and after it, and the loss in percent.
    pub(super) fn note(&self, visit: Visit, now: Instant) -> (State, State, u8) {
        let history = &mut self.visits().0;
        let before = history.state();
        history.note(visit, now);
        (before, history.state(), history.loss_percent())
    }

    fn visits(&self) -> MutexGuard<'_, (History, u64)> {
        self.visits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A poisoned memory is still one.
    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it can be probed in the overlay, likeliest first: the first address of a subnet, which tunnel devices
    /// have, then the second, which the pods' bridge has.
    pub fn overlay_addrs(&self) -> impl Iterator<Item = IpAddr> + use<> {
        overlay_addrs(&self.subnets)
    }
}

/// Where the owner of these subnets may be found in the overlay.
pub fn overlay_addrs(subnets: &Subnets) -> impl Iterator<Item = IpAddr> + use<> {
    let nets = subnets.v4().map(IpNet::V4).into_iter();
    let nets = nets.chain(subnets.v6().map(IpNet::V6));
    nets.flat_map(|net| [net.network(), following(net.network())])
}

fn following(addr: IpAddr) -> IpAddr {
    match addr {
        IpAddr::V4(addr) => IpAddr::V4(addr.to_bits().saturating_add(1).into()),
        IpAddr::V6(addr) => IpAddr::V6(addr.to_bits().saturating_add(1).into()),
    }
}

#[derive(Debug, Default)]
struct Table {
    by_addr: HashMap<IpAddr, Arc<Peer>>,
    peers: Vec<Arc<Peer>>,
}

/// Everybody's peers, shared by those who ask and those who answer.
#[derive(Debug)]
pub struct Directory {
    identity: ArcSwap<Identity>,
    /// When we got our lease.
    leased: ArcSwapOption<Instant>,
    table: ArcSwap<Table>,
    ways: ArcSwap<Ways>,
    /// Bytes of the longest packet of the overlay; 0 while that is not known.
    mtu: AtomicU16,
    sequence: AtomicU32,
}

impl Directory {
    /// One without peers. `node` tells this run of the daemon from others.
    #[must_use]
    pub fn new(node: u64) -> Self {
        Self {
            identity: ArcSwap::from_pointee(Identity {
                node,
                ..Identity::default()
            }),
            leased: ArcSwapOption::empty(),
            table: ArcSwap::default(),
            ways: ArcSwap::default(),
            mtu: AtomicU16::new(0),
            sequence: AtomicU32::new(1),
        }
    }

    /// Takes over our own lease.
    pub fn lease(&self, own: &Subnets) {
        let node = self.identity().node;
        self.leased.store(Some(Arc::new(Instant::now())));
        self.identity.store(Arc::new(Identity {
            node,
            v4: own.v4(),
            v6: own.v6(),
        }));
    }

    /// Takes over the leases of all peers; what was heard of those who stay is kept.
    pub fn update<'a>(&self, leases: impl Iterator<Item = &'a Lease>) {
        let before = self.table.load();
        let known: HashMap<&Subnets, &Arc<Peer>> = before
            .peers
            .iter()
            .map(|peer| (&peer.subnets, peer))
            .collect();
        let mut table = Table::default();
        for lease in leases {
            let peer = Peer::of(lease);
            let peer = match known.get(&lease.subnets) {
                Some(&same) if same.public == peer.public => Arc::clone(same),
                _ => Arc::new(peer),
            };
            // An address of the underlay is never taken for one of the overlay.
            for &addr in &peer.public {
                table
                    .by_addr
                    .entry(addr)
                    .or_insert_with(|| Arc::clone(&peer));
            }
            for addr in peer.overlay_addrs() {
                table.by_addr.insert(addr, Arc::clone(&peer));
            }
            table.peers.push(peer);
        }
        self.table.store(Arc::new(table));
    }

    /// Takes over what the links are, and the overlay's MTU in bytes.
    pub fn set_ways(&self, ways: Ways, mtu: u16) {
        self.ways.store(Arc::new(ways));
        self.mtu.store(mtu, Ordering::Relaxed);
    }

    /// The overlay's MTU in bytes, once it is known.
    #[must_use]
    pub fn mtu(&self) -> Option<u16> {
        let mtu = self.mtu.load(Ordering::Relaxed);
        (mtu > 0).then_some(mtu)
    }

    /// Where a peer is asked, likeliest first: in one family, at the address that tunnel devices have; where routes
    /// carry the packets, at that of the pods' bridge, and past the overlay if there is no pod yet.
    #[must_use]
    pub fn targets(&self, peer: &Peer) -> Vec<IpAddr> {
        let ways = self.ways.load();
        let has_device = !ways.tunnel.is_empty() || !ways.kernel_tunnel.is_empty();
        let mut overlay = peer.overlay_addrs();
        let (device, bridge) = (overlay.next(), overlay.next());
        if has_device {
            return device.into_iter().collect();
        }
        bridge
            .into_iter()
            .chain(peer.public.first().copied())
            .collect()
    }

    /// The way of a pod's packet to an address: what goes through the overlay comes from our own address there, so that
    /// the answer comes back as one to a pod does.
    #[must_use]
    pub fn path_to(&self, addr: IpAddr) -> Path {
        let ways = self.ways.load();
        let has_device = !ways.tunnel.is_empty() || !ways.kernel_tunnel.is_empty();
        let peer = self.peer_at(addr);
        let is_overlay = peer.is_some_and(|peer| peer.overlay_addrs().any(|one| one == addr));
        let own = self.identity();
        let local = match addr {
            IpAddr::V4(_) => own.v4.map(|net| IpAddr::V4(net.network())),
            IpAddr::V6(_) => own.v6.map(|net| IpAddr::V6(net.network())),
        };
        Path {
            // Where routes carry the packets, no device has it.
            local: local.filter(|_| has_device && is_overlay),
            ..Path::default()
        }
    }

    /// Likewise where routes carry the packets, from the address that the pods' bridge has as soon as there is one; none
    /// where [`path_to`](Self::path_to) has an address already.
    #[must_use]
    pub fn path_from_bridge(&self, addr: IpAddr) -> Option<Path> {
        let path = self.path_to(addr);
        let peer = self.peer_at(addr)?;
        let is_overlay = peer.overlay_addrs().any(|one| one == addr);
        let own = self.identity();
        let net = match addr {
            IpAddr::V4(_) => own.v4.map(|net| IpAddr::V4(net.network())),
            IpAddr::V6(_) => own.v6.map(|net| IpAddr::V6(net.network())),
        };
        let local = net.filter(|_| is_overlay && path.local.is_none())?;
        Some(Path {
            local: Some(following(local)),
            ..path
        })
    }

    /// The peer that has an address of its own, not one of its pods.
    #[must_use]
    pub fn peer_at(&self, addr: IpAddr) -> Option<Arc<Peer>> {
        self.table.load().by_addr.get(&addr).cloned()
    }

    /// All peers, in the order of their subnets.
    #[must_use]
    pub fn peers(&self) -> Vec<Arc<Peer>> {
        self.table.load().peers.clone()
    }

    /// The peer that has leased these subnets.
    #[must_use]
    pub fn peer_of(&self, subnets: &Subnets) -> Option<Arc<Peer>> {
        let table = self.table.load();
        let mut peers = table.peers.iter();
        peers.find(|peer| peer.subnets == *subnets).cloned()
    }

    /// Since when a peer and we have both had our leases, as far as that was seen from here.
    pub(super) fn together_since(&self, peer: &Peer) -> Instant {
        let leased = self.leased.load();
        let leased = leased.as_deref().copied();
        leased.map_or(peer.appeared, |leased| leased.max(peer.appeared))
    }

    /// What we say about ourselves.
    #[must_use]
    pub fn identity(&self) -> Identity {
        **self.identity.load()
    }

    /// What a datagram that came in by a link came in by.
    #[must_use]
    pub fn via(&self, link: u32) -> Via {
        self.ways.load().via(link)
    }

    /// What our packets to a peer are to come in by there, as a node that does likewise would say.
    #[must_use]
    pub fn sends_by(&self, peer: &Peer) -> Via {
        let ways = self.ways.load();
        let net = peer.subnets.v4().map(IpNet::V4);
        let net = net.or(peer.subnets.v6().map(IpNet::V6));
        if net.is_some_and(|net| ways.past.contains(&net)) {
            Via::Underlay
        } else if !ways.tunnel.is_empty() {
            Via::Tunnel
        } else if !ways.kernel_tunnel.is_empty() {
            Via::KernelTunnel
        } else {
            Via::Unknown
        }
    }

    /// A number for the next request; they rise, whoever asks.
    #[must_use]
    pub fn next_sequence(&self) -> u32 {
        // Only its uniqueness matters, and that it rises.
        self.sequence.fetch_add(1, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::LeaseAttrs;
    use std::net::Ipv4Addr;

    fn lease(subnets: &str, node: u8) -> Lease {
        Lease {
            subnets: subnets.parse().unwrap(),
            attrs: LeaseAttrs {
                public_ip: Some(Ipv4Addr::new(192, 0, 2, node)),
                ..LeaseAttrs::default()
            },
            expires: None,
            extension: LeaseExtension::default(),
        }
    }

    fn addr(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn word(sequence: u32, via: Via, overlay: bool) -> Word {
        Word {
            sequence: Some(sequence),
            via,
            overlay,
            claimed: None,
            sender: Identity::default(),
        }
    }

    fn directory(leases: &[Lease]) -> Directory {
        let directory = Directory::new(7);
        directory.update(leases.iter());
        directory
    }

    #[test]
    fn a_peer_is_known_by_its_own_addresses_and_its_pods_are_nobody() {
        let leases = [lease("198.18.2.0-24&fd00:1:0:2::-64", 2)];
        let directory = directory(&leases);
        for known in [
            "198.18.2.0",
            "198.18.2.1",
            "fd00:1:0:2::",
            "fd00:1:0:2::1",
            "192.0.2.2",
        ] {
            let peer = directory.peer_at(addr(known)).unwrap();
            assert_eq!(peer.subnets, leases[0].subnets, "{known}");
        }
        for nobody in ["198.18.2.2", "198.18.1.0", "192.0.2.1", "fd00:1:0:2::2"] {
            assert!(directory.peer_at(addr(nobody)).is_none(), "{nobody}");
        }
    }

    #[test]
    fn what_was_heard_outlives_an_update_and_not_another_node_with_the_subnet() {
        let (two, three) = (lease("198.18.2.0-24", 2), lease("198.18.3.0-24", 3));
        let directory = directory(std::slice::from_ref(&two));
        let heard = || {
            let peer = directory.peer_of(&two.subnets).unwrap();
            peer.last_heard().map(|heard| heard.sequence)
        };
        let peer = directory.peer_at(addr("198.18.2.0")).unwrap();
        peer.hear(word(5, Via::Tunnel, true));
        directory.update([&two, &three].into_iter());
        assert_eq!(heard(), Some(5));
        directory.update([&lease("198.18.2.0-24", 9)].into_iter());
        assert_eq!(heard(), None);
        directory.update(std::iter::empty());
        assert!(directory.peers().is_empty());
    }

    #[test]
    fn a_datagram_past_the_overlay_says_nothing_about_it() {
        let directory = directory(&[lease("198.18.2.0-24", 2)]);
        let ways = Ways {
            tunnel: vec![4],
            kernel_tunnel: vec![5],
            underlay: vec![2],
            past: HashSet::from(["198.18.3.0/24".parse().unwrap()]),
        };
        directory.set_ways(ways, 1472);
        for (link, via) in [
            (2, Via::Underlay),
            (9, Via::Other),
            (4, Via::Tunnel),
            (5, Via::KernelTunnel),
            (0, Via::Unknown),
        ] {
            assert_eq!(directory.via(link), via);
        }
        let peer = directory.peer_at(addr("198.18.2.0")).unwrap();
        assert_eq!(directory.sends_by(&peer), Via::Tunnel);
        directory.lease(&"198.18.9.0-24".parse().unwrap());
        let own = |to: &str| directory.path_to(addr(to)).local;
        assert_eq!(own("198.18.2.0"), Some(addr("198.18.9.0")));
        assert_eq!((own("192.0.2.2"), own("198.18.2.7")), (None, None));
        let other = Peer::of(&lease("198.18.3.0-24", 3));
        assert_eq!(directory.sends_by(&other), Via::Underlay);
        peer.hear(word(1, Via::Underlay, false));
        assert_eq!(peer.last_heard(), None);
        peer.hear(word(2, Via::Underlay, true));
        peer.hear(word(3, Via::Underlay, false));
        peer.hear(Word {
            sequence: None,
            ..word(0, Via::Tunnel, true)
        });
        assert_eq!(peer.last_heard().unwrap().sequence, 2);
        assert_eq!(peer.memory().heard.unwrap().1, Via::Tunnel);
    }

    #[test]
    fn own_identity_follows_the_lease_and_numbers_rise() {
        let directory = directory(&[]);
        directory.lease(&"198.18.9.0-24&fd00:1:0:9::-64".parse().unwrap());
        let identity = directory.identity();
        assert_eq!(identity.node, 7);
        assert_eq!(identity.v4.unwrap().to_string(), "198.18.9.0/24");
        assert_eq!(identity.v6.unwrap().to_string(), "fd00:1:0:9::/64");
        assert!(directory.next_sequence() < directory.next_sequence());
    }
}
