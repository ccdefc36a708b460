//! Owns the document that `loden status` shows. Never changes anything.

use std::net::{IpAddr, SocketAddr};
use std::time::{Instant, SystemTime};

use ipnet::IpNet;
use serde::Serialize;

use super::Daemon;
use super::carrier::Carrier;
use super::checksums::ChecksumDocument;
use super::guard::GuardDocument;
use super::past::WayDocument;
use super::probes;
use super::renewal::Held;
use super::session::Session;
use super::traffic::Traffic;
use super::tunnel::Tunnel;
use crate::backend::kernel::{Kernel, Link};
use crate::backend::udp;
use crate::datapath::{self, DropReason};
use crate::iface::{Candidate, Choice};
use crate::store::LeaseStore;
use crate::telemetry::metrics::{Snapshot, Watch};

#[derive(Serialize)]
struct Document<'a> {
    version: &'static str,
    pid: u32,
    uptime_seconds: u64,
    /// The tunnel carries packets.
    ready: bool,
    /// Why not.
    down: Option<&'a str>,
    /// What carries the packets.
    backend: &'static str,
    /// How often it was opened again.
    reopened: u64,
    subnet_file: String,
    interface: &'a Choice,
    candidates: &'a [Candidate],
    /// Where datagrams of peers arrive, for the backends that have any.
    bind: Option<SocketAddr>,
    lease: LeaseDocument,
    devices: Vec<DeviceDocument>,
    peers: Vec<PeerDocument>,
    /// Leases and files that are not used, and why.
    refused: Vec<RefusedDocument>,
    /// How far the store's news has come.
    watch: Watch,
    /// What on the node competes with the overlay, or changed under it.
    conflicts: Vec<String>,
    /// Every reason for a drop, with both directions' counts.
    drops: Vec<DropDocument>,
    datapath: datapath::Status,
    /// Who may send to the kernel's VXLAN device.
    source_check: Option<GuardDocument>,
    /// Whether what the kernel's VXLAN devices send arrives whole.
    checksums: Vec<ChecksumDocument>,
}

#[derive(Serialize)]
struct LeaseDocument {
    subnets: Vec<IpNet>,
    networks: Vec<IpNet>,
    public: IpAddr,
    mtu: u16,
    /// By the wall clock; none for a reservation.
    expires_in_seconds: Option<u64>,
}

#[derive(Serialize)]
struct DeviceDocument {
    name: String,
    mtu: u32,
    up: bool,
    tx_queue_len: u32,
    tx_dropped: u64,
}

#[derive(Serialize)]
struct PeerDocument {
    subnets: Vec<IpNet>,
    public: Option<IpAddr>,
    endpoint: Option<SocketAddr>,
    /// How packets reach it; none if they do not.
    transport: Option<String>,
    /// Ways that probes have proven and that are used therefore.
    proven: Vec<WayDocument>,
    /// Better ways that are not used, and why.
    rejected: Vec<WayDocument>,
    ecn: bool,
    sent: u64,
    received: u64,
    dropped: u64,
    path_mtu: Option<u16>,
    gso_withdrawn: Option<String>,
    /// What probes found; none while the peer is not known to the prober.
    probe: Option<probes::PeerDocument>,
}

#[derive(Serialize)]
struct RefusedDocument {
    what: String,
    why: String,
}

#[derive(Serialize)]
struct DropDocument {
    reason: &'static str,
    encap: u64,
    decap: u64,
    remedy: &'static str,
    /// Where it is explained.
    document: &'static str,
}

/// The daemon at this moment.
pub(super) async fn document<S: LeaseStore, K: Kernel>(
    daemon: &Daemon<'_, S, K>,
    session: &Session,
    expires: Option<SystemTime>,
) -> impl Serialize {
    let registration = &session.registration;
    let carrier = session.carrier.as_ref();
    // First, for the counters.
    let source_check = session.guard.document().await;
    let datapath = datapath_of(session);
    let mut devices = Vec::new();
    for index in carrier.into_iter().flat_map(Carrier::devices) {
        let link = daemon.kernel.link_at(index).await.ok().flatten();
        devices.extend(link.map(device));
    }
    let left = |end: SystemTime| end.duration_since(SystemTime::now()).unwrap_or_default();
    Document {
        version: env!("CARGO_PKG_VERSION"),
        pid: std::process::id(),
        uptime_seconds: daemon.started.elapsed().as_secs(),
        ready: carrier.is_some(),
        backend: registration.plan.name(),
        down: session.down.as_deref(),
        reopened: daemon.reopened,
        subnet_file: daemon.options.subnet_file.display().to_string(),
        interface: registration.choice(),
        candidates: &registration.candidates,
        bind: registration.plan.bind(),
        lease: LeaseDocument {
            subnets: udp::nets(&registration.lease.subnets),
            networks: udp::networks(&registration.config),
            public: registration.choice().public,
            mtu: registration.plan.mtu().get(),
            expires_in_seconds: expires.map(|end| left(end).as_secs()),
        },
        devices,
        peers: peers(session, &datapath),
        refused: refused(session),
        watch: watch(session),
        conflicts: registration
            .conflicts
            .iter()
            .map(ToString::to_string)
            .chain(session.moved.clone())
            .chain(session.env_behind.clone())
            .collect(),
        drops: drops(&datapath.total),
        datapath,
        source_check,
        checksums: session.checksums.documents(),
    }
}

/// The figures for `/metrics`.
pub(super) fn figures<S: LeaseStore, K: Kernel>(
    daemon: &Daemon<'_, S, K>,
    session: &Session,
    held: &Held,
) -> Snapshot {
    let left = |end: SystemTime| end.duration_since(SystemTime::now()).unwrap_or_default();
    let counts = &session.counts;
    let rules = session
        .traffic
        .as_ref()
        .map(Traffic::kept)
        .unwrap_or_default();
    Snapshot {
        ready: session.missing(held).is_empty(),
        uptime_seconds: daemon.started.elapsed().as_secs(),
        lease_expires_seconds: held.expires.get().map(|end| left(end).as_secs()),
        lease_lost: held.lost.get(),
        lease_renewals: held.renewals.get(),
        lease_renewal_failures: held.failures.get(),
        lease_reacquired: held.reacquired.get(),
        store_silence_seconds: counts.store_heard.elapsed().as_secs(),
        store_events: counts.store_events,
        store_problems: counts.store_problems,
        peers: session.peers.leases().len() as u64,
        leases_refused: session.peers.refused().len() as u64,
        leases_held: session.hold.len() as u64,
        reopened: daemon.reopened,
        watch: watch(session),
        device_looks: counts.looks,
        device_repairs: counts.repairs,
        rules_looks: rules.looks,
        rules_repairs: rules.repairs,
        probes: probes::figures(&daemon.probes),
        datapath: datapath_of(session),
    }
}

fn datapath_of(session: &Session) -> datapath::Status {
    let carrier = session.carrier.as_ref();
    let tunnels = carrier.map_or(&[][..], |carrier| carrier.tunnels.as_slice());
    let all = tunnels.iter().map(Tunnel::status);
    let mut status = all.reduce(datapath::Status::beside).unwrap_or_default();
    // What the kernel drops for the same reason as we would.
    for (reason, count) in session.guard.drops() {
        *status.total.decap.drops.entry(reason.name()).or_default() += count;
    }
    status
}

fn watch(session: &Session) -> Watch {
    let publication = &session.publication;
    let progress = publication.progress();
    Watch {
        revisions_behind: progress.revisions_behind(),
        oldest_seconds: progress.oldest(Instant::now()).as_secs_f64(),
        lag: publication.lag(),
        publications: publication.cost(),
    }
}

fn device(link: Link) -> DeviceDocument {
    DeviceDocument {
        name: link.name,
        mtu: link.mtu,
        up: link.up,
        tx_queue_len: link.tx_queue_len,
        tx_dropped: link.tx_dropped,
    }
}

fn peers(session: &Session, datapath: &datapath::Status) -> Vec<PeerDocument> {
    let counters: std::collections::HashMap<SocketAddr, &datapath::status::Peer> = datapath
        .peers
        .iter()
        .map(|peer| (peer.addr, peer))
        .collect();
    let known = session.directory.peers();
    let known: std::collections::HashMap<_, _> =
        known.iter().map(|peer| (peer.subnets, peer)).collect();
    let leases = session.peers.leases();
    let peer = |lease: &crate::lease::Lease| {
        let endpoint = session.registration.plan.endpoint_of(&lease.attrs);
        let seen = endpoint.and_then(|addr| counters.get(&addr));
        PeerDocument {
            subnets: udp::nets(&lease.subnets),
            public: lease.attrs.node(),
            endpoint,
            transport: session.transport_of(&lease.subnets),
            proven: session.carrier.as_ref().map_or_else(Vec::new, |carrier| {
                session.ways.proven(&carrier.report, lease)
            }),
            rejected: session.carrier.as_ref().map_or_else(Vec::new, |carrier| {
                let ways = &session.ways;
                ways.rejected(&session.registration, &carrier.report, lease)
            }),
            ecn: lease.extension.ecn,
            sent: seen.map_or(0, |peer| peer.sent),
            received: seen.map_or(0, |peer| peer.received),
            dropped: seen.map_or(0, |peer| peer.dropped),
            path_mtu: seen.and_then(|peer| peer.path_mtu),
            gso_withdrawn: seen.and_then(|peer| peer.gso_withdrawn.clone()),
            probe: known
                .get(&lease.subnets)
                .map(|peer| probes::PeerDocument::of(peer)),
        }
    };
    leases.map(peer).collect()
}

fn refused(session: &Session) -> Vec<RefusedDocument> {
    let leases = session.peers.refused().map(|refused| RefusedDocument {
        what: format!("lease {}", refused.lease.subnets),
        why: refused.reason.to_string(),
    });
    let unserved = session.unserved().map(|refused| RefusedDocument {
        what: format!("lease {}", refused.lease),
        why: refused.why.clone(),
    });
    let commands = session.command_failures();
    let commands = commands.iter().map(|(subnets, why)| RefusedDocument {
        what: format!("lease {subnets}"),
        why: why.clone(),
    });
    let files = session.problems.iter().map(|problem| RefusedDocument {
        what: problem.subject.clone(),
        why: problem.cause.to_string(),
    });
    leases
        .chain(unserved)
        .chain(commands)
        .chain(files)
        .collect()
}

fn drops(total: &datapath::status::Worker) -> Vec<DropDocument> {
    let count = |counters: &datapath::status::Counters, reason: DropReason| {
        counters.drops.get(reason.name()).copied().unwrap_or(0)
    };
    let drop = |&reason: &DropReason| DropDocument {
        reason: reason.name(),
        encap: count(&total.encap, reason),
        decap: count(&total.decap, reason),
        remedy: reason.remedy(),
        document: reason.document(),
    };
    DropReason::ALL.iter().map(drop).collect()
}
