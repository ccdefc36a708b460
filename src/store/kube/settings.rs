//! Owns what an operator says about Kubernetes: how to reach the API server, and who this node is. Connects to nobody.

use std::path::PathBuf;
use std::time::Duration;

use axum::http::Uri;
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
    /// The proxy is of a kind that we do not speak to.
    #[error(
        "the proxy for the Kubernetes API (proxy-url of the kubeconfig, or HTTPS_PROXY) is at {host:?}, not at http://HOST:PORT \
         or https://HOST:PORT: give it in one of these forms, or name the server in NO_PROXY"
    )]
    Proxy {
        /// Its scheme, if it has one, and its host; no user, no password.
        host: String,
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

/// The proxy as `kube` takes it: Go, and so flannel, takes one without a scheme for one of HTTP.
fn proxy(given: Uri) -> Result<Uri, KubeSettingsError> {
    let (scheme, host) = (given.scheme_str(), given.host().unwrap_or_default());
    let wrong = || KubeSettingsError::Proxy {
        host: scheme.map_or_else(|| host.to_owned(), |scheme| format!("{scheme}://{host}")),
    };
    match scheme {
        Some("http" | "https") => Ok(given),
        None => format!("http://{given}").parse().map_err(|_no_uri| wrong()),
        Some(_) => Err(wrong()),
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
        config.proxy_url = config.proxy_url.map(proxy).transpose()?;
        config.connect_timeout = Some(CONNECT);
        // A connection may die without a word. A watch has a limit of its own, which is shorter.
        config.read_timeout = Some(self.watch + MARGIN);
        // How long to wait before another attempt is ours to decide.
        config.default_retry = false;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tokio::io::AsyncReadExt as _;
    use tokio::net::TcpListener;

    use super::*;
    use crate::store::{KubeStore, LeaseStore as _};

    /// Settings with a kubeconfig for a server that is reached through `proxy` alone.
    fn behind(proxy: &str, dir: &std::path::Path) -> KubeSettings {
        let path = dir.join("kubeconfig");
        let cluster = format!(r#"{{"server": "https://192.0.2.9:6443", "proxy-url": {proxy:?}}}"#);
        let text = format!(
            r#"{{"clusters": [{{"name": "c", "cluster": {cluster}}}], "users": [{{"name": "u", "user": {{}}}}],
                "contexts": [{{"name": "x", "context": {{"cluster": "c", "user": "u"}}}}], "current-context": "x"}}"#
        );
        fs::write(&path, text).unwrap();
        KubeSettings {
            api_url: None,
            kubeconfig: Some(path),
            annotations: "flannel.alpha.coreos.com".parse().unwrap(),
            net_config: NET_CONFIG.into(),
            report_condition: false,
            identity: Identity::Node("n1".to_owned()),
            watch: WATCH,
        }
    }

    #[tokio::test]
    async fn server_is_asked_through_the_proxy_that_is_set() {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        for proxy in [format!("http://{addr}"), addr.to_string()] {
            let store = KubeStore::new(behind(&proxy, dir.path())).await.unwrap();
            let asked = async {
                let (mut socket, _) = listener.accept().await.unwrap();
                let mut request = [0; 32];
                socket.read_exact(&mut request).await.unwrap();
                String::from_utf8_lossy(&request).into_owned()
            };
            tokio::select! {
                request = asked => assert!(request.starts_with("CONNECT 192.0.2.9:6443 "), "{request}"),
                answer = store.public_ips() => unreachable!("{answer:?}"),
            }
        }
    }

    #[tokio::test]
    async fn proxy_of_another_kind_is_named_without_its_password() {
        let dir = tempfile::tempdir().unwrap();
        for (proxy, named) in [
            ("socks5://joe:hidden@192.0.2.7:1080", "socks5://192.0.2.7"),
            ("ftp://joe:hidden@192.0.2.7", "ftp://192.0.2.7"),
        ] {
            let settings = behind(proxy, dir.path());
            let error = KubeStore::new(settings).await.unwrap_err().to_string();
            let says = error.contains(named) && error.contains("HTTPS_PROXY");
            assert!(says && !error.contains("hidden"), "{error}");
        }
    }
}
