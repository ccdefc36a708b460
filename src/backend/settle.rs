//! Owns one look at the kernel: what is there is compared with what should be, and made so. Never decides what
//! should be, and never gives up on all peers because of one.

use std::collections::{BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

use super::desired::{Candidate, Desired, Device, Refused, Senders};
use super::device::{self, DeviceError};
use super::diff::{Observed, Step, difference};
use super::kernel::{Edit, Kernel, KernelError, Link, PROTOCOL_LODEN, TunnelLink};

/// Failures that are told one by one; the rest is a number.
const MAX_FAILURES: usize = 8;

/// What a look led to.
#[derive(Debug, Default)]
pub struct Report {
    /// The numbers of the devices, in the order of [`Desired::devices`].
    pub devices: Vec<u32>,
    /// What was changed, in words.
    pub changed: Vec<String>,
    /// Peers that get no way.
    pub refused: Vec<Refused>,
    /// The subnets that are reached by a route through their node.
    pub direct: HashSet<IpNet>,
    /// The links that those routes lead by.
    pub direct_links: BTreeSet<u32>,
    /// Who may send through the devices; none as long as not all peers are known.
    pub senders: Option<Senders>,
    /// Peers whose way past the tunnel can be probed.
    pub candidates: Vec<Candidate>,
    /// The subnets whose way past the tunnel is to be probed and cannot be: they are on no link.
    pub distant: HashSet<IpNet>,
    /// Why ways past the tunnel cannot be probed at all.
    pub unprobed: Option<String>,
    /// What the kernel refused, the first few in words.
    pub failures: Vec<String>,
    /// How often it refused.
    pub failed: usize,
}

/// Looks at the kernel and brings it to the desired state. What it refuses for one peer is in the report, and the
/// others are served.
///
/// # Errors
///
/// A device cannot be had, or the kernel does not say what it holds.
pub async fn settle(kernel: &impl Kernel, desired: &Desired) -> Result<Report, DeviceError> {
    let mut report = Report::default();
    for device in &desired.devices {
        let present = device::ensure(kernel, device).await?;
        if present.made {
            report.changed.push(format!("made {}", device.name));
        }
        let index = present.link.index;
        let actions = device::configure(kernel, index, device, &desired.networks).await?;
        let changed = actions
            .iter()
            .map(|action| format!("{}: {action:?}", device.name));
        report.changed.extend(changed);
        report.devices.push(index);
    }
    let mut observed = Observed {
        devices: report.devices.clone(),
        ..Observed::default()
    };
    if desired.complete && desired.sweep_devices {
        observed.flannels = sweep_devices(kernel, desired, &mut report).await?;
    }
    observed.routes = kernel.routes().await?;
    if desired.probing || (desired.complete && desired.sweep_devices) {
        observed.probe_routes = kernel.probe_routes().await?;
        let of_family = |v4: bool| {
            let mut networks = desired.networks.iter();
            desired.probing && networks.any(|net| matches!(net, IpNet::V4(_)) == v4)
        };
        match kernel.steer_probes(of_family(true), of_family(false)).await {
            Ok(false) => {}
            Ok(true) => report.changed.push("routing rule for probes".to_owned()),
            // A kernel without policy routing has nothing of ours there, either.
            Err(error) => report.unprobed = Some(error.to_string()),
        }
    }
    for &index in &report.devices {
        observed.neighbours.extend(kernel.neighbours(index).await?);
        observed.forwards.extend(kernel.forwards(index).await?);
    }
    if !desired.devices.is_empty() {
        let mut links = kernel.links().await?;
        links.retain(|link| !report.devices.contains(&link.index));
        let local = desired.devices.iter().find_map(Device::receives_all_to);
        observed.others = local.map_or_else(BTreeSet::new, |to| other_remotes(&links, to));
        observed.shared = shares_port(&links, desired);
    }
    let difference = difference(desired, &observed);
    report.refused = difference.refused;
    report.direct = difference.direct;
    report.direct_links = difference.direct_links;
    report.senders = difference.senders;
    report.candidates = difference.candidates;
    report.distant = difference.distant;
    let mut steps = difference.steps;
    if report.unprobed.is_some() {
        report.candidates.clear();
        steps.retain(|step| {
            !matches!(
                step.edit,
                Edit::AddProbeRoute(_) | Edit::DeleteProbeRoute(_)
            )
        });
    }
    let edits: Vec<Edit> = steps.iter().map(|step| step.edit).collect();
    let results = kernel.edit(&edits).await;
    for (step, result) in steps.iter().zip(results) {
        report.note(step, result);
    }
    Ok(report)
}

/// From whom these IPIP devices receive what comes to this address: the kernel prefers those that name a remote, as long
/// as they are up (`ip_tunnel_lookup`, net/ipv4/ip_tunnel.c).
fn other_remotes(links: &[Link], to: Ipv4Addr) -> BTreeSet<IpAddr> {
    let remote = |link: &Link| match link.tunnel {
        Some(TunnelLink::Ipip(ipip)) if ipip.local.is_none_or(|local| local == to) => {
            ipip.remote.map(IpAddr::V4)
        }
        Some(TunnelLink::Ipip(_) | TunnelLink::Vxlan(_)) | None => None,
    };
    let up = links.iter().filter(|link| link.up);
    up.filter_map(remote).collect()
}

/// Whether one of these links receives on the port of a wanted device.
fn shares_port(links: &[Link], desired: &Desired) -> bool {
    let port = |tunnel: &TunnelLink| match tunnel {
        TunnelLink::Vxlan(vxlan) => Some(vxlan.port),
        TunnelLink::Ipip(_) => None,
    };
    let mut wanted = desired.devices.iter().filter_map(|it| port(&it.tunnel));
    wanted.any(|wanted| {
        let mut ports = links
            .iter()
            .filter_map(|link| link.tunnel.as_ref().and_then(port));
        ports.any(|port| port == wanted)
    })
}

impl Report {
    fn note(&mut self, step: &Step, result: Result<(), KernelError>) {
        match result {
            Ok(()) => self.changed.push(step.edit.to_string()),
            Err(error) => {
                self.failed += 1;
                if self.failures.len() < MAX_FAILURES {
                    self.failures.push(match step.lease {
                        Some(lease) => format!("lease {lease}: {error}"),
                        None => error.to_string(),
                    });
                }
            }
        }
    }
}

/// Removes all that a daemon, ours or flannel's, leaves behind on purpose: the routes that are marked as ours, and the
/// tunnel devices with what is on them. What was removed, and what the kernel refused.
pub async fn remove(kernel: &impl Kernel) -> (Vec<String>, Vec<KernelError>) {
    let (mut removed, mut errors) = (Vec::new(), Vec::new());
    match kernel.routes().await {
        Ok(routes) => {
            let ours = routes
                .iter()
                .filter(|route| route.protocol == PROTOCOL_LODEN);
            let edits: Vec<Edit> = ours.copied().map(Edit::DeleteRoute).collect();
            for (edit, result) in edits.iter().zip(kernel.edit(&edits).await) {
                match (edit, result) {
                    (Edit::DeleteRoute(route), Ok(())) => {
                        removed.push(format!("route {}", route.net))
                    }
                    (_, Ok(())) => {}
                    (_, Err(error)) => errors.push(error),
                }
            }
        }
        Err(error) => errors.push(error),
    }
    let probes = kernel.probe_routes().await.unwrap_or_default();
    let edits: Vec<Edit> = probes.into_iter().map(Edit::DeleteProbeRoute).collect();
    let deleted = kernel.edit(&edits).await;
    errors.extend(deleted.into_iter().filter_map(Result::err));
    match kernel.steer_probes(false, false).await {
        Ok(true) => removed.push("routing rule for probes".to_owned()),
        Ok(false) => {}
        // A kernel without policy routing has no rule.
        Err(error) if error.is_unsupported() => {}
        Err(error) => errors.push(error),
    }
    match kernel.links().await {
        Ok(links) => {
            for link in links.iter().filter(|link| device::is_flannels(link)) {
                match kernel.delete_link(link.index).await {
                    Ok(()) => removed.push(format!("device {}", link.name)),
                    Err(error) => errors.push(error),
                }
            }
        }
        Err(error) => errors.push(error),
    }
    (removed, errors)
}

/// Removes the devices of a run with other settings, known by kind, name and an address inside the network.
/// Returns the numbers of those that stay although they look like one.
async fn sweep_devices(
    kernel: &impl Kernel,
    desired: &Desired,
    report: &mut Report,
) -> Result<Vec<u32>, KernelError> {
    let mut stay = Vec::new();
    let links = kernel.links().await?;
    let ours = |link: &&Link| device::is_flannels(link) && !report.devices.contains(&link.index);
    for link in links.iter().filter(ours) {
        let addrs = kernel.addresses(link.index).await?;
        let inside = addrs.iter().any(|addr| {
            desired
                .networks
                .iter()
                .any(|net| net.contains(&addr.addr()))
        });
        if inside && desired.retained.is_empty() {
            kernel.delete_link(link.index).await?;
            report.changed.push(format!("removed {}", link.name));
        } else if inside {
            stay.push(link.index);
        }
    }
    Ok(stay)
}

#[cfg(test)]
mod tests;
