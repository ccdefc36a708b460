//! Owns what comes before the tunnel: network configuration, external interface, conflicts, lease. Waits where
//! waiting helps, fails where an operator has to act.

use std::collections::HashSet;
use std::num::NonZero;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;

use super::{DaemonError, Options, StoreOptions, VxlanPlace, extension};
use crate::backend::device::{self, DeviceError};
use crate::backend::ends::{self, Ends};
use crate::backend::kernel::{Kernel, KernelError, PROTOCOL_LODEN, Route};
use crate::backend::plan::Plan;
use crate::backend::preflight::{self, Conflict};
use crate::backend::udp;
use crate::backend::vxlan::{Past, Vxlan};
use crate::config::NetworkConfig;
use crate::datapath::lock::{LockError, NameLock};
use crate::iface::{Candidate, Choice, Selector, Snapshot, Wanted};
use crate::lease::{Lease, Subnets};
use crate::store::{AcquireRequest, LeaseStore, StoreError};

/// How often a store is asked again; specification section 1.5, step 8.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// What a node is, for as long as it holds its lease.
pub(super) struct Registration {
    /// What is said of the external interface: by the command line, and of the public IPs by the store.
    pub(super) wanted: Wanted,
    pub(super) config: NetworkConfig,
    pub(super) plan: Plan,
    pub(super) ends: Ends,
    pub(super) candidates: Vec<Candidate>,
    pub(super) lease: Lease,
    pub(super) conflicts: Vec<Conflict>,
    /// The devices are ours.
    _devices: Vec<NameLock>,
}

impl Registration {
    /// The external interface.
    pub(super) const fn choice(&self) -> &Choice {
        self.ends.primary()
    }
}

/// Registers this node; `previous` are the subnets to ask for. `waits` is told what it waits for, and when it does no more.
pub(super) async fn register(
    store: &impl LeaseStore,
    kernel: &impl Kernel,
    options: &Options,
    previous: Option<Subnets>,
    waits: impl Fn(Option<&str>),
) -> Result<Registration, DaemonError> {
    let config = patiently("network configuration", &waits, || store.network_config()).await?;
    warn_about(&config);
    let set = patiently("node's public IPs", &waits, || store.public_ips()).await?;
    let wanted = options.wanted.clone().with_public_ips(set);
    let snapshot = look(kernel, &wanted).await?;
    let (ends, candidates) = choose(&snapshot, &wanted, &config)?;
    // Somebody may change them later, so the status does not tell of them.
    warn_or_fail(&preflight::settings(kernel, &config))?;
    let ours = ours(kernel, &snapshot).await?;
    let mut seen = snapshot;
    seen.links.retain(|link| !ours.contains(&link.index));
    let mut plan = Plan::new(&config, ends.clone())?;
    let devices = hold_devices(&plan)?;
    let networks = udp::networks(&config);
    // Where no subnet could help, none is taken. In Kubernetes one may be the whole network.
    let possible = match options.store {
        StoreOptions::Kube(_) => networks.as_slice(),
        StoreOptions::Local(_) | StoreOptions::Etcd(_) => &[],
    };
    let mut hopeless = preflight::swallowed(&networks, ends.iter().map(|end| end.public));
    let routes = foreign_routes(kernel, &ours).await?;
    hopeless.extend(preflight::conflicts(&seen, &routes, &networks, possible));
    hopeless.retain(Conflict::is_fatal);
    warn_or_fail(&hopeless)?;
    prepare(kernel, &mut plan, options.vxlan).await?;
    if let Plan::Outside(outside) = &mut plan {
        extension::before_lease(outside).await?;
    }
    if let Plan::Vxlan(vxlan) = &mut plan
        && vxlan.is_auto()
    {
        let obstacle = past_the_tunnel(kernel, vxlan, options);
        if let Some(obstacle) = &obstacle {
            tracing::warn!("no peer is reached past the tunnel: {obstacle}");
        }
        vxlan.set_past(Past {
            probe_port: options.probes.port.map(NonZero::get),
            obstacle,
        });
    }
    if let Plan::Vxlan(vxlan) = &plan
        && vxlan.leaves_direct_routing()
    {
        tracing::warn!("DirectRouting has no effect on this node: VXLAN is carried in user space");
    }
    let request = AcquireRequest {
        attrs: plan.attrs(),
        previous,
        extension: udp::EXTENSION,
    };
    let lease = patiently("lease", &waits, || store.acquire(request.clone())).await?;
    if let Plan::Outside(outside) = &plan {
        extension::after_lease(outside, &config, &lease).await?;
    }
    let own = udp::nets(&lease.subnets);
    tracing::info!(
        "leased {} for public IP {}, {}",
        text(&own),
        ends.primary().public,
        time_left(&lease)
    );
    let routes = foreign_routes(kernel, &ours).await?;
    let conflicts = preflight::conflicts(&seen, &routes, &networks, &own);
    warn_or_fail(&conflicts)?;
    Ok(Registration {
        wanted,
        config,
        plan,
        ends,
        candidates,
        lease,
        conflicts,
        _devices: devices,
    })
}

/// The name that stands for a tunnel device.
pub(super) fn device_lock(device: &str) -> String {
    format!("device/{device}")
}

/// Takes the names of the backend's devices: a second daemon with them would be of one mind with the first about
/// nothing.
fn hold_devices(plan: &Plan) -> Result<Vec<NameLock>, DaemonError> {
    let names: Vec<&str> = match plan {
        Plan::Vxlan(vxlan) => vxlan.device_names().collect(),
        Plan::Ipip(_) => vec![device::NAME_IPIP],
        Plan::Udp { .. } | Plan::HostGw(_) | Plan::Outside(_) => Vec::new(),
    };
    let hold = |name: &str| match NameLock::take(&device_lock(name)) {
        Ok(lock) => Ok(lock),
        Err(LockError::Held { pid }) => Err(DaemonError::DeviceHeld {
            name: name.to_owned(),
            pid,
        }),
        Err(LockError::Io(source)) => Err(DaemonError::Process {
            action: "take the name of the tunnel device",
            source,
        }),
    };
    names.into_iter().map(hold).collect()
}

fn warn_or_fail(conflicts: &[Conflict]) -> Result<(), DaemonError> {
    for conflict in conflicts {
        if conflict.is_fatal() {
            return Err(DaemonError::Conflict(conflict.clone()));
        }
        tracing::warn!("{conflict}");
    }
    Ok(())
}

fn text(nets: &[IpNet]) -> String {
    let nets: Vec<String> = nets.iter().map(IpNet::to_string).collect();
    nets.join(" and ")
}

/// "for 1440 minutes" or "for ever".
pub(super) fn time_left(lease: &Lease) -> String {
    let Some(expires) = lease.expires else {
        return "for ever".to_owned();
    };
    let left = expires.duration_since(SystemTime::now());
    format!("for {} minutes", left.unwrap_or_default().as_secs() / 60)
}

fn warn_about(config: &NetworkConfig) {
    if config.backend_defaulted {
        tracing::warn!(
            "the network configuration names no Backend: using udp, as flannel does (its documents say \
             vxlan): name one"
        );
    }
    for key in &config.unknown_keys {
        tracing::warn!("the network configuration has an unknown key {key:?}: ignored");
    }
}

/// What the choice of the external interface is made from.
pub(super) async fn look(kernel: &impl Kernel, wanted: &Wanted) -> Result<Snapshot, KernelError> {
    let mut snapshot = kernel.snapshot().await?;
    for selector in &wanted.selectors {
        if let Selector::Reach(to) = selector {
            snapshot.reach.extend(kernel.route_to(*to).await?);
        }
    }
    Ok(snapshot)
}

fn choose(
    snapshot: &Snapshot,
    wanted: &Wanted,
    config: &NetworkConfig,
) -> Result<(Ends, Vec<Candidate>), DaemonError> {
    let search = ends::search(snapshot, wanted, config);
    for failed in &search.failed {
        tracing::info!("no external interface by {failed}");
    }
    let ends = search.ends?;
    for candidate in &search.candidates {
        tracing::debug!("{candidate}");
    }
    for choice in ends.iter() {
        tracing::info!(
            "external interface {} with {} and MTU {}: {}",
            choice.name,
            choice.addr,
            choice.mtu,
            choice.reason
        );
    }
    Ok((ends, search.candidates))
}

/// Makes the devices, whose MAC addresses the lease publishes where they have one. What this cannot do is found out
/// before anything else is changed.
pub(super) async fn prepare(
    kernel: &impl Kernel,
    plan: &mut Plan,
    place: VxlanPlace,
) -> Result<(), DaemonError> {
    if let Plan::Ipip(ipip) = plan {
        device::ensure(kernel, &ipip.device(None)).await?;
    }
    let Plan::Vxlan(vxlan) = plan else {
        return Ok(());
    };
    if place == VxlanPlace::User {
        for name in vxlan.device_names() {
            // Of a run before, with the port that our own data plane takes.
            let link = kernel.link(name).await?.filter(device::is_flannels);
            if let Some(link) = link {
                tracing::info!("device {name} is taken away: VXLAN is carried in user space");
                kernel.delete_link(link.index).await?;
            }
        }
        return Ok(vxlan.move_to_user_space("--vxlan user".to_owned())?);
    }
    for wanted in vxlan.devices(None) {
        let there = kernel.link(&wanted.name).await?;
        if let Some(link) = there {
            vxlan.adopt_mac(&wanted.name, &link);
        }
    }
    for wanted in vxlan.devices(None) {
        match device::ensure(kernel, &wanted).await {
            Err(error @ DeviceError::Lacking { .. }) if place == VxlanPlace::Auto => {
                tracing::warn!("VXLAN is carried in user space, on the same port: {error}");
                return Ok(vxlan.move_to_user_space(error.to_string())?);
            }
            Err(error @ DeviceError::Lacking { .. }) => return Err(DaemonError::NoVxlan(error)),
            ensured => drop(ensured?),
        }
    }
    Ok(())
}

/// Why packets cannot come and go past the tunnel here, if they cannot.
fn past_the_tunnel(kernel: &impl Kernel, vxlan: &Vxlan, options: &Options) -> Option<String> {
    if options.probes.port.is_none() {
        return Some("no probes are answered (--probe-port 0)".to_owned());
    }
    // While two nodes change over, packets come in by the link that the route back does not take; strict reverse path
    // filtering drops those (ip-sysctl.rst: of `all` and the link's own the higher counts, and 2 is loose).
    let value = |link: &str| -> Option<u8> {
        let path = format!("ipv4/conf/{link}/rp_filter");
        kernel.setting(&path)?.parse().ok()
    };
    let all = value("all").unwrap_or(0);
    vxlan.links().find_map(|link| {
        // A device that is yet to come begins with the default.
        let own = value(link).or_else(|| value("default")).unwrap_or(0);
        (own.max(all) == 1).then(|| {
            format!(
                "reverse path filtering is strict on {link} (sysctl -w net.ipv4.conf.all.rp_filter=2 makes it loose)"
            )
        })
    })
}

/// The numbers of the devices that are the original's or ours, of whichever run: the first look at the kernel puts
/// them and what leads through them right.
async fn ours(kernel: &impl Kernel, snapshot: &Snapshot) -> Result<HashSet<u32>, KernelError> {
    let mut ours = HashSet::new();
    for named in snapshot
        .links
        .iter()
        .filter(|link| device::is_name(&link.name))
    {
        let link = kernel.link_at(named.index).await?;
        ours.extend(link.filter(device::is_flannels).map(|link| link.index));
    }
    Ok(ours)
}

/// The routes that are neither marked as ours nor lead through `ours`.
async fn foreign_routes(
    kernel: &impl Kernel,
    ours: &HashSet<u32>,
) -> Result<Vec<Route>, KernelError> {
    let mut routes = kernel.routes().await?;
    routes.retain(|route| !(route.protocol == PROTOCOL_LODEN || ours.contains(&route.link)));
    Ok(routes)
}

/// Asks until the store answers. One line per new complaint, which `waits` is told too, and none per attempt.
pub(super) async fn patiently<T, F>(
    what: &str,
    waits: impl Fn(Option<&str>),
    mut ask: impl FnMut() -> F,
) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let mut said = String::new();
    loop {
        let error = match ask().await {
            Ok(answer) => {
                if !said.is_empty() {
                    waits(None);
                }
                return Ok(answer);
            }
            Err(error @ (StoreError::Config { .. } | StoreError::NoPublicIp)) => return Err(error),
            Err(error) => error.to_string(),
        };
        if error != said {
            let complaint = format!("waiting for the {what}: {error}");
            // Whoever has read the line and asks is told the same.
            waits(Some(&complaint));
            tracing::warn!("{complaint}");
            said = error;
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}
