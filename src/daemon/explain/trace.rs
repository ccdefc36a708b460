//! Owns following marked probes through both nodes' daemons: our own workers show what became of each, and the
//! other's daemon says what arrived. Never says more of a node than its daemon told.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZero;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::Explanation;
use crate::backend::kernel::Kernel;
use crate::daemon::Daemon;
use crate::daemon::session::Session;
use crate::datapath::tap::filter::Filter;
use crate::datapath::tap::{Capture, Direction, Record, Wanted};
use crate::debug::pcapng::Outcome;
use crate::probe::Directory;
use crate::probe::prober::{Prober, Round};
use crate::store::LeaseStore;

/// Marked probes: enough to tell a loss from a way that is closed.
const PROBES: u16 = 3;

/// How long answers are waited for.
const PATIENCE: Duration = Duration::from_millis(500);

/// Workers are looked at so often, this long apart, before what they do not show counts as not seen.
const LOOKS: u32 = 20;
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Bytes of records that are looked at; three probes and their answers take a few hundred.
const ENOUGH: usize = 1 << 16;

/// What a trace needs of the daemon.
pub(in crate::daemon) struct Trace {
    directory: Arc<Directory>,
    to: SocketAddr,
    len: u16,
    capture: Option<Capture>,
    records: Vec<Record>,
    /// The other node.
    node: String,
}

impl Trace {
    /// Makes ready to follow probes to the node whose lease has `addr`; why not, if they cannot be. Our own workers are
    /// watched where they carry the packets.
    pub(super) fn begin<S: LeaseStore, K: Kernel>(
        daemon: &Daemon<'_, S, K>,
        session: &Session,
        addr: IpAddr,
        len: u16,
        is_watched: bool,
    ) -> Result<Self, String> {
        let port = daemon.probes.options.port.map(NonZero::get);
        let port =
            port.ok_or("the daemon runs with --probe-port 0, so there is nothing to follow")?;
        let peer = session.directory.peers().into_iter().find(|peer| {
            let nets = crate::backend::udp::nets(&peer.subnets);
            nets.iter().any(|net| net.contains(&addr)) || peer.public.contains(&addr)
        });
        let peer = peer.ok_or_else(|| {
            format!("{addr} is in no peer's lease: there is nobody to follow probes to")
        })?;
        let targets = session.directory.targets(&peer).into_iter();
        let mut targets = targets.chain(peer.overlay_addrs());
        let to = targets.find(|of| of.is_ipv4() == addr.is_ipv4());
        let to = to.ok_or_else(|| format!("the peer of {addr} has no address of that family"))?;
        let carrier = session.carrier.as_ref();
        let taps = carrier.and_then(|carrier| carrier.tunnel_of(to)?.taps());
        let taps = taps.filter(|_| is_watched);
        let filter = format!("udp port {port} and host {to}").parse::<Filter>();
        let capture = match (taps, filter) {
            (Some(taps), Ok(filter)) => taps
                .capture(Wanted {
                    filter,
                    snap_len: 1,
                    segments: true,
                })
                .ok(),
            (None, _) | (_, Err(_)) => None,
        };
        Ok(Self {
            directory: Arc::clone(&session.directory),
            to: SocketAddr::new(to, port),
            len,
            capture,
            records: Vec::new(),
            node: peer
                .public
                .first()
                .map_or_else(|| to.to_string(), IpAddr::to_string),
        })
    }

    /// Sends the probes, and adds what was seen of them.
    pub(in crate::daemon) async fn run(self, explanation: &mut Explanation) {
        let lines = self.follow().await;
        explanation.trace = lines;
    }

    async fn follow(mut self) -> Vec<String> {
        let path = self.directory.path_to(self.to.ip());
        let mut prober = match Prober::probes(&self.directory, &path, self.to).await {
            Ok(prober) => prober,
            Err(error) => return vec![format!("no probe can be sent to {}: {error}", self.to)],
        };
        // Workers begin to show packets at their next burst, which these make; they are told apart by their length.
        let waking = Round {
            count: PROBES,
            every: Duration::from_millis(1),
            patience: PATIENCE / 5,
            ..Round::default()
        };
        prober.round(waking).await;
        self.len = self.len.max(prober.least_len() + 1);
        let round = Round {
            count: PROBES,
            patience: PATIENCE,
            len: self.len,
            full: true,
            trace: true,
            ..Round::default()
        };
        let figures = prober.round(round).await;
        self.fetch(figures.sent, figures.answered).await;
        let mut lines = vec![format!(
            "{} marked probes of {} bytes to {}",
            figures.sent, self.len, self.to
        )];
        match self.seen(Direction::Encap) {
            Some(seen) => {
                lines.extend(told("this node", &seen, "none of them reached its workers"))
            }
            None => lines.push(
                "this node: its workers cannot be watched: the kernel carries the packets"
                    .to_owned(),
            ),
        }
        match (figures.via_there, figures.ttl_there) {
            (Some(via), ttl) => {
                let ttl = ttl.map_or_else(String::new, |ttl| format!(", with a TTL of {ttl}"));
                lines.push(format!(
                    "{}: its daemon saw {} of them come in by {via}{ttl}, and answered",
                    self.node, figures.answered
                ));
            }
            (None, _) => {
                let said = figures.refused.as_ref();
                let said = said.map_or_else(String::new, |said| format!(" ({said})"));
                lines.push(format!(
                    "{}: sight ends here: no daemon answers probes{said}",
                    self.node
                ));
            }
        }
        if let Some(seen) = self.seen(Direction::Decap) {
            lines.extend(told("back here", &seen, "no answer reached its workers"));
        }
        if let Some(rtt) = figures.rtt_us {
            let millis = |micros: u64| Duration::from_micros(micros).as_secs_f64() * 1e3;
            lines.push(format!(
                "there and back in {:.2} to {:.2} ms",
                millis(rtt.min),
                millis(rtt.max)
            ));
        }
        lines
    }

    /// Fetches what our workers show, until it is as much as was sent and answered: a worker shows a packet after it
    /// has sent it, which may be after the answer has come.
    async fn fetch(&mut self, sent: u32, answered: u32) {
        for _ in 0..LOOKS {
            let Some(capture) = &mut self.capture else {
                return;
            };
            let mut bytes = Vec::new();
            capture.take(&mut bytes, ENOUGH);
            let mut rest = bytes.as_slice();
            while let Ok((record, _, after)) = Record::decode(rest) {
                self.records.push(record);
                rest = after;
            }
            if self.count(Direction::Encap) >= sent && self.count(Direction::Decap) >= answered {
                return;
            }
            sleep(LOOK_EVERY).await;
        }
    }

    fn count(&self, direction: Direction) -> u32 {
        self.marked(direction).map(|record| record.packets).sum()
    }

    fn marked(&self, direction: Direction) -> impl Iterator<Item = &Record> {
        let len = u32::from(self.len);
        let marked = move |record: &&Record| record.direction == direction && record.len == len;
        self.records.iter().filter(marked)
    }

    /// What our workers did with the packets of one direction: how many had which outcome.
    fn seen(&self, direction: Direction) -> Option<BTreeMap<String, u32>> {
        self.capture.as_ref()?;
        let mut seen = BTreeMap::new();
        for record in self.marked(direction) {
            *seen.entry(Outcome(record).to_string()).or_default() += record.packets;
        }
        Some(seen)
    }
}

fn told(whose: &str, seen: &BTreeMap<String, u32>, none: &str) -> Vec<String> {
    if seen.is_empty() {
        return vec![format!("{whose}: {none}")];
    }
    let line = |(outcome, count): (&String, &u32)| format!("{whose}: {count} {outcome}");
    seen.iter().map(line).collect()
}
