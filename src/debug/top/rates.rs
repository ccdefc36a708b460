//! Owns the difference between two of the daemon's answers, per second. Never negative: where counters began
//! anew, because the daemon or its data plane did, what they show since then counts.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What is read of the daemon's answer to `status`. Fields that a daemon of another version lacks are zero.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Answer {
    version: String,
    pid: u32,
    uptime_seconds: u64,
    reopened: u64,
    down: Option<String>,
    peers: Vec<PeerCounts>,
    datapath: Datapath,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Datapath {
    engine: String,
    device: String,
    capabilities: Vec<Capability>,
    workers: Vec<WorkerCounts>,
    total: WorkerCounts,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct WorkerCounts {
    encap: Counts,
    decap: Counts,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Counts {
    read: u64,
    sent: u64,
    answered: u64,
    sent_bytes: u64,
    read_calls: u64,
    send_calls: u64,
    wakeups: u64,
    drops: BTreeMap<String, u64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct PeerCounts {
    subnets: Vec<String>,
    endpoint: Option<String>,
    sent: u64,
    received: u64,
    dropped: u64,
    path_mtu: Option<u16>,
}

/// A kernel feature and whether it is used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capability {
    /// Its name in `loden status`.
    pub name: String,
    /// In use now.
    pub used: bool,
    /// Why not.
    pub reason: Option<String>,
}

/// What happened between two answers, per second.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Rates {
    /// The daemon's version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Since when it runs.
    pub uptime_seconds: u64,
    /// Why no packets flow, if none do.
    pub down: Option<String>,
    /// `mmsg` or `portable`.
    pub engine: String,
    /// The TUN device.
    pub device: String,
    /// The time between the answers.
    pub interval_seconds: f64,
    /// All workers, TUN to underlay.
    pub encap: Direction,
    /// All workers, underlay to TUN.
    pub decap: Direction,
    /// Every worker.
    pub workers: Vec<Worker>,
    /// Every peer, in the daemon's order.
    pub peers: Vec<Peer>,
    /// Reasons that ever dropped a packet.
    pub drops: Vec<Drop>,
    /// Kernel features.
    pub capabilities: Vec<Capability>,
}

/// One direction.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Direction {
    /// Inner packets handed on.
    pub packets_per_second: f64,
    /// Their bits.
    pub bits_per_second: f64,
    /// Inner packets answered with an ICMP error.
    pub answered_per_second: f64,
    /// Inner packets dropped.
    pub dropped_per_second: f64,
    /// Inner packets per system call that reads: how long superpackets and bursts are.
    pub packets_per_read: f64,
    /// Inner packets per system call that sends: how long runs and superpackets are.
    pub packets_per_send: f64,
    /// Wake-ups with something to do.
    pub wakeups_per_second: f64,
}

/// One worker.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Worker {
    /// TUN to underlay.
    pub encap: Direction,
    /// Underlay to TUN.
    pub decap: Direction,
}

/// One peer.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Peer {
    /// Its subnets.
    pub subnets: String,
    /// Where its datagrams go; none where it cannot be reached.
    pub endpoint: Option<String>,
    /// Inner packets sent to it.
    pub sent_per_second: f64,
    /// Inner packets accepted from it.
    pub received_per_second: f64,
    /// Inner packets from it that were dropped.
    pub dropped_per_second: f64,
    /// Path MTU where one was learned.
    pub path_mtu: Option<u16>,
}

/// One reason for drops, in one direction.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Drop {
    /// Its name.
    pub reason: String,
    /// `encap` or `decap`.
    pub direction: &'static str,
    /// Inner packets.
    pub per_second: f64,
    /// Inner packets since the data plane was opened.
    pub total: u64,
}

impl Answer {
    /// Reads the daemon's answer.
    ///
    /// # Errors
    /// A field has another type than it should.
    pub fn read(document: Value) -> Result<Self, serde_json::Error> {
        serde_json::from_value(document)
    }

    /// Whether the counters of `earlier` are the beginning of these.
    const fn continues(&self, earlier: &Self) -> bool {
        self.pid == earlier.pid
            && self.reopened == earlier.reopened
            && self.datapath.total.encap.read >= earlier.datapath.total.encap.read
            && self.datapath.total.decap.read >= earlier.datapath.total.decap.read
    }
}

/// Differences over one interval.
struct Over(f64);

impl Over {
    #[expect(
        clippy::cast_precision_loss,
        reason = "a rate is shown with three digits"
    )]
    fn rate(&self, now: u64, before: u64) -> f64 {
        now.saturating_sub(before) as f64 / self.0
    }

    fn direction(&self, now: &Counts, before: &Counts) -> Direction {
        let rate = |of: fn(&Counts) -> u64| self.rate(of(now), of(before));
        let per = |many: f64, calls: f64| if calls > 0.0 { many / calls } else { 0.0 };
        let sent = rate(|counts| counts.sent);
        Direction {
            packets_per_second: sent,
            bits_per_second: 8.0 * rate(|counts| counts.sent_bytes),
            answered_per_second: rate(|counts| counts.answered),
            dropped_per_second: rate(|counts| counts.drops.values().sum()),
            packets_per_read: per(rate(|counts| counts.read), rate(|counts| counts.read_calls)),
            packets_per_send: per(sent, rate(|counts| counts.send_calls)),
            wakeups_per_second: rate(|counts| counts.wakeups),
        }
    }

    fn worker(&self, now: &WorkerCounts, before: &WorkerCounts) -> Worker {
        Worker {
            encap: self.direction(&now.encap, &before.encap),
            decap: self.direction(&now.decap, &before.decap),
        }
    }
}

impl Rates {
    /// From two answers, `interval` apart.
    #[must_use]
    pub fn between(earlier: &Answer, now: &Answer, interval: Duration) -> Self {
        let nothing = Answer::default();
        let before = if now.continues(earlier) {
            earlier
        } else {
            &nothing
        };
        // Answers never come at the same instant; and a division must not be by zero.
        let seconds = interval.as_secs_f64().max(1e-3);
        let over = Over(seconds);
        let (new, old) = (&now.datapath, &before.datapath);
        let total = over.worker(&new.total, &old.total);
        let known: BTreeMap<_, _> = before.peers.iter().map(|p| (&p.endpoint, p)).collect();
        let none = PeerCounts::default();
        let peer = |peer: &PeerCounts| {
            let was = known.get(&peer.endpoint).copied().unwrap_or(&none);
            Peer {
                subnets: peer.subnets.join(","),
                endpoint: peer.endpoint.clone(),
                sent_per_second: over.rate(peer.sent, was.sent),
                received_per_second: over.rate(peer.received, was.received),
                dropped_per_second: over.rate(peer.dropped, was.dropped),
                path_mtu: peer.path_mtu,
            }
        };
        let idle = WorkerCounts::default();
        let workers = new.workers.iter().enumerate().map(|(idx, worker)| {
            let was = old.workers.get(idx).unwrap_or(&idle);
            over.worker(worker, was)
        });
        let mut drops = Vec::new();
        for (direction, new, old) in [
            ("encap", &new.total.encap, &old.total.encap),
            ("decap", &new.total.decap, &old.total.decap),
        ] {
            let happened = new.drops.iter().filter(|&(_, &total)| total > 0);
            drops.extend(happened.map(|(reason, &total)| Drop {
                reason: reason.clone(),
                direction,
                per_second: over.rate(total, old.drops.get(reason).copied().unwrap_or(0)),
                total,
            }));
        }
        drops.sort_by(|a, b| {
            let by_rate = b.per_second.total_cmp(&a.per_second);
            by_rate.then(b.total.cmp(&a.total))
        });
        Self {
            version: now.version.clone(),
            pid: now.pid,
            uptime_seconds: now.uptime_seconds,
            down: now.down.clone(),
            engine: new.engine.clone(),
            device: new.device.clone(),
            interval_seconds: seconds,
            encap: total.encap,
            decap: total.decap,
            workers: workers.collect(),
            peers: now.peers.iter().map(peer).collect(),
            drops,
            capabilities: new.capabilities.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn answer(pid: u32, n: u64) -> Answer {
        Answer::read(json!({
            "pid": pid, "reopened": 0,
            "peers": [{"subnets": ["198.18.4.0/24"], "endpoint": "192.0.2.2:8285", "sent": 10 * n, "received": n}],
            "datapath": {"total": {
                "encap": {"read": 12 * n, "sent": 10 * n, "sent_bytes": 1000 * n, "read_calls": 3 * n,
                          "send_calls": 2 * n, "drops": {"no_route": 2 * n, "malformed": 0}},
                "decap": {"read": n, "sent": n}},
              "workers": [{"encap": {"sent": 10 * n}}]},
        }))
        .unwrap()
    }

    #[test]
    fn rates_are_differences_per_second() {
        let rates = Rates::between(&answer(1, 100), &answer(1, 300), Duration::from_secs(2));
        assert_eq!(rates.encap.packets_per_second, 1000.0);
        assert_eq!(rates.encap.bits_per_second, 800_000.0);
        assert_eq!(rates.encap.dropped_per_second, 200.0);
        assert_eq!(rates.encap.packets_per_read, 4.0);
        assert_eq!(rates.encap.packets_per_send, 5.0);
        assert_eq!(rates.workers[0].encap.packets_per_second, 1000.0);
        assert_eq!(rates.peers[0].sent_per_second, 1000.0);
        assert_eq!(rates.peers[0].received_per_second, 100.0);
        let [drop] = &rates.drops[..] else {
            unreachable!("one reason happened")
        };
        assert_eq!((drop.per_second, drop.total), (200.0, 600));
    }

    #[test]
    fn counters_that_begin_anew_count_from_zero() {
        for later in [answer(2, 50), answer(1, 50)] {
            let rates = Rates::between(&answer(1, 1000), &later, Duration::from_secs(1));
            assert_eq!(rates.encap.packets_per_second, 500.0);
            assert_eq!(rates.peers[0].sent_per_second, 500.0);
        }
    }

    #[test]
    fn an_answer_without_anything_is_no_traffic() {
        let empty = Answer::read(json!({})).unwrap();
        let rates = Rates::between(&empty, &empty, Duration::ZERO);
        assert_eq!(rates.encap, Direction::default());
        assert!(rates.peers.is_empty());
    }
}
