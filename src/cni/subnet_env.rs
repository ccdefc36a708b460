//! Owns what the plugin takes from `subnet.env`: the original's rules, specification section 12.3, which know no
//! quotes and no `export`. Never does I/O.

use ipnet::{Ipv4Net, Ipv6Net};
use std::str::FromStr;

/// What `subnet.env` says about this node's pods. At least one network and one subnet.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodEnv {
    /// IPv4 networks, host bits masked off, each once.
    pub networks: Vec<Ipv4Net>,
    /// Likewise for IPv6.
    pub ipv6_networks: Vec<Ipv6Net>,
    /// The node's IPv4 subnet, host bits masked off.
    pub subnet: Option<Ipv4Net>,
    /// Likewise for IPv6.
    pub ipv6_subnet: Option<Ipv6Net>,
    /// What pods may send, in bytes.
    pub mtu: u32,
    /// Whether the daemon masquerades, so that the delegate must not.
    pub ip_masq: bool,
}

/// Why a text is not a `subnet.env`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PodEnvError {
    /// A key without a value.
    #[error("line {line}: {key} has no value: write {key}=VALUE, or let the daemon write the file")]
    NoValue {
        /// Counted from 1.
        line: usize,
        /// The key.
        key: &'static str,
    },
    /// A value that is not what its key takes.
    #[error("line {line}: {key}: expected {expected}, found {found:?}")]
    Value {
        /// Counted from 1.
        line: usize,
        /// The key.
        key: &'static str,
        /// What the key takes.
        expected: &'static str,
        /// The start of the text.
        found: String,
    },
    /// Keys that have to be there.
    #[error("is missing {}", .0.join(", "))]
    Missing(Vec<&'static str>),
}

const NETWORK: &str = "FLANNEL_NETWORK";
const IPV6_NETWORK: &str = "FLANNEL_IPV6_NETWORK";
const SUBNET: &str = "FLANNEL_SUBNET";
const IPV6_SUBNET: &str = "FLANNEL_IPV6_SUBNET";
const MTU: &str = "FLANNEL_MTU";
const IP_MASQ: &str = "FLANNEL_IPMASQ";
const KEYS: [&str; 6] = [NETWORK, IPV6_NETWORK, SUBNET, IPV6_SUBNET, MTU, IP_MASQ];

const V4: &str = "an IPv4 prefix like 10.1.17.0/24";
const V6: &str = "an IPv6 prefix like fd00:1::/64";

impl PodEnv {
    /// Reads the content of a file. Unknown keys and other lines are ignored; a repeated key counts last.
    ///
    /// # Errors
    ///
    /// The first line that is wrong, or all the keys that are missing.
    pub fn parse(text: &str) -> Result<Self, PodEnvError> {
        let mut env = Self::default();
        let (mut mtu, mut ip_masq) = (None, None);
        for (index, text) in text.lines().enumerate() {
            let (name, value) = match text.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (text, None),
            };
            let Some(key) = KEYS.into_iter().find(|key| *key == name) else {
                continue;
            };
            let number = index + 1;
            let value = value.ok_or(PodEnvError::NoValue { line: number, key })?;
            let line = Line { number, key, value };
            match key {
                NETWORK => env.networks = line.prefixes(V4, Ipv4Net::trunc)?,
                IPV6_NETWORK => env.ipv6_networks = line.prefixes(V6, Ipv6Net::trunc)?,
                SUBNET => env.subnet = Some(line.parse::<Ipv4Net>(value, V4)?.trunc()),
                IPV6_SUBNET => env.ipv6_subnet = Some(line.parse::<Ipv6Net>(value, V6)?.trunc()),
                MTU => mtu = Some(line.parse(value, "a number of bytes")?),
                _ => ip_masq = Some(value == "true"),
            }
        }
        let mut missing = Vec::new();
        if env.networks.is_empty() && env.ipv6_networks.is_empty() {
            missing.extend([NETWORK, IPV6_NETWORK]);
        }
        if env.subnet.is_none() && env.ipv6_subnet.is_none() {
            missing.extend([SUBNET, IPV6_SUBNET]);
        }
        missing.extend(mtu.is_none().then_some(MTU));
        missing.extend(ip_masq.is_none().then_some(IP_MASQ));
        match (mtu, ip_masq) {
            (Some(mtu), Some(ip_masq)) if missing.is_empty() => Ok(Self {
                mtu,
                ip_masq,
                ..env
            }),
            _ => Err(PodEnvError::Missing(missing)),
        }
    }
}

/// One assignment to a known key.
struct Line<'a> {
    number: usize,
    key: &'static str,
    value: &'a str,
}

impl Line<'_> {
    fn parse<T: FromStr>(&self, text: &str, expected: &'static str) -> Result<T, PodEnvError> {
        text.parse().map_err(|_any| PodEnvError::Value {
            line: self.number,
            key: self.key,
            expected,
            found: text.chars().take(64).collect(),
        })
    }

    fn prefixes<N: FromStr + PartialEq>(
        &self,
        expected: &'static str,
        trunc: fn(&N) -> N,
    ) -> Result<Vec<N>, PodEnvError> {
        let mut nets = Vec::new();
        for element in self.value.split(',') {
            let net = trunc(&self.parse(element, expected)?);
            if !nets.contains(&net) {
                nets.push(net);
            }
        }
        Ok(nets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_daemon_writes_is_read_with_host_bits_masked_off() {
        let env = PodEnv::parse(
            "FLANNEL_NETWORK=10.244.0.0/16,10.245.0.0/16,10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\n\
             FLANNEL_IPV6_NETWORK=2001:db8:42::/56\nFLANNEL_IPV6_SUBNET=2001:db8:42:1::1/64\n\n\
             COLOUR=red\nFLANNEL_MTU=1450\r\nFLANNEL_IPMASQ=yes\n",
        )
        .unwrap();
        let expected = PodEnv {
            networks: vec![
                "10.244.0.0/16".parse().unwrap(),
                "10.245.0.0/16".parse().unwrap(),
            ],
            ipv6_networks: vec!["2001:db8:42::/56".parse().unwrap()],
            subnet: Some("10.244.1.0/24".parse().unwrap()),
            ipv6_subnet: Some("2001:db8:42:1::/64".parse().unwrap()),
            mtu: 1450,
            ip_masq: false,
        };
        assert_eq!(env, expected);
    }

    #[test]
    fn a_key_without_a_value_is_named_with_its_line() {
        let error = PodEnv::parse("FLANNEL_IPMASQ=true\nFLANNEL_MTU\n").unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("line 2: FLANNEL_MTU has no value"),
            "{error}"
        );
    }

    #[test]
    fn missing_keys_are_listed_as_the_original_lists_them() {
        for (text, expected) in [
            (
                "",
                "is missing FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET, FLANNEL_MTU, FLANNEL_IPMASQ",
            ),
            (
                "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_IPV6_SUBNET=fd00::/64\nexport FLANNEL_MTU=1\n",
                "is missing FLANNEL_MTU, FLANNEL_IPMASQ",
            ),
        ] {
            assert_eq!(PodEnv::parse(text).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn wrong_values_are_named() {
        for (text, key) in [
            ("FLANNEL_NETWORK=10.1.0.0/16,", "FLANNEL_NETWORK"),
            ("FLANNEL_NETWORK=fd00::/16", "FLANNEL_NETWORK"),
            ("FLANNEL_IPV6_NETWORK=10.1.0.0/16", "FLANNEL_IPV6_NETWORK"),
            ("FLANNEL_SUBNET=\"10.1.0.0/16\"", "FLANNEL_SUBNET"),
            ("FLANNEL_IPV6_SUBNET=", "FLANNEL_IPV6_SUBNET"),
            ("FLANNEL_MTU=-1", "FLANNEL_MTU"),
            ("FLANNEL_MTU=4294967296", "FLANNEL_MTU"),
        ] {
            let error = PodEnv::parse(text).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("line 1: {key}: expected")),
                "{error}"
            );
        }
    }
}
