//! Owns the look at a node before a daemon runs on it: everything that would stand in its way, each by its name.
//! Never changes anything.

mod host;

use std::fs::File;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::num::NonZero;
use std::path::Path;

use ipnet::IpNet;
use serde::Serialize;

use super::{Options, VxlanPlace, network_config, register, traffic};
use crate::backend::device;
use crate::backend::ends::{self, Ends};
use crate::backend::kernel::{Kernel, PROTOCOL_LODEN, Route};
use crate::backend::plan::Plan;
use crate::backend::preflight;
use crate::backend::udp;
use crate::config::{Backend, NetworkConfig};
use crate::firewall::{Admission, Arrival, Firewall, Mode};
use crate::iface::{Choice, Snapshot};
use crate::netlink::Netlink;
use crate::store::env_file::PreviousEnv;

/// How grave something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    /// As it should be.
    Good,
    /// It may do harm.
    Warning,
    /// The daemon would not run, or no packet would get through.
    Failure,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What.
    pub what: &'static str,
    /// How grave.
    pub grade: Grade,
    /// What was found, and what to do about it.
    pub found: String,
}

/// What is looked at, in order.
#[derive(Debug, Default)]
struct Checks(Vec<Check>);

impl Checks {
    fn good(&mut self, what: &'static str, found: impl Into<String>) {
        self.add(what, Grade::Good, found.into());
    }

    fn warn(&mut self, what: &'static str, found: impl Into<String>) {
        self.add(what, Grade::Warning, found.into());
    }

    fn fail(&mut self, what: &'static str, found: impl Into<String>) {
        self.add(what, Grade::Failure, found.into());
    }

    fn add(&mut self, what: &'static str, grade: Grade, found: String) {
        self.0.push(Check { what, grade, found });
    }
}

/// Looks at everything that a daemon with these options would meet on this node.
#[must_use]
pub fn preflight(options: &Options) -> Vec<Check> {
    let mut checks = Checks::default();
    host::capabilities(&mut checks, Path::new("/"));
    host::files(&mut checks, options);
    host::others(&mut checks, options, Path::new("/"));
    host::managers(&mut checks, Path::new("/"));
    host::cni(&mut checks, &Path::new("/").join("etc/cni/net.d"));
    let config = match network_config(options) {
        Ok(config) => config,
        Err(error) => {
            checks.fail("configuration", error.to_string());
            checks.warn(
                "network",
                "not looked at: that takes the network configuration",
            );
            return checks.0;
        }
    };
    checks.good(
        "configuration",
        format!(
            "network {}, backend {}",
            nets(&udp::networks(&config)),
            config.backend.name()
        ),
    );
    let looked = super::runtime()
        .map_err(|e| e.to_string())
        .and_then(|runtime| runtime.block_on(network(&mut checks, options, &config)));
    if let Err(error) = looked {
        checks.fail("network", error);
    }
    checks.0
}

fn nets(nets: &[IpNet]) -> String {
    let nets: Vec<String> = nets.iter().map(IpNet::to_string).collect();
    nets.join(" and ")
}

/// Whatever depends on the network configuration.
async fn network(
    checks: &mut Checks,
    options: &Options,
    config: &NetworkConfig,
) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let kernel = Netlink::connect().map_err(|e| text(&e))?;
    let snapshot = register::look(&kernel, &options.wanted)
        .await
        .map_err(|e| text(&e))?;
    for conflict in preflight::settings(&kernel, config) {
        match conflict.is_fatal() {
            true => checks.fail("settings", conflict.to_string()),
            false => checks.warn("settings", conflict.to_string()),
        }
    }
    if options.traffic.masquerade && kernel.setting("bridge/bridge-nf-call-iptables").is_none() {
        checks.warn(
            "settings",
            "net.bridge.bridge-nf-call-iptables is not there: iptables rules do not see what pods of this node send \
             to each other; if services need that, load it (modprobe br_netfilter)",
        );
    }
    leftovers(checks, &kernel, &snapshot).await;
    let search = ends::search(&snapshot, &options.wanted, config);
    let ends = match search.ends {
        Ok(ends) => ends,
        Err(error) => {
            checks.fail("interface", error.to_string());
            return Ok(());
        }
    };
    for end in ends.iter() {
        checks.good(
            "interface",
            format!(
                "{} with {}, MTU {}: {}",
                end.name, end.addr, end.mtu, end.reason
            ),
        );
        let strict = format!("ipv4/conf/{}/rp_filter", end.name);
        let is_strict = [strict.as_str(), "ipv4/conf/all/rp_filter"]
            .iter()
            .any(|path| kernel.setting(path).as_deref() == Some("1"));
        if is_strict && config.backend == Backend::HostGw {
            checks.warn(
                "settings",
                format!(
                    "rp_filter is strict on {}: packets that come back by another link are dropped; set it to 2",
                    end.name
                ),
            );
        }
    }
    let choice = ends.primary().clone();
    overlaps(checks, &kernel, options, config, &snapshot, &ends).await?;
    let plan = match Plan::new(config, ends) {
        Ok(plan) => plan,
        Err(error) => {
            checks.fail("backend", error.to_string());
            return Ok(());
        }
    };
    carrier(checks, options, &plan);
    if let Some(port) = plan.port() {
        port_is_free(checks, SocketAddr::new(choice.addr, port), "tunnel");
    }
    if let Some(arrival) = traffic::arrival(&plan) {
        firewall(checks, options, config, &choice, arrival).await;
    }
    if let Some(port) = options.probes.port.map(NonZero::get) {
        port_is_free(checks, SocketAddr::new(choice.addr, port), "probes");
    }
    Ok(())
}

/// What a run before, or the original, has left.
async fn leftovers(checks: &mut Checks, kernel: &impl Kernel, snapshot: &Snapshot) {
    for link in snapshot
        .links
        .iter()
        .filter(|link| link.name.starts_with("flannel"))
    {
        let kept = match kernel.link_at(link.index).await {
            Ok(Some(there)) => device::is_flannels(&there),
            Ok(None) | Err(_) => false,
        };
        if kept {
            checks.good(
                "devices",
                format!("{} is there, and is taken over", link.name),
            );
        } else {
            checks.warn(
                "devices",
                format!(
                    "{0} is there: whoever made it may still run, or has left it (ip link del {0})",
                    link.name
                ),
            );
        }
    }
}

/// Whatever of the node's own network lies in the overlay, or around it.
async fn overlaps(
    checks: &mut Checks,
    kernel: &impl Kernel,
    options: &Options,
    config: &NetworkConfig,
    snapshot: &Snapshot,
    ends: &Ends,
) -> Result<(), String> {
    let routes = kernel.routes().await.map_err(|error| error.to_string())?;
    let previous = PreviousEnv::read(&options.subnet_file).ok();
    let own = previous.and_then(|env| env.previous());
    let own = own.map(|own| udp::nets(&own)).unwrap_or_default();
    let networks = udp::networks(config);
    let name_of = |route: &Route| {
        let mut links = snapshot.links.iter();
        let link = links.find(|link| link.index == route.link);
        link.map_or_else(|| route.link.to_string(), |link| link.name.clone())
    };
    // What is flannel's own is repaired by the daemon's first look.
    let foreign =
        |route: &&Route| route.protocol != PROTOCOL_LODEN && !name_of(route).starts_with("flannel");
    let foreign: Vec<Route> = routes.iter().filter(foreign).copied().collect();
    let mut conflicts = preflight::swallowed(&networks, ends.iter().map(|end| end.public));
    conflicts.extend(preflight::conflicts(snapshot, &foreign, &networks, &own));
    let mut clean = conflicts.is_empty();
    for conflict in conflicts {
        match conflict.is_fatal() {
            true => checks.fail("networks", conflict.to_string()),
            false => checks.warn("networks", conflict.to_string()),
        }
    }
    for network in &networks {
        let around = |route: &&Route| {
            route.gateway.is_none()
                && route.net.prefix_len() > 0
                && route.net.contains(network)
                && route.net != *network
        };
        for route in foreign.iter().filter(around) {
            clean = false;
            checks.warn(
                "networks",
                format!(
                    "the overlay network {network} lies inside {}, which is on {}: whoever has an address of both is \
                     reached by the overlay only",
                    route.net,
                    name_of(route)
                ),
            );
        }
    }
    if clean {
        checks.good(
            "networks",
            format!("nothing of this node overlaps {}", nets(&networks)),
        );
    }
    Ok(())
}

/// Whether what carries the packets can be had.
fn carrier(checks: &mut Checks, options: &Options, plan: &Plan) {
    const TUN: &str = "/dev/net/tun";
    let tun = || File::options().read(true).write(true).open(TUN);
    let told = |error: io::Error| {
        format!(
            "{TUN} cannot be opened: {error}: load it (modprobe tun), or hand the device into the container"
        )
    };
    match plan {
        Plan::HostGw(_) | Plan::Outside(_) => {}
        Plan::Ipip(_) if host::has_module(Path::new("/"), "ipip") => {
            checks.good("devices", "the kernel has IPIP");
        }
        Plan::Ipip(_) => checks.fail(
            "devices",
            "the kernel has no IPIP: load it (modprobe ipip), install the kernel's extra modules, or use another backend",
        ),
        Plan::Udp { .. } => match tun() {
            Ok(_) => checks.good("devices", format!("{TUN} can be opened")),
            Err(error) => checks.fail("devices", told(error)),
        },
        Plan::Vxlan(_) => {
            let kernel = options.vxlan != VxlanPlace::User && host::has_module(Path::new("/"), "vxlan");
            match (kernel, options.vxlan, tun()) {
                (true, _, _) => checks.good("devices", "the kernel has VXLAN"),
                (false, VxlanPlace::Kernel, _) => checks.fail(
                    "devices",
                    "the kernel has no VXLAN: install its extra modules, or use --vxlan auto",
                ),
                (false, VxlanPlace::Auto, Ok(_)) => checks.warn(
                    "devices",
                    "no VXLAN module was found: if the kernel has none, VXLAN is carried in user space",
                ),
                (false, VxlanPlace::User, Ok(_)) => {
                    checks.good("devices", format!("{TUN} can be opened"));
                }
                (false, VxlanPlace::Auto | VxlanPlace::User, Err(error)) => {
                    checks.fail("devices", told(error));
                }
            }
        }
    }
}

/// Binds the port, and lets it go.
fn port_is_free(checks: &mut Checks, addr: SocketAddr, what: &str) {
    match UdpSocket::bind(addr) {
        Ok(_) => checks.good("ports", format!("UDP {addr} is free, for the {what}")),
        Err(error) => {
            let holder = host::holder(Path::new("/"), addr.port());
            let holder = holder.map_or_else(String::new, |holder| format!(", held by {holder}"));
            checks.fail(
                "ports",
                format!("UDP {addr} cannot be had for the {what}: {error}{holder}: stop what holds it (ss -ulnp)"),
            );
        }
    }
}

/// The host's own firewall.
async fn firewall(
    checks: &mut Checks,
    options: &Options,
    config: &NetworkConfig,
    choice: &Choice,
    arrival: Arrival,
) {
    let mode = if config.enable_nftables {
        Mode::Nftables
    } else {
        Mode::Iptables
    };
    let firewall = match Firewall::open(options.traffic.programs.clone(), mode).await {
        Ok(firewall) => firewall,
        Err(error) if options.traffic.masquerade => {
            return checks.fail("firewall", error.to_string());
        }
        Err(error) => return checks.warn("firewall", error.to_string()),
    };
    match firewall.admission(arrival, &choice.name, choice.addr).await {
        Ok(Admission::Open) => checks.good("firewall", format!("it admits {arrival}")),
        Ok(Admission::Tracked(refusal) | Admission::Established(refusal)) => checks.warn(
            "firewall",
            format!("it admits {arrival} with connection tracking only: {refusal}"),
        ),
        Ok(Admission::Closed(refusal)) => checks.fail(
            "firewall",
            format!("it does not admit the tunnel: accept {arrival}: {refusal}"),
        ),
        Err(error) => checks.warn("firewall", error.to_string()),
    }
}
