//! Owns the address arithmetic of a network: which subnets it is cut into, and from which to which they are
//! leased. Written once for both families. Never knows which subnets are taken.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};

use super::{ConfigError, Null, Object};
use crate::addr::OverlayPrefix;

/// The subnets of one family that nodes may lease: those of one length between two bounds.
///
/// The bounds lie inside the network, are aligned to the length, and the first is not above the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubnetPool<N> {
    network: N,
    first: N,
    last: N,
}

/// The keys of one family contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// The network is missing.
    #[error("please define {key}: the family is enabled but the key is missing or of length 0")]
    NoNetwork {
        /// `Network` or `IPv6Network`.
        key: &'static str,
    },
    /// The network cannot be cut into at least four subnets.
    #[error("{key} {network} is too small: the smallest useful network is a /{longest}")]
    NetworkTooSmall {
        /// `Network` or `IPv6Network`.
        key: &'static str,
        /// The network.
        network: String,
        /// The longest prefix that would do.
        longest: u8,
    },
    /// The subnet length does not fit the network.
    #[error(
        "{key} {given} does not fit {network}: use {shortest} to {longest}, so that at least four subnets fit"
    )]
    SubnetLen {
        /// `SubnetLen` or `IPv6SubnetLen`.
        key: &'static str,
        /// The value given.
        given: u64,
        /// The network.
        network: String,
        /// The shortest length that would do.
        shortest: u8,
        /// The longest length that would do.
        longest: u8,
    },
    /// A bound lies outside the network.
    #[error("{key} {bound} is not in the range of {network}")]
    OutsideNetwork {
        /// `SubnetMin` or one of its siblings.
        key: &'static str,
        /// The value given.
        bound: String,
        /// The network.
        network: String,
    },
    /// A bound is not the first address of a subnet.
    #[error("{key} {bound} is not on a subnet boundary of /{subnet_len}: use {aligned}")]
    Unaligned {
        /// `SubnetMin` or one of its siblings.
        key: &'static str,
        /// The value given.
        bound: String,
        /// The length of a subnet.
        subnet_len: u8,
        /// The boundary below.
        aligned: String,
    },
    /// The bounds are the wrong way round.
    #[error("{min_key} {min} is above {max_key} {max}: no subnet lies between them")]
    Reversed {
        /// `SubnetMin` or `IPv6SubnetMin`.
        min_key: &'static str,
        /// Its value, given or derived.
        min: String,
        /// `SubnetMax` or `IPv6SubnetMax`.
        max_key: &'static str,
        /// Its value, given or derived.
        max: String,
    },
}

impl<N: OverlayPrefix> SubnetPool<N> {
    /// The whole overlay network of the family.
    #[must_use]
    pub const fn network(&self) -> N {
        self.network
    }

    /// The prefix length of every subnet.
    #[must_use]
    pub fn subnet_len(&self) -> u8 {
        self.first.len_bits()
    }

    /// The subnet at `SubnetMin`.
    #[must_use]
    pub const fn first(&self) -> N {
        self.first
    }

    /// The subnet at `SubnetMax`, still part of the pool.
    #[must_use]
    pub const fn last(&self) -> N {
        self.last
    }

    /// Whether `subnet` could have come from this pool: the right length, and between the bounds.
    #[must_use]
    pub fn contains(&self, subnet: &N) -> bool {
        subnet.len_bits() == self.subnet_len()
            && (self.first.first_bits()..=self.last.first_bits()).contains(&subnet.first_bits())
    }
}

/// What differs between the families: names of keys, and limits of section 2.2.
pub(super) trait PoolRules: OverlayPrefix + FromStr {
    type Addr: FromStr + fmt::Display + Copy;
    const NETWORK: &'static str;
    const NETWORK_EXPECTED: &'static str;
    const SUBNET_LEN: &'static str;
    const SUBNET_MIN: &'static str;
    const SUBNET_MAX: &'static str;
    const ADDR_EXPECTED: &'static str;
    /// What `null` means for the bounds.
    const BOUND_NULL: Null;
    /// The longest network and the longest subnet accepted.
    const LONGEST_NETWORK: u8;
    const LONGEST_SUBNET: u8;
    /// The subnet length of networks that are at least two bits shorter.
    const USUAL_SUBNET: u8;

    fn addr_bits(addr: Self::Addr) -> u128;
    fn base(&self) -> Self::Addr;

    /// Whether the prefix can hold an overlay at all.
    fn usable(&self) -> bool {
        true
    }
}

impl PoolRules for Ipv4Net {
    type Addr = Ipv4Addr;
    const NETWORK: &'static str = "Network";
    const NETWORK_EXPECTED: &'static str = "an IPv4 network like \"10.5.0.0/16\"";
    const SUBNET_LEN: &'static str = "SubnetLen";
    const SUBNET_MIN: &'static str = "SubnetMin";
    const SUBNET_MAX: &'static str = "SubnetMax";
    const ADDR_EXPECTED: &'static str = "an IPv4 address like \"10.5.1.0\"";
    const BOUND_NULL: Null = Null::Refused;
    const LONGEST_NETWORK: u8 = 28;
    const LONGEST_SUBNET: u8 = 30;
    const USUAL_SUBNET: u8 = 24;

    fn addr_bits(addr: Ipv4Addr) -> u128 {
        u128::from(u32::from(addr))
    }

    fn base(&self) -> Ipv4Addr {
        self.network()
    }
}

impl PoolRules for Ipv6Net {
    type Addr = Ipv6Addr;
    const NETWORK: &'static str = "IPv6Network";
    const NETWORK_EXPECTED: &'static str = "an IPv6 network like \"fd00:5::/48\"";
    const SUBNET_LEN: &'static str = "IPv6SubnetLen";
    const SUBNET_MIN: &'static str = "IPv6SubnetMin";
    const SUBNET_MAX: &'static str = "IPv6SubnetMax";
    const ADDR_EXPECTED: &'static str = "an IPv6 address like \"fd00:5:0:1::\"";
    const BOUND_NULL: Null = Null::Unset;
    const LONGEST_NETWORK: u8 = 124;
    const LONGEST_SUBNET: u8 = 126;
    const USUAL_SUBNET: u8 = 64;

    fn addr_bits(addr: Ipv6Addr) -> u128 {
        addr.into()
    }

    fn base(&self) -> Ipv6Addr {
        self.network()
    }

    /// IPv4-mapped addresses are IPv4 to everybody who meets them.
    fn usable(&self) -> bool {
        self.network().to_ipv4_mapped().is_none()
    }
}

/// The keys of one family, decoded but not yet compared with each other.
pub(super) struct Draft<N> {
    network: Option<N>,
    subnet_len: u64,
    min: Option<u128>,
    max: Option<u128>,
}

impl<N: PoolRules> Draft<N> {
    /// Decodes the family's keys. A zero in any of them means "not given".
    pub(super) fn read(document: &Object) -> Result<Self, ConfigError> {
        let network = document
            .text(N::NETWORK, N::NETWORK_EXPECTED, Null::Refused, |text| {
                text.parse().ok().filter(N::usable)
            })?
            .and_then(|net| N::from_bits(net.first_bits(), net.len_bits()))
            .filter(|net| net.len_bits() > 0);
        let bound = |key| {
            let decode = |text: &str| text.parse().ok().map(N::addr_bits);
            let bits = document.text(key, N::ADDR_EXPECTED, N::BOUND_NULL, decode);
            bits.map(|bits| bits.filter(|&bits| bits != 0))
        };
        Ok(Self {
            network,
            subnet_len: document
                .plain(N::SUBNET_LEN, "a prefix length, a whole number")?
                .unwrap_or_default(),
            min: bound(N::SUBNET_MIN)?,
            max: bound(N::SUBNET_MAX)?,
        })
    }

    /// The pool; if its subnets are `assigned` by somebody else, the whole network stands for each of them.
    pub(super) fn pool(self, assigned: bool) -> Result<SubnetPool<N>, PoolError> {
        let network = self
            .network
            .ok_or(PoolError::NoNetwork { key: N::NETWORK })?;
        if assigned {
            return Ok(SubnetPool {
                network,
                first: network,
                last: network,
            });
        }
        self.validate(network)
    }

    /// Applies the checks and defaults of section 2.2.
    fn validate(self, network: N) -> Result<SubnetPool<N>, PoolError> {
        let len = subnet_len(network, self.subnet_len)?;
        // The first subnet of the network is left out unless asked for, as flannel always did.
        let size = 1u128 << (N::BITS - len);
        let min = self.min.unwrap_or(network.first_bits() + size);
        let max = self.max.unwrap_or(network.last_bits() - (size - 1));
        let first = bound(N::SUBNET_MIN, min, network, len)?;
        let last = bound(N::SUBNET_MAX, max, network, len)?;
        if first > last {
            return Err(PoolError::Reversed {
                min_key: N::SUBNET_MIN,
                min: first.base().to_string(),
                max_key: N::SUBNET_MAX,
                max: last.base().to_string(),
            });
        }
        Ok(SubnetPool {
            network,
            first,
            last,
        })
    }
}

/// The length of every subnet: as given, or flannel's default. At least four subnets fit.
fn subnet_len<N: PoolRules>(network: N, given: u64) -> Result<u8, PoolError> {
    let shortest = network.len_bits().saturating_add(2);
    if shortest > N::LONGEST_SUBNET {
        return Err(PoolError::NetworkTooSmall {
            key: N::NETWORK,
            network: network.to_string(),
            longest: N::LONGEST_NETWORK,
        });
    }
    if given == 0 {
        return Ok(shortest.max(N::USUAL_SUBNET));
    }
    u8::try_from(given)
        .ok()
        .filter(|len| (shortest..=N::LONGEST_SUBNET).contains(len))
        .ok_or_else(|| PoolError::SubnetLen {
            key: N::SUBNET_LEN,
            given,
            network: network.to_string(),
            shortest,
            longest: N::LONGEST_SUBNET,
        })
}

/// The subnet that starts at `bits`, which must lie in the network.
fn bound<N: PoolRules>(key: &'static str, bits: u128, network: N, len: u8) -> Result<N, PoolError> {
    let host = N::from_bits(bits, N::BITS);
    let subnet = N::from_bits(bits, len);
    match (host, subnet) {
        (Some(host), Some(subnet)) if network.holds(&host) => {
            if host.first_bits() == subnet.first_bits() {
                return Ok(subnet);
            }
            Err(PoolError::Unaligned {
                key,
                bound: host.base().to_string(),
                subnet_len: len,
                aligned: subnet.base().to_string(),
            })
        }
        (host, _) => Err(PoolError::OutsideNetwork {
            key,
            bound: host.map_or_else(String::new, |host| host.base().to_string()),
            network: network.to_string(),
        }),
    }
}
