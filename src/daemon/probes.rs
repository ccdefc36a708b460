//! Owns the daemon's part in probing: the directory of peers, answering them, and what is reported to them. Never
//! decides what a finding means.

use std::num::NonZero;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::ProbeOptions;
use super::session::Session;
use crate::lease::Subnets;
use crate::probe::responder::Asked;
use crate::probe::{self, Directory, Responder};
use crate::wire::probe::{Facts, Health, Report};

/// Reports that may wait for the daemon's loop.
const REPORTS: usize = 16;

/// What outlives a session.
pub(super) struct Probes {
    pub(super) directory: Arc<Directory>,
    options: ProbeOptions,
    responder: Option<Responder>,
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
    let peers = session.peers.leases().len();
    Report {
        facts: Facts {
            health,
            public: Some(session.registration.choice().public),
            received: None,
            sent: None,
            bad_checksums: 0,
            peers: u32::try_from(peers).unwrap_or(u32::MAX),
        },
        first: asked.first,
        entries: Vec::new(),
    }
}
