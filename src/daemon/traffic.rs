//! Owns what the node's traffic rules should be, and having them kept. Never runs a program itself; the firewall
//! does. Flannel specification sections 10, 11.3 and 11.4.

use std::future::pending;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::register::Registration;
use super::{DaemonError, TrafficOptions};
use crate::addr::OverlayPrefix;
use crate::backend::plan::Plan;
use crate::config::{NetworkConfig, SourcePort, SubnetPool};
use crate::datapath::lock::{LockError, NameLock};
use crate::firewall::{
    Admission, Arrival, Error, Family, FamilyRules, Firewall, Keeper, KeeperStatus, Masquerade,
    Mode, Notrack, Rules, Underlay,
};
use crate::lease::Subnets;

/// The name that whoever keeps the traffic rules of a network namespace holds: the chains and tables have fixed names,
/// so that two daemons would each remove the other's.
const KEEPS_RULES: &str = "traffic-rules";

/// Where the kernel says that bridged packets pass iptables.
const BRIDGE_CALLS: &str = "/proc/sys/net/bridge/bridge-nf-call-iptables";

/// The rules of a session, kept until it is dropped. The rules themselves stay, as the original leaves them.
pub(super) struct Traffic {
    keeper: Option<JoinHandle<()>>,
    status: Option<watch::Receiver<KeeperStatus>>,
    /// Dropped last: without it the keeper goes on with what it has.
    _wanted: watch::Sender<Rules>,
    /// The rules are ours to keep.
    lock: Option<NameLock>,
    /// What is not as it should be and will not be repaired.
    missing: Option<String>,
}

impl Drop for Traffic {
    fn drop(&mut self) {
        if let Some(keeper) = &self.keeper {
            keeper.abort();
        }
    }
}

/// The program for the rules, and how the host's own firewall treats the tunnel.
pub(super) struct Prepared {
    firewall: Result<Firewall, Error>,
    admission: Admission,
    /// None if another daemon keeps the rules.
    lock: Option<NameLock>,
}

/// Looks at the host before anything is opened: changes nothing, except that source ports stay fixed where the
/// host's firewall admits nothing else.
pub(super) async fn prepare(
    options: &TrafficOptions,
    registration: &mut Registration,
) -> Result<Prepared, DaemonError> {
    let lock = lock(options)?;
    let nftables = registration.config.enable_nftables;
    let mode = if nftables {
        Mode::Nftables
    } else {
        Mode::Iptables
    };
    if !nftables && options.masquerade && !Path::new(BRIDGE_CALLS).exists() {
        tracing::info!(
            "{BRIDGE_CALLS} is not there: iptables rules do not see what pods of this node send to each \
             other; if services need that, load it (modprobe br_netfilter)"
        );
    }
    let firewall = Firewall::open(options.programs.clone(), mode).await;
    let mut admission = Admission::Open;
    match &firewall {
        Ok(firewall) => {
            let choice = registration.choice();
            if let Some(arrival) = arrival(&registration.plan) {
                match firewall.admission(arrival, &choice.name, choice.addr).await {
                    Ok(found) => admission = found,
                    Err(error) => {
                        tracing::warn!("cannot read the host's own firewall: {error}");
                    }
                }
            }
        }
        Err(error) if options.masquerade => {
            tracing::error!("--ip-masq needs {}", program(mode));
            return Err(DaemonError::Firewall(error.to_string()));
        }
        Err(error) if options.forward => tracing::warn!("no forward rules: {error}"),
        Err(error) => tracing::debug!("no traffic rules: {error}"),
    }
    report(&admission, &mut registration.plan);
    Ok(Prepared {
        firewall,
        admission,
        lock,
    })
}

/// Takes the traffic rules of this network namespace for us, or says who has them.
fn lock(options: &TrafficOptions) -> Result<Option<NameLock>, DaemonError> {
    let pid = match NameLock::take(KEEPS_RULES) {
        Ok(lock) => return Ok(Some(lock)),
        Err(LockError::Held { pid }) => pid,
        Err(LockError::Io(source)) => {
            return Err(DaemonError::Process {
                action: "take the traffic rules of this network namespace",
                source,
            });
        }
    };
    let other = format!("another daemon (pid {pid}) keeps the traffic rules of this node");
    if options.masquerade {
        return Err(DaemonError::Firewall(format!(
            "{other}: start this one with --ip-masq=false, or stop the other"
        )));
    }
    if options.forward {
        tracing::warn!(
            "{other}: no forward rules for this network: where the node drops what it forwards, accept the network \
             by a rule of your own"
        );
    }
    Ok(None)
}

/// The question how the host's own firewall treats the tunnel.
#[derive(Clone)]
pub(super) struct Admitting {
    programs: Vec<PathBuf>,
    mode: Mode,
    arrival: Option<Arrival>,
    device: String,
    addr: IpAddr,
}

impl Admitting {
    pub(super) fn of(options: &TrafficOptions, registration: &Registration) -> Self {
        let choice = registration.choice();
        Self {
            programs: options.programs.clone(),
            mode: if registration.config.enable_nftables {
                Mode::Nftables
            } else {
                Mode::Iptables
            },
            arrival: arrival(&registration.plan),
            device: choice.name.clone(),
            addr: choice.addr,
        }
    }

    /// What it says now.
    pub(super) async fn ask(&self) -> Result<Admission, String> {
        let unread = |error: Error| format!("the host's own firewall: {error}");
        let Some(arrival) = self.arrival else {
            return Ok(Admission::Open);
        };
        let firewall = Firewall::open(self.programs.clone(), self.mode).await;
        let firewall = firewall.map_err(unread)?;
        let found = firewall.admission(arrival, &self.device, self.addr).await;
        found.map_err(unread)
    }
}

/// How what peers send arrives; none where they route to us.
pub(super) const fn arrival(plan: &Plan) -> Option<Arrival> {
    match (plan, plan.port()) {
        (Plan::Ipip(_), _) => Some(Arrival::Ipip),
        (_, Some(port)) => Some(Arrival::Udp(port)),
        (_, None) => None,
    }
}

/// Tells how the host's own firewall treats the tunnel, and yields to it where we can.
fn report(admission: &Admission, plan: &mut Plan) {
    let (Some(refusal), Some(arrival)) = (admission.refusal(), arrival(plan)) else {
        return;
    };
    let source_port = plan.source_port_mut();
    match (admission, &source_port) {
        (Admission::Open, _) => {}
        (Admission::Tracked(_), Some(_)) => tracing::info!(
            "the host's firewall admits {arrival} only with connection tracking, which stays on: {refusal}"
        ),
        (Admission::Tracked(_), None) => tracing::info!(
            "the host's firewall admits {arrival} only with connection tracking: {refusal}"
        ),
        (Admission::Established(_), Some(_)) => tracing::warn!(
            "the host's firewall admits {arrival} only as an established connection: source ports stay \
             fixed and tracking stays on; accept the port to lift both: {refusal}"
        ),
        // The kernel's VXLAN varies its source ports, so no connection is ever established; IP in IP has none, and is
        // one only once both ends have sent.
        (Admission::Established(_), None) | (Admission::Closed(_), _) => tracing::error!(
            "the host's firewall does not admit the tunnel: accept {arrival}: {refusal}"
        ),
    }
    if let Some(source_port) = source_port
        && !admission.varying_source_ports()
    {
        *source_port = SourcePort::Fixed;
    }
}

const fn program(mode: Mode) -> &'static str {
    match mode {
        Mode::Nftables => "nft, for EnableNFTables is true",
        Mode::Iptables => "iptables, for EnableNFTables is false",
    }
}

impl Traffic {
    /// Puts the rules in place and has them kept.
    pub(super) async fn start(
        prepared: Prepared,
        options: &TrafficOptions,
        registration: &Registration,
    ) -> Result<Self, DaemonError> {
        let (wanted, receiver) = watch::channel(Rules::none());
        let mut traffic = Self {
            keeper: None,
            status: None,
            _wanted: wanted,
            lock: prepared.lock,
            missing: None,
        };
        let firewall = match prepared.firewall {
            Ok(firewall) if traffic.lock.is_some() => Arc::new(firewall),
            // Both were said before.
            Ok(_) | Err(_) => return Ok(traffic),
        };
        let mut rules = rules(options, registration, &prepared.admission)
            .map_err(|error| DaemonError::Firewall(error.to_string()))?;
        match firewall.apply(&rules).await {
            Ok(applied) => {
                for place in &applied.swept {
                    tracing::info!("removed {place}, which the other traffic manager has left");
                }
                if let Some(error) = &applied.tracked_because {
                    tracing::warn!("the tunnel's datagrams are tracked as connections: {error}");
                    // A cost, not a fault: without wanting it, the rules are complete.
                    rules = families(options, &registration.config, &registration.lease.subnets)
                        .map_err(|error| DaemonError::Firewall(error.to_string()))?;
                }
            }
            Err(error) if options.masquerade => {
                return Err(DaemonError::Firewall(error.to_string()));
            }
            Err(error) => tracing::warn!("traffic rules are incomplete: {error}"),
        }
        traffic._wanted.send_replace(rules);
        match Keeper::new(firewall, options.resync) {
            Ok(keeper) => {
                traffic.status = Some(keeper.status());
                traffic.keeper = Some(tokio::spawn(async move {
                    let Err(error) = keeper.run(receiver).await;
                    tracing::error!("traffic rules are no longer looked after: {error}");
                }));
            }
            Err(error) => {
                tracing::error!("traffic rules are not looked after: {error}");
                traffic.missing = Some(error.to_string());
            }
        }
        Ok(traffic)
    }

    /// Why the rules are not as they should be, if they are not.
    pub(super) fn problem(&self) -> Option<String> {
        let status = self.status.as_ref();
        self.missing
            .clone()
            .or_else(|| status.and_then(|status| status.borrow().error.clone()))
    }

    /// Returns when the keeper has looked: there may be another problem, or none any more.
    pub(super) async fn looked(&mut self) {
        if let Some(status) = &mut self.status
            && status.changed().await.is_ok()
        {
            return;
        }
        pending().await
    }

    /// What the keeper has done.
    pub(super) fn kept(&self) -> KeeperStatus {
        let status = self.status.as_ref();
        status
            .map(|status| status.borrow().clone())
            .unwrap_or_default()
    }
}

/// What should be in place.
fn rules(
    options: &TrafficOptions,
    registration: &Registration,
    admission: &Admission,
) -> Result<Rules, Error> {
    if !options.masquerade && !options.forward {
        // Whoever wants no rules of ours wants none: what an earlier run left is removed.
        return Ok(Rules::none());
    }
    let mut rules = families(options, &registration.config, &registration.lease.subnets)?;
    if let Plan::Udp { backend, underlay } = &registration.plan
        && admission.untracked()
    {
        let family = match underlay.bind {
            std::net::SocketAddr::V4(_) => Family::V4,
            std::net::SocketAddr::V6(_) => Family::V6,
        };
        rules = rules.with_notrack(Notrack {
            port: backend.port,
            underlay: Underlay::Only(family),
        });
    }
    Ok(rules)
}

fn families(
    options: &TrafficOptions,
    config: &NetworkConfig,
    subnets: &Subnets,
) -> Result<Rules, Error> {
    let mut rules = Rules::none();
    if let Some(family) = family(options, config.ipv4.as_ref(), subnets.v4())? {
        rules = rules.with(family);
    }
    if let Some(family) = family(options, config.ipv6.as_ref(), subnets.v6())? {
        rules = rules.with(family);
    }
    Ok(rules)
}

fn family<N: OverlayPrefix + Into<IpNet>>(
    options: &TrafficOptions,
    pool: Option<&SubnetPool<N>>,
    subnet: Option<N>,
) -> Result<Option<FamilyRules>, Error> {
    let (Some(pool), Some(subnet)) = (pool, subnet) else {
        return Ok(None);
    };
    if !options.masquerade && !options.forward {
        return Ok(None);
    }
    let masquerade = options.masquerade.then_some(Masquerade {
        fully_random: options.fully_random,
        exempt: Vec::new(),
    });
    FamilyRules::new(pool.network(), subnet, masquerade, options.forward).map(Some)
}
