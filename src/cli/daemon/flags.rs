//! Owns the flags of `loden daemon`, named as flannel names them (specification section 1.2). Never acts on one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use clap::builder::RangedU64ValueParser;

use super::values::{
    HealthPort, PublicIp, Secret, go_bool, health_ip, health_port, pattern, public_ip,
    renew_margin, resync, secret, verbosity,
};
use crate::daemon::VxlanPlace;
use crate::datapath::EngineKind;
use crate::debug::socket;
use crate::firewall::ResyncInterval;
use crate::iface::Pattern;

/// Where the original writes `subnet.env`.
pub(in crate::cli) const SUBNET_FILE: &str = "/run/flannel/subnet.env";

/// Where the original looks for etcd.
pub(super) const ETCD_ENDPOINTS: &str = "http://127.0.0.1:4001,http://127.0.0.1:2379";

/// Below which key the original keeps everything.
pub(super) const ETCD_PREFIX: &str = "/coreos.com/network";

/// What the keys of the original's annotations begin with.
pub(super) const ANNOTATION_PREFIX: &str = "flannel.alpha.coreos.com";

/// Where the local store is.
pub(super) const LOCAL_STORE: &str = "/var/lib/loden";

/// Flags of the agent. Each of flannel's can also be set by its variable, FLANNELD_IFACE for --iface.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub struct DaemonArgs {
    /// External interface, by name or address; may be repeated, the first that fits is used
    /// [default: that of the default route]
    #[arg(long, value_name = "NAME|IP", help_heading = "External interface")]
    pub(super) iface: Vec<String>,

    /// External interface, by a regular expression on its addresses or name; may be repeated, tried after
    /// --iface
    #[arg(long, value_name = "REGEX", value_parser = pattern, help_heading = "External interface")]
    pub(super) iface_regex: Vec<Option<Pattern>>,

    /// External interface, the one that the route to this address leaves by; tried last
    #[arg(long, value_name = "IP", help_heading = "External interface")]
    pub(super) iface_can_reach: Option<String>,

    /// IPv4 address that other nodes use; without --iface it also selects the interface
    /// [default: the address of the external interface]
    #[arg(long, value_name = "IP", value_parser = public_ip::<Ipv4Addr>, help_heading = "External interface")]
    pub(super) public_ip: Option<PublicIp<Ipv4Addr>>,

    /// IPv6 address that other nodes use, likewise
    #[arg(long, value_name = "IP", value_parser = public_ip::<Ipv6Addr>, help_heading = "External interface")]
    pub(super) public_ipv6: Option<PublicIp<Ipv6Addr>>,

    /// File to write for the CNI plugin
    #[arg(long, value_name = "FILE", default_value = SUBNET_FILE, value_parser = file_path)]
    pub(super) subnet_file: PathBuf,

    #[command(flatten)]
    pub(super) store: StoreArgs,

    #[command(flatten)]
    pub(super) traffic: TrafficArgs,

    #[command(flatten)]
    pub(super) kube: KubeArgs,

    /// Address to answer /healthz, /readyz and /metrics on
    #[arg(long, value_name = "IP", default_value = "0.0.0.0", value_parser = health_ip, help_heading = "Health")]
    pub(super) healthz_ip: IpAddr,

    /// Port to answer them on; 0 for none
    #[arg(long, value_name = "PORT", default_value = "0", value_parser = health_port, help_heading = "Health")]
    pub(super) healthz_port: HealthPort,

    /// Number of workers, 128 at most [default: the CPUs this process may use, by affinity and cgroup quota]
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024), help_heading = "Data plane")]
    pub(super) workers: Option<usize>,

    /// Pin each worker to one CPU
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_value = "false", default_missing_value = "true", value_parser = go_bool, help_heading = "Data plane")]
    pub(super) pin: bool,

    /// Implementation of the packet path
    #[arg(long, value_name = "ENGINE", value_enum, default_value_t = EngineKind::Mmsg, help_heading = "Data plane")]
    pub(super) engine: EngineKind,

    /// Who carries the packets of the vxlan backend
    #[arg(long, value_name = "PLACE", value_enum, default_value_t = VxlanPlace::Auto, help_heading = "Data plane")]
    pub(super) vxlan: VxlanPlace,

    /// UDP port on which peers' probes are answered, and on which theirs are asked; 0 for none
    #[arg(long, value_name = "PORT", default_value_t = crate::wire::probe::PORT, help_heading = "Probes")]
    pub(super) probe_port: u16,

    /// Probe a few peers every second, so that the status tells how they are reached
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_value = "true", default_missing_value = "true", value_parser = go_bool, help_heading = "Probes")]
    pub(super) background_probes: bool,

    /// Socket that `loden status` asks [default: beside the subnet file, subnet.sock for subnet.env]
    #[arg(long, value_name = "PATH", value_parser = socket_path)]
    pub(super) status_socket: Option<PathBuf>,

    /// Say what was understood, and from where, and end
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_value = "false", default_missing_value = "true", value_parser = go_bool)]
    pub(in crate::cli) print_config: bool,

    /// Log verbosity: 0 info, 1 debug, 2 trace, 3 and more also what libraries trace
    #[arg(long = "v", short = 'v', value_name = "N", default_value = "0", value_parser = verbosity)]
    pub(in crate::cli) verbosity: u8,

    /// Of flannel's logger; without effect here
    #[arg(long, hide = true)]
    pub(super) vmodule: Option<String>,

    /// Of flannel's logger; without effect here
    #[arg(long = "log_backtrace_at", hide = true)]
    pub(super) log_backtrace_at: Option<String>,
}

/// Where the network configuration and the leases are.
#[derive(Debug, Args)]
#[command(next_help_heading = "Store")]
pub(super) struct StoreArgs {
    /// Keep the leases in this directory, with the network configuration in its file `config`
    /// [default: /var/lib/loden, unless called as flanneld or with an --etcd flag]
    #[arg(long, value_name = "DIR", value_parser = any_path)]
    pub(super) local_store: Option<PathBuf>,

    /// Keep the leases in etcd, at these servers, separated by commas
    /// [default: http://127.0.0.1:4001,http://127.0.0.1:2379]
    #[arg(long, value_name = "URLS")]
    pub(super) etcd_endpoints: Option<String>,

    /// Key below which everything is [default: /coreos.com/network]
    #[arg(long, value_name = "KEY")]
    pub(super) etcd_prefix: Option<String>,

    /// Key of our certificate for etcd
    #[arg(long, value_name = "FILE", value_parser = any_path)]
    pub(super) etcd_keyfile: Option<PathBuf>,

    /// Our certificate for etcd
    #[arg(long, value_name = "FILE", value_parser = any_path)]
    pub(super) etcd_certfile: Option<PathBuf>,

    /// Who may sign etcd's certificates [default: whom the system trusts]
    #[arg(long, value_name = "FILE", value_parser = any_path)]
    pub(super) etcd_cafile: Option<PathBuf>,

    /// User for etcd
    #[arg(long, value_name = "NAME")]
    pub(super) etcd_username: Option<String>,

    /// Password for etcd; better given by its variable, for everybody may read command lines
    #[arg(long, value_name = "PASSWORD", value_parser = secret)]
    pub(super) etcd_password: Option<Secret>,

    /// Renew the lease so many minutes before it ends
    #[arg(long, value_name = "MINUTES", default_value = "60", value_parser = renew_margin)]
    pub(super) subnet_lease_renew_margin: Duration,
}

/// The node's traffic rules.
#[derive(Debug, Args)]
#[command(next_help_heading = "Traffic rules")]
#[expect(clippy::struct_excessive_bools, reason = "switches of a command line")]
pub(super) struct TrafficArgs {
    /// Masquerade what pods send out of the network
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_value = "false", default_missing_value = "true", value_parser = go_bool)]
    pub(super) ip_masq: bool,

    /// Do not ask for random ports when masquerading
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_value = "false", default_missing_value = "true", value_parser = go_bool)]
    pub(super) ip_masq_fully_random_disable: bool,

    /// Accept the network's packets in the FORWARD chain
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_value = "true", default_missing_value = "true", value_parser = go_bool)]
    pub(super) iptables_forward_rules: bool,

    /// Look at the rules this often, at least
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = resync)]
    pub(super) iptables_resync: ResyncInterval,

    /// Keep a blackhole route to the node's own subnet
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_value = "false", default_missing_value = "true", value_parser = go_bool)]
    pub(super) ip_blackhole_route: bool,
}

/// The Kubernetes store.
#[derive(Debug, Args)]
#[command(next_help_heading = "Kubernetes")]
pub(super) struct KubeArgs {
    /// Keep the leases in the Node objects of Kubernetes; as the node NODE_NAME, or that of the pod POD_NAME in
    /// POD_NAMESPACE
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_value = "false", default_missing_value = "true", value_parser = go_bool)]
    pub(super) kube_subnet_mgr: bool,

    /// The API server [default: that of the kubeconfig, or of the pod's service account]
    #[arg(long, value_name = "URL")]
    pub(super) kube_api_url: Option<String>,

    /// What the keys of our annotations begin with [default: flannel.alpha.coreos.com]
    #[arg(long, value_name = "DOMAIN[/NAME]")]
    pub(super) kube_annotation_prefix: Option<String>,

    /// How to reach the API server [default: as the pod's service account]
    #[arg(long, value_name = "FILE")]
    pub(super) kubeconfig_file: Option<String>,

    /// The network configuration [default: /etc/kube-flannel/net-conf.json]
    #[arg(long, value_name = "FILE")]
    pub(super) net_config_path: Option<String>,

    /// Keep the node's condition NetworkUnavailable true to the state [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", value_parser = go_bool)]
    pub(super) set_node_network_unavailable: Option<bool>,
}

/// Also the empty one that templates leave behind.
fn any_path(text: &str) -> Result<PathBuf, std::convert::Infallible> {
    Ok(PathBuf::from(text))
}

fn file_path(text: &str) -> Result<PathBuf, &'static str> {
    let path = Path::new(text);
    if path.file_name().is_none() || text.ends_with('/') {
        return Err("name a file, not a directory");
    }
    Ok(path.to_owned())
}

pub(in crate::cli) fn socket_path(text: &str) -> Result<PathBuf, String> {
    let path = file_path(text)?;
    socket::check_path(&path).map_err(|e| e.to_string())?;
    Ok(path)
}
