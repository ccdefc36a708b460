//! Owns what is known of one peer, as far as probes are concerned: its addresses, what was heard of it, what visits and its
//! traces have shown. Never sends anything.

use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ipnet::IpNet;

use super::history::{History, State, Visit};
use crate::lease::{Lease, LeaseExtension, Subnets};
use crate::wire::probe::{Heard, Identity, Via};

/// A peer, from its lease.
#[derive(Debug)]
pub struct Peer {
    /// What it has leased.
    pub subnets: Subnets,
    /// Its addresses on the underlay.
    pub public: Vec<IpAddr>,
    /// When its lease was first seen.
    pub(super) appeared: Instant,
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
    pub(super) fn of(lease: &Lease) -> Self {
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

pub(super) fn following(addr: IpAddr) -> IpAddr {
    match addr {
        IpAddr::V4(addr) => IpAddr::V4(addr.to_bits().saturating_add(1).into()),
        IpAddr::V6(addr) => IpAddr::V6(addr.to_bits().saturating_add(1).into()),
    }
}
