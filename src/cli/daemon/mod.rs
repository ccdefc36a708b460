//! Owns the step from the flags of `loden daemon` to validated [`Options`]. Never starts anything by itself.

mod flags;
mod print;
pub(super) mod values;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::thread::available_parallelism;

use anyhow::{Context as _, bail};

use crate::daemon::{self, Options, StoreOptions, TrafficOptions};
use crate::debug::socket;
use crate::iface::{Selector, Wanted};
use crate::store::etcd::EtcdSettings;

pub use flags::DaemonArgs;
use flags::{ETCD_ENDPOINTS, ETCD_PREFIX, LOCAL_STORE, StoreArgs};
pub(super) use flags::{SUBNET_FILE, socket_path};
pub(super) use print::{Understood, understood};

/// Where programs are if nobody says so.
const DEFAULT_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

impl StoreArgs {
    fn choose(self, as_flanneld: bool) -> anyhow::Result<StoreOptions> {
        let file = |path: Option<PathBuf>| path.filter(|path| !path.as_os_str().is_empty());
        let text = |text: Option<String>| text.filter(|text| !text.is_empty());
        let endpoints = text(self.etcd_endpoints);
        let prefix = text(self.etcd_prefix);
        let settings = EtcdSettings {
            ca_file: file(self.etcd_cafile),
            cert_file: file(self.etcd_certfile),
            key_file: file(self.etcd_keyfile),
            username: text(self.etcd_username).unwrap_or_default(),
            password: self.etcd_password.unwrap_or_default().0,
            ..EtcdSettings::default()
        };
        let etcd_is_named = endpoints.is_some()
            || prefix.is_some()
            || settings.ca_file.is_some()
            || settings.cert_file.is_some()
            || settings.key_file.is_some()
            || !settings.username.is_empty()
            || !settings.password.is_empty();
        if let Some(dir) = file(self.local_store) {
            if etcd_is_named {
                bail!(
                    "--local-store and an --etcd flag or variable are both given: leave out one of them"
                );
            }
            return Ok(StoreOptions::Local(dir));
        }
        if !etcd_is_named && !as_flanneld {
            return Ok(StoreOptions::Local(PathBuf::from(LOCAL_STORE)));
        }
        Ok(StoreOptions::Etcd(EtcdSettings {
            endpoints: endpoints.unwrap_or_else(|| ETCD_ENDPOINTS.to_owned()),
            prefix: prefix.unwrap_or_else(|| ETCD_PREFIX.to_owned()),
            ..settings
        }))
    }
}

impl DaemonArgs {
    /// What is not available, by name; and a warning for each flag without effect.
    fn check_kubernetes(&self) -> anyhow::Result<()> {
        let kube = &self.kube;
        if kube.kube_subnet_mgr {
            bail!(
                "--kube-subnet-mgr is not available yet: leases are kept in etcd (--etcd-endpoints) or \
                 in a directory (--local-store)"
            );
        }
        for (flag, given) in [
            ("kube-api-url", kube.kube_api_url.is_some()),
            (
                "kube-annotation-prefix",
                kube.kube_annotation_prefix.is_some(),
            ),
            ("kubeconfig-file", kube.kubeconfig_file.is_some()),
            ("net-config-path", kube.net_config_path.is_some()),
            (
                "set-node-network-unavailable",
                kube.set_node_network_unavailable.is_some(),
            ),
            ("vmodule", self.vmodule.is_some()),
            ("log_backtrace_at", self.log_backtrace_at.is_some()),
        ] {
            if given {
                tracing::warn!("--{flag} has no effect here");
            }
        }
        Ok(())
    }

    /// `as_flanneld`: called by the name of the original, so its defaults count.
    pub(super) fn into_options(self, as_flanneld: bool) -> anyhow::Result<Options> {
        self.check_kubernetes()?;
        let reach = self.iface_can_reach.filter(|text| !text.is_empty());
        let reach = reach
            .map(|text| {
                let ip: IpAddr = text
                    .parse()
                    .with_context(|| format!("--iface-can-reach {text:?}: give an address"))?;
                anyhow::Ok(Selector::Reach(ip))
            })
            .transpose()?;
        let named = self.iface.iter().filter(|text| !text.is_empty());
        let selectors = named
            .map(|text| Selector::parse(text))
            .chain(
                self.iface_regex
                    .into_iter()
                    .flatten()
                    .map(Selector::Pattern),
            )
            .chain(reach)
            .collect();
        let status_socket = match self.status_socket {
            Some(path) => path,
            None => socket::beside(&self.subnet_file),
        };
        socket::check_path(&status_socket)?;
        let renew_margin = self.store.subnet_lease_renew_margin;
        Ok(Options {
            wanted: Wanted {
                selectors,
                public_ip: self.public_ip.and_then(|given| given.0),
                public_ipv6: self.public_ipv6.and_then(|given| given.0),
            },
            subnet_file: self.subnet_file,
            status_socket,
            store: self.store.choose(as_flanneld)?,
            renew_margin,
            traffic: TrafficOptions {
                masquerade: self.traffic.ip_masq,
                fully_random: !self.traffic.ip_masq_fully_random_disable,
                forward: self.traffic.iptables_forward_rules,
                resync: self.traffic.iptables_resync,
                blackhole: self.traffic.ip_blackhole_route,
                programs: search_path(),
            },
            health: self
                .healthz_port
                .0
                .map(|port| SocketAddr::new(self.healthz_ip, port)),
            // Affinity and cgroup quota are both in it; unreadable ones count as one CPU.
            workers: self
                .workers
                .unwrap_or_else(|| available_parallelism().map_or(1, std::num::NonZero::get)),
            pin: self.pin,
            engine: self.engine,
        })
    }
}

/// The directories of PATH.
pub(super) fn search_path() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").filter(|path| !path.is_empty());
    let path = path.unwrap_or_else(|| DEFAULT_PATH.into());
    let all = std::env::split_paths(&path);
    all.filter(|dir| dir.is_absolute() && *dir != Path::new("/"))
        .collect()
}

/// Runs the agent, or says how it would.
pub(super) fn run(
    args: DaemonArgs,
    as_flanneld: bool,
    understood: &[Understood],
) -> anyhow::Result<()> {
    let print = args.print_config;
    let options = args.into_options(as_flanneld)?;
    if print {
        return print::print(&options, understood);
    }
    Ok(daemon::run(options)?)
}
