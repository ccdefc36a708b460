//! Owns the `Backend` object: one typed variant per backend. Never decides whether the kernel can do it.

use super::extension::{self, ExtensionBackend};
use super::{ConfigError, Object};
use crate::addr::Mtu;
use crate::config::Null;

/// The backends that can be chosen.
pub(super) const AVAILABLE: &[&str] = &[
    "udp",
    "vxlan",
    "host-gw",
    "ipip",
    "auto",
    "alloc",
    "extension",
];

/// The backends of flannel that cannot be chosen yet.
const UNAVAILABLE: &[&str] = &["wireguard", "ipsec", "tencent-vpc"];

/// Every backend type there is.
pub(super) fn known() -> Vec<&'static str> {
    [AVAILABLE, UNAVAILABLE].concat()
}

pub(super) const TYPE: &str = "Type";
const PORT: &str = "Port";
const MTU: &str = "MTU";
const SOURCE_PORT: &str = "SourcePort";
const SOURCE_CHECK: &str = "SourceCheck";
const AUTO: &str = "Auto";
const VNI: &str = "VNI";
const GBP: &str = "GBP";
const LEARNING: &str = "Learning";
const DIRECT_ROUTING: &str = "DirectRouting";

/// The keys of a `udp` backend.
const UDP_KEYS: &[&str] = &[TYPE, PORT, MTU, SOURCE_PORT, SOURCE_CHECK];

/// The keys of a `vxlan` backend. The last two mean something on Windows only, and nothing here.
const VXLAN_KEYS: &[&str] = &[
    TYPE,
    VNI,
    PORT,
    MTU,
    GBP,
    LEARNING,
    DIRECT_ROUTING,
    SOURCE_CHECK,
    AUTO,
    "MacPrefix",
    "Name",
];

/// The keys of an `ipip` backend.
const IPIP_KEYS: &[&str] = &[TYPE, DIRECT_ROUTING, SOURCE_CHECK];

/// The keys of a `host-gw` backend, and of `alloc`.
const HOST_GW_KEYS: &[&str] = &[TYPE];

/// How packets cross the underlay.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backend {
    /// Raw IP in UDP, by the data path of this program.
    Udp(UdpBackend),
    /// Ethernet in VXLAN, by the kernel's device.
    Vxlan(VxlanBackend),
    /// Plain routes through the peers, which are on the link of the external interface.
    HostGw,
    /// IPv4 in IPv4, by the kernel's device.
    Ipip(IpipBackend),
    /// None that we know of: a subnet is leased, and somebody else carries the packets.
    Alloc,
    /// Whatever commands of the operator's set up.
    Extension(ExtensionBackend),
}

/// Options of the `ipip` backend; specification section 8.4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpipBackend {
    /// Peers that are on a link of this node are reached by a plain route.
    pub direct_routing: bool,
    /// Which packets are accepted from the underlay; `None`: all.
    pub source_check: Option<SourceCheck>,
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

/// Options of the `vxlan` backend; specification section 8.2.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanBackend {
    /// The VXLAN network identifier, 24 bits, and the number in the device's name.
    pub vni: u32,
    /// The UDP port every node of the network receives on; never 0.
    pub port: u16,
    /// The MTU of the underlay, before the encap overhead is subtracted; `None`: that of the external
    /// interface.
    pub mtu: Option<Mtu>,
    /// Group Based Policy: the packet mark travels in the VXLAN header.
    pub gbp: bool,
    /// The device learns from what it receives which VTEP has which MAC address.
    pub learning: bool,
    /// Peers that are on a link of this node are reached by a plain route.
    pub direct_routing: bool,
    /// Which packets are accepted from the underlay; `None`: all.
    pub source_check: Option<SourceCheck>,
    /// Each peer that says what it can do is reached by the best way that is proven to work.
    pub auto: bool,
}

/// The port that Linux uses for VXLAN where none is given (`drivers/net/vxlan`, module parameter `udp_port`);
/// IANA's is 4789.
pub const VXLAN_PORT: u16 = 8472;

impl Default for VxlanBackend {
    fn default() -> Self {
        Self {
            vni: 1,
            port: VXLAN_PORT,
            mtu: None,
            gbp: false,
            learning: false,
            direct_routing: false,
            source_check: Some(SourceCheck::Strict),
            auto: false,
        }
    }
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
    /// The backend's name, as it is written in the configuration.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Udp(_) => "udp",
            Self::Vxlan(_) => "vxlan",
            Self::HostGw => "host-gw",
            Self::Ipip(_) => "ipip",
            Self::Alloc => "alloc",
            Self::Extension(_) => "extension",
        }
    }

    /// The keys that mean something to this backend.
    pub(super) const fn keys(&self) -> &'static [&'static str] {
        match self {
            Self::Udp(_) => UDP_KEYS,
            Self::Vxlan(_) => VXLAN_KEYS,
            Self::HostGw | Self::Alloc => HOST_GW_KEYS,
            Self::Ipip(_) => IPIP_KEYS,
            Self::Extension(_) => extension::KEYS,
        }
    }

    /// Reads a `Backend` object.
    pub(super) fn read(object: &Object) -> Result<Self, ConfigError> {
        let name: String = object.plain(TYPE, "a backend's name")?.unwrap_or_default();
        let name = name.to_lowercase();
        let auto = object.plain::<bool>(AUTO, "true or false")?;
        if auto == Some(true) && matches!(name.as_str(), "udp" | "host-gw" | "ipip") {
            // There is no way that both an unmodified peer and one without a proven route could fall back to.
            let expected = "false, or Type \"vxlan\"";
            return Err(object.refuse(AUTO, expected, "true").into());
        }
        match name.as_str() {
            "udp" => UdpBackend::read(object).map(Self::Udp),
            "vxlan" => VxlanBackend::read(object).map(Self::Vxlan),
            "auto" => VxlanBackend::read(object).map(|vxlan| {
                let auto = true;
                Self::Vxlan(VxlanBackend { auto, ..vxlan })
            }),
            "host-gw" => Ok(Self::HostGw),
            "ipip" => Ok(Self::Ipip(IpipBackend {
                direct_routing: object
                    .plain(DIRECT_ROUTING, "true or false")?
                    .unwrap_or_default(),
                source_check: source_check(object)?,
            })),
            "alloc" => Ok(Self::Alloc),
            "extension" => ExtensionBackend::read(object).map(Self::Extension),
            known if UNAVAILABLE.contains(&known) => Err(ConfigError::BackendUnavailable { name }),
            _ => Err(ConfigError::BackendUnknown {
                name: name.chars().take(48).collect(),
            }),
        }
    }
}

/// `SourceCheck` of the kernel's tunnels, which without it take everything.
fn source_check(object: &Object) -> Result<Option<SourceCheck>, ConfigError> {
    let given = object.text(
        SOURCE_CHECK,
        "\"strict\", \"loose\" or \"off\"",
        Null::Skipped,
        |text| match text {
            "strict" => Some(Some(SourceCheck::Strict)),
            "loose" => Some(Some(SourceCheck::Loose)),
            "off" => Some(None),
            _ => None,
        },
    )?;
    Ok(given.unwrap_or(Some(SourceCheck::default())))
}

/// A whole number that `accept` takes; `None` if the key is not there.
fn number<T>(
    object: &Object,
    key: &'static str,
    expected: &'static str,
    accept: impl FnOnce(i64) -> Option<T>,
) -> Result<Option<T>, ConfigError> {
    match object.plain::<i64>(key, expected)? {
        None => Ok(None),
        Some(given) => match accept(given) {
            Some(value) => Ok(Some(value)),
            None => Err(object.refuse(key, expected, &given.to_string()).into()),
        },
    }
}

/// `MTU`; what flannel's vxlan takes for "not given" is 0.
fn mtu(object: &Object) -> Result<Option<Mtu>, ConfigError> {
    let given = number(
        object,
        MTU,
        "a number of bytes from 68 to 65535",
        |given| match given {
            0 => Some(None),
            _ => u32::try_from(given).ok().and_then(Mtu::new).map(Some),
        },
    )?;
    Ok(given.flatten())
}

impl UdpBackend {
    fn read(object: &Object) -> Result<Self, ConfigError> {
        let defaults = Self::default();
        let port = number(object, PORT, "a UDP port from 1 to 65535", |given| {
            u16::try_from(given).ok().filter(|&port| port != 0)
        })?;
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
            port: port.unwrap_or(defaults.port),
            mtu: mtu(object)?,
            source_port,
            source_check,
        })
    }
}

impl VxlanBackend {
    fn read(object: &Object) -> Result<Self, ConfigError> {
        let defaults = Self::default();
        let flag = |key| object.plain::<bool>(key, "true or false");
        // The number is part of the device's name, which the kernel limits to 15 characters; `flannel.` and
        // `flannel-v6.` leave 7 and 4 of them, and 24 bits have up to 8 digits.
        let vni = number(
            object,
            VNI,
            "a VXLAN network identifier from 0 to 9999999",
            |given| u32::try_from(given).ok().filter(|&vni| vni <= 9_999_999),
        )?;
        let port = number(
            object,
            PORT,
            "a UDP port from 1 to 65535, or 0 for 8472",
            |given| u16::try_from(given).ok(),
        )?;
        Ok(Self {
            source_check: source_check(object)?,
            vni: vni.unwrap_or(defaults.vni),
            port: port.filter(|&port| port != 0).unwrap_or(defaults.port),
            mtu: mtu(object)?,
            gbp: flag(GBP)?.unwrap_or(defaults.gbp),
            learning: flag(LEARNING)?.unwrap_or(defaults.learning),
            direct_routing: flag(DIRECT_ROUTING)?.unwrap_or(defaults.direct_routing),
            auto: flag(AUTO)?.unwrap_or(defaults.auto),
        })
    }
}
