//! Owns the daemon's part in probing: the directory of peers, answering them, and what is reported to them, or told of
//! their traces. Never decides what a finding means.

use std::fs;
use std::num::NonZero;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::{Mutex, mpsc, oneshot};

use super::explain::Lookouts;
use super::session::Session;
use super::traffic::Admitting;
use super::{Daemon, ProbeOptions};
use crate::backend::kernel::{Kernel, PROBE_MARK};
use crate::backend::udp;
use crate::firewall::Admission;
use crate::lease::Subnets;
use crate::probe::background::sentence;
use crate::probe::directory::Peer;
use crate::probe::responder::{Asked, Told, Wish};
use crate::probe::{self, Background, Directory, Responder, Tally};
use crate::store::LeaseStore;
use crate::telemetry::metrics;
use crate::wire::probe::{Entry, Facts, Health, Report};

/// Reports that may wait for the daemon's loop.
const REPORTS: usize = 16;

/// Asking the firewall runs a program.
const ASK_FIREWALL_EVERY: Duration = Duration::from_secs(2);

/// What outlives a session.
pub(super) struct Probes {
    pub(super) directory: Arc<Directory>,
    pub(super) options: ProbeOptions,
    responder: Option<Responder>,
    background: Option<Background>,
    pub(super) tally: Arc<Tally>,
    reports: mpsc::Receiver<Asked>,
    sender: mpsc::Sender<Asked>,
    pub(super) admission: Arc<LastAdmission>,
    lookouts: Lookouts,
}

impl Probes {
    pub(super) fn new(options: ProbeOptions) -> Self {
        let (sender, reports) = mpsc::channel(REPORTS);
        Self {
            directory: Arc::new(Directory::new(probe::random())),
            options,
            responder: None,
            background: None,
            tally: Arc::default(),
            reports,
            sender,
            admission: Arc::default(),
            lookouts: Lookouts::default(),
        }
    }

    /// Answers probes from now on, as the owner of these subnets. A daemon that does not is no worse a tunnel.
    pub(super) fn start(&mut self, own: &Subnets) {
        self.directory.lease(own);
        let Some(port) = self.options.port.map(NonZero::get) else {
            return;
        };
        if self.options.background && self.background.is_none() {
            self.background = Some(Background::start(port, &self.directory, &self.tally));
        }
        if self.responder.is_some() {
            return;
        }
        match Responder::start(port, &self.directory, &self.sender, PROBE_MARK) {
            Ok(responder) => self.responder = Some(responder),
            Err(error) => tracing::warn!(
                "probes of peers are not answered: UDP port {port}: {error}: free the port, or give all nodes \
                 another --probe-port"
            ),
        }
    }

    /// The next request that only the daemon can answer.
    pub(super) async fn asked(&mut self) -> Option<Asked> {
        self.reports.recv().await
    }
}

/// Answers what a peer asks.
pub(super) fn answer<S: LeaseStore, K: Kernel>(
    daemon: &mut Daemon<'_, S, K>,
    session: &Session,
    Asked { peer, wish, answer }: Asked,
) {
    match wish {
        Wish::Report { first, room } => report(daemon, session, &peer, (first, room), answer),
        Wish::Watch { nonce, order } => {
            // Nobody is answered without one.
            let port = daemon.probes.options.port.map_or(0, NonZero::get);
            let lookouts = &mut daemon.probes.lookouts;
            lookouts.order(session, &peer, (nonce, order), port, answer);
        }
    }
}

/// Reports on us and on so many of our peers, in a task: the firewall takes its time.
fn report<S: LeaseStore, K: Kernel>(
    daemon: &Daemon<'_, S, K>,
    session: &Session,
    asker: &Peer,
    (first, room): (u32, usize),
    answer: oneshot::Sender<Told>,
) {
    let mut report = Report {
        facts: facts(daemon.kernel, session, asker),
        first,
        entries: Vec::new(),
    };
    let peers = session.directory.peers();
    let from = usize::try_from(first).unwrap_or(usize::MAX);
    let entry = |peer: &Arc<Peer>| {
        let history = peer.history();
        Some(Entry {
            subnet: first_net(&peer.subnets)?,
            reach: history.state().reach,
            loss: history.loss_percent(),
            rtt: history.rtt(),
        })
    };
    let entries = peers.iter().skip(from).take(room);
    report.entries = entries.filter_map(entry).collect();
    let admitting = Admitting::of(&daemon.options.traffic, &session.registration);
    let admission = Arc::clone(&daemon.probes.admission);
    tokio::spawn(async move {
        if admission.closed(&admitting).await.is_some() {
            report.facts.health = report.facts.health.with(Health::FIREWALL_CLOSED);
        }
        // The asker may have given up.
        let _gone = answer.send(Told::Report(report));
    });
}

/// What we say of ourselves to a peer.
fn facts(kernel: &impl Kernel, session: &Session, asker: &Peer) -> Facts {
    let is_off = |path| kernel.setting(path).is_some_and(|value| value == "0");
    let registration = &session.registration;
    let off = (registration.config.ipv4.is_some() && is_off("ipv4/ip_forward"))
        || (registration.config.ipv6.is_some() && is_off("ipv6/conf/all/forwarding"));
    let mut health = Health::default();
    for (wrong, what) in [
        (session.carrier.is_none(), Health::TUNNEL_DOWN),
        (off, Health::NOT_FORWARDING),
    ] {
        if wrong {
            health = health.with(what);
        }
    }
    let mut leases = session.peers.leases();
    let lease = leases.find(|lease| lease.subnets == asker.subnets);
    let endpoint = lease.and_then(|lease| registration.plan.endpoint_of(&lease.attrs));
    let counted = session.carrier.as_ref().and_then(|carrier| {
        let mut peers = carrier
            .tunnels
            .iter()
            .flat_map(|tunnel| tunnel.status().peers);
        peers.find(|peer| Some(peer.addr) == endpoint)
    });
    Facts {
        health,
        public: Some(registration.choice().public),
        received: counted.as_ref().map(|peer| peer.received),
        sent: counted.as_ref().map(|peer| peer.sent),
        bad_checksums: bad_checksums(),
        peers: u32::try_from(session.directory.peers().len()).unwrap_or(u32::MAX),
        sends_by: session.directory.sends_by(asker),
    }
}

/// Datagrams that the kernel dropped in this network namespace for a wrong checksum (proc(5), `/proc/net/snmp`).
pub(super) fn bad_checksums() -> u64 {
    const COUNTER: &str = "InCsumErrors";
    // The process may be in another namespace than this thread.
    let v4 = fs::read_to_string("/proc/thread-self/net/snmp").unwrap_or_default();
    let mut udp = v4.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let named = udp.next().unwrap_or_default().split(' ');
    let values = udp.next().unwrap_or_default().split(' ');
    let v4 = named.zip(values).find(|(name, _)| *name == COUNTER);
    let v4 = v4.and_then(|(_, value)| value.parse::<u64>().ok());
    let v6 = fs::read_to_string("/proc/thread-self/net/snmp6").unwrap_or_default();
    let v6 = v6.lines().find_map(|line| {
        let (name, value) = line.split_once(char::is_whitespace)?;
        (name.strip_prefix("Udp6") == Some(COUNTER)).then(|| value.trim().parse::<u64>().ok())?
    });
    v4.unwrap_or(0) + v6.unwrap_or(0)
}

/// What the host's firewall said last; asked again no sooner than [`ASK_FIREWALL_EVERY`].
#[derive(Default)]
pub(super) struct LastAdmission(Mutex<Option<(Instant, Option<String>)>>);

impl LastAdmission {
    /// The rule that closes the tunnel's port, if one does.
    pub(super) async fn closed(&self, admitting: &Admitting) -> Option<String> {
        let mut last = self.0.lock().await;
        if let Some((at, closed)) = last.as_ref()
            && at.elapsed() < ASK_FIREWALL_EVERY
        {
            return closed.clone();
        }
        let closed = match admitting.ask().await {
            Ok(Admission::Closed(refusal)) => Some(refusal.to_string()),
            Ok(Admission::Open | Admission::Tracked(_) | Admission::Established(_)) => None,
            Err(error) => {
                tracing::debug!("{error}");
                None
            }
        };
        *last = Some((Instant::now(), closed.clone()));
        closed
    }
}

fn first_net(subnets: &Subnets) -> Option<ipnet::IpNet> {
    udp::nets(subnets).into_iter().next()
}

/// How a peer is reached, for the status.
#[derive(Serialize)]
pub(super) struct PeerDocument {
    /// `unknown`, `answers`, `echoes`, `loses`, `silent`.
    reach: &'static str,
    /// Short packets pass and packets of full size do not.
    narrow: bool,
    /// It is not as it should be.
    degraded: bool,
    /// The same in words.
    sentence: String,
    loss_percent: u8,
    rtt_us: Option<u64>,
    clock_offset_us: Option<i64>,
    /// Since the last visit.
    probed_seconds_ago: Option<u64>,
    /// Since the state has been what it is.
    state_seconds: Option<u64>,
    /// Since anything of it came through the overlay, and by what.
    heard_seconds_ago: Option<u64>,
    heard_by: Option<&'static str>,
    /// Since it heard anything of us through the overlay, as it last said.
    hears_us_seconds_ago: Option<u64>,
}

impl PeerDocument {
    pub(super) fn of(peer: &Peer) -> Self {
        let (history, memory) = (peer.history(), peer.memory());
        let state = history.state();
        let seconds = |at: Option<Instant>| at.map(|at| at.elapsed().as_secs());
        let hears = memory.claimed.and_then(|(heard, at)| {
            let age = heard?.age + at.elapsed();
            Some(age.as_secs())
        });
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Self {
            reach: state.reach.name(),
            narrow: state.narrow,
            degraded: state.is_degraded(),
            sentence: sentence(state, history.loss_percent()),
            loss_percent: history.loss_percent(),
            rtt_us: history.rtt().map(micros),
            clock_offset_us: history.clock_offset_us(),
            probed_seconds_ago: seconds(history.visited()),
            state_seconds: seconds(history.since()),
            heard_seconds_ago: seconds(memory.heard.map(|(at, _)| at)),
            heard_by: memory.heard.map(|(_, via)| via.name()),
            hears_us_seconds_ago: hears,
        }
    }
}

/// The figures for `/metrics`.
pub(super) fn figures(probes: &Probes) -> metrics::Probes {
    let mut figures = metrics::Probes {
        visits: probes.tally.visits(),
        answered: probes.tally.answered(),
        rtt: probes.tally.rtt(),
        ..metrics::Probes::default()
    };
    for peer in probes.directory.peers() {
        let state = peer.history().state();
        *figures.reach.entry(state.reach.name()).or_default() += 1;
        figures.degraded += u64::from(state.is_degraded());
    }
    figures
}
