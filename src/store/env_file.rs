//! Owns `subnet.env`: the bytes the CNI plugin and others read, written atomically, and what is left of the run
//! before. Never decides what a previous subnet is used for. Specification section 4.

mod dotenv;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};

use crate::addr::{Mtu, OverlayPrefix};
use crate::file::{FileError, mode_of, read_bounded, replace};
use crate::lease::Subnets;
use dotenv::{NotAnAssignment, assignment};

/// The largest file read. A complete one takes about 200 bytes.
pub const MAX_ENV_LEN: usize = 64 * 1024;

const NETWORK: &str = "FLANNEL_NETWORK";
const SUBNET: &str = "FLANNEL_SUBNET";
const IPV6_NETWORK: &str = "FLANNEL_IPV6_NETWORK";
const IPV6_SUBNET: &str = "FLANNEL_IPV6_SUBNET";

/// What `subnet.env` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubnetEnv {
    /// The IPv4 network, if the family is enabled.
    pub network: Option<Ipv4Net>,
    /// The IPv6 network, if the family is enabled.
    pub ipv6_network: Option<Ipv6Net>,
    /// What this node leases.
    pub subnets: Subnets,
    /// What pods may send.
    pub mtu: Mtu,
    /// Whether the daemon masquerades, so that the CNI plugin must not.
    pub ip_masq: bool,
}

impl SubnetEnv {
    /// The content of the file.
    #[must_use]
    pub fn render(&self) -> String {
        let mut out = String::new();
        family(
            &mut out,
            (NETWORK, self.network),
            (SUBNET, self.subnets.v4()),
        );
        family(
            &mut out,
            (IPV6_NETWORK, self.ipv6_network),
            (IPV6_SUBNET, self.subnets.v6()),
        );
        // Writing to a string cannot fail.
        let _infallible = writeln!(
            out,
            "FLANNEL_MTU={}\nFLANNEL_IPMASQ={}",
            self.mtu, self.ip_masq
        );
        out
    }

    /// Replaces the file at `path` in one step, so that a reader sees the old content or the new, also after a
    /// power failure. Makes the directory, mode 0755. The file gets mode 0644 whatever the umask, or keeps the
    /// permission bits of the regular file it replaces.
    ///
    /// # Errors
    ///
    /// The step that failed. The old file is then still there.
    pub fn write(&self, path: &Path) -> Result<(), FileError> {
        replace(path, self.render().as_bytes(), mode_of(path))
    }
}

/// Writes one family's two lines. The subnet is written as its first usable address.
fn family<N: OverlayPrefix>(
    out: &mut String,
    (network_key, network): (&str, Option<N>),
    (subnet_key, subnet): (&str, Option<N>),
) {
    let gateway = |subnet: N| GatewayText(subnet.first_bits() + 1, N::BITS, subnet.len_bits());
    // Writing to a string cannot fail.
    if let Some(network) = network {
        let _infallible = writeln!(out, "{network_key}={network}");
    }
    if let Some(subnet) = subnet {
        let _infallible = writeln!(out, "{subnet_key}={}", gateway(subnet));
    }
}

struct GatewayText(u128, u8, u8);

impl std::fmt::Display for GatewayText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self(bits, width, len) = *self;
        match u32::try_from(bits) {
            Ok(v4) if width == 32 => write!(f, "{}/{len}", std::net::Ipv4Addr::from(v4)),
            _ => write!(f, "{}/{len}", std::net::Ipv6Addr::from(bits)),
        }
    }
}

/// What an earlier `subnet.env` says, as far as it can be read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PreviousEnv {
    /// `FLANNEL_NETWORK`, host bits masked off.
    pub networks: Vec<Ipv4Net>,
    /// `FLANNEL_SUBNET`, host bits masked off.
    pub subnets: Vec<Ipv4Net>,
    /// `FLANNEL_IPV6_NETWORK`, host bits masked off.
    pub ipv6_networks: Vec<Ipv6Net>,
    /// `FLANNEL_IPV6_SUBNET`, host bits masked off.
    pub ipv6_subnets: Vec<Ipv6Net>,
    /// What was skipped, worth a warning each.
    pub skipped: Vec<Skipped>,
}

/// A part of `subnet.env` that is not usable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Skipped {
    /// A line that is no assignment.
    #[error("line {line} is not KEY=VALUE")]
    Line {
        /// Counted from 1.
        line: usize,
    },
    /// An element of a value that is not a prefix.
    #[error("{key}: {element:?} is not a prefix like 10.1.74.0/24")]
    Element {
        /// The key.
        key: &'static str,
        /// The text.
        element: String,
    },
}

impl PreviousEnv {
    /// Reads the file at `path`. A missing file is an empty one.
    ///
    /// # Errors
    ///
    /// Anything but a regular file, one larger than [`MAX_ENV_LEN`], and what the system refuses.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        match read_bounded(path, MAX_ENV_LEN) {
            Ok(text) => Ok(Self::parse(&String::from_utf8_lossy(&text))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(FileError::new("read", path)(e)),
        }
    }

    /// Reads the content of a file by the rules of dotenv: `#` starts a comment, `export ` may precede a key,
    /// values may be quoted, `$KEY` and `${KEY}` stand for an earlier line's value unless in single quotes.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut env = Self::default();
        let values = variables(text, &mut env.skipped);
        let value = |key| values.get(key).map_or("", String::as_str);
        env.networks = prefixes(NETWORK, value(NETWORK), &mut env.skipped);
        env.subnets = prefixes(SUBNET, value(SUBNET), &mut env.skipped);
        env.ipv6_networks = prefixes(IPV6_NETWORK, value(IPV6_NETWORK), &mut env.skipped);
        env.ipv6_subnets = prefixes(IPV6_SUBNET, value(IPV6_SUBNET), &mut env.skipped);
        env
    }

    /// The subnets to ask for again; `None` unless each family names at most one, and some family one.
    #[must_use]
    pub fn previous(&self) -> Option<Subnets> {
        fn single<N: Copy>(list: &[N]) -> Option<N> {
            if let [one] = list { Some(*one) } else { None }
        }
        if self.subnets.len() > 1 || self.ipv6_subnets.len() > 1 {
            return None;
        }
        Subnets::new(single(&self.subnets), single(&self.ipv6_subnets))
    }
}

/// What the lines of a dotenv file assign, the last one of each key.
pub(crate) fn variables<'a>(
    text: &'a str,
    skipped: &mut Vec<Skipped>,
) -> BTreeMap<&'a str, String> {
    let mut values = BTreeMap::new();
    for (index, line) in text.lines().enumerate() {
        match assignment(line, &values) {
            Ok(None) => {}
            Ok(Some((key, value))) => {
                values.insert(key, value);
            }
            Err(NotAnAssignment) => skipped.push(Skipped::Line { line: index + 1 }),
        }
    }
    values
}

fn prefixes<N: OverlayPrefix + FromStr>(
    key: &'static str,
    value: &str,
    skipped: &mut Vec<Skipped>,
) -> Vec<N> {
    let mut nets = Vec::new();
    for element in value.split(',').filter(|element| !element.is_empty()) {
        match element
            .parse::<N>()
            .ok()
            .and_then(|net| N::from_bits(net.first_bits(), net.len_bits()))
        {
            Some(net) => nets.push(net),
            None => skipped.push(Skipped::Element {
                key,
                element: element.chars().take(64).collect(),
            }),
        }
    }
    nets
}

#[cfg(test)]
mod tests;
