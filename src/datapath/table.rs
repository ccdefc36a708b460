//! Owns what a worker knows of its peers: the table it reads once per burst, and each peer's learned state.
//! Never learns by itself; the directions write what they see.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

use ipnet::IpNet;
use socket2::SockAddr;

use super::shared::Withdrawable;
use super::{DropReason, Encapsulation, PeerRoute, status};
use crate::addr::{Mac, Mtu};
use crate::route::Fib;

/// How long a learned path MTU or a withdrawn offload is believed before it is tried again
/// (RFC 1191 section 6.3 and RFC 8201 section 4: at least ten minutes for a larger MTU).
pub const RETRY_AFTER_MS: u64 = 10 * 60 * 1000;

/// How often a peer's refusals are reported.
const REPORT_AGAIN_MS: u64 = 60 * 1000;

// `first_drop` keeps one bit per reason.
const _: () = assert!(DropReason::COUNT <= 32);

/// Milliseconds since the data plane was opened; monotonic.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// Starts at zero, now.
    #[must_use]
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// The time. Read on slow paths only.
    #[must_use]
    pub fn now_ms(self) -> u64 {
        u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// What makes two next hops one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PeerKey {
    /// Where its datagrams go.
    pub addr: SocketAddr,
    /// Its VTEP's MAC address. A node that took a new lease with a new MAC is two next hops until the old lease
    /// expires.
    pub mac: Option<Mac>,
    /// It decapsulates with RFC 6040 normal mode.
    pub ecn: bool,
}

impl From<&PeerRoute> for PeerKey {
    fn from(route: &PeerRoute) -> Self {
        Self {
            addr: route.addr,
            mac: route.mac,
            ecn: route.ecn,
        }
    }
}

/// A next hop and what was learned about the path to it. Shared by all workers; survives publications.
pub struct Peer {
    /// Where its datagrams go.
    pub addr: SocketAddr,
    /// The same as the kernel takes it.
    pub name: SockAddr,
    /// Its VTEP's MAC address, where it is known.
    pub mac: Option<Mac>,
    /// It decapsulates with RFC 6040 normal mode.
    pub ecn: bool,
    /// Bytes of a datagram in front of the inner packet.
    overhead: u16,
    /// Largest inner packet the path carries; 0 when nothing was learned.
    max_inner: AtomicU32,
    /// When that is forgotten, by [`Clock`].
    max_inner_until: AtomicU64,
    /// Sending runs to it.
    pub gso: Withdrawable,
    /// When "port unreachable" was last reported, plus one; 0 for never.
    refused_at: AtomicU64,
    /// Drop reasons already reported for it, one bit each.
    reported: AtomicU32,
    /// Inner packets sent to it.
    pub sent: AtomicU64,
    /// Inner packets accepted from it.
    pub received: AtomicU64,
    /// Inner packets from it dropped.
    pub dropped: AtomicU64,
}

impl Peer {
    /// A peer of whom nothing is known yet.
    #[must_use]
    pub fn new(PeerKey { addr, mac, ecn }: PeerKey, encapsulation: Encapsulation) -> Self {
        Self {
            addr,
            name: SockAddr::from(addr),
            mac,
            ecn,
            overhead: encapsulation.overhead(addr.ip()),
            max_inner: AtomicU32::new(0),
            max_inner_until: AtomicU64::new(0),
            gso: Withdrawable::default(),
            refused_at: AtomicU64::new(0),
            reported: AtomicU32::new(0),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        }
    }

    const fn key(&self) -> PeerKey {
        PeerKey {
            addr: self.addr,
            mac: self.mac,
            ecn: self.ecn,
        }
    }

    /// Whether what comes from a VTEP with this address can be the peer's; nothing known contradicts nothing.
    #[inline]
    #[must_use]
    pub fn may_be(&self, mac: Option<Mac>) -> bool {
        mac.is_none() || self.mac.is_none() || mac == self.mac
    }

    /// The largest inner packet that fits the path, where that was learned. One relaxed load where it was not.
    #[inline]
    pub fn max_inner(&self, clock: Clock) -> Option<Mtu> {
        let max = Mtu::new(self.max_inner.load(Ordering::Relaxed))?;
        if clock.now_ms() >= self.max_inner_until.load(Ordering::Relaxed) {
            self.max_inner.store(0, Ordering::Relaxed);
            return None;
        }
        Some(max)
    }

    /// Learns the path MTU, outer headers included. Returns whether that was news. Values below what every
    /// path must carry are raised to it: an ICMP message may be forged.
    pub fn learn_path_mtu(&self, mtu: u32, clock: Clock) -> Option<Mtu> {
        // 552 is the kernel's own floor for IPv4 (`net.ipv4.route.min_pmtu`).
        let floor = if self.addr.is_ipv4() {
            552
        } else {
            u32::from(Mtu::MIN_V6.get())
        };
        let mtu = Mtu::new(mtu.max(floor))?;
        let max = u32::from(mtu.get()) - u32::from(self.overhead);
        self.max_inner_until
            .store(clock.now_ms() + RETRY_AFTER_MS, Ordering::Relaxed);
        (self.max_inner.swap(max, Ordering::Relaxed) != max).then_some(mtu)
    }

    /// Notes that nothing listens on its tunnel port; true when that is worth saying again.
    pub fn note_refusal(&self, clock: Clock) -> bool {
        let (now, last) = (clock.now_ms(), self.refused_at.load(Ordering::Relaxed));
        let due = last == 0 || now >= last + REPORT_AGAIN_MS;
        if due {
            self.refused_at.store(now + 1, Ordering::Relaxed);
        }
        due
    }

    /// Whether this is the first drop for this reason.
    pub fn first_drop(&self, reason: DropReason) -> bool {
        let bit = 1 << (reason as u32);
        self.reported.fetch_or(bit, Ordering::Relaxed) & bit == 0
    }

    fn to_status(&self, nets: Vec<IpNet>) -> status::Peer {
        let max = Mtu::new(self.max_inner.load(Ordering::Relaxed));
        status::Peer {
            addr: self.addr,
            nets,
            sent: self.sent.load(Ordering::Relaxed),
            received: self.received.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
            path_mtu: max.map(|mtu| mtu.get() + self.overhead),
            gso_withdrawn: self
                .gso
                .is_withdrawn()
                .then(|| "the kernel refused a GSO run on this path".to_owned()),
        }
    }
}

/// What workers read: prefixes to peers, and peers by their underlay address.
#[derive(Default)]
pub struct Table {
    /// Longest-prefix match.
    pub fib: Fib<Arc<Peer>>,
    /// The next hops at an address, which stand one after the other: the first and the number.
    by_addr: HashMap<IpAddr, (usize, usize)>,
    nets: Vec<(IpNet, usize)>,
}

impl Table {
    /// Builds a table from routes; a peer that `previous` knows under the same key keeps its state.
    #[must_use]
    pub fn build(routes: &[PeerRoute], encapsulation: Encapsulation, previous: &Self) -> Self {
        let mut keys: Vec<PeerKey> = routes.iter().map(PeerKey::from).collect();
        keys.sort_unstable();
        keys.dedup();
        let nets = routes
            .iter()
            .filter_map(|route| {
                let idx = keys.binary_search(&PeerKey::from(route)).ok()?;
                Some((route.net, idx))
            })
            .collect::<Vec<_>>();
        let mut by_addr: HashMap<IpAddr, (usize, usize)> = HashMap::with_capacity(keys.len());
        for (idx, key) in keys.iter().enumerate() {
            by_addr.entry(key.addr.ip()).or_insert((idx, 0)).1 += 1;
        }
        let peers = keys
            .into_iter()
            .map(|key| {
                let mut known = previous.peers_by_ip(key.addr.ip()).iter();
                known
                    .find(|peer| peer.key() == key)
                    .map_or_else(|| Arc::new(Peer::new(key, encapsulation)), Arc::clone)
            })
            .collect();
        Self {
            fib: Fib::build(nets.iter().copied(), peers),
            by_addr,
            nets,
        }
    }

    /// The peers whose datagrams come from this underlay address: one, but while a node changes.
    #[must_use]
    pub fn peers_by_ip(&self, addr: IpAddr) -> &[Arc<Peer>] {
        self.by_addr
            .get(&addr)
            .and_then(|&(first, count)| self.fib.hops().get(first..first + count))
            .unwrap_or_default()
    }

    /// As `status` shows the peers.
    #[must_use]
    pub fn to_status(&self) -> Vec<status::Peer> {
        let mut nets = vec![Vec::new(); self.fib.hops().len()];
        for (net, idx) in &self.nets {
            if let Some(nets) = nets.get_mut(*idx) {
                nets.push(*net);
            }
        }
        self.fib
            .hops()
            .iter()
            .zip(nets)
            .map(|(peer, nets)| peer.to_status(nets))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(net: &str, addr: &str, ecn: bool) -> PeerRoute {
        PeerRoute {
            net: net.parse().unwrap(),
            addr: addr.parse().unwrap(),
            mac: None,
            ecn,
        }
    }

    fn build(routes: &[PeerRoute], previous: &Table) -> Table {
        Table::build(routes, Encapsulation::Plain, previous)
    }

    fn peer(addr: &str, encapsulation: Encapsulation) -> Peer {
        Peer::new(
            PeerKey::from(&route("198.18.1.0/24", addr, false)),
            encapsulation,
        )
    }

    #[test]
    fn a_peer_keeps_its_state_over_publications_and_loses_it_with_its_address() {
        let clock = Clock::start();
        let first = build(
            &[route("198.18.1.0/24", "192.0.2.1:8285", false)],
            &Table::default(),
        );
        let peer = Arc::clone(&first.peers_by_ip("192.0.2.1".parse().unwrap())[0]);
        assert_eq!(peer.learn_path_mtu(1400, clock), Mtu::new(1400));
        assert_eq!(peer.learn_path_mtu(1400, clock), None, "no news");
        let same = build(&[route("198.18.9.0/24", "192.0.2.1:8285", false)], &first);
        let (_, kept) = same.fib.lookup("198.18.9.1".parse().unwrap()).unwrap();
        assert_eq!(kept.max_inner(clock), Mtu::new(1372));
        let moved = build(&[route("198.18.9.0/24", "192.0.2.2:8285", false)], &same);
        let (_, fresh) = moved.fib.lookup("198.18.9.1".parse().unwrap()).unwrap();
        assert_eq!(fresh.max_inner(clock), None);
    }

    #[test]
    fn a_forged_tiny_path_mtu_is_raised_to_what_every_path_carries() {
        let clock = Clock::start();
        let vxlan = Encapsulation::Vxlan {
            vni: crate::addr::Vni::new(1).unwrap(),
            mac: Mac::local(2),
        };
        let plain = Encapsulation::Plain;
        let v4 = peer("192.0.2.1:8285", plain);
        assert_eq!(v4.learn_path_mtu(0, clock), Mtu::new(552));
        for (addr, encapsulation, learned, inner) in [
            ("[2001:db8::1]:8285", plain, 1280, 1232),
            ("[2001:db8::1]:8472", vxlan, 1280, 1210),
            ("192.0.2.1:8472", vxlan, 552, 502),
        ] {
            let peer = peer(addr, encapsulation);
            assert_eq!(peer.learn_path_mtu(68, clock), Mtu::new(learned));
            assert_eq!(peer.max_inner(clock), Mtu::new(inner), "{addr}");
        }
    }

    #[test]
    fn a_node_with_an_old_and_a_new_mac_is_two_peers_at_one_address() {
        let with = |net: &str, mac: u64| PeerRoute {
            mac: Some(Mac::local(mac)),
            ..route(net, "192.0.2.1:8472", false)
        };
        let routes = [with("198.18.1.0/24", 2), with("198.18.2.0/24", 6)];
        let table = build(&routes, &Table::default());
        let at = table.peers_by_ip("192.0.2.1".parse().unwrap());
        assert_eq!(at.len(), 2);
        for (net, mac) in [("198.18.1.9", 2), ("198.18.2.9", 6)] {
            let (_, peer) = table.fib.lookup(net.parse().unwrap()).unwrap();
            assert_eq!(peer.mac, Some(Mac::local(mac)));
        }
        assert!(table.peers_by_ip("192.0.2.2".parse().unwrap()).is_empty());
        let kept = build(&routes[1..], &table);
        assert!(Arc::ptr_eq(
            &kept.peers_by_ip("192.0.2.1".parse().unwrap())[0],
            &at[1]
        ));
    }

    #[test]
    fn ports_of_one_address_are_peers_of_their_own() {
        let routes = [
            route("198.18.1.0/24", "192.0.2.1:8285", true),
            route("198.18.2.0/24", "192.0.2.1:8286", true),
            route("198.18.3.0/24", "192.0.2.1:8286", true),
            route("198.18.4.0/24", "192.0.2.1:8285", true),
        ];
        let table = build(&routes, &Table::default());
        assert_eq!(table.fib.hops().len(), 2);
        for (n, port) in [(1, 8285), (2, 8286), (3, 8286), (4, 8285)] {
            let addr = std::net::Ipv4Addr::new(198, 18, n, 1).into();
            assert_eq!(table.fib.lookup(addr).unwrap().1.addr.port(), port);
        }
    }

    #[test]
    fn two_subnets_of_one_peer_share_it() {
        let routes = [
            route("198.18.1.0/24", "192.0.2.1:8285", true),
            route("fd00:1::/64", "192.0.2.1:8285", true),
        ];
        let table = build(&routes, &Table::default());
        assert_eq!(table.fib.hops().len(), 1);
        assert_eq!(table.to_status()[0].nets.len(), 2);
    }
}
