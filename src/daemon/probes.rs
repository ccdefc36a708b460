//! Owns the daemon's part in probing: the directory of peers, answering them, and what is reported to them. Never
//! decides what a finding means.

use std::num::NonZero;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::mpsc;

use super::ProbeOptions;
use super::session::Session;
use crate::backend::udp;
use crate::lease::Subnets;
use crate::probe::background::sentence;
use crate::probe::directory::Peer;
use crate::probe::responder::Asked;
use crate::probe::{self, Background, Directory, Responder, Tally};
use crate::telemetry::metrics;
use crate::wire::probe::{Entry, Facts, Health, Report};

/// Reports that may wait for the daemon's loop.
const REPORTS: usize = 16;

/// What outlives a session.
pub(super) struct Probes {
    pub(super) directory: Arc<Directory>,
    options: ProbeOptions,
    responder: Option<Responder>,
    background: Option<Background>,
    pub(super) tally: Arc<Tally>,
    reports: mpsc::Receiver<Asked>,
    sender: mpsc::Sender<Asked>,
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
        match Responder::start(port, &self.directory, &self.sender) {
            Ok(responder) => self.responder = Some(responder),
            Err(error) => tracing::warn!(
                "probes of peers are not answered: UDP port {port}: {error}: free the port, or give all nodes \
                 another --probe-port"
            ),
        }
    }

    /// The next request for a report.
    pub(super) async fn asked(&mut self) -> Option<Asked> {
        self.reports.recv().await
    }
}

/// What a peer is told about us and our peers.
pub(super) fn report(session: &Session, asked: &Asked) -> Report {
    let mut health = Health::default();
    if session.carrier.is_none() {
        health = health.with(Health::TUNNEL_DOWN);
    }
    let peers = session.directory.peers();
    let from = usize::try_from(asked.first).unwrap_or(usize::MAX);
    let entry = |peer: &Arc<Peer>| {
        let history = peer.history();
        Some(Entry {
            subnet: first_net(&peer.subnets)?,
            reach: history.state().reach,
            loss: history.loss_percent(),
            rtt: history.rtt(),
        })
    };
    let entries = peers.iter().skip(from).take(asked.room);
    Report {
        facts: Facts {
            health,
            public: Some(session.registration.choice().public),
            received: None,
            sent: None,
            bad_checksums: 0,
            peers: u32::try_from(peers.len()).unwrap_or(u32::MAX),
        },
        first: asked.first,
        entries: entries.filter_map(entry).collect(),
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
