//! Owns the session's part in reaching peers past the tunnel: who is to be proven, what was found, and why a better
//! way than the one in use was rejected. Never sends a probe itself.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::Serialize;

use super::register::Registration;
use crate::backend::desired::Desired;
use crate::backend::kernel::PROBE_MARK;
use crate::backend::plan::Plan;
use crate::backend::settle::Report;
use crate::backend::udp;
use crate::iface::Family;
use crate::lease::Lease;
use crate::probe::Directory;
use crate::probe::past::{Past, Target, Wanted};

/// Changes that are told one by one; the rest is a number.
const MAX_TOLD: usize = 5;

/// Ways past the tunnel, where they are asked for.
pub(super) struct Ways {
    past: Option<Past>,
    /// The subnets that are reached past the tunnel now.
    proven: HashSet<IpNet>,
    /// How often something about the links has changed.
    changes: u64,
}

/// A way past the tunnel to a peer, and why it is used or not.
#[derive(Debug, Serialize)]
pub(super) struct WayDocument {
    /// Its name.
    transport: &'static str,
    /// To which of the peer's subnets.
    pub(super) subnet: IpNet,
    pub(super) why: String,
}

impl Ways {
    pub(super) fn start(registration: &Registration, directory: &Arc<Directory>) -> Self {
        let auto = matches!(&registration.plan, Plan::Vxlan(vxlan) if vxlan.is_auto());
        Self {
            past: auto.then(|| Past::start(directory, PROBE_MARK)),
            proven: HashSet::new(),
            changes: 0,
        }
    }

    /// Waits until something else is found; for ever, where nothing is looked for.
    pub(super) async fn changed(&mut self) {
        match &mut self.past {
            Some(past) => past.changed().await,
            None => std::future::pending().await,
        }
    }

    /// Something about the links of this node has changed: what was proven is proven again.
    pub(super) const fn hurry(&mut self) {
        self.changes += 1;
    }

    /// Takes over what is found now; whether any peer is reached otherwise for it.
    pub(super) fn take(&mut self) -> bool {
        let Some(past) = &self.past else {
            return false;
        };
        let found = past.found();
        let begun = found.proven.difference(&self.proven);
        let ended = self.proven.difference(&found.proven);
        let begun =
            begun.map(|net| format!("{net} is reached past the tunnel: probes have proven it"));
        let ended = ended.map(|net| {
            let why = found
                .why_not
                .get(net)
                .map_or("its way has changed", String::as_str);
            format!("{net} is reached through the tunnel again: {why}")
        });
        let mut lines: Vec<String> = begun.chain(ended).collect();
        lines.sort_unstable();
        let changed = !lines.is_empty();
        for line in lines.iter().take(MAX_TOLD) {
            tracing::info!("{line}");
        }
        if let Some(more) = lines.len().checked_sub(MAX_TOLD).filter(|&more| more > 0) {
            tracing::info!("{more} more subnets are reached otherwise now (loden status)");
        }
        self.proven.clone_from(&found.proven);
        changed
    }

    /// Writes into what is wanted what is proven.
    pub(super) fn prove(&self, desired: &mut Desired) {
        for peer in &mut desired.peers {
            peer.way.prove(self.proven.contains(&peer.net));
        }
    }

    /// Has the peers proven to which the last look found a way.
    pub(super) fn want(&self, registration: &Registration, report: Option<&Report>) {
        let Some(past) = &self.past else { return };
        let target = |candidate: &crate::backend::desired::Candidate| Target {
            net: candidate.net,
            port: candidate.port,
            public: candidate.public,
            link: candidate.link,
        };
        let candidates = report.map(|report| report.candidates.iter().map(target).collect());
        let own = udp::nets(&registration.lease.subnets);
        past.want(Wanted {
            targets: candidates.unwrap_or_default(),
            local: own.iter().map(IpNet::network).collect(),
            len: registration.plan.mtu().get(),
            change: self.changes,
        });
    }

    /// Why a peer is reached past the tunnel, for each of its subnets that is.
    pub(super) fn proven(&self, report: &Report, lease: &Lease) -> Vec<WayDocument> {
        let Some(past) = &self.past else {
            return Vec::new();
        };
        let found = past.found();
        let nets = udp::nets(&lease.subnets).into_iter();
        let direct = nets.filter(|net| report.direct.contains(net));
        let way = |subnet| WayDocument {
            transport: "route",
            subnet,
            why: match found.proven.contains(&subnet) {
                true => format!("probes of {} bytes arrive past the tunnel", found.len),
                false => "probes no longer arrive: it is being given up".to_owned(),
            },
        };
        direct.map(way).collect()
    }

    /// Why a peer is not reached past the tunnel, for each of its subnets that is not.
    pub(super) fn rejected(
        &self,
        registration: &Registration,
        report: &Report,
        lease: &Lease,
    ) -> Vec<WayDocument> {
        let (Some(past), Plan::Vxlan(vxlan)) = (&self.past, &registration.plan) else {
            return Vec::new();
        };
        let found = past.found();
        let nets = udp::nets(&lease.subnets).into_iter();
        let others = nets.filter(|net| !report.direct.contains(net));
        let rejected = |net: IpNet| {
            let family = match net.addr() {
                IpAddr::V4(_) => Family::V4,
                IpAddr::V6(_) => Family::V6,
            };
            let why = match vxlan.past_to(lease, family) {
                Err(why) => why,
                Ok(None) => return None,
                Ok(Some(_)) if report.unprobed.is_some() => {
                    report.unprobed.clone().unwrap_or_default()
                }
                Ok(Some(_)) if report.distant.contains(&net) => {
                    "its public IP is on no link of this node".to_owned()
                }
                Ok(Some(_)) => match found.why_not.get(&net) {
                    Some(why) => why.clone(),
                    None => "it is being proven".to_owned(),
                },
            };
            Some(WayDocument {
                transport: "route",
                subnet: net,
                why,
            })
        };
        others.filter_map(rejected).collect()
    }
}
