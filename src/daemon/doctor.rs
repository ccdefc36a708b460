//! Owns the examination of peers that `loden doctor` shows: what is looked at, in which order, and how long. Never
//! concludes anything; `debug::doctor` does.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZero;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt as _};
use serde::Serialize;
use tokio::net::UdpSocket;
use tokio::time::{sleep, timeout};

use super::Daemon;
use super::probes::LastAdmission;
use super::renewal::Held;
use super::session::Session;
use super::traffic::Admitting;
use crate::backend::kernel::Kernel;
use crate::backend::preflight;
use crate::backend::udp;
use crate::config::Backend;
use crate::debug::doctor::{Evidence, Finding, LOSSY, Said, Way, diagnose};
use crate::lease::Lease;
use crate::probe::directory::Peer;
use crate::probe::prober::{Prober, Round};
use crate::probe::{Directory, Figures, Path, Sizes};
use crate::store::LeaseStore;
use crate::wire::probe::{Probe, Reach, Report};

/// Peers that are examined in one go. More take longer than anybody waits.
const MOST: usize = 64;

/// Of these, at a time: each sends ten probes in two tenths of a second.
const AT_A_TIME: usize = 16;

/// How long answers are waited for.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long a peer is listened for that may not hear us: who is asked for a report probes the asker at its prober's
/// next tick.
const LISTEN: Duration = Duration::from_secs(4);

/// Peers whose own view is asked for.
const MOST_OF_MESH: usize = 256;

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

/// How one node reaches the others.
#[derive(Debug, Serialize)]
struct Row {
    node: String,
    /// Why there is nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    silent: Option<&'static str>,
    cells: Vec<Cell>,
}

#[derive(Debug, Serialize)]
struct Cell {
    peer: String,
    reach: &'static str,
    loss_percent: u8,
    rtt_us: Option<u64>,
}

/// Everything that an examination needs of the daemon.
pub(super) struct Examination {
    port: u16,
    directory: Arc<Directory>,
    admission: Arc<LastAdmission>,
    admitting: Admitting,
    mtu: u16,
    ways_are_chosen: bool,
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
        ways_are_chosen: matches!(
            &registration.config.backend,
            Backend::Vxlan(vxlan) if vxlan.auto || vxlan.direct_routing
        ),
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
        let is_well = |row: &Row| {
            let bad = [Reach::Loses.name(), Reach::Silent.name()];
            row.silent.is_none() && row.cells.iter().all(|cell| !bad.contains(&cell.reach))
        };
        Document {
            healthy: node.is_empty()
                && peers.iter().all(|peer| peer.findings.is_empty())
                && mesh.iter().flatten().all(is_well),
            peers_in_all: self.peers_in_all,
            took_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            node,
            peers,
            mesh,
        }
    }

    async fn examine(&self, patient: &Patient, closed_here: Option<String>) -> PeerDocument {
        let begun = Instant::now();
        let targets = self.directory.targets(&patient.peer);
        let overlay_addr = targets.first().copied();
        let past = |count| Round {
            count,
            patience: PATIENCE,
            ..Round::default()
        };
        let path = Path::default();
        let (mut overlay, mut direct, underlay, before) = tokio::join!(
            self.probes(overlay_addr, &path, past(10)),
            self.probes(patient.public, &path, past(3)),
            self.echoes(patient.public, past(3)),
            self.ask(patient),
        );
        let mut notes = Vec::new();
        if overlay.answered == 0 && direct.answered > 0 && targets.len() > 1 {
            notes.push(
                "it has no address in the overlay yet, before its first pod: its node was probed instead"
                    .to_owned(),
            );
            direct.sender = direct.sender.or(overlay.sender);
            overlay = direct.clone();
        }
        let mut evidence = Evidence {
            subnets: patient.peer.subnets,
            way: patient.way.clone(),
            closed_here,
            clashes: patient.clashes.clone(),
            mtu: self.mtu,
            overlay_echo: None,
            unchecked: None,
            sizes: None,
            refused: false,
            said: None,
            we_hear: false,
            ways_are_chosen: self.ways_are_chosen,
            runs_it: patient.peer.runs_it(),
            overlay,
            direct,
            underlay,
        };
        if evidence.overlay.answered > 0 {
            self.measure(overlay_addr, &mut evidence).await;
        } else {
            self.look_closer(patient, overlay_addr, begun, &mut evidence)
                .await;
        }
        let after = self.ask(patient).await;
        evidence.said = after.map(|(report, said)| {
            let hears_us = said.heard.is_some_and(|heard| heard.age <= begun.elapsed());
            Said {
                before: before.map_or(report.facts, |(report, _)| report.facts),
                after: report.facts,
                sender: said.sender,
                hears_us,
            }
        });
        evidence.clashes.extend(self.moved(patient, &evidence));
        let heard = patient.peer.memory().heard;
        evidence.we_hear = heard.is_some_and(|(at, _)| at >= begun);
        let findings = diagnose(&evidence);
        notes.extend(remarks(&evidence));
        PeerDocument {
            subnets: patient.peer.subnets.to_string(),
            public: patient.public,
            transport: patient.transport.clone(),
            findings,
            notes,
            overlay: evidence.overlay,
            overlay_echo: evidence.overlay_echo,
            direct: evidence.direct,
            underlay: evidence.underlay,
            sizes: evidence.sizes,
        }
    }

    /// Whether a peer says to be at an address that is another's.
    fn moved(&self, patient: &Patient, evidence: &Evidence) -> Option<String> {
        let says = evidence.said?.after.public?;
        let public = patient.public.filter(|&public| public != says)?;
        let other = self.directory.peer_at(says)?;
        (other.subnets != patient.peer.subnets).then(|| {
            format!(
                "the node at {public} publishes {says}, which is that of lease {}",
                other.subnets
            )
        })
    }

    /// What more there is to find out of a peer that answers.
    async fn measure(&self, addr: Option<IpAddr>, evidence: &mut Evidence) {
        if evidence.overlay.loss_percent() >= LOSSY {
            // One bad moment is none.
            let again = Round {
                count: 20,
                patience: PATIENCE,
                ..Round::default()
            };
            let again = self.probes(addr, &Path::default(), again).await;
            if again.loss_percent() < evidence.overlay.loss_percent() {
                evidence.overlay = again;
            }
        }
        let Ok(mut prober) = self.prober(addr, &Path::default()).await else {
            return;
        };
        let slowest = evidence.overlay.rtt_us.map_or(0, |rtt| rtt.max);
        let patience = Duration::from_micros(4 * slowest).clamp(PATIENCE / 2, 4 * PATIENCE);
        let mut sizes = prober.sizes(self.mtu, patience).await;
        if sizes.up < Some(self.mtu) || sizes.down < Some(self.mtu) {
            // Nor is one bad sweep.
            let whole = Round {
                count: 8,
                len: self.mtu,
                full: true,
                patience,
                ..Round::default()
            };
            if prober.round(whole).await.answered > 0 {
                sizes.up = Some(self.mtu);
                sizes.down = Some(self.mtu);
            }
        }
        evidence.sizes = Some(sizes);
    }

    /// What more there is to find out of a peer from which nothing comes.
    async fn look_closer(
        &self,
        patient: &Patient,
        addr: Option<IpAddr>,
        begun: Instant,
        evidence: &mut Evidence,
    ) {
        let few = Round {
            count: 3,
            patience: PATIENCE,
            ..Round::default()
        };
        let unchecked = Path {
            unchecked: true,
            ..Path::default()
        };
        let (echo, unchecked, refused) = tokio::join!(
            self.echoes(addr, few),
            self.probes(addr, &unchecked, few),
            knock(patient.endpoint),
        );
        evidence.overlay_echo = echo;
        evidence.unchecked = Some(unchecked);
        evidence.refused = refused;
        if evidence
            .overlay_echo
            .as_ref()
            .is_some_and(|echo| echo.answered > 0)
            || refused
        {
            return;
        }
        // Which end still hears tells the direction. It probes us of its own accord.
        let is_there = evidence.direct.answered > 0 && evidence.runs_it;
        while is_there && begun.elapsed() < LISTEN {
            if patient
                .peer
                .memory()
                .heard
                .is_some_and(|(at, _)| at >= begun)
            {
                break;
            }
            sleep(PATIENCE / 5).await;
        }
    }

    async fn prober(&self, addr: Option<IpAddr>, path: &Path) -> io::Result<Prober> {
        let addr = addr.ok_or(io::ErrorKind::AddrNotAvailable)?;
        Prober::probes(&self.directory, path, SocketAddr::new(addr, self.port)).await
    }

    async fn probes(&self, addr: Option<IpAddr>, path: &Path, round: Round) -> Figures {
        match self.prober(addr, path).await {
            Ok(mut prober) => prober.round(round).await,
            Err(error) => Figures {
                errno: error.raw_os_error(),
                refused: Some(error.to_string()),
                ..Figures::default()
            },
        }
    }

    /// None where echoes may not be sent.
    async fn echoes(&self, addr: Option<IpAddr>, round: Round) -> Option<Figures> {
        let mut prober = Prober::echoes(&self.directory, &Path::default(), addr?).ok()?;
        Some(prober.round(round).await)
    }

    /// What a peer says of itself: past the overlay, or through it.
    async fn ask(&self, patient: &Patient) -> Option<(Report, Probe)> {
        let overlay = self.directory.targets(&patient.peer).first().copied();
        for addr in [patient.public, overlay] {
            if let Ok(mut prober) = self.prober(addr, &Path::default()).await
                && let Some(said) = prober.report(0, PATIENCE).await
            {
                return Some(said);
            }
        }
        None
    }

    /// What all nodes say of how they reach each other.
    async fn mesh(&self) -> Vec<Row> {
        let peers = self.directory.peers();
        let mut rows = Vec::new();
        for peer in peers.iter().take(MOST_OF_MESH) {
            rows.push(self.row(peer));
        }
        let rows: Vec<Row> = stream::iter(rows).buffered(AT_A_TIME).collect().await;
        let mut all = vec![self.own_row().await];
        all.extend(rows);
        all
    }

    async fn own_row(&self) -> Row {
        let cell = |peer: &Arc<Peer>| {
            let history = peer.history();
            Cell {
                peer: peer.subnets.to_string(),
                reach: history.state().reach.name(),
                loss_percent: history.loss_percent(),
                rtt_us: history.rtt().map(micros),
            }
        };
        Row {
            node: self.own.clone(),
            silent: None,
            cells: self.directory.peers().iter().map(cell).collect(),
        }
    }

    /// A peer's own view, in as many parts as it takes.
    async fn row(&self, peer: &Arc<Peer>) -> Row {
        let mut row = Row {
            node: peer.subnets.to_string(),
            silent: Some("it does not say: it runs another program, or is not reached"),
            cells: Vec::new(),
        };
        let targets = self.directory.targets(peer).into_iter();
        for addr in targets.chain(peer.public.first().copied()) {
            let Ok(mut prober) = self.prober(Some(addr), &Path::default()).await else {
                continue;
            };
            loop {
                let first = u32::try_from(row.cells.len()).unwrap_or(u32::MAX);
                let Some((report, _)) = prober.report(first, PATIENCE).await else {
                    break;
                };
                row.silent = None;
                let more = usize::try_from(report.facts.peers)
                    .unwrap_or(0)
                    .min(MOST_OF_MESH);
                let entries = report.entries.iter().map(|entry| Cell {
                    peer: entry.subnet.to_string(),
                    reach: entry.reach.name(),
                    loss_percent: entry.loss,
                    rtt_us: entry.rtt.map(micros),
                });
                let before = row.cells.len();
                row.cells.extend(entries);
                if row.cells.len() >= more || row.cells.len() == before {
                    return row;
                }
            }
        }
        row
    }
}

/// Whether a node says that nobody listens at its tunnel's port.
async fn knock(endpoint: Option<SocketAddr>) -> bool {
    let Some(endpoint) = endpoint else {
        return false;
    };
    let any: IpAddr = match endpoint.ip() {
        IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let knocked = async {
        let socket = UdpSocket::bind((any, 0)).await?;
        socket.connect(endpoint).await?;
        // No packet of any version of IP: whoever listens drops it.
        socket.send(&[0]).await?;
        socket.recv(&mut [0]).await
    };
    let answer = timeout(PATIENCE, knocked).await;
    matches!(answer, Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused)
}

/// What is worth knowing of a peer, and no fault.
fn remarks(evidence: &Evidence) -> Vec<String> {
    let mut remarks = Vec::new();
    let echoes = evidence
        .overlay_echo
        .as_ref()
        .is_some_and(|echo| echo.answered > 0);
    if evidence.overlay.answered == 0 && echoes && !evidence.runs_it {
        remarks.push(
            "it answers echoes through the overlay and no probes: it runs another program, or its firewall closes \
             the probes' port"
                .to_owned(),
        );
    }
    if let Some(sizes) = evidence.sizes
        && sizes.told
        && sizes.up.min(sizes.down) < Some(sizes.tried)
    {
        remarks.push(format!(
            "packets longer than {} bytes are refused on the way, and their senders are told",
            sizes.up.min(sizes.down).unwrap_or_default()
        ));
    }
    remarks
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
