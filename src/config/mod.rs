//! Owns the network configuration: from the bytes of `net-conf.json` (the `config` key of a store) to a
//! complete [`NetworkConfig`]. Never does I/O, never logs: what deserves a warning is returned.

mod backend;
mod extension;
mod go_json;
mod pool;

use ipnet::{Ipv4Net, Ipv6Net};

pub use backend::{
    Backend, IpipBackend, SourceCheck, SourcePort, UdpBackend, VXLAN_PORT, VxlanBackend,
};
pub use extension::{Argv, ExtensionBackend};
pub use go_json::FieldError;
pub(crate) use go_json::{Null, Object};
pub use pool::{PoolError, SubnetPool};

/// The largest document read. A complete one takes a few hundred bytes.
pub const MAX_CONFIG_LEN: usize = 64 * 1024;

const ENABLE_IPV4: &str = "EnableIPv4";
const ENABLE_IPV6: &str = "EnableIPv6";
const ENABLE_NFTABLES: &str = "EnableNFTables";
const BACKEND: &str = "Backend";

const KEYS: [&str; 12] = [
    ENABLE_IPV4,
    ENABLE_IPV6,
    ENABLE_NFTABLES,
    BACKEND,
    "Network",
    "IPv6Network",
    "SubnetMin",
    "SubnetMax",
    "IPv6SubnetMin",
    "IPv6SubnetMax",
    "SubnetLen",
    "IPv6SubnetLen",
];

/// A validated network configuration; flannel specification section 2.
///
/// At least one family is enabled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Where IPv4 subnets come from; `None` when `EnableIPv4` is false.
    pub ipv4: Option<SubnetPool<Ipv4Net>>,
    /// Where IPv6 subnets come from; `None` unless `EnableIPv6` is true.
    pub ipv6: Option<SubnetPool<Ipv6Net>>,
    /// Use nftables, not iptables.
    pub enable_nftables: bool,
    /// How packets cross the underlay.
    pub backend: Backend,
    /// There is no `Backend` key, so [`Backend`] is flannel's built-in `udp`. Worth a loud warning: flannel's
    /// own documentation claims `vxlan`.
    pub backend_defaulted: bool,
    /// Keys nobody knows, as written; ignored like flannel does, but usually a typing error worth a warning.
    pub unknown_keys: Vec<String>,
}

/// Why a document is not a network configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The document is larger than [`MAX_CONFIG_LEN`].
    #[error("the network configuration has {len} bytes; at most {MAX_CONFIG_LEN} are read")]
    TooLarge {
        /// Bytes of the document.
        len: usize,
    },
    /// The document is not one JSON object.
    #[error("the network configuration is not one JSON object: {reason}")]
    Syntax {
        /// What the JSON parser says, with line and column.
        reason: String,
    },
    /// A key has a value of the wrong type or text.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// Neither family is enabled.
    #[error("EnableIPv4 and EnableIPv6 are both false: set at least one of them to true")]
    NoFamily,
    /// The addresses of one family contradict each other.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// `Backend.Type` names a backend of flannel that is not implemented.
    #[error("Backend.Type {name:?} is not available yet: use {}", backend::AVAILABLE.join(", "))]
    BackendUnavailable {
        /// The type, lower-cased.
        name: String,
    },
    /// The IPv6 device's name would be too long.
    #[error(
        "Backend.VNI {vni} has no room in the name of the device flannel-v6.{vni}: with EnableIPv6 use one from 0 to 9999"
    )]
    VniTooLong {
        /// The number given.
        vni: u32,
    },
    /// The backend carries IPv4 alone.
    #[error(
        "EnableIPv6 is true, and Backend.Type \"{backend}\" carries IPv4 only: set EnableIPv6 to false, or use udp, vxlan or host-gw"
    )]
    Ipv4Only {
        /// The backend.
        backend: &'static str,
    },
    /// `Backend.Type` names no backend, or is missing from a `Backend` that is there.
    #[error("unknown backend type {name:?} in Backend.Type: use one of {}", backend::known().join(", "))]
    BackendUnknown {
        /// The type, lower-cased; empty if missing.
        name: String,
    },
}

impl NetworkConfig {
    /// Parses and validates a document, with the defaults and derived values of section 2.2.
    ///
    /// # Errors
    ///
    /// The first key that is wrong, by name.
    pub fn parse(text: &[u8]) -> Result<Self, ConfigError> {
        Self::read(text, false)
    }

    /// Likewise for a network whose subnets somebody else assigns: whatever lies in the network, whatever its
    /// length. The keys about subnets are of no account.
    ///
    /// # Errors
    ///
    /// As [`parse`](Self::parse).
    pub fn parse_assigned(text: &[u8]) -> Result<Self, ConfigError> {
        Self::read(text, true)
    }

    fn read(text: &[u8], assigned: bool) -> Result<Self, ConfigError> {
        if text.len() > MAX_CONFIG_LEN {
            return Err(ConfigError::TooLarge { len: text.len() });
        }
        let document = object(text, "")?;
        let flag = |key| document.plain::<bool>(key, "true or false");
        let ipv4 = pool::Draft::<Ipv4Net>::read(&document)?;
        let ipv6 = pool::Draft::<Ipv6Net>::read(&document)?;
        let ipv4 = flag(ENABLE_IPV4)?
            .unwrap_or(true)
            .then(|| ipv4.pool(assigned))
            .transpose()?;
        let ipv6 = flag(ENABLE_IPV6)?
            .unwrap_or(false)
            .then(|| ipv6.pool(assigned))
            .transpose()?;
        if ipv4.is_none() && ipv6.is_none() {
            return Err(ConfigError::NoFamily);
        }

        let mut unknown_keys = document.unknown(&KEYS);
        let (backend, backend_defaulted) = match document.values(BACKEND).last() {
            None => (Backend::Udp(UdpBackend::default()), true),
            // An object without a type, as far as flannel is concerned.
            Some(raw) if raw.get() == "null" => {
                return Err(ConfigError::BackendUnknown {
                    name: String::new(),
                });
            }
            Some(raw) => {
                let object = object(raw.get().as_bytes(), "Backend.")?;
                let backend = Backend::read(&object)?;
                unknown_keys.extend(object.unknown(backend.keys()));
                (backend, false)
            }
        };
        if let (Backend::Vxlan(vxlan), Some(_)) = (&backend, &ipv6)
            && vxlan.vni > 9999
        {
            return Err(ConfigError::VniTooLong { vni: vxlan.vni });
        }
        if let (Backend::Ipip(_), Some(_)) = (&backend, &ipv6) {
            let backend = backend.name();
            return Err(ConfigError::Ipv4Only { backend });
        }
        Ok(Self {
            ipv4,
            ipv6,
            enable_nftables: flag(ENABLE_NFTABLES)?.unwrap_or(false),
            backend,
            backend_defaulted,
            unknown_keys,
        })
    }
}

fn object(text: &[u8], path: &'static str) -> Result<Object, ConfigError> {
    Object::parse(text, path).map_err(|e| ConfigError::Syntax {
        reason: format!("{path}{e}"),
    })
}

#[cfg(test)]
mod tests;
