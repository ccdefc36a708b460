//! Owns the `Backend` object: one typed variant per backend. Never decides whether the kernel can do it.

use super::{ConfigError, Object};
use crate::addr::Mtu;
use crate::config::Null;

/// The backends that can be chosen.
pub(super) const AVAILABLE: &[&str] = &["udp"];

/// The backends of flannel that cannot be chosen yet.
const UNAVAILABLE: &[&str] = &[
    "vxlan",
    "host-gw",
    "ipip",
    "wireguard",
    "ipsec",
    "alloc",
    "tencent-vpc",
    "extension",
];

/// Every backend type there is.
pub(super) fn known() -> Vec<&'static str> {
    [AVAILABLE, UNAVAILABLE].concat()
}

const TYPE: &str = "Type";
const PORT: &str = "Port";
const MTU: &str = "MTU";
const SOURCE_PORT: &str = "SourcePort";
const SOURCE_CHECK: &str = "SourceCheck";

/// The keys of a `udp` backend.
pub(super) const UDP_KEYS: &[&str] = &[TYPE, PORT, MTU, SOURCE_PORT, SOURCE_CHECK];

/// How packets cross the underlay.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backend {
    /// Raw IP in UDP, by the data path of this program.
    Udp(UdpBackend),
}

/// Options of the `udp` backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UdpBackend {
    /// The UDP port every node of the network receives on; never 0.
    pub port: u16,
    /// The MTU of the underlay, before the encap overhead is subtracted; `None`: that of the external
    /// interface.
    pub mtu: Option<Mtu>,
    /// Which port packets are sent from.
    pub source_port: SourcePort,
    /// Which packets are accepted from the underlay.
    pub source_check: SourceCheck,
}

/// `SourcePort`: which UDP port packets are sent from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SourcePort {
    /// Varied by inner flow, so that receivers and equal-cost paths can spread the load.
    #[default]
    Spread,
    /// Always the receiving port, like flannel, for firewalls that match on it.
    Fixed,
}

/// `SourceCheck`: which packets are accepted from the underlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SourceCheck {
    /// The outer source must be a peer's public IP and the inner source must lie in its lease.
    #[default]
    Strict,
    /// The inner source must lie in some lease; for peers behind NAT.
    Loose,
}

impl Default for UdpBackend {
    fn default() -> Self {
        Self {
            port: 8285,
            mtu: None,
            source_port: SourcePort::default(),
            source_check: SourceCheck::default(),
        }
    }
}

impl Backend {
    /// Reads a `Backend` object.
    pub(super) fn read(object: &Object) -> Result<Self, ConfigError> {
        let name: String = object.plain(TYPE, "a backend's name")?.unwrap_or_default();
        let name = name.to_lowercase();
        match name.as_str() {
            "udp" => UdpBackend::read(object).map(Self::Udp),
            known if UNAVAILABLE.contains(&known) => Err(ConfigError::BackendUnavailable { name }),
            _ => Err(ConfigError::BackendUnknown {
                name: name.chars().take(48).collect(),
            }),
        }
    }
}

impl UdpBackend {
    fn read(object: &Object) -> Result<Self, ConfigError> {
        const PORT_RANGE: &str = "a UDP port from 1 to 65535";
        const MTU_RANGE: &str = "a number of bytes from 68 to 65535";
        let defaults = Self::default();
        let port = match object.plain::<i64>(PORT, PORT_RANGE)? {
            None => defaults.port,
            Some(given) => u16::try_from(given)
                .ok()
                .filter(|&port| port != 0)
                .ok_or_else(|| object.refuse(PORT, PORT_RANGE, &given.to_string()))?,
        };
        let mtu = match object.plain::<i64>(MTU, MTU_RANGE)? {
            // What flannel's vxlan takes for "not given".
            None | Some(0) => None,
            Some(given) => {
                let mtu = u32::try_from(given).ok().and_then(Mtu::new);
                Some(mtu.ok_or_else(|| object.refuse(MTU, MTU_RANGE, &given.to_string()))?)
            }
        };
        let source_port = object
            .text(
                SOURCE_PORT,
                "\"spread\" or \"fixed\"",
                Null::Skipped,
                |text| match text {
                    "spread" => Some(SourcePort::Spread),
                    "fixed" => Some(SourcePort::Fixed),
                    _ => None,
                },
            )?
            .unwrap_or_default();
        let source_check = object
            .text(
                SOURCE_CHECK,
                "\"strict\" or \"loose\"",
                Null::Skipped,
                |text| match text {
                    "strict" => Some(SourceCheck::Strict),
                    "loose" => Some(SourceCheck::Loose),
                    _ => None,
                },
            )?
            .unwrap_or_default();
        Ok(Self {
            port,
            mtu,
            source_port,
            source_check,
        })
    }
}
