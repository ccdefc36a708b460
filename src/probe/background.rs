//! Owns probing peers all the time, at a cost that does not grow with the cluster: a few peers a second, those in
//! doubt first, the rest in turn and in an order of this node's own. Never acts on what it finds.
//!
//! Nobody is visited before its lease and ours are old enough for both ends to know them: to whoever does not, a probe is
//! a stranger's packet.
//!
//! A path that breaks is suspected at its peer's next turn, within [`AT_LEAST`] for up to 40 peers and within 25
//! seconds for up to 200, and told after three visits, a second apart. Beyond that, turns are rarer; but a path has two
//! ends, and what a peer says of it is heard, too.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

use super::Figures;
use super::directory::{Directory, Peer};
use super::history::{State, Visit};
use super::prober::{Prober, Round};
use crate::telemetry::histogram::{Distribution, Histogram};
use crate::telemetry::rate_limit::Allowance;
use crate::wire::probe::Reach;

/// Peers that are visited in a second, at most.
pub const PER_TICK: usize = 8;

/// Of these, peers in doubt: some turns are always left to the others.
const SUSPECTS_PER_TICK: usize = 4;

const TICK: Duration = Duration::from_secs(1);

/// Between two visits of a peer that is not in doubt.
pub const AT_LEAST: Duration = Duration::from_secs(5);

/// A lease is taken to be known to everybody so long after it appeared, and up to [`SPREAD`] more, which is another time
/// for every pair: stores tell of it within a second, and watches are resumed within a few.
const SETTLE: Duration = Duration::from_secs(3);
const SPREAD: Duration = Duration::from_secs(2);

/// How long an answer may take: all visits of a tick are over at the next.
const PATIENCE: Duration = Duration::from_millis(450);

/// Every so many visits, a packet of full size is sent, too.
const WIDE_EVERY: u64 = 3;

/// Visits at first in which every peer is asked for a probe.
const ASK_FIRST: u64 = 3;

/// A peer that answered no probe, and echoes, is asked for a probe again every so many visits.
const ASK_AGAIN_EVERY: u64 = 12;

/// Lines about peers in [`LINES_IN`]: thousands may be lost at once.
const LINES: u32 = 10;
const LINES_IN: Duration = Duration::from_secs(60);

/// Bounds of the histogram of round-trip times: from one rack to the other side of the world.
const BOUNDS: &[Duration] = &[
    Duration::from_micros(100),
    Duration::from_micros(250),
    Duration::from_micros(500),
    Duration::from_millis(1),
    Duration::from_micros(2500),
    Duration::from_millis(5),
    Duration::from_millis(10),
    Duration::from_millis(25),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_millis(500),
];

/// What was probed so far.
#[derive(Debug)]
pub struct Tally {
    visits: AtomicU64,
    answered: AtomicU64,
    rtt: Histogram,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            visits: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            rtt: Histogram::new(BOUNDS),
        }
    }
}

impl Tally {
    /// Visits that are over.
    #[must_use]
    pub fn visits(&self) -> u64 {
        self.visits.load(Ordering::Relaxed)
    }

    /// Visits that were answered.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Round-trip times of those.
    #[must_use]
    pub fn rtt(&self) -> Distribution {
        self.rtt.read()
    }
}

/// The background prober. Dropping it ends it.
#[derive(Debug)]
pub struct Background {
    task: JoinHandle<()>,
}

impl Background {
    /// Probes the directory's peers at `port` from now on, in a task of the current runtime.
    #[must_use]
    pub fn start(port: u16, directory: &Arc<Directory>, tally: &Arc<Tally>) -> Self {
        let running = Running {
            port,
            directory: Arc::clone(directory),
            tally: Arc::clone(tally),
            lines: Allowance::new(LINES, LINES_IN),
        };
        Self {
            task: tokio::spawn(running.run()),
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Running {
    port: u16,
    directory: Arc<Directory>,
    tally: Arc<Tally>,
    lines: Allowance,
}

impl Running {
    async fn run(mut self) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let chosen = choose(&self.directory, Instant::now());
            let visits = chosen.iter().map(|peer| self.visit(peer));
            for (peer, visit) in chosen.iter().zip(join_all(visits).await) {
                // Without a way to ask, as while the tunnel is down, nothing was found out.
                if let Ok(visit) = visit {
                    self.take(peer, visit);
                }
            }
        }
    }

    fn take(&mut self, peer: &Peer, visit: Visit) {
        self.tally.visits.fetch_add(1, Ordering::Relaxed);
        if let Some(rtt) = visit.rtt {
            self.tally.answered.fetch_add(1, Ordering::Relaxed);
            self.tally.rtt.record(rtt);
        }
        let now = Instant::now();
        let (before, after, loss) = peer.note(visit, now);
        let worse = after.is_degraded() && !before.is_degraded();
        let better = before.is_degraded() && !after.is_degraded();
        if (worse || better) && self.lines.allow(now) {
            let subnets = peer.subnets;
            if better {
                tracing::info!("peer {subnets} is reached again: {}", sentence(after, loss));
            } else {
                tracing::warn!(
                    "peer {subnets}: {}: loden doctor finds out why",
                    sentence(after, loss)
                );
            }
        }
    }

    /// Asks one peer once.
    async fn visit(&self, peer: &Peer) -> io::Result<Visit> {
        let (history, nth) = peer.next_visit();
        let asks = peer.runs_it() || nth <= ASK_FIRST || nth % ASK_AGAIN_EVERY == 0;
        let wide = nth % WIDE_EVERY == 0 || history.is_suspect();
        let mut refused = None;
        for to in self.directory.targets(peer) {
            let path = self.directory.path_to(to);
            if asks {
                let to = SocketAddr::new(to, self.port);
                let mut prober = Prober::probes(&self.directory, &path, to).await?;
                let figures = prober.round(once(0)).await;
                if figures.answered > 0 {
                    let wide = self.wide(&mut prober, wide).await;
                    return Ok(visit(&figures, false, wide));
                }
            }
            let mut prober = match Prober::echoes(&self.directory, &path, to) {
                Ok(prober) => prober,
                Err(error) => {
                    refused = Some(error);
                    continue;
                }
            };
            let figures = prober.round(once(0)).await;
            if figures.answered > 0 {
                let wide = self.wide(&mut prober, wide).await;
                return Ok(visit(&figures, true, wide));
            }
        }
        match refused {
            // Where echoes may not be sent, only those who have answered before can be said to be lost.
            Some(error) if !history.has_answered() => Err(error),
            Some(_) | None => Ok(Visit {
                rtt: None,
                echo: false,
                wide: None,
                clock_offset_us: None,
            }),
        }
    }

    /// Whether a full-size packet gets there and back, if that is to be asked.
    async fn wide(&self, prober: &mut Prober, asked: bool) -> Option<bool> {
        let len = self.directory.mtu().filter(|_| asked)?;
        let figures = prober
            .round(Round {
                full: true,
                ..once(len)
            })
            .await;
        // The link itself is smaller: whoever sends is told so.
        (figures.errno != Some(libc::EMSGSIZE)).then_some(figures.answered > 0)
    }
}

const fn once(len: u16) -> Round {
    Round {
        count: 1,
        every: Duration::ZERO,
        patience: PATIENCE,
        len,
        full: false,
        trace: false,
    }
}

fn visit(figures: &Figures, echo: bool, wide: Option<bool>) -> Visit {
    Visit {
        rtt: figures.rtt_us.map(|rtt| Duration::from_micros(rtt.min)),
        echo,
        wide,
        clock_offset_us: figures.clock_offset_us,
    }
}

/// How a peer is reached, in words.
#[must_use]
pub fn sentence(state: State, loss_percent: u8) -> String {
    let reach = match state.reach {
        Reach::Unknown => "not probed yet".to_owned(),
        Reach::Answers => "answers".to_owned(),
        Reach::Echoes => "answers echo requests only: it runs another program, or none".to_owned(),
        Reach::Loses => format!("loses {loss_percent} % of the probes"),
        Reach::Silent => "nothing comes back".to_owned(),
    };
    if state.narrow {
        format!("{reach}, but packets of full size get lost")
    } else {
        reach
    }
}

/// Whose turn it is: those in doubt, then those whose last visit is longest ago; in an order of the node's own, so
/// that not all nodes visit the same one first.
fn choose(directory: &Directory, now: Instant) -> Vec<Arc<Peer>> {
    let salt = directory.identity().node;
    let peers = directory.peers();
    let mut suspects = Vec::new();
    let mut due = Vec::new();
    for peer in &peers {
        let history = peer.history();
        let visited = history.visited();
        let ago = visited.map(|at| now.saturating_duration_since(at));
        let shuffled = shuffled(salt, peer);
        let key = (visited, shuffled, peer);
        let is_wanted = peer.is_wanted();
        // Who asks to be visited knows us.
        if now < directory.together_since(peer) + settling(shuffled) && !is_wanted {
            continue;
        }
        if history.is_suspect() || is_wanted {
            suspects.push(key);
        } else if ago.is_none_or(|ago| ago >= AT_LEAST) {
            due.push(key);
        }
    }
    let order = |turns: &mut Vec<(Option<Instant>, u64, &Arc<Peer>)>| {
        turns.sort_unstable_by_key(|&(visited, shuffled, _)| (visited, shuffled));
    };
    order(&mut suspects);
    order(&mut due);
    let first = suspects
        .len()
        .min(SUSPECTS_PER_TICK.max(PER_TICK - due.len().min(PER_TICK)));
    let chosen = suspects.iter().take(first).chain(&due).take(PER_TICK);
    chosen.map(|&(_, _, peer)| Arc::clone(peer)).collect()
}

/// How long a pair of nodes waits before the first visit.
fn settling(shuffled: u64) -> Duration {
    let spread = u64::try_from(SPREAD.as_millis()).unwrap_or(u64::MAX);
    SETTLE + Duration::from_millis(shuffled % spread)
}

/// A node's own order: FNV-1a over its number and the peer's first address.
fn shuffled(salt: u64, peer: &Peer) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64 ^ salt;
    let addr = peer.overlay_addrs().next();
    let octets = match addr {
        Some(IpAddr::V4(addr)) => addr.to_ipv6_mapped().octets(),
        Some(IpAddr::V6(addr)) => addr.octets(),
        None => [0; 16],
    };
    for octet in octets {
        hash = (hash ^ u64::from(octet)).wrapping_mul(0x0100_0000_01b3);
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Lease, LeaseAttrs, LeaseExtension};
    use std::collections::BTreeSet;

    fn directory(peers: u16) -> Directory {
        directory_of(peers, 9)
    }

    /// When everybody is known to everybody.
    fn settled() -> Instant {
        Instant::now() + SETTLE + SPREAD
    }

    fn directory_of(peers: u16, node: u64) -> Directory {
        let lease = |nth: u16| Lease {
            subnets: format!("198.{}.{}.0-24", 18 + nth / 256, nth % 256)
                .parse()
                .unwrap(),
            attrs: LeaseAttrs::default(),
            expires: None,
            extension: LeaseExtension::default(),
        };
        let leases: Vec<Lease> = (0..peers).map(lease).collect();
        let directory = Directory::new(node);
        directory.update(leases.iter());
        directory
    }

    fn found(lost: bool) -> Visit {
        Visit {
            rtt: (!lost).then_some(Duration::from_millis(1)),
            echo: false,
            wide: None,
            clock_offset_us: None,
        }
    }

    /// Lets `seconds` pass; whom each of them visited. `is_lost` says what a visit finds.
    fn turns(
        directory: &Directory,
        from: Instant,
        seconds: u32,
        is_lost: impl Fn(&Peer) -> bool,
    ) -> Vec<Vec<String>> {
        let tick = |second: u32| {
            let now = from + second * TICK;
            let chosen = choose(directory, now);
            let name = |peer: &Arc<Peer>| {
                peer.note(found(is_lost(peer)), now);
                peer.subnets.to_string()
            };
            chosen.iter().map(name).collect()
        };
        (0..seconds).map(tick).collect()
    }

    #[test]
    fn cost_is_bounded_however_many_peers_there_are_and_all_get_their_turn() {
        for (peers, within) in [(1, 1), (8, 1), (40, 5), (200, 25), (240, 30)] {
            let directory = directory(peers);
            let turns = turns(&directory, settled(), within, |_| false);
            assert!(turns.iter().all(|tick| tick.len() <= PER_TICK));
            let seen: BTreeSet<String> = turns.into_iter().flatten().collect();
            assert_eq!(seen.len(), usize::from(peers), "{peers}");
        }
        let few = turns(&directory(1), settled(), 20, |_| false);
        let visits: usize = few.iter().map(Vec::len).sum();
        assert_eq!(visits, 4, "one every five seconds");
    }

    #[test]
    fn a_path_that_breaks_is_told_within_thirty_seconds() {
        let directory = directory(200);
        let start = settled();
        turns(&directory, start, 60, |_| false);
        // The worst: its turn was just over.
        let peers = directory.peers();
        let last = peers.iter().max_by_key(|peer| peer.history().visited());
        let broken = last.unwrap().subnets;
        turns(&directory, start + 60 * TICK, 30, |peer| {
            peer.subnets == broken
        });
        let state = directory.peer_of(&broken).unwrap().history().state();
        assert_eq!(state.reach, Reach::Silent);
    }

    #[test]
    fn peers_in_doubt_do_not_take_all_turns() {
        let directory = directory(200);
        let start = settled();
        // Half of the cluster is gone.
        let gone = |peer: &Peer| peer.subnets.to_string().as_str() < "198.18.150";
        turns(&directory, start, 60, gone);
        let turns = turns(&directory, start + 60 * TICK, 30, gone);
        let seen: BTreeSet<String> = turns.iter().flatten().cloned().collect();
        let alive = directory.peers();
        let alive = alive.iter().filter(|peer| !gone(peer)).count();
        let alive_seen = seen.iter().filter(|name| name.as_str() >= "198.18.150");
        assert!(alive_seen.count() >= alive.min(100), "{}", seen.len());
        assert!(turns.iter().all(|tick| tick.len() <= PER_TICK));
    }

    #[test]
    fn nodes_go_round_in_different_orders() {
        let order = |node| {
            let chosen = choose(&directory_of(100, node), settled());
            let names = chosen.iter().map(|peer| peer.subnets.to_string());
            names.collect::<Vec<_>>()
        };
        assert_ne!(order(1), order(2));
        assert_eq!(order(1), order(1));
    }

    #[test]
    fn nobody_is_visited_before_both_ends_can_know_each_other_and_not_all_at_one_time() {
        let directory = directory(40);
        directory.lease(&"198.19.9.0-24".parse().unwrap());
        // The moment that counts, however long it takes to get here.
        let start = directory.together_since(&directory.peers()[0]);
        let known = |after: Duration| {
            let now = start + after;
            let peers = directory.peers();
            let shuffled = |peer: &Arc<Peer>| shuffled(directory.identity().node, peer);
            let settled = |peer: &&Arc<Peer>| {
                now >= directory.together_since(peer) + settling(shuffled(peer))
            };
            peers.iter().filter(settled).count()
        };
        assert!(choose(&directory, start + SETTLE - TICK).is_empty());
        assert_eq!(known(SETTLE - TICK), 0);
        let some = known(SETTLE + SPREAD / 2);
        assert!(some > 0 && some < 40, "{some}");
        assert_eq!(known(SETTLE + SPREAD), 40);
        assert_eq!(choose(&directory, start + SETTLE + SPREAD).len(), PER_TICK);
        // Who asks for it is visited at once.
        let asker = directory.peers().remove(7);
        asker.want_visit();
        let chosen = choose(&directory, start);
        assert_eq!(chosen.len(), 1);
        assert_eq!(chosen[0].subnets, asker.subnets);
        // Another lease of ours is unknown again.
        asker.next_visit();
        let much_later = Instant::now() + 100 * TICK;
        assert!(!choose(&directory, much_later).is_empty());
        let again = Instant::now();
        directory.lease(&"198.19.8.0-24".parse().unwrap());
        assert!(choose(&directory, again + SETTLE - TICK).is_empty());
    }
}
