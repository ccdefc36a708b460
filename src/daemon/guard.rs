//! Owns the source check of the kernel's tunnel devices for as long as a session lasts. Never decides who the peers
//! are, and never keeps packets from flowing because it cannot check them.

use serde::Serialize;

use super::TrafficOptions;
use super::register::Registration;
use crate::backend::plan::Plan;
use crate::backend::{desired, device};
use crate::config::SourceCheck;
use crate::datapath::DropReason;
use crate::datapath::lock::NameLock;
use crate::firewall::{
    SenderCheck, SenderScope, SenderStatus, Senders, TableOf, Tunnel, TunnelKind, sweep_senders,
};

/// The check, or why there is none.
pub(super) enum Guard {
    /// It is kept up.
    Kept(SenderCheck),
    /// Wanted, and not to be had here.
    Lacking(String),
    /// There is nothing to check, or it is switched off.
    Idle,
}

/// What the status shows of it.
#[derive(Debug, Serialize)]
pub(super) struct GuardDocument {
    /// Datagrams from others than peers are dropped.
    outer: bool,
    /// Inner packets are dropped that the sender has no lease for.
    inner: bool,
    /// Why not all that was asked for, or what is wrong now.
    why_not: Option<String>,
    /// How often somebody else had changed it.
    repairs: u64,
}

impl Guard {
    /// Removes what is left of other runs, and starts what this session wants.
    pub(super) async fn start(options: &TrafficOptions, registration: &Registration) -> Self {
        let wanted = wanted(&registration.plan);
        let own = match &registration.plan {
            Plan::Vxlan(vxlan) => Some(TableOf::Vxlan(vxlan.vni())),
            Plan::Ipip(_) => Some(TableOf::Ipip),
            Plan::Udp { .. } | Plan::HostGw(_) | Plan::Outside(_) => None,
        };
        let kept = |of| match own {
            Some(own) if own == of => wanted.is_some(),
            // A daemon that keeps it holds the name of its device.
            _ => {
                // One daemon has the devices of both families, or that of one.
                let devices = match of {
                    TableOf::Vxlan(vni) => [device::NAME_V4, device::NAME_V6]
                        .map(|prefix| format!("{prefix}{vni}"))
                        .to_vec(),
                    TableOf::Ipip => vec![device::NAME_IPIP.to_owned()],
                };
                let is_held =
                    |name: &String| NameLock::take(&super::register::device_lock(name)).is_err();
                devices.iter().any(is_held)
            }
        };
        match sweep_senders(options.programs.clone(), kept).await {
            Ok(swept) => {
                for table in swept {
                    tracing::info!("removed {table}, the source check of a run before");
                }
            }
            Err(error) => tracing::warn!("cannot look for source checks of runs before: {error}"),
        }
        let Some(tunnel) = wanted else {
            return Self::Idle;
        };
        let kind = tunnel.kind.to_string();
        match SenderCheck::start(options.programs.clone(), tunnel).await {
            Ok(check) => {
                if let Some(why) = check.last_status().lacking {
                    tracing::warn!("inner packets from {kind} peers are not checked: {why}");
                }
                Self::Kept(check)
            }
            Err(error) => {
                tracing::warn!("who sends to the {kind} device is not checked: {error}");
                Self::Lacking(error.to_string())
            }
        }
    }

    /// Says who the peers are now, and which devices there are.
    pub(super) fn want(&self, senders: &desired::Senders, devices: &[u32]) {
        if let Self::Kept(check) = self {
            check.want(Senders {
                outer: senders.outer.clone(),
                inner: senders.inner.clone(),
                own: senders.own.clone(),
                others: senders.others.clone(),
                shared: senders.shared,
                devices: devices.to_vec(),
            });
        }
    }

    /// What it checks; none where nothing is.
    pub(super) fn scope(&self) -> Option<SenderScope> {
        match self {
            Self::Kept(check) => Some(check.last_status().scope),
            Self::Lacking(_) | Self::Idle => None,
        }
    }

    /// Why it checks nothing; none where it checks something.
    pub(super) fn idle(&self) -> Option<&str> {
        match self {
            Self::Kept(_) => None,
            Self::Lacking(why) => Some(why),
            Self::Idle => Some("Backend.SourceCheck is off"),
        }
    }

    /// What is wrong with it now.
    pub(super) fn problem(&self) -> Option<String> {
        match self {
            Self::Kept(check) => check.last_status().error,
            Self::Lacking(_) | Self::Idle => None,
        }
    }

    /// What it has dropped, by the reasons that our own data plane has for the same.
    pub(super) fn drops(&self) -> Vec<(DropReason, u64)> {
        match self {
            Self::Kept(check) => drops(&check.last_status()),
            Self::Lacking(_) | Self::Idle => Vec::new(),
        }
    }

    /// What the status shows, with the counters as they are now.
    pub(super) async fn document(&self) -> Option<GuardDocument> {
        match self {
            Self::Kept(check) => {
                let status = check.status().await;
                Some(GuardDocument {
                    outer: status.scope.outer,
                    inner: status.scope.inner,
                    why_not: status.error.or(status.lacking),
                    repairs: status.repairs,
                })
            }
            Self::Lacking(why) => Some(GuardDocument {
                outer: false,
                inner: false,
                why_not: Some(why.clone()),
                repairs: 0,
            }),
            Self::Idle => None,
        }
    }
}

fn drops(status: &SenderStatus) -> Vec<(DropReason, u64)> {
    vec![
        (DropReason::UnknownPeer, status.unknown_peer),
        (DropReason::SpoofedSource, status.spoofed_source),
    ]
}

/// The devices to check; none where the kernel has none, or where it is switched off.
fn wanted(plan: &Plan) -> Option<Tunnel> {
    let (kind, check) = match plan {
        Plan::Vxlan(vxlan) if vxlan.in_user_space().is_none() => {
            let kind = TunnelKind::Vxlan {
                vni: vxlan.vni(),
                port: vxlan.port(),
                devices: vxlan.device_names().map(str::to_owned).collect(),
            };
            (kind, vxlan.source_check()?)
        }
        Plan::Ipip(ipip) => (TunnelKind::Ipip, ipip.source_check()?),
        Plan::Vxlan(_) | Plan::Udp { .. } | Plan::HostGw(_) | Plan::Outside(_) => return None,
    };
    Some(Tunnel {
        kind,
        outer: check == SourceCheck::Strict,
    })
}
