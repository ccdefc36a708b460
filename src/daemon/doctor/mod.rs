//! Owns the examination of peers that `loden doctor` shows: what is looked at, in which order, and how long. Never
//! concludes anything; `debug::doctor` does.

mod examine;
mod mesh;

use std::net::{IpAddr, SocketAddr};
use std::num::NonZero;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt as _};
use serde::Serialize;

use mesh::Row;

use super::Daemon;
use super::probes::LastAdmission;
use super::renewal::Held;
use super::session::Session;
use super::traffic::Admitting;
use crate::backend::kernel::Kernel;
use crate::backend::preflight;
use crate::backend::udp;
use crate::debug::doctor::{Finding, Way};
use crate::lease::Lease;
use crate::probe::directory::Peer;
use crate::probe::{Directory, Figures, Sizes};
use crate::store::LeaseStore;

/// Peers that are examined in one go. More take longer than anybody waits.
const MOST: usize = 64;

/// Of these, at a time: each sends ten probes in two tenths of a second.
const AT_A_TIME: usize = 16;

/// How long answers are waited for.
const PATIENCE: Duration = Duration::from_millis(500);

/// What a doctor finds.
#[derive(Debug, Serialize)]
pub(super) struct Document {
    /// Nothing is wrong.
    healthy: bool,
    /// Peers there are.
    peers_in_all: usize,
    took_ms: u64,
    /// What is wrong with this node.
    node: Vec<String>,
    peers: Vec<PeerDocument>,
    /// How nodes reach each other, as they say.
    #[serde(skip_serializing_if = "Option::is_none")]
    mesh: Option<Vec<Row>>,
}

#[derive(Debug, Serialize)]
struct PeerDocument {
    subnets: String,
    public: Option<IpAddr>,
    transport: Option<String>,
    /// What is wrong.
    findings: Vec<Finding>,
    /// What is worth knowing.
    notes: Vec<String>,
    overlay: Figures,
    #[serde(skip_serializing_if = "Option::is_none")]
    overlay_echo: Option<Figures>,
    direct: Figures,
    #[serde(skip_serializing_if = "Option::is_none")]
    underlay: Option<Figures>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sizes: Option<Sizes>,
}

/// Everything that an examination needs of the daemon.
pub(super) struct Examination {
    port: u16,
    directory: Arc<Directory>,
    admission: Arc<LastAdmission>,
    admitting: Admitting,
    mtu: u16,
    own: String,
    node: Vec<String>,
    peers_in_all: usize,
    patients: Vec<Patient>,
    mesh: bool,
}

/// A peer that is examined.
struct Patient {
    peer: Arc<Peer>,
    public: Option<IpAddr>,
    /// Where the tunnel's datagrams go.
    endpoint: Option<SocketAddr>,
    transport: Option<String>,
    /// Why there is none.
    unserved: Option<String>,
    way: Way,
    clashes: Vec<String>,
}

/// Takes down what only the daemon's loop knows. `only` is an address of the peer that is asked about.
pub(super) async fn begin<S: LeaseStore, K: Kernel>(
    daemon: &Daemon<'_, S, K>,
    session: &Session,
    held: &Held,
    only: Option<IpAddr>,
    mesh: bool,
) -> Result<Examination, String> {
    let port = daemon.probes.options.port.map(NonZero::get).ok_or(
        "the daemon runs with --probe-port 0, so it neither asks nor answers: start it without",
    )?;
    let registration = &session.registration;
    let own_public: Vec<IpAddr> = registration.ends.iter().map(|end| end.public).collect();
    let is_meant = |lease: &&Lease| match only {
        None => true,
        Some(addr) => {
            lease.attrs.node() == Some(addr)
                || udp::nets(&lease.subnets)
                    .iter()
                    .any(|net| net.contains(&addr))
        }
    };
    let mut leases: Vec<&Lease> = session.peers.leases().filter(is_meant).collect();
    if let (Some(addr), true) = (only, leases.is_empty()) {
        return Err(format!(
            "{addr} is nobody's: give the public IP of a peer, or an address in its subnet"
        ));
    }
    // Those that are known to be in trouble first.
    let history = |lease: &Lease| session.directory.peer_of(&lease.subnets);
    leases.sort_by_cached_key(|lease| {
        let degraded = history(lease).is_some_and(|peer| peer.history().state().is_degraded());
        std::cmp::Reverse(degraded)
    });
    let mut patients = Vec::new();
    for lease in leases.into_iter().take(MOST) {
        let Some(peer) = session.directory.peer_of(&lease.subnets) else {
            continue;
        };
        let public = registration
            .plan
            .endpoint_of(&lease.attrs)
            .map_or_else(|| lease.attrs.node(), |endpoint| Some(endpoint.ip()));
        let mut clashes = Vec::new();
        if let Some(public) = public {
            let others = session.peers.leases().filter(|other| {
                other.subnets != lease.subnets && other.attrs.node() == Some(public)
            });
            clashes.extend(
                others.map(|other| format!("lease {} publishes {public}, too", other.subnets)),
            );
            if own_public.contains(&public) {
                clashes.push(format!("{public} is this node's own"));
            }
        }
        patients.push(Patient {
            way: way(daemon.kernel, public).await,
            public,
            endpoint: registration.plan.endpoint_of(&lease.attrs),
            transport: session.transport_of(&lease.subnets),
            unserved: session.why_unserved(&lease.subnets),
            clashes,
            peer,
        });
    }
    let mut node = session.missing(held);
    let settings = preflight::settings(daemon.kernel, &registration.config);
    node.extend(settings.iter().map(ToString::to_string));
    Ok(Examination {
        port,
        directory: Arc::clone(&session.directory),
        admission: Arc::clone(&daemon.probes.admission),
        admitting: Admitting::of(&daemon.options.traffic, registration),
        mtu: registration.plan.mtu().get(),
        own: registration.lease.subnets.to_string(),
        node,
        peers_in_all: session.peers.leases().len(),
        patients,
        mesh,
    })
}

/// Whether the kernel has a way to a node.
async fn way(kernel: &impl Kernel, public: Option<IpAddr>) -> Way {
    let Some(public) = public else {
        return Way::Closed("its lease has no address of our underlay's family".to_owned());
    };
    match kernel.route_to(public).await {
        Ok(Some(reach)) => match kernel.link_at(reach.link).await {
            Ok(Some(link)) if !link.up => {
                Way::Closed(format!("{} towards {public} is down", link.name))
            }
            Ok(_) | Err(_) => Way::Open,
        },
        Ok(None) => Way::Closed(format!("the kernel has no route to {public}")),
        Err(error) => Way::Closed(format!("the route to {public} refuses: {}", error.source)),
    }
}

impl Examination {
    /// Examines the peers, and says what is wrong.
    pub(super) async fn run(mut self) -> Document {
        let begun = Instant::now();
        let closed = self.admission.closed(&self.admitting).await;
        let mut node = std::mem::take(&mut self.node);
        node.extend(
            closed
                .as_ref()
                .map(|rule| format!("this node's firewall drops the tunnel's datagrams: {rule}")),
        );
        let mut examined = Vec::new();
        for patient in &self.patients {
            examined.push(self.examine(patient, closed.clone()));
        }
        let peers: Vec<PeerDocument> = stream::iter(examined).buffered(AT_A_TIME).collect().await;
        let mesh = if self.mesh {
            Some(self.mesh().await)
        } else {
            None
        };
        Document {
            healthy: node.is_empty()
                && peers.iter().all(|peer| peer.findings.is_empty())
                && mesh.iter().flatten().all(Row::is_well),
            peers_in_all: self.peers_in_all,
            took_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            node,
            peers,
            mesh,
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
