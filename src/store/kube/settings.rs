//! Owns what an operator says about Kubernetes: how to reach the API server, and who this node is. Connects to nobody.

use std::path::PathBuf;
use std::time::Duration;

use kube::Config;
use kube::config::{KubeConfigOptions, Kubeconfig};

use super::annotations::{Annotations, PrefixError};
use super::failure::causes;

/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(5);

/// The server is asked to end a watch after so long. One that says nothing for five seconds more is dead.
pub const WATCH: Duration = Duration::from_secs(120);

/// How much longer than a watch any other answer, or the beginning of one, may take.
const MARGIN: Duration = Duration::from_secs(10);

/// Where flannel looks for the network configuration.
pub const NET_CONFIG: &str = "/etc/kube-flannel/net-conf.json";

/// Which API server to use, and as which node; flannel's options of the same names.
#[derive(Debug, Clone)]
pub struct KubeSettings {
    /// `--kube-api-url`; overrides the server of a kubeconfig.
    pub api_url: Option<String>,
    /// `--kubeconfig-file`. Without it and a URL: what a pod is given.
    pub kubeconfig: Option<PathBuf>,
    /// `--kube-annotation-prefix`.
    pub annotations: Annotations,
    /// `--net-config-path`.
    pub net_config: PathBuf,
    /// `--set-node-network-unavailable`.
    pub report_condition: bool,
    /// Who we are.
    pub identity: Identity,
    /// How long a watch lasts; [`WATCH`].
    pub watch: Duration,
}

/// How the node's name is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// `NODE_NAME`.
    Node(String),
    /// `POD_NAMESPACE` and `POD_NAME`: the node that this pod runs on.
    Pod {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
}

/// Why settings cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KubeSettingsError {
    /// Nobody says which node this is.
    #[error(
        "env variables POD_NAME and POD_NAMESPACE must be set, or NODE_NAME: which node is this? Set them \
         from the pod's fields metadata.name and metadata.namespace, or spec.nodeName"
    )]
    NoIdentity,
    /// The prefix makes no annotation keys.
    #[error("--kube-annotation-prefix: {0}")]
    Prefix(#[from] PrefixError),
    /// The URL cannot be read.
    #[error("--kube-api-url {url:?} is not a URL: give one like https://192.0.2.1:6443")]
    Url {
        /// The text.
        url: String,
    },
    /// The kubeconfig cannot be used.
    #[error("--kubeconfig-file {}: {reason}", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// There is no service account here.
    #[error(
        "no service account of a pod is found here ({0}): run as a pod with its token mounted, or give \
         --kubeconfig-file or --kube-api-url"
    )]
    NoServiceAccount(String),
    /// The certificates or the credentials cannot be used.
    #[error("the credentials for the Kubernetes API cannot be used: {0}")]
    Credentials(String),
}

impl Identity {
    /// From the texts of the variables; empty ones do not count.
    ///
    /// # Errors
    ///
    /// [`KubeSettingsError::NoIdentity`].
    pub fn new(node: &str, pod_namespace: &str, pod: &str) -> Result<Self, KubeSettingsError> {
        if !node.is_empty() {
            return Ok(Self::Node(node.to_owned()));
        }
        if pod_namespace.is_empty() || pod.is_empty() {
            return Err(KubeSettingsError::NoIdentity);
        }
        Ok(Self::Pod {
            namespace: pod_namespace.to_owned(),
            name: pod.to_owned(),
        })
    }
}

impl KubeSettings {
    /// How to reach the API server.
    pub(super) async fn config(&self) -> Result<Config, KubeSettingsError> {
        let mut config = match (&self.kubeconfig, &self.api_url) {
            (Some(path), _) => {
                let wrong = |e: &dyn std::error::Error| KubeSettingsError::Kubeconfig {
                    path: path.clone(),
                    reason: causes(e),
                };
                let file = Kubeconfig::read_from(path).map_err(|e| wrong(&e))?;
                Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                    .await
                    .map_err(|e| wrong(&e))?
            }
            (None, Some(_)) => Config::new(Default::default()),
            (None, None) => {
                Config::incluster().map_err(|e| KubeSettingsError::NoServiceAccount(causes(&e)))?
            }
        };
        if let Some(url) = &self.api_url {
            config.cluster_url = match url.parse() {
                Ok(parsed) if url.starts_with("https://") || url.starts_with("http://") => parsed,
                _ => return Err(KubeSettingsError::Url { url: url.clone() }),
            };
        }
        config.connect_timeout = Some(CONNECT);
        // A connection may die without a word. A watch has a limit of its own, which is shorter.
        config.read_timeout = Some(self.watch + MARGIN);
        // How long to wait before another attempt is ours to decide.
        config.default_retry = false;
        Ok(config)
    }
}
