//! Owns the step from the flags of `loden daemon` to validated [`Options`]. Never starts anything by itself.

mod flags;
mod print;
pub(super) mod values;

use std::net::{IpAddr, SocketAddr};
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::thread::available_parallelism;

use anyhow::{Context as _, bail};

use crate::daemon::{self, Options, ProbeOptions, StoreOptions, TrafficOptions};
use crate::debug::socket;
use crate::iface::{Selector, Wanted};
use crate::store::etcd::EtcdSettings;
use crate::store::kube::{Identity, KubeSettings, KubeSettingsError, NET_CONFIG, WATCH};

pub use flags::DaemonArgs;
use flags::{ANNOTATION_PREFIX, ETCD_ENDPOINTS, ETCD_PREFIX, KubeArgs, LOCAL_STORE, StoreArgs};
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

impl KubeArgs {
    /// The Kubernetes store, as the node that `variable` names.
    fn settings(self, variable: impl Fn(&str) -> String) -> anyhow::Result<KubeSettings> {
        let text = |text: Option<String>| text.filter(|text| !text.is_empty());
        let prefix = text(self.kube_annotation_prefix);
        let prefix = prefix.as_deref().unwrap_or(ANNOTATION_PREFIX);
        Ok(KubeSettings {
            api_url: text(self.kube_api_url),
            kubeconfig: text(self.kubeconfig_file).map(PathBuf::from),
            annotations: prefix.parse().map_err(KubeSettingsError::Prefix)?,
            net_config: text(self.net_config_path)
                .unwrap_or_else(|| NET_CONFIG.to_owned())
                .into(),
            report_condition: self.set_node_network_unavailable.unwrap_or(true),
            identity: Identity::new(
                &variable("NODE_NAME"),
                &variable("POD_NAMESPACE"),
                &variable("POD_NAME"),
            )?,
            watch: WATCH,
        })
    }

    /// What has no effect because the store is another, by name.
    fn idle(&self) -> impl Iterator<Item = &'static str> {
        [
            ("kube-api-url", self.kube_api_url.is_some()),
            (
                "kube-annotation-prefix",
                self.kube_annotation_prefix.is_some(),
            ),
            ("kubeconfig-file", self.kubeconfig_file.is_some()),
            ("net-config-path", self.net_config_path.is_some()),
            (
                "set-node-network-unavailable",
                self.set_node_network_unavailable.is_some(),
            ),
        ]
        .into_iter()
        .filter(|(_, given)| *given && !self.kube_subnet_mgr)
        .map(|(flag, _)| flag)
    }
}

impl DaemonArgs {
    /// A warning for each flag without effect.
    fn warn_about_idle(&self) {
        let log_flags = [
            ("vmodule", self.vmodule.is_some()),
            ("log_backtrace_at", self.log_backtrace_at.is_some()),
        ];
        let log_flags = log_flags.into_iter().filter(|(_, given)| *given);
        for flag in self.kube.idle().chain(log_flags.map(|(flag, _)| flag)) {
            tracing::warn!("--{flag} has no effect here");
        }
    }

    /// `as_flanneld`: called by the name of the original, so its defaults count.
    pub(super) fn into_options(self, as_flanneld: bool) -> anyhow::Result<Options> {
        self.warn_about_idle();
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
        // As in the original, this one overrules the options of all others.
        let store = if self.kube.kube_subnet_mgr {
            let variable = |name: &str| {
                let value = std::env::var_os(name).unwrap_or_default();
                value.to_string_lossy().into_owned()
            };
            StoreOptions::Kube(self.kube.settings(variable)?)
        } else {
            self.store.choose(as_flanneld)?
        };
        Ok(Options {
            wanted: Wanted {
                selectors,
                public_ip: self.public_ip.and_then(|given| given.0),
                public_ipv6: self.public_ipv6.and_then(|given| given.0),
            },
            subnet_file: self.subnet_file,
            status_socket,
            store,
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
                .unwrap_or_else(|| available_parallelism().map_or(1, NonZero::get)),
            pin: self.pin,
            engine: self.engine,
            vxlan: self.vxlan,
            probes: ProbeOptions {
                port: NonZero::new(self.probe_port),
                background: self.background_probes,
            },
        })
    }
}

/// The directories of PATH.
pub(in crate::cli) fn search_path() -> Vec<PathBuf> {
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
