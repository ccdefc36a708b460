//! Owns the daemons of a lab: the store they share, their command lines, and waiting for what they
//! promise. Never attaches pods.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::plan::{self, PodNet};
use super::process::Tracked;
use super::spec::cli_name;
use super::wait::{self, Interrupt};
use super::{Backend, Dialect, Error, Member, NetNs, Spec, Store, command};

/// A daemon writes `subnet.env` as soon as it has a lease and a device; on a busy machine that may take
/// a while, and only a failing lab ever waits this long.
const START_LIMIT: Duration = Duration::from_secs(20);

/// Makes the local store that all daemons of the lab share: flannel's network configuration, and an empty
/// directory of subnets.
///
/// # Errors
/// [`Error::Io`] names the file.
pub(crate) fn create_store(spec: &Spec, lab_dir: &Path) -> Result<(), Error> {
    let store = store_dir(lab_dir);
    let subnets = store.join("subnets");
    fs::create_dir_all(&subnets).map_err(Error::io("create", subnets.display().to_string()))?;
    let config = store.join("config");
    let backend = spec.backend.daemons();
    let text = serde_json::json!({ "Network": plan::NETWORK, "Backend": { "Type": backend } });
    fs::write(&config, format!("{text}\n"))
        .map_err(Error::io("write", config.display().to_string()))
}

/// Starts an etcd in `netns`, waits for it, and writes flannel's network configuration. No traffic
/// rules are asked for that the kernel may lack, so they are in nftables.
///
/// # Errors
/// [`Error::Missing`] without etcd and etcdctl; [`Error::Timeout`], [`Error::Ended`].
pub(crate) fn start_etcd(
    spec: &Spec,
    netns: &NetNs,
    lab_dir: &Path,
    interrupt: &Interrupt,
) -> Result<Tracked, Error> {
    let (_, addr) = plan::store(spec);
    let client = format!("http://{addr}:2379");
    let peer = format!("http://{addr}:2380");
    let mut command = Command::new("etcd");
    command
        .args(["--name", "lab", "--data-dir"])
        .arg(lab_dir.join("etcd-data"))
        .args([
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
        ])
        .args([
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
        ])
        .arg("--initial-cluster")
        .arg(format!("lab={peer}"));
    let mut server = Tracked::spawn(netns, lab_dir, "etcd", &mut command)?;
    let etcdctl = |args: &[&str]| {
        let mut all = vec!["ETCDCTL_API=3", "etcdctl", "--endpoints", &client];
        all.extend(args);
        command::run(Some(netns), "env", &all)
    };
    wait::until("an answer of etcd", START_LIMIT, interrupt, || {
        server.check_running()?;
        Ok(etcdctl(&["endpoint", "health"]).ok())
    })?;
    let config = serde_json::json!({
        "Network": plan::NETWORK,
        "EnableNFTables": true,
        "Backend": { "Type": spec.backend.daemons() },
    });
    etcdctl(&["put", "/coreos.com/network/config", &config.to_string()])?;
    Ok(server)
}

/// Starts one daemon in its node's namespace.
///
/// # Errors
/// [`Error::Io`] or [`Error::Missing`].
pub(crate) fn start(spec: &Spec, lab_dir: &Path, node: u8) -> Result<Tracked, Error> {
    let member = Member::Node(node);
    let netns = NetNs::named(spec.name.namespace(member));
    let files = node_dir(lab_dir, node);
    fs::create_dir_all(&files).map_err(Error::io("create", files.display().to_string()))?;
    let program = spec.daemon.as_deref().ok_or(Error::Invalid {
        what: "the daemon's program",
        given: String::new(),
        rule: "given when the backend is one of daemons",
    })?;
    Tracked::spawn(
        &netns,
        &files,
        "daemon",
        &mut daemon(program, spec, lab_dir, node),
    )
}

fn daemon(program: &Path, spec: &Spec, lab_dir: &Path, node: u8) -> Command {
    let files = node_dir(lab_dir, node);
    let mut command = Command::new(program);
    if spec.dialect == Dialect::Loden {
        command
            .args(["daemon", "--status-socket"])
            .arg(status_socket(lab_dir, node));
        // A lab has what was asked for, and nothing in its place.
        match spec.backend {
            Backend::Vxlan => command.args(["--vxlan", "kernel"]),
            Backend::UserVxlan => command.args(["--vxlan", "user"]),
            Backend::None
            | Backend::Plain
            | Backend::ByHand
            | Backend::Udp
            | Backend::HostGw
            | Backend::Ipip
            | Backend::WireguardGo => &mut command,
        };
    }
    command
        .args(["--iface", "eth0", "--public-ip"])
        .arg(plan::underlay_v4(node).to_string())
        .arg("--subnet-file")
        .arg(files.join("subnet.env"));
    if !spec.traffic_rules {
        command.arg("--iptables-forward-rules=false");
    }
    match spec.store {
        Store::Local => command.arg("--local-store").arg(store_dir(lab_dir)),
        Store::Etcd => {
            let endpoint = format!("http://{}:2379", plan::store(spec).1);
            command.arg("--etcd-endpoints").arg(endpoint)
        }
    };
    if let Some(engine) = &spec.engine {
        command.arg("--engine").arg(cli_name(engine));
    }
    if let Some(workers) = spec.workers {
        command.arg("--workers").arg(workers.to_string());
    }
    command
}

/// Waits for a daemon's `subnet.env` and reads the pod network from it.
///
/// # Errors
/// [`Error::Ended`] with the end of the log if the daemon gives up, [`Error::Timeout`],
/// [`Error::Malformed`], [`Error::Interrupted`].
pub(crate) fn await_subnet(
    daemon: &mut Tracked,
    lab_dir: &Path,
    node: u8,
    interrupt: &Interrupt,
) -> Result<PodNet, Error> {
    let path = node_dir(lab_dir, node).join("subnet.env");
    let text = wait::until(&path.display().to_string(), START_LIMIT, interrupt, || {
        daemon.check_running()?;
        // The daemon renames a complete file into place, so what is there is whole.
        Ok(fs::read_to_string(&path).ok())
    })?;
    PodNet::from_subnet_env(&text).map_err(|reason| Error::Malformed {
        path,
        expected: "flannel's subnet.env",
        reason,
    })
}

/// The directory with the files of one node's daemon.
pub(crate) fn node_dir(lab_dir: &Path, node: u8) -> PathBuf {
    lab_dir.join(Member::Node(node).to_string())
}

/// The socket on which a node's daemon answers `loden status`.
pub(crate) fn status_socket(lab_dir: &Path, node: u8) -> PathBuf {
    node_dir(lab_dir, node).join("status.sock")
}

fn store_dir(lab_dir: &Path) -> PathBuf {
    lab_dir.join("store")
}
