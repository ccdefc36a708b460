//! Owns which ways past the tunnel are probed when, with what, and what the answers say of each, however many ways
//! there are. Pure: sends nothing, and times are handed in.
//!
//! To notice in time that a way has failed takes a probe per way and time; nothing that costs less tells of a way that
//! carries no packets at the moment. So each way in use is probed every [`EVERY`](super::proof::EVERY), and what is
//! bounded is what a probe costs: only so many a second are as long as the longest packet of the overlay, and with more
//! ways than that the long ones take turns. Ways that are not in use yet have a share of their own, and never delay
//! the others.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::headers_len;
use super::past::{Found, Target};
use super::proof::{Proof, Step};
use crate::wire::probe::{HEADER_LEN, Via};

/// Due probes are sent this often, in groups.
pub const TICK: Duration = Duration::from_millis(10);

/// Probes of ways in use in a group: 12 800 a second, each second one to both subnets of 5000 peers, or more than two
/// to one subnet each when all fail at once.
const USED_AT_A_TIME: usize = 128;

/// Likewise of other ways: 800 a second. As many peers ask us at once when a cluster starts.
const OTHERS_AT_A_TIME: usize = 8;

/// Of so many ways in use each probe is as long as the longest packet; of more, each has its turn among short ones.
const LONG_WAYS: usize = 800;

/// Payload of a short probe: room for both answers with their headers, which may not be longer than what they answer.
const SHORT_PAYLOAD: usize = 2 * HEADER_LEN + 48;

/// One probe to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// Whom it is for.
    pub target: Target,
    /// Bytes of its payload.
    pub payload: usize,
    /// It asks for an answer past the tunnel, too.
    pub past: bool,
}

/// What an answer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// The request's number.
    pub sequence: u32,
    /// Who says it.
    pub from: IpAddr,
    /// What the request came in by.
    pub via: Via,
    /// Bytes of the request's packet as it arrived.
    pub seen_len: u16,
    /// It came past the tunnel, and another may follow or be lost.
    pub past: bool,
}

/// All ways.
#[derive(Debug, Default)]
pub struct Rounds {
    ways: HashMap<IpNet, Way>,
    /// By when they are due.
    used: BTreeSet<(Instant, IpNet)>,
    others: BTreeSet<(Instant, IpNet)>,
    /// By the probe's number.
    on_the_way: HashMap<u32, IpNet>,
    /// Bytes of the longest packet of the overlay.
    len: u16,
    /// Something else may be found now.
    stale: bool,
}

#[derive(Debug)]
struct Way {
    target: Target,
    proof: Proof,
    /// Of the probe on its way, its number and the bytes of its packet.
    sent: Option<(u32, u16)>,
    /// The last one was long.
    long: bool,
    /// A long one was lost since one arrived: no short one makes up for it.
    owes_long: bool,
    /// Short ones that have arrived since a long one did.
    shorts: usize,
    /// Answers by the routing table's way are not known to come.
    past: bool,
}

impl Way {
    const fn new(target: Target, now: Instant) -> Self {
        Self {
            target,
            proof: Proof::new(now),
            sent: None,
            long: true,
            owes_long: false,
            shorts: 0,
            past: true,
        }
    }

    fn lose(&mut self, now: Instant, why: &str) {
        self.owes_long |= self.long;
        self.past = true;
        self.proof.lost(now, why);
    }
}

impl Rounds {
    /// Takes over who is to be proven, by packets of `len` bytes; with `anew`, what is known does not count, and with
    /// `hurry` it is looked at again at once.
    pub fn take(&mut self, targets: &[Target], len: u16, anew: bool, hurry: bool, now: Instant) {
        let mut before = std::mem::take(&mut self.ways);
        self.used.clear();
        self.others.clear();
        self.len = len;
        for target in targets {
            let known = before.remove(&target.net);
            let mut way = match known {
                Some(way) if way.target == *target && !anew => way,
                Some(_) | None => Way::new(*target, now),
            };
            if hurry {
                way.proof.hurry(now);
            }
            self.put(way);
        }
        let ways = &self.ways;
        self.on_the_way.retain(|sequence, net| {
            let way = ways.get(net);
            way.and_then(|way| way.sent)
                .is_some_and(|(sent, _)| sent == *sequence)
        });
        self.stale = true;
    }

    /// When there is something to do next.
    #[must_use]
    pub fn at(&self) -> Option<Instant> {
        let first = |queue: &BTreeSet<(Instant, IpNet)>| queue.first().map(|(at, _)| *at);
        first(&self.used)
            .into_iter()
            .chain(first(&self.others))
            .min()
    }

    /// What is to be sent now; to be asked once in a [`TICK`]. What was on its way for too long is lost.
    pub fn due(&mut self, now: Instant) -> Vec<Due> {
        let mut due = Vec::new();
        for (in_use, most) in [(true, USED_AT_A_TIME), (false, OTHERS_AT_A_TIME)] {
            let sent_before = due.len();
            while due.len() - sent_before < most {
                let queue = if in_use { &self.used } else { &self.others };
                let Some(&(_, net)) = queue.first().filter(|(at, _)| *at <= now) else {
                    break;
                };
                due.extend(self.step(&net, now));
            }
        }
        due
    }

    fn step(&mut self, net: &IpNet, now: Instant) -> Option<Due> {
        let len = self.len;
        let turns = self.used.len().div_ceil(LONG_WAYS);
        let (sequence, due) = self.change(net, |way| {
            let overdue = way.sent.take();
            if overdue.is_some() {
                way.lose(now, "no answer");
            }
            if way.proof.step(now) == Step::Wait {
                return (overdue, None);
            }
            way.long = !way.proof.holds() || way.owes_long || way.shorts + 1 >= turns;
            let long = usize::from(len.saturating_sub(headers_len(way.target.net.addr())));
            let payload = match way.long {
                true => long.max(HEADER_LEN),
                false => SHORT_PAYLOAD.min(long).max(HEADER_LEN),
            };
            let due = Due {
                target: way.target,
                payload,
                past: way.past,
            };
            (overdue, Some(due))
        })?;
        if let Some((sequence, _)) = sequence {
            self.on_the_way.remove(&sequence);
        }
        due
    }

    /// A probe has left under this number.
    pub fn sent(&mut self, due: &Due, sequence: u32) {
        let net = due.target.net;
        let Some(way) = self.ways.get_mut(&net) else {
            return;
        };
        let len = usize::from(headers_len(net.addr())) + due.payload;
        way.sent = Some((sequence, u16::try_from(len).unwrap_or(u16::MAX)));
        self.on_the_way.insert(sequence, net);
    }

    /// A probe could not leave.
    pub fn unsent(&mut self, due: &Due, why: &str, now: Instant) {
        self.change(&due.target.net, |way| way.lose(now, why));
    }

    /// Takes an answer; one that nobody waits for is ignored.
    pub fn answered(&mut self, answer: &Answer, now: Instant) {
        let Some(&net) = self.on_the_way.get(&answer.sequence) else {
            return;
        };
        if answer.from != net.network() {
            return;
        }
        self.on_the_way.remove(&answer.sequence);
        self.change(&net, |way| {
            let sent_len = way.sent.take().map_or(0, |(_, len)| len);
            let tunnelled = match answer.via {
                Via::Tunnel | Via::KernelTunnel => Some("through the tunnel"),
                Via::Unknown => Some("by a link that it does not tell"),
                Via::Underlay | Via::Other => None,
            };
            if let Some(how) = tunnelled {
                way.lose(now, &format!("the probe arrived {how}"));
            } else if answer.seen_len < sent_len {
                let seen = answer.seen_len;
                way.lose(now, &format!("of {sent_len} bytes, {seen} arrived"));
            } else {
                way.past = answer.past;
                way.owes_long &= !way.long;
                way.shorts = if way.long { 0 } else { way.shorts + 1 };
                way.proof.arrived(now);
            }
        });
    }

    /// What is found, if it may be something else than when this was last asked.
    pub fn news(&mut self) -> Option<Found> {
        if !std::mem::take(&mut self.stale) {
            return None;
        }
        let mut found = Found {
            len: self.len,
            proven: HashSet::new(),
            why_not: HashMap::new(),
        };
        for (net, way) in &self.ways {
            if way.proof.holds() {
                found.proven.insert(*net);
            } else if let Some(why) = way.proof.why_not() {
                let len = self.len;
                let why = match why {
                    "no answer" => format!("probes of {len} bytes past the tunnel have no answer"),
                    other => other.to_owned(),
                };
                found.why_not.insert(*net, why);
            }
        }
        Some(found)
    }

    /// Whether something else may be found.
    #[must_use]
    pub const fn is_stale(&self) -> bool {
        self.stale
    }

    /// Changes a way, keeps it in its place, and notes whether something else is found thereby.
    fn change<T>(&mut self, net: &IpNet, change: impl FnOnce(&mut Way) -> T) -> Option<T> {
        let mut way = self.ways.remove(net)?;
        let place = (way.proof.at(), *net);
        self.used.remove(&place);
        self.others.remove(&place);
        let before = (way.proof.holds(), way.proof.why_not().map(str::to_owned));
        let result = change(&mut way);
        self.stale |= before.0 != way.proof.holds() || before.1.as_deref() != way.proof.why_not();
        self.put(way);
        Some(result)
    }

    fn put(&mut self, way: Way) {
        let queue = match way.proof.holds() {
            true => &mut self.used,
            false => &mut self.others,
        };
        queue.insert((way.proof.at(), way.target.net));
        self.ways.insert(way.target.net, way);
    }
}

#[cfg(test)]
mod tests;
