//! Owns what carries the packets of a session: our data plane, or the kernel programmed for every peer. Never
//! decides when to open it, or when to look at it.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::register::Registration;
use super::tunnel::{Events, Tunnel, event_channels};
use super::{DaemonError, Options};
use crate::backend::desired::{Desired, Direct, Refused};
use crate::backend::kernel::{Change, Kernel};
use crate::backend::reconcile::Outcome;
use crate::backend::settle::{self, settle};
use crate::datapath::PeerRoute;

/// What should be there for the peers.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    /// For the data plane.
    pub(super) routes: Vec<PeerRoute>,
    /// For the kernel.
    pub(super) desired: Desired,
}

/// What carries the packets. Dropping it takes our data plane away; what the kernel was programmed with stays and
/// goes on carrying packets, as the original leaves it.
pub(super) struct Carrier {
    /// Our data plane, where it carries the packets: one tunnel, or one per family.
    pub(super) tunnels: Vec<Tunnel>,
    /// What its workers say.
    pub(super) events: Events,
    wanted: Wanted,
    /// The kernel may not hold what is wanted.
    stale: bool,
    /// A device that a run before has left was looked for, with nobody left who could need it.
    swept: bool,
    /// What the last look found.
    pub(super) report: settle::Report,
    /// How long the last look took.
    pub(super) look_took: Duration,
}

/// What a look found.
pub(super) enum Looked {
    /// All is as it should be.
    Unchanged,
    /// It was put right, after changes by somebody else.
    Repaired(String),
    /// It was brought to what is wanted now.
    Programmed(usize),
    /// Some of it cannot be put right, for now.
    Incomplete(String),
    /// It has to be opened anew.
    Broken(String),
}

impl Carrier {
    /// Opens the data plane, or programs the kernel.
    pub(super) async fn open(
        options: &Options,
        registration: &Registration,
        kernel: &impl Kernel,
        wanted: Wanted,
    ) -> Result<Self, DaemonError> {
        let Registration {
            config,
            plan,
            lease,
            ..
        } = registration;
        let (on_event, events) = event_channels();
        let mut tunnels = Vec::new();
        for plane in plan.data_planes(config, &lease.subnets, registration.choice()) {
            let on_event = Arc::clone(&on_event);
            tunnels.push(Tunnel::open(options, plane, on_event, kernel, &wanted.routes).await?);
        }
        let begun = Instant::now();
        let mut carrier = Self {
            tunnels,
            events,
            wanted,
            stale: true,
            swept: false,
            report: settle::Report::default(),
            look_took: Duration::ZERO,
        };
        let failures = carrier.settle(kernel).await?;
        if let Some(failures) = failures {
            tracing::warn!("{failures}");
        }
        if carrier.tunnels.is_empty() {
            tracing::info!(
                "{} is up: MTU {}, {} peers, after {:?}",
                registration.plan.name(),
                registration.plan.mtu(),
                carrier.wanted.desired.peers.len(),
                begun.elapsed()
            );
        }
        Ok(carrier)
    }

    /// Takes over what is wanted now: at once in our data plane, at the next look in the kernel.
    pub(super) fn publish(&mut self, wanted: Wanted) {
        for tunnel in &self.tunnels {
            tunnel.publish(&wanted.routes);
        }
        self.stale |= wanted.desired != self.wanted.desired;
        self.wanted = wanted;
    }

    /// What the data plane knows of peers.
    pub(super) fn routes(&self) -> &[PeerRoute] {
        &self.wanted.routes
    }

    /// Whether the kernel waits for a look because of what was published.
    pub(super) const fn is_stale(&self) -> bool {
        self.stale
    }

    /// The tunnel of ours that carries what goes to or comes from `addr`.
    pub(super) fn tunnel_of(&self, addr: IpAddr) -> Option<&Tunnel> {
        let carries = |tunnel: &&Tunnel| {
            let networks = &tunnel.desired.networks;
            networks.iter().any(|network| network.contains(&addr))
        };
        self.tunnels.iter().find(carries).or(self.tunnels.first())
    }

    /// What a way past the tunnel to a peer's subnet takes; none of a peer that the kernel is told nothing of.
    pub(super) fn direct_to(&self, net: IpNet) -> Option<Direct> {
        let mut peers = self.wanted.desired.peers.iter();
        peers.find(|peer| peer.net == net)?.way.direct()
    }

    /// The devices that the kernel has, in the order of the report's.
    pub(super) fn wanted_devices(&self) -> &[crate::backend::desired::Device] {
        &self.wanted.desired.devices
    }

    /// What the kernel should hold for the peers.
    pub(super) const fn desired(&self) -> &Desired {
        &self.wanted.desired
    }

    /// The numbers of the devices.
    pub(super) fn devices(&self) -> impl Iterator<Item = u32> {
        let tunnels = self.tunnels.iter().map(|tunnel| tunnel.index);
        tunnels.chain(self.report.devices.iter().copied())
    }

    /// Looks at what is there, and puts it right.
    pub(super) async fn look(&mut self, kernel: &impl Kernel) -> Looked {
        let begun = Instant::now();
        let mut repaired = None;
        for tunnel in &self.tunnels {
            match tunnel.repair(kernel).await {
                Ok(Outcome::Done(actions)) if actions.is_empty() => {}
                Ok(Outcome::Done(actions)) => {
                    tracing::debug!(?actions, device = tunnel.device, "repaired");
                    repaired = Some(format!("device {}", tunnel.device));
                }
                Ok(Outcome::Gone) => {
                    return Looked::Broken(format!("device {} was removed", tunnel.device));
                }
                Err(error) => {
                    let device = &tunnel.device;
                    return Looked::Incomplete(format!("device {device} stays as it is: {error}"));
                }
            }
        }
        // With a data plane of ours, nothing in the kernel depends on single peers, but for ways past it.
        if !self.tunnels.is_empty() && !self.stale && !self.wanted.desired.probing {
            self.look_took = begun.elapsed();
            return repaired.map_or(Looked::Unchanged, Looked::Repaired);
        }
        let was_stale = self.stale;
        let failures = match self.settle(kernel).await {
            Ok(failures) => failures,
            Err(error) => return Looked::Broken(error.to_string()),
        };
        self.look_took = begun.elapsed();
        if let Some(failures) = failures {
            return Looked::Incomplete(failures);
        }
        match (self.report.changed.as_slice(), repaired) {
            ([], None) => Looked::Unchanged,
            (changed, None) if was_stale => Looked::Programmed(changed.len()),
            ([], Some(what)) => Looked::Repaired(what),
            ([one], None) => Looked::Repaired(one.clone()),
            ([one, rest @ ..], _) => Looked::Repaired(format!("{one} and {} more", rest.len())),
        }
    }

    /// One look at the kernel; what it refused, if it did.
    async fn settle(
        &mut self,
        kernel: &impl Kernel,
    ) -> Result<Option<String>, crate::backend::device::DeviceError> {
        let desired = &mut self.wanted.desired;
        desired.sweep_devices = !self.swept;
        let report = settle(kernel, desired).await?;
        self.swept = desired.complete && desired.retained.is_empty();
        // What the next publication is compared with does not know of it.
        desired.sweep_devices = false;
        for change in &report.changed {
            tracing::debug!("{change}");
        }
        let told: HashSet<&Refused> = self.report.refused.iter().collect();
        tell(
            report
                .refused
                .iter()
                .filter(|refused| !told.contains(refused)),
        );
        let failures = match report.failed {
            0 => None,
            failed => Some(format!(
                "{failed} changes were refused: {}",
                report.failures.join("; ")
            )),
        };
        self.stale = false;
        self.report = report;
        Ok(failures)
    }

    /// Whether a change may be about what we keep.
    pub(super) fn concerns(&self, change: Change, external: u32) -> bool {
        let in_kernel = self.tunnels.is_empty() || self.wanted.desired.probing;
        let is_ours = |index: u32| self.tunnels.iter().any(|tunnel| tunnel.index == index);
        let link = |index: u32| {
            is_ours(index)
                || (in_kernel && (index == external || self.report.devices.contains(&index)))
        };
        match change {
            Change::Link(index) | Change::Address(index) => link(index),
            Change::Tunnel(index) => !self.report.devices.is_empty() || link(index),
            Change::Neighbour(index) => in_kernel && self.report.devices.contains(&index),
            Change::Route(net) => match self.tunnels.as_slice() {
                tunnels @ [_, ..] if !in_kernel => tunnels
                    .iter()
                    .any(|tunnel| tunnel.desired.networks.contains(&net)),
                _ => {
                    let desired = &self.wanted.desired;
                    // A route of ours, or one that decides whether a peer is on a link.
                    desired
                        .networks
                        .iter()
                        .any(|network| network.contains(&net))
                        || desired.peers.iter().any(|peer| net.contains(&peer.public))
                }
            },
            Change::Everything => true,
        }
    }
}

/// Peers that are refused all at once, as when the underlay goes down, make a few lines and a number.
const MAX_TOLD: usize = 5;

/// Tells of peers that get no way.
pub(super) fn tell<'a>(refused: impl Iterator<Item = &'a Refused>) {
    let refused: Vec<&Refused> = refused.collect();
    for Refused { lease, why } in refused.iter().take(MAX_TOLD) {
        tracing::warn!("lease {lease} is not served: {why}");
    }
    if let Some(more) = refused.len().checked_sub(MAX_TOLD).filter(|&more| more > 0) {
        tracing::warn!("{more} more leases are not served (loden status)");
    }
}
