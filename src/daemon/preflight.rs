//! Owns the look at a node before a daemon runs on it: everything that would stand in its way, each by its name.
//! Never changes anything.

use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::num::NonZero;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use nix::unistd::{AccessFlags, access};
use serde::Serialize;

use super::{Options, StoreOptions, VxlanPlace, network_config, register};
use crate::backend::device;
use crate::backend::ends;
use crate::backend::kernel::{Kernel, PROTOCOL_LODEN, Route};
use crate::backend::plan::Plan;
use crate::backend::preflight;
use crate::backend::udp;
use crate::config::{Backend, NetworkConfig};
use crate::debug::socket::{self, Request};
use crate::firewall::{Admission, Firewall, Mode};
use crate::iface::{Choice, Snapshot};
use crate::netlink::Netlink;
use crate::store::env_file::PreviousEnv;

/// What the daemon needs the capability for, and its number (capability.h).
const CAPABILITIES: [(&str, u32, &str); 2] = [
    ("CAP_NET_ADMIN", 12, "devices, routes and the tunnel"),
    ("CAP_NET_RAW", 13, "ICMP echoes to peers without loden"),
];

/// Files that are searched for a name, at most so many bytes of each.
const MAX_FILE: u64 = 1 << 20;

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
    capabilities(&mut checks, Path::new("/"));
    files(&mut checks, options);
    others(&mut checks, options, Path::new("/"));
    managers(&mut checks, Path::new("/"));
    cni(&mut checks, &Path::new("/").join("etc/cni/net.d"));
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

fn capabilities(checks: &mut Checks, root: &Path) {
    let status = fs::read_to_string(root.join("proc/self/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| {
        let mask = line.strip_prefix("CapEff:")?.trim();
        u64::from_str_radix(mask, 16).ok()
    });
    let mask = mask.unwrap_or(0);
    for (name, bit, purpose) in CAPABILITIES {
        if mask >> bit & 1 == 1 {
            checks.good("capability", name);
        } else if bit == 12 {
            checks.fail(
                "capability",
                format!("{name} is missing, for {purpose}: run as root, or grant it"),
            );
        } else {
            checks.warn("capability", format!("{name} is missing, for {purpose}"));
        }
    }
}

/// The places that the daemon writes to.
fn files(checks: &mut Checks, options: &Options) {
    let mut places: Vec<(&str, &Path)> = vec![
        ("subnet file", &options.subnet_file),
        ("status socket", &options.status_socket),
    ];
    if let StoreOptions::Local(dir) = &options.store {
        places.push(("store", dir));
    }
    for (what, path) in places {
        // The nearest directory that is there is where the others would be made.
        let there = path.ancestors().skip(1).find(|dir| dir.is_dir());
        let Some(there) = there else {
            continue;
        };
        match access(there, AccessFlags::W_OK) {
            Ok(()) => checks.good("files", format!("{what} {}", path.display())),
            Err(error) => checks.fail(
                "files",
                format!(
                    "{what} {}: {} cannot be written: {error}",
                    path.display(),
                    there.display()
                ),
            ),
        }
    }
}

/// Other daemons of this network namespace, ours or the original's.
fn others(checks: &mut Checks, options: &Options, root: &Path) {
    if socket::ask(&options.status_socket, &Request::Status).is_ok() {
        checks.fail(
            "other daemons",
            format!(
                "one answers at {}: stop it first",
                options.status_socket.display()
            ),
        );
    }
    let namespace = |process: &Path| fs::read_link(process.join("ns/net")).ok();
    let own = namespace(&root.join("proc/self"));
    let mut found = Vec::new();
    for (pid, process) in processes(root) {
        let arguments = fs::read(process.join("cmdline")).unwrap_or_default();
        let mut arguments = arguments.split(|&byte| byte == 0);
        let program = arguments.next().unwrap_or_default();
        let program = String::from_utf8_lossy(program).into_owned();
        let name = Path::new(&program).file_name().unwrap_or_default();
        let is_one = name == "flanneld"
            || (name == "loden" && arguments.next() == Some(b"daemon".as_slice()));
        if is_one && namespace(&process) == own {
            found.push(format!("{program} (pid {pid})"));
        }
    }
    match found.as_slice() {
        [] => checks.good("other daemons", "none in this network namespace"),
        found => checks.fail(
            "other daemons",
            format!(
                "{} runs in this network namespace: stop it first",
                found.join(", ")
            ),
        ),
    }
}

fn processes(root: &Path) -> impl Iterator<Item = (u32, PathBuf)> {
    let entries = fs::read_dir(root.join("proc")).into_iter().flatten();
    entries.flatten().filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        Some((pid, entry.path()))
    })
}

/// Programs that take devices of others for their own.
fn managers(checks: &mut Checks, root: &Path) {
    const NETWORK_MANAGER: &[&str] = &[
        "etc/NetworkManager/conf.d",
        "run/NetworkManager/conf.d",
        "usr/lib/NetworkManager/conf.d",
    ];
    const NETWORKD: &[&str] = &[
        "etc/systemd/network",
        "run/systemd/network",
        "usr/lib/systemd/network",
    ];
    let running: Vec<String> = processes(root)
        .filter_map(|(_, process)| fs::read_to_string(process.join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .collect();
    for (comm, name, dirs, cure) in [
        (
            "NetworkManager",
            "NetworkManager",
            NETWORK_MANAGER,
            "a file in /etc/NetworkManager/conf.d with: [keyfile] unmanaged-devices=interface-name:flannel*;interface-name:cni*",
        ),
        // The kernel keeps fifteen characters of a name.
        (
            "systemd-network",
            "systemd-networkd",
            NETWORKD,
            "a file in /etc/systemd/network with: [Match] Name=flannel* cni* and [Link] Unmanaged=yes",
        ),
    ] {
        if !running.iter().any(|running| running == comm) {
            continue;
        }
        if dirs.iter().any(|dir| mentions(&root.join(dir), "flannel")) {
            checks.good(
                "managers",
                format!("{name} runs, and is told of flannel's devices"),
            );
        } else {
            checks.warn(
                "managers",
                format!("{name} runs, and may change flannel's devices: tell it to leave them alone, by {cure}"),
            );
        }
    }
}

/// Whether a file in a directory has this word.
fn mentions(dir: &Path, word: &str) -> bool {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| {
            entry
                .metadata()
                .is_ok_and(|meta| meta.is_file() && meta.len() <= MAX_FILE)
        })
        .any(|entry| fs::read_to_string(entry.path()).is_ok_and(|text| text.contains(word)))
}

/// Configurations of other pod networks.
fn cni(checks: &mut Checks, dir: &Path) {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<(String, bool)> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let is_conf = [".conf", ".conflist", ".json"]
                .iter()
                .any(|end| name.ends_with(end));
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            is_conf.then(|| (name, text.contains("\"flannel\"")))
        })
        .collect();
    names.sort();
    match names.first() {
        None => checks.good("cni", format!("no configuration in {} yet", dir.display())),
        Some((first, true)) => checks.good("cni", format!("{}/{first} is flannel's", dir.display())),
        Some((first, false)) => checks.warn(
            "cni",
            format!(
                "{}/{first} is of another network and comes first in the alphabet, so that pods get it: remove it",
                dir.display()
            ),
        ),
    }
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
    overlaps(checks, &kernel, options, config, &snapshot, &choice).await?;
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
        firewall(checks, options, config, &choice, port).await;
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
            Ok(Some(there)) => there.vxlan.is_some() && device::is_name(&link.name),
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
    choice: &Choice,
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
    let conflicts = preflight::conflicts(snapshot, &foreign, &networks, &own, choice.public);
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
        Plan::HostGw(_) => {}
        Plan::Udp { .. } => match tun() {
            Ok(_) => checks.good("devices", format!("{TUN} can be opened")),
            Err(error) => checks.fail("devices", told(error)),
        },
        Plan::Vxlan(_) => {
            let kernel = options.vxlan != VxlanPlace::User && has_vxlan(Path::new("/"));
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

/// Whether the kernel's VXLAN is loaded, built in, or there to be loaded.
fn has_vxlan(root: &Path) -> bool {
    if root.join("sys/module/vxlan").exists() {
        return true;
    }
    let release = fs::read_to_string(root.join("proc/sys/kernel/osrelease")).unwrap_or_default();
    let dir = root.join("lib/modules").join(release.trim());
    ["modules.builtin", "modules.dep"]
        .iter()
        .any(|list| fs::read_to_string(dir.join(list)).is_ok_and(|text| text.contains("/vxlan.ko")))
}

/// Binds the port, and lets it go.
fn port_is_free(checks: &mut Checks, addr: SocketAddr, what: &str) {
    match UdpSocket::bind(addr) {
        Ok(_) => checks.good("ports", format!("UDP {addr} is free, for the {what}")),
        Err(error) => {
            let holder = holder(Path::new("/"), addr.port());
            let holder = holder.map_or_else(String::new, |holder| format!(", held by {holder}"));
            checks.fail(
                "ports",
                format!("UDP {addr} cannot be had for the {what}: {error}{holder}: stop what holds it (ss -ulnp)"),
            );
        }
    }
}

/// Who has a UDP port bound, if it is a process that can be seen: by the inode of its socket (proc(5)).
fn holder(root: &Path, port: u16) -> Option<String> {
    let tables = ["udp", "udp6"].map(|table| {
        fs::read_to_string(root.join("proc/thread-self/net").join(table)).unwrap_or_default()
    });
    let suffix = format!(":{port:04X}");
    let inode = tables
        .iter()
        .flat_map(|table| table.lines().skip(1))
        .find_map(|line| {
            let columns: Vec<&str> = line.split_whitespace().collect();
            let is_it = columns.get(1).is_some_and(|local| local.ends_with(&suffix));
            is_it.then(|| columns.get(9).map(|inode| format!("socket:[{inode}]")))?
        })?;
    processes(root).find_map(|(pid, process)| {
        let mut files = fs::read_dir(process.join("fd")).ok()?.flatten();
        let has_it = files.any(|file| {
            fs::read_link(file.path()).is_ok_and(|target| target.as_os_str() == inode.as_str())
        });
        let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
        has_it.then(|| format!("{} (pid {pid})", name.trim()))
    })
}

/// The host's own firewall.
async fn firewall(
    checks: &mut Checks,
    options: &Options,
    config: &NetworkConfig,
    choice: &Choice,
    port: u16,
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
    match firewall.admission(port, &choice.name, choice.addr).await {
        Ok(Admission::Open) => checks.good("firewall", format!("it admits UDP port {port}")),
        Ok(Admission::Tracked(refusal) | Admission::Established(refusal)) => checks.warn(
            "firewall",
            format!("it admits UDP port {port} with connection tracking only: {refusal}"),
        ),
        Ok(Admission::Closed(refusal)) => checks.fail(
            "firewall",
            format!("it does not admit the tunnel: accept UDP port {port}: {refusal}"),
        ),
        Err(error) => checks.warn("firewall", error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn found(look: impl FnOnce(&mut Checks)) -> Vec<(Grade, String)> {
        let mut checks = Checks::default();
        look(&mut checks);
        checks
            .0
            .into_iter()
            .map(|check| (check.grade, check.found))
            .collect()
    }

    #[test]
    fn managers_of_devices_are_named_unless_they_are_told_to_keep_off() {
        let comm = ("proc/17/comm", "NetworkManager\n");
        let quiet = root(&[("proc/17/comm", "sshd\n")]);
        assert_eq!(found(|checks| managers(checks, quiet.path())), []);
        let meddling = root(&[comm, ("proc/18/comm", "systemd-network\n")]);
        let warnings = found(|checks| managers(checks, meddling.path()));
        assert_eq!(warnings.len(), 2);
        assert!(warnings.iter().all(|(grade, _)| *grade == Grade::Warning));
        assert!(
            warnings[0]
                .1
                .contains("unmanaged-devices=interface-name:flannel*")
        );
        let told = root(&[
            comm,
            (
                "etc/NetworkManager/conf.d/x.conf",
                "[keyfile]\nunmanaged-devices=interface-name:flannel*\n",
            ),
        ]);
        assert_eq!(
            found(|checks| managers(checks, told.path()))[0].0,
            Grade::Good
        );
    }

    #[test]
    fn configuration_of_another_network_that_comes_first_is_named() {
        let ours = (
            "net.d/10-flannel.conflist",
            r#"{"plugins":[{"type":"flannel"}]}"#,
        );
        let other = |name| (name, r#"{"type":"calico"}"#);
        let first = |files: &[(&str, &str)]| {
            let root = root(files);
            found(|checks| cni(checks, &root.path().join("net.d"))).remove(0)
        };
        assert_eq!(first(&[]).0, Grade::Good);
        assert_eq!(first(&[ours, other("net.d/20-calico.conf")]).0, Grade::Good);
        assert_eq!(first(&[ours, other("net.d/00-notes.txt")]).0, Grade::Good);
        let (grade, text) = first(&[ours, other("net.d/05-calico.conf")]);
        assert_eq!(grade, Grade::Warning);
        assert!(text.contains("05-calico.conf"));
    }

    #[test]
    fn missing_capability_is_named_with_what_it_is_for() {
        let all = root(&[("proc/self/status", "Name:\tx\nCapEff:\t000001ffffffffff\n")]);
        let all = found(|checks| capabilities(checks, all.path()));
        assert!(
            all.iter().all(|(grade, _)| *grade == Grade::Good),
            "{all:?}"
        );
        let admin = root(&[("proc/self/status", "CapEff:\t0000000000001000\n")]);
        let admin = found(|checks| capabilities(checks, admin.path()));
        assert_eq!((admin[0].0, admin[1].0), (Grade::Good, Grade::Warning));
        let none = root(&[("proc/self/status", "CapEff:\t0000000000000000\n")]);
        let none = found(|checks| capabilities(checks, none.path()));
        assert_eq!(none[0].0, Grade::Failure);
    }

    #[test]
    fn vxlan_counts_where_it_is_loaded_built_in_or_a_module() {
        assert!(!has_vxlan(root(&[]).path()));
        assert!(has_vxlan(root(&[("sys/module/vxlan/refcnt", "0")]).path()));
        let release = ("proc/sys/kernel/osrelease", "6.1.0-x\n");
        for list in ["modules.builtin", "modules.dep"] {
            let path = format!("lib/modules/6.1.0-x/{list}");
            let has = root(&[release, (&path, "kernel/drivers/net/vxlan/vxlan.ko:\n")]);
            assert!(has_vxlan(has.path()), "{list}");
            let lacks = root(&[release, (&path, "kernel/drivers/net/veth.ko:\n")]);
            assert!(!has_vxlan(lacks.path()));
        }
    }
}
