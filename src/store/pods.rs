//! Owns what a store that knows pods says of one: its name, checked before anybody is asked, and where it is. Never asks
//! anybody.

use std::fmt;
use std::net::IpAddr;
use std::pin::Pin;
use std::str::FromStr;

use super::StoreError;

/// Where names without a namespace are looked for, as kubectl does.
const DEFAULT_NAMESPACE: &str = "default";

/// The longest namespace, a label of RFC 1123, and the longest name of a pod, a subdomain of it. In bytes.
const MAX_NAMESPACE_LEN: usize = 63;
const MAX_NAME_LEN: usize = 253;

/// A pod's name and its namespace's, with nothing in them that could be anything else.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PodName {
    namespace: String,
    name: String,
}

/// Why a text names no pod.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PodNameError {
    /// It is meant as an address, and is none.
    #[error("{0:?} is no address: give one like 198.18.1.2 or fd00::2")]
    Address(String),
    /// It is neither.
    #[error(
        "{0:?} is neither an address nor the name of a pod: give NAMESPACE/NAME, or NAME for one in default; names are \
         small letters, digits, - and ."
    )]
    Name(String),
}

impl PodName {
    /// Its namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Its name there.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl FromStr for PodName {
    type Err = PodNameError;

    fn from_str(text: &str) -> Result<Self, PodNameError> {
        let shown = || text.chars().take(MAX_NAME_LEN).collect::<String>();
        let of_address = |c: char| c.is_ascii_digit() || c == '.';
        if text.contains(':') || (!text.is_empty() && text.chars().all(of_address)) {
            return Err(PodNameError::Address(shown()));
        }
        let (namespace, name) = text.split_once('/').unwrap_or((DEFAULT_NAMESPACE, text));
        let fits = namespace.len() <= MAX_NAMESPACE_LEN && name.len() <= MAX_NAME_LEN;
        if !fits || !is_label(namespace) || !name.split('.').all(is_label) {
            return Err(PodNameError::Name(shown()));
        }
        Ok(Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    }
}

/// A label of RFC 1123, in small letters, as Kubernetes has it.
fn is_label(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    !text.is_empty() && text.chars().all(inner) && !text.starts_with('-') && !text.ends_with('-')
}

/// What a store says of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// The node it is on; none until it is known.
    pub node: Option<String>,
    /// Its addresses, the preferred one first; none before it has any, and after its end.
    pub addrs: Vec<IpAddr>,
    /// It has no network of its own: its addresses are its node's.
    pub shares_node: bool,
    /// What it does, in a few words: `Pending (ContainerCreating)`.
    pub phase: String,
}

/// Why nothing is known of a pod.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// The store knows no pods.
    #[error(
        "{0}: names of pods need a Kubernetes cluster (--kube-subnet-mgr), and this daemon's store is none: give addresses"
    )]
    NoCluster(PodName),
    /// There is none of that name.
    #[error(
        "there is no pod {0}: kubectl get pods -A -o wide lists them; its namespace goes in front, NAMESPACE/NAME"
    )]
    Missing(PodName),
    /// The store does not say.
    #[error("{name}: {source}; addresses are explained without asking anybody")]
    Store {
        /// Who was asked about.
        name: PodName,
        /// Why.
        source: StoreError,
    },
}

/// The answer to come.
pub type PodLookup = Pin<Box<dyn Future<Output = Result<Pod, PodError>> + Send>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_has_a_namespace_and_nothing_that_could_lead_elsewhere() {
        let parsed = |text: &str| text.parse::<PodName>().map(|name| name.to_string());
        assert_eq!(parsed("web-1").unwrap(), "default/web-1");
        assert_eq!(parsed("kube-system/a.b-2").unwrap(), "kube-system/a.b-2");
        assert_eq!(parsed("default/10.1").unwrap(), "default/10.1");
        let long = format!("{}/x", "n".repeat(64));
        for text in [
            "",
            "/",
            "a/",
            "/a",
            "a/b/c",
            "../nodes",
            "default/..",
            "default/a?x=1",
            "A",
            "-a",
            "a-",
            "a..b",
            "a b",
            "a%2fb",
            &long,
            &"x".repeat(254),
        ] {
            assert!(
                matches!(parsed(text), Err(PodNameError::Name(_))),
                "{text:?}: {:?}",
                parsed(text)
            );
        }
        for text in ["198.18.1.300", "198.18.1", "fd00::x", "1"] {
            assert!(
                matches!(parsed(text), Err(PodNameError::Address(_))),
                "{text}"
            );
        }
    }
}
