//! Owns what comes before the tunnel: network configuration, external interface, conflicts, lease. Waits where
//! waiting helps, fails where an operator has to act.

use std::time::{Duration, SystemTime};

use ipnet::IpNet;

use super::DaemonError;
use crate::backend::kernel::{Kernel, KernelError};
use crate::backend::preflight::{self, Conflict};
use crate::backend::udp::{self, Underlay};
use crate::config::{Backend, NetworkConfig, UdpBackend};
use crate::iface::{self, Candidate, Choice, Selector, Snapshot, Wanted};
use crate::lease::{Lease, Subnets};
use crate::store::{AcquireRequest, LeaseStore, StoreError};

/// How often a store is asked again; specification section 1.5, step 8.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// What a node is, for as long as it holds its lease.
pub(super) struct Registration {
    /// What the command line says of the external interface, and the store where that says nothing.
    pub(super) wanted: Wanted,
    pub(super) config: NetworkConfig,
    pub(super) backend: UdpBackend,
    pub(super) choice: Choice,
    pub(super) candidates: Vec<Candidate>,
    pub(super) underlay: Underlay,
    pub(super) lease: Lease,
    pub(super) conflicts: Vec<Conflict>,
}

/// Registers this node; `previous` are the subnets to ask for.
pub(super) async fn register(
    store: &impl LeaseStore,
    kernel: &impl Kernel,
    wanted: &Wanted,
    previous: Option<Subnets>,
) -> Result<Registration, DaemonError> {
    let config = patiently("network configuration", || store.network_config()).await?;
    warn_about(&config);
    let Backend::Udp(backend) = config.backend.clone();
    let set = patiently("node's public IPs", || store.public_ips()).await?;
    let wanted = Wanted {
        public_ip: wanted.public_ip.or(set.0),
        public_ipv6: wanted.public_ipv6.or(set.1),
        ..wanted.clone()
    };
    let snapshot = look(kernel, &wanted).await?;
    let (choice, candidates) = choose(&snapshot, &wanted, &config)?;
    let underlay = Underlay::new(&config, &backend, &choice)?;
    let request = AcquireRequest {
        attrs: underlay.attrs.clone(),
        previous,
        extension: udp::EXTENSION,
    };
    let lease = patiently("lease", || store.acquire(request.clone())).await?;
    let own = udp::nets(&lease.subnets);
    tracing::info!(
        "leased {} for public IP {}, {}",
        text(&own),
        choice.public,
        time_left(&lease)
    );
    let networks = udp::networks(&config);
    let routes = kernel.routes().await?;
    let conflicts = preflight::conflicts(&snapshot, &routes, &networks, &own, choice.public);
    for conflict in &conflicts {
        if conflict.is_fatal() {
            return Err(DaemonError::Conflict(conflict.clone()));
        }
        tracing::warn!("{conflict}");
    }
    Ok(Registration {
        wanted,
        config,
        backend,
        choice,
        candidates,
        underlay,
        lease,
        conflicts,
    })
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
) -> Result<(Choice, Vec<Candidate>), DaemonError> {
    let decision = iface::choose(snapshot, wanted, udp::stack(config, wanted));
    for failed in &decision.failed {
        tracing::info!("no external interface by {failed}");
    }
    let choice = decision.choice?;
    for candidate in &decision.candidates {
        tracing::debug!("{candidate}");
    }
    tracing::info!(
        "external interface {} with {} and MTU {}: {}",
        choice.name,
        choice.addr,
        choice.mtu,
        choice.reason
    );
    Ok((choice, decision.candidates))
}

/// Asks until the store answers. One line per new complaint, none per attempt.
pub(super) async fn patiently<T, F>(what: &str, mut ask: impl FnMut() -> F) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let mut said = String::new();
    loop {
        let error = match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error @ (StoreError::Config { .. } | StoreError::NoPublicIp)) => return Err(error),
            Err(error) => error.to_string(),
        };
        if error != said {
            tracing::warn!("waiting for the {what}: {error}");
            said = error;
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}
