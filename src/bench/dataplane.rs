//! Owns what loden's own counters say about a run: system calls, and whether the offloads took part. These figures
//! explain; what is compared is measured from outside. Never asks a daemon that is not loden.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Error;
use super::scenario::Load;
use super::system::Expected;
use crate::debug::socket::{self, Request};
use crate::lab::spec::cli_name;

/// One daemon's data plane at one moment: the part of `loden status --json` that is needed here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    document: Document,
    expected: Expected,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
struct Document {
    datapath: Datapath,
    peers: Vec<Peer>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
struct Peer {
    transport: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
struct Datapath {
    engine: String,
    capabilities: Vec<Capability>,
    total: Directions,
}

/// A kernel feature and whether it is used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capability {
    /// `tun-tso`, `udp-gso`, ...
    pub name: String,
    /// In use.
    pub used: bool,
    /// Why not.
    pub reason: Option<String>,
    /// How often it was withdrawn since the start.
    #[serde(default)]
    pub withdrawals: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
struct Directions {
    encap: Counters,
    decap: Counters,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
struct Counters {
    read: u64,
    sent: u64,
    read_calls: u64,
    send_calls: u64,
    read_superpackets: u64,
    sent_superpackets: u64,
}

impl Counters {
    const fn minus(self, before: Self) -> Self {
        Self {
            read: self.read.saturating_sub(before.read),
            sent: self.sent.saturating_sub(before.sent),
            read_calls: self.read_calls.saturating_sub(before.read_calls),
            send_calls: self.send_calls.saturating_sub(before.send_calls),
            read_superpackets: self
                .read_superpackets
                .saturating_sub(before.read_superpackets),
            sent_superpackets: self
                .sent_superpackets
                .saturating_sub(before.sent_superpackets),
        }
    }

    const fn plus(self, other: Self) -> Self {
        Self {
            read: self.read + other.read,
            sent: self.sent + other.sent,
            read_calls: self.read_calls + other.read_calls,
            send_calls: self.send_calls + other.send_calls,
            read_superpackets: self.read_superpackets + other.read_superpackets,
            sent_superpackets: self.sent_superpackets + other.sent_superpackets,
        }
    }
}

impl Picture {
    /// Asks the daemon behind `socket`.
    ///
    /// # Errors
    /// [`Error::Status`] if it does not answer, [`Error::Report`] if the answer is not understood.
    pub fn take(socket: &Path, expected: Expected) -> Result<Self, Error> {
        let answer = socket::ask(socket, &Request::Status)?;
        let document = serde_json::from_value(answer).map_err(|error| Error::Report {
            program: "loden status",
            reason: error.to_string(),
        })?;
        Ok(Self { document, expected })
    }

    /// What is not as it should be.
    fn surprises(&self) -> Vec<String> {
        let mut found = Vec::new();
        let engine = &self.document.datapath.engine;
        if let Some(wanted) = self.expected.engine.map(|wanted| cli_name(&wanted))
            && *engine != wanted
        {
            found.push(format!("the engine is {engine}, not {wanted}"));
        }
        let wanted = self.expected.transport;
        for peer in &self.document.peers {
            match peer.transport.as_deref() {
                Some(transport) if transport == wanted => {}
                Some(other) => found.push(format!("a peer is reached by {other}, not {wanted}")),
                None => found.push("a peer is not reached".to_owned()),
            }
        }
        found
    }

    /// What the kernel offers, and what of it is used.
    #[must_use]
    pub fn capabilities(&self) -> &[Capability] {
        &self.document.datapath.capabilities
    }
}

/// What all daemons of a lab did between two pictures.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Work {
    encap: Counters,
    decap: Counters,
    /// Capabilities in force on every daemon from the first picture to the last.
    in_force: Vec<String>,
    /// What is wrong whatever the traffic was.
    faults: Vec<String>,
    /// Whether datagrams can arrive joined.
    gro: bool,
}

impl Work {
    /// The difference of two rounds of pictures, daemon by daemon; `None` without any.
    #[must_use]
    pub fn between(before: &[Picture], after: &[Picture], gro: bool) -> Option<Self> {
        if before.is_empty() || before.len() != after.len() {
            return None;
        }
        let mut work = Self {
            gro,
            ..Self::default()
        };
        let mut used: BTreeMap<&str, usize> = BTreeMap::new();
        for (before, after) in before.iter().zip(after) {
            let (was, is) = (&before.document.datapath, &after.document.datapath);
            work.encap = work.encap.plus(is.total.encap.minus(was.total.encap));
            work.decap = work.decap.plus(is.total.decap.minus(was.total.decap));
            work.faults.extend(after.surprises());
            for now in &is.capabilities {
                let Some(then) = was.capabilities.iter().find(|then| then.name == now.name) else {
                    continue;
                };
                if now.withdrawals > then.withdrawals || (then.used && !now.used) {
                    let why = now.reason.as_deref().unwrap_or("no reason given");
                    work.faults
                        .push(format!("{} was given up: {why}", now.name));
                } else if now.used && then.used {
                    *used.entry(now.name.as_str()).or_default() += 1;
                }
            }
        }
        let everywhere = used
            .into_iter()
            .filter(|(_, daemons)| *daemons == after.len());
        work.in_force = everywhere.map(|(name, _)| name.to_owned()).collect();
        Some(work)
    }

    /// System calls that moved packets, per packet that crossed from node to node.
    #[must_use]
    pub fn calls_per_packet(&self) -> Option<f64> {
        ratio(self.calls(), self.decap.sent)
    }

    /// Inner packets that such a call moved, on average over reading and writing.
    #[must_use]
    pub fn packets_per_call(&self) -> Option<f64> {
        let all = self.encap.plus(self.decap);
        ratio(all.read + all.sent, self.calls())
    }

    const fn calls(&self) -> u64 {
        let all = self.encap.plus(self.decap);
        all.read_calls + all.send_calls
    }

    /// The capabilities that this load can make use of, each with what shows its part: the superpackets that it
    /// moved, and what it means if there were none.
    fn offloads(&self, load: Load) -> Vec<(&'static str, u64, &'static str)> {
        let read = (
            self.encap.read_superpackets,
            "no superpacket was read from the TUN",
        );
        let written = (self.decap.sent_superpackets, "none was written to the TUN");
        let sent = (self.encap.sent_superpackets, "no run of datagrams was sent");
        let received = (
            self.decap.read_superpackets,
            "no joined datagrams were received",
        );
        let mut offloads = Vec::new();
        if load.is_bulk() {
            offloads.extend([
                ("tun-tso", read.0, read.1),
                ("tun-tso", written.0, written.1),
            ]);
        } else {
            offloads.push(("tun-uso", read.0, read.1));
        }
        offloads.push(("udp-gso", sent.0, sent.1));
        if self.gro {
            offloads.push(("udp-gro", received.0, received.1));
        }
        offloads
    }

    fn is_in_force(&self, capability: &str) -> bool {
        self.in_force.iter().any(|name| name == capability)
    }

    /// The offloads that took part in this run.
    #[must_use]
    pub fn engaged(&self, load: Load) -> Vec<String> {
        let mut engaged: Vec<String> = self
            .offloads(load)
            .into_iter()
            .filter(|(name, superpackets, _)| *superpackets > 0 && self.is_in_force(name))
            .map(|(name, _, _)| name.to_owned())
            .collect();
        engaged.dedup();
        engaged
    }

    /// Why the figures of this run do not stand for the engine: an offload that was in force by its name, but took
    /// no part in traffic that it is made for, or one that was given up on the way. `superpackets`: whether the
    /// sending program handed the kernel any.
    #[must_use]
    pub fn faults(&self, load: Load, superpackets: bool) -> Vec<String> {
        let mut faults = self.faults.clone();
        if superpackets {
            for (name, superpackets, what) in self.offloads(load) {
                if superpackets == 0 && self.is_in_force(name) {
                    faults.push(format!("{name} is said to be in use, but {what}"));
                }
            }
        }
        faults
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of one run are far below 2^52"
)]
fn ratio(over: u64, under: u64) -> Option<f64> {
    (under > 0).then(|| over as f64 / under as f64)
}

#[cfg(test)]
mod tests {
    use super::super::scenario::Scenario;
    use super::*;
    use crate::lab::Engine;
    use serde_json::json;

    const EXPECTED: Expected = Expected {
        engine: Some(Engine::Mmsg),
        transport: "udp",
    };

    fn picture(engine: &str, used: bool, withdrawals: u64, scale: u64) -> Picture {
        let counters = json!({
            "read": 1000 * scale, "sent": 900 * scale, "read_calls": 50 * scale, "send_calls": 45 * scale,
            "read_superpackets": 30 * scale, "sent_superpackets": 20 * scale, "wakeups": 7,
        });
        let document = json!({ "version": "x", "peers": [{ "transport": "udp" }], "datapath": {
            "engine": engine,
            "capabilities": [{ "name": "udp-gso", "used": used, "reason": "EIO", "withdrawals": withdrawals }],
            "total": { "encap": counters, "decap": counters },
        }});
        Picture {
            document: serde_json::from_value(document).unwrap(),
            expected: EXPECTED,
        }
    }

    fn between(before: &Picture, after: &Picture) -> Work {
        let (before, after) = (std::slice::from_ref(before), std::slice::from_ref(after));
        Work::between(before, after, true).unwrap()
    }

    fn faults(before: &Picture, after: &Picture) -> Vec<String> {
        between(before, after).faults(Scenario::tcp(1).load, true)
    }

    #[test]
    fn calls_and_packets_are_those_of_all_daemons_between_the_pictures() {
        let (before, after) = (picture("mmsg", true, 0, 1), picture("mmsg", true, 0, 3));
        let work = Work::between(&[before.clone(), before], &[after.clone(), after], true).unwrap();
        // Two daemons, two directions, each (50 + 45) x 2 calls for 900 x 2 packets sent.
        assert_eq!(work.calls_per_packet(), Some(4.0 * 190.0 / (2.0 * 1800.0)));
        assert_eq!(work.packets_per_call(), Some(3800.0 / 190.0));
        assert_eq!(
            work.faults(Scenario::tcp(1).load, true),
            Vec::<String>::new()
        );
        assert_eq!(work.engaged(Scenario::tcp(1).load), ["udp-gso"]);
    }

    #[test]
    fn an_offload_that_is_given_up_on_the_way_is_a_fault_even_if_it_works_again() {
        let before = picture("mmsg", true, 0, 1);
        assert_eq!(
            faults(&before, &picture("mmsg", false, 1, 2)),
            ["udp-gso was given up: EIO"]
        );
        assert_eq!(faults(&before, &picture("mmsg", true, 1, 2)).len(), 1);
    }

    #[test]
    fn an_offload_that_took_no_part_is_a_fault_and_one_the_kernel_lacks_is_not() {
        let idle = picture("mmsg", true, 0, 1);
        let found = faults(&idle, &idle);
        assert_eq!(
            found,
            ["udp-gso is said to be in use, but no run of datagrams was sent"]
        );
        let lacking = picture("mmsg", false, 0, 1);
        assert_eq!(faults(&lacking, &lacking), Vec::<String>::new());
    }

    #[test]
    fn another_engine_than_was_asked_for_is_a_fault() {
        let other = picture("portable", false, 0, 1);
        assert_eq!(faults(&other, &other), ["the engine is portable, not mmsg"]);
    }

    #[test]
    fn another_transport_than_was_asked_for_and_a_peer_without_one_are_faults() {
        let good = picture("mmsg", true, 0, 1);
        let with = |transport: Option<&str>| {
            let mut other = picture("mmsg", true, 0, 2);
            other.document.peers[0].transport = transport.map(str::to_owned);
            other
        };
        let found = faults(&good, &with(Some("vxlan")));
        assert_eq!(found, ["a peer is reached by vxlan, not udp"]);
        assert_eq!(faults(&good, &with(None)), ["a peer is not reached"]);
    }

    #[test]
    fn joined_datagrams_are_missed_only_where_there_is_gro() {
        let with = |scale| {
            let mut picture = picture("mmsg", true, 0, scale);
            picture.document.datapath.capabilities[0].name = "udp-gro".to_owned();
            picture.document.datapath.total.decap.read_superpackets = 7;
            picture
        };
        let pictures = ([with(1)], [with(2)]);
        let missed = |gro| {
            let work = Work::between(&pictures.0, &pictures.1, gro).unwrap();
            work.faults(Scenario::tcp(1).load, true)
        };
        assert_eq!(
            missed(true),
            ["udp-gro is said to be in use, but no joined datagrams were received"]
        );
        assert_eq!(missed(false), Vec::<String>::new());
    }

    #[test]
    fn without_counters_there_is_no_work() {
        assert_eq!(Work::between(&[], &[], true), None);
    }
}
